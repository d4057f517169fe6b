"""Checks of settings, our own and those of transformers and TRL: ranges, folders, secrets."""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainingArguments

from goose_lora.errors import UserError
from goose_lora.kinds import short
from goose_lora.redaction import SECRET_VALUES, is_secret, remember

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_NOT_NEGATIVE = (
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "dataloader_num_workers",
    "seed",
    "neftune_noise_alpha",
    "center_rewards_coefficient",
    "label_smoothing_factor",
    "eval_delay",
)
_ABOVE_ZERO = (
    "num_train_epochs",
    "save_steps",
    "logging_steps",
    "eval_steps",
    "adam_epsilon",
    "max_length",
    "save_total_limit",
    "dataset_num_proc",
    "ddp_timeout",
    "eval_accumulation_steps",
)
_LONGEST_NAME = 255  # bytes, on Linux and macOS
LARGEST_SEED = 2**32 - 1  # numpy's
_LARGEST_COUNT = 2**53
_LARGEST, _SMALLEST = 3.4e38, 1e-37  # of float32, with a margin


def check_finite(settings: "DataclassInstance") -> None:
    """Raise UserError, naming the setting, if a number among ``settings`` is none.

    It is NaN, infinite, or would be infinite or 0 in float32.
    """
    for field in fields(settings):
        value = getattr(settings, field.name)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{field.name}={number}: must be a finite number.")
            if field.name == "seed" and not 0 <= number <= LARGEST_SEED:
                raise UserError(f"seed={number}: must not be negative, and at most {LARGEST_SEED}.")
            # Counts end in 64 bits, and numbers of float32 are 0 or infinite beyond these
            if isinstance(number, int) and abs(number) > _LARGEST_COUNT:
                raise UserError(f"{field.name}={short.repr(number)}: is too large for anything.")
            if abs(number) > _LARGEST or 0 < abs(number) < _SMALLEST:
                size = "large" if abs(number) > 1 else "small"
                raise UserError(f"{field.name}={number}: is too {size} for the arithmetic of float32.")


def check_training(args: TrainingArguments) -> None:
    """Check ranges of the settings of ``transformers.TrainingArguments`` and of TRL's.

    They take any number and fail, or train on nothing, later.

    Raises:
        UserError: one that no training can use.
    """
    # By kind of limit; TRL's settings are there only where its trainer is
    values = vars(args)
    require_at_least_one(args, *_AT_LEAST_ONE)
    for name in _NOT_NEGATIVE:
        value = values.get(name)
        _require(name, value, value is None or value >= 0, "must not be negative")
    for name in _ABOVE_ZERO:
        value = values.get(name)
        _require(name, value, value is None or value > 0, "must be above 0")
    for name in ("seed", "data_seed"):
        seed = values[name]
        fits = seed is None or 0 <= seed <= LARGEST_SEED
        _require(name, seed, fits, f"must be at least 0 and at most {LARGEST_SEED}")
    length = values.get("max_length")
    _require("max_length", length, length is None or length > 1, "one token has nothing to predict")
    _require(
        "max_steps",
        args.max_steps,
        args.max_steps >= 1 or args.max_steps == -1,
        "must be 1 or more, or -1 to count by epochs",
    )


def require_at_least_one(settings: object, *names: str) -> None:
    """Raise UserError unless each setting of ``names`` is 1 or more, or None."""
    for name in names:
        value = getattr(settings, name)
        _require(name, value, value is None or value >= 1, "must be 1 or more")


def _require(name: str, value: object, holds: bool, why: str) -> None:
    if not holds:
        raise UserError(f"{name}={value}: {why}.")


def require_output_folder(name: str, option: str = "output_dir") -> None:
    """Raise UserError, before hours of work, if results cannot be written to the folder ``name``.

    It is not made yet. ``option`` is what the user gave it by.
    """
    if not name.strip() or "\0" in name:
        raise UserError(f"{option}={name!r}: results need a folder. Give its name.")
    # The nearest folder that exists is what must let us write
    path = Path(name).absolute()
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise UserError(f"{option}: {nearest} is a file, not a folder. Give another name, or move it away.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(
            f"{option}: {nearest} may not be written to. Give another folder, or change its rights."
        )


def check_not_empty(settings: "DataclassInstance") -> None:
    """Raise UserError for the name of a folder, file, model or function that is no name.

    An empty one would mean the working directory to some readers, and nothing to others; of one
    that is too long the system says so to each reader in another place.
    """
    names = {field.name for field in fields(settings)}
    if isinstance(settings, TrainingArguments):  # others of transformers mean "as it is"
        names &= {"output_dir", "resume_from_checkpoint", "hub_model_id"}
    for name in sorted(names):
        value = vars(settings)[name]
        if isinstance(value, str) and not value.strip() and name != "output_dir":
            raise UserError(f"{name}={value!r}: is empty. Give a name, or leave it out.")
        # Signed addresses of the web may be as long as they like
        is_name = isinstance(value, str) and "://" not in value
        if is_name and any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(value).parts):
            raise UserError(f"{name}={short.repr(value)}: no file system takes so long a name. Shorten it.")


def check_no_secrets(settings: "DataclassInstance") -> None:
    """Raise UserError if a setting with names of its own holds a secret.

    Such settings are kept in files, and trackers get them: model_init_kwargs with a token.
    """
    for field in fields(settings):
        text = getattr(settings, field.name)
        if isinstance(text, str) and SECRET_VALUES.search(text) and not is_secret(field.name):
            raise UserError(
                f"{field.name}: holds what has the form of a token, and settings are kept in files. Put it"
                " into the environment: HF_TOKEN for the Hub."
            )
        for name, value in _named_values(getattr(settings, field.name)):
            if value is not None and is_secret(name):
                remember(value)
                raise UserError(
                    f"{field.name}: {name} looks like a secret, and settings are kept in files. Put it into"
                    " the environment: HF_TOKEN for the Hub."
                )


def _named_values(value: object) -> Iterator[tuple[object, object]]:
    """Yield each name in a mapping, at any depth, with its value."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield name, inner
            yield from _named_values(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _named_values(inner)


def token_to_environment(settings: TrainingArguments) -> None:
    """Move ``hub_token`` out of the settings, to where huggingface_hub looks for it: HF_TOKEN.

    transformers pickles the settings into training_args.bin with the token in them, and trackers
    get them.
    """
    # One place for the token, which no file and no tracker reads
    if settings.hub_token and "\0" in settings.hub_token:
        raise UserError("hub_token: holds a zero byte, which no environment takes. Copy it again.")
    if settings.hub_token:
        remember(settings.hub_token)
        os.environ["HF_TOKEN"] = settings.hub_token
        settings.hub_token = None
