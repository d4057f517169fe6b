"""Settings that transformers and TRL take as they are, and stumble over once the model is there.

Each is tried here in the way in which it will be used, on nothing.
"""

import difflib
import importlib.metadata
from enum import Enum
from typing import Any

import torch
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from goose_lora.errors import UserError

# What torch's checkpointing takes from a file; reentrant checkpointing is refused.
_CHECKPOINTING = {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"}
_SFT_LOSSES = ("nll", "dft")
# Needs a metric at each step, which the schedule's other forms do not.
_STEPWISE = SchedulerType.REDUCE_ON_PLATEAU


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
    asks_for_best = values.get("load_best_model_at_end") or _value(args.save_strategy) == "best"
    if asks_for_best and args.eval_strategy == "no":
        raise UserError(
            "load_best_model_at_end, save_strategy: there is no best without an evaluation. Set"
            " eval_strategy: steps."
        )


def _check_trackers(args: TrainingArguments) -> None:
    """Raise UserError unless each name of report_to is a tracker that is installed."""
    names = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    available = get_available_reporting_integrations()
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
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
        raise UserError(f"optim: {_value(args.optim)} cannot be had: {_first_line(error)}") from error


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
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=settings,
        )
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        name = _value(args.lr_scheduler_type)
        raise UserError(
            f"lr_scheduler_kwargs={settings}: {name} cannot be made of it: {_first_line(error)}"
        ) from error


def _value(setting: object) -> object:
    """Return what is written in a file for a choice of transformers."""
    return setting.value if isinstance(setting, Enum) else setting


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
