"""4-bit and 8-bit weights: bitsandbytes' configuration, and what keeps them trainable on a CPU."""

import math
import time
from typing import Any

import torch
from torch import nn
from transformers import (
    BitsAndBytesConfig,
)

from goose_lora.models.arguments import ModelArguments


def cpu_multiplies_bf16() -> bool:
    """Return whether this CPU has instructions for bfloat16.

    A product then takes no longer than twice that in float32. It is tried, in 0.1 s or so.

    Without them (x86 without AVX512-BF16 or AMX) it is done in software: 8 times slower forward and
    40 times backward, where it was measured.
    """
    # The best of several tries of each: a slow try tells of other work
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other on a busy machine tell nothing
    try:
        for _ in range(8):  # in turns, so that other work on the machine slows both
            for dtype in best:
                x, weight = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
                started = time.perf_counter()
                torch.mm(x, weight)
                best[dtype] = min(best[dtype], time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return best[torch.bfloat16] <= 2 * best[torch.float32]


def quantization_config(args: ModelArguments) -> BitsAndBytesConfig | None:
    """Return the settings of bitsandbytes.

    int8 goes without its outlier columns: which they are is decided over the whole batch, padding
    included, so that a row's log-probabilities would depend on its batch-mates (by up to 2.9 nats
    on SmolLM2-135M), and with them PPO's ratios.
    """
    # As QLoRA has it: normal floats, and scales quantized in their turn
    if args.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=args.torch_dtype,
        )
    return (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0) if args.quantization == "int8" else None
    )


def keep_4bit_trainable_on_cpu(model: nn.Module) -> None:
    """Keep 4-bit layers in the form that has gradients.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a layer at its first forward in evaluation
    mode, for good, into a form without autograd: LoRA gradients are then missing or wrong, without
    an error. Repacking is only for speed.
    """
    for layer in _layers_of_kind(model, "Linear4bit"):
        layer.support_avx512bf16_for_cpu = False


def compute_4bit_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let 4-bit layers compute in the run's dtype: a base that was saved so brings its own."""
    for layer in _layers_of_kind(model, "Linear4bit"):
        layer.compute_dtype, layer.compute_type_is_set = dtype, True


def keep_8bit_alike_on_cpu(model: nn.Module) -> None:
    """Compute 8-bit layers in evaluation mode as in training mode.

    On a CPU, bitsandbytes 0.50 multiplies by dequantized weights in training mode, and rounds
    activations to int8 too in evaluation mode: log-probabilities of rollout and update differ by
    0.2 nats. The state of a layer, which its forward tells the mode, stays in training.
    """
    for layer in _layers_of_kind(model, "Linear8bitLt"):
        # A property in a class of its own, since the forward sets the mode each time
        if layer.weight.device.type == "cpu":
            state = type(layer.state)
            layer.state.__class__ = type(
                state.__name__,
                (state,),
                {"is_training": property(lambda self: True, lambda self, mode: None)},
            )


def _layers_of_kind(model: nn.Module, kind: str) -> list[Any]:
    # By name: bitsandbytes is not imported where nothing is quantized
    return [module for module in model.modules() if type(module).__name__ == kind]
