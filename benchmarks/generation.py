"""What a static cache and torch.compile make of a rollout's generation, beside the growing cache that rollouts use.

    python benchmarks/generation.py [--dtype float32] [--rows 32] [--tokens 32] [--prompt 32] [--device cuda]

SmolLM2-135M's shape, or BENCHMARK_SHAPE's, with random weights, greedy, one thread; CPU seconds of a batch, on a GPU those of the clock, the best
of three, and of the first, which compiles. Needs a C++ compiler for the third case.
"""

import argparse
import time

import torch
from step_common import DTYPES, EOS, PAD, model_config, prompts
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig

CASES = {"growing cache": {}, "static cache": {"cache_implementation": "static"}, "static cache, compiled": {"cache_implementation": "static"}}


def synchronized() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(model_config(), dtype=DTYPES[arguments.dtype]).eval()
    ids = torch.tensor(prompts(arguments.rows, arguments.prompt), device=arguments.device)
    clock = time.process_time if arguments.device == "cpu" else synchronized
    wanted = None
    for name, settings in CASES.items():
        config = GenerationConfig(
            max_new_tokens=arguments.tokens, min_new_tokens=arguments.tokens, do_sample=False, eos_token_id=EOS, pad_token_id=PAD, **settings
        )
        if name.endswith("compiled"):
            config.compile_config = CompileConfig(fullgraph=False)
            config.compile_config._compile_all_devices = True
        else:
            config.disable_compile = True
        seconds = []
        for _ in range(4):
            started = clock()
            with torch.no_grad():
                replies = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
            seconds.append(clock() - started)
        wanted = replies if wanted is None else wanted
        same = (replies == wanted).float().mean().item()
        print(f"{name}: {min(seconds[1:]):.2f} seconds, the first {seconds[0]:.2f}; {100 * same:.1f} % of tokens as with the first", flush=True)


if __name__ == "__main__":
    main()
