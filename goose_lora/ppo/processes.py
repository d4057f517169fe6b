"""Tensors of all processes of a run: gathered, summed and averaged by accelerate."""

from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor


def gathered(accelerator: Accelerator, x: Tensor) -> Tensor:
    """Return the rows of all processes, which are of one width."""
    return cast(Tensor, accelerator.gather(x))


def gathered_to_one_width(accelerator: Accelerator, x: Tensor) -> Tensor:
    """Return the rows (B, T) of all processes, padded with 0 to the widest."""
    # Alone, accelerate would still read each width from the device
    if accelerator.num_processes == 1:
        return x
    return gathered(accelerator, cast(Tensor, accelerator.pad_across_processes(x, dim=1)))


def summed(accelerator: Accelerator, x: Tensor) -> Tensor:
    """Return the sum over processes."""
    return cast(Tensor, accelerator.reduce(x, reduction="sum"))


def averaged(accelerator: Accelerator, figures: dict[str, Tensor]) -> dict[str, float]:
    """Return the mean of each figure over processes, all of them in one exchange, in fp32."""
    # One exchange: figures are many and small.
    own = torch.stack([x.to(accelerator.device, torch.float32) for x in figures.values()])
    means = cast(Tensor, accelerator.reduce(own, reduction="mean"))
    return dict(zip(figures, means.tolist(), strict=True))
