"""Memory, time and files over 200 rollouts of prompts and replies of other lengths each time, with
evaluations and checkpoints on the way.

Resident memory is read after garbage collection and after what is free has been given back to the
system: what is left grows only if something is held. Tensors that Python knows of are counted
beside it, without noise. What a step takes is counted in calls, which are the same on every
machine; its time, the processor's, is bounded widely, since a core does half as much where its
neighbour is busy, and with --full, for a quiet machine, to 15 %.
"""

import ctypes
import gc
import json
import sys
import time

import numpy
import psutil
import pytest
import tiny
import tiny_runs
import torch
from datasets import Dataset
from transformers import TrainerCallback

from goose_lora.files import read_jsonl
from goose_lora.reporting.diagnosis import diagnose

STEPS, WARM_UP = 200, 50
T_13 = 2.16  # two-sided 95 % of Student's t with 13 degrees of freedom
# Bytes a step with a log each: transformers keeps a row of figures of it, and writes all of them
# into each checkpoint
ROW_BOUND = 16_000
BARE_BOUND = 4_000  # with the log history emptied at each log; a rollout's tensors are over 40,000 here
LENGTHS = {"response_length": 16, "stop_token_ids": list(range(4, 9)), "per_device_train_batch_size": 8}


class Watch(TrainerCallback):
    """One figure a step of each kind."""

    def __init__(self):
        self.rss, self.tensors, self.blocks, self.seconds, self.calls, self.width = [], [], [], [], [], []
        self.started, self.called = None, 0
        gc.collect()
        gc.freeze()  # what is there before the run is not looked at again
        try:
            self.give_back = ctypes.CDLL(None).malloc_trim
        except AttributeError:
            pytest.skip("memory is measured with glibc's malloc_trim")

    def on_step_begin(self, args, state, control, **kwargs):
        if self.started is not None:  # the last step with its log, evaluation and checkpoint
            self.seconds.append(time.process_time() - self.started - self.watching)
            self.calls.append(self.called)
        self.called, self.started = 0, time.process_time()
        sys.setprofile(self.count)

    def count(self, frame, event, argument):
        self.called += event == "call" or event == "c_call"

    def on_step_end(self, args, state, control, **kwargs):
        before = time.process_time()
        sys.setprofile(None)
        gc.collect()
        self.give_back(0)
        self.rss.append(psutil.Process().memory_info().rss)
        self.tensors.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
        self.blocks.append(sys.getallocatedblocks())
        self.watching = time.process_time() - before
        sys.setprofile(self.count)

    def on_train_end(self, args, state, control, **kwargs):
        sys.setprofile(None)


def run(folder, steps, **changes):
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, 24, (256,), generator=generator).tolist()
    rows = Dataset.from_list(
        [
            {"input_ids": torch.randint(4, tiny.VOCABULARY, (n,), generator=generator).tolist()}
            for n in lengths
        ]
    )
    one = {
        "num_rollouts": steps,
        "num_mini_batches": 1,
        "num_ppo_epochs": 1,
        "gradient_accumulation_steps": 1,
        "sample_rows": 1,
    }
    evaluated = {"eval_strategy": "steps", "eval_steps": 20, "num_eval_prompts": 4}
    saved = {"save_strategy": "steps", "save_steps": 20, "save_total_limit": 2}
    ppo = tiny_runs.trainer(folder, rows=rows, eval_rows=rows, **LENGTHS | one | evaluated | saved | changes)
    watch = Watch()
    ppo.add_callback(watch)
    make = ppo.experience.make

    def noting(rollout, *args):
        watch.width.append(rollout.input_ids.shape[1])
        return make(rollout, *args)

    ppo.experience.make = noting
    return ppo, watch


def slope(values):
    """Of a line through the means of 15 blocks, a step, and the half width of its 95 % interval:
    single steps follow one another too closely."""
    values = numpy.asarray(values[-len(values) // 15 * 15 :], dtype=float)
    size = len(values) // 15
    means, at = values.reshape(15, size).mean(1), numpy.arange(15) * size
    (steep, _), covariance = numpy.polyfit(at, means, 1, cov=True)
    return steep, T_13 * covariance[0, 0] ** 0.5


def slowdown(taken, width):
    """Median of what steps of the last third took over the first's, each counted in what its number
    of columns takes over the whole run."""
    taken, width = numpy.asarray(taken), numpy.asarray(width)
    usual = numpy.polyval(numpy.polyfit(width, taken, 1), width)
    first, _, last = numpy.array_split(taken / usual, 3)
    return numpy.median(last) / numpy.median(first)


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    ppo, watch = run(folder, STEPS)
    halfway = {}

    class Sizes(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == STEPS // 2:
                halfway.update(sizes(folder))

    ppo.add_callback(Sizes())
    ppo.train()
    gc.unfreeze()
    return folder, watch, halfway


def sizes(folder):
    """Bytes of each file of a run by its name, of the newest checkpoint's under ``newest/``, and
    how many checkpoints there are."""
    saved = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    files = {
        f"newest/{path.relative_to(saved[-1])}": path.stat().st_size
        for path in saved[-1].rglob("*")
        if path.is_file()
    }
    return (
        files
        | {
            path.name: path.stat().st_size
            for path in folder.iterdir()
            if path.is_file() and path.name[0] != "."
        }
        | {"checkpoints": len(saved)}
    )


def test_resident_memory_grows_by_a_row_of_figures_a_log_at_most(long, capsys):
    _, watch, _ = long
    steep, margin = slope(watch.rss[WARM_UP:])
    with capsys.disabled():
        print(
            f"\nresident memory: {steep:.0f} +- {margin:.0f} bytes a step over {len(watch.rss) - WARM_UP}"
            " steps"
        )
    assert steep + margin < ROW_BOUND, (steep, margin)


def test_no_tensor_is_kept_beyond_its_rollout(long):
    _, watch, _ = long
    assert len(set(watch.width)) > 8, "rollouts are of many widths"
    assert max(watch.tensors[WARM_UP + 75 :]) <= max(watch.tensors[WARM_UP : WARM_UP + 75]), watch.tensors


def test_python_keeps_a_row_of_figures_a_rollout_and_nothing_else(long, capsys):
    _, watch, _ = long
    steep, margin = slope(watch.blocks[WARM_UP:])
    with capsys.disabled():
        print(f"\nobjects of Python: {steep:.0f} +- {margin:.0f} blocks a step")
    assert steep + margin < 150, (steep, margin)


class Forget(TrainerCallback):
    def on_log(self, args, state, control, **kwargs):
        state.log_history.clear()


def test_but_for_the_log_history_it_stays_and_a_leak_of_each_rollouts_batch_is_detected(tmp_path, capsys):
    ppo, watch = run(tmp_path, 120, save_strategy="no", eval_strategy="no")
    ppo.add_callback(Forget())
    kept, make = [], ppo.experience.make

    def leaking(*args):
        made = make(*args)
        if ppo.state.global_step >= 60:
            kept.append(made[0])
        return made

    ppo.experience.make = leaking
    ppo.train()
    gc.unfreeze()
    (before, margin), (after, wide) = slope(watch.rss[15:60]), slope(watch.rss[60:])
    with capsys.disabled():
        print(
            f"\nwithout the log history: {before:.0f} +- {margin:.0f} bytes a step, and {after:.0f} +-"
            f" {wide:.0f} with the planted leak"
        )
    assert before + margin < BARE_BOUND and after - wide > ROW_BOUND, (before, margin, after, wide)
    assert (
        max(watch.tensors[15:60]) <= max(watch.tensors[:15])
        and watch.tensors[-1] - watch.tensors[59] >= 60 * 8
    )


class Scan(TrainerCallback):
    """Looks at each figure of the whole log in each step: work that grows with the run."""

    def on_step_end(self, args, state, control, **kwargs):
        self.found = sum(
            abs(figure) > 0 for _ in range(30) for row in state.log_history for figure in row.values()
        )


def test_a_step_takes_as_much_at_the_end_as_at_the_start(long, capsys, request):
    _, watch, _ = long
    width = watch.width[WARM_UP : STEPS - 1]
    calls, seconds = slowdown(watch.calls[WARM_UP:], width), slowdown(watch.seconds[WARM_UP:], width)
    with capsys.disabled():
        median = numpy.median(watch.seconds[WARM_UP:])
        print(
            f"\na step, last third over first: {calls:.3f} in calls, {seconds:.3f} in processor time (median"
            f" {median * 1000:.0f} ms, profiled)"
        )
    assert calls < 1.03
    assert seconds < (1.15 if request.config.getoption("--full") else 2)


def test_a_step_that_looks_through_the_whole_log_is_detected(tmp_path):
    ppo, watch = run(tmp_path, 60, save_strategy="no", eval_strategy="no")
    ppo.add_callback(Scan())
    ppo.train()
    gc.unfreeze()
    slower = slowdown(watch.calls[15:], watch.width[15:59])
    assert slower > 1.03, slower


def test_the_diagnosis_of_a_long_log_takes_time_in_proportion_to_it(long):
    rows = [row for row in read_jsonl(long[0] / "metrics.jsonl") if "objective/score" in row]

    def seconds(copies):
        longer = [row | {"step": STEPS * copy + row["step"]} for copy in range(copies) for row in rows]
        started = time.process_time()
        diagnose(longer)
        return time.process_time() - started

    assert seconds(40) < 25 * seconds(5), "eight times the rows, where the square would be 64 times"


def test_files_stay_but_for_a_row_a_log_and_the_samples(long):
    folder, _, before = long
    after = sizes(folder)
    assert before.keys() == after.keys() and before["checkpoints"] == after["checkpoints"] == 2
    grown = {name for name in before if after[name] - before[name] > 64}  # a step or a time of more digits
    assert grown == {"metrics.jsonl", "samples.jsonl", "newest/trainer_state.json"}
    assert all((after[name] - before[name]) / (STEPS / 2) < 3000 for name in grown), "bytes a step"
    rows = read_jsonl(folder / "metrics.jsonl")
    assert len(rows) == STEPS + STEPS // 20 + 1, "a row a rollout, one an evaluation, and the summary"
    assert (
        max(len(json.dumps(row)) for row in rows) < 2000
        and len(read_jsonl(folder / "samples.jsonl")) == STEPS
    )
