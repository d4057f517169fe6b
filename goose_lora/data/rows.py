"""Files and names of the Hub to rows, and rows with what is known of them."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import constants

from goose_lora.data.formats import Taken, describe_dropped, take
from goose_lora.data.labelled import BEST_FIRST, pair_words, parse_pairs
from goose_lora.data.shapes import Reading, StageName
from goose_lora.embedded import resolve
from goose_lora.errors import UserError
from goose_lora.files import brief

logger = logging.getLogger(__name__)

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class DataArguments:
    """Where the rows are."""

    dataset_name: str = field(
        metadata={
            "help": "A .jsonl, .json, .parquet or .csv file, a Hub dataset, or embedded/NAME for the demo's."
        }
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Held-out rows, as dataset_name."})
    eval_dataset_split: str = field(
        default="test", metadata={"help": "Split of a Hub dataset to evaluate on."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "Use the first so many rows only."})
    column_mapping: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns to rename, as FROM=TO: instruction=prompt. In YAML also {instruction: prompt}."
        },
    )

    pairs: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Which of two replies is better: {a: reply_1, b: reply_2, winner: better, a_wins: 1, b_wins:"
                " 2, tie: 0, margin: by}, a preset's name, or best_first for lists."
            )
        },
    )
    as_chat: bool | None = field(
        default=None,
        metadata={
            "help": (
                "true: each prompt of text becomes the user's turn; false: none does; unset: those of shapes"
                " whose replies are not glued to their prompts, such as Alpaca's."
            )
        },
    )

    leave_out: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Parts of messages to leave out where a chat template would lose them: a role (developer), a"
                " key (reasoning_content), or think for thoughts inside the text."
            )
        },
    )

    def __post_init__(self) -> None:
        self.pairs = pair_words(self.pairs)
        parse_pairs(self.pairs or [BEST_FIRST])
        if isinstance(self.column_mapping, str):
            self.column_mapping = [self.column_mapping]
        elif isinstance(self.column_mapping, Mapping):
            self.column_mapping = [f"{source}={target}" for source, target in self.column_mapping.items()]
        parse_column_mapping(self.column_mapping or [])
        if self.max_rows is not None and self.max_rows < 1:
            raise UserError(f"max_rows={self.max_rows}: must be 1 or more, or null for all rows.")

    @property
    def reading(self) -> Reading:
        """How rows are read."""
        return Reading(tuple(self.pairs or ()), self.as_chat, tuple(self.leave_out or ()))

    def train(self, stage: StageName) -> "RowSet":
        """Read the rows to train on, as ``stage`` takes them."""
        return self._read(self.dataset_name, self.dataset_split, stage)

    def held_out(self, stage: StageName) -> "RowSet | None":
        """Read the held-out rows, as ``stage`` takes them; None if none are named."""
        if self.eval_dataset_name is None:
            return None
        return self._read(self.eval_dataset_name, self.eval_dataset_split, stage)

    def _read(self, name: str, split: str, stage: StageName) -> "RowSet":
        taken = take_rows(name, split, self.max_rows, self.column_mapping, stage, self.reading)
        return RowSet(name, split, taken.rows, tuple(taken.numbers))


@dataclass(frozen=True)
class RowSet:
    """Rows with the name and split that they were read by."""

    name: str
    split: str | None
    rows: Dataset
    numbers: tuple[int, ...] | None = None  # of the rows, in the file

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """The rows as a stage saw them, for the lineage: see ``fingerprint``."""
        return fingerprint(self.name, self.split, self.rows)


def fingerprint(name: str, split: str | None, rows: Dataset) -> dict[str, Any]:
    """Return a data set as a stage saw it: name, split, number of rows, sha256 and kind.

    The sha256 is of the rows as lines of JSON with sorted keys. ``chat`` tells whether anything in
    the first row is chat messages.
    """
    # Chat is seen in the first row: rows are of one kind
    digest = hashlib.sha256()
    chat = any(
        isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]
        for value in rows[0].values()
    )
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return {"name": name, "split": split, "rows": len(rows), "sha256": digest.hexdigest(), "chat": chat}


def parse_column_mapping(pairs: Sequence[str]) -> dict[str, str]:
    """``FROM=TO`` to old and new names.

    Raises:
        ValueError: another form, a column named twice, or two that would become one.
    """
    mapping: dict[str, str] = {}
    for pair in pairs:
        source, equals, target = pair.partition("=")
        if not source or not equals or not target:
            raise UserError(
                f"column_mapping: {pair!r} is not of the form FROM=TO, for example instruction=prompt."
            )
        # One column cannot become two, nor two become one
        if source in mapping or target in mapping.values():
            raise UserError(f"column_mapping: {', '.join(pairs)} names {source} or {target} twice.")
        mapping[source] = target
    return mapping


def load_rows(
    name: str,
    split: str = "train",
    max_rows: int | None = None,
    column_mapping: Sequence[str] | None = None,
    *,
    stage: StageName | None = None,
    reading: Reading | None = None,
) -> Dataset:
    """Read the rows of a file, of a Hub dataset or of the demo (embedded/NAME), columns renamed.

    With ``stage`` they are as that stage takes them (``formats.take``), and what it leaves out is
    counted in a warning.

    Raises:
        ValueError: a file of another kind, one that is not there or is broken (with the line), an
            unknown split, no rows, a column to rename that is not there; with ``stage``, what
            ``take`` raises.
    """
    if stage is not None:
        return take_rows(name, split, max_rows, column_mapping, stage, reading).rows
    # Read, cut and rename
    name = resolve(name)
    rows = _read(name, split)
    if max_rows is not None:
        rows = rows.select(range(min(max_rows, len(rows))))
    if len(rows) == 0:
        raise UserError(f"{name}: no rows.")
    return rename_columns(rows, parse_column_mapping(column_mapping or []), name)


def take_rows(
    name: str,
    split: str,
    max_rows: int | None,
    column_mapping: Sequence[str] | None,
    stage: StageName,
    reading: Reading | None = None,
) -> Taken:
    """Read rows as a stage takes them, and tell in a warning what is left out and ignored.

    Raises:
        UserError: as ``load_rows``.
    """
    rows = load_rows(name, split, max_rows, column_mapping)
    name = resolve(name)
    taken = take(rows, stage, name, reading)
    left_out = sum(map(len, taken.dropped.values()))
    if left_out:
        logger.warning(
            "%s: %d of %d rows left out: %s", name, left_out, len(rows), describe_dropped(taken.dropped)
        )
    if taken.ignored:
        logger.warning("%s: read as %s; ignored: %s", name, taken.title, ", ".join(taken.ignored))
    return taken


def rename_columns(rows: Dataset, mapping: Mapping[str, str], name: str) -> Dataset:
    """``rows`` with columns renamed from the keys of ``mapping`` to its values.

    Raises:
        ValueError: a column that is not there, or a new name that another column has.
    """
    found = rows.column_names
    for source, target in mapping.items():
        if source not in found:
            raise UserError(
                f"{name}: column_mapping {source}={target}: there is no column {source}. There are"
                f" {', '.join(found)}."
            )
        if target in found and target not in mapping:
            way_out = f"Rename that too, for example {target}=old_{target}."
            raise UserError(
                f"{name}: column_mapping {source}={target}: there is a column {target} already. {way_out}"
            )
    return rows.rename_columns(dict(mapping)) if mapping else rows


def _read(name: str, split: str) -> Dataset:
    suffix = Path(name).suffix.lower()
    # A file by its ending, which must be there and be whole
    if suffix in READERS:
        if not Path(name).is_file():
            raise UserError(f"{name}: no such file. Check the path.")
        if Path(name).stat().st_size == 0:
            raise UserError(f"{name}: the file is empty. Write rows into it, or give another.")
        if suffix != ".parquet":
            _check_encoding(Path(name))
        try:
            rows = load_dataset(READERS[suffix], data_files=name, split="train")
        except (DatasetGenerationError, ValueError) as error:
            broken = _broken_json(Path(name)) if READERS[suffix] == "json" else None
            if "corresponds to no data" in str(error):
                broken = "no rows. Was it written to its end?"
            raise UserError(
                f"{name}: {broken or f'{brief(error.__cause__ or error)}. Mend the file, or write it again.'}"
            ) from error
    elif Path(name).exists():
        raise UserError(
            f"{name}: cannot read this kind of file. Use {', '.join(READERS)} or the name of a Hub dataset."
        )
    else:
        try:
            rows = load_dataset(name, split=split)
        except Exception as error:  # what httpx, fsspec, pyarrow and pandas raise, passed on
            way_out = (
                "Unset HF_HUB_OFFLINE"
                if constants.HF_HUB_OFFLINE
                else "Check the name, dataset_split and the network"
            )
            raise UserError(
                f"{name}: no file here, and not to be had from the Hub: {brief(error)}. {way_out}, or give a"
                " file."
            ) from error
    # Several splits are a folder of rows, not rows
    if isinstance(rows, DatasetDict) or not isinstance(rows, Dataset):
        raise UserError(f"{name}: expected one split of rows; name it with dataset_split.")
    return rows


def _check_encoding(path: Path) -> None:
    """Raise UserError, naming the line, unless a file of text is UTF-8.

    The reader of JSON would notice only when the row is used.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                place = (
                    f"line {number} is not UTF-8, at byte {error.start + 1} of it (0x{line[error.start]:02x})"
                )
                raise UserError(f"{path}: {place}. Save the file as UTF-8.") from error


def _broken_json(path: Path) -> str | None:
    """Find the first line that is not JSON; None if all are.

    The file is one list, or one object per line.
    """
    text = path.read_text(encoding="utf-8-sig")
    # One list
    if text.lstrip().startswith("["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            return f"line {error.lineno} is not JSON: {error.msg} at character {error.colno}."
        except RecursionError:
            return "the JSON is nested too deep."
        return None
    # One object per line; empty lines are allowed
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            return (
                f"line {number} is not JSON: {error.msg} at character {error.colno}. Each line must be one"
                " object."
            )
        except RecursionError:
            return (
                f"line {number} is JSON nested too deep. Each line must be one object, with text or a list of"
                " messages."
            )
        if not isinstance(row, dict):
            return (
                f"line {number} is a JSON {type(row).__name__}; each line must be one object, with columns as"
                " keys."
            )
    return None


def require_columns(rows: Dataset, name: str, *alternatives: Sequence[str]) -> None:
    """Raise UserError unless ``rows`` has all columns of one of ``alternatives``.

    The error names the columns found and those accepted.
    """
    if not any(set(columns) <= set(rows.column_names) for columns in alternatives):
        accepted = " or ".join("+".join(columns) for columns in alternatives)
        raise UserError(f"{name}: has the columns {', '.join(rows.column_names)}; needed are {accepted}.")
