"""One frozen base in memory, and the four models that adapters and small heads make of it.

A role is an adapter. The policy lives under PEFT's name ``default``, because PEFT and Trainer write
that adapter to the root of an output folder, where plain ``PeftModel.from_pretrained`` looks for
it, and the others (``value``, ``reward``, ``reference``) to folders beside it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from goose_lora.errors import UserError
from goose_lora.models import adapters
from goose_lora.models.adapters import adapter_config
from goose_lora.models.role_outputs import Views
from goose_lora.models.roles import ADAPTERS, Critic, CriticInit, Reference, Role, RolePlan, belongs_to
from goose_lora.models.trunk import trained_from


class SharedBase(Views, PeftModel):
    """A causal language model whose weights serve as policy, critic, reward model and reference at
    once.

    ``SharedBase.build`` makes one. Being a ``PeftModel``, it is saved and restored by ``Trainer``
    as adapters only.
    """

    role_plan: RolePlan
    reads_eos: bool
    values_are_scores: bool
    offsets: dict[Role, float]  # what is subtracted from a head's output, in units of the raw score
    train_layers: str
    trained_from: dict[Role, int]  # by role with an adapter that trains: the lowest layer in which it does
    _role: Any
    set_adapter: Any
    add_adapter: Any
    base_model: Any

    @classmethod
    def build(
        cls,
        base: Any,
        policy: LoraConfig | str | Path,
        *,
        reward: str | Path | None = None,
        critic: Critic | None = None,
        critic_init: CriticInit | None = None,
        value: LoraConfig | None = None,
        reference: str | Path | None = None,
        average: bool = False,
        train_layers: str = "all",
    ) -> "SharedBase":
        """Put the roles on ``base``, a causal language model of transformers, quantized or not. All
        dropout is set to 0, the base's too.

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

        Raises:
            ValueError: an adapter for another base, or without the head it needs; a critic that
                cannot start as ``critic_init`` says; ``reward_features`` without a reward adapter;
                ``train_layers`` that the model or the adapters do not have.
        """
        from_folder = not isinstance(policy, LoraConfig)
        kinds: dict[Any, Reference | None] = {None: None, "copy": "copy", "base": "base"}
        plan = RolePlan.of(
            critic=critic,
            critic_init=critic_init,
            has_policy=from_folder,
            has_reward=reward is not None,
            reference=kinds.get(reference, "folder"),
            average=average,
            train_layers=train_layers,
        )
        start: Any = adapters.local_folder(policy) if from_folder else policy
        reward = None if reward is None else adapters.local_folder(reward)
        reference = reference if reference in (None, "copy", "base") else adapters.local_folder(reference)
        head = base.get_output_embeddings()
        if reward is not None or critic is not None:
            base.score = nn.Linear(
                head.weight.shape[1], 1, bias=False, dtype=torch.float32, device=head.weight.device
            )
            nn.init.normal_(base.score.weight, std=1 / (head.weight.shape[1] + 1) ** 0.5)
        config = (
            adapter_config(start)
            if from_folder
            else adapters.without_lora_dropout(copy.deepcopy(start), "the policy's LoraConfig")
        )
        adapters.switch_off_dropout(base)
        self = cls(base, config, adapter_name=ADAPTERS["policy"])
        self.role_plan, self._role = plan, "policy"
        if from_folder:
            self.load_role("policy", start)
        if plan.reference == "copy":
            self.add_adapter(ADAPTERS["reference"], copy.deepcopy(config))
            self._copy_role("policy", "reference")
        elif reference is not None and plan.reference == "folder":
            self.add_adapter(ADAPTERS["reference"], adapter_config(reference))
            self.load_role("reference", reference)
        if average:
            self.add_adapter(ADAPTERS["ema"], copy.deepcopy(config))
            self._copy_role("policy", "ema")
        self.reads_eos, self.offsets = True, {"reward": 0.0, "value": 0.0}
        if reward is not None:
            self.add_adapter(ADAPTERS["reward"], adapter_config(reward))
            self.load_role("reward", reward)
            lineage = adapters.read_lineage(reward)
            self.reads_eos, self.offsets["reward"] = (
                lineage.get("append_eos", True),
                lineage.get("reward_bias", 0.0),
            )
        self.critic = critic
        self.values_are_scores = plan.values_are_scores
        if critic is not None:
            self._add_critic(plan, value)
        self.train_layers = train_layers
        self.trained_from = {
            role: trained_from(self, self.layers, ADAPTERS[role], train_layers)
            for role in plan.training_adapters
        }
        self._switch_to("policy")
        self.set_trainable(("policy", "value"))
        return self.eval()

    def _add_critic(self, plan: RolePlan, value: LoraConfig | None) -> None:
        source = plan.value_source
        config: Any = self.peft_config[ADAPTERS[source]]
        if plan.critic != "adapter":
            config = LoraConfig(target_modules=DUMMY_TARGET_MODULES)
        elif plan.critic_init == "zero" and value is not None:
            config = value
        config = copy.deepcopy(config)
        config.modules_to_save = ["score"]
        config.lora_dropout = 0.0
        self.add_adapter(ADAPTERS["value"], config)
        if plan.critic_init != "zero":
            self._copy_role(source, "value")
        if plan.critic_init == "reward":
            # A copy says what the reward model says; a head of zeros says 0
            self.offsets["value"] = self.offsets["reward"]
        else:
            # An unbiased start: no critic before the first update
            nn.init.zeros_(self.score_head("value").weight)

    # ---- Adapters: loading, copying, and which of them train ----

    def load_role(self, role: Role, folder: str | Path) -> None:
        """Load a saved adapter's weights, and its head if the role has one, into ``role``.

        Raises:
            ValueError: tensors that the role needs are missing in the folder, or the folder has
                some that fit nowhere or have another size.
        """
        adapters.load_weights(self, role, folder)

    def _copy_role(self, source: Role, target: Role) -> None:
        parameters = dict(self.role_parameters(source))
        with torch.no_grad():
            for name, parameter in self.role_parameters(target):
                twin = parameters.get(name.replace(f".{ADAPTERS[target]}.", f".{ADAPTERS[source]}."))
                if twin is not None:  # the policy has no head to copy
                    parameter.copy_(twin)

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the role ``ema`` towards the policy: ema <- decay * ema + (1 - decay) * policy,
        factor by factor of LoRA."""
        policy = dict(self.role_parameters("policy"))
        for name, parameter in self.role_parameters("ema"):
            parameter.lerp_(
                policy[name.replace(f".{ADAPTERS['ema']}.", f".{ADAPTERS['policy']}.")], 1 - decay
            )

    def role_parameters(self, role: Role) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of a role's adapter, its head included."""
        return ((name, p) for name, p in self.named_parameters() if belongs_to(name, ADAPTERS[role]))

    def training_parameters(self, role: Role) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of a role that train: those in ``train_layers``, and its head."""
        frozen = {
            id(p) for layer in self.layers[: self.trained_from.get(role, 0)] for p in layer.parameters()
        }
        if self.train_layers != "all":
            frozen |= {id(p) for p in self.parameters()} - {id(p) for p in self.layers.parameters()}
        return (
            (name, p) for name, p in self.role_parameters(role) if id(p) not in frozen or ".score." in name
        )

    def set_trainable(self, roles: Sequence[Role]) -> None:
        """Let the parameters of ``roles`` train, and nothing else. PEFT freezes and unfreezes
        adapters as a side effect of switching."""
        training = {id(p) for role in roles for _, p in self.training_parameters(role)}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in training)

    def has(self, role: Role) -> bool:
        """Whether an adapter of its own stands for ``role``."""
        return ADAPTERS.get(role) in self.peft_config

    # ---- Roles ----

    @contextmanager
    def role(self, role: Role, *, generating: bool = False) -> Iterator[Any]:
        """Inside, the base acts as ``role``; yields the transformers model. Afterwards everything
        is as it was, errors included.

        Active adapter, every requires_grad, training mode and checkpointing are put back.
        ``generating`` also sets evaluation mode and
        turns checkpointing off: with it on, ``generate`` loses its cache and its context
        (TF#36051).
        """
        if role not in ("reference", "base") and not self.has(role):
            raise UserError(
                f"this shared base has no {role} adapter, only {sorted(self.peft_config)}. Give"
                " SharedBase.build its folder."
            )
        core: Any = self.get_base_model()
        before = self._role
        training = [(module, module.training) for module in self.modules()] if generating else []
        checkpointing = (
            [m for m in core.modules() if getattr(m, "gradient_checkpointing", False)] if generating else []
        )
        try:
            self._switch_to(role)
            if generating:
                self.eval()
                for module in checkpointing:
                    module.gradient_checkpointing = False
            yield core
        finally:
            self._switch_to(before)
            for module, mode in training:
                module.training = mode
            for module in checkpointing:
                module.gradient_checkpointing = True

    def _switch_to(self, role: Role) -> None:
        flags = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        if role == "base" or (role == "reference" and not self.has("reference")):
            self.base_model.disable_adapter_layers()
        else:
            self.base_model.enable_adapter_layers()
            self.set_adapter(ADAPTERS[self.value_states if role == "value" else role], inference_mode=True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        self._role = role

    @property
    def value_states(self) -> Role:
        """The role whose hidden states the critic's head reads: a head alone brings no adapter of
        its own."""
        return self.role_plan.value_states

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; the reward adapter's folder keeps the note of what it was trained to read,
        and of its bias."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.has("reward"):
            adapters.write_lineage(
                Path(save_directory) / ADAPTERS["reward"],
                append_eos=self.reads_eos,
                reward_bias=self.offsets["reward"],
            )

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any
    ) -> None:
        """As in transformers, but each recompute runs under the role of its own forward (PEFT#2832:
        else gradients are wrong, silently).

        Raises:
            ValueError: reentrant checkpointing, which has no such hook.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False):
            raise UserError(
                "gradient checkpointing with use_reentrant=True cannot tell the adapters of policy and critic"
                " apart. Use gradient_checkpointing_kwargs: {use_reentrant: false}."
            )
        options.update(
            use_reentrant=False, context_fn=lambda: (nullcontext(), adapters.Reentrant(self._as_now()))
        )
        core: Any = self.get_base_model()
        core.activation_checkpointing_enable(activation_checkpointing_kwargs=options, **kwargs)

    def _as_now(self) -> Callable[[], Any]:
        """Makes a context in which the base is what it is now: its role, and how many columns are
        read."""
        role, columns = self._role, self._columns

        @contextmanager
        def again() -> Iterator[None]:
            with self.role(role), self.reading(columns):
                yield

        return again

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any
    ) -> None:
        """transformers' older name for the same; PEFT would pass it on to the base, which knows no
        roles."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)
