"""PPO on a shared base, as a ``transformers.Trainer`` through its public hooks.

Loop, resume, logging and launchers are the library's.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from goose_lora.data.tokenization import left_pad
from goose_lora.errors import UserError
from goose_lora.generation.rollout import Rollout
from goose_lora.generation.sampling import generation_config
from goose_lora.generation.vllm import VLLMEngine
from goose_lora.kinds import require_kind
from goose_lora.models.compatibility import require_context, require_prompts
from goose_lora.models.endings import reply_ends
from goose_lora.models.loading import require_tokenizer_object
from goose_lora.models.roles import ADAPTERS, Role
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo import first_step_checks
from goose_lora.ppo.callbacks import Diagnosis, PolicyAverage, RolloutState, write_samples
from goose_lora.ppo.collector import RolloutCollector
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.evaluation import evaluate_prompts, own_random_numbers, reference_scores
from goose_lora.ppo.experience import Experience, ExperienceMaker
from goose_lora.ppo.first_step_checks import FirstStepChecks
from goose_lora.ppo.judging import calibration_generations, judge_figures, require_groups
from goose_lora.ppo.kl_control import make_kl_control
from goose_lora.ppo.memory_rules import USUAL_GROUP
from goose_lora.ppo.metrics import RunMetrics
from goose_lora.ppo.microbatches import Microbatch
from goose_lora.ppo.own_loop import (
    GivenRollout,
    GivenScores,
    Ids,
    Masks,
    OwnLoop,
    rollout_of,
    scores_of,
    token_lists,
    unscored,
)
from goose_lora.ppo.processes import gathered
from goose_lora.ppo.sampler import (
    GivenPrompts,
    PretrainingTexts,
    PromptBatch,
    PromptCollator,
    RolloutBatches,
    prompt_rows,
    repeated,
)
from goose_lora.ppo.schedules import by_settings
from goose_lora.ppo.trl_names import TRAINER_ARGUMENTS, answers_trl
from goose_lora.ppo.update import Updater
from goose_lora.rewards.scale import ScoreScale, score_scale
from goose_lora.rewards.sources import RewardMix, RewardSource, Scores
from goose_lora.training.callbacks import MetricsFile
from goose_lora.training.checkpoints import Facts, SettingRules
from goose_lora.training.launch import require_one_gpu
from goose_lora.training.resume import Resumable, rows_sha256

logger = logging.getLogger(__name__)


@answers_trl(TRAINER_ARGUMENTS)
class PPOTrainer(Resumable, Trainer):
    """Trains the policy of ``model`` by PPO.

    PPO is that of Schulman et al. 2017, as InstructGPT has it (Ouyang et al. 2022).

    Args:
        model: the shared base, with a critic where ``advantage_estimator`` is gae, and with a
            reward adapter unless ``reward_function`` is given.
        args: settings.
        train_dataset: prompts: texts, lists of chat messages, or rows as the recipe takes them (or
            a table of them, of pandas or a dict of columns), tokenized here; or rows with
            ``input_ids``, from ``data.tokenize_prompts``. Further columns go to the reward
            function. None for a loop of one's own by ``generate`` and ``step``.
        processing_class: the base's tokenizer.
        reward_function: scores in place of the reward adapter; or several in a list, ``"adapter"``
            among them where it has a part. See RewardMix.
        reward_weights: one to each of them; 1 if not given.
        ptx_dataset: rows with ``input_ids`` of pretraining text, from ``data.tokenize_texts``, for
            ``ptx_coef``.
        eval_dataset: held-out prompts like ``train_dataset``, for ``eval_strategy``.

    Attributes:
        collector: generates replies, and asks the roles about them.
        experience: makes advantages of their scores.
        updater: learns from them, microbatch after microbatch.
        checks: those of the first step.
        metrics: the figures since the last log.
        rollout_state: what checkpoints carry of PPO: KL coefficient and scale of scores.
        own_loop: the training in a thread of its own, where the user's loop has been started.
    """

    args: PPOConfig
    train_dataset: Dataset
    eval_dataset: Dataset | None
    processing_class: PreTrainedTokenizerBase
    loss_is_scaled_for_ga = True  # compute_loss divides by the token count of the whole optimizer step

    def __init__(
        self,
        model: SharedBase,
        args: PPOConfig,
        train_dataset: GivenPrompts | None,
        processing_class: PreTrainedTokenizerBase,
        *,
        eval_dataset: GivenPrompts | None = None,
        reward_function: RewardSource | Sequence[RewardSource] | None = None,
        reward_weights: Sequence[float] | None = None,
        ptx_dataset: Dataset | None = None,
        **kwargs: Any,
    ):
        # 1. What does not go together is refused before anything is set up.
        _require_parts(model, args, processing_class)
        alone = train_dataset is None and not model.has("reward")
        sources = _sources(reward_function, default=unscored if alone else "adapter")
        reward = RewardMix(sources, reward_weights, timeout=args.reward_timeout)
        require_groups(reward, args)
        for judge in reward.judges.values():
            judge.group_size = args.num_generations
        if reward.needs_adapter and not model.has("reward"):
            raise UserError(
                "nothing scores the replies: give SharedBase.build a reward adapter, or PPOTrainer a"
                " reward_function."
            )
        first_step_checks.check_roles(model, args)
        require_one_gpu(args)
        if args.push_to_hub:
            self.push_to_hub()
        _require_texts(args, ptx_dataset)

        # 2. The library's trainer, and what is called back by it.
        self.has_prompts = train_dataset is not None
        rows = partial(prompt_rows, tokenizer=processing_class, max_prompt_tokens=args.max_prompt_tokens)
        train_rows = _unread_rows(args, processing_class)
        if train_dataset is not None:
            train_rows = rows(train_dataset, name="train_dataset")
        eval_rows = None if eval_dataset is None else rows(eval_dataset, name="eval_dataset")
        require_prompts(
            model.core,
            processing_class,
            {"train_dataset": train_rows, "eval_dataset": eval_rows},
            args.response_length,
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            **kwargs,
        )
        self.rollout_state = RolloutState(
            make_kl_control(args.kl_coef, target=args.kl_target, horizon=args.kl_horizon)
        )
        for callback in (self.rollout_state, MetricsFile(), Diagnosis()):
            self.add_callback(callback)
        if args.ema_decay is not None:
            self.add_callback(PolicyAverage(model, args.ema_decay))

        # 3. The parts of a step: each owns what it keeps from one step to the next.
        pad = cast(int, processing_class.pad_token_id)
        self.collate = PromptCollator(pad)
        rollouts = args.rollouts(len(self.train_dataset))
        self.collector = _collector(model, args, processing_class, reward, rollouts=rollouts)
        # Other sources have a scale of their own
        in_units_of_scores = model.values_are_scores and reward.needs_adapter
        self.experience = ExperienceMaker(
            args, self.rollout_state, self.accelerator, values_are_scores=in_units_of_scores
        )
        self.checks = FirstStepChecks(model)
        self.metrics = RunMetrics(self.accelerator, microbatches_per_step=args.gradient_accumulation_steps)
        texts, self.ptx_dataset = None, ptx_dataset
        if ptx_dataset is not None:
            texts = PretrainingTexts(
                ptx_dataset,
                batch_size=args.ptx_batch_size,
                microbatches=args.gradient_accumulation_steps,
                seed=args.seed,
                process=self.accelerator.process_index,
                processes=self.accelerator.num_processes,
                pad_token_id=pad,
                device=args.device,
            )
        self.updater = Updater(
            model,
            args,
            self.accelerator,
            collector=self.collector,
            experience=self.experience,
            checks=self.checks,
            metrics=self.metrics,
            texts=texts,
        )
        self.own_loop = OwnLoop(args.device, self.stop)

    @property
    def stage(self) -> str:  # type: ignore[override]
        """The name of the stage in checkpoints and lineage."""
        return "ppo" if self.has_prompts else "own_loop"

    @property
    def resume_rules(self) -> SettingRules:  # type: ignore[override]
        """Return which settings a resumed run may have otherwise."""
        return self.args.resume_rules

    def made_of(self) -> dict[str, str]:
        """Add what scores the replies, with its weight, and the pretraining texts."""
        # The rows of the latter are hashed once, as all rows are
        if self._made_of is None and self.ptx_dataset is not None:
            super().made_of()["pretraining texts' content"] = rows_sha256(self.ptx_dataset)
        return {**super().made_of(), **self.collector.reward.made_of()}

    def chosen(self) -> Facts:
        """Return by which groups and weights replies are written: they depend on both."""
        return self.collector.chosen

    def keep(self, chosen: Facts) -> None:
        """Go on with the groups and the weights of the checkpoint's run."""
        self.collector.keep(chosen)

    unit = "rollout"
    forwards_in_dtype = True

    @property
    def steps_between_resumable(self) -> int:  # type: ignore[override]
        """Optimizer steps of a rollout: only between rollouts can a run go on exactly."""
        return self.args.steps_per_rollout

    @property
    def shared(self) -> SharedBase:
        """The ``SharedBase`` inside what accelerate may have wrapped around it."""
        return cast(SharedBase, self.accelerator.unwrap_model(self.model))

    @property
    def critic_warms_up(self) -> bool:
        """Whether the critic alone learns in this step."""
        return self.state.global_step < self.args.critic_warmup_steps

    # ---- Public hooks of Trainer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return an optimizer with policy and critic as two groups, each with its learning rate.

        Overridden since Trainer has one group, and since resuming leaves inactive adapters frozen:
        they are marked first.
        """
        if self.optimizer is None:
            # Trainer has set one seed for all: without this, all processes would sample alike.
            set_seed(self.args.seed, device_specific=True)
            # All that trains is marked, and nothing else may train.
            shared = self.shared
            roles = shared.role_plan.training
            shared.set_trainable(roles)
            groups = [list(shared.training_parameters(role)) for role in roles]
            expected = [name for group in groups for name, _ in group]
            first_step_checks.check_trainable(shared.named_parameters(), expected)

            # Two groups, which two schedules can move apart.
            rates = (self.args.learning_rate, self.args.critic_learning_rate)[: len(roles)]
            with_rates = [
                {"params": [parameter for _, parameter in group], "lr": rate}
                for group, rate in zip(groups, rates, strict=True)
            ]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(
                self.args, cast(PreTrainedModel, shared)
            )
            self.optimizer = optimizer_class(with_rates, weight_decay=self.args.weight_decay, **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """Return the library's schedule, unless policy and critic go by different ones."""
        if not self.args.has_two_schedules:
            return super().create_scheduler(num_training_steps, optimizer)
        # By this mark Trainer knows it for one that belongs to a single training.
        if self.lr_scheduler is None:
            self.lr_scheduler = by_settings(self.args, optimizer or self.optimizer, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader:
        """Return each batch of prompts once for every microbatch that is made of its rollout.

        A rollout has ``num_generations`` replies to each.
        """
        if self.own_loop.started:
            self.own_loop.check_thread()
        elif not self.has_prompts:
            raise UserError("there is no train_dataset: give PPOTrainer one, or go on by generate and step.")
        # Trainer counts batches: so each batch of prompts comes as often as its rollout has
        # microbatches, and all but the first of them are passed over.
        args = self.args
        batches = RolloutBatches(
            len(self.train_dataset),
            args.rollout_batch_size // args.num_generations,
            repeat=args.steps_per_rollout * args.gradient_accumulation_steps,
            seed=args.seed,
            num_processes=self.accelerator.num_processes,
        )
        rows = cast(torch.utils.data.Dataset, self.train_dataset)
        return self.accelerator.prepare(DataLoader(rows, batch_sampler=batches, collate_fn=self.collate))

    def training_step(
        self, model: nn.Module, inputs: PromptBatch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Learn from the next microbatch; collect a rollout first where the last is used up.

        Overridden since a batch of Trainer is a batch of prompts here, from which microbatches are
        made.
        """
        # A rollout lasts for several calls of this; the prompts are read by the first of them.
        step = self.state.global_step
        microbatch = self.updater.next_microbatch(partial(self.collect, inputs))
        # What Trainer calls its inputs goes through to compute_loss as it is: a microbatch.
        one_pass = cast(
            Callable[[Microbatch], Tensor],
            partial(super().training_step, model, num_items_in_batch=num_items_in_batch),
        )
        # Forward and backward; the step of the optimizer is Trainer's.
        with self.metrics.timed("update"):
            loss = self.updater.learn(model, microbatch, one_pass)
        # Gradients are checked before any is dropped.
        self.checks.gradients(step=step, scaled=self.accelerator.scaler is not None)
        if self.critic_warms_up:
            self.updater.drop_policy_gradients()
        self.metrics.microbatches += 1
        # Trainer adds it up: one that is not finite would be all that is logged from then on
        return torch.where(loss.isfinite(), loss, 0.0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Microbatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the clipped PPO loss of a microbatch, or of a part of it.

        Overridden since the loss is PPO's: a mean over the response tokens of the optimizer step,
        to which microbatches and processes add up.
        """
        return self.updater.loss(model, inputs, step=self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log besides what rollouts and updates since the last log have shown on all processes."""
        # An evaluation has a log of its own, in the middle of what is gathered here.
        of_evaluation = any(name.startswith("eval_") for name in logs)
        if self.metrics.microbatches and not of_evaluation:
            skipped = {"policy/not_finite": self.finite.skipped / self.metrics.steps}
            logs.update(self.metrics.take() | skipped)
            self.finite.skipped = 0
            self.metrics.latest |= logs
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Answer the first ``num_eval_prompts`` held-out prompts, and score the replies.

        Each prompt has a sampled and a greedy reply. ``eval_objective`` is the sampled replies'
        score less ``kl_coef`` (that of the settings, also where it adapts) times their KL, and what
        the best checkpoint and early stopping go by; scores are counted in the scale of the first
        evaluation. Training draws the random numbers that it would have drawn without.

        Raises:
            UserError: there are no held-out prompts.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise UserError(
                "there is nothing to evaluate on: give PPOTrainer an eval_dataset, or evaluate one."
            )
        # The same prompts in the same scale each time, so that evaluations can be compared.
        rows = rows.select(range(min(self.args.num_eval_prompts, len(rows))))
        if self.rollout_state.evaluation_scale is None:
            self.rollout_state.evaluation_scale = tuple(self._evaluation_scale(rows))
        figures = evaluate_prompts(
            self.collector,
            self.accelerator,
            rows,
            self.collate,
            scale=ScoreScale(*self.rollout_state.evaluation_scale),
            seed=self.args.seed,
        )
        # What the run is after: a score that is not paid for in KL.
        figures["objective"] = figures["score"] - self.args.kl_coef * figures["kl"]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def load_best(self, checkpoint: Path) -> None:
        """Load critic and average of the best checkpoint too.

        Overridden since Trainer loads the policy alone, and what was trained with it belongs to the
        same step.
        """
        trained: tuple[Role, ...] = ("value", "ema")
        roles: list[Role] = [role for role in trained if self.shared.has(role)]
        for role in roles:
            self.shared.load_role(role, checkpoint / ADAPTERS[role])
        if self.is_world_process_zero():
            logger.warning(
                "the run ends with %s of %s (%s %.4g).",
                ", ".join(["policy", *roles]),
                checkpoint,
                self.args.metric_for_best_model,
                self.state.best_metric,
            )

    def push_to_hub(self, *args: object, **kwargs: object) -> str:
        """Refuse: Trainer would upload more than the result.

        Raises:
            UserError: always.
        """
        raise UserError(
            "push_to_hub: Trainer would upload all that lies in output_dir. Save, then call"
            " goose_lora.sharing.hub.push(output_dir, repo)."
        )

    # ---- Rollouts ----

    def collect(self, prompts: PromptBatch) -> Experience:
        """Return a rollout with what the update needs of it.

        In a loop of the user's own, the rollout is the user's, and the prompts are not read.
        """
        # The training's thread waits here until the user gives a rollout.
        if self.own_loop.started:
            given = self.own_loop.take()
            return self.make_experience(given.rollout, given.scores)
        # The scale is learned before the first rollout, while the policy is still its reference.
        if self.rollout_state.score_scale is None:
            self._calibrate()
        prompts = repeated(prompts, self.args.num_generations)
        self.progress.phase("generating")
        with self.metrics.timed("generate"):
            rollout = self.collector.generate(
                prompts["input_ids"], prompts["attention_mask"], keep_trunk=True
            )
        return self.make_experience(rollout, columns=prompts["columns"])

    @torch.no_grad()
    def make_experience(
        self, rollout: Rollout, scores: Scores | None = None, columns: dict[str, list] | None = None
    ) -> Experience:
        """Return what the update needs of a rollout, and note its figures.

        Args:
            scores: of the replies; by default, those of the trainer's own sources of reward.
            columns: of the prompts' rows, for those sources.
        """
        args, step = self.args, self.state.global_step

        # What the roles say, and the scores.
        self.progress.phase("scoring")
        with self.metrics.timed("score"):
            seen = self.updater.ask_roles(rollout, score=scores is None, step=step)
            if scores is None:
                scores = self.collector.scores(rollout, columns or {}, seen.by_adapter)
        self.checks.reference(seen.logprobs, seen.ref_logprobs, rollout.response_mask, step=step)

        # Advantages, at the price of the KL as it was; then the price moves.
        experience, figures = self.experience.make(rollout, seen, scores)
        judged = self.collector.reward.judged(scores)
        figures |= judge_figures(self.accelerator, judged)
        for name in judged:
            figures.pop(f"reward/{name}", None)  # a half by its making, which says nothing
        self.metrics.add_rollout(figures)
        kl = figures["objective/kl"]
        if not self.critic_warms_up:
            replies = len(rollout.ended) * self.accelerator.num_processes
            self.rollout_state.kl_control.update(kl, replies)
        self._stop_above_max_kl(kl)

        # Some of the replies for people to read.
        if self.is_world_process_zero():
            k1 = torch.where(rollout.response_mask, seen.logprobs - seen.ref_logprobs, 0.0)
            samples = write_samples(
                args.output_dir,
                self.processing_class,
                rollout,
                scores.total,
                k1.sum(-1),
                step=step,
                rows=args.sample_rows,
                asked_of=(columns or {}).get("prompt"),
            )
            for line in samples[:1]:
                self.progress.sample(line["asked"], line["reply"])
        self.progress.phase("updating")
        return experience

    def _stop_above_max_kl(self, kl: float) -> None:
        """Let the run end at this rollout where its KL is above the bound."""
        if self.args.max_kl is not None and kl > self.args.max_kl:
            self.control.should_training_stop = True
            logger.warning(
                "stopped at step %d: the KL is %.3g nats a reply, above max_kl=%g. Raise kl_coef, or lower"
                " learning_rate or num_ppo_epochs.",
                self.state.global_step,
                kl,
                self.args.max_kl,
            )

    # ---- The scale of scores ----

    def _calibrate(self) -> None:
        """Learn the scale of scores from the untrained policy, which is the reference."""
        if self.args.score_normalization != "reference":
            return
        self.progress.phase("calibrating scores on replies of the reference", long=True)
        scores = self._scores_of_the_reference(self.train_dataset)
        self.experience.learn_scale(scores, self.collector.reward.names)
        logger.info("scores of the reference: mean %.3f, standard deviation %.3f", *self.experience.scale)

    def _scores_of_the_reference(self, rows: Dataset) -> Float[Tensor, " N"]:
        return reference_scores(
            self.collector,
            self.accelerator,
            rows,
            self.collate,
            count=self.args.score_calibration_prompts,
            seed=self.args.seed,
            generations=calibration_generations(self.collector.reward, self.args),
        )

    def _evaluation_scale(self, rows: Dataset) -> ScoreScale:
        """Return the scale of scores as it is at the first evaluation.

        One that comes before the training has found it must not find it for it.
        """
        if self.args.score_normalization != "reference" or self.rollout_state.score_scale is not None:
            return self.experience.scale
        # As the training will find it, but with random numbers of its own.
        with own_random_numbers(self.accelerator, self.args.seed):
            scores = self._scores_of_the_reference(self.train_dataset if self.has_prompts else rows)
            everywhere = gathered(self.accelerator, scores)
        return score_scale(everywhere, self.collector.reward.names)

    # ---- A loop of the user's own ----

    def start(self, resume_from_checkpoint: str | bool | None = None) -> int:
        """Begin a loop of your own, or go on with one from a checkpoint (as in ``train``).

        Until the loop ends, SIGINT and SIGTERM are answered after the rollout under way: ``step``
        saves, and raises ``Stopped``. After it ``generate`` and ``step`` draw the random numbers
        that the uninterrupted loop would have drawn.

        Returns:
            How many rollouts are behind it.

        Raises:
            UserError: the loop has been started before, or ``sampling_correction`` is set.
        """
        if self.args.sampling_correction is not None:
            raise UserError(
                f"sampling_correction={self.args.sampling_correction}: a loop of your own gives replies"
                " without the probabilities that they were drawn with. Leave it out."
            )
        self.own_loop.start(partial(self.train, resume_from_checkpoint=resume_from_checkpoint))
        return self.state.global_step // self.args.steps_per_rollout

    def generate(self, queries: Sequence[Ids], *, greedy: bool = False) -> list[Tensor]:
        """Return one reply of the policy as it is now to each query (token ids), sampled or greedy.

        A reply is its ids (T,), the token that ends it included.

        Raises:
            UserError: no list of queries, one without tokens, one that leaves no room for a reply,
                or an id that the vocabulary does not have.
        """
        prompts = token_lists(queries, "queries", self.collector.vocabulary)
        if not all(prompts):
            raise UserError(f"queries: sample {prompts.index([])} is empty. A query has a token or more.")
        require_context(self.shared.core, max(map(len, prompts)) + self.args.response_length)
        if not self.own_loop.started:
            self.start()
        # In the user's thread, between two steps: no trunk is noted, since the replies may change
        # before they come back.
        ids, mask = left_pad(prompts, self.processing_class.pad_token_id, self.args.device)
        rollout = self.collector.generate(ids, mask, greedy=greedy)
        return [torch.tensor(reply) for reply in rollout.response_ids()]

    def score(self, queries: Sequence[Ids], responses: Sequence[Ids]) -> Float[Tensor, " B"]:
        """Return raw scores by the trainer's sources of reward, for a loop that adds to them."""
        rollout = rollout_of(queries, responses, None, self.processing_class, self.collector)
        return self.collector.scores(rollout, {}).total

    def step(
        self,
        queries: Sequence[Ids],
        responses: Sequence[Ids],
        scores: GivenScores,
        response_masks: Masks | None = None,
    ) -> dict[str, float]:
        """Make all optimizer steps of one rollout.

        Args:
            queries, responses: token ids, as many samples as a rollout has
                (``args.rollout_batch_size``). Replies to one prompt stand together where
                ``num_generations`` is above 1.
            scores: a number for each response, or a list with one for each of its tokens.
            response_masks: which tokens of each response the policy wrote. Others, such as a user's
                or a tool's between two replies, are read by the policy and the critic, and are not
                trained on. All, if not given.

        Returns:
            The figures of the rollout and, where this step is logged, all of that row of
            ``metrics.jsonl``.

        Raises:
            UserError: another number of samples, or what ``rollout_of`` and ``scores_of`` refuse.
                Nothing has changed then.
        """
        # All that can be refused is refused before the training gets anything.
        wanted = self.args.rollout_batch_size
        queries = token_lists(queries, "queries", self.collector.vocabulary)
        if len(queries) != wanted:
            raise UserError(
                f"{len(queries)} samples for a rollout of {wanted}, which is per_device_train_batch_size *"
                " gradient_accumulation_steps * num_mini_batches. Give so many, or change those."
            )
        rollout = rollout_of(queries, responses, response_masks, self.processing_class, self.collector)
        given = GivenRollout(rollout, scores_of(scores, rollout))
        if not self.own_loop.started:
            self.start()
        self.own_loop.give(given)
        return self.metrics.latest

    def finish(self) -> None:
        """End the loop where it is.

        What was not saved is not saved by it, and the best checkpoint is not loaded: call
        ``save_model``.
        """
        if self.own_loop.finish():
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)


def _require_parts(model: object, args: object, tokenizer: object) -> None:
    """Raise UserError for parts of another kind, or a tokenizer without a pad token."""
    require_kind("model", model, SharedBase, "Make one: SharedBase.build(load_base(...), ...).")
    require_kind("args", args, PPOConfig, "Make one: PPOConfig(output_dir=...).")
    require_tokenizer_object("processing_class", tokenizer)
    if cast(PreTrainedTokenizerBase, tokenizer).pad_token_id is None:
        raise UserError(
            "the tokenizer has no pad token. Load it with goose_lora.load_tokenizer, or set"
            " tokenizer.pad_token to a token that is not its end-of-text token."
        )


def _require_texts(args: PPOConfig, texts: Dataset | None) -> None:
    """Raise UserError for pretraining text without its weight, or the weight without text."""
    if (args.ptx_coef > 0) != (texts is not None):
        raise UserError(
            f"ptx_coef={args.ptx_coef:g}: PPO-ptx needs a weight above 0 and pretraining text: set"
            " ptx_dataset_name too"
        )


def _sources(
    given: RewardSource | Sequence[RewardSource] | None, *, default: RewardSource
) -> list[RewardSource]:
    """Return the sources of reward as a list."""
    if given is None:
        return [default]
    if isinstance(given, (list, tuple)):
        return list(given)
    return [cast(RewardSource, given)]


def _unread_rows(args: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return what a loop of the user's own has in place of prompts.

    That is one batch of rows, which nobody reads, for each rollout.
    """
    rows = args.rollout_batch_size // args.num_generations * args.world_size
    return Dataset.from_dict({"input_ids": [[tokenizer.eos_token_id]] * rows})


def _collector(
    shared: SharedBase,
    args: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    reward: RewardMix,
    *,
    rollouts: int,
) -> RolloutCollector:
    """Return what generates and evaluates by these settings, in a run of ``rollouts``."""
    # Replies end at these tokens, at the stop texts, and at their greatest length.
    generation = generation_config(
        response_tokens=args.response_length,
        temperature=args.temperature,
        eos_token_ids=reply_ends(tokenizer, args.stop_token_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    # Who leaves the size of groups to the memory plan, and makes none, has the usual one
    group = args.local_rollout_forward_batch_size or USUAL_GROUP
    groups = -(-args.rollout_batch_size // group)
    engine = None
    if args.rollout_engine == "vllm":
        engine = VLLMEngine(
            shared,
            tokenizer,
            generation,
            memory_share=args.vllm_memory_share,
            rows=group,
            prompt_tokens=args.max_prompt_tokens,
            stop_strings=args.stop_strings,
        )
    return RolloutCollector(
        shared,
        tokenizer,
        generation,
        batch_size=group,
        weights=args.rollout_weights,
        reuse_trunk=args.reuse_trunk,
        reward=reward,
        stop_strings=args.stop_strings,
        exact_kl=args.kl_location if args.kl_estimator == "exact" else None,
        entropy_gradient=args.entropy_coef > 0,
        trunk_memory=args.trunk_memory,
        engine=engine,
        compile_rollouts=args.rollout_compile,
        decoding_steps=rollouts * groups * args.response_length,
    )
