"""Microbatches as small as they can be.

They have no columns of padding, and no more rows than fit into a number of tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from goose_lora.models.role_outputs import PolicyAndValue

BY_SEQUENCE = ("input_ids", "attention_mask", "trunk", "value_trunk")  # (B, L, ...)
BY_RESPONSE = (  # (B, T, ...)
    "response_mask",
    "old_logprobs",
    "ref_logprobs",
    "advantages",
    "old_values",
    "returns",
    "features",
    "ref_hidden",
    "sampling_weights",
)


@dataclass
class Microbatch:
    """Rows of a rollout that the update reads at a time, with what it knows of them.

    The tensors from ``old_values`` on are there where the run needs them: see ``Experience``.

    Attributes:
        num_tokens: response tokens of the whole optimizer step, averaged over processes. Losses
            divided by it add up to the mean over tokens, however the rows are cut.
        whole_rows: rows of the microbatch that this is a part of; its own number where None.
        reads_texts: whether the pretraining text of the microbatch is read with this part of it.
        output: the forward pass of policy and critic with its graph, where scoring has made it.
    """

    input_ids: Int[Tensor, "B L"]
    attention_mask: Int[Tensor, "B L"]
    response_mask: Bool[Tensor, "B T"]
    old_logprobs: Float[Tensor, "B T"]
    ref_logprobs: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    num_tokens: float
    old_values: Float[Tensor, "B T"] | None = None
    returns: Float[Tensor, "B T"] | None = None
    trunk: Float[Tensor, "B L H"] | None = None
    value_trunk: Float[Tensor, "B L H"] | None = None
    features: Float[Tensor, "B T H"] | None = None
    ref_hidden: Float[Tensor, "B T H"] | None = None
    sampling_weights: Float[Tensor, "B T"] | None = None
    whole_rows: int | None = None
    reads_texts: bool = True
    output: PolicyAndValue | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.input_ids)

    @property
    def share(self) -> float:
        """The part of its whole microbatch's rows."""
        return len(self) / (self.whole_rows or len(self))

    @property
    def padded_tokens(self) -> int:
        """Rows times the width to which they are padded."""
        return self.attention_mask.numel()

    def take_output(self) -> PolicyAndValue | None:
        """Hand over the forward pass, and keep no reference to its graph."""
        output, self.output = self.output, None
        return output

    def to(self, device: torch.device) -> "Microbatch":
        """Return this with all tensors on ``device``; some may have waited in the host's memory."""
        return self.changed(lambda name, x: _to(x, device))

    def part(self, rows: list[int], *, reads_texts: bool) -> "Microbatch":
        """Return some of the rows, trimmed, without the forward pass that was made of all."""
        taken = self.changed(lambda name, x: x[rows])
        part = replace(
            taken,
            whole_rows=self.whole_rows or len(self),
            reads_texts=self.reads_texts and reads_texts,
            output=None,
        )
        return trimmed(part)

    def changed(self, change: Callable[[str, Tensor], Tensor]) -> "Microbatch":
        """Return this with each tensor that has rows replaced by ``change(name, tensor)``."""
        new = {}
        # Rows are copied or cut in each tensor alike, so that none can be forgotten here.
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in BY_SEQUENCE + BY_RESPONSE and value is not None:
                new[field.name] = change(field.name, value)
        return replace(self, **new)


def _to(x: Tensor, device: torch.device) -> Tensor:
    # From memory that the device reads by itself: the host goes on meanwhile
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def trimmed(batch: Microbatch) -> Microbatch:
    """Return ``batch`` without the columns at either end that no row attends to.

    All that depends on them is padding.
    """
    # Prompts are padded on the left and replies on the right: padding that all rows share stands at
    # the ends. What is left are views, which need no memory.
    attended = batch.attention_mask.any(0).tolist()
    first, after = attended.index(True), len(attended) - attended[::-1].index(True)
    response_tokens = batch.response_mask.shape[1] - (batch.attention_mask.shape[1] - after)

    def cut(name: str, x: Tensor) -> Tensor:
        if name in BY_SEQUENCE:
            return x[:, first:after]
        return x[:, :response_tokens]

    return batch.changed(cut)


def split_by_tokens(batch: Microbatch, max_tokens: int | None) -> list[Microbatch]:
    """Split ``batch`` into trimmed parts of at most ``max_tokens``.

    Tokens are counted with padding: rows times the width to which they are padded. A row that is
    longer stands alone. Rows of like
    length stand together, the longest first, so that a run that is going to be out of memory is so
    at once. In one part, rows keep their order.
    """
    if max_tokens is None:
        return [trimmed(batch)]
    # Greedily: each row joins the last group if that stays within the bound. Prompts and responses
    # are padded apart, so that a group is as wide as its longest of each together.
    prompts, responses = _lengths(batch)
    groups: list[list[int]] = []
    for row in _longest_first(prompts, responses):
        rows = [*groups[-1], row] if groups else [row]
        width = max(prompts[number] for number in rows) + max(responses[number] for number in rows)
        if groups and len(rows) * width <= max_tokens:
            groups[-1] = rows
        else:
            groups.append([row])
    return _parts(batch, groups)


def split_in_two(batch: Microbatch) -> list[Microbatch]:
    """Split ``batch`` into two trimmed parts, the longer rows in the first."""
    prompts, responses = _lengths(batch)
    order = _longest_first(prompts, responses)
    # An odd row goes to the first half.
    middle = -(-len(order) // 2)
    return _parts(batch, [order[:middle], order[middle:]])


def _parts(batch: Microbatch, groups: list[list[int]]) -> list[Microbatch]:
    """Return the groups of rows as parts, of which the first reads the pretraining text."""
    return [batch.part(sorted(rows), reads_texts=number == 0) for number, rows in enumerate(groups)]


def _longest_first(prompts: Sequence[int], responses: Sequence[int]) -> list[int]:
    return sorted(range(len(prompts)), key=lambda row: -prompts[row] - responses[row])


def _lengths(batch: Microbatch) -> tuple[list[int], list[int]]:
    """Return the tokens of each row's prompt and of its response, others' tokens in it included."""
    # In one read of the device
    width = batch.response_mask.shape[1]
    attended = batch.attention_mask.long()
    prompts, responses = torch.stack([attended[:, :-width].sum(-1), attended[:, -width:].sum(-1)]).tolist()
    return prompts, responses
