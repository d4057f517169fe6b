"""Replies to a batch of prompts, and groups of them put together."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from goose_lora.errors import UserError
from goose_lora.functional import last_counted

# What transformers declares of a tokenizer's eos_token_id and pad_token_id; here it is an int.
SpecialTokenId = int | list[int] | str | list[str] | Any | None


@dataclass
class Rollout:
    """B replies of up to T tokens.

    Sequences are left-padded prompts followed by replies: L = P + T. All replies begin in one
    column. A reply may have holes: tokens between its own that others wrote (a user, a tool), which
    are attended to and not trained on.

    Attributes:
        response_mask: true where a reply's token counts, the one that ends it included; everything
            after it is padding.
        ended: which replies ended by themselves.
        sampling_logprobs: those of the moment of sampling, to be compared with what the update
            computes.
        trunk: the output of the policy's lower layers, where it was noted while generating.
    """

    input_ids: Int[Tensor, "B L"]
    attention_mask: Int[Tensor, "B L"]
    response_mask: Bool[Tensor, "B T"]
    ended: Bool[Tensor, " B"]
    sampling_logprobs: Float[Tensor, "B T"] | None = None
    trunk: Float[Tensor, "B L H"] | None = None

    def __post_init__(self) -> None:
        # What is cut wrongly shows here, and not as an index error in the update.
        same_rows = len(self.response_mask) == len(self.input_ids)
        if self.input_ids.shape != self.attention_mask.shape or not same_rows:
            raise UserError(
                f"rollout: input_ids {tuple(self.input_ids.shape)}, attention_mask"
                f" {tuple(self.attention_mask.shape)} and response_mask {tuple(self.response_mask.shape)} do"
                " not belong together"
            )
        if not self.response_mask.any(-1).all():
            raise UserError("rollout: a reply has no token that counts; drop it before this point")

    @property
    def prompt_tokens(self) -> int:
        # Width of the prompts, padding included.
        return self.input_ids.shape[1] - self.response_mask.shape[1]

    @property
    def response_tokens(self) -> int:
        return self.response_mask.shape[1]

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """Counted tokens of each reply."""
        return self.response_mask.sum(-1)

    def ends_with_token(self, token_ids: Sequence[int]) -> Bool[Tensor, " B"]:
        """Return whether each reply's last counted token is one of ``token_ids``."""
        # Its column in the reply, then in the sequence.
        last = last_counted(self.response_mask.long()) + self.prompt_tokens
        token = self.input_ids.gather(1, last[:, None]).squeeze(1)
        return torch.isin(token, torch.tensor(list(token_ids), device=token.device))

    def response_ids(self) -> list[list[int]]:
        """Return the token ids of each reply, padding left out."""
        return _kept(self.input_ids[:, self.prompt_tokens :], self.response_mask)

    def prompt_ids(self) -> list[list[int]]:
        """Return the token ids of each prompt, padding left out."""
        width = self.prompt_tokens
        return _kept(self.input_ids[:, :width], self.attention_mask[:, :width])


def _kept(ids: Int[Tensor, "B N"], mask: Bool[Tensor, "B N"] | Int[Tensor, "B N"]) -> list[list[int]]:
    """Return the ids of each row where its mask is true."""
    # Two reads of the device, however many rows there are
    return [list(compress(row, keep)) for row, keep in zip(ids.tolist(), mask.tolist(), strict=True)]


def joined(parts: Sequence[Rollout], order: Int[Tensor, " B"], pad_token_id: SpecialTokenId) -> Rollout:
    """Return groups of rows of other widths as one rollout.

    Row i of the groups, one after another, becomes row ``order[i]``.
    """
    prompt_tokens = max(part.prompt_tokens for part in parts)
    response_tokens = max(part.response_tokens for part in parts)
    # Where each row of the result stands among the groups' rows.
    places = order.argsort()

    def together(tensors: Sequence[Tensor], fill: float, *, of_reply: bool = False) -> Tensor:
        # Prompts are padded on the left and replies on the right, so that replies stay aligned.
        padded = []
        for part, x in zip(parts, tensors, strict=True):
            left = 0 if of_reply else prompt_tokens - part.prompt_tokens
            right = response_tokens - part.response_tokens
            after_columns = [0, 0] * (x.dim() - 2)
            padded.append(torch.nn.functional.pad(x, (*after_columns, left, right), value=fill))
        rows = torch.cat(padded)
        return rows[places.to(rows.device)]

    # These two are there in all groups or in none.
    sampling_logprobs = trunk = None
    if logprobs := [part.sampling_logprobs for part in parts if part.sampling_logprobs is not None]:
        sampling_logprobs = together(logprobs, 0.0, of_reply=True)
    if trunks := [part.trunk for part in parts if part.trunk is not None]:
        trunk = together(trunks, 0.0)
    return Rollout(
        input_ids=together([part.input_ids for part in parts], cast(int, pad_token_id)),
        attention_mask=together([part.attention_mask for part in parts], 0),
        response_mask=together([part.response_mask for part in parts], False, of_reply=True),
        ended=torch.cat([part.ended for part in parts])[places],
        sampling_logprobs=sampling_logprobs,
        trunk=trunk,
    )
