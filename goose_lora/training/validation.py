"""What settings are checked for whoever made them, the project's own dataclasses and those of
transformers and TRL: types, ranges, folders."""

import math
import os
import reprlib
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from goose_lora.errors import UserError

_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_NOT_NEGATIVE = (
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "dataloader_num_workers",
    "seed",
)
_ABOVE_ZERO = (
    "num_train_epochs",
    "save_steps",
    "logging_steps",
    "eval_steps",
    "adam_epsilon",
    "max_length",
    "save_total_limit",
)
_LARGEST_SEED = 2**32 - 1  # numpy's

_short = reprlib.Repr()  # aliases make a few lines of YAML a value without end
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxstring = 2, 4, 4, 60


def check_types(config: Mapping[str, Any], dataclasses: Sequence[type], where: str) -> None:
    """Compare the values of a YAML file with the types of the settings. Text where a number belongs
    is left to argparse, which reads it as one: YAML takes 1e-5 for text.

    Raises:
        ValueError: a value of another type: a list for a number, a fraction for a count, null where
            something must be.
    """
    hints: dict[str, Any] = {}
    for dataclass in dataclasses:
        hints |= get_type_hints(dataclass)
    for name, value in config.items():
        if name in hints and not _fits(value, hints[name]):
            found = "null" if value is None else _short.repr(value)
            quotes = (
                " Put it in quotes."
                if "text" in _words(hints[name]) and isinstance(value, (int, float))
                else ""
            )
            raise UserError(f"{where}{name}: {found} is not {_words(hints[name])}.{quotes}")


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is list:
        if isinstance(value, (list, tuple)):
            return all(
                _fits(item, parts[0]) and not (isinstance(item, str) and parts[0] is not str)
                for item in value
            )
        return value is not None and (
            isinstance(value, Mapping) == (parts[0] is str) or _fits(value, parts[0])
        )
    if hint in (int, float, bool):
        if isinstance(value, str):
            return True
        return isinstance(value, {int: int, float: (int, float), bool: bool}[hint]) and (
            hint is bool or not isinstance(value, bool)
        )
    if hint in (str, type(None)):
        return isinstance(value, hint)
    return True  # enums and dictionaries: their owner says what it takes


def _words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin is list:
        return (
            "a list of"
            f" {', '.join(_words(part).removeprefix('a ') + 's' * (part is not str) for part in parts)}"
        )
    return _KINDS.get(hint, str(getattr(hint, "__name__", hint)))


def check_finite(settings: Any) -> None:
    """Raise ValueError, naming the setting, if a number among ``settings`` is NaN or infinite."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{field.name}={number}: must be a finite number.")


def check_training(args: TrainingArguments) -> None:
    """Ranges of the settings of ``transformers.TrainingArguments`` and of TRL's, which take any
    number and fail, or train on nothing, later.

    Raises:
        ValueError: one that no training can use.
    """
    values = vars(args)
    require_at_least_one(args, *_AT_LEAST_ONE)
    for name in _NOT_NEGATIVE:
        _require(name, values[name], values[name] is None or values[name] >= 0, "must not be negative")
    for name in _ABOVE_ZERO:
        value = values.get(name)
        _require(name, value, value is None or value > 0, "must be above 0")
    _require("seed", args.seed, args.seed <= _LARGEST_SEED, f"must be at most {_LARGEST_SEED}")
    _require(
        "max_steps",
        args.max_steps,
        args.max_steps >= 1 or args.max_steps == -1,
        "must be 1 or more, or -1 to count by epochs",
    )


def require_at_least_one(settings: Any, *names: str) -> None:
    """Raise ValueError unless each setting of ``names`` is 1 or more, or None."""
    for name in names:
        value = getattr(settings, name)
        _require(name, value, value is None or value >= 1, "must be 1 or more")


def _require(name: str, value: Any, holds: bool, why: str) -> None:
    if not holds:
        raise UserError(f"{name}={value}: {why}.")


def require_output_folder(name: str) -> None:
    """Raise ValueError, before hours of work, if results cannot be written to the folder ``name``.
    It is not made yet."""
    path = Path(name).absolute()
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise UserError(f"output_dir: {nearest} is a file, not a folder. Give another name, or move it away.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(
            f"output_dir: {nearest} may not be written to. Give another folder, or change its rights."
        )


def token_to_environment(settings: Any) -> None:
    """Move ``hub_token`` to where huggingface_hub looks for it, the variable HF_TOKEN, and out of
    the settings: transformers pickles them into training_args.bin with the token in them, and
    trackers get them."""
    if vars(settings).get("hub_token"):
        os.environ["HF_TOKEN"] = settings.hub_token
        settings.hub_token = None
