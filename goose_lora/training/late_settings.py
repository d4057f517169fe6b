"""Settings that transformers and TRL take as they are, and stumble over once the model is there.

Each is tried here in the way in which it will be used, on nothing.
"""

import difflib
import importlib.metadata
import os
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.training_args import ParallelMode
from transformers.utils import is_liger_kernel_available

from goose_lora.errors import UserError
from goose_lora.files import first_line
from goose_lora.models.folders import require_hub_name

# What torch's checkpointing takes from a file; reentrant checkpointing is refused.
_CHECKPOINTING = {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"}
_SFT_LOSSES = ("nll", "dft")
_WORDS = {
    "torch_compile_mode": (
        "default",
        "lite",
        "reduce-overhead",
        "max-autotune-no-cudagraphs",
        "max-autotune",
    ),
}
_MANY_WORKERS = 128
# Stages by a setting that each of them alone has.
_TELLS = {"kl_coef": "ppo", "assistant_only_loss": "sft"}
# Figures of an evaluation by which a best checkpoint can be chosen; recipes/reward.py names those
# of its held-out pairs itself.
_EVALUATED = {
    "ppo": (
        "objective",
        "score",
        "greedy_score",
        "kl",
        "eos_rate",
        "response_tokens",
        "greedy_response_tokens",
    ),
    "sft": ("loss", "mean_token_accuracy", "entropy", "num_tokens", "aux_loss"),
}
# Needs a metric at each step, which the schedule's other forms do not.
_STEPWISE = SchedulerType.REDUCE_ON_PLATEAU


def stage_of(values: Mapping[str, object]) -> str:
    """Return whose settings these are: ppo's (and a loop's of one's own), sft's, or another's."""
    return next((stage for setting, stage in _TELLS.items() if setting in values), "another")


def check_late_settings(args: TrainingArguments) -> None:
    """Check settings on which a run would end after the model has loaded.

    Raises:
        UserError: trackers that are not there, an optimizer or schedule that cannot be made, a form
            of loss or checkpointing that is none, a precision that the machine lacks, or a model's
            settings that no recipe reads.
    """
    _check_trackers(args)
    _check_optimizer(args)
    _check_schedule(args)

    # Names and numbers that are read late
    values = vars(args)
    loss = values.get("loss_type")
    if loss is not None and loss not in _SFT_LOSSES:
        raise UserError(f"loss_type={loss!r}: there are {' and '.join(_SFT_LOSSES)}.")
    kinds = values.get("gradient_checkpointing_kwargs") or {}
    unknown = sorted(set(kinds) - _CHECKPOINTING) if isinstance(kinds, dict) else [repr(kinds)]
    if unknown:
        raise UserError(
            f"gradient_checkpointing_kwargs: {unknown[0]} is none of {', '.join(sorted(_CHECKPOINTING))}."
        )
    if kinds.get("use_reentrant"):
        raise UserError(
            "gradient_checkpointing_kwargs: use_reentrant: true gives wrong gradients where adapters are"
            " switched, or none. Leave it out."
        )
    if values.get("model_init_kwargs"):
        raise UserError(
            "model_init_kwargs: recipes load the base themselves and would pass it over. Use"
            " quantization, dtype, attn_implementation and model_revision."
        )
    if args.fp16 and args.device.type == "cpu":
        raise UserError("fp16: true: a CPU has no mixed precision in float16. Leave it out.")
    _check_best(args)
    _check_workers(args)
    _check_names(args)
    _check_machine(args)


def _check_names(args: TrainingArguments) -> None:
    """Raise UserError for words that are looked up, and packages that are imported, late."""
    values = vars(args)
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise UserError(
            "use_liger_kernel: true: liger_kernel is not installed. pip install liger-kernel, or leave it"
            " out."
        )
    for name, known in _WORDS.items():
        if values.get(name) not in (None, *known):
            raise UserError(f"{name}={values[name]!r}: there are {', '.join(known)}.")
    if args.torch_compile and str(args.torch_compile_backend).upper() not in DynamoBackend.list():
        backends = ", ".join(DynamoBackend.list()).lower()
        raise UserError(f"torch_compile_backend={args.torch_compile_backend!r}: there are {backends}.")
    multiple = values.get("pad_to_multiple_of")
    if multiple is not None and multiple < 1:
        raise UserError(f"pad_to_multiple_of={multiple}: must be 1 or more, or null.")
    if args.hub_model_id:
        require_hub_name("hub_model_id", args.hub_model_id)


def _check_best(args: TrainingArguments) -> None:
    """Raise UserError unless evaluations give the figure by which the best is chosen."""
    asks_for_best = args.load_best_model_at_end or _value(args.save_strategy) == "best"
    if not asks_for_best:
        return
    if args.eval_strategy == "no":
        raise UserError(
            "load_best_model_at_end, save_strategy: there is no best without an evaluation. Set"
            " eval_strategy: steps."
        )
    figures = _EVALUATED.get(stage_of(vars(args)))
    metric = str(args.metric_for_best_model or "loss")
    if not metric.startswith("eval_"):
        metric = f"eval_{metric}"
    if figures is not None and metric.removeprefix("eval_") not in figures:
        raise UserError(
            f"metric_for_best_model={args.metric_for_best_model}: evaluations of this stage give no {metric}."
            f" Use {' or '.join(f'eval_{name}' for name in figures)}."
        )


def _check_machine(args: TrainingArguments) -> None:
    """Raise UserError for what needs several processes, an accelerator or packed rows."""
    values = vars(args)
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise UserError("fsdp: needs several processes. Start them by accelerate launch, or leave it out.")
    if values.get("activation_offloading") and args.device.type == "cpu":
        raise UserError(
            "activation_offloading: true: there is no GPU to take activations from. Leave it out."
        )
    loose = values.get("padding_free") and not values.get("packing")
    if loose and values.get("max_length") is not None:
        raise UserError(
            f"padding_free: true: without packing, max_length={values['max_length']} would not hold. Set"
            " packing: true, or max_length: null."
        )


def _check_workers(args: TrainingArguments) -> None:
    """Raise UserError for loading processes that cannot be, or that no machine has room for."""
    values, cores = vars(args), os.cpu_count() or 1
    most = max(_MANY_WORKERS, 4 * cores)
    for name in ("dataloader_num_workers", "dataset_num_proc"):
        count = values.get(name)
        if count is not None and count > most:
            raise UserError(
                f"{name}={count}: so many processes are more than this machine bears, which has {cores}"
                f" cores. Use {cores} or fewer."
            )
    ahead = args.dataloader_prefetch_factor
    if ahead is not None and ahead < 1:
        raise UserError(f"dataloader_prefetch_factor={ahead}: must be 1 or more, or null.")
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise UserError(
            "dataloader_persistent_workers: true: there are no workers to keep. Set dataloader_num_workers"
            " to 1 or more, or leave it out."
        )


def _check_trackers(args: TrainingArguments) -> None:
    """Raise UserError unless each name of report_to is a tracker that is installed."""
    names = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    if not isinstance(names, list):
        raise UserError(f"report_to: {names!r} is no list of trackers. report_to: none switches them off.")
    available = get_available_reporting_integrations()
    for name in names:
        if name in ("none", "all"):
            continue
        if not isinstance(name, str) or name not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(str(name), INTEGRATION_TO_CALLBACK, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(INTEGRATION_TO_CALLBACK)}."
            raise UserError(f"report_to: {name!r} is no tracker. {hint}")
        if name not in available:
            raise UserError(
                f"report_to: {name} is not installed. Install it (pip install {name}), or set"
                " report_to: none."
            )


def _check_optimizer(args: TrainingArguments) -> None:
    """Raise UserError unless the optimizer can be had with its settings."""
    for name in ("adam_beta1", "adam_beta2"):
        value = vars(args)[name]
        if not 0 <= value < 1:
            raise UserError(f"{name}={value}: must be at least 0 and below 1; 0.9 and 0.999 are usual.")
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError, RuntimeError, importlib.metadata.PackageNotFoundError) as error:
        given = ""
        if args.optim_args:
            given = f" with optim_args: {args.optim_args} (name=value, name=value)"
        raise UserError(f"optim: {_value(args.optim)} cannot be had{given}: {first_line(error)}") from error


def _check_schedule(args: TrainingArguments) -> None:
    """Raise UserError unless the learning rate's schedule can be made with its settings."""
    if args.lr_scheduler_type == _STEPWISE:
        raise UserError(
            f"lr_scheduler_type: {_STEPWISE.value} needs a metric, and no recipe gives it one. Use linear,"
            " cosine or constant."
        )
    settings: Any = args.lr_scheduler_kwargs
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    try:
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=settings,
        )
        # Some settings are met behind the warm-up only
        for _ in range(9):
            optimizer.step()
            schedule.step()
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        name = _value(args.lr_scheduler_type)
        raise UserError(
            f"lr_scheduler_kwargs={settings}: {name} cannot be made of it: {first_line(error)}"
        ) from error


def _value(setting: object) -> object:
    """Return what is written in a file for a choice of transformers."""
    return setting.value if isinstance(setting, Enum) else setting
