"""A base and its adapters as shapes: what is adapted, how large it is, and how many bytes it takes.
No weights are read.

The model is built on torch's meta device, where tensors have shapes and no memory, and its
parameters are counted there.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from goose_lora.models.adapters import adapter_config
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.loading import lora_config
from goose_lora.models.roles import RolePlan
from goose_lora.models.trunk import decoder_layers, top_layers
from goose_lora.ppo.config import PPOConfig

FP32 = 4


@dataclass(frozen=True)
class Linear:
    """A linear layer inside the decoder: its full name, the index of its layer, and the numbers of
    features."""

    name: str
    layer: int
    inputs: int
    outputs: int

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def in_attention(self) -> bool:
        return "att" in self.parent.lower()


@dataclass(frozen=True)
class Model:
    """The base as shapes."""

    linears: tuple[Linear, ...]
    other_parameters: int  # embeddings, norms, biases, and the head where it is not tied
    norms: int  # features that the norms of one layer see of a token
    layers: int
    hidden: int
    states: int  # features of the last hidden states, which the heads read; OPT may project them
    heads: int
    queries: int  # features of all heads
    keys: int  # features of all key-value heads
    vocabulary: int
    compute: int  # bytes of a number in the base's dtype
    quantization: str
    fused_attention: bool  # no attention probabilities are kept
    # PEFT casts the input of each bf16 linear to fp32, and autocast each back, one copy a linear.
    # Quantized layers go without, except on a CPU: PEFT 0.21 asks whether autocast is on for CUDA.
    casts: bool

    @property
    def weights(self) -> int:
        return sum(linear.inputs * linear.outputs for linear in self.linears)

    @property
    def base(self) -> int:
        """Bytes of the frozen base. nf4 has a byte of scale for 64 numbers, and 4 for 256 scales;
        int8 a float for each row."""
        quantized = {
            "none": self.weights * self.compute,
            "int8": self.weights + sum(FP32 * linear.outputs for linear in self.linears),
            "nf4": (
                math.ceil(self.weights * (1 / 2 + 1 / 64 + FP32 / 64 / 256))
                + len(self.linears) * FP32 * (16 + 256)
            ),
        }[self.quantization]
        return quantized + self.other_parameters * self.compute

    @property
    def largest_weight(self) -> int:
        """Bytes of the largest dequantized matrix, which quantized layers make and drop; nothing
        where they are not quantized."""
        return (
            0
            if self.quantization == "none"
            else max(x.inputs * x.outputs for x in self.linears) * self.compute
        )

    @property
    def wide(self) -> int:
        """Features of the widest point of a layer, inside the feed-forward part."""
        return max(linear.inputs for linear in self.linears if not linear.in_attention)


@dataclass(frozen=True)
class Adapter:
    """A role's LoRA matrices: which linears, and each one's rank. ``head``: features that its
    scalar head reads, 0 without one.

    ``trained``: parameters in the layers that train, the lowest of which is ``trained_from``.
    """

    ranks: dict[str, int]
    parameters: int
    lowest_layer: int
    trained: int
    trained_from: int
    head: int = 0


@dataclass(frozen=True)
class Roles:
    """The adapters of a run; None where a role has none of its own."""

    policy: Adapter
    value: Adapter | None
    reward: Adapter | None
    plan: RolePlan
    value_copies_policy: bool = False

    @property
    def trained(self) -> int:
        """Parameters that train."""
        return sum(a.trained + a.head for a in (self.policy, self.value) if a is not None)

    @property
    def bytes(self) -> int:
        own = sum(a.parameters + a.head for a in (self.policy, self.value, self.reward) if a is not None)
        return FP32 * (own + self.plan.policy_copies * self.policy.parameters)

    @property
    def trunks(self) -> int:
        """How many outputs of lower layers a rollout keeps: the policy's, and the critic's where
        its adapter is not the same below."""
        policy, value = self.policy, self.value
        if value is None or not value.ranks:
            return int(policy.trained_from > 0)
        bare = min(policy.lowest_layer, value.lowest_layer) >= policy.trained_from == value.trained_from
        alike = policy.trained_from == value.trained_from and (bare or self.value_copies_policy)
        return int(policy.trained_from > 0) + int(value.trained_from > 0 and not alike)


def read_model(core: Any, args: ModelArguments, device: str) -> Model:
    """Count the parameters of a transformers model by kind; ``device`` is where it will run, cuda
    or cpu."""
    layers, config = decoder_layers(core), core.config.get_text_config()
    names = {id(module): name for name, module in core.named_modules()}
    linears = []
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                shape = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
                linears.append(Linear(names[id(module)], index, shape[1], shape[0]))
    settings = config.to_dict()  # not every family has each of these
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = settings.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, (settings.get("num_key_value_heads") or heads) * head_dim
    total = sum(parameter.numel() for parameter in core.parameters())
    return Model(
        tuple(linears),
        total - sum(linear.inputs * linear.outputs for linear in linears),
        sum(_norm_width(name, module, hidden, queries, keys) for name, module in layers[0].named_modules()),
        len(layers),
        hidden,
        core.get_output_embeddings().weight.shape[1],
        heads,
        queries,
        keys,
        core.get_output_embeddings().weight.shape[0],
        args.torch_dtype.itemsize,
        args.quantization,
        config._attn_implementation != "eager",
        args.torch_dtype.itemsize < FP32 and (args.quantization == "none" or device == "cpu"),
    )


def _norm_width(name: str, module: nn.Module, hidden: int, queries: int, keys: int) -> int:
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1:
        return 0
    return hidden if weight.numel() == hidden else keys if "k_" in name.rpartition(".")[2] else queries


def read_adapter(
    config: LoraConfig, model: Model, *, train_layers: str = "all", head: bool = False
) -> Adapter:
    """Which linears a LoRA configuration adapts, by PEFT's own rule."""
    first = top_layers(train_layers, model.layers, "train_layers")[0]
    ranks = {x.name: int(config.r) for x in model.linears if check_target_module_exists(config, x.name)}
    for name in ranks:
        own = [rank for pattern, rank in (config.rank_pattern or {}).items() if name.endswith(pattern)]
        ranks[name] = own[0] if own else ranks[name]
    chosen = [x for x in model.linears if x.name in ranks]
    sizes = {x: ranks[x.name] * (x.inputs + x.outputs) for x in chosen}
    trained = sum(size for x, size in sizes.items() if x.layer >= first)
    lowest = min((x.layer for x in chosen), default=model.layers)
    return Adapter(
        ranks, sum(sizes.values()), lowest, trained, max(lowest, first), model.states if head else 0
    )


def is_trained(folder: str) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def read_roles(
    core: Any,
    model: Model,
    args: ModelArguments,
    config: PPOConfig,
    policy: str | None = None,
    reward: str | None = None,
) -> Roles:
    """The roles that recipes/ppo.py puts on the base, as ``SharedBase.build`` does. An adapter that
    is not trained yet counts as the settings say."""

    def config_of(folder: str | None) -> LoraConfig:
        return adapter_config(folder) if folder and is_trained(folder) else lora_config(args, core)

    ours = read_adapter(config_of(policy), model, train_layers=config.train_layers)
    judge = (
        read_adapter(config_of(reward), model, train_layers=config.train_layers, head=True)
        if reward
        else None
    )
    plan, value = config.role_plan(has_policy=policy is not None, has_reward=judge is not None), None
    if plan.critic is not None:
        start = judge if judge is not None and plan.value_source == "reward" else ours
        none = Adapter({}, 0, model.layers, 0, model.layers)
        value = replace(start if plan.critic == "adapter" else none, head=model.states)
    copied = config.critic_init == "policy" or (judge is None and config.critic_init != "zero")
    return Roles(ours, value, judge, plan, copied)
