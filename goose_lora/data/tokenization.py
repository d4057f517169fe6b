"""Rows to token ids: prompts, texts and chat messages, and their padding."""

import inspect
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from goose_lora.data.messages import Cell, Content, Message
from goose_lora.data.rows import (
    require_columns,
)
from goose_lora.errors import UserError
from goose_lora.models.dates import with_day
from goose_lora.models.endings import template_limit

logger = logging.getLogger(__name__)

# What apply_chat_template takes besides the template's own keywords
_NO_KEYWORDS = {
    "asks",
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
} - {"documents", "kwargs"}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # keys under which templates look for them
MARKS = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|eot_id|user|assistant)\|>|<start_of_turn>|<end_of_turn>"
)


def require_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if not tokenizer.chat_template:
        raise UserError(
            f"{name}: the rows are chat messages, but the tokenizer has no chat template. Use a chat model,"
            " or text; or give SFT and reward model a template (chat_template_path), which PPO takes over."
        )


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: Any, **how: Any) -> Any:
    """Put messages through the tokenizer's chat template, which writes the day of the chain.

    Raises:
        ValueError: the template is broken, or refuses messages of this kind, as many do a system
            message or two turns of one role.
    """
    try:
        how |= with_day(tokenizer, how.get("chat_template"), how.get("tools"))
        with template_limit():
            return tokenizer.apply_chat_template(messages, **how)
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the tokenizer's chat template refuses messages of {roles}: {error}. Change the rows, or use"
            " another template."
        ) from error


def chat_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row has for the chat template besides messages: tools and keywords.

    Raises:
        UserError: keywords that are none of the template's.
    """
    tools, keywords = row.get("tools"), row.get("chat_template_kwargs") or {}
    if not isinstance(keywords, Mapping):
        raise UserError(
            f"chat_template_kwargs is {type(keywords).__name__}; expected an object of names and values, such"
            ' as {"enable_thinking": false}.'
        )
    if taken := [name for name in keywords if name in _NO_KEYWORDS]:
        raise UserError(
            f"chat_template_kwargs: {', '.join(taken)} is set by the stage that reads the rows, not by a row."
            " Leave it out; tools have a column of their own."
        )
    return ({"tools": tools} if tools else {}) | dict(keywords)


def render_whole(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, asks: bool = False, **options: Any
) -> list[int]:
    """Tokenize messages by the chat template; ``asks``: up to where a reply begins.

    Raises:
        UserError: as ``whole_text`` does.
    """
    text, _ = whole_text(messages, tokenizer, asks=asks, **options)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def whole_text(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, asks: bool = False, **options: Any
) -> tuple[str, Sequence[Message]]:
    """Return what the chat template makes of messages, and the messages as it has read them.

    Raises:
        UserError: the template refuses them, or leaves out something that they say, or tools: eight
            of the sixteen templates that TRL knows drop a developer's message, thirteen thoughts.
    """
    text = apply_template(tokenizer, messages, tokenize=False, add_generation_prompt=asks, **options)
    lost = _left_out(messages, text, tokenizer, asks=asks, **options)
    # A developer's message is a system message to templates that are older than the role
    if lost is not None and lost[1] == "developer":
        messages = [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in messages]
        text = apply_template(tokenizer, messages, tokenize=False, add_generation_prompt=asks, **options)
        lost = _left_out(messages, text, tokenizer, asks=asks, **options)
        if lost is None:
            _tell_once("the chat template has no role developer: such messages are read as system")
    unwritten = _unwritten_tools(messages, tokenizer, asks=asks, **options)
    if unwritten:
        raise _loses(*unwritten[0], dict.fromkeys(where.partition(" ")[0] for where, _ in unwritten))
    if lost is not None:
        place, what, missing = lost
        raise _loses(f"{what} of message {place}", missing, [what])
    return text, messages


def _loses(where: str, missing: str, parts: Iterable[str]) -> UserError:
    return UserError(
        f"the chat template leaves out {where}: {missing[:60]!r}. Use a template that writes it"
        f" (chat_template.jinja beside the tokenizer), or leave it out of the rows: leave_out:"
        f" [{', '.join(parts)}]."
    )


@cache
def _tell_once(text: str) -> None:
    logger.warning(text)


class _Part(NamedTuple):
    """What a message says: its number, the role or the key that says it, and the words."""

    place: int
    what: str
    said: str


def _left_out(
    messages: Sequence[Message], text: str, tokenizer: PreTrainedTokenizerBase, *, asks: bool, **options: Cell
) -> _Part | None:
    """Return the first part of the messages that the template has not written into ``text``."""
    parts = _parts(messages, text)
    for part in parts:
        if not _stands_in(part.said, text):
            return part
    # Words that others say too may stand there for them alone
    everything = "\0".join(part.said for part in parts)
    doubtful = [
        part
        for part in parts
        if sum(text.count(form) for form in _forms(part.said)) < everything.count(part.said)
    ]
    if not doubtful:
        return None
    # So the template is given words of which each is said once
    marks = _Marks()
    turns = [marks.turn(turn, place) for place, turn in enumerate(messages, 1)]
    try:
        marked = apply_template(tokenizer, turns, tokenize=False, add_generation_prompt=asks, **options)
    except UserError:  # as below
        return None
    lost = {where for mark, (where, _) in marks.said.items() if mark not in marked}
    return next((part for part in doubtful if f"{part.what} of message {part.place}" in lost), None)


def _parts(messages: Sequence[Message], text: str) -> list[_Part]:
    """Return all that messages say but their tools.

    Thoughts inside the content of earlier turns are dropped by design, which is told.
    """
    parts = []
    for place, message in enumerate(messages, 1):
        last = place == len(messages)
        # What the turn says, its thoughts apart
        thought, _, content = _said(message).rpartition("</think>")
        parts.append(_Part(place, message["role"], content))
        thought = thought.replace("<think>", "")
        if last and thought:
            parts.append(_Part(place, "think", thought))
        elif thought.strip() and not _stands_in(thought.strip(), text):
            _tell_once(
                "the chat template leaves out the thoughts inside earlier turns of the assistant, so that"
                " these are read, and learned where all turns are, without them. leave_out: [think] leaves"
                " out all thoughts."
            )
        keys = [key for key in THOUGHTS if isinstance(message.get(key), str)]
        parts += [_Part(place, key, message[key]) for key in keys]
    return [part._replace(said=part.said.strip()) for part in parts if part.said.strip()]


def _said(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _unwritten_tools(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, asks: bool, **options: Cell
) -> list[tuple[str, str]]:
    """Return what the template does not write of tools and of calls, each with where it stands.

    Of a tool its name and those of its parameters are looked for, of a call everything. Their words
    may stand elsewhere in the text, so the template is given others in their place.
    """
    marks = _Marks()
    if options.get("tools"):
        options["tools"] = [marks.tool(tool) for tool in options["tools"]]
    turns = [
        {**turn, "tool_calls": [marks.call(call, f"tool_calls of message {place}") for call in calls]}
        if (calls := turn.get("tool_calls"))
        else turn
        for place, turn in enumerate(messages, 1)
    ]
    if not marks.said:
        return []
    try:
        text = apply_template(tokenizer, turns, tokenize=False, add_generation_prompt=asks, **options)
    except UserError:  # it takes the rows' own words, and not these: it reads them
        return []
    return [said for mark, said in marks.said.items() if mark not in text]


class _Marks:
    """Words that no text has by chance, each with where it stands and what it stands for."""

    def __init__(self) -> None:
        self.said: dict[str, tuple[str, str]] = {}

    def turn(self, turn: Message, place: int) -> Message:
        """Return a message with marks for what it says and thinks, between the same tags."""
        marked, said = dict(turn), _said(turn)
        thought, closes, content = said.rpartition("</think>")
        if closes:
            opens = "<think>" if "<think>" in thought else ""
            thought = self.of(thought.replace("<think>", "").strip(), f"think of message {place}")
            closes = f"{opens}\n{thought}\n</think>\n\n"
        if said.strip():
            role = turn["role"]
            marked["content"] = closes + self.of(content.strip(), f"{role} of message {place}")
        for key in THOUGHTS:
            if isinstance(turn.get(key), str):
                marked[key] = self.of(turn[key], f"{key} of message {place}")
        return marked

    def call(self, call: Mapping[str, Cell], where: str) -> dict[str, Cell]:
        """Return a call with marks for its name and all of its arguments."""
        function = {**call["function"], "name": self.of(call["function"]["name"], where)}
        function["arguments"] = self.of(function.get("arguments", {}), where)
        return {**call, "function": function}

    def tool(self, tool: Mapping[str, Cell]) -> dict[str, Cell]:
        """Return a tool with marks for its name and those of its parameters."""
        function = tool.get("function")
        if not isinstance(function, dict):  # of another kind than templates know
            return self.of(tool, "tools")
        marked = {**function, "name": self.of(function.get("name"), "tools")}
        parameters = function.get("parameters")
        if isinstance(parameters, dict) and isinstance(parameters.get("properties"), dict):
            properties = {self.of(key, "tools"): value for key, value in parameters["properties"].items()}
            marked["parameters"] = {**parameters, "properties": properties}
        return {**tool, "function": marked}

    def of(self, value: Cell, where: str) -> Cell:
        """Return a value with marks for its keys and all that it says, but for what is empty."""
        if isinstance(value, dict):
            return {self.of(key, where): self.of(inner, where) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.of(inner, where) for inner in value]
        if value is None or value == "":
            return value
        mark = f"gooselora{len(self.said)}mark"
        self.said[mark] = (where, str(value))
        return mark


def _stands_in(said: str, text: str) -> bool:
    """Return whether ``said`` is in ``text``, as it is or as a JSON string writes it."""
    return any(form in text for form in _forms(said))


def _forms(said: str) -> set[str]:
    return {said, json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1]}


def foreign_markers(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return marks of chat templates in a text that are no tokens of this tokenizer."""
    added: Any = tokenizer
    known = added.get_added_vocab()
    return [mark for mark in MARKS.findall(text) if mark not in known]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, ends: bool) -> list[int]:
    """Tokenize a text as TRL does, with BOS once and, where it ``ends``, EOS once.

    A text that a template has been through has both already; what may follow its EOS (ChatML: a
    line break) is left out.
    """
    end = str(tokenizer.eos_token or "")
    closed = bool(end) and text.rstrip().endswith(end)
    whole = text
    if ends:
        whole = text.rstrip() if closed else text + end
    encoded: Any = tokenizer(whole)["input_ids"]
    ids = list(encoded)
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def begins_texts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    empty: Any = tokenizer("")["input_ids"]
    return tokenizer.bos_token_id is not None and empty[:1] == [tokenizer.bos_token_id]


def prompt_ids(prompt: Content, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
    """Tokenize a prompt, up to where the reply begins.

    A text begins with BOS where the tokenizer begins texts so, as in SFT and the reward model, but
    never with two, and has no other special token. Messages go through the chat template, once,
    with ``options`` such as tools.
    """
    if isinstance(prompt, str):
        # A text, with one BOS where texts begin so
        bos: Any = tokenizer.bos_token_id
        ids: Any = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return [bos, *ids] if ids and ids[0] != bos and begins_texts_with_bos(tokenizer) else ids
    encoded: Any = apply_template(
        tokenizer, prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **options
    )
    return encoded["input_ids"]


def row_prompt_ids(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize the prompt of a row as PPO sees it, with the row's tools and template keywords.

    Raises:
        UserError: the template leaves something out.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt_ids(prompt, tokenizer)
    return render_whole(prompt, tokenizer, asks=True, **chat_options(row))


def tokenize_prompts(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_prompt_tokens: int,
    numbers: Sequence[int] | None = None,
) -> Dataset:
    """Tokenize rows with a ``prompt``: text, or a list of chat messages.

    The rows get ``input_ids``; other columns are kept for reward functions. ``numbers`` are those
    of the rows in their file.

    Prompts that are empty or longer than ``max_prompt_tokens`` are left out, and counted in a
    warning.

    Raises:
        ValueError: no ``prompt`` column, messages for a tokenizer without a chat template, or no
            prompt left.
    """
    require_columns(rows, name, ["prompt"])
    if not isinstance(rows[0]["prompt"], str):
        require_chat_template(tokenizer, name)

    def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            return {"input_ids": row_prompt_ids(row, tokenizer)}
        except ValueError as error:
            number = f"{index + 1} of those that are left" if numbers is None else numbers[index]
            raise UserError(f"{name}: row {number}: {error}") from error

    # Tokens beside the columns, then those that fit
    # (not from a cache: it does not know the day that the template writes)
    encoded: Any = rows.map(encode, with_indices=True, desc=f"Tokenizing {name}", load_from_cache_file=False)
    kept = encoded.filter(lambda row: 0 < len(row["input_ids"]) <= max_prompt_tokens)
    if len(kept) < len(encoded):
        left_out = len(encoded) - len(kept)
        logger.warning(
            "%s: %d of %d prompts left out, empty or over max_prompt_tokens=%d",
            name,
            left_out,
            len(encoded),
            max_prompt_tokens,
        )
    if len(kept) == 0:
        raise UserError(
            f"{name}: no prompt has between 1 and max_prompt_tokens={max_prompt_tokens} tokens. Raise"
            " max_prompt_tokens."
        )
    return kept


def left_pad(
    prompts: Sequence[Sequence[int]], pad_token_id: Any, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Pad token lists on the left to the longest.

    Returns ``input_ids`` and ``attention_mask``, both (B, P) int64.
    """
    # Masks come from lengths, never from ids that are not the pad token
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def right_pad(
    completions: Sequence[Sequence[int]], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> tuple[Tensor, Tensor]:
    """Pad token lists on the right, as TRL does; (N, L) each.

    A classifier of GPT-2 counts what stands before a text in its positions.
    """
    width, step = max(map(len, completions)), pad_to_multiple_of or 1
    ids = torch.full((len(completions), -(-width // step) * step), pad_token_id)
    mask = torch.zeros_like(ids)
    for place, completion in enumerate(completions):
        ids[place, : len(completion)] = torch.tensor(completion)
        mask[place, : len(completion)] = 1
    return ids, mask
