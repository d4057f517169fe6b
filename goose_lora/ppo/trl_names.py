"""Names of TRL's PPO and what each is called here.

They are those of both generations (0.7 to 0.11 and 0.12 to 1.12). A name is listed where it does
not exist here, or is TRL's for something that is done in another way. Names that are not listed
work here.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from goose_lora.errors import UserError

Class = TypeVar("Class", bound=type)

_ROLES = "nothing: the roles are policy, value, reward and reference"
_TRACKED = "nothing: report_to names the tracker, which has its own environment variables"
_ALWAYS_LORA = "nothing: policy and critic are LoRA adapters always"

# Fields of PPOConfig (trl 0.11.4 and 1.12.0), and of ScriptArguments and ModelConfig, which the
# shipped examples parse beside it.
FROM_TRL = {
    # KL
    "init_kl_coef": "kl_coef",
    "adap_kl_ctrl": "kl_target (adaptive where it is set, fixed where not)",
    "target": "kl_target",
    "horizon": "kl_horizon",
    "kl_penalty": "kl_estimator (k1 for 'kl', k2 for 'mse', exact for 'full') and kl_location",
    "target_kl": "max_kl, which is nats a reply and stops the run",
    "early_stopping": "max_kl, which stops the run where it is set",
    # Score
    "use_score_scaling": "score_normalization: running",
    "use_score_norm": "score_normalization: running",
    # Length of the run, and sizes
    "steps": "num_rollouts (steps / batch_size)",
    "total_episodes": "num_rollouts (total_episodes / batch_size)",
    "num_total_batches": "num_rollouts",
    "ppo_epochs": "num_ppo_epochs",
    "batch_size": "per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches",
    "global_batch_size": (
        "per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches on each process"
    ),
    "local_batch_size": "per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches",
    "mini_batch_size": (
        "per_device_train_batch_size (0.7 to 0.11, a forward); with gradient_accumulation_steps times it, an"
        " optimizer step (1.12)"
    ),
    "local_mini_batch_size": "per_device_train_batch_size * gradient_accumulation_steps",
    "micro_batch_size": "per_device_train_batch_size on each process",
    "forward_batch_size": "per_device_train_batch_size",
    "backward_batch_size": "per_device_train_batch_size * gradient_accumulation_steps",
    "global_backward_batch_size": "per_device_train_batch_size * gradient_accumulation_steps on each process",
    "world_size": "nothing: accelerate launch says how many processes there are",
    # Replies
    "stop_token": "stop_token_ids; unset, replies end at the tokenizer's end-of-text token, as with 'eos'",
    "stop_token_id": "stop_token_ids, a list",
    "num_sample_generations": "samples.jsonl, which every run writes, and sample_rows",
    # Models
    "sft_model_path": "policy_adapter, the SFT adapter; a whole SFT model is model_name_or_path",
    "reward_model_path": (
        "reward_adapter, a reward adapter; a whole reward model is reward_function: model:PATH_OR_HUB_ID"
    ),
    "reward_model": (
        "reward_adapter, a reward adapter; a whole reward model is reward_function: model:PATH_OR_HUB_ID"
    ),
    "ref_model_path": "policy_adapter, whose frozen copy is the reference",
    "ref_model": "policy_adapter, whose frozen copy is the reference",
    "value_model": "critic",
    "model_name": "model_name_or_path",
    "model_adapter_name": _ROLES,
    "ref_adapter_name": _ROLES,
    "is_encoder_decoder": "nothing: decoder-only models alone",
    "is_peft_model": _ALWAYS_LORA,
    "use_peft": _ALWAYS_LORA,
    "torch_dtype": "dtype",
    "load_in_4bit": "quantization: nf4",
    "load_in_8bit": "quantization: int8",
    "bnb_4bit_quant_type": "quantization: nf4",
    "use_bnb_nested_quant": "nothing: quantization: nf4 nests its constants always",
    "bnb_4bit_quant_storage": "nothing: the base is not sharded",
    "lora_target_parameters": "lora_target_modules, of linear layers",
    "lora_modules_to_save": "nothing: the policy is pure LoRA, so that plain PEFT and vLLM load it",
    "lora_task_type": "nothing: each role has its own",
    "use_rslora": "lora_alpha, which may be sqrt(r) times as large",
    "use_dora": "nothing: plain LoRA alone",
    # Data
    "query_dataset": "dataset_name",
    "dataset_train_split": "dataset_split",
    "dataset_test_split": "eval_dataset_split, with eval_dataset_name",
    "dataset_streaming": "nothing: prompts are read whole; max_rows takes the first of them",
    "dataset_num_proc": "nothing: prompts are tokenized in one process, and kept",
    # Tracking, and the machine
    "exp_name": "run_name",
    "task_name": "run_name",
    "log_with": "report_to",
    "tracker_project_name": "project",
    "tracker_kwargs": _TRACKED,
    "project_kwargs": "output_dir",
    "push_to_hub_if_best_kwargs": "push_to_hub, hub_model_id and hub_private_repo",
    "compare_steps": "nothing: metrics.jsonl has every rollout",
    "accelerator_kwargs": "accelerator_config, or a file for accelerate launch",
    "optimize_device_cache": "torch_empty_cache_steps",
    "optimize_cuda_cache": "torch_empty_cache_steps",
    "ignore_bias_buffers": "ddp_broadcast_buffers",
    "gradient_checkpointing_use_reentrant": (
        "nothing: checkpointing is never reentrant, which could not tell the adapters apart"
    ),
    "ds3_gather_for_generation": "nothing: the base is not sharded",
}

# Keyword arguments of PPOTrainer (trl 0.11.4 and 1.12.0).
TRAINER_ARGUMENTS = {
    "config": "args=PPOConfig(...)",
    "tokenizer": "processing_class",
    "dataset": "train_dataset, from goose_lora.data.tokenization.tokenize_prompts",
    "ref_model": (
        "SharedBase.build(base, policy, reference=...): a frozen copy of a trained policy adapter, or the"
        " base with adapters off"
    ),
    "reward_model": (
        "SharedBase.build(..., reward=FOLDER), or reward_function: a Python function or"
        " 'model:PATH_OR_HUB_ID'"
    ),
    "value_model": "SharedBase.build(..., critic='adapter'), or 'shared' or 'reward_features'",
    "peft_config": "SharedBase.build(base, LoraConfig(...))",
    "optimizer": "optimizers=(optimizer, None), or the settings optim and learning_rate",
    "lr_scheduler": "optimizers=(None, scheduler), or the setting lr_scheduler_type",
    "num_shared_layers": "lora_layers: top-K, below which all roles share the base",
    "data_collator": "nothing: the trainer pads prompts itself",
    "training_data_collator": "nothing: the trainer pads prompts itself",
}

# Names that were imported from trl for its PPO.
IMPORTS = {
    "PPOv2Config": "PPOConfig",
    "PPOv2Trainer": "PPOTrainer",
    "AutoModelForCausalLMWithValueHead": (
        "SharedBase.build(base, policy, critic='shared'), a value head on the policy"
    ),
    "AutoModelForSeq2SeqLMWithValueHead": "nothing: decoder-only models alone",
    "PreTrainedModelWrapper": "SharedBase",
    "RLOOConfig": "PPOConfig(advantage_estimator='rloo', num_generations=...)",
    "RLOOTrainer": "PPOTrainer with PPOConfig(advantage_estimator='rloo')",
    "GRPOConfig": "PPOConfig(advantage_estimator='grpo', num_generations=...)",
    "GRPOTrainer": "PPOTrainer with PPOConfig(advantage_estimator='grpo')",
    "AdaptiveKLController": "PPOConfig(kl_target=...)",
    "FixedKLController": "PPOConfig(kl_coef=...)",
    "ModelConfig": "goose_lora.models.arguments.ModelArguments",
    "ScriptArguments": "goose_lora.data.rows.DataArguments",
    "get_peft_config": "goose_lora.models.loading.lora_config",
    "get_quantization_config": "goose_lora.models.quantization.quantization_config",
}


def refuse_trl_arguments(names: Iterable[str], answers: Mapping[str, str] = TRAINER_ARGUMENTS) -> None:
    """Refuse ``names`` that are TRL's, with the name here for each.

    Args:
        answers: TRL's names and those here; by default, the keywords of its PPOTrainer.

    Raises:
        UserError: one or more are TRL's.
    """
    found = [name for name in names if name in answers]
    if found:
        listed = "; ".join(f"{name!r} is here {answers[name]}" for name in found)
        raise UserError(
            f"{listed}. This is not TRL's PPO: docs/migration.md has the whole table and two worked examples."
        )


def answers_trl(answers: Mapping[str, str]) -> Callable[[Class], Class]:
    """Make a decorator of classes that answers keyword arguments which are TRL's.

    It does so before Python complains of those that are missing.
    """

    def decorate(cls: Class) -> Class:
        original = cls.__init__

        @functools.wraps(original)
        def __init__(instance: object, *args: object, **kwargs: object) -> None:
            refuse_trl_arguments(kwargs, answers)
            original(instance, *args, **kwargs)

        cls.__init__ = __init__
        return cls

    return decorate
