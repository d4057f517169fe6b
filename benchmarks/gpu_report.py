"""What this machine makes of the program, in ten minutes: parts with a limit of time each.

    make gpu-report
    python benchmarks/gpu_report.py --only environment,ppo --output runs/gpu_report.json

Each part is a process. After it, what is known is written as JSON, so that a machine that goes away
leaves what it had. A part that fails or takes too long is noted with its last words, and the next
begins. On a GPU the model has the shape of Qwen3-1.7B and 512 + 256 tokens; on a CPU all is in
miniature.
"""

import argparse
import json
import platform
import runpy
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
Seconds = defaultdict[str, float]  # by phase
LAST_WORDS = 2000  # characters of what a part that failed has said
WIDTH = {"cuda": 4096, "cpu": 256}  # of the matrices whose products are timed


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def timed(seconds: Seconds, phase: str) -> Iterator[None]:
    """Add the seconds that a phase takes, the device's work included."""
    synchronize()
    started = time.perf_counter()
    yield
    synchronize()
    seconds[phase] += time.perf_counter() - started


# ---- Parts, the most valuable first ----
def environment() -> dict[str, Any]:
    """Return versions, the device, and the speed of products in each dtype (TFLOP/s)."""
    import torch

    from goose_lora.training.versions import versions

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, width = platform.processor() or platform.machine(), WIDTH[device]
    if device == "cuda":
        name = torch.cuda.get_device_name()
    speeds = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.ones(width, width, dtype=dtype, device=device)
        torch.mm(x, x)
        synchronize()
        started = time.perf_counter()
        for _ in range(10):
            torch.mm(x, x)
        synchronize()
        speeds[str(dtype)] = 10 * 2 * width**3 / (time.perf_counter() - started) / 1e12
    return {"versions": versions(), "device": device, "name": name, "TFLOP/s": speeds}


def _model(folder: Path) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """Return benchmarks/memory.py, a model's arguments, sizes of a run, and the model's shape."""
    import torch

    from goose_lora.models.arguments import ModelArguments

    memory = runpy.run_path(str(HERE.with_name("memory.py")))
    if torch.cuda.is_available():
        path = memory["random_model"](folder / "base", "1.7B")
        sizes = {"max_prompt_tokens": 512, "response_length": 256, "per_device_train_batch_size": 8}
        return memory, ModelArguments(path), sizes | {"use_cpu": False}, {"shape": "1.7B"}
    memory["small_model"](folder / "base", num_hidden_layers=2, vocab_size=256)
    sizes = {"max_prompt_tokens": 16, "response_length": 8, "per_device_train_batch_size": 2}
    arguments = ModelArguments(str(folder / "base"), quantization="none", dtype="float32")
    return memory, arguments, sizes, {"shape": "miniature"}


def ppo() -> dict[str, Any]:
    """Return seconds of each phase of a rollout, by critic and checkpointing."""
    from goose_lora.models.loading import load_tokenizer

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        memory, arguments, sizes, found["of"] = _model(Path(name))
        for critic in ("adapter", "shared"):
            for checkpointing in (False, True):
                seconds: Seconds = defaultdict(float)
                changes = {"critic": critic, "gradient_checkpointing": checkpointing}
                config = memory["settings"](Path(name) / "run", rollout_weights="shared", **sizes, **changes)
                memory["ready_run"](
                    load_tokenizer(arguments), arguments, config, None, partial(timed, seconds)
                ).train()
                found[f"{critic}, checkpointing: {checkpointing}"] = dict(seconds)
    return found


def generation() -> dict[str, Any]:
    """Return tokens a second of a rollout, by weights and group."""
    from goose_lora.models.loading import load_tokenizer

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        memory, arguments, sizes, found["of"] = _model(Path(name))
        rows = sizes["per_device_train_batch_size"]
        for weights in ("shared", "dense"):
            for group in (rows, max(1, rows // 2)):
                seconds: Seconds = defaultdict(float)
                changes = {"rollout_weights": weights, "local_rollout_forward_batch_size": group}
                config = memory["settings"](Path(name) / "run", **sizes, **changes)
                memory["ready_run"](
                    load_tokenizer(arguments), arguments, config, None, partial(timed, seconds)
                ).train()
                tokens = config.num_rollouts * rows * config.response_length
                found[f"{weights}, groups of {group}"] = tokens / seconds["generate"]
    return found


def float16() -> dict[str, Any]:
    """Return seconds of each phase, the gap of sampling (nats a token) and loss scale, by dtype."""
    from goose_lora.models.loading import load_tokenizer

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        memory, arguments, sizes, found["of"] = _model(Path(name))
        for dtype in ("bfloat16", "float16"):
            seconds: Seconds = defaultdict(float)
            config = memory["settings"](Path(name) / "run", rollout_weights="shared", **sizes)
            of_dtype = replace(arguments, dtype=dtype)
            run = memory["ready_run"](
                load_tokenizer(of_dtype), of_dtype, config, None, partial(timed, seconds)
            )
            run.train()
            logs = {key: value for row in run.state.log_history for key, value in row.items()}
            shown = ("rollout/sampling_gap", "policy/first_ratio_gap", "loss_scale", "loss_scale_skips")
            found[dtype] = dict(seconds) | {key: logs[key] for key in shown if key in logs}
    return found


def plan() -> dict[str, Any]:
    """Return the memory plan's bytes beside the allocator's peaks, by phase; on a GPU alone."""
    import torch

    if not torch.cuda.is_available():
        return {"skipped": "there is no GPU"}
    with tempfile.TemporaryDirectory() as name:
        memory, arguments, sizes, of = _model(Path(name))
        config = memory["settings"](Path(name) / "run", **memory["FIRST"] | sizes)
        planned, peaks = memory["measured_gpu"](arguments, config)
    return {"of": of, "plan": planned, "peaks": {phase: peak._asdict() for phase, peak in peaks.items()}}


def tests() -> dict[str, Any]:
    """Return the last line of the tests that need a GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "tests/end_to_end/test_gpu.py"],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    return {"exit": done.returncode, "said": done.stdout.strip().splitlines()[-1:]}


# By name: the part, and the most seconds that it may take.
PARTS: dict[str, tuple[Callable[[], dict[str, Any]], int]] = {
    "environment": (environment, 60),
    "ppo": (ppo, 180),
    "generation": (generation, 120),
    "float16": (float16, 90),
    "plan": (plan, 90),
    "tests": (tests, 120),
}


# ---- The report ----
def report(names: list[str], output: Path, limit: float | None = None) -> dict[str, Any]:
    """Run the parts one after another, and write what is known after each."""
    found: dict[str, Any] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        started = time.perf_counter()
        found[name] = _part(name, limit or PARTS[name][1])
        found[name]["seconds"] = round(time.perf_counter() - started, 1)
        # Whole or not at all: beside its place, then renamed
        temporary = output.with_name(f".{output.name}.tmp")
        temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        temporary.replace(output)
        print(name, json.dumps(found[name]), flush=True)
    return found


def _part(name: str, limit: float) -> dict[str, Any]:
    """Run a part in a process of its own; return its result, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(HERE), "--part", name, "--output", str(result)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done in {limit:g} s"}
        if done.returncode != 0 or not result.is_file():
            return {"failed": (done.stderr or done.stdout)[-LAST_WORDS:], "exit": done.returncode}
        return {"result": json.loads(result.read_text(encoding="utf-8"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_report.json"))
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--limit", type=float, help="seconds of each part, in place of its own limit")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        arguments.output.write_text(json.dumps(PARTS[arguments.part][0]()), encoding="utf-8")
    else:
        report(arguments.only, arguments.output, arguments.limit)


if __name__ == "__main__":
    main()
