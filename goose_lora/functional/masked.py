"""Masked sums, means, moments and whitening: true in a mask is where a token counts."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# A count over several processes arrives as a tensor, and as a float where a mean was taken.
TokenCount = int | float | Int[Tensor, ""] | Float[Tensor, ""]


class Moments(NamedTuple):
    """Count, mean and population variance of some tokens."""

    count: Int[Tensor, ""]
    mean: Float[Tensor, ""]
    var: Float[Tensor, ""]


def _upcast(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return ``x`` in at least fp32."""
    return x if x.dtype == torch.float64 else x.float()


def _select(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return ``x`` in at least fp32, zero outside the mask."""
    # Before all arithmetic: 0 * NaN is NaN, in the backward pass too.
    return torch.where(mask, _upcast(x), 0.0)


def masked_sum(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Return the sum of ``x`` over the mask; 0 for an empty mask.

    TRL multiplies by the mask instead, which spreads a NaN from padding.
    """
    return _select(x, mask).sum()


def masked_mean(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, num_tokens: TokenCount | None = None
) -> Float[Tensor, ""]:
    """Return the mean of ``x`` over the mask, or a microbatch's share of its minibatch's mean.

    ``num_tokens`` is the token count of the minibatch over all its microbatches and ranks. The
    results then add up to its token mean, however it was cut, and an empty mask gives 0. DDP
    averages gradients over ranks where this wants their sum: multiply the loss by the number of
    ranks there, as transformers.Trainer does. TRL averages the means of micro-batches and ranks,
    which gives a token beside short responses more weight than one beside long ones; OpenAI's and
    CleanRL's rows are all equally long.

    Raises ValueError if the mask is empty and ``num_tokens`` is not given, or if ``num_tokens`` is
    not positive.
    """
    # Without the count of the whole minibatch, this mask is all there is to divide by.
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
    """Return count, mean and population variance of ``x`` over the mask, in two passes.

    The variance is divided by n; TRL divides by n - 1, which is infinite for one token. Raises
    ValueError if the mask is empty.
    """
    x = _select(x, mask)
    mean = masked_mean(x, mask)
    # The second pass is over what is left: sums of squares would cancel.
    return Moments(mask.sum(), mean, masked_mean((x - mean).square(), mask))


def merge_moments(parts: list[Moments]) -> Moments:
    """Return the moments of all tokens from the moments of disjoint parts, such as ranks.

    Chan, Golub and LeVeque 1979, STAN-CS-79-773. The variance is what lies within the parts plus
    what lies between their means; sums of squares, which cancel, do not occur. TRL, OpenAI and
    CleanRL whiten by the statistics of each rank. Raises ValueError if there are no parts.
    """
    if not parts:
        raise ValueError("merge_moments got no parts. Pass the Moments of at least one rank or micro-batch.")
    counts, means, variances = (torch.stack(column) for column in zip(*parts, strict=True))
    # Parts count by their tokens, not each as one.
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
    """Scale ``x`` to mean 0 and variance 1 over the mask; 0 outside the mask.

    (x - mean) / sqrt(var + eps), as OpenAI's ``utils.whiten``; the mean stays where ``shift_mean``
    is false. ``statistics`` replaces the mean and variance of ``x`` itself: pass
    ``merge_moments`` over all ranks. One token, or equal ones, give 0. TRL divides the variance by
    n - 1, so that one token gives NaN, and leaves junk outside the mask. Raises ValueError if the
    mask is empty and no statistics are given.
    """
    x = _select(x, mask)
    _, mean, var = moments(x, mask) if statistics is None else statistics
    # What the mean of equal numbers is rounded by must not be scaled up to a deviation
    apart = x - mean
    rounded = apart.abs() <= 8 * torch.finfo(x.dtype).eps * abs(mean)
    whitened = torch.where(rounded, 0.0, apart) * torch.rsqrt(var + eps)
    # A mean that was added shows outside the mask, too.
    return _select(whitened if shift_mean else whitened + mean, mask)


def last_counted(mask: Int[Tensor, "B L"]) -> Int[Tensor, " B"]:
    """Return the last column that counts in each row, on whichever side the padding stands."""
    # argmax finds the largest column number among those that count.
    return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
