"""Sources of reward: the reward adapter and Python functions, weighted and added."""

import asyncio
import hashlib
import inspect
import logging
import os
import re
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from goose_lora.deadline import time_limit
from goose_lora.errors import UserError
from goose_lora.rewards.group_judge import EVEN, GroupJudge

logger = logging.getLogger(__name__)
_LONGEST = 200  # characters of a stranger's words in an error

RewardFunction = Callable[..., Any]
RewardSource = RewardFunction | Literal["adapter"]


@runtime_checkable
class _Array(Protocol):
    """What torch and numpy have in common."""

    ndim: int

    def tolist(self) -> list[Any]: ...


class RewardMix:
    """The weighted sum of what several sources say of each reply.

    A source is the reward adapter (``"adapter"``) or a Python function. A function has TRL's
    signature, plain or async, ``f(prompts=, completions=, completion_ids=, **columns) -> list[float
    | None]``: one number a reply, None where it has nothing to say; or one list a reply, with a
    number for each of its tokens. Columns are those of the prompts' dataset.

    Args:
        timeout: seconds that the functions may take together; None: as long as they like.

    Raises:
        UserError: no source, or not one weight to each.
    """

    def __init__(
        self,
        sources: Sequence[RewardSource],
        weights: Sequence[float] | None = None,
        *,
        timeout: float | None = None,
    ):
        self.sources, self.timeout = list(sources), timeout
        self.weights = [1.0] * len(self.sources) if weights is None else [float(weight) for weight in weights]
        if not self.sources or len(self.weights) != len(self.sources):
            raise UserError(
                f"reward_weights: {len(self.weights)} weights for {len(self.sources)} sources of reward; give"
                " one to each."
            )
        # Functions of one name are told apart by their places
        names = [
            "adapter" if source == "adapter" else getattr(source, "__name__", type(source).__name__)
            for source in self.sources
        ]
        self.names = [
            name if names.count(name) == 1 else f"{name}_{index}" for index, name in enumerate(names)
        ]
        for index in range(len(self.names)):  # another function may have such a name itself
            while self.names[index] in self.names[:index]:
                self.names[index] += "_"

    @property
    def needs_adapter(self) -> bool:
        return "adapter" in self.sources

    @property
    def judges(self) -> dict[str, GroupJudge]:
        """The sources that compare the replies to a prompt, by name."""
        named = zip(self.names, self.sources, strict=True)
        return {name: source for name, source in named if isinstance(source, GroupJudge)}

    @property
    def pays_judges(self) -> bool:
        """Whether a judge has a weight, so that scores depend on a prompt's other replies."""
        weights = zip(self.names, self.weights, strict=True)
        return any(weight != 0 for name, weight in weights if name in self.judges)

    def without_judges(self) -> "RewardMix":
        """Return the same for replies that stand alone: 0.5 by judges, which nobody asks."""
        sources: list[RewardSource] = [
            _even if isinstance(source, GroupJudge) else source for source in self.sources
        ]
        mix = RewardMix(sources, self.weights, timeout=self.timeout)
        mix.names = self.names
        return mix

    def judged(self, scores: "Scores") -> dict[str, tuple[int, float, int]]:
        """Return by judge what the last call has taken and found.

        That is the calls, and in how many of the decided pairs the rest of what is paid prefers the
        same reply, of how many. Where nothing else is paid, there are none of these.
        """
        found = {}
        for name, weight in zip(self.names, self.weights, strict=True):
            if name not in self.judges or name not in scores.by_source:
                continue
            last = self.judges[name].last
            agreement = (0.0, 0)
            if self._pays_besides(name):
                own = weight * scores.by_source[name].to(scores.total.device)
                agreement = last.agreement((scores.total - own).tolist())
            found[name] = (last.calls, *agreement)
        return found

    def _pays_besides(self, name: str) -> bool:
        others = zip(self.names, self.weights, strict=True)
        return any(weight != 0 for other, weight in others if other != name)

    def made_of(self) -> dict[str, str]:
        """Return, by name of source, its weight and a hash of its code as far as Python has it."""
        found = {}
        for name, source, weight in zip(self.names, self.sources, self.weights, strict=True):
            code = "adapter"
            if source != "adapter":
                code = _code_of(source)
            digest = hashlib.sha256(code.encode()).hexdigest()[:12]
            found[f"reward {name}"] = f"{digest} with weight {weight:g}"
        return {"rewards": ", ".join(sorted(self.names)), **found}

    def numbers(self, **replies: object) -> list[float]:
        """Return one number a reply, from functions alone, as a call does."""
        return self(None, **replies).total.tolist()

    def check(
        self,
        prompt: object,
        columns: Mapping[str, Any] | None = None,
        completion_ids: Sequence[int] | None = None,
    ) -> None:
        """Call each Python function on one reply, before anything loads.

        Args:
            prompt: a prompt as the functions will get it.
            columns: the other columns of its row, where they are given any.
            completion_ids: tokens of the reply, whose text is "ok", where they are given them.

        Raises:
            UserError: as a call does.
        """
        replies = {name: [value] for name, value in (columns or {}).items()}
        replies |= {"prompts": [prompt], "completions": ["ok"]}
        if completion_ids is not None:
            replies["completion_ids"] = [list(completion_ids)]
        functions = self._functions()
        with self._in_time(functions):
            said = _ask_all(functions, replies)
        for name, answer in zip(functions, said, strict=True):
            _read_answer(answer, [len(completion_ids or "ok")], name)

    def _in_time(self, functions: Mapping[str, RewardFunction]) -> AbstractContextManager[None]:
        """Interrupt functions that have not answered in ``timeout`` seconds."""
        return time_limit(
            self.timeout if functions else None,
            f"the reward function {', '.join(functions)}",
            ", which is reward_timeout. See what it waits for, or raise reward_timeout (null: no limit);"
            " --resume_from_checkpoint latest goes on from the last checkpoint.",
        )

    def _functions(self) -> dict[str, RewardFunction]:
        """Return the Python functions by name."""
        named = zip(self.names, self.sources, strict=True)
        return {name: source for name, source in named if source != "adapter"}

    def __call__(self, by_adapter: Float[Tensor, " B"] | None, /, **replies: Any) -> "Scores":
        """Ask all sources; return what they say, weighted and added.

        Args:
            by_adapter: the reward adapter's scores, where it is a source.
            replies: ``prompts, completions, completion_ids`` and columns, for the functions.

        Raises:
            UserError: a function that raised an error, or did not give one finite number, one list
                of them (a number a token) or None a reply; or a reply of which no source said
                anything.
            TimeLimitError: the functions took longer than ``timeout``.
        """
        # Ask: the functions together, under one limit of time
        answered = "completion_ids" if "completion_ids" in replies else "completions"
        lengths = [len(reply) for reply in replies[answered]]
        functions = self._functions()
        with self._in_time(functions):
            said = _ask_all(functions, replies)
        # Read: one column of scores a source, in the order of the sources
        answers = iter(said)
        device = torch.device("cpu") if by_adapter is None else by_adapter.device
        columns, by_token = [], None
        for name, weight, source in zip(self.names, self.weights, self.sources, strict=True):
            if source == "adapter":
                columns.append(by_adapter)
                continue
            scores, tokens = _read_answer(next(answers), lengths, name)
            columns.append(scores.to(device))
            if tokens is not None:
                by_token = weight * tokens.to(device) + (0.0 if by_token is None else by_token)
        scores = torch.stack(
            [torch.as_tensor(column, dtype=torch.float32, device=device) for column in columns]
        )
        # Add: a source that said None has no say; a reply of which none that is paid spoke has no
        # reward
        weights = torch.tensor(self.weights, device=device)[:, None]
        paid = scores[weights.squeeze(1) != 0]
        silent = (paid if len(paid) else scores).isnan().all(0)
        if silent.any():
            raise UserError(
                f"no source of reward said anything of {int(silent.sum())} of {len(lengths)} replies: each"
                " with a weight returned None there. Return a number for each reply, or weigh a source that"
                " does."
            )
        return Scores((weights * scores).nansum(0), dict(zip(self.names, scores, strict=True)), by_token)


def _code_of(source: object) -> str:
    """Return the text of what scores: of a user's whole file, for what a function calls there.

    Of a library's function or object, and of a script's own, it is that function's or class's text;
    where there is none, its name.
    """
    # What was bound to a function belongs to it
    if isinstance(source, partial):
        bound = f"{source.args} {sorted(source.keywords.items())}"
        return _code_of(source.func) + re.sub(r" at 0x[0-9a-f]+", "", bound)
    plain = inspect.unwrap(source) if callable(source) else source
    if not inspect.isroutine(plain):
        plain = type(plain)
    # An object with a name of its own, as a classifier has, is not its class alone
    name = str(getattr(source, "name", ""))
    try:
        path = Path(inspect.getsourcefile(plain) or "")
        text = inspect.getsource(plain)
        if _is_users(plain, path):
            text = path.read_text(encoding="utf-8", errors="replace")
    except (OSError, TypeError):
        return name + str(getattr(plain, "__qualname__", type(plain).__name__))
    return name + text


def _is_users(plain: object, path: Path) -> bool:
    """Return whether a function is a user's, in a file that holds no run of its own."""
    module = str(getattr(plain, "__module__", None))
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return module != "__main__" and not module.startswith("goose_lora.") and not installed


class Scores(NamedTuple):
    """Raw scores (B,), before any normalisation.

    ``by_source`` has each source's own, before weighting, NaN where it said None. ``by_token`` is
    the weighted part of the scores that was given token by token: N numbers for the N counted
    tokens of all replies, one reply after the other; their sum is in ``total``.
    """

    total: Float[Tensor, " B"]
    by_source: dict[str, Float[Tensor, " B"]]
    by_token: Float[Tensor, " N"] | None = None


def _ask_all(functions: Mapping[str, RewardFunction], replies: Mapping[str, Any]) -> list[Any]:
    """Return what the functions say.

    Plain functions answer one after the other; what async ones wait for, they wait for together.
    Judges are asked first, and answer while the others do.
    """
    judges = {name: function for name, function in functions.items() if isinstance(function, GroupJudge)}
    try:
        return _all_answers({**judges, **functions}, functions, replies)
    except BaseException:
        # Nobody waits for their answers any more, and each may be paid for
        for judge in judges.values():
            judge.cancel()
        raise


def _all_answers(
    in_order: Mapping[str, RewardFunction],
    functions: Mapping[str, RewardFunction],
    replies: Mapping[str, Any],
) -> list[Any]:
    answers: dict[str, Any] = {}
    for name, function in in_order.items():
        with _named(name), _same_folder(name):
            # Lists of its own: what it does to them concerns nobody else
            own = {key: list(values) for key, values in replies.items()}
            if "completion_ids" in own:
                own["completion_ids"] = [list(ids) for ids in own["completion_ids"]]
            _require_call(name, function, own)
            answers[name] = function(**own)
    if any(map(inspect.isawaitable, answers.values())):
        # Outside of it plain functions may have event loops of their own
        answers = dict(zip(answers, asyncio.run(_await_all(answers)), strict=True))
    return [answers[name] for name in functions]


def _even(completions: Sequence[str], **columns: object) -> list[float]:
    """Return what a judge gives to replies that are compared with none."""
    return [EVEN] * len(completions)


async def _await_all(answers: Mapping[str, Any]) -> list[Any]:
    async def awaited(name: str, answer: Awaitable[object]) -> object:
        if not inspect.isawaitable(answer):
            return answer
        with _named(name), _same_folder(name):
            return await answer

    return await asyncio.gather(*(awaited(name, answer) for name, answer in answers.items()))


def _require_call(name: str, function: RewardFunction, replies: Mapping[str, Any]) -> None:
    """Raise UserError unless a function can be called with these names."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some written in C have none
        return
    try:
        signature.bind(**replies)
        # A method's own first name is taken: a column of that name, self, cannot be given to it
        method = inspect.getattr_static(type(function), "__call__", None)
        if inspect.ismethod(function):
            method = function.__func__
        if inspect.isfunction(method):
            inspect.signature(method).bind(None, **replies)
    except TypeError as error:
        raise UserError(
            f"the reward function {name} cannot be called: {error}. It is given {', '.join(replies)} by"
            f" name: def {name}(prompts, completions, **columns). A column of the rows can be renamed by"
            " column_mapping."
        ) from None


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the function, and the line where an error arose, in any error inside.

    Errors that are meant for the interpreter count too: a function may not end a run.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        # Who waits for all may be cancelled itself, as by Ctrl-C
        if isinstance(error, asyncio.CancelledError) and _is_cancelled():
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        raise UserError(
            f"the reward function {name} raised {type(error).__name__} ({where}): {_shown(error)}"
        ) from error


def _is_cancelled() -> bool:
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs
        return False
    return task is not None and task.cancelling() > 0


def _shown(value: object) -> str:
    """Return a value of a stranger's in a few words, whatever its own words do."""
    try:
        text = str(value)
    except Exception as error:
        return f"a {type(value).__name__} whose text cannot be had ({type(error).__name__})"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


@contextmanager
def _same_folder(name: str) -> Iterator[None]:
    """Go back to the working directory, which names of files count from, and tell of it."""
    before = os.getcwd()
    try:
        yield
    finally:
        if not Path.cwd().samefile(before):
            os.chdir(before)
            logger.warning(
                "the reward function %s has left the working directory; it is %s again.", name, before
            )


def _read_answer(
    answer: object, lengths: Sequence[int], name: str
) -> tuple[Float[Tensor, " B"], Float[Tensor, " N"] | None]:
    """Read a function's answer as one score a reply, NaN for None.

    Where it gave lists, also as one number a token.
    """
    # One answer a reply, whatever holds the answers
    listed = None
    with _named(name):
        if isinstance(answer, _Array) and answer.ndim:
            listed = answer.tolist()
        elif isinstance(answer, Sequence) and not isinstance(answer, (str, bytes, bytearray)):
            listed = list(answer)
    if listed is None or len(listed) != len(lengths):
        what = type(answer).__name__ if listed is None else f"{len(listed)} numbers"
        raise UserError(
            f"the reward function {name} returned {what} for {len(lengths)} replies. It must return one"
            " number (or None) a reply."
        )
    # Which replies have a number a token, and is there one for each?
    listed = [item.tolist() if isinstance(item, _Array) else item for item in listed]
    tokens = [list(item) if isinstance(item, (list, tuple)) else None for item in listed]
    for row, (item, length) in enumerate(zip(tokens, lengths, strict=True)):
        if item is not None and len(item) != length:
            raise UserError(
                f"the reward function {name} returned {len(item)} numbers for the {length} tokens of reply"
                f" {row}; give one a token."
            )
    if all(item is None for item in tokens):
        return _numbers(listed, name, range(len(listed))), None
    # Beside lists, a number belongs to a reply's last token, and None to nothing.
    spread = [
        item if item is not None else [0.0] * (length - 1) + [0.0 if whole is None else whole]
        for item, whole, length in zip(tokens, listed, lengths, strict=True)
    ]
    owners = [row for row, length in enumerate(lengths) for _ in range(length)]
    flat = _numbers([number for item in spread for number in item], name, owners)
    if flat.isnan().any():
        row = owners[int(flat.isnan().nonzero()[0])]
        what = "give each token a number, 0 where there is nothing to say"
        raise UserError(f"the reward function {name} returned None for a token of reply {row}; {what}.")
    # A reply's score is the sum of its tokens'
    sums = torch.stack([part.sum() for part in flat.split(list(lengths))])
    said_nothing = torch.tensor([item is None for item in listed])
    return sums.masked_fill(said_nothing, float("nan")), flat


def _numbers(listed: Sequence[Any], name: str, owners: Sequence[int]) -> Float[Tensor, " N"]:
    """Return the numbers, NaN for None.

    ``owners`` tells which reply each number belongs to.
    """
    floats = [float("nan")] * len(listed)
    for index, number in enumerate(listed):
        if number is None:
            continue
        try:
            if isinstance(number, (str, bytes)):
                raise TypeError("text")
            floats[index] = float(number)
        except Exception as error:  # a stranger's own __float__ may raise anything
            why = "too large" if isinstance(error, OverflowError) else "no number"
            what = f"something that is {why} for reply {owners[index]}: {_shown(number)}"
            raise UserError(f"the reward function {name} returned {what}.") from error
    numbers = torch.tensor(floats)
    finite = numbers.isfinite().tolist()
    broken = [index for index, number in enumerate(listed) if number is not None and not finite[index]]
    if broken:
        what = f"{_shown(listed[broken[0]])} for reply {owners[broken[0]]}"
        raise UserError(
            f"the reward function {name} returned {what}, {len(broken)} of {len(listed)} not finite."
        )
    return numbers
