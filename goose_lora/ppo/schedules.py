"""Learning rates of policy and critic over a run, each with a schedule of its own."""

from collections.abc import Callable
from typing import cast

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from goose_lora.errors import UserError
from goose_lora.ppo.config import PPOConfig

Factor = Callable[[int], float]


def by_settings(args: PPOConfig, optimizer: torch.optim.Optimizer, training_steps: int) -> LambdaLR:
    """Return the scheduler of a run whose policy and critic go by different schedules."""
    # The policy's schedule begins after the critic's warm-up.
    still = args.critic_warmup_steps
    moving = training_steps - still
    options = _options(args)
    policy = factor(
        args.lr_scheduler_type,
        warmup_steps=args.get_warmup_steps(moving),
        training_steps=moving,
        learning_rate=args.learning_rate,
        options=options,
    )

    # Another schedule has other options; and constant, in transformers, knows no warm-up.
    name = args.value_lr_scheduler_type or args.lr_scheduler_type
    own_options = options if name == args.lr_scheduler_type else None
    if name == "constant":
        name = "constant_with_warmup"
    critic = factor(
        name,
        warmup_steps=args.value_warmup_steps,
        training_steps=training_steps,
        learning_rate=args.critic_learning_rate,
        options=own_options,
    )
    return policy_and_critic(optimizer, policy, critic, still_steps=still)


def _options(args: PPOConfig) -> dict | None:
    """Return the options of the library's schedule, which its settings also take as text."""
    return cast("dict | None", args.lr_scheduler_kwargs)


def policy_and_critic(
    optimizer: torch.optim.Optimizer, policy: Factor, critic: Factor, *, still_steps: int
) -> LambdaLR:
    """Return one scheduler for the optimizer's two groups.

    The policy stands still for the first ``still_steps``, and its schedule begins then.
    """

    def of_policy(step: int) -> float:
        if step < still_steps:
            return 0.0
        return policy(step - still_steps)

    return LambdaLR(optimizer, [of_policy, critic])


def factor(
    name: str,
    *,
    warmup_steps: int,
    training_steps: int,
    learning_rate: float = 1.0,
    options: dict | None = None,
) -> Factor:
    """Return what the schedule ``name`` of transformers multiplies ``learning_rate`` by.

    It is a function of the optimizer step. The rate itself matters to schedules that end at a rate
    which is given as such, as ``min_lr``.

    Raises:
        ValueError: an unknown name.
        UserError: one that does not follow from the step alone (reduce_lr_on_plateau).
    """
    # A scheduler is made for an optimizer; this one is only asked for its function.
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
    scheduler = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=training_steps,
        scheduler_specific_kwargs=options,
    )
    # Only a function of the step can be put beside another in one scheduler.
    if not isinstance(scheduler, LambdaLR):
        raise UserError(
            f"lr_scheduler_type {name} does not follow from the step alone, so that policy and critic cannot"
            " each have one. Use linear or cosine."
        )
    return scheduler.lr_lambdas[0]  # type: ignore[return-value]
