"""What a stage leaves behind to look at: figures as JSON, metrics as jsonl, the verdict, curves as PNG."""

import json
import logging
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from goose_lora.model_files import is_number, read_json_object
from goose_lora.pictures import curves
from goose_lora.verdict import RewardVerdict

logger = logging.getLogger(__name__)

_STARTED = time.monotonic()


def read_json(path: str | Path) -> dict[str, Any]:
    return read_json_object(Path(path))


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all: written beside its place, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """One object a line.

    Raises:
        ValueError: a line that is none, with its number.
    """
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line.decode("utf-8")) if line.strip() else None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: line {number} is not JSON: {error}. Was the run stopped as it wrote? Delete that line.") from error
            if row is not None and not isinstance(row, dict):
                raise ValueError(f"{path}: line {number} is a JSON {type(row).__name__}, expected an object. Delete that line.")
            rows += [row] if row is not None else []
    return rows


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``.

    Raises:
        ValueError: as ``read_jsonl``, or a figure that is no number.
    """
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        for name, value in row.items():
            if ("/" in name or name == "step") and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"{path}: line {number}: {name} is {value!r}, expected a number. Delete that line.")
    return rows


def write_jsonl(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def peak_rss_gb() -> float:
    """Most memory this process ever had resident, in GB (10^9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def cost() -> dict[str, float]:
    """What this process has taken so far: seconds, and most memory, in GB (10^9 bytes)."""
    gpu = {"peak_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)} if torch.cuda.is_available() else {}
    return {"seconds": round(time.monotonic() - _STARTED, 1), "peak_rss_gb": round(peak_rss_gb(), 2), **gpu}


def write_stage(output_dir: str | None, stage: str, figures: Mapping[str, Any], log_history: Sequence[Mapping[str, Any]] | None = None) -> None:
    """``stage.json``, written last, tells that the stage is whole; ``metrics.jsonl`` holds its log, unless the trainer wrote it already."""
    folder = Path(output_dir or ".")
    if log_history is not None:
        write_jsonl(folder / "metrics.jsonl", log_history)
    write_json(folder / "stage.json", {"stage": stage, **cost(), **figures})


def write_verdict(output_dir: str | None, verdict: RewardVerdict) -> None:
    """Save the reward model's verdict as ``verdict.json`` and print it."""
    write_json(Path(output_dir or ".") / "verdict.json", verdict.to_dict())
    print("\nThe reward model on held-out pairs:")
    for line in verdict.lines():
        print(f"  {line}")


def require_verdict(reward_folder: str | Path, *, force: bool) -> None:
    """Look at the verdict beside a reward adapter before anything is trained on its scores. One of other origin has none, and passes.

    What the verdict warns of (length, probes that beat the chosen reply, calibration) is logged, a line each, forced or not.

    Raises:
        ValueError: its interval on held-out pairs includes 0.5, so that it may know nothing, and ``force`` is not set.
    """
    path = Path(reward_folder) / "verdict.json"
    if not path.is_file():
        return
    verdict = read_json(path)
    interval, warnings = verdict.get("accuracy_ci"), verdict.get("warnings", [])
    numbers = [*interval, verdict.get("accuracy"), verdict.get("n_pairs")] if isinstance(interval, list) else []
    if len(numbers) != 4 or not all(map(is_number, numbers)) or not isinstance(warnings, list):
        raise ValueError(f"{path}: no verdict of recipes/reward.py: accuracy_ci is {interval!r}. Train the reward model again, or delete the file.")
    for line in warnings:
        logger.warning("the reward model: %s", line)
    if force:
        return
    low, high = numbers[:2]
    if low <= 0.5:
        raise ValueError(
            f"{path}: the reward model is right on {verdict['accuracy']:.2f} of {verdict['n_pairs']} held-out pairs ({low:.2f} to {high:.2f}), "
            "which may be chance, and PPO would learn that. Train it longer or on more pairs, judge it on more, or set force: true."
        )


def plot_curves(metrics: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Score, KL, critic loss (entropy where there is no critic) and reply length over PPO steps, as one PNG."""
    Path(path).write_bytes(curves({"": metrics}))
