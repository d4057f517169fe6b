"""What may be meant otherwise in rows that are sound: told, in the recipes and in ``data``."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from goose_lora.data.messages import Content, said
from goose_lora.data.shapes import DIALOGUE, conversation_prompt
from goose_lora.data.tokenization import apply_template, chat_options
from goose_lora.errors import UserError

logger = logging.getLogger(__name__)

_REPLY_COLUMNS = ("completion", "chosen", "rejected")
_LONG_ENOUGH = 8  # characters of a prompt that a reply does not begin with by chance
_REPLY = "gooselorareply"  # a word that no template writes by itself
_FIRST = 3  # rows whose numbers are told


def hints(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    as_chat: bool | None,
    numbers: Sequence[int] | None = None,
) -> list[str]:
    """Return a sentence on each thing that users mean otherwise most of the time.

    They are text for a chat model, what a template writes before replies, replies that stick to
    their prompts, and replies that hold them.

    Args:
        as_chat: what the user has said of text; nothing is told of what was decided.
        numbers: those of the rows in their file.
    """
    found: list[str] = []
    plain, stuck, twice, unanswered = False, {}, {}, {}
    for number, row in zip(numbers or range(1, len(rows) + 1), rows, strict=True):
        cells: Mapping[str, Any] = dict(row)  # type: ignore[arg-type]
        asked = cells.get("text", cells.get("prompt"))
        # Text that went through a template, or has turns in it, is meant as it is
        plain = plain or (isinstance(asked, str) and not DIALOGUE.search(asked))
        turns = cells.get("messages")
        if turns and all(turn["role"] != "assistant" for turn in turns):
            unanswered[number] = ""
        for reply in _replies(cells):
            if _sticks(cells["prompt"], reply):
                stuck.setdefault(number, f"{cells['prompt'][-12:]}{_text(reply)[:12]}")
            if _holds(cells["prompt"], reply):
                twice.setdefault(number, _text(reply)[:40])

    # Said in words of the settings
    if between := _written_between(dict(rows[0]), tokenizer):
        found.append(
            f"the chat template writes {between!r} between prompt and reply. SFT learns it and the reward"
            " model judges it as a part of the reply; replies of PPO have it only where the policy writes it."
            " A column chat_template_kwargs with {enable_thinking: false} puts it into the prompt, where the"
            " template knows that."
        )
    if plain and tokenizer.chat_template and as_chat is None:
        turns = "" if "text" in rows.column_names else "as_chat: true makes prompts the user's turns, "
        found.append(
            f"plain text, and the tokenizer has a chat template, which is not used for it. {turns}as_chat:"
            " false says that text is meant."
        )
    if unanswered:
        found.append(
            f"{_count(unanswered, len(rows))} have no turn of the assistant: words of the user are learned."
            " Leave such rows out, or set assistant_only_loss: true."
        )
    if stuck:
        parts = "as_chat: true parts them; or begin" if tokenizer.chat_template else "Begin"
        found.append(
            f"{_count(stuck, len(rows))} have a reply that sticks to its prompt"
            f" ({next(iter(stuck.values()))!r}). {parts} replies with a space."
        )
    if twice:
        found.append(
            f"{_count(twice, len(rows))} have a reply that begins with its prompt"
            f" ({next(iter(twice.values()))!r}), which is then read twice. Cut it off the replies."
        )
    return found


def tell_hints(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    as_chat: bool | None,
    numbers: Sequence[int] | None = None,
) -> None:
    """Log the ``hints`` on rows as warnings."""
    for sentence in hints(rows, tokenizer, as_chat=as_chat, numbers=numbers):
        logger.warning("%s: %s", name, sentence)


def _written_between(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the template writes between a prompt of messages and its reply."""
    messages = row.get("prompt") or conversation_prompt(row.get("messages") or [])
    if not isinstance(messages, list) or not messages or not tokenizer.chat_template:
        return ""
    reply = {"role": "assistant", "content": _REPLY}
    options = chat_options(row)
    try:
        alone = apply_template(tokenizer, messages, tokenize=False, add_generation_prompt=True, **options)
        whole = apply_template(tokenizer, [*messages, reply], tokenize=False, **options)
    except UserError:  # told where rows go through it
        return ""
    before, found, _ = whole.partition(_REPLY)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(alone, before, strict=False)))
    return before[same:].strip() if found else ""


def _replies(row: Mapping[str, Any]) -> Iterator[Content]:
    if row.get("prompt"):
        yield from (row[column] for column in _REPLY_COLUMNS if column in row)
        yield from row.get("completions") or []


def _text(content: Content) -> str:
    if isinstance(content, str):
        return content
    return said(content[0]) if content else ""


def _sticks(prompt: Content, reply: Content) -> bool:
    """Return whether a word of the reply follows the prompt without a space."""
    if not isinstance(prompt, str) or not isinstance(reply, str) or DIALOGUE.search(prompt):
        return False
    # Scripts without spaces, and marks such as [/INST], have none to miss
    first = reply[:1]
    return first.isascii() and first.isalnum() and prompt[-1].isascii() and not prompt[-1:].isspace()


def _holds(prompt: Content, reply: Content) -> bool:
    asked = prompt if isinstance(prompt, str) else said(prompt[-1])
    return len(asked.strip()) >= _LONG_ENOUGH and _text(reply).lstrip().startswith(asked.strip())


def _count(places: Mapping[int, str], total: int) -> str:
    shown = ", ".join(map(str, list(places)[:_FIRST])) + (", ..." if len(places) > _FIRST else "")
    return f"{len(places)} of {total} rows (row{'s' if len(places) > 1 else ''} {shown})"
