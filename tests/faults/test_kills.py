"""Runs that are killed without warning, again and again, end where the one that was left alone
ends: weights, metrics and samples. So do copies of what a loss of power leaves of them."""

import random
import shutil
import sys

import forks
import pytest
import tiny_chain
from forks import Moment, PowerCut, assert_same_leavings, cut_of

from goose_lora import cli
from goose_lora.apps.label import LabelQueue
from goose_lora.apps.label_file import ChoiceFile
from goose_lora.apps.session import SampledReply
from goose_lora.files import read_jsonl

KINDS = ("rollout", "forward", "update", "file", "file")


def killed_again_and_again(name, folder, settings, kills, seed, *, anywhere):
    """How often it was killed until it ended as the one that is left alone, from whose moments
    those of the kills are drawn."""
    straight = forks.run(name, folder / "straight", **settings)
    assert straight.code == 0, straight.output[-3000:]
    generator = random.Random(seed)
    killed, done = 0, 0
    while killed < kills or done == 0:
        broken, moment = folder / f"broken-{done}", None
        if killed < kills:
            kind = generator.choice([kind for kind in KINDS if straight.counts[kind]])
            # A run that goes on has fewer moments than the whole one
            last = straight.counts[kind] // (1 if anywhere and killed % 3 == 0 else 2)
            moment = Moment(kind, generator.randint(1, max(1, last)))
        ended = forks.run(name, broken, moment, **settings, resume_from_checkpoint="latest")
        assert ended.code in (0, -9), ended.output[-3000:]
        killed += ended.code != 0
        if ended.code == 0:
            done += 1
            assert_same_leavings(folder / "straight", broken)
    return killed


ADAPTIVE = {
    "kl_target": 1.0,
    "kl_horizon": 50,
    "score_normalization": "running",
    "ema_decay": 0.9,
    "critic_warmup_rollouts": 1,
}
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "num_eval_prompts": 4,
    "load_best_model_at_end": True,
    "save_total_limit": 1,
}
RLOO = {
    "advantage_estimator": "rloo",
    "num_generations": 2,
    "lr_scheduler_type": "linear",
    "save_total_limit": 1,
}
KILLED: list[int] = []


@pytest.mark.parametrize(
    ("name", "changes", "kills", "full", "seed"),
    [
        ("ppo", ADAPTIVE, 8, 14, 1),
        ("ppo", BEST, 7, 12, 2),
        ("ppo", RLOO, 7, 10, 3),
        ("own_loop", {"critic": "shared"}, 4, 12, 4),
        ("sft", {}, 3, 12, 5),
        ("reward", {}, 3, 12, 6),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_where_it_would_have_ended(
    name, changes, kills, full, seed, given, tmp_path, request
):
    settings = given[name] | changes
    if "eval_strategy" in changes:
        settings["eval_dataset_name"] = settings["dataset_name"]
    everything = request.config.getoption("--full")
    times = full if everything else kills
    KILLED.append(killed_again_and_again(name, tmp_path, settings, times, seed, anywhere=everything))


def test_twenty_kills_or_more_were_survived():
    assert sum(KILLED) >= 20, KILLED


# ---- Commands that write ----


def merged(folder, run, moment=None):
    words = ["merge", run, "--out", folder / "out", "--dtype", "float32"]
    return forks.run_words(cli.main, words, folder, moment)


def test_a_merge_that_is_killed_leaves_a_whole_model_or_none_and_the_next_one_ends(
    adapter_chain, tmp_path, request
):
    run = tiny_chain.copy(adapter_chain, tmp_path / "chain") / "ppo"
    for name in ("straight", "broken"):
        (tmp_path / name).mkdir()
    straight = merged(tmp_path / "straight", run)
    assert straight.code == 0, straight.output[-3000:]
    want = left_by_merge(tmp_path / "straight")
    kills, killed = 8 if request.config.getoption("--full") else 2, 0
    generator = random.Random(7)
    while killed < kills:
        moment = Moment("file", generator.randint(1, straight.counts["file"]))
        ended = merged(tmp_path / "broken", run, moment)
        assert ended.code in (0, -9), ended.output[-3000:]
        killed += ended.code != 0
        if (tmp_path / "broken" / "out").exists():
            assert left_by_merge(tmp_path / "broken") == want
            shutil.rmtree(tmp_path / "broken" / "out")
    assert merged(tmp_path / "broken", run).code == 0
    assert left_by_merge(tmp_path / "broken") == want
    assert [path.name for path in (tmp_path / "broken").iterdir()] == ["out"]


def left_by_merge(folder):
    files = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    # Times and paths are each run's own
    noted = {name: files.pop(name) is not None for name in ("goose_lora.json", "README.md")}
    return files | noted


def two(number):
    return SampledReply(f" left {number}", 2, True, None), SampledReply(f" right {number}", 2, True, None)


def label():
    """Choose the left reply to each of 40 prompts, and say so when it is recorded."""
    folder = sys.argv[1]
    prompts = [f"prompt {number}" for number in range(40)]
    queue = LabelQueue(prompts, two, ChoiceFile(f"{folder}/pairs.jsonl"), policy="p")
    while (pair := queue.next("a")) is not None:
        assert queue.record("a", pair.key, "left")
        print("recorded", pair.prompt, flush=True)


@pytest.mark.parametrize("cut", [False, True])
def test_a_labeler_that_is_killed_or_loses_power_loses_no_choice_that_it_acknowledged(cut, tmp_path, request):
    kills = 8 if request.config.getoption("--full") else 2
    generator, folder, recorded = random.Random(8), tmp_path / "labels", set()
    folder.mkdir()
    for _ in range(kills):
        moment = (PowerCut if cut else Moment)("file", generator.randint(2, 12))
        ended = forks.run_words(label, [folder], folder, moment)
        assert ended.code == -9, ended.output[-3000:]
        recorded |= {
            line.removeprefix("recorded ") for line in ended.output.splitlines() if "recorded" in line
        }
        if cut:
            shutil.rmtree(folder)
            cut_of(folder).rename(folder)
    ended = forks.run_words(label, [folder], folder)
    assert ended.code == 0, ended.output[-3000:]
    written = [row["prompt"] for row in read_jsonl(folder / "pairs.jsonl")]
    assert recorded <= set(written) and len(written) == len(set(written)) == 40


# ---- Loss of power ----


@pytest.mark.parametrize(("name", "full"), [("ppo", 8), ("own_loop", 4), ("sft", 4), ("reward", 4)])
def test_what_a_loss_of_power_leaves_is_resumed_exactly_or_refused(name, full, given, tmp_path, request):
    settings = given[name] | {"save_total_limit": 1}
    straight = forks.run(name, tmp_path / "straight", **settings)
    assert straight.code == 0, straight.output[-3000:]
    generator = random.Random(9)
    cuts = full if request.config.getoption("--full") else 1
    for number in range(cuts):
        folder = tmp_path / f"run-{number}"
        # Most of what can be lost comes late: checkpoints that replace others, and the end
        least = straight.counts["file"] // 3
        moment = PowerCut("file", generator.randint(least, straight.counts["file"]))
        ended = forks.run(name, folder, moment, **settings)
        assert ended.code == -9, ended.output[-3000:]
        again = forks.run(name, cut_of(folder), **settings, resume_from_checkpoint="latest")
        assert again.code in (0, 2), again.output[-3000:]
        if again.code == 2:
            print(f"\n{name}, refused: {again.output.strip().splitlines()[-2:]}")
        else:
            assert_same_leavings(tmp_path / "straight", cut_of(folder))


# ---- A full disk ----


@pytest.mark.parametrize("name", ["ppo", "own_loop", "sft", "reward"])
def test_a_disk_that_is_full_at_the_end_costs_no_result_and_is_told_in_one_line(
    name, given, tmp_path, request
):
    straight = forks.run(name, tmp_path / "straight", **given[name])
    assert straight.code == 0, straight.output[-3000:]
    generator, files = random.Random(10), straight.counts["file"]
    for number in range(4 if request.config.getoption("--full") else 1):
        folder = tmp_path / f"run-{number}"
        moment = Moment("file", generator.randint(files * 3 // 4, files - 8), forks.fill_the_disk)
        ended = forks.run(name, folder, moment, **given[name])
        if ended.code != 0:  # what is left to write may be small enough
            assert ended.code == 2, ended.output[-3000:]
            *_, last = [line for line in ended.output.splitlines() if line.startswith("error: ")]
            assert "could not be " in last, last
        again = forks.run(name, folder, **given[name], resume_from_checkpoint="latest")
        assert again.code == 0, again.output[-3000:]
        assert_same_leavings(tmp_path / "straight", folder)
