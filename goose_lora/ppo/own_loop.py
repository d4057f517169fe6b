"""A loop of the user's own: ``generate`` replies, score them in any way, and ``step``.

``Trainer.train`` runs in a thread of its own that waits for one rollout after another. So such a
loop has the same optimizer steps, schedules, logs, callbacks and checkpoints as the trainer's: it
is the trainer's. One of the two threads always waits for the other: nothing runs at the same time,
and random numbers come in one order.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from goose_lora.data.tokenization import left_pad
from goose_lora.errors import UserError
from goose_lora.files import is_number
from goose_lora.generation.rollout import Rollout
from goose_lora.generation.stopping import ends_with_stop
from goose_lora.kinds import plain, short
from goose_lora.models.compatibility import require_context
from goose_lora.ppo.collector import RolloutCollector
from goose_lora.rewards.sources import Scores
from goose_lora.training.signals import StopSignals

Ids = Sequence[int] | Tensor
GivenScores = Sequence[float | Ids | Sequence[float]] | Tensor
Masks = Sequence[Sequence[bool] | Tensor]


class GivenRollout(NamedTuple):
    """A rollout that the user has made, and its scores."""

    rollout: Rollout
    scores: Scores


class LoopEnded(Exception):
    """Raised inside the training thread to leave it when the user has finished early."""


class OwnLoop:
    """Runs the training in a thread of its own.

    The thread asks for rollouts by ``take``; the user's thread answers by ``give``.

    Args:
        device: what the thread's CUDA calls go to.
        stop: signals, which reach the user's thread alone; handled from the start of the loop to
            its end.
    """

    def __init__(self, device: torch.device, stop: StopSignals):
        self.thread: threading.Thread | None = None
        self.ended = False
        self._device = device
        self._stop, self._handled = stop, ExitStack()
        self._asked: queue.SimpleQueue[BaseException | str] = queue.SimpleQueue()
        self._given: queue.SimpleQueue[GivenRollout | LoopEnded] = queue.SimpleQueue()
        self._error: BaseException | None = None

    @property
    def started(self) -> bool:
        """Whether this trainer's loop is the user's."""
        return self.thread is not None

    # ---- In the user's thread ----

    def start(self, train: Callable[[], object]) -> None:
        """Start the training; return when it asks for its first rollout.

        Optimizer, checkpoint and random state are in place then.

        Args:
            train: the whole training; it calls ``take`` whenever it needs a rollout.

        Raises:
            UserError: the loop has been started before.
        """
        if self.started:
            raise UserError("the loop has been started already. Make a new PPOTrainer for another one.")
        # A daemon: a user who leaves the loop without finish is not kept from ending the program.
        self.thread = threading.Thread(
            target=self._run, args=(train,), name="goose_lora training", daemon=True
        )
        self._handled.enter_context(self._stop.handled())
        self.thread.start()
        self._wait()

    def give(self, rollout: GivenRollout | LoopEnded) -> None:
        """Hand over a rollout; return when all its optimizer steps, logs and saves are done.

        Errors of the training are raised here.

        Raises:
            UserError: the training is over.
        """
        if self._error is not None:
            raise UserError(
                f"the training ended by an error, {self._error!r}. Make a new PPOTrainer, and start it from a"
                " checkpoint."
            )
        if self.ended:
            raise UserError(
                "the training is over: max_steps is reached or a callback stopped it. Raise num_rollouts for"
                " a longer run."
            )
        self._given.put(rollout)
        self._wait()

    def finish(self) -> bool:
        """Leave the training where it is; return whether it was under way."""
        under_way = self.started and not self.ended
        if under_way:
            self.give(LoopEnded())
        return under_way

    def _wait(self) -> None:
        """Wait until the training asks for a rollout, or ends."""
        # The answer is "next" where it asks, an error where it broke, and anything else at its end.
        answer = self._asked.get()
        self.ended = answer != "next"
        if self.ended and self.thread is not None:
            self.thread.join()
            self._handled.close()
        if isinstance(answer, BaseException):
            self._error = answer
            raise answer

    # ---- In the training's thread ----

    def check_thread(self) -> None:
        """Check that it is this loop that begins to train.

        Raises:
            UserError: it is anyone else.
        """
        if threading.current_thread() is not self.thread:
            raise UserError(
                "a loop of your own has been started: go on by step, or make a new PPOTrainer for train()."
            )

    def take(self) -> GivenRollout:
        """Return the next rollout that the user gives."""
        self._asked.put("next")
        rollout = self._given.get()
        if isinstance(rollout, LoopEnded):
            raise rollout
        return rollout

    def _run(self, train: Callable[[], object]) -> None:
        try:
            # Each thread has a current device of its own.
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            train()
        except LoopEnded:
            self._asked.put("finished")
        # Whatever it is belongs to the user's thread, which waits for an answer.
        except BaseException as error:
            self._asked.put(error)
        else:
            self._asked.put("finished")


# ---- Lists of tokens and numbers as a rollout and its scores ----


def rollout_of(
    queries: Sequence[Ids],
    responses: Sequence[Ids],
    masks: Masks | None,
    tokenizer: PreTrainedTokenizerBase,
    collector: RolloutCollector,
) -> Rollout:
    """Return token lists as a rollout.

    Args:
        masks: one truth value for each token of each response, whether the policy wrote it; all of
            them, if not given.
        collector: has the stop settings, by which a reply has ended.

    Raises:
        UserError: lists that do not belong together, or a response without a token of the policy's.
    """
    queries = token_lists(queries, "queries", collector.vocabulary)
    responses = token_lists(responses, "responses", collector.vocabulary)
    if masks is None:
        masks = [[True] * len(response) for response in responses]
    masks = _truth_lists(masks)
    _check_samples(queries, responses, masks)
    longest = max(len(query) + len(response) for query, response in zip(queries, responses, strict=True))
    require_context(collector.shared.core, longest)

    # Prompts padded on the left and replies on the right, so that all replies begin in one column.
    device = collector.device
    pad = cast(int, tokenizer.pad_token_id)
    prompt_ids, prompt_mask = left_pad(queries, pad, device)
    width = max(map(len, responses))
    ids = torch.full((len(responses), width), pad)
    attended, counted = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (response, mask) in enumerate(zip(responses, masks, strict=True)):
        ids[row, : len(response)] = torch.as_tensor(response)
        attended[row, : len(response)] = 1
        counted[row, : len(response)] = torch.as_tensor(mask, dtype=torch.bool)

    # What ended a reply is looked for in its last turn alone.
    stops = collector.generation.eos_token_id, collector.stop_strings or ()
    ended = [
        ends_with_stop(tokenizer, last_turn(reply, mask), *stops)
        for reply, mask in zip(ids, counted, strict=True)
    ]
    return Rollout(
        torch.cat([prompt_ids, ids.to(device)], dim=1),
        torch.cat([prompt_mask, attended.to(device)], dim=1),
        counted.to(device),
        torch.tensor(ended, device=device),
    )


def token_lists(given: Sequence[Ids], name: str, vocabulary: int) -> list[list[int]]:
    """Return token ids as lists.

    Raises:
        UserError: no list of such lists, or an id that the vocabulary does not have.
    """
    lists = plain(given)
    if not isinstance(lists, Sequence) or isinstance(lists, str) or len(lists) == 0:
        raise UserError(f"{name}: {short.repr(lists)}: give a list of samples, each a list of token ids.")
    found = []
    for row, ids in enumerate(lists):
        if not isinstance(ids, Sequence) or isinstance(ids, str):
            raise UserError(
                f"{name}: sample {row} is {short.repr(ids)}. Give token ids: tokenizer(text)['input_ids']."
            )
        wrong = [token for token in ids if type(token) is not int or not 0 <= token < vocabulary]
        if wrong:
            raise UserError(
                f"{name}: sample {row} has {short.repr(wrong[0])}, which is no token id: they go from 0 to"
                f" {vocabulary - 1}. Use the base's tokenizer."
            )
        found.append(list(ids))
    return found


def _truth_lists(masks: Masks) -> list[list[bool]]:
    """Return masks as lists of truth values; raises as ``rollout_of``."""
    lists = plain(masks)
    found = []
    for row, mask in enumerate(lists if isinstance(lists, list) else [lists]):
        if not isinstance(mask, list) or not all(counts in (0, 1) for counts in mask):
            raise UserError(
                f"response mask {row} is {short.repr(mask)}. Give a list of one truth value for each token."
            )
        found.append([bool(counts) for counts in mask])
    return found


def _check_samples(queries: Sequence[Ids], responses: Sequence[Ids], masks: Masks) -> None:
    """Raise as ``rollout_of``."""
    if not len(queries) == len(responses) == len(masks):
        raise UserError(
            f"{len(queries)} queries, {len(responses)} responses and {len(masks)} response masks: give one of"
            " each a sample."
        )
    for row, (query, response, mask) in enumerate(zip(queries, responses, masks, strict=True)):
        if len(query) == 0 or len(response) != len(mask) or not any(mask):
            raise UserError(
                f"sample {row}: {len(query)} query tokens, {len(response)} response tokens, {len(mask)} in"
                f" its mask, {int(sum(mask))} of them the policy's. A query has a token or more, a mask one"
                " truth value for each response token, and the policy wrote one or more of them."
            )


def last_turn(reply: Int[Tensor, " T"], mask: Bool[Tensor, " T"]) -> list[int]:
    """Return the last tokens in a row that count.

    A stop text of an earlier turn is not this one's, and none stands across two.
    """
    # From behind the last hole to the last token that counts
    last = int(mask.nonzero()[-1])
    holes = (~mask[:last]).nonzero().flatten().tolist()
    first = holes[-1] + 1 if holes else 0
    return reply[first : last + 1].tolist()


def scores_of(scores: GivenScores, rollout: Rollout) -> Scores:
    """Return the user's scores: a number a reply, or one for each token of each response.

    What is given for a token that the policy did not write counts for the token before it that the
    policy wrote, or for its first.

    Raises:
        UserError: not one score a reply, not one number a response token, or a number that is not
            finite.
    """
    mask = rollout.response_mask
    given = plain(scores)
    if not isinstance(given, list) or len(given) != len(mask):
        count = len(given) if isinstance(given, list) else short.repr(given)
        raise UserError(
            f"{count} scores for {len(mask)} responses; give one number, or one list of numbers, a response."
        )
    # Scores are given for each token of a response, others' tokens in it included.
    lengths = rollout.attention_mask[:, rollout.prompt_tokens :].sum(-1).tolist()
    by_token = torch.zeros(mask.shape)
    dense = False
    for row, (score, length) in enumerate(zip(given, lengths, strict=True)):
        if not all(map(_is_score, score if isinstance(score, list) else [score])):
            raise UserError(f"score {row} is {short.repr(score)}; give a finite number, or one a token.")
        numbers = torch.as_tensor(score, dtype=torch.float32, device="cpu")
        of_tokens = numbers.dim() > 0
        fits = numbers.dim() <= 1 and numbers.numel() == (length if of_tokens else 1)
        if not fits or not numbers.isfinite().all():
            raise UserError(
                f"score {row} has the shape {tuple(numbers.shape)} for {length} response tokens; give a"
                " finite number, or one a token."
            )
        dense = dense or of_tokens

        # Each number goes to the last token of the policy's up to its place.
        places = torch.arange(length) if of_tokens else torch.tensor([length - 1])
        own = mask[row].cpu().nonzero().flatten()
        owner = own[(torch.searchsorted(own, places, right=True) - 1).clamp(min=0)]
        by_token[row].scatter_add_(0, owner, numbers.reshape(-1))
    by_token = by_token.to(mask.device)
    return Scores(by_token.sum(-1), {}, by_token[mask] if dense else None)


def _is_score(score: object) -> bool:
    # Which numbers are finite, and how deep lists are, is looked at as a tensor
    return isinstance(score, float | bool | list) or is_number(score)


def unscored(**replies: object) -> list[float | None]:
    """Raise in place of a source of reward: the trainer's user scores the replies."""
    raise UserError(
        "nothing scores the replies: give SharedBase.build a reward adapter, or PPOTrainer a reward_function."
    )
