"""Decisions on memory that the trainer makes and the memory plan foresees, as pure functions.

Two more stand beside what they decide on: ``models.dense_copy.takes_dense_copy`` and
``models.trunk.captured_depth``.
"""

from collections.abc import Callable
from typing import Literal

from goose_lora.models.dense_copy import SHARE_OF_FREE_MEMORY

TrunkMemory = Literal["auto", "device", "host"]
# Replies generated and scored at a time where nothing was planned, and as many as are tried where
# a rollout has fewer: others calibrate scores, or evaluate.
USUAL_GROUP = 64


def largest_group(fits: Callable[[int], bool], *, replies: int) -> int:
    """Return how many replies are generated and scored at a time, of a rollout of ``replies``.

    All of them, or the largest power of two with which ``fits`` holds; 1 where it holds for none.
    Powers of two, so that a little more or less of free memory changes nothing.
    """
    most = max(replies, USUAL_GROUP)
    sizes = {replies, *(2**power for power in range(most.bit_length()))}
    return next((size for size in sorted(sizes, reverse=True) if fits(size)), 1)


def waits_on_host(where: TrunkMemory, *, need: float, free: float) -> bool:
    """Return whether the states of a rollout wait for the update in the host's memory.

    Args:
        where: the setting ``trunk_memory``.
        need: bytes of the states.
        free: bytes that are free on the device. ``auto`` takes the host where the states need more
            than half of them.
    """
    # Half of what is free is left for the update's activations.
    return where == "host" or (where == "auto" and need > SHARE_OF_FREE_MEMORY * free)


def scoring_keeps_graph(
    *,
    replies: int,
    microbatch_rows: int,
    group_rows: int,
    max_tokens: int | None,
    pretraining: bool,
) -> bool:
    """Return whether scoring makes the first forward pass of the update, and keeps its graph.

    No weight changes between the two, so one pass serves both where the first optimizer step takes
    the whole rollout at once.

    Args:
        replies: of the rollout, on this process.
        microbatch_rows: rows of a microbatch of the update.
        group_rows: replies that are scored at a time.
        max_tokens: the bound on a microbatch's tokens; with one, the update cuts its own parts.
        pretraining: whether the update reads pretraining text besides.
    """
    # A rollout that is scored in several groups, or learned from in several parts, has no pass that
    # serves both; nor has one whose update reads pretraining text besides.
    one_pass = replies <= min(microbatch_rows, group_rows)
    return one_pass and max_tokens is None and not pretraining
