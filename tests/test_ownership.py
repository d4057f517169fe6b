"""goose_lora.ownership: what a run may replace in its folder, what it keeps, and who may write."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from goose_lora import ownership
from goose_lora.data.sources import read_rows
from goose_lora.models.roles import ADAPTERS, WITH_HEAD

PARTS = ("adapter_config.json", "adapter_model.safetensors", "value/adapter_model.safetensors")


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    ownership.release()


def save(folder, text, parts=PARTS):
    with ownership.replacing(folder) as temporary:
        for name in parts:
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_users_own_files_in_a_roles_folder_outlive_two_results(tmp_path):
    for name in ("value/notes.txt", "reference/run.log", "mine.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    save(tmp_path, "one")
    save(tmp_path, "two")
    found = contents(tmp_path)
    assert {name for name, text in found.items() if text == "mine"} == {
        "value/notes.txt",
        "reference/run.log",
        "mine.md",
    }
    assert {name for name, text in found.items() if text == "two"} == set(PARTS)
    assert "one" not in found.values()


def test_of_the_earlier_result_nothing_stays_that_the_new_one_lacks(tmp_path):
    save(tmp_path, "one")
    save(tmp_path, "two", PARTS[:2])
    assert not (tmp_path / "value").exists()
    assert set(json.loads((tmp_path / "written.json").read_text())["files"]) == set(PARTS[:2])


@pytest.mark.parametrize("in_the_way", ["file", "folder", "link", "broken link"])
@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "value", ".unfinished", ".replaced"]
)
def test_a_result_is_whole_whatever_stands_in_its_way_and_that_is_kept(name, in_the_way, tmp_path, caplog):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    place = run / name
    if in_the_way == "file":
        place.write_text("mine")
    elif in_the_way == "folder":
        place.mkdir()
        (place / "precious.txt").write_text("mine")
    else:
        place.symlink_to(other if in_the_way == "link" else tmp_path / "gone")
    save(run, "new")
    assert all((run / part).read_text() == "new" and not (run / part).is_symlink() for part in PARTS)
    assert contents(other) == {"precious.txt": "mine"}
    if name == "value" and in_the_way == "folder":
        assert (place / "precious.txt").read_text() == "mine"
    else:
        assert os.path.lexists(run / f"{name}.kept") and f"it is kept as {name}.kept" in caplog.text


@pytest.mark.parametrize("moves", range(1, 6))
def test_a_save_that_breaks_off_while_files_change_places_leaves_the_old_result(moves, tmp_path, monkeypatch):
    save(tmp_path, "old")
    calls, replace = [], os.replace

    def failing(source, target, **options):
        if "written.json" not in str(source):
            calls.append(source)
            if len(calls) == moves:
                raise OSError(5, "Input/output error")
        return replace(source, target, **options)

    monkeypatch.setattr(os, "replace", failing)
    monkeypatch.setattr(Path, "replace", lambda self, target: failing(self, target))
    with pytest.raises(OSError, match=r"could not be saved .* What was there before is untouched"):
        save(tmp_path, "new")
    monkeypatch.undo()
    assert {name: text for name, text in contents(tmp_path).items() if name in PARTS} == dict.fromkeys(
        PARTS, "old"
    )
    save(tmp_path, "newer")
    assert set(contents(tmp_path)) == {*PARTS, "written.json"}


@dataclass
class Settings:
    policy_adapter: str | None = None
    dataset_name: str | None = None
    reward_function: list[str] | None = None
    stop_strings: list[str] | None = None


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("policy_adapter", "x"),
        ("policy_adapter", "x/"),
        ("policy_adapter", "x/reward"),
        ("policy_adapter", "elsewhere/../x/checkpoint-4"),
        ("policy_adapter", "link"),
        ("policy_adapter", "link/reward"),
        ("policy_adapter", "x/leads_out"),
        ("dataset_name", "x/rows.jsonl"),
        ("reward_function", ["module:name", "x/score.py:score"]),
        ("reward_function", ["model:x/reward"]),
    ],
)
def test_an_input_inside_the_folder_is_refused_by_its_setting(setting, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("x/reward", "x/checkpoint-4", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("x/rows.jsonl", "x/score.py"):
        (tmp_path / file).write_text("")
    (tmp_path / "link").symlink_to("x")
    (tmp_path / "x" / "leads_out").symlink_to(tmp_path / "elsewhere")
    named = ownership.named_inputs(Settings(**{setting: value}))
    for output in ("x", "link", str(tmp_path / "x")):
        with pytest.raises(ValueError, match=rf"^{setting}: .* output_dir, .* Give another output_dir"):
            ownership.refuse_inputs_inside(output, named)
    sound = Settings(policy_adapter="elsewhere", dataset_name="org/x", stop_strings=["x"])
    ownership.refuse_inputs_inside("x", ownership.named_inputs(sound))
    assert not (tmp_path / "new").exists()


def test_a_folder_with_another_stages_run_is_refused_and_with_its_own_it_is_not(tmp_path):
    ownership.check_place(tmp_path / "none", "ppo")
    ownership.begin(tmp_path, "reward")
    save(tmp_path, "reward")
    ownership.check_place(tmp_path, "reward")
    with pytest.raises(ValueError, match=r"has a run of the stage reward .* Give another output_dir"):
        ownership.check_place(tmp_path, "ppo")


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "value/README.md", "metrics.jsonl"])
def test_a_strangers_file_under_the_name_of_a_result_is_refused_by_name(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"output_dir: .* has {name}, which no run of this stage has"):
        ownership.check_place(tmp_path, "ppo")
    assert contents(tmp_path) == {name: "mine"}


def test_what_an_older_version_has_written_counts_as_its_stages(tmp_path):
    for name in (*PARTS, "metrics.jsonl", "value/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    (tmp_path / "goose_lora.json").write_text('{"stage": "ppo"}')
    ownership.check_place(tmp_path, "ppo")
    with pytest.raises(ValueError, match="a run of the stage ppo"):
        ownership.check_place(tmp_path, "sft")
    save(tmp_path, "new")
    found = contents(tmp_path)
    assert {found[name] for name in PARTS} == {"new"} and found["value/notes.txt"] == "old"


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": 1, "start": 0, "files": ["../other.txt"]}', '{"format": 9}']
)
def test_a_damaged_manifest_is_told_and_deletes_nothing(content, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "other.txt").write_text("mine")
    (tmp_path / "run" / "written.json").write_text(content)
    with pytest.raises(ValueError, match=r"written\.json"):
        save(tmp_path / "run", "new")
    assert (tmp_path / "other.txt").read_text() == "mine"


# ---- One writer ----

HOLDER = """
import sys, time
from goose_lora import ownership
ownership.hold(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""
READER = HOLDER.replace("hold(", "share(")


def holder(folder):
    return started(HOLDER, folder)


def started(text, folder):
    process = subprocess.Popen([sys.executable, "-c", text, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def end(process):
    process.kill()
    process.wait()


def test_a_second_process_is_refused_with_pid_and_host_and_a_killed_ones_lock_is_taken_over(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    process = holder(tmp_path)
    try:
        for ask in (ownership.hold, ownership.require_free):
            with pytest.raises(ValueError, match=rf"is being written by process {process.pid} on \S+"):
                ask(tmp_path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    ownership.require_free(tmp_path)
    ownership.hold(tmp_path)
    assert f"taken over from process {process.pid} on " in caplog.text
    ownership.hold(tmp_path)  # this process's already
    ownership.release(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_a_folder_that_is_being_written_is_free(tmp_path):
    process = holder(tmp_path / "run")
    try:
        subprocess.run(["cp", "-r", str(tmp_path / "run"), str(tmp_path / "copy")], check=True)
        ownership.hold(tmp_path / "copy")
    finally:
        process.kill()
        process.wait()


# ---- Those who read ----


def test_a_folder_that_is_read_is_written_by_nobody_and_read_by_several(tmp_path):
    first, second = (started(READER, tmp_path) for _ in range(2))
    try:
        with pytest.raises(ValueError, match=r"is being read by process \d+ on \S+, as goose-lora label"):
            ownership.hold(tmp_path)
        assert not ownership.holds(tmp_path)
        end(first)
        with pytest.raises(ValueError, match=rf"is being read by process {second.pid} on "):
            ownership.hold(tmp_path)
    finally:
        end(first)
        end(second)
    ownership.hold(tmp_path)
    assert not list(tmp_path.glob(".reader-*")), "what killed readers have left is gone"


def test_what_is_being_written_is_not_read(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(ValueError, match=rf"is being written by process {process.pid} on "):
            ownership.share(tmp_path)
        assert not list(tmp_path.glob(".reader-*"))
    finally:
        end(process)
    ownership.share(tmp_path)
    ownership.share(tmp_path)
    ownership.hold(tmp_path)  # who reads it may write to it, such as figures of an evaluation
    ownership.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_another_host_is_taken_over_with_a_word_about_network_disks(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    (tmp_path / ".writer.json").write_text('{"pid": 1, "host": "another"}')
    ownership.hold(tmp_path)
    assert "taken over from process 1 on another, whose lock is free." in caplog.text


def test_a_number_of_a_process_that_is_used_again_holds_nothing(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    note = {"pid": os.getpid(), "host": socket.gethostname()}
    (tmp_path / ".writer.json").write_text(json.dumps(note))
    ownership.hold(tmp_path)
    assert f"taken over from process {os.getpid()} on" in caplog.text


@pytest.mark.parametrize("note", ["", "[]", "{", '{"pid": 1}', "\0" * 40, "[" * 5000])
def test_a_note_that_cannot_be_read_holds_nothing(note, tmp_path):
    (tmp_path / ".writer.json").write_text(note)
    ownership.hold(tmp_path)
    assert json.loads((tmp_path / ".writer.json").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_lock_that_is_none_is_told_in_one_line(kind, tmp_path):
    lock = tmp_path / ".writer.lock"
    lock.mkdir() if kind == "folder" else lock.symlink_to(tmp_path / "nowhere" / "x")
    with pytest.raises(ValueError, match=r"^output_dir: .* cannot be locked \(.*\)\. Give another folder\.$"):
        ownership.hold(tmp_path)


LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]]).wait()
"""


def test_a_run_whose_launcher_was_killed_keeps_its_folder(tmp_path):
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path), HOLDER], stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout.readline() == "held\n"
    end(launcher)
    pid = json.loads((tmp_path / ".writer.json").read_text())["pid"]
    try:
        assert pid != launcher.pid
        with pytest.raises(ValueError, match=rf"is being written by process {pid} on "):
            ownership.hold(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}").exists() and b"Z" not in Path(f"/proc/{pid}/stat").read_bytes().split()[2:3]:
        time.sleep(0.01)
    ownership.hold(tmp_path)


# ---- Inputs around, above and under other names ----


@pytest.mark.parametrize(
    ("setting", "outputs"),
    [
        ("dataset_name", ["input/run", "input/a/b", "link/run", "input/../input/run"]),
        ("policy_adapter", ["input/value", "input/checkpoint-4", "link/reference/x"]),
    ],
)
def test_a_folder_that_is_read_as_a_whole_has_no_run_inside(setting, outputs, tmp_path):
    (tmp_path / "input").mkdir()
    (tmp_path / "link").symlink_to("input")
    named = ownership.named_inputs(Settings(**{setting: str(tmp_path / "input")}))
    for output in outputs:
        with pytest.raises(ValueError, match=rf"^{setting}: .* is a folder around output_dir"):
            ownership.refuse_inputs_inside(tmp_path / output, named)
    ownership.refuse_inputs_inside(tmp_path / "input-2", named)
    if setting == "policy_adapter":
        ownership.refuse_inputs_inside(tmp_path / "input" / "evaluation", named)


@pytest.mark.parametrize(
    "name", ["run/sample*.jsonl", "r?n/*", "~/run/samples.jsonl", "file://{}/run/samples.jsonl"]
)
def test_rows_of_the_run_are_refused_by_whatever_name(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples.jsonl").write_text("{}")
    named = ownership.named_inputs(Settings(dataset_name=name.format(tmp_path)))
    with pytest.raises(ValueError, match=r"^dataset_name: .* lies in output_dir"):
        ownership.refuse_inputs_inside("run", named)
    ownership.refuse_inputs_inside("other", named)


def test_a_glob_in_a_folder_with_brackets_is_what_the_reader_takes_it_for(tmp_path):
    folder = tmp_path / "run[1]"
    folder.mkdir()
    (folder / "samples.jsonl").write_text('{"prompt": "ba"}\n')
    name = str(folder / "sample*.jsonl")
    assert read_rows(name, "train")["prompt"][:] == ["ba"]
    with pytest.raises(ValueError, match=r"^dataset_name: .* lies in output_dir"):
        ownership.refuse_inputs_inside(folder, ownership.named_inputs(Settings(dataset_name=name)))


def test_a_hard_link_to_a_file_of_the_run_is_refused(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "samples.jsonl").write_text("{}")
    os.link(run / "samples.jsonl", tmp_path / "rows.jsonl")
    named = ownership.named_inputs(Settings(dataset_name=str(tmp_path / "rows.jsonl")))
    with pytest.raises(ValueError, match=r"^dataset_name: .* is a hard link to a file in output_dir"):
        ownership.refuse_inputs_inside(run, named)
    os.link(tmp_path / "rows.jsonl", tmp_path / "again.jsonl")
    (run / "samples.jsonl").unlink()
    ownership.refuse_inputs_inside(run, named)


# ---- Where a result goes ----


def test_a_result_goes_through_a_link_and_onto_a_disk_of_its_own(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    save(tmp_path / "run", "one")
    save(tmp_path / "run", "two")
    assert (tmp_path / "run").is_symlink()
    assert {
        name: text for name, text in contents(tmp_path / "disk").items() if name in PARTS
    } == dict.fromkeys(PARTS, "two")


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_weights_are_as_readable_as_other_files(mask, tmp_path):
    before = os.umask(mask)
    try:
        with ownership.replacing(tmp_path / "run") as temporary:
            save_file({"x": torch.zeros(1)}, temporary / "model.safetensors")
            (temporary / "config.json").write_text("{}")
    finally:
        os.umask(before)
    modes = {(tmp_path / "run" / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1 and modes.pop() & 0o777 == 0o666 & ~mask


def test_the_folder_of_each_role_that_scores_is_a_result_of_ppo():
    """The names stand in two places, since this module knows nothing of models."""
    for stage in ("ppo", "own_loop", "ppo_in_one_file"):
        assert {f"{ADAPTERS[role]}/adapter_model.safetensors" for role in WITH_HEAD} <= set(
            ownership.RESULTS[stage]
        )
