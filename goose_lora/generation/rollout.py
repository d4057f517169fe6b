"""What a rollout holds and how it is cut into microbatches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from goose_lora.errors import UserError
from goose_lora.functional import last_counted


@dataclass
class Rollout:
    """B replies of up to T tokens. Sequences are left-padded prompts followed by replies: L = P +
    T; all replies begin in one column.

    ``response_mask`` is true where a reply's token counts, the one that ends it included;
    everything after it is padding. A reply may have
    holes: tokens between its own that others wrote (a user, a tool), which are attended to and not
    trained on. ``ended`` tells which replies ended by themselves. ``sampling_logprobs`` are those
    of the moment of sampling, to be compared with what the update computes. ``trunk`` is the output
    of the policy's lower layers, where it was noted while generating.
    """

    input_ids: Int[Tensor, "B L"]
    attention_mask: Int[Tensor, "B L"]
    response_mask: Bool[Tensor, "B T"]
    ended: Bool[Tensor, " B"]
    sampling_logprobs: Float[Tensor, "B T"] | None = None
    trunk: Float[Tensor, "B L H"] | None = None

    def __post_init__(self) -> None:
        if self.input_ids.shape != self.attention_mask.shape or len(self.response_mask) != len(
            self.input_ids
        ):
            raise UserError(
                f"rollout: input_ids {tuple(self.input_ids.shape)}, attention_mask"
                f" {tuple(self.attention_mask.shape)} and response_mask {tuple(self.response_mask.shape)} do"
                " not belong together"
            )
        if not self.response_mask.any(-1).all():
            raise UserError("rollout: a reply has no token that counts; drop it before this point")

    @property
    def prompt_tokens(self) -> int:
        return self.input_ids.shape[1] - self.response_mask.shape[1]

    @property
    def response_tokens(self) -> int:
        return self.response_mask.shape[1]

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        return self.response_mask.sum(-1)

    def ends_with_token(self, token_id: Any) -> Bool[Tensor, " B"]:
        """Whether each reply's last counted token is ``token_id``."""
        last = last_counted(self.response_mask.long()) + self.prompt_tokens
        return self.input_ids.gather(1, last[:, None]).squeeze(1) == token_id

    def response_ids(self) -> list[list[int]]:
        """Token ids of each reply, padding left out."""
        replies = self.input_ids[:, self.prompt_tokens :]
        return [ids[mask].tolist() for ids, mask in zip(replies, self.response_mask, strict=True)]

    def prompt_ids(self) -> list[list[int]]:
        prompts, masks = (
            self.input_ids[:, : self.prompt_tokens],
            self.attention_mask[:, : self.prompt_tokens].bool(),
        )
        return [ids[mask].tolist() for ids, mask in zip(prompts, masks, strict=True)]


def joined(parts: Sequence[Rollout], order: Int[Tensor, " B"], pad_token_id: Any) -> Rollout:
    """Groups of other widths as one rollout, its rows where they were: row i of the parts is row
    ``order[i]``."""
    prompt_tokens, reply_tokens = (
        max(getattr(part, name) for part in parts) for name in ("prompt_tokens", "response_tokens")
    )

    def column(name: str, fill: Any, *, of_reply: bool) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        if found[0] is None:
            return None
        padded = []
        for part, x in zip(parts, found, strict=True):
            left = 0 if of_reply else prompt_tokens - part.prompt_tokens
            padded.append(
                torch.nn.functional.pad(
                    x, (*[0, 0] * (x.dim() - 2), left, reply_tokens - part.response_tokens), value=fill
                )
            )
        whole = torch.cat(padded)
        return whole[order.argsort().to(whole.device)]

    return Rollout(
        column("input_ids", pad_token_id, of_reply=False),  # type: ignore[arg-type]
        column("attention_mask", 0, of_reply=False),  # type: ignore[arg-type]
        column("response_mask", False, of_reply=True),  # type: ignore[arg-type]
        torch.cat([part.ended for part in parts])[order.argsort()],
        column("sampling_logprobs", 0.0, of_reply=True),
        column("trunk", 0.0, of_reply=False),
    )
