"""Callbacks that any stage uses: the file of metrics, and steps that cannot be made."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from goose_lora.errors import UserError
from goose_lora.files import append_line, read_whole_lines

logger = logging.getLogger(__name__)


_Row = dict[str, Any]  # a line of metrics.jsonl or samples.jsonl


class MetricsFile(TrainerCallback):
    """Writes each log as one line of JSON to ``metrics.jsonl``.

    A resumed run first drops the lines after its checkpoint.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the lines up to the checkpoint that the run resumes from, none for a new run."""
        if not state.is_world_process_zero:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = Path(args.output_dir or ".") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            kept: list[_Row] = []
            if state.global_step:
                kept = [row for row in read_whole_lines(path) if self._stays(name, row, state.global_step)]

            # Replaced as a whole: a run that is killed here loses no line
            temporary = path.with_name(f".{name}.tmp")
            temporary.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8"
            )
            temporary.replace(path)

    @staticmethod
    def _stays(name: str, row: _Row, step: int) -> bool:
        """Return whether a resumed run keeps ``row``.

        Samples of a rollout bear the step that it begins at, and are written again. The summary of
        a run that was stopped is not the run's.
        """
        return row["step"] < step or (
            row["step"] == step and name == "metrics.jsonl" and "train_runtime" not in row
        )

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
            append_line(Path(args.output_dir or ".") / "metrics.jsonl", {"step": state.global_step, **logs})


SKIPPED_IN_A_ROW = 3


class NotFinite(UserError):
    """Gradients of several optimizer steps in a row were not finite."""


class FiniteSteps(TrainerCallback):
    """Skips optimizer steps with gradients that are not finite.

    Each is counted and told of, and the third in a row ends the run.
    """

    def __init__(self):
        self.skipped = 0  # since the last log
        self.in_a_row = 0

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
        # One transfer from the device, however many parameters there are
        assert model is not None
        graded = [(p, p.grad) for p in model.parameters() if p.grad is not None]
        if not graded or torch.stack([grad.isfinite().all() for _, grad in graded]).all():
            self.in_a_row = 0
            return

        # None, not 0: the optimizer passes them by, and its averages stay as they are
        self.skipped += 1
        self.in_a_row += 1
        for parameter, _ in graded:
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
