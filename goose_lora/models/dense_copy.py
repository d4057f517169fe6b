"""A dense copy of one role's model for rollouts: weights dequantized, the adapter merged.

Most of a decoding step on a quantized base is dequantization, and unmerged adapters triple the
number of matrix products. Embeddings, norms and whatever else is neither quantized nor adapted stay
the base's own tensors: only the matrices of its layers take memory.
"""

import copy
import logging
from typing import Any, Literal

import psutil
import torch
from accelerate import init_empty_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from goose_lora.errors import UserError
from goose_lora.models import role_checks, role_outputs
from goose_lora.models.host_embeddings import HostEmbedding
from goose_lora.models.role_outputs import output_head
from goose_lora.models.roles import ADAPTERS, Role
from goose_lora.models.shared_base import SharedBase

logger = logging.getLogger(__name__)

RolloutWeights = Literal["auto", "shared", "dense"]
SHARE_OF_FREE_MEMORY = 0.5  # the rest is for cache and activations
_BLOCK = 64  # columns by which a static cache grows


class DenseCopy:
    """A transformers model that takes the weights of one role after another.

    It is in the base's dtype; what is merged, in ``dtype``.

    Raises:
        UserError: the adapters are of a kind that is not a sum of two matrices.
    """

    def __init__(self, shared: SharedBase, dtype: torch.dtype | None = None):
        self.shared = shared
        core = shared.core
        # Only what is known to be a sum of two matrices can be merged
        odd = unmergeable(shared)
        if odd:
            raise UserError(f"a merged copy of the weights takes plain LoRA only, and here is {odd}.")
        # An empty model of the same class, without quantization
        config = copy.deepcopy(core.config)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        merged = dtype or output_head(core).weight.dtype
        with init_empty_weights(include_buffers=False):
            self.model: Any = type(core)._from_config(
                config, dtype=merged, attn_implementation=config._attn_implementation
            )
        # Its parameters are the base's own tensors, or dense matrices in their place
        self._adapted: list[tuple[Any, Tensor]] = []
        for name, module in list(self.model.named_modules()):
            source = core.get_submodule(name)
            if isinstance(source, HostEmbedding):
                self.model.set_submodule(name, source)
            else:
                self._fill(module, source, merged)
        # Buffers, such as rotary frequencies, that no checkpoint holds
        for name, buffer in self.model.named_buffers():
            buffer.data = core.get_buffer(name).data
        self.model.generation_config = copy.deepcopy(core.generation_config)
        self.model.requires_grad_(False).eval()

    def _fill(self, module: nn.Module, source: Any, dtype: torch.dtype) -> None:
        """Give ``module`` the parameters of ``source``.

        They are the same tensors, except for matrices that are quantized or adapted.
        """
        adapted = isinstance(source, LoraLayer)
        inner: Any = source.get_base_layer() if adapted else source
        # GPT-2's (in, out), of which bitsandbytes makes (out, in)
        turned = isinstance(module, Conv1D) and not isinstance(inner, Conv1D)
        for name, _ in list(module.named_parameters(recurse=False)):
            parameter = getattr(inner, name)
            if name == "weight" and (adapted or _is_quantized(inner)):
                weight = torch.empty(_shape(inner), dtype=dtype, device=parameter.device)
                parameter = nn.Parameter(weight.T.contiguous() if turned else weight, requires_grad=False)
                weight = parameter.data.T if turned else parameter.data
                if adapted:
                    self._adapted.append((source, weight))
                else:
                    weight.copy_(_dense_weight(inner))
            setattr(module, name, parameter)

    @torch.no_grad()
    def merge_role(self, role: Role) -> PreTrainedModel:
        """Merge ``role`` into the copy, and return the transformers model.

        It is merged anew each time, since adapters train.

        The sum is taken in fp32 and rounded once to the model's dtype.
        """
        adapter = ADAPTERS.get(role) if self.shared.has(role) else None
        for source, merged in self._adapted:
            weight = _dense_weight(source.get_base_layer())
            if adapter in source.lora_A or adapter in source.lora_embedding_A:
                weight = weight.float() + source.get_delta_weight(adapter).float()
            merged.copy_(weight)
        return self.model

    @torch.no_grad()
    def gap(self, role: Role) -> tuple[float, float]:
        """Merge ``role`` and compare a few log-probabilities with the role's own forward.

        Returns:
            The mean difference in nats, and what rounding allows.
        """
        with self.shared.role(role, generating=True) as core:
            wanted = role_checks.own_answer(core)
        with role_outputs.autocast(self.shared.core):
            logits = self.merge_role(role)(input_ids=wanted.ids, use_cache=False).logits[0]
        gap = (logits.to(wanted.logits.dtype).log_softmax(-1) - wanted.logits.log_softmax(-1)).abs().mean()
        # The copy may be in a narrower dtype than the base
        allowed = max(role_checks.tolerance(own) for own in (wanted.logits, logits))
        return gap.item(), allowed

    def require_same(self, role: Role) -> None:
        """Raise UserError unless the merged copy of ``role`` says what the role says."""
        gap, allowed = self.gap(role)
        if not gap <= allowed:
            raise UserError(
                f"the merged copy of {type(self.shared.core).__name__} is {gap:.3g} nats a token away from"
                f" the role {role} (allowed {allowed:.2g}), another model. Use the adapter on its base."
            )


def takes_dense_copy(wanted: RolloutWeights, *, need: float, free: float) -> bool:
    """Return whether rollouts take a dense copy of ``need`` bytes where ``free`` bytes are free.

    ``auto`` takes one that needs no more than half of the free memory.
    """
    return wanted == "dense" or (wanted == "auto" and need <= SHARE_OF_FREE_MEMORY * free)


def make_dense_copy(shared: SharedBase, wanted: RolloutWeights) -> DenseCopy | None:
    """Make a dense copy if ``wanted`` is ``dense``, or ``auto`` and memory allows it.

    Raises:
        ValueError: ``dense``, but the adapters are of a kind that is not a sum of two matrices, or
            the copy does not say what the policy says.
    """
    if wanted == "shared":
        return None
    # Only a sum of two matrices can be merged
    odd = unmergeable(shared)
    if odd and wanted == "dense":
        raise UserError(
            f"rollout_weights: dense merges plain LoRA only, and here is {odd}. Use rollout_weights: shared."
        )
    if odd:
        return None
    # Only what fits is made
    need, free = dense_bytes(shared), free_bytes(shared.device)
    if not takes_dense_copy(wanted, need=need, free=free):
        logger.info(
            "rollouts use the shared weights: a dense copy takes %.1f GB and %.1f GB are free",
            need / 1e9,
            free / 1e9,
        )
        return None
    # And only one that says what the role says is used
    copied = DenseCopy(shared)
    gap, allowed = copied.gap("policy")
    if gap <= allowed:
        return copied
    name = type(shared.core).__name__
    if wanted == "dense":
        raise UserError(
            f"rollout_weights: dense: the merged copy of {name} is {gap:.3g} nats a token away from the"
            f" policy (allowed {allowed:.2g}). Use rollout_weights: shared."
        )
    logger.warning("rollouts use the shared weights: a merged copy of %s is not the same model", name)
    return None


def why_not_compiled(model: PreTrainedModel) -> str | None:
    """Say why a model's decoding cannot be compiled to a graph; None where it can."""
    if not model._can_compile_fullgraph:
        return f"transformers does not say that {type(model).__name__} can be"
    if any(isinstance(module, HostEmbedding) for module in model.modules()):
        return "the input embeddings are on the host (embeddings: host)"
    return None


def whole_columns(columns: int) -> int:
    """Return the columns of a static cache for so many tokens: whole blocks.

    Each other size is compiled anew.
    """
    return -(-columns // _BLOCK) * _BLOCK


def unmergeable(shared: SharedBase) -> str | None:
    """Return the name of a part of the adapters that no merged copy can hold; None without any."""
    for name, module in shared.named_modules():
        if isinstance(module, LoraLayer):
            if module.lora_variant:
                return f"{type(next(iter(module.lora_variant.values()))).__name__} on {name}"
            if isinstance(module, ParamWrapper):
                return f"LoRA on the parameter {module.parameter_name} of {name} (target_parameters)"
            if any(module.lora_bias.values()):
                return f"lora_bias on {name}"
        # Whole modules and tokens that an adapter replaces; heads are no part of a copy
        replaced = isinstance(module, AuxiliaryTrainingWrapper) and not name.endswith(".score")
        if replaced or isinstance(module, TrainableTokensLayer):
            return f"{name} as an adapter's own ({type(module).__name__})"
    return None


def dense_bytes(shared: SharedBase) -> int:
    """Return the bytes that a dense copy adds: quantized and adapted matrices, in its dtype."""
    core = shared.core
    # Each matrix once, be it quantized, adapted or both
    adapted = [module.get_base_layer() for module in core.modules() if isinstance(module, LoraLayer)]
    inner = {id(layer): layer for layer in adapted}
    inner |= {
        id(module): module
        for module in core.modules()
        if _is_quantized(module) and not isinstance(module, LoraLayer)
    }
    numbers = sum(_shape(layer).numel() for layer in inner.values())
    return numbers * output_head(core).weight.element_size()


def free_bytes(device: torch.device) -> int:
    """Return the memory that can be had now on ``device``."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _dense_weight(layer: Any) -> Tensor:
    # PEFT's dequantize_module_weight also replaces the layer's weight, and an int8 one on a CPU
    # then lacks its scales.
    if not _is_quantized(layer):
        return layer.weight
    return dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None))


def _shape(layer: Any) -> torch.Size:
    state = getattr(layer.weight, "quant_state", None)
    return layer.weight.shape if state is None else state.shape


def _is_quantized(module: nn.Module) -> bool:
    return type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params")
