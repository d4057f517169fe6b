"""A base and its adapters as shapes: what is adapted, how large it is, how many bytes it takes.

No weights are read. The model is built on torch's meta device, where tensors have shapes and no
memory, and its parameters are counted there.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from goose_lora.errors import UserError
from goose_lora.models.adapter_kinds import OF_EMBEDDINGS, kept_base, plain_config
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.compatibility import require_shared_parts
from goose_lora.models.folders import AdapterFolder
from goose_lora.models.host_embeddings import tied
from goose_lora.models.loading import lora_config
from goose_lora.models.roles import RolePlan
from goose_lora.models.trunk import decoder_layers, top_layers
from goose_lora.ppo.config import PPOConfig

FP32 = 4
# What families call the number of experts that read a token, and a layer's experts.
EXPERTS_OF_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
EXPERT = re.compile(r"expert|moe")
# PEFT notes both as own modules of a reward adapter, and a decoder has the first: no copy needs it
_REWARD_HEADS = ("score", "classifier")


@dataclass(frozen=True)
class LinearShape:
    """A linear layer inside the decoder: full name, index of its layer, numbers of features."""

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

    @property
    def numbers(self) -> int:
        """Numbers of its matrix."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """The base as shapes."""

    linears: tuple[LinearShape, ...]
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
    # Mixture of experts: features inside one expert (gate, up and their product), experts that
    # read a token, and layers. They are no linear layers: neither quantized nor adapted.
    expert_features: int = 0
    experts_of_token: int = 0
    layers_of_experts: tuple[int, ...] = ()
    on_host: int = 0  # input embeddings that the device does not keep

    @property
    def weights(self) -> int:
        """Numbers of the decoder's matrices."""
        return sum(linear.numbers for linear in self.linears)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the decoder's matrices in the base's dtype."""
        return self.weights * self.compute

    @property
    def base(self) -> int:
        """Bytes of the frozen base.

        nf4 has a byte of scale for 64 numbers, and 4 for 256 scales; int8 a float for each row.
        """
        quantized = {
            "none": self.dense_bytes,
            "int8": self.weights + sum(FP32 * linear.outputs for linear in self.linears),
            "nf4": (
                math.ceil(self.weights * (1 / 2 + 1 / 64 + FP32 / 64 / 256))
                + len(self.linears) * FP32 * (16 + 256)
            ),
        }[self.quantization]
        return quantized + (self.other_parameters - self.on_host) * self.compute

    @property
    def loaded(self) -> int:
        """Bytes of the base while it is loaded, before the embeddings go to the host."""
        return self.base + self.on_host * self.compute

    @property
    def largest_weight(self) -> int:
        """Bytes of the largest dequantized matrix, which quantized layers make and drop.

        0 where they are not quantized.
        """
        if self.quantization == "none":
            return 0
        return max(linear.numbers for linear in self.linears) * self.compute

    @cached_property
    def wide(self) -> int:
        """Features of the widest point of a layer, inside the feed-forward part."""
        own = max((linear.inputs for linear in self.linears if not linear.in_attention), default=0)
        return max(own, self.expert_features * self.experts_of_token // 3)


@dataclass(frozen=True)
class AdapterShape:
    """A role's LoRA matrices: which linears, and each one's rank."""

    ranks: dict[str, int]
    parameters: int
    lowest_layer: int
    trained: int  # parameters in the layers that train
    trained_from: int  # the lowest of these layers
    head: int = 0  # features that its scalar head reads; 0 without one
    mergeable: bool = True  # whether it is a sum of two matrices everywhere
    embeddings: int = 0  # numbers of the tables that LoRA on embeddings adapts

    @property
    def with_head(self) -> int:
        """Parameters, those of the head included."""
        return self.parameters + self.head


@dataclass(frozen=True)
class RoleShapes:
    """The adapters of a run; None where a role has none of its own."""

    policy: AdapterShape
    value: AdapterShape | None
    reward: AdapterShape | None
    plan: RolePlan
    value_starts_as_policy: bool  # it is the policy's copy, or neither changes anything yet
    members: tuple[AdapterShape, ...] = ()  # further ones of an ensemble of reward models

    @property
    def mergeable(self) -> bool:
        """Whether a dense copy can hold what the adapters are."""
        adapters = (self.policy, self.value, self.reward)
        return all(adapter.mergeable for adapter in adapters if adapter is not None)

    @property
    def trained(self) -> int:
        """Parameters that train."""
        training = (self.policy, self.value)
        return sum(adapter.trained + adapter.head for adapter in training if adapter is not None)

    @property
    def bytes(self) -> int:
        """Bytes of all adapters, copies and heads, in fp32."""
        adapters = (self.policy, self.value, self.reward, *self.members)
        own = sum(adapter.with_head for adapter in adapters if adapter is not None)
        return FP32 * (own + self.plan.policy_copies * self.policy.parameters)

    @property
    def trunks(self) -> int:
        """Number of trunks that a rollout keeps.

        They are the policy's, and the critic's where its adapter is not the same below.
        """
        policy, value = self.policy, self.value
        of_policy = int(policy.trained_from > 0)
        if value is None or not value.ranks:
            return of_policy

        # One trunk serves both where neither adapter changes it, or both change it alike.
        bare = min(policy.lowest_layer, value.lowest_layer) >= policy.trained_from == value.trained_from
        alike = policy.trained_from == value.trained_from and (bare or self.value_starts_as_policy)
        return of_policy + int(value.trained_from > 0 and not alike)


def read_model(core: PreTrainedModel, args: ModelArguments, device: str) -> ModelShape:
    """Count the parameters of a transformers model by kind.

    Args:
        core: the model, on any device.
        device: where it will run, cuda or cpu.

    Raises:
        UserError: a kind of model whose shapes are not those of a decoder of attention and linears.
    """
    try:
        return _model_shape(core, args, device)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"no memory plan of {args.model_name_or_path} ({type(core).__name__}): its shapes are not those"
            f" of a decoder with attention and linear layers ({error}). --force True runs without a plan."
        ) from error


def _model_shape(core: PreTrainedModel, args: ModelArguments, device: str) -> ModelShape:
    layers, config = decoder_layers(core), core.config.get_text_config()
    linears = _linears(core, layers)

    # The head's matrix is (vocabulary, features). Where it is tied, it is the embeddings.
    total = sum(parameter.numel() for parameter in core.parameters())
    vocabulary, states = core.get_output_embeddings().weight.shape  # type: ignore[union-attr]

    # A table that is also the head is not left to the host.
    embeddings, on_host = core.get_input_embeddings().weight, 0
    if args.embeddings == "host":
        if core.get_output_embeddings().weight is embeddings:  # type: ignore[union-attr]
            raise UserError(tied(args.model_name_or_path))
        on_host = 0 if device == "cpu" else embeddings.numel()  # type: ignore[union-attr,operator]

    # Not every family has each of these settings.
    settings = config.to_dict()
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = settings.get("head_dim") or hidden // heads
    queries = heads * head_dim
    keys = (settings.get("num_key_value_heads") or heads) * head_dim
    norms = [_norm_width(name, norm, hidden, queries, keys) for name, norm in layers[0].named_modules()]

    compute = args.torch_dtype.itemsize
    features, number, with_experts = _experts(layers, hidden)
    chosen = next((settings[name] for name in EXPERTS_OF_TOKEN if settings.get(name)), number)
    return ModelShape(
        linears=linears,
        other_parameters=total - sum(linear.numbers for linear in linears),
        norms=sum(norms),
        layers=len(layers),
        hidden=hidden,
        states=states,
        heads=heads,
        queries=queries,
        keys=keys,
        vocabulary=vocabulary,
        compute=compute,
        quantization=args.quantization,
        fused_attention=config._attn_implementation != "eager",
        casts=compute < FP32 and (args.quantization == "none" or device == "cpu"),
        expert_features=features,
        experts_of_token=min(chosen, number),
        layers_of_experts=with_experts,
        on_host=on_host,
    )


def _experts(layers: nn.ModuleList, hidden: int) -> tuple[int, int, tuple[int, ...]]:
    """Return the features inside one expert, the number of experts, and the layers with some.

    transformers keeps a projection of all experts of a layer in one parameter of three dimensions.
    """
    features = number = 0
    found = []
    for index, layer in enumerate(layers):
        stacked = [p for name, p in layer.named_parameters() if p.dim() == 3 and EXPERT.search(name)]
        if stacked:
            # Gate, up and down: each has hidden times its inner features.
            number, found = stacked[0].shape[0], [*found, index]
            features = max(features, sum(p.numel() for p in stacked) // (number * hidden))
    return features, number, tuple(found)


def _linears(core: PreTrainedModel, layers: nn.ModuleList) -> tuple[LinearShape, ...]:
    names = {id(module): name for name, module in core.named_modules()}
    found = []
    for index, layer in enumerate(layers):
        for module in layer.modules():
            # The matrix is (out, in), and GPT-2's Conv1D keeps (in, out).
            if isinstance(module, nn.Linear):
                outputs, inputs = module.weight.shape
            elif isinstance(module, Conv1D):
                inputs, outputs = module.weight.shape
            else:
                continue
            found.append(LinearShape(names[id(module)], index, inputs, outputs))
    return tuple(found)


def _norm_width(name: str, module: nn.Module, hidden: int, queries: int, keys: int) -> int:
    """Return how many features of a token a norm sees; 0 for a module that is no norm."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1:
        return 0
    if weight.numel() == hidden:
        return hidden
    # A norm of one head's width sees each head of the queries or the keys.
    return keys if "k_" in name.rpartition(".")[2] else queries


def read_adapter(
    config: LoraConfig,
    model: ModelShape,
    *,
    train_layers: str = "all",
    head: bool = False,
    tensors: Mapping[str, Sequence[int]] | None = None,
) -> AdapterShape:
    """Return which linears a LoRA configuration adapts, by PEFT's own rule, and what else it has.

    Args:
        tensors: names and shapes of a trained adapter's tensors, which tell what it has besides
            LoRA on linears: whole modules, embeddings, magnitudes, biases, tokens.
    """
    chosen = [linear for linear in model.linears if check_target_module_exists(config, linear.name)]
    ranks = {linear.name: _rank(config, linear.name) for linear in chosen}
    sizes = [(linear.layer, ranks[linear.name] * (linear.inputs + linear.outputs)) for linear in chosen]
    others = _other_tensors(tensors or {}, ranks, model)

    # Of what train_layers leaves out, nothing trains; of all, nothing is below what is in no layer.
    first = top_layers(train_layers, model.layers, "train_layers")[0]
    inside = [(layer, size) for layer, size in sizes + others if layer is not None]
    lowest = min((layer for layer, _ in inside), default=model.layers)
    outside = sum(size for layer, size in others if layer is None)
    everywhere = train_layers == "all" and outside > 0
    trained = sum(size for layer, size in inside if layer >= first) + everywhere * outside
    trained_from = 0 if everywhere else max(lowest, first)
    odd = (config.use_dora, config.lora_bias, config.target_parameters, config.trainable_token_indices)
    whole = set(config.modules_to_save or []) - set(_REWARD_HEADS)
    return AdapterShape(
        ranks=ranks,
        parameters=sum(size for _, size in inside) + outside,
        lowest_layer=0 if outside else lowest,
        trained=trained,
        trained_from=trained_from,
        head=model.states if head else 0,
        mergeable=not any(odd) and not whole,
        embeddings=_adapted_embeddings(tensors or {}),
    )


def _adapted_embeddings(tensors: Mapping[str, Sequence[int]]) -> int:
    """Return the numbers of tables under LoRA."""
    words, features = OF_EMBEDDINGS
    places = [name.removesuffix(words) for name in tensors if name.endswith(words)]
    return sum(tensors[place + words][1] * tensors[place + features][0] for place in places)


def _other_tensors(
    tensors: Mapping[str, Sequence[int]], ranks: Mapping[str, int], model: ModelShape
) -> list[tuple[int | None, int]]:
    """Return layer (None outside of them) and size of all that is no LoRA on a counted linear."""
    found: list[tuple[int | None, int]] = []
    place = model.linears[0].name.partition(f".{model.linears[0].layer}.")[0] if model.linears else ""
    for name, shape in tensors.items():
        # The head is counted by itself, and the base's own matrix is there already
        inner = name.removeprefix("base_model.model.")
        counted = inner.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") in ranks
        if counted or inner.endswith("score.weight") or kept_base(inner):
            continue
        index = inner.removeprefix(f"{place}.").partition(".")[0]
        layer = int(index) if inner.startswith(f"{place}.") and index.isdecimal() else None
        found.append((layer, math.prod(shape)))
    return found


def _rank(config: LoraConfig, name: str) -> int:
    for pattern, rank in (config.rank_pattern or {}).items():
        if name.endswith(pattern):
            return rank
    return int(config.r)


def is_trained(folder: str) -> bool:
    """Return whether ``folder`` holds an adapter already."""
    return (Path(folder) / "adapter_config.json").is_file()


def read_roles(
    core: PreTrainedModel,
    model: ModelShape,
    args: ModelArguments,
    config: PPOConfig,
    policy: AdapterFolder | str | None = None,
    reward: AdapterFolder | str | None = None,
) -> RoleShapes:
    """Return the roles that recipes/ppo.py puts on the base, as ``SharedBase.build`` does.

    An adapter that is not trained yet counts as the settings say.

    Raises:
        UserError: a critic that ``RolePlan.of`` refuses, or an adapter that cannot be a role.
    """
    plan = config.role_plan(has_policy=policy is not None, has_reward=reward is not None)

    def shape_of(setting: str, adapter: AdapterFolder | str | None, *, head: bool) -> AdapterShape:
        if adapter is None or (isinstance(adapter, str) and not is_trained(adapter)):
            fresh = lora_config(args, core)
            return read_adapter(fresh, model, train_layers=config.train_layers, head=head)
        # As it will be on the base: a start that is subtracted takes twice the rank
        folder = AdapterFolder.of(setting, adapter)
        require_shared_parts(folder, core)
        plain, tensors = plain_config(folder), dict(folder.shapes)
        growth = plain.r // folder.lora_config().r
        for part, dim in OF_EMBEDDINGS.items():
            for name in [name for name in tensors if name.endswith(part)]:
                shape = list(tensors[name])
                shape[dim] *= growth
                tensors[name] = shape
        return read_adapter(plain, model, train_layers=config.train_layers, head=head, tensors=tensors)

    adapters = {"policy": shape_of("policy_adapter", policy, head=False)}
    members: tuple[AdapterShape, ...] = ()
    if reward is not None:
        adapters["reward"] = shape_of("reward_adapter", reward, head=True)
        if isinstance(reward, AdapterFolder) or is_trained(reward):
            others = AdapterFolder.of("reward_adapter", reward).members[1:]
            members = tuple(shape_of("reward_adapter", other, head=True) for other in others)

    # The critic has the form of what it copies, or is a head alone.
    value = None
    if plan.critic == "adapter":
        value = replace(adapters[plan.value_source], head=model.states)
    elif plan.critic is not None:
        value = AdapterShape({}, 0, model.layers, 0, model.layers, head=model.states)

    # A fresh adapter changes nothing yet, and what does not train of it never will.
    both_fresh = policy is None and plan.critic_init == "zero"
    return RoleShapes(
        policy=adapters["policy"],
        value=value,
        reward=adapters.get("reward"),
        plan=plan,
        members=members,
        value_starts_as_policy=plan.critic_init == "policy" or both_fresh,
    )
