"""PPO's modes on the demo, several seeds: what each ends at, and what it costs.

    python benchmarks/modes.py --output runs/modes \\
        [--modes reward_features rloo ...] [--seeds 0 1 2] [--dtype float32] [--rows 16]
    python benchmarks/modes.py --output runs/top-4 --lora_layers top-4 --modes reward_features

Each seed trains its own SFT adapter and reward model once; every mode starts from them. A run is
the demo's PPO stage with the settings below (``--rows``: of so many replies a minibatch, where the
demo has 32; ``--lora_layers``: adapters in other layers, in all stages), then 200 held-out prompts
at temperature 1, judged by VADER and by second_judge.py. CPU seconds are of the PPO stage without
its imports, of its process alone, so that other work on the machine does not enter. What is
finished is not run again; several calls may share the output folder. Prints a table, mean and range
over seeds.
"""

import argparse
import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import bitsandbytes  # noqa: F401  (imported once here: every run is a fork)
import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import trl  # noqa: F401
from second_judge import sentiments

from goose_lora import (
    cli,
    demo,
    embedded,
)
from goose_lora.data.rows import load_rows
from goose_lora.data.tokenization import tokenize_prompts
from goose_lora.evaluation.policies import Replies, answer, judge_all, summary
from goose_lora.evaluation.statistics import matched_length_difference
from goose_lora.files import read_json, write_json
from goose_lora.generation.sampling import generation_config
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.dense_copy import make_dense_copy
from goose_lora.models.loading import load_base, load_tokenizer
from goose_lora.models.roles import Role
from goose_lora.models.shared_base import SharedBase

ROOT = Path(__file__).resolve().parent.parent
GROUPS = {"num_generations": 4}
BEFORE = "before.json"  # replies of a seed's SFT model, with the second judge's word on each
MODES: dict[str, dict[str, object]] = {
    # The average only watches: the run is bit for bit the one without
    "reward_features": {"ema_decay": 0.95},
    "adapter": {"critic": "adapter"},
    "shared": {"critic": "shared"},
    "rloo": {"advantage_estimator": "rloo", **GROUPS},
    "grpo": {"advantage_estimator": "grpo", **GROUPS},
    "kl_adaptive": {"kl_target": 6, "kl_horizon": 640},
    "kl_k2_in_loss": {"kl_location": "loss", "kl_estimator": "k2"},
    "kl_k3_in_loss": {"kl_location": "loss", "kl_estimator": "k3"},
    "kl_k3_in_reward": {"kl_estimator": "k3"},
    "kl_exact_in_reward": {"kl_estimator": "exact"},
    "kl_exact_in_loss": {"kl_location": "loss", "kl_estimator": "exact"},
    "adapter_from_policy": {"critic": "adapter", "critic_init": "policy"},
    "adapter_from_zero": {"critic": "adapter", "critic_init": "zero"},
    "critic_warmup": {"critic_warmup_rollouts": 2, "num_rollouts": 20},
    "running_scores": {"score_normalization": "running"},
    "kl_coef_low": {"kl_coef": 0.075},
    "kl_coef_high": {"kl_coef": 0.3},
    "kl_k2_in_loss_high": {"kl_location": "loss", "kl_estimator": "k2", "kl_coef": 0.3},
    "kl_k3_in_loss_high": {"kl_location": "loss", "kl_estimator": "k3", "kl_coef": 0.3},
    "ptx": {"ptx_coef": 0.1, "ptx_dataset_name": "embedded/sft", "ptx_batch_size": 8},
}


def run(work: Callable[[], None], log: Path) -> float:
    """Return the CPU seconds of ``work`` in a fork of this process; stop everything if it fails.

    The fork has the libraries imported. Output goes to ``log``.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(log, "w", encoding="utf-8") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            work()
            status = 0
        except SystemExit as stop:
            status = 1 if stop.code else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"{log.stem} failed; see {log}")
    return usage.ru_utime + usage.ru_stime


def start_recipe(name: str, arguments: list[str]) -> None:
    os.chdir(ROOT)
    sys.argv = [f"recipes/{name}.py", *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def recipe(name: str, folder: Path, seed: int, dtype: str, **settings: object) -> float:
    """Run a stage into ``folder`` and return its CPU seconds; a list is a setting of many words."""
    settings |= {"dtype": dtype} | ({} if name == "ppo" else {"bf16": dtype == "bfloat16"})
    config = f"recipes/configs/demo_cpu/raw/{name}.yaml"
    options = []
    for key, value in settings.items():
        options += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    arguments = ["--config", config, "--output_dir", str(folder), "--seed", str(seed), *options]
    return run(lambda: start_recipe(name, arguments), folder.with_name(f"{folder.name}.log"))


def stages(seed_folder: Path, seed: int, dtype: str, layers: dict[str, str]) -> dict[str, object]:
    """The two stages before PPO, and the settings that point at them."""
    for name in ("sft", "reward"):
        if not (seed_folder / name / "stage.json").is_file():
            recipe(name, seed_folder / name, seed, dtype, **layers)
    return {"policy_adapter": seed_folder / "sft", "reward_adapter": seed_folder / "reward"}


def judge(seed_folder: Path, folder: Path, seed: int, dtype: str, which: str = "ppo") -> dict[str, float]:
    """Figures of one policy on the held-out prompts; 'sft' in ``which`` judges the reference."""
    target = folder / f"judged_{which}.json"
    if not target.is_file():
        run(
            lambda: judge_here(str(seed_folder), str(folder), seed, dtype, which),
            folder / f"judged_{which}.log",
        )
    return json.loads(target.read_text(encoding="utf-8"))


def judge_here(seed_folder: str, folder: str, seed: int, dtype: Any, which: str) -> None:
    cli.quiet_libraries()
    cli.keep_freed_memory()
    model = ModelArguments(embedded.resolve("embedded"), dtype=dtype)
    tokenizer = load_tokenizer(model)
    rows = load_rows(embedded.resolve("embedded/prompts-test"), max_rows=200)
    prompts = list(tokenize_prompts(rows, tokenizer, name="prompts-test", max_prompt_tokens=512)["input_ids"])
    policy = {"ppo": folder, "ema": f"{folder}/ema", "sft": f"{seed_folder}/sft"}[which]
    shared = SharedBase.build(
        load_base(model, tokenizer), policy, reward=f"{seed_folder}/reward", reference=f"{seed_folder}/sft"
    )
    sampling = generation_config(
        response_tokens=24,
        temperature=1.0,
        eos_token_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    dense = make_dense_copy(shared, "auto")

    def replies(role: Role) -> Replies:
        return answer(shared, role, prompts, tokenizer, sampling, batch_size=100, seed=seed, dense=dense)

    # The SFT model's, once a seed: all that is judged later stands beside them
    texts, kept = tokenizer.batch_decode(prompts), Path(seed_folder) / BEFORE
    if not kept.is_file():
        before = replies("reference")
        second = second_judge(before, texts, shared, tokenizer)
        write_json(kept, {"replies": asdict(before), "second": second})
    figures = judged(replies("policy"), texts, Path(seed_folder), shared, tokenizer)
    write_json(f"{folder}/judged_{which}.json", figures)


def second_judge(replies: Replies, prompts: list[str], shared: SharedBase, tokenizer: Any) -> list[float]:
    with shared.role("base") as base:
        return sentiments(base, tokenizer, list(map(str.__add__, prompts, replies.texts)))


def judged(
    said: Replies, prompts: list[str], seed_folder: Path, shared: SharedBase, tokenizer: Any
) -> dict[str, Any]:
    """Return what both judges say of replies, beside those of the SFT model in ``BEFORE``."""
    noted = read_json(seed_folder / BEFORE)
    before = Replies(**noted["replies"])
    named = {"it": said, "before": before}
    judge_all(named, prompts, demo.vader)
    of_second = second_judge(said, prompts, shared, tokenizer)
    gain = matched_length_difference(of_second, said.lengths, noted["second"], before.lengths).value
    figures = summary(named, against="before")["it"]
    return figures | {"second": fmean(of_second), "second_gain_at_equal_length": gain}


def table(output: Path, modes: list[str]) -> str:
    """A line a mode: mean over the seeds that are there, and the range."""

    def cell(values: list[float], digits: int = 2) -> str:
        return (
            f"{fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
            if values
            else "-"
        )

    lines = [
        "| mode | seeds | VADER | score | KL | distinct-2 | tokens | ended | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for mode, prefix in [(mode, "") for mode in modes] + [("reward_features", "ema_")]:
        rows = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(output.glob(f"seed*/{mode}/mode.json"))
        ]
        names = ("judge", "score", "kl", "distinct_2", "tokens", "ended", "cpu_seconds")
        columns = {name: [row[prefix + name] for row in rows if prefix + name in row] for name in names}
        digits = {"judge": 3, "distinct_2": 3, "kl": 1, "tokens": 1, "cpu_seconds": 0}
        cells = [cell(values, digits.get(name, 2)) for name, values in columns.items()]
        lines.append(
            " | ".join([f"| {mode}{', average of the weights' if prefix else ''}", str(len(rows)), *cells])
            + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "modes")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument(
        "--lora_layers", help="top-K or all; give it an output folder of its own (default: the demo's)"
    )
    arguments = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    dtype, size = (
        arguments.dtype,
        {
            "per_device_train_batch_size": arguments.rows,
            "score_calibration_prompts": 4 * arguments.rows,
        },
    )
    for mode in arguments.modes:
        for seed in arguments.seeds:
            seed_folder = arguments.output.resolve() / f"seed{seed}"
            folder = seed_folder / mode
            if (folder / "mode.json").is_file():
                continue
            start = stages(
                seed_folder,
                seed,
                dtype,
                {"lora_layers": arguments.lora_layers} if arguments.lora_layers else {},
            )
            seconds = recipe("ppo", folder, seed, dtype, **start, **size, **MODES[mode])
            figures = judge(seed_folder, folder, seed, dtype)
            if (folder / "ema").is_dir():
                figures |= {
                    f"ema_{name}": value
                    for name, value in judge(seed_folder, folder, seed, dtype, "ema").items()
                }
            (folder / "mode.json").write_text(
                json.dumps(figures | {"cpu_seconds": seconds, "settings": MODES[mode]}, indent=2),
                encoding="utf-8",
            )
            print(
                f"{mode}, seed {seed}: VADER {figures['judge']:.3f}, KL {figures['kl']:.1f}, {seconds:.0f}"
                " CPU seconds",
                flush=True,
            )
    print(table(arguments.output.resolve(), list(MODES)))


if __name__ == "__main__":
    main()
