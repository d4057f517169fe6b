"""All stages on a base that computes in float16, as on a card below 8.0; a CPU simulates it."""

import pytest
import recipe_runs
import tiny
import torch
from recipe_runs import options, recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from goose_lora.apps.session import PolicySession, inspect_run
from goose_lora.files import read_json, read_jsonl
from goose_lora.sharing.merge import merge


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A chain in nf4 and float16, and the folder that holds it."""
    folder = tmp_path_factory.mktemp("run")
    data = {
        name: tiny.write_rows(folder / f"{name}.jsonl", getattr(tiny, name)(24))
        for name in ("texts", "preferences", "prompts")
    }
    base = {
        "model_name_or_path": tiny.save_base(
            folder / "base", hidden_size=66, head_dim=22, intermediate_size=64
        ),
        "quantization": "nf4",
        "dtype": "float16",
    }
    model = base | {"lora_r": 3, "lora_alpha": 6, "lora_layers": "top-2"}
    train = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "learning_rate": 1e-2,
    }
    # bf16 as the shipped configurations have it: the base's dtype decides
    learn = {"bf16": True, "logging_steps": 4, "gradient_checkpointing": False}
    recipe("sft").main(
        options(
            **model,
            **train | learn,
            max_steps=8,
            dataset_name=data["texts"],
            output_dir=folder / "sft",
        )
    )
    recipe("reward").main(
        options(
            **model,
            **train | learn,
            max_steps=24,
            dataset_name=data["preferences"],
            eval_dataset_name=data["preferences"],
            output_dir=folder / "reward",
        )
    )
    rollouts = {"num_rollouts": 3, "response_length": 5, "policy_adapter": folder / "sft"}
    recipe("ppo").main(
        options(
            **model,
            **train | {"per_device_train_batch_size": 24},
            **rollouts,
            num_ppo_epochs=4,
            score_calibration_prompts=24,
            reward_adapter=folder / "reward",
            dataset_name=data["prompts"],
            output_dir=folder / "ppo",
        )
    )
    recipe("own_loop").main(
        options(
            **model,
            **train,
            **rollouts | {"num_rollouts": 1},
            rating=f"{recipe_runs.__file__}:count_good",
            questions="bad",
            dataset_name=data["prompts"],
            output_dir=folder / "own_loop",
        )
    )
    recipe("evaluate").main(
        options(
            **base,
            dataset_name=data["prompts"],
            output_dir=folder / "evaluation",
            policy_adapter=folder / "ppo",
            sft_adapter=folder / "sft",
            reward_adapter=folder / "reward",
            response_length=5,
        )
    )
    return folder


def test_each_stage_moves_what_it_trains(run):
    losses = [row["loss"] for row in read_jsonl(run / "sft" / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0]
    assert read_json(run / "reward" / "verdict.json")["accuracy"] > 0.9
    rows = read_jsonl(run / "ppo" / "metrics.jsonl")
    # The score is the tests' of the trainer, on a reward that a random base can learn
    assert [row["policy/not_finite"] for row in rows[:3]] == [0.0] * 3
    assert rows[0]["objective/kl"] < 1e-3 < rows[2]["objective/kl"]
    assert read_json(run / "evaluation" / "evaluation.json")["figures"].keys() == {"base", "sft", "ppo"}


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "own_loop"])
def test_adapters_are_fp32_and_say_what_they_were_trained_on(run, stage):
    weights = load_file(run / stage / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert read_json(run / stage / "goose_lora.json")["base"]["dtype"] == "float16"


def test_chat_and_merge_go_on_in_float16(run, tmp_path):
    info = inspect_run(run / "ppo")
    session = PolicySession(info, temperature=0, max_new_tokens=5)
    (reply,) = session.reply("ppo", "ba be", seed=0)
    assert reply.tokens and reply.score is not None
    said = merge(run / "ppo", tmp_path / "merged", dtype="float16")
    assert "KL to the adapter's model" in said
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.float16
    kl = read_json(tmp_path / "merged" / "goose_lora.json")["figures"]["kl"]
    assert abs(kl) < 1e-3
