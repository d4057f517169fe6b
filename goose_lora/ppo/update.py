"""The update: microbatch after microbatch of a rollout, each with one forward and backward pass.

There are as few passes as there need be, and each is as small as the memory wants it.
"""

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from jaxtyping import Bool, Float
from torch import Tensor, nn

import goose_lora.functional as F
from goose_lora.generation.rollout import Rollout
from goose_lora.models.role_outputs import PolicyAndValue
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo.collector import RoleOutputs, RolloutCollector
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.experience import Experience, ExperienceMaker
from goose_lora.ppo.first_step_checks import FirstStepChecks
from goose_lora.ppo.loss import leaves_bounds, total_loss, unless
from goose_lora.ppo.memory_rules import scoring_keeps_graph
from goose_lora.ppo.metrics import RunMetrics
from goose_lora.ppo.microbatches import Microbatch, split_by_tokens, split_in_two
from goose_lora.ppo.processes import summed
from goose_lora.ppo.sampler import PretrainingTexts

logger = logging.getLogger(__name__)

Gradients = list[tuple[nn.Parameter, Tensor]]


class Updater:
    """Deals out the microbatches of a rollout, and learns from each.

    Where the first optimizer step takes the whole rollout at once, its forward pass is the one that
    scoring has made already, since no weight has changed between them: scoring keeps its graph. Not
    in the very first rollout, whose two passes are compared (``first_step_checks.check_ratio``).

    Args:
        texts: pretraining texts for ``ptx_coef``, if the loss has that term.
    """

    def __init__(
        self,
        shared: SharedBase,
        args: PPOConfig,
        accelerator: Accelerator,
        *,
        collector: RolloutCollector,
        experience: ExperienceMaker,
        checks: FirstStepChecks,
        metrics: RunMetrics,
        texts: PretrainingTexts | None,
    ):
        self.shared, self.args, self.accelerator = shared, args, accelerator
        self.collector, self.experience = collector, experience
        self.checks, self.metrics, self.texts = checks, metrics, texts
        self._left: Iterator[Microbatch] = iter(())
        self._rollout_is_new = False  # no pass of the update has been compared with it
        # Of the step's pretraining text, in the part that was read last
        self._text_share: Float[Tensor, ""] = torch.zeros(())
        self._training: list[nn.Parameter] | None = None
        self._max_tokens = args.max_tokens_per_microbatch  # fewer after the memory was short

    # ---- Scoring, whose forward pass may be the update's first ----

    def ask_roles(self, rollout: Rollout, *, score: bool, step: int) -> RoleOutputs:
        """Return what the roles say of a rollout, with the graph that the update goes on from."""
        if not self.goes_on_from_scoring(rollout, step=step):
            return self.collector.evaluate(rollout, score=score)
        # As for the other passes of the update, also in a run's first rollout after a checkpoint
        self.shared.train()
        try:
            return self.collector.evaluate(rollout, score=score, keep_graph=True)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not should_reduce_batch_size(error):
                raise
        # After the except: the error's traceback held the graph of the pass
        self._go_on_with_half(rollout.attention_mask.numel())
        return self.collector.evaluate(rollout, score=score)

    def goes_on_from_scoring(self, rollout: Rollout, *, step: int) -> bool:
        """Return whether the update's first pass over a rollout is the one that scores it."""
        # In the first step of all the two passes are compared; with several processes,
        # DistributedDataParallel has to see the forward pass itself.
        one_pass = scoring_keeps_graph(
            replies=len(rollout.ended),
            microbatch_rows=self.args.per_device_train_batch_size,
            group_rows=self.collector.batch_size,
            max_tokens=self._max_tokens,
            pretraining=self.texts is not None,
        )
        return one_pass and step > 0 and self.accelerator.num_processes == 1

    # ---- Microbatches ----

    def next_microbatch(self, collect: Callable[[], Experience]) -> Microbatch:
        """Return the next microbatch; ``collect`` makes a rollout where the last is used up."""
        microbatch = next(self._left, None)
        if microbatch is None:
            self._left = self._microbatches(collect())
            self._rollout_is_new = True
            microbatch = next(self._left)
        return microbatch

    def _microbatches(self, experience: Experience) -> Iterator[Microbatch]:
        """Yield the microbatches of all passes over a rollout."""
        for _ in range(self.args.num_ppo_epochs):
            yield from experience.microbatches(
                self.args.per_device_train_batch_size,
                self.args.gradient_accumulation_steps,
                mean_tokens=self._mean_over_processes,
            )

    def _mean_over_processes(self, tokens: Tensor) -> Tensor:
        return summed(self.accelerator, tokens) / self.accelerator.num_processes

    # ---- One microbatch ----

    def learn(
        self, model: nn.Module, microbatch: Microbatch, one_pass: Callable[[Microbatch], Tensor]
    ) -> Tensor:
        """Add the gradients of a microbatch, in parts where it would be too large.

        Out of memory, a part is halved, and so are all that come after it.

        Args:
            one_pass: forward and backward of a part; returns its loss.

        Returns:
            The loss of the whole microbatch.
        """
        loss = torch.zeros((), device=self.args.device)
        # A pass that was made already is of the microbatch as it is.
        parts = [microbatch]
        if microbatch.output is None:
            parts = split_by_tokens(microbatch, self._max_tokens)
        while parts:
            part = parts.pop(0)
            alone = len(part) == 1 or self.accelerator.num_processes > 1
            gradients: Gradients = []
            totals = self.metrics.of_updates()
            if not alone:
                gradients = self._set_aside()
            try:
                # Only the last part's backward has to meet the other processes.
                with self._unsynchronised(model, more=bool(parts)):
                    loss = loss + one_pass(part)
                done = True
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if alone or not should_reduce_batch_size(error):
                    raise
                done = False
            if not done:
                # What half a pass has left is taken back, and the part is tried again in two; after
                # the except, since the error's traceback held what the pass had made
                self._drop_gradients()
                self.metrics.restore(totals)
                parts = [*split_in_two(part), *parts]
                self._go_on_with_half(part.padded_tokens)
            self._add(gradients)
        return loss

    def loss(self, model: nn.Module, microbatch: Microbatch, *, step: int) -> Tensor:
        """Return the loss of one part, and add its figures to the metrics."""
        args = self.args
        output = microbatch.take_output()
        microbatch = microbatch.to(args.device)
        if output is None:
            output = self._forward(model, microbatch, step=step)

        # The first pass of all over a rollout gives the log-probabilities that it was made with.
        if self._rollout_is_new:
            self._rollout_is_new = False
            old, mask = microbatch.old_logprobs, microbatch.response_mask
            self.checks.ratio(output.logprobs, old, mask, step=step)
            self._note_gap(output.logprobs, old, mask)

        # Where its ratio has left all bounds, the loss is 0 on a path that has no infinity.
        skipped = None
        if args.ratio_threshold is not None:
            skipped = leaves_bounds(output, microbatch, args.ratio_threshold)
            output = unless(skipped, output, microbatch)
        values = output.values
        if values is not None:
            values = self.experience.values(values)
        price = self.experience.charged_kl_coef
        loss, stats = total_loss(output, microbatch, values, args, kl_coef=price)
        stats = {name: value.detach() for name, value in stats.items()}

        # A part whose ratio has left all bounds moves nothing, and figures are means over the rest:
        # on another process it may stay within them, and the figures of both are averaged.
        if skipped is not None:
            loss = torch.where(skipped, 0.0, loss)
            self._leave_out(stats, microbatch, skipped)
            stats = {name: torch.where(skipped, 0.0, value) for name, value in stats.items()}
            stats["policy/skipped"] = microbatch.share * skipped.float() / args.gradient_accumulation_steps
        self.metrics.add_update(stats)
        return loss

    def _leave_out(self, stats: Collection[str], microbatch: Microbatch, skipped: Bool[Tensor, ""]) -> None:
        """Take a part that is skipped out of the means: its tokens, or its pretraining text."""
        tokens = microbatch.response_mask.sum() / microbatch.num_tokens
        shares = {name: self._text_share if name == "loss/ptx" else tokens for name in stats}
        self.metrics.leave_out({name: skipped * share for name, share in shares.items()})

    def _note_gap(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> None:
        """Note how far old and new log-probabilities are apart, in nats per token."""
        gaps = F.masked_sum((logprobs.detach() - old_logprobs).abs(), mask)
        gap, tokens = summed(self.accelerator, torch.stack([gaps, mask.sum()])).tolist()
        self.metrics.add_to_rollout("policy/first_ratio_gap", gap / tokens)

    def drop_policy_gradients(self) -> None:
        """Leave the policy where it is in this step."""
        # None, not 0: the optimizer passes these by, and Adam's averages and count of steps begin
        # after the warm-up.
        for _, parameter in self.shared.role_parameters("policy"):
            parameter.grad = None

    def _forward(self, model: nn.Module, microbatch: Microbatch, *, step: int) -> PolicyAndValue:
        """Run policy and critic on one part, with its pretraining text."""
        texts = None
        if self.texts is not None and microbatch.reads_texts:
            number = self.metrics.microbatches % self.args.gradient_accumulation_steps
            texts = self.texts.of(step=step, microbatch=number)
            _, mask, tokens = texts
            self._text_share = (mask.sum() - len(mask)) / tokens
        return model(
            microbatch.input_ids,
            microbatch.attention_mask,
            microbatch.response_mask,
            trunk=microbatch.trunk,
            value_trunk=microbatch.value_trunk,
            features=microbatch.features,
            ref_hidden=microbatch.ref_hidden,
            temperature=self.args.temperature,
            entropy_gradient=self.args.entropy_coef > 0,
            ptx=texts,
        )

    def _set_aside(self) -> Gradients:
        """Take the gradients so far off their parameters, so that a pass that fails spoils none.

        Nothing is copied: ``_add`` puts them back on top of what the pass has left.
        """
        aside: Gradients = []
        for parameter in self.training_parameters:
            if parameter.grad is not None:
                aside.append((parameter, parameter.grad))
                parameter.grad = None
        return aside

    def _add(self, gradients: Gradients) -> None:
        both = [(p.grad, before) for p, before in gradients if p.grad is not None]
        for parameter, before in gradients:
            if parameter.grad is None:
                parameter.grad = before
        # One call for all of them
        if both:
            torch._foreach_add_([grad for grad, _ in both], [before for _, before in both])

    def _drop_gradients(self) -> None:
        for parameter in self.training_parameters:
            parameter.grad = None

    @property
    def training_parameters(self) -> list[nn.Parameter]:
        """The parameters that train; the base has hundreds more, which are looked through once."""
        if self._training is None:
            self._training = [p for p in self.shared.parameters() if p.requires_grad]
        return self._training

    def _unsynchronised(self, model: nn.Module, *, more: bool) -> AbstractContextManager:
        """Return the context of a backward pass, after which ``more`` of the microbatch follow."""
        if more:
            return self.accelerator.no_sync(model)
        return nullcontext()

    def _go_on_with_half(self, tokens: int) -> None:
        """Make parts of half the tokens from now on, and say so."""
        self._max_tokens = tokens // 2
        logger.warning(
            "out of memory with a microbatch of %d tokens: going on with parts of %d. Set"
            " max_tokens_per_microbatch to that.",
            tokens,
            tokens // 2,
        )
        clear_device_cache(garbage_collection=True)
