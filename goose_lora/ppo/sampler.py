"""Which prompts a rollout answers, and which pretraining texts a microbatch reads."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, TypedDict

import pandas as pd
import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from goose_lora.data.formats import take
from goose_lora.data.tokenization import left_pad, tokenize_prompts
from goose_lora.errors import UserError
from goose_lora.files import brief
from goose_lora.kinds import kind_of


class PromptBatch(TypedDict):
    """Left-padded prompts, and the other columns of their rows."""

    input_ids: Int[Tensor, "B P"]
    attention_mask: Int[Tensor, "B P"]
    columns: dict[str, list]


GivenPrompt = str | Sequence[Mapping[str, Any]]  # text, or chat messages
GivenPrompts = (
    Dataset | pd.DataFrame | Mapping[str, Sequence[object]] | Sequence[GivenPrompt | Mapping[str, Any]]
)


def prompt_rows(
    prompts: GivenPrompts, tokenizer: PreTrainedTokenizerBase, *, name: str, max_prompt_tokens: int
) -> Dataset:
    """Return prompts as rows with ``input_ids``, which are left as they are where they have them.

    Args:
        prompts: texts, lists of chat messages, or rows as ``recipes/ppo.py`` takes them: with
            ``prompt``, ``messages`` or pairs; also as a table, of pandas or a dict of columns.
            Other columns go to reward functions.
        name: what errors call them.

    Raises:
        UserError: no prompts, another kind of thing, or what ``data.tokenize_prompts`` refuses.
    """
    try:
        rows = _rows(prompts, name)
    except (pa.ArrowException, TypeError) as error:
        raise UserError(
            f"{name}: its rows make no table: {brief(error)}. Give each column values of one kind."
        ) from error
    if len(rows) == 0:
        raise UserError(f"{name}: no prompts.")
    if "input_ids" in rows.column_names:
        return rows
    taken = take(rows, "ppo", name)
    return tokenize_prompts(taken.rows, tokenizer, name=name, max_prompt_tokens=max_prompt_tokens)


def _rows(prompts: GivenPrompts, name: str) -> Dataset:
    """Return prompts as rows, texts and chat messages in a column ``prompt``."""
    # Tables
    if isinstance(prompts, Dataset):
        return prompts
    if isinstance(prompts, DatasetDict | IterableDatasetDict):
        splits = list(map(str, prompts))
        raise UserError(f"{name} has the splits {', '.join(splits)}. Give one of them: [{splits[0]!r}].")
    if isinstance(prompts, pd.DataFrame):
        return Dataset.from_pandas(prompts, preserve_index=False)
    if isinstance(prompts, Mapping):
        if not all(isinstance(column, (list, tuple)) for column in prompts.values()):
            raise UserError(
                f"{name} is one row, or columns that are no lists. Give a list of rows, or a list for each"
                " column."
            )
        return Dataset.from_dict({column: list(values) for column, values in prompts.items()})

    # Lists; a text has letters, and a path is the name of a file
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
        raise UserError(
            f"{name} is {kind_of(prompts)}. Give prompts in a list, or the rows of a file:"
            " datasets.load_dataset('json', data_files=FILE, split='train')."
        )
    listed = list(prompts)
    if all(isinstance(prompt, Mapping) for prompt in listed):
        return Dataset.from_list([dict(row) for row in listed if isinstance(row, Mapping)])
    if all(isinstance(prompt, str) for prompt in listed) or all(map(_is_chat, listed)):
        return Dataset.from_list([{"prompt": prompt} for prompt in listed])
    kinds = sorted({type(prompt).__name__ for prompt in listed})
    raise UserError(
        f"{name} has {', '.join(kinds)}: give texts alone, lists of chat messages alone, or rows with a"
        " prompt."
    )


def _is_chat(prompt: object) -> bool:
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        return False
    return all(isinstance(message, Mapping) for message in prompt)


class PromptCollator:
    """Puts rows of a data set together to a batch of prompts."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> PromptBatch:
        # On the left, so that all replies begin in one column.
        input_ids, attention_mask = left_pad([row["input_ids"] for row in rows], self.pad_token_id)
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "input_ids"}
        return {"input_ids": input_ids, "attention_mask": attention_mask, "columns": columns}


def repeated(prompts: PromptBatch, times: int) -> PromptBatch:
    """Return each prompt ``times`` times, in a row."""
    columns = {
        name: [value for value in column for _ in range(times)] for name, column in prompts["columns"].items()
    }
    return {
        "input_ids": prompts["input_ids"].repeat_interleave(times, dim=0),
        "attention_mask": prompts["attention_mask"].repeat_interleave(times, dim=0),
        "columns": columns,
    }


class RolloutBatches:
    """Batches of row numbers: each is dealt ``repeat`` times in a row to the rank that gets it.

    That is once for every microbatch of its rollout. accelerate deals batches to ranks in turn, so
    the batches of one block are interleaved; with plain repetition all ranks would roll out the
    same prompts. Rows that fill no whole block are left for the next epoch's shuffle.

    Raises:
        UserError: too few rows for one rollout.
    """

    drop_last = True

    def __init__(self, num_rows: int, batch_size: int, repeat: int, *, seed: int, num_processes: int = 1):
        # An epoch has whole rollouts only: with fewer rows it would have none.
        if num_rows < batch_size * num_processes:
            raise UserError(
                f"{num_rows} prompts do not fill one rollout of {batch_size} prompts on each of"
                f" {num_processes} processes. Add prompts, or lower per_device_train_batch_size,"
                " gradient_accumulation_steps or num_mini_batches, whose product is the rollout."
            )
        self.num_rows, self.batch_size, self.repeat = num_rows, batch_size, repeat
        self.seed, self.num_processes = seed, num_processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as in this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of an epoch over all ranks."""
        return self.num_rows // (self.batch_size * self.num_processes) * self.num_processes * self.repeat

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of an epoch."""
        # The order follows from seed and epoch alone, so that a resumed run deals the same prompts.
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_rows, generator=generator).tolist()
        # A block is one rollout of all ranks; accelerate deals its batches to them in turn.
        block_size = self.batch_size * self.num_processes
        for start in range(0, self.num_rows - block_size + 1, block_size):
            block = [
                order[start + i * self.batch_size : start + (i + 1) * self.batch_size]
                for i in range(self.num_processes)
            ]
            for _ in range(self.repeat):
                yield from block


class PretrainingTexts:
    """The pretraining texts of each microbatch.

    Which they are follows from step and process alone, so that a resumed run takes the same.

    Args:
        rows: with ``input_ids``, from ``data.tokenize_texts``.
        microbatches: of an optimizer step.
    """

    def __init__(
        self,
        rows: Dataset,
        *,
        batch_size: int,
        microbatches: int,
        seed: int,
        process: int,
        processes: int,
        pad_token_id: int,
        device: torch.device,
    ):
        self.rows, self.batch_size, self.microbatches = rows, batch_size, microbatches
        self.seed, self.process, self.processes = seed, process, processes
        self.pad_token_id, self.device = pad_token_id, device
        self._counted = (-1, 1.0)  # a step, and the tokens of its texts

    def of(self, *, step: int, microbatch: int) -> tuple[Int[Tensor, "P N"], Int[Tensor, "P N"], float]:
        """Return ids and attention mask of the texts of a microbatch, counted within its step.

        The number is what the sum of their losses is divided by: the tokens that all microbatches
        of the step predict, as a mean over processes.
        """
        texts = self._texts(step, microbatch, self.process)
        return *left_pad(texts, self.pad_token_id, self.device), self._tokens(step)

    def _texts(self, step: int, microbatch: int, process: int) -> list[list[int]]:
        place = step * self.microbatches + microbatch
        # A tuple of integers has the same hash in every run.
        generator = torch.Generator().manual_seed(hash((self.seed, place, process)) % 2**63)
        numbers = torch.randint(len(self.rows), (self.batch_size,), generator=generator).tolist()
        return [self.rows[number]["input_ids"] for number in numbers]

    def _tokens(self, step: int) -> float:
        if self._counted[0] != step:
            parts = product(range(self.microbatches), range(self.processes))
            texts = [text for part in parts for text in self._texts(step, *part)]
            tokens = sum(len(text) - 1 for text in texts)  # nothing predicts the first
            self._counted = (step, max(1, tokens) / self.processes)
        return self._counted[1]
