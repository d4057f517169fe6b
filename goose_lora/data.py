"""Datasets: files and Hub names to rows, rows to tokenized prompts, and the order in which prompts are dealt out."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import constants
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from goose_lora.data_formats import Stage, describe_dropped, take
from goose_lora.model_files import brief

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
    column_mapping: list[str] | None = field(
        default=None, metadata={"help": "Columns to rename, as FROM=TO: instruction=prompt. In YAML also {instruction: prompt}."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.column_mapping, str):
            self.column_mapping = [self.column_mapping]
        elif isinstance(self.column_mapping, Mapping):
            self.column_mapping = [f"{source}={target}" for source, target in self.column_mapping.items()]
        parse_column_mapping(self.column_mapping or [])
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows={self.max_rows}: must be 1 or more, or null for all rows.")


def parse_column_mapping(pairs: Sequence[str]) -> dict[str, str]:
    """``FROM=TO`` to old and new names.

    Raises:
        ValueError: another form, a column named twice, or two that would become one.
    """
    mapping: dict[str, str] = {}
    for pair in pairs:
        source, equals, target = pair.partition("=")
        if not source or not equals or not target:
            raise ValueError(f"column_mapping: {pair!r} is not of the form FROM=TO, for example instruction=prompt.")
        if source in mapping or target in mapping.values():
            raise ValueError(f"column_mapping: {', '.join(pairs)} names {source} or {target} twice.")
        mapping[source] = target
    return mapping


def load_rows(
    name: str, split: str = "train", max_rows: int | None = None, column_mapping: Sequence[str] | None = None, *, stage: Stage | None = None
) -> Dataset:
    """Rows of a file or of a Hub dataset, their columns renamed; with ``stage``, as that stage takes them (``data_formats.take``), and what it
    leaves out is counted in a warning.

    Raises:
        ValueError: a file of another kind, one that is not there or is broken (with the line), an unknown split, no rows, a column to rename
            that is not there; with ``stage``, what ``take`` raises.
    """
    rows = _read(name, split)
    if max_rows is not None:
        rows = rows.select(range(min(max_rows, len(rows))))
    if len(rows) == 0:
        raise ValueError(f"{name}: no rows.")
    rows = rename_columns(rows, parse_column_mapping(column_mapping or []), name)
    if stage is None:
        return rows
    taken = take(rows, stage, name)
    if taken.dropped:
        left_out = len(rows) - len(taken.rows)
        logger.warning("%s: %d of %d rows left out: %s", name, left_out, len(rows), describe_dropped(taken.dropped))
    return taken.rows


def rename_columns(rows: Dataset, mapping: Mapping[str, str], name: str) -> Dataset:
    """``rows`` with columns renamed from the keys of ``mapping`` to its values.

    Raises:
        ValueError: a column that is not there, or a new name that another column has.
    """
    found = rows.column_names
    for source, target in mapping.items():
        if source not in found:
            raise ValueError(f"{name}: column_mapping {source}={target}: there is no column {source}. There are {', '.join(found)}.")
        if target in found and target not in mapping:
            way_out = f"Rename that too, for example {target}=old_{target}."
            raise ValueError(f"{name}: column_mapping {source}={target}: there is a column {target} already. {way_out}")
    return rows.rename_columns(dict(mapping)) if mapping else rows


def _read(name: str, split: str) -> Dataset:
    suffix = Path(name).suffix.lower()
    if suffix in READERS:
        if not Path(name).is_file():
            raise ValueError(f"{name}: no such file. Check the path.")
        if Path(name).stat().st_size == 0:
            raise ValueError(f"{name}: the file is empty. Write rows into it, or give another.")
        if suffix != ".parquet":
            _check_encoding(Path(name))
        try:
            rows = load_dataset(READERS[suffix], data_files=name, split="train")
        except (DatasetGenerationError, ValueError) as error:
            broken = _broken_json(Path(name)) if READERS[suffix] == "json" else None
            if "corresponds to no data" in str(error):
                broken = "no rows. Was it written to its end?"
            raise ValueError(f"{name}: {broken or f'{brief(error.__cause__ or error)}. Mend the file, or write it again.'}") from error
    elif Path(name).exists():
        raise ValueError(f"{name}: cannot read this kind of file. Use {', '.join(READERS)} or the name of a Hub dataset.")
    else:
        try:
            rows = load_dataset(name, split=split)
        except Exception as error:  # what httpx, fsspec, pyarrow and pandas raise, passed on
            way_out = "Unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "Check the name, dataset_split and the network"
            raise ValueError(f"{name}: no file here, and not to be had from the Hub: {brief(error)}. {way_out}, or give a file.") from error
    if isinstance(rows, DatasetDict) or not isinstance(rows, Dataset):
        raise ValueError(f"{name}: expected one split of rows; name it with dataset_split.")
    return rows


def _check_encoding(path: Path) -> None:
    """Raise ValueError, naming the line, unless a file of text is UTF-8: the reader of JSON would notice only when the row is used."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                place = f"line {number} is not UTF-8, at byte {error.start + 1} of it (0x{line[error.start]:02x})"
                raise ValueError(f"{path}: {place}. Save the file as UTF-8.") from error


def _broken_json(path: Path) -> str | None:
    """The first line that is not JSON, of a file that is one list or one object a line; None if all are."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            return f"line {error.lineno} is not JSON: {error.msg} at character {error.colno}."
        except RecursionError:
            return "the JSON is nested too deep."
        return None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            return f"line {number} is not JSON: {error.msg} at character {error.colno}. Each line must be one object."
        except RecursionError:
            return f"line {number} is JSON nested too deep. Each line must be one object, with text or a list of messages."
        if not isinstance(row, dict):
            return f"line {number} is a JSON {type(row).__name__}; each line must be one object, with columns as keys."
    return None


def require_columns(rows: Dataset, name: str, *alternatives: Sequence[str]) -> None:
    """Raise ValueError, naming the columns found and accepted, unless ``rows`` has all columns of one of ``alternatives``."""
    if not any(set(columns) <= set(rows.column_names) for columns in alternatives):
        accepted = " or ".join("+".join(columns) for columns in alternatives)
        raise ValueError(f"{name}: has the columns {', '.join(rows.column_names)}; needed are {accepted}.")


def require_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if not tokenizer.chat_template:
        raise ValueError(f"{name}: the rows are chat messages, but the tokenizer has no chat template. Use a chat model, or text.")


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: Any, **how: Any) -> Any:
    """Messages through the tokenizer's chat template.

    Raises:
        ValueError: the template is broken, or refuses messages of this kind, as many do a system message or two turns of one role.
    """
    try:
        return tokenizer.apply_chat_template(messages, **how)
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the tokenizer's chat template refuses messages of {roles}: {error}. Change the rows, or use another template.") from error


def check_chat(rows: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether rows for fine-tuning are chat messages. If so, each goes through the chat template once, before the model loads.

    Raises:
        ValueError: there is no template, or it refuses a row.
    """
    columns = [column for column in ("messages", "prompt", "completion") if column in rows.column_names]
    if not columns or isinstance(rows[0][columns[0]], str):
        return False
    require_chat_template(tokenizer, name)
    for number, row in enumerate(rows, 1):
        try:
            apply_template(tokenizer, [message for column in columns for message in row[column]], tokenize=False)  # type: ignore[index]
        except ValueError as error:
            raise ValueError(f"{name}: row {number}: {error}") from error
    return True


def begins_texts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]  # type: ignore[index]


def prompt_ids(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a prompt, up to where the reply begins. A text begins with BOS where the tokenizer begins texts so, as in SFT and the reward
    model, but never with two, and has no other special token; messages go through the chat template, once."""
    if isinstance(prompt, str):
        bos: Any = tokenizer.bos_token_id
        ids: Any = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return [bos, *ids] if ids and ids[0] != bos and begins_texts_with_bos(tokenizer) else ids
    encoded: Any = apply_template(tokenizer, prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    return encoded["input_ids"]


def tokenize_prompts(rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, name: str, max_prompt_tokens: int) -> Dataset:
    """Rows with a ``prompt`` (text, or a list of chat messages) to rows with ``input_ids``; other columns are kept for reward functions.

    Prompts that are empty or longer than ``max_prompt_tokens`` are left out, and counted in a warning.

    Raises:
        ValueError: no ``prompt`` column, messages for a tokenizer without a chat template, or no prompt left.
    """
    require_columns(rows, name, ["prompt"])
    if not isinstance(rows[0]["prompt"], str):
        require_chat_template(tokenizer, name)

    def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            return {"input_ids": prompt_ids(row["prompt"], tokenizer)}
        except ValueError as error:
            raise ValueError(f"{name}: row {index + 1} of those that are left: {error}") from error

    encoded: Any = rows.map(encode, with_indices=True, desc=f"Tokenizing {name}")
    kept = encoded.filter(lambda row: 0 < len(row["input_ids"]) <= max_prompt_tokens)
    if len(kept) < len(encoded):
        left_out = len(encoded) - len(kept)
        logger.warning("%s: %d of %d prompts left out, empty or over max_prompt_tokens=%d", name, left_out, len(encoded), max_prompt_tokens)
    if len(kept) == 0:
        raise ValueError(f"{name}: no prompt has between 1 and max_prompt_tokens={max_prompt_tokens} tokens. Raise max_prompt_tokens.")
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
