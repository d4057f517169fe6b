"""One PPO step of this project and of its peers, side by side: FLOPs, CPU seconds and peak memory.

    python benchmarks/step.py --trl-ppo .venv-parity/bin/python --output runs/bench \\
        [--dtypes float32 bfloat16] [--cases ours-all-adapter ...]

``make bench`` does that. The work is that of SmolLM2-135M with random weights: 16 prompts of 32
tokens, replies of 32, 4 epochs, LoRA of rank 16 on all linear layers. Each case is a process on one
thread; run it on a quiet machine, since they are compared. FLOPs are those of torch's counter,
seconds those of the process, memory is what was resident at the peak above what the imports took.
What is finished is not run again. Writes step.json, step.md and step.png.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from counted import SHAPES, Work, goose, trl_ppo

HERE = Path(__file__).resolve().parent
WORK = {"batch": 16, "prompt": 32, "response": 32, "epochs": 4}
OURS = {"side": "goose", "quantization": "none"}
CASES: dict[str, dict[str, Any]] = {
    "trl-ppo": {"side": "trl_ppo"},
    "ours-all-adapter": OURS | {"layers": "all", "critic": "adapter"},
    "ours-all-shared": OURS | {"layers": "all", "critic": "shared"},
    "ours-top7-adapter": OURS | {"layers": "top-7", "critic": "adapter"},
    "ours-top7-shared": OURS | {"layers": "top-7", "critic": "shared"},
    "ours-top7-reward_features": OURS | {"layers": "top-7", "critic": "reward_features"},
    "ours-top7-adapter-nf4": OURS | {"layers": "top-7", "critic": "adapter", "quantization": "nf4"},
    "ours-top7-adapter-nf4-shared_rollouts": (
        OURS | {"layers": "top-7", "critic": "adapter", "quantization": "nf4", "rollout_weights": "shared"}
    ),
    "trl-grpo": {"side": "trl_group", "estimator": "grpo", "generations": 4},
    "trl-rloo": {"side": "trl_group", "estimator": "rloo", "generations": 4},
    "ours-top7-grpo": OURS | {"layers": "top-7", "critic": None, "estimator": "grpo", "generations": 4},
}
PHASES = ("generate", "score", "update")


def run(name: str, dtype: str, output: Path, trl_python: str, steps: int) -> None:
    """One case in a process of its own."""
    result, case = output / f"{name}-{dtype}.json", CASES[name]
    if result.is_file():
        return
    python = trl_python if case["side"] == "trl_ppo" else sys.executable
    words = json.dumps(case | WORK | {"dtype": dtype, "steps": steps, "output": str(result)})
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    log = result.with_suffix(".log")
    print(f"{name}, {dtype} ...", flush=True)
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(
            [python, str(HERE / f"step_{case['side']}.py"), words],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        sys.exit(f"{name} ended with exit code {done.returncode}; see {log}")


def counted(name: str) -> dict[str, int] | None:
    """The FLOPs that the design needs, where they are counted by hand."""
    case, shape, work = CASES[name], SHAPES["135M"], Work(**WORK)
    if case["side"] == "trl_ppo":
        return trl_ppo(shape, work)
    if case["side"] != "goose":
        return None
    layers = shape.layers if case["layers"] == "all" else int(case["layers"].partition("-")[2])
    return goose(shape, work, layers=layers, critic=case["critic"])


def table(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Return a table with a line a case: GFLOP and seconds by phase, and memory.

    It also has how many times less that is than TRL's PPO in the same dtype.
    """
    lines = [
        (
            "| case | dtype | GFLOP: generate, score, update | counted | score + update, times fewer "
            "| CPU s: generate, score, update | whole step, times faster | peak MB | times less |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, dtype), row in found.items():
        peer = found.get(("trl-ppo", dtype), row)
        flops, by_hand = row["flops"], counted(name)
        work, peers = (x["flops"]["score"] + x["flops"]["update"] for x in (row, peer))
        seconds, peer_seconds = (sum(x["seconds"].values()) for x in (row, peer))
        # To the counter, a product with a 4-bit matrix is nothing
        seen = CASES[name].get("quantization") != "nf4"
        cells = [name, dtype, ", ".join(f"{flops[phase] / 1e9:,.0f}" for phase in PHASES) if seen else "-"]
        cells += [
            "-" if by_hand is None else ", ".join(f"{by_hand[phase] / 1e9:,.0f}" for phase in PHASES),
            f"{peers / work:.2f}" if seen else "-",
        ]
        cells += [
            ", ".join(f"{row['seconds'].get(phase, 0):.1f}" for phase in PHASES),
            f"{peer_seconds / seconds:.2f}",
        ]
        cells += [f"{row['peak_mb']:,.0f}", f"{peer['peak_mb'] / row['peak_mb']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def growth() -> str:
    """Return a table of how the counted FLOPs grow with model, length, batch and epochs.

    This project trains the top quarter of the layers, against TRL's PPO.
    """
    lines = [
        "| model | prompt + reply | batch | epochs | TRL PPO, TFLOP | own critic | shared critic | times"
        " fewer |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        for prompt, response, batch, epochs in (
            (32, 32, 16, 4),
            (512, 256, 16, 4),
            (512, 256, 64, 4),
            (512, 256, 16, 1),
            (2048, 1024, 16, 4),
        ):
            work = Work(batch, prompt, response, epochs)
            peer = sum(trl_ppo(shape, work).values())
            ours = [
                sum(goose(shape, work, layers=shape.layers // 4, critic=critic).values())
                for critic in ("adapter", "shared")
            ]
            times = " / ".join(f"{peer / own:.1f}" for own in ours)
            tera = [f"{flops / 1e12:,.1f}" for flops in (peer, *ours)]
            lines.append(
                "| "
                + " | ".join([name, f"{prompt} + {response}", str(batch), str(epochs), *tera, times])
                + " |"
            )
    return "\n".join(lines)


def plot(found: dict[tuple[str, str], dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [f"{name}\n{dtype}" if len({d for _, d in found}) > 1 else name for name, dtype in found]
    figure, axes = plt.subplots(1, 3, figsize=(15, 0.42 * len(found) + 1.6), sharey=True)
    places = range(len(found))[::-1]
    for axis, key, title, unit in (
        (axes[0], "flops", "GFLOP a step", 1e9),
        (axes[1], "seconds", "CPU seconds a step, one thread", 1),
    ):
        left = [0.0] * len(found)
        for phase, colour in zip(PHASES, ("#8fb8de", "#f2b36b", "#c96567"), strict=True):
            shown = [
                counted(name) if key == "flops" and CASES[name].get("quantization") == "nf4" else row[key]
                for (name, _), row in found.items()
            ]
            widths = [(figures or {}).get(phase, 0) / unit for figures in shown]
            axis.barh(places, widths, left=left, color=colour, label=phase)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.set_title(title)
    axes[2].barh(places, [row["peak_mb"] for row in found.values()], color="#7a8b99")
    axes[2].set_title("peak memory above the imports, MB")
    axes[0].set_yticks(places, names)
    axes[0].legend(loc="lower right")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trl-ppo",
        default=str(HERE.parent / ".venv-parity" / "bin" / "python"),
        help="Python of an environment with trl==1.12.0",
    )
    parser.add_argument("--output", type=Path, default=HERE.parent / "runs" / "bench")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["float32", "bfloat16"],
        help="both where the CPU multiplies bfloat16, else float32",
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--steps", type=int, default=2, help="timed steps of each case, after one that is counted"
    )
    arguments = parser.parse_args()
    dtypes = arguments.dtypes
    if dtypes is None:
        from goose_lora.models.quantization import cpu_multiplies_bf16

        dtypes = ["float32", "bfloat16"] if cpu_multiplies_bf16() else ["float32"]
    arguments.output.mkdir(parents=True, exist_ok=True)
    for dtype in dtypes:
        for name in arguments.cases:
            run(name, dtype, arguments.output, arguments.trl_ppo, arguments.steps)
    paths = {(name, dtype): arguments.output / f"{name}-{dtype}.json" for dtype in dtypes for name in CASES}
    found = {
        key: json.loads(path.read_text(encoding="utf-8")) for key, path in paths.items() if path.is_file()
    }
    text = (
        f"{table(found)}\n\nCounted by hand, whole step, adapters in the top quarter of the"
        f" layers:\n\n{growth()}\n"
    )
    (arguments.output / "step.md").write_text(text, encoding="utf-8")
    (arguments.output / "step.json").write_text(
        json.dumps({f"{n}, {d}": row for (n, d), row in found.items()}, indent=2), encoding="utf-8"
    )
    plot(found, arguments.output / "step.png")
    print(text)


if __name__ == "__main__":
    main()
