"""Decoding with a cache of fixed size, whose steps a GPU replays as one CUDA graph.

A token of a model with 28 layers is some 1,700 operators, each of which Python launches. With
transformers' static cache the shapes of all steps are the same, so that ``torch.compile`` (mode
reduce-overhead) records them once, and a step is one launch.
"""

import logging
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig

from goose_lora.errors import UserError
from goose_lora.models.dense_copy import DenseCopy, whole_columns, why_not_compiled

logger = logging.getLogger(__name__)

RolloutCompile = Literal["auto", "off"]
Rolled = TypeVar("Rolled")

# Compiling takes a minute or more, and a step is some 20 ms shorter (an estimate from its launches;
# not measured): fewer steps would not earn it.
WORTH_STEPS = 10_000


class StaticCache:
    """The settings of ``generate`` under which each step has the shapes of the one before.

    Args:
        compile_config: how steps are compiled; None for the cache alone. The default's graphs are
            those of CUDA.

    Attributes:
        columns: tokens of the cache; it grows to the longest rollout so far.
        serves: whether a rollout could be made with it; None before the first.
    """

    def __init__(self, compile_config: CompileConfig | None = None):
        self.compile_config = compile_config
        self.columns = 0
        self.serves: bool | None = None  # None until a rollout has been tried with it

    def apply_to(self, settings: GenerationConfig, columns: int) -> None:
        """Set what ``generate`` needs to write ``columns`` tokens, prompt and reply together."""
        self.columns = max(self.columns, whole_columns(columns))
        settings.update(
            cache_implementation="static",
            max_cache_len=self.columns,
            compile_config=self.compile_config,
            disable_compile=self.compile_config is None,
        )

    def try_first(self, make: Callable[["StaticCache | None"], Rolled]) -> Rolled:
        """Return what ``make`` makes with this cache, or without where the first time has failed.

        The cause is told, and the random numbers that it has drawn are drawn again.
        """
        if self.serves is not None:
            return make(self if self.serves else None)
        cuda = torch.cuda.is_initialized()
        states: tuple[Tensor, list[Tensor]] = torch.get_rng_state(), []
        if cuda:
            states = states[0], torch.cuda.get_rng_state_all()
        try:
            made = make(self)
        except (torch.OutOfMemoryError, UserError):
            raise
        # Whatever compilers, drivers and libraries raise: the rollout can be made without them
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            logger.warning(
                "rollouts go on with a growing cache and without CUDA graphs: compiling failed (%s: %s)."
                " rollout_compile: off leaves it out.",
                type(error).__name__,
                first_line,
            )
            self.serves = False
            torch.set_rng_state(states[0])
            if cuda:
                torch.cuda.set_rng_state_all(states[1])
            return make(None)
        self.serves = True
        return made


def make_static_cache(
    dense: DenseCopy | None, wanted: RolloutCompile, device: torch.device, *, steps: int
) -> StaticCache | None:
    """Return the cache of compiled rollouts; None where they are not compiled, of which CUDA tells.

    Args:
        dense: what writes the replies, where it is a dense copy.
        device: where it stands.
        steps: of decoding in the whole run.
    """
    if wanted == "off" or device.type != "cuda":
        return None
    why = why_not(dense, steps)
    if why is not None:
        logger.warning("rollouts are not compiled to CUDA graphs: %s", why)
        return None
    return StaticCache(CompileConfig(mode="reduce-overhead", dynamic=False))


def why_not(dense: DenseCopy | None, steps: int) -> str | None:
    """Say why replies of ``dense`` are not compiled; None where they are."""
    if dense is None:
        return "they are written by the shared weights, not by a dense copy (rollout_weights)"
    why = why_not_compiled(dense.model)
    if why is None and steps < WORTH_STEPS:
        return f"the run has {steps} steps of decoding, and compiling is worth it from {WORTH_STEPS}"
    return why
