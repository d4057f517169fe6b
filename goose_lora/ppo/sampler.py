"""The order in which prompts are dealt out to rollouts and processes."""

from collections.abc import Iterator

import torch

from goose_lora.errors import UserError


class RolloutBatches:
    """Batches of row numbers: each is dealt ``repeat`` times in a row to the rank that gets it,
    once for every microbatch of its rollout.

    accelerate deals batches to ranks in turn, so the batches of one block are interleaved; with
    plain repetition all ranks would roll out the same prompts. Rows that fill no whole block are
    left for the next epoch's shuffle.
    """

    drop_last = True

    def __init__(self, num_rows: int, batch_size: int, repeat: int, *, seed: int, num_processes: int = 1):
        if num_rows < batch_size * num_processes:
            raise UserError(
                f"{num_rows} prompts do not fill one rollout of {batch_size} prompts on each of"
                f" {num_processes} processes. Add prompts, or lower per_device_train_batch_size,"
                " gradient_accumulation_steps or num_mini_batches, whose product is the rollout."
            )
        self.num_rows, self.batch_size, self.repeat, self.seed, self.num_processes = (
            num_rows,
            batch_size,
            repeat,
            seed,
            num_processes,
        )
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows // (self.batch_size * self.num_processes) * self.num_processes * self.repeat

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(
            self.num_rows, generator=torch.Generator().manual_seed(self.seed + self.epoch)
        ).tolist()
        block_size = self.batch_size * self.num_processes
        for start in range(0, self.num_rows - block_size + 1, block_size):
            block = [
                order[start + i * self.batch_size : start + (i + 1) * self.batch_size]
                for i in range(self.num_processes)
            ]
            for _ in range(self.repeat):
                yield from block
