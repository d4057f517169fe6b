"""Findings on a run, and the statistics of its logged rows that they are made of."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal, NamedTuple

# "look": may be meant so; "wrong": the run does not do what PPO says.
Level = Literal["ok", "look", "wrong"]
Rows = Sequence[Mapping[str, Any]]

TREND = 5  # logged rollouts that a verdict on a trend waits for
LARGEST = 1e100  # the square of more is no number
CLEAR = 2.5  # standard errors: the size of a change that is not noise


class Finding(NamedTuple):
    """One verdict on a run: how bad it is, what it is about, and what was seen."""

    level: Level
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:5}  {self.name:14}  {self.text}"


# ---- Rows ----


def rollouts_of(rows: Rows) -> Rows:
    """Return the rows in which a rollout was logged."""
    return [row for row in rows if "objective/score" in row]


def finite(value: object) -> bool:
    """Return whether a logged value is a number that one can count with."""
    return isinstance(value, (int, float)) and abs(value) < LARGEST


def rollouts_in(row: Mapping[str, Any]) -> float:
    """Return the number of rollouts whose mean a row is."""
    count = row.get("rollout/count", 1)
    return count if finite(count) else 1


def column(rows: Rows, name: str) -> list[float]:
    """Return the finite values of a metric, in the order in which they were logged."""
    return [float(row[name]) for row in rows if finite(row.get(name))]


# ---- Ends and their change ----


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Return the means of the first and of the last fifth, as ``end_size`` counts it."""
    size = end_size(values)
    return fmean(values[:size]), fmean(values[-size:])


def end_size(values: Sequence[float]) -> int:
    """Return the number of values in a fifth: at least 1, and at least 3 where there are 6."""
    return max(1, len(values) // 5, min(3, len(values) // 2))


def recent(rows: Rows, name: str) -> float | None:
    """Return the mean of a metric over the last fifth of the run, None if it was not logged."""
    values = column(rows, name)
    return ends(values)[1] if values else None


def change(values: Sequence[float]) -> float:
    """Return the change from the first end to the last, in standard errors.

    It is 0 where there are too few values to tell. The noise is that of successive values (von
    Neumann 1941), so that a trend does not count as its own noise.
    """
    if len(values) < TREND:
        return 0.0
    # The standard error of a difference of two means, each over an end's values
    first, last = ends(values)
    noise = (fmean((after - before) ** 2 for before, after in pairwise(values)) / 2) ** 0.5
    error = noise * (2 / end_size(values)) ** 0.5
    return (last - first) / error if error > 0 else 0.0
