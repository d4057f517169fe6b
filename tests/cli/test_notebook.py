"""``goose_lora.run``: stages as calls, which return what they have left and raise what is wrong."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from peft import PeftModel
from transformers.trainer_utils import SchedulerType

import goose_lora
from goose_lora.cli.yaml_settings import read_config
from goose_lora.errors import UserError
from goose_lora.files import read_json


def even(completions, **columns):
    """A reward that needs nothing: the share of even words."""
    return [float(len(text) % 2) for text in completions]


@pytest.fixture
def settings(tiny_base):
    return {
        "model_name_or_path": tiny_base,
        "quantization": "none",
        "dtype": "float32",
        "lora_r": 3,
        "use_cpu": True,
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }


def test_a_chain_is_two_calls(settings, tmp_path):
    texts = tiny.write_rows(tmp_path / "texts.jsonl", tiny.texts(16))
    prompts = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompts(16))
    sft = goose_lora.run("sft", settings, dataset_name=texts, output_dir=tmp_path / "sft", max_steps=2)
    assert sft.figures["steps"] == 2 == sft.trainer.state.global_step
    assert sft.folder / "adapter_model.safetensors" in sft.files
    ppo = goose_lora.run(
        "ppo",
        settings,
        dataset_name=prompts,
        output_dir=tmp_path / "ppo",
        policy_adapter=sft.folder,
        reward_function=f"{__file__}:even",
        num_rollouts=1,
        response_length=4,
        score_calibration_prompts=8,
    )
    assert "objective/score" in ppo.figures
    assert isinstance(ppo.trainer.model, PeftModel)
    noted = read_json(tmp_path / "ppo" / "goose_lora.json")
    assert noted["command"].startswith("goose_lora.run(") and "yaml" not in noted["command"]
    assert "GOOSE_LORA_COMMAND" not in os.environ


def test_a_packaged_configuration_and_overrides(settings, tmp_path):
    texts = tiny.write_rows(tmp_path / "texts.jsonl", tiny.texts(16))
    done = goose_lora.run(
        "sft",
        "demo_cpu/raw/sft",
        **(settings | {"lora_layers": "all"}),
        dataset_name=texts,
        output_dir=tmp_path / "sft",
        max_steps=1,
    )
    assert done.trainer.args.learning_rate == 5e-4, "the configuration's"
    assert done.trainer.args.max_steps == 1, "the override"


@pytest.mark.parametrize(
    ("stage", "given", "said"),
    [
        ("dpo", {}, "'dpo' is no stage. There are sft, reward, ppo, own-loop, evaluate"),
        ("ppo", {}, "output_dir is missing"),
        ("ppo", {"config": "nowhere/ppo", "output_dir": "x"}, "no such file, nor a configuration"),
        ("ppo", {"output_dir": "x", "kl_coeff": 0.1}, "unknown setting 'kl_coeff'. Did you mean kl_coef"),
    ],
)
def test_what_is_wrong_is_raised(stage, given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        goose_lora.run(stage, **given)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def written(monkeypatch):
    """The settings that a recipe would have been given, of the last call."""
    seen = {}

    def main(words):
        seen.clear()
        seen.update(read_config(words[1]))

    monkeypatch.setattr("goose_lora.cli.notebook.load_recipe", lambda script: SimpleNamespace(main=main))
    return seen


def test_what_python_has_for_a_setting_reaches_the_recipe_as_that(written, tmp_path):
    given = {"kl_coef": np.float64(0.5), "seed": np.int64(3), "lora_target_modules": ("a", "b")}
    given |= {
        "dtype": torch.float32,
        "lr_scheduler_type": SchedulerType.COSINE,
        "vf_coef": torch.tensor(0.25),
    }
    goose_lora.run("ppo", given, output_dir=tmp_path, policy_adapter=tmp_path / "sft")
    assert written == {
        "kl_coef": 0.5,
        "seed": 3,
        "lora_target_modules": ["a", "b"],
        "dtype": "float32",
        "lr_scheduler_type": "cosine",
        "vf_coef": 0.25,
        "output_dir": str(tmp_path),
        "policy_adapter": str(tmp_path / "sft"),
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"reward_function": even}, "reward_function: of the kind function, .* 'my_file.py:function'"),
        ({"reward_function": [even, "adapter"]}, "reward_function: of the kind function"),
        (
            {"dataset_name": Dataset.from_list(tiny.prompts())},
            "dataset_name: .* Dataset, .* to a file",
        ),
        ({"seed": object()}, "seed: of the kind object, .* Give text, a number"),
    ],
    ids=["function", "functions", "rows", "object"],
)
def test_what_no_file_can_hold_is_refused_with_the_way_out(given, said, tmp_path):
    with pytest.raises(UserError, match=said):
        goose_lora.run("ppo", given, output_dir=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_an_error_names_no_file_that_is_gone(settings, tmp_path):
    with pytest.raises(UserError) as refused:
        goose_lora.run("ppo", settings, output_dir=tmp_path, kl_coef=[0.1])
    assert str(refused.value) == "kl_coef: [0.1] is not a number."


def test_folders_in_the_home_folder_are_found_and_the_result_is_read_there(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.save_base(tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "texts.jsonl", tiny.texts(16))
    settings |= {"model_name_or_path": "~/base", "bf16": False, "max_steps": 1, "dataset_name": rows}
    first = goose_lora.run("sft", settings, output_dir="~/first")
    assert first.folder == tmp_path / "first" and first.figures["steps"] == 1
    assert first.folder / "adapter_model.safetensors" in first.files
    again = goose_lora.run("sft", settings, output_dir="~/again", policy_adapter="~/first")
    assert read_json(again.folder / "goose_lora.json")["base"]["id"] == str(tmp_path / "base")


def test_a_secret_reaches_the_recipe_and_no_file(settings, tmp_path, monkeypatch):
    seen = {}

    def main(words):
        seen["words"], seen["file"] = words, Path(words[1]).read_text()

    monkeypatch.setattr("goose_lora.cli.notebook.load_recipe", lambda script: SimpleNamespace(main=main))
    goose_lora.run("sft", settings, output_dir=tmp_path / "sft", hub_token="hf_planted", eos_token="</s>")
    assert seen["words"][2:] == ["--hub_token", "hf_planted"]
    assert "planted" not in seen["file"] and "eos_token: </s>" in seen["file"]


def test_the_version_is_the_packages():
    assert goose_lora.__version__.count(".") == 2


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize("order", ["sequential", "group_by_length", "batch_rebalance"])
def test_rows_come_in_each_order_that_transformers_has(stage, order, settings, tmp_path):
    texts, preferences = tiny.texts(16), tiny.preferences(16)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", texts if stage == "sft" else preferences)
    settings |= {"train_sampling_strategy": order, "bf16": False, "max_steps": 2}
    if stage == "reward":
        settings["eval_dataset_name"] = rows
    done = goose_lora.run(stage, settings, dataset_name=rows, output_dir=tmp_path / "run")
    assert done.figures["steps"] == 2
