"""What the recipes of this folder's runs are told, at its smallest."""

import pytest


def count_good(completions, **columns):
    return [text.split().count("good") + 0.1 * len(text.split()) for text in completions]


@pytest.fixture(scope="module")
def given(tiny_base, tmp_path_factory):
    """Settings by recipe."""
    import tiny  # not before tests/conftest.py has hidden the GPU: these tests fork

    folder = tmp_path_factory.mktemp("data")
    data = {
        name: tiny.write_rows(folder / f"{name}.jsonl", getattr(tiny, name)(24))
        for name in ("texts", "preferences", "prompts")
    }
    model = {
        "model_name_or_path": tiny_base,
        "quantization": "none",
        "dtype": "float32",
        "lora_r": 3,
        "lora_alpha": 6,
        "lora_layers": "top-2",
    }
    train = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
    }
    train["per_device_train_batch_size"] = 4
    small = {
        "bf16": False,
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
        "gradient_checkpointing": False,
    }
    ppo = {
        "num_rollouts": 4,
        "num_ppo_epochs": 2,
        "save_steps": 2,
        "response_length": 4,
        "score_calibration_prompts": 8,
        "rollout_weights": "shared",
    }
    ppo |= {"reward_function": f"{__file__}:count_good", "dataset_name": data["prompts"], "sample_rows": 1}
    pairs = {"dataset_name": data["preferences"], "eval_dataset_name": data["preferences"]}
    own = {"rating": f"{__file__}:count_good", "score_normalization": "none"}
    return {
        "sft": model | train | small | {"dataset_name": data["texts"]},
        "reward": model | train | small | pairs,
        "ppo": model | train | ppo,
        "own_loop": (
            model | train | {name: value for name, value in ppo.items() if name != "reward_function"} | own
        ),
    }
