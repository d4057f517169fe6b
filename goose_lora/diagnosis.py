"""What the metrics of a PPO run say about it: a verdict a line, each with its figure and what to do."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

Level = Literal["ok", "look", "wrong"]
Rows = Sequence[Mapping[str, Any]]


class Finding(NamedTuple):
    """One verdict. ``look``: may be meant so; ``wrong``: the run does not do what PPO says."""

    level: Level
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:5}  {self.name}: {self.text}"


def diagnose(metrics: Rows) -> list[Finding]:
    """Findings over a run's logged rollouts (the rows of ``metrics.jsonl``), the worst first.

    Raises:
        ValueError: no rollout was logged.
    """
    rows = [row for row in metrics if "objective/score" in row]
    if not rows:
        raise ValueError("no rollout is in these metrics. A run of recipes/ppo.py writes one line a rollout to metrics.jsonl.")
    order: dict[Level, int] = {"wrong": 0, "look": 1, "ok": 2}
    return sorted((finding for check in CHECKS for finding in check(rows)), key=lambda finding: order[finding.level])


def _column(rows: Rows, name: str) -> list[float]:
    return [float(row[name]) for row in rows if name in row and abs(row[name]) < float("inf")]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and of the last fifth."""
    size = max(1, len(values) // 5)
    return fmean(values[:size]), fmean(values[-size:])


def _numbers(rows: Rows) -> Iterator[Finding]:
    broken = sorted({name for row in rows for name, value in row.items() if isinstance(value, float) and not abs(value) < float("inf")})
    if broken:
        yield Finding("wrong", "numbers", f"not finite: {', '.join(broken)}. Training has diverged; go back to a checkpoint and lower learning_rate.")


def _kl_sign(rows: Rows) -> Iterator[Finding]:
    values = _column(rows, "objective/kl")
    gap = fmean(_column(rows, "rollout/sampling_gap") or [0.0])
    negative = sum(value < 0 for value in values) / len(values)
    noise = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    if fmean(values) < -max(0.05, 2 * noise) and negative > 0.5:
        cause = (
            f"replies are drawn from another distribution than is trained (gap {gap:.2f} nats a token): a sampling filter, a rollout copy, a dtype"
            if gap > 0.15
            else "the reference is not what the policy started from, or log-probabilities are taken at another temperature or with padding"
        )
        yield Finding("wrong", "KL sign", f"negative in {negative:.0%} of rollouts, {fmean(values):.2f} on average. A KL is not: {cause}.")


def _sampling_gap(rows: Rows) -> Iterator[Finding]:
    gaps = _column(rows, "rollout/sampling_gap")
    if not gaps:
        return
    gap = fmean(gaps)
    if gap > 0.15:
        text = f"tokens are drawn {gap:.2f} nats a token away from what the update computes. Try rollout_weights: shared."
        yield Finding("wrong", "sampling", text)
    else:
        yield Finding("ok", "sampling", f"drawn {gap:.3g} nats a token away from what the update computes")


def _kl_size(rows: Rows) -> Iterator[Finding]:
    last = _ends(_column(rows, "objective/kl"))[1]
    if last > 20:
        yield Finding("look", "KL", f"{last:.1f} nats a reply: far from the reference, where reward models err. Raise kl_coef, or stop earlier.")
    elif last >= 0:
        yield Finding("ok", "KL", f"{last:.2f} nats a reply at the end")


def _clipping(rows: Rows) -> Iterator[Finding]:
    values = _column(rows, "policy/clip_fraction")
    if not values:
        return
    mean = fmean(values)
    if mean > 0.3:
        yield Finding("look", "clipping", f"{mean:.0%} of tokens are clipped: the steps are too large. Lower learning_rate or num_ppo_epochs.")
    else:
        yield Finding("ok", "clipping", f"{mean:.1%} of tokens")


def _skipped(rows: Rows) -> Iterator[Finding]:
    skipped = fmean(_column(rows, "policy/skipped") or [0.0])
    if skipped > 0:
        text = f"{skipped:.1%} of minibatches were skipped, their ratio above ratio_threshold. Lower learning_rate or num_ppo_epochs."
        yield Finding("look", "ratio", text)


def _critic(rows: Rows) -> Iterator[Finding]:
    values = _column(rows, "value/explained_variance")
    if not values:
        return
    last = _ends(values)[1]
    if last < 0.05:
        text = f"explains {last:.2f} of the returns' variance: no better than a constant. Raise value_learning_rate or vf_coef."
        yield Finding("look", "critic", text)
    else:
        yield Finding("ok", "critic", f"explains {last:.2f} of the returns' variance at the end")


def _entropy(rows: Rows) -> Iterator[Finding]:
    values = _column(rows, "policy/entropy")
    if not values:
        return
    first, last = _ends(values)
    if last < 0.4 * first:
        text = f"{first:.2f} to {last:.2f} nats a token: replies grow alike. Raise kl_coef or entropy_coef, or stop earlier."
        yield Finding("look", "entropy", text)
    else:
        yield Finding("ok", "entropy", f"{first:.2f} to {last:.2f} nats a token")


def _endings(rows: Rows) -> Iterator[Finding]:
    values = _column(rows, "rollout/eos_rate")
    if not values:
        return
    first, last = _ends(values)
    if last < 0.05:
        reason = "the policy has stopped ending its replies" if first > 0.2 else "replies never end by themselves"
        yield Finding("look", "endings", f"{first:.0%} to {last:.0%}: {reason}. Set missing_eos_penalty, or raise response_length.")
    else:
        yield Finding("ok", "endings", f"{first:.0%} to {last:.0%} of replies end by themselves")


def _length(rows: Rows) -> Iterator[Finding]:
    values = _column(rows, "rollout/response_tokens")
    if not values:
        return
    first, last = _ends(values)
    if not 0.5 * first <= last <= 1.5 * first:
        text = f"{first:.1f} to {last:.1f} tokens. See whether the score follows length (verdict.json), and compare at equal length."
        yield Finding("look", "length", text)
    else:
        yield Finding("ok", "length", f"{first:.1f} to {last:.1f} tokens")


def _score(rows: Rows) -> Iterator[Finding]:
    values = _column(rows, "objective/score")
    first, last = _ends(values)
    if len(values) >= 5 and last <= first:
        text = f"{first:.2f} to {last:.2f}: it does not rise. Look at critic, clipping and learning rate; try a lower kl_coef."
        yield Finding("look", "score", text)
    else:
        yield Finding("ok", "score", f"{first:.2f} to {last:.2f}")
    entropies, lengths = _column(rows, "policy/entropy"), _column(rows, "rollout/response_tokens")
    narrower = entropies and lengths and all(_ends(column)[1] < 0.6 * _ends(column)[0] for column in (entropies, lengths))
    if last - first > 2 and narrower:
        text = f"the score rose by {last - first:.1f} while entropy and length fell: read samples.jsonl, and ask a judge that did not train it."
        yield Finding("look", "reward hacking", text)


def _learning_rate(rows: Rows) -> Iterator[Finding]:
    values = _column(rows, "learning_rate")
    if values and max(values) == 0:
        yield Finding("wrong", "learning rate", "0 in all of the run: nothing was learned. Look at learning_rate and warmup_steps.")


CHECKS: list[Callable[[Rows], Iterator[Finding]]] = [
    _numbers, _kl_sign, _sampling_gap, _kl_size, _clipping, _skipped, _critic, _entropy, _endings, _length, _score, _learning_rate,
]  # fmt: skip
