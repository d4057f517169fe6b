"""What makes a rollout's generation fast: caches, torch.compile, and a dense copy.

A static cache and torch.compile are compared with the growing cache that rollouts use; and, of an
nf4 base with LoRA in all linear layers, a dense copy with the shared weights.

    python benchmarks/generation.py [--dtype float32] [--rows 32] [--tokens 32] [--prompt 32] \\
        [--device cuda] [--of cache|weights]

SmolLM2-135M's shape, or BENCHMARK_SHAPE's, with random weights, greedy, one thread; CPU seconds of
a batch, on a GPU those of the clock, the best of three, and of the first, which compiles. Needs a
C++ compiler for the third case.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from step_common import DTYPES, EOS, PAD, model_config, prompts, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig

from goose_lora.cli import keep_freed_memory
from goose_lora.generation.sampling import generation_config, sample
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.dense_copy import DenseCopy
from goose_lora.models.loading import load_base, load_tokenizer, lora_config
from goose_lora.models.shared_base import SharedBase

CASES = {
    "growing cache": {},
    "static cache": {"cache_implementation": "static"},
    "static cache, compiled": {"cache_implementation": "static"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--of", choices=["cache", "weights"], default="cache")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()  # as the recipes do
    clock = time.process_time if arguments.device == "cpu" else synchronized
    ids = torch.tensor(prompts(arguments.rows, arguments.prompt), device=arguments.device)
    cases = caches(arguments, ids) if arguments.of == "cache" else weights(arguments, ids)
    wanted = None
    for name, generate in cases.items():
        seconds = []
        for _ in range(4):
            started = clock()
            with torch.no_grad():
                replies = generate()
            seconds.append(clock() - started)
        wanted = replies if wanted is None else wanted
        same = (replies == wanted).float().mean().item()
        print(
            f"{name}: {min(seconds[1:]):.2f} seconds, the first {seconds[0]:.2f}; {100 * same:.1f} % of"
            " tokens as with the first",
            flush=True,
        )


def caches(arguments: argparse.Namespace, ids: Tensor) -> dict[str, Callable[[], Tensor]]:
    with torch.device(arguments.device):
        model: Any = AutoModelForCausalLM.from_config(model_config(), dtype=DTYPES[arguments.dtype]).eval()
    made = {}
    for name, settings in CASES.items():
        config = GenerationConfig(
            max_new_tokens=arguments.tokens,
            min_new_tokens=arguments.tokens,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=PAD,
            **settings,
        )
        if name.endswith("compiled"):
            config.compile_config = CompileConfig(fullgraph=False)
            config.compile_config._compile_all_devices = True
        else:
            config.disable_compile = True
        made[name] = partial(
            model.generate, input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
    return made


def weights(arguments: argparse.Namespace, ids: Tensor) -> dict[str, Callable[[], Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(model_config(), dtype=torch.bfloat16).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        model = ModelArguments(folder, dtype=arguments.dtype)
        base = load_base(model, load_tokenizer(model), device=torch.device(arguments.device))
    shared = SharedBase.build(base, lora_config(model, base))
    config = generation_config(
        response_tokens=arguments.tokens,
        temperature=1.0,
        eos_token_ids=[PAD + 1],
        pad_token_id=PAD,
        do_sample=False,
    )
    copied = DenseCopy(shared)

    def generate(dense: DenseCopy | None) -> Tensor:
        if dense:
            dense.merge_role("policy")
        return sample(shared, ids, torch.ones_like(ids), config, dense=dense).input_ids

    return {"nf4, shared weights": partial(generate, None), "nf4, dense copy": partial(generate, copied)}


def synchronized() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
