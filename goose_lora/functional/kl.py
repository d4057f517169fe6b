"""Estimators of the KL divergence between two policies, per token."""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from goose_lora.functional.masked import _select, _upcast

KLEstimator = Literal["k1", "k2", "k3"]


def kl_per_token(
    logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"], *, estimator: KLEstimator
) -> Float[Tensor, "*shape"]:
    """Return an estimate of KL(policy || reference) at each sampled token, in nats.

    Schulman, joschu.net/blog/kl-approx.html. The tokens were sampled from the policy.

    With d = logprobs - ref_logprobs: k1 = d, unbiased, of either sign; k2 = d^2 / 2, biased in
    third order; k3 = exp(-d) - 1 + d, unbiased and never negative, but of large variance where the
    reference has mass that the policy lost. They are for the reward; as a loss only k2 has the
    gradient of the KL in expectation (that of k1 is 0). There is no mask: padding stays junk.

    OpenAI, CleanRL and TRL 0.12 have k1, TRL 1.12 k1 and k3; k3 goes by expm1 here, since exp(-d) -
    1 + d is rounding noise in fp32 for |d| < 3e-4. Raises ValueError for an unknown estimator.
    """
    # In bf16, the difference of two log-probabilities near each other would be all rounding.
    difference = _upcast(logprobs) - _upcast(ref_logprobs)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    # expm1: exp(-d) - 1 + d is rounding noise near 0.
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kl_estimator={estimator!r} is unknown. Use one of {', '.join(get_args(KLEstimator))}.")


def weighted_kl(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    ref_logprobs: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    estimator: KLEstimator,
) -> Float[Tensor, "*shape"]:
    """Return an estimate of KL(policy || reference) by an older policy's tokens, 0 elsewhere.

    That of ``kl_per_token`` times exp(logprobs - old_logprobs), for a loss. As such, both have the
    gradient of the KL on average over the older policy's tokens: k2 with a weight that has no
    gradient (Liu et al. 2025, arXiv:2510.01555), k3 with one that has (DeepSeek-V3.2,
    arXiv:2512.02556; TRL's use_bias_correction_kl), which changes its gradient where the two
    policies are still one. In nats. Raises ValueError for k1, which no source has so.
    """
    if estimator == "k1":
        raise ValueError("weighted_kl has k2 and k3: in the loss k1 has no gradient on average.")
    logprobs, old_logprobs = _select(logprobs, mask), _select(old_logprobs, mask).detach()
    weight = (logprobs - old_logprobs).exp()
    if estimator == "k2":
        weight = weight.detach()
    return weight * kl_per_token(logprobs, _select(ref_logprobs, mask).detach(), estimator=estimator)


def exact_kl(
    logits: Float[Tensor, "*shape V"], ref_logits: Float[Tensor, "*shape V"]
) -> Float[Tensor, "*shape"]:
    """Return KL(policy || reference) of the next token, sum_v p_v (log p_v - log q_v), in nats.

    For evaluation, where logits are at hand. A token of logit -inf adds 0; it is infinite where the
    reference alone excludes a token. TRL, OpenAI and CleanRL only sample it. Raises nothing.
    """
    log_p, log_q = _upcast(logits).log_softmax(-1), _upcast(ref_logits).log_softmax(-1)
    # Where p is 0 the term is 0, and not 0 times infinity.
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)
