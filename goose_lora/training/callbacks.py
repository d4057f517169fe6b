"""Callbacks that any stage uses: the file of metrics, and steps that cannot be made."""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from goose_lora.errors import UserError
from goose_lora.files import append_line, json_line, read_sound_lines, write_text
from goose_lora.ownership import claim
from goose_lora.training.loss_scale import LEAST_SCALE

logger = logging.getLogger(__name__)


_Row = dict[str, Any]  # a line of metrics.jsonl or samples.jsonl


METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"


def _readable(path: Path) -> list[_Row]:
    """Return the rows of a run's file that can be read; what cannot is told, and kept beside it."""
    rows, unsound = read_sound_lines(path)
    if unsound:
        kept = path.with_name(f"{path.name}.kept")
        shutil.copyfile(path, kept)
        lines = ", ".join(map(str, unsound[:5])) + (" ..." if len(unsound) > 5 else "")
        logger.warning(
            "%s: line %s is no JSON object, cut off or damaged, and is left out. The file as it was is"
            " kept as %s.",
            path,
            lines,
            kept.name,
        )
    return rows


def _replace(path: Path, rows: list[_Row]) -> None:
    """Replace a file of rows as a whole: a run that is killed here loses no line."""
    write_text(path, "".join(map(json_line, rows)))


class MetricsFile(TrainerCallback):
    """Writes each log as one line of JSON to ``metrics.jsonl``.

    A resumed run first writes the lines up to its checkpoint anew.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the lines up to the checkpoint that the run resumes from, none for a new run.

        Metrics are the checkpoint's own log, which has what a power failure took from the file.
        """
        if not state.is_world_process_zero:
            return
        folder, step = Path(args.output_dir or "."), state.global_step
        claim(folder, METRICS_FILE, SAMPLES_FILE)
        # The summary of a run that was stopped is not the run's
        logged = [row for row in state.log_history if "train_runtime" not in row and step]
        metrics = [{"step": row["step"], **row} for row in logged]
        there = _readable(folder / METRICS_FILE) if step else []
        _replace(folder / METRICS_FILE, metrics)
        if there and not metrics:
            logger.warning("%s: the checkpoint's log is empty, so it begins anew.", folder / METRICS_FILE)

        # Samples of a rollout bear the step that it begins at, and are written again
        samples = _readable(folder / SAMPLES_FILE) if step else []
        for row in samples:
            if not isinstance(row.get("step"), int):
                raise UserError(
                    f"{folder / SAMPLES_FILE}: a line has no step. Delete that line: {str(row)[:80]}"
                )
        _replace(folder / SAMPLES_FILE, [row for row in samples if row["step"] < step])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: _Row | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a line."""
        if state.is_world_process_zero and logs:
            # Trainer's estimate of its work knows nothing of rollouts
            shown = {name: value for name, value in logs.items() if name != "total_flos"}
            append_line(Path(args.output_dir or ".") / METRICS_FILE, {"step": state.global_step, **shown})


SKIPPED_IN_A_ROW = 3


class NotFinite(UserError):
    """Gradients of several optimizer steps in a row were not finite."""


class FiniteSteps(TrainerCallback):
    """Skips optimizer steps with gradients that are not finite.

    Each is counted and told of, and the third in a row ends the run. Where the loss is scaled, a
    finite one whose gradient overflows says that the scale is too large, which is no fault: torch
    leaves that step out and halves the scale.
    """

    def __init__(self):
        self.skipped = 0  # since the last log
        self.in_a_row = 0
        self.rescaled = 0  # steps since the last log that were left out for a smaller scale
        self.scaler: torch.amp.GradScaler | None = None
        self._broken: torch.Tensor | None = None  # whether a loss of this step was not finite

    def see_loss(self, loss: torch.Tensor) -> None:
        """Note whether a loss is finite, without waiting for the device."""
        broken = ~loss.detach().isfinite().all()
        self._broken = broken if self._broken is None else self._broken | broken

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Drop the gradients if one of them is not finite.

        Raises:
            NotFinite: it is the third time in a row.
        """
        # One transfer from the device, however many parameters there are. The largest number and
        # not the norm: squares may overflow where the gradient does not.
        assert model is not None
        graded = [p for p in model.parameters() if p.grad is not None]
        largest = get_total_norm([p.grad for p in graded if p.grad is not None], norm_type=float("inf"))
        if largest.isfinite():
            self.in_a_row, self._broken = 0, None
            return
        if self._overflowed(args, step=state.global_step + 1):
            return

        # None, not 0: the optimizer passes them by, and its averages stay as they are
        self.skipped += 1
        self.in_a_row += 1
        for parameter in graded:
            parameter.grad = None
        step = state.global_step + 1
        advice = (
            "Causes: a learning rate that is too high, a reward or text that overflows, a base whose dtype is"
            " too narrow."
        )
        if self.in_a_row == SKIPPED_IN_A_ROW:
            raise NotFinite(
                f"step {step}: the gradient is not finite for the {SKIPPED_IN_A_ROW}rd time in a row, so"
                f" nothing is learned any more. {advice} --resume_from_checkpoint latest goes on from the"
                " last checkpoint."
            )
        logger.warning(
            "step %d is skipped: its gradient is not finite, so a logit, the loss or the gradient itself was"
            " not. %s",
            step,
            advice,
        )

    def _overflowed(self, args: TrainingArguments, *, step: int) -> bool:
        """Return whether the scale alone is why gradients are not finite, and say so."""
        broken, self._broken = self._broken, None
        if self.scaler is None:
            return False
        scale = self.scaler.get_scale()
        # Gradients are alike on all processes, and so all come here; a loss is of one of them
        anywhere = torch.tensor(bool(broken), device=args.device, dtype=torch.int)
        if args.world_size > 1:
            torch.distributed.all_reduce(anywhere, op=torch.distributed.ReduceOp.MAX)
        if anywhere.item() or scale <= LEAST_SCALE:
            return False
        self.rescaled += 1
        logger.info(
            "step %d is left out: a gradient overflowed at the loss scale %g, which is halved.", step, scale
        )
        return True
