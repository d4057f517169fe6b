"""``goose-lora label`` without its page: pairs of replies are made, handed out and recorded.

A labeler is shown two replies of a policy to a prompt and says which is better. The page is in
label_page.py.
"""

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
from goose_lora.models.folders import ADAPTER_WEIGHTS
from goose_lora.ownership import share
from goose_lora.ppo.config import PPOConfig

Choose = Literal["random", "uncertain"]
Choice = Literal["left", "right", "tie", "skip"]
CHOICES: tuple[Choice, ...] = ("left", "right", "tie", "skip")
# A labeler who has gone away keeps a pair from the others for so long.
LEASE_SECONDS = 15 * 60.0


@dataclass(frozen=True)
class Pair:
    """Two replies to a prompt. ``key`` names it when the choice is recorded."""

    key: str
    prompt: Prompt
    left: SampledReply
    right: SampledReply


class LabelQueue:
    """A queue that hands out pairs, each to one labeler at a time, and records choices.

    Threads may share one; processes share the file.

    Args:
        make: gives the pair for a prompt by its number; None if there are no two different replies.
        policy: what replies, as the file's lines name it.
        seed: of the order of prompts. Two processes on one file should have two.
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
        # A prompt that stands in the data twice is labelled once: it has one key
        self._prompts = {key_of(prompt, policy): (number, prompt) for number, prompt in enumerate(prompts)}
        self._order = list(self._prompts)
        random.Random(seed).shuffle(self._order)
        self._leases: dict[str, tuple[str, float]] = {}  # by key: whose, and until when
        self._alike: set[str] = set()  # keys of prompts without two different replies
        # Pairs by key, made one after the other in a thread of their own
        self._made: dict[str, Future[Pair | None]] = {}
        self._worker = ThreadPoolExecutor(1)
        self._lock = threading.RLock()

    def next(self, labeler: str) -> Pair | None:
        """Return the pair that ``labeler`` has already, or one that nobody has.

        Returns None if none is left for now. The pair after it is made meanwhile.
        """
        while True:
            # Lease a prompt. Its pair is awaited without the lock, since the model takes its time
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
            # A prompt without two different replies is passed over
            with self._lock:
                if pair is None:
                    self._alike.add(key)
                    continue
                following = self._free(None)
                if following is not None:
                    self._start(following)
            return pair

    def record(self, labeler: str, key: str, choice: str, better: str | None = None) -> bool:
        """Write the choice down.

        Returns False, and writes nothing, if the prompt was labelled before.

        Args:
            better: the text into which the chosen reply was edited. The reply itself is then the
                rejected one.

        Raises:
            UserError: there is no such pair or choice, or the edit is empty or changes nothing.
            OSError: the file cannot be written.
        """
        if choice not in CHOICES:
            raise UserError(f"choice {choice!r}: there are {', '.join(CHOICES)}.")
        with self._lock:
            # Only a pair that was shown can be chosen from
            if key not in self._made or (pair := self._made[key].result()) is None:
                raise UserError(f"there is no pair {key!r}. Ask for the next one.")
            row = row_of(pair, choice, better)
            kept = self.file.append(pair.prompt, row, policy=self.policy, pair="chosen" in row)
            self._leases.pop(key, None)
            return kept

    def progress(self) -> dict[str, int]:
        """Return numbers of prompts: all, paired, passed over, with no two different replies."""
        with self._lock:
            kinds = [self.file.done[key] for key in self._prompts if key in self.file.done]
        return {
            "prompts": len(self._prompts),
            "pairs": kinds.count("pair"),
            "passed": kinds.count("passed"),
            "alike": len(self._alike),
        }

    def _free(self, labeler: str | None) -> str | None:
        """Return the key that ``labeler`` has, or else the first one that nobody has."""
        now = self.clock()
        open_keys = [key for key in self._order if key not in self.file.done and key not in self._alike]
        for key in open_keys:
            if labeler is not None and self._leases.get(key, ("", 0.0))[0] == labeler:
                return key
        for key in open_keys:
            if key not in self._leases or self._leases[key][1] <= now:
                return key
        return None

    def _start(self, key: str) -> "Future[Pair | None]":
        if key not in self._made:
            self._made[key] = self._worker.submit(self._pair, key)
        return self._made[key]

    def _pair(self, key: str) -> Pair | None:
        number, prompt = self._prompts[key]
        replies = self._make(number)
        return None if replies is None else Pair(key, prompt, *replies)


def row_of(pair: Pair, choice: str, better: str | None = None) -> dict[str, Any]:
    """Return the line of a choice, without the prompt: a pair, a tie or a skip.

    A pair is in TRL's preference format, of text or messages as the prompt is.

    Raises:
        UserError: the edit is empty, changes nothing, or belongs to no side.
    """

    def written(text: str) -> Prompt:
        return text if isinstance(pair.prompt, str) else [{"role": "assistant", "content": text}]

    # A tie and a skip keep both replies, in the order in which they were shown
    if choice not in ("left", "right"):
        if better is not None:
            raise UserError(f"an edited reply goes with left or right, not with {choice}.")
        return {"choice": choice, "replies": [written(pair.left.text), written(pair.right.text)]}
    chosen, rejected = pair.left.text, pair.right.text
    if choice == "right":
        chosen, rejected = rejected, chosen

    # An edited reply is better than the one that it was made of
    if better is not None:
        if isinstance(pair.prompt, str) and not better[:1].isspace():
            # Or it would stick to the prompt's last word
            better = chosen[: len(chosen) - len(chosen.lstrip())] + better
        if not better.strip():
            raise UserError("the edited reply is empty.")
        if better.strip() == chosen.strip():
            raise UserError("the edited reply is the same as before. Change it, or choose it as it is.")
        chosen, rejected = better, chosen
    return {"chosen": written(chosen), "rejected": written(rejected), "edited": better is not None}


def choose_two(
    replies: Sequence[SampledReply], how: Choose, rng: random.Random
) -> tuple[SampledReply, SampledReply] | None:
    """Return two different replies, none of them empty, in random order.

    They are any two, or with ``uncertain`` those whose scores are nearest. Returns None if there
    are no two.
    """
    different = list({reply.text.strip(): reply for reply in replies if reply.text.strip()}.values())
    if len(different) < 2:
        return None
    if how == "random":
        first, second = rng.sample(different, 2)
        return first, second

    # Nearest scores are neighbours in the order of scores
    different.sort(key=lambda reply: reply.score or 0.0)
    scores = [reply.score or 0.0 for reply in different]
    nearest = min(range(len(different) - 1), key=lambda place: scores[place + 1] - scores[place])
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
    """Load ``policy`` and return a queue of pairs of its replies to ``prompts``.

    It needs no page: a labeler in Python can use it.

    Args:
        policy: output_dir of recipes/ppo.py or recipes/sft.py.
        prompts: rows with a prompt, as for recipes/ppo.py.
        out: the .jsonl that choices are appended to.
        choose: random, or uncertain: of ``candidates`` replies the two that the run's reward model
            scores most alike.
        temperature, max_new_tokens: the run's own if unset.
        seed: of the order of prompts, and of replies.
        base: where the base is, if not where the run had it.

    Raises:
        UserError: nothing can be labelled; before anything is loaded.
    """
    # What can be known before a weight is read
    check_sampling(temperature, max_new_tokens, greedy=False)
    if candidates < 2:
        raise UserError(f"--candidates {candidates}: must be 2 or more, of which two are shown.")
    info = inspect_run(policy, base=base)
    share(info.folder)
    if choose == "uncertain" and info.reward is None:
        raise UserError(
            f"--choose uncertain asks the reward model, and {policy} has none. Use --choose random."
        )
    texts = _prompts(info, prompts, max_new_tokens or info.response_tokens)
    file = ChoiceFile(out)

    session = PolicySession(info, temperature=temperature, max_new_tokens=max_new_tokens)
    name = next(name for name, role in info.roles.items() if role == "policy")

    def make(number: int) -> tuple[SampledReply, SampledReply] | None:
        # A seed a prompt: a pair is the same in whichever order, and process, it is made
        own_seed = seed * 1_000_003 + number
        return choose_two(
            session.reply(name, texts[number], seed=own_seed, count=candidates),
            choose,
            random.Random(own_seed),
        )

    return LabelQueue(texts, make, file, policy=file_sha256(info.folder / ADAPTER_WEIGHTS)[:12], seed=seed)


def _prompts(info: RunInfo, name: str, response_tokens: int) -> list[Prompt]:
    """Return the prompts that fit the run's limit, and check that they fit the base's context."""
    limit = info.settings.get("max_prompt_tokens", PPOConfig.max_prompt_tokens)
    rows = tokenize_prompts(load_rows(name, stage="ppo"), info.tokenizer, name=name, max_prompt_tokens=limit)
    info.check(tokens=max(map(len, rows["input_ids"])) + response_tokens)
    return list(rows["prompt"])
