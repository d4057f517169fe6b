"""Training on a base in float16: the loss is multiplied before its backward pass.

Small gradients would become 0 in it. torch's GradScaler finds the factor: it is halved where a
gradient overflows, and that step is left out.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch.optim import Optimizer

SCALER_FILE = "scaler.pt"  # as Trainer calls it in checkpoints
# Below torch's 65536, at which first steps of small batches are lost, and moved sooner than after
# its 2000 steps, more than many runs have.
_FIRST_SCALE, _STEPS_TO_GROW = 2.0**12, 200
# A gradient that overflows at this scale or below has not been made too large by it.
LEAST_SCALE = 1.0


def is_float16(model: nn.Module | None) -> bool:
    """Return whether a model under adapters, or a plain one, computes in float16."""
    base = getattr(model, "get_base_model", lambda: model)()
    table = cast(Any, base).get_input_embeddings()
    return table.weight.dtype == torch.float16


def scale_loss(accelerator: Accelerator, optimizer: Callable[[], object]) -> None:
    """Let ``accelerator`` scale losses, on any device, and give gradients back unscaled.

    accelerate makes a scaler of its own only for mixed precision in fp16, which it has on a GPU
    alone, and wraps each forward for it. ``optimizer`` returns the run's, once there is one.
    """
    if accelerator.scaler is not None:
        return
    scaler = torch.amp.GradScaler(
        accelerator.device.type, init_scale=_FIRST_SCALE, growth_interval=_STEPS_TO_GROW
    )
    accelerator.scaler = scaler

    # What clipping calls first, and what does nothing but under mixed precision
    def unscale_gradients(given: object = None) -> None:
        inner = optimizer()
        while isinstance(inner, AcceleratedOptimizer):
            inner = inner.optimizer
        scaler.unscale_(cast(Optimizer, inner))

    vars(accelerator)["unscale_gradients"] = unscale_gradients


def compute_in_float16(model: nn.Module, device: torch.device) -> None:
    """Let a model's forward compute products in float16, whatever dtype its adapters have.

    What it returns is fp32, and so is the loss that is made of it.
    """
    forward = torch.autocast(device.type, dtype=torch.float16)(model.forward)
    model.forward = convert_outputs_to_fp32(forward)
