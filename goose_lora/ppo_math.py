"""The arithmetic of PPO and of the reward model: functions of tensors and floats, without models or configuration.

Letters in shapes: B sequences, T response tokens, V vocabulary. ``mask`` is true where a token counts. What lies elsewhere, NaN
included, has no say in a value or a gradient. Everything computes in at least fp32; float64 stays float64.

"OpenAI" below is lm-human-preferences (the code of Ziegler et al. 2019, arXiv:1909.08593), "CleanRL" is its port to PyTorch by CleanRL's
author, vwxyzjn/lm-human-preference-details, and "TRL" its PPOTrainer from 0.12 to 1.12. OpenAI and CleanRL have no mask: responses have
a fixed length there, and every mean is over all positions.
"""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
TokenCount = int | float | Int[Tensor, ""] | Float[Tensor, ""]


class Moments(NamedTuple):
    """Count, mean and population variance of some tokens."""

    count: Int[Tensor, ""]
    mean: Float[Tensor, ""]
    var: Float[Tensor, ""]


def _upcast(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return x if x.dtype == torch.float64 else x.float()


def _select(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``x`` in at least fp32, zero outside the mask. Comes before all arithmetic: 0 * NaN is NaN, in the backward pass too."""
    return torch.where(mask, _upcast(x), 0.0)


def masked_sum(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Sum of ``x`` over the mask; 0 for an empty mask. TRL multiplies by the mask instead, which spreads a NaN from padding."""
    return _select(x, mask).sum()


def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, num_tokens: TokenCount | None = None) -> Float[Tensor, ""]:
    """Mean of ``x`` over the mask, or this micro-batch's share of the mean over a whole mini-batch.

    ``num_tokens`` is the token count of the mini-batch over all its micro-batches and ranks. The results then add up to its token mean,
    however it was cut, and an empty mask gives 0. DDP averages gradients over ranks where this wants their sum: multiply the loss by the
    number of ranks there, as transformers.Trainer does. TRL averages the means of micro-batches and ranks, which gives a token beside short
    responses more weight than one beside long ones; OpenAI's and CleanRL's rows are all equally long.

    Raises ValueError if the mask is empty and ``num_tokens`` is not given, or if ``num_tokens`` is not positive.
    """
    if num_tokens is None:
        num_tokens = mask.sum()
        if num_tokens == 0:
            raise ValueError(
                f"the mask of shape {tuple(mask.shape)} selects no token, so there is no mean. Drop empty responses before this point, "
                "or pass num_tokens (the count of the whole mini-batch) if only this micro-batch may be empty."
            )
    elif num_tokens <= 0:
        raise ValueError(
            f"num_tokens={int(num_tokens)}, but it is the token count of a whole mini-batch and so at least 1. Pass the sum of "
            "mask.sum() over all micro-batches and ranks, and skip a mini-batch without any token."
        )
    return masked_sum(x, mask) / num_tokens


def moments(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Moments:
    """Count, mean and population variance (divided by n) of ``x`` over the mask, in two passes.

    TRL divides by n - 1, which is infinite for one token. Raises ValueError if the mask is empty.
    """
    x = _select(x, mask)
    mean = masked_mean(x, mask)
    return Moments(mask.sum(), mean, masked_mean((x - mean).square(), mask))


def merge_moments(parts: list[Moments]) -> Moments:
    """Moments of all tokens together from the moments of disjoint parts, such as ranks (Chan, Golub and LeVeque 1979, STAN-CS-79-773).

    The variance is what lies within the parts plus what lies between their means; sums of squares, which cancel, do not occur.
    TRL, OpenAI and CleanRL whiten by the statistics of each rank. Raises ValueError if there are no parts.
    """
    if not parts:
        raise ValueError("merge_moments got no parts. Pass the Moments of at least one rank or micro-batch.")
    counts, means, variances = (torch.stack(column) for column in zip(*parts, strict=True))
    count = counts.sum()
    mean = (counts * means).sum() / count
    return Moments(count, mean, (counts * (variances + (means - mean).square())).sum() / count)


def whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    shift_mean: bool = True,
    statistics: Moments | None = None,
    eps: float = 1e-8,
) -> Float[Tensor, "*shape"]:
    """Scale ``x`` to variance 1 over the mask, and to mean 0 unless ``shift_mean`` is false (the mean then stays); 0 outside the mask.

    (x - mean) / sqrt(var + eps), as OpenAI's ``utils.whiten``. ``statistics`` replaces the mean and variance of ``x`` itself: pass
    ``merge_moments`` over all ranks. One token, or equal ones, give 0. TRL divides the variance by n - 1, so that one token gives NaN, and
    leaves junk outside the mask. Raises ValueError if the mask is empty and no statistics are given.
    """
    x = _select(x, mask)
    _, mean, var = moments(x, mask) if statistics is None else statistics
    whitened = (x - mean) * torch.rsqrt(var + eps)
    return _select(whitened if shift_mean else whitened + mean, mask)


def gae(
    rewards: Float[Tensor, "B T"], values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, gamma: float, lam: float
) -> Float[Tensor, "B T"]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16); 0 outside the mask.

    A_t = sum_k (gamma lam)^k delta_(t+k), with delta_t = r_t + gamma V_(t+1) - V_t. After a row's last counted token the episode is over
    and its value is 0. Time is counted in counted tokens: one outside the mask, such as a user turn between two replies, is passed over,
    neither discounting nor bootstrapped from, and its reward is lost (put it on the counted token before). Returns are advantages + values.

    OpenAI and CleanRL run to the fixed length. TRL runs to one position past the response, where it puts the score, and so bootstraps from
    the value after the last token. None of them knows holes. Rows without a token are 0; raises nothing.
    """
    rewards, values = _upcast(rewards), _upcast(values)
    advantages = torch.zeros_like(rewards + values)
    advantage_ahead = value_ahead = advantages.new_zeros(len(advantages))
    for t in reversed(range(advantages.shape[1])):
        td_error = rewards[:, t] + gamma * value_ahead - values[:, t]
        advantage_ahead = torch.where(mask[:, t], td_error + gamma * lam * advantage_ahead, advantage_ahead)
        value_ahead = torch.where(mask[:, t], values[:, t], value_ahead)
        advantages[:, t] = advantage_ahead
    return _select(advantages, mask)


def leave_one_out(returns: Float[Tensor, "B"], group_size: int) -> Float[Tensor, "B"]:
    """Each reply's return less the mean return of the other replies to the same prompt: RLOO (Ahmadian et al. 2024, arXiv:2402.14740, eq. 8).

    Replies to one prompt stand together: B is a multiple of ``group_size``. As in TRL's RLOOTrainer. Raises ValueError for groups of one.
    """
    groups = _groups(_upcast(returns), group_size)
    others = (groups.sum(-1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def group_normalised(returns: Float[Tensor, "B"], group_size: int, *, eps: float = 1e-4) -> Float[Tensor, "B"]:
    """Each reply's return less its group's mean, over its group's standard deviation: GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1.2).

    The deviation is the sample's (n - 1) plus ``eps``, as in TRL's GRPOTrainer: a group whose replies score alike teaches nothing. Raises
    ValueError for groups of one.
    """
    groups = _groups(_upcast(returns), group_size)
    return ((groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + eps)).flatten()


def _groups(returns: Float[Tensor, "B"], group_size: int) -> Float[Tensor, "P G"]:
    if group_size < 2 or len(returns) % group_size:
        raise ValueError(
            f"{len(returns)} returns in groups of {group_size}: replies are compared with others to the same prompt, so a group is 2 or more, "
            "and all are of one size. Set num_generations to 2 or more."
        )
    return returns.view(-1, group_size)


def policy_loss(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    cliprange: float,
    num_tokens: TokenCount | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Clipped surrogate objective, negated to be minimised (Schulman et al. 2017, arXiv:1707.06347, eq. 7), a mean over tokens.

    max(-A r, -A clip(r, 1 - cliprange, 1 + cliprange)) with r = exp(logprobs - old_logprobs). Log-probabilities in nats, of the sampled
    tokens, old ones from the policy that sampled them. No gradient flows into the old log-probabilities and the advantages.

    Stats, without gradient and shared out by ``num_tokens`` like the loss: "policy/clip_fraction" (tokens whose clipped term is the larger:
    leaving the range in the advantage's favour), "policy/kl_from_rollout" (KL(old || new) in nats a token, by k3), "policy/ratio_mean".

    The loss is TRL's, OpenAI's and CleanRL's, but for the mean (see ``masked_mean``). Their approxkl is k2, and in TRL it and the ratio
    are means over padding too, which draws them towards 0 and 1. Raises ValueError as ``masked_mean`` does.
    """
    log_ratio = _select(logprobs, mask) - _select(old_logprobs, mask).detach()
    advantages = _select(advantages, mask).detach()
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = masked_mean(torch.maximum(plain, clipped), mask, num_tokens=num_tokens)
    with torch.no_grad():
        stats = {
            "policy/clip_fraction": masked_mean((clipped > plain).to(ratio.dtype), mask, num_tokens=num_tokens),
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
    """Half the squared error of the critic, pessimistic where it moved by more than ``cliprange_value``, a mean over tokens.

    0.5 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2); None does not clip: arXiv:1707.06347, eq. 9, halved. The clipping is in no
    paper but in OpenAI's code, where it comes from baselines' ppo2. In units of the reward, squared. No gradient flows into old values
    and returns.

    Stats as in ``policy_loss``: "value/clip_fraction" (tokens whose clipped error is the larger: they get no gradient) and "value/error"
    (mean squared error, not halved or clipped). OpenAI, CleanRL and TRL have the same loss, always clipped; TRL also trains the value
    after the last token, which never enters an advantage here. Raises ValueError as ``masked_mean`` does.
    """
    values, old_values, returns = _select(values, mask), _select(old_values, mask).detach(), _select(returns, mask).detach()
    error = (values - returns).square()
    clipped_error = error
    if cliprange_value is not None:
        # Not old + clamp(new - old), which rounds within the range too and so counts as clipped what is not.
        clipped_error = (values.clamp(old_values - cliprange_value, old_values + cliprange_value) - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(error, clipped_error), mask, num_tokens=num_tokens)
    with torch.no_grad():
        stats = {
            "value/clip_fraction": masked_mean((clipped_error > error).to(error.dtype), mask, num_tokens=num_tokens),
            "value/error": masked_mean(error, mask, num_tokens=num_tokens),
        }
    return loss, stats


def kl_per_token(
    logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"], *, estimator: KLEstimator
) -> Float[Tensor, "*shape"]:
    """KL(policy || reference) estimated at each token that was sampled from the policy (Schulman, joschu.net/blog/kl-approx.html), in nats.

    With d = logprobs - ref_logprobs: k1 = d, unbiased, of either sign; k2 = d^2 / 2, biased in third order; k3 = exp(-d) - 1 + d, unbiased
    and never negative, but of large variance where the reference has mass that the policy lost. They are for the reward; as a loss only k2
    has the gradient of the KL in expectation (that of k1 is 0). There is no mask: padding stays junk.

    OpenAI, CleanRL and TRL 0.12 have k1, TRL 1.12 k1 and k3; k3 goes by expm1 here, since exp(-d) - 1 + d is rounding noise in fp32 for
    |d| < 3e-4. Raises ValueError for an unknown estimator.
    """
    difference = _upcast(logprobs) - _upcast(ref_logprobs)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kl_estimator={estimator!r} is unknown. Use one of {', '.join(get_args(KLEstimator))}.")


def exact_kl(logits: Float[Tensor, "*shape V"], ref_logits: Float[Tensor, "*shape V"]) -> Float[Tensor, "*shape"]:
    """KL(policy || reference) of the next token, sum_v p_v (log p_v - log q_v), in nats; for evaluation, where logits are at hand.

    A token of logit -inf adds 0; it is infinite where the reference alone excludes a token. TRL, OpenAI and CleanRL only sample it.
    Raises nothing.
    """
    log_p, log_q = _upcast(logits).log_softmax(-1), _upcast(ref_logits).log_softmax(-1)
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)


def entropy(logits: Float[Tensor, "*shape V"]) -> Float[Tensor, "*shape"]:
    """Entropy of the next token, -sum_v p_v log p_v, in nats.

    logsumexp(x) - sum_v p_v x_v in TRL, OpenAI and CleanRL is the same, but NaN where a logit is -inf, and TRL computes it in the model's
    dtype. TRL's "objective/entropy" is the sum of -logprobs instead, a sample of the sequence's entropy. Raises nothing.
    """
    log_p = _upcast(logits).log_softmax(-1)
    p = log_p.exp()
    return -(p * torch.where(p > 0, log_p, 0.0)).sum(-1)


def gather_logprobs(logits: Float[Tensor, "*shape V"], ids: Int[Tensor, "*shape"], *, temperature: float = 1.0) -> Float[Tensor, "*shape"]:
    """log softmax(logits / temperature) at ``ids``, in nats: the log-probability under the distribution that was sampled from.

    ``ids`` in padding must be valid tokens too (not -100). TRL and CleanRL's summarize/ppo.py divide by temperature + 1e-7, and in the
    model's dtype, of which bf16 has three digits; OpenAI has no epsilon either. Raises ValueError unless the temperature is positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} gives no distribution. Use a positive one; 1.0 is the model's own.")
    return (_upcast(logits) / temperature).log_softmax(-1).gather(-1, ids.long().unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def explained_variance(
    values: Float[Tensor, "*shape"], returns: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """1 - Var(returns - values) / Var(returns) over the mask: 1 is a perfect critic, 0 one no better than a constant. No gradient.

    0 if all returns are equal: there is nothing to explain (cleanrl's ppo.py for games gives NaN, which poisons averages). A constant
    offset does not show here, unlike in OpenAI's 1 - error / Var(returns); TRL does not report it. Raises ValueError if the mask is empty.
    """
    returns, residual = _select(returns, mask), _select(returns, mask) - _select(values, mask)
    total, unexplained = moments(returns, mask).var, moments(residual, mask).var
    # Not total == 0: the mean of equal numbers is rounded, which leaves a variance of 1e-34 or so to divide by.
    is_constant = returns[mask].min() == returns[mask].max()
    return torch.where(is_constant, 0.0, 1 - unexplained / total)


def pairwise_loss(chosen: Float[Tensor, "B"], rejected: Float[Tensor, "B"], margin: Float[Tensor, "B"] | None = None) -> Float[Tensor, ""]:
    """Bradley-Terry: -log sigmoid(chosen - rejected - margin), a mean over pairs (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

    The margin is that of Llama 2 (arXiv:2307.09288, eq. 2). In nats; log 2 for a model that knows nothing. Finite at any difference,
    unlike -log(sigmoid(x)). The same as TRL's RewardTrainer and CleanRL's summarize/reward.py; OpenAI learns the best of four by
    cross-entropy. Raises ValueError for an empty batch.
    """
    if not len(chosen):
        raise ValueError("pairwise_loss got no pairs, so there is no mean. Drop empty batches before this point.")
    difference = _upcast(chosen) - _upcast(rejected)
    if margin is not None:
        difference = difference - _upcast(margin)
    return -torch.nn.functional.logsigmoid(difference).mean()


def untied_pairs(ranks: Int[Tensor, "N"], prompts: Int[Tensor, "N"]) -> tuple[Int[Tensor, "M"], Int[Tensor, "M"]]:
    """Indices (better, worse) of all pairs of completions to one prompt whose ranks differ; a lower rank is better. Raises nothing."""
    better, worse = ((prompts[:, None] == prompts) & (ranks[:, None] < ranks)).nonzero(as_tuple=True)
    return better, worse


def ranking_loss(scores: Float[Tensor, "N"], ranks: Int[Tensor, "N"], prompts: Int[Tensor, "N"]) -> Float[Tensor, ""]:
    """-log sigmoid(better - worse), a mean over each prompt's pairs, then over prompts (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

    N completions in any order: ``prompts`` numbers the prompt that each answers, a lower rank is better, and equal ranks are a tie that
    makes no pair. A prompt counts once however many completions it has (1 / (K choose 2) in the paper). With two completions a prompt it is
    ``pairwise_loss``. In nats. TRL has pairs only. Raises ValueError for a prompt without two completions of different rank, or no prompt.
    """
    better, worse = untied_pairs(ranks, prompts)
    names, place = prompts.unique(return_inverse=True)
    pair_counts = torch.bincount(place[better], minlength=len(names))
    if not len(names) or not pair_counts.all():
        alone = names[pair_counts == 0].tolist()
        raise ValueError(
            f"ranking_loss got {len(names)} prompts, of which {len(alone)} have no two completions of different rank (such as {alone[:3]}), so "
            "there is no mean. Leave such prompts out before this point."
        )
    losses = -torch.nn.functional.logsigmoid(_upcast(scores)[better] - _upcast(scores)[worse])
    return (losses.new_zeros(len(names)).index_add(0, place[better], losses) / pair_counts).mean()
