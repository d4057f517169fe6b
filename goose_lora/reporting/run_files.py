"""What a stage leaves behind to look at: figures as JSON, metrics as jsonl, the verdict, curves as
PNG."""

from collections.abc import Mapping, Sequence
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
