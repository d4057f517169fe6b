"""From a rollout and its scores to what the update needs: rewards, advantages, and figures."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor

import goose_lora.functional as F
from goose_lora.errors import UserError
from goose_lora.generation.rollout import Rollout
from goose_lora.models.role_outputs import PolicyAndValue
from goose_lora.ppo.callbacks import RolloutState
from goose_lora.ppo.collector import RoleOutputs
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.microbatches import Microbatch
from goose_lora.ppo.processes import averaged, gathered, gathered_to_one_width
from goose_lora.rewards.scale import ScoreScale, score_scale
from goose_lora.rewards.sources import Scores


@dataclass
class Experience:
    """A rollout with what the update needs, all (B, T) and fp32.

    Values and returns are there where there is a critic, the weights of tokens where
    ``sampling_correction`` asks for them. Besides, the output of the policy's trunk,
    and of the critic's if it is another, (B, L, H) where it is reused; the states that the critic's
    head reads (B, T, H) where they are frozen; and the reference's (B, T, H) where the exact KL to
    it is part of the loss. These may be in the host's memory. ``output`` is the first forward pass
    of the update with its graph, where scoring has made it.
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
    sampling_weights: Float[Tensor, "B T"] | None = None
    output: PolicyAndValue | None = None

    def microbatches(
        self, rows: int, per_step: int, *, mean_tokens: Callable[[Tensor], Tensor]
    ) -> Iterator[Microbatch]:
        """Yield one epoch's microbatches of ``rows`` rows, of steps in a fresh random order.

        In a step of several, rows of like length stand together, the longest first: a microbatch is
        as wide as its longest row, and their gradients are added up in whatever order. In one
        microbatch, rows keep their order.

        Args:
            per_step: microbatches of an optimizer step.
            mean_tokens: averages a step's number of response tokens over processes, since
                DistributedDataParallel averages gradients: see ``Microbatch``.
        """
        # Drawn on the CPU, from the random state that checkpoints carry.
        order = torch.randperm(len(self.rollout.input_ids), device="cpu")
        if len(order) <= rows:
            order = order.sort().values
        # Lengths with their prompts, where they decide which rows stand together
        whole = self.rollout.attention_mask.sum(-1).cpu() if per_step > 1 else None
        # The counts of all steps are read from the device together.
        device, steps = self.rollout.input_ids.device, order.split(rows * per_step)
        lengths = self.rollout.lengths[order.to(device)]
        sums = torch.stack([part.sum() for part in lengths.split(rows * per_step)])
        for step, num_tokens in zip(steps, mean_tokens(sums).tolist(), strict=True):
            if whole is not None:
                step = step[whole[step].argsort(descending=True, stable=True)]
            for chosen in step.split(rows):
                yield self._take(chosen, num_tokens)

    def _take(self, rows: Int[Tensor, " b"], num_tokens: float) -> Microbatch:
        """Return a microbatch of some rows; the first of all takes along the pass that was made."""
        output, self.output = self.output, None
        device = self.rollout.input_ids.device
        places = {torch.device("cpu"): rows, device: rows.to(device)}

        def chosen(x: Tensor) -> Tensor:
            return x[places[x.device]]

        def chosen_if_there(x: Tensor | None) -> Tensor | None:
            return None if x is None else chosen(x)

        return Microbatch(
            input_ids=chosen(self.rollout.input_ids),
            attention_mask=chosen(self.rollout.attention_mask),
            response_mask=chosen(self.rollout.response_mask),
            old_logprobs=chosen(self.logprobs),
            ref_logprobs=chosen(self.ref_logprobs),
            advantages=chosen(self.advantages),
            num_tokens=num_tokens,
            old_values=chosen_if_there(self.values),
            returns=chosen_if_there(self.returns),
            trunk=chosen_if_there(self.trunk),
            value_trunk=chosen_if_there(self.value_trunk),
            features=chosen_if_there(self.features),
            ref_hidden=chosen_if_there(self.ref_hidden),
            sampling_weights=chosen_if_there(self.sampling_weights),
            output=output,
        )


class Advantages(NamedTuple):
    """Advantages as the policy learns from them, and before whitening; what the critic learns."""

    advantages: Float[Tensor, "B T"]
    plain: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"] | None


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
        self.args, self.state, self.accelerator = args, state, accelerator
        self.values_are_scores = values_are_scores
        self.charged_kl_coef = args.kl_coef  # what the rollout under way pays for a nat

    # ---- The units of scores ----

    @property
    def kl_coef(self) -> float:
        """The price of a nat of KL as it is now."""
        return self.state.kl_control.coef

    @property
    def scale(self) -> ScoreScale:
        """Mean and standard deviation in which scores are counted as it is now."""
        return ScoreScale(*(self.state.score_scale or ScoreScale()))

    def values(self, values: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Return the critic's output in the units of normalised scores."""
        return self.scale.normalise(values) if self.values_are_scores else values

    def learn_scale(self, raw: Float[Tensor, " B"], sources: Sequence[str] = ("adapter",)) -> None:
        """Take ``raw``, scores of ``sources`` on this process, into the scale.

        It is learned once and for all from the reference's replies, or from all replies so far.
        """
        how = self.args.score_normalization
        if how == "none" or (how == "reference" and self.state.score_scale is not None):
            return
        everywhere = gathered(self.accelerator, raw)
        if how == "reference":
            self.state.score_scale = tuple(score_scale(everywhere, sources))
            return

        # The moments of all scores so far and of these together, in float64 on the host.
        parts = [F.moments(everywhere.double().cpu(), torch.ones(len(everywhere), dtype=torch.bool))]
        if self.state.score_moments is not None:
            so_far = torch.tensor(self.state.score_moments, dtype=torch.float64)
            parts.insert(0, F.Moments(*so_far))
        merged = F.merge_moments(parts)
        self.state.score_moments = tuple(float(x) for x in merged)
        # All scores alike so far: nothing to count in, and no reason to stop, since a sparse reward
        # begins so.
        deviation = merged.var.sqrt().item() if merged.var > 1e-12 else 1.0
        self.state.score_scale = (merged.mean.item(), deviation)

    # ---- From scores to advantages ----

    def make(
        self, rollout: Rollout, seen: RoleOutputs, scores: Scores
    ) -> tuple[Experience, dict[str, float]]:
        """Return what the update needs of a rollout, and figures of it over all processes."""
        args, mask = self.args, rollout.response_mask

        # 1. Scores: in the units of the scale, clipped, and less what is taken off them.
        self.learn_scale(scores.total, list(scores.by_source))
        normalised = self.scale.normalise(scores.total)
        shaped = F.shaped_scores(
            normalised,
            rollout.ended,
            rollout.lengths,
            clip=args.score_clip,
            missing_eos_penalty=args.missing_eos_penalty,
            length_penalty=args.length_penalty,
        )

        # 2. Rewards: the price of the KL at each token, and the score where it belongs.
        by_token = None
        if scores.by_token is not None:
            zeros = torch.zeros_like(seen.logprobs)
            by_token = zeros.masked_scatter(mask, scores.by_token / self.scale.std)
        kl_coef = self.kl_coef if args.kl_location == "reward" else 0.0
        rewards = F.token_rewards(shaped, self._kl(seen), mask, kl_coef=kl_coef, by_token=by_token)

        # 3. Values, where there is a critic; 4. advantages.
        values = None
        if seen.values is not None:
            values = torch.where(mask, self.values(seen.values), 0.0)
        made = self.advantages(rewards, values, mask)

        # 5. Figures.
        figures = {"objective/score": normalised.mean(), "objective/raw_score": scores.total.mean()}
        figures |= self._of_replies(rollout, seen)
        if args.num_generations > 1:
            figures["rollout/alike_groups"] = F.alike_share(shaped, args.num_generations)
        figures |= self._of_sources(scores)
        if seen.disagreement is not None:
            figures["objective/disagreement"] = seen.disagreement.mean()
        figures["objective/reward"] = rewards.sum(-1).mean()
        self.charged_kl_coef = self.kl_coef  # the price moves before the update
        figures["objective/kl_coef"] = torch.tensor(self.charged_kl_coef)
        figures |= self._of_advantages(made, values, mask)

        weights, of_weights = self._sampling_weights(rollout, seen)
        experience = Experience(
            rollout,
            seen.logprobs,
            seen.ref_logprobs,
            made.advantages,
            values,
            made.returns,
            trunk=seen.trunk,
            value_trunk=seen.value_trunk,
            features=seen.features,
            ref_hidden=seen.ref_hidden,
            sampling_weights=weights,
            output=seen.output,
        )
        # Each process has as many replies; a figure that counts tokens is equal on all.
        return experience, averaged(self.accelerator, figures | of_weights)

    def _sampling_weights(
        self, rollout: Rollout, seen: RoleOutputs
    ) -> tuple[Float[Tensor, "B T"] | None, dict[str, Tensor]]:
        """Return the tokens' weights for the gap between sampler and update, and figures of them.

        Raises:
            UserError: nobody knows how likely the tokens were to their sampler.
        """
        correction, cap = self.args.sampling_correction, self.args.sampling_correction_cap
        if correction is None:
            return None, {}
        if rollout.sampling_logprobs is None:
            raise UserError(
                f"sampling_correction={correction}: these replies come without the probabilities that they"
                " were drawn with, as in a loop of your own. Leave it out."
            )
        mask = rollout.response_mask
        weights, stats = F.sampling_weights(
            seen.logprobs, rollout.sampling_logprobs, mask, correction=correction, cap=cap
        )
        everyones = self._everyones(mask)
        figures = {name: F.masked_mean(self._everywhere(x), everyones) for name, x in stats.items()}
        return weights, figures

    def _kl(self, seen: RoleOutputs) -> Float[Tensor, "B T"]:
        """Return the KL to the reference that is charged: the exact one where the roles give it."""
        if seen.kl is not None:
            return seen.kl
        estimator = self.args.sampled_kl_estimator
        return F.kl_per_token(seen.logprobs, seen.ref_logprobs, estimator=estimator)

    def advantages(
        self, rewards: Float[Tensor, "B T"], values: Float[Tensor, "B T"] | None, mask: Bool[Tensor, "B T"]
    ) -> Advantages:
        """Return advantages, and what the critic is to learn where there is one."""
        args = self.args
        # Without a critic, the replies to one prompt are compared with one another.
        if values is None:
            compare = {"rloo": F.leave_one_out, "grpo": F.group_normalised}[args.advantage_estimator]
            compared = compare(rewards.sum(-1), args.num_generations)
            plain = torch.where(mask, compared[:, None], 0.0)
            return Advantages(plain, plain, None)

        # With one, GAE; whitening goes by the moments over all processes.
        if args.whiten_rewards:
            rewards = F.whiten(rewards, mask, shift_mean=False, statistics=self._moments(rewards, mask))
        plain = F.gae(rewards, values, mask, gamma=args.gamma, lam=args.lam)
        whitened = F.whiten(plain, mask, statistics=self._moments(plain, mask))

        # The critic's targets may look further ahead than the policy's advantages.
        ahead = plain
        if args.lam_critic is not None:
            ahead = F.gae(rewards, values, mask, gamma=args.gamma, lam=args.lam_critic)
        return Advantages(whitened, plain, torch.where(mask, ahead + values, 0.0))

    def _moments(self, x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> F.Moments:
        """Return the moments of ``x`` over the rollouts of all processes."""
        # Gathered as one row of three numbers a process.
        own = torch.stack(
            [torch.as_tensor(value, dtype=x.dtype, device=x.device) for value in F.moments(x, mask)]
        )
        return F.merge_moments([F.Moments(*row) for row in gathered(self.accelerator, own[None])])

    # ---- Figures ----

    def _of_replies(self, rollout: Rollout, seen: RoleOutputs) -> dict[str, Tensor]:
        """Return figures of the replies, and the KL to the reference in nats a reply."""
        # k1 is what the objective charges on average; k3 is never negative.
        mask = rollout.response_mask
        k1 = torch.where(mask, seen.logprobs - seen.ref_logprobs, 0.0)
        k3 = torch.where(mask, F.kl_per_token(seen.logprobs, seen.ref_logprobs, estimator="k3"), 0.0)
        # Replies are compared over all processes by a number that stands for their tokens.
        replies = rollout.response_ids()
        texts = self._everywhere(torch.tensor([hash(tuple(reply)) for reply in replies], device=mask.device))
        figures = {
            "objective/kl": k1.sum(-1).mean(),
            "objective/kl_k3": k3.sum(-1).mean(),
            "rollout/response_tokens": rollout.lengths.float().mean(),
            "rollout/eos_rate": rollout.ended.float().mean(),
            "rollout/repetition": torch.tensor(sum(map(repeated_trigrams, replies)) / len(replies)),
            "rollout/distinct_replies": torch.tensor(len(texts.unique()) / len(texts)),
        }
        if seen.kl is not None:
            figures["objective/kl_exact"] = torch.where(mask, seen.kl, 0.0).sum(-1).mean()
        if rollout.sampling_logprobs is not None:
            # How far the probabilities of generating are from those of the update
            gap = torch.where(mask, (rollout.sampling_logprobs - seen.logprobs).abs(), 0.0)
            figures["rollout/sampling_gap"] = F.masked_mean(self._everywhere(gap), self._everyones(mask))
        return figures

    def _of_sources(self, scores: Scores) -> dict[str, Tensor]:
        """Return the mean score of each source, where it is not the reward adapter alone."""
        if list(scores.by_source) == ["adapter"]:
            return {}
        device = scores.total.device
        return {
            f"reward/{name}": self._everywhere(values.to(device)).nanmean()
            for name, values in scores.by_source.items()
        }

    def _of_advantages(
        self, made: Advantages, values: Float[Tensor, "B T"] | None, mask: Bool[Tensor, "B T"]
    ) -> dict[str, Tensor]:
        """Return the spread of the unwhitened advantages, and how good the critic is."""
        # Over all processes at once: a variance is no mean of variances.
        everyones = self._everyones(mask)
        of_critic = {}
        if values is not None and made.returns is not None:
            all_values, all_returns = self._everywhere(values), self._everywhere(made.returns)
            of_critic = {
                "value/explained_variance": F.explained_variance(all_values, all_returns, everyones),
                "value/mean": F.masked_mean(all_values, everyones),
            }
        return {
            "advantage/std": F.moments(self._everywhere(made.plain), everyones).var.sqrt(),
            "advantage/largest": self._everywhere(made.advantages).abs().max(),
        } | of_critic

    def _everyones(self, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "N T"]:
        """Return the masks of all processes."""
        return self._everywhere(mask.long()).bool()

    def _everywhere(self, x: Tensor) -> Tensor:
        """Return the rows of all processes, those of (B, T) padded to one width."""
        return gathered_to_one_width(self.accelerator, x)


def repeated_trigrams(reply: list[int]) -> float:
    """Return the share of a reply's token trigrams that stood in it before; 0 below three tokens.

    That is seq-rep-3 (Welleck et al. 2020, arXiv:1908.04319).
    """
    trigrams = list(zip(reply, reply[1:], reply[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0
