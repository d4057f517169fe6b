"""The verdict on a reward model, before anything is trained on its scores.

It is made of scores on held-out pairs and on probes.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from goose_lora.errors import UserError
from goose_lora.evaluation.statistics import (
    Numbers,
    Proportion,
    calibration,
    correlation,
    grouped_accuracy,
    paired,
    pairwise_accuracy,
    win_rate,
)
from goose_lora.files import is_number, read_json, write_json

logger = logging.getLogger(__name__)

LENGTH_CORRELATION_LIMIT = 0.5  # above it, a quarter of the variance of the score is length
# Logits; below it, sigmoid(score difference) is within 0.01 of 0.5 for nearly every pair
SCORE_STD_FLOOR = 0.01
CALIBRATION_ERROR_LIMIT = 0.1  # probability
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Replies that should lose to the chosen one, and what follows where they do not.
PROBES = {
    "empty": "PPO will learn to say nothing; add pairs whose rejected reply is empty (augment_pairs)",
    "repeated": "PPO will learn to repeat itself; add pairs whose rejected reply does (augment_pairs)",
    "truncated": "PPO will learn to stop halfway; add pairs whose rejected reply is cut off (augment_pairs)",
    "flattering": (
        "PPO will learn to flatter; add pairs whose rejected reply does, or put replies to other prompts"
        " beside the chosen one (augment_pairs)"
    ),
    "gushing": "PPO will learn to pile up warm words; put replies to other prompts beside the chosen one",
    "fawning": "PPO will learn to flatter with words of the prompt; add pairs whose rejected reply does",
    "other_prompt": (
        "the prompt has little say; where replies answer their prompts, put some to other prompts beside"
        " the chosen one (augment_pairs)"
    ),
}


class JudgedRewards(Protocol):
    """A verdict as it is saved and shown."""

    def to_dict(self) -> dict[str, object]: ...
    def lines(self) -> list[str]: ...


class ProbeScores(NamedTuple):
    """Scores of one probe to M prompts, and of the held-out replies to them: (M,) each.

    ``chosen`` is the best and ``rejected`` the worst reply to the same prompt.
    """

    probe: Numbers
    chosen: Numbers
    rejected: Numbers


@dataclass(frozen=True)
class ProbeVerdict:
    """How often a probe scores higher than the replies to its prompt; a tie: one half."""

    score_mean: float
    beats_chosen: Proportion
    beats_rejected: Proportion

    @property
    def fails(self) -> bool:
        return self.beats_chosen.value > 0.5


@dataclass(frozen=True)
class RewardVerdict:
    """The figures of a reward model on held-out pairs.

    Scores and margins are in logits, lengths in tokens; standard deviations have divisor N.
    """

    accuracy: Proportion
    accuracy_any_pair: Proportion | None  # on a second test set
    length_correlation: float  # score against response length, chosen and rejected replies together
    score_mean: float
    score_std: float
    margin_mean: float  # chosen minus rejected
    margin_std: float
    margin_negative: float  # share of pairs
    margin_quantiles: dict[str, float]  # by their share of pairs, "0.05" to "0.95"
    calibration_error: float
    calibration_bins: list[dict[str, float]]
    n_pairs: int
    n_prompts: int
    probes: dict[str, ProbeVerdict] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON values.

        The three of the second test set are None where there was none. ``warnings`` are the lines
        that are not ok.
        """
        second = self.accuracy_any_pair
        return {
            **vars(self),
            "accuracy": self.accuracy.value,
            "accuracy_ci": [self.accuracy.low, self.accuracy.high],
            "accuracy_any_pair": second and second.value,
            "accuracy_any_pair_ci": second and [second.low, second.high],
            "n_any_pairs": second and second.n,
            "probes": {name: _plain(probe) for name, probe in self.probes.items()},
            "warnings": [line for line in self.lines() if not line.endswith(": ok")],
        }

    def lines(self) -> list[str]:
        """Return one line a number: the number, the verdict, and what to do where it is bad."""
        among = f"{self.accuracy.n} pairs" + (
            f" of {self.n_prompts} prompts" if self.n_prompts < self.n_pairs else ""
        )
        at_chance = (
            "do not run PPO on this reward model; more or cleaner pairs, more epochs, or a lower learning"
            " rate"
        )
        # Accuracy, on the pairs of the test set and on those of a second one
        lines = [_accuracy_line("accuracy", self.accuracy, among, at_chance)]
        if self.accuracy_any_pair:
            among = f"{self.accuracy_any_pair.n} pairs"
            lines.append(
                _accuracy_line(
                    "accuracy on any pair",
                    self.accuracy_any_pair,
                    among,
                    "such pairs are not told apart; train on more",
                )
            )
        # Then each figure with its limit, and what to do beyond it
        longer, low, high = (
            self.length_correlation > 0,
            self.margin_quantiles["0.05"],
            self.margin_quantiles["0.95"],
        )
        checks = [
            (
                f"correlation of score and length {self.length_correlation:+.2f}",
                abs(self.length_correlation) > LENGTH_CORRELATION_LIMIT,
                (
                    f"PPO will learn length ({'longer' if longer else 'shorter'} replies); balance lengths"
                    " inside the pairs, or add a length term to the reward"
                ),
            ),
            (
                (
                    f"score mean {self.score_mean:.3g}, standard deviation {self.score_std:.3g}, mean margin"
                    f" {self.margin_mean:.3g}"
                ),
                self.score_std < SCORE_STD_FLOOR,
                "nearly one score for every reply; check that the score head was trained and loaded",
            ),
            (
                (
                    f"margins of 5 to 95 % of the pairs {low:.3g} to {high:.3g}, standard deviation"
                    f" {self.margin_std:.3g}, {self.margin_negative:.0%} negative"
                ),
                -low > max(high, 0.0),
                "the largest margins are on the wrong side; look at those pairs for swapped labels",
            ),
            (
                f"calibration error {self.calibration_error:.2f}",
                self.calibration_error > CALIBRATION_ERROR_LIMIT,
                (
                    "the size of a score difference is not to be trusted; more pairs, and leave"
                    " score_normalization on"
                ),
            ),
            *((_probe_text(name, probe), probe.fails, PROBES[name]) for name, probe in self.probes.items()),
        ]
        return lines + [f"{number}: {action if bad else 'ok'}" for number, bad, action in checks]


def _plain(probe: ProbeVerdict) -> dict[str, object]:
    chosen, rejected = probe.beats_chosen, probe.beats_rejected
    return {
        "score_mean": probe.score_mean,
        "beats_chosen": chosen.value,
        "beats_chosen_ci": [chosen.low, chosen.high],
        "beats_rejected": rejected.value,
        "beats_rejected_ci": [rejected.low, rejected.high],
        "n": chosen.n,
    }


def _probe_text(name: str, probe: ProbeVerdict) -> str:
    share = probe.beats_chosen
    return (
        f"{name} reply: score {probe.score_mean:.3g} on average, above the chosen reply to {share.value:.2f}"
        f" of {share.n} prompts ({share.low:.2f} to {share.high:.2f}), above the rejected to"
        f" {probe.beats_rejected.value:.2f}"
    )


def _accuracy_line(name: str, accuracy: Proportion, among: str, at_chance: str) -> str:
    text = f"{name} {accuracy.value:.2f} (95 % interval {accuracy.low:.2f} to {accuracy.high:.2f}, {among})"
    if accuracy.high < 0.5:
        return (
            f"{text} is below chance: do not run PPO on this reward model; chosen and rejected look swapped"
        )
    return f"{text} includes chance: {at_chance}" if accuracy.low <= 0.5 else f"{text}: ok"


def reward_verdict(
    chosen: Numbers,
    rejected: Numbers,
    chosen_lengths: Numbers,
    rejected_lengths: Numbers,
    any_pair: tuple[Numbers, ...] | None = None,
    *,
    prompts: Numbers | None = None,
    probes: Mapping[str, ProbeScores] | None = None,
) -> RewardVerdict:
    """Return the verdict on (N,) held-out scores in logits and lengths in tokens.

    Args:
        any_pair: (chosen, rejected) scores of a second test set, and the number of each pair's
            prompt where several are of one.
        prompts: the number of each pair's prompt, where several pairs are of one ranked list; the
            accuracy's interval is wider then.
        probes: scores of each of ``PROBES`` that was tried.

    Raises:
        UserError: unequal, empty or non-finite input.
    """
    # Each side is checked against its lengths, then pairs against pairs
    chosen, chosen_lengths = paired("chosen", chosen, "chosen_lengths", chosen_lengths)
    rejected, rejected_lengths = paired("rejected", rejected, "rejected_lengths", rejected_lengths)
    numbers = np.arange(chosen.size) if prompts is None else np.asarray(prompts)
    accuracy = grouped_accuracy(chosen, rejected, numbers)
    scores, margins = np.concatenate([chosen, rejected]), chosen - rejected
    bins, error = calibration(chosen, rejected)
    return RewardVerdict(
        accuracy=accuracy,
        accuracy_any_pair=(
            None
            if any_pair is None
            else (grouped_accuracy if len(any_pair) == 3 else pairwise_accuracy)(*any_pair)
        ),
        length_correlation=correlation(scores, np.concatenate([chosen_lengths, rejected_lengths])),
        score_mean=float(scores.mean()),
        score_std=float(scores.std()),
        margin_mean=float(margins.mean()),
        margin_std=float(margins.std()),
        margin_negative=float((margins < 0).mean()),
        margin_quantiles={f"{share:g}": float(np.quantile(margins, share)) for share in QUANTILES},
        calibration_error=error,
        calibration_bins=bins,
        n_pairs=accuracy.n,
        n_prompts=len(np.unique(numbers)),
        probes={name: _probe_verdict(seen) for name, seen in (probes or {}).items()},
    )


def _probe_verdict(seen: ProbeScores) -> ProbeVerdict:
    mean = float(paired("probe", seen.probe, "chosen", seen.chosen)[0].mean())
    return ProbeVerdict(mean, win_rate(seen.probe, seen.chosen), win_rate(seen.probe, seen.rejected))


def write_verdict(output_dir: str | Path | None, verdict: JudgedRewards) -> None:
    """Save the verdict on a reward model, or on an ensemble of them, as ``verdict.json``."""
    write_json(Path(output_dir or ".") / "verdict.json", verdict.to_dict())


def show_verdict(verdict: JudgedRewards, title: str = "The reward model on held-out pairs") -> None:
    """Print the lines of a verdict under a title."""
    print(f"\n{title}:")
    for line in verdict.lines():
        print(f"  {line}")


def require_verdict(reward_folder: str | Path, *, force: bool) -> None:
    """Refuse a reward adapter whose verdict says that it may know nothing.

    An adapter of other origin has no verdict, and passes. What the verdict warns of (length, probes
    that beat the chosen reply, calibration) is logged, a line each, forced or not.

    Raises:
        UserError: its interval on held-out pairs includes 0.5, so that it may know nothing, and
            ``force`` is not set.
    """
    # A verdict is a file that people may have edited
    path = Path(reward_folder) / "verdict.json"
    if not path.is_file():
        return
    verdict = read_json(path)
    interval, warnings = verdict.get("accuracy_ci"), verdict.get("warnings", [])
    numbers = (
        [*interval, verdict.get("accuracy"), verdict.get("n_pairs")] if isinstance(interval, list) else []
    )
    if len(numbers) != 4 or not all(map(is_number, numbers)) or not isinstance(warnings, list):
        raise UserError(
            f"{path}: no verdict of recipes/reward.py: accuracy_ci is {interval!r}. Train the reward model"
            " again, or delete the file."
        )
    # Warnings always; refusal unless forced
    for line in warnings:
        logger.warning("the reward model: %s", line)
    if force:
        return
    low, high = numbers[:2]
    if low <= 0.5:
        raise UserError(
            f"{path}: the reward model is right on {verdict['accuracy']:.2f} of {verdict['n_pairs']} held-out"
            f" pairs ({low:.2f} to {high:.2f}), which may be chance, and PPO would learn that. Train it"
            " longer or on more pairs, judge it on more, or set force: true."
        )
