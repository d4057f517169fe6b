"""Files of settings, read as their author meant them.

PyYAML reads YAML 1.1, in which 010 is 8, 1:30 is 90, no is false, 1e-5 is text, and the second of
two equal keys wins without a word. Here a number is a decimal, text is text, and a key stands once,
as in YAML 1.2.
"""

import math
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from goose_lora.errors import UserError
from goose_lora.redaction import is_secret, remember_named

_INT = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_BOOL = re.compile("true|True|TRUE|false|False|FALSE")
_NULL = re.compile("~|null|Null|NULL|")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the plain values of YAML 1.2, in which each key stands once."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            seen: dict[Any, int] = {}
            for key_node, _ in node.value:
                key, line = key_node.value, key_node.start_mark.line + 1
                if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                    if key in seen:
                        raise UserError(f"{key!r} stands in lines {seen[key]} and {line}. Keep one of them.")
                    seen[key] = line
        return super().construct_mapping(node, deep)


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    base = 0 if text[:2] in ("0x", "0o") else 10  # 010 is ten, which int(text, 0) refuses
    return int(text, base)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).lower()
    if text.endswith(".nan"):
        return math.nan
    return float(text.replace(".inf", "inf"))


for _kind, _pattern, _firsts in (
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("bool", _BOOL, "tTfF"),
    ("null", _NULL, ["~", "n", "N", ""]),
    ("merge", re.compile("<<"), "<"),
):
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _whole, list(_firsts))
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def require_no_folder(path: str) -> None:
    """Raise UserError where ``path`` is a folder, and name the YAML files in it."""
    if not Path(path).is_dir():
        return
    found = sorted(each.name for each in Path(path).iterdir() if each.suffix in (".yaml", ".yml"))
    inside = f"Give one of the files in it: {', '.join(found)}" if found else "It has no .yaml file"
    raise UserError(f"--config {path}: a folder, not a file. {inside}.")


def read_config(path: str) -> dict[Any, Any]:
    """Return the settings in a YAML file.

    Raises:
        UserError: no such file, not YAML, not settings, or a key that stands twice.
    """
    require_no_folder(path)
    if not Path(path).is_file():
        raise UserError(f"--config {path}: no such file. The shipped ones are in recipes/configs/.")
    try:
        text = Path(path).read_text(encoding="utf-8")
        remember_named(text)
        config = _Loader(text).get_single_data()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
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
        # All but the first from PyYAML's constructors, of a date such as 2020-99-99. The cause is
        # left out: its traceback shows the line of the file
        raise UserError(f"{path}: not a YAML file that can be read: {_what(error)}. Mend it there.") from None
    if not isinstance(config, dict):
        raise UserError(
            f"{path}: expected lines of the form 'setting: value', found {type(config).__name__}."
        )
    return config


def _what(error: Exception) -> str:
    """Return what is wrong with a file and where.

    The file's own line is left out, since it may hold a secret.
    """
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    words = ", ".join(filter(None, [error.context, error.problem]))
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return words
    # The name of an alias or tag, which the problem quotes, may be a secret with a * or ! before it
    line = str(getattr(mark, "buffer", "") or "").split("\n")[mark.line : mark.line + 1]
    if line and is_secret(line[0].partition(":")[0].strip(" -\"'")):
        words = "a value that cannot be read"
    return f"{words}, line {mark.line + 1}, column {mark.column + 1}"
