"""Values of settings in the kinds that these have, from files, the command line and Python."""

import difflib
import math
import reprlib
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from itertools import zip_longest
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch

from goose_lora.errors import UserError
from goose_lora.redaction import is_secret

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

short = reprlib.Repr()  # aliases make a few lines of YAML a value without end
short.maxlevel, short.maxlist, short.maxdict, short.maxstring = 2, 4, 4, 60


def plain(value: object) -> object:
    """Return what Python users have for a number, text or list as that itself.

    Scalars and arrays of numpy and torch become numbers and lists, paths and dtypes become text.
    Anything else is returned as it is.
    """
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return value.tolist()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if type(value) in (list, tuple):
        return [plain(item) for item in cast(Sequence[object], value)]
    if type(value) is dict:
        return {plain(name): plain(item) for name, item in value.items()}
    return value


def settle_types(settings: "DataclassInstance") -> None:
    """Make the values of a dataclass ``plain``, and compare them with the types of its fields.

    It stands first in ``__post_init__``: the parser of the command line has then read its text.

    Raises:
        UserError: as ``check_types`` does, and text where a number belongs.
    """
    # A frozen dataclass is settled too
    values = {field.name: plain(vars(settings)[field.name]) for field in fields(settings)}
    for name, value in values.items():
        object.__setattr__(settings, name, value)
    if values.get("debug", "") is None:  # what argparse makes of transformers' default, an empty text
        del values["debug"]
    check_types(values, [type(settings)], where="", from_python=True)


def require_kind(name: str, value: object, kind: type | types.UnionType, way_out: str) -> None:
    """Raise UserError unless what a Python user gave as ``name`` is of this kind."""
    if not isinstance(value, kind):
        kinds = " or ".join(str(one.__name__) for one in get_args(kind) or cast(tuple[type], (kind,)))
        raise UserError(f"{name} is {kind_of(value)}, not of the kind {kinds}. {way_out}")


def kind_of(value: object) -> str:
    """Return what a value is, in the words of an error."""
    if value is None or isinstance(value, (str, int, float)):
        return short.repr(value)
    return f"of the kind {type(value).__name__}"


def check_types(
    config: Mapping[str, Any], dataclasses: Sequence[type], where: str, *, from_python: bool = False
) -> None:
    """Compare the values of a YAML file, or of Python, with the types of the settings.

    Text where a number belongs is left to argparse, which reads it as one: YAML takes 1e-5 for
    text. Nobody reads what is given ``from_python``.

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
    # In the order in which a reader would mend them: the kind first, then the value
    for name, value in config.items():
        if name in hints and _is_no_number(value, hints[name]):
            raise UserError(f"{where}{name}={value}: must be a finite number.")
        if name in hints and not _fits(value, hints[name], reads=not from_python):
            # As YAML writes it, and with what helps most often: 0123 for text
            found = "null" if value is None else short.repr(value)
            if is_secret(name):
                found = "what stands there"
            quotes = ""
            if "text" in _words(hints[name]) and isinstance(value, (int, float)):
                quotes = " Put it in quotes."
            raise UserError(f"{where}{name}: {found} is not {_words(hints[name])}.{quotes}")
        # Of enumerations of transformers, which the parser lets transformers check
        known = _values_of_enum(hints.get(name)) if from_python else []
        if known and isinstance(value, str) and value not in known:
            near = difflib.get_close_matches(value, known, n=8, cutoff=0.4) or known[:8]
            raise UserError(
                f"{where}{name}: {short.repr(value)} is none of the values of its setting. Near it:"
                f" {', '.join(near)}."
            )
        # argparse compares words of the command line with them, and no default from a file
        if value is not None and choices.get(name) and value not in choices[name]:
            known = ", ".join(map(str, choices[name]))
            raise UserError(f"{where}{name}: {short.repr(value)} is none of {known}.")


def check_words(words: Sequence[str], dataclasses: Sequence[type]) -> None:
    """Raise UserError for a setting of the command line that would be read as something else.

    That is a number that is NaN or infinite, since some become whole numbers as soon as they are
    read, and a list that stands twice, of which argparse takes the last alone.
    """
    hints: dict[str, object] = {}
    for dataclass in dataclasses:
        hints |= get_type_hints(dataclass)
    # Each option with the word behind it, which is its value unless it has one behind =
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


def _values_of_enum(hint: object) -> list[str]:
    """Return the values of a setting of an enumeration, or text for one; nothing for others."""
    parts = [part for part in get_args(hint) if isinstance(part, type) and issubclass(part, Enum)]
    return [str(member.value) for part in parts for member in part]


def _fits(value: object, hint: object, *, reads: bool) -> bool:
    """Return whether a value is one of the type ``hint``, or text that may become one.

    Args:
        reads: whether somebody reads text where a number belongs.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part, reads=reads) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is list:
        return _fits_list(value, parts[0], reads=reads)
    if hint in (int, float, bool):
        return _fits_number(value, hint, reads=reads)
    if hint in (str, type(None)):
        return isinstance(value, (str if hint is str else type(None)))
    if hint is dict or origin is dict:
        # JSON text too, and what transformers has made of it. A number would be opened as a file:
        # 1 is standard output
        return isinstance(value, (Mapping, str)) or is_dataclass(value)
    return not isinstance(value, (list, tuple, Mapping))  # enums: their owner says what it takes


def _fits_list(value: object, part: object, *, reads: bool) -> bool:
    """Return whether a value is a list of ``part``, or a single one of them.

    A mapping stands for a list of texts FROM=TO.
    """
    if isinstance(value, (list, tuple)):
        # Numbers in text stay refused inside lists, which argparse does not read
        return all(_fits(item, part, reads=False) for item in value)
    if value is None:
        return False
    return (isinstance(value, Mapping) and part is str) or _fits(value, part, reads=reads)


def _fits_number(value: object, hint: object, *, reads: bool) -> bool:
    """Return whether a value is a whole number, a number, or true or false; a bool is no number."""
    if isinstance(value, str):
        return reads
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
