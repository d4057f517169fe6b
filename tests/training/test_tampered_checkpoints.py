"""A checkpoint of a real run, harmed in every way that is known: each is refused in one line before
a step is made, or the run goes on exactly, since what was harmed is not read."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import trainer, with_reward_adapter
from transformers.trainer_pt_utils import safe_globals

from goose_lora.training import checkpoints, resume

# Read by nobody who resumes: people, and those who load the adapter without its run.
NOT_READ = {"README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "goose_lora.json"}
SETTINGS = {
    "num_rollouts": 2,
    "save_strategy": "steps",
    "save_steps": 4,
    "ema_decay": 0.9,
    "score_normalization": "running",
}
ROLES = ("value", "reward", "reference", "ema")
NAN = float("nan")


def a_run(folder, **changes):
    roles = {"critic": "adapter", "reference": "copy", "average": True}
    shared = with_reward_adapter(folder / "reward", **roles)
    return trainer(folder, shared=shared, reward="adapter", **SETTINGS | changes)


class Run:
    """A run that has ended, another one beside it, and a trainer of the first's settings that may
    resume; ``answer`` is what that says to a checkpoint."""

    def __init__(self, folder):
        for name, changes in (("own", {}), ("other", {"seed": 7, "learning_rate": 3e-3})):
            a_run(folder / name, **changes).train()
        self.folder = folder / "own"
        self.other = folder / "other" / "checkpoint-8"
        self.trainer = a_run(folder / "again")
        self.facts = resume.facts(self.trainer)

    def answer(self, checkpoint):
        """The error's text, or None where the run would go on."""
        try:
            checkpoints.choose(
                str(checkpoint), checkpoint.parent, self.facts, rules=self.trainer.resume_rules
            )
            self.trainer._check_tensors(checkpoint)
        except ValueError as error:
            assert "\n" not in str(error) and str(error).startswith("resume_from_checkpoint: ")
            return str(error)
        return None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the last checkpoint, to be harmed."""
    return Path(shutil.copytree(run.folder / "checkpoint-8", tmp_path / "checkpoint-8"))


def files_of(checkpoint):
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


def seal_again(checkpoint):
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    (checkpoint / "checkpoint.json").unlink()
    checkpoints.seal(checkpoint, {k: v for k, v in manifest.items() if k not in ("files", "saved", "format")})


def test_an_unharmed_copy_goes_on(run, copy):
    assert run.answer(copy) is None
    seal_again(copy)
    assert run.answer(copy) is None


# ---- Files ----


def gone(path, run):
    path.unlink()


def empty(path, run):
    path.write_bytes(b"")


def halved(path, run):
    os.truncate(path, path.stat().st_size // 2)


def a_folder(path, run):
    path.unlink()
    path.mkdir()


def a_broken_link(path, run):
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def a_link_elsewhere(path, run):
    path.unlink()
    path.symlink_to(run.other / "trainer_state.json")


def a_bit_off(path, run):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


HARMS = {harm.__name__: harm for harm in (gone, empty, halved, a_folder, a_broken_link, a_link_elsewhere)}
HARMS["a_bit_off"] = a_bit_off


@pytest.mark.parametrize("harm", HARMS)
def test_each_file_that_was_harmed_after_the_save_is_named(harm, run, tmp_path):
    for number, name in enumerate(files_of(run.folder / "checkpoint-8")):
        checkpoint = tmp_path / str(number) / "checkpoint-8"
        shutil.copytree(run.folder / "checkpoint-8", checkpoint)
        HARMS[harm](checkpoint / name, run)
        assert f"{name}" in (run.answer(checkpoint) or ""), name


@pytest.mark.parametrize("step", ["another run", "another step"])
def test_each_file_of_another_run_or_step_is_named(step, run, tmp_path):
    source = run.other if step == "another run" else run.folder / "checkpoint-4"
    tried = 0
    for number, name in enumerate(files_of(run.folder / "checkpoint-8")):
        checkpoint = tmp_path / str(number) / "checkpoint-8"
        shutil.copytree(run.folder / "checkpoint-8", checkpoint)
        if (source / name).read_bytes() == (checkpoint / name).read_bytes():
            continue
        shutil.copy(source / name, checkpoint / name)
        tried += 1
        assert run.answer(checkpoint), name
    assert tried > 7


@pytest.mark.parametrize("harm", ["gone", "empty", "halved"])
def test_each_file_that_was_harmed_and_sealed_again_is_named_where_it_is_read(harm, run, tmp_path):
    for number, name in enumerate(files_of(run.folder / "checkpoint-8")):
        if name == "checkpoint.json":
            continue
        checkpoint = tmp_path / str(number) / "checkpoint-8"
        shutil.copytree(run.folder / "checkpoint-8", checkpoint)
        HARMS[harm](checkpoint / name, run)
        seal_again(checkpoint)
        said = run.answer(checkpoint)
        assert (said is None) == (Path(name).name in NOT_READ), (name, said)
        assert said is None or name in said


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("sealed", [False, True])
def test_a_roles_folder_that_is_missing_or_anothers_is_named(role, sealed, run, copy):
    shutil.rmtree(copy / role)
    if sealed:
        seal_again(copy)
    assert f"{role}/adapter_" in run.answer(copy)
    # Another role's in its place: not of its shapes, or not of its file
    other = "value" if role in ("reference", "ema") else "reference"
    shutil.copytree(copy / other, copy / role)
    if sealed:
        seal_again(copy)
    assert f"{role}/" in run.answer(copy)


@pytest.mark.parametrize("place", ["", *ROLES])
@pytest.mark.parametrize("what", ["rank", "a tensor less", "a tensor more", "another name", "NaN"])
def test_weights_of_another_form_are_named_whoever_sealed_them(place, what, run, copy):
    path = copy / place / "adapter_model.safetensors"
    weights = load_file(path)
    key = sorted(weights)[0]
    if what == "rank":
        weights = {name: value.repeat(2, 1)[: len(value) + 1] for name, value in weights.items()}
    elif what == "a tensor less":
        del weights[key]
    elif what == "NaN":
        weights[key] = torch.full_like(weights[key], NAN)
    else:
        weights["another"] = weights[key] + 0.0
        if what == "another name":
            del weights[key]
    save_file(weights, path)
    seal_again(copy)
    said = run.answer(copy)
    assert str(path.relative_to(copy)) in said or (place == "" and "optimizer.pt" in said), said


STRAY = (
    *("pytorch_model.bin", "model.safetensors", "adapter_model.bin", "model.safetensors.index.json"),
    *("pytorch_model.bin.index.json", "value/adapter_model.bin", "optimizer.bin", "rng_state_1.pth"),
    *("mine/adapter_model.safetensors", "pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"),
    *("global_step8/zero_pp_rank_0_optim_states.pt", "training_args.bin", "scaler.pth", "latest.pt"),
)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", STRAY)
def test_what_a_loader_could_take_for_the_runs_own_is_named(name, sealed, run, copy):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"x")
    if sealed:
        seal_again(copy)
    assert name.partition("/")[0] in run.answer(copy)


def test_a_users_notes_in_a_checkpoint_are_no_fault(run, copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "value" / "plot.png").write_bytes(b"x")
    assert run.answer(copy) is None


# ---- The manifest ----

WRONG = (None, "x", -1, 2**70, NAN, True, [], ["x"], {}, {"x": 1}, 1.5)
# What may be so: versions are only told, and a run of Python's has no recipe.
FREE = {("versions", "{}"), ("recipe", "{}"), ("recipe", "{'x': 1}")}


@pytest.mark.parametrize("name", ["format", "files", *checkpoints._TYPES])
def test_a_wrong_value_in_the_manifest_is_named(name, run, copy):
    manifest = json.loads((copy / "checkpoint.json").read_text())
    for value in WRONG:
        if value == manifest[name] or (name, str(value)) in FREE:
            continue
        (copy / "checkpoint.json").write_text(json.dumps(manifest | {name: value}))
        said = run.answer(copy)
        if name == "versions" and said is None:
            assert value == {"x": 1}
            continue
        assert said is not None, (name, value)


@pytest.mark.parametrize("name", ["format", "files", *checkpoints._NEEDED, "made_of"])
def test_what_was_taken_out_of_the_manifest_is_named(name, run, copy):
    manifest = json.loads((copy / "checkpoint.json").read_text())
    del manifest[name]
    (copy / "checkpoint.json").write_text(json.dumps(manifest))
    assert run.answer(copy)


@pytest.mark.parametrize("group", ["base", "made_of", "settings"])
def test_each_fact_that_was_taken_out_or_changed_is_named(group, run, copy):
    manifest = json.loads((copy / "checkpoint.json").read_text())
    silent = 0
    for name in manifest[group]:
        for value in (..., "another"):
            facts = {key: each for key, each in manifest[group].items() if key != name}
            if value is not ...:
                facts[name] = value
            (copy / "checkpoint.json").write_text(json.dumps(manifest | {group: facts}))
            said = run.answer(copy)
            assert said is None or name in said or "base is" in said
            silent += said is None
    # Settings that may differ are told; a base of the same content has any name
    assert silent == 0 or group != "made_of"


def test_an_adapter_of_another_kind_is_named(run, copy):
    manifest = json.loads((copy / "checkpoint.json").read_text())
    for role, facts in manifest["adapters"].items():
        for name in facts:
            other = manifest["adapters"] | {role: facts | {name: 99}}
            (copy / "checkpoint.json").write_text(json.dumps(manifest | {"adapters": other}))
            assert f"{name} of the adapter {role}" in run.answer(copy)


# ---- Trainer's state ----


@pytest.mark.parametrize("name", ["global_step", "max_steps", "num_train_epochs", "epoch", "log_history"])
@pytest.mark.parametrize("value", ["x", -1, NAN, 2**70, [], {}, True])
def test_a_wrong_value_in_the_trainers_state_is_named(name, value, run, copy):
    state = json.loads((copy / "trainer_state.json").read_text())
    if name == "log_history" and value == []:
        return  # a run that logs nothing
    (copy / "trainer_state.json").write_text(json.dumps(state | {name: value}))
    seal_again(copy)
    assert name in run.answer(copy) or (name == "global_step" and "is of step" in run.answer(copy))


# ---- Optimizer, schedule, random state ----


def changed(path, edit):
    with safe_globals():
        content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


def first(state):
    return state["state"][0]


OPTIMIZER = {
    "another shape": lambda s: first(s).update(exp_avg=torch.ones(2, 5)),
    "a variance below 0": lambda s: first(s)["exp_avg_sq"].fill_(-1.0),
    "an infinite variance": lambda s: first(s)["exp_avg_sq"].fill_(float("inf")),
    "an average of NaN": lambda s: first(s)["exp_avg"].fill_(NAN),
    "a step ahead": lambda s: first(s)["step"].fill_(9.0),
    "a step below 0": lambda s: first(s)["step"].fill_(-1.0),
    "a step of text": lambda s: first(s).update(step="x"),
    "steps for each": lambda s: first(s).update(step=torch.ones(3)),
    "a parameter of nobody": lambda s: s["state"].update({999: first(s)}),
    "a state of text": lambda s: s["state"].update({0: "x"}),
    "no groups": lambda s: s.update(param_groups=[]),
    "groups of text": lambda s: s.update(param_groups=["x"]),
    "a rate of NaN": lambda s: s["param_groups"][0].update(lr=NAN),
    "a rate below 0": lambda s: s["param_groups"][1].update(lr=-1e-3),
    "a rate of text": lambda s: s["param_groups"][0].update(lr="x"),
}


@pytest.mark.parametrize("name", OPTIMIZER)
def test_an_optimizer_that_cannot_be_the_runs_is_named(name, run, copy):
    changed(copy / "optimizer.pt", OPTIMIZER[name])
    seal_again(copy)
    assert "optimizer.pt" in run.answer(copy)


@pytest.mark.parametrize("value", [10**12, 9, -1, "x", None, NAN])
def test_a_schedule_that_cannot_be_the_runs_is_named(value, run, copy):
    changed(copy / "scheduler.pt", lambda state: state.update(last_epoch=value))
    seal_again(copy)
    assert "scheduler.pt" in run.answer(copy)


@pytest.mark.parametrize("part", ["python", "numpy", "cpu"])
@pytest.mark.parametrize("value", [None, "x", [1]])
def test_a_random_state_that_is_none_is_named(part, value, run, copy):
    changed(copy / "rng_state.pth", lambda state: state.update({part: value}))
    seal_again(copy)
    assert "rng_state.pth" in run.answer(copy)


# ---- FSDP and DeepSpeed, whose optimizer is in files of their own ----

SHARDED = {
    "FSDP, whole": (["optimizer.bin", "pytorch_model_fsdp.bin"], []),
    "FSDP, shards": (
        ["optimizer_0/.metadata", "optimizer_0/__0_0.distcp", "optimizer_0/__1_0.distcp"]
        + ["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"],
        ["adapter_model.safetensors", "adapter_config.json"],
    ),
    "DeepSpeed": (["latest", "global_step8/zero_pp_rank_0_mp_rank_00_optim_states.pt"], ["scheduler.pt"]),
}


@pytest.mark.parametrize("kind", SHARDED)
def test_an_optimizer_in_shards_is_whole_with_all_of_them(kind, copy):
    written, absent = SHARDED[kind]
    manifest = json.loads((copy / "checkpoint.json").read_text())
    for role in ROLES:
        shutil.rmtree(copy / role)
    shutil.copy(copy / "rng_state.pth", copy / "rng_state_0.pth")
    (copy / "rng_state.pth").rename(copy / "rng_state_1.pth")
    for name in ("optimizer.pt", *absent):
        (copy / name).unlink()
    for name in written:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"x")
    manifest |= {"world_size": 2, "adapters": {"default": manifest["adapters"]["default"]}}
    (copy / "checkpoint.json").write_text(json.dumps(manifest))
    seal_again(copy)
    assert checkpoints.why_incomplete(copy) is None
    for name in ("rng_state_1.pth", written[-1] if kind == "DeepSpeed" else written[0]):
        kept = (copy / name).read_bytes()
        (copy / name).unlink()
        assert name in checkpoints.why_incomplete(copy)
        (copy / name).write_bytes(kept)
