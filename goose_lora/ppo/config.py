"""Settings of PPO: names that TRL's users know, checked when made."""

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from goose_lora.errors import UserError
from goose_lora.functional import KLEstimator
from goose_lora.kinds import settle_types
from goose_lora.models.roles import RolePlan, default_critic
from goose_lora.models.trunk import top_layers
from goose_lora.ppo.trl_names import FROM_TRL, answers_trl
from goose_lora.training.checkpoints import SettingRules
from goose_lora.training.validation import check_finite, check_training

# Settings of PPO in a resumed run: the form of a rollout and what the roles are must be the same.
# What a resumed run may have otherwise: its length, prices and bounds, of which the new ones are
# used, and what it takes in time and memory.
RESUME_RULES = SettingRules(
    may_differ=(
        "response_length",
        "temperature",
        "max_prompt_tokens",
        "local_rollout_forward_batch_size",
        "rollout_weights",
        "rollout_compile",
        "rollout_engine",
        "vllm_memory_share",
        "kl_coef",
        "max_kl",
        "kl_importance_weight",
        "kl_target",
        "kl_horizon",
        "score_calibration_prompts",
        "score_clip",
        "length_penalty",
        "missing_eos_penalty",
        "reward_timeout",
        "max_tokens_per_microbatch",
        "cliprange",
        "cliprange_high",
        "sampling_correction",
        "sampling_correction_cap",
        "cliprange_value",
        "ratio_threshold",
        "vf_coef",
        "gamma",
        "lam",
        "lam_critic",
        "entropy_coef",
        "ptx_coef",
        "reuse_trunk",
        "trunk_memory",
        "num_eval_prompts",
    )
)
_SAVE_EVERY_ROLLOUTS = 10
_SCHEDULES = [str(schedule.value) for schedule in SchedulerType]
_VLLM_COLDEST = 0.01  # vLLM samples at this temperature where it is asked for a lower one


@answers_trl(FROM_TRL)
@dataclass
class PPOConfig(TrainingArguments):
    """The settings of a PPO run.

    One rollout is ``per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches``
    replies on each process, to that many prompts or, with ``num_generations``, to so many times
    fewer. Each of ``num_ppo_epochs`` passes over it makes ``num_mini_batches`` optimizer steps.
    ``max_steps``, ``logging_steps`` and ``save_steps`` count optimizer steps, as everywhere in
    transformers.
    """

    # Rollout: how many replies, how long they are, how they are drawn, and what generates them.
    # Sampling has no filter (top-k, top-p): the update compares probabilities with those that the
    # replies were drawn with.
    num_rollouts: int | None = field(
        default=None, metadata={"help": "Length of the run in rollouts; sets max_steps."}
    )
    response_length: int = field(default=53, metadata={"help": "Most tokens of a reply."})
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature; all log-probabilities are taken at it."}
    )
    max_prompt_tokens: int = field(
        default=512, metadata={"help": "Longer prompts are left out, and counted."}
    )
    local_rollout_forward_batch_size: int | None = field(
        default=None,
        metadata={
            "help": (
                "Replies generated and scored at a time, on each process; unset: as many as fit by the memory"
                " plan, up to a whole rollout."
            )
        },
    )
    stop_token_ids: list[int] | None = field(
        default=None, metadata={"help": "Tokens that end a reply, besides the end-of-text token."}
    )
    stop_strings: list[str] | None = field(
        default=None, metadata={"help": "Texts that end a reply; they stay part of it."}
    )
    rollout_weights: Literal["auto", "shared", "dense"] = field(
        default="auto",
        metadata={
            "help": (
                "dense: generate with an unquantized merged copy, faster but larger. auto: where half of the"
                " free memory holds it."
            )
        },
    )
    rollout_compile: Literal["auto", "off"] = field(
        default="auto",
        metadata={
            "help": (
                "auto: on CUDA, a dense copy decodes with CUDA graphs in runs that earn a minute of"
                " compiling."
            )
        },
    )
    rollout_engine: Literal["transformers", "vllm"] = field(
        default="transformers",
        metadata={
            "help": (
                "vllm: generate by vLLM in the same process, where it is installed; made for one GPU, and not"
                " yet run on any."
            )
        },
    )
    vllm_memory_share: float = field(
        default=0.3, metadata={"help": "vLLM's share of memory, which the update has too."}
    )
    sample_rows: int = field(
        default=4, metadata={"help": "Replies of each logged rollout written to samples.jsonl."}
    )

    # Reward: what a reply earns. The score is normalised, clipped, and less the penalties; the KL
    # to the reference is charged at each token. Sums over a reply's tokens are in nats per reply.
    kl_coef: float = field(default=0.05, metadata={"help": "Price of a nat of KL to the reference."})
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = field(
        default="k1",
        metadata={
            "help": ("Estimator of the KL that is charged; exact: over the vocabulary, by one more head.")
        },
    )
    kl_location: Literal["reward", "loss"] = field(
        default="reward",
        metadata={"help": "Charge the KL as part of each token's reward, or as a term of the loss (not k1)."},
    )
    kl_importance_weight: bool = field(
        default=False,
        metadata={"help": "Weigh a KL in the loss by the policy's ratio (k2 or k3; arXiv:2510.01555)."},
    )
    max_kl: float | None = field(
        default=None, metadata={"help": "Stop at a rollout whose KL (nats a reply) is above this."}
    )
    kl_target: float | None = field(
        default=None, metadata={"help": "Adapt kl_coef towards this KL (nats a reply); null: fixed."}
    )
    kl_horizon: int = field(default=10000, metadata={"help": "Replies over which an adaptive kl_coef moves."})
    score_normalization: Literal["reference", "running", "none"] = field(
        default="reference",
        metadata={
            "help": (
                "Count scores in standard deviations of the reference's replies, or of all so far; or not."
            )
        },
    )
    score_calibration_prompts: int = field(
        default=192, metadata={"help": "Prompts answered first, to learn the reference's scale."}
    )
    score_clip: float | None = field(
        default=None, metadata={"help": "Bound on a score's size, after normalisation; null: none."}
    )
    length_penalty: float = field(
        default=0.0,
        metadata={"help": "Taken off the score a token; negative pays for length."},
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken off the score of a reply that did not end by itself."}
    )
    reward_timeout: float | None = field(
        default=1800,
        metadata={
            "help": (
                "Seconds that the reward functions may take over a rollout; then the run ends. null: as long"
                " as they like."
            )
        },
    )
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Scale rewards to variance 1 in each rollout, their mean kept."}
    )

    # Update: what the policy and the critic learn from a rollout, and within which bounds.
    # Without a critic (rloo, grpo), the critic's settings have no effect.
    advantage_estimator: Literal["gae", "rloo", "grpo"] = field(
        default="gae",
        metadata={
            "help": (
                "gae: PPO with a critic. rloo, grpo: replies to one prompt are compared; no critic is loaded."
            )
        },
    )
    num_generations: int = field(
        default=1, metadata={"help": "Replies to a prompt of a rollout; rloo and grpo: 2 or more."}
    )
    max_tokens_per_microbatch: int | None = field(
        default=None,
        metadata={
            "help": (
                "Cut each microbatch into parts of at most so many tokens, padding counted; the result is the"
                " same (ratio_threshold counts a part), the memory less."
            )
        },
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps a pass."})
    cliprange: float = field(default=0.2, metadata={"help": "The policy's ratio counts within 1 +- this."})
    cliprange_high: float | None = field(
        default=None, metadata={"help": "Above, within 1 + this: DAPO's clip-higher (0.28 there)."}
    )
    sampling_correction: Literal["truncate", "mask"] | None = field(
        default=None,
        metadata={
            "help": (
                "Weigh tokens by the update's probability over the sampler's: above the cap, the cap"
                " (truncate, TIS) or 0 (mask, MIS)."
            )
        },
    )
    sampling_correction_cap: float = field(
        default=3.0, metadata={"help": "Largest weight of sampling_correction; TRL's is 3."}
    )
    ratio_threshold: float | None = field(
        default=10.0,
        metadata={
            "help": "A microbatch whose mean ratio is above this, or below 1/this, is skipped; null: never."
        },
    )
    critic: Literal["adapter", "shared", "reward_features"] | None = field(
        default=None,
        metadata={
            "help": (
                "adapter: its own, started from the reward adapter. shared: a head on the policy."
                " reward_features: a head on the reward adapter, the default where there is one; otherwise"
                " adapter."
            )
        },
    )
    critic_init: Literal["reward", "policy", "zero"] | None = field(
        default=None,
        metadata={
            "help": (
                "What the critic starts from; the reward adapter where there is one if unset. policy, zero:"
                " head of 0."
            )
        },
    )
    critic_warmup_rollouts: int = field(
        default=0, metadata={"help": "First rollouts in which the critic alone learns."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the critic's loss."})
    cliprange_value: float | None = field(
        default=0.2, metadata={"help": "The critic moves at most this far a rollout; null: no bound."}
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "The critic's learning rate; learning_rate if unset."}
    )
    value_lr_scheduler_type: str | None = field(
        default=None, metadata={"help": "The critic's schedule; lr_scheduler_type if unset."}
    )
    value_warmup_steps: int = field(
        default=0, metadata={"help": "Warm-up steps of the critic's learning rate."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount a token."})
    lam: float = field(default=0.95, metadata={"help": "GAE's trade of bias for variance."})
    lam_critic: float | None = field(
        default=None, metadata={"help": "lam of what the critic learns: VC-PPO's, 1.0 there."}
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Bonus for entropy in the loss."})
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Moving average of the policy in ema/, such as 0.992."},
    )
    ptx_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of the loss on ptx_dataset_name (PPO-ptx)."},
    )
    ptx_batch_size: int = field(default=4, metadata={"help": "Pretraining texts a microbatch."})
    train_layers: str = field(
        default="all",
        metadata={
            "help": "all, or top-K: train the K uppermost layers only; those below are run once a rollout."
        },
    )
    reuse_trunk: bool = field(
        default=True,
        metadata={"help": "Run the layers below what trains once a rollout; all passes use the output."},
    )
    trunk_memory: Literal["auto", "device", "host"] = field(
        default="auto",
        metadata={
            "help": (
                "Where that output waits for the update. auto: on the host where it needs more than half of"
                " the memory that is left."
            )
        },
    )

    # Evaluation on held-out prompts while training. eval_strategy, eval_steps and
    # load_best_model_at_end are those of transformers.
    num_eval_prompts: int = field(
        default=64, metadata={"help": "Held-out prompts of an evaluation, the same ones each time."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "End after so many without a better eval_objective."}
    )

    # TrainingArguments with another default. The lengths are None here, since they follow from the
    # size of a rollout, and are filled in when the settings are made.
    learning_rate: float = field(default=1e-4, metadata={"help": "The policy's peak learning rate."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "As in transformers."})
    logging_steps: float | None = field(
        default=None, metadata={"help": "In optimizer steps; once a rollout if unset."}
    )
    save_steps: float | None = field(
        default=None, metadata={"help": "Optimizer steps, in whole rollouts; 10 rollouts if unset."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    eval_steps: float | None = field(
        default=None, metadata={"help": "Optimizer steps, in whole rollouts; save_steps if unset."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: functions read columns."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay off: it hides broken losses."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code from the model's repository. Off unless you asked."}
    )

    def __post_init__(self) -> None:
        """Fill in what follows from other settings, and check all of them."""
        settle_types(self)
        # One text without brackets in a YAML file is a string, whose letters would each end a
        # reply.
        if isinstance(self.stop_strings, str):
            self.stop_strings = [self.stop_strings]
        if isinstance(self.stop_token_ids, int):
            self.stop_token_ids = [self.stop_token_ids]
        self._check_ranges()
        self._fill_in()
        super().__post_init__()

        # What only transformers' own checks have settled: processes, and strategies as enums.
        alone = self.rollout_engine == "transformers" or self.world_size == 1
        self._require(
            "rollout_engine",
            alone,
            f"serves one process, not {self.world_size}; use rollout_engine: transformers",
        )
        self._check_whole_rollouts("save_steps", self.save_strategy, "cannot be resumed exactly")
        self._check_whole_rollouts("eval_steps", self.eval_strategy, "has no checkpoint of its own")
        never = str(self.eval_strategy) in ("no", "IntervalStrategy.NO")
        self._require(
            "early_stopping_patience",
            self.early_stopping_patience is None or not never,
            "nothing is evaluated; set eval_strategy: steps and eval_dataset_name",
        )

    def _fill_in(self) -> None:
        """Count in optimizer steps what is given in rollouts, and set the defaults that follow.

        Raises:
            UserError: max_steps and num_rollouts contradict each other.
        """
        steps = self.steps_per_rollout
        if self.num_rollouts is not None:
            if self.max_steps not in (-1, self.num_rollouts * steps):
                raise UserError(
                    f"max_steps={self.max_steps} and num_rollouts={self.num_rollouts} (of {steps} optimizer"
                    " steps) contradict each other; set one."
                )
            self.max_steps = self.num_rollouts * steps
        if self.logging_steps is None:
            self.logging_steps = steps
        if self.save_steps is None:
            self.save_steps = _SAVE_EVERY_ROLLOUTS * steps
        if self.eval_steps is None:
            self.eval_steps = self.save_steps
        # The best checkpoint and early stopping go by the same number.
        if self.load_best_model_at_end or self.early_stopping_patience is not None:
            self.metric_for_best_model = self.metric_for_best_model or "eval_objective"
            if self.greater_is_better is None:
                self.greater_is_better = True

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps made on one rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    def rollouts(self, prompts: int) -> int:
        """Return how many rollouts a run over so many prompts has."""
        if self.max_steps > 0:
            return self.max_steps // self.steps_per_rollout
        of_rollout = self.rollout_batch_size // self.num_generations * self.world_size
        return int(self.num_train_epochs * (prompts // of_rollout))

    @property
    def needs_critic(self) -> bool:
        """Whether advantages are taken against a learned value."""
        return self.advantage_estimator == "gae"

    def role_plan(self, *, has_policy: bool, has_reward: bool) -> RolePlan:
        """Return the roles of a run with or without a trained policy adapter and a reward adapter.

        Raises:
            UserError: the critic cannot start as ``critic_init`` says, or has nothing to read.
        """
        # Replies that are compared with one another need none.
        critic = None
        if self.needs_critic:
            critic = self.critic or default_critic(has_reward=has_reward)
        return RolePlan.of(
            critic=critic,
            critic_init=self.critic_init,
            has_policy=has_policy,
            has_reward=has_reward,
            average=self.ema_decay is not None,
            train_layers=self.train_layers,
        )

    @property
    def critic_warmup_steps(self) -> int:
        """First optimizer steps in which the critic alone learns."""
        return self.critic_warmup_rollouts * self.steps_per_rollout

    @property
    def has_two_schedules(self) -> bool:
        """Whether the critic's learning rate goes by a schedule of its own."""
        own = self.value_lr_scheduler_type or self.value_warmup_steps or self.critic_warmup_rollouts
        return self.needs_critic and bool(own)

    @property
    def resume_rules(self) -> SettingRules:
        """Which settings a resumed run may have otherwise."""
        if self.kl_target is None:
            return RESUME_RULES
        # An adaptive price goes on from the checkpoint's: the setting is where it began
        kept = tuple(name for name in RESUME_RULES.may_differ if name != "kl_coef")
        return RESUME_RULES._replace(may_differ=kept)

    @property
    def sampled_kl_estimator(self) -> KLEstimator:
        """The estimator of the KL from sampled tokens, where it is not the exact one."""
        if self.kl_estimator == "exact":
            raise ValueError("kl_estimator=exact is no estimator: the roles give this KL")
        return self.kl_estimator

    @property
    def critic_learning_rate(self) -> float:
        """The critic's peak learning rate."""
        return self.learning_rate if self.value_learning_rate is None else self.value_learning_rate

    @property
    def rollout_batch_size(self) -> int:
        """Replies of one rollout on one process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches

    def _check_ranges(self) -> None:
        """Check each setting by itself, and those that must go together.

        Raises:
            UserError: naming the setting, its value, and what it may be.
        """
        check_finite(self)
        check_training(self)
        self._check_numbers()
        self._check_rollout()
        self._check_engine()
        self._check_reward()
        self._check_kl()
        self._check_update()
        self._check_critic()
        self._check_what_stays_off()

    def _check_numbers(self) -> None:
        """Check counts and coefficients that have a bound of 0 or 1."""
        # Counts: none of these can be nothing.
        at_least_one = (
            "response_length",
            "num_ppo_epochs",
            "num_mini_batches",
            "max_prompt_tokens",
            "ptx_batch_size",
            "num_eval_prompts",
            "kl_horizon",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
        )
        for name in at_least_one:
            self._require(name, getattr(self, name) >= 1, "must be 1 or more")
        self._require_or_null("local_rollout_forward_batch_size", 1, "must be 1 or more, or null")
        # Weights of what comes later in a reply.
        for name in ("gamma", "lam"):
            fits = 0 <= getattr(self, name) <= 1
            self._require(name, fits, "must lie between 0 and 1; 1 and 0.95 are usual")
        # A negative one would pay for what it is to prevent.
        for name in ("kl_coef", "vf_coef", "learning_rate", "entropy_coef", "ptx_coef"):
            self._require(name, getattr(self, name) >= 0, "must not be negative")
        # What is unset here has a default elsewhere.
        for name in ("sample_rows", "value_warmup_steps", "value_learning_rate"):
            self._require(name, (getattr(self, name) or 0) >= 0, "must not be negative")

    def _check_rollout(self) -> None:
        """Check the length of the run, and how replies are drawn and end."""
        self._require_or_null("num_rollouts", 1, "must be 1 or more, or null to go by max_steps or epochs")
        self._require(
            "temperature", self.temperature > 0, "must be positive; rollouts are sampled, never greedy"
        )
        self._require(
            "stop_strings", all(self.stop_strings or []), "an empty text would end every reply at once"
        )
        least = 1 if self.needs_critic else 2
        self._require(
            "num_generations",
            self.num_generations >= least,
            "rloo and grpo compare 2 or more replies a prompt",
        )
        # Each process answers whole groups.
        whole = self.rollout_batch_size % max(1, self.num_generations) == 0
        self._require(
            "num_generations", whole, f"must divide the {self.rollout_batch_size} replies of a rollout"
        )

    def _check_reward(self) -> None:
        """Check the sources of reward, and the scale of scores."""
        self._require_positive_or_null("reward_timeout", "no limit")
        self._require_positive_or_null("score_clip", "no bound")
        self._require(
            "score_calibration_prompts",
            self.score_calibration_prompts >= 2,
            "a standard deviation needs two replies or more",
        )

    def _check_kl(self) -> None:
        """Check the price of the KL, its estimator, and its bounds."""
        self._require_positive_or_null("max_kl", "no bound")
        # Its gradient is the score function, whose mean is 0 under the policy itself.
        in_loss = self.kl_location == "loss" and self.kl_estimator == "k1"
        self._require(
            "kl_estimator",
            not in_loss,
            "in the loss k1 has no gradient on average; use k2 or k3 with kl_location=loss",
        )
        # The exact KL is of all tokens, whichever was drawn: a weight would add noise alone.
        weighed = self.kl_location == "loss" and self.kl_estimator in ("k2", "k3")
        self._require(
            "kl_importance_weight",
            weighed or not self.kl_importance_weight,
            "only a KL of drawn tokens in the loss has a weight; set kl_location: loss and kl_estimator: k2"
            " or k3, or leave it false",
        )
        self._require_positive_or_null("kl_target", "a fixed kl_coef")
        self._require(
            "kl_coef",
            self.kl_target is None or self.kl_coef > 0,
            "must be positive with kl_target: from 0 it could never grow",
        )

    def _check_update(self) -> None:
        """Check the bounds of the update, what of the policy trains, and when it stops."""
        self._require("cliprange", 0 < self.cliprange < 1, "must lie between 0 and 1; 0.2 is usual")
        self._require(
            "cliprange_high",
            self.cliprange_high is None or self.cliprange_high >= self.cliprange,
            f"must not be below cliprange={self.cliprange}, or null for cliprange; DAPO's is 0.28 beside 0.2",
        )
        self._require(
            "sampling_correction_cap",
            self.sampling_correction_cap >= 1,
            "must be 1 or more, the weight of a token that both find equally likely; 3 is TRL's",
        )
        self._require(
            "sampling_correction_cap",
            self.sampling_correction != "mask" or self.sampling_correction_cap > 1,
            "leaves out tokens whose probability has risen by rounding alone, with sampling_correction=mask;"
            " set it above 1, as TRL's 3",
        )
        self._require(
            "max_tokens_per_microbatch",
            self.max_tokens_per_microbatch is None or self.max_tokens_per_microbatch >= 1,
            "must be 1 or more, or null for no bound",
        )
        self._require(
            "ratio_threshold",
            self.ratio_threshold is None or self.ratio_threshold > 1,
            "must be above 1, or null for no bound",
        )
        self._require(
            "ema_decay",
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "must lie between 0 and 1; 0.992 is InstructGPT's",
        )
        known = self.lr_scheduler_type in _SCHEDULES
        self._require("lr_scheduler_type", known, f"must be one of {', '.join(_SCHEDULES)}")
        # The base is not known yet: any number of layers that is spelt right
        top_layers(self.train_layers, 10**6, "train_layers")
        self._require_or_null("early_stopping_patience", 1, "must be 1 or more, or null for no early stop")

    def _check_critic(self) -> None:
        """Check the bound and the schedule of the critic, where there is one."""
        self._require_positive_or_null("cliprange_value", "no bound")
        self._require("critic_warmup_rollouts", self.critic_warmup_rollouts >= 0, "must not be negative")
        self._require(
            "critic_warmup_rollouts",
            self.needs_critic or not self.critic_warmup_rollouts,
            "rloo and grpo have no critic to warm up",
        )
        own = self.lam_critic
        self._require("lam_critic", own is None or 0 <= own <= 1, "must lie between 0 and 1; 1.0 is VC-PPO's")
        self._require(
            "lam_critic", own is None or self.needs_critic, "rloo and grpo have no critic to learn by it"
        )
        # ReduceLROnPlateau goes by a metric, not by the step alone.
        schedules = [name for name in _SCHEDULES if name != SchedulerType.REDUCE_ON_PLATEAU]
        known = self.value_lr_scheduler_type is None or self.value_lr_scheduler_type in schedules
        self._require("value_lr_scheduler_type", known, f"must be one of {', '.join(schedules)}")

    def _check_what_stays_off(self) -> None:
        """Check settings of transformers that would break a run without a word."""
        # One precision for all roles: rollout and update are compared token by token.
        for name in ("bf16", "fp16"):
            self._require(
                name,
                not getattr(self, name),
                "the base's dtype decides in which precision all roles compute; set dtype: bfloat16",
            )
        self._require(
            "remove_unused_columns",
            not self.remove_unused_columns,
            "reward functions get the data's columns; leave it false",
        )
        self._require(
            "logging_nan_inf_filter",
            not self.logging_nan_inf_filter,
            "it hides broken losses; leave it false",
        )

    def _check_engine(self) -> None:
        """Check what generates the replies."""
        self._require(
            "vllm_memory_share",
            0 < self.vllm_memory_share < 1,
            "must lie between 0 and 1; 0.3 leaves the rest to training",
        )
        # vLLM has a base of its own, and other limits than transformers.
        if self.rollout_engine == "vllm":
            self._require(
                "rollout_weights",
                self.rollout_weights != "dense",
                "rollout_engine: vllm has weights of its own; leave it out",
            )
            self._require(
                "temperature",
                self.temperature >= _VLLM_COLDEST,
                f"vLLM takes {_VLLM_COLDEST} for anything below it",
            )

    def _require_positive_or_null(self, name: str, null_means: str) -> None:
        value = getattr(self, name)
        self._require(name, value is None or value > 0, f"must be positive, or null for {null_means}")

    def _require_or_null(self, name: str, least: int, why: str) -> None:
        value = getattr(self, name)
        self._require(name, value is None or value >= least, why)

    def _require(self, name: str, holds: bool, why: str) -> None:
        """Raise UserError with the setting, its value and ``why``, unless it ``holds``."""
        if not holds:
            raise UserError(f"{name}={getattr(self, name)}: {why}.")

    def _check_whole_rollouts(self, name: str, strategy: object, why: str) -> None:
        """Check that what happens every so many steps happens between rollouts."""
        # Inside a rollout, a checkpoint would have to carry its replies and states.
        steps, every = self.steps_per_rollout, getattr(self, name) or 0
        if str(getattr(strategy, "value", strategy)) != "steps" or every % steps == 0:
            return
        fits = max(1, round(every / steps)) * steps
        raise UserError(
            f"{name}={every:g} falls inside a rollout ({steps} optimizer steps each), and such a checkpoint"
            f" {why}. Use {name}={fits}."
        )
