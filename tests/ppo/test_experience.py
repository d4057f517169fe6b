"""From scores to rewards: the scale of scores, what is taken off them and in which order, and where
each part of a reward lands."""

import numpy
import pytest
import tiny
import torch
from accelerate import Accelerator
from tiny_runs import assert_same_weights, config, logged, trainer

from goose_lora.generation.rollout import Rollout
from goose_lora.ppo import experience
from goose_lora.ppo.callbacks import RolloutState
from goose_lora.ppo.collector import RoleOutputs
from goose_lora.ppo.experience import ExperienceMaker
from goose_lora.ppo.kl_control import FixedKL
from goose_lora.rewards.sources import Scores

MASK = tiny.response_mask((3, 1, 2))
ENDED = torch.tensor([True, False, False])


def maker(folder, *, values_are_scores=False, **changes):
    args = config(folder, **{"score_normalization": "none"} | changes)
    return ExperienceMaker(
        args, RolloutState(FixedKL(args.kl_coef)), Accelerator(cpu=True), values_are_scores=values_are_scores
    )


def rollout(mask=MASK, ended=ENDED):
    prompts = torch.ones(len(mask), 1, dtype=torch.long)
    ids = torch.arange(4, 4 + mask.numel()).view(mask.shape)
    return Rollout(torch.cat([prompts, ids], 1), torch.cat([prompts, mask.long()], 1), mask, ended)


def evaluated(mask=MASK, *, kl=None, values=None):
    """A policy 0.5 nats above its reference at every token."""
    logprobs = torch.where(mask, -1.0, float("nan"))
    values = torch.zeros(mask.shape) if values is None else values
    return RoleOutputs(None, logprobs, logprobs - 0.5, kl, values, None, None, None, None)


@pytest.fixture
def rewards(monkeypatch):
    """All rewards a token that are made, in order."""
    kept = []
    token_rewards = experience.F.token_rewards
    monkeypatch.setattr(
        experience.F,
        "token_rewards",
        lambda *args, **kwargs: kept.append(token_rewards(*args, **kwargs)) or kept[-1],
    )
    return kept


def test_scores_are_normalised_then_clipped_then_fined_for_no_end_and_for_length(tmp_path, rewards):
    make = maker(tmp_path, score_clip=1.0, missing_eos_penalty=5.0, length_penalty=0.25, kl_coef=0.0)
    make.state.score_scale = (10.0, 2.0)
    make.make(rollout(), evaluated(), Scores(torch.tensor([11.0, 16.0, 0.0]), {}))
    want = [0.5 - 3 * 0.25, 1.0 - 5.0 - 0.25, -1.0 - 5.0 - 2 * 0.25]
    assert rewards[0].sum(-1).tolist() == want
    assert rewards[0][0].tolist() == [0.0, 0.0, want[0]] and rewards[0][1].tolist() == [want[1], 0.0, 0.0]


@pytest.mark.parametrize("location", ["reward", "loss"])
def test_rewards_of_tokens_land_on_them_and_sum_to_the_score_after_all_penalties(location, tmp_path, rewards):
    make = maker(
        tmp_path,
        score_clip=1.0,
        missing_eos_penalty=5.0,
        length_penalty=0.25,
        kl_coef=0.2,
        kl_location=location,
        kl_estimator="k3",
    )
    make.state.score_scale = (1.0, 2.0)
    by_token = torch.tensor([1.0, -3.0, 8.0, 4.0, 2.0, 0.5])
    # The last one has more than its tokens' 2.5
    make.make(rollout(), evaluated(), Scores(torch.tensor([7.0, 4.0, 2.5]), {}, by_token))
    kl = 0.2 * (float(numpy.exp(-0.5)) - 1 + 0.5) if location == "reward" else 0.0
    totals = [1.0 - 0.75, 1.0 - 5.25, 0.75 - 5.5]
    want = torch.tensor(
        [
            [0.5 - kl, -1.5 - kl, totals[0] + 1.0 - kl],
            [totals[1] - kl, 0, 0],
            [1.0 - kl, totals[2] - 1.0 - kl, 0],
        ]
    )
    torch.testing.assert_close(rewards[0], want, rtol=0, atol=1e-6)


def test_the_exact_kl_is_charged_where_it_is_given(tmp_path, rewards):
    kl = torch.where(MASK, torch.arange(9.0).view(3, 3), float("nan"))
    _, shown = maker(tmp_path, kl_coef=0.5, kl_estimator="exact").make(
        rollout(), evaluated(kl=kl), Scores(torch.zeros(3), {})
    )
    assert torch.equal(rewards[0], torch.where(MASK, -0.5 * torch.arange(9.0).view(3, 3), 0.0))
    assert shown["objective/kl_exact"] == pytest.approx((0 + 1 + 2 + 3 + 6 + 7) / 3)
    assert shown["objective/kl"] == pytest.approx(1.0)


def test_the_running_scale_is_that_of_all_scores_so_far(tmp_path):
    make = maker(tmp_path, score_normalization="running")
    generator = torch.Generator().manual_seed(4)
    seen = []
    for size in (16, 3, 1, 40):
        # Far from 0, where sums of squares would cancel
        seen.append(torch.randn(size, generator=generator) * (1 + len(seen)) + 100)
        make.learn_scale(seen[-1])
        everything = torch.cat(seen).double().numpy()
        assert make.scale == pytest.approx((everything.mean(), everything.std()), rel=1e-12)
        assert make.state.score_moments == pytest.approx(
            (len(everything), everything.mean(), everything.var()), rel=1e-12
        )


def test_scores_that_are_all_alike_so_far_are_counted_from_their_mean_in_their_own_units(tmp_path):
    make = maker(tmp_path, score_normalization="running")
    for _ in range(2):
        make.learn_scale(torch.full((7,), 0.1))
        assert make.scale == pytest.approx((0.1, 1.0), rel=1e-6)
    make.learn_scale(torch.tensor([1.1]))
    assert make.scale.std == pytest.approx(numpy.std([0.1] * 14 + [1.1]), rel=1e-6)


def test_the_references_scale_is_learned_once(tmp_path):
    make = maker(tmp_path, score_normalization="reference")
    for scores in ([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]):
        make.learn_scale(torch.tensor(scores))
        assert make.scale == pytest.approx((2.0, 1.0))
    with pytest.raises(ValueError, match=r"cannot be normalised: 2 replies .* score_normalization: none"):
        maker(tmp_path, score_normalization="reference").learn_scale(torch.tensor([1.0, 1.0]))


def test_without_normalisation_scores_are_what_they_are(tmp_path):
    make = maker(tmp_path)
    make.learn_scale(torch.tensor([1.0, 2.0, 3.0]))
    assert make.scale == (0.0, 1.0)


def test_values_of_a_critic_that_speaks_in_scores_are_normalised_like_them(tmp_path):
    values = torch.where(MASK, torch.arange(9.0).view(3, 3), float("nan"))
    for in_scores, want in (
        (True, (torch.arange(9.0).view(3, 3) - 3) / 2),
        (False, torch.arange(9.0).view(3, 3)),
    ):
        make = maker(tmp_path, values_are_scores=in_scores)
        make.state.score_scale = (3.0, 2.0)
        made, _ = make.make(rollout(), evaluated(values=values), Scores(torch.zeros(3), {}))
        assert torch.equal(made.values, torch.where(MASK, want, 0.0))


def test_a_run_whose_scores_are_alike_at_first_goes_on(tmp_path):
    calls = []

    def sparse(completion_ids, **columns):
        calls.append(1)
        return (
            [0.0] * len(completion_ids)
            if len(calls) == 1
            else [float(len(set(ids))) for ids in completion_ids]
        )

    trainer(tmp_path, reward=sparse, score_normalization="running").train()
    first, second = logged(tmp_path)
    assert len(calls) == 2, "no calibration"
    assert first["objective/score"] == 0.0 and second["objective/score"] > 0


def test_a_resumed_run_goes_on_with_the_running_scale(tmp_path):
    settings = {
        "num_rollouts": 3,
        "save_strategy": "steps",
        "save_steps": 8,
        "score_normalization": "running",
        "score_clip": 1.5,
    }
    straight = trainer(tmp_path / "straight", **settings)
    straight.train()
    resumed = trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-8"))
    assert_same_weights(straight.shared, resumed.shared)
    assert resumed.rollout_state.score_moments == straight.rollout_state.score_moments
    assert resumed.rollout_state.score_moments[0] == 48
    assert logged(tmp_path / "resumed") == logged(tmp_path / "straight")


def test_rewards_of_tokens_reach_the_update(tmp_path):
    def even(completion_ids, **columns):
        return [[float(token % 2 == 0) for token in ids] for ids in completion_ids]

    trainer(tmp_path, reward=even, score_normalization="none", kl_coef=0.0, num_rollouts=1).train()
    row = logged(tmp_path)[0]
    assert (
        row["objective/reward"] == pytest.approx(row["objective/raw_score"], abs=1e-5)
        and row["objective/raw_score"] > 0.5
    )


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("score_clip", 0.0),
        ("critic_warmup_rollouts", -1),
        ("ema_decay", 1.0),
        ("ema_decay", 0.0),
        ("num_eval_prompts", 0),
    ],
)
def test_an_impossible_number_is_refused_by_name(setting, value, tmp_path):
    with pytest.raises(ValueError, match=f"^{setting}={value}"):
        config(tmp_path, **{setting: value})
