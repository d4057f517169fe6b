"""Losses of the policy, the critic and the reward model."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from goose_lora.functional.masked import TokenCount, _select, _upcast, masked_mean

SamplingCorrection = Literal["truncate", "mask"]


def sampling_weights(
    logprobs: Float[Tensor, "*shape"],
    sampling_logprobs: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    correction: SamplingCorrection,
    cap: float,
) -> tuple[Float[Tensor, "*shape"], dict[str, Float[Tensor, "*shape"]]]:
    """Return a token's weight for the gap between sampler and update; and stats, per token.

    exp(logprobs - sampling_logprobs), both of the policy before the update: as the update computes
    them, and as the sampler had them, which may have other kernels, dtypes or weights. Above
    ``cap`` it is the cap (truncate: TIS, Yao et al. 2025, fengyao.notion.site/off-policy-rl) or 0
    (mask: MIS, TRL's token_mask). Of one token: what came before it is not weighed. 0 outside the
    mask, without gradient. Stats: "rollout/sampling_weight", and "rollout/sampling_capped", 1 where
    the cap was met. Raises nothing.
    """
    # What is outside the mask has weight 0, and not exp(0).
    ratio = (_select(logprobs, mask) - _select(sampling_logprobs, mask)).detach().exp()
    above = ratio > cap
    bound = ratio.clamp(max=cap) if correction == "truncate" else ratio.masked_fill(above, 0.0)
    weights = _select(bound, mask)
    capped = _select(above.to(ratio.dtype), mask)
    return weights, {"rollout/sampling_weight": weights, "rollout/sampling_capped": capped}


def policy_loss(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    cliprange: float,
    cliprange_high: float | None = None,
    weights: Float[Tensor, "*shape"] | None = None,
    num_tokens: TokenCount | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Return PPO's clipped objective, negated to be minimised, as a mean over tokens; and stats.

    Schulman et al. 2017, arXiv:1707.06347, eq. 7:
    max(-A r, -A clip(r, 1 - cliprange, 1 + cliprange)) with r = exp(logprobs - old_logprobs).
    ``cliprange_high`` is an upper bound of its own, 1 + cliprange_high ("clip-higher", DAPO, Yu et
    al. 2025, arXiv:2503.14476, eq. 10): unlikely tokens may gain more before they are clipped.
    ``weights``, one a token, multiply the terms, and not the stats: ``sampling_weights``.
    Log-probabilities in nats, of the sampled tokens, old ones from the policy that sampled them. No
    gradient flows into the old log-probabilities, the advantages and the weights.

    Stats, without gradient and shared out by ``num_tokens`` like the loss: "policy/clip_fraction"
    (tokens whose clipped term is the larger: leaving the range in the advantage's favour),
    "policy/kl_from_rollout" (KL(old || new) in nats a token, by k3), "policy/ratio_mean".

    The loss is TRL's, OpenAI's and CleanRL's, but for the mean (see ``masked_mean``). Their
    approxkl is k2, and in TRL it and the ratio are means over padding too, which draws them towards
    0 and 1. Raises ValueError as ``masked_mean`` does.
    """
    # Selection comes first: padding may hold NaN.
    log_ratio = _select(logprobs, mask) - _select(old_logprobs, mask).detach()
    advantages = _select(advantages, mask).detach()
    ratio = log_ratio.exp()
    high = cliprange if cliprange_high is None else cliprange_high
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + high)
    terms = torch.maximum(plain, clipped)
    if weights is not None:
        terms = terms * _select(weights, mask).detach()
    loss = masked_mean(terms, mask, num_tokens=num_tokens)

    # expm1 keeps the digits of k3 where the ratio is near 1.
    with torch.no_grad():
        stats = {
            "policy/clip_fraction": masked_mean(
                (clipped > plain).to(ratio.dtype), mask, num_tokens=num_tokens
            ),
            "policy/kl_from_rollout": masked_mean(log_ratio.expm1() - log_ratio, mask, num_tokens=num_tokens),
            "policy/ratio_mean": masked_mean(ratio, mask, num_tokens=num_tokens),
        }
    return loss, stats


def value_loss(
    values: Float[Tensor, "*shape"],
    old_values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    cliprange_value: float | None,
    num_tokens: TokenCount | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Return half the critic's squared error, clipped, as a mean over tokens; and stats.

    The error is the larger of two where the critic moved by more than ``cliprange_value``:
    0.5 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2); None does not clip: arXiv:1707.06347,
    eq. 9, halved. The clipping is in no paper but in OpenAI's code, where it comes from baselines'
    ppo2. In units of the reward, squared. No gradient flows into old values and returns.

    Stats as in ``policy_loss``: "value/clip_fraction" (tokens whose clipped error is the larger:
    they get no gradient) and "value/error" (mean squared error, not halved or clipped). OpenAI,
    CleanRL and TRL have the same loss, always clipped; TRL also trains the value after the last
    token, which never enters an advantage here. Raises ValueError as ``masked_mean`` does.
    """
    values, old_values, returns = (
        _select(values, mask),
        _select(old_values, mask).detach(),
        _select(returns, mask).detach(),
    )

    # The larger error is pessimistic: a critic that left the range gets no gradient out of it.
    error = (values - returns).square()
    clipped_error = error
    if cliprange_value is not None:
        # Not old + clamp(new - old), which rounds within the range too and so counts as clipped
        # what is not.
        clipped_error = (
            values.clamp(old_values - cliprange_value, old_values + cliprange_value) - returns
        ).square()
    loss = 0.5 * masked_mean(torch.maximum(error, clipped_error), mask, num_tokens=num_tokens)

    with torch.no_grad():
        stats = {
            "value/clip_fraction": masked_mean(
                (clipped_error > error).to(error.dtype), mask, num_tokens=num_tokens
            ),
            "value/error": masked_mean(error, mask, num_tokens=num_tokens),
        }
    return loss, stats


def pairwise_loss(
    chosen: Float[Tensor, "B"],
    rejected: Float[Tensor, "B"],
    margin: Float[Tensor, "B"] | None = None,
    target: Float[Tensor, "B"] | None = None,
) -> Float[Tensor, ""]:
    """Return Bradley and Terry's loss of pairs: -log sigmoid(chosen - rejected - margin), a mean.

    Ouyang et al. 2022, arXiv:2203.02155, eq. 1. The margin is that of Llama 2 (arXiv:2307.09288,
    eq. 2). ``target`` is the probability that the chosen reply is the better one, 1 by default; the
    loss is then the cross-entropy to it, which for 0.5, a tie, is least where both score alike (the
    neutral pairs of RRM, arXiv:2409.13156). In nats; log 2 for a model that knows nothing. Finite
    at any difference, unlike -log(sigmoid(x)). The same as TRL's RewardTrainer and CleanRL's
    summarize/reward.py, which have no ties; OpenAI learns the best of four by cross-entropy. Raises
    ValueError for an empty batch.
    """
    if not len(chosen):
        raise ValueError(
            "pairwise_loss got no pairs, so there is no mean. Drop empty batches before this point."
        )
    # logsigmoid stays finite where the sigmoid itself rounds to 0.
    difference = _upcast(chosen) - _upcast(rejected)
    if margin is not None:
        difference = difference - _upcast(margin)
    losses = -torch.nn.functional.logsigmoid(difference)
    if target is not None:
        # -log(1 - sigmoid(x)) is -log sigmoid(x) + x.
        losses = losses + (1 - _upcast(target)) * difference
    return losses.mean()


def untied_pairs(
    ranks: Int[Tensor, "N"], prompts: Int[Tensor, "N"]
) -> tuple[Int[Tensor, "M"], Int[Tensor, "M"]]:
    """Return the indices (better, worse) of all pairs of replies to one prompt with other ranks.

    A lower rank is better. Raises nothing.
    """
    better, worse = ((prompts[:, None] == prompts) & (ranks[:, None] < ranks)).nonzero(as_tuple=True)
    return better, worse


def ranking_loss(
    scores: Float[Tensor, "N"], ranks: Int[Tensor, "N"], prompts: Int[Tensor, "N"]
) -> Float[Tensor, ""]:
    """Return -log sigmoid(better - worse), a mean over each prompt's pairs, then over prompts.

    Ouyang et al. 2022, arXiv:2203.02155, eq. 1. N completions in any order: ``prompts`` numbers the
    prompt that each answers, a lower rank is better, and equal ranks are a tie that makes no pair.
    A prompt counts once however many completions it has (1 / (K choose 2) in the paper). With two
    completions a prompt it is ``pairwise_loss``. In nats. TRL has pairs only. Raises ValueError for
    a prompt without two completions of different rank, or no prompt.
    """
    # Each pair belongs to the prompt of its better completion.
    better, worse = untied_pairs(ranks, prompts)
    names, place = prompts.unique(return_inverse=True)
    pair_counts = torch.bincount(place[better], minlength=len(names))
    if not len(names) or not pair_counts.all():
        alone = names[pair_counts == 0].tolist()
        raise ValueError(
            f"ranking_loss got {len(names)} prompts, of which {len(alone)} have no two completions of"
            f" different rank (such as {alone[:3]}), so there is no mean. Leave such prompts out before this"
            " point."
        )

    # Each prompt's losses are added up, then divided by its pairs.
    losses = -torch.nn.functional.logsigmoid(_upcast(scores)[better] - _upcast(scores)[worse])
    return (losses.new_zeros(len(names)).index_add(0, place[better], losses) / pair_counts).mean()
