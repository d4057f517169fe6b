"""Datasets: files and Hub names to rows, rows to tokenized prompts, and the order in which prompts are dealt out."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class DataArguments:
    """Where the rows are."""

    dataset_name: str = field(metadata={"help": "A .jsonl, .json, .parquet or .csv file, a Hub dataset, or embedded/NAME for the demo's."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Held-out rows, as dataset_name."})
    eval_dataset_split: str = field(default="test", metadata={"help": "Split of a Hub dataset to evaluate on."})
    max_rows: int | None = field(default=None, metadata={"help": "Use the first so many rows only."})


def load_rows(name: str, split: str = "train", max_rows: int | None = None) -> Dataset:
    """Rows of a file or of a Hub dataset.

    Raises:
        ValueError: a file of another kind, a file that is not there, an unknown split, or no rows.
    """
    suffix = Path(name).suffix.lower()
    if suffix in READERS:
        if not Path(name).is_file():
            raise ValueError(f"{name}: no such file.")
        if Path(name).stat().st_size == 0:
            raise ValueError(f"{name}: the file is empty.")
        rows = load_dataset(READERS[suffix], data_files=name, split="train")
    elif Path(name).exists():
        raise ValueError(f"{name}: cannot read this kind of file. Use {', '.join(READERS)} or the name of a Hub dataset.")
    else:
        rows = load_dataset(name, split=split)
    if isinstance(rows, DatasetDict) or not isinstance(rows, Dataset):
        raise ValueError(f"{name}: expected one split of rows; name it with dataset_split.")
    if max_rows is not None:
        rows = rows.select(range(min(max_rows, len(rows))))
    if len(rows) == 0:
        raise ValueError(f"{name}: no rows.")
    return rows


def require_columns(rows: Dataset, name: str, *alternatives: Sequence[str]) -> None:
    """Raise ValueError, naming the columns found and accepted, unless ``rows`` has all columns of one of ``alternatives``."""
    if not any(set(columns) <= set(rows.column_names) for columns in alternatives):
        accepted = " or ".join("+".join(columns) for columns in alternatives)
        raise ValueError(f"{name}: has the columns {', '.join(rows.column_names)}; needed are {accepted}.")


def tokenize_prompts(rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, name: str, max_prompt_tokens: int) -> Dataset:
    """Rows with a ``prompt`` (text, or a list of chat messages) to rows with ``input_ids``; other columns are kept for reward functions.

    A text is taken as it is, without special tokens; messages go through the chat template once, up to the assistant's turn. Prompts that
    are empty or longer than ``max_prompt_tokens`` are left out, and counted in a warning.

    Raises:
        ValueError: no ``prompt`` column, messages for a tokenizer without a chat template, or no prompt left.
    """
    require_columns(rows, name, ["prompt"])
    if not isinstance(rows[0]["prompt"], str) and tokenizer.chat_template is None:
        raise ValueError(f"{name}: the prompts are chat messages, but the tokenizer has no chat template. Use a chat model, or text prompts.")

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return {"input_ids": tokenizer(prompt, add_special_tokens=False)["input_ids"]}
        encoded: Any = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
        return {"input_ids": encoded["input_ids"]}

    encoded: Any = rows.map(encode, desc=f"Tokenizing {name}")
    kept = encoded.filter(lambda row: 0 < len(row["input_ids"]) <= max_prompt_tokens)
    if len(kept) < len(encoded):
        left_out = len(encoded) - len(kept)
        logger.warning("%s: %d of %d prompts left out, empty or over max_prompt_tokens=%d", name, left_out, len(encoded), max_prompt_tokens)
    if len(kept) == 0:
        raise ValueError(f"{name}: no prompt has between 1 and max_prompt_tokens={max_prompt_tokens} tokens. Raise max_prompt_tokens.")
    return kept


def tokenize_pairs_without_end(rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, name: str, max_length: int | None = None) -> Dataset:
    """Preference pairs as ``trl.RewardTrainer`` takes them tokenized (``chosen_ids``, ``rejected_ids``), without the end-of-text token that it
    appends to texts; ``length`` is that of the longer one, for sampling by length.

    Raises:
        ValueError: chat messages, whose template writes an end of its own, or no pair within ``max_length``.
    """
    if not isinstance(rows[0]["chosen"], str):
        raise ValueError(f"{name}: append_eos: false is for plain text; these are chat messages, which their template ends. Set it to true.")

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        chosen, rejected = (tokenizer(row.get("prompt", "") + row[side])["input_ids"] for side in ("chosen", "rejected"))
        return {"chosen_ids": chosen, "rejected_ids": rejected, "length": max(len(chosen), len(rejected))}

    texts = [column for column in rows.column_names if column != "margin"]
    kept: Any = rows.map(encode, remove_columns=texts, desc=f"Tokenizing {name}")
    if max_length is not None:
        kept = kept.filter(lambda row: row["length"] <= max_length)
    if len(kept) < len(rows):
        logger.warning("%s: %d of %d pairs left out, longer than max_length=%s", name, len(rows) - len(kept), len(rows), max_length)
    if len(kept) == 0:
        raise ValueError(f"{name}: no pair has at most max_length={max_length} tokens. Raise max_length.")
    return kept


def tokenize_texts(rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, name: str, max_length: int) -> Dataset:
    """Rows with ``text`` to rows with ``input_ids``: the text and the end-of-text token, cut at ``max_length``; empty texts are left out.

    Raises:
        ValueError: no ``text`` column, or no text left.
    """
    require_columns(rows, name, ["text"])

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id][:max_length]}

    rows = rows.filter(lambda row: bool(row["text"] and row["text"].strip()))
    if len(rows) == 0:
        raise ValueError(f"{name}: no row has any text.")
    return rows.map(encode, remove_columns=rows.column_names, desc=f"Tokenizing {name}")


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: Any, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token lists to ``input_ids`` and ``attention_mask``, both (B, P) int64, padded on the left to the longest."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


class RolloutBatches:
    """Batches of row numbers: each is dealt ``repeat`` times in a row to the rank that gets it, once for every microbatch of its rollout.

    accelerate deals batches to ranks in turn, so the batches of one block are interleaved; with plain repetition all ranks would roll out
    the same prompts. Rows that fill no whole block are left for the next epoch's shuffle.
    """

    drop_last = True

    def __init__(self, num_rows: int, batch_size: int, repeat: int, *, seed: int, num_processes: int = 1):
        if num_rows < batch_size * num_processes:
            raise ValueError(
                f"{num_rows} prompts do not fill one rollout of {batch_size} prompts on each of {num_processes} processes. Add prompts, or lower "
                "per_device_train_batch_size, gradient_accumulation_steps or num_mini_batches, whose product is the rollout."
            )
        self.num_rows, self.batch_size, self.repeat, self.seed, self.num_processes = num_rows, batch_size, repeat, seed, num_processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows // (self.batch_size * self.num_processes) * self.num_processes * self.repeat

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        block_size = self.batch_size * self.num_processes
        for start in range(0, self.num_rows - block_size + 1, block_size):
            block = [order[start + i * self.batch_size : start + (i + 1) * self.batch_size] for i in range(self.num_processes)]
            for _ in range(self.repeat):
                yield from block
