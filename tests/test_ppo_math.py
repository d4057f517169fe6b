import inspect
import math
import pathlib
import subprocess
import sys

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import JUNK, groups, pairs, ragged, ranked, two_logits

from goose_lora import ppo_math
from goose_lora.ppo_math import (
    Moments,
    entropy,
    exact_kl,
    explained_variance,
    gae,
    gather_logprobs,
    kl_per_token,
    masked_mean,
    masked_sum,
    merge_moments,
    moments,
    pairwise_loss,
    policy_loss,
    ranking_loss,
    untied_pairs,
    value_loss,
    whiten,
)

UNIT = st.floats(0, 1)
CLIPRANGES = st.floats(0.05, 0.5)

# Every function with a mask, as functions of four tensors and that mask; each uses the tensors it needs.
MASKED = {
    "masked_sum": lambda a, b, c, d, mask, **_: masked_sum(a, mask),
    "masked_mean": lambda a, b, c, d, mask, **share: masked_mean(a, mask, **share),
    "moments": lambda a, b, c, d, mask, **_: tuple(moments(a, mask))[1:],
    "whiten": lambda a, b, c, d, mask, **_: whiten(a, mask),
    "gae": lambda a, b, c, d, mask, **_: gae(a, b, mask, gamma=0.9, lam=0.8),
    "policy_loss": lambda a, b, c, d, mask, **share: policy_loss(a, b, c, mask, cliprange=0.2, **share),
    "value_loss": lambda a, b, c, d, mask, **share: value_loss(a, b, c, mask, cliprange_value=0.5, **share),
    "explained_variance": lambda a, b, c, d, mask, **_: explained_variance(a, b, mask),
}
SHARED = ("masked_mean", "policy_loss", "value_loss")
every_masked_function = pytest.mark.parametrize("name", MASKED)


def close(got, want, **tolerance):
    """Equal within 1e-7, or exactly where the want is a bool or tolerance=0 is given."""
    want = torch.as_tensor(want, dtype=got.dtype)
    torch.testing.assert_close(got, want, **({"rtol": 1e-7, "atol": 1e-7} | tolerance))


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def outputs(result):
    """All tensors of a result, the stats' included, in one line."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, dict):
        return list(result.values())
    return [x for part in result for x in outputs(part)]


def outputs_and_gradients(function, tensors):
    """What a function gives, and the gradient of the weighted sum of that in each of the tensors (zero where none flows)."""
    tensors = [x.clone().requires_grad_() for x in tensors]
    results = outputs(function(*tensors))
    total = sum((x * torch.arange(1, x.numel() + 1).reshape(x.shape)).sum() for x in results if x.requires_grad)
    if isinstance(total, torch.Tensor):
        with torch.autograd.set_detect_anomaly(True):  # a NaN on the way back is an error, even if a later step would drop it
            total.backward()
    return [x.detach() for x in results], [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors]


# Masks


def test_the_table_names_every_function_with_a_mask():
    functions = inspect.getmembers(ppo_math, inspect.isfunction)
    with_mask = {n for n, f in functions if n[0] != "_" and "mask" in inspect.signature(f).parameters and f.__module__ == ppo_math.__name__}
    assert with_mask == set(MASKED)


@every_masked_function
@given(batch=ragged(tensors=4, holes=True), junk=JUNK)
def test_padding_has_no_say_in_value_or_gradient(name, batch, junk):
    mask, *tensors = batch

    def function(*xs):
        return MASKED[name](*xs, mask)

    want, want_gradients = outputs_and_gradients(function, tensors)
    got, gradients = outputs_and_gradients(function, [torch.where(mask, x, junk) for x in tensors])
    for x, y in zip(got + gradients, want + want_gradients, strict=True):
        close(x, y, rtol=0, atol=0)
    for gradient in gradients:
        assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("name", ["whiten", "gae"])
@given(batch=ragged(tensors=4, holes=True), junk=JUNK)
def test_what_is_outside_the_mask_comes_back_as_zero(name, batch, junk):
    mask, *tensors = batch
    assert (MASKED[name](*(torch.where(mask, x, junk) for x in tensors), mask)[~mask] == 0).all()


@given(ragged(holes=True))
def test_whiten_without_shift_and_with_given_statistics_is_zero_outside_the_mask(batch):
    mask, x = batch
    statistics = Moments(torch.tensor(7), tensor(5.0).squeeze(), tensor(2.0).squeeze())
    assert (whiten(x, mask, shift_mean=False, statistics=statistics)[~mask] == 0).all()


@pytest.mark.parametrize("name", sorted(set(MASKED) - {"masked_sum", "gae"}))
def test_an_empty_mask_is_an_error_that_says_the_way_out(name):
    x, nothing = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(2, 3\) selects no token.*Drop empty responses.*num_tokens"):
        MASKED[name](x, x, x, x, nothing)


def test_the_sum_over_an_empty_mask_is_zero():
    assert masked_sum(torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)) == 0


def test_gae_of_rows_without_a_token_is_zero():
    mask = torch.tensor([[False, False], [True, False]])
    close(gae(torch.ones(2, 2).double(), torch.zeros(2, 2).double(), mask, gamma=0.9, lam=0.8), [[0, 0], [1, 0]])
    assert gae(torch.ones(2, 0), torch.ones(2, 0), torch.ones(2, 0, dtype=torch.bool), gamma=0.9, lam=0.8).shape == (2, 0)


@given(ragged(holes=True))
def test_masked_sum_and_mean_are_those_of_the_counted_tokens(batch):
    mask, x = batch
    (counted,) = reference.tokens(mask, x)
    close(masked_sum(x, mask), math.fsum(counted))
    close(masked_mean(x, mask), math.fsum(counted) / len(counted))


# Micro-batches


@pytest.mark.parametrize("name", SHARED)
def test_microbatches_add_up_to_the_token_mean_and_its_gradient(name):
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor([[5], [1]])
    tensors = [torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(4)]

    def means(*xs, rows=slice(0, 2), **share):
        return MASKED[name](*(x[rows] for x in xs), mask[rows], **share)

    def added(*xs):
        parts = [outputs(means(*xs, rows=slice(i, i + 1), num_tokens=6)) for i in range(2)]
        return [sum(column) for column in zip(*parts, strict=True)]

    want, want_gradients = outputs_and_gradients(means, tensors)
    got, gradients = outputs_and_gradients(added, tensors)
    for x, y in zip(got + gradients, want + want_gradients, strict=True):
        close(x, y)
    mean_of_means = sum(outputs(means(*tensors, rows=slice(i, i + 1)))[0] for i in range(2)) / 2
    assert abs(mean_of_means - want[0]) > 0.01  # else this test could not fail


def test_the_mean_of_two_uneven_rows_is_that_of_their_tokens():
    x, mask = tensor(1, 1, 1, 1, 9, 0, 0, 0).reshape(2, 4), torch.arange(4) < torch.tensor([[4], [1]])
    close(masked_mean(x, mask), 13 / 5)
    close(masked_mean(x[:1], mask[:1], num_tokens=5) + masked_mean(x[1:], mask[1:], num_tokens=5), 13 / 5)


@pytest.mark.parametrize("name", SHARED)
def test_an_empty_microbatch_of_a_minibatch_with_tokens_adds_nothing(name):
    x = torch.full((2, 3), math.nan)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    results, gradients = outputs_and_gradients(lambda *xs: MASKED[name](*xs, nothing, num_tokens=7), [x] * 4)
    for y in results + gradients:
        assert (y == 0).all()


@pytest.mark.parametrize("name", SHARED)
def test_num_tokens_may_be_a_tensor(name):
    x, mask = [torch.randn(2, 3, generator=torch.Generator().manual_seed(i)) for i in range(4)], torch.ones(2, 3, dtype=torch.bool)
    got, want = (outputs(MASKED[name](*x, mask, num_tokens=count)) for count in (torch.tensor(11), 11))
    assert got == want


@pytest.mark.parametrize("num_tokens", [0, -3, torch.tensor(0)])
@pytest.mark.parametrize("name", SHARED)
def test_a_token_count_that_is_not_positive_is_an_error(name, num_tokens):
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=rf"num_tokens={int(num_tokens)}.*over all micro-batches and ranks"):
        MASKED[name](x, x, x, x, x.bool(), num_tokens=num_tokens)


# Precision


def results_of_all_functions(x):
    """Every public function of ppo_math on four (3, 5) tensors."""
    mask, ids = torch.arange(5) < torch.tensor([[5], [2], [3]]), torch.tensor([0, 4, 2])
    return {name: outputs(function(*x, mask)) for name, function in MASKED.items()} | {
        "k1": [kl_per_token(x[0], x[1], estimator="k1")],
        "k2": [kl_per_token(x[0], x[1], estimator="k2")],
        "k3": [kl_per_token(x[0], x[1], estimator="k3")],
        "exact_kl": [exact_kl(x[0], x[1])],
        "entropy": [entropy(x[0])],
        "gather_logprobs": [gather_logprobs(x[0], ids, temperature=0.7)],
        "merge_moments": list(merge_moments([moments(y, mask) for y in x]))[1:],
        "pairwise_loss": [pairwise_loss(x[0][0], x[1][0], x[2][0])],
    }


@pytest.mark.parametrize(
    ("given_dtype", "computed_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_everything_computes_in_fp32_or_float64(given_dtype, computed_dtype):
    x = [torch.randn(3, 5, generator=torch.Generator().manual_seed(i)).to(given_dtype) for i in range(4)]
    upcast_first = results_of_all_functions([y.to(computed_dtype) for y in x])
    for name, got in results_of_all_functions(x).items():
        for y, want in zip(got, upcast_first[name], strict=True):
            assert y.dtype == computed_dtype, name
            close(y, want, rtol=0, atol=0)


def test_wrong_shapes_are_caught_under_test():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for call in (
        lambda: gae(x, torch.zeros(2, 4), mask, gamma=1.0, lam=1.0),
        lambda: policy_loss(x, x, torch.zeros(2), mask, cliprange=0.2),
        lambda: masked_mean(x, mask.float()),
        lambda: gather_logprobs(x, torch.zeros(3, dtype=torch.long)),
    ):
        with pytest.raises(Exception, match=r"[Tt]ype-check"):
            call()


# Moments and whitening


@given(ragged(holes=True))
def test_moments_are_count_mean_and_population_variance(batch):
    mask, x = batch
    (counted,) = reference.tokens(mask, x)
    count, mean, var = moments(x, mask)
    assert count == len(counted)
    close(mean, reference.fmean(counted))
    close(var, reference.pvariance(counted))


@given(ragged(), st.floats(-1e4, 1e4))
def test_merged_moments_are_those_of_the_whole(batch, offset):
    mask, x = batch
    x = x + offset * torch.arange(len(x))[:, None]  # rows of different means, so that the part between them counts
    merged, whole = merge_moments([moments(x[i : i + 1], mask[i : i + 1]) for i in range(len(x))]), moments(x, mask)
    assert merged.count == whole.count
    close(merged.mean, whole.mean)
    close(merged.var, whole.var)


def test_merging_parts_far_from_zero_does_not_cancel():
    x = tensor(1e8, 1e8 + 2, 1e8 + 4, 1e8 + 6)[None]
    ones = torch.ones(1, 2, dtype=torch.bool)
    close(merge_moments([moments(x[:, :2], ones), moments(x[:, 2:], ones)]).var, 5.0)


def test_merging_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one rank"):
        merge_moments([])


@given(ragged(holes=True))
def test_whitened_tokens_have_mean_zero_and_variance_one(batch):
    mask, x = batch
    assume(x[mask].var(unbiased=False) > 0.1)
    (counted,) = reference.tokens(mask, whiten(x, mask, eps=0.0))
    assert abs(reference.fmean(counted)) < 1e-7
    assert abs(reference.pvariance(counted) - 1) < 1e-7


@given(ragged(holes=True))
def test_whitening_without_shift_keeps_the_mean(batch):
    mask, x = batch
    assume(x[mask].var(unbiased=False) > 0.1)
    close(masked_mean(whiten(x, mask, shift_mean=False), mask), masked_mean(x, mask))
    close(whiten(x, mask, shift_mean=False)[mask], whiten(x, mask)[mask] + masked_mean(x, mask))


def test_eps_is_added_to_the_variance():
    close(whiten(tensor(-1, 1)[None], torch.ones(1, 2, dtype=torch.bool), eps=3.0), [[-0.5, 0.5]])


def test_equal_tokens_whiten_to_zero():
    mask = torch.tensor([[True, False]])
    assert (whiten(torch.tensor([[3.0, 5.0]]), mask) == 0).all()


@given(ragged())
def test_ranks_whiten_alike_by_merged_statistics(batch):
    mask, x = batch
    rows = [(x[i : i + 1], mask[i : i + 1]) for i in range(len(x))]
    statistics = merge_moments([moments(*row) for row in rows])
    # With next to no variance, whitening blows rounding errors up by 1 / sqrt(eps) = 1e4.
    assume(statistics.var > 1e-3)
    close(torch.cat([whiten(*row, statistics=statistics) for row in rows]), whiten(x, mask))


# Generalised advantage estimation


@given(ragged(tensors=2), UNIT, UNIT)
def test_gae_is_the_weighted_average_of_n_step_advantages(batch, gamma, lam):
    mask, rewards, values = batch
    got = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, keep in enumerate(mask):
        close(got[row][keep], reference.gae_row(rewards[row][keep].tolist(), values[row][keep].tolist(), gamma, lam))


@given(ragged(tensors=2, holes=True), UNIT, UNIT)
def test_gae_passes_over_tokens_that_do_not_count(batch, gamma, lam):
    mask, rewards, values = batch
    got = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, keep in enumerate(mask):
        close(got[row][keep], reference.gae_row(rewards[row][keep].tolist(), values[row][keep].tolist(), gamma, lam))


@given(ragged(tensors=2, holes=True))
def test_with_gamma_and_lambda_one_the_advantage_is_return_minus_value(batch):
    mask, rewards, values = batch
    returns = torch.where(mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    close(gae(rewards, values, mask, gamma=1.0, lam=1.0), torch.where(mask, returns - values, 0.0))


@given(ragged(tensors=2), UNIT)
def test_with_lambda_zero_the_advantage_is_the_td_error(batch, gamma):
    mask, rewards, values = batch
    next_values = torch.cat([torch.where(mask, values, 0.0)[:, 1:], torch.zeros(len(mask), 1)], dim=1)
    close(gae(rewards, values, mask, gamma=gamma, lam=0.0), torch.where(mask, rewards + gamma * next_values - values, 0.0))


@given(ragged(tensors=2), UNIT)
def test_with_gamma_zero_the_advantage_is_reward_minus_value(batch, lam):
    mask, rewards, values = batch
    close(gae(rewards, values, mask, gamma=0.0, lam=lam), torch.where(mask, rewards - values, 0.0))


def test_two_turns_by_hand():
    # Token, user turn of two tokens, token: delta_1 = 4 - 2 = 2, delta_0 = 1 + 0.5 * 2 - 3 = -1, A_0 = -1 + 0.25 * 2.
    mask = torch.tensor([[True, False, False, True]])
    close(gae(tensor(1, 7, 7, 4)[None], tensor(3, 7, 7, 2)[None], mask, gamma=0.5, lam=0.5), [[-0.5, 0, 0, 2]])


# Policy loss


@given(ragged(tensors=3, holes=True), CLIPRANGES)
def test_policy_loss_and_stats_match_the_token_by_token_reference(batch, cliprange):
    mask, *tensors = batch
    loss, stats = policy_loss(*tensors, mask, cliprange=cliprange)
    want = reference.policy_loss(*reference.tokens(mask, *tensors), cliprange)
    assert {"loss": loss, **stats}.keys() == want.keys()
    for name, got in {"loss": loss, **stats}.items():
        close(got, want[name])


@given(ragged(tensors=2, holes=True), CLIPRANGES)
def test_on_policy_the_gradient_is_that_of_reinforce(batch, cliprange):
    mask, logprobs, advantages = batch
    logprobs.requires_grad_()
    loss, stats = policy_loss(logprobs, logprobs.detach().clone(), advantages, mask, cliprange=cliprange)
    loss.backward()
    close(loss.detach(), -masked_mean(advantages, mask))
    close(logprobs.grad, torch.where(mask, -advantages / mask.sum(), 0.0))
    assert [x.item() for x in stats.values()] == [0, 0, 1]


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope", "is_clipped"),
    [
        (1.0, 1.5, -1.2, 0.0, 1),  # good and already likelier by more than the range: no further reward
        (1.0, 0.5, -0.5, -0.5, 0),  # good but less likely: full gradient to bring it back
        (-1.0, 0.5, 0.8, 0.0, 1),  # bad and already less likely by more than the range: no further push
        (-1.0, 1.5, 1.5, 1.5, 0),  # bad but likelier: full gradient to undo it
        (1.0, 1.1, -1.1, -1.1, 0),
        (-1.0, 0.9, 0.9, 0.9, 0),
        (0.0, 1.5, 0.0, 0.0, 0),
    ],
)
def test_clipping_stops_only_what_the_advantage_favours(advantage, ratio, loss, slope, is_clipped):
    logprobs = tensor(math.log(ratio)).requires_grad_()
    got, stats = policy_loss(logprobs, tensor(0.0), tensor(advantage), torch.tensor([True]), cliprange=0.2)
    got.backward()
    close(got.detach(), loss)
    close(logprobs.grad, [slope])
    assert stats["policy/clip_fraction"] == is_clipped


def test_no_gradient_flows_into_the_rollout_or_the_stats():
    tensors = [torch.randn(2, 3, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)]
    for loss, stats in (
        policy_loss(*tensors, torch.ones(2, 3, dtype=torch.bool), cliprange=0.2),
        value_loss(*tensors, torch.ones(2, 3, dtype=torch.bool), cliprange_value=0.2),
    ):
        assert not any(x.requires_grad for x in stats.values())
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        assert gradients[0].abs().sum() > 0 and gradients[1] is None and gradients[2] is None


def test_a_small_kl_from_the_rollout_does_not_round_to_nothing():
    # exp(x) - 1 - x in fp32 has an error of 6e-8, twelve times this KL of 5e-9. float32, hence 1e-3: expm1's own rounding.
    _, stats = policy_loss(torch.tensor([1e-4]), torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([True]), cliprange=0.2)
    close(stats["policy/kl_from_rollout"], 5e-9, rtol=1e-3, atol=0)


# Value loss and explained variance


@given(ragged(tensors=3, holes=True), st.none() | CLIPRANGES)
def test_value_loss_and_stats_match_the_token_by_token_reference(batch, cliprange_value):
    mask, *tensors = batch
    loss, stats = value_loss(*tensors, mask, cliprange_value=cliprange_value)
    want = reference.value_loss(*reference.tokens(mask, *tensors), cliprange_value)
    assert {"loss": loss, **stats}.keys() == want.keys()
    for name, got in {"loss": loss, **stats}.items():
        close(got, want[name])


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope", "is_clipped"),
    [
        (1.0, 2.0, 1.62, 0.0, 1),  # moved by 1 towards the return, of which 0.2 are believed: (0.2 - 2)^2 / 2, and no further push
        (-1.0, -2.0, 1.62, 0.0, 1),
        (1.0, -1.0, 2.0, 2.0, 0),  # moved away from it: full gradient to bring it back
        (-1.0, 1.0, 2.0, -2.0, 0),
        (0.1, 2.0, 1.805, -1.9, 0),
    ],
)
def test_value_clipping_stops_only_moves_towards_the_return(value, target, loss, slope, is_clipped):
    values = tensor(value).requires_grad_()
    got, stats = value_loss(values, tensor(0.0), tensor(target), torch.tensor([True]), cliprange_value=0.2)
    got.backward()
    close(got.detach(), loss)
    close(values.grad, [slope])
    assert stats["value/clip_fraction"] == is_clipped
    close(stats["value/error"], (value - target) ** 2)


def test_values_within_the_range_do_not_count_as_clipped_in_fp32():
    values, old_values, returns = (torch.randn(1000, generator=torch.Generator().manual_seed(i)) for i in range(3))
    assert value_loss(values, old_values, returns, values == values, cliprange_value=100.0)[1]["value/clip_fraction"] == 0


def test_without_a_value_range_the_loss_is_half_the_squared_error():
    values = tensor(1.0).requires_grad_()
    got, stats = value_loss(values, tensor(0.0), tensor(2.0), torch.tensor([True]), cliprange_value=None)
    got.backward()
    assert (got, values.grad, stats["value/clip_fraction"]) == (0.5, -1, 0)


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


# KL, entropy, log-probabilities


def expected(logits, ref_logits, estimator):
    """The estimator's expectation over tokens of the policy, exactly: every token, weighted by its probability."""
    return (logits.softmax(-1).detach() * kl_per_token(logits.log_softmax(-1), ref_logits.log_softmax(-1), estimator=estimator)).sum(-1)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@given(both=two_logits())
def test_k1_and_k3_are_unbiased(estimator, both):
    close(expected(*both, estimator), [reference.kl(*rows) for rows in zip(*(x.tolist() for x in both), strict=True)])


def test_k2_is_right_to_second_order():
    generator = torch.Generator().manual_seed(0)
    logits, direction = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))

    def error(step):
        return expected(logits, logits + step * direction, "k2") - exact_kl(logits, logits + step * direction)

    # An error of third order falls by 8 as the step halves, one of second order (a wrong factor) by 4; 5 % for the fourth order.
    close(error(2e-3) / error(1e-3), torch.full((7,), 8.0), rtol=0.05, atol=0)
    assert (error(2e-3).abs() < 1e-2 * exact_kl(logits, logits + 2e-3 * direction)).all()


@given(two_logits())
def test_only_k2_has_the_gradient_of_the_kl_as_a_loss(both):
    logits, ref_logits = both

    def gradient(function):
        x = logits.clone().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]

    close(gradient(lambda x: expected(x, ref_logits, "k2")), gradient(lambda x: exact_kl(x, ref_logits)))
    close(gradient(lambda x: expected(x, ref_logits, "k1")), torch.zeros_like(logits))
    close(gradient(lambda x: expected(x, ref_logits, "k3")), gradient(lambda x: exact_kl(ref_logits, x)))


@given(two_logits())
def test_only_k1_has_the_gradient_of_the_kl_as_a_reward(both):
    """Of one token: E[grad log pi(y) KL(y)]. The exact sum is the same for every y, so that it says nothing about which to take."""
    logits, ref_logits = both
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)

    def policy_gradient(reward):
        x = logits.clone().requires_grad_()
        return torch.autograd.grad((logprobs.exp() * x.log_softmax(-1) * reward).sum(), x)[0]

    x = logits.clone().requires_grad_()
    close(policy_gradient(kl_per_token(logprobs, ref_logprobs, estimator="k1")), torch.autograd.grad(exact_kl(x, ref_logits).sum(), x)[0])
    close(policy_gradient(exact_kl(logits, ref_logits)[..., None].expand_as(logits)), torch.zeros_like(logits))


@given(ragged(tensors=2))
def test_k2_and_k3_are_never_negative_and_all_are_zero_where_both_agree(batch):
    _, logprobs, ref_logprobs = batch
    for estimator in ("k1", "k2", "k3"):
        assert (kl_per_token(logprobs, logprobs, estimator=estimator) == 0).all()
    assert (kl_per_token(logprobs, ref_logprobs, estimator="k2") >= 0).all()
    assert (kl_per_token(logprobs, ref_logprobs, estimator="k3") >= 0).all()


def test_estimators_by_hand():
    policy, ref = tensor(-1.0), tensor(-3.0)
    close(kl_per_token(policy, ref, estimator="k1"), [2.0])
    close(kl_per_token(policy, ref, estimator="k2"), [2.0])
    close(kl_per_token(policy, ref, estimator="k3"), [math.exp(-2) + 1])


def test_small_k3_does_not_round_to_nothing():
    # float32, hence 1e-3 (expm1's own rounding); exp(-d) - 1 + d is wrong by a factor of ten here.
    close(kl_per_token(torch.tensor([1e-4]), torch.tensor([0.0]), estimator="k3"), [5e-9], rtol=1e-3, atol=0)


def test_an_unknown_estimator_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'k4' is unknown\. Use one of k1, k2, k3"):
        inspect.unwrap(kl_per_token)(torch.zeros(1), torch.zeros(1), estimator="k4")  # unwrapped: beartype would object first


@given(two_logits())
def test_exact_kl_and_entropy_match_their_definitions(both):
    logits, ref_logits = both
    close(exact_kl(logits, ref_logits), [reference.kl(*rows) for rows in zip(logits.tolist(), ref_logits.tolist(), strict=True)])
    close(entropy(logits), [reference.entropy(row) for row in logits.tolist()])


@given(two_logits())
def test_entropy_is_log_v_less_the_kl_to_the_uniform_distribution(both):
    logits, _ = both
    close(entropy(logits), math.log(logits.shape[-1]) - exact_kl(logits, torch.zeros_like(logits)))
    close(entropy(torch.zeros_like(logits)), torch.full(logits.shape[:-1], math.log(logits.shape[-1])).double())


def test_excluded_tokens_leave_entropy_kl_and_gradients_finite():
    logits = tensor(1.0, -math.inf, 2.0, -500.0).requires_grad_()
    ref_logits = tensor(2.0, -math.inf, 2.0, 1.0).requires_grad_()
    (entropy(logits) + exact_kl(logits, ref_logits)).backward()
    kept = tensor(1.0, 2.0, -500.0)
    close(entropy(logits).detach(), entropy(kept))
    close(exact_kl(logits, ref_logits).detach(), exact_kl(kept, tensor(2.0, 2.0, 1.0)))
    assert logits.grad.isfinite().all() and ref_logits.grad.isfinite().all()


def test_underflowing_probabilities_leave_gradients_finite():
    logits = torch.tensor([0.0, -200.0]).requires_grad_()  # exp(-200) is 0 in fp32
    (entropy(logits) + exact_kl(logits, torch.tensor([-200.0, 0.0]))).backward()
    assert logits.grad.isfinite().all()


def test_the_kl_to_a_reference_that_excludes_a_token_is_infinite():
    assert exact_kl(tensor(0.0, 0.0), tensor(0.0, -math.inf)) == math.inf


@given(two_logits(), st.floats(0.1, 3))
def test_gathered_logprobs_are_logs_of_the_sampled_distribution(both, temperature):
    logits, _ = both
    for token in range(logits.shape[-1]):
        ids = torch.full(logits.shape[:-1], token)
        want = [math.log(reference.softmax([x / temperature for x in row])[token]) for row in logits.tolist()]
        close(gather_logprobs(logits, ids, temperature=temperature), want)


def test_each_position_gathers_its_own_token_at_temperature_one():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.tensor([[0, 4, 2], [1, 3, 0]], dtype=torch.int32)
    got = gather_logprobs(logits, ids)
    for row in range(2):
        for t in range(3):
            close(got[row, t], math.log(reference.softmax(logits[row, t].tolist())[ids[row, t]]))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_without_a_distribution_is_an_error(temperature):
    with pytest.raises(ValueError, match=rf"temperature={temperature} .*Use a positive one"):
        gather_logprobs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), temperature=temperature)


# The reward model


@given(pairs())
def test_pairwise_loss_is_minus_the_log_probability_of_the_preference(scores):
    chosen, rejected, margin = scores
    close(pairwise_loss(chosen, rejected, margin), reference.pairwise_loss(*(x.tolist() for x in scores)))
    close(pairwise_loss(chosen, rejected), reference.pairwise_loss(chosen.tolist(), rejected.tolist(), [0.0] * len(chosen)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pairwise_loss_is_finite_at_differences_of_200(dtype):
    chosen = torch.tensor([-200.0, 200.0], dtype=dtype).requires_grad_()
    loss = pairwise_loss(chosen, torch.zeros(2, dtype=dtype))
    loss.backward()
    assert loss == 100
    close(chosen.grad, [-0.5, 0])


def test_a_repeated_batch_has_the_same_pairwise_loss():
    chosen, rejected = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(pairwise_loss(chosen.repeat(3), rejected.repeat(3)), pairwise_loss(chosen, rejected))


def test_no_pairs_are_an_error():
    with pytest.raises(ValueError, match="no pairs"):
        pairwise_loss(torch.zeros(0), torch.zeros(0))


@given(ranked())
def test_ranking_loss_is_the_mean_over_prompts_of_the_mean_over_their_couples(drawn):
    close(ranking_loss(*drawn), reference.ranking_loss(*(x.tolist() for x in drawn)))


@given(pairs())
def test_ranking_loss_of_lists_of_two_is_the_pairwise_loss_bit_for_bit(drawn):
    chosen, rejected, _ = drawn
    scores, ranks = torch.stack([chosen, rejected], 1).flatten(), torch.tensor([1, 2]).repeat(len(chosen))
    assert torch.equal(ranking_loss(scores, ranks, torch.arange(len(chosen)).repeat_interleave(2)), pairwise_loss(chosen, rejected))


def test_untied_pairs_are_those_of_one_prompt_and_of_different_rank():
    better, worse = untied_pairs(torch.tensor([2, 1, 2, 3, 5, 4]), torch.tensor([7, 7, 7, 7, 8, 8]))
    assert sorted(zip(better.tolist(), worse.tolist(), strict=True)) == [(0, 3), (1, 0), (1, 2), (1, 3), (2, 3), (5, 4)]


def test_ranking_loss_is_finite_at_differences_of_200_and_computes_in_fp32():
    scores = torch.tensor([0.0, 200.0], dtype=torch.bfloat16, requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([1, 2]), torch.tensor([0, 0]))
    loss.backward()
    assert loss == 200 and loss.dtype == torch.float32
    close(scores.grad, [-1, 1])
    small = torch.tensor([1.0, 0.99609375], dtype=torch.bfloat16)  # adjacent numbers: in bf16 the loss itself would be rounded to 0.69
    close(ranking_loss(small, torch.tensor([1, 2]), torch.tensor([0, 0])), reference.ranking_loss(small.tolist(), [1, 2], [0, 0]), atol=1e-6)


@pytest.mark.parametrize(("ranks", "prompts"), [([1, 1, 1, 2], [0, 0, 5, 5]), ([1, 1, 2], [0, 5, 5]), ([], [])])
def test_a_prompt_without_an_untied_pair_is_an_error(ranks, prompts):
    with pytest.raises(ValueError, match=r"no two completions of different rank" if not ranks else r"1 have no two .*\(such as \[0\]\)"):
        ranking_loss(torch.zeros(len(ranks)), torch.tensor(ranks, dtype=torch.long), torch.tensor(prompts, dtype=torch.long))


# The module


def test_importing_ppo_math_pulls_in_no_training_library():
    code = "import sys, goose_lora.ppo_math; print(*sorted({'transformers', 'peft', 'trl', 'accelerate', 'datasets'} & set(sys.modules)))"
    root = pathlib.Path(ppo_math.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout.strip() == ""


# groups of replies to one prompt


@given(groups())
def test_leave_one_out_is_the_return_less_the_mean_of_the_others(drawn):
    returns, size = drawn
    got = ppo_math.leave_one_out(returns, size)
    close(got, torch.tensor(reference.leave_one_out(returns.tolist(), size), dtype=torch.float64))
    close(got.view(-1, size).sum(-1), torch.zeros(len(returns) // size, dtype=torch.float64))


@given(groups())
def test_group_normalised_counts_in_the_groups_deviations(drawn):
    returns, size = drawn
    got = ppo_math.group_normalised(returns, size, eps=1e-4)
    close(got, torch.tensor(reference.group_normalised(returns.tolist(), size, 1e-4), dtype=torch.float64), atol=1e-6, rtol=1e-6)


def test_groups_by_hand():
    returns = torch.tensor([1.0, 3.0, 10.0, 10.0])
    close(ppo_math.leave_one_out(returns, 2), torch.tensor([-2.0, 2.0, 0.0, 0.0]))
    close(ppo_math.group_normalised(returns, 2), torch.tensor([-1.0, 1.0, 0.0, 0.0]) / (2**0.5 + 1e-4))
    assert ppo_math.leave_one_out(returns.bfloat16(), 4).dtype == torch.float32 == ppo_math.group_normalised(returns.bfloat16(), 4).dtype


@pytest.mark.parametrize(("count", "size"), [(4, 1), (4, 3), (4, 0)])
@pytest.mark.parametrize("function", [ppo_math.leave_one_out, ppo_math.group_normalised])
def test_groups_of_one_or_of_unequal_size_are_refused(function, count, size):
    with pytest.raises(ValueError, match=f"4 returns in groups of {size}.*num_generations"):
        function(torch.ones(count), size)
