"""The tokens that end a reply, gathered in one place for all stages.

A chat model's turn often does not end with the tokenizer's EOS (Gemma: <end_of_turn>, Phi:
<|end|>), and a base with several ends names them in generation_config.json (transformers#32110).
"""

import json
import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from goose_lora.deadline import time_limit
from goose_lora.errors import TimeLimitError, UserError

logger = logging.getLogger(__name__)

# Where a tokenizer keeps what its files alone do not say. It is saved with the tokenizer, so that
# each stage hands its ends to the next.
_NOTED = "reply_ends"
_LONGEST_RENDERING = 20.0  # seconds for a conversation
_REPLY = "gooselorareply"  # a word that no template writes by itself


class ReplyEnd(NamedTuple):
    """A token that ends a reply, and what says so."""

    id: int
    token: str
    source: str


class _Closing(NamedTuple):
    """What closes an assistant's turn, and whether the template writes it where no turn follows.

    ``state`` is what the template was rendered with.
    """

    state: str
    token: int | None
    is_written: bool


# The template is rendered once: rows are encoded by thousands.
_rendered: WeakKeyDictionary[PreTrainedTokenizerBase, _Closing] = WeakKeyDictionary()


def ends_with_sources(
    tokenizer: PreTrainedTokenizerBase, stop_token_ids: Iterable[int] = ()
) -> list[ReplyEnd]:
    """Return the tokens that end a reply, the tokenizer's EOS first, each once.

    They are the tokenizer's EOS, what the base ships or an earlier stage was trained to end with
    (``note_ends``), the token with which the chat template closes an assistant's turn, and
    ``stop_token_ids``.
    """
    noted: dict[str, str] = tokenizer.init_kwargs.get(_NOTED, {})
    found: list[tuple[Any, str]] = [(tokenizer.eos_token_id, "tokenizer")]
    found += [(int(number), source) for number, source in noted.items()]
    found += [(closing_token(tokenizer), "chat template")]
    found += [(number, "stop_token_ids") for number in stop_token_ids]

    # What several name is told with all of them
    sources: dict[int, list[str]] = {}
    for number, source in found:
        if number is not None and source not in sources.setdefault(number, []):
            sources[number].append(source)
    tokens = tokenizer.convert_ids_to_tokens(list(sources))
    return [
        ReplyEnd(number, str(token), ", ".join(names))
        for (number, names), token in zip(sources.items(), tokens, strict=True)
    ]


def reply_ends(tokenizer: PreTrainedTokenizerBase, stop_token_ids: Iterable[int] | None = None) -> list[int]:
    """Return the ids of ``ends_with_sources``."""
    return [end.id for end in ends_with_sources(tokenizer, stop_token_ids or ())]


def ends_text(tokenizer: PreTrainedTokenizerBase, stop_token_ids: Iterable[int] | None = None) -> str:
    """Return in one line which tokens end a reply, what says so, and what ends none."""
    ends = ends_with_sources(tokenizer, stop_token_ids or ())
    said = "replies end at " + ", ".join(f"{end.token} ({end.id}: {end.source})" for end in ends)
    text = closing_text(tokenizer)
    if text is None:
        return said
    return (
        f"{said}; the chat template closes a turn with the text {text!r}, which is no token: no reply ends"
        f" there unless you set stop_strings: [{json.dumps(text, ensure_ascii=False)}]"
    )


def closing_text(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the text with which the chat template closes an assistant's turn.

    None where a token that ends a reply stands in it, where it closes turns by nothing, or without
    a template.
    """
    if not tokenizer.chat_template or closing_token(tokenizer) is not None:
        return None
    tail = _after_reply(tokenizer, [{"role": "user", "content": "ask"}, _said()])
    if not tail or any(end.token in tail for end in ends_with_sources(tokenizer)):
        return None
    return tail


def note_ends(tokenizer: PreTrainedTokenizerBase, ends: Iterable[int], source: str) -> None:
    """Note further ends with the tokenizer, which is saved with them.

    What the tokenizer has no token for is left out, and told.
    """
    noted = dict(tokenizer.init_kwargs.get(_NOTED, {}))
    for number in ends:
        # Configurations have defaults of other vocabularies, such as GPT-2's 50256
        if 0 <= number < len(tokenizer):
            noted.setdefault(str(number), source)
        else:
            logger.warning(
                "%s names %d as an end, and the tokenizer has %d tokens: left out",
                source,
                number,
                len(tokenizer),
            )
    if noted:
        tokenizer.init_kwargs[_NOTED] = noted


def shipped_ends(name: str, revision: str | None) -> list[int]:
    """Return the ends that a model's generation_config.json names.

    Where it has none, they are those that its config.json has, as in transformers' ``generate``.
    """
    try:
        shipped: Any = GenerationConfig.from_pretrained(name, revision=revision or "main").eos_token_id
    except OSError:  # it ships none
        try:
            written, _ = PretrainedConfig.get_config_dict(name, revision=revision)
        except OSError:  # a tokenizer's folder
            return []
        shipped = written.get("eos_token_id")
    if shipped is None:
        return []
    return list(shipped) if isinstance(shipped, list) else [shipped]


def closing_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token with which the chat template closes an assistant's turn.

    None without a template, or where it closes turns with plain text or not at all. Where nothing
    follows the last turn (GLM), it is the token that opens the user's next one.
    """
    return _closing(tokenizer).token if tokenizer.chat_template else None


def unwritten_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends a reply and that the chat template does not write after the last.

    None where it writes one, or none is known.
    """
    closing = _closing(tokenizer) if tokenizer.chat_template else None
    return None if closing is None or closing.is_written else closing.token


def _closing(tokenizer: PreTrainedTokenizerBase) -> _Closing:
    # Asked anew only where the template or the EOS that it may write has changed
    state = json.dumps([tokenizer.chat_template, tokenizer.eos_token, len(tokenizer)])
    if tokenizer in _rendered and _rendered[tokenizer].state == state:
        return _rendered[tokenizer]
    ask, said = {"role": "user", "content": "ask"}, _said()
    tail = _after_reply(tokenizer, [ask, said])
    is_written = tail != ""
    if not is_written:
        tail = _after_reply(tokenizer, [ask, said, ask])

    # The longest of the tokens that text is split at: <|end|> is no part of <|end|>of
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    opening = [token for token in added if token.strip() and (tail or "").startswith(token.strip())]
    closing = added[max(opening, key=len)] if opening else None
    _rendered[tokenizer] = _Closing(state, closing, is_written)
    return _rendered[tokenizer]


def require_tokens(
    tokenizer: PreTrainedTokenizerBase, stop_token_ids: Iterable[int] | None, base: str
) -> None:
    """Raise UserError unless the tokenizer has all of ``stop_token_ids``."""
    for token in stop_token_ids or []:
        if not 0 <= token < len(tokenizer):
            raise UserError(
                f"stop_token_ids: {token} is no token of {base}, which has {len(tokenizer)}. Give numbers"
                f" from 0 to {len(tokenizer) - 1}."
            )


def template_limit() -> AbstractContextManager[None]:
    """Interrupt a chat template that does not come to an end: it is a program of strangers'."""
    return time_limit(
        _LONGEST_RENDERING, "the chat template", ". Does it come to an end? Give another: chat_template_path."
    )


def _said() -> dict[str, str]:
    """Return the turn of an assistant whose words are found again in what a template writes."""
    return {"role": "assistant", "content": _REPLY}


def _after_reply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str | None:
    """Return what the template writes after the assistant's words; None where it refuses them."""
    try:
        with template_limit():
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TimeLimitError:
        raise
    except (TemplateError, TypeError, ValueError):  # told where rows go through it
        return None
    _, found, tail = text.rpartition(_REPLY)
    return tail.strip() if found else None
