"""Settings for people: what ``--help`` shows, and the reference in docs/settings.md."""

import dataclasses
import enum
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from goose_lora.training.signals import STARTED_BY

# Settings of transformers and TRL that most runs set. The others are in --help-all.
COMMON = (
    "output_dir",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "max_length",
    "packing",
    "assistant_only_loss",
    "chat_template_path",
    "eos_token",
    "center_rewards_coefficient",
    "bf16",
    "seed",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "load_best_model_at_end",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "push_to_hub",
    "hub_model_id",
)
LIBRARIES = "Settings of transformers and TRL"  # the heading of theirs
_WIDTH, _MARGIN, _SHORT = 100, 34, 120
HELP, HELP_ALL = ("-h", "--help"), "--help-all"


class Setting(NamedTuple):
    """A setting: its name, the values that it takes, its default, and what it does."""

    name: str
    values: str
    default: str
    text: str


def groups(settings: Sequence[type], *, everything: bool = False) -> dict[str, list[Setting]]:
    """Return the settings of dataclasses by the heading under which they stand.

    Args:
        everything: those of transformers and TRL that few runs set, too.
    """
    found: dict[str, list[Setting]] = {}
    seen: set[str] = set()
    for kind in settings:
        for owner, setting in _of(kind, everything):
            # PPO takes some settings of its parents away, and some of two dataclasses are one
            if setting.name not in seen:
                seen.add(setting.name)
                found.setdefault(owner, []).append(setting)
    # The length of a PPO run is its number of rollouts
    if "num_rollouts" in seen and not everything:
        own = found.get(LIBRARIES, [])
        found[LIBRARIES] = [one for one in own if one.name not in ("num_train_epochs", "max_steps")]
    return {title: found[title] for title in sorted(found, key=LIBRARIES.__eq__)}


def _of(kind: type, everything: bool) -> Iterator[tuple[str, Setting]]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        # The class that has written it last is whose it is: heirs have the same object
        heirs = [
            base
            for base in kind.__mro__
            if vars(base).get("__dataclass_fields__", {}).get(field.name) is field
        ]
        owner = heirs[-1]
        is_own = owner.__module__.split(".")[0] not in ("transformers", "trl")
        if not is_own and not everything and field.name not in COMMON:
            continue
        title = _title(owner) if is_own else LIBRARIES
        yield (
            title,
            Setting(field.name, _values(hints[field.name]), _default(field), _text(field, whole=is_own)),
        )


def _title(owner: type) -> str:
    """Return the first line of a dataclass's docstring, without its full stop."""
    return (owner.__doc__ or owner.__name__).strip().splitlines()[0].rstrip(".")


def _values(hint: object) -> str:
    """Return what a type takes, as it is written on the command line."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(_values(one) for one in inner if one is not type(None)))
    if origin in (list, tuple):
        return f"{_values(inner[0])} ..."
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " | ".join(str(one.value) for one in hint)
    names = {bool: "true | false", str: "text", int: "whole number", float: "number", dict: "JSON"}
    return names.get(origin or hint, "JSON")


def _default(field: "dataclasses.Field[object]") -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    if field.default is dataclasses.MISSING:
        return "required"
    value = field.default.value if isinstance(field.default, enum.Enum) else field.default
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text(field: "dataclasses.Field[object]", *, whole: bool) -> str:
    """Return a field's help, or its first sentence where it is long and need not be ``whole``."""
    text = " ".join(str(field.metadata.get("help", "")).split()).replace("%%", "%")
    return text if whole or len(text) <= _SHORT else re.split(r"(?<=[.!?]) (?=[A-Z`'])", text)[0]


def help_text(settings: Sequence[type], *, everything: bool, command: str, page: str | None) -> str:
    """Return what ``--help`` shows.

    Args:
        everything: for ``--help-all``.
        command: as the user calls it.
        page: docstring of the recipe, with an example.
    """
    lines = [(page or "").strip()] if page else []
    for title, members in groups(settings, everything=everything).items():
        lines += ["", f"{title}:"]
        for setting in members:
            lines += _entry(setting)
    if not everything:
        lines += ["", f"{command} {HELP_ALL} lists all settings of transformers and TRL too."]
    return "\n".join(lines).strip()


def _entry(setting: Setting) -> list[str]:
    """Return the lines of one setting: its name, and beside it what it does."""
    about = f"{setting.text} " if setting.text else ""
    values = "" if setting.values in ("text", "whole number", "number") else f"{setting.values}; "
    beside = textwrap.wrap(f"{about}[{values}{setting.default}]", _WIDTH - _MARGIN, break_on_hyphens=False)
    name = f"  --{setting.name}"
    if len(name) < _MARGIN - 1:
        return [f"{name:{_MARGIN}}{beside[0]}", *(" " * _MARGIN + line for line in beside[1:])]
    return [name, *(" " * _MARGIN + line for line in beside)]


def asks_for_help(words: Sequence[str]) -> bool:
    """Return whether one of the words asks for help."""
    return any(word in (*HELP, HELP_ALL) for word in words)


def show_help(settings: Sequence[type], words: Sequence[str]) -> None:
    """Print the settings of a recipe, and end the process."""
    main = sys.modules["__main__"]
    command = os.environ.get(STARTED_BY) or f"python {sys.argv[0]}"
    sys.stdout.write(
        help_text(settings, everything=HELP_ALL in words, command=command, page=main.__doc__) + "\n"
    )
    raise SystemExit(0)


def reference(recipes: dict[str, Sequence[type]]) -> str:
    """Return docs/settings.md: all settings of the project's own, a table a dataclass.

    Args:
        recipes: the dataclasses of each recipe, by its name.
    """
    tables: dict[str, tuple[list[str], list[Setting]]] = {}
    for recipe, settings in recipes.items():
        for title, members in groups(settings).items():
            if title != LIBRARIES:
                tables.setdefault(title, ([], members))[0].append(recipe)
    page = "https://huggingface.co/docs/transformers/main_classes/trainer"
    lines = [
        "# Settings",
        "",
        "Settings of the project's own, with their defaults. They stand in the file of `--config`, or on the"
        " command line behind two dashes, which wins. Recipes take those of"
        f" [transformers]({page}#transformers.TrainingArguments)"
        " and [TRL](https://huggingface.co/docs/trl) too: `--help-all` lists them.",
    ]
    for title, (users, members) in tables.items():
        lines += ["", f"## {title}", "", f"For {', '.join(users)}.", ""]
        lines += ["| setting | values | default | what it does |", "|---|---|---|---|"]
        for name, values, default, text in members:
            cells = [f"`{name}`", values.replace("|", "\\|"), f"`{default}`", text.replace("|", "\\|")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
