"""Estimators of the KL divergence, entropy, and log-probabilities of single tokens."""

import inspect
import math

import pytest
import reference
import torch
from closeness import close, tensor
from hypothesis import given
from hypothesis import strategies as st
from strategies import ragged, two_logits

from goose_lora.functional import (
    entropy,
    exact_kl,
    gather_logprobs,
    kl_per_token,
    weighted_kl,
)


def expected(logits, ref_logits, estimator):
    """The estimator's expectation over tokens of the policy, exactly: every token, weighted by its
    probability."""
    return (
        logits.softmax(-1).detach()
        * kl_per_token(logits.log_softmax(-1), ref_logits.log_softmax(-1), estimator=estimator)
    ).sum(-1)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@given(both=two_logits())
def test_k1_and_k3_are_unbiased(estimator, both):
    close(
        expected(*both, estimator),
        [reference.kl(*rows) for rows in zip(*(x.tolist() for x in both), strict=True)],
    )


def test_k2_is_right_to_second_order():
    generator = torch.Generator().manual_seed(0)
    logits, direction = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))

    def error(step):
        return expected(logits, logits + step * direction, "k2") - exact_kl(logits, logits + step * direction)

    # An error of third order falls by 8 as the step halves, one of second order (a wrong factor) by
    # 4; 5 % for the fourth order.
    close(error(2e-3) / error(1e-3), torch.full((7,), 8.0), rtol=0.05, atol=0)
    assert (error(2e-3).abs() < 1e-2 * exact_kl(logits, logits + 2e-3 * direction)).all()


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@given(both=two_logits())
def test_weighed_both_have_the_gradient_of_the_kl_on_another_policys_tokens(estimator, both):
    logits, ref_logits = both
    sampler = logits.flip(-1).log_softmax(-1)  # another distribution, which drew the tokens

    def gradient(function):
        x = logits.clone().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]

    def average(x):
        mask = torch.ones_like(x, dtype=torch.bool)
        new, ref = x.log_softmax(-1), ref_logits.log_softmax(-1)
        return sampler.exp() * weighted_kl(new, sampler, ref, mask, estimator=estimator)

    want = gradient(lambda x: exact_kl(x, ref_logits))
    close(gradient(average), want, rtol=1e-6, atol=1e-6)
    if estimator == "k3":  # and its value is the KL's
        close(average(logits).sum(-1), exact_kl(logits, ref_logits), rtol=1e-6, atol=1e-6)


def test_a_weighed_k2_is_as_before_where_the_policy_is_the_one_that_sampled():
    new, ref = (torch.randn(9, generator=torch.Generator().manual_seed(i)).double() for i in (0, 1))
    mask = torch.arange(9) < 7
    gradients = []
    for function in (
        lambda x: weighted_kl(x, new, ref, mask, estimator="k2"),
        lambda x: kl_per_token(x, ref, estimator="k2")[mask],
    ):
        x = new.clone().requires_grad_()
        gradients.append(torch.autograd.grad(function(x).sum(), x)[0])
    assert torch.equal(*gradients)
    with pytest.raises(ValueError, match="in the loss k1 has no gradient"):
        weighted_kl(new, new, ref, mask, estimator="k1")


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
    """Of one token: E[grad log pi(y) KL(y)]. The exact sum is the same for every y, so that it says
    nothing about which to take."""
    logits, ref_logits = both
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)

    def policy_gradient(reward):
        x = logits.clone().requires_grad_()
        return torch.autograd.grad((logprobs.exp() * x.log_softmax(-1) * reward).sum(), x)[0]

    x = logits.clone().requires_grad_()
    close(
        policy_gradient(kl_per_token(logprobs, ref_logprobs, estimator="k1")),
        torch.autograd.grad(exact_kl(x, ref_logits).sum(), x)[0],
    )
    close(
        policy_gradient(exact_kl(logits, ref_logits)[..., None].expand_as(logits)), torch.zeros_like(logits)
    )


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
        # Unwrapped: beartype would object first
        inspect.unwrap(kl_per_token)(torch.zeros(1), torch.zeros(1), estimator="k4")


@given(two_logits())
def test_exact_kl_and_entropy_match_their_definitions(both):
    logits, ref_logits = both
    close(
        exact_kl(logits, ref_logits),
        [reference.kl(*rows) for rows in zip(logits.tolist(), ref_logits.tolist(), strict=True)],
    )
    close(entropy(logits), [reference.entropy(row) for row in logits.tolist()])


@given(two_logits())
def test_entropy_is_log_v_less_the_kl_to_the_uniform_distribution(both):
    logits, _ = both
    close(entropy(logits), math.log(logits.shape[-1]) - exact_kl(logits, torch.zeros_like(logits)))
    close(
        entropy(torch.zeros_like(logits)), torch.full(logits.shape[:-1], math.log(logits.shape[-1])).double()
    )


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
