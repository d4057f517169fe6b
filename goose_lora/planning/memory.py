"""How much memory a PPO run needs, phase by phase, from its configuration alone: no weights are
read.

Parameters are counted on the meta device (``shapes``). What a phase holds besides follows from
which tensors the forward keeps for the backward
pass: docs/memory.md has the list, and how far the plan is from measured peaks.
Not counted: the allocator's fragmentation, workspaces of kernels, the CUDA context, and a
classifier named as reward function.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from goose_lora.errors import UserError
from goose_lora.functional import CHUNK_TOKENS
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.compatibility import meta_model
from goose_lora.models.dense_copy import takes_dense_copy
from goose_lora.models.trunk import BY_POSITION, captured_depth
from goose_lora.planning.shapes import FP32, Adapter, Linear, read_model, read_roles
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.memory_rules import scoring_keeps_graph, waits_on_host

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
PARTS = ("base", "adapters", "optimizer", "dense copy", "vllm", "cache", "trunk", "activations", "logits")
UNMEASURED = (
    "Not counted: the allocator's fragmentation, workspaces of kernels, and the CUDA context; on an H100 15 %"
    " and 0.6 GB. Leave them room."
)


@dataclass(frozen=True)
class Plan:
    """Bytes of each phase by part."""

    phases: dict[str, dict[str, int]]

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def phase(self) -> str:
        """The one that takes most."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.phase)

    def table(self) -> str:
        """A line a part, a column a phase, in GB of 10^9 bytes."""
        small = self.peak < 10**9
        unit, name = (10**6, "MB") if small else (10**9, "GB")
        lines = [f"{name:<12}" + "".join(f"{phase:>10}" for phase in self.phases)]
        for part in PARTS:
            numbers = [self.phases[phase].get(part, 0) / unit for phase in self.phases]
            if any(numbers):
                lines.append(f"{part:<12}" + "".join(f"{number:>10.2f}" for number in numbers))
        return "\n".join(
            [
                *lines,
                f"{'together':<12}" + "".join(f"{self.total(phase) / unit:>10.2f}" for phase in self.phases),
            ]
        )


@dataclass(frozen=True)
class Sizes:
    """The settings that a user may lower, and ``microbatches`` of a rollout."""

    rows: int
    rollout_rows: int
    response_tokens: int
    prompt_tokens: int
    microbatches: int

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.response_tokens

    @property
    def all_rows(self) -> int:
        return self.rows * self.microbatches


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
        core: Any,
        args: ModelArguments,
        config: PPOConfig,
        *,
        policy: str | None = None,
        reward: str | None = None,
        prompt_tokens: int | None = None,
        ptx_tokens: int = 0,
        memory: int | None = None,
        device: str = "cuda",
    ):
        self.config, self.ptx_tokens, self.name = (
            config,
            ptx_tokens,
            f"{args.model_name_or_path}, {args.quantization}, {args.dtype}",
        )
        self.model = read_model(core, args, device)
        self.roles = read_roles(core, self.model, args, config, policy, reward)
        self.memory, self.device = memory, device
        # For dense copy and trunk
        self.free = math.inf if memory is None else memory - self.model.base - self.roles.bytes
        self.dense = self._dense_bytes()
        microbatches = config.gradient_accumulation_steps * config.num_mini_batches
        batch, group = config.per_device_train_batch_size, config.local_rollout_forward_batch_size
        self.sizes = Sizes(
            batch, group, config.response_length, prompt_tokens or config.max_prompt_tokens, microbatches
        )

    def _dense_bytes(self) -> int:
        """Of the merged copy for rollouts: the quantized and the adapted matrices."""
        if self.config.rollout_engine == "vllm":
            return 0
        chosen = [
            x
            for x in self.model.linears
            if self.model.quantization != "none" or x.name in self.roles.policy.ranks
        ]
        need = sum(x.inputs * x.outputs for x in chosen) * self.model.compute
        return need if takes_dense_copy(self.config.rollout_weights, need=need, free=self.free) else 0

    def _vllm_bytes(self, sizes: Sizes) -> int:
        """What vLLM takes of the device: its share, or what a base of its own and the cache need if
        that is more. A base that is quantized here is not quantized there."""
        model = self.model
        weights = model.base + (
            sum(x.inputs * x.outputs for x in model.linears) * model.compute
            if model.quantization != "none"
            else 0
        )
        cache = sizes.rollout_rows * sizes.length * 2 * model.keys * model.compute * model.layers
        return max(round(self.config.vllm_memory_share * (self.memory or 0)), weights + cache)

    # ---- What one token, or one row, takes ----

    def saved(self, adapter: Adapter, layer: int, length: int, read: float = 1.0) -> int:
        """Bytes a token that one layer under ``adapter`` keeps for its backward pass. ``read``: the
        share of the last layer's positions that are."""
        model, number = self.model, self.model.compute
        linears = [x for x in model.linears if x.layer == layer]
        spared = [x for x in linears if read < 1 and set(x.name.split(".")) & set(BY_POSITION)]
        feed = [x for x in linears if not x.in_attention]
        gates = sum(x.outputs for x in feed[:-1]) if feed else 0
        activation = (gates + (model.wide if gates >= 2 * model.wide else 0)) * (
            read if feed and feed[0] in spared else 1
        )
        attention = 4 * model.queries * number + FP32 * model.heads
        attention += length * (number if model.fused_attention else model.heads * (FP32 + number))
        inputs = self._inputs(
            adapter, linears, [x for x in linears if x not in spared]
        ) + read * self._inputs(adapter, linears, spared)
        return int(FP32 * model.norms + number * (inputs + activation) + attention)

    def _inputs(self, adapter: Adapter, linears: list[Linear], part: list[Linear]) -> int:
        """Numbers a token that the linears of ``part`` keep of their inputs and of LoRA's inner
        states; ``linears`` are all of their layer."""
        adapted = [x for x in part if x.name in adapter.ranks]
        inner = sum(adapter.ranks[x.name] for x in adapted)
        if self.model.casts:
            return sum(x.inputs for x in adapted) + inner
        # the input itself; the attention's output is kept anyway
        return (
            sum(max((x.inputs for x in group if x in adapted), default=0) for group in _by_input(linears))
            + inner
        )

    def kept(self, adapter: Adapter, rows: int, length: int, read: float = 1.0) -> int:
        """Bytes that a forward of ``rows`` rows keeps until the backward pass: of all layers, or
        with checkpointing of their inputs."""
        layers = range(adapter.trained_from, self.model.layers)
        if self.config.gradient_checkpointing:
            return rows * length * self.model.hidden * self.model.compute * len(layers)
        shares = [read if layer == self.model.layers - 1 else 1.0 for layer in layers]
        saved = sum(
            self.saved(adapter, layer, length, share) for layer, share in zip(layers, shares, strict=True)
        )
        return rows * length * saved + self.cast(adapter)

    def cast(self, adapter: Adapter) -> int:
        """Bytes of the copies of an adapter in the base's dtype, which autocast keeps during a
        forward."""
        return adapter.parameters * self.model.compute if self.model.compute < FP32 else 0

    def forward(self, rows: int, tokens: int, adapter: Adapter | None) -> int:
        """Bytes that a forward without gradients takes at its widest point, inside the feed-forward
        part of one layer."""
        model = self.model
        wide = model.compute * ((3 if adapter is None else 4) * model.wide + 3 * model.hidden)
        wide += FP32 * model.hidden if model.casts and adapter is not None else 0
        attention = model.compute * (5 * model.queries + 2 * model.hidden)
        mask = tokens * (1 + model.compute)
        return (
            rows * tokens * (max(wide, attention) + mask)
            + model.largest_weight
            + (self.cast(adapter) if adapter is not None else 0)
        )

    def backward(self, rows: int, length: int) -> int:
        """Bytes of gradients at the widest point of a layer's backward pass."""
        model = self.model
        return rows * length * model.compute * (2 * model.wide + 2 * model.hidden) + model.largest_weight

    def head(self, tokens: int, *, training: bool) -> int:
        """Bytes of the language-model head over one chunk of response tokens, in fp32."""
        config = self.config
        chunk = min(CHUNK_TOKENS, tokens)
        tables = 5 if training and config.entropy_coef > 0 else 3
        if config.kl_estimator == "exact" and (not training or config.kl_location == "loss"):
            tables = max(tables, 6 if tokens > CHUNK_TOKENS else 4)
        return FP32 * tables * chunk * self.model.vocabulary

    # ---- Phases ----

    def plan(self, sizes: Sizes | None = None) -> Plan:
        """Bytes of each phase; ``sizes`` are the configuration's if not given."""
        sizes = sizes or self.sizes
        loaded = {"base": self.model.base, "adapters": self.roles.bytes}
        trainer = loaded | {"optimizer": 2 * FP32 * self.roles.trained, "dense copy": self.dense}
        if self.config.rollout_engine == "vllm" and self.device == "cpu":
            trainer["vllm"] = self._vllm_bytes(sizes)  # it sleeps on a GPU alone
        phases = {
            "load": {"base": self.model.base, "activations": self.model.largest_weight},
            "generate": trainer | self._generate(sizes),
            "score": trainer | self._score(sizes),
            "update": trainer | {"optimizer": 3 * FP32 * self.roles.trained} | self._update(sizes),
        }
        return Plan(phases)

    def _generate(self, sizes: Sizes) -> dict[str, int]:
        if self.config.rollout_engine == "vllm":
            return {"vllm": self._vllm_bytes(sizes)}
        model, rows = self.model, min(sizes.rollout_rows, self._replies(sizes))
        of_token = 2 * model.keys * model.compute
        cache = rows * sizes.length * of_token * model.layers
        grown = rows * sizes.length * of_token  # while one layer's cache is copied to one token more
        # The prompt is read before the reply's part of the cache is there.
        prompt = (
            self.forward(rows, sizes.prompt_tokens, None if self.dense else self.roles.policy)
            - cache * sizes.response_tokens // sizes.length
        )
        logits = rows * model.vocabulary * (model.compute + FP32)
        # Noted on the way, but for what is generated to learn the scale of scores or to evaluate.
        noted = (
            model.hidden * model.compute * sizes.all_rows * sizes.length
            if self._notes_trunk and not self._waits_on_host(sizes)
            else 0
        )
        return {"cache": cache, "trunk": noted, "activations": max(prompt - logits, grown), "logits": logits}

    @property
    def _notes_trunk(self) -> bool:
        policy = self.roles.policy
        if self.config.rollout_engine == "vllm" or not self.config.reuse_trunk:
            return False
        adapted = policy.lowest_layer < policy.trained_from
        return captured_depth(policy.trained_from, merged=self.dense > 0, adapted_below=adapted) > 0

    def _replies(self, sizes: Sizes) -> int:
        """How many are ever generated at a time: in a rollout, to learn the scale of scores, or in
        an evaluation."""
        config = self.config
        calibration = config.score_calibration_prompts if config.score_normalization == "reference" else 0
        return max(
            sizes.all_rows, calibration, config.num_eval_prompts if config.eval_strategy != "no" else 0
        )

    def _experience(self, sizes: Sizes) -> int:
        """What of a rollout is kept for the update: the trunk's output, features for the critic,
        the reference's states for an exact KL."""
        config, model = self.config, self.model
        state = model.hidden * model.compute * sizes.all_rows
        trunk = sizes.length * self.roles.trunks if config.reuse_trunk else 0
        features = sizes.response_tokens if self.roles.plan.critic == "reward_features" else 0
        reference = (
            sizes.response_tokens if config.kl_estimator == "exact" and config.kl_location == "loss" else 0
        )
        return state * (trunk + features + reference)

    def _waits_on_host(self, sizes: Sizes) -> bool:
        # On a CPU the host's memory is the device's.
        return self.device != "cpu" and waits_on_host(
            self.config.trunk_memory, need=self._experience(sizes), free=self.free - self.dense
        )

    def _score(self, sizes: Sizes) -> dict[str, int]:
        rows = min(sizes.rollout_rows, sizes.all_rows)
        kept = self._experience(sizes)
        if self._waits_on_host(sizes):
            kept = kept * rows // sizes.all_rows
        # Of the reward model and the reference
        states = 2 * rows * sizes.length * self.model.hidden * self.model.compute
        run = states + self.forward(rows, sizes.length, self.roles.policy)
        logits = states + self.head(rows * sizes.response_tokens, training=False)
        if self._keeps_graph(sizes):
            policy, value = self._graph(rows, sizes)
            run = max(run, states + policy + value)
            logits = states + policy + self.head(rows * sizes.response_tokens, training=True)
        # At the end the groups' parts are put together, when both are there.
        widest = max(run, kept, states)
        return {"trunk": kept, "activations": widest, "logits": max(0, logits - widest)}

    def _update(self, sizes: Sizes) -> dict[str, int]:
        config, model, roles = self.config, self.model, self.roles
        rows, length = sizes.rows, sizes.length
        if config.max_tokens_per_microbatch is not None:
            rows = min(rows, max(1, config.max_tokens_per_microbatch // length))
        policy, value = self._graph(rows, sizes)
        again = 0
        if config.gradient_checkpointing:
            again = (
                rows
                * length
                * max(
                    self.saved(roles.policy, layer, length)
                    for layer in range(roles.policy.trained_from, model.layers)
                )
            )
        backward = policy + value + again + self.backward(rows, length)
        logits = self.head(rows * sizes.response_tokens, training=True)
        slices = self._experience(replace(sizes, microbatches=1))
        waiting = 0 if self._waits_on_host(sizes) else self._experience(sizes)
        return {
            "trunk": waiting + slices,
            "activations": backward,
            "logits": max(0, policy + logits - backward),
        }

    def _graph(self, rows: int, sizes: Sizes) -> tuple[int, int]:
        """What the passes of policy and critic over ``rows`` rows keep for the backward pass."""
        config, model, roles, length = self.config, self.model, self.roles, sizes.length
        read = min(1.0, (sizes.response_tokens + 1) / length)
        replies = rows * sizes.response_tokens * model.hidden * (3 * model.compute + FP32)
        policy = self.kept(roles.policy, rows, length, read) + rows * length * FP32 * model.hidden + replies
        if config.ptx_coef > 0:
            policy += self.kept(roles.policy, config.ptx_batch_size, self.ptx_tokens)
        value = 0
        if roles.value is not None and roles.plan.critic == "adapter":
            value = self.kept(roles.value, rows, length, read) + rows * length * FP32 * model.hidden
        return policy, value

    def _keeps_graph(self, sizes: Sizes) -> bool:
        """Whether scoring makes the first pass of the update: see ``passes``."""
        return scoring_keeps_graph(
            replies=sizes.all_rows,
            microbatch_rows=sizes.rows,
            group_rows=sizes.rollout_rows,
            max_tokens=self.config.max_tokens_per_microbatch,
            pretraining=self.config.ptx_coef > 0,
        )

    # ---- What fits ----

    def fits(self, sizes: Sizes, memory: float) -> bool:
        return self.plan(sizes).peak <= memory

    def largest(self, memory: float) -> dict[str, int]:
        """The largest batch sizes that fit together at the response length as it is, then the
        largest response length at the batch sizes as they are; 0 where nothing fits. None is looked
        for above 4096 rows, as many replies as there are, or 32768 tokens."""
        rows = _largest(lambda n: self.fits(replace(self.sizes, rows=n, rollout_rows=1), memory), 4096)
        at = replace(self.sizes, rows=max(1, min(rows, self.sizes.rows)))
        group = _largest(lambda n: self.fits(replace(at, rollout_rows=n), memory), self._replies(at))
        tokens = _largest(lambda n: self.fits(replace(self.sizes, response_tokens=n), memory), 32768)
        return {
            "per_device_train_batch_size": rows,
            "local_rollout_forward_batch_size": group,
            "response_length": tokens,
        }

    def report(self, memory: float | None = None) -> str:
        """The plan as text, and what fits into ``memory``."""
        sizes, plan = self.sizes, self.plan()
        lines = [
            (
                f"{self.name}: {sizes.rows} rows a microbatch, {sizes.rollout_rows} at a time in a rollout of"
                f" {sizes.all_rows}, {sizes.prompt_tokens} + {sizes.response_tokens} tokens each"
            ),
            plan.table(),
        ]
        if memory is not None:
            lines.append(
                f"{plan.phase} takes most, {amount(plan.peak)} of {amount(memory)}. Largest that fits:"
                f" {self._advice(memory)}."
            )
        return "\n".join([*lines, UNMEASURED])

    def _advice(self, memory: float) -> str:
        """The largest sizes in words."""
        rows, group, tokens = (
            f"{name}={number}" if number else f"no {name}" for name, number in self.largest(memory).items()
        )
        return f"{rows} and {group} at this response_length, or {tokens} at these batch sizes"

    def check(self, memory: float) -> None:
        """Raise ValueError if the run needs more than ``memory`` bytes, naming the largest sizes
        that fit."""
        plan = self.plan()
        if plan.peak > memory:
            lighter = " rollout_weights: shared goes without the dense copy." if self.dense else ""
            raise UserError(
                f"the run does not fit: {plan.phase} takes {amount(plan.peak)}, and {amount(memory)} are"
                f" free. Largest that fits: {self._advice(memory)}.{lighter} --force True goes on anyway."
            )


def amount(number: float) -> str:
    """Bytes in words, in units of 10^6 or 10^9."""
    return f"{number / 10**9:.2f} GB" if number >= 10**9 else f"{number / 10**6:.1f} MB"


@dataclass
class PlannedRoles:
    """Of the settings of recipes/ppo.py that concern roles, those that take memory."""

    policy_adapter: str | None = field(default=None, metadata={"help": "Folder of the SFT adapter."})
    reward_adapter: str | None = field(default=None, metadata={"help": "Folder of the reward adapter."})
    ptx_max_length: int = field(default=512, metadata={"help": "Longer pretraining texts are cut."})


def planner(
    args: ModelArguments,
    config: PPOConfig,
    roles: Any,
    *,
    memory: int | None,
    device: str,
    prompt_tokens: int | None = None,
) -> Planner:
    """The plan of recipes/ppo.py. ``roles`` has the settings of ``PlannedRoles``; ``prompt_tokens``
    is the longest prompt, where it is known."""
    return Planner(
        meta_model(args, trust_remote_code=config.trust_remote_code),
        args,
        config,
        policy=roles.policy_adapter,
        reward=roles.reward_adapter,
        prompt_tokens=prompt_tokens,
        ptx_tokens=roles.ptx_max_length,
        memory=memory,
        device=device,
    )


def _by_input(linears: list[Linear]) -> list[list[Linear]]:
    """Linears that read one tensor: all but the last of a module read its input. The attention's
    output is counted with the attention."""
    parents = {x.parent: [y for y in linears if y.parent == x.parent] for x in linears}
    return [
        part
        for group in parents.values()
        for part in (group[:-1], [] if group[-1].in_attention else group[-1:])
    ]


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """Largest number up to ``limit`` for which ``fits`` holds, which it does below any for which it
    does; 0 if for none."""
    if not fits(1):
        return 0
    low, high = 1, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def read_memory(text: str) -> int:
    """Bytes of a text such as 24GB, 16 GiB or 800MB.

    Raises:
        ValueError: any other text.
    """
    number = text.strip().upper().rstrip("BIKMG ")
    unit = text.strip().upper()[len(number) :].strip()
    try:
        return round(float(number) * UNITS[unit])
    except (ValueError, KeyError):
        raise UserError(
            f"--memory {text}: write a number and one of KB, MB, GB, KiB, MiB and GiB, such as 24GB."
        ) from None
