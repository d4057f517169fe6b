"""The demo's PPO stage beside TRL 1.12.0's PPO, from the same models and prompts.

    python benchmarks/demo_trl.py --trl-ppo .venv-parity/bin/python --output runs/demo_trl \\
        [--seeds 0 1 2] [--dtype float32] [--rollouts 20]

For each seed: SFT and reward model by the recipes (once; ``benchmarks/modes.py`` leaves the same),
PPO by ``recipes/ppo.py``, and TRL's PPO on dense copies of the two, dequantized and merged, with a
fresh LoRA adapter whose reference is the base below it. TRL's ``kl_coef`` is of raw scores, so it
gets the demo's times the standard deviation of the reference's. Numbers of samples and epochs are
the same. Then 200 held-out prompts at temperature 1, judged by VADER. CPU seconds on one thread
are of the whole stage but its imports, on both sides: loading, training and saving. What is
finished is not run again.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from modes import ROOT, judge, judged, recipe, run, stages
from transformers import AutoModelForSequenceClassification

from goose_lora import cli, embedded
from goose_lora.data.rows import load_rows
from goose_lora.data.tokenization import left_pad, tokenize_prompts
from goose_lora.evaluation.policies import Replies
from goose_lora.files import read_jsonl, write_json
from goose_lora.generation.sampling import response_mask
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.dense_copy import DenseCopy
from goose_lora.models.loading import load_base, load_tokenizer
from goose_lora.models.shared_base import SharedBase

RESPONSE, PROMPT_TOKENS, KL_COEF = 24, 32, 0.15


def shared_base(seed_folder: Path, dtype: str) -> tuple[SharedBase, Any]:
    model = ModelArguments(embedded.resolve("embedded"), dtype=dtype)
    tokenizer = load_tokenizer(model)
    return (
        SharedBase.build(load_base(model, tokenizer), seed_folder / "sft", reward=seed_folder / "reward"),
        tokenizer,
    )


def prompts_of(name: str, tokenizer: Any, rows: int | None = None) -> list[list[int]]:
    found = load_rows(embedded.resolve(name), max_rows=rows)
    return [
        list(ids)
        for ids in tokenize_prompts(found, tokenizer, name=name, max_prompt_tokens=PROMPT_TOKENS)["input_ids"]
    ]


def write_start(seed_folder: Path, dtype: str) -> None:
    """Write what TRL starts from: dense copies of both models, the tokenizer and the prompts."""
    # Its environment does not have this project.
    shared, tokenizer = shared_base(seed_folder, dtype)
    dense = DenseCopy(shared)
    dense.merge_role("policy")
    dense.model.save_pretrained(seed_folder / "dense" / "policy")
    dense.merge_role("reward")
    config = copy.deepcopy(dense.model.config)
    config.num_labels = 1
    judge: Any = AutoModelForSequenceClassification.from_config(config, dtype=dense.model.dtype)
    getattr(judge, judge.base_model_prefix).load_state_dict(
        getattr(dense.model, dense.model.base_model_prefix).state_dict()
    )
    judge.score.weight.data.copy_(shared.score_head("reward").weight)
    judge.save_pretrained(seed_folder / "dense" / "reward")
    tokenizer.save_pretrained(str(seed_folder / "dense" / "policy"))
    names = {
        "train": prompts_of("embedded/prompts", tokenizer),
        "test": prompts_of("embedded/prompts-test", tokenizer, 200),
    }
    write_json(str(seed_folder / "dense" / "prompts.json"), names)


def score_std(folder: Path) -> float:
    """Return what the recipe has divided scores by, from its own log."""
    # Raw and normalised scores lie on one line.
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "objective/raw_score" in row]
    first, last = rows[0], rows[-1]
    return (last["objective/raw_score"] - first["objective/raw_score"]) / (
        last["objective/score"] - first["objective/score"]
    )


@torch.no_grad()
def judge_replies(seed_folder: Path, folder: Path, dtype: str) -> None:
    """Compute the figures of TRL's replies: scores, and log-probabilities of the SFT model.

    Log-probabilities under TRL's policy were noted with the replies.
    """
    cli.quiet_libraries()
    shared, tokenizer = shared_base(seed_folder, dtype)
    rows = read_jsonl(folder / "replies.jsonl")
    replies = Replies()
    for start in range(0, len(rows), 50):
        part = rows[start : start + 50]
        prompts, attention = left_pad([row["prompt"] for row in part], tokenizer.pad_token_id)
        own = torch.tensor(
            [row["reply"] + [tokenizer.pad_token_id] * (RESPONSE - len(row["reply"])) for row in part]
        )
        mask, ended = response_mask(own, [tokenizer.eos_token_id])
        mask = mask & (torch.arange(RESPONSE) < torch.tensor([[len(row["reply"])] for row in part]))
        ids, attended = torch.cat([prompts, own], 1), torch.cat([attention, mask.long()], 1)
        reference, _ = shared.logprobs(shared.hidden("policy", ids, attended), ids, mask)
        replies.texts += tokenizer.batch_decode(
            [[token for token in row["reply"]] for row in part], skip_special_tokens=True
        )
        replies.kl += [
            row["logprob"] - logprob for row, logprob in zip(part, reference.sum(-1).tolist(), strict=True)
        ]
        replies.lengths += mask.sum(-1).tolist()
        replies.ended += ended.tolist()
        replies.scores += shared.scores(ids, attended, ended=ended).tolist()
    prompts = tokenizer.batch_decode([row["prompt"] for row in rows])
    write_json(f"{folder}/judged_ppo.json", judged(replies, prompts, seed_folder, shared, tokenizer))


def trl(seed_folder: Path, folder: Path, python: str, case: dict[str, Any]) -> float:
    """CPU seconds of TRL's stage, in its own environment."""
    folder.mkdir(exist_ok=True)
    words = json.dumps(
        case | {"start": str(seed_folder / "dense"), "output": str(folder), "response": RESPONSE}
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with open(folder / "log", "w", encoding="utf-8") as log:
        done = subprocess.run(
            [python, str(ROOT / "benchmarks" / "demo_trl_ppo.py"), words],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        sys.exit(f"TRL ended with exit code {done.returncode}; see {folder / 'log'}")
    return json.loads((folder / "trained.json").read_text(encoding="utf-8"))["cpu_seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trl-ppo",
        default=str(ROOT / ".venv-parity" / "bin" / "python"),
        help="Python of an environment with trl==1.12.0",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "demo_trl")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rollouts", type=int, default=20)
    arguments = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    dtype = arguments.dtype
    print(
        "| seed | side | VADER | score | KL | distinct-2 | tokens | ended | CPU seconds"
        " |\n|---|---|---|---|---|---|---|---|---|"
    )
    for seed in arguments.seeds:
        seed_folder = arguments.output.resolve() / f"seed{seed}"
        start = stages(seed_folder, seed, dtype, {})
        for side in ("ours", "trl"):
            folder = seed_folder / side
            if not (folder / "side.json").is_file():
                if side == "ours":
                    seconds = recipe("ppo", folder, seed, dtype, **start, num_rollouts=arguments.rollouts)
                    figures = judge(seed_folder, folder, seed, dtype)
                else:
                    run(lambda at=seed_folder: write_start(at, dtype), seed_folder / "dense.log")
                    coefficient = KL_COEF * score_std(seed_folder / "ours")
                    case = {
                        "seed": seed,
                        "dtype": dtype,
                        "rollouts": arguments.rollouts,
                        "replies": 64,
                        "kl_coef": coefficient,
                    }
                    seconds = trl(seed_folder, folder, arguments.trl_ppo, case)
                    run(lambda at=seed_folder, to=folder: judge_replies(at, to, dtype), folder / "judged.log")
                    figures = json.loads((folder / "judged_ppo.json").read_text(encoding="utf-8"))
                write_json(str(folder / "side.json"), figures | {"cpu_seconds": seconds})
            row = json.loads((folder / "side.json").read_text(encoding="utf-8"))
            numbers = [
                f"{row[name]:.3f}" for name in ("judge", "score", "kl", "distinct_2", "tokens", "ended")
            ]
            print(
                "| " + " | ".join([str(seed), side, *numbers, f"{row['cpu_seconds']:.0f}"]) + " |", flush=True
            )


if __name__ == "__main__":
    main()
