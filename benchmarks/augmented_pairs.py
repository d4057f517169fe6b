"""What made pairs do to the demo's reward model: accuracy, and what the probes beat.

    python benchmarks/augmented_pairs.py --output runs/pairs [--seeds 0 1 2] [--kinds none empty]

Each run is recipes/reward.py on demo_cpu/reward.yaml with ``augment_pairs``, with as many more
steps as there are more pairs, so that each pair is seen as often. What is finished is not run
again; several calls may share the output folder. Prints a table: means over the seeds that are
there, and each seed's own.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import yaml

from goose_lora.files import read_json

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "recipes" / "configs" / "demo_cpu" / "reward.yaml"
KINDS: dict[str, dict[str, float]] = {
    "none": {},
    "other_prompt": {"other_prompt": 0.5},
    "neutral": {"neutral": 0.25},
    "empty": {"empty": 0.05},
    "cut": {"cut": 0.2},
    "repeated": {"repeated": 0.1},
    "other_prompt and empty": {"other_prompt": 0.25, "empty": 0.05},
    "all": {"other_prompt": 0.25, "neutral": 0.1, "empty": 0.05, "cut": 0.1, "repeated": 0.05},
}
PROBES = ("flattering", "gushing", "fawning", "empty", "repeated", "truncated", "other_prompt")


def train(kind: str, seed: int, folder: Path) -> None:
    """Train one reward model into ``folder``, on one thread; stop everything if that fails."""
    shares = KINDS[kind]
    steps = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["max_steps"]
    command = [sys.executable, str(ROOT / "recipes" / "reward.py"), "--config", str(CONFIG)]
    command += ["--output_dir", str(folder), "--seed", str(seed)]
    command += ["--max_steps", str(round(steps * (1 + sum(shares.values()))))]
    if shares:
        command += ["--augment_pairs", *(f"{name}={share}" for name, share in shares.items())]
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "ACCELERATE_USE_CPU": "true"}
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=file)
    if done.returncode:
        sys.exit(f"{kind}, seed {seed} failed; see {log}")


def table(output: Path, kinds: list[str]) -> str:
    """A line a kind: accuracy, and to what share of prompts each probe beats the chosen reply."""
    lines = [f"| pairs made | seeds | accuracy | {' | '.join(PROBES)} |", "|---" * (3 + len(PROBES)) + "|"]
    for kind in kinds:
        verdicts = [read_json(path) for path in sorted(output.glob(f"seed*/{kind}/verdict.json"))]
        columns = [[verdict["accuracy"] for verdict in verdicts]]
        columns += [[verdict["probes"][probe]["beats_chosen"] for verdict in verdicts] for probe in PROBES]
        cells = [
            f"{fmean(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})" if values else "-"
            for values in columns
        ]
        shares = ", ".join(f"`{name}` {share:g}" for name, share in KINDS[kind].items()) or "none"
        lines.append(f"| {shares} | {len(verdicts)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "pairs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    for seed in arguments.seeds:
        for kind in arguments.kinds:
            folder = output / f"seed{seed}" / kind
            if not (folder / "stage.json").is_file():
                train(kind, seed, folder)
                print(f"{kind}, seed {seed}: accuracy {read_json(folder / 'verdict.json')['accuracy']:.3f}")
    print(table(output, list(KINDS)))


if __name__ == "__main__":
    main()
