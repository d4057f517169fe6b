"""Findings on a run, and the figures that verdicts are made of: columns of its logged rows, their
ends and their change."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import inf
from statistics import fmean
from typing import Any, Literal, NamedTuple

Level = Literal["ok", "look", "wrong"]
Rows = Sequence[Mapping[str, Any]]

TREND = 5  # logged rollouts that a verdict on a trend waits for
CLEAR = 2.5  # standard errors: the size of a change that is not noise


class Finding(NamedTuple):
    """One verdict. ``look``: may be meant so; ``wrong``: the run does not do what PPO says."""

    level: Level
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:5}  {self.name:14}  {self.text}"


def column(rows: Rows, name: str) -> list[float]:
    return [float(row[name]) for row in rows if name in row and abs(row[name]) < inf]


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and of the last fifth, of three values at least where there are six."""
    size = end_size(values)
    return fmean(values[:size]), fmean(values[-size:])


def end_size(values: Sequence[float]) -> int:
    return max(1, len(values) // 5, min(3, len(values) // 2))


def change(values: Sequence[float]) -> float:
    """From the first end to the last, in standard errors; 0 where there are too few values to tell.

    The noise is that of successive values (von Neumann 1941), so that a trend does not count as its
    own noise.
    """
    if len(values) < TREND:
        return 0.0
    first, last = ends(values)
    noise = (fmean((after - before) ** 2 for before, after in pairwise(values)) / 2) ** 0.5
    error = noise * (2 / end_size(values)) ** 0.5
    return (last - first) / error if error > 0 else 0.0


def rollouts_in(row: Mapping[str, Any]) -> float:
    return row.get("rollout/count", 1)


def recent(rows: Rows, name: str) -> float | None:
    """Mean over the last fifth of the run, where the metric was logged."""
    values = column(rows, name)
    return ends(values)[1] if values else None
