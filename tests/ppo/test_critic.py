"""Where the critic starts from, and the rollouts in which it learns alone."""

import pytest
import tiny
import tiny_runs
import torch
from tiny_runs import assert_same_weights, fresh, logged, trainer, with_reward_adapter
from transformers import TrainerCallback

from goose_lora.data.tokenization import left_pad
from goose_lora.models.roles import ADAPTERS, RolePlan
from goose_lora.models.shared_base import SharedBase

BEGINNINGS = [
    # critic, with a reward adapter, what it can start from; the default comes first
    ("adapter", True, ["reward", "policy", "zero"]),
    ("adapter", False, ["zero", "policy"]),
    ("shared", True, ["zero"]),
    ("shared", False, ["zero"]),
    ("reward_features", True, ["reward", "zero"]),
    (None, True, ["zero"]),
    (None, False, ["zero"]),
]


def critic_start(critic, critic_init, *, has_reward):
    plan = RolePlan.of(critic=critic, critic_init=critic_init, has_policy=False, has_reward=has_reward)
    return plan.critic_init


@pytest.mark.parametrize(("critic", "has_reward", "possible"), BEGINNINGS)
def test_a_critic_starts_only_from_what_is_there(critic, has_reward, possible):
    assert critic_start(critic, None, has_reward=has_reward) == possible[0]
    for start in ("reward", "policy", "zero"):
        if start in possible:
            assert critic_start(critic, start, has_reward=has_reward) == start
        else:
            with pytest.raises(ValueError, match=f"critic_init: {start} does not go with critic: {critic}"):
                critic_start(critic, start, has_reward=has_reward)


def test_a_critic_on_reward_features_needs_a_reward_adapter():
    with pytest.raises(ValueError, match=r"there is no reward adapter\. Use adapter or shared"):
        critic_start("reward_features", None, has_reward=False)


def twins(shared, role):
    """Names in the value adapter, without its mark, whose tensors are bit for bit those of
    ``role``'s, and those that are not."""
    theirs = {name.replace(f".{ADAPTERS[role]}", ""): p for name, p in shared.role_parameters(role)}
    mine = {name.replace(".value", ""): p for name, p in shared.role_parameters("value")}
    same = {name for name, p in mine.items() if name in theirs and torch.equal(p, theirs[name])}
    return same, mine.keys() - same


def test_from_the_reward_model_all_is_a_copy(tmp_path):
    shared = with_reward_adapter(tmp_path, critic="adapter", critic_init="reward")
    same, other = twins(shared, "reward")
    assert not other and any("score" in name for name in same) and len(same) > 20
    assert shared.values_are_scores
    ids, mask = tiny.batch()
    values = shared.apply_head("value", shared.hidden("value", ids, mask))[:, -1]
    torch.testing.assert_close(values, shared.scores(ids, mask), rtol=0, atol=1e-6)


def test_on_reward_features_the_head_is_a_copy_or_zero(tmp_path):
    shared = with_reward_adapter(tmp_path, critic="reward_features")
    assert (
        torch.equal(shared.score_head("value").weight, shared.score_head("reward").weight)
        and shared.values_are_scores
    )
    shared = with_reward_adapter(tmp_path, critic="reward_features", critic_init="zero")
    assert not shared.score_head("value").weight.any() and not shared.values_are_scores
    assert shared.score_head("reward").weight.any(), "the reward model's own head stays"


def test_from_the_policy_the_adapter_is_a_copy_and_the_head_zero(tmp_path):
    shared = fresh(critic=None)
    tiny.randomise(shared, "default", std=0.2)
    shared.save_pretrained(tmp_path / "policy")
    for reward in (None, tmp_path / "reward"):
        if reward is not None:
            with_reward_adapter(reward)
        shared = SharedBase.build(
            tiny.base(), str(tmp_path / "policy"), reward=reward, critic="adapter", critic_init="policy"
        )
        same, other = twins(shared, "policy")
        assert other == {"base_model.model.score.modules_to_save.weight"} and len(same) > 20
        assert not shared.score_head("value").weight.any() and not shared.values_are_scores


@pytest.mark.parametrize("critic", ["adapter", "shared"])
def test_from_zero_nothing_is_a_copy_and_every_value_is_0(critic, tmp_path):
    shared = with_reward_adapter(tmp_path, critic=critic, critic_init="zero")
    ids, mask = tiny.batch()
    with torch.no_grad():
        assert not shared(ids, mask, tiny.response_mask()).values.any()
    assert not shared.values_are_scores
    if critic == "adapter":
        same, _ = twins(shared, "reward")
        assert not any("lora_A" in name or "score" in name for name in same)


def test_a_fresh_critic_has_the_configuration_it_was_given(tmp_path):
    base = tiny.base()
    with_reward_adapter(tmp_path / "reward")
    value = tiny.lora(base, layers="top-1")
    shared = SharedBase.build(
        base, tiny.lora(base), reward=tmp_path / "reward", critic="adapter", critic_init="zero", value=value
    )
    layers = {
        name.split(".layers.")[1].split(".")[0]
        for name, _ in shared.role_parameters("value")
        if ".layers." in name
    }
    assert layers == {str(tiny.LAYERS - 1)}


@pytest.mark.parametrize(("start", "first"), [("zero", 0.0), ("policy", 0.0), ("reward", None)])
def test_the_first_values_are_0_or_the_reward_models_in_units_of_normalised_scores(start, first, tmp_path):
    """A head of 0 says 0, the mean normalised score, and not -mean/std of the reward model's
    numbers."""
    shared = with_reward_adapter(tmp_path / "reward", critic="adapter", critic_init=start)
    ppo = trainer(tmp_path / "run", shared=shared, reward=None, num_rollouts=1)
    ppo.rollout_state.score_scale = (5.0, 2.0)
    rollout = ppo.collector.generate(*left_pad([[5, 6], [7, 8, 9]], tiny.PAD))
    seen = ppo.collector.evaluate(rollout)
    values = ppo.experience.make(rollout, seen, ppo.collector.scores(rollout, {}, seen.by_adapter))[0].values
    if first is not None:
        assert (values == first).all()
        return
    ids, attention = rollout.input_ids, rollout.attention_mask
    for row in range(2):
        for token in range(int(rollout.response_mask[row].sum())):
            # The value of a token is what the reward model says of the text before it
            read = rollout.prompt_tokens + token
            score = shared.scores(ids[row : row + 1, :read], attention[row : row + 1, :read])
            torch.testing.assert_close(values[row, token], (score[0] - 5.0) / 2.0, rtol=0, atol=1e-5)


class Watch(TrainerCallback):
    """Copies of policy and critic before the first optimizer step and after each."""

    def __init__(self):
        self.steps = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.steps.append(
            {
                role: [p.detach().clone() for _, p in model.role_parameters(role)]
                for role in ("policy", "value")
            }
        )

    on_step_end = on_train_begin

    def moved(self, role, step):
        return any(
            not torch.equal(a, b)
            for a, b in zip(self.steps[step][role], self.steps[step + 1][role], strict=True)
        )


@pytest.mark.parametrize("critic", ["adapter", "shared"])
def test_in_the_warm_up_the_critic_alone_moves_and_then_both(critic, tmp_path):
    watch = Watch()
    settings = {
        "critic_warmup_rollouts": 1,
        "num_rollouts": 3,
        "kl_target": 5.0,
        "kl_horizon": 50,
        "weight_decay": 0.1,
    }
    ppo = trainer(tmp_path, shared=fresh(critic=critic), callbacks=[watch], **settings)
    ppo.train()
    assert [watch.moved("policy", step) for step in range(12)] == [False] * 4 + [True] * 8
    assert all(watch.moved("value", step) for step in range(12))
    coefs = [row["objective/kl_coef"] for row in logged(tmp_path)]
    assert coefs[0] == coefs[1] > coefs[2], (
        "a row shows the coefficient that its rollout was charged, before it moves by it"
    )


@pytest.mark.parametrize("critic", ["adapter", "shared"])
def test_after_the_warm_up_the_policys_optimizer_begins_as_it_would_without(critic, tmp_path):
    """Adam's first step is the learning rate for every number. A state from the warm-up would make
    it another, up to three times as large."""
    watch = Watch()
    settings = {
        "critic_warmup_rollouts": 3,
        "num_rollouts": 4,
        "learning_rate": 1e-3,
        "value_learning_rate": 1e-2,
        "max_grad_norm": 0.0,
    }
    ppo = trainer(tmp_path, shared=fresh(critic=critic), callbacks=[watch], **settings)
    ppo.train()
    before, after = watch.steps[12]["policy"], watch.steps[13]["policy"]
    steps = torch.cat([(a - b).abs().flatten() for a, b in zip(after, before, strict=True)])
    assert steps.max().item() == pytest.approx(1e-3, rel=1e-3)
    counts = {
        group: {int(ppo.optimizer.state[p]["step"]) for p in ppo.optimizer.param_groups[group]["params"]}
        for group in (0, 1)
    }
    assert counts == {0: {4}, 1: {16}}


def test_a_run_resumed_within_the_warm_up_is_exact(tmp_path):
    settings = {
        "critic_warmup_rollouts": 2,
        "num_rollouts": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "save_total_limit": None,
    }
    straight = trainer(tmp_path / "straight", **settings)
    straight.train()
    resumed = trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    assert_same_weights(straight.shared, resumed.shared)


def test_a_run_without_a_critic_has_none_to_warm_up(tmp_path):
    with pytest.raises(ValueError, match="critic_warmup_rollouts=1: rloo and grpo have no critic"):
        trainer(tmp_path, critic_warmup_rollouts=1, advantage_estimator="rloo", num_generations=2)


def test_the_default_critic_reads_the_reward_adapter_where_there_is_one(tmp_path):
    def critic_of(*, has_reward, **settings):
        config = tiny_runs.config(tmp_path, **settings)
        return config.role_plan(has_policy=False, has_reward=has_reward).critic

    assert critic_of(has_reward=True) == "reward_features"
    assert critic_of(has_reward=False) == "adapter"
    assert critic_of(has_reward=True, critic="shared") == "shared"
    assert critic_of(has_reward=True, advantage_estimator="rloo", num_generations=2) is None


@pytest.mark.parametrize("reference", [None, "copy", "base"])
@pytest.mark.parametrize("critic", ["adapter", "shared", "reward_features", None])
def test_the_plan_names_the_adapters_that_are_put_on_the_base(tmp_path, critic, reference):
    shared = with_reward_adapter(tmp_path, critic=critic, reference=reference, average=True)
    plan = shared.role_plan
    assert {ADAPTERS[role] for role in plan.adapters} == set(shared.peft_config)
    assert set(plan.training_adapters) == set(shared.trained_from)
    training = {
        role for role in plan.adapters if any(p.requires_grad for _, p in shared.role_parameters(role))
    }
    assert training == set(plan.training)
