"""Ready rewards by name, ``trl:NAME(...)`` and ``check:NAME(...)``, with literal arguments."""

import ast
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from goose_lora.deadline import kept_alarm
from goose_lora.errors import UserError
from goose_lora.rewards import checks

READY = ("trl:", "check:")
_CHECKS: dict[str, Callable[..., list[float]]] = {
    "matches_regex": checks.matches_regex,
    "json_schema": checks.json_schema,
    "length_within": checks.length_within,
}
# What a run gives by name, which no argument may stand for
_GIVEN = ("prompts", "completions", "completion_ids", "log_extra", "trainer_state", "kwargs", "columns")


class ReadyReward:
    """A ready reward, called like any reward function with text replies.

    ``trl:NAME`` is a function of the installed ``trl.rewards``. It gets each reply as one message,
    as TRL's trainers give it in a chat. Arguments go to the maker (``get_NAME``) where it has one.
    ``check:NAME`` is one of ``goose_lora.rewards.checks``: an argument is a column that has the
    same value in every row.

    Raises:
        UserError: an unknown name or argument, one that is missing, an argument that is no literal,
            or a package that is not installed.
    """

    def __init__(self, spec: str):
        self.spec = spec
        kind, _, call = spec.partition(":")
        name, arguments = _parsed(spec, call)
        make = _trl_reward if kind == "trl" else _check
        self.function, self.bound, self.name = make(spec, name, arguments)
        self.messages = kind == "trl"
        self.__name__ = str(getattr(self.function, "__name__", name))
        # A run checks by it, before anything loads, that its columns are there
        signature = inspect.signature(self.function)
        hidden = {*self.bound, "log_extra"}
        self.__signature__ = signature.replace(
            parameters=[value for key, value in signature.parameters.items() if key not in hidden]
        )

    def __call__(self, /, **replies: Any) -> list[Any]:
        # Two values of one name: none is passed over
        twice = sorted({*self.bound, "log_extra"} & replies.keys())
        if twice:
            raise UserError(
                f"{self.spec}: {', '.join(twice)} is both an argument and a column of the rows. Drop the"
                " argument, or rename the column by column_mapping."
            )
        bound = self.bound
        if self.messages:
            replies["completions"] = [
                [{"role": "assistant", "content": text}] for text in replies["completions"]
            ]
        else:
            bound = {key: [value] * len(replies["completions"]) for key, value in bound.items()}
        # math_verify has alarms of its own, which would end reward_timeout's
        with kept_alarm():
            return self.function(**replies, **bound)


def _parsed(spec: str, call: str) -> tuple[str, dict[str, object]]:
    """Return the name and the arguments of ``NAME`` or ``NAME(key=literal, ...)``."""
    refusal = UserError(
        f"{spec!r}: write NAME or NAME(argument=value, ...) with numbers, texts, lists or mappings."
    )
    try:
        tree = ast.parse(call.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, {}
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.args:
            raise refusal
        # Python itself refuses an argument that is given twice; ** has no name
        return tree.func.id, {str(item.arg or "**"): ast.literal_eval(item.value) for item in tree.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise refusal from None


def _trl_reward(
    spec: str, name: str, arguments: Mapping[str, object]
) -> tuple[Callable[..., Any], dict[str, object], str]:
    """Return a function of ``trl.rewards``, the arguments of its calls, and what it is made of."""
    from trl import rewards

    # The maker's own name, or the name without its get_
    offered = [key for key in dir(rewards) if key.endswith(("_reward", "_punishment"))]
    found = name if name in offered else f"get_{name}"
    if found not in offered:
        raise _unknown(spec, offered)
    function = getattr(rewards, found)
    module = str(getattr(function, "__module__", ""))
    if module.endswith("accuracy_rewards") and importlib.util.find_spec("math_verify") is None:
        raise UserError(f"{spec}: it needs the package math-verify: pip install 'goose-lora[rewards]'.")
    made_of = f"{spec} of trl {importlib.metadata.version('trl')}"
    _require_arguments(spec, function, arguments)
    if not found.startswith("get_"):
        return function, dict(arguments), made_of
    try:
        return function(**arguments), {}, made_of
    except (ValueError, TypeError) as error:
        raise UserError(f"{spec}: {error}.") from None


def _check(
    spec: str, name: str, arguments: Mapping[str, object]
) -> tuple[Callable[..., Any], dict[str, object], str]:
    """Return a function of ``checks``, the arguments of its calls, and what it is made of."""
    if name not in _CHECKS:
        raise _unknown(spec, list(_CHECKS))
    function = _CHECKS[name]
    _require_arguments(spec, function, arguments)
    return function, dict(arguments), f"{spec} {inspect.getsource(function)}"


def _require_arguments(spec: str, function: Callable[..., Any], arguments: Mapping[str, object]) -> None:
    """Raise UserError for an argument that the function does not take."""
    known = [key for key in inspect.signature(function).parameters if key not in _GIVEN]
    unknown = [key for key in arguments if key not in known]
    if unknown:
        raise UserError(
            f"{spec}: it has no argument {', '.join(unknown)}; it has {', '.join(known) or 'none'}."
        )


def _unknown(spec: str, offered: Sequence[str]) -> UserError:
    return UserError(f"{spec}: there is no such reward. There are {', '.join(sorted(offered))}.")
