"""Which kinds of LoRA adapters can be a role, judged by configuration and tensor names.

What is not known is refused by name. PiSSA and OLoRA start from a principal part W' of the base's
weights, which PEFT takes out of the base: an adapter trained to BA stands for W + BA - W', a plain
LoRA adapter of twice the rank on the base as it is.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import cast

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from goose_lora.errors import UserError
from goose_lora.models.folders import AdapterFolder

# Settings that PEFT loads exactly on a base that others share
_EXACT = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
    # Of how a start was found, which the saved tensors hold; and of how much is done at once
    "corda_config",
    "eva_config",
    "loftq_config",
    "megatron_core",
    "qalora_group_size",
}
_SUBTRACTED = ("pissa", "olora")  # whose start can be found again from the base's weights
_HARMLESS = (True, False, "gaussian", "eva", "orthogonal")
_WAY_OUT = (
    "Train one of plain LoRA, or merge it into the base with PEFT's merge_and_unload and use that base."
)
# Factors of LoRA on embeddings, (r, words) and (features, r), and which dimension is the rank
OF_EMBEDDINGS = {".lora_embedding_A": 0, ".lora_embedding_B": 1}
_KNOWN_TENSORS = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_B.bias",
    *OF_EMBEDDINGS,
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
    ".token_adapter.trainable_tokens_delta",
)


def require_known(adapter: AdapterFolder) -> None:
    """Refuse an adapter whose configuration says something that a role cannot be exactly.

    Raises:
        UserError: a setting, or a start of the weights, that is not known to be exact.
    """
    config, where = adapter.config, f"{adapter.setting}: {adapter}"
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{where} was trained with bias={config['bias']!r}, which changes the base's own biases, and"
            " roles share those. Train it with bias='none'."
        )
    # A value that is off, be it None, False or empty, says nothing
    defaults = {f.name: f.default for f in fields(LoraConfig) if f.default is not MISSING}
    odd = {
        name: value
        for name, value in config.items()
        if name not in _EXACT and value and name != "bias" and value != defaults.get(name)
    }
    if odd:
        name, value = next(iter(odd.items()))
        raise UserError(
            f"{where}: its configuration has {name}={value!r}, which a role on a shared base cannot be"
            f" exactly. {_WAY_OUT}"
        )
    # How the training began, where that has changed the base
    start = config.get("init_lora_weights", True)
    if start not in (*_HARMLESS, *_SUBTRACTED):
        raise UserError(
            f"{where} was trained from init_lora_weights={start!r}, which changes the base's weights. Save it"
            " with save_pretrained(FOLDER, path_initial_model_for_weight_conversion=START), or train one from"
            " init_lora_weights=True."
        )


def require_harmless_start(config: LoraConfig) -> None:
    """Refuse a fresh adapter whose start would change the base that all roles share."""
    if config.init_lora_weights not in _HARMLESS:
        raise UserError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base's weights, which all roles"
            " share. Use True, gaussian or orthogonal."
        )


def require_dequantizable(use_dora: bool, where: str, *, int8_on_cpu: bool) -> None:
    """Refuse DoRA on int8 weights that are on a CPU.

    DoRA takes the norm of the dequantized weights, and PEFT's dequantization of an int8 layer on a
    CPU leaves it without its scales.
    """
    if use_dora and int8_on_cpu:
        raise UserError(
            f"{where} has use_dora, which PEFT cannot compute from int8 weights on a CPU. Set quantization:"
            " nf4 or none."
        )


def known_tensor(name: str) -> bool:
    """Return whether the tensor ``name`` of an adapter is of a kind that a role can have."""
    return name.endswith(_KNOWN_TENSORS)


def kept_base(name: str) -> bool:
    """Return whether PEFT has saved the base's own ``name`` beside an embedding's LoRA."""
    return name.endswith(".base_layer.weight")


def plain_config(adapter: AdapterFolder) -> LoraConfig:
    """Return PEFT's configuration of an adapter that puts it on a base and leaves the base alone.

    Raises:
        UserError: as ``require_known``.
    """
    require_known(adapter)
    config = adapter.lora_config()
    if config.init_lora_weights in _SUBTRACTED:
        # Twice the rank at the same scaling
        growth = math.sqrt(2) if config.use_rslora else 2
        config.r *= 2
        config.lora_alpha = config.lora_alpha * growth  # type: ignore[assignment]
        config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
        alphas = config.alpha_pattern or {}
        config.alpha_pattern = {name: alpha * growth for name, alpha in alphas.items()}
    # The saved tensors take the place of any start
    config.init_lora_weights = True
    return config


def as_plain(
    weights: Mapping[str, Tensor], adapter: AdapterFolder, model: PeftModel, role_name: str
) -> dict[str, Tensor]:
    """Return an adapter's tensors with its start subtracted, where it took that out of its base.

    Args:
        role_name: PEFT's name of the adapter on ``model``, which has ``plain_config``.

    Raises:
        UserError: the base is quantized, so that the start cannot be found again, or PEFT's start
            has left factors that PEFT itself cannot run.
    """
    plain = dict(weights)
    start = adapter.config.get("init_lora_weights", True)
    if start not in _SUBTRACTED:
        return plain
    config, core = adapter.lora_config(), cast(nn.Module, model.get_base_model())
    for name in [name for name in weights if name.endswith(".lora_A.weight")]:
        place = name.removesuffix(".lora_A.weight")
        twin = f"{place}.lora_B.weight"
        module = cast(LoraLayer, core.get_submodule(place.removeprefix("base_model.model.")))
        inner = module.get_base_layer()
        weight = cast(Tensor, inner.weight)
        if not torch.is_floating_point(weight):
            raise UserError(
                f"{adapter.setting}: {adapter} was trained from init_lora_weights={start!r}, and its start"
                " cannot be found again in a quantized base. Set quantization: none, or save the adapter with"
                " save_pretrained(FOLDER, path_initial_model_for_weight_conversion=START)."
            )
        # A Conv1D keeps its matrix transposed, which PEFT's OLoRA does not look at
        swapped = start == "olora" and isinstance(inner, Conv1D)
        if swapped and len(set(weight.shape)) > 1:
            raise UserError(
                f"{adapter.setting}: {adapter} was trained from init_lora_weights='olora' on {place}, whose"
                " weight is transposed (Conv1D): PEFT swaps the sides of its factors there, and cannot run it"
                " either. Train one from init_lora_weights=True or 'pissa'."
            )
        # PEFT's own start of this one matrix, on a copy of it
        rank = len(weights[name])
        alone = LoraConfig(
            r=rank,
            lora_alpha=module.scaling[role_name] * rank,
            target_modules=["only"],
            init_lora_weights=start,
            fan_in_fan_out=config.fan_in_fan_out,
        )
        holder = inject_adapter_in_model(alone, nn.ModuleDict({"only": copy.deepcopy(inner)}))
        started = cast(LoraLayer, holder.get_submodule("only"))
        factor_a, factor_b = (
            cast(nn.Linear, part["default"]).weight.detach() for part in (started.lora_A, started.lora_B)
        )
        # What it took out of a square transposed matrix is not what its factors then add
        if swapped:
            factor_a, factor_b = factor_b.T, factor_a.T
        # The start with its sign turned, beside what was trained
        plain[name] = torch.cat([weights[name], factor_a.to(weights[name])])
        plain[twin] = torch.cat([weights[twin], -factor_b.to(weights[twin])], dim=1)
    # Of embeddings PEFT takes nothing out: what is beside their factors is 0
    for part, dim in OF_EMBEDDINGS.items():
        for name in [name for name in weights if name.endswith(part)]:
            plain[name] = torch.cat([weights[name], torch.zeros_like(weights[name])], dim=dim)
    return plain
