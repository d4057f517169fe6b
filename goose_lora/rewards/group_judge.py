"""A judge of pairs as a source of reward: how many of the other replies to a prompt each beats."""

import asyncio
import threading
from collections.abc import Coroutine, Generator, Sequence
from concurrent.futures import Future
from itertools import combinations, groupby
from pathlib import Path
from typing import NamedTuple

from goose_lora.rewards.pairwise_judge import (
    LEAST_QUESTIONS,
    Comparison,
    PairwiseJudge,
    rubric_text,
    served_model,
)

MOST_WHOLE = 4  # a group of so many replies is compared whole
_NEIGHBOURS = 2  # in a larger one, each reply with so many after it and before it
EVEN = 0.5  # of a reply that was compared with none
Outcomes = list[float | None]


def compared_pairs(count: int) -> list[tuple[int, int]]:
    """Return which of ``count`` replies to a prompt are compared with which.

    Up to four each with all others; more stand in a ring, and each meets its four neighbours: the
    calls then grow with the replies, and not with their square.
    """
    if count <= MOST_WHOLE:
        return list(combinations(range(count), 2))
    return [(place, (place + step) % count) for place in range(count) for step in range(1, _NEIGHBOURS + 1)]


def calls_for(count: int) -> int:
    """Return the most calls for ``count`` replies to a prompt: both orders of each pair."""
    return 2 * len(compared_pairs(count))


class Compared(NamedTuple):
    """What a judge was last asked: pairs of rows, the outcome of each, and the calls it took."""

    pairs: list[tuple[int, int]]
    outcomes: Outcomes
    calls: int

    def shares(self, count: int) -> list[float]:
        """Return of each of ``count`` replies the share of its comparisons that it wins.

        A tie is a half. A pair without an answer is left out, and a reply of which nothing was
        answered has 0.5: that is the mean of all, and any other number would be a verdict.
        """
        # Both replies of a pair share one win
        won, met = [0.0] * count, [0] * count
        for (first, second), outcome in zip(self.pairs, self.outcomes, strict=True):
            if outcome is not None:
                won[first] += outcome
                won[second] += 1 - outcome
                met[first] += 1
                met[second] += 1
        return [wins / times if times else EVEN for wins, times in zip(won, met, strict=True)]

    def agreement(self, scores: Sequence[float]) -> tuple[float, int]:
        """Return in how many decided pairs ``scores`` agree, and how many there are.

        A tie of scores is a half.
        """
        agreeing, decided = 0.0, 0
        for (first, second), outcome in zip(self.pairs, self.outcomes, strict=True):
            if outcome in (0.0, 1.0):
                better, worse = (first, second) if outcome else (second, first)
                decided += 1
                agreeing += 0.5 * ((scores[better] > scores[worse]) + (scores[better] >= scores[worse]))
        return agreeing, decided


class GroupJudge:
    """A source of reward that compares the replies to a prompt with one another.

    A reply's score is the share of the others that it beats, by a judge of pairs: see
    ``compared_pairs``. Rows with equal prompts that stand in a row are replies to one prompt, up to
    ``group_size`` of them; a reply that stands alone has 0.5, and nobody is asked. The mean of all
    scores is 0.5 by its making: what a policy gains is seen where it is compared with another.

    It is called like any async function. Its questions are on their way as soon as it is called, in
    a thread of its own, while others score.
    """

    def __init__(self, judge: PairwiseJudge):
        self.judge = judge
        self.name = judge.name  # other weights, another rubric: another source
        self.__name__ = judge.model.rstrip("/").rpartition("/")[2]
        self.group_size: int | None = None  # a prompt that is drawn twice in a row has two groups
        self.last = Compared([], [], 0)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asking: Future[Outcomes] | None = None

    def __call__(
        self, prompts: Sequence[object], completions: Sequence[str], **columns: object
    ) -> "_Answers | list[float]":
        # Which rows are replies to one prompt, and which of them meet?
        pairs: list[tuple[int, int]] = []
        for _, group in groupby(range(len(prompts)), key=lambda row: prompts[row]):
            same = list(group)
            size = self.group_size or len(same)
            for start in range(0, len(same), size):
                rows = same[start : start + size]
                pairs += [(rows[first], rows[second]) for first, second in compared_pairs(len(rows))]
        if not pairs:
            self.last = Compared([], [], 0)
            return [EVEN] * len(completions)
        # On their way at once; whoever awaits the scores waits for them
        asked = [Comparison(prompts[one], completions[one], completions[other]) for one, other in pairs]
        calls = self.judge.asked.calls
        self._asking = self._start(self.judge.outcomes(asked))
        return _Answers(self, self._asking, pairs, len(completions), calls)

    def cancel(self) -> None:
        """Ask no more of what was asked last; nobody waits for it."""
        if self._asking is not None:
            self._asking.cancel()

    def _start(self, asking: Coroutine[object, object, Outcomes]) -> "Future[Outcomes]":
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            # A daemon: a server that hangs does not keep the program from ending
            threading.Thread(target=self._loop.run_forever, name="goose_lora judge", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(asking, self._loop)


class _Answers:
    """Scores that are waited for: ``await`` gives one a reply."""

    def __init__(
        self,
        source: GroupJudge,
        asking: "Future[Outcomes]",
        pairs: list[tuple[int, int]],
        count: int,
        calls_before: int,
    ):
        self.source, self.asking, self.pairs = source, asking, pairs
        self.count, self.calls_before = count, calls_before

    def __await__(self) -> Generator[object, None, list[float]]:
        return self._scores().__await__()

    async def _scores(self) -> list[float]:
        outcomes = await asyncio.wrap_future(self.asking)
        calls = self.source.judge.asked.calls - self.calls_before
        self.source.last = Compared(self.pairs, outcomes, calls)
        return self.source.last.shares(self.count)


def served_judge(
    name: str, *, base_url: str | None, rubric: str | None, cache: Path, process: int = 0
) -> GroupJudge:
    """Return the source of reward that ``openai:MODEL`` names.

    Answers that were no verdict are kept too, so that a resumed run scores as it did before.

    Raises:
        UserError: as ``rubric_text`` and ``PairwiseJudge``.
    """
    judge = PairwiseJudge(
        served_model(name),
        base_url=base_url,
        rubric=rubric_text(rubric),
        cache=cache,
        process=process,
        keeps_silence=True,
        least_questions=LEAST_QUESTIONS,
        way_on="--resume_from_checkpoint latest goes on from the last checkpoint",
    )
    return GroupJudge(judge)
