"""Demonstrations as tokens: what fine-tuning learns from, and what it only reads.

The tokens are those of ``trl.SFTTrainer``. What TRL passes over is refused, left out or told: text
that a template drops, a cut that takes the reply, turns that are not to be learned.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from goose_lora.data.messages import Cell, Content, Message
from goose_lora.data.rows import require_columns
from goose_lora.data.tokenization import (
    apply_template,
    chat_options,
    foreign_markers,
    render_whole,
    require_chat_template,
    text_ids,
    whole_text,
)
from goose_lora.errors import UserError
from goose_lora.models.endings import unwritten_end

logger = logging.getLogger(__name__)

NOT_LEARNED = -100  # in labels, as transformers' loss reads them


class Learning(NamedTuple):
    """Which tokens fine-tuning learns: the settings of ``trl.SFTConfig`` that say it."""

    max_length: int | None = 1024
    keep_end: bool = False
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False

    @classmethod
    def of(cls, config: Cell) -> "Learning":
        """Return what a ``trl.SFTConfig`` says; packing cuts by itself."""
        return cls(
            None if config.packing else config.max_length,
            config.truncation_mode == "keep_end",
            config.completion_only_loss,
            config.assistant_only_loss,
        )


class Demonstration(NamedTuple):
    """Tokens of a row, which of them are learned, and where the reply begins.

    ``said`` is true where a reply stands: of a text, everywhere. ``whole`` is the length before it
    was cut.
    """

    ids: list[int]
    learned: list[bool]
    said: list[bool]
    whole: int

    @property
    def has_reply(self) -> bool:
        """Whether something of a reply is left to learn."""
        return any(learned and said for learned, said in zip(self.learned, self.said, strict=True))


def demonstration(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, learning: Learning
) -> Demonstration:
    """Tokenize a row of text, of prompt and completion, or of messages.

    Raises:
        UserError: the template refuses the messages or leaves something out, or
            ``assistant_only_loss`` asks for what cannot be known.
    """
    # Tokens, and where replies are in them
    options = chat_options(row)
    if learning.assistant_only_loss:
        if isinstance(row.get("prompt"), str) or "text" in row:
            raise UserError(
                "assistant_only_loss is for chat messages, and these rows are text. Leave it out, or read"
                " them as messages: as_chat: true."
            )
        options["chat_template"] = _marking_template(tokenizer)
    if "text" in row:
        ids = text_ids(tokenizer, row["text"], ends=True)
        said = learned = [True] * len(ids)
    elif "messages" in row:
        ids, said = _conversation(row["messages"], tokenizer, options)
        learned = [True] * len(ids)
    else:
        ids, said = _prompt_and_reply(row, tokenizer, options)
        learned = said if learning.completion_only_loss in (None, True) else [True] * len(ids)
    if learning.assistant_only_loss:
        said = _marked(_turns_of(row), tokenizer, options)
        learned = [one and other for one, other in zip(learned, said, strict=True)]
    weights = _weights(row, ids, tokenizer, options)
    learned = [one and other for one, other in zip(learned, weights, strict=True)]
    # A reply ends as PPO's do, also where the template leaves that to the next turn
    missing = unwritten_end(tokenizer) if _ends_with_reply(row) else None
    if missing is not None and ids[-1] != missing:
        ids, said, learned = [*ids, missing], [*said, said[-1]], [*learned, learned[-1]]
    # The cut
    kept = slice(None)
    if learning.max_length is not None and len(ids) > learning.max_length:
        kept = slice(-learning.max_length, None) if learning.keep_end else slice(learning.max_length)
    return Demonstration(ids[kept], learned[kept], said[kept], len(ids))


def tokenize_demonstrations(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    learning: Learning,
    numbers: Sequence[int] | None = None,
) -> Dataset:
    """Tokenize rows for fine-tuning, as ``input_ids`` and ``labels``.

    Rows of which nothing of a reply is left to learn are left out. They and those that are cut are
    counted in a warning. ``numbers`` are those of the rows in their file.

    Raises:
        UserError: a row that ``demonstration`` refuses (with its number), or no row left.
    """
    # Chat needs a template, which is told before a row is looked at
    columns = rows.column_names
    if "messages" in columns or ("prompt" in columns and not isinstance(rows[0]["prompt"], str)):
        require_chat_template(tokenizer, name)
    # Row by row, what is left of each after the cut
    made, cut, lost, foreign = [], 0, [], 0
    for place, row in enumerate(rows):
        number = place + 1 if numbers is None else numbers[place]
        cells: dict[str, Any] = dict(row)  # type: ignore[arg-type]
        try:
            tokens = demonstration(cells, tokenizer, learning)
        except UserError as error:
            raise UserError(f"{name}: row {number}: {error}") from error
        foreign += "text" in columns and bool(foreign_markers(cells["text"], tokenizer))
        if not tokens.has_reply:
            lost.append(number)
            continue
        cut += len(tokens.ids) < tokens.whole
        labels = [
            token if learned else NOT_LEARNED
            for token, learned in zip(tokens.ids, tokens.learned, strict=True)
        ]
        made.append({"input_ids": tokens.ids, "labels": labels})

    # What a reader of the loss would not see
    if lost:
        logger.warning(
            "%s: %d of %d rows left out: nothing of the reply is left to learn at max_length=%s (rows %s)",
            *(name, len(lost), len(rows), learning.max_length, ", ".join(map(str, lost[:3]))),
        )
    if cut:
        logger.warning("%s: %d of %d rows cut at max_length=%s", name, cut, len(rows), learning.max_length)
    if foreign:
        logger.warning(
            "%s: %d rows hold marks of a chat template, such as <|im_start|>, that are no tokens of this"
            " tokenizer; they are read as plain text",
            name,
            foreign,
        )
    if learning.assistant_only_loss and not _learns_to_stop(tokenizer):
        logger.warning(
            "%s: under assistant_only_loss the chat template's marks leave out the token that ends a turn:"
            " the model may not learn to stop. Move it inside {%% generation %%} ... {%% endgeneration %%}"
            " (chat_template_path), or leave assistant_only_loss out",
            name,
        )
    # Something must be left to learn
    if not made:
        raise UserError(
            f"{name}: no row has anything of its reply left to learn at max_length={learning.max_length}."
            " Raise max_length, or set truncation_mode: keep_end."
        )
    ids = List(Value("int64"))
    return Dataset.from_list(made, features=Features({"input_ids": ids, "labels": ids}))


def tokenize_texts(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, name: str, max_length: int
) -> Dataset:
    """Tokenize rows of PPO-ptx, as ``input_ids``: whole, as fine-tuning reads them, and cut.

    All tokens count, those of prompts too. Empty texts are left out.

    Raises:
        UserError: other columns than fine-tuning's, a row that ``demonstration`` refuses, or no
            text left.
    """
    require_columns(rows, name, ["text"], ["messages"], ["prompt", "completion"])
    # Texts that have something to say
    if "text" in rows.column_names:
        rows = rows.filter(lambda row: bool(row["text"] and row["text"].strip()))
    if len(rows) == 0:
        raise UserError(f"{name}: no row has any text.")
    learning = Learning(max_length, completion_only_loss=False)
    made = []
    for number, row in enumerate(rows, 1):
        cells: dict[str, Any] = dict(row)  # type: ignore[arg-type]
        try:
            made.append({"input_ids": demonstration(cells, tokenizer, learning).ids})
        except UserError as error:
            raise UserError(f"{name}: row {number}: {error}") from error
    return Dataset.from_list(made, features=Features({"input_ids": List(Value("int64"))}))


def prompt_alone(
    prompt: Content, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> list[int]:
    """Return the tokens of a row's prompt without its reply; ``options``: for the chat template."""
    if isinstance(prompt, str):
        return text_ids(tokenizer, prompt, ends=False)
    return render_whole(prompt, tokenizer, asks=True, **options)


def _prompt_and_reply(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> tuple[list[int], list[bool]]:
    """Return the tokens of both together; the reply begins where they differ from the prompt's."""
    # Together as one text, and the prompt alone beside it
    prompt, reply = row["prompt"], row["completion"]
    alone = prompt_alone(prompt, tokenizer, options)
    if isinstance(prompt, str):
        ids = text_ids(tokenizer, prompt + reply, ends=True)
    else:
        ids = render_whole([*prompt, *reply], tokenizer, **options)
    # A token may span the end of the prompt and the start of the reply: it is the reply's
    start = tokens_in_common(alone, ids)
    return ids, [place >= start for place in range(len(ids))]


def _conversation(
    messages: Cell, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> tuple[list[int], list[bool]]:
    """Return tokens, and where replies stand: from the beginning of the assistant's first turn.

    Without such a turn, everywhere.
    """
    ids = render_whole(messages, tokenizer, **options)
    # The first turn of the assistant begins where the prompt before it ends
    # Without a question before it there is no place where a reply begins
    first = next((place for place, turn in enumerate(messages) if turn["role"] == "assistant"), None)
    if not first:
        return ids, [True] * len(ids)
    try:
        before = render_whole(messages[:first], tokenizer, asks=True, **options)
    except UserError:
        return ids, [True] * len(ids)  # a template that takes whole conversations alone
    start = tokens_in_common(before, ids)
    return ids, [place >= start for place in range(len(ids))]


def _ends_with_reply(row: Mapping[str, Any]) -> bool:
    """Return whether the last turn of a row of messages is the assistant's."""
    if "text" in row or isinstance(row.get("prompt"), str):
        return False
    return _turns_of(row)[-1]["role"] == "assistant"


def _turns_of(row: Mapping[str, Any]) -> list[Message]:
    """Return all turns of a row of chat messages."""
    return row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]


def _marking_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return TRL's training template, which marks the assistant's tokens; None: the own one does.

    Raises:
        UserError: neither has marks.
    """
    from trl.chat_template_utils import has_generation_markers

    # Not by the word: a question after add_generation_prompt has it too
    if tokenizer.chat_template is None or has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return _trls_template(tokenizer, str(tokenizer.chat_template))
    except ValueError as error:
        raise UserError(
            f"assistant_only_loss: {' '.join(str(error).split())} Leave it out, or give a template with"
            " {% generation %} marks: chat_template_path."
        ) from error


@lru_cache(maxsize=4)
def _trls_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """Return TRL's training template for ``template``, which is the tokenizer's as it is now."""
    # To find it, TRL renders conversations with tools: four times the time of a row
    from trl.chat_template_utils import get_training_chat_template

    return get_training_chat_template(tokenizer)


def _learns_to_stop(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the token that ends the assistant's turn is marked as the assistant's."""
    from trl.chat_template_utils import is_chat_template_stop_token_trained

    return is_chat_template_stop_token_trained(tokenizer, chat_template=_marking_template(tokenizer))


def _marked(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> list[bool]:
    """Return which tokens are the assistant's, by the marks of the template.

    Raises:
        UserError: it marks none, where the assistant says something.
    """
    encoded: Any = apply_template(
        tokenizer,
        whole_text(messages, tokenizer, **options)[1],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **options,
    )
    marks = [bool(bit) for bit in encoded["assistant_masks"]]
    if not any(marks) and any(turn["role"] == "assistant" and turn.get("content") for turn in messages):
        raise UserError(
            "assistant_only_loss: the chat template has {% generation %} marks, and none around what the"
            " assistant says here. Leave it out, or mend the template: chat_template_path."
        )
    return marks


def _weights(
    row: Mapping[str, Any],
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any],
) -> list[bool]:
    """Return where turns stand that OpenAI's ``weight`` leaves to be learned: all but those of 0.

    Raises:
        UserError: another weight than 0 or 1, or a template under which a turn has no place.
    """
    # Rows without weights, which most are, are learned as they are
    learned = [True] * len(ids)
    if "text" in row or isinstance(row.get("completion"), str):
        return learned
    turns = _turns_of(row)
    if not any("weight" in turn for turn in row.get("completion", turns)):
        return learned
    for place, turn in enumerate(turns):
        if turn.get("weight", 1) not in (0, 1):
            raise UserError(f"message {place + 1} has the weight {turn['weight']}; 0 and 1 are known.")
        if turn.get("weight", 1) == 1:
            continue
        # From where the turn is asked for, to where the next begins
        before = render_whole(turns[:place], tokenizer, asks=True, **options)
        until = render_whole(turns[: place + 1], tokenizer, **options)
        if tokens_in_common(before, ids) < len(before) or tokens_in_common(until, ids) < len(until):
            raise UserError(
                f"message {place + 1} has the weight 0, and under this chat template its tokens cannot be"
                " told from others. Leave the turn out of the rows."
            )
        learned[len(before) : len(until)] = [False] * (len(until) - len(before))
    return learned


def tokens_in_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    shortest = min(len(first), len(second))
    return next((place for place in range(shortest) if first[place] != second[place]), shortest)
