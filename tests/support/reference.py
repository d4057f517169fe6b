"""Slow references for ppo_math, written from the definitions in another form than the code.

Python floats, one token at a time, sums over lists: no tensors, no running state, no masks inside
the arithmetic. A mask is gone after ``tokens``, which keeps what counts; so holes and padding
cannot be treated wrongly here.
"""

import math
from itertools import combinations
from statistics import fmean, pvariance, stdev


def tokens(mask, *tensors):
    """The counted tokens of each tensor as lists of floats, all rows in a line."""
    keep = mask.flatten().tolist()
    return [
        [number for number, counts in zip(x.flatten().tolist(), keep, strict=True) if counts] for x in tensors
    ]


def gae_row(rewards, values, gamma, lam):
    """Advantages of one row of counted tokens: the average of all n-step advantages with weights (1
    - lam) lam^(n - 1), of which the longest, to the end of the episode, takes all that remains
    (arXiv:1506.02438, the first line of eq. 16)."""

    def n_step(t, n):
        ahead = values[t + n] if t + n < len(values) else 0.0
        return sum(gamma**i * rewards[t + i] for i in range(n)) + gamma**n * ahead - values[t]

    def average(t):
        longest = len(values) - t
        return sum((1 - lam) * lam ** (n - 1) * n_step(t, n) for n in range(1, longest)) + lam ** (
            longest - 1
        ) * n_step(t, longest)

    return [average(t) for t in range(len(values))]


def policy_loss(logprobs, old_logprobs, advantages, cliprange, cliprange_high=None):
    """A ratio that leaves [1 - c, 1 + c] in its advantage's favour earns no more than at the
    border; one against it pays in full. DAPO's range is [1 - c, 1 + high]."""
    high = cliprange if cliprange_high is None else cliprange_high
    losses, clipped, kls, ratios = [], [], [], []
    for new, old, advantage in zip(logprobs, old_logprobs, advantages, strict=True):
        ratio = math.exp(new) / math.exp(old)
        earned = min(ratio, 1 + high) if advantage > 0 else max(ratio, 1 - cliprange)
        losses.append(-advantage * earned)
        clipped.append(advantage != 0 and earned != ratio)
        kls.append(ratio - 1 - math.log(ratio))
        ratios.append(ratio)
    return {
        "loss": fmean(losses),
        "policy/clip_fraction": fmean(clipped),
        "policy/kl_from_rollout": fmean(kls),
        "policy/ratio_mean": fmean(ratios),
    }


def value_loss(values, old_values, returns, cliprange_value):
    """The larger of two errors: of the value, and of the value led back to within the range around
    the old one."""
    losses, clipped, errors = [], [], []
    for value, old, target in zip(values, old_values, returns, strict=True):
        led_back = value
        if cliprange_value is not None and abs(value - old) > cliprange_value:
            led_back = old + math.copysign(cliprange_value, value - old)
        losses.append(max(abs(value - target), abs(led_back - target)) ** 2 / 2)
        clipped.append(abs(led_back - target) > abs(value - target))
        errors.append((value - target) ** 2)
    return {"loss": fmean(losses), "value/clip_fraction": fmean(clipped), "value/error": fmean(errors)}


def explained_variance(values, returns):
    if len(set(returns)) == 1:
        return 0.0
    return 1 - pvariance([target - value for value, target in zip(values, returns, strict=True)]) / pvariance(
        returns
    )


def softmax(logits):
    weights = [math.exp(x) for x in logits]
    return [weight / math.fsum(weights) for weight in weights]


def kl(logits, ref_logits):
    return math.fsum(p * math.log(p / q) for p, q in zip(softmax(logits), softmax(ref_logits), strict=True))


def entropy(logits):
    return math.fsum(p * math.log(1 / p) for p in softmax(logits))


def pairwise_loss(chosen, rejected, margin):
    """-log of the probability that chosen is preferred: 1 / (1 + exp(-difference))."""
    return fmean(math.log1p(math.exp(r + m - c)) for c, r, m in zip(chosen, rejected, margin, strict=True))


def pairwise_loss_with_targets(chosen, rejected, margin, target):
    """The cross-entropy between the wished and the model's probability that chosen is preferred."""
    losses = []
    for c, r, m, wished in zip(chosen, rejected, margin, target, strict=True):
        better, worse = math.exp(c), math.exp(r + m)
        losses.append(
            -wished * math.log(better / (better + worse)) - (1 - wished) * math.log(worse / (better + worse))
        )
    return fmean(losses)


def ranking_loss(scores, ranks, prompts):
    """For each prompt the mean of -log P(better is preferred) over its (K choose 2) couples less
    the ties; then the mean of the prompts."""
    by_prompt = {}
    for score, rank, prompt in zip(scores, ranks, prompts, strict=True):
        by_prompt.setdefault(prompt, []).append((rank, score))
    means = []
    for completions in by_prompt.values():
        couples = [sorted(couple) for couple in combinations(completions, 2) if couple[0][0] != couple[1][0]]
        means.append(fmean(math.log1p(math.exp(worse - better)) for (_, better), (_, worse) in couples))
    return fmean(means)


def leave_one_out(returns, group_size):
    """Each return less the mean of the others of its group, the others listed one by one."""
    found = []
    for i, own in enumerate(returns):
        start = i // group_size * group_size
        found.append(own - fmean(returns[k] for k in range(start, start + group_size) if k != i))
    return found


def group_normalised(returns, group_size, eps):
    """How many of its group's standard deviations (n - 1) each return is above its group's mean."""
    found = []
    for i, own in enumerate(returns):
        start = i // group_size * group_size
        group = returns[start : start + group_size]
        found.append((own - fmean(group)) / (stdev(group) + eps))
    return found


def alike_share(scores, group_size):
    """Of all prompts, those whose best and worst reply score alike but for rounding."""
    groups = [scores[start : start + group_size] for start in range(0, len(scores), group_size)]
    alike = [max(group) - min(group) <= 1e-8 + 1e-5 * abs(min(group)) for group in groups]
    return sum(alike) / len(groups)


def sampling_weights(logprobs, sampling_logprobs, correction, cap):
    """How much likelier each token is to the update than it was to its sampler; too much is cut to
    the cap, or not learned from."""
    found = []
    for new, drawn in zip(logprobs, sampling_logprobs, strict=True):
        weight = math.exp(new) / math.exp(drawn)
        found.append(weight if weight <= cap else {"truncate": cap, "mask": 0.0}[correction])
    return found
