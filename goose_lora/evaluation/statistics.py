"""Statistics of reward models and policies, as pure functions of numbers and texts.

`Numbers` is one finite value a sample, shape (N,): a list, array or tensor of any dtype and device,
computed in float64. Unequal, empty or non-finite input is a UserError everywhere: a nan averaged
away would hide the reply that caused it.
"""

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from torch import Tensor

from goose_lora.errors import UserError

# Lists from JSON, arrays from here, tensors from a model
Numbers = Sequence[float] | np.ndarray | Tensor


class Proportion(NamedTuple):
    """A share in [0, 1] of `n` comparisons with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    n: int


class Estimate(NamedTuple):
    """A mean of `n` values, in their unit, with its bootstrap interval."""

    value: float
    low: float
    high: float
    n: int


def _vector(name: str, values: Numbers) -> np.ndarray:
    array = np.asarray(
        values.detach().double().cpu() if isinstance(values, Tensor) else values, dtype=np.float64
    )
    if array.ndim != 1:
        raise UserError(
            f"{name} has shape {array.shape}, expected (N,): one number a sample. For a (N, 1) score head use"
            " .squeeze(-1)."
        )
    if not array.size:
        raise UserError(f"{name} is empty; at least one value is needed.")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise UserError(
            f"{name}: {bad.size} of {array.size} values are not finite, first {array[bad[0]]} at index"
            f" {bad[0]}; look there."
        )
    return array


def paired(
    first_name: str, first: Numbers, second_name: str, second: Numbers
) -> tuple[np.ndarray, np.ndarray]:
    """Return both as float64 arrays of one length. Raises as the module says."""
    a, b = _vector(first_name, first), _vector(second_name, second)
    if a.size != b.size:
        raise UserError(
            f"{first_name} has {a.size} values and {second_name} {b.size}; give one of each a sample, in the"
            " same order."
        )
    return a, b


def _at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name}={count}; it must be 1 or more.")


def _tail(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise UserError(
            f"confidence={confidence} is not between 0 and 1; for a 95 % interval use confidence=0.95."
        )
    return (1 - confidence) / 2


def wilson_interval(successes: float, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a binomial proportion.

    It holds every p from which the observed share is at most z sqrt(p(1-p)/n) away (Wilson 1927,
    JASA 22:209). Unlike the normal interval it stays in [0, 1] and has a width at 0 and at n
    successes. `successes` may be fractional (ties count one half). Raises UserError for n < 1,
    successes outside [0, n], confidence outside (0, 1).
    """
    _at_least_one(n=n)
    if not 0 <= successes <= n:
        raise UserError(f"successes={successes} is outside [0, n={n}].")
    return _wilson(successes / n, n, -NormalDist().inv_cdf(_tail(confidence)))


def _wilson(share: float, n: float, z: float) -> tuple[float, float]:
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    # The share is inside, whatever the rounding
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _share_above(a: np.ndarray, b: np.ndarray) -> Proportion:
    wins = float((a > b).sum() + 0.5 * (a == b).sum())
    return Proportion(wins / a.size, *wilson_interval(wins, a.size), a.size)


def pairwise_accuracy(chosen: Numbers, rejected: Numbers) -> Proportion:
    """Return the share of pairs whose chosen reply scores higher.

    Row i of both (N,) scores is one pair. A tie counts one half, so that a constant score has
    exactly 0.5. Raises as the module says.
    """
    return _share_above(*paired("chosen", chosen, "rejected", rejected))


def grouped_accuracy(chosen: Numbers, rejected: Numbers, groups: Numbers) -> Proportion:
    """Return ``pairwise_accuracy`` of pairs that come in groups, all (N,).

    Pairs of one group share replies, as those of one ranked list do, and so say less than N pairs.

    The interval is Wilson's for N / (design effect) pairs (Kish 1965): the count from which
    independent pairs would give the variance that the groups' sums show. Groups of one give
    ``pairwise_accuracy``. All right or all wrong shows no variance: a group counts as one pair
    then. Raises as the module says.
    """
    value = pairwise_accuracy(chosen, rejected).value
    a, b = paired("chosen", chosen, "rejected", rejected)
    # The variance of the share, counted by groups: the sum of each group's residuals, squared
    _, place = np.unique(paired("chosen", chosen, "groups", groups)[1], return_inverse=True)
    residuals = np.bincount(place, np.where(a == b, 0.5, a > b) - value)
    # As many independent pairs as would have that variance; never more than there are
    variance, count = float((residuals**2).sum()) / a.size**2, float(a.size)
    if value in (0.0, 1.0):
        count = float(len(residuals))
    elif variance > 0:
        count = min(count, max(1.0, value * (1 - value) / variance))
    return Proportion(value, *_wilson(value, count, -NormalDist().inv_cdf(_tail(0.95))), a.size)


def win_rate(scores_a: Numbers, scores_b: Numbers) -> Proportion:
    """Return the share of N prompts on which a's reply scores higher than b's.

    A tie counts one half, so that win_rate(a, b) + win_rate(b, a) = 1. Both are (N,), in the order
    of the prompts. Raises as the module says.
    """
    return _share_above(*paired("scores_a", scores_a, "scores_b", scores_b))


def _bootstrap_means(values: np.ndarray, random: np.random.Generator, resamples: int) -> np.ndarray:
    # Memory: one resample
    return np.array([values[random.integers(values.size, size=values.size)].mean() for _ in range(resamples)])


def mean_interval(
    values: Numbers, *, confidence: float = 0.95, seed: int = 0, resamples: int = 2000
) -> Estimate:
    """Return the mean of (N,) values and its percentile bootstrap interval.

    Efron 1979, Annals of Statistics 7:1. The same seed gives the same interval. Equal values, or
    only one, give an interval without width. Raises as the module says, for confidence outside (0,
    1), resamples < 1.
    """
    x, tail = _vector("values", values), _tail(confidence)
    _at_least_one(resamples=resamples)
    low, high = np.quantile(_bootstrap_means(x, np.random.default_rng(seed), resamples), [tail, 1 - tail])
    return Estimate(float(x.mean()), float(low), float(high), x.size)


def _unit_deviations(x: np.ndarray) -> np.ndarray:
    if x.min() == x.max():
        return np.zeros_like(x)
    # Scale, centre, then norm
    x = x / np.abs(x).max()  # the squares below neither overflow nor vanish
    x = x - x.mean()
    return x / np.linalg.norm(x)


def correlation(x: Numbers, y: Numbers) -> float:
    """Return Pearson's correlation of (N,) x and y, in [-1, 1].

    Where either is constant (one value included) it is undefined: 0.0 here, nan in numpy. Raises as
    the module says.
    """
    x, y = map(_unit_deviations, paired("x", x, "y", y))
    return float(np.clip(x @ y, -1.0, 1.0))


def spearman(x: Numbers, y: Numbers) -> float:
    """Return Spearman's rank correlation (1904), ties sharing their mean rank.

    It is the `correlation` of the ranks; 0.0 for a constant, as there.
    """
    return correlation(*map(_ranks, paired("x", x, "y", y)))


def _ranks(x: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    # The mean of the ranks that equal values take up together
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _ngrams(texts: Sequence[str], n: int) -> list[list[tuple[str, ...]]]:
    if isinstance(texts, str):
        raise TypeError(
            f"texts is one string ({texts[:20]!r}), which would be read letter by letter; give a list of"
            " strings."
        )
    _at_least_one(n=n)
    return [
        list(zip(*(words[i:] for i in range(n)), strict=False))
        for words in (text.lower().split() for text in texts)
    ]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return the share of n-grams over all texts that are distinct, in [0, 1].

    Li et al. 2016, arXiv 1510.03055; 0.0 when there is no n-gram. Lower-cased words, split at white
    space. It falls as texts grow in number or length. TypeError for a bare string, UserError for n
    < 1.
    """
    grams = [gram for row in _ngrams(texts, n) for gram in row]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(texts: Sequence[str], n: int = 3) -> float:
    """Return the mean share of n-grams of a text that repeat others of it, in [0, 1).

    That is 1 - distinct / total n-grams inside the text (seq-rep-n, Welleck et al. 2020, arXiv
    1908.04319). Words as in `distinct_n`; a text shorter than n words counts as 0. Raises as
    `distinct_n`, and UserError for no texts.
    """
    _at_least_one(texts=len(texts))
    return sum(1 - len(set(row)) / len(row) if row else 0.0 for row in _ngrams(texts, n)) / len(texts)


def matched_length_difference(
    values_a: Numbers,
    lengths_a: Numbers,
    values_b: Numbers,
    lengths_b: Numbers,
    *,
    bins: int = 5,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> Estimate:
    """Return the mean of a minus the mean of b among replies of like length.

    Is a better, or only longer? `n` is how many of a had a counterpart.

    Subclassification (Cochran 1968, Biometrics 24:295): the pooled lengths are cut at their
    quantiles into at most `bins` strata; where a and b both have members, the differences of means
    are averaged with the number of a's members as weight. A difference of length inside a stratum
    stays. The interval is a percentile bootstrap inside the strata; a stratum's only member adds no
    width. values_a, lengths_a: (N,); values_b, lengths_b: (M,), lengths in tokens. Raises as the
    module says, when no stratum holds both, for bins or resamples < 1.
    """
    a, tokens_a = paired("values_a", values_a, "lengths_a", lengths_a)
    b, tokens_b = paired("values_b", values_b, "lengths_b", lengths_b)
    tail = _tail(confidence)
    _at_least_one(bins=bins, resamples=resamples)
    # Strata: both sides' lengths, cut at the quantiles of all
    pooled = np.sort(np.concatenate([tokens_a, tokens_b]))
    # Lengths themselves: np.quantile rounds beside them and splits equal ones
    cuts = pooled[np.arange(1, bins) * pooled.size // bins]
    stratum_a, stratum_b = (
        np.searchsorted(cuts, tokens_a, side="right"),
        np.searchsorted(cuts, tokens_b, side="right"),
    )
    # Only where both have members is there anything to compare
    shared = np.intersect1d(stratum_a, stratum_b)
    if not shared.size:
        raise UserError(
            f"no length stratum holds members of both: lengths of a are {tokens_a.min():g} to"
            f" {tokens_a.max():g}, of b {tokens_b.min():g} to {tokens_b.max():g}. Use fewer bins than {bins},"
            " or compare replies of like length."
        )
    # The weighted mean of the strata's differences, and of their resamples
    random, covered = np.random.default_rng(seed), int(np.isin(stratum_a, shared).sum())
    value, resampled = 0.0, np.zeros(resamples)
    for stratum in shared:
        in_a, in_b = a[stratum_a == stratum], b[stratum_b == stratum]
        value += in_a.size / covered * (in_a.mean() - in_b.mean())
        resampled += (
            in_a.size
            / covered
            * (_bootstrap_means(in_a, random, resamples) - _bootstrap_means(in_b, random, resamples))
        )
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high), covered)


def calibration(
    chosen_scores: Numbers, rejected_scores: Numbers, bins: int = 5
) -> tuple[list[dict[str, float]], float]:
    """Return how well (N,) score differences, in logits, predict which reply is chosen.

    Bradley and Terry (1952): sigmoid(|difference|), the predicted probability that the higher score
    is the chosen reply, against how often it is (a tie: one half), in `bins` equal parts of [0.5,
    1].

    Returns the occupied bins {"predicted", "observed", "n"} in rising order, and the expected
    calibration error (Guo et al. 2017, arXiv 1706.04599): |observed - predicted| weighted by n,
    biased upwards when bins hold few pairs. Raises as the module says, for bins < 1.
    """
    chosen, rejected = paired("chosen_scores", chosen_scores, "rejected_scores", rejected_scores)
    _at_least_one(bins=bins)
    # What the model predicts, what happened, and the bin of each pair
    predicted = 1 / (1 + np.exp(-np.abs(chosen - rejected)))
    observed = np.where(chosen == rejected, 0.5, chosen > rejected)
    place = np.minimum((2 * bins * (predicted - 0.5)).astype(int), bins - 1)
    rows = [
        {
            "predicted": float(predicted[place == i].mean()),
            "observed": float(observed[place == i].mean()),
            "n": int((place == i).sum()),
        }
        for i in np.unique(place)
    ]
    return rows, sum(row["n"] * abs(row["observed"] - row["predicted"]) for row in rows) / chosen.size
