"""One frozen base in memory, and the four models that adapters and small heads make of it.

A role is an adapter. The policy lives under PEFT's name ``default``, because PEFT and Trainer write that adapter to the root of an output
folder, where plain ``PeftModel.from_pretrained`` looks for it, and the others (``value``, ``reward``, ``reference``) to folders beside it.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, PeftModel
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from goose_lora import adapters
from goose_lora.adapters import ADAPTERS, Critic, CriticInit, Role, adapter_config, belongs_to
from goose_lora.batch import last_counted
from goose_lora.logprobs import token_kl, token_logprobs
from goose_lora.trunk import above, below, decoder_layers, lowest_layer

logger = logging.getLogger(__name__)


class PolicyAndValue(NamedTuple):
    """What one forward of policy and critic gives for each response token, in fp32: (B, T) each; and the policy's loss on pretraining text."""

    logprobs: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"] | None
    kl: Float[Tensor, "B T"] | None = None
    ptx_loss: Float[Tensor, ""] | None = None


class SharedBase(PeftModel):
    """A causal language model whose weights serve as policy, critic, reward model and reference at once.

    ``SharedBase.build`` makes one. Being a ``PeftModel``, it is saved and restored by ``Trainer`` as adapters only.
    """

    critic: Any
    reads_eos: bool
    values_are_scores: bool
    offsets: dict[Role, float]  # what is subtracted from a head's output, in units of the raw score
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
    ) -> "SharedBase":
        """Put the roles on ``base``, a causal language model of transformers, quantized or not. All dropout is set to 0, the base's too.

        Args:
            policy: a fresh adapter's configuration, or a trained one (SFT): a folder, or user/repo[/folder][@revision] on the Hub, as for all roles.
            reward: folder of the adapter and ``score`` head that ``trl.RewardTrainer`` saved, if there is a reward adapter.
            critic: ``adapter`` for a value adapter with its own head; ``shared`` for a head on the policy's hidden states; ``reward_features`` for
                a head on the frozen reward adapter's, which scoring computes anyway; None for no critic.
            critic_init: ``reward`` for a copy of the reward adapter and head (of the head alone with ``reward_features``), the default where there
                is one to copy; ``policy`` for a copy of the policy adapter, with a head of 0; ``zero`` for a fresh adapter and a head of 0.
            value: the value adapter's configuration where it copies none; the reward adapter's or the policy's by default.
            reference: ``copy`` for a frozen copy of the policy as it starts (the default where the policy is a trained adapter), ``base`` for
                the base with all adapters off (the default where it is fresh), or the folder of an adapter.
            average: add a frozen copy of the policy as the role ``ema``, for a moving average.

        Raises:
            ValueError: an adapter for another base, or without the head it needs; a critic that cannot start as ``critic_init`` says;
                ``reward_features`` without a reward adapter.
        """
        critic_init = adapters.check_critic(critic, critic_init, has_reward=reward is not None)
        from_folder = not isinstance(policy, LoraConfig)
        start: Any = adapters.local_folder(policy) if from_folder else policy
        reward = None if reward is None else adapters.local_folder(reward)
        reference = reference if reference in (None, "copy", "base") else adapters.local_folder(reference)
        head = base.get_output_embeddings()
        if reward is not None or critic is not None:
            base.score = nn.Linear(head.weight.shape[1], 1, bias=False, dtype=torch.float32, device=head.weight.device)
            nn.init.normal_(base.score.weight, std=1 / (head.weight.shape[1] + 1) ** 0.5)
        config = adapter_config(start) if from_folder else adapters.without_lora_dropout(copy.deepcopy(start), "the policy's LoraConfig")
        adapters.switch_off_dropout(base)
        self = cls(base, config, adapter_name=ADAPTERS["policy"])
        self._role = "policy"
        if from_folder:
            self.load_role("policy", start)
        reference = reference or ("copy" if from_folder else "base")
        if reference == "copy":
            self.add_adapter(ADAPTERS["reference"], copy.deepcopy(config))
            self._copy_role("policy", "reference")
        elif reference != "base":
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
            self.reads_eos, self.offsets["reward"] = lineage.get("append_eos", True), lineage.get("reward_bias", 0.0)
        self.critic = critic
        self.values_are_scores = critic is not None and critic_init == "reward"
        if critic is not None:
            self._add_critic(critic, critic_init, value)
        self._switch_to("policy")
        self.set_trainable(("policy", "value"))
        return self.eval()

    def _add_critic(self, critic: Critic, critic_init: CriticInit, value: LoraConfig | None) -> None:
        source: Role = "reward" if self.has("reward") and critic_init != "policy" else "policy"
        config: Any = self.peft_config[ADAPTERS[source]]
        if critic != "adapter":
            config = LoraConfig(target_modules=DUMMY_TARGET_MODULES)
        elif critic_init == "zero" and value is not None:
            config = value
        config = copy.deepcopy(config)
        config.modules_to_save = ["score"]
        config.lora_dropout = 0.0
        self.add_adapter(ADAPTERS["value"], config)
        if critic_init != "zero":
            self._copy_role(source, "value")
        if critic_init == "reward":
            self.offsets["value"] = self.offsets["reward"]  # a copy says what the reward model says; a head of zeros says 0
        else:
            nn.init.zeros_(self.score_head("value").weight)  # an unbiased start: no critic before the first update

    # ---- Adapters: loading, copying, and which of them train ----

    def load_role(self, role: Role, folder: str | Path) -> None:
        """Load a saved adapter's weights, and its head if the role has one, into ``role``.

        Raises:
            ValueError: tensors that the role needs are missing in the folder, or the folder has some that fit nowhere or have another size.
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
        """Move the role ``ema`` towards the policy: ema <- decay * ema + (1 - decay) * policy, factor by factor of LoRA."""
        policy = dict(self.role_parameters("policy"))
        for name, parameter in self.role_parameters("ema"):
            parameter.lerp_(policy[name.replace(f".{ADAPTERS['ema']}.", f".{ADAPTERS['policy']}.")], 1 - decay)

    def role_parameters(self, role: Role) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of a role's adapter, its head included."""
        return ((name, p) for name, p in self.named_parameters() if belongs_to(name, ADAPTERS[role]))

    def set_trainable(self, roles: Sequence[Role]) -> None:
        """Let the parameters of ``roles`` train, and nothing else. PEFT freezes and unfreezes adapters as a side effect of switching."""
        adapters = [ADAPTERS[role] for role in roles]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(belongs_to(name, *adapters))

    def has(self, role: Role) -> bool:
        """Whether an adapter of its own stands for ``role``."""
        return ADAPTERS.get(role) in self.peft_config

    # ---- Roles ----

    @contextmanager
    def role(self, role: Role, *, generating: bool = False) -> Iterator[Any]:
        """Inside, the base acts as ``role``; yields the transformers model. Afterwards everything is as it was, errors included.

        Active adapter, every requires_grad, training mode and checkpointing are put back. ``generating`` also sets evaluation mode and
        turns checkpointing off: with it on, ``generate`` loses its cache and its context (TF#36051).
        """
        if role not in ("reference", "base") and not self.has(role):
            raise ValueError(f"this shared base has no {role} adapter, only {sorted(self.peft_config)}. Give SharedBase.build its folder.")
        core: Any = self.get_base_model()
        before = self._role
        training = [(module, module.training) for module in self.modules()] if generating else []
        checkpointing = [m for m in core.modules() if getattr(m, "gradient_checkpointing", False)] if generating else []
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
            self.set_adapter(ADAPTERS[self._value_states if role == "value" else role], inference_mode=True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        self._role = role

    @property
    def _value_states(self) -> Role:
        """The role whose hidden states the critic's head reads: a head alone brings no adapter of its own."""
        heads: dict[str, Role] = {"shared": "policy", "reward_features": "reward"}
        return heads.get(self.critic, "value")

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; the reward adapter's folder keeps the note of what it was trained to read, and of its bias."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.has("reward"):
            adapters.write_lineage(Path(save_directory) / ADAPTERS["reward"], append_eos=self.reads_eos, reward_bias=self.offsets["reward"])

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """As in transformers, but each recompute runs under the role of its own forward (PEFT#2832: else gradients are wrong, silently).

        Raises:
            ValueError: reentrant checkpointing, which has no such hook.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False):
            raise ValueError(
                "gradient checkpointing with use_reentrant=True cannot tell the adapters of policy and critic apart. "
                "Use gradient_checkpointing_kwargs: {use_reentrant: false}."
            )
        options.update(use_reentrant=False, context_fn=lambda: (nullcontext(), adapters.Reentrant(lambda role=self._role: self.role(role))))
        core: Any = self.get_base_model()
        core.activation_checkpointing_enable(activation_checkpointing_kwargs=options, **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """transformers' older name for the same; PEFT would pass it on to the base, which knows no roles."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    # ---- The four views ----

    @property
    def layers(self) -> nn.ModuleList:
        return decoder_layers(self.get_base_model())

    def trunk_depth(self) -> int:
        """How many of the lowest layers no adapter changes: they are the same for all roles, and their output can be reused."""
        layers = self.layers
        inside = {id(parameter) for parameter in layers.parameters()}
        adapted = [p for name, p in self.named_parameters() if belongs_to(name, *ADAPTERS.values()) and ".score." not in name]
        if any(id(parameter) not in inside for parameter in adapted):
            return 0  # an adapter on the embeddings or the head
        return min(lowest_layer(layers, adapter) for adapter in self.peft_config)

    @torch.no_grad()
    def trunk(self, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"]) -> Float[Tensor, "B L H"] | None:
        """Output of the layers that all roles share, or None if there are none."""
        depth = self.trunk_depth()
        if depth == 0:
            return None
        with below(self.layers, depth) as output:
            self._decode(self.get_base_model(), input_ids, attention_mask)
        return output[0]

    def hidden(
        self, role: Role, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"], trunk: Float[Tensor, "B L H"] | None = None
    ) -> Float[Tensor, "B L H"]:
        """Last hidden states under ``role``, resumed from ``trunk`` if given. Padding may stand on either side."""
        resumed = nullcontext() if trunk is None else above(self.layers, self.trunk_depth(), trunk)
        with self.role(role) as core, resumed:
            return self._decode(core, input_ids, attention_mask)

    def _decode(self, core: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # GPT-2's learned positions count padding unless told otherwise (TRL#6800).
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        decoder = getattr(core, core.base_model_prefix)
        with self.autocast():
            output = decoder(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
        return output.last_hidden_state

    def autocast(self) -> Any:
        """bf16 matrix products with fp32 adapters, for rollout and update alike; nothing for an fp32 base."""
        core: Any = self.get_base_model()
        weight = core.get_output_embeddings().weight
        enabled = weight.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(weight.device.type, dtype=weight.dtype if enabled else torch.bfloat16, enabled=enabled)

    def score_head(self, role: Role) -> nn.Linear:
        """The linear head of ``value`` or ``reward``: (1, H), fp32, without bias."""
        core: Any = self.get_base_model()
        return core.score.modules_to_save[ADAPTERS[role]]

    def apply_head(self, role: Role, hidden: Float[Tensor, "*s H"]) -> Float[Tensor, "*s"]:
        """Scalar of each state under the role's head, less the role's offset, in fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            head = self.score_head(role)
            return head(hidden.to(head.weight.dtype)).squeeze(-1) - self.offsets[role]

    def logprobs(
        self,
        hidden: Float[Tensor, "B L H"],
        input_ids: Int[Tensor, "B L"],
        response_mask: Bool[Tensor, "B T"],
        *,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Log-probabilities of the last T tokens and entropies (nats), zero outside ``response_mask``; only masked positions meet the head."""
        core: Any = self.get_base_model()
        head, tokens = core.get_output_embeddings(), response_mask.shape[1]
        logprobs, entropies = token_logprobs(
            before_response(hidden, response_mask)[response_mask],
            input_ids[:, -tokens:][response_mask],
            head.weight,
            head.bias,
            temperature=temperature,
            softcap=self._final_softcap,
            entropy_gradient=entropy_gradient,
        )
        zeros = torch.zeros(response_mask.shape, dtype=logprobs.dtype, device=logprobs.device)
        return zeros.masked_scatter(response_mask, logprobs), zeros.masked_scatter(response_mask, entropies)

    def exact_kl(
        self, hidden: Float[Tensor, "B T H"], ref_hidden: Float[Tensor, "B T H"], response_mask: Bool[Tensor, "B T"], *, temperature: float = 1.0
    ) -> Float[Tensor, "B T"]:
        """KL(policy || reference) of each next token over the whole vocabulary (nats), zero outside ``response_mask``; gradient to ``hidden``."""
        core: Any = self.get_base_model()
        head = core.get_output_embeddings()
        kl = token_kl(
            hidden[response_mask], ref_hidden[response_mask], head.weight, head.bias, temperature=temperature, softcap=self._final_softcap
        )
        return torch.zeros(response_mask.shape, dtype=kl.dtype, device=kl.device).masked_scatter(response_mask, kl)

    @property
    def _final_softcap(self) -> float | None:
        core: Any = self.get_base_model()
        return core.config.get_text_config().to_dict().get("final_logit_softcapping")

    def values(self, hidden: Float[Tensor, "B L H"], response_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """V of the state before each of the last T tokens, zero outside ``response_mask``."""
        values = self.apply_head("value", before_response(hidden, response_mask))
        return torch.where(response_mask, values, 0.0)

    def scores(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Int[Tensor, "B L"],
        trunk: Float[Tensor, "B L H"] | None = None,
        ended: Bool[Tensor, " B"] | None = None,
    ) -> Float[Tensor, " B"]:
        """The reward model's score of each row, read at its last counted token: what the SEQ_CLS model of RewardTrainer gives, less the
        ``reward_bias`` beside the adapter (the mean raw score of references, which so have 0: Ouyang et al. 2022, arXiv:2203.02155, 3.5).

        ``ended`` tells which rows close with an end-of-text token; a reward model that was trained without it reads the token before.
        """
        return self.read_scores(self.hidden("reward", input_ids, attention_mask, trunk), attention_mask, ended)

    def read_scores(
        self, hidden: Float[Tensor, "B L H"], attention_mask: Int[Tensor, "B L"], ended: Bool[Tensor, " B"] | None = None
    ) -> Float[Tensor, " B"]:
        """``scores``, given the hidden states under ``reward``."""
        last = last_counted(attention_mask)
        if ended is not None and not self.reads_eos:
            last = last - ended.long()
        return self.apply_head("reward", hidden[torch.arange(len(last), device=last.device), last])

    def forward(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Int[Tensor, "B L"],
        response_mask: Bool[Tensor, "B T"],
        trunk: Float[Tensor, "B L H"] | None = None,
        features: Float[Tensor, "B T H"] | None = None,
        ref_hidden: Float[Tensor, "B T H"] | None = None,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
        ptx: tuple[Int[Tensor, "P N"], Int[Tensor, "P N"]] | None = None,
    ) -> PolicyAndValue:
        """Policy and critic in one call, which is what DistributedDataParallel must see: one forward, then one backward.

        ``features``: the reward adapter's states before each response token, for a critic on ``reward_features``; computed where not given.
        ``ref_hidden``: the reference's states before each response token, for the exact KL to it.
        ``ptx``: pretraining texts and their attention mask; their mean negative log-likelihood a token is PPO-ptx's term.
        """
        ptx_loss = None if ptx is None else self.negative_log_likelihood(*ptx)
        hidden = self.hidden("policy", input_ids, attention_mask, trunk)
        logprobs, entropy = self.logprobs(hidden, input_ids, response_mask, temperature=temperature, entropy_gradient=entropy_gradient)
        kl = None if ref_hidden is None else self.exact_kl(before_response(hidden, response_mask), ref_hidden, response_mask, temperature=temperature)
        if self.critic is None:
            values = None
        elif features is not None:
            values = torch.where(response_mask, self.apply_head("value", features), 0.0)
        else:
            values = self.values(hidden if self.critic == "shared" else self.hidden("value", input_ids, attention_mask, trunk), response_mask)
        return PolicyAndValue(logprobs, entropy, values, kl, ptx_loss)

    def negative_log_likelihood(self, input_ids: Int[Tensor, "P N"], attention_mask: Int[Tensor, "P N"]) -> Float[Tensor, ""]:
        """Of whole texts under the policy: nats a token, the first token of each left out. Only the policy gets a gradient."""
        predicted = (attention_mask[:, 1:] & attention_mask[:, :-1]).bool()
        logprobs, _ = self.logprobs(self.hidden("policy", input_ids, attention_mask), input_ids, predicted)
        return -logprobs.sum() / predicted.sum()


def before_response(hidden: Float[Tensor, "B L H"], response_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T H"]:
    """States from which each of the last T tokens was chosen."""
    return hidden[:, -response_mask.shape[1] - 1 : -1]
