"""Which roles are the same below, and up to where: what a trunk may serve.

A role that trains (policy, value) stays as it is below the lowest layer in which it trains. Others share its trunk if their adapters compute
the same there: because there are none, or they are frozen copies of one another, or add nothing yet.
"""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from goose_lora.adapters import belongs_to
from goose_lora.trunk import lowest_layer, top_layers


def trained_from(model: Any, layers: nn.ModuleList, adapter: str, train_layers: str) -> int:
    """Lowest layer in which ``adapter`` trains if only ``train_layers`` do; 0 if it trains outside the layers, on embeddings or the head.

    Raises:
        ValueError: the adapter reaches none of ``train_layers``.
    """
    lowest = top_layers(train_layers, len(layers), "train_layers")[0]
    if train_layers == "all":
        inside = {id(parameter) for parameter in layers.parameters()}
        adapted = [p for name, p in model.named_parameters() if belongs_to(name, adapter) and ".score." not in name]
        return lowest_layer(layers, adapter) if all(id(parameter) in inside for parameter in adapted) else 0
    if not any(belongs_to(name, adapter) for layer in layers[lowest:] for name, _ in layer.named_parameters()):
        raise ValueError(f"train_layers={train_layers!r}: the adapter has nothing in these layers, so nothing trains. Write all, or more layers.")
    return max(lowest, lowest_layer(layers, adapter))


def same_below(model: Any, layers: nn.ModuleList, depth: int, one: str | None, other: str | None) -> bool:
    """Whether two adapters (None: none at all) compute the same in ``layers[:depth]`` and outside the layers, bit for bit."""
    above = {id(module) for layer in layers[depth:] for module in layer.modules()}
    lower = (module for module in model.modules() if isinstance(module, LoraLayer) and id(module) not in above)
    return one == other or all(_alike(_effect(module, one), _effect(module, other)) for module in lower)


def _effect(module: Any, adapter: str | None) -> dict[str, Tensor]:
    """What ``adapter`` adds to a layer, by names of its factors; nothing where it has none there, or its product is 0."""
    if adapter is None:
        return {}
    factors = {name: p for name, p in module.named_parameters() if belongs_to(name, adapter)}
    plain = len(factors) == 2  # a variant such as DoRA has more, and changes the layer even where the product is 0
    if not factors or (plain and any(not factor.any() for factor in factors.values())):
        return {}
    scaling = torch.tensor(float(module.scaling[adapter]), dtype=torch.float64)
    return {name.replace(f".{adapter}", ""): p for name, p in factors.items()} | {"scaling": scaling}


def _alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(factor, other[name]) for name, factor in one.items())
