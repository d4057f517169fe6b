"""A reward model on a benchmark: accuracy by subset, the best of N, and length held equal."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from goose_lora.evaluation.reward_model import HeldOut, HeldOutScores, held_out_verdict, untied
from goose_lora.evaluation.statistics import Proportion, grouped_accuracy, wilson_interval
from goose_lora.evaluation.verdict import RewardVerdict


@dataclass(frozen=True)
class LengthControl:
    """Accuracy on pairs whose better reply is the longer, on those where it is the shorter.

    ``balanced`` is the mean of both: a score that is length alone has 0.5 there. Each is None where
    there are no such pairs.
    """

    longer: Proportion | None
    shorter: Proportion | None
    balanced: Proportion | None


@dataclass(frozen=True)
class SubsetVerdict:
    """The figures of some prompts: pairs told apart, and a best reply on top of all of a prompt."""

    accuracy: Proportion
    best_of: Proportion
    length: LengthControl
    replies: int

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON values."""
        return {
            "prompts": self.best_of.n,
            "replies": self.replies,
            **_named("accuracy", self.accuracy),
            **_named("best_of_n", self.best_of),
            **_named("accuracy_chosen_longer", self.length.longer),
            **_named("accuracy_chosen_shorter", self.length.shorter),
            **_named("accuracy_length_balanced", self.length.balanced),
        }

    def row(self, name: str) -> dict[str, object]:
        """Return a row of the table."""
        return {
            "subset": name,
            "prompts": str(self.best_of.n),
            "replies": str(self.replies),
            "accuracy": _shown(self.accuracy),
            "best of N": _shown(self.best_of),
            "length balanced": _shown(self.length.balanced),
        }


@dataclass(frozen=True)
class BenchmarkVerdict:
    """A reward model on a benchmark: all prompts, each subset, and the mean of the subsets."""

    pairs: RewardVerdict
    whole: SubsetVerdict
    subsets: dict[str, SubsetVerdict]
    mean_of_subsets: Proportion | None

    def to_dict(self) -> dict[str, object]:
        """Return JSON values: those of a verdict on pairs, with the benchmark's beside."""
        return {
            **self.pairs.to_dict(),
            **self.whole.to_dict(),
            "subsets": {name: subset.to_dict() for name, subset in self.subsets.items()},
            **_named("mean_of_subsets", self.mean_of_subsets),
        }

    def rows(self) -> list[dict[str, object]]:
        """Return the rows of the table: subsets, then their mean, then all prompts."""
        rows: list[dict[str, object]] = [subset.row(name) for name, subset in self.subsets.items()]
        if self.mean_of_subsets is not None:
            rows.append({"subset": "mean of subsets", "best of N": _shown(self.mean_of_subsets)})
        return [*rows, self.whole.row("all")]


def benchmark_verdict(
    held_out: HeldOut, scores: HeldOutScores, subsets: Sequence[str | None] | None = None
) -> BenchmarkVerdict:
    """Return the verdict of scores on a benchmark; ``subsets`` is each prompt's, if any."""
    found = {}
    for name in dict.fromkeys(name for name in subsets or () if name is not None):
        places = [place for place, own in enumerate(subsets or ()) if own == name]
        found[name] = _subset(held_out, scores, places)
    return BenchmarkVerdict(
        held_out_verdict(held_out, scores),
        _subset(held_out, scores, list(range(len(held_out.ranks)))),
        found,
        _mean([subset.best_of for subset in found.values()]) if found else None,
    )


def _subset(held_out: HeldOut, scores: HeldOutScores, places: list[int]) -> SubsetVerdict:
    # The pairs among the replies to each prompt, with their lengths
    own = [scores.completions[place] for place in places]
    ranks = [held_out.ranks[place] for place in places]
    lengths = [np.array([len(ids) for ids in held_out.completions[place]]) for place in places]
    better, worse, prompts = untied(own, ranks)
    longer = np.sign(np.subtract(*untied(lengths, ranks)[:2]))

    def among(sign: int) -> Proportion | None:
        mine = longer == sign
        return grouped_accuracy(better[mine], worse[mine], prompts[mine]) if mine.any() else None

    halves = among(1), among(-1)
    balanced = None if halves[0] is None or halves[1] is None else _mean([halves[0], halves[1]])
    return SubsetVerdict(
        grouped_accuracy(better, worse, prompts),
        best_of_n(own, ranks),
        LengthControl(*halves, balanced),
        sum(map(len, ranks)),
    )


def best_of_n(scores: Sequence[np.ndarray], ranks: Sequence[Sequence[int]]) -> Proportion:
    """Return the share of prompts to which a best reply has the highest score of all.

    Where several share the highest score, the prompt counts as the share of best replies among
    them: N equal scores count as 1 / N, as in RewardBench 2 (arXiv:2506.01937).
    """
    right = 0.0
    for own, order in zip(scores, ranks, strict=True):
        top = np.asarray(own) == np.max(own)
        right += float((top & (np.asarray(order) == min(order))).sum() / top.sum())
    return Proportion(right / len(ranks), *wilson_interval(right, len(ranks)), len(ranks))


def _mean(parts: Sequence[Proportion]) -> Proportion:
    """Return the mean of shares, its interval by MOVER (Zou and Donner 2008), as if independent."""
    value = sum(part.value for part in parts) / len(parts)
    below = sum((part.value - part.low) ** 2 for part in parts) ** 0.5 / len(parts)
    above = sum((part.high - part.value) ** 2 for part in parts) ** 0.5 / len(parts)
    return Proportion(value, value - below, value + above, sum(part.n for part in parts))


def _named(name: str, share: Proportion | None) -> dict[str, object]:
    return {name: share and share.value, f"{name}_ci": share and [share.low, share.high]}


def _shown(share: Proportion | None) -> str:
    return "" if share is None else f"{share.value:.3f} ({share.low:.2f} to {share.high:.2f})"
