"""Learning rates of policy and critic over a run, each with a schedule of its own."""

from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

Factor = Callable[[int], float]


def policy_and_critic(optimizer: torch.optim.Optimizer, policy: Factor, critic: Factor, *, still_steps: int) -> LambdaLR:
    """One scheduler for the optimizer's two groups; the policy stands still for the first ``still_steps``, and its schedule begins then."""
    return LambdaLR(optimizer, [lambda step: 0.0 if step < still_steps else policy(step - still_steps), critic])


def factor(name: str, *, warmup_steps: int, training_steps: int, options: dict | None = None) -> Factor:
    """What the schedule ``name`` of transformers multiplies the learning rate by, as a function of the optimizer step.

    Raises:
        ValueError: an unknown name, or one that does not follow from the step alone (reduce_lr_on_plateau).
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=training_steps, scheduler_specific_kwargs=options
    )
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"lr_scheduler_type {name} does not follow from the step alone, so that policy and critic cannot each have one. Use linear or cosine."
        )
    return scheduler.lr_lambdas[0]  # type: ignore[return-value]
