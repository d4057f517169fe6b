"""Formats of rows: what rows may look like, which stage takes which, and what is wrong with one.

No tokenizer is needed to know it.

A row that is malformed is an error with its number, counted from 1; one that is sound but teaches
nothing is left out, with a reason.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple, get_args

from datasets import Dataset, Features, Json, LargeList, List, Value, concatenate_datasets

from goose_lora.data.columns import (
    HISTORIES,
    INPUTS,
    OF_TRAINERS,
    SYSTEMS,
    TEMPLATE,
    TOOLS,
    meaning,
    plain_name,
    says_nothing,
)
from goose_lora.data.messages import (
    ROLE_KEYS,
    Cell,
    Meant,
    as_meant,
    check_asks,
    check_whole_turns,
    meant_by,
    without,
)
from goose_lora.data.shapes import (
    Cells,
    LeftOut,
    Reading,
    Row,
    Shape,
    StageName,
    asked_of,
    by_prompt,
    leftover,
    shape_of,
    without_prompts,
)
from goose_lora.errors import UserError

logger = logging.getLogger(__name__)

Kind = Literal["text", "chat"]
LOOKED_AT = 1000  # rows, for the first value of each column


class Format(NamedTuple):
    """Columns that belong together, and the stages that take them.

    The stage that they are meant for comes first.
    """

    title: str
    columns: tuple[str, ...]
    stages: tuple[StageName, ...]


PAIRS = Format("preference pairs", ("prompt", "chosen", "rejected"), ("reward", "ppo"))
PROMPTS_AND_COMPLETIONS = Format("prompts and completions", ("prompt", "completion"), ("sft", "ppo"))
RANKED_LISTS = Format("ranked lists", ("prompt", "completions"), ("reward", "ppo"))
PROMPTS = Format("prompts", ("prompt",), ("ppo",))
IMPLICIT_PAIRS = Format("preference pairs, the prompt inside both", ("chosen", "rejected"), ("reward", "ppo"))
CONVERSATIONS = Format("conversations", ("messages",), ("sft", "ppo"))
TEXTS = Format("texts", ("text",), ("sft",))
# Where rows fit several, a stage takes them as the first.
FORMATS = (PAIRS, PROMPTS_AND_COMPLETIONS, RANKED_LISTS, PROMPTS, IMPLICIT_PAIRS, CONVERSATIONS, TEXTS)
EXTRAS = ("ranks", "margin", "tools", "chat_template_kwargs")  # go with a form where a row has them

KIND_NAMES: dict[str, str] = {"text": "text", "chat": "a list of chat messages"}


class Taken(NamedTuple):
    """Rows as a stage takes them, and the numbers, from 1, of those it leaves out, by reason.

    ``numbers`` are those of the rows that are left, in the file; ``title`` says what the rows look
    like, ``ignored`` names columns that nothing uses, and ``not_there`` parts to leave out that no
    row has.
    """

    rows: Dataset
    format: Format
    kind: Kind
    dropped: dict[str, list[int]]
    numbers: list[int]
    title: str
    ignored: list[str]
    not_there: list[str]


def find_format(columns: Iterable[str], stage: StageName, name: str) -> Format:
    """Return the format of TRL's names in which ``stage`` takes rows with these columns.

    Raises:
        UserError: none; it names the columns found, those accepted, and the setting that renames.
    """
    # The first format whose columns are all there
    columns = list(columns)
    for format in FORMATS:
        if stage in format.stages and set(format.columns) <= set(columns):
            return format
    accepted = " or ".join("+".join(format.columns) for format in FORMATS if stage in format.stages)
    others = [
        other
        for other in get_args(StageName)
        if any(other in f.stages and set(f.columns) <= set(columns) for f in FORMATS)
    ]
    hint = f"They suit {' and '.join(others)}. " if others else ""
    raise UserError(
        f"{name}: has the columns {', '.join(columns)}; {stage} takes {accepted}. {hint}Rename yours, for"
        f" example column_mapping: [{_renaming(columns, stage)}]."
    )


def _renaming(columns: Sequence[str], stage: StageName) -> str:
    """Return a mapping of the first columns that are free to the names that the stage takes."""
    wanted = {"sft": ("prompt", "completion"), "reward": ("prompt", "chosen", "rejected"), "ppo": ("prompt",)}
    needed = [name for name in wanted[stage] if name not in columns]
    # What goes with a prompt is no reply, and neither is a judgement on one
    beside = (*SYSTEMS, *INPUTS, *HISTORIES, *TOOLS, *TEMPLATE)
    free = [
        name
        for name in columns
        if name not in wanted[stage] and plain_name(name) not in beside and meaning(name) is None
    ]
    pairs = [f"{source}={target}" for source, target in zip(free, needed, strict=False)]
    return ", ".join(pairs) or "instruction=prompt"


def take(rows: Dataset, stage: StageName, name: str, reading: Reading | None = None) -> Taken:
    """Return rows as ``stage`` takes them, those that teach nothing left out.

    Rows of any shape are read one by one (``shapes.shape_of``). They then have the columns of one
    format, and none that is not meant for the stage; for PPO each has a ``prompt``, and its other
    columns are kept for reward functions.

    Raises:
        UserError: columns that the stage does not take or that would be passed over, a malformed
            row (with its number), or no row left.
    """
    # What the columns say, once for all rows
    reading = reading or Reading()
    meant = _meant(rows)
    values = _first_values(rows, meant)
    try:
        shape = shape_of(values, stage, reading)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if shape is None:
        format = find_format(rows.column_names, stage, name)
        raise UserError(
            f"{name}: there is nothing in the columns {', '.join(format.columns)}. Rename another to it with"
            " column_mapping, or give other rows."
        )

    # Row by row, by its number in the file: malformed is an error, useless is left out
    reader = _Reader(shape, stage, name, reading.leave_out)
    needed = [column for column in rows.column_names if column in shape.uses or meaning(column) is not None]
    for number, row in enumerate(rows.select_columns(needed), 1):
        cells: Cells = dict(row)  # type: ignore[arg-type]
        reader.read(number, {column: as_meant(cells[column], meant, (column,)) for column in cells})
    _tell_mixed(name, meant, shape)
    if "label" in shape.form:
        reader.group(len(rows))
    elif stage == "reward":
        reader.cut_prompts()

    # Rows must be left
    missing = [
        reason.removesuffix(" is missing") for reason in reader.dropped if reason.endswith(" is missing")
    ]
    if not reader.made and len(missing) == len(reader.dropped) == 1 and missing[0] in rows.column_names:
        raise UserError(
            f"{name}: there is nothing in the column {missing[0]}. Rename another to it with column_mapping,"
            " or give other rows."
        )
    if not reader.made:
        raise UserError(
            f"{name}: none of {len(rows)} rows is left: {describe_dropped(reader.dropped)}. Mend the rows, or"
            " give others."
        )
    kept = _for_ppo(rows, reader) if stage == "ppo" else _dataset(reader.made, reader.kind)
    ignored = [
        column for column in rows.column_names if column not in shape.uses and column not in kept.column_names
    ]
    dropped = {reason: sorted(numbers) for reason, numbers in reader.dropped.items()}
    return Taken(
        kept,
        reader.format,
        reader.kind,
        dropped,
        reader.numbers,
        shape.title,
        ignored,
        reader.not_there,
    )


def looks_like(rows: Dataset, stage: StageName, reading: Reading) -> Shape | None:
    """Return the shape in which a stage takes these rows; None if it takes none.

    Raises:
        UserError: a shape that is known and not understood.
    """
    first = rows.select(range(min(len(rows), LOOKED_AT)))
    return shape_of(_first_values(rows, _meant(first)), stage, reading)


def _meant(rows: Dataset) -> Meant:
    return meant_by(_with_texts(rows))  # type: ignore[arg-type]


def _with_texts(rows: Dataset) -> Dataset:
    """Return the columns in which a text may stand for more, by their types and first letters."""
    # Objects with roles are messages by their type
    kinds = {column: kind for column, kind in rows.features.items() if column not in OF_TRAINERS}
    texts = [column for column, kind in kinds.items() if isinstance(kind, Value) and "string" in kind.dtype]
    deep = [
        column
        for column, kind in kinds.items()
        if isinstance(kind, List | LargeList | Json | dict)
        and not (isinstance(kind, List) and isinstance(kind.feature, dict) and {*ROLE_KEYS} & {*kind.feature})
    ]
    found: set[str] = set()
    for table in rows.select_columns(texts).with_format("arrow").iter(batch_size=1000) if texts else ():
        for column in {*texts} - found:
            cells = table[column].to_pylist()  # type: ignore[call-overload]
            if any(text and text.lstrip()[:1] in ("[", "{") for text in cells):
                found.add(column)
    return rows.select_columns([column for column in kinds if column in (*deep, *found)])


def _tell_mixed(name: str, meant: Meant, shape: Shape) -> None:
    """Log where text that could be chat messages is none, since most of its column is not."""
    for spot, rows in meant.mixed.items():
        if spot[0] in shape.uses:
            shown = [
                ", ".join(map(str, numbers[:3])) + (", ..." if len(numbers) > 3 else "") for numbers in rows
            ]
            way = "what is text stays so" if spot in meant.messages else "all is read as text"
            logger.warning(
                "%s: %s is chat messages as JSON in %d rows (%s) and none in %d (%s); %s.",
                name,
                spot[0],
                len(rows[0]),
                shown[0],
                len(rows[1]),
                shown[1],
                way,
            )


class _Reader:
    """Rows of one shape, read one after the other."""

    def __init__(self, shape: Shape, stage: StageName, name: str, leave_out: Sequence[str]):
        self.shape, self.name, self.leave_out = shape, name, leave_out
        self.not_there = list(leave_out)
        self.stage: StageName = stage
        self.format = (
            next(format for format in FORMATS if format.columns == shape.form[:3])
            if ("label" not in shape.form)
            else RANKED_LISTS
        )
        self.dropped: dict[str, list[int]] = defaultdict(list)
        self.made: list[Cells] = []
        self.numbers: list[int] = []
        self.kind: Kind = "text"
        self.kind_from = 0

    def read(self, number: int, row: Row) -> None:
        """Read one row, and keep it unless it teaches nothing."""
        # What the row says, what it would say besides, and whether it is sound
        try:
            made = self.shape.read(row)
            if self.leave_out:
                self.not_there = [part for part in self.not_there if without(made, [part]) == made]
                made = without(made, self.leave_out)
            if self.stage == "sft":
                check_whole_turns(made)
            passed_over = leftover(self.shape, row, self.stage)
            if passed_over is not None:
                raise UserError(passed_over)
            self._keep(number, made, self._reason(number, made))
        except LeftOut as error:
            self.dropped[str(error)].append(number)
        except UserError as error:
            raise UserError(f"{self.name}: row {number}: {error}") from error

    def cut_prompts(self) -> None:
        """Cut prompts off replies of text, if all replies of the file begin with theirs."""
        made = without_prompts(self.made, self.shape.asking)
        if made is None:
            return
        logger.warning(
            "%s: the replies of all %d rows begin with their prompt, which is cut off. If they are to keep"
            " it, begin them with a space.",
            self.name,
            len(made),
        )
        # A reply that was nothing but its prompt is empty now
        numbers, self.made, self.numbers = self.numbers, [], []
        for number, row in zip(numbers, made, strict=True):
            self._keep(number, row, reason_to_drop(row, self.format, self.stage, self.kind))

    def _keep(self, number: int, made: Cells, reason: str | None) -> None:
        if reason is not None:
            self.dropped[reason].append(number)
            return
        self.made.append(made)
        self.numbers.append(number)

    def group(self, count: int) -> None:
        """Make ranked lists of replies with thumbs up and down, a list to each prompt."""
        # The numbers of lists are their own: each is of several rows
        lists = list(by_prompt(self.made))
        if lists:
            used = {asked_of(row) for row in lists}
            alone = [
                number
                for number, row in zip(self.numbers, self.made, strict=True)
                if asked_of(row) not in used
            ]
        else:
            alone = self.numbers
        if alone:
            self.dropped["its prompt has no good and bad reply both, which SFT does not need"] = alone
        self.made, self.numbers = lists, list(range(1, len(lists) + 1))

    def _reason(self, number: int, made: Cells) -> str | None:
        # All rows of a file are of one kind, since a template takes all or none
        first = made[self.shape.form[0]]
        kind = _kind_of(first, self.shape.form[0])
        if not self.kind_from:
            self.kind, self.kind_from = kind, number
        elif kind != self.kind:
            column = self.shape.form[0]
            raise UserError(
                f"{column} is {KIND_NAMES[kind]}, but {column} of row {self.kind_from} is"
                f" {KIND_NAMES[self.kind]}. Write all as text or all as messages, or read all as messages:"
                " as_chat: true."
            )
        if "label" in self.shape.form:
            return reason_to_drop(made, PROMPTS_AND_COMPLETIONS, "sft", kind)
        return reason_to_drop(made, self.format, self.stage, kind)


def _first_values(rows: Dataset, meant: Meant) -> dict[str, Any]:
    """Return each column with its first value that says something; None where there is none."""
    # Ids of another tokenizer are none of its columns: nothing may read them
    values: dict[str, Any] = dict.fromkeys(
        column for column in rows.column_names if column not in OF_TRAINERS
    )
    for number, row in enumerate(rows):
        missing = [column for column, value in values.items() if says_nothing(value)]
        if not missing or number >= LOOKED_AT:
            break
        for column in missing:
            values[column] = as_meant(row[column], meant, (column,))  # type: ignore[index,call-overload]
    return values


def _features(columns: Sequence[str], kind: Kind) -> Features:
    """Return types under which messages stay as they are: Arrow fills in the keys of others."""
    # Json keeps each value as it is written
    content = Value("string") if kind == "text" else List(Json())
    types = {
        "completions": List(content),
        "ranks": List(Value("int64")),
        "tools": List(Json()),
        "chat_template_kwargs": Json(),
    }
    return Features({column: types.get(column, content) for column in columns if column != "margin"})


def _dataset(made: Sequence[Cells], kind: Kind) -> Dataset:
    """Return rows as a data set, with the columns that any of them has."""
    columns = list(dict.fromkeys(column for row in made for column in row))
    data = Dataset.from_list(
        [{column: row.get(column) for column in columns if column != "margin"} for row in made],
        features=_features(columns, kind),
    )
    # A margin is what it is, and checked where it is used
    if "margin" in columns:
        margins = Dataset.from_list(
            [{"margin": row.get("margin")} for row in made], on_mixed_types="use_json"
        )
        data = concatenate_datasets([data, margins], axis=1)
    return data


def _for_ppo(rows: Dataset, reader: _Reader) -> Dataset:
    """Return the rows that are left with their prompts, and other columns for reward functions."""
    # The columns as they are in the file, but for what the template is given
    places = [number - 1 for number in reader.numbers]
    found = _dataset(reader.made, reader.kind)
    same = "prompt" in rows.column_names and found.column_names == ["prompt"]
    kept = rows if len(places) == len(rows) else rows.select(places)
    # Tools are those that were read, if any
    gone = (*OF_TRAINERS, "tools")
    kept = kept.remove_columns([column for column in gone if column in kept.column_names])
    if same and all(before == row["prompt"] for before, row in zip(kept["prompt"], reader.made, strict=True)):
        return kept
    kept = kept.remove_columns([column for column in found.column_names if column in kept.column_names])
    return concatenate_datasets([kept, found], axis=1) if kept.column_names else found


def describe_dropped(dropped: Mapping[str, Sequence[int]]) -> str:
    """Return counts and reasons in one line, each with the first three row numbers."""
    return "; ".join(
        f"{len(numbers)} because {reason} (row{'s' if len(numbers) > 1 else ''}"
        f" {', '.join(map(str, numbers[:3]))}{', ...' if len(numbers) > 3 else ''})"
        for reason, numbers in dropped.items()
    )


def reason_to_drop(row: Row, format: Format, stage: StageName, kind: Kind) -> str | None:
    """Return why a row in one of the formats is left out, or None.

    Raises:
        UserError: it is malformed.
    """
    columns = ("prompt",) if stage == "ppo" else format.columns
    for column in columns:
        if column == "completions":
            reason = _ranked_reason(row, kind)
        else:
            reason = _value_reason(
                row[column],
                column,
                kind,
                may_be_empty=column != "text" and kind == "text" and stage != "ppo",
            )
        if reason is not None:
            return reason
    # A pair that does not differ teaches nothing
    if "chosen" in columns and row["chosen"] == row["rejected"]:
        return "chosen and rejected are the same"
    return None


def ranks_of(row: Row) -> list[int]:
    """Return one rank per reply of a ranked list: 1 for the best, equal ones for ties.

    They are its ``ranks``, or 1, 2, ... as the list stands.

    Raises:
        ValueError: not one rank a reply, or something other than whole numbers from 1 to the number
            of replies.
    """
    # A list without ranks stands best first
    count, ranks = len(row["completions"]), row.get("ranks")
    if ranks is None:
        return list(range(1, count + 1))
    if len(ranks) != count:
        raise UserError(
            f"{len(ranks)} ranks for {count} completions; give one to each, or no ranks if the list stands"
            " best first."
        )
    if not all(
        isinstance(rank, int | float) and float(rank).is_integer() and 1 <= rank <= count for rank in ranks
    ):
        raise UserError(
            f"ranks {ranks}: expected whole numbers from 1, the best, to {count}, the number of completions."
            " Scores are not ranks."
        )
    return [int(rank) for rank in ranks]


def _kind_of(value: Cell, column: str) -> Kind:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "chat"
    raise UserError(f"{column} is {type(value).__name__}; expected text or a list of chat messages.")


def _value_reason(value: Cell, column: str, kind: Kind, *, may_be_empty: bool = False) -> str | None:
    if value is None:
        return f"{column} is missing"
    # Text and messages are told apart row by row
    found = _kind_of(value, column)
    if found != kind:
        raise UserError(
            f"{column} is {KIND_NAMES[found]}, but the prompt is {KIND_NAMES[kind]}. Write all as text or"
            " all as messages."
        )
    if kind == "text":
        return None if may_be_empty or value.strip() else f"{column} is empty"
    if not value:
        return f"{column} is empty"
    try:
        if column == "prompt":
            check_asks(value)
        elif column != "messages" and value[-1]["role"] != "assistant":
            raise UserError(
                f"the last message is of the {value[-1]['role']}; a reply ends with a turn of the assistant."
            )
    except ValueError as error:
        raise UserError(f"{column}: {error}") from error
    if not (value[-1].get("content") or "").strip() and not value[-1].get("tool_calls"):
        return f"the last message of {column} is empty"
    return None


def _ranked_reason(row: Row, kind: Kind) -> str | None:
    """Return as ``reason_to_drop`` does, for the replies of a ranked list."""
    completions = row["completions"]
    if completions is None:
        return "completions are missing"
    if not isinstance(completions, list):
        raise UserError(f"completions is {type(completions).__name__}; expected a list of replies.")
    if len(completions) < 2:
        return "there are fewer than two completions"
    ranks = ranks_of(row)
    for place, completion in enumerate(completions, 1):
        reason = _value_reason(completion, f"completion {place}", kind)
        if reason is not None:
            return "a completion is missing or empty"
    for (one, rank), (other, its) in combinations(zip(completions, ranks, strict=True), 2):
        if rank != its and one == other:
            return "one reply stands there twice, with different ranks"
    return "all completions have one rank" if len(set(ranks)) == 1 else None
