"""Settings that a stage would pass over: refused where training depends on them, told elsewhere.

transformers knows some 150 settings, and reads many of them only beside another one.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from enum import Enum
from typing import NamedTuple, cast

from transformers import SchedulerType, TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.trainer_pt_utils import AcceleratorConfig

from goose_lora.errors import UserError
from goose_lora.training.late_settings import stage_of

logger = logging.getLogger(__name__)


class _Unread(NamedTuple):
    """A setting with no effect, or a harmful one, unless ``holds``; ``why`` says the way out."""

    name: str
    holds: Callable[[Mapping[str, object]], bool]
    why: str


def _is_ppo(values: Mapping[str, object]) -> bool:
    return stage_of(values) == "ppo"


def _is_fine_tuning(values: Mapping[str, object]) -> bool:
    return stage_of(values) == "sft"


def _never(values: Mapping[str, object]) -> bool:
    return False


def _not_ppo(values: Mapping[str, object]) -> bool:
    return not _is_ppo(values)


def _beside(name: str) -> Callable[[Mapping[str, object]], bool]:
    """Return a question: is the setting ``name`` given, or on?"""
    return lambda values: bool(values.get(name))


# Who sets one of these wants other training, or another checkpoint, than there would be
_REFUSED = (
    _Unread("bf16_full_eval", _never, "adapters stay in float32. Leave it out; dtype is the base's."),
    _Unread("fp16_full_eval", _never, "adapters stay in float32. Leave it out; dtype is the base's."),
    _Unread(
        "save_only_model",
        _never,
        "no run could go on from such a checkpoint. Leave it out; save_total_limit: 1 keeps the disk small.",
    ),
    _Unread("ignore_data_skip", _never, "a resumed run would read the same rows again. Leave it out."),
    _Unread("label_names", _never, "each stage names its labels itself. Leave it out."),
    _Unread("dataset_kwargs", _never, "the recipe prepares the rows itself (docs/data.md). Leave it out."),
    _Unread("fsdp_config", _beside("fsdp"), "is read with fsdp alone. Set fsdp too, or leave it out."),
    _Unread(
        "dataloader_multiprocessing_context",
        lambda values: _is_ppo(values) or bool(values.get("dataloader_num_workers")),
        "there are no workers to start. Set dataloader_num_workers to 1 or more, or leave it out.",
    ),
    _Unread(
        "label_smoothing_factor",
        _is_fine_tuning,
        "is of fine-tuning (recipes/sft.py) alone. Leave it out; margins of pairs are a column.",
    ),
    _Unread("neftune_noise_alpha", _not_ppo, "log-probabilities of PPO have no noise. Leave it out."),
    _Unread(
        "auto_find_batch_size", _not_ppo, "PPO halves a microbatch itself where memory ends. Leave it out."
    ),
    _Unread(
        "warmup_steps",
        lambda values: values["lr_scheduler_type"] != SchedulerType.CONSTANT,
        "lr_scheduler_type: constant has no warm-up. Set lr_scheduler_type: constant_with_warmup.",
    ),
)

# These change nothing that is trained, but were set for something
_OF_UPLOADS = ("hub_model_id", "hub_revision", "hub_private_repo", "hub_always_push")
_OF_TRACKIO = ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
_OF_ROWS_READ_AHEAD = (
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "dataloader_multiprocessing_context",
    "dataloader_drop_last",
)
_OF_TRANSFORMERS_LOOP = (
    "average_tokens_across_devices",
    "batch_eval_metrics",
    "eval_accumulation_steps",
    "include_for_metrics",
    "include_num_input_tokens_seen",
    "per_device_eval_batch_size",
    "prediction_loss_only",
)
_WITHOUT_EFFECT = (
    *(_Unread(name, _beside("push_to_hub"), "needs push_to_hub: true") for name in _OF_UPLOADS),
    *(
        _Unread(name, lambda values: "trackio" in (values["report_to"] or ()), "needs report_to: trackio")
        for name in _OF_TRACKIO
    ),
    _Unread("liger_kernel_config", _beside("use_liger_kernel"), "needs use_liger_kernel: true"),
    _Unread(
        "length_column_name",
        lambda values: values["train_sampling_strategy"] in ("group_by_length", "batch_rebalance"),
        "needs train_sampling_strategy: group_by_length",
    ),
    _Unread(
        "optim_target_modules",
        lambda values: any(kind in _text(values["optim"]) for kind in ("galore", "apollo", "lomo")),
        "needs a GaLore, APOLLO or LOMO optimizer",
    ),
    _Unread(
        "metric_for_best_model",
        lambda values: bool(
            values["load_best_model_at_end"]
            or _text(values["save_strategy"]) == "best"
            or values.get("early_stopping_patience") is not None
        ),
        "needs load_best_model_at_end: true",
    ),
    _Unread("eval_packing", _beside("packing"), "needs packing: true"),
    _Unread("data_seed", _not_ppo, "prompts of PPO are drawn by seed"),
    *(_Unread(name, _not_ppo, "PPO keeps its prompts in memory") for name in _OF_ROWS_READ_AHEAD),
    *(_Unread(name, _not_ppo, "is of transformers' own loop") for name in _OF_TRANSFORMERS_LOOP),
    _Unread("do_predict", _never, "recipes/evaluate.py writes replies"),
)


def check_unread_settings(args: TrainingArguments) -> None:
    """Refuse settings that would be passed over though training depends on them; tell the rest.

    Raises:
        UserError: a setting of another stage, of a precision that adapters do not have, or without
            the one beside which it is read.
    """
    values, given = vars(args), _given(args)
    for name, holds, why in _REFUSED:
        if name in given and not holds(values):
            raise UserError(f"{name}={_text(values[name])}: {why}")
    _check_sampling(args)
    _check_accelerator(args)
    # transformers makes a list of words, and keeps whatever else is given
    debug: object = args.debug
    if not isinstance(debug, list) or any(option not in list(DebugOption) for option in debug):
        raise UserError(
            f"debug={_text(debug)}: is none of {', '.join(DebugOption)}. Give one of them, or leave it out."
        )
    if DebugOption.UNDERFLOW_OVERFLOW in debug and _is_ppo(values):
        raise UserError(
            "debug=underflow_overflow: cannot look into several roles on one base. Leave it out: every step"
            " is looked at, and a number that is not finite is told by its tensor."
        )
    passed_over = [
        f"{name} ({why})" for name, holds, why in _WITHOUT_EFFECT if name in given and not holds(values)
    ]
    if passed_over:
        logger.warning("Without effect here: %s.", ", ".join(passed_over))


def _given(args: TrainingArguments) -> set[str]:
    """Return the names of settings that differ from what their dataclass fills in."""
    names = set()
    for field in fields(args):
        default = field.default
        if default is MISSING:
            default = field.default_factory() if field.default_factory is not MISSING else None
        value = getattr(args, field.name, default)
        # Unset, off, empty and the default are all of no effect
        is_off = value is False and default is True
        if is_off or (value and _text(value) != _text(default)):
            names.add(field.name)
    return names


def _check_sampling(args: TrainingArguments) -> None:
    """Raise UserError for another order of prompts than PPO's."""
    order = args.train_sampling_strategy
    if order != "random" and _is_ppo(vars(args)):
        raise UserError(
            f"train_sampling_strategy={order}: rollouts draw their prompts at random. Leave it out."
        )


def _check_accelerator(args: TrainingArguments) -> None:
    """Raise UserError for settings of accelerate that contradict those of the run."""
    config = cast(AcceleratorConfig, args.accelerator_config)  # of a file's words, once they are read
    steps = (config.gradient_accumulation_kwargs or {}).get("num_steps")
    if steps is not None:
        raise UserError(
            f"accelerator_config: gradient_accumulation_kwargs: num_steps={steps}: here it is"
            f" gradient_accumulation_steps: {steps}."
        )
    if config.split_batches and _is_ppo(vars(args)):
        raise UserError(
            "accelerator_config: split_batches: true: a batch is of each process here. Leave it out."
        )


def _text(value: object) -> str:
    """Return a setting as it is written in a file."""
    return str(value.value if isinstance(value, Enum) else value)
