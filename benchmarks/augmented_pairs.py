"""What made pairs do to the demo's reward model: accuracy, and what the probes beat.

    python benchmarks/augmented_pairs.py --output runs/pairs [--seeds 0 1 2] [--kinds none empty]
    python benchmarks/augmented_pairs.py --data raw --output runs/pairs_raw

Each run is recipes/reward.py on demo_cpu/reward.yaml (``--data raw``: on demo_cpu/raw/reward.yaml)
with ``augment_pairs``, with as many more steps as there are more pairs, so that each pair is seen
as often; in float32 where a CPU multiplies no bfloat16. What a run found is a line of
augmented_pairs.jsonl, beside this file, and is not run again; several calls may run side by side.
Prints a table: means over the seeds that are there, and each seed's own.
"""

import argparse
import itertools
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from goose_lora.demo import slow_bf16_options
from goose_lora.files import append_line, read_json, read_jsonl

ROOT = Path(__file__).resolve().parent.parent
CHATS, RAW = "chats", "raw"
CONFIGS = {
    CHATS: ROOT / "recipes" / "configs" / "demo_cpu",
    RAW: ROOT / "recipes" / "configs" / "demo_cpu" / "raw",
}
KINDS: dict[str, dict[str, float]] = {
    "none": {},
    "other_prompt": {"other_prompt": 0.5},
    "neutral": {"neutral": 0.25},
    "empty": {"empty": 0.05},
    "cut": {"cut": 0.2},
    "repeated": {"repeated": 0.1},
    "other_prompt and empty": {"other_prompt": 0.25, "empty": 0.05},
    "half of other_prompt, and empty": {"other_prompt": 0.5, "empty": 0.05},
    "all": {"other_prompt": 0.25, "neutral": 0.1, "empty": 0.05, "cut": 0.1, "repeated": 0.05},
}
PROBES = ("flattering", "gushing", "fawning", "empty", "repeated", "truncated", "other_prompt")


Row = dict[str, Any]


def recipe(data: str, name: str, folder: Path, seed: int, *settings: object) -> None:
    """Run a stage of the demo into ``folder``, on one thread; stop everything if it fails."""
    config = CONFIGS[data] / f"{name}.yaml"
    command = [sys.executable, ROOT / "recipes" / f"{name}.py", "--config", config]
    command += ["--output_dir", folder, "--seed", seed, *settings]
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "ACCELERATE_USE_CPU": "true"}
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(list(map(str, command)), env=environment, stdout=file, stderr=file)
    if done.returncode:
        sys.exit(f"{folder.name}, seed {seed} failed; see {log}")


def train(data: str, kind: str, seed: int, folder: Path) -> Row:
    """Train one reward model into ``folder``, on one thread; stop everything if that fails.

    Returns:
        What its verdict says: accuracy, and each probe's share of the prompts.
    """
    shares, slow = KINDS[kind], slow_bf16_options("reward")
    steps = yaml.safe_load((CONFIGS[data] / "reward.yaml").read_text(encoding="utf-8"))["max_steps"]
    asked = ["--max_steps", round(steps * (1 + sum(shares.values())))]
    if shares:
        asked += ["--augment_pairs", *(f"{name}={share}" for name, share in shares.items())]
    recipe(data, "reward", folder, seed, *slow, *asked)
    verdict = read_json(folder / "verdict.json")
    probes = {name: probe["beats_chosen"] for name, probe in verdict["probes"].items()}
    dtype = "float32" if slow else "bfloat16"
    row = {"data": data, "kind": kind, "seed": seed, "dtype": dtype}
    return row | {"accuracy": verdict["accuracy"], "probes": probes}


def table(rows: list[Row]) -> str:
    """A line a kind: accuracy, and to what share of prompts each probe beats the chosen reply."""
    lines = [f"| pairs made | seeds | accuracy | {' | '.join(PROBES)} |", "|---" * (3 + len(PROBES)) + "|"]
    for kind, made in KINDS.items():
        own = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["seed"])
        columns = [[row["accuracy"] for row in own]]
        columns += [[row["probes"][probe] for row in own] for probe in PROBES]
        cells = [
            f"{fmean(values):.3f} ({', '.join(f'{value:.2f}' for value in values)})" if values else "-"
            for values in columns
        ]
        shares = ", ".join(f"`{name}` {share:g}" for name, share in made.items()) or "none"
        lines.append(f"| {shares} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=CONFIGS, default=CHATS)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "pairs")
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    for seed, kind in itertools.product(arguments.seeds, arguments.kinds):
        if (kind, seed) in {(row["kind"], row["seed"]) for row in found(arguments.rows, arguments.data)}:
            continue
        row = train(arguments.data, kind, seed, output / f"seed{seed}" / kind)
        append_line(arguments.rows, row)
        print(f"{kind}, seed {seed}: accuracy {row['accuracy']:.3f}", flush=True)
    print(table(found(arguments.rows, arguments.data)))


def found(rows: Path, data: str) -> list[Row]:
    """Return the lines of earlier runs on such data."""
    return [row for row in (read_jsonl(rows) if rows.is_file() else []) if row["data"] == data]


if __name__ == "__main__":
    main()
