"""The losses of policy, critic and reward model."""

import math

import pytest
import reference
import torch
from closeness import CLIPRANGES, close, tensor
from hypothesis import given
from hypothesis import strategies as st
from strategies import pairs, ragged, ranked

from goose_lora.functional import (
    masked_mean,
    pairwise_loss,
    policy_loss,
    ranking_loss,
    sampling_weights,
    untied_pairs,
    value_loss,
)


@given(ragged(tensors=3, holes=True), CLIPRANGES)
def test_policy_loss_and_stats_match_the_token_by_token_reference(batch, cliprange):
    mask, *tensors = batch
    loss, stats = policy_loss(*tensors, mask, cliprange=cliprange)
    want = reference.policy_loss(*reference.tokens(mask, *tensors), cliprange)
    assert {"loss": loss, **stats}.keys() == want.keys()
    for name, got in {"loss": loss, **stats}.items():
        close(got, want[name])


@given(ragged(tensors=3, holes=True), CLIPRANGES, CLIPRANGES)
def test_clip_higher_bounds_what_rises_by_a_number_of_its_own(batch, cliprange, more):
    mask, *tensors = batch
    both = {"cliprange": cliprange, "cliprange_high": cliprange + more}
    loss, stats = policy_loss(*tensors, mask, **both)
    want = reference.policy_loss(*reference.tokens(mask, *tensors), **both)
    for name, got in {"loss": loss, **stats}.items():
        close(got, want[name])


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        (1.0, 1.25, -1.25, -1.25),  # above 1.2, and within 1.28
        (1.0, 1.3, -1.28, 0.0),
        (-1.0, 0.75, 0.8, 0.0),  # the lower bound stays 0.8
    ],
)
def test_clip_higher_by_hand(advantage, ratio, loss, slope):
    logprobs = tensor(math.log(ratio)).requires_grad_()
    ranges = {"cliprange": 0.2, "cliprange_high": 0.28}
    got, _ = policy_loss(logprobs, tensor(0.0), tensor(advantage), torch.tensor([True]), **ranges)
    got.backward()
    close(got.detach(), loss)
    close(logprobs.grad, [slope])


@pytest.mark.parametrize("correction", ["truncate", "mask"])
@given(ragged(tensors=2, holes=True), st.floats(1, 5))
def test_weights_of_the_gap_to_the_sampler_match_the_reference(correction, batch, cap):
    mask, *both = batch
    weights, stats = sampling_weights(*both, mask, correction=correction, cap=cap)
    want = reference.sampling_weights(*reference.tokens(mask, *both), correction, cap)
    close(weights[mask], want)
    assert (weights[~mask] == 0).all()
    above = [new - drawn > math.log(cap) for new, drawn in zip(*reference.tokens(mask, *both), strict=True)]
    assert stats["rollout/sampling_capped"][mask].bool().tolist() == above


@given(ragged(tensors=4, holes=True), CLIPRANGES)
def test_weights_multiply_each_tokens_term_and_leave_the_stats(batch, cliprange):
    mask, logprobs, old, advantages, weights = batch
    loss, stats = policy_loss(logprobs, old, advantages, mask, cliprange=cliprange, weights=weights)
    each = [
        weight * reference.policy_loss([new], [before], [gain], cliprange)["loss"]
        for new, before, gain, weight in zip(
            *reference.tokens(mask, logprobs, old, advantages, weights), strict=True
        )
    ]
    close(loss, sum(each) / len(each))
    plain = policy_loss(logprobs, old, advantages, mask, cliprange=cliprange)[1]
    assert stats == plain


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
    tensors = [
        torch.randn(2, 3, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)
    ]
    for loss, stats in (
        policy_loss(*tensors, torch.ones(2, 3, dtype=torch.bool), cliprange=0.2),
        value_loss(*tensors, torch.ones(2, 3, dtype=torch.bool), cliprange_value=0.2),
    ):
        assert not any(x.requires_grad for x in stats.values())
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        assert gradients[0].abs().sum() > 0 and gradients[1] is None and gradients[2] is None


def test_a_small_kl_from_the_rollout_does_not_round_to_nothing():
    # exp(x) - 1 - x in fp32 has an error of 6e-8, twelve times this KL of 5e-9. float32, hence
    # 1e-3: expm1's own rounding.
    _, stats = policy_loss(
        torch.tensor([1e-4]), torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([True]), cliprange=0.2
    )
    close(stats["policy/kl_from_rollout"], 5e-9, rtol=1e-3, atol=0)


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
        # Moved by 1 towards the return, of which 0.2 are believed: (0.2 - 2)^2 / 2, and no further
        # push
        (1.0, 2.0, 1.62, 0.0, 1),
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
    values, old_values, returns = (
        torch.randn(1000, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    assert (
        value_loss(values, old_values, returns, values == values, cliprange_value=100.0)[1][
            "value/clip_fraction"
        ]
        == 0
    )


def test_without_a_value_range_the_loss_is_half_the_squared_error():
    values = tensor(1.0).requires_grad_()
    got, stats = value_loss(values, tensor(0.0), tensor(2.0), torch.tensor([True]), cliprange_value=None)
    got.backward()
    assert (got, values.grad, stats["value/clip_fraction"]) == (0.5, -1, 0)


@given(pairs(), st.lists(st.sampled_from([0.5, 1.0, 0.25]), min_size=20, max_size=20))
def test_pairwise_loss_with_a_target_is_the_cross_entropy_to_it(scores, targets):
    chosen, rejected, margin = scores
    target = torch.tensor(targets[: len(chosen)], dtype=torch.float64)
    close(
        pairwise_loss(chosen, rejected, margin, target),
        reference.pairwise_loss_with_targets(*(x.tolist() for x in (*scores, target))),
    )


def test_a_tie_pulls_two_scores_together_from_either_side_and_rests_where_they_are_alike():
    chosen = torch.tensor([2.0, -2.0, 1.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    pairwise_loss(chosen, rejected, None, torch.full((3,), 0.5, dtype=torch.float64)).backward()
    assert chosen.grad[0] > 0 > chosen.grad[1] and chosen.grad[2] == 0


@given(pairs())
def test_pairwise_loss_is_minus_the_log_probability_of_the_preference(scores):
    chosen, rejected, margin = scores
    close(pairwise_loss(chosen, rejected, margin), reference.pairwise_loss(*(x.tolist() for x in scores)))
    close(
        pairwise_loss(chosen, rejected),
        reference.pairwise_loss(chosen.tolist(), rejected.tolist(), [0.0] * len(chosen)),
    )


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
    assert torch.equal(
        ranking_loss(scores, ranks, torch.arange(len(chosen)).repeat_interleave(2)),
        pairwise_loss(chosen, rejected),
    )


def test_untied_pairs_are_those_of_one_prompt_and_of_different_rank():
    better, worse = untied_pairs(torch.tensor([2, 1, 2, 3, 5, 4]), torch.tensor([7, 7, 7, 7, 8, 8]))
    assert sorted(zip(better.tolist(), worse.tolist(), strict=True)) == [
        (0, 3),
        (1, 0),
        (1, 2),
        (1, 3),
        (2, 3),
        (5, 4),
    ]


def test_ranking_loss_is_finite_at_differences_of_200_and_computes_in_fp32():
    scores = torch.tensor([0.0, 200.0], dtype=torch.bfloat16, requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([1, 2]), torch.tensor([0, 0]))
    loss.backward()
    assert loss == 200 and loss.dtype == torch.float32
    close(scores.grad, [-1, 1])
    # Adjacent numbers: in bf16 the loss itself would be rounded to 0.69
    small = torch.tensor([1.0, 0.99609375], dtype=torch.bfloat16)
    close(
        ranking_loss(small, torch.tensor([1, 2]), torch.tensor([0, 0])),
        reference.ranking_loss(small.tolist(), [1, 2], [0, 0]),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("ranks", "prompts"), [([1, 1, 1, 2], [0, 0, 5, 5]), ([1, 1, 2], [0, 5, 5]), ([], [])]
)
def test_a_prompt_without_an_untied_pair_is_an_error(ranks, prompts):
    with pytest.raises(
        ValueError,
        match=r"no two completions of different rank" if not ranks else r"1 have no two .*\(such as \[0\]\)",
    ):
        ranking_loss(
            torch.zeros(len(ranks)),
            torch.tensor(ranks, dtype=torch.long),
            torch.tensor(prompts, dtype=torch.long),
        )
