"""The files of a run: their types, and how they are read and written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from goose_lora.errors import UserError
from goose_lora.files import read_json, read_jsonl, write_json, write_jsonl
from goose_lora.models.folders import read_lineage
from goose_lora.training.cost import cost

# ---- Types of goose_lora.json, verdict.json and evaluation.json ----
# An older file may lack a key, and an adapter of other origin has no lineage at all. Whoever reads
# one that may be such takes its keys with ``get``.


class BaseRecord(TypedDict):
    """The base model of a stage, in its lineage."""

    id: str  # model_name_or_path: a folder, or a name on the Hub
    hub_id: str | None  # base_hub_id: what a folder is on the Hub
    revision: str | None  # as it was asked for
    commit: str | None  # as it was loaded; None for a folder
    content: str | None  # a hash of its tensors; None where the weights are not to be had
    quantization: str  # nf4, int8 or none
    dtype: str  # of the arithmetic in training
    licence: str | None  # of the base's own card


class VerdictFile(TypedDict):
    """The verdict of recipes/reward.py on a reward model, and a parent's copy of these keys."""

    accuracy: float
    accuracy_ci: list[float]  # 95 %: low and high
    n_pairs: int  # held-out ones
    warnings: list[str] | None
    members: NotRequired[dict[str, "MemberFigures"]]  # of an ensemble, by folder


class MemberFigures(TypedDict):
    """What the verdict on an ensemble says of one member, or of one aggregation."""

    accuracy: float
    accuracy_ci: list[float]
    beats_chosen: dict[str, float]  # by probe


class ParentRecord(TypedDict):
    """An adapter that a stage started from, in its lineage."""

    name: str  # a folder, or user/repo[/folder]@commit
    sha256: str  # of its weights, as the stage read them
    members: NotRequired[list[str]]  # the same of all members of an ensemble, itself the first
    verdict: VerdictFile | None  # of a reward model
    lineage: "Lineage"  # its own, copied; empty for an adapter of other origin


class DataRecord(TypedDict):
    """A data set that a stage used, in its lineage."""

    name: str
    split: str | None
    rows: int
    sha256: str  # of the rows as lines of JSON
    chat: bool  # whether they are chat messages
    augmented: NotRequired[dict[str, int]]  # pairs made of them, by kind


class HardwareRecord(TypedDict):
    """The machine of a stage, in its lineage."""

    processor: str
    cores: int | None
    gpus: list[str]


class _Facts(TypedDict, total=False):
    # What only some stages note: PPO its findings, a reward model how it is read, and an upload
    # where it went
    findings: list[str]
    append_eos: bool
    reward_bias: float
    hub_repo: str
    template_date: str  # the day that the chat template writes, where it writes one


class Lineage(_Facts):
    """``goose_lora.json``: what a stage made, and from what."""

    stage: str
    base: BaseRecord
    sha256: str | None  # of the adapter's weights; None for merged ones
    chat_template_sha256: str | None
    reply_ends: dict[str, int]  # the tokens that end a reply
    parents: dict[str, ParentRecord]  # by role
    command: str | None
    settings: dict[str, Any]  # those that are not defaults
    data: list[DataRecord]
    figures: dict[str, Any]
    hardware: HardwareRecord
    versions: dict[str, str]  # by package


class EvaluationFile(TypedDict):
    """``evaluation.json``: what recipes/evaluate.py measured, a row of figures a policy."""

    prompts: int
    dataset: str
    against: str  # the policy that win rates are against
    figures: dict[str, dict[str, Any]]  # by policy, then by measure; intervals end in _ci
    samples: list[dict[str, str]]
    judge: NotRequired[str]  # what rated the replies, if something did
    judge_asked: NotRequired[dict[str, Any]]  # of a judge of pairs: calls, cache_hits, no_answer


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
