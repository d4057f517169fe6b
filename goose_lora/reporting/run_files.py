"""The files of a run: their types, and how they are read and written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from goose_lora.errors import UserError
from goose_lora.files import read_json, read_jsonl, write_json, write_jsonl
from goose_lora.models.adapters import read_lineage
from goose_lora.training.cost import cost

# ---- Types of goose_lora.json, verdict.json and evaluation.json ----
# An older file may lack a key, and an adapter of other origin has no lineage at all. Whoever reads
# one that may be such takes its keys with ``get``.


class BaseRecord(TypedDict):
    """The base model of a stage, in its lineage."""

    id: str
    hub_id: str | None
    revision: str | None
    commit: str | None
    quantization: str
    dtype: str
    licence: str | None


class VerdictFile(TypedDict):
    """The verdict of recipes/reward.py on a reward model, and a parent's copy of these keys."""

    accuracy: float
    accuracy_ci: list[float]
    n_pairs: int
    warnings: list[str] | None


class ParentRecord(TypedDict):
    """An adapter that a stage started from, in its lineage."""

    name: str
    sha256: str
    verdict: VerdictFile | None
    lineage: "Lineage"


class DataRecord(TypedDict):
    """A data set that a stage used, in its lineage."""

    name: str
    split: str | None
    rows: int
    sha256: str
    chat: bool


class HardwareRecord(TypedDict):
    """The machine of a stage, in its lineage."""

    processor: str
    cores: int | None
    gpus: list[str]


class _Facts(TypedDict, total=False):
    findings: list[str]
    hub_repo: str
    append_eos: bool
    reward_bias: float


class Lineage(_Facts):
    """``goose_lora.json``: what a stage made, and from what."""

    stage: str
    base: BaseRecord
    sha256: str | None
    chat_template_sha256: str | None
    parents: dict[str, ParentRecord]
    command: str | None
    settings: dict[str, Any]
    data: list[DataRecord]
    figures: dict[str, Any]
    hardware: HardwareRecord
    versions: dict[str, str]


class EvaluationFile(TypedDict):
    """``evaluation.json``: what recipes/evaluate.py measured, a row of figures a policy."""

    prompts: int
    dataset: str
    against: str
    figures: dict[str, dict[str, Any]]
    samples: list[dict[str, str]]


# ---- Reading and writing ----


def lineage_of(folder: str | Path) -> Lineage:
    """Return the lineage of an output, empty if the folder has none.

    Raises:
        UserError: the file is damaged.
    """
    return cast(Lineage, read_lineage(folder))


def read_evaluation(folder: str | Path) -> EvaluationFile | None:
    """Return evaluation.json, or None if the folder has none.

    Raises:
        UserError: it is not a file of recipes/evaluate.py.
    """
    path = Path(folder) / "evaluation.json"
    if not path.is_file():
        return None
    evaluation = read_json(path)
    figures = evaluation.get("figures")
    sound = isinstance(figures, dict) and figures and all(isinstance(row, dict) for row in figures.values())
    if not sound or not {"prompts", "against"} <= evaluation.keys():
        raise UserError(f"{path}: no figures of recipes/evaluate.py. Run it again, or delete the file.")
    return cast(EvaluationFile, evaluation)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a ``metrics.jsonl``.

    Raises:
        UserError: as ``read_jsonl``, or a figure is not a number.
    """
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        for name, value in row.items():
            # Trainer also logs text, under names without a slash
            is_figure = "/" in name or name == "step"
            if is_figure and (isinstance(value, bool) or not isinstance(value, (int, float))):
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
    """Write ``metrics.jsonl`` from ``log_history``, and then ``stage.json`` with figures and cost.

    ``stage.json`` comes last, so that it marks a whole stage. A trainer that has written its
    metrics already gives no ``log_history``.
    """
    folder = Path(output_dir or ".")
    if log_history is not None:
        write_jsonl(folder / "metrics.jsonl", log_history)
    write_json(folder / "stage.json", {"stage": stage, **cost(), **figures})
