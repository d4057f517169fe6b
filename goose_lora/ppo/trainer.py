"""PPO on a shared base, as a ``transformers.Trainer`` through its public hooks: loop, resume,
logging and launchers are the library's."""

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer

import goose_lora.functional as F
from goose_lora.data.tokenization import left_pad
from goose_lora.errors import UserError
from goose_lora.generation.rollout import Rollout
from goose_lora.generation.sampling import generation_config
from goose_lora.generation.vllm import VLLMEngine
from goose_lora.models.roles import ADAPTERS, Role
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo import first_step_checks
from goose_lora.ppo.callbacks import Diagnosis, PolicyAverage, RolloutState, write_samples
from goose_lora.ppo.collector import Rollouts
from goose_lora.ppo.config import RESUME_RULES, PPOConfig
from goose_lora.ppo.evaluation import evaluate_prompts, own_random_numbers, reference_scores
from goose_lora.ppo.experience import Experience, ExperienceMaker
from goose_lora.ppo.kl_control import AdaptiveKL, FixedKL
from goose_lora.ppo.loss import leaves_bounds, total_loss
from goose_lora.ppo.own_loop import UserLoop, unscored
from goose_lora.ppo.sampler import RolloutBatches
from goose_lora.ppo.schedules import by_settings
from goose_lora.ppo.trl_names import TRAINER_ARGUMENTS, answers_trl
from goose_lora.ppo.update import Passes
from goose_lora.rewards.scale import ScoreScale, score_scale
from goose_lora.rewards.sources import RewardMix, RewardSource, Scores
from goose_lora.training.callbacks import MetricsFile
from goose_lora.training.launch import require_one_gpu
from goose_lora.training.resume import Resumable

logger = logging.getLogger(__name__)


def refuse_upload(*args: object, **kwargs: object) -> None:
    """Stands in place of Trainer's ``push_to_hub``. Raises ValueError."""
    raise UserError(
        "push_to_hub: Trainer would upload all that lies in output_dir. Save, then call"
        " goose_lora.sharing.hub.push(output_dir, repo)."
    )


@answers_trl(TRAINER_ARGUMENTS)
class PPOTrainer(UserLoop, Resumable, Passes, Trainer):
    """Trains the policy of ``model`` by PPO (Schulman et al. 2017) as InstructGPT does (Ouyang et
    al. 2022).

    Args:
        model: the shared base, with a critic where ``advantage_estimator`` is gae, and with a
            reward adapter unless ``reward_function`` is given.
        args: settings.
        train_dataset: rows with ``input_ids``, from ``data.tokenize_prompts``; further columns go
            to the reward function. None for a loop of one's own by ``generate`` and ``step``.
        processing_class: the base's tokenizer.
        reward_function: scores in place of the reward adapter; or several in a list, ``"adapter"``
            among them where it has a part. See RewardMix.
        reward_weights: one to each of them; 1 if not given.
        ptx_dataset: rows with ``input_ids`` of pretraining text, from ``data.tokenize_texts``, for
            ``ptx_coef``.
        eval_dataset (by keyword, as in Trainer): held-out prompts like ``train_dataset``, for
            ``eval_strategy``.
    """

    args: PPOConfig
    train_dataset: Dataset
    processing_class: PreTrainedTokenizerBase
    push_to_hub: Any = refuse_upload
    resume_rules = RESUME_RULES
    loss_is_scaled_for_ga = True  # compute_loss divides by the token count of the whole optimizer step

    def __init__(
        self,
        model: SharedBase,
        args: PPOConfig,
        train_dataset: Dataset | None,
        processing_class: PreTrainedTokenizerBase,
        *,
        reward_function: RewardSource | Sequence[RewardSource] | None = None,
        reward_weights: Sequence[float] | None = None,
        ptx_dataset: Dataset | None = None,
        **kwargs: Any,
    ):
        alone: Any = unscored if train_dataset is None and not model.has("reward") else "adapter"
        sources: Any = alone if reward_function is None else reward_function
        reward = RewardMix(
            list(sources) if isinstance(sources, (list, tuple)) else [sources],
            reward_weights,
            timeout=args.reward_timeout,
        )
        if reward.needs_adapter and not model.has("reward"):
            raise UserError(
                "nothing scores the replies: give SharedBase.build a reward adapter, or PPOTrainer a"
                " reward_function."
            )
        first_step_checks.check_roles(model, args)
        require_one_gpu(args)
        if args.push_to_hub:
            self.push_to_hub()
        if (args.ptx_coef > 0) != (ptx_dataset is not None):
            raise UserError(
                f"ptx_coef={args.ptx_coef:g}: PPO-ptx needs a weight above 0 and pretraining text: set"
                " ptx_dataset_name too"
            )
        self.ptx_dataset = ptx_dataset
        control = (
            FixedKL(args.kl_coef)
            if args.kl_target is None
            else AdaptiveKL(args.kl_coef, args.kl_target, args.kl_horizon)
        )
        self.rollout_state = RolloutState(control)
        self._has_prompts = train_dataset is not None
        # A loop of one's own: one batch of rows, which nobody reads, for each rollout
        if train_dataset is None:
            rollouts = args.rollout_batch_size // args.num_generations * args.world_size
            train_dataset = Dataset.from_dict({"input_ids": [[processing_class.eos_token_id]] * rollouts})
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, processing_class=processing_class, **kwargs
        )
        for callback in (self.rollout_state, MetricsFile(), Diagnosis()):
            self.add_callback(callback)
        if args.ema_decay is not None:
            self.add_callback(PolicyAverage(model, args.ema_decay))
        self._microbatches: Iterator[dict[str, Tensor]] = iter(())
        self._rollout_metrics: dict[str, list[float]] = defaultdict(list)
        self._update_metrics: dict[str, Tensor | float] = defaultdict(float)
        self._microbatches_done = 0  # since the last log
        self._gates_open = False
        self._rollout_is_fresh = False
        generation = generation_config(
            response_tokens=args.response_length,
            temperature=args.temperature,
            eos_token_ids=[processing_class.eos_token_id, *(args.stop_token_ids or [])],
            pad_token_id=processing_class.pad_token_id,
        )
        engine = None
        if args.rollout_engine == "vllm":
            how: Any = {
                "rows": args.local_rollout_forward_batch_size,
                "prompt_tokens": args.max_prompt_tokens,
                "stop_strings": args.stop_strings,
            }
            engine = VLLMEngine(
                model, processing_class, generation, memory_share=args.vllm_memory_share, **how
            )
        self.rollouts = Rollouts(
            model,
            processing_class,
            generation,
            batch_size=args.local_rollout_forward_batch_size,
            weights=args.rollout_weights,
            reuse_trunk=args.reuse_trunk,
            reward=reward,
            stop_strings=args.stop_strings,
            exact_kl=args.kl_location if args.kl_estimator == "exact" else None,
            entropy_gradient=args.entropy_coef > 0,
            trunk_memory=args.trunk_memory,
            engine=engine,
        )
        # Other sources have a scale of their own
        in_units_of_scores = model.values_are_scores and reward.needs_adapter
        self.experiences = ExperienceMaker(
            args, self.rollout_state, self.accelerator, values_are_scores=in_units_of_scores
        )
        self.last_figures: dict[str, float] = {}  # of the last rollout, and of its log

    @property
    def stage(self) -> str:  # type: ignore[override]
        return "ppo" if self._has_prompts else "own_loop"

    @property
    def steps_between_resumable(self) -> int:  # type: ignore[override]
        """Only between rollouts can a run go on exactly."""
        return self.args.steps_per_rollout

    @property
    def shared(self) -> Any:
        """The ``SharedBase`` inside what accelerate may have wrapped around it."""
        return self.accelerator.unwrap_model(self.model)

    # ---- Public hooks of Trainer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Policy and critic as two groups, each with its learning rate. Resuming leaves inactive
        adapters frozen: mark them first."""
        if self.optimizer is None:
            set_seed(self.args.seed, device_specific=True)  # or all processes would sample alike
            self.shared.set_trainable(self._training_roles)
            first_step_checks.check_trainable(
                self.shared.named_parameters(), [name for group in self._training for name, _ in group]
            )
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.shared)
            rates = (self.args.learning_rate, self.args.critic_learning_rate)[: len(self._training_roles)]
            groups = [
                {"params": [p for _, p in group], "lr": rate}
                for group, rate in zip(self._training, rates, strict=True)
            ]
            self.optimizer = optimizer_class(groups, weight_decay=self.args.weight_decay, **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """The library's, unless policy and critic go by different ones."""
        args = self.args
        if not (
            args.needs_critic
            and (args.value_lr_scheduler_type or args.value_warmup_steps or args.critic_warmup_rollouts)
        ):
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = by_settings(args, optimizer or self.optimizer, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader:
        """Each batch of prompts once for every microbatch that is made of its rollout. A rollout
        has ``num_generations`` replies to each."""
        if self._own_loop is not None:
            self._own_loop.check_thread()
        elif not self._has_prompts:
            raise UserError("there is no train_dataset: give PPOTrainer one, or go on by generate and step.")
        repeat = self.args.steps_per_rollout * self.args.gradient_accumulation_steps
        batches = RolloutBatches(
            len(self.train_dataset),
            self.args.rollout_batch_size // self.args.num_generations,
            repeat,
            seed=self.args.seed,
            num_processes=self.accelerator.num_processes,
        )
        rows: Any = self.train_dataset
        return self.accelerator.prepare(DataLoader(rows, batch_sampler=batches, collate_fn=self._collate))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """A rollout where the last one is used up, then one microbatch of it."""
        microbatch = next(self._microbatches, None)
        if microbatch is None:
            self._microbatches = self._roll_out(inputs)
            microbatch = next(self._microbatches)
        first = not self._gates_open and self.state.global_step == 0
        with self._timed("update"):
            loss = self._learn(model, microbatch, num_items_in_batch)
        if first:
            first_step_checks.check_gradients(self.shared.named_parameters())
        if self._critic_warms_up:
            # None, not 0: the optimizer passes these by, and Adam's averages and count of steps
            # begin after the warm-up.
            for _, parameter in self.shared.role_parameters("policy"):
                parameter.grad = None
        self._gates_open = True
        self._microbatches_done += 1
        # Trainer adds it up: one that is not finite would be all that is logged from then on
        return torch.where(loss.isfinite(), loss, 0.0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The clipped PPO loss, a mean over the response tokens of the optimizer step: microbatches
        and processes add up to it."""
        args, mask = self.args, inputs["response_mask"]
        share, carries_ptx = self._part
        output = self._take_first_output()
        if output is None:
            output = model(
                inputs["input_ids"],
                inputs["attention_mask"],
                mask,
                trunk=inputs.get("trunk"),
                value_trunk=inputs.get("value_trunk"),
                features=inputs.get("features"),
                ref_hidden=inputs.get("ref_hidden"),
                temperature=args.temperature,
                entropy_gradient=args.entropy_coef > 0,
                ptx=self._pretraining_texts() if carries_ptx else None,
            )
        if self._rollout_is_fresh:
            self._rollout_is_fresh = False
            if not self._gates_open and self.state.global_step == 0:
                first_step_checks.check_ratio(
                    output.logprobs,
                    inputs["old_logprobs"],
                    mask,
                    tolerance=self._tolerance(first_step_checks.RATIO_TOLERANCE),
                )
            gaps = F.masked_sum((output.logprobs.detach() - inputs["old_logprobs"]).abs(), mask)
            gap, tokens = self.accelerator.reduce(torch.stack([gaps, mask.sum()]), reduction="sum").tolist()  # type: ignore[union-attr]
            self._rollout_metrics["policy/first_ratio_gap"].append(gap / tokens)
        if args.ratio_threshold is not None:
            skipped = leaves_bounds(output, inputs, args.ratio_threshold)
            counted = share * skipped.float() / args.gradient_accumulation_steps
            self._update_metrics["policy/skipped"] = self._update_metrics["policy/skipped"] + counted
            if skipped:
                # Not a bare 0: DistributedDataParallel waits for a backward pass.
                return (
                    0.0
                    * torch.stack([x.sum() for x in (output.logprobs, output.values) if x is not None]).sum()
                )
        values = None if output.values is None else self.experiences.values(output.values)
        loss, stats = total_loss(output, inputs, values, args, kl_coef=self.rollout_state.kl_control.coef)
        for name, value in stats.items():
            self._update_metrics[name] = self._update_metrics[name] + value.detach()
        return loss

    def _pretraining_texts(self) -> tuple[Tensor, Tensor] | None:
        """Those of this microbatch: which they are follows from step and process alone, so that a
        resumed run takes the same."""
        if self.ptx_dataset is None:
            return None
        place = (
            self.state.global_step * self.args.gradient_accumulation_steps
            + self._microbatches_done % self.args.gradient_accumulation_steps
        )
        generator = torch.Generator().manual_seed(
            hash((self.args.seed, place, self.accelerator.process_index)) % 2**63
        )
        rows = torch.randint(len(self.ptx_dataset), (self.args.ptx_batch_size,), generator=generator).tolist()
        return left_pad(
            [self.ptx_dataset[row]["input_ids"] for row in rows],
            self.processing_class.pad_token_id,
            self.args.device,
        )

    def load_best(self, checkpoint: Path) -> None:
        """Overridden to load critic and average too: Trainer loads the policy alone."""
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what rollouts and updates since the last log have shown, averaged over processes."""
        steps = self._microbatches_done / self.args.gradient_accumulation_steps
        if steps > 0 and not any(name.startswith("eval_") for name in logs):
            update = {
                name: torch.as_tensor(total, device=self.args.device) / steps
                for name, total in self._update_metrics.items()
            }
            rollout = {
                name: torch.tensor(sum(seen) / len(seen), device=self.args.device)
                for name, seen in self._rollout_metrics.items()
            }
            if rollout:
                rollout["rollout/count"] = torch.tensor(
                    float(len(self._rollout_metrics["objective/score"])), device=self.args.device
                )
            mean = self.accelerator.reduce(rollout | update, reduction="mean")
            logs.update(
                {name: value.item() for name, value in mean.items()}
                | {"policy/not_finite": self.finite.skipped / steps}
            )
            self.finite.skipped = 0
            self.last_figures |= logs
            self._rollout_metrics.clear()
            self._update_metrics.clear()
            self._microbatches_done = 0
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer the first ``num_eval_prompts`` held-out prompts, sampled and greedy, and score the
        replies.

        ``eval_objective`` is the sampled replies' score less ``kl_coef`` (that of the settings,
        also where it adapts) times their KL, and what the best checkpoint and early stopping go by;
        scores are counted in the scale of the first evaluation. Training draws the random numbers
        that it would have drawn without.
        """
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise UserError(
                "there is nothing to evaluate on: give PPOTrainer an eval_dataset, or evaluate one."
            )
        rows = rows.select(range(min(self.args.num_eval_prompts, len(rows))))
        state, seed = self.rollout_state, self.args.seed
        if state.evaluation_scale is None:
            state.evaluation_scale = tuple(self._evaluation_scale(rows))
        scale = ScoreScale(*state.evaluation_scale)
        figures = evaluate_prompts(
            self.rollouts, self.accelerator, rows, self._collate, scale=scale, seed=seed
        )
        objective = figures["score"] - self.args.kl_coef * figures["kl"]
        metrics = {
            f"{metric_key_prefix}_{name}": value
            for name, value in (figures | {"objective": objective}).items()
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- Rollouts ----

    def _roll_out(self, prompts: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
        """Microbatches of all epochs of one rollout."""
        args = self.args
        if self._own_loop is not None:
            experience = self._experience(*self._own_loop.take())
        else:
            if self.rollout_state.score_scale is None:
                self._calibrate()
            prompts = self._repeated(prompts)
            with self._timed("generate"):
                rollout = self.rollouts.generate(
                    prompts["input_ids"], prompts["attention_mask"], keep_trunk=True
                )
            experience = self._experience(rollout, columns=prompts["columns"])
        self._rollout_is_fresh = True
        count = self.accelerator.num_processes

        def mean_tokens(tokens: Tensor) -> Tensor:
            return self.accelerator.reduce(tokens, reduction="sum") / count

        for _ in range(args.num_ppo_epochs):
            yield from experience.microbatches(
                args.per_device_train_batch_size, args.gradient_accumulation_steps, mean_tokens=mean_tokens
            )

    def _repeated(self, prompts: dict[str, Any]) -> dict[str, Any]:
        """Each prompt ``num_generations`` times, in a row."""
        count = self.args.num_generations
        columns = {
            name: [value for value in column for _ in range(count)]
            for name, column in prompts["columns"].items()
        }
        return {
            name: prompts[name].repeat_interleave(count, dim=0) for name in ("input_ids", "attention_mask")
        } | {"columns": columns}

    @torch.no_grad()
    def _experience(
        self, rollout: Rollout, scores: Scores | None = None, columns: dict[str, list] | None = None
    ) -> Experience:
        """What the update needs of a rollout; scored by the trainer's own sources of reward if no
        scores are given."""
        args, control = self.args, self.rollout_state.kl_control
        with self._timed("score"):
            seen = self._ask_the_roles(rollout, score=scores is None)
            scores = (
                self.rollouts.scores(rollout, columns or {}, seen.by_adapter) if scores is None else scores
            )
        if self.state.global_step == 0:
            kl, tolerance = seen.logprobs - seen.ref_logprobs, self._tolerance(first_step_checks.KL_TOLERANCE)
            first_step_checks.check_reference(kl, rollout.response_mask, tolerance=tolerance)
        experience, shown = self.experiences.make(rollout, seen, scores)
        self.last_figures = dict(shown)
        for name, value in shown.items():
            self._rollout_metrics[name].append(value)
        kl = shown["objective/kl"]
        if not self._critic_warms_up:
            control.update(kl, len(rollout.ended) * self.accelerator.num_processes)
        self._stop_above_max_kl(kl)
        k1 = torch.where(rollout.response_mask, seen.logprobs - seen.ref_logprobs, 0.0)
        if self.is_world_process_zero():
            step, rows = self.state.global_step, args.sample_rows
            write_samples(
                args.output_dir,
                self.processing_class,
                rollout,
                scores.total,
                k1.sum(-1),
                step=step,
                rows=rows,
            )
        return experience

    def _stop_above_max_kl(self, kl: float) -> None:
        if self.args.max_kl is not None and kl > self.args.max_kl:
            self.control.should_training_stop = True
            logger.warning(
                "stopped at step %d: the KL is %.3g nats a reply, above max_kl=%g. Raise kl_coef, or lower"
                " learning_rate or num_ppo_epochs.",
                self.state.global_step,
                kl,
                self.args.max_kl,
            )

    def _calibrate(self) -> None:
        """Learn the scale of scores from replies of the untrained policy, which is the
        reference."""
        if self.args.score_normalization != "reference":
            return
        self.experiences.learn_scale(self._scores_of_the_reference(self.train_dataset))
        logger.info("scores of the reference: mean %.3f, standard deviation %.3f", *self.experiences.scale)

    def _scores_of_the_reference(self, rows: Dataset) -> Tensor:
        count, seed = self.args.score_calibration_prompts, self.args.seed
        return reference_scores(self.rollouts, self.accelerator, rows, self._collate, count=count, seed=seed)

    def _evaluation_scale(self, rows: Dataset) -> ScoreScale:
        """The scale of scores as it is at the first evaluation; one that comes before the training
        has found it must not find it for it."""
        if self.args.score_normalization != "reference" or self.rollout_state.score_scale is not None:
            return self.experiences.scale
        with own_random_numbers(self.accelerator, self.args.seed):
            scores: Any = self.accelerator.gather(
                self._scores_of_the_reference(self.train_dataset if self._has_prompts else rows)
            )
        return score_scale(scores)

    # ---- Small things ----

    @property
    def _critic_warms_up(self) -> bool:
        return self.state.global_step < self.args.critic_warmup_rollouts * self.args.steps_per_rollout

    def _tolerance(self, by_dtype: Mapping[torch.dtype, float]) -> float:
        return by_dtype.get(
            self.shared.get_base_model().get_output_embeddings().weight.dtype, by_dtype[torch.float32]
        )

    @property
    def _training_roles(self) -> tuple[Role, ...]:
        return ("policy", "value") if self.args.needs_critic else ("policy",)

    @property
    def _training(self) -> list[list[tuple[str, nn.Parameter]]]:
        return [list(self.shared.training_parameters(role)) for role in self._training_roles]

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        input_ids, attention_mask = left_pad(
            [row["input_ids"] for row in rows], self.processing_class.pad_token_id
        )
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "input_ids"}
        return {"input_ids": input_ids, "attention_mask": attention_mask, "columns": columns}

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Seconds of a phase, summed over the optimizer steps of a log and divided by their number
        like all update figures."""
        started = time.perf_counter()
        yield
        self._update_metrics[f"seconds/{phase}"] = (
            self._update_metrics[f"seconds/{phase}"] + time.perf_counter() - started
        )
