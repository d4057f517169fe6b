"""What a stage leaves behind to look at: figures as JSON, metrics as jsonl, the verdict, curves as
PNG."""

from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from goose_lora.errors import UserError
from goose_lora.files import read_jsonl, write_json, write_jsonl
from goose_lora.training.cost import cost


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``.

    Raises:
        ValueError: as ``read_jsonl``, or a figure that is no number.
    """
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        for name, value in row.items():
            if ("/" in name or name == "step") and (
                isinstance(value, bool) or not isinstance(value, (int, float))
            ):
                raise UserError(
                    f"{path}: line {number}: {name} is {value!r}, expected a number. Delete that line."
                )
    return rows


def write_stage(
    output_dir: str | None,
    stage: str,
    figures: Mapping[str, Any],
    log_history: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """``stage.json``, written last, tells that the stage is whole; ``metrics.jsonl`` holds its log,
    unless the trainer wrote it already."""
    folder = Path(output_dir or ".")
    if log_history is not None:
        write_jsonl(folder / "metrics.jsonl", log_history)
    write_json(folder / "stage.json", {"stage": stage, **cost(), **figures})


TITLES = {
    "sft": "supervised fine-tuning",
    "reward": "training as a reward model",
    "ppo": "PPO",
    "own_loop": "PPO in a loop of its own",
    "merge": "merging a policy into it",
}
# Figures of evaluation.json, and what they are.
COLUMNS = {
    "score": "score of the reward model",
    "judge": "judge",
    "kl": "KL to the reference, nats a reply",
    "tokens": "tokens",
    "ended": "share that ended",
    "distinct_2": "distinct bigrams",
    "score_win_rate": "win rate by score",
    "judge_win_rate": "win rate by judge",
}


def figure(value: Any) -> str:
    """A number as the card shows it; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return "-" if value is None else str(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def with_interval(row: Mapping[str, Any], key: str) -> str:
    """A figure of an evaluation as the card shows it, its interval in brackets where it has one."""
    interval = row.get(f"{key}_ci")
    return figure(row.get(key)) + (f" ({figure(interval[0])} to {figure(interval[1])})" if interval else "")
