"""CPU seconds of scoring by an ensemble of K reward models, beside one: adapters in the top third.

    python benchmarks/ensemble_scores.py [--members 4] [--times 5] [--rows 32] [--tokens 32]

The embedded model in nf4, members with random adapters. A score is the pass of the trunk and each
member's own layers, as a rollout's scoring has it. One thread; the two take turns, and the least of
each is told.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from goose_lora import cli, embedded
from goose_lora.files import file_sha256
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.ensembles import Member, RewardEnsemble
from goose_lora.models.loading import load_base, load_reward_base, load_tokenizer, lora_config
from goose_lora.models.quantization import cpu_multiplies_bf16
from goose_lora.models.shared_base import SharedBase

import torch  # isort: skip
from peft import get_peft_model


def write_ensemble(folder: Path, count: int, args: ModelArguments, tokenizer: Any) -> Path:
    """Write ``count`` reward models of random adapters, and how they score as one."""
    members = []
    for place in range(count):
        torch.manual_seed(place)
        own, base = folder / f"member{place}", load_reward_base(args, tokenizer)
        lora = lora_config(args, base, "SEQ_CLS", init_lora_weights=False)
        get_peft_model(base, lora).save_pretrained(str(own))
        name = f"../{own.name}" if place else "."
        members.append(Member(name, file_sha256(own / "adapter_model.safetensors"), 0.0, 1.0))
    if count > 1:
        RewardEnsemble("adapters", 1.0, 0.0, tuple(members)).write(folder / "member0")
    return folder / "member0"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    cli.quiet_libraries()
    torch.set_num_threads(1)
    dtype = "bfloat16" if cpu_multiplies_bf16() else "float32"
    args = ModelArguments(embedded.resolve("embedded"), quantization="nf4", dtype=dtype, lora_layers="top-10")
    tokenizer = load_tokenizer(args)
    shape = (arguments.rows, arguments.tokens)
    ids, mask = torch.randint(3, len(tokenizer), shape), torch.ones(shape, dtype=torch.long)

    counts = (1, arguments.members)
    scorers = []
    with tempfile.TemporaryDirectory() as temporary:
        for count in counts:
            judge = write_ensemble(Path(temporary) / str(count), count, args, tokenizer)
            base = load_base(args, tokenizer)
            shared = SharedBase.build(base, lora_config(args, base), reward=judge)

            def score(shared: SharedBase = shared) -> None:
                with torch.no_grad():
                    roles = dict.fromkeys(shared.member_states.values())
                    shared.judge(ids, mask, shared.trunks(ids, mask, ["policy", *roles]))

            scorers.append(score)

    seconds: list[list[float]] = [[] for _ in counts]
    for _ in range(arguments.times):
        for score, times in zip(scorers, seconds, strict=True):
            began = time.process_time()
            score()
            times.append(time.process_time() - began)
    least = [min(times) for times in seconds]
    for count, best in zip(counts, least, strict=True):
        print(f"{count} member{'s' * (count > 1)}, {dtype}: {best:.2f} CPU seconds")
    print(f"{least[1] / least[0]:.2f} times")


if __name__ == "__main__":
    main()
