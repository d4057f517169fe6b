"""Rows to token ids: prompts, texts and chat messages, and their padding."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from goose_lora.data.messages import Content
from goose_lora.data.rows import (
    require_columns,
)
from goose_lora.errors import UserError

logger = logging.getLogger(__name__)


def require_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if not tokenizer.chat_template:
        raise UserError(
            f"{name}: the rows are chat messages, but the tokenizer has no chat template. Use a chat model,"
            " or text."
        )


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: Any, **how: Any) -> Any:
    """Messages through the tokenizer's chat template.

    Raises:
        ValueError: the template is broken, or refuses messages of this kind, as many do a system
            message or two turns of one role.
    """
    try:
        return tokenizer.apply_chat_template(messages, **how)
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the tokenizer's chat template refuses messages of {roles}: {error}. Change the rows, or use"
            " another template."
        ) from error


def check_chat(rows: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Return whether rows for fine-tuning are chat messages.

    If so, each goes through the chat template once, before the model loads.

    Raises:
        ValueError: there is no template, or it refuses a row.
    """
    # What fine-tuning reads, in the order in which the template gets it
    columns = [column for column in ("messages", "prompt", "completion") if column in rows.column_names]
    if not columns or isinstance(rows[0][columns[0]], str):
        return False
    require_chat_template(tokenizer, name)
    for number, row in enumerate(rows, 1):
        try:
            cells: dict[str, Any] = dict(row)  # type: ignore[arg-type]
            messages = [message for column in columns for message in cells[column]]
            apply_template(tokenizer, messages, tokenize=False)
        except ValueError as error:
            raise UserError(f"{name}: row {number}: {error}") from error
    return True


def begins_texts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]  # type: ignore[index]


def prompt_ids(prompt: Content, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize a prompt, up to where the reply begins.

    A text begins with BOS where the tokenizer begins texts so, as in SFT and the reward model, but
    never with two, and has no other special token. Messages go through the chat template, once.
    """
    if isinstance(prompt, str):
        # A text, with one BOS where texts begin so
        bos: Any = tokenizer.bos_token_id
        ids: Any = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return [bos, *ids] if ids and ids[0] != bos and begins_texts_with_bos(tokenizer) else ids
    encoded: Any = apply_template(
        tokenizer, prompt, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return encoded["input_ids"]


def tokenize_prompts(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, name: str, max_prompt_tokens: int
) -> Dataset:
    """Tokenize rows with a ``prompt``: text, or a list of chat messages.

    The rows get ``input_ids``; other columns are kept for reward functions.

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
            return {"input_ids": prompt_ids(row["prompt"], tokenizer)}
        except ValueError as error:
            raise UserError(f"{name}: row {index + 1} of those that are left: {error}") from error

    # Tokens beside the columns, then those that fit
    encoded: Any = rows.map(encode, with_indices=True, desc=f"Tokenizing {name}")
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


def tokenize_texts(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, name: str, max_length: int
) -> Dataset:
    """Tokenize rows with ``text``: the text and the end-of-text token, cut at ``max_length``.

    Empty texts are left out.

    Raises:
        ValueError: no ``text`` column, or no text left.
    """
    require_columns(rows, name, ["text"])

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id][:max_length]}

    # Texts that have something to say
    rows = rows.filter(lambda row: bool(row["text"] and row["text"].strip()))
    if len(rows) == 0:
        raise UserError(f"{name}: no row has any text.")
    return rows.map(encode, remove_columns=rows.column_names, desc=f"Tokenizing {name}")


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
