"""Checks of settings, our own and those of transformers and TRL: types, ranges, folders."""

import math
import os
import reprlib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from goose_lora.errors import UserError
from goose_lora.redaction import SECRET_VALUES, is_secret, remember

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_KINDS: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    dict: "names with a value each",
}
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

_short = reprlib.Repr()  # aliases make a few lines of YAML a value without end
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxstring = 2, 4, 4, 60


def check_types(config: Mapping[str, Any], dataclasses: Sequence[type], where: str) -> None:
    """Compare the values of a YAML file with the types of the settings.

    Text where a number belongs is left to argparse, which reads it as one: YAML takes 1e-5 for
    text.

    Raises:
        UserError: a value of another type: a list for a number, a fraction for a count, null where
            something must be.
    """
    # The dataclasses' own annotations say what a value may be
    hints: dict[str, object] = {}
    choices: dict[str, list[object]] = {}
    for dataclass in dataclasses:
        hints |= get_type_hints(dataclass)
        for field in fields(dataclass):
            if field.name != "loss_type":  # of which there are fewer here
                choices[field.name] = list(field.metadata.get("choices") or [])
    for name, value in config.items():
        if name in hints and _is_no_number(value, hints[name]):
            raise UserError(f"{where}{name}={value}: must be a finite number.")
        if name in hints and not _fits(value, hints[name]):
            # As YAML writes it, and with what helps most often: 0123 for text
            found = "null" if value is None else _short.repr(value)
            if is_secret(name):
                found = "what stands there"
            quotes = ""
            if "text" in _words(hints[name]) and isinstance(value, (int, float)):
                quotes = " Put it in quotes."
            raise UserError(f"{where}{name}: {found} is not {_words(hints[name])}.{quotes}")
        # argparse compares words of the command line with them, and no default from a file
        if value is not None and choices.get(name) and value not in choices[name]:
            known = ", ".join(map(str, choices[name]))
            raise UserError(f"{where}{name}: {_short.repr(value)} is none of {known}.")


def check_words(words: Sequence[str], dataclasses: Sequence[type]) -> None:
    """Raise UserError for a setting of the command line that would be read as something else.

    That is a number that is NaN or infinite, since some become whole numbers as soon as they are
    read, and a list that stands twice, of which argparse takes the last alone.
    """
    hints: dict[str, object] = {}
    for dataclass in dataclasses:
        hints |= get_type_hints(dataclass)
    seen: set[str] = set()
    for option, after in zip_longest(words, words[1:], fillvalue=""):
        name, equals, value = option.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        value = value if equals else after
        if option.startswith("--") and name in hints and _is_no_number(value, hints[name]):
            raise UserError(f"{name}={value}: must be a finite number.")
        if option.startswith("--") and _takes_several(hints.get(name)):
            if name in seen:
                raise UserError(f"--{name} stands twice. Give all of it at once: --{name} ONE OTHER.")
            seen.add(name)


def _takes_several(hint: object) -> bool:
    """Return whether a setting takes a list."""
    return any(get_origin(part) is list for part in (hint, *get_args(hint)))


def _is_no_number(value: object, hint: object) -> bool:
    """Return whether a value of a setting that may be a number is NaN, infinite, or text for it."""
    if str in (hint, *get_args(hint)) or not {int, float} & {hint, *get_args(hint)}:
        return False
    if not isinstance(value, (str, float)):
        return False
    try:
        return not math.isfinite(float(value))
    except ValueError:
        return False


def _fits(value: object, hint: object) -> bool:
    """Return whether a value of YAML is one of the type ``hint``, or text that may become one."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is list:
        return _fits_list(value, parts[0])
    if hint in (int, float, bool):
        return _fits_number(value, hint)
    if hint in (str, type(None)):
        return isinstance(value, (str if hint is str else type(None)))
    if hint is dict or origin is dict:
        # JSON text too. A number would be opened as a file: 1 is standard output
        return isinstance(value, (Mapping, str))
    return not isinstance(value, (list, tuple, Mapping))  # enums: their owner says what it takes


def _fits_list(value: object, part: object) -> bool:
    """Return whether a value is a list of ``part``, or a single one of them.

    A mapping stands for a list of texts FROM=TO.
    """
    if isinstance(value, (list, tuple)):
        # Numbers in text stay refused inside lists, which argparse does not read
        numbers_in_text = part is not str and any(isinstance(item, str) for item in value)
        return not numbers_in_text and all(_fits(item, part) for item in value)
    if value is None:
        return False
    return (isinstance(value, Mapping) and part is str) or _fits(value, part)


def _fits_number(value: object, hint: object) -> bool:
    """Return whether a value is a whole number, a number, or true or false; a bool is no number."""
    if isinstance(value, str):
        return True
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    return isinstance(value, int) or (hint is float and isinstance(value, float))


def _words(hint: object) -> str:
    """Return a type in the words of an error."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin is dict:
        return _KINDS[dict]
    if origin is list:
        plural = [_words(part).removeprefix("a ") + "s" * (part is not str) for part in parts]
        return f"a list of {', '.join(plural)}"
    return _KINDS.get(hint, str(getattr(hint, "__name__", hint)))


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
                raise UserError(f"{field.name}={_short.repr(number)}: is too large for anything.")
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
            raise UserError(f"{name}={_short.repr(value)}: no file system takes so long a name. Shorten it.")


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
