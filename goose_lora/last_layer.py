"""The last layer at the positions that are read.

Heads read the states before and at the tokens of a reply. Of the prompt's positions the last layer gives keys and values to those, and nothing
that is used besides: its queries, its output projection and its feed-forward part, some 94 % of a Llama layer's matrices, are run on the last
columns only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from goose_lora.trunk import replaced

BY_POSITION = ("q_proj", "o_proj", "mlp")  # a layer's modules that treat each position by itself, as Llama, Qwen, Mistral and others name them


@contextmanager
def reading(layer: nn.Module, columns: int | None) -> Iterator[None]:
    """Inside, ``layer`` gives correct states (B, L, H) in the last ``columns`` columns only, exact there; None: in all of them."""
    if columns is None:
        yield
        return
    found = [module for name, module in layer.named_modules() if name.rpartition(".")[2] in BY_POSITION]
    with replaced(found, [partial(_at_the_end, module.forward, columns) for module in found]):
        yield


def _at_the_end(forward: Callable[..., Any], columns: int, x: Tensor) -> Tensor:
    rest = x.shape[1] - columns
    return forward(x) if rest <= 0 else F.pad(forward(x[:, rest:].contiguous()), (0, 0, rest, 0))
