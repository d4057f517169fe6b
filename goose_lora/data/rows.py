"""Files and names of the Hub to rows, and rows with what is known of them."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from datasets import Dataset

from goose_lora.data.columns import SET_ASIDE, is_text
from goose_lora.data.formats import Taken, describe_dropped, take
from goose_lora.data.labelled import BEST_FIRST, pair_words, parse_pairs
from goose_lora.data.shapes import Reading, StageName
from goose_lora.data.sources import HubPlace, is_of_hub, is_table, numbers_again, read_rows
from goose_lora.embedded import resolve
from goose_lora.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """Where the rows are."""

    dataset_name: str = field(
        metadata={
            "help": (
                "A file (.jsonl, .json, .parquet, .csv, .tsv, .txt, also packed), a folder or glob of them, a"
                " Hub dataset, or embedded/NAME for the demo's."
            )
        }
    )
    dataset_split: str = field(default="train", metadata={"help": "Which split, of rows that have several."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset that has several."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder inside a Hub dataset."})
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."}
    )
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Held-out rows, as dataset_name."})
    eval_dataset_split: str = field(
        default="test", metadata={"help": "Split of eval_dataset_name, where that has several."}
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
                " key (reasoning_content, tool_calls), tools, or think for thoughts inside the text."
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
    def place(self) -> HubPlace:
        """Which part of a Hub dataset is read."""
        return HubPlace(self.dataset_config, self.data_dir, self.dataset_revision)

    @property
    def reading(self) -> Reading:
        """How rows are read."""
        return Reading(tuple(self.pairs or ()), self.as_chat, tuple(self.leave_out or ()))

    def train(self, stage: StageName) -> "RowSet":
        """Read the rows to train on, as ``stage`` takes them."""
        return self._read(self.dataset_name, self.dataset_split, stage, "dataset_split")

    def held_out(self, stage: StageName) -> "RowSet | None":
        """Read the held-out rows, as ``stage`` takes them; None if none are named."""
        if self.eval_dataset_name is None:
            if self.eval_dataset_split != DataArguments.eval_dataset_split:
                logger.warning("Without effect here: eval_dataset_split (needs eval_dataset_name).")
            return None
        return self._read(self.eval_dataset_name, self.eval_dataset_split, stage, "eval_dataset_split")

    def beside(self, name: str, max_rows: int | None = None) -> "RowSet":
        """Read a further file of texts or conversations, as fine-tuning takes them.

        Its columns are its own: ``column_mapping`` counts where it names some of them.
        """
        reading = Reading(as_chat=self.as_chat, leave_out=tuple(self.leave_out or ()))
        there = load_rows(name, self.dataset_split, 1).column_names
        mapping = [pair for pair in self.column_mapping or [] if pair.partition("=")[0] in there]
        taken = take_rows(name, self.dataset_split, max_rows, mapping, "sft", reading)
        return RowSet(name, self.dataset_split, taken.rows, tuple(taken.numbers))

    def _read(self, name: str, split: str, stage: StageName, setting: str) -> "RowSet":
        # A file is one split, whose name only the default may be silent about
        is_default = split == vars(DataArguments)[setting]
        # One place for both files, of which one may lie here
        names = (self.dataset_name, self.eval_dataset_name)
        elsewhere = not is_of_hub(name) and any(is_of_hub(other) for other in names if other)
        place = None if elsewhere else self.place
        rows = load_rows(
            name,
            split,
            self.max_rows,
            self.column_mapping,
            place=place,
            split_by=setting,
            is_default=is_default,
        )
        taken = take_told(rows, stage, resolve(name), self.reading)
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


def row_lines(rows: Dataset) -> Iterator[bytes]:
    """Yield each row as a line of JSON with sorted keys, by which rows are compared."""
    for row in rows:
        yield json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n"


def fingerprint(name: str, split: str | None, rows: Dataset) -> dict[str, Any]:
    """Return a data set as a stage saw it: name, split, number of rows, sha256 and kind.

    The sha256 is of all ``row_lines``. ``chat`` tells whether anything in
    the first row is chat messages.
    """
    # Chat is seen in the first row: rows are of one kind
    digest = hashlib.sha256()
    chat = any(
        isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]
        for value in rows[0].values()
    )
    for line in row_lines(rows):
        digest.update(line)
    return {"name": name, "split": split, "rows": len(rows), "sha256": digest.hexdigest(), "chat": chat}


def parse_column_mapping(pairs: Sequence[str]) -> dict[str, str]:
    """Return old and new names of pairs ``FROM=TO``.

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
    place: HubPlace | None = None,
    split_by: str = "dataset_split",
    is_default: bool = True,
) -> Dataset:
    """Read the rows of a file, of a Hub dataset or of the demo (embedded/NAME), columns renamed.

    With ``stage`` they are as that stage takes them (``formats.take``), and what it leaves out is
    counted in a warning. ``split_by`` is the setting that names the split, and ``is_default`` says
    that nobody has set it.

    Raises:
        ValueError: a file of another kind, one that is not there or is broken (with the line), an
            unknown split, no rows, a column to rename that is not there; with ``stage``, what
            ``take`` raises.
    """
    if stage is not None:
        return take_rows(name, split, max_rows, column_mapping, stage, reading, place).rows
    # Read, cut and rename
    name = resolve(name)
    mapping = parse_column_mapping(column_mapping or [])
    rows = read_rows(name, split, place, split_by=split_by, is_default=is_default)
    if is_table(name):
        rows = numbers_again(rows, {**dict.fromkeys(c for c in rows.column_names if is_text(c)), **mapping})
    if max_rows is not None:
        rows = rows.select(range(min(max_rows, len(rows))))
    if len(rows) == 0:
        raise UserError(f"{name}: no rows.")
    return rename_columns(rows, mapping, name)


def take_rows(
    name: str,
    split: str,
    max_rows: int | None,
    column_mapping: Sequence[str] | None,
    stage: StageName,
    reading: Reading | None = None,
    place: HubPlace | None = None,
) -> Taken:
    """Read rows as a stage takes them, and tell in a warning what is left out and ignored.

    Raises:
        UserError: as ``load_rows``.
    """
    rows = load_rows(name, split, max_rows, column_mapping, place=place)
    return take_told(rows, stage, resolve(name), reading)


def take_told(rows: Dataset, stage: StageName, name: str, reading: Reading | None = None) -> Taken:
    """Return rows as a stage takes them, and tell in a warning what is left out and ignored.

    Raises:
        UserError: as ``take``.
    """
    taken = take(rows, stage, name, reading)
    left_out = sum(map(len, taken.dropped.values()))
    if left_out:
        logger.warning(
            "%s: %d of %d rows left out: %s", name, left_out, len(rows), describe_dropped(taken.dropped)
        )
    if taken.ignored:
        logger.warning("%s: read as %s; ignored: %s", name, taken.title, ", ".join(taken.ignored))
    if taken.not_there:
        logger.warning(
            "%s: without effect: leave_out: [%s]; no row has a role, a key or a part of that name.",
            name,
            ", ".join(taken.not_there),
        )
    return taken


def rename_columns(rows: Dataset, mapping: Mapping[str, str], name: str) -> Dataset:
    """Return ``rows`` with columns renamed from the keys of ``mapping`` to its values.

    Raises:
        ValueError: a column that is not there, or a new name that another column has.
    """
    # Old names must be there, and new ones free
    found = rows.column_names
    # What is set aside may be in another file of the run alone
    mapping = {
        source: target for source, target in mapping.items() if source in found or not SET_ASIDE.match(target)
    }
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


def require_columns(rows: Dataset, name: str, *alternatives: Sequence[str]) -> None:
    """Raise UserError unless ``rows`` has all columns of one of ``alternatives``.

    The error names the columns found and those accepted.
    """
    if not any(set(columns) <= set(rows.column_names) for columns in alternatives):
        accepted = " or ".join("+".join(columns) for columns in alternatives)
        raise UserError(f"{name}: has the columns {', '.join(rows.column_names)}; needed are {accepted}.")
