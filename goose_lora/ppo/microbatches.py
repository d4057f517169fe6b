"""Microbatches as small as they can be: without columns of padding, and with so many rows that a
number of tokens is not exceeded."""

import torch
from torch import Tensor

Batch = dict[str, Tensor]
BY_SEQUENCE = ("input_ids", "attention_mask", "trunk", "value_trunk")  # (B, L, ...)
BY_ROLLOUT = ("num_tokens",)  # of the whole optimizer step


def trimmed(batch: Batch) -> Batch:
    """``batch`` without the columns at either end that no row attends to: all that depends on them
    is padding."""
    attended = batch["attention_mask"].any(0).nonzero().flatten()
    first, after = int(attended[0]), int(attended[-1]) + 1
    response_tokens = batch["response_mask"].shape[1] - (batch["attention_mask"].shape[1] - after)

    def cut(name: str, x: Tensor) -> Tensor:
        if name in BY_ROLLOUT:
            return x
        return x[:, first:after] if name in BY_SEQUENCE else x[:, :response_tokens]

    return {name: cut(name, x) for name, x in batch.items()}


def within(batch: Batch, max_tokens: int | None) -> list[Batch]:
    """``batch`` in trimmed parts of at most ``max_tokens``, rows times the width to which they are
    padded; a row that is longer stands alone.

    Rows of like length stand together, the longest first, so that a run that is going to be out of
    memory is so at once. In one part, rows keep their order.
    """
    if max_tokens is None:
        return [trimmed(batch)]
    prompts, responses = _lengths(batch)
    order = torch.argsort(prompts + responses, descending=True, stable=True).tolist()
    parts: list[list[int]] = []
    for row in order:
        rows = [*(parts[-1] if parts else []), row]
        if parts and len(rows) * int(prompts[rows].max() + responses[rows].max()) <= max_tokens:
            parts[-1] = rows
        else:
            parts.append([row])
    return [trimmed(_take(batch, sorted(rows))) for rows in parts]


def halves(batch: Batch) -> list[Batch]:
    """``batch`` in two trimmed parts, the longer rows in the first."""
    prompts, responses = _lengths(batch)
    order = torch.argsort(prompts + responses, descending=True, stable=True).tolist()
    middle = -(-len(order) // 2)
    return [trimmed(_take(batch, sorted(rows))) for rows in (order[:middle], order[middle:])]


def padded_tokens(batch: Batch) -> int:
    return batch["attention_mask"].numel()


def _lengths(batch: Batch) -> tuple[Tensor, Tensor]:
    """Tokens of each row's prompt and of its response, others' tokens in it included."""
    width = batch["response_mask"].shape[1]
    attended = batch["attention_mask"].long()
    return attended[:, :-width].sum(-1).cpu(), attended[:, -width:].sum(-1).cpu()


def _take(batch: Batch, rows: list[int]) -> Batch:
    return {name: x if name in BY_ROLLOUT else x[rows] for name, x in batch.items()}
