"""Replies to a batch of prompts, and one sweep over them for all that the roles have to say."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from goose_lora.errors import UserError
from goose_lora.generation.rollout import Rollout, joined
from goose_lora.generation.sampling import sample
from goose_lora.generation.static_cache import RolloutCompile, StaticCache, make_static_cache
from goose_lora.generation.stopping import StopStrings
from goose_lora.generation.vllm import VLLMEngine
from goose_lora.models.dense_copy import RolloutWeights, free_bytes, make_dense_copy
from goose_lora.models.endings import reply_ends
from goose_lora.models.role_outputs import PolicyAndValue, before_response, columns_read, output_head
from goose_lora.models.roles import REWARD_ROLES, Role
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo.memory_rules import TrunkMemory, waits_on_host
from goose_lora.rewards.sources import RewardMix, Scores
from goose_lora.training.checkpoints import Facts

logger = logging.getLogger(__name__)
Made = TypeVar("Made")


class RoleOutputs(NamedTuple):
    """What the roles say of a rollout, before any normalisation; parts that nobody needs are None.

    ``trunk`` is the policy's, ``value_trunk`` the critic's where it is another. ``kl`` is the exact
    one, ``ref_hidden`` the reference's states for a loss on it. ``by_adapter`` has the reward
    adapter's scores, ``disagreement`` that of the members where it is an ensemble. ``output`` is
    policy and critic with their graph, where it was kept.
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
    disagreement: Float[Tensor, " B"] | None = None
    output: PolicyAndValue | None = None


class _Group(NamedTuple):
    """Some replies of a rollout, as the roles read them.

    ``ended`` tells which replies close with the end-of-text token, since a reward model may not
    have read it. ``trunk`` is the policy's, where it was noted while generating.
    """

    input_ids: Int[Tensor, "b L"]
    attention_mask: Int[Tensor, "b L"]
    response_mask: Bool[Tensor, "b T"]
    ended: Bool[Tensor, " b"]
    trunk: Float[Tensor, "b L H"] | None


class RolloutCollector:
    """Generates and evaluates in groups of ``batch_size`` replies, on one process.

    Out of memory, groups are halved from then on.

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
        compile_rollouts: ``auto`` decodes by CUDA graphs where that is possible and worth it.
        decoding_steps: of the whole run, by which that is judged.
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
        compile_rollouts: RolloutCompile = "off",
        decoding_steps: int = 0,
    ):
        self.shared, self.tokenizer, self.generation = shared, tokenizer, generation
        self.batch_size, self.reuse_trunk, self.reward = batch_size, reuse_trunk, reward
        self.stop_strings, self.exact_kl, self.entropy_gradient = stop_strings, exact_kl, entropy_gradient
        self.trunk_memory: TrunkMemory = trunk_memory
        self.engine = engine
        # An engine generates from weights of its own, so that a copy here would be for nothing.
        self.compile_rollouts: RolloutCompile = "off" if engine else compile_rollouts
        self.decoding_steps = decoding_steps
        self._take("shared" if engine else weights)

    def _take(self, weights: RolloutWeights) -> None:
        """Take the weights that replies are written by, and the form of their cache."""
        self.dense = make_dense_copy(self.shared, weights)
        self.static = make_static_cache(
            self.dense, self.compile_rollouts, self.device, steps=self.decoding_steps
        )

    @property
    def chosen(self) -> Facts:
        """Groups and weights that replies are written by, under the names of their settings.

        Sampling draws group by group, and weights are rounded otherwise in each form.
        """
        weights = "shared" if self.dense is None else "dense"
        return {"local_rollout_forward_batch_size": self.batch_size, "rollout_weights": weights}

    def keep(self, chosen: Facts) -> None:
        """Go on as ``chosen`` says; what it does not name stays."""
        wanted = {**self.chosen, **chosen}
        if wanted["rollout_weights"] != self.chosen["rollout_weights"]:
            self._take(wanted["rollout_weights"])
        self.batch_size = wanted["local_rollout_forward_batch_size"]

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model has."""
        return self.shared.core.config.get_text_config().vocab_size

    @property
    def device(self) -> torch.device:
        """Where the head of the model stands, and so a rollout."""
        return output_head(self.shared.core).weight.device

    # ---- Replies ----

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "B P"],
        attention_mask: Int[Tensor, "B P"],
        *,
        greedy: bool = False,
        keep_trunk: bool = False,
    ) -> Rollout:
        """Return one reply to each left-padded prompt, by the policy as it is now.

        All replies are padded to one width.

        Args:
            keep_trunk: note the output of the policy's trunk on the way, so that ``evaluate`` needs
                no pass for it.
        """
        # A dense copy is merged anew, since the policy has moved; the engine sees to that itself.
        if self.engine is not None:
            return self.engine.sample(input_ids, attention_mask, greedy=greedy)
        if self.dense is not None:
            self.dense.merge_role("policy")
        config = self.generation
        if greedy:
            config = copy.deepcopy(config)
            config.do_sample = False

        # Where the trunk's output is noted, it waits where the update will look for it.
        depth, keep_on = 0, None
        compiled = self.static is not None and self.static.serves is not False
        if keep_trunk and self.reuse_trunk and not compiled:
            depth = self.shared.capture_depth(merged=self.dense is not None)
        if depth:
            keep_on = self._keep_on(len(input_ids), input_ids.shape[1] + config.max_new_tokens)

        def reply_to(ids: Int[Tensor, "b P"], mask: Int[Tensor, "b P"]) -> Rollout:
            made = partial(
                sample,
                self.shared,
                ids,
                mask,
                config,
                dense=self.dense,
                trunk_depth=depth,
                keep_trunk_on=keep_on,
            )

            def by(static: StaticCache | None) -> Rollout:
                return made(stop=self._stop(ids.shape[1]), static=static)

            return by(None) if self.static is None else self.static.try_first(by)

        if len(input_ids) <= self.batch_size:
            whole = self._unless_short(len(input_ids), reply_to, input_ids, attention_mask)
            if whole is not None:
                return whole
        # Like lengths together: less padding, and fewer steps that only one reply needs
        lengths, order = attention_mask.sum(-1).sort(stable=True)
        parts, done, ascending = [], 0, lengths.tolist()
        while done < len(order):
            rows = order[done : done + self.batch_size]
            longest = ascending[done + len(rows) - 1]
            part = self._unless_short(
                len(rows), reply_to, input_ids[rows, -longest:], attention_mask[rows, -longest:]
            )
            if part is not None:
                parts.append(part)
                done += len(rows)
        return joined(parts, order, self.tokenizer.pad_token_id)

    def _unless_short(self, rows: int, make: Callable[..., Made], *inputs: Any) -> Made | None:
        """Return what ``make`` makes of ``rows`` replies; None where memory is short for them.

        Groups then have half as many replies, from now on, and the caller tries again.
        """
        try:
            return make(*inputs)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if rows == 1 or not should_reduce_batch_size(error):
                raise
        # After the except: the error's traceback held what the pass had made.
        self.batch_size = (rows + 1) // 2
        clear_device_cache(garbage_collection=True)
        logger.warning(
            "out of memory with a group of %d replies: going on with groups of %d. Set"
            " local_rollout_forward_batch_size to that.",
            rows,
            self.batch_size,
        )
        return None

    def _stop(self, prompt_tokens: int) -> StopStrings | None:
        """Return a look-out for the stop texts, which serves one call."""
        if not self.stop_strings:
            return None
        return StopStrings(self.tokenizer, self.stop_strings, prompt_tokens)

    def _keep_on(self, rows: int, columns: int) -> torch.device:
        """Return the device on which a rollout of this size leaves its states."""
        # Bytes of one state for each token, in the base's dtype, and of each trunk that is kept
        weight = output_head(self.shared.core).weight
        number = rows * columns * weight.shape[1] * weight.element_size() * self.shared.kept_trunks()
        if waits_on_host(self.trunk_memory, need=number, free=free_bytes(weight.device)):
            return torch.device("cpu")
        return weight.device

    # ---- What the roles say ----

    @torch.no_grad()
    def evaluate(self, rollout: Rollout, *, score: bool = True, keep_graph: bool = False) -> RoleOutputs:
        """Return what all roles say in one sweep, a group of replies at a time.

        So each group's shared layers are run once. The reward adapter scores where it is a source,
        unless ``score`` is false.

        Args:
            keep_graph: that of policy and critic, of a rollout that is one group.

        Raises:
            UserError: the graph is asked for, and there is more than one group.
        """
        # The graphs of several groups do not make one microbatch.
        if keep_graph and len(rollout.ended) > self.batch_size:
            raise UserError(
                f"keep_graph: {len(rollout.ended)} replies are more than one group of {self.batch_size}"
            )
        # What the update needs is moved group by group to where it waits.
        score = score and self.reward.needs_adapter
        keep_on = self._keep_on(*rollout.input_ids.shape)
        evaluate = partial(self._evaluate_group, score=score, keep_graph=keep_graph, keep_on=keep_on)
        # A graph is the updater's, who has other parts of it to make smaller
        if keep_graph:
            parts = [evaluate(group) for group in self._groups(rollout)]
        else:
            parts = self._in_groups(rollout, evaluate)
        seen = _together(parts)
        return seen if rollout.trunk is None else seen._replace(trunk=rollout.trunk)

    def _in_groups(self, rollout: Rollout, make: Callable[[_Group], Made]) -> list[Made]:
        """Return what ``make`` makes of each group; all anew where memory is short for one."""
        while True:
            parts: list[Made] = []
            for group in self._groups(rollout):
                part = self._unless_short(len(group.ended), make, group)
                if part is None:
                    break
                parts.append(part)
            else:
                return parts

    def _evaluate_group(
        self, group: _Group, *, score: bool, keep_graph: bool, keep_on: torch.device
    ) -> RoleOutputs:
        """Return what the roles say of one group; what the update needs waits on ``keep_on``."""
        shared, temperature = self.shared, self.generation.temperature
        ids, attention, mask = group.input_ids, group.attention_mask, group.response_mask

        # The trunk of each role, once for all that share it.
        on_features = shared.critic == "reward_features"
        roles: list[Role] = ["policy", "reference"]
        if on_features or score:
            roles.append("reward")
        if score:
            # Members of an ensemble that have layers of their own, not a head on another's states
            roles.extend(role for role in REWARD_ROLES[1:] if shared.member_states.get(role) == role)
        if shared.critic == "adapter":
            roles.append("value")
        trunks: dict[Role, Tensor | None] = dict.fromkeys(roles)
        if self.reuse_trunk:
            captured = None if group.trunk is None else group.trunk.to(ids.device)
            trunks = shared.trunks(ids, attention, roles, captured)
        trunk, value_trunk = trunks["policy"], trunks.get("value")
        if value_trunk is trunk:
            value_trunk = None

        # The reward model's states, for its scores and for a critic that reads them.
        read = columns_read(mask)
        judged, features = None, None
        if "reward" in roles:
            judged = shared.hidden("reward", ids, attention, trunks["reward"], read)
        if on_features and judged is not None:
            features = before_response(judged, mask).clone()

        # The reference, then policy and critic.
        reference = shared.hidden("reference", ids, attention, trunks["reference"], read)
        ref_logprobs, _ = shared.logprobs(reference, ids, mask, temperature=temperature)
        ref_hidden = before_response(reference, mask).clone() if self.exact_kl else None
        with torch.set_grad_enabled(keep_graph):
            output = shared(
                ids,
                attention,
                mask,
                trunk=trunk,
                value_trunk=value_trunk,
                features=features,
                ref_hidden=ref_hidden,
                temperature=temperature,
                entropy_gradient=self.entropy_gradient,
            )

        # Scores are read from the same states of the reward model.
        said = None
        if score and judged is not None:
            said = shared.judge(ids, attention, trunks, group.ended, hidden=judged, columns=read)
        return RoleOutputs(
            None if said is None else said.scores,
            output.logprobs.detach(),
            ref_logprobs,
            _without_graph(output.kl),
            _without_graph(output.values),
            # What was noted while generating waits where it is
            trunk=_moved(trunk, keep_on) if group.trunk is None else None,
            value_trunk=_moved(value_trunk, keep_on),
            features=_moved(features, keep_on),
            ref_hidden=_moved(ref_hidden, keep_on) if self.exact_kl == "loss" else None,
            disagreement=None if said is None else said.disagreement,
            output=output if keep_graph else None,
        )

    @torch.no_grad()
    def scores(
        self,
        rollout: Rollout,
        columns: dict[str, list],
        by_adapter: Float[Tensor, " B"] | None = None,
        *,
        alone: bool = False,
    ) -> Scores:
        """Return raw scores from all sources.

        The reward adapter's are computed unless ``evaluate`` has given them already.

        Args:
            alone: whether each reply is the only one to its prompt, so that no judge is asked.
        """
        if self.reward.needs_adapter and by_adapter is None:
            by_adapter = torch.cat(self._in_groups(rollout, self._scores_of_group))
        # What a reward function gets: texts and tokens of the replies, and the prompts' columns.
        ids = rollout.response_ids()
        replies = columns | {
            "prompts": columns.get("prompt") or self.tokenizer.batch_decode(rollout.prompt_ids()),
            "completions": self.tokenizer.batch_decode(ids, skip_special_tokens=True),
            "completion_ids": ids,
        }
        replies.pop("prompt", None)
        mix = self.reward.without_judges() if alone and self.reward.judges else self.reward
        total, by_source, by_token = mix(by_adapter, **replies)
        device = rollout.input_ids.device
        return Scores(total.to(device), by_source, _moved(by_token, device))

    def _scores_of_group(self, group: _Group) -> Float[Tensor, " b"]:
        shared, ids, attention = self.shared, group.input_ids, group.attention_mask
        # One reward model is one pass; several share the layers below
        states = list(dict.fromkeys(shared.member_states.values()))
        trunks: dict[Role, Tensor | None] = {}
        if self.reuse_trunk and len(states) > 1:
            trunks = shared.trunks(ids, attention, states)
        return shared.judge(ids, attention, trunks, group.ended).scores

    def _groups(self, rollout: Rollout) -> Iterator[_Group]:
        """Yield the rollout in groups of ``batch_size`` replies."""
        size = self.batch_size
        # A reward model that reads no end skips those of text; a stop token is part of the reply.
        ids, ended = rollout.input_ids.split(size), rollout.ends_with_token(reply_ends(self.tokenizer))
        trunks: Sequence[Tensor | None] = [None] * len(ids)
        if rollout.trunk is not None:
            trunks = rollout.trunk.split(size)
        fields = (
            ids,
            rollout.attention_mask.split(size),
            rollout.response_mask.split(size),
            ended.split(size),
        )
        for group in zip(*fields, trunks, strict=True):
            yield _Group(*group)


def _together(parts: Sequence[RoleOutputs]) -> RoleOutputs:
    """Return the outputs of all groups as those of one rollout; a graph is of the only group."""
    # The last field is no tensor, and is left as the first part has it.
    joined_fields = {}
    for name in RoleOutputs._fields[:-1]:
        column = [getattr(part, name) for part in parts]
        if column[0] is not None:
            joined_fields[name] = torch.cat(column)
    return parts[0]._replace(**joined_fields)


def _moved(x: Tensor | None, device: torch.device) -> Tensor | None:
    return None if x is None else x.to(device)


def _without_graph(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
