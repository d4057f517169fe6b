"""The names of stages and measures, and how figures and settings are written as text."""

import json
from collections.abc import Callable, Mapping, Sequence
from numbers import Real

# Stages by the names that they have in goose_lora.json.
STAGE_TITLES = {
    "sft": "supervised fine-tuning",
    "reward": "training as a reward model",
    "ppo": "PPO",
    "own_loop": "PPO in a loop of its own",
    "merge": "merging a policy into it",
}
# The figures of evaluation.json, and what each one says.
MEASURES = {
    "score": "score of the reward model",
    "judge": "rating by the judge",
    "kl": "KL to the reference, nats a reply",
    "tokens": "tokens",
    "ended": "share that ended",
    "distinct_2": "distinct bigrams",
    "base_loss": "the base's own loss on them, nats a token",
    "score_win_rate": "win rate by score",
    "judge_win_rate": "win rate by judge",
}


def rounded(value: object) -> str:
    """Return a number with 4 significant digits, a whole number as it is, None as "-"."""
    if value is None:
        return "-"
    # A bool is a number to Python, and text to a reader
    if isinstance(value, (bool, int)) or not isinstance(value, Real):
        return str(value)
    return f"{float(value):.4g}"


def two_decimals(value: object) -> str:
    """Return a number with two decimals, a small one with two digits; others as ``rounded``."""
    if isinstance(value, (bool, int)) or not isinstance(value, Real):
        return rounded(value)
    number = float(value)
    return f"{number:.2f}" if abs(number) >= 0.0095 or number == 0 else f"{number:.2g}"


def with_interval(row: Mapping[str, object], key: str, written: Callable[[object], str] = rounded) -> str:
    """Return a figure of an evaluation, with its interval in brackets if it has one."""
    interval = row.get(f"{key}_ci")
    if not isinstance(interval, Sequence) or not interval:
        return written(row.get(key))
    low, high = interval[0], interval[1]
    return f"{written(row.get(key))} ({written(low)} to {written(high)})"


def measured_in(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the names of those ``MEASURES`` that at least one of ``rows`` has."""
    return [key for key in MEASURES if any(key in row for row in rows)]


def setting_text(value: object) -> str:
    """Return a setting as text: JSON, but a string as it is."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
