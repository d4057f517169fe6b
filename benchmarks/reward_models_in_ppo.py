"""What the demo's PPO finds by one reward model, by one with made pairs, and by four of them.

    python benchmarks/augmented_pairs.py --output runs/pairs --kinds none empty
    python benchmarks/ensemble_probes.py --runs runs/pairs
    python benchmarks/reward_models_in_ppo.py --runs runs/pairs [--seeds 0 1 2] [--models none four]
    python benchmarks/reward_models_in_ppo.py --runs runs/pairs --rollouts 60 --kl_coef 0.03

The demo's SFT, PPO and evaluation (``--data raw``: on its ratings as raw text), in float32 where a
CPU multiplies no bfloat16; the reward models are those that the first two commands have left. VADER
watches PPO, with a weight of 0; every policy's score and win rate are told by the seed's single
reward model. What a run found is a line of reward_models_in_ppo.jsonl, beside this file, and is not
run again; several calls may run side by side, if not on one seed's first run. Prints a table: means
over the seeds that are there.
"""

import argparse
import itertools
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from augmented_pairs import CHATS, KINDS, RAW, ROOT, found, recipe

from goose_lora.demo import slow_bf16_options
from goose_lora.files import append_line, read_json, read_jsonl

JUDGES = {CHATS: "goose_lora.demo:vader_of_reply", RAW: "goose_lora.demo:vader"}
AGGREGATIONS = {"four": ["--reward_aggregation", "min"]}
MODELS = (*KINDS, "four")
COLUMNS = {
    "VADER": "judge",
    "at equal length": "judge_gain_at_equal_length",
    "KL": "kl",
    "score": "score",
    "win rate": "score_win_rate",
    "distinct-2": "distinct_2",
    "tokens": "tokens",
    "ended": "ended",
    "loss": "base_loss",
}
WINDOW = 5  # rollouts that a mean on the way is of

Row = dict[str, Any]


def stage(data: str, name: str, folder: Path, seed: int, *settings: object) -> None:
    """Run a stage of the demo into ``folder``, unless it has been."""
    if not (folder / "stage.json").is_file():
        recipe(data, name, folder, seed, *slow_bf16_options(name), *settings)


def run(data: str, runs: Path, model: str, seed: int, rollouts: int, kl_coef: float) -> Row:
    """Train and judge one policy.

    Returns:
        Its figures on held-out prompts, those of the SFT model, and what VADER said on the way.
    """
    own = runs / f"seed{seed}"
    reward = runs / "four" / f"seed{seed}" / "member_0" if model == "four" else own / model
    folder = own / f"ppo {model} {rollouts} {kl_coef:g}"
    start = ["--policy_adapter", own / "sft", "--reward_adapter", reward]
    watched = ["--reward_function", "adapter", JUDGES[data], "--reward_weights", 1, 0]
    asked = ["--num_rollouts", rollouts, "--kl_coef", kl_coef, *AGGREGATIONS.get(model, [])]
    if data == CHATS:
        asked.append(f"--length_penalty={-kl_coef:g}")  # pays for a token what the KL takes, as the demo's
    stage(data, "sft", own / "sft", seed)
    stage(data, "ppo", folder, seed, *start, *watched, *asked)
    judged = folder.with_name(f"{folder.name}, judged")
    adapters = ["--sft_adapter", own / "sft", "--reward_adapter", own / "none"]
    stage(data, "evaluate", judged, seed, "--policy_adapter", folder, *adapters)
    figures = read_json(judged / "evaluation.json")["figures"]
    logged, watched_as = read_jsonl(folder / "metrics.jsonl"), f"reward/{JUDGES[data].partition(':')[2]}"
    heard = np.array([row[watched_as] for row in logged if watched_as in row])
    means = np.convolve(heard, np.ones(WINDOW) / WINDOW, "valid")
    row = {"data": data, "model": model, "seed": seed, "rollouts": rollouts, "kl_coef": kl_coef}
    row |= {"dtype": "float32" if slow_bf16_options("ppo") else "bfloat16"}
    row |= {name: round(figures["ppo"][name], 4) for name in COLUMNS.values()}
    row |= {f"sft_{name}": round(figures["sft"][name], 4) for name in ("judge", "distinct_2", "base_loss")}
    return row | {"best_on_the_way": round(means.max(), 4), "last_on_the_way": round(means[-1], 4)}


def table(rows: list[Row]) -> str:
    """A line a reward model, number of rollouts and price."""
    head = ["reward model", "rollouts", "`kl_coef`", "seeds", *COLUMNS, "best on the way", "last"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    works = sorted({(row["rollouts"], -row["kl_coef"]) for row in rows})
    for (rollouts, price), model in itertools.product(works, MODELS):
        work = (model, rollouts, -price)
        own = [row for row in rows if (row["model"], row["rollouts"], row["kl_coef"]) == work]
        if own:
            names = [*COLUMNS.values(), "best_on_the_way", "last_on_the_way"]
            cells = [f"{fmean(row[name] for row in own):.3f}" for name in names]
            lines.append(
                "| " + " | ".join([model, str(rollouts), f"{-price:g}", str(len(own)), *cells]) + " |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=JUDGES, default=CHATS)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "pairs")
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["none", "empty", "four"])
    parser.add_argument("--rollouts", type=int, default=10)
    parser.add_argument("--kl_coef", type=float, default=0.09)
    arguments = parser.parse_args()
    for seed, model in itertools.product(arguments.seeds, arguments.models):
        work = (model, seed, arguments.rollouts, arguments.kl_coef)
        keys = ("model", "seed", "rollouts", "kl_coef")
        if work in {tuple(row[key] for key in keys) for row in found(arguments.rows, arguments.data)}:
            continue
        row = run(
            arguments.data, arguments.runs.resolve(), model, seed, arguments.rollouts, arguments.kl_coef
        )
        append_line(arguments.rows, row)
        print(f"{model}, seed {seed}: VADER {row['judge']:.3f}, KL {row['kl']:.1f}", flush=True)
    print(table(found(arguments.rows, arguments.data)))


if __name__ == "__main__":
    main()
