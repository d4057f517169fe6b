"""Generalised advantage estimation, groups of replies to one prompt, and explained variance."""

import pytest
import reference
import torch
from closeness import UNIT, close, tensor
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import groups, ragged

import goose_lora.functional as F
from goose_lora.functional import (
    explained_variance,
    gae,
)


@given(ragged(tensors=2), UNIT, UNIT)
def test_gae_is_the_weighted_average_of_n_step_advantages(batch, gamma, lam):
    mask, rewards, values = batch
    got = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, keep in enumerate(mask):
        close(
            got[row][keep],
            reference.gae_row(rewards[row][keep].tolist(), values[row][keep].tolist(), gamma, lam),
        )


@given(ragged(tensors=2, holes=True), UNIT, UNIT)
def test_gae_passes_over_tokens_that_do_not_count(batch, gamma, lam):
    mask, rewards, values = batch
    got = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, keep in enumerate(mask):
        close(
            got[row][keep],
            reference.gae_row(rewards[row][keep].tolist(), values[row][keep].tolist(), gamma, lam),
        )


@given(ragged(tensors=2, holes=True))
def test_with_gamma_and_lambda_one_the_advantage_is_return_minus_value(batch):
    mask, rewards, values = batch
    returns = torch.where(mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    close(gae(rewards, values, mask, gamma=1.0, lam=1.0), torch.where(mask, returns - values, 0.0))


@given(ragged(tensors=2), UNIT)
def test_with_lambda_zero_the_advantage_is_the_td_error(batch, gamma):
    mask, rewards, values = batch
    next_values = torch.cat([torch.where(mask, values, 0.0)[:, 1:], torch.zeros(len(mask), 1)], dim=1)
    close(
        gae(rewards, values, mask, gamma=gamma, lam=0.0),
        torch.where(mask, rewards + gamma * next_values - values, 0.0),
    )


@given(ragged(tensors=2), UNIT)
def test_with_gamma_zero_the_advantage_is_reward_minus_value(batch, lam):
    mask, rewards, values = batch
    close(gae(rewards, values, mask, gamma=0.0, lam=lam), torch.where(mask, rewards - values, 0.0))


def test_two_turns_by_hand():
    # Token, user turn of two tokens, token: delta_1 = 4 - 2 = 2, delta_0 = 1 + 0.5 * 2 - 3 = -1,
    # A_0 = -1 + 0.25 * 2.
    mask = torch.tensor([[True, False, False, True]])
    close(
        gae(tensor(1, 7, 7, 4)[None], tensor(3, 7, 7, 2)[None], mask, gamma=0.5, lam=0.5), [[-0.5, 0, 0, 2]]
    )


@given(groups())
def test_leave_one_out_is_the_return_less_the_mean_of_the_others(drawn):
    returns, size = drawn
    got = F.leave_one_out(returns, size)
    close(got, torch.tensor(reference.leave_one_out(returns.tolist(), size), dtype=torch.float64))
    close(got.view(-1, size).sum(-1), torch.zeros(len(returns) // size, dtype=torch.float64))


@given(groups())
def test_group_normalised_counts_in_the_groups_deviations(drawn):
    returns, size = drawn
    got = F.group_normalised(returns, size, eps=1e-4)
    close(
        got,
        torch.tensor(reference.group_normalised(returns.tolist(), size, 1e-4), dtype=torch.float64),
        atol=1e-6,
        rtol=1e-6,
    )


@given(groups(), st.booleans())
def test_the_share_of_groups_that_score_alike_is_counted(drawn, level):
    scores, size = drawn
    scores = scores.round() if level else torch.where(torch.arange(len(scores)) < size, scores[0], scores)
    close(F.alike_share(scores, size), torch.tensor(reference.alike_share(scores.tolist(), size)))


@pytest.mark.parametrize("value", [0.7, 10.1, -100.1, 1000.1])
@pytest.mark.parametrize("size", [3, 4, 12, 64])
@pytest.mark.parametrize("function", [F.leave_one_out, F.group_normalised])
def test_a_group_that_scores_alike_teaches_exactly_nothing(function, size, value):
    # of a rounding error, Adam makes a whole step
    returns = torch.cat([torch.full((size,), value), torch.arange(size) ** 2.0 / size])
    alike, apart = function(returns, size).split(size)
    assert not alike.any() and apart.all()


def test_alike_is_but_for_rounding():
    scores = torch.tensor([0.1 + 0.2, 0.3, 1.0, 1.001, 0.0, 0.0])
    close(F.alike_share(scores, 2), torch.tensor(2 / 3))
    assert F.alike_share(scores.bfloat16()[:2], 2).dtype == torch.float32


def test_groups_by_hand():
    returns = torch.tensor([1.0, 3.0, 10.0, 10.0])
    close(F.leave_one_out(returns, 2), torch.tensor([-2.0, 2.0, 0.0, 0.0]))
    close(F.group_normalised(returns, 2), torch.tensor([-1.0, 1.0, 0.0, 0.0]) / (2**0.5 + 1e-4))
    assert (
        F.leave_one_out(returns.bfloat16(), 4).dtype
        == torch.float32
        == F.group_normalised(returns.bfloat16(), 4).dtype
    )


@pytest.mark.parametrize(("count", "size"), [(4, 1), (4, 3), (4, 0)])
@pytest.mark.parametrize("function", [F.leave_one_out, F.group_normalised, F.alike_share])
def test_groups_of_one_or_of_unequal_size_are_refused(function, count, size):
    with pytest.raises(ValueError, match=f"4 returns in groups of {size}.*num_generations"):
        function(torch.ones(count), size)


@given(ragged(tensors=2, holes=True))
def test_explained_variance_matches_the_definition(batch):
    mask, values, returns = batch
    counted = reference.tokens(mask, values, returns)
    variance = reference.pvariance(counted[1])
    assume(variance == 0 or variance > 1e-3)
    close(explained_variance(values, returns, mask), reference.explained_variance(*counted))


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant_one():
    returns, mask = tensor(1, 2, 4)[None], torch.ones(1, 3, dtype=torch.bool)
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(returns + 5, returns, mask) == 1
    assert explained_variance(torch.zeros(1, 3).double(), returns, mask) == 0


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_explained_variance_of_constant_returns_is_zero(constant):
    returns = torch.full((1, 7), constant, dtype=torch.float64)
    returns[0, 3:] = 2.0  # padding
    assert explained_variance(torch.randn(1, 7, dtype=torch.float64), returns, torch.arange(7)[None] < 3) == 0


def test_explained_variance_carries_no_gradient():
    x = torch.randn(1, 3).requires_grad_()
    assert not explained_variance(x, torch.randn(1, 3), torch.ones(1, 3, dtype=torch.bool)).requires_grad


# ---- Scores before they become rewards ----


def shaped(score, ended, length, clip, missing, per_token):
    """Written from the definition, a reply at a time."""
    if clip is not None:
        score = max(-clip, min(clip, score))
    if missing is not None and not ended:
        score -= missing
    return score - per_token * length


@given(
    st.lists(st.tuples(st.floats(-9, 9), st.booleans(), st.integers(1, 40)), min_size=1, max_size=6),
    st.none() | st.floats(0.1, 5),
    st.none() | st.floats(0, 5),
    st.floats(-1, 1),
)
def test_scores_are_clipped_then_fined_for_no_end_and_for_length(replies, clip, missing, per_token):
    scores, ended, lengths = zip(*replies, strict=True)
    got = F.shaped_scores(
        tensor(*scores),
        torch.tensor(ended),
        torch.tensor(lengths),
        clip=clip,
        missing_eos_penalty=missing,
        length_penalty=per_token,
    )
    close(got, [shaped(*reply, clip, missing, per_token) for reply in replies])


def test_scores_stay_as_they_are_where_nothing_is_asked_for():
    scores = tensor(3.0, -7.5)
    assert torch.equal(F.shaped_scores(scores, torch.tensor([True, False]), torch.tensor([4, 9])), scores)
