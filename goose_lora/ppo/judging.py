"""Judges that compare the replies to a prompt, as sources of reward of a PPO run."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from transformers import IntervalStrategy

from goose_lora.errors import UserError
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.evaluation import calibration_prompts
from goose_lora.ppo.processes import summed
from goose_lora.rewards.group_judge import MOST_WHOLE, calls_for
from goose_lora.rewards.sources import RewardMix


def require_groups(reward: RewardMix, args: PPOConfig) -> None:
    """Check that judges among the sources have replies to compare.

    Raises:
        UserError: there is one reply to a prompt, in rollouts or in evaluations that only judges
            could score.
    """
    # In rollouts: a reply needs another one beside it
    names = ", ".join(reward.judges)
    if not names:
        return
    if args.num_generations < 2:
        raise UserError(
            f"reward_function: {names} compares the replies to a prompt with one another, and"
            f" num_generations={args.num_generations} gives one to each. Set num_generations: 2 or more"
            f" (up to {MOST_WHOLE} are all compared), or use it as judge of recipes/evaluate.py."
        )
    # In evaluations: each prompt is answered once
    paid = [name for name, weight in zip(reward.names, reward.weights, strict=True) if weight != 0]
    if _evaluates(args) and paid and reward.judges.keys() >= set(paid):
        raise UserError(
            f"eval_strategy: an evaluation has one reply to a prompt, which {names} compares with none, and"
            " nothing else is paid. Set eval_strategy: no, and judge the result by recipes/evaluate.py, or"
            " give another reward_function a weight."
        )


def _evaluates(args: PPOConfig) -> bool:
    return IntervalStrategy(args.eval_strategy) != IntervalStrategy.NO


def calibration_generations(reward: RewardMix, args: PPOConfig) -> int:
    """Return how many replies to a prompt the scale of scores is learned from."""
    return args.num_generations if reward.pays_judges else 1


def judging_plan(reward: RewardMix, args: PPOConfig, prompts: int, *, resumed: bool) -> list[str]:
    """Return in a line for each judge what it compares, and how many calls a run takes at most."""
    # Of all processes together
    size = args.num_generations
    calls = calls_for(size)
    replies = args.rollout_batch_size * args.world_size
    rollouts = args.rollouts(prompts)
    of_rollout = replies // size * calls
    met = "each with all others" if size <= MOST_WHOLE else "each with four of the others"
    lines = []
    for judge in reward.judges.values():
        line = (
            f"{judge.name} compares the {size} replies to a prompt, {met} in both orders: at most"
            f" {calls:,} calls a prompt, {of_rollout:,} a rollout, {of_rollout * rollouts:,} for the run of"
            f" {rollouts:,} rollouts"
        )
        # The scale is learned once, and a checkpoint has it
        calibrates = reward.pays_judges and args.score_normalization == "reference" and not resumed
        if calibrates:
            own = calibration_prompts(
                args.score_calibration_prompts, processes=args.world_size, generations=size
            )
            line += f", and {own * args.world_size * calls:,} before them for the scale of scores"
        if reward.pays_judges and _evaluates(args):
            line += ". Evaluations have one reply to a prompt, which counts as a tie"
        lines.append(f"{line}. Answers are kept, and none is asked for twice.")
    return lines


def judge_figures(accelerator: Accelerator, judged: Mapping[str, tuple[int, float, int]]) -> dict[str, float]:
    """Return the calls of a rollout, and where the judges agree with the rest of what is paid.

    ``judge/NAME`` is the share of the pairs that a judge has decided in which the other
    sources' sum prefers the same reply. Both are over all processes.
    """
    if not judged:
        return {}
    # One exchange of as many numbers on each process
    own = torch.tensor(list(judged.values()), dtype=torch.float64, device=accelerator.device)
    everywhere = summed(accelerator, own).tolist()
    figures: dict[str, float] = {"rollout/judge_calls": sum(calls for calls, _, _ in everywhere)}
    for name, (_, agreeing, decided) in zip(judged, everywhere, strict=True):
        if decided:
            figures[f"judge/{name}"] = agreeing / decided
    return figures
