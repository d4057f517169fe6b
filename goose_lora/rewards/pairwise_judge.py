"""A language model as judge: which of two replies is better, asked of an OpenAI-compatible server.

Each pair is asked about in both orders (Zheng et al. 2023, arXiv:2306.05685: judges favour a
place), and counts as a win where both answers agree. The ``openai`` library talks to the server.
"""

import asyncio
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from goose_lora.errors import UserError
from goose_lora.files import append_line, brief, read_sound_lines, writing
from goose_lora.redaction import without_known_secrets

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletionMessageParam

Verdict = Literal["A", "B", "tie"]
_T = TypeVar("_T")

SERVED = "openai:"  # what a judge behind a server begins with
OPENAI_URL = "https://api.openai.com/v1"
KEY = "OPENAI_API_KEY"
CACHE_FILE = "judge_cache.jsonl"
SILENCE = "none"  # stands in the file for an answer that was no verdict
AT_A_TIME = 4  # questions that wait for an answer
ANSWER_SECONDS = 120.0  # for one answer
FIRST_RETRIES = 2  # of the made-up question, for which somebody waits
ANSWER_RETRIES = 5  # of a question that was not answered; the library waits longer before each
ANSWER_TOKENS = 1024  # of an answer, for those who think first
MOST_SILENT = 0.1  # share of questions without an answer from which the rest says little
LEAST_QUESTIONS = 50  # before such a share ends what asks little by little

_FORM = (
    "You are given a JSON object: the request, reply_a and reply_b. Answer with one word and nothing else:"
    " A if reply_a is better, B if reply_b is better, tie if neither is."
)
_THOUGHT = re.compile(r"\A\s*<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)
_VERDICT = re.compile(
    r"\W*(?:(?:my |the |final )*(?:answer|verdict|choice|winner|better(?: reply)?)(?: is)?\W*)?"
    r"(?:reply[\s_]*)?(?P<verdict>a|b|tie)(?: is better)?\W*",
    re.IGNORECASE,
)
_MADE_UP = ("How many legs has a spider?", "A spider has eight legs.", "Blue, and on Tuesdays never.")
_OF_ONE_QUESTION = (400, 413, 422)  # too long, or of content that the server does not take


def served_model(judge: str) -> str:
    """Return the model that ``openai:MODEL`` names."""
    return judge.removeprefix(SERVED).strip()


def rubric_text(file: str | None) -> str:
    """Return the rubric in a file of the user's, or the package's own.

    Raises:
        UserError: it cannot be read, or holds nothing.
    """
    path = Path(__file__).with_name("rubric.txt") if file is None else Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise UserError(
            f"judge_rubric: {path} cannot be read: {brief(error)}. Give a text file in UTF-8, or leave it"
            " out for the package's own rubric."
        ) from error
    if not text:
        raise UserError(
            f"judge_rubric: {path} is empty. Write there what makes a reply the better one, or leave it out"
            " for the package's own rubric."
        )
    return text


def check_judge_settings(
    judge: str | None, base_url: str | None, rubric: str | None, *, setting: str = "judge"
) -> None:
    """Look at a judge's settings by themselves, before anything is read or asked.

    Args:
        setting: the name of the one that names the judge.

    Raises:
        UserError: settings of a server's judge beside another one; no model, or an address that
            cannot be one.
    """
    if judge is None or not judge.startswith(SERVED):
        for name, value in (("judge_base_url", base_url), ("judge_rubric", rubric)):
            if value is not None:
                raise UserError(
                    f"{name}={without_known_secrets(value)}: is of a judge behind a server alone. Set"
                    f" {setting}: {SERVED}MODEL beside it, or leave it out; {setting} is {judge or 'unset'}."
                )
        return
    if not served_model(judge):
        raise UserError(f"{setting}={judge}: names no model. Write {SERVED}MODEL, as the server lists it.")
    if base_url is None:
        return
    # An address may hold what belongs into no file
    try:
        parts = urlsplit(base_url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise UserError(
            "judge_base_url: cannot be read as an address. Write it like http://localhost:11434/v1."
        ) from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise UserError(
            "judge_base_url: has more than a server and a path. Leave out what stands before @ and from ? on;"
            f" a key is read from the environment variable {KEY} alone."
        )
    if not sound:
        raise UserError(
            f"judge_base_url={base_url}: is no address of a server. Write it like http://localhost:11434/v1."
        )


class Asked(NamedTuple):
    """What a judge was asked so far: questions sent, found in the cache, and not answered."""

    calls: int
    cache_hits: int
    no_answer: int


@dataclass
class _Question:
    """The request and two replies, as a server is asked about them."""

    request: object
    reply_a: str
    reply_b: str

    def messages(self, rubric: str) -> list[dict[str, str]]:
        """Return a conversation of two turns; JSON's quotes keep a reply from posing as another."""
        content = json.dumps(vars(self), ensure_ascii=False, default=str)
        return [
            {"role": "system", "content": f"{rubric}\n\n{_FORM}"},
            # Half of a character, as \ud800, could not be sent
            {"role": "user", "content": content.encode("utf-8", "replace").decode()},
        ]


class Comparison(NamedTuple):
    """A request, and two replies to it of which one may be better."""

    request: object
    mine: str
    other: str


class PairwiseJudge:
    """Say which of two replies is better, by a model behind an OpenAI-compatible server.

    Args:
        model: its name, as the server lists it.
        base_url: of the server, as a rule ending in /v1; OpenAI's own if None.
        rubric: what makes a reply the better one.
        cache: file of JSON lines with the answers so far; hashes and verdicts, no texts.
        process: of several that ask, each has a file of its own beside that of process 0.
        keeps_silence: whether the file has answers that were no verdict too, so that nothing is
            asked again; otherwise they are.
        least_questions: a tenth of them may lead to nothing though fewer were asked so far.
        way_on: how to go on after a failure, for its error.

    Raises:
        UserError: no ``openai`` library, or no key where the server is OpenAI's.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None,
        rubric: str,
        cache: Path,
        process: int = 0,
        keeps_silence: bool = False,
        least_questions: int = 0,
        way_on: str = "the same command goes on from there",
    ):
        if importlib.util.find_spec("openai") is None:
            raise UserError(
                f"judge: {SERVED}{model} needs the package openai: pip install 'goose-lora[judge]'."
            )
        self.model, self.base_url, self.rubric = model, (base_url or OPENAI_URL).rstrip("/"), rubric
        self._cache_file = cache_file(cache, process)
        self._known: dict[str, Verdict | None] | None = None  # what the file has, once it is read
        self._keeps_silence, self._least_questions = keeps_silence, least_questions
        self._kept = f" Answers so far are kept in {self._cache_file}: {way_on}."
        self._key = os.environ.get(KEY, "").strip()
        if not self._key and self.base_url == OPENAI_URL:
            raise UserError(
                f"judge: {SERVED}{model} is asked at {OPENAI_URL}, and the environment variable {KEY} is not"
                " set. Set it, or set judge_base_url to a server of your own."
            )
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"{KEY}: has characters that no key has. Set it anew; it is not shown here.")
        self._calls = self._cache_hits = self._no_answer = self._questions = 0
        self._nonsense = ""  # the first answer that was none

    @property
    def asked(self) -> Asked:
        return Asked(self._calls, self._cache_hits, self._no_answer)

    @property
    def name(self) -> str:
        """What judges, for files and cards: two rubrics make two judges."""
        digest = hashlib.sha256(self.rubric.encode()).hexdigest()[:8]
        return f"{SERVED}{self.model} (rubric {digest})"

    def told(self) -> str:
        """Return in a line what was asked, and what was not answered."""
        text = f"{self.name}: {self._calls} calls, {self._cache_hits} answers from {self._cache_file}."
        if self._no_answer:
            text += f" No verdict on {self._no_answer} questions, one of them {self._nonsense}: left out."
        return text

    def check(self) -> None:
        """Ask one made-up question, before anything loads.

        Raises:
            UserError: the server cannot be reached, refuses, or gives no verdict.
        """

        async def ask() -> Verdict | None:
            async with self._client(FIRST_RETRIES) as client:
                return await self._ask(client, _Question(*_MADE_UP).messages(self.rubric), first=True)

        with self._named_errors("", FIRST_RETRIES):
            verdict = _run(ask())
        if verdict is None:
            raise UserError(
                f"judge: {SERVED}{self.model} answered a made-up question with {self._nonsense}, where A, B"
                " or tie is asked for. Take a model that follows instructions, or mend judge_rubric."
            )

    def compare(
        self, prompts: Sequence[object], replies: Mapping[str, Sequence[str]], against: str
    ) -> dict[str, list[float | None]]:
        """Compare the replies of each name with those of ``against``, prompt by prompt.

        Returns 1 where a reply is better in both orders, 0 where it is worse in both, 0.5 for a tie
        and for answers that contradict each other, None where an answer is missing. Equal texts are
        a tie, and nobody is asked.

        Raises:
            UserError: the server fails for good, or more than a tenth of its answers are none.
        """
        names = [name for name in replies if name != against]
        pairs = [
            Comparison(*row)
            for name in names
            for row in zip(prompts, replies[name], replies[against], strict=True)
        ]
        found = iter(self.compare_pairs(pairs))
        return {name: [next(found) for _ in prompts] for name in names}

    def compare_pairs(self, pairs: Sequence[Comparison], *, shows: bool = True) -> list[float | None]:
        """Return what is found of the first reply of each pair, as ``compare`` does.

        Args:
            shows: a bar of the questions.
        """
        return _run(self.outcomes(pairs, shows=shows))

    async def outcomes(self, pairs: Sequence[Comparison], *, shows: bool = False) -> list[float | None]:
        """Return what ``compare_pairs`` does, to be awaited."""
        # Both orders of each pair of different replies; a question that comes twice is asked once
        questions: dict[str, list[dict[str, str]]] = {}
        keys: list[tuple[str, str] | None] = []
        for request, mine, other in pairs:
            if mine == other:
                keys.append(None)
                continue
            orders = [
                _Question(request, *pair).messages(self.rubric) for pair in ((mine, other), (other, mine))
            ]
            both = (self._key_of(orders[0]), self._key_of(orders[1]))
            keys.append(both)
            questions |= dict(zip(both, orders, strict=True))
        verdicts = await self._answers(questions, shows=shows)
        return [
            0.5 if both is None else _of_both(verdicts.get(both[0]), verdicts.get(both[1])) for both in keys
        ]

    async def _answers(
        self, questions: Mapping[str, list[dict[str, str]]], *, shows: bool
    ) -> dict[str, Verdict | None]:
        """Return verdicts by key, from the cache and from the server."""
        # The file is read once: it grows with each rollout of a run
        if self._known is None:
            self._known = self._cached()
        known: dict[str, Verdict | None] = {key: self._known[key] for key in questions if key in self._known}
        self._cache_hits += len(known)
        self._questions += len(questions)
        missing = {key: messages for key, messages in questions.items() if key not in known}
        bar = tqdm(total=len(questions), initial=len(known), desc="judge", disable=None if shows else True)
        try:
            with self._named_errors(self._kept, ANSWER_RETRIES):
                await self._ask_all(missing, known, bar)
        finally:
            bar.close()
        return known

    async def _ask_all(
        self, missing: Mapping[str, list[dict[str, str]]], verdicts: dict[str, Verdict | None], bar: tqdm
    ) -> None:
        """Ask the missing questions, a few at a time, and add to ``verdicts``, file and bar."""
        waiting = iter(missing.items())
        total = max(self._questions, self._least_questions)

        async def work(client: "AsyncOpenAI") -> None:
            for key, messages in waiting:  # one iterator for all: each takes the next
                verdict = await self._ask(client, messages)
                bar.update()
                if verdict is not None or self._keeps_silence:
                    verdicts[key] = verdict
                    self._keep(key, verdict)
                if verdict is not None:
                    continue
                # Paid calls that lead to nothing end early
                self._no_answer += 1
                if self._no_answer > MOST_SILENT * total:
                    raise UserError(
                        f"judge: {SERVED}{self.model} gave no verdict on {self._no_answer} of {total}"
                        f" questions, one of them {self._nonsense}; more than a tenth says too little. Take"
                        f" a model that answers A, B or tie alone, or mend judge_rubric.{self._kept}"
                    )

        if missing:
            async with self._client(ANSWER_RETRIES) as client:
                workers = [asyncio.ensure_future(work(client)) for _ in range(min(AT_A_TIME, len(missing)))]
                try:
                    await asyncio.gather(*workers)
                finally:
                    # Where one fails, the others pay for no more; an event loop may outlive this
                    for worker in workers:
                        worker.cancel()

    async def _ask(
        self, client: "AsyncOpenAI", messages: list[dict[str, str]], *, first: bool = False
    ) -> Verdict | None:
        """Ask one question; None for an answer that is no verdict, or a refusal of this one."""
        from openai import APIStatusError

        self._calls += 1
        try:
            said = await client.chat.completions.create(
                model=self.model,
                messages=cast("list[ChatCompletionMessageParam]", messages),
                temperature=0,
                max_completion_tokens=ANSWER_TOKENS,
            )
        except APIStatusError as error:
            # What served the made-up question and not this one minds what it is about
            if first or error.status_code not in _OF_ONE_QUESTION:
                raise
            self._note(f"an error {error.status_code}")
            return None
        # The library hands on what the server sent, of whatever kind it is
        try:
            message = said.choices[0].message if said.choices else None
            text = (message and message.content) or ""
        except (AttributeError, TypeError, LookupError):
            raise _NoCompletionError(_shown(said)) from None
        if not isinstance(text, str):
            raise _NoCompletionError(_shown(text))
        verdict = _read_verdict(text)
        if verdict is None:
            refusal = message and message.refusal
            self._note(_shown(refusal or text) if refusal or text.strip() else "an empty text")
        return verdict

    def _note(self, answer: str) -> None:
        self._nonsense = self._nonsense or answer

    @asynccontextmanager
    async def _client(self, retries: int) -> "AsyncIterator[AsyncOpenAI]":
        from openai import AsyncOpenAI

        key = self._key or "none"  # servers of one's own ask for none, and the library for one
        async with AsyncOpenAI(
            base_url=self.base_url, api_key=key, timeout=ANSWER_SECONDS, max_retries=retries
        ) as client:
            yield client

    def _key_of(self, messages: list[dict[str, str]]) -> str:
        asked = json.dumps([self.model, self.base_url, self.rubric, messages])
        return hashlib.sha256(asked.encode()).hexdigest()

    def _keep(self, key: str, verdict: Verdict | None) -> None:
        """Remember an answer, and write it down."""
        assert self._known is not None
        self._known[key] = verdict
        append_line(self._cache_file, {"key": key, "verdict": verdict or SILENCE})

    def _cached(self) -> dict[str, Verdict | None]:
        """Return the verdicts that the file has; a line that was cut short is passed over."""
        rows, unsound = read_sound_lines(self._cache_file)
        if unsound:  # the next line must not be added to half a one
            with writing(self._cache_file), open(self._cache_file, "a", encoding="utf-8") as file:
                file.write("\n")
        found: dict[str, Verdict | None] = {}
        for row in (row for row in rows if "key" in row):
            if row.get("verdict") in ("A", "B", "tie"):
                found[str(row["key"])] = row["verdict"]
            elif row.get("verdict") == SILENCE and self._keeps_silence:
                found[str(row["key"])] = None
        return found

    @contextmanager
    def _named_errors(self, kept: str, retries: int) -> Iterator[None]:
        """Turn what the library raises into one line: what is wrong, where, and the way out."""
        import openai

        where = f"judge: {SERVED}{self.model} at {self.base_url}"
        tries = f"{retries + 1} tries"
        try:
            yield
        except openai.APITimeoutError:
            problem = (
                f"gave no answer within {ANSWER_SECONDS:g} s, in {tries}. See what the server waits for, or"
            )
            problem += " take a smaller model."
        except openai.APIConnectionError as error:
            reason = _shown(error.__cause__ or error)
            problem = f"cannot be reached: {reason}. Start the server, or mend judge_base_url (it ends in"
            problem += " /v1 as a rule)."
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            state = "as it is set" if self._key else "which is not set"
            problem = f"does not let us in ({error.status_code}): {_shown(error.message)}. It was asked with"
            problem += f" the environment variable {KEY}, {state}."
        except openai.NotFoundError as error:
            problem = f"has no such model, or no such address (404): {_shown(error.message)}. Mend judge to a"
            problem += " model that the server lists, or judge_base_url (it ends in /v1 as a rule)."
        except openai.RateLimitError as error:
            problem = f"takes no more questions (429), after {tries}: {_shown(error.message)}. Wait, or see"
            problem += " what the account has left."
        except openai.APIStatusError as error:
            problem = f"refused ({error.status_code}): {_shown(error.message)}. See the server's log, or take"
            problem += " another model."
        except (openai.OpenAIError, json.JSONDecodeError, UnicodeDecodeError, _NoCompletionError) as error:
            problem = f"answered with something that is no chat completion: {_shown(error)}. Mend"
            problem += " judge_base_url (it ends in /v1 as a rule)."
        else:
            return
        raise UserError(f"{where} {problem}{kept}")


def cache_file(first: Path, process: int) -> Path:
    """Return the file that a process of several writes; ``first`` is that of process 0."""
    return first if process == 0 else first.with_name(f"{first.stem}_{process}{first.suffix}")


def _run(asking: Coroutine[object, object, _T]) -> _T:
    """Wait for what is asked; in a thread of its own where an event loop runs, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(asking)
    with ThreadPoolExecutor(1) as aside:
        return aside.submit(asyncio.run, asking).result()


class _NoCompletionError(Exception):
    """A server's answer that is no chat completion, such as a page."""


def _shown(value: object) -> str:
    """Return a server's words in one short line, without secrets that it may repeat."""
    text = " ".join(without_known_secrets(str(value)).split())
    text = text if len(text) <= 160 else f"{text[:160]}..."
    return repr(text.rstrip("."))


def _read_verdict(text: str) -> Verdict | None:
    """Return the verdict of an answer, in its first or its last line; None if there is none."""
    lines = [line for line in _THOUGHT.sub("", text).splitlines() if line.strip()]
    found = [_VERDICT.fullmatch(line) for line in dict.fromkeys((*lines[:1], *lines[-1:]))]
    verdicts = {match["verdict"].lower() for match in found if match}
    if len(verdicts) != 1:
        return None
    verdict = verdicts.pop()
    return "tie" if verdict == "tie" else "A" if verdict == "a" else "B"


def _of_both(forward: Verdict | None, backward: Verdict | None) -> float | None:
    """Return what two answers say of the reply that was A to the first and B to the second."""
    if forward is None or backward is None:
        return None
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((forward, backward), 0.5)
