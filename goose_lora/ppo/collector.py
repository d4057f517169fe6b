"""Replies to a batch of prompts, and one sweep over them for all that the roles have to say:
scores, log-probabilities, values."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from goose_lora.errors import UserError
from goose_lora.generation.rollout import Rollout, joined
from goose_lora.generation.sampling import sample
from goose_lora.generation.stopping import StopStrings
from goose_lora.generation.vllm import VLLMEngine
from goose_lora.models.dense_copy import RolloutWeights, free_bytes, make_dense_copy
from goose_lora.models.role_outputs import PolicyAndValue, before_response, columns_read, output_head
from goose_lora.models.roles import Role
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo.memory_rules import TrunkMemory, waits_on_host
from goose_lora.rewards.sources import RewardMix, Scores


class Evaluated(NamedTuple):
    """What the roles say of a rollout, before any normalisation; parts that nobody needs are None.

    ``trunk`` is the policy's, ``value_trunk`` the critic's where it is another. ``kl`` is the exact
    one, ``ref_hidden`` the reference's states for a loss on it. ``by_adapter`` has the reward
    adapter's scores. ``output`` is policy and critic with their graph, where it was kept.
    """

    by_adapter: Float[Tensor, " B"] | None
    logprobs: Float[Tensor, "B T"]
    ref_logprobs: Float[Tensor, "B T"]
    kl: Float[Tensor, "B T"] | None
    values: Float[Tensor, "B T"] | None
    trunk: Float[Tensor, "B L H"] | None
    value_trunk: Float[Tensor, "B L H"] | None
    features: Float[Tensor, "B T H"] | None
    ref_hidden: Float[Tensor, "B T H"] | None
    output: PolicyAndValue | None = None


class Rollouts:
    """Generates and evaluates in groups of ``batch_size`` replies, on one process.

    Args:
        reward: what scores the replies.
        stop_strings: texts that end a reply, besides the tokens of ``generation``.
        reuse_trunk: run the layers that the roles share once.
        exact_kl: sum the KL over the vocabulary; for a loss, the reference's states are kept too.
        entropy_gradient: whether a graph that is kept reaches the entropy.
        trunk_memory: where states that the update needs wait for it, on the device or the host;
            ``auto`` takes the host where they would need more than half of what the device has
            left.
        engine: what generates in place of transformers; the lengths, stop texts and sampling are
            its own.
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
        stop_strings: Sequence[str] | None = None,
        reuse_trunk: bool = True,
        exact_kl: Literal["reward", "loss"] | None = None,
        entropy_gradient: bool = False,
        trunk_memory: TrunkMemory = "auto",
        engine: VLLMEngine | None = None,
    ):
        self.shared, self.tokenizer, self.generation = shared, tokenizer, generation
        self.batch_size, self.reuse_trunk, self.reward = batch_size, reuse_trunk, reward
        self.stop_strings, self.exact_kl, self.entropy_gradient = stop_strings, exact_kl, entropy_gradient
        self.trunk_memory: TrunkMemory = trunk_memory
        self.engine = engine
        self.dense = make_dense_copy(shared, "shared" if engine else weights)

    def _keep_on(self, rows: int, columns: int) -> torch.device:
        """The device on which a rollout of this size leaves its states."""
        weight = output_head(self.shared.core).weight
        number = rows * columns * weight.shape[1] * weight.element_size() * self.shared.kept_trunks()
        on_host = waits_on_host(self.trunk_memory, need=number, free=free_bytes(weight.device))
        return torch.device("cpu") if on_host else weight.device

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "B P"],
        attention_mask: Int[Tensor, "B P"],
        *,
        greedy: bool = False,
        keep_trunk: bool = False,
    ) -> Rollout:
        """One reply to each left-padded prompt, by the policy as it is now; all put together to one
        width.

        ``keep_trunk``: note the output of the policy's trunk on the way, so that ``evaluate`` needs
        no pass for it.
        """
        if self.engine is not None:
            return self.engine.sample(input_ids, attention_mask, greedy=greedy)
        if self.dense is not None:
            self.dense.merge_role("policy")
        config = self.generation
        if greedy:
            config = copy.deepcopy(config)
            config.do_sample = False
        depth = (
            self.shared.capture_depth(merged=self.dense is not None) if keep_trunk and self.reuse_trunk else 0
        )
        columns = input_ids.shape[1] + config.max_new_tokens
        how = {
            "dense": self.dense,
            "trunk_depth": depth,
            "keep_trunk_on": self._keep_on(len(input_ids), columns) if depth else None,
        }
        if len(input_ids) <= self.batch_size:
            return sample(
                self.shared, input_ids, attention_mask, config, stop=self._stop(input_ids.shape[1]), **how
            )
        # Like lengths together: less padding, and fewer steps that only one reply needs
        order = attention_mask.sum(-1).argsort(stable=True)
        parts = []
        for rows in order.split(self.batch_size):
            longest = int(attention_mask[rows].sum(-1).max())
            ids, mask = input_ids[rows, -longest:], attention_mask[rows, -longest:]
            parts.append(sample(self.shared, ids, mask, config, stop=self._stop(longest), **how))
        return joined(parts, order, self.tokenizer.pad_token_id)

    def _stop(self, prompt_tokens: int) -> StopStrings | None:
        return StopStrings(self.tokenizer, self.stop_strings, prompt_tokens) if self.stop_strings else None

    @torch.no_grad()
    def evaluate(self, rollout: Rollout, *, score: bool = True, keep_graph: bool = False) -> Evaluated:
        """All roles in one sweep, a group of replies at a time, so that each group's shared layers
        are run once. The reward adapter scores where it is a source, unless ``score`` is false.
        ``keep_graph``: that of policy and critic, of a rollout that is one group.
        """
        if keep_graph and len(rollout.ended) > self.batch_size:
            raise UserError(
                f"keep_graph: {len(rollout.ended)} replies are more than one group of {self.batch_size}"
            )
        score = score and self.reward.needs_adapter
        shared, temperature = self.shared, self.generation.temperature
        on_features = shared.critic == "reward_features"
        roles: list[Role] = [
            "policy",
            "reference",
            *(["reward"] if on_features or score else []),
            *(["value"] if shared.critic == "adapter" else []),
        ]
        parts = []
        keep_on = self._keep_on(*rollout.input_ids.shape)
        for ids, attention, mask, closed, captured in self._groups(rollout):
            captured = None if captured is None else captured.to(ids.device)
            trunks = (
                shared.trunks(ids, attention, roles, captured) if self.reuse_trunk else dict.fromkeys(roles)
            )
            read = columns_read(mask)
            judged: Any = (
                shared.hidden("reward", ids, attention, trunks["reward"], read)
                if on_features or score
                else None
            )
            features = before_response(judged, mask).clone() if on_features else None
            reference = shared.hidden("reference", ids, attention, trunks["reference"], read)
            ref_logprobs, _ = shared.logprobs(reference, ids, mask, temperature=temperature)
            ref_hidden = before_response(reference, mask).clone() if self.exact_kl else None
            trunk, value_trunk = trunks["policy"], trunks.get("value")
            value_trunk = None if value_trunk is trunk else value_trunk
            states = {
                "trunk": trunk,
                "value_trunk": value_trunk,
                "features": features,
                "ref_hidden": ref_hidden,
            }
            with torch.set_grad_enabled(keep_graph):
                output = shared(
                    ids,
                    attention,
                    mask,
                    temperature=temperature,
                    entropy_gradient=self.entropy_gradient,
                    **states,
                )
            without_graph: Any = [None if x is None else x.detach() for x in output]
            policy = PolicyAndValue(*without_graph)
            scores = shared.read_scores(judged, attention, closed) if score else None
            kept = ref_hidden if self.exact_kl == "loss" else None
            own_trunk = trunk if captured is None else None
            waiting = (None if x is None else x.to(keep_on) for x in (own_trunk, value_trunk, features, kept))
            parts.append((scores, policy.logprobs, ref_logprobs, policy.kl, policy.values, *waiting))
        columns: Any = [_together(column) for column in zip(*parts, strict=True)]
        seen = Evaluated(*columns, output=output if keep_graph else None)
        return seen if rollout.trunk is None else seen._replace(trunk=rollout.trunk)

    @torch.no_grad()
    def scores(
        self, rollout: Rollout, columns: dict[str, list], by_adapter: Float[Tensor, " B"] | None = None
    ) -> Scores:
        """Raw scores from all sources; the reward adapter's are computed unless ``evaluate`` has
        given them already."""
        if self.reward.needs_adapter and by_adapter is None:
            by_adapter = torch.cat(
                [
                    self.shared.scores(ids, attention, ended=closed)
                    for ids, attention, _, closed, _ in self._groups(rollout)
                ]
            )
        ids = rollout.response_ids()
        replies = columns | {
            "prompts": columns.get("prompt") or self.tokenizer.batch_decode(rollout.prompt_ids()),
            "completions": self.tokenizer.batch_decode(ids, skip_special_tokens=True),
            "completion_ids": ids,
        }
        replies.pop("prompt", None)
        total, by_source, by_token = self.reward(by_adapter, **replies)
        device = rollout.input_ids.device
        return Scores(total.to(device), by_source, None if by_token is None else by_token.to(device))

    def _groups(self, rollout: Rollout) -> Iterator[tuple[Any, ...]]:
        """Ids, attention mask, response mask, which replies close with the end-of-text token, since
        a reward model may not have read it, and the trunk's output where there is one."""
        closed = rollout.ends_with_token(self.tokenizer.eos_token_id)
        fields = (rollout.input_ids, rollout.attention_mask, rollout.response_mask, closed)
        parts = [field.split(self.batch_size) for field in fields]
        trunks = [None] * len(parts[0]) if rollout.trunk is None else rollout.trunk.split(self.batch_size)
        return zip(*parts, trunks, strict=True)


def _together(parts: Sequence[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])
