"""Learning rates of policy and critic, step by step, against numbers worked out by hand; in runs
too, resumed ones among them."""

import math

import pytest
import torch
from tiny_runs import assert_same_weights, config, trainer
from transformers import TrainerCallback

from goose_lora.ppo.schedules import factor, policy_and_critic


class Rates(TrainerCallback):
    """The learning rates of the groups that each optimizer step was made with, or of the one
    group."""

    def __init__(self):
        self.used = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.used.append([group["lr"] for group in optimizer.param_groups])


def rates(folder, **changes):
    watch = Rates()
    ppo = trainer(folder, callbacks=[watch], **{"num_rollouts": 2, "learning_rate": 0.01} | changes)
    ppo.train()
    policy, critic = zip(*watch.used, strict=True)
    return list(policy), list(critic), ppo


def approx(numbers):
    return pytest.approx(numbers, rel=1e-9, abs=1e-15)


def linear(step, warmup, total):
    return step / warmup if step < warmup else (total - step) / (total - warmup)


def cosine(step, warmup, total, floor=0.0):
    return (
        step / warmup
        if step < warmup
        else floor + (1 - floor) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
    )


def test_each_group_goes_by_its_own_factor_and_the_policy_begins_after_it_stood_still():
    optimizer = torch.optim.SGD(
        [{"params": [torch.zeros(1)], "lr": 2.0}, {"params": [torch.zeros(1)], "lr": 3.0}]
    )
    scheduler = policy_and_critic(
        optimizer, lambda step: 1 / (1 + step), lambda step: 1.0 + step, still_steps=2
    )
    seen = []
    for _ in range(5):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert seen == [[0, 3], [0, 6], [2, 9], [1, 12], [approx(2 / 3), 15]]


@pytest.mark.parametrize(("name", "by_hand"), [("linear", linear), ("cosine", cosine)])
def test_a_factor_is_that_of_the_schedules_definition(name, by_hand):
    found = factor(name, warmup_steps=3, training_steps=11)
    assert [found(step) for step in range(11)] == approx([by_hand(step, 3, 11) for step in range(11)])


def test_a_floor_given_as_a_learning_rate_is_a_part_of_the_groups_own():
    found = factor(
        "cosine_with_min_lr", warmup_steps=0, training_steps=10, learning_rate=0.01, options={"min_lr": 0.001}
    )
    assert [found(step) for step in range(11)] == approx(
        [cosine(step, 0, 10, floor=0.1) for step in range(11)]
    )


def test_a_schedule_that_does_not_follow_from_the_step_is_refused():
    with pytest.raises(ValueError, match="reduce_lr_on_plateau does not follow from the step alone"):
        factor("reduce_lr_on_plateau", warmup_steps=0, training_steps=10)


def test_policy_and_critic_follow_schedules_of_their_own_in_a_run(tmp_path):
    settings = {
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "value_lr_scheduler_type": "cosine",
        "value_warmup_steps": 3,
    }
    policy, critic, _ = rates(tmp_path, value_learning_rate=0.1, **settings)
    assert policy == approx([0.01 * linear(step, 2, 8) for step in range(8)])
    assert critic == approx([0.1 * cosine(step, 3, 8) for step in range(8)])


def test_the_critics_warm_up_steps_alone_leave_the_policy_as_it_was(tmp_path):
    policy, critic, _ = rates(tmp_path, value_warmup_steps=4)
    assert policy == [0.01] * 8
    assert critic == approx([0.0, 0.0025, 0.005, 0.0075] + [0.01] * 4)


def test_the_policys_schedule_begins_after_the_critics_warm_up_and_ends_with_the_run(tmp_path):
    policy, critic, _ = rates(
        tmp_path, num_rollouts=3, critic_warmup_rollouts=1, lr_scheduler_type="linear", warmup_steps=0.25
    )
    assert policy == approx([0.0] * 4 + [0.01 * linear(step, 2, 8) for step in range(8)])
    assert critic == approx([0.01 * linear(step, 0, 12) for step in range(12)])


def test_options_of_the_policys_schedule_are_not_given_to_another(tmp_path):
    settings = {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 0.001},
        "value_lr_scheduler_type": "linear",
    }
    policy, critic, _ = rates(tmp_path, **settings)
    assert policy == approx([0.01 * cosine(step, 0, 8, floor=0.1) for step in range(8)])
    assert critic == approx([0.01 * linear(step, 0, 8) for step in range(8)])


def test_a_resumed_run_goes_on_with_both_learning_rates(tmp_path):
    settings = {
        "num_rollouts": 3,
        "lr_scheduler_type": "linear",
        "value_lr_scheduler_type": "cosine",
        "value_warmup_steps": 6,
    }
    settings |= {"save_strategy": "steps", "save_steps": 4, "save_total_limit": None}
    policy, critic, straight = rates(tmp_path / "straight", **settings)
    watch = Rates()
    resumed = trainer(tmp_path / "resumed", callbacks=[watch], learning_rate=0.01, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    assert watch.used == [list(pair) for pair in zip(policy[4:], critic[4:], strict=True)]
    assert_same_weights(straight.shared, resumed.shared)


def test_an_unknown_schedule_of_the_critic_is_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"value_lr_scheduler_type=cosin: .*cosine"):
        config(tmp_path, value_lr_scheduler_type="cosin")
