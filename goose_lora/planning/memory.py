"""How much memory a PPO run needs, phase by phase, from its configuration alone.

No weights are read: parameters are counted on the meta device (``shapes``), and what a pass holds
besides follows from which tensors the forward keeps for the backward pass (``costs``).
docs/memory.md has the list, and how far the plan is from measured peaks.

Not counted: the allocator's fragmentation, workspaces of kernels, and the CUDA context, for which
a GPU is left a margin; and a classifier named as reward function. ``ways`` has what a run that does
not fit can change.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from goose_lora.errors import UserError
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.compatibility import meta_model
from goose_lora.models.dense_copy import (
    RolloutWeights,
    takes_dense_copy,
    whole_columns,
    why_not_compiled,
)
from goose_lora.models.folders import AdapterFolder, context_of, steady_length
from goose_lora.models.trunk import captured_depth
from goose_lora.planning.costs import PassCosts
from goose_lora.planning.shapes import FP32, read_model, read_roles
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.memory_rules import USUAL_GROUP, largest_group, scoring_keeps_graph, waits_on_host

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
PARTS = ("base", "adapters", "optimizer", "dense copy", "vllm", "cache", "trunk", "activations", "logits")
UNMEASURED = "Not counted: the allocator's fragmentation, and workspaces of kernels"
# What a GPU takes besides the tensors: measured on one H100 (docs/memory.md).
MARGIN_SHARE, MARGIN_BYTES = 0.15, 6 * 10**8
# The largest sizes that ``Planner.largest`` tries.
MOST_ROWS, MOST_TOKENS = 4096, 32768


@dataclass(frozen=True)
class Plan:
    """Bytes of each phase by part."""

    phases: dict[str, dict[str, int]]

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def phase(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.phase)

    def table(self) -> str:
        """Return a line a part and a column a phase, in MB or GB: 10^6 or 10^9 bytes."""
        # A small run would be all zeros in GB.
        name, unit = "GB", 10**9
        if self.peak < 10**9:
            name, unit = "MB", 10**6
        lines = [f"{name:<12}" + "".join(f"{phase:>10}" for phase in self.phases)]
        for part in PARTS:
            numbers = [self.phases[phase].get(part, 0) / unit for phase in self.phases]
            if any(numbers):
                lines.append(f"{part:<12}" + "".join(f"{number:>10.2f}" for number in numbers))
        totals = [self.total(phase) / unit for phase in self.phases]
        lines.append(f"{'together':<12}" + "".join(f"{total:>10.2f}" for total in totals))
        return "\n".join(lines)


@dataclass(frozen=True)
class Sizes:
    """The settings that a user may lower, and the number of microbatches of a rollout."""

    rows: int
    rollout_rows: int
    response_tokens: int
    prompt_tokens: int
    microbatches: int

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt_tokens + self.response_tokens

    @property
    def replies(self) -> int:
        """Replies of a rollout."""
        return self.rows * self.microbatches

    @property
    def group_rows(self) -> int:
        """Replies of a rollout that are scored at a time."""
        return min(self.rollout_rows, self.replies)


class Planner:
    """Plans of one run at any sizes.

    Args:
        core: the base, on the meta device.
        policy, reward: folders of adapters, as in recipes/ppo.py.
        prompt_tokens: longest prompt; ``max_prompt_tokens`` if not given.
        ptx_tokens: longest pretraining text, where ``ptx_coef`` is above 0.
        memory: bytes that there are, for ``rollout_weights: auto``.
        device: where the run will be, cuda or cpu.
    """

    def __init__(
        self,
        core: PreTrainedModel,
        args: ModelArguments,
        config: PPOConfig,
        *,
        policy: AdapterFolder | str | None = None,
        reward: AdapterFolder | str | None = None,
        prompt_tokens: int | None = None,
        ptx_tokens: int = 0,
        memory: int | None = None,
        device: str = "cuda",
    ):
        self.core, self.args, self.config, self.ptx_tokens = core, args, config, ptx_tokens
        self.policy, self.reward = policy, reward
        self.memory, self.device = memory, device
        self.model = read_model(core, args, device)
        self.roles = read_roles(core, self.model, args, config, policy, reward)
        self.costs = PassCosts(self.model, config)

        # Dense copy and trunk go by what base and adapters leave free.
        self.free = math.inf
        if memory is not None:
            self.free = memory - self.model.base - self.roles.bytes
        self.dense = 0
        self.sizes = Sizes(
            rows=config.per_device_train_batch_size,
            rollout_rows=config.local_rollout_forward_batch_size or USUAL_GROUP,
            response_tokens=config.response_length,
            prompt_tokens=prompt_tokens or config.max_prompt_tokens,
            microbatches=config.gradient_accumulation_steps * config.num_mini_batches,
        )
        # ``auto`` takes the dense copy only where the whole run then fits.
        self.dense = self._dense_bytes()
        if memory is not None and config.rollout_weights == "auto" and not self.fits(self.sizes, memory):
            self.dense = 0
        if config.local_rollout_forward_batch_size is None:
            self.sizes = replace(self.sizes, rollout_rows=self._largest_group())

    def changed(self, changes: Mapping[str, Any], *, memory: int | None = None) -> "Planner":
        """Return the plan of the same run with other settings, those of the model among them."""
        # Copies that are read here and run nowhere: made anew, transformers' settings would lose
        # what they call by two names.
        args, config = copy.copy(self.args), copy.copy(self.config)
        for name, value in changes.items():
            setattr(args if name in vars(args) else config, name, value)
        return Planner(
            self.core,
            args,
            config,
            policy=self.policy,
            reward=self.reward,
            prompt_tokens=min(self.sizes.prompt_tokens, config.max_prompt_tokens),
            ptx_tokens=self.ptx_tokens,
            memory=self.memory if memory is None else memory,
            device=self.device,
        )

    @property
    def rollout_weights(self) -> RolloutWeights:
        """The setting, where ``auto`` is ``shared`` if the run has no room for a dense copy."""
        asked = self.config.rollout_weights
        return "shared" if asked == "auto" and not self.dense else asked

    def _largest_group(self) -> int:
        """Return how many replies are generated and scored at a time, where the settings leave it.

        Groups that take no more than the rest of the run does are free, though it does not fit.
        """
        if self.memory is None:
            return largest_group(lambda rows: True, replies=self.sizes.replies)
        alone = self.needed(replace(self.sizes, rollout_rows=1))
        limit = max(self.memory, alone)
        return largest_group(
            lambda rows: self.fits(replace(self.sizes, rollout_rows=rows), limit),
            replies=self.sizes.replies,
        )

    @property
    def _by_vllm(self) -> bool:
        return self.config.rollout_engine == "vllm"

    def _dense_bytes(self) -> int:
        """Return the bytes of the merged copy for rollouts; 0 where there is none."""
        if self._by_vllm or not self.roles.mergeable:
            return 0
        # The copy has the quantized and the adapted matrices; the rest is the base's own.
        adapted = self.roles.policy.ranks
        copied = [
            linear
            for linear in self.model.linears
            if self.model.quantization != "none" or linear.name in adapted
        ]
        numbers = sum(linear.numbers for linear in copied) + self.roles.policy.embeddings
        need = numbers * self.model.compute
        taken = takes_dense_copy(self.config.rollout_weights, need=need, free=self.free)
        return need if taken else 0

    def _vllm_bytes(self, sizes: Sizes) -> int:
        """Return what vLLM takes of the device.

        It is vLLM's share, or what its own base and the cache need if that is more. A base that is
        quantized here is not quantized there.
        """
        # Its base has the dense matrices, and the rest as here.
        model = self.model
        weights = model.base
        if model.quantization != "none":
            weights += model.dense_bytes
        cache = sizes.rollout_rows * sizes.length * self._cache_of_token * model.layers
        return max(round(self.config.vllm_memory_share * (self.memory or 0)), weights + cache)

    # ---- Phases ----

    def plan(self, sizes: Sizes | None = None) -> Plan:
        """Return the bytes of each phase; ``sizes`` are the configuration's if not given."""
        sizes = sizes or self.sizes
        loaded = {"base": self.model.base, "adapters": self.roles.bytes}

        # AdamW's two averages stay; in the update the gradients join them.
        number = FP32 * self.roles.trained
        trainer = loaded | {"optimizer": 2 * number, "dense copy": self.dense}
        if self._by_vllm and self.device == "cpu":
            trainer["vllm"] = self._vllm_bytes(sizes)  # it sleeps on a GPU alone
        phases = {
            "load": {"base": self.model.loaded, "activations": self.model.largest_weight},
            "generate": trainer | self._generate(sizes),
            "score": trainer | self._score(sizes),
            "update": trainer | {"optimizer": 3 * number} | self._update(sizes),
        }
        return Plan(phases)

    @property
    def _cache_of_token(self) -> int:
        """Bytes of a token's key and value in one layer."""
        return 2 * self.model.keys * self.model.compute

    def _generate(self, sizes: Sizes) -> dict[str, int]:
        if self._by_vllm:
            return {"vllm": self._vllm_bytes(sizes)}
        model = self.model
        rows = min(sizes.rollout_rows, self.most_replies(sizes))
        columns = sizes.length
        if self._static_cache:
            columns = whole_columns(columns)
        one_layer = rows * columns * self._cache_of_token
        cache = one_layer * model.layers

        # The widest points are the pass over the prompt, when the reply's part of the cache is not
        # there yet, and the moment when one layer's cache is copied to one token more. A cache of
        # fixed size is there from the beginning, and never copied.
        active = None if self.dense else self.roles.policy
        prompt = self.costs.forward(rows, sizes.prompt_tokens, active)
        if self._static_cache:
            one_layer = 0
        else:
            prompt -= cache * sizes.response_tokens // sizes.length
        logits = rows * model.vocabulary * (model.compute + FP32)

        # Replies that only learn the scale of scores, or evaluate, leave no trunk.
        trunk = 0
        if self._captures_trunk and not self._waits_on_host(sizes):
            trunk = model.hidden * model.compute * sizes.replies * sizes.length
        return {
            "cache": cache,
            "trunk": trunk,
            "activations": max(prompt - logits, one_layer),
            "logits": logits,
        }

    @property
    def _static_cache(self) -> bool:
        """Whether replies may be decoded by CUDA graphs; short runs leave it out, and need less."""
        asked = self.config.rollout_compile == "auto" and self.device == "cuda"
        on_device = self.dense > 0 and not self.model.on_host
        return asked and on_device and why_not_compiled(self.core) is None

    @property
    def _captures_trunk(self) -> bool:
        policy = self.roles.policy
        if self._by_vllm or not self.config.reuse_trunk:
            return False
        adapted = policy.lowest_layer < policy.trained_from
        return captured_depth(policy.trained_from, merged=self.dense > 0, adapted_below=adapted) > 0

    def most_replies(self, sizes: Sizes) -> int:
        """Return how many replies are ever generated at a time.

        That is in a rollout, to learn the scale of scores, or in an evaluation.
        """
        # The last two are made by the same collector, whatever the size of a rollout.
        config, counts = self.config, [sizes.replies]
        if config.score_normalization == "reference":
            counts.append(config.score_calibration_prompts)
        if config.eval_strategy != "no":
            counts.append(config.num_eval_prompts)
        return max(counts)

    def _experience(self, sizes: Sizes) -> int:
        """Return the bytes of the states of a rollout that are kept for the update.

        They are the trunk's output, features for the critic, and the reference's states for an
        exact KL.
        """
        config, by_reply = self.config, 0
        if config.reuse_trunk:
            by_reply += sizes.length * self.roles.trunks
        if self.roles.plan.critic == "reward_features":
            by_reply += sizes.response_tokens
        if config.kl_estimator == "exact" and config.kl_location == "loss":
            by_reply += sizes.response_tokens
        return self.model.hidden * self.model.compute * sizes.replies * by_reply

    def _waits_on_host(self, sizes: Sizes) -> bool:
        # On a CPU the host's memory is the device's.
        return self.device != "cpu" and waits_on_host(
            self.config.trunk_memory,
            need=self._experience(sizes),
            free=self.free - self.dense,
        )

    def _score(self, sizes: Sizes) -> dict[str, int]:
        costs, rows = self.costs, sizes.group_rows
        kept = self._experience(sizes)
        if self._waits_on_host(sizes):
            kept = kept * rows // sizes.replies

        # Hidden states of the reward model and the reference are there in each pass, and of an
        # ensemble those of one more member.
        states = (2 + bool(self.roles.members)) * rows * sizes.length * self.model.hidden * self.model.compute
        run = states + costs.forward(rows, sizes.length, self.roles.policy)
        logits = states + costs.head(rows * sizes.response_tokens, training=False)
        if self._keeps_graph(sizes):
            policy, value = self._graph(rows, sizes)
            run = max(run, states + policy + value)
            logits = states + policy + costs.head(rows * sizes.response_tokens, training=True)

        # At the end the groups' parts are put together, when both are there.
        widest = max(run, kept, states)
        return {"trunk": kept, "activations": widest, "logits": max(0, logits - widest)}

    def _update(self, sizes: Sizes) -> dict[str, int]:
        costs, rows = self.costs, sizes.rows
        if self.config.max_tokens_per_microbatch is not None:
            rows = min(rows, max(1, self.config.max_tokens_per_microbatch // sizes.length))

        # The head comes after the policy's pass and before the critic's and the backward pass.
        policy, value = self._graph(rows, sizes)
        again = costs.kept_again(self.roles.policy, rows, sizes.length)
        backward = policy + value + again + costs.backward(rows, sizes.length)
        logits = policy + costs.head(rows * sizes.response_tokens, training=True)

        # A microbatch is a copy of its part of the states that wait.
        trunk = self._experience(replace(sizes, microbatches=1))
        if not self._waits_on_host(sizes):
            trunk += self._experience(sizes)
        return {"trunk": trunk, "activations": backward, "logits": max(0, logits - backward)}

    def _graph(self, rows: int, sizes: Sizes) -> tuple[int, int]:
        """Return the bytes that the passes of policy and critic keep for the backward pass."""
        costs, roles, length = self.costs, self.roles, sizes.length
        read = min(1.0, (sizes.response_tokens + 1) / length)
        hidden = self.model.hidden

        # The final norm keeps its input in fp32; the policy's head reads copies of the reply's
        # states.
        final_norm = rows * length * FP32 * hidden
        replies = rows * sizes.response_tokens * hidden * (3 * self.model.compute + FP32)
        policy = costs.kept(roles.policy, rows, length, read) + final_norm + replies
        if self.config.ptx_coef > 0:
            policy += costs.kept(roles.policy, self.config.ptx_batch_size, self.ptx_tokens)
        value = 0
        if roles.value is not None and roles.plan.critic == "adapter":
            value = costs.kept(roles.value, rows, length, read) + final_norm
        return policy, value

    def _keeps_graph(self, sizes: Sizes) -> bool:
        return scoring_keeps_graph(
            replies=sizes.replies,
            microbatch_rows=sizes.rows,
            group_rows=sizes.rollout_rows,
            max_tokens=self.config.max_tokens_per_microbatch,
            pretraining=self.config.ptx_coef > 0,
        )

    # ---- What fits ----

    def needed(self, sizes: Sizes | None = None) -> int:
        """Return the bytes that the run needs: its widest phase, and a GPU's margin."""
        return with_margin(self.plan(sizes).peak, self.device)

    def fits(self, sizes: Sizes, memory: float) -> bool:
        """Return whether the run needs no more than ``memory`` bytes at ``sizes``."""
        return self.needed(sizes) <= memory

    def largest(self, memory: float) -> dict[str, int]:
        """Return the largest sizes that fit into ``memory`` bytes, by name of the setting.

        0 stands where nothing fits. The batch sizes fit together at the response length as it is;
        the response length fits at the batch sizes as they are. None is looked for above 4096 rows,
        as many replies as there are, or 32768 tokens and the base's context.
        """

        def fitting(sizes: Sizes, name: str, limit: int) -> int:
            return largest_number(lambda number: self.fits(replace(sizes, **{name: number}), memory), limit)

        # Groups of one row leave the most room for microbatches.
        rows = fitting(replace(self.sizes, rollout_rows=1), "rows", MOST_ROWS)
        beside = replace(self.sizes, rows=max(1, min(rows, self.sizes.rows)))
        # A run refuses longer texts than its base can read
        known = [context_of(self.core.config), steady_length(self.core.config)]
        room = min([MOST_TOKENS, *(bound - self.sizes.prompt_tokens for bound in known if bound is not None)])
        return {
            "per_device_train_batch_size": rows,
            "local_rollout_forward_batch_size": fitting(beside, "rollout_rows", self.most_replies(beside)),
            "response_length": fitting(self.sizes, "response_tokens", room),
        }

    def report(self, memory: float | None = None) -> str:
        """Return the plan as text, and what fits into ``memory``."""
        sizes, plan = self.sizes, self.plan()
        lines = [
            (
                f"{self.name}: {sizes.rows} rows a microbatch, {sizes.rollout_rows} at a time in a rollout of"
                f" {sizes.replies}, {sizes.prompt_tokens} + {sizes.response_tokens} tokens each"
            ),
            plan.table(),
        ]
        if memory is not None:
            if self.config.local_rollout_forward_batch_size is None and self.fits(sizes, memory):
                lines.append(
                    f"Replies at a time: {sizes.rollout_rows}, as many as fit"
                    " (local_rollout_forward_batch_size is not set)."
                )
            lines.append(
                f"{plan.phase} takes most, {self._need()} of {amount(memory)}. Largest that fits:"
                f" {self.advice(memory)}."
            )
        context = ""
        if self.device != "cpu":
            context = ", and the CUDA context; the margin is for them"
        return "\n".join([*lines, f"{UNMEASURED}{context}."])

    @property
    def name(self) -> str:
        """The base and how it is kept."""
        return f"{self.args.model_name_or_path}, {self.args.quantization}, {self.args.dtype}"

    def _need(self) -> str:
        """Return in words what the run needs."""
        peak = self.plan().peak
        if self.device == "cpu":
            return amount(peak)
        return (
            f"{amount(self.needed())} ({amount(peak)}, and a margin of {MARGIN_SHARE:.0%} and"
            f" {amount(MARGIN_BYTES)})"
        )

    def advice(self, memory: float) -> str:
        """Return the largest sizes in words."""
        # A size of 0 would not be a setting: not even one row or token fits.
        found = self.largest(memory).items()
        rows, group, tokens = (f"{name}={number}" if number else f"no {name}" for name, number in found)
        return f"{rows} and {group} at this response_length, or {tokens} at these batch sizes"

    def lack(self, memory: float) -> str | None:
        """Say what the run needs and what there is; None where it fits."""
        if self.fits(self.sizes, memory):
            return None
        return (
            f"the run does not fit: {self.plan().phase} takes {self._need()}, and {amount(memory)} are free."
        )


def with_margin(peak: int, device: str) -> int:
    """Return what a run of that peak needs of a device."""
    # The host's memory has no context of a device, and its allocator gives back what is freed.
    if device == "cpu":
        return peak
    return math.ceil(peak * (1 + MARGIN_SHARE)) + MARGIN_BYTES


def largest_number(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number up to ``limit`` for which ``fits`` holds; 0 if for none.

    ``fits`` holds below any number for which it does.
    """
    if limit < 1 or not fits(1):
        return 0
    # Bisection: low fits, and high is above what fits.
    low, high = 1, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


@dataclass
class PlannedRoles:
    """The settings of recipes/ppo.py that concern roles and take memory."""

    policy_adapter: str | None = field(default=None, metadata={"help": "Folder of the SFT adapter."})
    reward_adapter: str | None = field(default=None, metadata={"help": "Folder of the reward adapter."})
    ptx_max_length: int = field(default=512, metadata={"help": "Longer pretraining texts are cut."})


def plan_run(
    args: ModelArguments,
    config: PPOConfig,
    *,
    policy: AdapterFolder | str | None,
    reward: AdapterFolder | str | None,
    memory: int | None,
    device: str,
    prompt_tokens: int | None = None,
    ptx_tokens: int = 0,
) -> Planner:
    """Plan a run of recipes/ppo.py.

    ``prompt_tokens`` is the longest prompt, where it is known; ``ptx_tokens`` the longest text of
    pretraining. An adapter that is not trained yet is given by its name.
    """
    return Planner(
        meta_model(args, trust_remote_code=config.trust_remote_code),
        args,
        config,
        policy=policy,
        reward=reward,
        prompt_tokens=prompt_tokens,
        ptx_tokens=ptx_tokens,
        memory=memory,
        device=device,
    )


def amount(number: float) -> str:
    """Return bytes in words, in units of 10^6 or 10^9."""
    return f"{number / 10**9:.2f} GB" if number >= 10**9 else f"{number / 10**6:.1f} MB"


def read_memory(text: str, option: str = "--memory") -> int:
    """Return the bytes of a text such as 24GB, 16 GiB or 800MB.

    Raises:
        UserError: any other text.
    """
    # The unit is the letters at the end.
    number = text.strip().upper().rstrip("BIKMG ")
    unit = text.strip().upper()[len(number) :].strip()
    try:
        amount = round(float(number) * UNITS[unit])
        if amount <= 0:
            raise ValueError
        return amount
    except (ValueError, KeyError, OverflowError):
        raise UserError(
            f"{option} {text}: write a number and one of KB, MB, GB, KiB, MiB and GiB, such as 24GB."
        ) from None
