"""The figures that a run logs, gathered between one log and the next."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from goose_lora.ppo.processes import averaged

Totals = dict[str, Tensor | float]

_SECONDS = "seconds/"
LEFT_OUT = "left out of "  # before a figure's name: the part of its mean that was skipped
NOTHING = 1e-6  # a mean over less than this part of its tokens is one over none, but for rounding


class RunMetrics:
    """Figures of rollouts and of updates since the last log.

    Those of a rollout are averaged over rollouts. Those of the update are sums over microbatches
    whose parts add up to a mean, and are divided by the number of optimizer steps. Seconds are
    those of a rollout, all of its optimizer steps together.

    Attributes:
        microbatches: how many were learned from since the last log.
        latest: the figures of the last rollout and, once it is logged, of its whole row.
    """

    def __init__(self, accelerator: Accelerator, *, microbatches_per_step: int):
        self.accelerator = accelerator
        self.microbatches_per_step = microbatches_per_step
        self.microbatches = 0
        self.latest: dict[str, float] = {}
        self._rollouts: dict[str, list[float]] = defaultdict(list)
        self._totals: Totals = defaultdict(float)

    @property
    def steps(self) -> float:
        """Optimizer steps since the last log."""
        return self.microbatches / self.microbatches_per_step

    def add_rollout(self, figures: Mapping[str, float]) -> None:
        """Note the figures of a new rollout."""
        self.latest = dict(figures)
        for name, value in figures.items():
            self.add_to_rollout(name, value)

    def add_to_rollout(self, name: str, value: float) -> None:
        """Note one more figure of the rollout, which became known later."""
        self._rollouts[name].append(value)

    def leave_out(self, shares: Mapping[str, Tensor]) -> None:
        """Take what was skipped out of the means of figures: ``shares`` of an optimizer step."""
        self.add_update({LEFT_OUT + name: share for name, share in shares.items()})

    def add_update(self, figures: Mapping[str, Tensor | float]) -> None:
        """Add what a microbatch contributes to the figures of its optimizer step."""
        for name, value in figures.items():
            self._totals[name] = self._totals[name] + value

    def of_updates(self) -> Totals:
        """Return a copy of the sums so far, to which ``restore`` goes back."""
        return dict(self._totals)

    def restore(self, totals: Totals) -> None:
        """Forget what was added since ``totals`` was copied."""
        self._totals = defaultdict(float, totals)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the seconds inside, which become a figure of the rollout."""
        started = time.perf_counter()
        yield
        self.add_update({f"{_SECONDS}{phase}": time.perf_counter() - started})

    def take(self) -> dict[str, float]:
        """Return the means since the last log over all processes, and begin anew.

        A figure of which all was skipped is not among them.
        """
        # Of rollouts: a mean over those since the last log, and how many they were.
        device, steps, rollouts = self.accelerator.device, self.steps, 1.0
        rollout = {
            name: torch.tensor(sum(seen) / len(seen), device=device) for name, seen in self._rollouts.items()
        }
        if rollout:
            rollouts = float(len(self._rollouts["objective/score"]))
            rollout["rollout/count"] = torch.tensor(rollouts, device=device)
        # Of the update: sums whose parts make up one optimizer step each; seconds are a rollout's.
        update = {
            name: torch.as_tensor(total, device=device) / (rollouts if name.startswith(_SECONDS) else steps)
            for name, total in self._totals.items()
        }
        # Each process has as many rollouts and steps, so that a mean of means is the mean.
        means = averaged(self.accelerator, self._in_one_order(rollout | update))
        # What was skipped added 0 to the sums. It is no part of the means either.
        skipped = {name: means.pop(name) for name in list(means) if name.startswith(LEFT_OUT)}
        for name, share in skipped.items():
            mean = means.pop(name.removeprefix(LEFT_OUT), 0.0)
            if share < 1 - NOTHING:
                means[name.removeprefix(LEFT_OUT)] = mean / (1 - share)
        self._rollouts.clear()
        self._totals.clear()
        self.microbatches = 0
        return means

    def _in_one_order(self, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the figures in an order that does not depend on the process.

        What another process has and this one has not seen counts 0 here, as a sum of nothing.
        """
        names = list(figures)
        if self.accelerator.num_processes > 1:
            names = sorted(set(gather_object(names)))
        return {name: figures.get(name, torch.zeros(())) for name in names}
