"""What Python costs beside arithmetic: operators a decoded token and a microbatch, and CPU seconds.

    python benchmarks/operators.py

A model of 28 small layers in bfloat16, in which almost all time is overhead, as on a GPU. Operators
are those that reach torch's dispatcher, views left out: on a GPU about as many launches, but for
those inside the model of a compiled rollout, which are one. CPU seconds are of forward and backward
of one microbatch, one thread, the best of five.
"""

import argparse
import tempfile
import time
from collections import Counter
from typing import Any

import torch
from memory import words
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from goose_lora.generation.sampling import generation_config, sample
from goose_lora.generation.static_cache import StaticCache
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.dense_copy import DenseCopy
from goose_lora.models.loading import load_base, load_tokenizer, lora_config
from goose_lora.models.shared_base import SharedBase

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 28,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 128,
    "vocab_size": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VIEWS = {
    *("view", "_unsafe_view", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select"),
    *("detach", "permute", "alias", "split", "as_strided", "reshape", "split_with_sizes", "unbind"),
    *("_reshape_alias", "lift_fresh"),
}


class Operators(TorchDispatchMode):
    """Counts the operators inside, views left out, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    def total(self) -> int:
        return sum(number for name, number in self.counts.items() if name not in VIEWS)


def decoding(shared: SharedBase, dense: DenseCopy | None, static: StaticCache | None) -> tuple[float, float]:
    """Return operators a token, and those outside the model."""
    ids = torch.randint(3, 2000, (4, 8))
    model: Any = dense.model if dense else shared.core
    seen: dict[int, tuple[int, int]] = {}
    for tokens in (4, 12):
        config = generation_config(
            response_tokens=tokens, temperature=1.0, eos_token_ids=[2047], pad_token_id=0
        )
        inside: list[int] = []
        with Operators() as counted:
            hooks = (
                model.register_forward_pre_hook(
                    lambda *_, inside=inside, counted=counted: inside.append(-counted.total())
                ),
                model.register_forward_hook(
                    lambda *_, inside=inside, counted=counted: inside.append(counted.total())
                ),
            )
            sample(shared, ids, torch.ones_like(ids), config, dense=dense, static=static)
        for hook in hooks:
            hook.remove()
        seen[tokens] = counted.total(), counted.total() - sum(inside)
    return (seen[12][0] - seen[4][0]) / 8, (seen[12][1] - seen[4][1]) / 8


def update(shared: SharedBase) -> str:
    """Return operators and CPU seconds of forward and backward of one microbatch, in words."""
    shared.train()
    ids, mask = torch.randint(3, 2000, (2, 48)), torch.ones(2, 16, dtype=torch.bool)
    seconds: list[tuple[float, float]] = []
    counts: list[int] = []
    for run in range(6):
        with Operators() if run == 0 else torch.enable_grad() as counted:
            started = time.process_time()
            output = shared(ids, torch.ones_like(ids), mask)
            forward = time.process_time()
            counts.append(counted.total() if isinstance(counted, Operators) else 0)
            (output.logprobs.sum() + output.values.sum()).backward()
            seconds.append((forward - started, time.process_time() - forward))
            counts.append(counted.total() if isinstance(counted, Operators) else 0)
    best = [min(column) for column in zip(*seconds[1:], strict=True)]
    return (
        f"forward {counts[0]} operators, backward {counts[1] - counts[0]}; CPU seconds {best[0]:.3f} and"
        f" {best[1]:.3f}"
    )


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.for_model("qwen3", **SHAPE)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        words(2048).save_pretrained(folder)
        for quantization in ("none", "nf4"):
            arguments = ModelArguments(folder, quantization=quantization, dtype="bfloat16")  # type: ignore[arg-type]
            base = load_base(arguments, load_tokenizer(arguments), device=torch.device("cpu"))
            shared = SharedBase.build(base, lora_config(arguments, base), critic="adapter")
            dense = DenseCopy(shared)
            dense.merge_role("policy")
            for name, copied, static in (
                ("shared weights", None, None),
                ("dense copy", dense, None),
                ("dense copy, static cache", dense, StaticCache()),
            ):
                every, outside = decoding(shared, copied, static)
                print(
                    f"{quantization}, {name}: {every:.0f} operators a token, {outside:.0f} outside the model"
                )
            print(f"{quantization}, update: {update(shared)}", flush=True)
            shared.gradient_checkpointing_enable()
            print(f"{quantization}, update, checkpointing: {update(shared)}", flush=True)


if __name__ == "__main__":
    main()
