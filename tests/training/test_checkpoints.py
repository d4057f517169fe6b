"""goose_lora.training.checkpoints and interrupts on folders alone: what is whole, which one is
taken, what is refused, what is deleted and when."""

import ast
import json
import logging
import os
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers.trainer
from safetensors.torch import save_file
from transformers.trainer_pt_utils import safe_globals

from goose_lora import ownership
from goose_lora.ppo.config import RESUME_RULES
from goose_lora.training import checkpoints
from goose_lora.training.signals import StopSignals

FACTS = {
    "stage": "ppo",
    "step": 4,
    "world_size": 1,
    "rows": 64,
    "base": {"name": "tiny"},
    "adapters": {"default": {"r": 3}, "value": {"r": 3}},
}
FACTS |= {
    "settings": {
        "seed": 0,
        "learning_rate": 1e-3,
        "critic": "adapter",
        "kl_coef": 0.05,
        "num_rollouts": 4,
        "output_dir": "runs/x",
    }
}


def folder_of(output, step, *, whole=True, **facts):
    """A checkpoint with all parts that a run needs to go on."""
    ownership.claim(output, f"checkpoint-{step}")
    folder = output / f"checkpoint-{step}"
    (folder / "value").mkdir(parents=True)
    for place in (folder, folder / "value"):
        save_file({"lora": torch.ones(3)}, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text("{}")
    state = {"global_step": step, "epoch": 0.5, "log_history": [{"step": step}], "stateful_callbacks": {}}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    torch.save({"state": {0: moments}, "param_groups": [{"params": [0]}]}, folder / "optimizer.pt")
    torch.save({"last_epoch": step}, folder / "scheduler.pt")
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(states, folder / "rng_state.pth")
    if whole:
        checkpoints.seal(folder, FACTS | {"step": step} | facts)
    return folder


def change_last_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def json_with(name, **changes):
    def change(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return change


def torch_with(name, edit):
    def change(folder):
        with safe_globals():
            content = torch.load(folder / name, weights_only=True)
        edit(content)
        torch.save(content, folder / name)

    return change


def gone(name):
    return lambda folder: (folder / name).unlink()


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def file_for_a_folder(folder):
    shutil.rmtree(folder / "value")
    (folder / "value").write_text("")


NAN = float("nan")
# Sealed again after the change, so that no checksum tells of it.
TAMPERED = {
    "no optimizer": (gone("optimizer.pt"), "optimizer.pt is missing"),
    "no schedule": (gone("scheduler.pt"), "scheduler.pt is missing"),
    "no random state": (gone("rng_state.pth"), "rng_state.pth is missing"),
    "no state": (gone("trainer_state.json"), "trainer_state.json is missing"),
    "no policy": (gone("adapter_model.safetensors"), "adapter_model.safetensors is missing"),
    "no configuration": (gone("adapter_config.json"), "adapter_config.json is missing"),
    "no critic": (lambda f: shutil.rmtree(f / "value"), "value/adapter_config.json is missing"),
    "a file for the critic": (file_for_a_folder, "value/adapter_config.json is missing"),
    "a pickle": (written("pytorch_model.bin", b"x"), "it has pytorch_model.bin, which no run writes"),
    "weights": (
        written("value/pytorch_model.bin", b"x"),
        "it has value/pytorch_model.bin, which no run writes",
    ),
    "another step": (json_with("trainer_state.json", global_step=10**12), "is of step 1000000000000"),
    "a negative step": (json_with("trainer_state.json", global_step=-1), "is of step -1"),
    "a step of text": (json_with("trainer_state.json", global_step="8"), "is of step '8'"),
    "no log": (json_with("trainer_state.json", log_history={}), "log_history is no list of rows"),
    "a later row": (json_with("trainer_state.json", log_history=[{"step": 9}]), "of no step up to 8"),
    "an epoch": (json_with("trainer_state.json", epoch=NAN), "epoch is nan"),
    "callbacks": (json_with("trainer_state.json", stateful_callbacks=[1]), "stateful_callbacks is no object"),
    "an unknown key": (json_with("trainer_state.json", own=1), "has own, which Trainer does not know"),
    "a state that is no JSON": (written("trainer_state.json", b"{"), "not JSON that can be read"),
    "an optimizer of zeros": (written("optimizer.pt", b"\0" * 99), "holds no state of an optimizer"),
    "no groups": (torch_with("optimizer.pt", lambda s: s.pop("param_groups")), "holds no groups"),
    "NaN": (
        torch_with("optimizer.pt", lambda s: s["state"][0]["exp_avg"].fill_(NAN)),
        "exp_avg of parameter 0 is not finite",
    ),
    "a variance": (
        torch_with("optimizer.pt", lambda s: s["state"][0]["exp_avg_sq"].fill_(-1)),
        "the variance of parameter 0 is negative",
    ),
    "more steps": (
        torch_with("optimizer.pt", lambda s: s["state"][0]["step"].fill_(1e9)),
        "has made 1e+09 steps of 8",
    ),
    "a schedule": (torch_with("scheduler.pt", lambda s: s.update(last_epoch="x")), "no state of a schedule"),
    "random state": (torch_with("rng_state.pth", lambda s: s.pop("cpu")), "rng_state.pth holds no random"),
    "a list for a state": (written("trainer_state.json", b"[]"), "expected an object"),
    "weights of zeros": (
        written("adapter_model.safetensors", b"\0" * 99),
        "adapter_model.safetensors cannot",
    ),
    "weights of NaN": (
        lambda f: save_file({"lora": torch.full((3,), NAN)}, f / "value" / "adapter_model.safetensors"),
        "value/adapter_model.safetensors: lora is not finite",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_sealed_checkpoint_without_sound_parts_is_refused_by_name_and_passed_by(name, tmp_path, said):
    whole, broken = folder_of(tmp_path, 4), folder_of(tmp_path, 8)
    change, why = TAMPERED[name]
    change(broken)
    (broken / "checkpoint.json").unlink()
    checkpoints.seal(broken, FACTS | {"step": 8})
    with pytest.raises(ValueError, match=re.escape(why)) as error:
        checkpoints.choose(str(broken), tmp_path, FACTS)
    assert "\n" not in str(error.value) and "Give another" in str(error.value)
    assert checkpoints.choose("latest", tmp_path, FACTS) == str(whole)
    assert "checkpoint-8 is passed by: " in said.text


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"files": {"optimizer.pt": 3}},
        {"files": {"../outside": [1, "a"]}},
        {"files": {"/etc/passwd": [1, "a"]}},
        {"stage": 3},
        {"step": "8"},
        {"step": True},
        {"step": 12},
        {"world_size": None},
        {"base": "tiny"},
        {"adapters": ["default"]},
        {"adapters": {"../x": {}}},
        {"adapters": {"default": 3}},
        {"settings": []},
        {"made_of": "x"},
        {"start": -1},
    ],
)
def test_a_manifest_of_wrong_types_is_refused(changes, tmp_path):
    broken = folder_of(tmp_path, 8)
    json_with("checkpoint.json", **changes)(broken)
    with pytest.raises(ValueError, match=r"its checkpoint\.json (is damaged|cannot be read)"):
        checkpoints.choose(str(broken), tmp_path, FACTS)


def test_a_base_is_compared_by_its_content_and_else_by_its_name(tmp_path):
    folder = folder_of(tmp_path, 4, base={"name": "tiny", "content": "a"})
    for base in ({"name": "moved", "content": "a"}, {"name": "tiny", "content": None}, {"name": "tiny"}):
        assert checkpoints.choose(str(folder), tmp_path, FACTS | {"base": base})
    for base in ({"name": "tiny", "content": "b"}, {"name": "other", "content": None}):
        with pytest.raises(ValueError, match=r"base (content|name) is"):
            checkpoints.choose(str(folder), tmp_path, FACTS | {"base": base})


def test_what_a_run_is_made_of_must_be_alike(tmp_path):
    folder = folder_of(tmp_path, 4, made_of={"rows' content": "1", "rewards": "length"})
    assert checkpoints.choose(str(folder), tmp_path, FACTS | {"made_of": {"rows' content": "1"}})
    with pytest.raises(ValueError, match="rewards is length there and other here"):
        checkpoints.choose(str(folder), tmp_path, FACTS | {"made_of": {"rewards": "other"}})


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "goose_lora.training.checkpoints")
    return caplog


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (
            lambda folder: (folder / "checkpoint.json").unlink(),
            "it has no checkpoint.json, which is written last",
        ),
        (
            lambda folder: (folder / "value" / "adapter_model.safetensors").unlink(),
            "value/adapter_model.safetensors is missing",
        ),
        (
            lambda folder: os.truncate(folder / "adapter_model.safetensors", 20),
            "adapter_model.safetensors has 20 bytes of",
        ),
        (
            lambda folder: change_last_byte(folder / "adapter_model.safetensors"),
            "adapter_model.safetensors is damaged",
        ),
        (lambda folder: os.truncate(folder / "checkpoint.json", 30), "checkpoint.json cannot be read"),
        (
            lambda folder: (folder / "checkpoint.json").write_text('{"format": 0, "files": {}}'),
            "format 0, and this version reads format 1",
        ),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_by_name_and_passed_by(harm, why, tmp_path, said):
    whole, broken = folder_of(tmp_path, 4), folder_of(tmp_path, 8)
    assert checkpoints.why_incomplete(broken) is None
    harm(broken)
    with pytest.raises(ValueError, match=f"checkpoint-8 cannot be resumed: .*{why}"):
        checkpoints.choose(str(broken), tmp_path, FACTS)
    assert checkpoints.choose("latest", tmp_path, FACTS) == str(whole)
    assert "checkpoint-8 is passed by: " in said.text
    assert f"going on from {whole} (step 4)" in said.text


@pytest.mark.parametrize("wanted", ["latest", True, "True"])
def test_without_a_whole_checkpoint_the_run_starts_from_the_beginning_and_says_so(wanted, tmp_path, said):
    folder_of(tmp_path, 4, whole=False)
    assert checkpoints.choose(wanted, tmp_path, FACTS) is None
    assert "no whole checkpoint: the run starts from the beginning" in said.text
    assert checkpoints.choose(wanted, tmp_path / "nothing", FACTS) is None


def test_a_run_that_starts_anew_beside_checkpoints_is_told_of_them(tmp_path, said):
    folder_of(tmp_path, 4)
    assert checkpoints.choose(None, tmp_path, FACTS) is None
    assert "has checkpoint-4 of an earlier run; this one starts from the beginning" in said.text


def test_the_newest_is_of_the_run_that_was_begun_last_whatever_its_step(tmp_path):
    folder_of(tmp_path, 80, start=1)
    folder_of(tmp_path, 8, start=2)
    assert checkpoints.newest(tmp_path)[0] == tmp_path / "checkpoint-8"


def test_clocks_have_no_say_in_the_order_and_the_one_just_sealed_stays(tmp_path):
    ahead = time.time() + 7200
    for step in (4, 8, 12):
        folder = folder_of(tmp_path, step, start=1)
        if step < 12:
            noted = json.loads((folder / "checkpoint.json").read_text())
            (folder / "checkpoint.json").write_text(json.dumps(noted | {"saved": ahead}))
            os.utime(folder, (ahead, ahead))
    assert checkpoints.newest(tmp_path)[0] == tmp_path / "checkpoint-12"
    checkpoints.prune(tmp_path, 1, [])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-12"]


def test_copies_foreign_names_and_an_older_runs_higher_step_do_not_change_which_is_the_newest(tmp_path):
    for step, start in ((10, 1), (4, 2), (8, 2)):
        folder_of(tmp_path, step, start=start)
    # cp -r gives new times; a copy under another step's name is none of that step
    for step in (4, 10):
        shutil.move(tmp_path / f"checkpoint-{step}", tmp_path / "moved")
        shutil.copytree(tmp_path / "moved", tmp_path / f"checkpoint-{step}", copy_function=shutil.copyfile)
        shutil.rmtree(tmp_path / "moved")
    shutil.copytree(tmp_path / "checkpoint-8", tmp_path / "checkpoint-99")
    same = 1_700_000_000
    for folder in tmp_path.glob("checkpoint-*"):
        os.utime(folder, (same, same))
    # Names that are no step's, and steps with zeros before them
    for name in ("checkpoint-abc", "checkpoint-", "checkpoint-8.kept", "checkpoint--3", "checkpoint-1e3"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-77").write_text("a file")
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-0004")
    newest, passed = checkpoints.newest(tmp_path)
    assert newest == tmp_path / "checkpoint-8" and list(passed) == ["checkpoint-99"]
    assert "it says step 8" in passed["checkpoint-99"]
    checkpoints.prune(tmp_path, 1, [newest])
    left = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert {"checkpoint-8", "checkpoint-0004", "checkpoint-77", "checkpoint-abc", "checkpoint-99"} <= left
    assert not {"checkpoint-4", "checkpoint-10"} & left


def test_the_checkpoint_just_sealed_stays_though_others_count_as_newer(tmp_path):
    folder_of(tmp_path, 80, start=9)
    sealed = folder_of(tmp_path, 8, start=1)
    checkpoints.prune(tmp_path, 1, [sealed])
    assert sealed.is_dir()


def test_what_no_run_has_written_is_never_pruned(tmp_path):
    for name in ("checkpoint-1", "checkpoint-900"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    for step in (4, 8):
        folder_of(tmp_path, step)
    (tmp_path / "checkpoint-4" / "notes.txt").write_text("mine too")
    checkpoints.prune(tmp_path, 1, [])
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.txt")) == [
        "checkpoint-1/thesis.txt",
        "checkpoint-4.kept/notes.txt",
        "checkpoint-900/thesis.txt",
    ]
    assert [path.name for path in (tmp_path / "checkpoint-4.kept").iterdir()] == ["notes.txt"]
    checkpoints.make_room(tmp_path / "checkpoint-900")
    assert (tmp_path / "checkpoint-900.kept" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"stage": "reward"}, "stage is ppo there and reward here"),
        ({"world_size": 2}, "world_size is 1 there and 2 here"),
        ({"rows": 65}, "rows is 64 there and 65 here"),
        ({"base": {"name": "other"}}, "base name is tiny there and other here"),
        ({"adapters": {"default": {"r": 3}}}, "adapters is default, value there and default here"),
        (
            {"adapters": {"default": {"r": 8}, "value": {"r": 3}}},
            "r of the adapter default is 3 there and 8 here",
        ),
        ({"settings": {"seed": 1}}, "seed is 0 there and 1 here"),
        ({"settings": {"learning_rate": 1e-4}}, "learning_rate is 0.001 there and 0.0001 here"),
        ({"settings": {"critic": "shared"}}, "critic is adapter there and shared here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_the_difference_is_told(other, told, tmp_path):
    folder = folder_of(tmp_path, 4)
    for wanted in ("latest", str(folder)):
        with pytest.raises(
            ValueError,
            match=f"checkpoint-4 was saved by another run, and cannot be resumed by this one: {told}",
        ):
            checkpoints.choose(wanted, tmp_path, FACTS | other, rules=RESUME_RULES)


def test_before_the_model_is_there_only_what_is_known_is_compared(tmp_path):
    folder = folder_of(tmp_path, 4)
    assert checkpoints.choose("latest", tmp_path, {"stage": "ppo", "adapter": {"r": 3}}) == str(folder)
    with pytest.raises(ValueError, match="r of the adapter default is 3 there and 4 here"):
        checkpoints.choose("latest", tmp_path, {"stage": "ppo", "adapter": {"r": 4}})


def test_settings_that_may_change_are_told_and_those_that_do_not_matter_are_not(tmp_path, said):
    folder_of(tmp_path, 4)
    changed = FACTS["settings"] | {"kl_coef": 0.1, "num_rollouts": 9, "output_dir": "runs/y"}
    assert checkpoints.choose("latest", tmp_path, FACTS | {"settings": changed}, rules=RESUME_RULES)
    assert (
        "so that it ends otherwise: kl_coef is 0.05 there and 0.1 here." in said.text
        and "num_rollouts" not in said.text
    )


def test_old_checkpoints_go_those_that_were_cut_off_first_and_the_newest_and_the_best_stay(tmp_path):
    for step in (4, 8, 12, 20):
        folder_of(tmp_path, step)
    folder_of(tmp_path, 16, whole=False)
    names = lambda: {path.name for path in tmp_path.glob("checkpoint-*")}  # noqa: E731
    checkpoints.prune(tmp_path, None, [])
    assert len(names()) == 5
    checkpoints.prune(tmp_path, 4, [])
    assert names() == {"checkpoint-4", "checkpoint-8", "checkpoint-12", "checkpoint-20"}
    checkpoints.prune(tmp_path, 2, [str(tmp_path / "checkpoint-4")])
    assert names() == {"checkpoint-4", "checkpoint-20"}
    checkpoints.prune(tmp_path, 1, [str(tmp_path / "checkpoint-4")])
    assert names() == {"checkpoint-4", "checkpoint-20"}


def test_a_result_takes_the_old_ones_place_only_when_it_is_whole(tmp_path):
    def write(folder, text):
        (folder / "value").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors", "value/adapter_model.safetensors"):
            (folder / name).write_text(text)

    def texts():
        files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "written.json"]
        return {path.read_text() for path in files}

    with ownership.replacing(tmp_path) as temporary:
        write(temporary, "old")
    message = (
        r"could not be saved in .* MB free there\): No space left on device. What was there before is"
        r" untouched"
    )
    with pytest.raises(OSError, match=message), ownership.replacing(tmp_path) as temporary:
        write(temporary, "new")
        raise RuntimeError("No space left on device\nand a trace")
    assert texts() == {"old"} and not (tmp_path / ".unfinished").exists()
    with ownership.replacing(tmp_path) as temporary:
        write(temporary, "new")
    assert texts() == {"new"} and len(list(tmp_path.rglob("*"))) == 5


def test_while_files_change_places_no_adapter_loads(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("old")
    (tmp_path / "adapter_model.safetensors").write_text("old")
    seen = []
    replace = Path.replace

    def watched(self, target):
        if "written.json" not in self.name:
            seen.append((self.name, (tmp_path / "adapter_config.json").exists()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    with ownership.replacing(tmp_path) as temporary:
        for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
            (temporary / name).write_text("new")
    assert seen == [
        ("adapter_model.safetensors", False),
        ("tokenizer.json", False),
        ("adapter_config.json", False),
    ]


def test_a_manifest_is_renamed_into_place_after_all_files_are_on_the_disk(tmp_path, monkeypatch):
    ownership.claim(tmp_path, "checkpoint-4")
    order, fsync, replace = [], os.fsync, Path.replace
    names = {}

    def synced(handle):
        order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        return fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(
        Path,
        "replace",
        lambda self, target: (
            order.append("rename"),
            replace(self, target),
            names.update({self.name: target.name}),
        ),
    )
    folder = folder_of(tmp_path, 4)
    at = order.index("rename")
    assert order.count("adapter_model.safetensors") == 2 and {
        "value",
        "adapter_model.safetensors",
        ".checkpoint.json.tmp",
    } <= set(order[:at])
    assert order[at + 1 :] == ["checkpoint-4", tmp_path.name] and names == {
        ".checkpoint.json.tmp": "checkpoint.json"
    }
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert json.loads((folder / "checkpoint.json").read_text())["files"].keys() == written - {
        "checkpoint.json"
    }


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"output_dir: nothing can be written to .*file/run \(Not a directory\)"
    ):
        ownership.require_writable(tmp_path / "file" / "run")
    ownership.require_writable(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_a_run_that_is_refused_leaves_no_folder_and_one_with_results_keeps_its_own(tmp_path):
    refused, kept = tmp_path / "runs" / "of" / "a", tmp_path / "kept"
    (tmp_path / "there").mkdir()
    for folder in (refused, kept, tmp_path / "there" / "b"):
        ownership.begin_in(folder, "ppo")
    (kept / "result").write_text("one")
    ownership.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "there"]
    assert [path.name for path in kept.iterdir()] == ["result"] and not any((tmp_path / "there").iterdir())


def test_the_first_signal_is_noted_and_the_second_does_what_it_does_without(capfd, request):
    before, own_handler = signal.default_int_handler, signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)  # the background jobs of a shell ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, own_handler))
    stop = StopSignals()
    with stop.handled(), stop.handled():
        signal.raise_signal(signal.SIGINT)
        assert (
            stop.asked == signal.SIGINT and "SIGINT: what is under way is finished" in capfd.readouterr().err
        )
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with stop.handled():
        assert stop.asked == 0, "another training is not stopped by an old request"
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def inside():
        with StopSignals().handled():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]


def test_trainer_unpickles_nothing_that_is_not_a_tensor():
    """The library that loads optimizer, schedule and random state of a checkpoint: each torch.load
    of it has weights_only."""
    calls = [
        node
        for node in ast.walk(ast.parse(Path(transformers.trainer.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads")
    ]
    assert len(calls) > 5
    for node in calls:
        assert "weights_only=True" in ast.unparse(node), f"line {node.lineno}"
