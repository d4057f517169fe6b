"""Token rewards, and the advantages that are made of them: GAE, RLOO and GRPO."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from goose_lora.functional.masked import _select, _upcast, last_counted, moments


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float,
    lam: float,
) -> Float[Tensor, "B T"]:
    """Return the generalised advantage estimates (GAE); 0 outside the mask.

    Schulman et al. 2016, arXiv:1506.02438, eq. 16:
    A_t = sum_k (gamma lam)^k delta_(t+k), with delta_t = r_t + gamma V_(t+1) - V_t. After a row's
    last counted token the episode is over and its value is 0. Time is counted in counted tokens:
    one outside the mask, such as a user turn between two replies, is passed over, neither
    discounting nor bootstrapped from, and its reward is lost (put it on the counted token before).
    Returns are advantages + values; the critic's may have a ``lam`` of their own, by a second call
    (VC-PPO, Yuan et al. 2025, arXiv:2503.01491).

    OpenAI and CleanRL run to the fixed length. TRL runs to one position past the response, where it
    puts the score, and so bootstraps from the value after the last token. None of them knows holes.
    Rows without a token are 0; raises nothing.
    """
    # From the last token to the first; a row's state ahead is 0 until its last counted token.
    rewards, values = _upcast(rewards), _upcast(values)
    advantages = torch.zeros_like(rewards + values)
    advantage_ahead = value_ahead = advantages.new_zeros(len(advantages))
    for t in reversed(range(advantages.shape[1])):
        td_error = rewards[:, t] + gamma * value_ahead - values[:, t]
        # Where the mask is false, what lies ahead is handed on as it is.
        advantage_ahead = torch.where(mask[:, t], td_error + gamma * lam * advantage_ahead, advantage_ahead)
        value_ahead = torch.where(mask[:, t], values[:, t], value_ahead)
        advantages[:, t] = advantage_ahead
    return _select(advantages, mask)


def leave_one_out(returns: Float[Tensor, "B"], group_size: int) -> Float[Tensor, "B"]:
    """Return each reply's return less the mean of the other replies to its prompt (RLOO).

    Ahmadian et al. 2024, arXiv:2402.14740, eq. 8. Replies to one prompt stand together: B is a
    multiple of ``group_size``. As in TRL's RLOOTrainer. Raises ValueError for groups of one.
    """
    # A reply's own return has no part in its baseline, which so has no bias. Counted from the first
    # of the group, equal returns are exactly 0: of what their sum is rounded by, Adam makes a step
    groups = _groups(_upcast(returns), group_size)
    groups = groups - groups[:, :1]
    others = (groups.sum(-1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def group_normalised(
    returns: Float[Tensor, "B"], group_size: int, *, eps: float = 1e-4
) -> Float[Tensor, "B"]:
    """Return each reply's return less its group's mean, over the group's deviation (GRPO).

    Shao et al. 2024, arXiv:2402.03300, section 4.1.2. The standard deviation is the sample's (n -
    1) plus ``eps``, as in TRL's GRPOTrainer: a group whose replies score alike teaches nothing.
    Raises ValueError for groups of one.
    """
    # Counted from the first of the group, whose replies then are exactly 0 where they score alike
    groups = _groups(_upcast(returns), group_size)
    groups = groups - groups[:, :1]
    return ((groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + eps)).flatten()


def alike_share(scores: Float[Tensor, "B"], group_size: int) -> Float[Tensor, ""]:
    """Return the share of prompts whose replies all score alike, and so teach nothing of scores.

    DAPO, Yu et al. 2025, arXiv:2503.14476, section 3.2, which samples anew in their place. Groups
    as in ``leave_one_out``; alike is within 1e-5 of the score, or 1e-8. TRL's GRPOTrainer logs it
    as frac_reward_zero_std. Raises ValueError for groups of one.
    """
    # The ends, not a deviation: that of equal numbers is rounded.
    groups = _groups(_upcast(scores), group_size)
    return torch.isclose(groups.amax(-1), groups.amin(-1)).float().mean()


def _groups(returns: Float[Tensor, "B"], group_size: int) -> Float[Tensor, "P G"]:
    """Return the replies' returns as a row a prompt."""
    if group_size < 2 or len(returns) % group_size:
        raise ValueError(
            f"{len(returns)} returns in groups of {group_size}: replies are compared with others to the same"
            " prompt, so a group is 2 or more, and all are of one size. Set num_generations to 2 or more."
        )
    return returns.view(-1, group_size)


@torch.no_grad()
def explained_variance(
    values: Float[Tensor, "*shape"], returns: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """Return the share of the returns' variance over the mask that the critic explains.

    1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 one no better than a
    constant. No gradient.

    0 if all returns are equal: there is nothing to explain (cleanrl's ppo.py for games gives NaN,
    which poisons averages). A constant offset does not show here, unlike in OpenAI's 1 - error /
    Var(returns); TRL does not report it. Raises ValueError if the mask is empty.
    """
    # Both variances are over the mask alone.
    returns, residual = _select(returns, mask), _select(returns, mask) - _select(values, mask)
    total, unexplained = moments(returns, mask).var, moments(residual, mask).var
    # Not total == 0: the mean of equal numbers is rounded, which leaves a variance of 1e-34 or so
    # to divide by.
    is_constant = returns[mask].min() == returns[mask].max()
    return torch.where(is_constant, 0.0, 1 - unexplained / total)


def token_rewards(
    scores: Float[Tensor, " B"],
    kl: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    kl_coef: float,
    by_token: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """Return -kl_coef * KL at every token, plus the reply's score at its last counted token.

    Ouyang et al. 2022, arXiv:2203.02155, eq. 2; Ziegler et al. 2019. ``by_token`` is the part of
    the score that belongs to single tokens, in the units of ``scores``; the last token gets what is
    left of it, so that a reply's rewards always sum to its score and KL. TRL 0.12-1.12 puts the
    score on the padding after the end-of-text token, whose value enters the estimate.
    """
    # No KL is charged outside the mask.
    scores, kl = _upcast(scores), _upcast(kl)
    rewards = torch.where(mask, -kl_coef * kl, 0.0)

    # What single tokens earn is taken off the score, so that the sum stays.
    if by_token is not None:
        by_token = torch.where(mask, _upcast(by_token), 0.0)
        rewards, scores = rewards + by_token, scores - by_token.sum(-1)
    return rewards.scatter_add(1, last_counted(mask.long())[:, None], scores[:, None].to(rewards.dtype))


def shaped_scores(
    scores: Float[Tensor, " B"],
    ended: Bool[Tensor, " B"],
    lengths: Int[Tensor, " B"],
    *,
    clip: float | None = None,
    missing_eos_penalty: float | None = None,
    length_penalty: float = 0.0,
) -> Float[Tensor, " B"]:
    """Return each reply's score, clipped, then less what is taken off for its end and its length.

    clip(score, -clip, clip) - missing_eos_penalty [not ended] - length_penalty length, with lengths
    in tokens. The penalties come after the clipping, so that they are always felt. None leaves a
    term out. TRL 0.12-1.12 has the penalty for a missing end alone, and does not clip. Raises
    nothing.
    """
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    if missing_eos_penalty is not None:
        scores = torch.where(ended, scores, scores - missing_eos_penalty)
    return scores - length_penalty * lengths
