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
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from goose_lora.data.tokenization import left_pad
from goose_lora.errors import UserError
from goose_lora.generation.rollout import Rollout
from goose_lora.generation.stopping import ends_with_stop
from goose_lora.rewards.sources import Scores
from goose_lora.training.signals import StopSignals

Ids = Sequence[int] | Tensor


class LoopEnded(Exception):
    """Raised inside the training thread to leave it when the user has finished early."""


class OwnLoop:
    """Runs ``train`` in a thread that asks for rollouts by ``take``; the user's thread answers by
    ``give``.

    Args:
        train: the whole training; it calls ``take`` whenever it needs a rollout.
        device: what the thread's CUDA calls go to.
        stop: signals, which reach the user's thread alone; handled from the start of the loop to
            its end.
    """

    def __init__(self, train: Callable[[], Any], device: torch.device, stop: StopSignals):
        self._train, self._device = train, device
        self._stop, self._handled = stop, ExitStack()
        self._asked: queue.SimpleQueue[BaseException | str] = queue.SimpleQueue()
        self._given: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="goose_lora training", daemon=True)
        self.ended = False
        self._error: BaseException | None = None

    def start(self) -> None:
        """Returns when the training asks for its first rollout: optimizer, checkpoint and random
        state are in place then."""
        self._handled.enter_context(self._stop.handled())
        self._thread.start()
        self._wait()

    def give(self, rollout: Any) -> None:
        """Hand over a rollout; returns when all its optimizer steps, logs and saves are done.
        Errors of the training are raised here."""
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

    def finish(self) -> None:
        """Leave the training where it is, if it has not ended by itself."""
        if not self.ended:
            self.give(LoopEnded())

    def check_thread(self) -> None:
        """Raise ValueError where anyone but this loop begins to train."""
        if threading.current_thread() is not self._thread:
            raise UserError(
                "a loop of your own has been started: go on by step, or make a new PPOTrainer for train()."
            )

    def take(self) -> Any:
        """The next rollout; in the training's thread."""
        self._asked.put("next")
        rollout = self._given.get()
        if isinstance(rollout, LoopEnded):
            raise rollout
        return rollout

    def _wait(self) -> None:
        answer = self._asked.get()
        self.ended = answer != "next"
        if self.ended:
            self._thread.join()
            self._handled.close()
        if isinstance(answer, BaseException):
            self._error = answer
            raise answer

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            self._train()
        except LoopEnded:
            self._asked.put("finished")
        except BaseException as error:
            self._asked.put(error)
        else:
            self._asked.put("finished")


def rollout_of(
    queries: Sequence[Ids],
    responses: Sequence[Ids],
    masks: Sequence[Sequence[bool] | Tensor] | None,
    tokenizer: Any,
    rollouts: Any,
) -> Rollout:
    """Token lists as a rollout. ``masks`` has one truth value for each token of each response:
    whether the policy wrote it.

    Raises:
        ValueError: lists that do not belong together, or a response without a token of the
            policy's.
    """
    masks = [[True] * len(response) for response in responses] if masks is None else masks
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
    device = rollouts.shared.get_base_model().get_output_embeddings().weight.device
    prompt_ids, prompt_mask = left_pad(
        [list(map(int, query)) for query in queries], tokenizer.pad_token_id, device
    )
    width = max(map(len, responses))
    ids = torch.full((len(responses), width), tokenizer.pad_token_id)
    attended, counted = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (response, mask) in enumerate(zip(responses, masks, strict=True)):
        ids[row, : len(response)] = torch.as_tensor(response)
        attended[row, : len(response)] = 1
        counted[row, : len(response)] = torch.as_tensor(mask, dtype=torch.bool)
    stops = rollouts.generation.eos_token_id, rollouts.stop_strings or ()
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


def last_turn(reply: Int[Tensor, " T"], mask: Bool[Tensor, " T"]) -> list[int]:
    """The last tokens in a row that count: a stop text of an earlier turn is not this one's, and
    none stands across two."""
    last = int(mask.nonzero()[-1])
    holes = (~mask[:last]).nonzero()
    return reply[int(holes[-1]) + 1 if len(holes) else 0 : last + 1].tolist()


def scores_of(scores: Sequence[float | Ids | Sequence[float]] | Tensor, rollout: Rollout) -> Scores:
    """The user's scores: a number a reply, or one for each token of each response.

    What is given for a token that the policy did not write counts for the token before it that the
    policy wrote, or for its first.

    Raises:
        ValueError: not one score a reply, not one number a response token, or a number that is not
            finite.
    """
    mask = rollout.response_mask
    if len(scores) != len(mask):
        raise UserError(
            f"{len(scores)} scores for {len(mask)} responses; give one number, or one list of numbers, a"
            " response."
        )
    lengths = rollout.attention_mask[:, rollout.prompt_tokens :].sum(-1).tolist()
    by_token = torch.zeros(mask.shape)
    dense = False
    for row, (score, length) in enumerate(zip(scores, lengths, strict=True)):
        numbers = torch.as_tensor(score, dtype=torch.float32, device="cpu")
        dense = dense or numbers.dim() > 0
        if (
            numbers.dim() > 1
            or (numbers.dim() == 1 and len(numbers) != length)
            or not numbers.isfinite().all()
        ):
            raise UserError(
                f"score {row} has the shape {tuple(numbers.shape)} for {length} response tokens; give a"
                " finite number, or one a token."
            )
        places = torch.arange(length) if numbers.dim() else torch.tensor([length - 1])
        own = mask[row].cpu().nonzero().flatten()
        owner = own[(torch.searchsorted(own, places, right=True) - 1).clamp(min=0)]
        by_token[row].scatter_add_(0, owner, numbers.reshape(-1))
    by_token = by_token.to(mask.device)
    return Scores(by_token.sum(-1), {}, by_token[mask] if dense else None)


def unscored(**replies: Any) -> None:
    """The source of reward of a trainer whose user scores the replies."""
    raise UserError(
        "nothing scores the replies: give SharedBase.build a reward adapter, or PPOTrainer a reward_function."
    )


class UserLoop:
    """The methods of ``PPOTrainer`` for a loop of one's own."""

    _own_loop: OwnLoop | None = None

    def start(self: Any, resume_from_checkpoint: str | bool | None = None) -> int:
        """Begin a loop of your own, or go on with one from a checkpoint (as in ``train``); returns
        how many rollouts are behind it.

        Until the loop ends, SIGINT and SIGTERM are answered after the rollout under way: ``step``
        saves, and raises ``Stopped``. After it ``generate`` and ``step`` draw the random numbers
        that the uninterrupted loop would have drawn.
        """
        if self._own_loop is not None:
            raise UserError("the loop has been started already. Make a new PPOTrainer for another one.")
        self._own_loop = OwnLoop(
            lambda: self.train(resume_from_checkpoint=resume_from_checkpoint), self.args.device, self.stop
        )
        self._own_loop.start()
        return self.state.global_step // self.args.steps_per_rollout

    def generate(self: Any, queries: Sequence[Ids], *, greedy: bool = False) -> list[Tensor]:
        """One reply of the policy as it is now to each query (token ids), sampled or greedy: its
        ids (T,), the token that ends it included."""
        if self._own_loop is None:
            self.start()
        ids, mask = left_pad(
            [list(map(int, query)) for query in queries], self.processing_class.pad_token_id, self.args.device
        )
        return [
            torch.tensor(reply) for reply in self.rollouts.generate(ids, mask, greedy=greedy).response_ids()
        ]

    def score(self: Any, queries: Sequence[Ids], responses: Sequence[Ids]) -> Float[Tensor, " B"]:
        """What the trainer's own sources of reward say of the replies, raw, for a loop that adds to
        it."""
        rollout = rollout_of(queries, responses, None, self.processing_class, self.rollouts)
        return self.rollouts.scores(rollout, {}).total

    def step(
        self: Any,
        queries: Sequence[Ids],
        responses: Sequence[Ids],
        scores: Sequence[float | Ids | Sequence[float]] | Tensor,
        response_masks: Sequence[Sequence[bool] | Tensor] | None = None,
    ) -> dict[str, float]:
        """All optimizer steps of one rollout; returns its figures and, where this step is logged,
        all of that row of ``metrics.jsonl``.

        Args:
            queries, responses: token ids, as many samples as a rollout has
                (``args.rollout_batch_size``). Replies to one prompt stand together where
                ``num_generations`` is above 1.
            scores: a number for each response, or a list with one for each of its tokens.
            response_masks: which tokens of each response the policy wrote. Others, such as a user's
                or a tool's between two replies, are read by the policy and the critic, and are not
                trained on. All, if not given.

        Raises:
            ValueError: another number of samples, or what ``rollout_of`` and ``scores_of`` refuse.
                Nothing has changed then.
        """
        wanted = self.args.rollout_batch_size
        if len(queries) != wanted:
            raise UserError(
                f"{len(queries)} samples for a rollout of {wanted}, which is per_device_train_batch_size *"
                " gradient_accumulation_steps * num_mini_batches. Give so many, or change those."
            )
        rollout = rollout_of(queries, responses, response_masks, self.processing_class, self.rollouts)
        read = scores_of(scores, rollout)
        if self._own_loop is None:
            self.start()
        loop: Any = self._own_loop
        loop.give((rollout, read))
        return self.last_figures

    def finish(self: Any) -> None:
        """End the loop where it is. What was not saved is not saved by it, and the best checkpoint
        is not loaded: call ``save_model``."""
        if self._own_loop is not None and not self._own_loop.ended:
            self._own_loop.finish()
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
