"""Settings that have no effect are told, with what they need; those that have one are not."""

import pytest
from trl import RewardConfig, SFTConfig

from goose_lora.ppo.config import PPOConfig
from goose_lora.training.unread_settings import check_unread_settings

STAGES = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}
OF_ALL = {
    "hub_model_id": ("me/mine", {"push_to_hub": True}),
    "hub_private_repo": (True, {"push_to_hub": True}),
    "hub_always_push": (True, {"push_to_hub": True}),
    "hub_revision": ("dev", {"push_to_hub": True}),
    "liger_kernel_config": ({"rope": True}, {"use_liger_kernel": True}),
    "optim_target_modules": (["q_proj"], {"optim": "galore_adamw"}),
    "metric_for_best_model": ("loss", {"save_strategy": "best", "eval_strategy": "steps"}),
    "trackio_space_id": ("me/space", {"report_to": ["trackio"]}),
}
OF_SOME = [
    ("ppo", "data_seed", 3),
    ("ppo", "per_device_eval_batch_size", 1),
    ("ppo", "dataloader_num_workers", 2),
    ("ppo", "dataloader_drop_last", True),
    ("ppo", "average_tokens_across_devices", False),
    ("ppo", "include_num_input_tokens_seen", True),
    ("ppo", "prediction_loss_only", True),
    ("ppo", "do_predict", True),
    ("sft", "eval_packing", True),
    ("sft", "length_column_name", "size"),
    ("reward", "do_predict", True),
]


def told(caplog, stage, tmp_path, **settings):
    """What is said of settings given to a stage."""
    caplog.clear()
    if stage != "ppo":
        settings.setdefault("bf16", False)
    check_unread_settings(STAGES[stage](output_dir=str(tmp_path), use_cpu=True, **settings))
    return caplog.text


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_are_not_told(stage, caplog, tmp_path):
    assert told(caplog, stage, tmp_path) == ""


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", OF_ALL)
def test_a_setting_that_needs_another_one_is_told_where_that_is_not_set(name, stage, caplog, tmp_path):
    value, beside = OF_ALL[name]
    needed = next(iter(beside)) if name != "optim_target_modules" else "optimizer"
    said = told(caplog, stage, tmp_path, **{name: value})
    assert said.count("Without effect here:") == 1
    assert f"{name} (needs" in said
    assert needed in said or name == "metric_for_best_model"
    if name != "metric_for_best_model" or stage != "ppo":
        assert told(caplog, stage, tmp_path, **{name: value}, **beside) == ""


@pytest.mark.parametrize(("stage", "name", "value"), OF_SOME)
def test_a_setting_that_the_stage_does_not_read_is_told(stage, name, value, caplog, tmp_path):
    said = told(caplog, stage, tmp_path, **{name: value})
    assert f"Without effect here: {name} (" in said


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("sft", {"data_seed": 3, "dataloader_num_workers": 2, "per_device_eval_batch_size": 1}),
        ("reward", {"data_seed": 3, "dataloader_drop_last": True, "prediction_loss_only": True}),
        ("sft", {"train_sampling_strategy": "group_by_length", "length_column_name": "size"}),
        ("sft", {"packing": True, "eval_packing": True, "neftune_noise_alpha": 5}),
        ("ppo", {"warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup"}),
        ("ppo", {"value_warmup_steps": 2}),
        ("reward", {"train_sampling_strategy": "sequential"}),
    ],
)
def test_a_setting_that_is_read_is_not_told(stage, settings, caplog, tmp_path):
    assert told(caplog, stage, tmp_path, **settings) == ""
