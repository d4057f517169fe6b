"""Replies to a batch of prompts, and one sweep over them for all that the roles have to say: scores, log-probabilities, values."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from goose_lora.batch import Rollout
from goose_lora.dense import RolloutWeights, dense_copy
from goose_lora.rewards import RewardMix
from goose_lora.sampling import sample
from goose_lora.shared_base import SharedBase, before_response


class Evaluated(NamedTuple):
    """What the roles say of a rollout, before any normalisation."""

    scores: Float[Tensor, " B"]
    scores_by_source: dict[str, Float[Tensor, " B"]]
    logprobs: Float[Tensor, "B T"]
    ref_logprobs: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"] | None
    trunk: Float[Tensor, "B L H"] | None
    features: Float[Tensor, "B T H"] | None


class Rollouts:
    """Generates and evaluates in groups of ``batch_size`` replies, on one process.

    Args:
        reward: what scores the replies.
        reuse_trunk: run the layers that the roles share once.
    """

    def __init__(
        self,
        shared: SharedBase,
        tokenizer: PreTrainedTokenizerBase,
        generation: GenerationConfig,
        *,
        batch_size: int,
        weights: RolloutWeights = "auto",
        reward: RewardMix,
        reuse_trunk: bool = True,
    ):
        self.shared, self.tokenizer, self.generation = shared, tokenizer, generation
        self.batch_size, self.reuse_trunk, self.reward = batch_size, reuse_trunk, reward
        self.dense = dense_copy(shared, weights)

    @torch.no_grad()
    def generate(self, input_ids: Int[Tensor, "B P"], attention_mask: Int[Tensor, "B P"]) -> Rollout:
        """One reply to each left-padded prompt, by the policy as it is now; all put together to one width."""
        if self.dense is not None:
            self.dense.become("policy")
        groups = zip(input_ids.split(self.batch_size), attention_mask.split(self.batch_size), strict=True)
        parts = [sample(self.shared, ids, mask, self.generation, dense=self.dense) for ids, mask in groups]
        if len(parts) == 1:
            return parts[0]
        width = max(part.input_ids.shape[1] for part in parts)

        def joined(name: str, fill: Any) -> Tensor:
            columns = [(getattr(part, name), width - part.input_ids.shape[1]) for part in parts]
            return torch.cat([torch.nn.functional.pad(x, (0, missing), value=fill) for x, missing in columns])

        fills = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "response_mask": False, "sampling_logprobs": 0.0}
        return Rollout(**{name: joined(name, fill) for name, fill in fills.items()}, ended=torch.cat([p.ended for p in parts]))

    @torch.no_grad()
    def evaluate(self, rollout: Rollout, columns: dict[str, list]) -> Evaluated:
        """All roles in one sweep, a group of replies at a time, so that each group's shared layers are run once."""
        shared, temperature = self.shared, self.generation.temperature
        on_features = shared.critic == "reward_features"
        parts = []
        for ids, attention, mask, ended in self._groups(rollout):
            trunk = shared.trunk(ids, attention) if self.reuse_trunk else None
            judged: Any = shared.hidden("reward", ids, attention, trunk) if on_features or self.reward.needs_adapter else None
            features = before_response(judged, mask).clone() if on_features else None
            policy = shared(ids, attention, mask, trunk=trunk, features=features, temperature=temperature)
            reference = shared.hidden("reference", ids, attention, trunk)
            ref_logprobs, _ = shared.logprobs(reference, ids, mask, temperature=temperature)
            scores = shared.read_scores(judged, attention, ended) if self.reward.needs_adapter else None
            parts.append((scores, policy.logprobs, ref_logprobs, policy.values, trunk, features))
        by_adapter, *others = (_together(column) for column in zip(*parts, strict=True))
        return Evaluated(*self._reward(by_adapter, rollout, columns), *others)  # type: ignore[arg-type]

    @torch.no_grad()
    def scores(self, rollout: Rollout, columns: dict[str, list]) -> Float[Tensor, " B"]:
        """Raw scores alone."""
        by_adapter = None
        if self.reward.needs_adapter:
            by_adapter = torch.cat([self.shared.scores(ids, attention, ended=ended) for ids, attention, _, ended in self._groups(rollout)])
        return self._reward(by_adapter, rollout, columns)[0]

    def _groups(self, rollout: Rollout) -> Iterator[tuple[Tensor, ...]]:
        fields = (rollout.input_ids, rollout.attention_mask, rollout.response_mask, rollout.ended)
        return zip(*(field.split(self.batch_size) for field in fields), strict=True)

    def _reward(self, by_adapter: Tensor | None, rollout: Rollout, columns: dict[str, list]) -> tuple[Tensor, dict[str, Tensor]]:
        ids = rollout.response_ids()
        replies = columns | {
            "prompts": columns.get("prompt") or self.tokenizer.batch_decode(rollout.prompt_ids()),
            "completions": self.tokenizer.batch_decode(ids, skip_special_tokens=True),
            "completion_ids": ids,
        }
        replies.pop("prompt", None)
        scores, by_source = self.reward(by_adapter, **replies)
        return scores.to(rollout.input_ids.device), by_source


def _together(parts: Sequence[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])
