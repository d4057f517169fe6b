"""PPO on a shared base, as a ``transformers.Trainer`` through its public hooks: loop, resume, logging and launchers are the library's."""

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer

from goose_lora import gates, ppo_math
from goose_lora.adapters import ADAPTERS, Role
from goose_lora.batch import Experience, Rollout
from goose_lora.callbacks import MetricsFile, RolloutState, append_line
from goose_lora.data import RolloutBatches, left_pad
from goose_lora.from_trl import TRAINER_ARGUMENTS, answers_trl
from goose_lora.kl_control import AdaptiveKL, FixedKL
from goose_lora.ppo_config import PPOConfig
from goose_lora.rewards import RewardMix, RewardSource, ScoreScale, score_scale, token_rewards
from goose_lora.rollouts import Rollouts
from goose_lora.sampling import generation_config
from goose_lora.shared_base import SharedBase

logger = logging.getLogger(__name__)

# Log-probabilities of one text in two batches: fp32 sums in another order, bf16 rounds what differs.
STEP_ZERO_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@answers_trl(TRAINER_ARGUMENTS)
class PPOTrainer(Trainer):
    """Trains the policy of ``model`` by PPO (Schulman et al. 2017) as InstructGPT does (Ouyang et al. 2022).

    Args:
        model: the shared base, with a critic where ``advantage_estimator`` is gae, and with a reward adapter unless ``reward_function`` is given.
        args: settings.
        train_dataset: rows with ``input_ids``, from ``data.tokenize_prompts``; further columns go to the reward function.
        processing_class: the base's tokenizer.
        reward_function: scores in place of the reward adapter; or several in a list, ``"adapter"`` among them where it has a part. See RewardMix.
        reward_weights: one to each of them; 1 if not given.
        ptx_dataset: rows with ``input_ids`` of pretraining text, from ``data.tokenize_texts``, for ``ptx_coef``.
    """

    args: PPOConfig
    train_dataset: Dataset
    processing_class: PreTrainedTokenizerBase
    loss_is_scaled_for_ga = True  # compute_loss divides by the token count of the whole optimizer step

    def __init__(
        self,
        model: SharedBase,
        args: PPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        *,
        reward_function: RewardSource | Sequence[RewardSource] | None = None,
        reward_weights: Sequence[float] | None = None,
        ptx_dataset: Dataset | None = None,
        **kwargs: Any,
    ):
        sources: Any = "adapter" if reward_function is None else reward_function
        reward = RewardMix(list(sources) if isinstance(sources, (list, tuple)) else [sources], reward_weights)
        if reward.needs_adapter and not model.has("reward"):
            raise ValueError("nothing scores the replies: give SharedBase.build a reward adapter, or PPOTrainer a reward_function.")
        if args.needs_critic != (model.critic is not None):
            wanted = "SharedBase.build(..., critic=args.critic)" if args.needs_critic else "critic=None: replies are compared with one another"
            raise ValueError(f"advantage_estimator={args.advantage_estimator} goes with {wanted}.")
        if (args.ptx_coef > 0) != (ptx_dataset is not None):
            raise ValueError(f"ptx_coef={args.ptx_coef:g}: PPO-ptx needs a weight above 0 and pretraining text: set ptx_dataset_name too")
        self.ptx_dataset = ptx_dataset
        control = FixedKL(args.kl_coef) if args.kl_target is None else AdaptiveKL(args.kl_coef, args.kl_target, args.kl_horizon)
        self.rollout_state = RolloutState(control)
        super().__init__(model=model, args=args, train_dataset=train_dataset, processing_class=processing_class, **kwargs)
        self.add_callback(self.rollout_state)
        self.add_callback(MetricsFile())
        self._microbatches: Iterator[dict[str, Tensor]] = iter(())
        self._rollout_metrics: dict[str, list[float]] = defaultdict(list)
        self._update_metrics: dict[str, Tensor | float] = defaultdict(float)
        self._microbatches_done = 0  # since the last log
        self._gates_open = False
        generation = generation_config(
            response_tokens=args.response_length,
            temperature=args.temperature,
            eos_token_ids=[processing_class.eos_token_id],
            pad_token_id=processing_class.pad_token_id,
        )
        self.rollouts = Rollouts(
            model,
            processing_class,
            generation,
            batch_size=args.local_rollout_forward_batch_size,
            weights=args.rollout_weights,
            reuse_trunk=args.reuse_trunk,
            reward=reward,
        )

    @property
    def shared(self) -> Any:
        """The ``SharedBase`` inside what accelerate may have wrapped around it."""
        return self.accelerator.unwrap_model(self.model)

    # ---- Public hooks of Trainer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Policy and critic as two groups, each with its learning rate. Resuming leaves inactive adapters frozen: mark them first."""
        if self.optimizer is None:
            set_seed(self.args.seed, device_specific=True)  # or all processes would sample alike
            self.shared.set_trainable(self._training_roles)
            gates.check_trainable(self.shared.named_parameters(), self._trainable_marks)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.shared)
            value_rate = self.args.learning_rate if self.args.value_learning_rate is None else self.args.value_learning_rate
            rates = zip(self._training_roles, (self.args.learning_rate, value_rate), strict=False)
            groups = [{"params": [p for _, p in self.shared.role_parameters(role)], "lr": rate} for role, rate in rates]
            self.optimizer = optimizer_class(groups, weight_decay=self.args.weight_decay, **options)
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Each batch of prompts once for every microbatch that is made of its rollout. A rollout has ``num_generations`` replies to each."""
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

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """A rollout where the last one is used up, then one microbatch of it."""
        microbatch = next(self._microbatches, None)
        if microbatch is None:
            self._microbatches = self._roll_out(inputs)
            microbatch = next(self._microbatches)
        first = not self._gates_open and self.state.global_step == 0
        with self._timed("update"):
            loss = super().training_step(model, microbatch, num_items_in_batch)
        if first:
            gates.check_gradients(self.shared.named_parameters())
        self._gates_open = True
        self._microbatches_done += 1
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The clipped PPO loss, a mean over the response tokens of the optimizer step: microbatches and processes add up to it."""
        args, mask, num_tokens = self.args, inputs["response_mask"], inputs["num_tokens"]
        output = model(
            inputs["input_ids"],
            inputs["attention_mask"],
            mask,
            trunk=inputs.get("trunk"),
            features=inputs.get("features"),
            temperature=args.temperature,
            entropy_gradient=args.entropy_coef > 0,
            ptx=self._pretraining_texts(),
        )
        if not self._gates_open and self.state.global_step == 0:
            gates.check_ratio(output.logprobs, inputs["old_logprobs"], mask, tolerance=self._tolerance)
        if args.ratio_threshold is not None:
            ratio = ppo_math.masked_mean((output.logprobs - inputs["old_logprobs"]).exp(), mask).detach()
            skipped = ratio > args.ratio_threshold
            self._update_metrics["policy/skipped"] = self._update_metrics["policy/skipped"] + skipped.float() / args.gradient_accumulation_steps
            if skipped:
                # Not a bare 0: DistributedDataParallel waits for a backward pass.
                return 0.0 * torch.stack([x.sum() for x in (output.logprobs, output.values) if x is not None]).sum()
        policy_loss, stats = ppo_math.policy_loss(
            output.logprobs, inputs["old_logprobs"], inputs["advantages"], mask, cliprange=args.cliprange, num_tokens=num_tokens
        )
        entropy = ppo_math.masked_mean(output.entropy, mask, num_tokens=num_tokens)
        loss = policy_loss - args.entropy_coef * entropy
        stats |= {"loss/policy": policy_loss, "policy/entropy": entropy}
        if output.values is not None:
            value_loss, value_stats = ppo_math.value_loss(
                self._scale.normalise(output.values),
                inputs["old_values"],
                inputs["returns"],
                mask,
                cliprange_value=args.cliprange_value,
                num_tokens=num_tokens,
            )
            loss = loss + args.vf_coef * value_loss
            stats |= value_stats | {"loss/value": value_loss}
        if output.ptx_loss is not None:
            stats["loss/ptx"] = output.ptx_loss / args.gradient_accumulation_steps
            loss = loss + args.ptx_coef * stats["loss/ptx"]
        if args.kl_location == "loss":
            kl = ppo_math.kl_per_token(output.logprobs, inputs["ref_logprobs"], estimator=args.kl_estimator)
            stats["loss/kl"] = ppo_math.masked_mean(kl, mask, num_tokens=num_tokens)
            loss = loss + self.rollout_state.kl_control.coef * stats["loss/kl"]
        for name, value in stats.items():
            self._update_metrics[name] = self._update_metrics[name] + value.detach()
        return loss

    def _pretraining_texts(self) -> tuple[Tensor, Tensor] | None:
        """Those of this microbatch: which they are follows from step and process alone, so that a resumed run takes the same."""
        if self.ptx_dataset is None:
            return None
        place = self.state.global_step * self.args.gradient_accumulation_steps + self._microbatches_done % self.args.gradient_accumulation_steps
        generator = torch.Generator().manual_seed(hash((self.args.seed, place, self.accelerator.process_index)) % 2**63)
        rows = torch.randint(len(self.ptx_dataset), (self.args.ptx_batch_size,), generator=generator).tolist()
        return left_pad([self.ptx_dataset[row]["input_ids"] for row in rows], self.processing_class.pad_token_id, self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what rollouts and updates since the last log have shown, averaged over processes."""
        steps = self._microbatches_done / self.args.gradient_accumulation_steps
        if steps > 0:
            update = {name: torch.as_tensor(total, device=self.args.device) / steps for name, total in self._update_metrics.items()}
            rollout = {name: torch.tensor(sum(seen) / len(seen), device=self.args.device) for name, seen in self._rollout_metrics.items()}
            mean = self.accelerator.reduce(rollout | update, reduction="mean")
            logs.update({name: value.item() for name, value in mean.items()})
            self._rollout_metrics.clear()
            self._update_metrics.clear()
            self._microbatches_done = 0
        super().log(logs, start_time)

    # ---- Rollouts ----

    def _roll_out(self, prompts: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
        """Microbatches of all epochs of one rollout."""
        args = self.args
        if self.rollout_state.score_scale is None:
            self._calibrate()
        experience = self._experience(self._repeated(prompts))
        count = self.accelerator.num_processes

        def mean_tokens(tokens: Tensor) -> Tensor:
            return self.accelerator.reduce(tokens, reduction="sum") / count

        for _ in range(args.num_ppo_epochs):
            yield from experience.microbatches(args.per_device_train_batch_size, args.gradient_accumulation_steps, mean_tokens=mean_tokens)

    def _repeated(self, prompts: dict[str, Any]) -> dict[str, Any]:
        """Each prompt ``num_generations`` times, in a row."""
        count = self.args.num_generations
        columns = {name: [value for value in column for _ in range(count)] for name, column in prompts["columns"].items()}
        return {name: prompts[name].repeat_interleave(count, dim=0) for name in ("input_ids", "attention_mask")} | {"columns": columns}

    @torch.no_grad()
    def _experience(self, prompts: dict[str, Any]) -> Experience:
        args, control = self.args, self.rollout_state.kl_control
        with self._timed("generate"):
            rollout = self.rollouts.generate(prompts["input_ids"], prompts["attention_mask"])
        with self._timed("score"):
            seen = self.rollouts.evaluate(rollout, prompts["columns"])
        mask = rollout.response_mask
        kl = ppo_math.kl_per_token(seen.logprobs, seen.ref_logprobs, estimator=args.kl_estimator)
        if self.state.global_step == 0:
            gates.check_reference(kl, mask, tolerance=self._tolerance)

        scores = self._scale.normalise(seen.scores)
        penalised = scores
        if args.missing_eos_penalty is not None:
            penalised = torch.where(rollout.ended, scores, scores - args.missing_eos_penalty)
        rewards = token_rewards(penalised, kl, mask, kl_coef=control.coef if args.kl_location == "reward" else 0.0)
        values = None if seen.values is None else torch.where(mask, self._scale.normalise(seen.values), 0.0)
        advantages, returns = self._advantages(rewards, values, mask)

        k1 = torch.where(mask, seen.logprobs - seen.ref_logprobs, 0.0)
        k3 = torch.where(mask, ppo_math.kl_per_token(seen.logprobs, seen.ref_logprobs, estimator="k3"), 0.0)
        assert rollout.sampling_logprobs is not None
        shown = {
            "objective/score": scores.mean(),
            "objective/raw_score": seen.scores.mean(),
            "objective/kl": k1.sum(-1).mean(),
            "objective/kl_k3": k3.sum(-1).mean(),
            "objective/reward": rewards.sum(-1).mean(),
            "objective/kl_coef": torch.tensor(control.coef),
            "rollout/response_tokens": rollout.lengths.float().mean(),
            "rollout/eos_rate": rollout.ended.float().mean(),
            "rollout/sampling_gap": ppo_math.masked_mean((rollout.sampling_logprobs - seen.logprobs).abs(), mask),
        }
        if values is not None and returns is not None:
            shown["value/explained_variance"] = ppo_math.explained_variance(values, returns, mask)
            shown["value/mean"] = ppo_math.masked_mean(values, mask)
        if len(seen.scores_by_source) > 1:
            shown |= {f"reward/{name}": values.nanmean() for name, values in seen.scores_by_source.items()}
        for name, value in shown.items():
            self._rollout_metrics[name].append(value.item())
        mean_kl: Any = self.accelerator.reduce(k1.sum(-1).mean(), reduction="mean")
        control.update(mean_kl.item(), len(mask) * self.accelerator.num_processes)
        self._stop_above_max_kl(mean_kl.item())
        self._write_samples(rollout, seen.scores, k1.sum(-1))
        return Experience(rollout, seen.logprobs, seen.ref_logprobs, advantages, values, returns, seen.trunk, seen.features)

    def _advantages(self, rewards: Tensor, values: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Advantages (B, T), and what the critic is to learn (B, T) where there is one."""
        args = self.args
        if values is None:
            compare = ppo_math.leave_one_out if args.advantage_estimator == "rloo" else ppo_math.group_normalised
            return torch.where(mask, compare(rewards.sum(-1), args.num_generations)[:, None], 0.0), None
        if args.whiten_rewards:
            rewards = ppo_math.whiten(rewards, mask, shift_mean=False, statistics=self._moments(rewards, mask))
        advantages = ppo_math.gae(rewards, values, mask, gamma=args.gamma, lam=args.lam)
        whitened = ppo_math.whiten(advantages, mask, statistics=self._moments(advantages, mask))
        return whitened, torch.where(mask, advantages + values, 0.0)

    def _stop_above_max_kl(self, kl: float) -> None:
        if self.args.max_kl is not None and kl > self.args.max_kl:
            self.control.should_training_stop = True
            logger.warning(
                "stopped at step %d: the KL is %.3g nats a reply, above max_kl=%g. Raise kl_coef, or lower learning_rate or num_ppo_epochs.",
                self.state.global_step,
                kl,
                self.args.max_kl,
            )

    def _calibrate(self) -> None:
        """Learn the scale of scores from replies of the untrained policy, which is the reference."""
        if not self.args.normalize_scores:
            self.rollout_state.score_scale = (0.0, 1.0)
            return
        count = -(-self.args.score_calibration_prompts // self.accelerator.num_processes)
        generator = torch.Generator().manual_seed(self.args.seed + self.accelerator.process_index)
        rows = torch.randint(len(self.train_dataset), (count,), generator=generator).tolist()
        prompts = self._collate([self.train_dataset[row] for row in rows])
        rollout = self.rollouts.generate(prompts["input_ids"].to(self.args.device), prompts["attention_mask"].to(self.args.device))
        raw = self.rollouts.scores(rollout, prompts["columns"])
        everywhere: Any = self.accelerator.gather(raw)
        scale = score_scale(everywhere)
        self.rollout_state.score_scale = (scale.mean, scale.std)
        logger.info("scores of the reference: mean %.3f, standard deviation %.3f", scale.mean, scale.std)

    # ---- Small things ----

    @property
    def _scale(self) -> ScoreScale:
        return ScoreScale(*(self.rollout_state.score_scale or ScoreScale()))

    @property
    def _tolerance(self) -> float:
        return STEP_ZERO_TOLERANCE.get(self.shared.get_base_model().get_output_embeddings().weight.dtype, 1e-5)

    @property
    def _training_roles(self) -> tuple[Role, ...]:
        return ("policy", "value") if self.args.needs_critic else ("policy",)

    @property
    def _trainable_marks(self) -> tuple[str, ...]:
        return tuple(f".{ADAPTERS[role]}." for role in self._training_roles)

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        input_ids, attention_mask = left_pad([row["input_ids"] for row in rows], self.processing_class.pad_token_id)
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "input_ids"}
        return {"input_ids": input_ids, "attention_mask": attention_mask, "columns": columns}

    def _moments(self, x: Tensor, mask: Tensor) -> ppo_math.Moments:
        """Over the rollouts of all processes."""
        own = torch.stack([torch.as_tensor(value, dtype=x.dtype, device=x.device) for value in ppo_math.moments(x, mask)])
        return ppo_math.merge_moments([ppo_math.Moments(*row) for row in self.accelerator.gather(own[None])])

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Seconds of a phase, summed over the optimizer steps of a log and divided by their number like all update figures."""
        started = time.perf_counter()
        yield
        self._update_metrics[f"seconds/{phase}"] = self._update_metrics[f"seconds/{phase}"] + time.perf_counter() - started

    def _write_samples(self, rollout: Rollout, scores: Tensor, kl: Tensor) -> None:
        if not self.is_world_process_zero():
            return
        decode = self.processing_class.batch_decode
        rows = self.args.sample_rows
        texts = zip(decode(rollout.prompt_ids()[:rows]), decode(rollout.response_ids()[:rows], skip_special_tokens=True), strict=True)
        for row, (prompt, reply) in enumerate(texts):
            append_line(
                Path(self.args.output_dir or ".") / "samples.jsonl",
                {"step": self.state.global_step, "prompt": prompt, "reply": reply, "raw_score": scores[row].item(), "kl": kl[row].item()},
            )
