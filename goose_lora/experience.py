"""What becomes of a rollout and its scores: rewards a token, advantages, and the figures that a run shows of them."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor

from goose_lora import ppo_math
from goose_lora.batch import Experience, Rollout
from goose_lora.callbacks import RolloutState
from goose_lora.ppo_config import PPOConfig
from goose_lora.rewards import Scores, ScoreScale, score_scale, token_rewards
from goose_lora.rollouts import Evaluated


class ExperienceMaker:
    """Turns rollouts into what the update needs, by the settings of one run.

    Args:
        state: the KL coefficient and the scale of scores, which checkpoints carry.
        values_are_scores: the critic started from the reward model and speaks in its units, so that its values are normalised like scores.
    """

    def __init__(self, args: PPOConfig, state: RolloutState, accelerator: Accelerator, *, values_are_scores: bool):
        self.args, self.state, self.accelerator, self.values_are_scores = args, state, accelerator, values_are_scores

    @property
    def scale(self) -> ScoreScale:
        return ScoreScale(*(self.state.score_scale or ScoreScale()))

    def values(self, values: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """The critic's output in the units of normalised scores."""
        return self.scale.normalise(values) if self.values_are_scores else values

    def learn_scale(self, raw: Float[Tensor, " B"]) -> None:
        """Take ``raw``, scores on this process, into the scale: once and for all from the reference's replies, or a part of all so far."""
        how = self.args.score_normalization
        if how == "none" or (how == "reference" and self.state.score_scale is not None):
            return
        everywhere: Any = self.accelerator.gather(raw)
        if how == "reference":
            self.state.score_scale = tuple(score_scale(everywhere))
            return
        before = self.state.score_moments
        seen = [] if before is None else [ppo_math.Moments(*torch.tensor(before, dtype=torch.float64))]
        new = ppo_math.moments(everywhere.double().cpu(), torch.ones(len(everywhere), dtype=torch.bool))
        merged = ppo_math.merge_moments([*seen, new])
        self.state.score_moments = tuple(float(x) for x in merged)
        # All scores alike so far: nothing to count in, and no reason to stop, since a sparse reward begins so.
        self.state.score_scale = (merged.mean.item(), merged.var.sqrt().item() if merged.var > 1e-12 else 1.0)

    def make(self, rollout: Rollout, seen: Evaluated, scores: Scores) -> tuple[Experience, dict[str, float]]:
        """Rewards and advantages of a rollout, and figures of them by name, over the rollouts of all processes."""
        args, mask = self.args, rollout.response_mask
        self.learn_scale(scores.total)
        kl = seen.kl if seen.kl is not None else ppo_math.kl_per_token(seen.logprobs, seen.ref_logprobs, estimator=args.kl_estimator)  # type: ignore[arg-type]
        normalised = self.scale.normalise(scores.total)
        by_token = None if scores.by_token is None else torch.zeros_like(seen.logprobs).masked_scatter(mask, scores.by_token / self.scale.std)
        kl_coef = self.state.kl_control.coef if args.kl_location == "reward" else 0.0
        rewards = token_rewards(self._penalised(normalised, rollout), kl, mask, kl_coef=kl_coef, by_token=by_token)
        values = None if seen.values is None else torch.where(mask, self.values(seen.values), 0.0)
        advantages, returns = self.advantages(rewards, values, mask)
        everywhere, everyones = self._everywhere, self._everywhere(mask.long()).bool()
        spread = advantages if values is None or returns is None else returns - values  # before it was whitened
        shown = _figures(rollout, seen, normalised, scores, everywhere) | {
            "objective/reward": rewards.sum(-1).mean(),
            "objective/kl_coef": torch.tensor(self.state.kl_control.coef),
            "advantage/std": ppo_math.moments(everywhere(spread), everyones).var.sqrt(),
            "advantage/largest": everywhere(advantages).abs().max(),
        }
        if values is not None and returns is not None:
            shown |= {
                "value/explained_variance": ppo_math.explained_variance(everywhere(values), everywhere(returns), everyones),
                "value/mean": ppo_math.masked_mean(everywhere(values), everyones),
            }
        states = (seen.trunk, seen.value_trunk, seen.features, seen.ref_hidden)
        kept = Experience(rollout, seen.logprobs, seen.ref_logprobs, advantages, values, returns, *states)
        own = torch.stack([value.to(mask.device, torch.float32) for value in shown.values()])
        mean: Any = self.accelerator.reduce(own, reduction="mean")  # each has as many replies; what counts tokens is equal
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
            compare = ppo_math.leave_one_out if args.advantage_estimator == "rloo" else ppo_math.group_normalised
            return torch.where(mask, compare(rewards.sum(-1), args.num_generations)[:, None], 0.0), None
        if args.whiten_rewards:
            rewards = ppo_math.whiten(rewards, mask, shift_mean=False, statistics=self._moments(rewards, mask))
        advantages = ppo_math.gae(rewards, values, mask, gamma=args.gamma, lam=args.lam)
        whitened = ppo_math.whiten(advantages, mask, statistics=self._moments(advantages, mask))
        return whitened, torch.where(mask, advantages + values, 0.0)

    def _moments(self, x: Tensor, mask: Tensor) -> ppo_math.Moments:
        """Over the rollouts of all processes."""
        own = torch.stack([torch.as_tensor(value, dtype=x.dtype, device=x.device) for value in ppo_math.moments(x, mask)])
        return ppo_math.merge_moments([ppo_math.Moments(*row) for row in self.accelerator.gather(own[None])])


def _figures(
    rollout: Rollout, seen: Evaluated, normalised: Float[Tensor, " B"], scores: Scores, everywhere: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    mask = rollout.response_mask
    k1 = torch.where(mask, seen.logprobs - seen.ref_logprobs, 0.0)
    k3 = torch.where(mask, ppo_math.kl_per_token(seen.logprobs, seen.ref_logprobs, estimator="k3"), 0.0)
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
        shown["rollout/sampling_gap"] = ppo_math.masked_mean(everywhere(gap), everywhere(mask.long()).bool())
    if len(scores.by_source) > 1:
        shown |= {f"reward/{name}": everywhere(values.to(mask.device)).nanmean() for name, values in scores.by_source.items()}
    return shown


def repeated_trigrams(reply: list[int]) -> float:
    """Share of a reply's token trigrams that stood in it before (seq-rep-3, Welleck et al. 2020, arXiv:1908.04319); 0 for fewer than three tokens."""
    trigrams = list(zip(reply, reply[1:], reply[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0
