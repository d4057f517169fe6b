"""What the checks cost when roles are put on a base: CPU seconds, beside one short forward.

    OMP_NUM_THREADS=1 python benchmarks/build_checks.py demo
    OMP_NUM_THREADS=1 python benchmarks/build_checks.py 1.7B --quantization nf4

``demo`` is the demo's base; ``1.7B`` has the shape of SmolLM2-1.7B and random weights. Each build
has a policy, a frozen copy of it, and a critic of its own. CPU seconds of one thread, which other
work on the machine changes little. Prints the build without its checks, the checks, one forward of
seven tokens, and how many such forwards the checks take.
"""

import argparse
import tempfile
import time
from collections.abc import Callable

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from goose_lora.embedded import resolve
from goose_lora.models import role_checks
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.loading import lora_config
from goose_lora.models.quantization import (
    keep_4bit_trainable_on_cpu,
    keep_8bit_alike_on_cpu,
    quantization_config,
)
from goose_lora.models.shared_base import SharedBase

SHAPE = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 8192,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "pad_token_id": 2,
}


def base_of(name: str, args: ModelArguments) -> PreTrainedModel:
    """Return the base, quantized as ``args`` say."""
    how = {"dtype": args.torch_dtype, "quantization_config": quantization_config(args)}
    if name == "demo":
        return AutoModelForCausalLM.from_pretrained(resolve("embedded"), **how, device_map={"": "cpu"})
    # Random weights go through a file, for bitsandbytes to quantize them as it loads
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **SHAPE)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, **how, device_map={"": "cpu"})


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds that ``work`` takes."""
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("base", choices=["demo", "1.7B"])
    parser.add_argument("--quantization", default="none", choices=["none", "nf4", "int8"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args = ModelArguments(given.base, quantization=given.quantization, dtype=given.dtype)
    base = base_of(given.base, args).eval()
    keep_4bit_trainable_on_cpu(base)
    keep_8bit_alike_on_cpu(base)

    # The checks are taken out of the build, and timed by themselves
    checks: list[float] = []
    bare, check = role_checks.bare_answer, role_checks.check_against_model
    kept: list[role_checks.OwnAnswer | None] = []
    role_checks.bare_answer = lambda core: kept.append(None)  # type: ignore[assignment]
    role_checks.check_against_model = lambda shared, answer: None
    lora = lora_config(args, base)
    checks.append(seconds(lambda: kept.append(bare(base))))
    built: list[SharedBase] = []
    of_build = seconds(lambda: built.append(SharedBase.build(base, lora, reference="copy", critic="adapter")))
    checks.append(seconds(lambda: check(built[0], kept[0])))
    one = min(seconds(lambda: role_checks.own_answer(built[0].core)) for _ in range(2))
    print(
        f"{given.base}, {given.quantization}, {given.dtype}: build {of_build:.2f} s, checks"
        f" {sum(checks):.2f} s; one forward of {role_checks.TOKENS} tokens {one:.2f} s, of which the checks"
        f" take {sum(checks) / one:.1f}"
    )


if __name__ == "__main__":
    main()
