"""``goose-lora label``: two replies of a policy to a prompt, and which of them a person prefers.
The page is in label_page.py; this is the rest."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from goose_lora.apps.label_file import ChoiceFile, key_of
from goose_lora.apps.session import PolicySession, Prompt, RunInfo, SampledReply, check_sampling, inspect_run
from goose_lora.data.rows import load_rows
from goose_lora.data.tokenization import tokenize_prompts
from goose_lora.errors import UserError
from goose_lora.files import file_sha256
from goose_lora.models.adapters import WEIGHTS
from goose_lora.ppo.config import PPOConfig

Choose = Literal["random", "uncertain"]
Choice = Literal["left", "right", "tie", "skip"]
CHOICES: tuple[Choice, ...] = ("left", "right", "tie", "skip")
LEASE_SECONDS = 15 * 60.0


@dataclass(frozen=True)
class Pair:
    """Two replies to a prompt. ``key`` names it when the choice is recorded."""

    key: str
    prompt: Prompt
    left: SampledReply
    right: SampledReply


class LabelQueue:
    """Hands out pairs, each to one labeler at a time, and records choices. Threads may share one;
    processes share the file.

    Args:
        make: the pair for the prompt of a number; None where there are no two different replies.
        policy: what replies, as the file's lines name it.
        seed: of the order of prompts. Two processes on one file had better have two.
        lease_seconds: after so long without a choice, a pair may be given to someone else.
        clock: seconds.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        make: Callable[[int], tuple[SampledReply, SampledReply] | None],
        file: ChoiceFile,
        *,
        policy: str,
        seed: int = 0,
        lease_seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.file, self.policy, self.lease_seconds, self.clock = file, policy, lease_seconds, clock
        self._make = make
        self._prompts = {key_of(prompt, policy): (number, prompt) for number, prompt in enumerate(prompts)}
        self._order = list(self._prompts)
        random.Random(seed).shuffle(self._order)
        self._leases: dict[str, tuple[str, float]] = {}  # by key: whose, and until when
        self._alike: set[str] = set()
        self._made: dict[str, Future[Pair | None]] = {}
        self._lock = threading.RLock()
        self._worker = ThreadPoolExecutor(1)

    def next(self, labeler: str) -> Pair | None:
        """The pair that ``labeler`` has already, or one that nobody has; None if none is left for
        now. The one after it is made meanwhile."""
        while True:
            with self._lock:
                self.file.refresh()
                key = self._free(labeler)
                if key is None:
                    return None
                self._leases[key] = (labeler, self.clock() + self.lease_seconds)
                made = self._start(key)
            try:
                pair = made.result()
            except Exception:  # it may come right next time
                with self._lock:
                    self._made.pop(key, None)
                    self._leases.pop(key, None)
                raise
            with self._lock:
                if pair is None:
                    self._alike.add(key)
                    continue
                following = self._free(None)
                if following is not None:
                    self._start(following)
            return pair

    def record(self, labeler: str, key: str, choice: str, better: str | None = None) -> bool:
        """Write the choice down. ``better``: the text that the left or right reply, whichever is
        chosen, was edited into; the reply itself is then the rejected one. False, and nothing is
        written, if the prompt was labelled before.

        Raises:
            ValueError: no such pair or choice, or an edit that is empty or changes nothing.
            OSError: the file cannot be written.
        """
        if choice not in CHOICES:
            raise UserError(f"choice {choice!r}: there are {', '.join(CHOICES)}.")
        with self._lock:
            if key not in self._made or (pair := self._made[key].result()) is None:
                raise UserError(f"there is no pair {key!r}. Ask for the next one.")
            row = row_of(pair, choice, better)
            kept = self.file.append(pair.prompt, row, policy=self.policy, pair="chosen" in row)
            self._leases.pop(key, None)
            return kept

    def progress(self) -> dict[str, int]:
        """Prompts in all, and how many have a pair, were passed over, and had no two different
        replies."""
        with self._lock:
            kinds = [self.file.done[key] for key in self._prompts if key in self.file.done]
        return {
            "prompts": len(self._prompts),
            "pairs": kinds.count("pair"),
            "passed": kinds.count("passed"),
            "alike": len(self._alike),
        }

    def _free(self, labeler: str | None) -> str | None:
        now = self.clock()
        open_keys = [key for key in self._order if key not in self.file.done and key not in self._alike]
        for key in open_keys:
            if labeler is not None and self._leases.get(key, ("", 0.0))[0] == labeler:
                return key
        return next(
            (key for key in open_keys if key not in self._leases or self._leases[key][1] <= now), None
        )

    def _start(self, key: str) -> "Future[Pair | None]":
        if key not in self._made:
            self._made[key] = self._worker.submit(self._pair, key)
        return self._made[key]

    def _pair(self, key: str) -> Pair | None:
        number, prompt = self._prompts[key]
        replies = self._make(number)
        return None if replies is None else Pair(key, prompt, *replies)


def row_of(pair: Pair, choice: str, better: str | None = None) -> dict[str, Any]:
    """The line of a choice, without the prompt: a pair in TRL's preference format, of text or
    messages as the prompt is; or a tie or a skip.

    Raises:
        ValueError: an edit that is empty, changes nothing, or belongs to no side.
    """

    def written(text: str) -> Any:
        return text if isinstance(pair.prompt, str) else [{"role": "assistant", "content": text}]

    if choice not in ("left", "right"):
        if better is not None:
            raise UserError(f"an edited reply goes with left or right, not with {choice}.")
        return {"choice": choice, "replies": [written(pair.left.text), written(pair.right.text)]}
    chosen, rejected = (
        (pair.left.text, pair.right.text) if choice == "left" else (pair.right.text, pair.left.text)
    )
    if better is not None:
        if isinstance(pair.prompt, str) and not better[:1].isspace():
            # Or it would stick to the prompt's last word
            better = chosen[: len(chosen) - len(chosen.lstrip())] + better
        if not better.strip() or better.strip() == chosen.strip():
            raise UserError(
                "the edited reply is "
                + ("the same as before. Change it, or choose it as it is." if better.strip() else "empty.")
            )
        chosen, rejected = better, chosen
    return {"chosen": written(chosen), "rejected": written(rejected), "edited": better is not None}


def choose_two(
    replies: Sequence[SampledReply], how: Choose, rng: random.Random
) -> tuple[SampledReply, SampledReply] | None:
    """Two different replies, none of them empty, in random order: any two, or those whose scores
    are nearest. None if there are not two."""
    different = list({reply.text.strip(): reply for reply in replies if reply.text.strip()}.values())
    if len(different) < 2:
        return None
    if how == "random":
        first, second = rng.sample(different, 2)
        return first, second
    different.sort(key=lambda reply: reply.score or 0.0)
    nearest = min(
        range(len(different) - 1),
        key=lambda place: (different[place + 1].score or 0.0) - (different[place].score or 0.0),
    )
    first, second = rng.sample(different[nearest : nearest + 2], 2)
    return first, second


def open_queue(
    policy: str | Path,
    prompts: str,
    out: str | Path,
    *,
    choose: Choose = "random",
    candidates: int = 4,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    base: str | None = None,
) -> LabelQueue:
    """Load ``policy`` and hand out pairs of its replies to ``prompts``; without a page, for a
    labeler in Python.

    Args:
        policy: output_dir of recipes/ppo.py or recipes/sft.py.
        prompts: rows with a prompt, as for recipes/ppo.py.
        out: the .jsonl that choices are appended to.
        choose: random, or uncertain: of ``candidates`` replies the two that the run's reward model
            scores most alike.
        temperature, max_new_tokens: the run's own if unset.
        seed: of prompts' order and of replies.
        base: where the base is, if not where the run had it.

    Raises:
        ValueError: nothing can be labelled; before anything is loaded.
    """
    check_sampling(temperature, max_new_tokens, greedy=False)
    if candidates < 2:
        raise UserError(f"--candidates {candidates}: must be 2 or more, of which two are shown.")
    info = inspect_run(policy, base=base)
    if choose == "uncertain" and info.reward is None:
        raise UserError(
            f"--choose uncertain asks the reward model, and {policy} has none. Use --choose random."
        )
    texts = _prompts(info, prompts, max_new_tokens or info.response_tokens)
    file = ChoiceFile(out)
    session = PolicySession(info, temperature=temperature, max_new_tokens=max_new_tokens)
    name = next(name for name, role in info.roles.items() if role == "policy")

    def make(number: int) -> tuple[SampledReply, SampledReply] | None:
        own_seed = seed * 1_000_003 + number
        return choose_two(
            session.reply(name, texts[number], seed=own_seed, count=candidates),
            choose,
            random.Random(own_seed),
        )

    return LabelQueue(texts, make, file, policy=file_sha256(info.folder / WEIGHTS)[:12], seed=seed)


def _prompts(info: RunInfo, name: str, response_tokens: int) -> list[Prompt]:
    limit = info.settings.get("max_prompt_tokens", PPOConfig.max_prompt_tokens)
    rows = tokenize_prompts(load_rows(name, stage="ppo"), info.tokenizer, name=name, max_prompt_tokens=limit)
    info.check(tokens=max(map(len, rows["input_ids"])) + response_tokens)
    return list(rows["prompt"])
