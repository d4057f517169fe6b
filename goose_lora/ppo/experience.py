"""What becomes of a rollout and its scores: rewards a token, advantages, and the figures that a run
shows of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor

import goose_lora.functional as F
from goose_lora.functional import token_rewards
from goose_lora.generation.rollout import Rollout
from goose_lora.ppo.callbacks import RolloutState
from goose_lora.ppo.collector import Evaluated
from goose_lora.ppo.config import PPOConfig
from goose_lora.rewards.scale import ScoreScale, score_scale
from goose_lora.rewards.sources import Scores


@dataclass
class Experience:
    """A rollout with what the update needs, all (B, T) and fp32; values and returns where there is
    a critic.

    Besides, the output of the policy's trunk, and of the critic's if it is another, (B, L, H) where
    it is reused; the states that the critic's head reads (B, T, H) where they are frozen; and the
    reference's (B, T, H) where the exact KL to it is part of the loss. These may be in the host's
    memory.
    """

    rollout: Rollout
    logprobs: Float[Tensor, "B T"]
    ref_logprobs: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"] | None = None
    returns: Float[Tensor, "B T"] | None = None
    trunk: Float[Tensor, "B L H"] | None = None
    value_trunk: Float[Tensor, "B L H"] | None = None
    features: Float[Tensor, "B T H"] | None = None
    ref_hidden: Float[Tensor, "B T H"] | None = None

    def microbatches(
        self, rows: int, per_step: int, *, mean_tokens: Callable[[Tensor], Tensor]
    ) -> Iterator[dict[str, Tensor]]:
        """One epoch's microbatches of ``rows`` rows in a fresh random order, ``per_step`` of them
        to each optimizer step.

        Their ``num_tokens`` is the number of response tokens of the whole optimizer step, averaged
        over processes by ``mean_tokens``
        since DistributedDataParallel averages gradients: with it, losses add up to the mean over
        tokens, however the rows are cut. In one microbatch, rows keep their order.
        """
        order = torch.randperm(len(self.rollout.input_ids), device="cpu").to(self.rollout.input_ids.device)
        order = order.sort().values if len(order) <= rows else order
        for step in order.split(rows * per_step):
            num_tokens = mean_tokens(self.rollout.response_mask[step].sum())
            for chosen in step.split(rows):
                yield self._take(chosen) | {"num_tokens": num_tokens}

    def _take(self, rows: Int[Tensor, " b"]) -> dict[str, Tensor]:
        everything = {
            "input_ids": self.rollout.input_ids,
            "attention_mask": self.rollout.attention_mask,
            "response_mask": self.rollout.response_mask,
            "old_logprobs": self.logprobs,
            "ref_logprobs": self.ref_logprobs,
            "advantages": self.advantages,
            "old_values": self.values,
            "returns": self.returns,
            "trunk": self.trunk,
            "value_trunk": self.value_trunk,
            "features": self.features,
            "ref_hidden": self.ref_hidden,
        }
        return {name: x[rows.to(x.device)] for name, x in everything.items() if x is not None}


class ExperienceMaker:
    """Turns rollouts into what the update needs, by the settings of one run.

    Args:
        state: the KL coefficient and the scale of scores, which checkpoints carry.
        values_are_scores: the critic started from the reward model and speaks in its units, so that
            its values are normalised like scores.
    """

    def __init__(
        self, args: PPOConfig, state: RolloutState, accelerator: Accelerator, *, values_are_scores: bool
    ):
        self.args, self.state, self.accelerator, self.values_are_scores = (
            args,
            state,
            accelerator,
            values_are_scores,
        )

    @property
    def scale(self) -> ScoreScale:
        return ScoreScale(*(self.state.score_scale or ScoreScale()))

    def values(self, values: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """The critic's output in the units of normalised scores."""
        return self.scale.normalise(values) if self.values_are_scores else values

    def learn_scale(self, raw: Float[Tensor, " B"]) -> None:
        """Take ``raw``, scores on this process, into the scale: once and for all from the
        reference's replies, or a part of all so far."""
        how = self.args.score_normalization
        if how == "none" or (how == "reference" and self.state.score_scale is not None):
            return
        everywhere: Any = self.accelerator.gather(raw)
        if how == "reference":
            self.state.score_scale = tuple(score_scale(everywhere))
            return
        before = self.state.score_moments
        seen = [] if before is None else [F.Moments(*torch.tensor(before, dtype=torch.float64))]
        new = F.moments(everywhere.double().cpu(), torch.ones(len(everywhere), dtype=torch.bool))
        merged = F.merge_moments([*seen, new])
        self.state.score_moments = tuple(float(x) for x in merged)
        # All scores alike so far: nothing to count in, and no reason to stop, since a sparse reward
        # begins so.
        self.state.score_scale = (merged.mean.item(), merged.var.sqrt().item() if merged.var > 1e-12 else 1.0)

    def make(self, rollout: Rollout, seen: Evaluated, scores: Scores) -> tuple[Experience, dict[str, float]]:
        """Rewards and advantages of a rollout, and figures of them by name, over the rollouts of
        all processes."""
        args, mask = self.args, rollout.response_mask
        self.learn_scale(scores.total)
        kl = seen.kl
        if kl is None:
            estimator: Any = args.kl_estimator  # not "exact", whose KL the roles have given
            kl = F.kl_per_token(seen.logprobs, seen.ref_logprobs, estimator=estimator)
        normalised = self.scale.normalise(scores.total)
        by_token = (
            None
            if scores.by_token is None
            else torch.zeros_like(seen.logprobs).masked_scatter(mask, scores.by_token / self.scale.std)
        )
        kl_coef = self.state.kl_control.coef if args.kl_location == "reward" else 0.0
        rewards = token_rewards(
            self._penalised(normalised, rollout), kl, mask, kl_coef=kl_coef, by_token=by_token
        )
        values = None if seen.values is None else torch.where(mask, self.values(seen.values), 0.0)
        advantages, returns = self.advantages(rewards, values, mask)
        everywhere, everyones = self._everywhere, self._everywhere(mask.long()).bool()
        # Before it was whitened
        spread = advantages if values is None or returns is None else returns - values
        shown = _figures(rollout, seen, normalised, scores, everywhere) | {
            "objective/reward": rewards.sum(-1).mean(),
            "objective/kl_coef": torch.tensor(self.state.kl_control.coef),
            "advantage/std": F.moments(everywhere(spread), everyones).var.sqrt(),
            "advantage/largest": everywhere(advantages).abs().max(),
        }
        if values is not None and returns is not None:
            shown |= {
                "value/explained_variance": F.explained_variance(
                    everywhere(values), everywhere(returns), everyones
                ),
                "value/mean": F.masked_mean(everywhere(values), everyones),
            }
        states = (seen.trunk, seen.value_trunk, seen.features, seen.ref_hidden)
        kept = Experience(rollout, seen.logprobs, seen.ref_logprobs, advantages, values, returns, *states)
        own = torch.stack([value.to(mask.device, torch.float32) for value in shown.values()])
        # Each has as many replies; what counts tokens is equal
        mean: Any = self.accelerator.reduce(own, reduction="mean")
        return kept, dict(zip(shown, mean.tolist(), strict=True))

    def _everywhere(self, x: Tensor) -> Any:
        """The rows of all processes, those of (B, T) padded to one width."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(x, dim=1))

    def _penalised(self, scores: Float[Tensor, " B"], rollout: Rollout) -> Float[Tensor, " B"]:
        args = self.args
        if args.score_clip is not None:
            scores = scores.clamp(-args.score_clip, args.score_clip)
        if args.missing_eos_penalty is not None:
            scores = torch.where(rollout.ended, scores, scores - args.missing_eos_penalty)
        return scores - args.length_penalty * rollout.lengths

    def advantages(
        self, rewards: Float[Tensor, "B T"], values: Float[Tensor, "B T"] | None, mask: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"] | None]:
        """Advantages, and what the critic is to learn where there is one."""
        args = self.args
        if values is None:
            compare = F.leave_one_out if args.advantage_estimator == "rloo" else F.group_normalised
            return torch.where(mask, compare(rewards.sum(-1), args.num_generations)[:, None], 0.0), None
        if args.whiten_rewards:
            rewards = F.whiten(rewards, mask, shift_mean=False, statistics=self._moments(rewards, mask))
        advantages = F.gae(rewards, values, mask, gamma=args.gamma, lam=args.lam)
        whitened = F.whiten(advantages, mask, statistics=self._moments(advantages, mask))
        return whitened, torch.where(mask, advantages + values, 0.0)

    def _moments(self, x: Tensor, mask: Tensor) -> F.Moments:
        """Over the rollouts of all processes."""
        own = torch.stack(
            [torch.as_tensor(value, dtype=x.dtype, device=x.device) for value in F.moments(x, mask)]
        )
        return F.merge_moments([F.Moments(*row) for row in self.accelerator.gather(own[None])])


def _figures(
    rollout: Rollout,
    seen: Evaluated,
    normalised: Float[Tensor, " B"],
    scores: Scores,
    everywhere: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    mask = rollout.response_mask
    k1 = torch.where(mask, seen.logprobs - seen.ref_logprobs, 0.0)
    k3 = torch.where(mask, F.kl_per_token(seen.logprobs, seen.ref_logprobs, estimator="k3"), 0.0)
    replies = rollout.response_ids()
    everyones = everywhere(torch.tensor([hash(tuple(reply)) for reply in replies], device=mask.device))
    shown = {
        "objective/score": normalised.mean(),
        "objective/raw_score": scores.total.mean(),
        "objective/kl": k1.sum(-1).mean(),
        "objective/kl_k3": k3.sum(-1).mean(),
        "rollout/response_tokens": rollout.lengths.float().mean(),
        "rollout/eos_rate": rollout.ended.float().mean(),
        "rollout/repetition": torch.tensor(sum(map(repeated_trigrams, replies)) / len(replies)),
        "rollout/distinct_replies": torch.tensor(len(everyones.unique()) / len(everyones)),
    }
    if seen.kl is not None:
        shown["objective/kl_exact"] = torch.where(mask, seen.kl, 0.0).sum(-1).mean()
    if rollout.sampling_logprobs is not None:
        gap = torch.where(mask, (rollout.sampling_logprobs - seen.logprobs).abs(), 0.0)
        shown["rollout/sampling_gap"] = F.masked_mean(everywhere(gap), everywhere(mask.long()).bool())
    if len(scores.by_source) > 1:
        shown |= {
            f"reward/{name}": everywhere(values.to(mask.device)).nanmean()
            for name, values in scores.by_source.items()
        }
    return shown


def repeated_trigrams(reply: list[int]) -> float:
    """Share of a reply's token trigrams that stood in it before (seq-rep-3, Welleck et al. 2020,
    arXiv:1908.04319); 0 for fewer than three tokens."""
    trigrams = list(zip(reply, reply[1:], reply[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0
