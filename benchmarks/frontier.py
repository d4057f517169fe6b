"""Two judges against the KL: this PPO's variants and TRL's, at three prices of the KL each.

    python benchmarks/frontier.py [--output runs/frontier] [--seeds 0 1] [--variants "min of 4"] \\
        [--prices 0.15]
    python benchmarks/frontier.py --draw

The work is the demo's ratings as raw text, in float32 where a CPU multiplies no bfloat16. Each seed
trains its SFT adapter once, and each kind of reward model that a variant asks for; a run is PPO in
18 rollouts of 32 replies, then 200 held-out prompts at temperature 1 (benchmarks/modes.py). TRL's
runs need an environment with trl==1.12.0 (``make parity`` makes it).

What a run found is a line of frontier.jsonl, beside this file, and is not run again: stop it when
you like. Rows without a second judge are of 2026-11-26, from docs/LOG.md.
At the end, or with ``--draw`` at once: the table, and docs/images/judge_against_kl.svg.
"""

import argparse
import itertools
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import modes
import numpy as np
from demo_trl import judge_replies, score_std, trl, write_start
from modes import ROOT, judge, recipe, run

from goose_lora.files import append_line, read_json, read_jsonl
from goose_lora.models.quantization import cpu_multiplies_bf16

Row = dict[str, Any]
Settings = dict[str, object]
PICTURE = ROOT / "docs" / "images" / "judge_against_kl.svg"
ROLLOUTS, REPLIES, REWARD_STEPS = 18, 32, 110
BATCH: Settings = {"per_device_train_batch_size": REPLIES, "score_calibration_prompts": 4 * REPLIES}
AUGMENTED: Settings = {
    "augment_pairs": ["other_prompt=0.25", "empty=0.05"],
    "max_steps": round(1.3 * REWARD_STEPS),  # each pair as often as without
}
DEFAULT, TRL = "k1 in the reward", "TRL's PPO"
# Reward models by name, and what they are trained with beside the demo's settings
REWARDS: dict[str, Settings] = {
    "one": {},
    "two": {"num_members": 2},
    "four": {"num_members": 4},
    "augmented": AUGMENTED,
    "four, augmented": {"num_members": 4, **AUGMENTED},  # every second member sees made pairs
}
# Variants: the reward model, and settings of PPO
VARIANTS: dict[str, tuple[str, Settings]] = {
    DEFAULT: ("one", {}),
    "augmented": ("augmented", {}),
    **{
        f"{name} of {count}": (members, {"reward_aggregation": name})
        for count, members in ((2, "two"), (4, "four"), ("4, augmented", "four, augmented"))
        for name in ("mean", "min", "mean_minus_std")
    },
    "k2 in the loss": ("one", {"kl_location": "loss", "kl_estimator": "k2"}),
    "k2 in the loss, weighed": (
        "one",
        {"kl_location": "loss", "kl_estimator": "k2", "kl_importance_weight": True},
    ),
    "truncated importance": ("one", {"sampling_correction": "truncate"}),
    "masked importance": ("one", {"sampling_correction": "mask"}),
    "critic's lambda 1": ("one", {"lam_critic": 1.0}),
    "clip-higher": ("one", {"cliprange_high": 0.28}),
    TRL: ("one", {}),
}
PRICES = (0.15, 0.075, 0.3)
# 0.975 quantiles of Student's t for a mean of so many seeds
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}


# ---- Runs ----


def run_one(variant: str, price: float, seed: int, seed_folder: Path, dtype: str, python: str) -> Row:
    """Train and judge one policy, with what it starts from where that is not there yet."""
    reward, settings = VARIANTS[variant]
    start = stages(seed_folder, reward, seed, dtype)
    folder = seed_folder / f"{variant} {price}"
    if variant == TRL:
        seconds, figures = run_trl(price, seed, seed_folder, folder, dtype, python)
    else:
        asked = {"kl_coef": price, "num_rollouts": ROLLOUTS, **BATCH, **settings}
        seconds = recipe("ppo", folder, seed, dtype, **start, **asked)
        figures = judge(seed_folder, folder, seed, dtype)
    names = ("judge", "judge_gain_at_equal_length", "second", "second_gain_at_equal_length", "score", "kl")
    names += ("distinct_2", "tokens", "ended")
    row = {"variant": variant, "kl_coef": price, "seed": seed, "replies": f"{ROLLOUTS} of {REPLIES}"}
    row |= {"dtype": dtype, **{name: round(figures[name], 4) for name in names}}
    return row | {"cpu_seconds": round(seconds)}


def stages(seed_folder: Path, reward: str, seed: int, dtype: str) -> Settings:
    """Train what PPO starts from, where it is not there yet; return the settings that name it."""
    # The single one is there for all: by it the figures of every variant are told
    found = modes.stages(seed_folder, seed, dtype, {})
    if reward != "one":
        folder = seed_folder / f"reward, {reward}"
        if not (folder / "stage.json").is_file():
            recipe("reward", folder, seed, dtype, **REWARDS[reward])
        found["reward_adapter"] = folder
    return found


def run_trl(
    price: float, seed: int, seed_folder: Path, folder: Path, dtype: str, python: str
) -> tuple[float, Row]:
    """Train and judge TRL's policy at the default's price, in units of raw scores."""
    ours = seed_folder / f"{DEFAULT} {price}"
    if not (ours / "metrics.jsonl").is_file():
        raise SystemExit(f"{TRL} at {price} takes the scores' spread from {ours}: run {DEFAULT!r} first.")
    if not (seed_folder / "dense" / "prompts.json").is_file():
        run(lambda: write_start(seed_folder, dtype), seed_folder / "dense.log")
    case = {"seed": seed, "dtype": dtype, "rollouts": ROLLOUTS, "replies": REPLIES}
    seconds = trl(seed_folder, folder, python, case | {"kl_coef": price * score_std(ours)})
    run(lambda: judge_replies(seed_folder, folder, dtype), folder / "judged.log")
    return seconds, read_json(folder / "judged_ppo.json")


# ---- What they tell ----


def groups(rows: Iterable[Row]) -> dict[tuple[str, float, str], list[Row]]:
    """Return rows by variant, price and number of replies: one a seed in each."""
    found = defaultdict(list)
    for row in rows:
        found[row["variant"], row["kl_coef"], row["replies"]].append(row)
    return dict(found)


def table(rows: list[Row]) -> str:
    """A line a variant and price: means over the seeds that are there."""
    columns = {"VADER": "judge", "at equal length": "judge_gain_at_equal_length", "second judge": "second"}
    columns |= {"KL": "kl", "distinct-2": "distinct_2", "tokens": "tokens", "CPU seconds": "cpu_seconds"}
    digits = {"kl": 1, "tokens": 1, "cpu_seconds": 0}
    head = ["variant", "`kl_coef`", "rollouts", "seeds", *columns]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (variant, price, replies), own in groups(rows).items():
        cells = [variant, f"{price:g}", replies, str(len(own))]
        for name in columns.values():
            values = [row[name] for row in own if name in row]
            cells.append(f"{fmean(values):.{digits.get(name, 3)}f}" if values else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def at_kl(rows: Iterable[Row], kl: float, name: str = "judge") -> dict[int, float]:
    """Return each seed's judgement at a KL, on the line between its prices to both sides of it."""
    by_seed = defaultdict(list)
    for row in rows:
        by_seed[row["seed"]].append((row["kl"], row[name]))
    found = {}
    for seed, points in by_seed.items():
        at, values = zip(*sorted(points), strict=True)
        if at[0] <= kl <= at[-1]:
            found[seed] = float(np.interp(kl, at, values))
    return found


def beside_trl(rows: list[Row], kl: float) -> list[str]:
    """A line a variant: VADER beside TRL's at one KL, seed by seed, with a 95 % interval."""
    work = f"{ROLLOUTS} of {REPLIES}"
    same = [row for row in rows if row["replies"] == work]
    theirs = at_kl((row for row in same if row["variant"] == TRL), kl)
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in same if row["variant"] != TRL):
        ours = at_kl((row for row in same if row["variant"] == variant), kl)
        apart = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        if len(apart) not in STUDENT:
            continue
        half = STUDENT[len(apart)] * stdev(apart) / len(apart) ** 0.5
        lines.append(
            f"{variant}, at a KL of {kl:g}: {fmean(apart):+.3f} +- {half:.3f} beside {TRL}"
            f" ({len(apart)} seeds)"
        )
    return lines


def draw(rows: list[Row]) -> None:
    """Draw VADER against the KL: a line through a variant's prices, a point where it has one."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    lines = defaultdict(list)
    for (variant, _, replies), own in groups(rows).items():
        point = fmean(row["kl"] for row in own), fmean(row["judge"] for row in own)
        lines[variant, replies].append(point)
    matplotlib.rcParams["svg.hashsalt"] = "frontier"  # the same file each time
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    colors = iter(("#c98a3b", "#8d6e9f", "#3b7ea1", "#a15c3b", "#6b8e23", "#b08d57", "#708090", "#955251"))
    usual = f"{ROLLOUTS} of {REPLIES}"
    for (variant, replies), points in lines.items():
        of_trl, work = variant == TRL, "" if replies == usual else f", rollouts {replies}"
        if len(points) == 1 and not (of_trl or work):
            axes.plot(*points[0], "o", color="#607d8b")
            axes.annotate(variant, points[0], xytext=(-20, 7), textcoords="offset points", fontsize=9)
            continue
        color = "#b3261e" if of_trl else "#4a7a4f" if variant == DEFAULT else next(colors, "#607d8b")
        label = variant + (", the default" if variant == DEFAULT and not work else "") + work
        axes.plot(*zip(*sorted(points), strict=True), "s-" if work else "o-", color=color, label=label)
    axes.margins(x=0.1)  # room for the names of single points
    axes.set_xlabel("KL to SFT, nats a reply")
    axes.set_ylabel("VADER, a judge that training never sees")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--prices", nargs="+", type=float, default=list(PRICES))
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "frontier")
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--trl-ppo", default=str(ROOT / ".venv-parity" / "bin" / "python"))
    parser.add_argument("--draw", action="store_true", help="run nothing: table and picture alone")
    arguments = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    dtype = "bfloat16" if cpu_multiplies_bf16() else "float32"
    asked = itertools.product(arguments.seeds, arguments.prices, arguments.variants)
    for seed, price, variant in () if arguments.draw else asked:
        name = (variant, price, f"{ROLLOUTS} of {REPLIES}")
        if any(row["seed"] == seed for row in groups(read_jsonl(arguments.rows)).get(name, [])):
            continue
        seed_folder = arguments.output.resolve() / f"seed{seed}"
        row = run_one(variant, price, seed, seed_folder, dtype, arguments.trl_ppo)
        append_line(arguments.rows, row)
        print(
            f"{variant}, {price:g}, seed {seed}: VADER {row['judge']:.3f}, second judge {row['second']:.2f},"
            f" KL {row['kl']:.1f}, {row['cpu_seconds']} CPU seconds",
            flush=True,
        )
    rows = read_jsonl(arguments.rows)
    print(table(rows))
    print("\n".join(beside_trl(rows, 6.3)))
    draw(rows)


if __name__ == "__main__":
    main()
