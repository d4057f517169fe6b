"""Preferences as tokens: ranked lists of completions, pairs among them, and references.

A pair is the shortest list. References are replies that should score 0.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from goose_lora.data.formats import ranks_of
from goose_lora.data.rows import require_columns
from goose_lora.data.tokenization import chat_options, render_whole, require_chat_template, text_ids
from goose_lora.errors import UserError
from goose_lora.models.endings import reply_ends, unwritten_end

logger = logging.getLogger(__name__)

Reply = str | list[dict[str, Any]]
LIST, PAIR = ["completions"], ["chosen", "rejected"]
REFERENCES = (["text"], ["prompt", "completion"], ["messages"])


class Ranked(NamedTuple):
    """Completions to one prompt, 1 the best rank, and the keywords that the chat template gets.

    ``number`` is that of the row in its file.
    """

    prompt: Reply | None
    completions: list[Reply]
    ranks: list[int]
    template: dict[str, Any]
    number: int = 0


def encode_reply(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Reply | None,
    reply: Reply,
    *,
    append_eos: bool,
    **template: Any,
) -> list[int]:
    """Tokenize prompt and reply as ``trl.RewardTrainer`` does those of a pair.

    Text is one string, closed with the end-of-text token if ``append_eos``. Messages go through the
    chat template, which writes an end of its own; ``template`` has keywords for it, such as
    ``tools``.

    Unlike in TRL, what a template writes after the end token (ChatML: a line break) is cut off, and
    an end that it does not write after the last turn (GLM) is added: the score is read at the last
    token, which in PPO is the one that ends the reply.
    """
    # Text: one string
    if isinstance(reply, str):
        return text_ids(tokenizer, f"{prompt or ''}{reply}", ends=append_eos)
    # Messages: cut after the end token of the last turn, if that is where the reply ends
    messages: list[Any] = [*(prompt or []), *reply]
    ids, ends = render_whole(messages, tokenizer, **template), reply_ends(tokenizer)
    end = max((place + 1 for place, token in enumerate(ids) if token in ends), default=len(ids))
    said, rest = messages[-1]["content"], str(tokenizer.decode(ids[end:])).strip()
    reply_follows = rest and (not said or said in rest)  # the end token closes an earlier turn
    if not reply_follows:
        return ids[:end]
    missing = unwritten_end(tokenizer)
    return ids if missing is None else [*ids, missing]


def as_ranked(row: Mapping[str, Any], place: str) -> Ranked:
    """Return a row as a ranked list.

    It has ``completions`` (and ``ranks``, or the list stands best first), or ``chosen`` and
    ``rejected``.

    Raises:
        ValueError: fewer than two completions, not one rank to each, or text and messages mixed.
            ``place`` names the row.
    """
    # A pair is a list of two
    completions = row["completions"] if "completions" in row else [row["chosen"], row["rejected"]]
    if len(completions) < 2:
        raise UserError(f"{place}: {len(completions)} completions. Give two or more.")
    try:
        ranks = ranks_of({**row, "completions": completions})
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error
    # All text or all messages: a template takes either
    prompt = row.get("prompt")
    if len({isinstance(part, str) for part in (*completions, prompt) if part is not None}) > 1:
        raise UserError(
            f"{place}: prompt and completions are text in part and messages in part. Write all as text, or"
            " each as a list of messages."
        )
    return Ranked(prompt, completions, ranks, chat_options(row))


def ranked_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    append_eos: bool,
    numbers: Sequence[int] | None = None,
) -> list[Ranked]:
    """Return all rows as ranked lists; ``numbers`` are those of the rows in their file.

    Raises:
        ValueError: other columns, a row that is no ranked list, messages without a chat template or
            with ``append_eos`` false.
    """
    require_columns(rows, name, LIST, PAIR)
    numbers = numbers or range(1, len(rows) + 1)
    found = [
        as_ranked(dict(row), f"{name}: row {number}")._replace(number=number)
        for number, row in zip(numbers, rows, strict=True)
    ]
    if not isinstance(found[0].completions[0], str):
        _require_template(tokenizer, name, append_eos)
    return found


def _require_template(tokenizer: PreTrainedTokenizerBase, name: str, append_eos: bool) -> None:
    if not append_eos:
        raise UserError(
            f"{name}: append_eos: false is for plain text; these are chat messages, which their template"
            " ends. Set it to true."
        )
    require_chat_template(tokenizer, name)


def tokenize_ranked(
    rows: list[Ranked],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    append_eos: bool = True,
    max_length: int | None = None,
    margins: list[float] | None = None,
    ties: bool = False,
    encode: Callable[..., list[int]] | None = None,
) -> Dataset:
    """Tokenize ranked lists.

    The rows have ``completion_ids`` (a token list each), ``ranks``, ``row`` (its place in
    ``rows``), ``length`` (tokens of the longest, for sampling by length), and ``margin`` where
    ``margins`` has one per row.

    Completions over ``max_length`` are left out, and with them the lists of which no two of
    different rank remain; both are counted. ``chosen_ids`` and ``rejected_ids``, the best and the
    worst, are what ``trl.RewardTrainer`` takes for the sign that data is tokenized.

    ``encode(prompt, reply, **template)`` reads a reply where that is not ``encode_reply``.

    With ``ties`` lists of one rank stay, and ``target`` has the probability that the chosen reply
    is the better one: 0.5 for them, 1 for others.

    Raises:
        ValueError: no list is left, or a margin that is no number.
    """
    # Token lists, best first; a list needs two of different rank to teach anything
    made: list[dict[str, Any]] = []
    encode = encode or partial(encode_reply, tokenizer, append_eos=append_eos)
    cut = 0
    for index, row in enumerate(rows):
        try:
            if margins is not None:
                check_margin(margins[index])
            encoded = [encode(row.prompt, reply, **row.template) for reply in row.completions]
        except UserError as error:
            raise UserError(f"{name}: row {row.number}: {error}") from error
        fitting = within(list(map(len, encoded)), max_length)
        cut += len(encoded) - len(fitting)
        decided = len({row.ranks[place] for place in fitting}) > 1
        if decided or (ties and len(fitting) > 1):
            fitting.sort(key=lambda place: row.ranks[place])
            ranks, ids = [row.ranks[place] for place in fitting], [encoded[place] for place in fitting]
            made.append(
                {
                    "completion_ids": ids,
                    "ranks": ranks,
                    "row": index,
                    "length": max(map(len, ids)),
                    "chosen_ids": ids[0],
                    "rejected_ids": ids[-1],
                }
            )
            if ties:
                made[-1]["target"] = 1.0 if decided else 0.5
    # What was left out is told
    if len(made) < len(rows) or cut:
        logger.warning(
            "%s: %d of %d prompts left out, without two completions of different rank; %d completions were"
            " longer than max_length=%s",
            *(name, len(rows) - len(made), len(rows), cut, max_length),
        )
    if not made:
        raise UserError(
            f"{name}: no prompt has two completions of different rank and of at most max_length={max_length}"
            " tokens. Raise max_length."
        )
    return Dataset.from_list(
        made if margins is None else [row | {"margin": margins[row["row"]]} for row in made]
    )


def check_margin(margin: object) -> None:
    """Raise UserError unless a margin, which is part of the loss, is a number."""
    if not isinstance(margin, (int, float)) or not math.isfinite(margin):
        raise UserError(f"margin is {margin!r}; expected numbers. Mend them, or set use_margin: false.")


def within(lengths: Sequence[int], max_length: int | None) -> list[int]:
    """Return the places of the completions that are not longer than ``max_length``."""
    return [place for place, length in enumerate(lengths) if max_length is None or length <= max_length]


def require_pairs(rows: Dataset, name: str, *, or_lists: bool) -> None:
    """Raise UserError unless the rows are preference pairs, or ranked lists if ``or_lists``."""
    require_columns(rows, name, PAIR, *([LIST] if or_lists else []))


def tokenize_rankings(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    append_eos: bool = True,
    max_length: int | None = None,
    numbers: Sequence[int] | None = None,
) -> Dataset:
    """Tokenize preference pairs and ranked lists, with their margins; see ``tokenize_ranked``."""
    margins = list(rows["margin"]) if "margin" in rows.column_names else None
    return tokenize_ranked(
        ranked_rows(rows, tokenizer, name=name, append_eos=append_eos, numbers=numbers),
        tokenizer,
        name=name,
        append_eos=append_eos,
        max_length=max_length,
        margins=margins,
    )


def tokenize_references(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    append_eos: bool = True,
    max_length: int | None = None,
) -> list[list[int]]:
    """Tokenize references.

    Rows have ``text``, or ``prompt`` and ``completion`` (text or messages), or ``messages``.

    Raises:
        ValueError: other columns, messages without a chat template or with ``append_eos`` false, or
            no reference within ``max_length``.
    """
    require_columns(rows, name, *REFERENCES)
    # The last of the columns holds the reply
    reply = next(columns[-1] for columns in REFERENCES if set(columns) <= set(rows.column_names))
    if not isinstance(rows[0][reply], str):
        _require_template(tokenizer, name, append_eos)
    encoded = []
    for number, row in enumerate(rows, 1):
        cells: dict[str, Any] = dict(row)  # type: ignore[arg-type]
        prompt = cells["prompt"] if reply == "completion" else None
        try:
            encoded.append(
                encode_reply(tokenizer, prompt, cells[reply], append_eos=append_eos, **chat_options(cells))
            )
        except UserError as error:
            raise UserError(f"{name}: row {number}: {error}") from error
    # Those within the limit
    kept = [ids for ids in encoded if ids and (max_length is None or len(ids) <= max_length)]
    if len(kept) < len(encoded):
        logger.warning(
            "%s: %d of %d references left out, longer than max_length=%s",
            name,
            len(encoded) - len(kept),
            len(encoded),
            max_length,
        )
    if not kept:
        raise UserError(
            f"{name}: no reference has between 1 and max_length={max_length} tokens. Raise max_length."
        )
    return kept
