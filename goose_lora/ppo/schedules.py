"""Learning rates of policy and critic over a run, each with a schedule of its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from goose_lora.errors import UserError
from goose_lora.ppo.config import PPOConfig

Factor = Callable[[int], float]


def by_settings(args: PPOConfig, optimizer: torch.optim.Optimizer, training_steps: int) -> LambdaLR:
    """The scheduler of a run of ``training_steps`` whose policy and critic go by different
    schedules."""
    still = args.critic_warmup_rollouts * args.steps_per_rollout
    moving = training_steps - still
    options: Any = args.lr_scheduler_kwargs
    rate = args.learning_rate
    policy = factor(
        args.lr_scheduler_type,
        warmup_steps=args.get_warmup_steps(moving),
        training_steps=moving,
        learning_rate=rate,
        options=options,
    )
    name = args.value_lr_scheduler_type or args.lr_scheduler_type
    own = options if name == args.lr_scheduler_type else None  # another schedule has other options
    if name == "constant":  # which in transformers knows no warm-up
        name = "constant_with_warmup"
    steps = {"warmup_steps": args.value_warmup_steps, "training_steps": training_steps}
    return policy_and_critic(
        optimizer,
        policy,
        factor(name, **steps, learning_rate=args.critic_learning_rate, options=own),
        still_steps=still,
    )


def policy_and_critic(
    optimizer: torch.optim.Optimizer, policy: Factor, critic: Factor, *, still_steps: int
) -> LambdaLR:
    """One scheduler for the optimizer's two groups; the policy stands still for the first
    ``still_steps``, and its schedule begins then."""
    return LambdaLR(
        optimizer, [lambda step: 0.0 if step < still_steps else policy(step - still_steps), critic]
    )


def factor(
    name: str,
    *,
    warmup_steps: int,
    training_steps: int,
    learning_rate: float = 1.0,
    options: dict | None = None,
) -> Factor:
    """What the schedule ``name`` of transformers multiplies ``learning_rate`` by, as a function of
    the optimizer step.

    The rate itself matters to schedules that end at a rate which is given as such, as ``min_lr``.

    Raises:
        ValueError: an unknown name, or one that does not follow from the step alone
            (reduce_lr_on_plateau).
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
    scheduler = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=training_steps,
        scheduler_specific_kwargs=options,
    )
    if not isinstance(scheduler, LambdaLR):
        raise UserError(
            f"lr_scheduler_type {name} does not follow from the step alone, so that policy and critic cannot"
            " each have one. Use linear or cosine."
        )
    return scheduler.lr_lambdas[0]  # type: ignore[return-value]
