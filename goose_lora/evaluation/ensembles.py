"""The test of reward models that score as one: each member, and each way to combine them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import torch

from goose_lora.errors import UserError
from goose_lora.evaluation.reward_model import HeldOut, HeldOutScores, held_out_verdict
from goose_lora.evaluation.verdict import RewardVerdict
from goose_lora.functional import Aggregation
from goose_lora.models.ensembles import Member, MemberKind, RewardEnsemble

AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)


@dataclass(frozen=True)
class ScoredMember:
    """A trained member, and its scores of the held-out rows, less its own bias.

    ``has_bias`` tells that references score 0, so that scores of members have one origin.
    """

    folder: str
    sha256: str
    seed: int
    augmented: bool
    has_bias: bool
    scores: HeldOutScores
    any_scores: HeldOutScores | None


def require_spread(held_out: HeldOut) -> None:
    """Raise UserError where held-out chosen replies cannot differ in score, whatever is trained."""
    if len({tuple(own[0]) for own in held_out.completions}) < 2:
        raise UserError(
            f"eval_dataset_name: all chosen replies of its {len(held_out.completions)} prompts are one text,"
            " and the members of num_members are counted in the spread of their scores of them. Name more"
            " rows there."
        )


def align_members(kind: MemberKind, tested: Sequence[ScoredMember]) -> RewardEnsemble:
    """Return the ensemble of members, each counted in the spread of its scores of chosen replies.

    Raises:
        UserError: a member scores all of them alike.
    """
    members = []
    for each in tested:
        chosen = each.scores.chosen()
        if len(chosen) < 2 or chosen.std() < 1e-6:
            raise UserError(
                f"{each.folder}: {len(chosen)} held-out chosen replies with a standard deviation of"
                f" {chosen.std():.2g}: a member's unit is theirs. Name more rows in eval_dataset_name, or"
                " train longer."
            )
        origin = 0.0 if each.has_bias else float(chosen.mean())
        members.append(
            Member(each.folder, each.sha256, origin, float(chosen.std()), each.seed, each.augmented)
        )
    scale = float(np.mean([member.spread for member in members]))
    shift = float(np.mean([member.origin for member in members]))
    return RewardEnsemble(kind, scale, shift, tuple(members))


def combine_scores(
    ensemble: RewardEnsemble,
    scores: Sequence[HeldOutScores],
    aggregation: Aggregation,
    uncertainty_coef: float = 1.0,
) -> tuple[HeldOutScores, HeldOutScores]:
    """Return the scores of all members as those of one model, and their disagreement."""
    by = replace(ensemble, aggregation=aggregation, uncertainty_coef=uncertainty_coef)

    def whole(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        score, apart = by.score([torch.as_tensor(part, dtype=torch.float64) for part in parts])
        return score.numpy(), apart.numpy()

    # All completions in one array, then by prompt again
    score, apart = whole([np.concatenate(each.completions) for each in scores])
    ends = np.cumsum([len(own) for own in scores[0].completions])[:-1]
    probes = {name: whole([each.probes[name] for each in scores]) for name in scores[0].probes}
    return (
        HeldOutScores(np.split(score, ends), {name: both[0] for name, both in probes.items()}),
        HeldOutScores(np.split(apart, ends), {name: both[1] for name, both in probes.items()}),
    )


@dataclass(frozen=True)
class EnsembleVerdict:
    """The verdicts of each member and of each aggregation, and how far the members disagree.

    ``apart_on_chosen`` and ``apart_on_probes`` are means over replies, in units of the members'
    spread.
    """

    members: dict[str, RewardVerdict]
    aggregations: dict[Aggregation, RewardVerdict]
    apart_on_chosen: float
    apart_on_probes: dict[str, float]

    @property
    def mean(self) -> RewardVerdict:
        """The verdict on the mean of the members, the default."""
        return self.aggregations["mean"]

    def to_dict(self) -> dict[str, object]:
        """Return JSON values: those of the mean, with ``members`` and ``aggregations`` beside."""
        return {
            **self.mean.to_dict(),
            "members": {name: _figures(verdict) for name, verdict in self.members.items()},
            "aggregations": {name: _figures(verdict) for name, verdict in self.aggregations.items()},
            "disagreement": {"chosen": self.apart_on_chosen, **self.apart_on_probes},
        }

    def lines(self) -> list[str]:
        """Return a line for each member and aggregation, and one for their disagreement."""
        lines = [
            figures_line(name, verdict)
            for verdicts in (self.members, self.aggregations)
            for name, verdict in verdicts.items()
        ]
        return [*lines, _apart_line(self.apart_on_chosen, self.apart_on_probes)]


def judge_ensemble(
    ensemble: RewardEnsemble,
    tested: Sequence[ScoredMember],
    held_out: HeldOut,
    any_pair: HeldOut | None = None,
) -> EnsembleVerdict:
    """Return the verdict on an ensemble: members by themselves, and all aggregations of them."""
    scores = [each.scores for each in tested]
    second = [each.any_scores for each in tested if each.any_scores is not None]
    members = {
        each.folder: held_out_verdict(held_out, each.scores, any_pair, each.any_scores) for each in tested
    }
    aggregations = {}
    for name in AGGREGATIONS:
        whole, _ = combine_scores(ensemble, scores, name)
        of_any = combine_scores(ensemble, second, name)[0] if second else None
        aggregations[name] = held_out_verdict(held_out, whole, any_pair, of_any)
    _, apart = combine_scores(ensemble, scores, "mean")
    return EnsembleVerdict(members, aggregations, *_means(apart))


def members_apart(disagreement: HeldOutScores) -> str:
    """Return a line on how far members disagree, in their spread."""
    return _apart_line(*_means(disagreement))


def _means(apart: HeldOutScores) -> tuple[float, dict[str, float]]:
    probes = {name: float(numbers.mean()) for name, numbers in apart.probes.items()}
    return float(apart.chosen().mean()), probes


def _apart_line(chosen: float, probes: Mapping[str, float]) -> str:
    apart = ", ".join(f"{name} {value:.2f}" for name, value in probes.items())
    said = f"members apart, in their spread on chosen replies: chosen {chosen:.2f}"
    return f"{said}, {apart}" if apart else said


def _figures(verdict: RewardVerdict) -> dict[str, object]:
    accuracy = verdict.accuracy
    return {
        "accuracy": accuracy.value,
        "accuracy_ci": [accuracy.low, accuracy.high],
        "beats_chosen": {name: probe.beats_chosen.value for name, probe in verdict.probes.items()},
    }


def figures_line(name: str, verdict: RewardVerdict) -> str:
    """Return the accuracy of a member or an aggregation, and its probes, in one line."""
    beats = ", ".join(f"{probe} {said.beats_chosen.value:.2f}" for probe, said in verdict.probes.items())
    accuracy = verdict.accuracy
    line = f"{name}: accuracy {accuracy.value:.3f} ({accuracy.low:.2f} to {accuracy.high:.2f})"
    return f"{line}; above the chosen reply: {beats}" if beats else line
