"""The names of stages and figures, and how a figure is written in a card or a report."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

STAGE_TITLES = {
    "sft": "supervised fine-tuning",
    "reward": "training as a reward model",
    "ppo": "PPO",
    "own_loop": "PPO in a loop of its own",
    "merge": "merging a policy into it",
}
# Figures of evaluation.json, and what they are.
MEASURES = {
    "score": "score of the reward model",
    "judge": "judge",
    "kl": "KL to the reference, nats a reply",
    "tokens": "tokens",
    "ended": "share that ended",
    "distinct_2": "distinct bigrams",
    "score_win_rate": "win rate by score",
    "judge_win_rate": "win rate by judge",
}


def rounded(value: Any) -> str:
    """A number as the card shows it; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return "-" if value is None else str(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def with_interval(row: Mapping[str, Any], key: str) -> str:
    """A figure of an evaluation as the card shows it, its interval in brackets where it has one."""
    interval = row.get(f"{key}_ci")
    return rounded(row.get(key)) + (
        f" ({rounded(interval[0])} to {rounded(interval[1])})" if interval else ""
    )
