"""Chat messages as people write them, read as role and content.

OpenAI's, ShareGPT's and LLaMA-Factory's forms, JSON text, parts of content, tool calls and tools.
"""

import ast
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from goose_lora.data.columns import setting_aside
from goose_lora.errors import UserError

Cell = Any  # what a row may hold, and what JSON text may stand for
Message = dict[str, Any]
Content = str | list[Message]  # text, or chat messages

CHAT_ROLES = ("system", "developer", "user", "assistant", "tool")
ASKING_ROLES = ("user", "tool")  # whose turn the assistant answers
# What ShareGPT, LLaMA-Factory, OpenAssistant and OpenAI's first function calls name their roles
ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
CALLING = ("function_call", "tool_call")  # ShareGPT's roles whose text is the JSON of a call
KNOWN_ROLES = (*CHAT_ROLES, *ROLE_NAMES, *CALLING)
LEARNED_KEYS = ("train", "training", "train_on_turn", "loss")  # Axolotl's and others' for a turn's weight
YES_AND_NO = {"true": 1, "false": 0, "1": 1, "0": 0, "1.0": 1, "0.0": 0}
ROLE_KEYS, TEXT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")


def parsed(value: object) -> Cell:
    """Return what JSON text, or the text that Python prints of lists, stands for.

    Any other value, and text that is neither, is returned as it is.
    """
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    # As json.dump writes it, then as str() of a list does
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list | dict):
            return found
    return value


class TurnsAsJson(str):
    """Text of a column that is lists of texts as JSON, one a turn (Chatbot Arena)."""


Spot = tuple[str, ...]  # where a text stands: its column, then keys of objects; * for items of a list


class Meant(NamedTuple):
    """What the texts of a file stand for, by where they stand.

    ``messages``: most are chat messages as JSON; ``turns``: most are lists of texts; ``mixed``:
    where some are messages and others none, the numbers of both kinds of rows, from 1.
    """

    messages: frozenset[Spot]
    turns: frozenset[Spot]
    mixed: dict[Spot, tuple[list[int], list[int]]]


def meant_by(rows: Iterable[Mapping[str, Any]]) -> Meant:
    """Return what the texts of these rows stand for; a reply that is JSON is text in most files."""
    # Cells that are messages are so whatever others are, and count with them
    messages, others = defaultdict[Spot, list[int]](list), defaultdict[Spot, list[int]](list)
    turns = Counter[Spot]()
    for number, row in enumerate(rows, 1):
        for column, value in row.items():
            for spot, cell in _spots(value, (column,)):
                # Most cells are plain text, of which nothing is parsed
                found = parsed(cell)
                (messages if _holds_messages(found) else others)[spot].append(number)
                turns[spot] += texts_of(found) is not None
    return Meant(
        frozenset(spot for spot in messages if len(messages[spot]) > len(others.get(spot, ()))),
        frozenset(
            spot for spot in others if 2 * turns[spot] > len(others[spot]) + len(messages.get(spot, ()))
        ),
        {spot: (messages[spot], others[spot]) for spot in messages if spot in others},
    )


def texts_of(value: Cell) -> list[str | None] | None:
    """Return ``TurnsAsJson``, or a list of texts, as that list; None for all else."""
    found = parsed(value) if isinstance(value, TurnsAsJson) else value
    listed = isinstance(found, list) and all(text is None or isinstance(text, str) for text in found)
    return found if listed else None


def as_meant(value: Cell, meant: Meant, spot: Spot) -> Cell:
    """Return a cell with its texts as what those in their place stand for."""
    # A text is what most of its kind are
    if isinstance(value, str):
        if spot in meant.messages:
            found = parsed(value)
            return [found] if is_messages([found]) else found
        return TurnsAsJson(value) if spot in meant.turns else value
    # What messages say is text
    if _holds_messages(value):
        return value
    if isinstance(value, dict):
        return {key: as_meant(inner, meant, (*spot, key)) for key, inner in value.items()}
    return [as_meant(inner, meant, (*spot, "*")) for inner in value] if isinstance(value, list) else value


def _spots(value: Cell, spot: Spot) -> Iterator[tuple[Spot, Cell]]:
    """Yield texts and messages with the places where they stand."""
    if _holds_messages(value) or (isinstance(value, str) and value.strip() not in ("", "[]", "{}")):
        yield spot, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _spots(inner, (*spot, key))
    elif isinstance(value, list):
        for inner in value:
            yield from _spots(inner, (*spot, "*"))


def _holds_messages(value: Cell) -> bool:
    """Return whether a value is chat messages, or one, and no other object that has such a key."""
    if isinstance(value, dict):
        value = value.get("messages", [value])
    return is_messages(value) and any(
        str(message[_key(message, ROLE_KEYS) or ""]).strip().lower() in KNOWN_ROLES
        and _key(message, (*TEXT_KEYS, "tool_calls", "function_call")) is not None
        for message in value
    )


# XTuner's keys of a turn, in their order, and the roles that they stand for.
_OF_A_TURN = {"system": "system", "input": "user", "output": "assistant"}


def is_messages(value: object) -> TypeGuard[list[Message]]:
    """Return whether ``value`` is a list of objects, each with a role."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and _key(message, ROLE_KEYS) is not None for message in value)
    )


def messages_of(value: object) -> list[Message]:
    """Return a list of messages in the form that chat templates take.

    Roles by their usual names, text parts joined, calls of tools decoded once, keys without a value
    left out.

    Raises:
        UserError: something that is not a message; it says which one.
    """
    # One message alone, or a list of them, maybe written as JSON text
    value = parsed(value)
    if isinstance(value, dict):
        value = value["messages"] if set(value) >= {"messages"} else [value]
    if is_turns(value):
        value = _of_turns(value)
    if not isinstance(value, list):
        raise UserError(f"{type(value).__name__} is not a list of chat messages.")
    return [_message(message, place) for place, message in enumerate(value, 1)]


def is_turns(value: object) -> TypeGuard[list[dict[str, Any]]]:
    """Return whether ``value`` is XTuner's list of turns, each a question and its answer."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict) and {"input", "output"} <= turn.keys() <= _OF_A_TURN.keys()
            for turn in value
        )
    )


def _of_turns(turns: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return XTuner's turns as messages; what one lacks has none."""
    return [
        {"role": role, "content": turn[key]}
        for turn in turns
        for key, role in _OF_A_TURN.items()
        if turn.get(key)
    ]


def turns_of(texts: Sequence[str]) -> list[Message]:
    """Return texts that alternate, the user's first, as messages (UltraChat's ``data``)."""
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]


def history_of(history: object) -> list[Message]:
    """Return earlier turns, pairs of question and answer or messages, as messages.

    Raises:
        UserError: another form.
    """
    # LLaMA-Factory's pairs, or messages
    history = parsed(history)
    if not history:
        return []
    if is_messages(history):
        return messages_of(history)
    way_out = f"or set it aside: {setting_aside('history')}."
    if not isinstance(history, list) or not all(
        isinstance(turn, list) and len(turn) == 2 for turn in history
    ):
        raise UserError(f"history is not a list of [question, answer] pairs. Write it so, {way_out}")
    for place, turn in enumerate(history, 1):
        if not all(isinstance(text, str) for text in turn):
            raise UserError(
                f"turn {place} of history is {str(turn)[:60]}; expected two texts. Mend the row, {way_out}"
            )
    return turns_of([text for turn in history for text in turn])


def tools_of(value: object) -> list[dict[str, Any]] | None:
    """Return tools as the JSON schemas that chat templates take; None if there are none.

    Raises:
        UserError: something else than a list of tools.
    """
    # A list, each of it maybe JSON text
    tools = parsed(value)
    if isinstance(tools, dict):
        tools = [tools]
    if not tools:
        return None
    tools = [parsed(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(
            "tools is no list of JSON schemas. Write each tool as {type: function, function: {name:,"
            f" parameters:}}}}, or set them aside: {setting_aside('tools')}."
        )
    # A bare schema, as LLaMA-Factory and ShareGPT have it, in the wrapping that templates expect
    bare = [_filled(tool) for tool in tools]
    return [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}
        for tool in bare
    ]


def system_of(value: object, column: str) -> str:
    """Return the text of a cell for the system message: text, a message, or a list of one of them.

    Raises:
        UserError: something else.
    """
    # Text that is JSON of another kind is text
    found = parsed(value)
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if is_messages([found]):
        (message,) = messages_of(found)
        if message["role"] in ("system", "developer"):
            return said(message)
    elif isinstance(found, str):
        return found
    elif isinstance(value, str) and isinstance(found, dict):
        return value
    raise UserError(
        f"{column} is {str(value)[:60]}; expected text, or one message with the role system. Write it so, or"
        f" set it aside: {setting_aside(column)}."
    )


def check_asks(messages: Sequence[Message]) -> None:
    """Raise UserError unless the last message is one that the assistant answers."""
    role = messages[-1]["role"]
    if role not in ASKING_ROLES:
        way_out = "Add the user's turn."
        if role == "assistant":
            way_out = "Put the conversation into a column messages, whose last reply is left out."
        raise UserError(
            f"the last message is of the {role}; a prompt ends with a turn of the user. {way_out}"
        )


def check_whole_turns(row: Mapping[str, Cell]) -> None:
    """Raise UserError where a message says that a part of its text is not to be learned."""
    for value in row.values():
        for place, message in enumerate(value if is_messages(value) else [], 1):
            if message.get("train_detail"):
                raise UserError(
                    f"message {place} has train_detail, which says what part of a turn is learned, and turns"
                    " are learned as a whole. Give it weight: 0, or learn all of it: leave_out:"
                    " [train_detail]."
                )


def without(value: Cell, parts: Sequence[str], *, is_prompt: bool = False) -> Cell:
    """Return messages, wherever they are in ``value``, without roles, keys or thoughts.

    ``tools`` are left out of the row. A turn that then says nothing goes too, but for the last one,
    if that is no prompt's: a row with an empty reply is left out.
    """
    if isinstance(value, dict):
        return {
            key: without(inner, parts, is_prompt=key == "prompt")
            for key, inner in value.items()
            if key != "tools" or "tools" not in parts
        }
    if not isinstance(value, list):
        return value
    # Lists of replies hold lists of messages
    if not is_messages(value):
        return [without(inner, parts) for inner in value]
    turns = [turn for turn in value if turn["role"] not in parts]
    kept = [{key: inner for key, inner in turn.items() if key not in parts} for turn in turns]
    if "think" in parts:
        kept = [
            {**turn, "content": said(turn).rpartition("</think>")[2].lstrip()}
            if "</think>" in said(turn)
            else turn
            for turn in kept
        ]
    return [
        left
        for place, (turn, left) in enumerate(zip(turns, kept, strict=True), 1)
        if left == turn
        or said(left).strip()
        or left.get("tool_calls")
        or (place == len(kept) and not is_prompt)
    ]


def said(message: Mapping[str, Any]) -> str:
    """Return the text of a message; nothing where it has none."""
    content = message.get("content")
    return content if isinstance(content, str) else ""


def asked(prompt: object) -> str:
    """Return a prompt as a reader wants it: its text, or messages without their template.

    A single user's turn is its text; of several, each begins with its role.
    """
    if not is_messages(prompt):
        return str(prompt)
    if len(prompt) == 1:
        return said(prompt[0])
    return "\n".join(f"{message['role']}: {said(message)}" for message in prompt)


def _message(message: object, place: int) -> Message:
    # An object with a role, under either name
    message = parsed(message)
    if not isinstance(message, dict):
        raise UserError(
            f"message {place} is {type(message).__name__}; expected an object with role and content."
            " Write all as text or all as messages."
        )
    role_key, text_key = _key(message, ROLE_KEYS), _key(message, TEXT_KEYS)
    if role_key is None:
        found = ", ".join(key for key, value in message.items() if value is not None) or "nothing"
        raise UserError(f"message {place} has no role; it has {found}. Each message needs role and content.")
    # Other keys are for the template: reasoning_content, name, weight
    rest = {
        key: _filled(value)
        for key, value in message.items()
        if key not in (role_key, text_key) and value is not None
    }
    # Whether a turn is learned: other trainers' words for OpenAI's weight
    for key in LEARNED_KEYS:
        if key in rest:
            weight = _weight(rest.pop(key), key, place)
            if rest.setdefault("weight", weight) != weight:
                raise UserError(f"message {place} has {key} beside another weight. Keep one of them.")
    role = str(message[role_key]).strip()
    role = ROLE_NAMES.get(role.lower(), role.lower() if role.lower() in CHAT_ROLES else role)
    content = None if text_key is None else _text(message[text_key], place, role)
    # ShareGPT's call of a tool is the JSON of it
    if role in CALLING:
        return {"role": "assistant", "content": "", "tool_calls": _calls(parsed(content), place)} | rest
    if role not in CHAT_ROLES:
        raise UserError(
            f"message {place} has the role {role!r}; known are {', '.join(CHAT_ROLES)}, and human and gpt."
            " Rename it in the rows."
        )
    read = {"role": role, "content": content}
    # OpenAI's first form of a call is one object, maybe as JSON text
    call = parsed(rest.pop("function_call", None))
    if rest.get("tool_calls"):
        rest["tool_calls"] = _calls(parsed(rest["tool_calls"]), place)
        if call:
            raise UserError(f"message {place} has both tool_calls and function_call. Keep one of them.")
    elif call:
        rest["tool_calls"] = _calls(call, place)
    if content is None and not rest.get("tool_calls"):
        raise UserError(
            f"message {place}, of the {role}, has no content. Each message needs role and content."
        )
    return read | rest


def _weight(value: object, key: str, place: int) -> int:
    """Return OpenAI's weight for what others write: true and false, also as text."""
    weight = YES_AND_NO.get(str(value).strip().lower())
    if weight is None:
        raise UserError(
            f"message {place} has {key}: {str(value)[:40]!r}, which says whether the turn is learned. Write"
            " true or false, or leave it out of the rows."
        )
    return weight


def _key(message: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if message.get(name) is not None), None)


def _text(content: object, place: int, role: str) -> str | None:
    """Return the text of a message's content; parts that are all text are joined."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
            for part in content
        ]
        if parts and all(isinstance(part, str) for part in parts):
            if any(isinstance(part, str) for part in content):
                raise UserError(
                    f"message {place}, of the {role}, has content of type list; it must be text, or parts of"
                    " {type: text, text: ...}."
                )
            return "".join(map(str, parts))
        kinds = {str(part.get("type")) for part in content if isinstance(part, dict)}
        raise UserError(
            f"message {place}, of the {role}, has content of type list; it must be text, or parts that are"
            f" all text ({', '.join(sorted(kinds))}). Leave such rows out."
        )
    raise UserError(
        f"message {place}, of the {role}, has content of type {type(content).__name__}; it must be text."
    )


def _calls(calls: object, place: int) -> list[dict[str, Any]]:
    """Return calls of tools with their arguments as objects: OpenAI writes them as JSON text."""
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = parsed(call)
        function = parsed(call.get("function", call)) if isinstance(call, dict) else None
        if not isinstance(function, dict) or "name" not in function:
            raise UserError(
                f"message {place} has a call of a tool without a name: {str(call)[:80]}. Write {{function:"
                " {name:, arguments:}}."
            )
        function = {**function, "arguments": parsed(function.get("arguments", {}))}
        outer = call if "function" in call else {"type": "function"}
        made.append({**outer, "function": function})
    return made


def _filled(value: Cell) -> Cell:
    """Return a value without keys that are null: Arrow fills structs with those of others."""
    if isinstance(value, dict):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value
