"""Settings from YAML and command line to dataclasses, checked."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

from goose_lora.cli import settings_help
from goose_lora.cli.process import keep_freed_memory, quiet_libraries
from goose_lora.cli.yaml_settings import read_config
from goose_lora.errors import UserError
from goose_lora.ownership import refuse_inputs_inside
from goose_lora.ppo.trl_names import FROM_TRL
from goose_lora.redaction import is_secret, remember
from goose_lora.training.launch import mixed_precision_of_launcher, require_precision

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# What argparse, transformers and TRL raise for a setting's value.
_REFUSALS = (ValueError, TypeError, OSError, ImportError, ArithmeticError, argparse.ArgumentError)


def parse(*types: type, args: Sequence[str] | None = None) -> Any:
    """Return one instance of each dataclass in ``types``; a single one alone.

    Settings are read from ``--config FILE.yaml`` and ``--field value``; the command line wins.

    Raises:
        UserError: an unknown setting (with the nearest known one), a value of the wrong type, or a
            configuration file that is not there.
    """
    from goose_lora.kinds import check_words

    quiet_libraries()
    keep_freed_memory()
    launched_with = mixed_precision_of_launcher()  # TrainingArguments writes over it
    given = sys.argv[1:] if args is None else args
    if settings_help.asks_for_help(given):
        settings_help.show_help(types, given)
    path, words = split_config(given)
    for word in words:
        if word.startswith("--"):
            _check_option(word, types)

    # The file first: its errors name the file
    config = {}
    if path is not None:
        config = read_config(path)
        _check_keys(config, types, path)
    check_words(words, types)
    *instances, unknown = parse_with(settings_parser(types), words, config)
    # A word that no dataclass knows is a typo; it is never passed over
    if unknown:
        _spare_word(unknown[0], words, types)
    for settings in instances:
        check_settings(settings)
        require_precision(settings, launched_with)
    # The file may not lie where the run writes
    output_dir = next((vars(each)["output_dir"] for each in instances if "output_dir" in vars(each)), None)
    if path is not None and output_dir:
        refuse_inputs_inside(output_dir, {"--config": [path]})
    return instances[0] if len(instances) == 1 else tuple(instances)


def split_config(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the file of ``--config FILE`` or ``--config=FILE``, if there is one, and other words.

    Raises:
        UserError: ``--config`` has no file, or stands twice.
    """
    path, words = None, []
    rest = iter(args)
    for word in rest:
        option, equals, value = word.partition("=")
        if option != "--config":
            words.append(word)
            continue
        value = value if equals else next(rest, "")
        if not value or value.startswith("--"):
            raise UserError("--config needs a file: --config recipes/configs/demo_cpu/ppo.yaml")
        if path is not None:
            raise UserError(f"--config stands twice, with {path} and {value}. Give one file.")
        path = value
    return path, words


def settings_parser(types: Sequence[type]) -> Any:
    """Return a parser of settings whose errors are UserErrors, and which takes whole names alone.

    argparse would print its usage of some 150 options and leave, and take any beginning of a name.
    """
    from trl import TrlParser

    parser: Any = TrlParser(types, allow_abbrev=False)  # type: ignore[arg-type]
    parser.error = raise_user_error
    read_negative_numbers(parser)
    return parser


def read_negative_numbers(parser: argparse.ArgumentParser) -> None:
    """Let a parser take -1e-4 for a number, as it does -0.1, and not for an option."""
    # argparse has no public place for it, and its own pattern has no exponents
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\Z|-(inf|nan)\Z")


def parse_with(parser: Any, words: Sequence[str], config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Let TRL's parser read the words over ``config``; return dataclasses and unknown words.

    The environment that ``config`` sets is set first.

    Raises:
        UserError: a value of the wrong type, or one that a dataclass refuses.
    """
    for name, value in (config.get("env") or {}).items():
        if is_secret(name):
            remember(str(value))
        os.environ[name] = str(value)
    settings = {name: config[name] for name in config if name != "env"}
    unknown = parser.set_defaults_with_config(**settings)
    try:
        *instances, more = parser.parse_args_into_dataclasses(args=list(words), return_remaining_strings=True)
    except _REFUSALS as error:
        said = _nearest_choice(str(error))
        if "assign use_cpu" in said and "Ampere" not in said:  # transformers' words where no GPU is
            said = (
                "bf16: torch finds no GPU. Say use_cpu: true (--use_cpu true) for the CPU, in bfloat16"
                " too; `goose-lora env` shows what torch finds."
            )
        culprit = ""
        if not any(field.name in said for kind in parser.dataclass_types for field in fields(kind)):
            culprit = _culprit(parser.dataclass_types, words, settings)
        raise UserError(f"{culprit}{said}") from error
    return (*instances, [*unknown, *more])


def _culprit(types: Sequence[type], words: Sequence[str], settings: Mapping[str, Any]) -> str:
    """Return the setting without which all others are taken, for an error that names none.

    It is found by leaving out one after the other: a message alone would make it a guess.
    """
    tries: list[tuple[str, list[str], dict[str, Any]]] = []
    for index, word in enumerate(words):
        if word.startswith("--"):
            end = index + 1
            while end < len(words) and not words[end].startswith("--"):
                end += 1
            name = word.partition("=")[0].removeprefix("--").replace("-", "_")
            tries.append((name, [*words[:index], *words[end:]], dict(settings)))
    for name in settings:
        tries.append((name, list(words), {key: settings[key] for key in settings if key != name}))
    for name, fewer_words, fewer in tries:
        parser = settings_parser(types)
        parser.set_defaults_with_config(**fewer)
        try:
            parser.parse_args_into_dataclasses(args=fewer_words, return_remaining_strings=True)
        except _REFUSALS:
            continue
        return f"{name}: "
    return ""


def check_settings(settings: "DataclassInstance") -> None:
    """Check what holds of all settings, and take the Hub's token out of them.

    Raises:
        UserError: a number that is not finite or out of its range, or a folder for results that
            cannot be made.
    """
    from transformers import TrainingArguments

    from goose_lora.models.arguments import ModelArguments, check_revision
    from goose_lora.training.late_settings import check_late_settings
    from goose_lora.training.unread_settings import check_unread_settings
    from goose_lora.training.validation import (
        check_finite,
        check_no_secrets,
        check_not_empty,
        check_training,
        require_output_folder,
        token_to_environment,
    )

    # Dataclasses check their own settings; these hold of all
    check_finite(settings)
    check_no_secrets(settings)
    check_not_empty(settings)
    if isinstance(settings, ModelArguments):
        check_revision(settings)
    if isinstance(settings, TrainingArguments):
        check_training(settings)
        check_late_settings(settings)
        check_unread_settings(settings)
        token_to_environment(settings)
    if vars(settings).get("output_dir") is not None:
        require_output_folder(vars(settings)["output_dir"])


def _check_option(word: str, types: Sequence[type]) -> None:
    """Raise UserError unless an option of the command line is the whole name of a setting."""
    known = {f.name for t in types for f in fields(t) if f.init} | {"help"}
    name = word.partition("=")[0].removeprefix("--").replace("-", "_")
    # transformers adds --no_x for what is true by default
    if name not in known and name.removeprefix("no_") not in known:
        _unknown(word, types)


def _spare_word(word: str, words: Sequence[str], types: Sequence[type]) -> NoReturn:
    """Raise UserError for a word that argparse has left over: one behind another one's value."""
    before = words[: words.index(word)] if word in words else []
    option = next((other for other in reversed(before) if other.startswith("--")), None)
    if word.startswith("--"):
        _unknown(word, types)
    if option is None:
        name = re.split("[=:\\s]", word.lstrip("-"))[0]
        raise UserError(f"{name!r} belongs to no setting, which begins with two dashes: --setting value.")
    shown = "another word" if is_secret(option) else repr(word)
    raise UserError(f"{option}: {shown} behind its value belongs to no setting. Put text in quotes.")


def _check_keys(config: Mapping[Any, Any], types: Sequence[type], path: str) -> None:
    from goose_lora.kinds import check_types

    # Names, then the environment, then types: the order in which a reader would mend them
    check_names(config, types, path)
    environment = config.get("env") or {}
    if not isinstance(environment, dict) or not all(
        isinstance(name, str)
        and name
        and not {"=", "\0"} & set(name)
        and isinstance(value, (str, int, float))
        and "\0" not in str(value)
        for name, value in environment.items()
    ):
        raise UserError(
            f"{path}: env: expected names of environment variables with a value each: env:"
            " {CUDA_VISIBLE_DEVICES: 0}."
        )
    check_types(config, types, where=f"{path}: ")


def check_names(config: Mapping[Any, Any], types: Sequence[type], path: str) -> None:
    """Raise UserError for a name in a file of settings that no dataclass has."""
    known = {f.name for t in types for f in fields(t) if f.init} | {"env"}
    for key in config:
        if key not in known:
            _unknown(f"--{key}", types, where=f"{path}: ")


def _unknown(option: str, types: Sequence[type], where: str = "") -> NoReturn:
    # What stands behind the name may be a secret
    name = re.split("[=:\\s]", option.lstrip("-"))[0].replace("-", "_")
    known = [f.name for t in types for f in fields(t) if f.init]
    # TRL's own names are answered with ours, others with the nearest
    near = difflib.get_close_matches(name, known, n=1)
    if name in FROM_TRL and "num_ppo_epochs" in known:
        raise UserError(f"{where}unknown setting {name!r}. It is TRL's; here it is {FROM_TRL[name]}.")
    begins = [one for one in known if one.startswith(name)]
    hint = "--help lists the settings."
    if near or (name and begins):
        hint = f"Did you mean {(near or begins)[0]}?"
    raise UserError(f"{where}unknown setting {name!r}. {hint}")


def _nearest_choice(message: str) -> str:
    """Return transformers' answer to an unknown choice with the nearest ones alone.

    It names all that there are, some fifty of optimizers.
    """
    # The form of transformers' message; another one is passed on as it is
    found = re.search(r"^(.*) is not a valid \w+, please select one of (\[.*\])", message, re.DOTALL)
    if found is None:
        return message
    choices = [choice.strip("' ") for choice in found[2].strip("[]").split(",")]
    near = difflib.get_close_matches(found[1], choices, n=8, cutoff=0.4) or choices[:8]
    return f"{found[1]!r} is none of the values of its setting. Near it: {', '.join(near)}."


def raise_user_error(message: str) -> NoReturn:
    """Raise UserError, in place of argparse's usage of some 150 options and its exit."""
    raise UserError(message)
