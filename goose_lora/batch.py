"""What a rollout holds and how it is cut into microbatches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class Rollout:
    """B replies of up to T tokens. Sequences are left-padded prompts followed by replies: L = P + T; all replies begin in one column.

    ``response_mask`` is true where a reply's token counts, the one that ends it included; everything after it is padding. A reply may have
    holes: tokens between its own that others wrote (a user, a tool), which are attended to and not trained on. ``ended`` tells which replies
    ended by themselves. ``sampling_logprobs`` are those of the moment of sampling, to be compared with what the update computes.
    ``trunk`` is the output of the policy's lower layers, where it was noted while generating.
    """

    input_ids: Int[Tensor, "B L"]
    attention_mask: Int[Tensor, "B L"]
    response_mask: Bool[Tensor, "B T"]
    ended: Bool[Tensor, " B"]
    sampling_logprobs: Float[Tensor, "B T"] | None = None
    trunk: Float[Tensor, "B L H"] | None = None

    def __post_init__(self) -> None:
        if self.input_ids.shape != self.attention_mask.shape or len(self.response_mask) != len(self.input_ids):
            raise ValueError(
                f"rollout: input_ids {tuple(self.input_ids.shape)}, attention_mask {tuple(self.attention_mask.shape)} and "
                f"response_mask {tuple(self.response_mask.shape)} do not belong together"
            )
        if not self.response_mask.any(-1).all():
            raise ValueError("rollout: a reply has no token that counts; drop it before this point")

    @property
    def prompt_tokens(self) -> int:
        return self.input_ids.shape[1] - self.response_mask.shape[1]

    @property
    def response_tokens(self) -> int:
        return self.response_mask.shape[1]

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        return self.response_mask.sum(-1)

    def closes_with(self, token_id: Any) -> Bool[Tensor, " B"]:
        """Whether each reply's last counted token is ``token_id``."""
        last = last_counted(self.response_mask.long()) + self.prompt_tokens
        return self.input_ids.gather(1, last[:, None]).squeeze(1) == token_id

    def response_ids(self) -> list[list[int]]:
        """Token ids of each reply, padding left out."""
        replies = self.input_ids[:, self.prompt_tokens :]
        return [ids[mask].tolist() for ids, mask in zip(replies, self.response_mask, strict=True)]

    def prompt_ids(self) -> list[list[int]]:
        prompts, masks = self.input_ids[:, : self.prompt_tokens], self.attention_mask[:, : self.prompt_tokens].bool()
        return [ids[mask].tolist() for ids, mask in zip(prompts, masks, strict=True)]


@dataclass
class Experience:
    """A rollout with what the update needs, all (B, T) and fp32; values and returns where there is a critic.

    Besides, the output of the policy's trunk, and of the critic's if it is another, (B, L, H) where it is reused; the states that the critic's
    head reads (B, T, H) where they are frozen; and the reference's (B, T, H) where the exact KL to it is part of the loss. These may be in the
    host's memory.
    """

    rollout: Rollout
    logprobs: Float[Tensor, "B T"]
    ref_logprobs: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"] | None = None
    returns: Float[Tensor, "B T"] | None = None
    trunk: Float[Tensor, "B L H"] | None = None
    value_trunk: Float[Tensor, "B L H"] | None = None
    features: Float[Tensor, "B T H"] | None = None
    ref_hidden: Float[Tensor, "B T H"] | None = None

    def microbatches(self, rows: int, per_step: int, *, mean_tokens: Callable[[Tensor], Tensor]) -> Iterator[dict[str, Tensor]]:
        """One epoch's microbatches of ``rows`` rows in a fresh random order, ``per_step`` of them to each optimizer step.

        Their ``num_tokens`` is the number of response tokens of the whole optimizer step, averaged over processes by ``mean_tokens``
        since DistributedDataParallel averages gradients: with it, losses add up to the mean over tokens, however the rows are cut.
        In one microbatch, rows keep their order.
        """
        order = torch.randperm(len(self.rollout.input_ids), device="cpu").to(self.rollout.input_ids.device)
        order = order.sort().values if len(order) <= rows else order
        for step in order.split(rows * per_step):
            num_tokens = mean_tokens(self.rollout.response_mask[step].sum())
            for chosen in step.split(rows):
                yield self._take(chosen) | {"num_tokens": num_tokens}

    def _take(self, rows: Int[Tensor, " b"]) -> dict[str, Tensor]:
        everything = {
            "input_ids": self.rollout.input_ids,
            "attention_mask": self.rollout.attention_mask,
            "response_mask": self.rollout.response_mask,
            "old_logprobs": self.logprobs,
            "ref_logprobs": self.ref_logprobs,
            "advantages": self.advantages,
            "old_values": self.values,
            "returns": self.returns,
            "trunk": self.trunk,
            "value_trunk": self.value_trunk,
            "features": self.features,
            "ref_hidden": self.ref_hidden,
        }
        return {name: x[rows.to(x.device)] for name, x in everything.items() if x is not None}


def last_counted(mask: Int[Tensor, "B L"]) -> Int[Tensor, " B"]:
    """Place of the last column that counts in each row, on whichever side the padding stands."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
