"""One frozen base in memory, and the four models that adapters and small heads make of it.

A role is an adapter. The policy lives under PEFT's name ``default``, because PEFT and Trainer write
that adapter to the root of an output folder, where plain ``PeftModel.from_pretrained`` looks for
it, and the others (``value``, ``reward``, ``reference``) to folders beside it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, LoraModel, PeftModel
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from transformers import PreTrainedModel

from goose_lora.errors import UserError
from goose_lora.functional import Aggregation
from goose_lora.models import adapters, role_checks, role_outputs
from goose_lora.models.adapter_kinds import require_harmless_start
from goose_lora.models.ensembles import RewardEnsemble
from goose_lora.models.folders import AdapterFolder, write_lineage
from goose_lora.models.host_embeddings import require_frozen_embeddings
from goose_lora.models.role_outputs import PolicyAndValue, before_response, columns_read
from goose_lora.models.roles import (
    ADAPTERS,
    REWARD_ROLES,
    WITH_HEAD,
    Critic,
    CriticInit,
    Reference,
    Role,
    RolePlan,
    belongs_to,
    of_another,
)
from goose_lora.models.trunk import (
    AdaptersBelow,
    above,
    below,
    by_position,
    captured_depth,
    decoder_layers,
    only_columns,
    trained_from,
)


class JudgedReplies(NamedTuple):
    """Scores, and where there is an ensemble the disagreement of its members in their spread."""

    scores: Float[Tensor, " B"]
    disagreement: Float[Tensor, " B"] | None


class SharedBase(PeftModel):
    """A causal language model that serves as policy, critic, reward model and reference.

    ``SharedBase.build`` makes one. As a ``PeftModel`` it is saved and restored by ``Trainer`` as
    adapters only.
    """

    base_model: LoraModel
    role_plan: RolePlan
    reward_reads_eos: bool  # whether the reward model was trained to read the end-of-text token
    head_bias: dict[Role, float]  # subtracted from a head's output, in units of the raw score
    ensemble: RewardEnsemble | None = None  # how several reward models score as one
    trained_from: dict[Role, int]  # the lowest layer in which an adapter trains, by its role
    own_head: bool = False  # whether logits come from the model's own head, with all that it does
    reuse_layers: bool = True  # whether a pass can be resumed in the middle of this model
    _role: Role | None  # None until the roles are there
    _columns: int | Tensor | None = None  # last columns that are read, or one a row; None for all
    _layers: tuple[nn.ModuleList] | None = None
    _by_position: tuple[nn.Module, ...] | None = None
    _before_backward: Role | None = None  # the role to go back to, once a recompute has left it
    _stances: dict[str | None, adapters.Stance]  # how PEFT's modules stand, by active adapter
    _stances_of: tuple[str, ...] = ()  # the adapters that there were when they were noted
    _member_states: dict[Role, Role] | None = None
    _below: dict[int, AdaptersBelow]  # by depth
    _below_of: tuple[str, ...] = ()  # the adapters that there were when they were found

    @classmethod
    def build(
        cls,
        base: PreTrainedModel,
        policy: LoraConfig | AdapterFolder | str | Path,
        *,
        reward: AdapterFolder | str | Path | None = None,
        critic: Critic | None = None,
        critic_init: CriticInit | None = None,
        value: LoraConfig | None = None,
        reference: AdapterFolder | str | Path | None = None,
        average: bool = False,
        train_layers: str = "all",
        reward_aggregation: Aggregation | None = None,
        uncertainty_coef: float | None = None,
    ) -> "SharedBase":
        """Put the roles on a causal language model of transformers, quantized or not.

        All dropout is set to 0, the base's too.

        Args:
            policy: a fresh adapter's configuration, or a trained one (SFT): a folder, or
                user/repo[/folder][@revision] on the Hub, as for all roles.
            reward: folder of the adapter and ``score`` head that ``trl.RewardTrainer`` saved, if
                there is a reward adapter.
            critic: ``adapter`` for a value adapter with its own head; ``shared`` for a head on the
                policy's hidden states; ``reward_features`` for a head on the frozen reward
                adapter's, which scoring computes anyway; None for no critic.
            critic_init: ``reward`` for a copy of the reward adapter and head (of the head alone
                with ``reward_features``), the default where there is one to copy; ``policy`` for a
                copy of the policy adapter, with a head of 0; ``zero`` for a fresh adapter and a
                head of 0.
            value: the value adapter's configuration where it copies none; the reward adapter's or
                the policy's by default.
            reference: ``copy`` for a frozen copy of the policy as it starts (the default where the
                policy is a trained adapter), ``base`` for the base with all adapters off (the
                default where it is fresh), or the folder of an adapter.
            average: add a frozen copy of the policy as the role ``ema``, for a moving average.
            train_layers: ``all``, or ``top-K``: policy and critic train in the K uppermost layers
                only, and keep what their adapters have below.
            reward_aggregation: how the members of an ensemble in ``reward`` score as one; what its
                folder says, the mean at first, if None. ``uncertainty_coef`` is that of
                ``mean_minus_std``.

        Raises:
            UserError: an adapter for another base, or without the head it needs; a critic that
                cannot start as ``critic_init`` says; ``reward_features`` without a reward adapter;
                ``train_layers`` that the model or the adapters do not have; a role that differs
                from the model that it stands for, on a few tokens.
        """
        # What is asked for, and the adapters as they lie on the disk.
        start = None if isinstance(policy, LoraConfig) else AdapterFolder.of("policy", policy)
        judge = None if reward is None else AdapterFolder.of("reward", reward)
        own_reference, kind = _reference(reference)
        plan = RolePlan.of(
            critic=critic,
            critic_init=critic_init,
            has_reward=judge is not None,
            has_policy=start is not None,
            reference=kind,
            average=average,
            train_layers=train_layers,
            reward_members=1 if judge is None else len(judge.members),
        )

        # The policy makes the PeftModel. A score head must be there before, for PEFT to copy it.
        if start is not None:
            config = adapters.config_without_dropout(start)
        else:
            config = _fresh(cast(LoraConfig, policy))
        require_frozen_embeddings(base, config)
        adapters.make_ready(base, config)
        if judge is not None or critic is not None:
            _add_score_head(base)
        bare = role_checks.bare_answer(base.eval())
        self = cls(base, config, adapter_name=ADAPTERS["policy"])
        self.role_plan, self._role = plan, None
        if start is not None:
            self.load_role("policy", start)

        # Frozen copies of the policy as it starts, and the reward model with its bias.
        if own_reference is not None:
            self._add_role("reference", adapters.config_without_dropout(own_reference))
            self.load_role("reference", own_reference)
        elif plan.reference == "copy":
            self._add_role("reference", config)
            self._copy_role("policy", "reference")
        if average:
            self._add_role("ema", config)
            self._copy_role("policy", "ema")
        self.reward_reads_eos, self.head_bias = True, {"reward": 0.0, "value": 0.0}
        if judge is not None:
            self._add_rewards(judge, reward_aggregation, uncertainty_coef)

        # The critic, and what of all this trains.
        if critic is not None:
            self._add_critic(value)
        self.trained_from = {
            role: trained_from(self, self.layers, ADAPTERS[role], train_layers)
            for role in plan.training_adapters
        }
        self._switch_to("policy")
        self.set_trainable(("policy", "value"))
        self.eval()
        role_checks.check_against_model(self, bare)
        return self

    def _add_role(self, role: Role, config: LoraConfig) -> None:
        require_frozen_embeddings(self.core, config)
        adapters.require_runs(self, config, role)
        cast(PeftModel, self).add_adapter(ADAPTERS[role], copy.deepcopy(config))

    def _add_rewards(
        self, judge: AdapterFolder, aggregation: Aggregation | None, uncertainty_coef: float | None
    ) -> None:
        """Add the reward model, or all members of an ensemble."""
        self.reward_reads_eos = judge.lineage.get("append_eos", True)
        for role, member in zip(REWARD_ROLES, judge.members, strict=False):
            if member.lineage.get("append_eos", True) != self.reward_reads_eos:
                raise UserError(
                    f"{member}: append_eos is not that of {judge}, and members read one text. Train them"
                    " together."
                )
            self._add_role(role, adapters.config_without_dropout(member))
            self.load_role(role, member)
            self.head_bias[role] = member.lineage.get("reward_bias", 0.0)
        if judge.ensemble is not None:
            self.ensemble = judge.ensemble.by(aggregation, uncertainty_coef)

    def _add_critic(self, value: LoraConfig | None) -> None:
        """Add the critic: an adapter with its head, or a head alone."""
        plan = self.role_plan
        config = cast(LoraConfig, self.peft_config[ADAPTERS[plan.value_source]])
        if plan.critic != "adapter":
            config = LoraConfig(target_modules=DUMMY_TARGET_MODULES)
        elif plan.critic_init == "zero" and value is not None:
            require_harmless_start(value)
            config = value
        config = copy.deepcopy(config)
        # A copy has whole modules where its source has them, such as embeddings
        whole = config.modules_to_save or []
        config.modules_to_save = ["score"] if plan.critic_init == "zero" else sorted({*whole, "score"})
        config.lora_dropout = 0.0
        self._add_role("value", config)
        if plan.critic_init != "zero":
            self._copy_role(plan.value_source, "value")
        if plan.critic_init == "reward":
            # A copy says what the reward model says; a head of zeros says 0.
            self.head_bias["value"] = self.head_bias["reward"]
            if self.ensemble is not None:
                self._align_value_head(self.ensemble)
        else:
            # An unbiased start: no critic before the first update.
            nn.init.zeros_(self.score_head("value").weight)

    @torch.no_grad()
    def _align_value_head(self, ensemble: RewardEnsemble) -> None:
        """Let a critic that copies the first member say that member's score in the units of all."""
        first = ensemble.members[0]
        factor = ensemble.scale / first.spread
        self.score_head("value").weight.mul_(factor)
        self.head_bias["value"] = factor * (self.head_bias["reward"] + first.origin) - ensemble.shift

    # ---- What the base is ----

    @property
    def core(self) -> PreTrainedModel:
        """The transformers model under the adapters."""
        return cast(PreTrainedModel, self.get_base_model())

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, lowest first."""
        # In a tuple: as an attribute of a module they would be registered, and saved, twice.
        if self._layers is None:
            self._layers = (decoder_layers(self.core),)
        return self._layers[0]

    @property
    def acting(self) -> Role:
        """The role that the model is now."""
        return self._role or "policy"

    @property
    def critic(self) -> Critic | None:
        """The kind of critic; None where there is none."""
        return self.role_plan.critic

    @property
    def value_states(self) -> Role:
        """The role whose hidden states the critic's head reads."""
        return self.role_plan.value_states

    @property
    def values_are_scores(self) -> bool:
        """Whether the critic started as the reward model and speaks in units of its score."""
        return self.role_plan.values_are_scores

    @property
    def train_layers(self) -> str:
        """The layers in which policy and critic train: ``all`` or ``top-K``."""
        return self.role_plan.train_layers

    # ---- Adapters: loading, copying, and which of them train ----

    def load_role(self, role: Role, folder: AdapterFolder | str | Path) -> None:
        """Load a saved adapter's weights, and its head if the role has one, into ``role``.

        Raises:
            ValueError: tensors that the role needs are missing in the folder, or the folder has
                some that fit nowhere or have another size.
        """
        adapters.load_weights(self, role, AdapterFolder.of(role, folder))

    def _copy_role(self, source: Role, target: Role) -> None:
        # One parameter for each of the other's, but for the head: the policy has none to copy
        parameters = dict(self.role_parameters(source))
        with torch.no_grad():
            for name, parameter in self.role_parameters(target):
                twin = parameters.get(of_another(name, ADAPTERS[target], ADAPTERS[source]))
                if twin is not None:
                    parameter.copy_(twin)
                elif parameter is not self._head_of(target):
                    raise UserError(
                        f"{name}: the role {target} cannot copy this from the role {source}, which has none."
                        " Use adapters of plain LoRA."
                    )

    def _head_of(self, role: Role) -> Tensor | None:
        return self.score_head(role).weight if role in WITH_HEAD else None

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the role ``ema`` towards the policy, factor by factor of LoRA.

        ema <- decay * ema + (1 - decay) * policy.
        """
        policy = dict(self.role_parameters("policy"))
        for name, parameter in self.role_parameters("ema"):
            parameter.lerp_(policy[of_another(name, ADAPTERS["ema"], ADAPTERS["policy"])], 1 - decay)

    def role_parameters(self, role: Role) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and parameters of a role's adapter, its head included."""
        return ((name, p) for name, p in self.named_parameters() if belongs_to(name, ADAPTERS[role]))

    def training_parameters(self, role: Role) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and parameters of a role that train: in ``train_layers``, and its head."""
        frozen = {
            id(p) for layer in self.layers[: self.trained_from.get(role, 0)] for p in layer.parameters()
        }
        if self.train_layers != "all":
            frozen |= {id(p) for p in self.parameters()} - {id(p) for p in self.layers.parameters()}
        return (
            (name, p) for name, p in self.role_parameters(role) if id(p) not in frozen or ".score." in name
        )

    def set_trainable(self, roles: Sequence[Role]) -> None:
        """Let the parameters of ``roles`` train, and nothing else.

        PEFT freezes and unfreezes adapters as a side effect of switching.
        """
        # By identity: a tied parameter has several names
        training = {id(p) for role in roles for _, p in self.training_parameters(role)}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in training)

    def has(self, role: Role) -> bool:
        """Return whether an adapter of its own stands for ``role``."""
        return ADAPTERS.get(role) in self.peft_config

    @property
    def reward_roles(self) -> tuple[Role, ...]:
        """The reward model, or the members of the ensemble; none where there is no reward model."""
        return tuple(role for role in REWARD_ROLES if self.has(role))

    @property
    def member_states(self) -> dict[Role, Role]:
        """For each member the role whose states its head reads: heads share the first one's."""
        roles = self.reward_roles
        if self._member_states is None or self._member_states.keys() != set(roles):
            self._member_states = {
                role: "reward" if self.says_the_same(role, "reward") else role for role in roles
            }
        return self._member_states

    def says_the_same(self, role: Role, other: Role) -> bool:
        """Return whether two roles have the same states: no tensor of their adapters differs."""
        return self._same_below(len(self.layers), self._adapter(role), self._adapter(other))

    def _same_below(self, depth: int, one: str | None, other: str | None) -> bool:
        """Return whether two adapters (None: none) compute the same below ``depth``."""
        if self._below_of != tuple(self.peft_config):
            self._below, self._below_of = {}, tuple(self.peft_config)
        if depth not in self._below:
            self._below[depth] = AdaptersBelow(self, self.layers, depth)
        return self._below[depth].same(one, other)

    # ---- Roles ----

    @contextmanager
    def role(self, role: Role, *, generating: bool = False) -> Iterator[Any]:
        """Act as ``role`` inside; yields the transformers model.

        Afterwards everything is as it was, errors included: active adapter, every requires_grad,
        training mode and checkpointing. ``generating`` also sets evaluation mode and turns
        checkpointing off: with it on, ``generate`` loses its cache and its context (TF#36051).
        """
        if role not in ("reference", "base") and not self.has(role):
            raise UserError(
                f"this shared base has no {role} adapter, only {sorted(self.peft_config)}. Give"
                " SharedBase.build its folder."
            )
        # A backward pass that failed, as one out of memory, has not come to its end.
        self._end_backward()
        core = self.core

        # What will be put back
        before = self.acting
        modules: list[nn.Module] = []
        checkpointing: list[nn.Module] = []
        if generating:
            modules = list(self.modules())
            checkpointing = [m for m in core.modules() if getattr(m, "gradient_checkpointing", False)]
        modes = [module.training for module in modules]
        try:
            self._switch_to(role)
            if generating:
                self.eval()
                _set_checkpointing(checkpointing, False)
            yield core
        finally:
            self._switch_to(before)
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            _set_checkpointing(checkpointing, True)

    def _switch_to(self, role: Role) -> None:
        """Let the adapter of ``role`` act, or none.

        PEFT walks all modules and parameters at each switch, seconds in a step of a deep model. So
        it is asked once for each adapter, and what it has set is set again from then on.
        """
        if self._role == role:
            return
        without = role == "base" or (role == "reference" and not self.has("reference"))
        adapter = None if without else ADAPTERS[self.role_plan.value_states if role == "value" else role]
        if self._stances_of != tuple(self.peft_config):
            self._stances, self._stances_of = {}, tuple(self.peft_config)
        known = self._stances.get(adapter)
        if known is not None:
            adapters.take_stance(self, adapter, known)
        else:
            # PEFT also sets flags of all parameters; they are put back.
            flags = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
            if adapter is None:
                self.base_model.disable_adapter_layers()
            else:
                self.base_model.enable_adapter_layers()
                self.set_adapter(adapter, inference_mode=True)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            self._stances[adapter] = adapters.stance_of(self)
        self._role = role

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Save as PEFT does, with a note beside the reward adapter.

        The note says what it was trained to read, and its bias.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        for role in self.reward_roles:
            write_lineage(
                Path(save_directory) / ADAPTERS[role],
                append_eos=self.reward_reads_eos,
                reward_bias=self.head_bias[role],
            )
        if self.ensemble is not None:
            # The others lie beside the first
            first = Path(save_directory) / ADAPTERS["reward"]
            self.ensemble.write_beside(first, [ADAPTERS[role] for role in self.reward_roles])

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any
    ) -> None:
        """Enable checkpointing whose recompute runs under the role of its own forward.

        Else gradients are wrong, silently (PEFT#2832).

        Raises:
            ValueError: reentrant checkpointing, which has no such hook.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False):
            raise UserError(
                "gradient checkpointing with use_reentrant=True cannot tell the adapters of policy and critic"
                " apart. Use gradient_checkpointing_kwargs: {use_reentrant: false}."
            )
        options.update(use_reentrant=False, context_fn=self._recompute_contexts)
        core = self.core
        # By the name that it has: the first is new in transformers 5.23, and warns of the second
        newer = getattr(core, "activation_checkpointing_enable", None)
        (newer or core.gradient_checkpointing_enable)(options, **kwargs)

    def adopt_checkpointing(self) -> None:
        """Let checkpointing that was enabled on the transformers model itself know the roles.

        It is then what ``activation_checkpointing_enable`` of this class makes of it.

        Raises:
            UserError: reentrant checkpointing, or contexts of its own, which would be lost.
        """
        for module in self.core.modules():
            checkpoint = vars(module).get("_gradient_checkpointing_func")
            if checkpoint is None or not module.gradient_checkpointing:
                continue
            settings = partial(checkpoint).keywords
            if settings.get("context_fn") == self._recompute_contexts:
                continue
            foreign = [name for name in ("use_reentrant", "context_fn") if settings.get(name)]
            if foreign:
                raise UserError(
                    f"gradient checkpointing of this {type(self.core).__name__} was enabled with a"
                    f" {foreign[0]} that cannot tell the roles of one base apart. Call"
                    " model.gradient_checkpointing_enable({'use_reentrant': False})."
                )
            own = partial(checkpoint, use_reentrant=False, context_fn=self._recompute_contexts)
            setattr(module, "_gradient_checkpointing_func", own)  # noqa: B010  (as _set_checkpointing)

    def _recompute_contexts(self) -> tuple[Any, Any]:
        """Return the contexts of a checkpointed forward and of its recompute."""
        return nullcontext(), adapters.Reentrant(self._as_now())

    def _as_now(self) -> Callable[[], Any]:
        """Make a context in which the base is what it is now: role, and columns that are read."""
        role, columns = self.acting, self._columns

        @contextmanager
        def again() -> Iterator[None]:
            self._follow(role)
            with self.reading(columns):
                yield

        return again

    def _follow(self, role: Role) -> None:
        """Act as ``role`` from here to the end of the backward pass, or to its next recompute.

        A pass has all layers of one role one after another, so that it switches once a role.
        """
        if self._role == role:
            return
        if self._before_backward is None:
            self._before_backward = self.acting
            # What DistributedDataParallel ends its own backward pass with
            engine: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
            engine.queue_callback(self._end_backward)
        self._switch_to(role)

    def _end_backward(self) -> None:
        """Go back to the role before the backward pass; nothing to do if it switched none."""
        if self._before_backward is not None:
            self._switch_to(self._before_backward)
            self._before_backward = None

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any
    ) -> None:
        """Enable checkpointing by transformers' older name.

        PEFT would pass it on to the base, which knows no roles.
        """
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    # ---- The trunk: layers that roles have in common ----

    def trunk_depth(self, role: Role = "policy") -> int:
        """Return the number of lowest layers whose output ``role`` can take from a trunk."""
        if not self.reuse_layers:
            return 0
        leader = role if role in self.trained_from else self._leader(role)
        return 0 if leader is None else self.trained_from[leader]

    def kept_trunks(self) -> int:
        """Return how many trunks of a rollout the update needs: policy and critic may share one."""
        return len({self._leader(role) for role in self.role_plan.training_adapters} - {None})

    def capture_depth(self, *, merged: bool) -> int:
        """Return the number of lowest layers to note while the policy generates; 0 for none.

        They are those of its trunk, unless merging the adapter changes their weights, or a merged
        copy computes otherwise: int8 layers round what they read to int8 too, dense ones do not.
        """
        depth = self.trunk_depth("policy")
        adapted = False
        if merged:
            rounds = any(type(module).__name__ == "Linear8bitLt" for module in self.layers.modules())
            adapted = rounds or not self._same_below(depth, ADAPTERS["policy"], None)
        return captured_depth(depth, merged=merged, adapted_below=adapted)

    def _leader(self, role: Role) -> Role | None:
        """Find the role that trains whose trunk serves ``role``: itself, policy or critic."""
        if not self.reuse_layers:
            return None
        depth = self.trained_from.get(role)
        own = self._adapter(role)
        for other, common in self.trained_from.items():
            may_share = depth in (None, common) and common > 0
            if may_share and self._same_below(common, own, self._adapter(other)):
                return other
        return role if depth else None

    def _adapter(self, role: Role) -> str | None:
        """Return PEFT's name of the adapter whose states ``role`` has; None for the base."""
        role = self.role_plan.value_states if role == "value" else role
        return ADAPTERS[role] if self.has(role) else None

    @torch.no_grad()
    def trunks(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Int[Tensor, "B L"],
        roles: Sequence[Role],
        captured: Float[Tensor, "B L H"] | None = None,
    ) -> dict[Role, Tensor | None]:
        """Run the layers below what trains, once for all roles that share them.

        Returns the output (B, L, H) for each of ``roles``: one tensor for all that share it, None
        where a role has no trunk. ``captured`` is the policy's, where it was noted while sampling.
        """
        leaders: dict[Role, Role | None] = {role: self._leader(role) for role in roles}
        outputs: dict[Role | None, Tensor | None] = {None: None}
        if captured is not None:
            outputs["policy"] = captured
        for leader in self.trained_from:
            if leader in leaders.values() and leader not in outputs:
                with self.role(leader) as core, below(self.layers, self.trained_from[leader]) as output:
                    role_outputs.decode(core, input_ids, attention_mask)
                outputs[leader] = output[0]
        return {role: outputs[leader] for role, leader in leaders.items()}

    # ---- What the roles say ----

    def hidden(
        self,
        role: Role,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Int[Tensor, "B L"],
        trunk: Float[Tensor, "B L H"] | None = None,
        columns: int | Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B L H"]:
        """Return the last hidden states under ``role``, resumed from ``trunk`` if given.

        Padding may stand on either side. ``columns`` is the number of last columns that are read,
        or the column of each row that is, all if None; the states of others are then worthless, and
        the last layer mostly spared.
        """
        resumed = nullcontext() if trunk is None else above(self.layers, self.trunk_depth(role), trunk)
        with self.role(role) as core, resumed, self.reading(columns):
            return role_outputs.decode(core, input_ids, attention_mask)

    @contextmanager
    def reading(self, columns: int | Int[Tensor, " B"] | None) -> Iterator[None]:
        """Read only some columns of hidden states inside, as ``hidden`` says.

        A recompute of checkpointing enters it again.
        """
        before, self._columns = self._columns, columns
        try:
            if self._by_position is None:
                self.spare_last_layer(True)
            assert self._by_position is not None
            with only_columns(self._by_position, columns):
                yield
        finally:
            self._columns = before

    def spare_last_layer(self, on: bool) -> None:
        """Let the last layer leave out columns that nobody reads, or compute all of them."""
        self._by_position = by_position(self.layers[-1]) if on else ()

    def autocast(self) -> torch.autocast:
        """Compute in the base's dtype with fp32 adapters; see ``role_outputs.autocast``."""
        return role_outputs.autocast(self.core)

    def score_head(self, role: Role) -> nn.Linear:
        """Return the linear head of the critic or a reward model: (1, H), fp32, without bias."""
        # PEFT keeps one copy of the head for each adapter that has one
        heads = cast(Any, self.core).score.modules_to_save
        return heads[ADAPTERS[role]]

    def apply_head(self, role: Role, hidden: Float[Tensor, "*s H"]) -> Float[Tensor, "*s"]:
        """Return the scalar of each state under the role's head, less the role's bias, in fp32."""
        return role_outputs.head_output(self.score_head(role), hidden, self.head_bias[role])

    def logprobs(
        self,
        hidden: Float[Tensor, "B L H"],
        input_ids: Int[Tensor, "B L"],
        response_mask: Bool[Tensor, "B T"],
        *,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Return log-probabilities of the last T tokens, and entropies (nats)."""
        return role_outputs.response_logprobs(
            self.core,
            hidden,
            input_ids,
            response_mask,
            temperature=temperature,
            entropy_gradient=entropy_gradient,
            own_head=self.own_head,
        )

    def exact_kl(
        self,
        hidden: Float[Tensor, "B T H"],
        ref_hidden: Float[Tensor, "B T H"],
        response_mask: Bool[Tensor, "B T"],
        *,
        temperature: float = 1.0,
    ) -> Float[Tensor, "B T"]:
        """Return KL(policy || reference) of each next token over the whole vocabulary (nats)."""
        return role_outputs.response_kl(
            self.core,
            hidden,
            ref_hidden,
            response_mask,
            temperature=temperature,
            own_head=self.own_head,
        )

    def values(
        self, hidden: Float[Tensor, "B L H"], response_mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """Return V of the state before each of the last T tokens, zero outside the mask."""
        values = self.apply_head("value", before_response(hidden, response_mask))
        return torch.where(response_mask, values, 0.0)

    def scores(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Int[Tensor, "B L"],
        trunk: Float[Tensor, "B L H"] | None = None,
        ended: Bool[Tensor, " B"] | None = None,
    ) -> Float[Tensor, " B"]:
        """Return the reward model's score of each row, read at its last counted token.

        It is what the SEQ_CLS model of RewardTrainer gives, less the ``reward_bias`` beside the
        adapter: the mean raw score of references, which so have 0 (Ouyang et al. 2022,
        arXiv:2203.02155, 3.5). ``ended`` tells which rows close with an end-of-text token; a reward
        model that was trained without it reads the token before.
        """
        return self.judge(input_ids, attention_mask, {"reward": trunk}, ended).scores

    def judge(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Int[Tensor, "B L"],
        trunks: Mapping[Role, Tensor | None],
        ended: Bool[Tensor, " B"] | None = None,
        *,
        hidden: Float[Tensor, "B L H"] | None = None,
        columns: int | None = None,
    ) -> JudgedReplies:
        """Return ``scores``, and how far the members of an ensemble disagree about each row.

        Args:
            trunks: from ``trunks``, of ``reward`` and the members that have states of their own.
            hidden: the states under ``reward``, where they are there already.
        """
        scores = self.member_scores(input_ids, attention_mask, trunks, ended, hidden=hidden, columns=columns)
        if self.ensemble is None:
            return JudgedReplies(scores[0], None)
        return JudgedReplies(*self.ensemble.score(scores))

    def member_scores(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Int[Tensor, "B L"],
        trunks: Mapping[Role, Tensor | None],
        ended: Bool[Tensor, " B"] | None = None,
        *,
        hidden: Float[Tensor, "B L H"] | None = None,
        columns: int | None = None,
    ) -> list[Float[Tensor, " B"]]:
        """Return each member's own scores, less its bias: what ``judge`` makes one score of."""
        # A member's states go before the next one's come: only the first one's may be needed twice,
        # and of the others' nothing but the column of the score.
        if hidden is None:
            hidden = self.hidden("reward", input_ids, attention_mask, trunks.get("reward"), columns)
        read = self._score_columns(attention_mask, ended)
        scores = []
        for role, of in self.member_states.items():
            states = hidden
            if of != "reward":
                states = self.hidden(of, input_ids, attention_mask, trunks.get(of), read)
            scores.append(self.read_scores(states, attention_mask, ended, role=role))
        return scores

    def read_scores(
        self,
        hidden: Float[Tensor, "B L H"],
        attention_mask: Int[Tensor, "B L"],
        ended: Bool[Tensor, " B"] | None = None,
        *,
        role: Role = "reward",
    ) -> Float[Tensor, " B"]:
        """Return one reward model's scores, or one member's, given the hidden states under it."""
        read = self._score_columns(attention_mask, ended)
        return self.apply_head(role, hidden[torch.arange(len(read), device=read.device), read])

    def _score_columns(
        self, attention_mask: Int[Tensor, "B L"], ended: Bool[Tensor, " B"] | None
    ) -> Int[Tensor, " B"]:
        return role_outputs.score_columns(attention_mask, None if self.reward_reads_eos else ended)

    def forward(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Int[Tensor, "B L"],
        response_mask: Bool[Tensor, "B T"],
        trunk: Float[Tensor, "B L H"] | None = None,
        value_trunk: Float[Tensor, "B L H"] | None = None,
        features: Float[Tensor, "B T H"] | None = None,
        ref_hidden: Float[Tensor, "B T H"] | None = None,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
        ptx: tuple[Int[Tensor, "P N"], Int[Tensor, "P N"], float] | None = None,
    ) -> PolicyAndValue:
        """Run policy and critic in one call.

        DistributedDataParallel must see one forward, then one backward.

        Args:
            trunk: the policy's from ``trunks``; ``value_trunk`` is that of the critic, if another.
            features: the reward adapter's states before each response token, for a critic on
                ``reward_features``; computed where not given.
            ref_hidden: the reference's states before each response token, for the exact KL to it.
            ptx: pretraining texts, their attention mask, and what the sum of their tokens' negative
                log-likelihood is divided by; PPO-ptx's term.
        """
        ptx_loss = None if ptx is None else self.negative_log_likelihood(*ptx)

        # The policy: log-probabilities and entropies, and the KL where it is exact.
        read = columns_read(response_mask)
        hidden = self.hidden("policy", input_ids, attention_mask, trunk, read)
        logprobs, entropy = self.logprobs(
            hidden,
            input_ids,
            response_mask,
            temperature=temperature,
            entropy_gradient=entropy_gradient,
        )
        kl = None
        if ref_hidden is not None:
            states = before_response(hidden, response_mask)
            kl = self.exact_kl(states, ref_hidden, response_mask, temperature=temperature)

        # The critic: a head on states that are there already, or an adapter with a pass of its own.
        if self.critic is None:
            values = None
        elif features is not None:
            values = torch.where(response_mask, self.apply_head("value", features), 0.0)
        elif self.critic == "shared":
            values = self.values(hidden, response_mask)
        else:
            # None of its own: it shares the policy's, or trains from the lowest layer on
            shared_trunk = trunk if self.trunk_depth("value") else None
            own_trunk = shared_trunk if value_trunk is None else value_trunk
            states = self.hidden("value", input_ids, attention_mask, own_trunk, read)
            values = self.values(states, response_mask)
        return PolicyAndValue(logprobs, entropy, values, kl, ptx_loss)

    def negative_log_likelihood(
        self,
        input_ids: Int[Tensor, "P N"],
        attention_mask: Int[Tensor, "P N"],
        num_tokens: float | None = None,
    ) -> Float[Tensor, ""]:
        """Return the policy's loss on whole texts in nats per token, first tokens left out.

        ``num_tokens`` is what the sum is divided by, where these texts are a part of more.
        """
        # A token counts where it and the one before it are text
        predicted = (attention_mask[:, 1:] & attention_mask[:, :-1]).bool()
        logprobs, _ = self.logprobs(self.hidden("policy", input_ids, attention_mask), input_ids, predicted)
        return -logprobs.sum() / (predicted.sum() if num_tokens is None else num_tokens)


def _fresh(policy: LoraConfig) -> LoraConfig:
    """Return the configuration of a fresh policy, without dropout."""
    fresh = copy.deepcopy(policy)
    require_harmless_start(fresh)
    return adapters.without_lora_dropout(fresh, "the policy's LoraConfig")


def _reference(
    reference: AdapterFolder | str | Path | None,
) -> tuple[AdapterFolder | None, Reference | None]:
    """Return the adapter that ``reference`` names, if it names one, and its kind."""
    if reference is None or reference in ("copy", "base"):
        return None, cast(Reference | None, reference)
    return AdapterFolder.of("reference", reference), "folder"


def _add_score_head(base: PreTrainedModel) -> None:
    """Add a fresh linear head (1, H) in fp32, which PEFT copies for reward model and critic."""
    weight = role_outputs.output_head(base).weight
    features = weight.shape[1]
    score = nn.Linear(features, 1, bias=False, dtype=torch.float32, device=weight.device)
    nn.init.normal_(score.weight, std=1 / (features + 1) ** 0.5)
    base.score = score


def _set_checkpointing(modules: Sequence[nn.Module], on: bool) -> None:
    for module in modules:
        setattr(module, "gradient_checkpointing", on)  # noqa: B010  (nn.Module types it as a tensor)
