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
MOST_ROWS = 64  # of a microbatch of the 8B
MINUTES = 10.0  # that the whole report may take
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


def _compiling() -> Any:
    """Return how steps of decoding are compiled."""
    import torch
    from transformers import CompileConfig

    if torch.cuda.is_available():
        return CompileConfig(mode="reduce-overhead", dynamic=False)
    # Captured and not compiled: C++ would take longer than all the rest
    config: Any = CompileConfig(backend="eager", mode="default", dynamic=False)
    config._compile_all_devices = True
    return config


def ppo() -> dict[str, Any]:
    """Return seconds of each phase of a rollout, by critic, checkpointing and compilation."""
    from goose_lora.generation.static_cache import StaticCache
    from goose_lora.models.loading import load_tokenizer

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        memory, arguments, sizes, found["of"] = _model(Path(name))

        def phases(*, compiled: bool = False, **changes: Any) -> dict[str, float]:
            seconds: Seconds = defaultdict(float)
            config = memory["settings"](Path(name) / "run", **sizes, **changes)
            tokenizer = load_tokenizer(arguments)
            run = memory["ready_run"](tokenizer, arguments, config, None, partial(timed, seconds))
            if compiled:
                run.collector.static = StaticCache(_compiling())
            run.train()
            return dict(seconds)

        for critic in ("adapter", "shared"):
            for checkpointing in (False, True):
                changes = {"critic": critic, "gradient_checkpointing": checkpointing}
                found[f"{critic}, checkpointing: {checkpointing}"] = phases(
                    rollout_weights="shared", **changes
                )
        backend = "inductor" if sizes.get("use_cpu") is False else "eager"
        # Both halves compiled: rollouts by CUDA graphs, and the update by Trainer's setting
        for setting, changes in (
            ("rollouts compiled", {"rollout_weights": "dense"}),
            (
                "update compiled",
                {"rollout_weights": "shared", "torch_compile": True, "torch_compile_backend": backend},
            ),
        ):
            try:
                found[f"shared, {setting}"] = phases(
                    critic="shared", compiled=changes["rollout_weights"] == "dense", **changes
                )
            # What a compiler cannot do is a result, too
            except Exception as error:
                found[f"shared, {setting}"] = {"failed": f"{type(error).__name__}: {error}"[:LAST_WORDS]}
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


def busy() -> dict[str, Any]:
    """Return the share of each PPO phase's time in which the device computes."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile, record_function

    from goose_lora.models.loading import load_tokenizer

    kind, activity = DeviceType.CPU, ProfilerActivity.CPU
    if torch.cuda.is_available():
        kind, activity = DeviceType.CUDA, ProfilerActivity.CUDA
    with tempfile.TemporaryDirectory() as name:
        memory, arguments, sizes, of = _model(Path(name))
        config = memory["settings"](Path(name) / "run", rollout_weights="shared", **sizes)
        spans: list[tuple[str, int, int]] = []

        @contextmanager
        def inside(phase: str) -> Iterator[None]:
            synchronize()
            started = time.time_ns()
            with record_function(f"phase:{phase}"):
                yield
            synchronize()
            spans.append((phase, started, time.time_ns()))

        run = memory["ready_run"](load_tokenizer(arguments), arguments, config, None, inside)
        with profile(activities=[activity]) as trace:
            run.train()
    events = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
    working = [
        (event.start_ns(), event.end_ns())
        for event in events
        if event.device_type() == kind and not event.name().startswith(("phase:", "["))
    ]
    return {"of": of, "share": busy_share(spans, working)}


def busy_share(spans: list[tuple[str, int, int]], working: list[tuple[int, int]]) -> dict[str, float]:
    """Return the part of each phase's spans in which one of the ``working`` intervals runs."""
    # In the order of their beginnings, each from where those before it end
    apart, reached = [], 0
    for start, end in sorted(working):
        if end > reached:
            apart.append((max(start, reached), end))
            reached = end
    inside: Seconds = defaultdict(float)
    whole: Seconds = defaultdict(float)
    for phase, begin, stop in spans:
        whole[phase] += stop - begin
        inside[phase] += sum(max(0, min(end, stop) - max(start, begin)) for start, end in apart)
    return {phase: inside[phase] / whole[phase] for phase in whole}


def caches() -> dict[str, Any]:
    """Return tokens a second of a dense copy, and the first rollout's seconds, by form of cache."""
    import torch

    from goose_lora.generation.static_cache import StaticCache
    from goose_lora.models.loading import load_tokenizer

    forms = {"growing": None, "static": StaticCache(), "compiled": StaticCache(_compiling())}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        memory, arguments, sizes, found["of"] = _model(Path(name))
        config = memory["settings"](Path(name) / "run", rollout_weights="dense", **sizes)
        tokenizer = load_tokenizer(arguments)
        run = memory["ready_run"](tokenizer, arguments, config, None, partial(timed, defaultdict(float)))
        rows, width = config.rollout_batch_size, config.max_prompt_tokens
        ids = torch.full((rows, width), 5, device=run.collector.device)
        for form, static in forms.items():
            run.collector.static, all_seconds = static, []
            for _ in range(3):
                seconds: Seconds = defaultdict(float)
                with timed(seconds, "generate"):
                    run.collector.generate(ids, torch.ones_like(ids))
                all_seconds.append(seconds["generate"])
            found[form] = {
                "tokens a second": rows * config.response_length / min(all_seconds[1:]),
                "first": all_seconds[0],
                "serves": static.serves if static else True,
            }
    return found


def capped(gigabytes: int) -> dict[str, Any]:
    """Return an 8B's plan and peaks at the plan's largest microbatch, on so much of the device."""
    import torch

    from goose_lora.models.arguments import ModelArguments
    from goose_lora.models.compatibility import meta_model
    from goose_lora.models.loading import load_tokenizer
    from goose_lora.planning.memory import Planner

    memory = runpy.run_path(str(HERE.with_name("memory.py")))
    changes = memory["LONG"] | {"use_cpu": False, "gradient_checkpointing": True}
    small = not torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if small:
            memory["small_model"](folder / "base", num_hidden_layers=2, vocab_size=256)
            arguments = ModelArguments(str(folder / "base"), quantization="none", dtype="float32")
            changes |= {"max_prompt_tokens": 16, "response_length": 8, "use_cpu": True}
            limit = gigabytes * 10**7
        else:
            total, limit = torch.cuda.get_device_properties(0).total_memory, gigabytes * 10**9
            if total < limit:
                return {"skipped": f"the card has {total / 1e9:.1f} GB"}
            torch.cuda.set_per_process_memory_fraction(limit / total)
            arguments = ModelArguments(memory["random_model"](folder / "base", "8B"))
        one = memory["settings"](folder / "run", per_device_train_batch_size=1, **changes)
        device = "cpu" if small else "cuda"
        planner = Planner(meta_model(arguments), arguments, one, memory=limit, device=device)
        rows = min(MOST_ROWS, planner.largest(limit)["per_device_train_batch_size"])
        if not rows:
            return {"skipped": f"by the plan an 8B does not fit {gigabytes} GB at 512 + 256 tokens"}
        config = memory["settings"](folder / "run", per_device_train_batch_size=rows, **changes)
        found = {"rows": rows, "limit": limit}
        if small:
            run = partial(memory["ready_run"], load_tokenizer(arguments), arguments, config, None)
            seconds: Seconds = defaultdict(float)
            run(partial(timed, seconds)).train()
            return found | {"seconds": dict(seconds)}
        planned, peaks = memory["measured_gpu"](arguments, config)
    return found | {"plan": planned, "peaks": {phase: peak._asdict() for phase, peak in peaks.items()}}


def peer(algorithm: str, python: str = sys.executable) -> dict[str, Any]:
    """Return seconds of a step and peak memory of TRL's GRPO, or of its last PPO, on our work."""
    if not Path(python).is_file():
        return {"skipped": f"there is no {python}: make {Path(python).parents[1].name}/.installed"}
    with tempfile.TemporaryDirectory() as name:
        _, arguments, sizes, of = _model(Path(name))
        script, result = HERE.with_name("gpu_report_peer.py"), Path(name) / "peer.json"
        case = {
            "algorithm": algorithm,
            "model": arguments.model_name_or_path,
            "rows": sizes["per_device_train_batch_size"],
            "prompt": sizes["max_prompt_tokens"],
            "response": sizes["response_length"],
            "result": str(result),
        }
        done = subprocess.run([python, str(script), json.dumps(case)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError((done.stderr or done.stdout)[-LAST_WORDS:])
        return {"of": of, **json.loads(result.read_text(encoding="utf-8"))}


def demo() -> dict[str, Any]:
    """Return seconds of the demo's stages, and what it says at the end; on a GPU alone."""
    import torch

    if not torch.cuda.is_available():
        return {"skipped": "on a CPU it takes minutes: make demo"}
    done = subprocess.run(["make", "demo"], cwd=HERE.parents[1], capture_output=True, text=True)
    return {"exit": done.returncode, "said": done.stdout.strip().splitlines()[-20:]}


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
    "busy": (busy, 60),
    "generation": (generation, 120),
    "caches": (caches, 120),
    "float16": (float16, 90),
    "trl_grpo": (partial(peer, "grpo"), 60),
    "trl_ppo": (partial(peer, "ppo", str(HERE.parents[1] / ".venv-parity" / "bin" / "python")), 60),
    "8B_24GB": (partial(capped, 24), 90),
    "8B_16GB": (partial(capped, 16), 90),
    "8B_12GB": (partial(capped, 12), 90),
    "plan": (plan, 90),
    "tests": (tests, 120),
    "demo": (demo, 300),
}


# ---- The report ----
def report(
    names: list[str], output: Path, limit: float | None = None, minutes: float = MINUTES
) -> dict[str, Any]:
    """Run the parts one after another, and write what is known after each.

    Parts for which nothing of ``minutes`` is left are noted, and not begun.
    """
    found: dict[str, Any] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + 60 * minutes
    for name in names:
        started = time.perf_counter()
        if started < end:
            found[name] = _part(name, min(limit or PARTS[name][1], end - started))
        else:
            found[name] = {"failed": f"not begun: {minutes:g} minutes are over"}
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
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of the whole report")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        arguments.output.write_text(json.dumps(PARTS[arguments.part][0]()), encoding="utf-8")
    else:
        report(arguments.only, arguments.output, arguments.limit, arguments.minutes)


if __name__ == "__main__":
    main()
