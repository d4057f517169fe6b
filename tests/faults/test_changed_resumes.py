"""What a run is made of, changed between the run and its resume, through the recipes: one line that
names it and exit code 2, before a step is made."""

import shutil

import forks
import pytest
import tiny
from forks import assert_same_leavings

REWARD = "def score(completions, **columns):\n    return [_count(text) for text in completions]\n\n\n"
REWARD += "def _count(text):\n    return text.split().count('good') + 0.1 * len(text.split())\n"


@pytest.fixture(scope="module")
def world(given, tiny_base, tmp_path_factory):
    """A run of sft.py, and one of ppo.py that starts from it, with the settings of both."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "score.py").write_text(REWARD)
    settings = {
        "sft": given["sft"] | {"eval_dataset_name": given["sft"]["dataset_name"]},
        "ppo": given["ppo"]
        | {"reward_function": f"{folder}/score.py:score", "policy_adapter": folder / "sft"},
    }
    for name in ("sft", "ppo"):
        ended = forks.run(name, folder / name, **settings[name])
        assert ended.code == 0, ended.output[-3000:]
    return folder, settings


def rows(name, folder, count=24, edit=None):
    """A file of the rows of ``name`` as the runs had them, but for what ``edit`` does."""
    found = getattr(tiny, name)(count)
    return tiny.write_rows(folder / f"{name}.jsonl", (edit or list)(found))


def file_of(folder, text):
    (folder / "score.py").write_text(text)
    return f"{folder}/score.py:score"


def other_adapter(folder, source):
    shutil.copytree(source, folder / "adapter")
    shutil.copy(source / "checkpoint-2" / "adapter_model.safetensors", folder / "adapter")
    return folder / "adapter"


def reordered(found):
    return found[::-1]


CHANGES = {
    "another helper of the reward function": (
        "ppo",
        lambda folder, world: {"reward_function": file_of(folder, REWARD.replace("0.1", "0.2"))},
        "reward score is",
    ),
    "another weight of it": ("ppo", lambda folder, world: {"reward_weights": 2.0}, "reward score is"),
    "prompts in another order": (
        "ppo",
        lambda folder, world: {"dataset_name": rows("prompts", folder, edit=reordered)},
        "rows' content is",
    ),
    "a row less": (
        "ppo",
        lambda folder, world: {"dataset_name": rows("prompts", folder, count=23)},
        "rows is 24 there and 23 here",
    ),
    "another policy to start from": (
        "ppo",
        lambda folder, world: {"policy_adapter": other_adapter(folder, world / "sft")},
        "policy_adapter is",
    ),
    "another way of counting": (
        "ppo",
        lambda folder, world: {"whiten_rewards": True},
        "whiten_rewards is False",
    ),
    "other held-out rows": (
        "sft",
        lambda folder, world: {"eval_dataset_name": rows("texts", folder, edit=reordered)},
        "held-out rows' content is",
    ),
    "another schedule": (
        "sft",
        lambda folder, world: {"lr_scheduler_type": "cosine"},
        "lr_scheduler_type is",
    ),
    "another dtype": ("sft", lambda folder, world: {"dtype": "bfloat16"}, "base dtype is float32 there"),
    "another quantization": (
        "sft",
        lambda folder, world: {"quantization": "int8"},
        "base quantization is none",
    ),
    "another dropout": ("sft", lambda folder, world: {"lora_dropout": 0.1}, "further of the adapter default"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_resume_of_something_else_is_refused_by_name(name, world, tmp_path):
    folder, settings = world
    stage, change, told = CHANGES[name]
    shutil.copytree(folder / stage, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    changed = settings[stage] | change(tmp_path, folder)
    ended = forks.run(stage, tmp_path / "run", **changed, resume_from_checkpoint="latest")
    assert ended.code == 2, ended.output[-2000:]
    *_, error = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert told in error and "Traceback" not in ended.output
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_what_is_the_same_by_another_name_goes_on(world, tmp_path):
    folder, settings = world
    shutil.copytree(folder / "ppo", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    same = {
        "dataset_name": rows("prompts", tmp_path),
        "policy_adapter": shutil.copytree(folder / "sft", tmp_path / "adapter"),
        "model_name_or_path": shutil.copytree(settings["ppo"]["model_name_or_path"], tmp_path / "base"),
        "reward_function": file_of(tmp_path, REWARD),
        "save_total_limit": 3,
    }
    ended = forks.run("ppo", tmp_path / "run", **settings["ppo"] | same, resume_from_checkpoint="latest")
    assert ended.code == 0, ended.output[-2000:]
    assert 0 < ended.counts["update"] < 8, "it goes on, and does not begin anew"
    assert_same_leavings(folder / "ppo", tmp_path / "run")
