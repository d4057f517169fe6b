"""InstructGOOSE's names (instruct-goose 0.0.7) on the shared base and the same mathematics: its README loop runs with another import line.

    from goose_lora.instruct import Agent, PairwiseLoss, RewardModel, RLHFConfig, RLHFTrainer, create_reference_model

What differs: ``Agent`` trains LoRA on the model it is given, which stays frozen and is the reference at the same time, and ``compute_loss``
is PPO. One call on each rollout needs nothing more. For further passes over a rollout, or minibatches of it, take ``old = trainer.snapshot(...)``
before its first update and give ``compute_loss(..., old=old)``, or ``old=old.rows(chosen)``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from goose_lora import ppo_math
from goose_lora.batch import Rollout
from goose_lora.loading import keep_4bit_trainable_on_cpu, linear_names
from goose_lora.rewards import token_rewards
from goose_lora.sampling import generation_config, response_mask, sample
from goose_lora.shared_base import Critic, PolicyAndValue, Role, SharedBase
from goose_lora.trunk import decoder_layers


class Agent(nn.Module):
    """Policy and critic on ``model``, a causal language model of transformers, quantized or not, which is frozen and in memory once.

    Args:
        policy: the adapter's configuration, or the folder of a trained one (SFT); LoRA of rank 16 on all linear layers by default.
        critic: ``shared`` for a value head on the policy's states, as in InstructGOOSE; ``adapter`` for an adapter of its own.
        temperature: of sampling, and of all log-probabilities.
        eos_token_id: the tokens that end a reply; the model's own by default.

    Raises:
        ValueError: no token is known that ends a reply.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        policy: LoraConfig | str | Path | None = None,
        critic: Critic = "shared",
        temperature: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
    ):
        super().__init__()
        ends = (eos_token_id, model.generation_config.eos_token_id, model.config.get_text_config().eos_token_id)
        self.eos_token_ids = next((_listed(end) for end in ends if end is not None), [])
        if not self.eos_token_ids:
            raise ValueError(f"{type(model).__name__} has no eos_token_id in its configuration, so replies cannot end. Give Agent(eos_token_id=).")
        self.temperature = temperature
        keep_4bit_trainable_on_cpu(model)
        everywhere = LoraConfig(r=16, lora_alpha=32, target_modules=linear_names(decoder_layers(model)), task_type="CAUSAL_LM")
        self.shared = SharedBase.build(model, policy or everywhere, critic=critic)
        self.train()

    def train(self, mode: bool = True) -> "Agent":
        """Evaluation mode, whatever is asked for: dropout, which GPT-2 has, would make the ratios noise. What trains does not depend on it."""
        return super().train(False)

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
        """Prompts and sampled replies, these always ``max_new_tokens`` wide and padded after their end: ``[:, -max_new_tokens:]`` are replies.

        Raises:
            ValueError: a setting of transformers with which replies would not be samples of the policy that ``compute_loss`` takes them for.
        """
        pad = self.eos_token_ids[0] if pad_token_id is None else pad_token_id
        common = {"response_tokens": max_new_tokens, "temperature": self.temperature, "eos_token_ids": self.eos_token_ids, "pad_token_id": pad}
        harmless = generation_config(**common).to_dict() | {"eos_token_id": self.eos_token_ids}
        for name, value in settings.items():
            # The README's min_length=-1, which transformers 5 refuses, means none.
            meant = {"min_length": max(value or 0, 0), "eos_token_id": _listed(value)}.get(name, value)
            if value is not None and meant != harmless.get(name):
                raise ValueError(
                    f"generate({name}={value!r}): the replies would not be samples of the policy whose log-probabilities compute_loss takes. "
                    "Leave it out; temperature and eos_token_id are arguments of Agent, and do_sample=False gives the likeliest reply."
                )
        prompts, mask = _left_padded(input_ids, attention_mask)
        sequences = sample(self.shared, prompts, mask.long(), generation_config(**common, do_sample=do_sample), role=role).input_ids
        # transformers stops at the longest reply, where the README's slice would take the prompt's last tokens for the reply's first.
        return nn.functional.pad(sequences, (0, prompts.shape[1] + max_new_tokens - sequences.shape[1]), value=pad)

    def forward(self, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Each row's next token, sampled, with its log-probability, the entropy (nats) and the value of the state before it: (B,) each."""
        ids, mask = _left_padded(input_ids, attention_mask)
        sequences = self.generate(ids, mask, max_new_tokens=1)
        one = torch.ones_like(mask[:, :1])
        output = self.evaluate(Rollout(sequences, torch.cat([mask, one], dim=1).long(), one, one[:, 0]), entropy_gradient=True)
        return sequences[:, -1], output.logprobs[:, 0], output.entropy[:, 0], output.values[:, 0]

    def evaluate(self, rollout: Rollout, *, trunk: Tensor | None = None, entropy_gradient: bool = False) -> PolicyAndValue:
        """Log-probabilities of the replies' own tokens, entropies, and values of the states before them: (B, T) each."""
        ids, attention, mask = rollout.input_ids, rollout.attention_mask, rollout.response_mask
        return self.shared(ids, attention, mask, trunk=trunk, temperature=self.temperature, entropy_gradient=entropy_gradient)


class ReferenceModel(nn.Module):
    """What the agent was before training: a view of its base, without a weight of its own and without gradients.

    Called with a rollout, it gives the log-probabilities of the replies' tokens.
    """

    def __init__(self, agent: Agent):
        super().__init__()
        self._agent = (agent,)  # in a tuple: as a submodule it would be frozen, moved and saved along with the view
        self.eval()

    @torch.no_grad()
    def forward(self, rollout: Rollout, *, trunk: Tensor | None = None) -> Float[Tensor, "B T"]:
        (agent,) = self._agent
        hidden = agent.shared.hidden("reference", rollout.input_ids, rollout.attention_mask, trunk)
        return agent.shared.logprobs(hidden, rollout.input_ids, rollout.response_mask, temperature=agent.temperature)[0]

    def generate(self, *args: Any, **settings: Any) -> Int[Tensor, "B P+T"]:
        """As the agent's."""
        return self._agent[0].generate(*args, **settings, role="reference")

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """The weights it reads, detached. Overridden since a view registers none."""
        shared = self._agent[0].shared
        others = {name for role in ("policy", "value", "reward") for name, _ in shared.role_parameters(role)}
        return ((name, p.detach()) for name, p in shared.named_parameters(*args, **kwargs) if name not in others)


def create_reference_model(model: Agent) -> ReferenceModel:
    """The reference of ``model``: what it was built on, whenever this is called. InstructGOOSE copies all weights as they are at the call."""
    return ReferenceModel(model)


@dataclass(frozen=True)
class RLHFConfig:
    """Settings of the loss. ``epsilon`` and ``ent_coef`` are InstructGOOSE's names for ``cliprange`` and ``entropy_coef``: give either.

    ``whiten_advantages`` is for batches: with one reply, taking off the mean pushes a part of a good reply's tokens down.
    """

    epsilon: float | None = None
    ent_coef: float | None = None
    vf_coef: float = 0.1
    cliprange: float | None = None
    entropy_coef: float | None = None
    cliprange_value: float | None = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    kl_coef: float = 0.05
    kl_estimator: ppo_math.KLEstimator = "k1"
    whiten_advantages: bool = True

    def __post_init__(self) -> None:
        for name, alias, default in (("cliprange", "epsilon", 0.1), ("entropy_coef", "ent_coef", 0.01)):
            given = {value for value in (getattr(self, name), getattr(self, alias)) if value is not None}
            if len(given) > 1:
                raise ValueError(f"{name}={getattr(self, name)} and {alias}={getattr(self, alias)} are one setting. Give one of them.")
            for one in (name, alias):
                object.__setattr__(self, one, next(iter(given), default))
        bounds = {"cliprange": 1.0, "gamma": 1.0, "lam": 1.0}
        for name in ("cliprange", "entropy_coef", "vf_coef", "kl_coef", "gamma", "lam", "cliprange_value"):
            value, most = getattr(self, name), bounds.get(name, float("inf"))
            if value is not None and not 0 <= value <= most:
                raise ValueError(f"{name}={value}: must lie between 0 and {most:g}.")


@dataclass(frozen=True)
class Snapshot:
    """What the updates on a rollout need of the policy that sampled it: (B, T) each, without gradient."""

    logprobs: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]

    def rows(self, chosen: Int[Tensor, " b"]) -> "Snapshot":
        """Of some rows: a minibatch's."""
        return Snapshot(*(x[chosen] for x in vars(self).values()))


class RLHFTrainer:
    """PPO's loss (Schulman et al. 2017) with the KL in the reward (Ouyang et al. 2022), for a loop and an optimizer of one's own.

    Prompts may be padded on either side. Of a reply counts what its mask has, up to and with its first end-of-text token.
    """

    def __init__(self, model: Agent, ref_model: ReferenceModel, config: RLHFConfig):
        if not isinstance(ref_model, ReferenceModel):
            raise ValueError(f"ref_model is a {type(ref_model).__name__}. Make it with create_reference_model(model), which copies no weight.")
        self.model, self.ref_model, self.config = model, ref_model, config

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
        """policy loss + vf_coef * value loss - entropy_coef * entropy, each a mean over the tokens that count.

        Without ``old``, the policy at this call is the one that sampled the replies. With it, the rewards are those it was taken with.

        Raises:
            ValueError: tensors that do not belong together, a prompt or reply without a token, a mask with holes, or rewards not finite.
        """
        return self.loss_and_metrics(query_ids, query_attention_mask, response_ids, response_attention_mask, rewards, old=old)[0]

    def loss_and_metrics(
        self,
        query_ids: Int[Tensor, "B P"],
        query_attention_mask: Int[Tensor, "B P"],
        response_ids: Int[Tensor, "B T"],
        response_attention_mask: Int[Tensor, "B T"],
        rewards: Float[Tensor, " B"],
        *,
        old: Snapshot | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """``compute_loss``, and what to watch: clip fractions, ratio, KL from the rollout, entropy, the critic's error."""
        config = self.config
        rollout = self._rollout(query_ids, query_attention_mask, response_ids, response_attention_mask, rewards)
        mask = rollout.response_mask
        trunk = self.model.shared.trunk(rollout.input_ids, rollout.attention_mask)
        output = self.model.evaluate(rollout, trunk=trunk, entropy_gradient=config.entropy_coef > 0)
        if old is None:
            old = self._snapshot(rollout, output, rewards, trunk)
        if old.logprobs.shape != mask.shape:
            raise ValueError(f"old is of replies {tuple(old.logprobs.shape)}, these are {tuple(mask.shape)}. For a minibatch give old.rows(chosen).")
        policy_loss, policy_stats = ppo_math.policy_loss(output.logprobs, old.logprobs, old.advantages, mask, cliprange=config.cliprange)
        value_loss, value_stats = ppo_math.value_loss(
            output.values, old.values, old.returns, mask, cliprange_value=config.cliprange_value
        )
        entropy = ppo_math.masked_mean(output.entropy, mask)
        stats = {"loss/policy": policy_loss.detach(), "loss/value": value_loss.detach(), "policy/entropy": entropy.detach()}
        return policy_loss + config.vf_coef * value_loss - config.entropy_coef * entropy, policy_stats | value_stats | stats

    @torch.no_grad()
    def snapshot(
        self, query_ids: Tensor, query_attention_mask: Tensor, response_ids: Tensor, response_attention_mask: Tensor, rewards: Tensor
    ) -> Snapshot:
        """What further calls on these replies need, to be taken before their first update: arguments as in ``compute_loss``."""
        rollout = self._rollout(query_ids, query_attention_mask, response_ids, response_attention_mask, rewards)
        trunk = self.model.shared.trunk(rollout.input_ids, rollout.attention_mask)
        return self._snapshot(rollout, self.model.evaluate(rollout, trunk=trunk), rewards, trunk)

    @torch.no_grad()
    def _snapshot(self, rollout: Rollout, output: PolicyAndValue, rewards: Tensor, trunk: Tensor | None) -> Snapshot:
        config, mask = self.config, rollout.response_mask
        logprobs, values = output.logprobs.detach(), output.values.detach()
        kl = ppo_math.kl_per_token(logprobs, self.ref_model(rollout, trunk=trunk), estimator=config.kl_estimator)
        scores = rewards.to(logprobs)
        advantages = ppo_math.gae(token_rewards(scores, kl, mask, kl_coef=config.kl_coef), values, mask, gamma=config.gamma, lam=config.lam)
        whitened = ppo_math.whiten(advantages, mask) if config.whiten_advantages else advantages
        return Snapshot(logprobs, values, whitened, advantages + values)

    def _rollout(
        self, query_ids: Tensor, query_attention_mask: Tensor, response_ids: Tensor, response_attention_mask: Tensor, rewards: Tensor
    ) -> Rollout:
        """Prompts moved to the right, padding made a valid token, and replies cut after their end."""
        batch = (query_ids, query_attention_mask, response_ids, response_attention_mask, rewards)
        (queries, query_mask, replies, reply_mask, scores) = shapes = [tuple(x.shape) for x in batch]
        if len(queries) != 2 or len(replies) != 2 or query_mask != queries or reply_mask != replies or not scores == queries[:1] == replies[:1]:
            raise ValueError(f"query, its mask, response, its mask and rewards must be (B, P), (B, P), (B, T), (B, T) and (B,), and are {shapes}.")
        counted = response_attention_mask.bool()
        if (counted[:, 1:] & ~counted[:, :-1]).any():
            raise ValueError("response_attention_mask has a 1 after a 0: a reply's tokens must come first in its row, and padding after them.")
        if not torch.isfinite(rewards).all():
            raise ValueError(f"{int((~torch.isfinite(rewards)).sum())} of {len(rewards)} rewards are not finite.")
        until_end, ended = response_mask(torch.where(counted, response_ids, -1), self.model.eos_token_ids)
        counted = counted & until_end
        prompts, prompt_mask = _left_padded(query_ids, query_attention_mask)
        input_ids = torch.cat([prompts, torch.where(counted, response_ids, 0)], dim=1)
        return Rollout(input_ids, torch.cat([prompt_mask, counted], dim=1).long(), counted, ended)


class RewardModel(nn.Module):
    """``checkpoint`` with one linear output, unbounded, read at each row's last token that counts; scores are of the reward's own unit."""

    def __init__(self, checkpoint: str | Path):
        super().__init__()
        self.model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1)
        self.model.score.float()
        self.eval()

    def forward(self, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"] | None = None) -> Float[Tensor, " B"]:
        """Padding may stand on either side, but counts where no mask is given."""
        ids, mask = _left_padded(input_ids, attention_mask)
        decoder = getattr(self.model, self.model.base_model_prefix)
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        states = decoder(input_ids=ids, attention_mask=mask.long(), position_ids=position_ids, use_cache=False).last_hidden_state
        return self.model.score(states[:, -1].float()).squeeze(-1)


class PairwiseLoss(nn.Module):
    """-log sigmoid(chosen - rejected), a mean over pairs: ``ppo_math.pairwise_loss``."""

    def forward(self, chosen_rewards: Float[Tensor, "*B"], rejected_rewards: Float[Tensor, "*B"]) -> Float[Tensor, ""]:
        if chosen_rewards.shape != rejected_rewards.shape:
            raise ValueError(f"chosen_rewards {tuple(chosen_rewards.shape)} and rejected_rewards {tuple(rejected_rewards.shape)} are not pairs.")
        return ppo_math.pairwise_loss(chosen_rewards.flatten(), rejected_rewards.flatten())


def _left_padded(ids: Int[Tensor, "B L"], mask: Int[Tensor, "B L"] | None) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """Rows moved to the right, and token 0, which every vocabulary has, where nothing counts; all counts where no mask is given."""
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if not mask.any(-1).all():
        raise ValueError("a row has no token that counts: its attention mask is all 0. Drop it.")
    order = mask.long().argsort(dim=-1, stable=True)
    mask = mask.gather(-1, order)
    return torch.where(mask, ids.gather(-1, order), 0), mask


def _listed(x: Any) -> list[Any]:
    return list(x) if isinstance(x, Sequence) else [x]
