"""Settings from YAML and command line to dataclasses, checked."""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from goose_lora.cli.process import keep_freed_memory, quiet_libraries
from goose_lora.errors import UserError
from goose_lora.ppo.trl_names import FROM_TRL

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def parse(*types: type, args: Sequence[str] | None = None) -> Any:
    """Return one instance of each dataclass in ``types``; a single one alone.

    Settings are read from ``--config FILE.yaml`` and ``--field value``; the command line wins.

    Raises:
        UserError: an unknown setting (with the nearest known one), a value of the wrong type, or a
            configuration file that is not there.
    """
    from trl import TrlParser

    quiet_libraries()
    keep_freed_memory()
    args = list(sys.argv[1:] if args is None else args)

    # The file first: its errors name the file
    if "--config" in args:
        index = args.index("--config") + 1
        if index == len(args):
            raise UserError("--config needs a file: --config recipes/configs/demo_cpu/ppo.yaml")
        _check_keys(args[index], types)

    # argparse would print its usage of some 150 options and leave
    parser: Any = TrlParser(types)  # type: ignore[arg-type]
    parser.error = raise_user_error
    *instances, unknown = parse_with(parser, args)
    # A word that no dataclass knows is a typo; it is never passed over
    if unknown:
        _unknown(next((word for word in unknown if word.startswith("--")), unknown[0]), types)
    for settings in instances:
        check_settings(settings)
    return instances[0] if len(instances) == 1 else tuple(instances)


def parse_with(parser: Any, args: Sequence[str]) -> tuple[Any, ...]:
    """Let TRL's parser read the words; return the dataclasses, and words that are no settings.

    Raises:
        UserError: a value of the wrong type, or one that a dataclass refuses.
    """
    try:
        return parser.parse_args_and_config(args, return_remaining_strings=True, fail_with_unknown_args=False)
    except (ValueError, OSError, ImportError, argparse.ArgumentError) as error:
        raise UserError(_nearest_choice(str(error))) from error


def check_settings(settings: "DataclassInstance") -> None:
    """Check what holds of all settings, and take the Hub's token out of them.

    Raises:
        UserError: a number that is not finite or out of its range, or a folder for results that
            cannot be made.
    """
    from transformers import TrainingArguments

    from goose_lora.training.validation import (
        check_finite,
        check_training,
        require_output_folder,
        token_to_environment,
    )

    # Dataclasses check their own settings; these hold of all
    check_finite(settings)
    if isinstance(settings, TrainingArguments):
        check_training(settings)
        token_to_environment(settings)
    if vars(settings).get("output_dir") is not None:
        require_output_folder(vars(settings)["output_dir"])


def read_config(path: str) -> dict[Any, Any]:
    """Return the settings in a YAML file.

    Raises:
        UserError: no such file, not YAML, or not settings.
    """
    import yaml

    if not Path(path).is_file():
        raise UserError(f"--config {path}: no such file. The shipped ones are in recipes/configs/.")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (
        yaml.YAMLError,
        OSError,
        ValueError,
        LookupError,
        ArithmeticError,
        RecursionError,
        TypeError,
        AttributeError,
    ) as error:
        # All but the first from PyYAML's constructors, of a date such as 2020-99-99.
        raise UserError(
            f"{path}: not a YAML file that can be read: {' '.join(str(error).split())}. Mend it there."
        ) from error
    if not isinstance(config, dict):
        raise UserError(
            f"{path}: expected lines of the form 'setting: value', found {type(config).__name__}."
        )
    return config


def _check_keys(path: str, types: Sequence[type]) -> None:
    from goose_lora.training.validation import check_types

    config = read_config(path)
    # Names, then the environment, then types: the order in which a reader would mend them
    known = {f.name for t in types for f in fields(t) if f.init} | {"env"}
    for key in config:
        if key not in known:
            _unknown(f"--{key}", types, where=f"{path}: ")
    environment = config.get("env") or {}
    if not isinstance(environment, dict) or not all(
        isinstance(name, str) and name and not {"=", "\0"} & set(name) for name in environment
    ):
        raise UserError(
            f"{path}: env: expected names of environment variables with a value each: env:"
            " {CUDA_VISIBLE_DEVICES: 0}."
        )
    check_types(config, types, where=f"{path}: ")


def _unknown(option: str, types: Sequence[type], where: str = "") -> None:
    name = option.lstrip("-").replace("-", "_")
    known = [f.name for t in types for f in fields(t) if f.init]
    # TRL's own names are answered with ours, others with the nearest
    near = difflib.get_close_matches(name, known, n=1)
    if name in FROM_TRL and "num_ppo_epochs" in known:
        raise UserError(f"{where}unknown setting {name!r}. It is TRL's; here it is {FROM_TRL[name]}.")
    hint = f"Did you mean {near[0]}?" if near else "--help lists the settings."
    raise UserError(f"{where}unknown setting {name!r}. {hint}")


def _nearest_choice(message: str) -> str:
    """Return transformers' answer to an unknown choice with the nearest ones alone.

    It names all that there are, some fifty of optimizers.
    """
    # The form of transformers' message; another one is passed on as it is
    found = re.search(r"^(\S+) is not a valid \w+, please select one of (\[.*\])", message)
    if found is None:
        return message
    choices = [choice.strip("' ") for choice in found[2].strip("[]").split(",")]
    near = difflib.get_close_matches(found[1], choices, n=8, cutoff=0.4) or choices[:8]
    return f"{found[1]!r} is none of the values of its setting. Near it: {', '.join(near)}."


def raise_user_error(message: str) -> NoReturn:
    """Raise UserError, in place of argparse's usage of some 150 options and its exit."""
    raise UserError(message)
