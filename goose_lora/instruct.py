"""InstructGOOSE's names (instruct-goose 0.0.7) on the shared base and the same mathematics.

Its README loop runs with another import line.

    from goose_lora.instruct import Agent, PairwiseLoss, RewardModel, RLHFConfig, RLHFTrainer,
    create_reference_model

What differs: ``Agent`` trains LoRA on the model it is given, which stays frozen and is the
reference at the same time, and ``compute_loss`` is PPO. One call on each rollout needs nothing
more. For further passes over a rollout, or for minibatches of it, take ``old =
trainer.snapshot(...)`` before its first update and give ``compute_loss(..., old=old)``, or
``old=old.rows(chosen)``.
"""

import copy
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, PeftModel, PeftType
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

import goose_lora.functional as F
from goose_lora.errors import UserError
from goose_lora.functional import token_rewards
from goose_lora.generation.rollout import Rollout
from goose_lora.generation.sampling import generation_config, response_mask, sample
from goose_lora.kinds import settle_types
from goose_lora.models.adapter_kinds import require_harmless_start, require_known
from goose_lora.models.dense_copy import DenseCopy, dense_bytes, free_bytes, unmergeable
from goose_lora.models.folders import AdapterFolder
from goose_lora.models.loading import linear_names
from goose_lora.models.quantization import keep_4bit_trainable_on_cpu, keep_8bit_alike_on_cpu
from goose_lora.models.roles import ADAPTERS, belongs_to
from goose_lora.models.shared_base import Critic, Role, SharedBase
from goose_lora.models.trunk import decoder_layers

_AGENT = "_goose_lora_agent"  # where a transformers model has the agent that was made on it


class Agent(nn.Module):
    """Policy and critic on a causal language model of transformers, quantized or not.

    The model is frozen and in memory once.

    ``policy`` is an adapter's configuration or the folder of a trained one (SFT), by default LoRA
    of rank 16 on all linear layers. A ``PeftModel`` brings its own, which trains on in its own
    parameters. ``critic`` is ``shared`` for a head on the policy's states, as
    in InstructGOOSE, or ``adapter`` for an adapter of its own. ``temperature`` is that of sampling
    and of all log-probabilities.

    The model answers, generates, checkpoints and saves as before, with the policy in it. An
    optimizer that has weights of the model must be made after the agent.

    Raises UserError if the model is no causal language model of transformers or PEFT, has an agent
    already, or has no end-of-text token.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        policy: LoraConfig | str | None = None,
        critic: Critic = "shared",
        temperature: float = 1.0,
    ):
        super().__init__()
        if _agent_of(model) is not None:
            raise UserError(
                f"this {type(model).__name__} has an agent already, which create_reference_model or"
                " Agent(model) has made. Give RLHFTrainer the model, or load the model again."
            )
        # The model says what ends its replies: its generation's settings first
        ends = [
            config.eos_token_id
            for config in (model.generation_config, model.config.get_text_config())
            if config
        ]
        self.eos_token_ids = next((_listed(end) for end in ends if end is not None), [])
        if not self.eos_token_ids:
            raise UserError(
                f"replies of {type(model).__name__} cannot end. Set model.generation_config.eos_token_id"
                " before Agent(model)."
            )
        # LoRA on a frozen base, quantized or not
        self.temperature = temperature
        keep_4bit_trainable_on_cpu(model)
        keep_8bit_alike_on_cpu(model)
        # PEFT's model has its policy already, which goes on as it is
        core = model
        if isinstance(model, PeftModel):
            core, self.shared = _on_peft_model(model, policy, critic)
        else:
            everywhere = LoraConfig(
                r=16, lora_alpha=32, target_modules=linear_names(decoder_layers(model)), task_type="CAUSAL_LM"
            )
            self.shared = SharedBase.build(model, policy or everywhere, critic=critic)
        # In a tuple, so that it is no submodule of the model
        vars(core)[_AGENT] = (self,)
        # transformers' own would write PEFT's names, which nothing can load
        vars(core)["save_pretrained"] = self._save_model
        own = cast(Callable[..., Any], core.generate)
        vars(core)["generate"] = partial(self._without_checkpointing, own)
        _watch_optimizers(self)
        self.eval()

    def generate(
        self,
        input_ids: Int[Tensor, "B P"],
        attention_mask: Int[Tensor, "B P"] | None = None,
        *,
        max_new_tokens: int = 20,
        pad_token_id: int | None = None,
        do_sample: bool = True,
        role: Role = "policy",
        **settings: Any,
    ) -> Int[Tensor, "B P+T"]:
        """Sample replies, padded after their end to ``max_new_tokens`` always.

        Returns prompts and replies: ``[:, -max_new_tokens:]`` are the replies.

        Raises ValueError for a setting of transformers under which they would not be samples of the
        policy, as ``compute_loss`` takes them.
        """
        # Plain sampling, and every setting of the caller's that it already means
        pad = self.eos_token_ids[0] if pad_token_id is None else pad_token_id
        own: dict[str, Any] = {
            "temperature": self.temperature,
            "eos_token_ids": self.eos_token_ids,
            "pad_token_id": pad,
        }
        config = generation_config(response_tokens=max_new_tokens, do_sample=do_sample, **own)
        harmless = generation_config(response_tokens=max_new_tokens, **own).to_dict()
        for name, value in settings.items():
            # The README's min_length=-1, which transformers 5 refuses, means none.
            meant = (
                0
                if (name, value) == ("min_length", -1)
                else _listed(value)
                if name == "eos_token_id"
                else value
            )
            if value is not None and meant != harmless.get(name):
                raise UserError(
                    f"generate({name}={value!r}): the replies would not be samples of the policy whose"
                    " log-probabilities compute_loss takes. Leave it out; the temperature is an argument of"
                    " Agent, and do_sample=False is greedy."
                )
        # Replies begin where the padding on the left has ended
        prompts, mask = _left_padded(input_ids, attention_mask)
        replies = sample(self.shared, prompts, mask.long(), config, role=role).input_ids[
            :, prompts.shape[1] :
        ]
        # transformers stops at the longest reply, where the README's slice would take the prompt's
        # last tokens for the reply's first.
        return torch.cat(
            [input_ids, nn.functional.pad(replies, (0, max_new_tokens - replies.shape[1]), value=pad)], dim=1
        )

    def forward(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"] | None = None
    ) -> tuple[Tensor, ...]:
        """Sample each row's next token.

        Returns it, its log-probability, the entropy (nats) and the value of the state before it:
        (B,) each.
        """
        ids, mask = _left_padded(input_ids, attention_mask)
        sequences, one = self.generate(ids, mask, max_new_tokens=1), torch.ones_like(mask[:, :1])
        rollout = Rollout(sequences, torch.cat([mask, one], dim=1).long(), one, one[:, 0])
        return sequences[:, -1], *(x[:, 0] for x in self.evaluate(rollout, entropy_gradient=True))

    def evaluate(self, rollout: Rollout, *, entropy_gradient: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of the replies' own tokens, entropies, and values: (B, T) each.

        A value is that of the state before its token.
        """
        self.shared.adopt_checkpointing()
        ids, attention, mask = rollout.input_ids, rollout.attention_mask, rollout.response_mask
        output = self.shared(
            ids, attention, mask, temperature=self.temperature, entropy_gradient=entropy_gradient
        )
        return output.logprobs, output.entropy, output.values

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Save the policy's adapter as PEFT does, and the critic in ``value/`` beside it.

        ``PeftModel.from_pretrained(base, folder)`` loads the policy. ``Agent(base, policy=folder)``
        goes on from it, and from the critic after
        ``agent.shared.load_role("value", f"{folder}/value")``. The base is not in the folder.
        """
        self.shared.save_pretrained(str(save_directory))

    def _save_model(self, save_directory: str | Path, **settings: object) -> None:
        """Save the transformers model whole: the policy merged into its base, by its own names.

        ``settings`` are those of transformers.

        Raises:
            UserError: an adapter that is no sum of two matrices, too little memory, or a
                ``state_dict`` of the caller's.
        """
        # What cannot be merged is saved as the adapter that it is
        core, odd = self.shared.core, unmergeable(self.shared)
        need, free = dense_bytes(self.shared), free_bytes(self.shared.device)
        why = None
        if settings.get("state_dict") is not None:
            why = "takes no state_dict: its weights are the base's and the policy's, merged"
        elif odd is not None:
            why = f"merges the policy, which takes plain LoRA only, and here is {odd}"
        elif need > free:
            why = f"merges the policy in {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        if why is not None:
            raise UserError(
                f"save_pretrained of this {type(core).__name__} {why}. Save the adapter:"
                " create_reference_model(model).agent.save_pretrained(FOLDER)."
            )
        merged = DenseCopy(self.shared)
        merged.require_same("policy")
        merged.model.save_pretrained(save_directory, **settings)

    def _without_checkpointing(
        self, generate: Callable[..., Any], *args: object, **settings: object
    ) -> object:
        """Call the model's ``generate``, which checkpointing would cost its context (TF#36051)."""
        with self.shared.role(self.shared.acting, generating=True):
            return generate(*args, **settings)


class _Weight(NamedTuple):
    """A weight of the base, and what changes when it is written to, converted or replaced."""

    name: str
    parameter: nn.Parameter
    version: int
    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def all_of(cls, shared: SharedBase) -> list["_Weight"]:
        """Return those of a base, in order: all that no adapter and no head of a role adds."""
        added = tuple(shared.peft_config)
        return [
            cls(name.replace(".base_layer", ""), p, 0 if p.is_inference() else p._version, p.dtype, p.shape)
            for name, p in shared.core.named_parameters()
            if not belongs_to(name, *added)
        ]

    @staticmethod
    def first_changed(before: list["_Weight"], now: list["_Weight"]) -> str | None:
        """Return the name of the first that is another, new, or gone; None if all are the same."""
        for was, one in zip(before, now, strict=False):
            # An offloaded weight is another object after each pass
            same = was.parameter is one.parameter or one.parameter.is_meta
            if not same or was[2:] != one[2:]:
                return was.name
        longer = max(before, now, key=len)[min(len(before), len(now)) :]
        return longer[0].name if longer else None


class ReferenceModel(nn.Module):
    """The model as it was when the reference was made: a frozen view without a copy of the base.

    It answers as a copy would: logits of token ids, ``generate``, ``config``, ``parameters``. Of an
    adapter that had been trained by then it keeps the tensors.

    It copies no weight of the base. Where one has been written to, converted to another dtype,
    resized or replaced since, it raises UserError instead of an answer. It cannot see writes that
    torch does not count: through ``parameter.data``, or by a fused optimizer.
    """

    def __init__(self, agent: Agent, *, of_plain_model: bool = False):
        super().__init__()
        # In a tuple: as a submodule it would be frozen, moved and saved along with the view
        self._agent = (agent,)
        self._of_plain_model = of_plain_model
        shared = agent.shared
        self.config: PretrainedConfig = copy.deepcopy(shared.core.config)
        self._generation_config = copy.deepcopy(shared.core.generation_config)
        # Untrained, the policy is the base, or the adapter that it started from. Else its tensors
        # are kept: they are few.
        untrained = shared.says_the_same("policy", "reference")
        self._role: Role = "reference" if untrained else "policy"
        self._kept: dict[str, Tensor] = {}
        if not untrained:
            self._kept = {n: p.detach().clone() for n, p in shared.role_parameters("policy")}
        self._weights = _Weight.all_of(shared)
        self.eval()

    @property
    def agent(self) -> Agent:
        """The agent whose reference this is."""
        return self._agent[0]

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.agent.shared.core.device

    @contextmanager
    def _as_it_was(self, *, generating: bool = False) -> Iterator[PreTrainedModel]:
        """Let the base answer inside as it did; afterwards it is as it is now."""
        shared = self.agent.shared
        # Another base would be another reference
        changed = _Weight.first_changed(self._weights, _Weight.all_of(shared))
        if changed is not None:
            raise UserError(
                f"the weights of this {type(shared.core).__name__} have changed since its reference was made"
                f" ({changed}), and the reference copies none. Train adapters alone; after a change that is"
                " meant, call create_reference_model(model) again."
            )
        # A tensor's data is exchanged: autograd's record of the policy stays what it is
        own = {name: p for name, p in shared.role_parameters("policy") if name in self._kept}
        now = {name: p.data for name, p in own.items()}
        settings = shared.core.generation_config
        try:
            for name, parameter in own.items():
                self._kept[name] = self._kept[name].to(parameter.device)
                parameter.data = self._kept[name]
            with shared.role(self._role, generating=generating) as core:
                core.generation_config = self._generation_config
                yield core
        finally:
            shared.core.generation_config = settings
            for name, parameter in own.items():
                parameter.data = now[name]

    @torch.no_grad()
    def forward(
        self,
        input_ids: Int[Tensor, "B L"] | None = None,
        attention_mask: Int[Tensor, "B L"] | None = None,
        **settings: Any,
    ) -> ModelOutput:
        """Return what the transformers model returns: ``logits`` (B, L, V) and the like."""
        with self._as_it_was() as core:
            return core(input_ids, attention_mask=attention_mask, **settings)

    @torch.no_grad()
    def generate(self, input_ids: Int[Tensor, "B P"] | None = None, **settings: Any) -> Int[Tensor, "B P+T"]:
        """Return prompts and replies, as ``generate`` of what it is the reference of."""
        with self._as_it_was(generating=True) as core:
            if self._of_plain_model:
                prompts = {} if input_ids is None else {"inputs": input_ids}
                return core.generate(**prompts, **settings)  # type: ignore[operator]
            if input_ids is None:
                raise UserError("generate() without input_ids: an agent continues token ids. Give them.")
            return self.agent.generate(input_ids, role=self._role, **settings)

    @torch.no_grad()
    def logprobs(self, rollout: Rollout) -> Float[Tensor, "B T"]:
        """Return log-probabilities of the replies' own tokens."""
        shared = self.agent.shared
        with self._as_it_was():
            hidden = shared.hidden(self._role, rollout.input_ids, rollout.attention_mask)
            return shared.logprobs(
                hidden,
                rollout.input_ids,
                rollout.response_mask,
                temperature=self.agent.temperature,
            )[0]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """Yield the weights it reads, detached. Overridden since the view registers none."""
        shared = self.agent.shared
        # What roles add is not the reference's, but for what it has kept
        roles: tuple[Role, ...] = ("policy", "value", "reward", "ema")
        others = {name for role in roles for name, _ in shared.role_parameters(role)}
        if self._kept and shared.has("reference"):
            others |= {name for name, _ in shared.role_parameters("reference")}
        for name, parameter in shared.named_parameters(*args, **kwargs):
            if name in self._kept:
                yield name, self._kept[name]
            elif name not in others and ".score." not in name:
                yield name, parameter.detach()


def create_reference_model(model: Agent | PreTrainedModel | PeftModel) -> ReferenceModel:
    """Return a frozen view that answers as ``model`` does now; no weight of the base is copied.

    InstructGOOSE copies all weights. Here a plain model of transformers gets the adapters of an
    ``Agent`` instead, in place: it answers as before, what trains from then on is the adapters, and
    ``RLHFTrainer(model, ref_model, config)`` trains them. A model of PEFT trains its own adapter.

    Make the optimizer afterwards, from the parameters that require a gradient. After a conversion
    of the model, such as ``model.to(torch.bfloat16)``, make the reference again.
    ``model.save_pretrained`` saves the base with the trained policy merged into it.
    """
    if isinstance(model, Agent):
        return ReferenceModel(model)
    return ReferenceModel(_agent_of(model) or Agent(model), of_plain_model=True)


def _agent_of(model: object) -> Agent | None:
    """Return the agent that was made on a model of transformers or of PEFT, if one was.

    Raises:
        UserError: anything else, or a model that does not continue texts.
    """
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(core, PreTrainedModel) or not core.can_generate():
        raise UserError(
            f"model is of type {type(core).__name__}, and must be a causal language model. Load one with"
            " AutoModelForCausalLM.from_pretrained(NAME), and give that."
        )
    found = vars(core).get(_AGENT)
    return found[0] if found else None


# ---- Optimizers that were made too early ----

_AGENTS: weakref.WeakSet[Agent] = weakref.WeakSet()
# Of each optimizer that has been looked at since the last agent came, how many parameters it had
_LOOKED_AT: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()


def _watch_optimizers(agent: Agent) -> None:
    """Let every optimizer's next step be looked at: the weights of ``agent`` are frozen now."""
    _AGENTS.add(agent)
    _LOOKED_AT.clear()
    _register_once()


@cache
def _register_once() -> None:
    register_optimizer_step_pre_hook(lambda optimizer, *call: _require_adapters(optimizer))


def _require_adapters(optimizer: Optimizer) -> None:
    """Refuse an optimizer that has frozen weights of an agent's model and nothing that trains.

    It is one that was made before the agent. Its steps would move nothing, without a word.
    """
    # Looked at once, and again when it got further parameters
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if _LOOKED_AT.get(optimizer) == count:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for agent in _AGENTS:
        core = type(agent.shared.core).__name__
        found = [p.requires_grad for p in agent.parameters() if id(p) in held]
        if found and not any(found):
            raise UserError(
                f"this {type(optimizer).__name__} has weights of a {core} that are frozen, and none of its"
                " adapters, so that its steps train nothing there. Make the optimizer after"
                " create_reference_model(model), from [p for p in model.parameters() if p.requires_grad]."
            )
    _LOOKED_AT[optimizer] = count


def _on_peft_model(
    model: PeftModel, policy: LoraConfig | str | None, critic: Critic
) -> tuple[PreTrainedModel, SharedBase]:
    """Put the roles on the base of PEFT's model, whose one adapter goes on as the policy.

    The model's own parameters are the policy's, so that an optimizer that has them trains it.

    Raises:
        UserError: another policy, several adapters, or an adapter that a role cannot be exactly.
    """
    where, names = f"this {type(model).__name__}", list(model.peft_config)
    if policy is not None:
        raise UserError(f"{where} has an adapter already, and policy names another. Leave policy out.")
    if names != [ADAPTERS["policy"]]:
        raise UserError(
            f"{where} has the adapters {', '.join(names)}, and an agent trains the one called default. Load"
            " that one alone."
        )
    config = model.peft_config[ADAPTERS["policy"]]
    if not isinstance(config, LoraConfig):
        raise UserError(f"{where} has an adapter of {PeftType(config.peft_type).value}. Agents train LoRA.")
    # Its start may have changed the base that is in memory
    require_harmless_start(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        adapter = AdapterFolder.open("model", folder)
        require_known(adapter)
        own = dict(model.named_parameters())
        core = cast(PreTrainedModel, model.unload())
        shared = SharedBase.build(core, adapter, critic=critic)
    # Its parameters take their places again, with what they hold
    for name, fresh in list(shared.role_parameters("policy")):
        place, _, leaf = name.rpartition(".")
        parameter = own.get(name, fresh)
        parameter.requires_grad_(fresh.requires_grad)
        shared.get_submodule(place).register_parameter(leaf, parameter)
    return core, shared


@dataclass(frozen=True)
class RLHFConfig:
    """Settings of the loss.

    ``epsilon`` and ``ent_coef`` are InstructGOOSE's names for ``cliprange`` and ``entropy_coef``:
    give either.

    ``whiten_advantages`` is for batches: with one reply, taking off the mean pushes a part of a
    good reply's tokens down.
    """

    epsilon: float = 0.1
    ent_coef: float = 0.01
    vf_coef: float = 0.1
    cliprange: float | None = None
    entropy_coef: float | None = None
    cliprange_value: float | None = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    kl_coef: float = 0.05
    kl_estimator: F.KLEstimator = "k1"
    whiten_advantages: bool = True

    def __post_init__(self) -> None:
        settle_types(self)
        # Two names of one setting: whichever is given is what both say
        for name, theirs in (("cliprange", "epsilon"), ("entropy_coef", "ent_coef")):
            ours, value = getattr(self, name), getattr(self, theirs)
            if ours is not None and value not in (ours, getattr(RLHFConfig, theirs)):
                raise UserError(f"{name}={ours} and {theirs}={value} are one setting. Give one of them.")
            for one in (name, theirs):
                object.__setattr__(self, one, value if ours is None else ours)
        # Ranges
        for name in ("cliprange", "entropy_coef", "vf_coef", "cliprange_value", "gamma", "lam", "kl_coef"):
            value, most = getattr(self, name), 1.0 if name in ("cliprange", "gamma", "lam") else torch.inf
            if value is not None and not 0 <= value <= most:
                raise UserError(f"{name}={value}: must lie between 0 and {most}.")


@dataclass(frozen=True)
class Snapshot:
    """What the updates on a rollout need of the policy that sampled it.

    (B, T) each, without gradient.
    """

    logprobs: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]

    def rows(self, chosen: Int[Tensor, " b"]) -> "Snapshot":
        """Return those of some rows: a minibatch's."""
        return Snapshot(*(x[chosen] for x in vars(self).values()))


class RLHFTrainer:
    """PPO's loss with the KL in the reward, for a loop and an optimizer of one's own.

    Schulman et al. 2017; Ouyang et al. 2022.

    Prompts may be padded on either side. Of a reply counts what its mask has, up to and with its
    first end-of-text token.
    """

    def __init__(
        self, model: Agent | PreTrainedModel | PeftModel, ref_model: ReferenceModel, config: RLHFConfig
    ):
        if not isinstance(ref_model, ReferenceModel):
            raise UserError(
                f"ref_model is a {type(ref_model).__name__}. Use create_reference_model(model), which copies"
                " no weight."
            )
        agent = model if isinstance(model, Agent) else _agent_of(model)
        if agent is None:
            raise UserError(
                f"model is a {type(model).__name__} without an agent, and ref_model another model's"
                " reference. Use create_reference_model(model)."
            )
        self.model, self.ref_model, self.config = agent, ref_model, config

    def compute_loss(
        self,
        query_ids: Int[Tensor, "B P"],
        query_attention_mask: Int[Tensor, "B P"],
        response_ids: Int[Tensor, "B T"],
        response_attention_mask: Int[Tensor, "B T"],
        rewards: Float[Tensor, " B"],
        *,
        old: Snapshot | None = None,
    ) -> Float[Tensor, ""]:
        """Return policy loss + vf_coef * value loss - entropy_coef * entropy.

        They are means over the tokens that count.

        Without ``old``, the policy at this call is the one that sampled the replies. With it, the
        rewards are those it was taken with.

        Raises ValueError: tensors that do not belong together, a prompt or reply without a token, a
        mask with holes, rewards not finite.
        """
        # The policy now, on the replies' own tokens
        config = self.config
        rollout = self._rollout(
            query_ids, query_attention_mask, response_ids, response_attention_mask, rewards
        )
        mask = rollout.response_mask
        logprobs, entropy, values = self.model.evaluate(rollout, entropy_gradient=config.ent_coef > 0)
        if old is None:
            old = self._snapshot(rollout, logprobs, values, rewards)
        # A snapshot of other rows is a mistake in the caller's loop
        if old.logprobs.shape != mask.shape:
            raise UserError(
                f"old has shape {tuple(old.logprobs.shape)}, not {tuple(mask.shape)}. For a minibatch give"
                " old.rows(chosen)."
            )
        # PPO's three terms
        policy_loss, _ = F.policy_loss(logprobs, old.logprobs, old.advantages, mask, cliprange=config.epsilon)
        value_loss, _ = F.value_loss(
            values, old.values, old.returns, mask, cliprange_value=config.cliprange_value
        )
        return policy_loss + config.vf_coef * value_loss - config.ent_coef * F.masked_mean(entropy, mask)

    @torch.no_grad()
    def snapshot(self, **batch: Tensor) -> Snapshot:
        """Return what calls on these replies need once an update was made.

        It is to be taken before, with the keyword arguments of ``compute_loss``.
        """
        rollout = self._rollout(**batch)
        logprobs, _, values = self.model.evaluate(rollout)
        return self._snapshot(rollout, logprobs, values, batch["rewards"])

    @torch.no_grad()
    def _snapshot(self, rollout: Rollout, logprobs: Tensor, values: Tensor, rewards: Tensor) -> Snapshot:
        # The KL is part of the reward, token by token
        config, mask = self.config, rollout.response_mask
        kl = F.kl_per_token(logprobs, self.ref_model.logprobs(rollout), estimator=config.kl_estimator)
        each_token = token_rewards(rewards.to(logprobs), kl, mask, kl_coef=config.kl_coef)
        # Advantages against the critic as it was
        advantages = F.gae(each_token, values, mask, gamma=config.gamma, lam=config.lam)
        whitened = F.whiten(advantages, mask) if config.whiten_advantages else advantages
        return Snapshot(logprobs, values, whitened, advantages + values)

    def _rollout(
        self,
        query_ids: Tensor,
        query_attention_mask: Tensor,
        response_ids: Tensor,
        response_attention_mask: Tensor,
        rewards: Tensor,
    ) -> Rollout:
        # Do the tensors belong together?
        batch = (query_ids, query_attention_mask, response_ids, response_attention_mask, rewards)
        query, query_mask, reply, reply_mask, scores = shapes = [tuple(x.shape) for x in batch]
        if (
            (query_mask, reply_mask) != (query, reply)
            or (len(query), len(reply)) != (2, 2)
            or not scores == query[:1] == reply[:1]
        ):
            raise UserError(
                "queries, their mask, responses, theirs, rewards must be (B, P) twice, (B, T) twice, (B,),"
                f" and are {shapes}."
            )
        # A mask without holes, and rewards that are numbers
        counted = response_attention_mask.bool()
        if (counted[:, 1:] & ~counted[:, :-1]).any():
            raise UserError(
                "response_attention_mask has a 1 after a 0. A reply's tokens must come first in its row,"
                " padding after them."
            )
        if not torch.isfinite(rewards).all():
            raise UserError(f"rewards are not finite: {rewards.tolist()}.")
        # What follows the first end counts as little as padding does
        until_end, ended = response_mask(torch.where(counted, response_ids, -1), self.model.eos_token_ids)
        counted = counted & until_end
        prompts, prompt_mask = _left_padded(query_ids, query_attention_mask)
        input_ids = torch.cat([prompts, torch.where(counted, response_ids, 0)], dim=1)
        return Rollout(input_ids, torch.cat([prompt_mask, counted], dim=1).long(), counted, ended)


class RewardModel(nn.Module):
    """The decoder in ``checkpoint`` with one linear output, fp32 and unbounded.

    The output is read at each row's last token that counts.
    """

    def __init__(self, checkpoint: str | Path):
        super().__init__()
        self.model = AutoModelForSequenceClassification.from_pretrained(
            checkpoint, num_labels=1, use_safetensors=True
        )
        self.model.score.float()
        self.eval()

    def forward(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"] | None = None
    ) -> Float[Tensor, " B"]:
        """Return scores, with gradients.

        Padding may stand on either side; without a mask it counts like any token.
        """
        ids, mask = _left_padded(input_ids, attention_mask)
        # On the left, so that each row's last token is in the last column
        decoder, position_ids = (
            getattr(self.model, self.model.base_model_prefix),
            (mask.cumsum(-1) - 1).clamp(min=0),
        )
        states = decoder(
            input_ids=ids, attention_mask=mask.long(), position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return self.model.score(states[:, -1].float()).squeeze(-1)


class PairwiseLoss(nn.Module):
    """-log sigmoid(chosen - rejected), a mean over pairs: ``functional.pairwise_loss``."""

    def forward(
        self, chosen_rewards: Float[Tensor, "*B"], rejected_rewards: Float[Tensor, "*B"]
    ) -> Float[Tensor, ""]:
        if chosen_rewards.shape != rejected_rewards.shape:
            raise UserError(
                f"rewards of shapes {tuple(chosen_rewards.shape)} and {tuple(rejected_rewards.shape)} are not"
                " pairs."
            )
        return F.pairwise_loss(chosen_rewards.flatten(), rejected_rewards.flatten())


def _left_padded(
    ids: Int[Tensor, "B L"], mask: Tensor | None
) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """Move rows to the right, with token 0, which every vocabulary has, where nothing counts.

    Without a mask everything counts.
    """
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if not mask.any(-1).all():
        raise UserError("a row has no token that counts: its attention mask is all 0. Leave it out.")
    # A stable sort keeps the order of the tokens that count
    order = mask.long().argsort(dim=-1, stable=True)
    mask = mask.gather(-1, order)
    return torch.where(mask, ids.gather(-1, order), 0), mask


def _listed(x: object) -> list[Any]:
    return list(x) if isinstance(x, Sequence) else [x]
