"""Every setting of every stage, changed between a run and its resume: told, compared by what it
names, or refused by its name."""

import json
import logging

import pytest
from recipe_runs import settings_of
from tiny_runs import logged, trainer
from transformers import TrainingArguments

from goose_lora.training import checkpoints
from goose_lora.training.checkpoints import SettingRules
from goose_lora.training.resume import given_facts

STAGES = ("sft", "reward", "ppo", "own_loop")
# Where it is kept and shown.
SILENT = {
    *("output_dir", "resume_from_checkpoint", "run_name", "project", "disable_tqdm", "report_to", "debug"),
    *("hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "push_to_hub"),
    *("trackio_bucket_id", "trackio_space_id", "trackio_static_space_id", "local_rank", "num_rollouts"),
    *("ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters"),
    *("ddp_static_graph", "ddp_timeout", "do_eval", "do_predict", "do_train", "log_level"),
    *("log_level_replica", "log_on_each_node", "skip_memory_metrics", "base_hub_id", "hub_token"),
}
# Compared as tensors, rows, templates and code.
BY_CONTENT = {
    *("model_name_or_path", "model_revision", "quantization", "dtype", "policy_adapter", "reward_adapter"),
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_layers", "chat_template_path"),
    *("dataset_name", "dataset_split", "dataset_config", "dataset_revision", "data_dir", "max_rows", "pairs"),
    *("eval_dataset_name", "eval_dataset_split", "column_mapping", "as_chat", "leave_out", "rating"),
    *("ptx_dataset_name", "ptx_max_length", "reward_function", "reward_weights", "judge_rubric"),
}
SAME_RUN = {
    *("logging_first_step", "logging_nan_inf_filter", "logging_steps", "logging_strategy", "save_strategy"),
    *("save_on_each_node", "save_only_model", "save_steps", "save_total_limit", "eval_accumulation_steps"),
    *("eval_delay", "eval_do_concat_batches", "eval_on_start", "eval_steps", "eval_strategy", "eval_packing"),
    *("eval_use_gather_object", "include_for_metrics", "include_num_input_tokens_seen", "use_cache"),
    *("prediction_loss_only", "batch_eval_metrics", "per_device_eval_batch_size", "bf16_full_eval"),
    *("fp16_full_eval", "dataloader_in_order", "dataloader_multiprocessing_context"),
    *("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory"),
    *("dataloader_prefetch_factor", "dataset_num_proc", "torch_empty_cache_steps", "enable_jit_checkpoint"),
    *("force", "trust_remote_code", "any_pairs_name", "reference_dataset_name", "sample_rows"),
    "early_stopping_patience",
}
ENDS_OTHERWISE = {
    *("max_steps", "num_train_epochs", "load_best_model_at_end", "metric_for_best_model", "use_cpu"),
    *("greater_is_better", "attn_implementation", "torch_compile", "torch_compile_backend"),
    *("torch_compile_mode", "activation_checkpointing", "activation_checkpointing_kwargs"),
    *("activation_offloading", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    "auto_find_batch_size",
}
OF_PPO = {
    *("response_length", "temperature", "max_prompt_tokens", "local_rollout_forward_batch_size", "vf_coef"),
    *(
        "rollout_weights",
        "rollout_compile",
        "rollout_engine",
        "vllm_memory_share",
        "kl_coef",
        "max_kl",
        "kl_target",
        "lam",
    ),
    *("kl_horizon", "score_calibration_prompts", "score_clip", "length_penalty", "missing_eos_penalty"),
    *("reward_timeout", "max_tokens_per_microbatch", "cliprange", "cliprange_value", "ratio_threshold"),
    *("cliprange_high", "lam_critic", "kl_importance_weight", "sampling_correction"),
    "sampling_correction_cap",
    *("gamma", "entropy_coef", "ptx_coef", "reuse_trunk", "trunk_memory", "num_eval_prompts"),
}


def given(stage, folder):
    """What a run of a stage is given, all of it the default."""
    needed = {
        "output_dir": str(folder),
        "model_name_or_path": "base",
        "dataset_name": "rows",
        "use_cpu": True,
    }
    made = []
    for kind in settings_of(stage):
        names = kind.__dataclass_fields__
        made.append(kind(**{name: value for name, value in needed.items() if name in names}))
    rules = made[0].resume_rules if stage in ("ppo", "own_loop") else SettingRules()
    return given_facts(*made), rules


def sealed(folder, facts):
    (folder / "checkpoint-4").mkdir(exist_ok=True)
    saved = {"stage": "x", "step": 4, "world_size": 1, "rows": 8, "base": {}, "adapters": {}} | facts
    checkpoints.seal(folder / "checkpoint-4", saved)
    # Its parts are another test's; here it is what the manifest says that counts
    return folder / "checkpoint-4"


def answer(checkpoint, facts, rules, caplog):
    """What is said to a run of ``facts`` that resumes from the checkpoint."""
    caplog.clear()
    try:
        checkpoints.choose(str(checkpoint), checkpoint.parent, facts, rules=rules)
    except ValueError as error:
        assert "\n" not in str(error)
        return f"refused: {error}"
    return caplog.text


@pytest.mark.parametrize("stage", STAGES)
def test_a_changed_setting_is_told_compared_by_content_or_refused_by_name(
    stage, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.WARNING, "goose_lora.training.checkpoints")
    monkeypatch.setattr(checkpoints, "why_incomplete", lambda folder: None)
    facts, rules = given(stage, tmp_path)
    checkpoint = sealed(tmp_path, facts)
    refused = 0
    for group in ("settings", "recipe"):
        for name, value in facts[group].items():
            other = "something else" if value != "something else" else None
            text = answer(checkpoint, facts | {group: facts[group] | {name: other}}, rules, caplog)
            told = f"{name} is {value} there and {other} here"
            if name in SILENT | BY_CONTENT:
                assert "refused" not in text and told not in text, name
            elif name in SAME_RUN:
                assert f"from here on the new settings are used: {told}" in text, name
            elif name in ENDS_OTHERWISE or (name in OF_PPO and stage in ("ppo", "own_loop")):
                assert f"so that it ends otherwise: {told}" in text, name
            else:
                assert text.startswith("refused") and told in text, name
                refused += 1
    assert refused > 40
    assert "refused" not in answer(checkpoint, facts, rules, caplog)


def test_what_is_best_cannot_be_judged_by_two_metrics(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(checkpoints, "why_incomplete", lambda folder: None)
    facts, rules = given("sft", tmp_path)
    facts["settings"]["metric_for_best_model"] = "loss"
    checkpoint = sealed(tmp_path, facts)
    other = facts | {"settings": facts["settings"] | {"metric_for_best_model": "accuracy"}}
    assert "metric_for_best_model is loss there and accuracy here" in answer(checkpoint, other, rules, caplog)


def test_given_facts_hold_no_secret(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, hub_token="hf_" + "a" * 20)
    assert "hf_a" not in json.dumps(given_facts(args))


def test_other_versions_are_told(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.WARNING, "goose_lora.training.checkpoints")
    monkeypatch.setattr(checkpoints, "why_incomplete", lambda folder: None)
    checkpoint = sealed(tmp_path, {"settings": {}, "versions": {"torch": "1.0", "peft": "2"}})
    text = answer(checkpoint, {"versions": {"torch": "3.0", "peft": "2"}}, SettingRules(), caplog)
    assert "versions are not those of the run that saved it" in text and "torch is 1.0 there and 3.0" in text
    assert "peft" not in text


SHORT = {"num_rollouts": 2, "save_strategy": "steps", "save_steps": 4, "score_normalization": "none"}


def test_a_new_price_of_the_kl_is_used_from_the_checkpoint_on(tmp_path):
    trainer(tmp_path / "run", kl_coef=0.02, **SHORT).train()
    again = trainer(tmp_path / "again", kl_coef=0.07, **SHORT)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    prices = [row["objective/kl_coef"] for row in logged(tmp_path / "again", "objective/kl_coef")]
    assert prices == pytest.approx([0.02, 0.07])


def test_the_first_price_of_an_adaptive_kl_is_refused_where_it_would_be_ignored(tmp_path):
    trainer(tmp_path / "run", kl_coef=0.02, kl_target=1.0, **SHORT).train()
    again = trainer(tmp_path / "again", kl_coef=0.07, kl_target=1.0, **SHORT)
    with pytest.raises(ValueError, match=r"kl_coef is 0\.02 there and 0\.07 here"):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
