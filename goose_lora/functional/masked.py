"""Masked sums, means, moments and whitening: true in a mask is where a token counts."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TokenCount = int | float | Int[Tensor, ""] | Float[Tensor, ""]


class Moments(NamedTuple):
    """Count, mean and population variance of some tokens."""

    count: Int[Tensor, ""]
    mean: Float[Tensor, ""]
    var: Float[Tensor, ""]


def _upcast(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return x if x.dtype == torch.float64 else x.float()


def _select(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``x`` in at least fp32, zero outside the mask. Comes before all arithmetic: 0 * NaN is NaN,
    in the backward pass too."""
    return torch.where(mask, _upcast(x), 0.0)


def masked_sum(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Sum of ``x`` over the mask; 0 for an empty mask. TRL multiplies by the mask instead, which
    spreads a NaN from padding."""
    return _select(x, mask).sum()


def masked_mean(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, num_tokens: TokenCount | None = None
) -> Float[Tensor, ""]:
    """Mean of ``x`` over the mask, or this micro-batch's share of the mean over a whole mini-batch.

    ``num_tokens`` is the token count of the mini-batch over all its micro-batches and ranks. The
    results then add up to its token mean,
    however it was cut, and an empty mask gives 0. DDP averages gradients over ranks where this
    wants their sum: multiply the loss by the number of ranks there, as transformers.Trainer does.
    TRL averages the means of micro-batches and ranks, which gives a token beside short responses
    more weight than one beside long ones; OpenAI's and CleanRL's rows are all equally long.

    Raises ValueError if the mask is empty and ``num_tokens`` is not given, or if ``num_tokens`` is
    not positive.
    """
    if num_tokens is None:
        num_tokens = mask.sum()
        if num_tokens == 0:
            raise ValueError(
                f"the mask of shape {tuple(mask.shape)} selects no token, so there is no mean. Drop empty"
                " responses before this point, or pass num_tokens (the count of the whole mini-batch) if"
                " only this micro-batch may be empty."
            )
    elif num_tokens <= 0:
        raise ValueError(
            f"num_tokens={int(num_tokens)}, but it is the token count of a whole mini-batch and so at least"
            " 1. Pass the sum of mask.sum() over all micro-batches and ranks, and skip a mini-batch without"
            " any token."
        )
    return masked_sum(x, mask) / num_tokens


def moments(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Moments:
    """Count, mean and population variance (divided by n) of ``x`` over the mask, in two passes.

    TRL divides by n - 1, which is infinite for one token. Raises ValueError if the mask is empty.
    """
    x = _select(x, mask)
    mean = masked_mean(x, mask)
    return Moments(mask.sum(), mean, masked_mean((x - mean).square(), mask))


def merge_moments(parts: list[Moments]) -> Moments:
    """Moments of all tokens together from the moments of disjoint parts, such as ranks (Chan, Golub
    and LeVeque 1979, STAN-CS-79-773).

    The variance is what lies within the parts plus what lies between their means; sums of squares,
    which cancel, do not occur. TRL, OpenAI and CleanRL whiten by the statistics of each rank.
    Raises ValueError if there are no parts.
    """
    if not parts:
        raise ValueError("merge_moments got no parts. Pass the Moments of at least one rank or micro-batch.")
    counts, means, variances = (torch.stack(column) for column in zip(*parts, strict=True))
    count = counts.sum()
    mean = (counts * means).sum() / count
    return Moments(count, mean, (counts * (variances + (means - mean).square())).sum() / count)


def whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    shift_mean: bool = True,
    statistics: Moments | None = None,
    eps: float = 1e-8,
) -> Float[Tensor, "*shape"]:
    """Scale ``x`` to variance 1 over the mask, and to mean 0 unless ``shift_mean`` is false (the
    mean then stays); 0 outside the mask.

    (x - mean) / sqrt(var + eps), as OpenAI's ``utils.whiten``. ``statistics`` replaces the mean and
    variance of ``x`` itself: pass ``merge_moments`` over all ranks. One token, or equal ones, give
    0. TRL divides the variance by n - 1, so that one token gives NaN, and leaves junk outside the
    mask. Raises ValueError if the mask is empty and no statistics are given.
    """
    x = _select(x, mask)
    _, mean, var = moments(x, mask) if statistics is None else statistics
    whitened = (x - mean) * torch.rsqrt(var + eps)
    return _select(whitened if shift_mean else whitened + mean, mask)


def last_counted(mask: Int[Tensor, "B L"]) -> Int[Tensor, " B"]:
    """Place of the last column that counts in each row, on whichever side the padding stands."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
