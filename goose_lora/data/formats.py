"""Formats of rows: what rows may look like, which stage takes which, and what is wrong with one.

No tokenizer is needed to know it.

A row that is malformed is an error with its number, counted from 1; one that is sound but teaches
nothing is left out, with a reason.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from datasets import Dataset

from goose_lora.errors import UserError

StageName = Literal["sft", "reward", "ppo"]
Kind = Literal["text", "chat"]
Row = Mapping[str, Any]
Content = str | list[dict[str, Any]]  # text, or chat messages


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
FORMAT_COLUMNS = {column for format in FORMATS for column in format.columns} | {"ranks"}

CHAT_ROLES = ("system", "developer", "user", "assistant", "tool")
ASKING_ROLES = ("user", "tool")  # whose turn the assistant answers
KIND_NAMES: dict[str, str] = {"text": "text", "chat": "a list of chat messages"}
TURN_MARKER = "\n\nAssistant:"  # of Anthropic's hh-rlhf, whose texts hold the whole dialogue


class Taken(NamedTuple):
    """Rows as a stage takes them, and the numbers, from 1, of those it leaves out, by reason."""

    rows: Dataset
    format: Format
    kind: Kind
    dropped: dict[str, list[int]]


def find_format(columns: Iterable[str], stage: StageName, name: str) -> Format:
    """Return the format in which ``stage`` takes rows with these columns.

    Raises:
        UserError: none; it names the columns found and those accepted.
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
    hint = (
        f"They suit {' and '.join(others)}. " if others else ""
    ) + "Rename yours, for example column_mapping: [instruction=prompt]."
    raise UserError(f"{name}: has the columns {', '.join(columns)}; {stage} takes {accepted}. {hint}")


def take(rows: Dataset, stage: StageName, name: str) -> Taken:
    """Return rows as ``stage`` takes them, those that teach nothing left out.

    Rows are checked one by one. For PPO each row then has a ``prompt``, and its other columns are
    kept for reward functions. For SFT and the reward model, columns of another format are removed,
    since TRL guesses from the columns what it is given.

    Raises:
        UserError: columns that the stage does not take, a malformed row (with its number), or no
            row left.
    """
    # What the columns say, and whether the rows are text or chat
    format = find_format(rows.column_names, stage, name)
    columns = [column for column in (*format.columns, "ranks") if column in rows.column_names]
    kind, kind_from = _kind_of_rows(rows, format.columns[0], name)
    # Row by row, by its number in the file: malformed is an error, useless is left out
    dropped: dict[str, list[int]] = defaultdict(list)
    kept = []
    for number, row in _numbered(rows, columns):
        try:
            reason = reason_to_drop(row, format, stage, kind)
        except _OtherKind as error:
            other = f"{format.columns[0]} of row {kind_from} is {KIND_NAMES[kind]}"
            raise UserError(f"{name}: row {number}: {error}, but {other}. {error.way_out}") from error
        except ValueError as error:
            raise UserError(f"{name}: row {number}: {error}") from error
        if reason is None:
            kept.append(number - 1)
        else:
            dropped[reason].append(number)
    # Rows must be left
    if not kept:
        raise UserError(
            f"{name}: none of {len(rows)} rows is left: {describe_dropped(dropped)}. Mend the rows, or give"
            " others."
        )
    rows = rows.select(kept) if dropped else rows
    # Only the stage's own columns: TRL guesses from them what it is given
    if stage != "ppo":
        rows = rows.remove_columns(
            [column for column in rows.column_names if column in FORMAT_COLUMNS and column not in columns]
        )
    elif "prompt" not in format.columns:
        rows = rows.map(lambda row: {"prompt": prompt_of(row, format)}, desc=f"Taking the prompts of {name}")
    return Taken(rows, format, kind, dict(dropped))


def describe_dropped(dropped: Mapping[str, Sequence[int]]) -> str:
    """Return counts and reasons in one line, each with the first three row numbers."""
    return "; ".join(
        f"{len(numbers)} because {reason} (row{'s' if len(numbers) > 1 else ''}"
        f" {', '.join(map(str, numbers[:3]))}{', ...' if len(numbers) > 3 else ''})"
        for reason, numbers in dropped.items()
    )


def reason_to_drop(row: Row, format: Format, stage: StageName, kind: Kind) -> str | None:
    """Return why ``row`` is left out, or None.

    Raises:
        UserError: it is malformed.
    """
    # PPO writes its own replies, so theirs need not be sound; a pair's must, or its prompt might be
    # of another kind.
    for column in format.columns:
        if stage == "ppo" and column in ("completion", "completions"):
            continue
        if column == "completions":
            reason = _ranked_reason(row, kind)
        else:
            reason = _value_reason(
                row[column],
                column,
                kind,
                may_be_empty=column == "prompt" and kind == "text" and stage != "ppo",
            )
        if reason is not None:
            return reason
    # A pair that does not differ teaches nothing; a prompt is needed to sample from
    if "chosen" in format.columns and row["chosen"] == row["rejected"]:
        return "chosen and rejected are the same"
    if stage == "ppo" and "prompt" not in format.columns:
        return _found_prompt_reason(prompt_of(row, format), format)
    return None


def prompt_of(row: Row, format: Format) -> Content:
    """Return the prompt of a row, text or messages.

    It is the row's own, the turns before the last one of the assistant, or what a pair has in
    common.
    """
    if "prompt" in format.columns:
        return row["prompt"]
    if format is CONVERSATIONS:
        return conversation_prompt(row["messages"])
    return implicit_prompt(row["chosen"], row["rejected"])


def conversation_prompt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return everything before the assistant's last turn, if that is the last.

    A conversation that ends otherwise is a prompt as a whole.
    """
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def implicit_prompt(chosen: Any, rejected: Any) -> Content:
    """Return what both begin with, cut where a reply can begin.

    Both replies keep something. Messages: up to the last turn that asks. Text: after the last
    ``Assistant:`` that opens a paragraph, if there is one (replies may begin alike), otherwise
    after the last whole word. TRL's ``extract_prompt`` cuts at the first letter that differs,
    within words and replies.
    """
    # What both begin with, to the letter or to the message
    shortest = min(len(chosen), len(rejected)) - 1
    same = next((place for place in range(shortest) if chosen[place] != rejected[place]), shortest)
    if isinstance(chosen, str):
        prefix = chosen[:same]
        if TURN_MARKER in prefix:
            return prefix[: prefix.rindex(TURN_MARKER) + len(TURN_MARKER)]
        inside_a_word = not (chosen[same].isspace() and rejected[same].isspace())
        while inside_a_word and prefix and not prefix[-1].isspace():
            prefix = prefix[:-1]
        return prefix.rstrip(" ")
    # Messages: back to the turn that asks
    while same and chosen[same - 1]["role"] not in ASKING_ROLES:
        same -= 1
    return chosen[:same]


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


def check_messages(messages: Sequence[Any]) -> None:
    """Raise UserError, saying which message, unless each has a known role and text.

    Tool calls may stand in place of text.
    """
    for place, message in enumerate(messages, 1):
        # Each message: an object, with a role that templates know, and with text
        if not isinstance(message, dict):
            raise UserError(
                f"message {place} is {type(message).__name__}; expected an object with role and content."
            )
        role, content = message.get("role"), message.get("content")
        if role is None:
            known = "from" in message and "value" in message
            hint = (
                "This is ShareGPT's form; trl.maybe_convert_to_chatml converts it."
                if known
                else "Each message needs role and content."
            )
            raise UserError(f"message {place} has no role; it has {', '.join(message) or 'nothing'}. {hint}")
        if role not in CHAT_ROLES:
            raise UserError(f"message {place} has the role {role!r}; known are {', '.join(CHAT_ROLES)}.")
        if content is None and not message.get("tool_calls"):
            raise UserError(
                f"message {place}, of the {role}, has no content. Each message needs role and content."
            )
        if content is not None and not isinstance(content, str):
            raise UserError(
                f"message {place}, of the {role}, has content of type {type(content).__name__}; it must be"
                " text."
            )


class _OtherKind(UserError):
    def __init__(self, column: str, found: Kind):
        super().__init__(f"{column} is {KIND_NAMES[found]}")
        self.way_out = "Write all as text or all as messages."
        if column in ("chosen", "rejected") and found == "chat":
            self.way_out += (
                " If chosen and rejected hold the whole conversation, set the prompt aside: column_mapping:"
                " [prompt=unused]."
            )


def _kind_of(value: object, column: str) -> Kind:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "chat"
    raise UserError(f"{column} is {type(value).__name__}; expected text or a list of chat messages.")


def _numbered(rows: Dataset, columns: list[str]) -> Iterator[tuple[int, Any]]:
    yield from enumerate(rows.select_columns(columns), 1)


def _kind_of_rows(rows: Dataset, column: str, name: str) -> tuple[Kind, int]:
    """Return the kind of the first row that has something in ``column``, and its number."""
    for number, row in _numbered(rows, [column]):
        if row[column] is not None:
            try:
                return _kind_of(row[column], column), number
            except ValueError as error:
                raise UserError(f"{name}: row {number}: {error}") from error
    raise UserError(
        f"{name}: there is nothing in the column {column}. Rename another to it with column_mapping, or give"
        " other rows."
    )


def _value_reason(value: Any, column: str, kind: Kind, *, may_be_empty: bool = False) -> str | None:
    if value is None:
        return f"{column} is missing"
    # Text and messages are told apart row by row
    found = _kind_of(value, column)
    if found != kind:
        raise _OtherKind(column, found)
    if kind == "text":
        return None if may_be_empty or value.strip() else f"{column} is empty"
    if not value:
        return f"{column} is empty"
    try:
        check_messages(value)
        if column == "prompt":
            _check_asks(value)
        elif column != "messages" and value[-1]["role"] != "assistant":
            raise UserError(
                f"the last message is of the {value[-1]['role']}; a reply ends with a turn of the assistant."
            )
    except ValueError as error:
        raise UserError(f"{column}: {error}") from error
    if not (value[-1].get("content") or "").strip() and not value[-1].get("tool_calls"):
        return f"the last message of {column} is empty"
    return None


def _check_asks(messages: Sequence[Any]) -> None:
    role = messages[-1]["role"]
    if role not in ASKING_ROLES:
        way_out = (
            "Put the conversation into a column messages, whose last reply is left out."
            if role == "assistant"
            else "Add the user's turn."
        )
        raise UserError(
            f"the last message is of the {role}; a prompt ends with a turn of the user. {way_out}"
        )


def _found_prompt_reason(prompt: Any, format: Format) -> str | None:
    if format is CONVERSATIONS:
        if not prompt:
            return "there is no turn before the reply"
        try:
            _check_asks(prompt)
        except ValueError as error:
            raise UserError(f"messages, before the last reply: {error}") from error
    elif not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise UserError(
            "chosen and rejected do not begin alike, so there is no prompt in them. Give the prompt in a"
            " column of its own."
        )
    return None


def _ranked_reason(row: Row, kind: Kind) -> str | None:
    """As ``reason_to_drop``, for the replies of a ranked list."""
    completions = row["completions"]
    if completions is None:
        return "completions are missing"
    if not isinstance(completions, list):
        raise UserError(f"completions is {type(completions).__name__}; expected a list of replies.")
    ranks = ranks_of(row)
    for place, completion in enumerate(completions, 1):
        reason = _value_reason(completion, f"completion {place}", kind)
        if reason is not None:
            return "a completion is missing or empty"
    if len(completions) < 2:
        return "there are fewer than two completions"
    return "all completions have one rank" if len(set(ranks)) == 1 else None
