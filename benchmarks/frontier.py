"""The judge against the KL, from the tables of docs/LOG.md: docs/images/judge_against_kl.svg.

    python benchmarks/frontier.py

Nothing is trained here. The rows are those of 2026-11-26, of the demo's ratings as raw text:
benchmarks/modes.py, means of three seeds, and benchmarks/demo_trl.py, here and TRL 1.12.0's PPO.
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean

DOCS = Path(__file__).resolve().parents[1] / "docs"
MODES, BESIDE_TRL = "every mode on three seeds", "the demo's PPO stage beside TRL"
# Those at one price after another, joined by a line, and single ones: the row's name to the label
PRICES = ("kl_coef_high", "reward_features (k1", "kl_coef_low")
K2, K3 = ("kl_k2_in_loss_high", "kl_k2_in_loss (0.15"), ("kl_k3_in_loss_high",)
SINGLE = {
    "kl_k3_in_reward": "k3 in the reward",
    "kl_exact_in_reward": "exact in the reward",
    "kl_adaptive": "adaptive price",
    "adapter_from_zero": "a critic of its own",
    "ptx": "PPO-ptx",
    "grpo": "GRPO",
}
Point = tuple[float, float]  # KL, nats a reply; VADER


def rows_of(log: str, title: str) -> list[list[str]]:
    """Return the cells of the tables under a heading, with the columns' names first."""
    chapter = re.split(r"(?m)^## ", log.partition(f": {title}")[2])[0]
    lines = [line for line in chapter.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def number(cell: str) -> float:
    """Return the mean in a cell such as ``0.551 (0.558, 0.577, 0.519)``."""
    return float(cell.split()[0])


def points_of_modes(log: str) -> dict[str, Point]:
    """Return each mode's point by the name of its row."""
    names, *rows = rows_of(log, MODES)
    kl, vader = names.index("KL"), names.index("VADER")
    return {row[0]: (number(row[kl]), number(row[vader])) for row in rows}


def points_beside_trl(log: str) -> dict[str, Point]:
    """Return the means of this project's PPO and TRL's."""
    names, *rows = rows_of(log, BESIDE_TRL)
    side, kl, vader = (names.index(name) for name in ("side", "KL", "VADER"))
    found = defaultdict(list)
    for row in rows:
        found[row[side]].append((number(row[kl]), number(row[vader])))
    return {name: (fmean(k for k, _ in of), fmean(v for _, v in of)) for name, of in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    log = (DOCS / "LOG.md").read_text(encoding="utf-8")
    modes = points_of_modes(log)

    def of(name: str) -> Point:
        (found,) = [point for row, point in modes.items() if row.startswith(name)]
        return found

    matplotlib.rcParams["svg.hashsalt"] = "frontier"  # the same file each time
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for names, label, color in (
        (PRICES, "k1 in the reward, the default, at three prices", "#4a7a4f"),
        (K2, "k2 in the loss, at two prices", "#c98a3b"),
        (K3, "k3 in the loss", "#8d6e9f"),
    ):
        axes.plot(*zip(*map(of, names), strict=True), "o-", color=color, label=label)
    for name, label in SINGLE.items():
        axes.plot(*of(name), "o", color="#607d8b")
        axes.annotate(label, of(name), xytext=(-20, 7), textcoords="offset points", fontsize=9)
    for (name, point), color in zip(points_beside_trl(log).items(), ("#4a7a4f", "#b3261e"), strict=True):
        axes.plot(*point, "s", color=color, label=f"20 rollouts of 64 prompts: {name}")
        print(f"{name}: VADER {point[1]:.3f} at KL {point[0]:.2f}")
    axes.set_xlim(2, 9.8)
    axes.set_xlabel("KL to SFT, nats a reply")
    axes.set_ylabel("VADER, a judge that training never sees")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "images" / "judge_against_kl.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
