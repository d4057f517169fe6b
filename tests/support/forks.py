"""Recipes run by children of this process, which has imported everything: each may be killed, or
meet with worse, at a chosen moment.

Moments are counted by kind: a call of ``sample`` (rollout), of the shared base's ``forward``
(forward), of the optimizer's ``step`` (update), and each file that is opened to be written,
renamed, deleted or written through a library in ``output_dir`` (file).
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import peft.peft_model
import torch
import transformers.modeling_utils
from accelerate.state import AcceleratorState, GradientState, PartialState
from power import Disk
from ranks import become, free_port
from recipe_runs import options, recipe
from transformers import TrainerState

import goose_lora.cli.stage
import goose_lora.ppo.callbacks
import goose_lora.ppo.collector
import goose_lora.training.callbacks
from goose_lora import cli
from goose_lora.files import read_jsonl
from goose_lora.models.shared_base import SharedBase

RECIPES = {name: recipe(name) for name in ("sft", "reward", "ppo", "own_loop")}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def fill_the_disk():
    """No file grows beyond this any more: what a full disk does, for Python, C++ and Rust alike."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))


class Moment(NamedTuple):
    """The ``count``-th moment of a kind, and what happens then."""

    kind: str
    count: int
    action: Callable[[], None] = kill


class PowerCut(Moment):
    """A moment at which the power goes: ``cut_of`` the folder has what the disk would have."""


def cut_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-cut")


class Ended(NamedTuple):
    """``code`` is the exit code, negative for a signal; ``counts`` the moments seen by a child that
    was not killed."""

    code: int
    output: str
    counts: Counter


class Watch:
    """Counts moments, in the child."""

    def __init__(self, folder: Path, moment: Moment | None):
        self.folder, self.moment, self.counts = str(folder), moment, Counter()
        self.disk = None
        if isinstance(moment, PowerCut):
            self.disk = Disk(folder, moment.count)

    def see(self, kind: str) -> None:
        self.counts[kind] += 1
        if self.is_now(kind):
            self.act()

    def act(self) -> None:
        # The copy's own files are no moments
        disk, self.disk, self.folder = self.disk, None, "nowhere"
        if disk is not None:
            disk.cut(cut_of(disk.folder))
        self.moment.action()

    def is_now(self, kind: str) -> bool:
        return self.moment is not None and kind == self.moment.kind and self.counts[kind] == self.moment.count

    def audit(self, event: str, args: tuple) -> None:
        writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (
            event == "open" and isinstance(args[2], int) and args[2] & WRITES
        )
        if writes and isinstance(args[0], (str, os.PathLike)) and str(args[0]).startswith(self.folder):
            self.see("file")
            if self.disk is not None:
                self.disk.see(event, args)

    def around(self, owner, name: str, kind: str) -> None:
        call = getattr(owner, name)

        def seen(*args, **kwargs):
            self.see(kind)
            return call(*args, **kwargs)

        setattr(owner, name, seen)

    def cut(self, owner, name: str, path_at: int) -> None:
        """The writer leaves half of what it has to write if its moment has come."""
        call = getattr(owner, name)

        def written(*args, **kwargs):
            path = args[path_at]
            before = os.path.getsize(path) if os.path.exists(path) else 0
            result = call(*args, **kwargs)
            self.counts["file"] += 1
            if self.is_now("file"):
                os.truncate(path, (before + os.path.getsize(path)) // 2)
                self.act()
            return result

        setattr(owner, name, written)

    def install(self) -> None:
        sys.addaudithook(self.audit)
        self.around(goose_lora.ppo.collector, "sample", "rollout")
        self.around(SharedBase, "forward", "forward")
        self.around(torch.optim.AdamW, "step", "update")
        self.cut(torch, "save", 1)
        self.cut(peft.peft_model, "safe_save_file", 1)
        self.cut(TrainerState, "save_to_json", 1)
        self.cut(transformers.modeling_utils, "safe_save_file", 1)
        self.cut(goose_lora.ppo.callbacks, "append_line", 0)
        self.cut(goose_lora.training.callbacks, "append_line", 0)


def kill_all():
    """This process and the others of its run."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def run(name: str, folder: Path, moment: Moment | None = None, **settings) -> Ended:
    """``recipes/NAME.py`` with ``output_dir`` ``folder`` in a child, to its end or its moment."""
    child = _start(name, folder, folder.with_suffix(".log"), moment, settings)
    _, status = os.waitpid(child, 0)
    return _ended(folder.with_suffix(".log"), status)


def run_words(main: Callable[[], object], words: list, folder: Path, moment: Moment | None = None) -> Ended:
    """Any other command in a child, whose moments are those of ``folder``."""
    log = folder.with_name(f"{folder.name}.log")

    def called() -> None:
        sys.argv = ["goose-lora", *map(str, words)]
        main()

    child = _start("", folder, log, moment, {}, main=called)
    _, status = os.waitpid(child, 0)
    return _ended(log, status)


def run_ranks(
    name: str, folder: Path, moments: dict[int, Moment], *, limit: float = 60, **settings
) -> tuple[list[Ended], float]:
    """The same in two children that are the processes of one run, and the seconds from the end of
    the first to that of the other.

    Raises:
        TimeoutError: one goes on ``limit`` seconds after the other has ended. It is killed.
    """
    port, logs = free_port(), [folder.with_suffix(f".{rank}.log") for rank in range(2)]
    children: list[int] = []
    for rank, log in enumerate(logs):
        children.append(
            _start(name, folder, log, moments.get(rank), settings, lambda rank=rank: become(rank, 2, port))
        )
        os.setpgid(children[rank], children[0])
    statuses: dict[int, int] = {}
    first = 0.0
    while len(statuses) < 2:
        for child in set(children) - statuses.keys():
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                first = first or time.monotonic()
                statuses[child] = status
        if first and time.monotonic() > first + limit:
            os.killpg(children[0], signal.SIGKILL)
            for child in set(children) - statuses.keys():
                os.waitpid(child, 0)
            raise TimeoutError(
                f"one of two processes goes on {limit} s after the other has ended;"
                f" {[log.read_text()[-1500:] for log in logs]}"
            )
        time.sleep(0.02)
    return [
        _ended(log, statuses[child]) for log, child in zip(logs, children, strict=True)
    ], time.monotonic() - first


def _start(
    name: str,
    folder: Path,
    log: Path,
    moment: Moment | None,
    settings: dict,
    prepare: Callable[[], None] | None = None,
    main: Callable[[], object] | None = None,
) -> int:
    """The process id of a child that runs a recipe and leaves its output in ``log``, and, unless it
    is killed, its counts beside it."""
    counts = log.with_suffix(".counts")
    counts.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        handle = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        sys.stdout = sys.stderr = os.fdopen(handle, "w", buffering=1)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()  # a run in the parent would leave its own
        if prepare:
            prepare()
        for signum in (signal.SIGINT, signal.SIGTERM):
            # Background jobs ignore it
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
        watch = Watch(folder, moment)
        watch.install()
        goose_lora.cli.stage.plot_curves = lambda *args: None  # half of the time of so small a run
        sys.argv = [f"recipes/{name}.py", *options(**settings, output_dir=folder)]
        try:
            cli.command(main or RECIPES[name].main)()
            code = 0
        except SystemExit as error:
            code = error.code
        counts.write_text(json.dumps(watch.counts))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _ended(log: Path, status: int) -> Ended:
    counts = log.with_suffix(".counts")
    seen = Counter(json.loads(counts.read_text())) if counts.is_file() else Counter()
    return Ended(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), seen)


def leavings(folder: Path):
    """All that a run leaves and that must not depend on how often it was killed."""
    files = [path for path in folder.rglob("adapter_model.safetensors") if "checkpoint-" not in str(path)]
    weights = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    # A summary of the process, not of the run
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "train_runtime" not in row]
    # num_tokens is TRL's count, which begins anew in each process
    metrics = [
        {name: value for name, value in row.items() if "second" not in name and name != "num_tokens"}
        for row in rows
    ]
    samples = folder / "samples.jsonl"
    return weights, metrics, samples.read_text() if samples.is_file() else ""


def assert_same_leavings(straight, broken):
    want, got = leavings(straight), leavings(broken)
    assert want[0] and want[1]
    assert want[0].keys() == got[0].keys(), (want[0].keys(), got[0].keys())
    different = [name for name, weights in want[0].items() if got[0][name] != weights]
    rows = [(one, other) for one, other in zip(want[1], got[1], strict=False) if one != other]
    one, other = rows[0] if rows else ({}, {})
    first = {name: (one[name], other.get(name)) for name in one if one[name] != other.get(name)}
    assert not different and not rows and len(want[1]) == len(got[1]), (
        f"adapters {different}; the first row that differs: {first}"
    )
    assert got[2] == want[2], "samples"
