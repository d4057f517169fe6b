"""What a run shows while it goes: its phase, one row a log, and one bar on a terminal."""

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from goose_lora import terminal


class _Column(NamedTuple):
    """A column of the rows: its title, the metrics that it may show, the first that is there."""

    title: str
    metrics: tuple[str, ...]
    form: str


# Of all stages; a row shows those that its log has.
_COLUMNS = (
    _Column("loss", ("loss",), ".3f"),
    _Column("accuracy", ("accuracy", "mean_token_accuracy"), ".3f"),
    _Column("margin", ("margin",), ".3f"),
    _Column("score", ("objective/raw_score", "objective/score", "raw_score", "score"), ".3f"),
    _Column("KL", ("objective/kl", "kl"), ".2f"),
    _Column("tokens", ("rollout/response_tokens", "response_tokens"), ".1f"),
    _Column("ended", ("rollout/eos_rate", "eos_rate"), ".0%"),
    _Column("learning rate", ("learning_rate",), ".2g"),
)
_OF_PPO = {"score", "KL", "tokens", "ended"}
_BAR = "{desc}{percentage:3.0f}% {bar:24} {n_fmt}/{total_fmt} [{elapsed}, {remaining} left]"
_WIDTH = 9  # of a column, unless its title is wider
SAMPLE_EVERY = 10  # rollouts from one sample reply to the next


class Progress(TrainerCallback):
    """Shows one row a log, a sample reply now and then, and on a terminal one bar.

    It takes the place of transformers' own callbacks, which print all figures of a log: those are
    in ``metrics.jsonl``. Rate and time left count the steps of this process alone, so that they are
    true after a resume.

    Args:
        every: optimizer steps of a unit that rows count: of a rollout in PPO.
        unit: its name.
    """

    def __init__(self, *, every: int = 1, unit: str = "step"):
        self.every, self.unit = every, unit
        self.bar: tqdm | None = None
        self.titles: tuple[str, ...] = ()
        self.shows = False  # from the first step on, on the process that tells
        self.began = self.last = time.monotonic()
        self.first_step = 0
        self.samples = 0

    @classmethod
    def put_into(cls, trainer: Trainer, *, every: int = 1, unit: str = "step") -> "Progress":
        """Return one that shows ``trainer``, in place of transformers' callbacks."""
        for other in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(other)
        progress = cls(every=every, unit=unit)
        trainer.add_callback(progress)
        return progress

    # ---- Called by Trainer ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Begin to count."""
        self.shows = state.is_world_process_zero
        self.began = self.last = time.monotonic()
        self.first_step, self.titles = state.global_step, ()
        if self.shows and not args.disable_tqdm and sys.stderr.isatty():
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                leave=False,
                bar_format=_BAR,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Show a row of the log."""
        # What only looks must not end a run, whatever a log has in it
        if self.shows and logs and "train_runtime" not in logs:
            with suppress(TypeError, ValueError):
                self._row(logs, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take the bar away."""
        self.close()

    # ---- Called by what is going on ----

    def close(self) -> None:
        """Take the bar away, also where a run has failed."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def phase(self, name: str, *, long: bool = False) -> None:
        """Show what is going on: in front of the bar, and as a line if it may be ``long``."""
        if not self.shows:
            return
        if self.bar is not None:
            self.bar.set_description(name)
        if long:
            terminal.say(name)

    def sample(self, prompt: str, reply: str) -> None:
        """Show a reply to read, of each ``SAMPLE_EVERY`` that are given."""
        if self.shows and self.samples % SAMPLE_EVERY == 0:
            terminal.say(f"    {_shortened(prompt, 60, keep_end=True)} -> {_shortened(reply, 100)}")
            self.titles = ()  # the rows' header comes again
        self.samples += 1

    # ---- A row ----

    def _row(self, logs: Mapping[str, float], state: TrainerState) -> None:
        """Say the figures of a log, those of held-out rows too, under a header of their names."""
        held_out = any(name.startswith("eval_") for name in logs)
        figures = {name.removeprefix("eval_"): value for name, value in logs.items()}
        found = [
            (column, figures[metric])
            for column in _COLUMNS
            for metric in [next((name for name in column.metrics if name in figures), None)]
            if metric is not None
        ]
        # PPO's loss and learning rate tell little; its own figures come first
        if any(column.title in _OF_PPO for column, _ in found):
            found = [(column, value) for column, value in found if column.title in _OF_PPO]
        if not found:
            return

        # Seconds since the last row, and those that are left at this process's own rate
        now = time.monotonic()
        done = state.global_step - self.first_step
        left = (now - self.began) / done * (state.max_steps - state.global_step) if done else None
        cells = [(column.title, format(value, column.form)) for column, value in found]
        if held_out:
            first = (self.unit, "held-out")
        else:
            first = (self.unit, f"{state.global_step // self.every}/{state.max_steps // self.every}")
            cells += [("seconds", f"{now - self.last:.1f}"), ("left", duration(left))]
        self.last = now
        self._say_cells([first, *cells])

    def _say_cells(self, cells: list[tuple[str, str]]) -> None:
        titles = tuple(title for title, _ in cells)
        widths = [max(_WIDTH, len(title)) for title in titles]
        if titles != self.titles:
            terminal.say("  ".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True)))
            self.titles = titles
        terminal.say("  ".join(f"{cell:>{width}}" for (_, cell), width in zip(cells, widths, strict=True)))


def duration(seconds: float | None) -> str:
    """Return seconds as ``1:05`` or ``2:03:04``; "-" for None."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _shortened(text: str, width: int, *, keep_end: bool = False) -> str:
    """Return text as one line of at most ``width`` characters, its beginning or its end."""
    line = " ".join(text.split())
    if len(line) <= width:
        return line
    return f"... {line[4 - width :]}" if keep_end else f"{line[: width - 4]} ..."
