"""Log-probabilities from hidden states where a head does more than one product.

Granite divides its logits, Cohere and Falcon-H1 multiply them, MiniCPM3 shrinks the states before.
Whatever it is, the model's own head computes it, chunk by chunk, and autograd gives its gradient.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from goose_lora.functional.logprobs import CHUNK_TOKENS

LogitsOf = Callable[[Tensor], Tensor]  # hidden states (N, H) to logits (N, V)


def own_token_logprobs(
    hidden: Float[Tensor, "N H"],
    ids: Int[Tensor, " N"],
    logits_of: LogitsOf,
    *,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return what ``token_logprobs`` does, for the logits that ``logits_of`` gives.

    Gradients reach ``hidden`` alone; through the entropy only with ``entropy_gradient``. Raises
    nothing.
    """

    def of_rows(states: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        log_p = _log_softmax(logits_of(states), temperature)
        entropies = -torch.linalg.vecdot(log_p.exp(), log_p)
        return log_p.gather(-1, ids[rows, None]).squeeze(-1), entropies

    logprobs, entropies = _ByChunks.apply(hidden, of_rows, 2 if entropy_gradient else 1, chunk_tokens)
    return logprobs, entropies if entropy_gradient else entropies.detach()


def own_token_kl(
    hidden: Float[Tensor, "N H"],
    ref_hidden: Float[Tensor, "N H"],
    logits_of: LogitsOf,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Float[Tensor, " N"]:
    """Return what ``token_kl`` does, for the logits that ``logits_of`` gives; raises nothing."""

    def of_rows(states: Tensor, rows: slice) -> tuple[Tensor]:
        log_p = _log_softmax(logits_of(states), temperature)
        with torch.no_grad():
            log_q = _log_softmax(logits_of(ref_hidden[rows]), temperature)
        return (torch.linalg.vecdot(log_p.exp(), log_p - log_q),)

    return _ByChunks.apply(hidden, of_rows, 1, chunk_tokens)[0]


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(wide) / temperature).log_softmax(-1)


class _ByChunks(torch.autograd.Function):
    """Numbers for each row of states, a gradient beside each of the first of them.

    The gradients are taken with the numbers, so that a chunk's logits can be dropped.
    """

    @staticmethod
    def forward(ctx, hidden, of_rows, differentiable, chunk_tokens):
        train = hidden.requires_grad
        slopes = [torch.empty_like(hidden) for _ in range(differentiable if train else 0)]
        chunks = []
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            states = hidden[rows].detach().requires_grad_(train)
            # Rows do not depend on one another, so the sum's gradient is that of each.
            with torch.set_grad_enabled(train):
                numbers = of_rows(states, rows)
                for number, slope in zip(numbers, slopes, strict=False):
                    (slope[rows],) = torch.autograd.grad(number.sum(), states, retain_graph=True)
            chunks.append(torch.stack([number.detach() for number in numbers]))
        ctx.save_for_backward(*slopes)
        if chunks:
            return tuple(torch.cat(chunks, dim=-1))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return tuple(hidden.new_empty(2, 0, dtype=wide))

    @staticmethod
    def backward(ctx, *grads):
        pairs = zip(grads, ctx.saved_tensors, strict=False)
        total = sum(grad[:, None].to(slope.dtype) * slope for grad, slope in pairs)
        return total, None, None, None
