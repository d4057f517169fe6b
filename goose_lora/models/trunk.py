"""The layers below the lowest adapter: run once, resumed above as often as needed.

With adapters in the top layers only, everything below computes the same for policy, critic,
reference and reward model, and in every PPO epoch. The model's own forward runs both halves: layers
that are not wanted pass their input through, so masks, rotary embeddings, per-layer attention types
and final norms stay the library's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import is_
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from goose_lora.errors import UserError
from goose_lora.models.roles import belongs_to, of_another


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of decoder layers of a transformers causal language model.

    Raises:
        UserError: the model has no such list, or several that could be it.
    """
    # By length: libraries name the list in ten ways
    count = model.config.get_text_config().num_hidden_layers
    found = [
        (name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count
    ]
    # A mixture-of-experts model may have as many experts as layers: the outermost list is the one
    # that holds the layers.
    found.sort(key=lambda item: item[0].count("."))
    if not found or (len(found) > 1 and found[0][0].count(".") == found[1][0].count(".")):
        names = [name for name, _ in found]
        raise UserError(
            f"{type(model).__name__}: looked for one list of {count} decoder layers and found"
            f" {names or 'none'}. Supported are decoder-only models of transformers (Llama, Qwen, Mistral,"
            " Gemma, GPT-2, GPT-NeoX, OPT, Phi-3 ...)."
        )
    return found[0][1]


def top_layers(text: str, num_layers: int, setting: str = "lora_layers") -> list[int]:
    """Return indices of the layers that ``all`` or ``top-K`` names, lowest first.

    Raises:
        UserError: any other text, or a K that the model does not have.
    """
    if text == "all":
        return list(range(num_layers))
    prefix, _, number = text.partition("-")
    if prefix != "top" or not number.isdecimal() or int(number) == 0:
        raise UserError(
            f"{setting}={text!r}: write all, or top-K with a number of layers, for example top-10."
        )
    if int(number) > num_layers:
        raise UserError(
            f"{setting}={text!r}: the model has {num_layers} layers. Write top-{num_layers} or less, or all."
        )
    return list(range(num_layers - int(number), num_layers))


def lowest_layer(layers: nn.ModuleList, adapter: str) -> int:
    """Return the index of the lowest layer that ``adapter`` changes.

    It is the number of layers if it changes none of them.
    """
    for index, layer in enumerate(layers):
        if any(belongs_to(f"layer.{name}", adapter) for name, _ in layer.named_parameters()):
            return index
    return len(layers)


@contextmanager
def patched_forward(layers: list[nn.Module], forwards: list) -> Iterator[None]:
    """Give each module another ``forward``, and put the old one back, whatever happens."""
    # An instance's own forward, where accelerate or a test has set one
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _pass_through(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    return hidden_states


@contextmanager
def below(layers: nn.ModuleList, depth: int) -> Iterator[list[Tensor]]:
    """Run only ``layers[:depth]`` in a forward of the model inside.

    The list that is yielded receives their output (B, L, H).
    """
    output: list[Any] = []
    hook = layers[depth - 1].register_forward_hook(lambda module, args, out: output.append(out))
    try:
        upper = list(layers[depth:])
        with patched_forward(upper, [_pass_through] * len(upper)):
            yield output
    finally:
        hook.remove()


@contextmanager
def entering_last(layers: nn.ModuleList) -> Iterator[list[object]]:
    """Note what the last but one layer gives in each forward of the model inside."""
    output: list[object] = []
    hooks = [layer.register_forward_hook(lambda *call: output.append(call[2])) for layer in layers[-2:-1]]
    try:
        yield output
    finally:
        for hook in hooks:
            hook.remove()


class Capture:
    """Keeps the output of ``layers[depth - 1]`` while a model generates.

    It is that of the prompt, then of one token after another. States that go to another device are
    on their way when a token is drawn: ``wait`` ends when they are there.

    Args:
        columns: how many tokens there will be at most, prompt and reply together.
        keep_on: the device that the states go to; the model's if None.
    """

    def __init__(self, layers: nn.ModuleList, depth: int, columns: int, keep_on: torch.device | None = None):
        self.layers, self.depth, self.columns, self.keep_on = layers, depth, columns, keep_on
        self.states: Any = None
        self.seen = 0
        self._from: torch.device | None = None  # where states come from, if they leave it

    def note(self, module: nn.Module, args: object, output: Tensor) -> None:
        rows, tokens, width = output.shape
        if self.states is None:
            leaves = self.keep_on is not None and self.keep_on != output.device
            shape = (rows, self.columns, width)
            if leaves:
                # A token's states lie together, and in memory that the device can write to by
                # itself: nobody waits for a copy
                self._from, shape = output.device, (self.columns, rows, width)
            pinned = leaves and output.is_cuda
            self.states = output.new_zeros(shape, device=self.keep_on, pin_memory=pinned)
            if leaves:
                self.states = self.states.transpose(0, 1)
        # Generate may sample on while it learns that all have ended
        until = min(self.columns, self.seen + tokens)
        noted = output[:, : until - self.seen]
        if self._from is None:
            self.states[:, self.seen : until] = noted
        else:
            by_token = self.states.transpose(0, 1)[self.seen : until]
            by_token.copy_(noted.transpose(0, 1).contiguous(), non_blocking=True)
        self.seen = until

    def wait(self) -> None:
        if self._from is not None and self._from.type == "cuda":
            torch.cuda.synchronize(self._from)

    @contextmanager
    def watching(self) -> Iterator[None]:
        hook = self.layers[self.depth - 1].register_forward_hook(self.note)
        try:
            yield
        finally:
            hook.remove()


@contextmanager
def above(layers: nn.ModuleList, depth: int, hidden_states: Tensor) -> Iterator[None]:
    """Start a forward of the model inside at ``layers[depth]`` from ``hidden_states`` (B, L, H).

    They are what ``below`` gave.

    The stored states enter as the output of layer ``depth - 1``. That way the first layer that
    trains receives them as an ordinary argument, which gradient checkpointing keeps for its
    recompute; a hook would be gone by then.
    """
    lower = list(layers[:depth])
    with patched_forward(lower, [_pass_through] * (depth - 1) + [lambda *args, **kwargs: hidden_states]):
        yield


def trained_from(model: nn.Module, layers: nn.ModuleList, adapter: str, train_layers: str) -> int:
    """Return the lowest layer in which ``adapter`` trains if only ``train_layers`` do.

    It is 0 if the adapter trains outside the layers, on embeddings or the head.

    Raises:
        ValueError: the adapter reaches none of ``train_layers``.
    """
    # All that the adapter has: if some lies outside the layers, nothing is below it
    lowest = top_layers(train_layers, len(layers), "train_layers")[0]
    if train_layers == "all":
        inside = {id(parameter) for parameter in layers.parameters()}
        adapted = [
            p for name, p in model.named_parameters() if belongs_to(name, adapter) and ".score." not in name
        ]
        return lowest_layer(layers, adapter) if all(id(parameter) in inside for parameter in adapted) else 0
    # Layers that were asked for, of which the adapter must have one
    if not any(
        belongs_to(f"layer.{name}", adapter)
        for layer in layers[lowest:]
        for name, _ in layer.named_parameters()
    ):
        raise UserError(
            f"train_layers={train_layers!r}: the adapter has nothing in these layers, so nothing trains."
            " Write all, or more layers."
        )
    return max(lowest, lowest_layer(layers, adapter))


def captured_depth(depth: int, *, merged: bool, adapted_below: bool) -> int:
    """Return how many of the lowest layers are noted while the policy generates (0: none).

    Args:
        depth: layers of the policy's trunk.
        merged: whether the policy's adapter is merged into the weights that generate.
        adapted_below: whether the adapter changes layers of the trunk. Merging rounds them to
            other weights than those that the update computes with.
    """
    return 0 if merged and adapted_below else depth


class AdaptersBelow:
    """The adapters of ``layers[:depth]`` and of everything outside the layers."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, depth: int):
        # All that adapters change but the upper layers, and the heads, which read what comes out
        above = {id(module) for layer in layers[depth:] for module in layer.modules()}
        self.modules = [
            module
            for name, module in model.named_modules()
            if issubclass(type(module), (BaseTunerLayer, AuxiliaryTrainingWrapper))
            and id(module) not in above
            and name.rpartition(".")[2] != "score"
        ]
        # What was found of pairs of adapters, and of which state of them
        self._known: dict[tuple[str | None, str | None], bool] = {}
        self._known_tensors: list[Tensor] = []
        self._known_state: list[object] = []

    def same(self, one: str | None, other: str | None) -> bool:
        """Return whether two adapters (None: none) compute the same there, bit for bit.

        Comparing reads each of them from the device. Where all stand still, they are compared once
        for each pair, and again after a tensor was written to or exchanged, or a scaling was set.
        """
        if one == other:
            return True
        tensors = [x for module in self.modules for x in (*module.parameters(), *module.buffers())]
        # Fused optimizers, torch's and bitsandbytes', write past the count of a tensor's versions
        if any(x.requires_grad for x in tensors):
            return self._compare(one, other)
        state: list[object] = [(x._version, x.data_ptr()) for x in tensors]
        state += [dict(module.scaling) for module in self.modules if isinstance(module, LoraLayer)]
        # By identity: tensors compare their numbers
        stand = len(tensors) == len(self._known_tensors) and all(map(is_, tensors, self._known_tensors))
        if not stand or state != self._known_state:
            self._known, self._known_tensors, self._known_state = {}, tensors, state
        if (one, other) not in self._known:
            self._known[one, other] = self._compare(one, other)
        return self._known[one, other]

    def _compare(self, one: str | None, other: str | None) -> bool:
        pairs = ((_effect(module, one), _effect(module, other)) for module in self.modules)
        return all(_alike(*pair) for pair in pairs)


def _effect(module: Any, adapter: str | None) -> dict[str, Tensor]:
    """Return what ``adapter`` adds to a module, by names of its tensors.

    Nothing where it has none there, or its product is 0.
    """
    if adapter is None:
        return {}
    # All its tensors by their names within the module, whatever holds them
    factors = {
        of_another(f"module.{name}", adapter, "adapter"): p
        for name, p in (*module.named_parameters(), *module.named_buffers())
        if belongs_to(f"module.{name}", adapter)
    }
    indices = getattr(getattr(module, "token_adapter", module), "token_indices", {}).get(adapter)
    if indices is not None:
        factors["token_indices"] = torch.tensor(indices)
    if not factors or not isinstance(module, LoraLayer):
        return factors
    # A variant such as DoRA has more, and changes the layer even where the product is 0
    plain = len(factors) == 2 and adapter not in module.lora_variant
    if plain and any(not factor.any() for factor in factors.values()):
        return {}
    scaling = torch.tensor(float(module.scaling[adapter]), dtype=torch.float64)
    variant = module.lora_variant.get(adapter)
    return factors | {"scaling": scaling, f"as {type(variant).__name__}": scaling}


def _alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(factor, other[name]) for name, factor in one.items()
    )


# A layer's modules that treat each position by itself, as Llama, Qwen, Mistral and others name them
BY_POSITION = ("q_proj", "o_proj", "mlp")


def by_position(layer: nn.Module) -> tuple[nn.Module, ...]:
    """Return the modules of a layer that treat each position by itself."""
    return tuple(module for name, module in layer.named_modules() if name.rpartition(".")[2] in BY_POSITION)


@contextmanager
def only_columns(modules: Sequence[nn.Module], columns: int | Tensor | None) -> Iterator[None]:
    """Compute correct states (B, L, H) of a layer in some columns only.

    They are exact in the last ``columns`` ones, or in one of each row (B,); None stands for all.
    ``modules`` are those of ``by_position``.
    """
    if columns is None:
        yield
        return
    found = list(modules)
    spared = _at_the_end if isinstance(columns, int) else _in_one
    with patched_forward(found, [partial(spared, module.forward, columns) for module in found]):
        yield


# Zeros stand for columns that nobody reads


def _at_the_end(forward: Callable[..., Any], columns: int, x: Tensor) -> Tensor:
    rest = x.shape[1] - columns
    return forward(x) if rest <= 0 else F.pad(forward(x[:, rest:].contiguous()), (0, 0, rest, 0))


def _in_one(forward: Callable[..., Any], columns: Tensor, x: Tensor) -> Tensor:
    rows = torch.arange(len(x), device=x.device)
    read = forward(x[rows, columns].unsqueeze(1))
    states = read.new_zeros(*x.shape[:2], read.shape[-1])
    states[rows, columns] = read.squeeze(1)
    return states
