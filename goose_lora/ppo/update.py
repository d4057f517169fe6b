"""The passes through the base that an update takes: as few as there need be, and as small as the
memory wants them."""

import logging
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from goose_lora.generation.rollout import Rollout
from goose_lora.models.role_outputs import PolicyAndValue
from goose_lora.ppo.collector import Evaluated, Rollouts
from goose_lora.ppo.memory_rules import scoring_keeps_graph
from goose_lora.ppo.microbatches import halves, padded_tokens, within

logger = logging.getLogger(__name__)


class Passes:
    """The part of ``PPOTrainer`` that runs them.

    Where the first optimizer step takes the whole rollout at once, its forward pass is the one that
    scoring has made already, since no weight has
    changed between them: scoring keeps its graph. Not in the very first rollout, whose two passes
    are compared (``gates.check_ratio``).
    """

    args: Any
    state: Any
    shared: Any
    rollouts: Rollouts
    accelerator: Any
    ptx_dataset: Any
    _update_metrics: Any
    # Share of its microbatch's rows in the part that is computed, and whether it carries
    # pretraining text
    _part: tuple[float, bool] = (1.0, True)
    _fewer_tokens: int | None = None  # after the memory was short
    _first_output: PolicyAndValue | None = None

    @property
    def _most_tokens(self) -> int | None:
        return self.args.max_tokens_per_microbatch if self._fewer_tokens is None else self._fewer_tokens

    def _ask_the_roles(self, rollout: Rollout, *, score: bool) -> Evaluated:
        """What the roles say of a rollout, with the graph of policy and critic where the update
        goes on from it."""
        whole = scoring_keeps_graph(
            replies=len(rollout.ended),
            microbatch_rows=self.args.per_device_train_batch_size,
            group_rows=self.rollouts.batch_size,
            max_tokens=self._most_tokens,
            pretraining=self.ptx_dataset is not None,
        )
        if not whole or self.state.global_step == 0 or self.accelerator.num_processes > 1:
            return self.rollouts.evaluate(rollout, score=score)
        # As for the other passes of the update, also in a run's first rollout after a checkpoint
        self.shared.train()
        try:
            seen = self.rollouts.evaluate(rollout, score=score, keep_graph=True)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not should_reduce_batch_size(error):
                raise
            self._go_on_with_half(rollout.attention_mask.numel())
            return self.rollouts.evaluate(rollout, score=score)
        self._first_output = seen.output
        return seen

    def _take_first_output(self) -> PolicyAndValue | None:
        output, self._first_output = self._first_output, None
        return output

    def _learn(
        self, model: nn.Module, microbatch: dict[str, Tensor], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Gradients of one microbatch, in parts where it would be too large; out of memory, the
        parts are halved from then on."""
        loss = torch.zeros((), device=self.args.device)
        rows, carries_ptx = len(microbatch["input_ids"]), True
        parts = [microbatch] if self._first_output is not None else within(microbatch, self._most_tokens)
        while parts:
            part = parts.pop(0)
            before = {
                name: p.grad if p.grad is None else p.grad.clone()
                for name, p in self.shared.named_parameters()
                if p.requires_grad
            }
            metrics = dict(self._update_metrics)
            self._part = (len(part["input_ids"]) / rows, carries_ptx)
            try:
                with self.accelerator.no_sync(model) if parts else nullcontext():
                    trainer: Any = super()
                    loss = loss + trainer.training_step(model, part, num_items_in_batch)
                carries_ptx = False
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if (
                    not should_reduce_batch_size(error)
                    or len(part["input_ids"]) == 1
                    or self.accelerator.num_processes > 1
                ):
                    raise
                for name, parameter in self.shared.named_parameters():
                    parameter.grad = before.get(name)
                self._update_metrics = defaultdict(float, metrics)
                parts = [*halves(part), *parts]
                self._go_on_with_half(padded_tokens(part))
        return loss

    def _go_on_with_half(self, tokens: int) -> None:
        self._fewer_tokens = tokens // 2
        logger.warning(
            "out of memory with a microbatch of %d tokens: going on with parts of %d. Set"
            " max_tokens_per_microbatch to that.",
            tokens,
            tokens // 2,
        )
        clear_device_cache(garbage_collection=True)
