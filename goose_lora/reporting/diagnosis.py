"""The diagnosis of a PPO run by its metrics: verdicts, each with its figure and what to do."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import inf
from statistics import fmean, median, stdev

from goose_lora.errors import UserError
from goose_lora.reporting.findings import (
    CLEAR,
    TREND,
    Finding,
    Level,
    Rows,
    change,
    column,
    ends,
    finite,
    recent,
    rollouts_in,
    rollouts_of,
)
from goose_lora.reporting.observing import only_looks
from goose_lora.reporting.reply_checks import REPLY_CHECKS

# Both in nats per token. Arithmetic stays below them: a bf16 copy of an nf4 base samples 0.05 away
# from it (docs/LOG.md), and the check of step 0 allows a ratio 0.05 away from 1 in bf16.
SAMPLING_GAP = 0.15
RATIO_GAP = 0.1


def diagnose(metrics: Rows) -> list[Finding]:
    """Return findings over a run's logs so far (the rows of ``metrics.jsonl``), the worst first.

    Raises:
        UserError: no rollout was logged.
    """
    if not rollouts_of(metrics):
        raise UserError(
            "no rollout is in these metrics. A run of recipes/ppo.py writes one line a rollout to"
            " metrics.jsonl."
        )
    order: dict[Level, int] = {"wrong": 0, "look": 1, "ok": 2}
    found: list[Finding] = []
    for check in CHECKS:
        with only_looks(f"the diagnosis of {check.__name__.strip('_')}"):
            found += check(metrics)
    return sorted(found, key=lambda finding: order[finding.level])


def diagnosis_text(metrics: Rows, *, brief: bool = False) -> str:
    """Return all findings, a line each, and a last line with what was read.

    Where it is ``brief``, what is well is counted alone.
    """
    findings = diagnose(metrics)
    rollouts = rollouts_of(metrics)
    levels = [finding.level for finding in findings]
    read = f"read {sum(rollouts_in(row) for row in rollouts):g} rollouts"
    if "step" in rollouts[0]:
        read += f", steps {rollouts[0]['step']} to {rollouts[-1]['step']}"
    read += f": {levels.count('wrong')} wrong, {levels.count('look')} to look at"
    if brief:
        read += f", {levels.count('ok')} ok"
        findings = [finding for finding in findings if finding.level != "ok"]
    if len(rollouts) < TREND:
        read += f" (what is a trend needs {TREND} logs)"
    return "\n".join([*map(str, findings), read])


# ---- Is it PPO: numbers, ratio, sampling, KL, reference ----


def _numbers(rows: Rows) -> Iterator[Finding]:
    numbers = {(name, value) for row in rows for name, value in row.items() if isinstance(value, float)}
    # A source of reward that says nothing on a reply logs NaN
    broken = sorted({name for name, value in numbers if not finite(value) and not name.startswith("reward/")})
    if broken:
        yield Finding(
            "wrong",
            "numbers",
            f"not finite: {', '.join(broken)}. Training has diverged; go back to a checkpoint and lower"
            " learning_rate.",
        )


def _first_ratio(rows: Rows) -> Iterator[Finding]:
    values = column(rows, "policy/first_ratio_gap")
    if not values:
        return
    gap = ends(values)[1]
    # The run's own first gap is its arithmetic; four times that is something else
    if gap > min(RATIO_GAP / 2, max(0.01, 4 * values[0])):
        level: Level = "look"
        if gap > RATIO_GAP:
            level = "wrong"
        text = (
            f"each rollout's first minibatch is {gap:.2g} nats a token off before anything was updated on it:"
            " the ratio does not start at 1. Turn dropout off, and look for padding that reaches the"
            " attention or a temperature that changed after the rollout."
        )
        yield Finding(level, "first ratio", text)
    else:
        yield Finding("ok", "first ratio", f"1 within {gap:.2g} nats a token before a rollout's first update")


def _sampling(rows: Rows) -> Iterator[Finding]:
    gap = recent(rows, "rollout/sampling_gap")
    if gap is None:
        return
    if gap > SAMPLING_GAP:
        action = (
            "Turn sampling filters off (repetition penalty, shortest length, suppressed tokens, top_k,"
            " top_p), or try rollout_weights: shared"
        )
        # Where two passes over one text differ, sampling is not to blame
        if (recent(rows, "policy/first_ratio_gap") or 0.0) > RATIO_GAP / 2:
            action = "So are two passes of the update: see first ratio, which names the cause of both"
        yield Finding(
            "wrong",
            "sampling",
            f"tokens are drawn {gap:.2f} nats a token away from what the update computes. {action}.",
        )
    else:
        yield Finding("ok", "sampling", f"drawn {gap:.3g} nats a token away from what the update computes")


def _kl_sign(rows: Rows) -> Iterator[Finding]:
    """Look for a KL below 0.

    The mean of log p(y)/r(y) over y drawn from p is a KL, hence not negative whatever r is: if it
    is, y was not drawn from p.
    """
    values = column(rows, "objective/kl")
    # The last fifth, and no fewer than a trend has
    values = values[-max(TREND, len(values) // 5) :]
    if len(values) < TREND:
        return
    mean, negative = fmean(values), sum(value < 0 for value in values) / len(values)
    # Estimates of a small KL scatter around it: two standard errors below 0, in most rollouts
    if mean < -max(0.05, 2 * stdev(values) / len(values) ** 0.5) and negative > 0.5:
        text = (
            f"negative in {negative:.0%} of the last {len(values)} rollouts, {mean:.2f} on average. A KL is"
            f" not: {_cause_of_negative(rows)}."
        )
        yield Finding("wrong", "KL sign", text)
    else:
        yield Finding(
            "ok", "KL sign", f"not negative, {mean:.2g} on average in the last {len(values)} rollouts"
        )


def _cause_of_negative(rows: Rows) -> str:
    """Return what other metrics say of a KL below 0: two passes, sampling, or the reference."""
    # Two passes first: where these differ, sampling and update differ too
    sampling, first = recent(rows, "rollout/sampling_gap"), recent(rows, "policy/first_ratio_gap") or 0.0
    if first > RATIO_GAP / 2:
        return (
            f"one text has log-probabilities {first:.2g} nats apart in two passes, which is dropout or"
            " padding. Turn dropout off"
        )
    if sampling is None:  # not logged
        return (
            "the replies were not drawn from the policy as it was. Sample without filters, at the temperature"
            " of the settings, after each update"
        )
    if sampling > SAMPLING_GAP:
        return (
            f"replies are drawn from another distribution than is trained ({sampling:.2f} nats a token): a"
            " sampling filter, a temperature, or a rollout copy in another dtype. Turn the filter off, or"
            " try rollout_weights: shared"
        )
    return (
        "the reference is no fixed distribution over the same texts: look at its padding, its temperature,"
        " and what has changed its adapter"
    )


def _reference(rows: Rows) -> Iterator[Finding]:
    """Look for a KL that the updates cannot explain: too early, or with a leap.

    The root of the KL per token is nearly a distance (half of Fisher's metric), and
    policy/kl_from_rollout tells how far one rollout's updates go, where they are two or more. The
    smaller of k1 and k3 is taken, since k3 has a long tail.
    """
    # Distance from the reference at each logged rollout, and what its updates may add to it
    logged = [
        row
        for row in rows
        if all(finite(row.get(name)) for name in ("objective/kl", "objective/kl_k3", "step"))
        and row["objective/kl_k3"] >= 0
        and finite(row.get("rollout/response_tokens"))
        and row["rollout/response_tokens"] > 0
    ]
    if len(logged) < 2:
        return
    # objective/kl is nats per reply
    away = [
        (min(abs(row["objective/kl"]), row["objective/kl_k3"]) / row["rollout/response_tokens"]) ** 0.5
        for row in logged
    ]
    updates = sorted(
        (row["step"], row["policy/kl_from_rollout"])
        for row in rows
        if finite(row.get("step")) and finite(row.get("policy/kl_from_rollout"))
    )
    moves = [
        _movement(updates, row["step"], after["step"]) for row, after in pairwise([*logged, {"step": inf}])
    ]

    # The first rollout. In a run that was not resumed, the policy is its reference still
    from_the_start = logged[0]["step"] <= logged[1]["step"] - logged[0]["step"]
    if from_the_start and away[0] > 0.1 + moves[0] * (rollouts_in(logged[0]) - 1):
        text = (
            f"the first rollout is {away[0] ** 2:.2g} nats a token from it already: it is not what the policy"
            " started from. A policy that starts from an SFT adapter needs a frozen copy of it. (A second"
            " round of PPO against the first's reference is meant so.)"
        )
        yield Finding("wrong", "reference", text)
        return

    # Each later one: a row is the mean of several rollouts, of which all but one came after updates
    for index in range(1, len(logged)):
        before = moves[index - 1] * rollouts_in(logged[index - 1])
        moved = before + moves[index] * (rollouts_in(logged[index]) - 1)
        if moves[index - 1] > 0 and away[index] - away[index - 1] > 0.1 + moved:
            text = (
                f"the KL leaps from {away[index - 1] ** 2:.2g} to {away[index] ** 2:.2g} nats a token at step"
                f" {logged[index]['step']}, more than the updates move the policy: the reference has changed."
                " Look at what was loaded there."
            )
            yield Finding("wrong", "reference", text)
            return
    yield Finding("ok", "reference", "the policy goes from it no faster than the updates take it")


def _movement(updates: list[tuple[float, float]], start: float, end: float) -> float:
    """Return how far a rollout's updates may have moved the policy, with room to spare.

    They are those logged at a step from ``start`` to before ``end``. It is 0 where no movement was
    seen: with one optimizer step a rollout, all of it comes after the measurement.

    Args:
        updates: steps in order, and the KL from the rollout that was logged there.
    """
    # Searched by halves, since a log is read anew each time that it grows
    first, last = bisect_left(updates, (start,)), bisect_left(updates, (end,))
    seen = max((kl for _, kl in updates[first:last]), default=0.0)
    return 5 * seen**0.5 if seen > 1e-8 else 0.0


def _kl_size(rows: Rows) -> Iterator[Finding]:
    last = recent(rows, "objective/kl")
    if last is not None and last > 20:
        yield Finding(
            "look",
            "KL",
            f"{last:.1f} nats a reply: far from the reference, where reward models err. Raise kl_coef, or"
            " stop earlier.",
        )
    elif last is not None and last >= 0:
        yield Finding("ok", "KL", f"{last:.2f} nats a reply at the end")


# ---- Does it learn: learning rate, gradient, advantages, steps, critic ----


def _learning_rate(rows: Rows) -> Iterator[Finding]:
    values = column(rows, "learning_rate")
    if not values:
        return
    # Cut off in a warm-up, the run may be meant so, and has learned nothing all the same
    if max(values) == 0:
        text = (
            "0 in all of the run: nothing was learned. Look at learning_rate, warmup_steps, and"
            " critic_warmup_rollouts if the run was cut off."
        )
        yield Finding("wrong", "learning rate", text)
        return
    moves = f"between {min(values):.2g} and {max(values):.2g}"
    if max(values) == min(values):
        moves = "constant"
    yield Finding("ok", "learning rate", f"{values[0]:.2g} to {values[-1]:.2g}, {moves}")

    # k3 is 0 while the policy is its reference, and no longer once an update has moved it
    logged = [row for row in rows if finite(row.get("objective/kl_k3")) and finite(row.get("learning_rate"))]
    after_updates = [
        row["objective/kl_k3"] for before, row in pairwise(logged) if before["learning_rate"] > 0
    ]
    if len(after_updates) >= 2 and max(map(abs, after_updates)) < 1e-7:
        text = (
            f"the policy does not move: its KL is 0 after each of {len(after_updates)} rollouts. Look at"
            " gradient, skipped and advantages, and at which adapter the optimizer has."
        )
        yield Finding("wrong", "policy", text)


def _gradient(rows: Rows) -> Iterator[Finding]:
    values = column(rows, "grad_norm")
    if not values:
        return
    # A single spike is clipped and passes; an end far above the median stays
    usual, last = median(values), ends(values)[1]
    if max(values) == 0:
        yield Finding(
            "wrong",
            "gradient",
            "its norm is 0 in all of the run: nothing reaches the adapters. Look at advantages, skipped and"
            " reward.",
        )
    elif usual == 0:
        # A reward that is rare: there was nothing to learn from in most rollouts
        share = sum(value == 0 for value in values) / len(values)
        text = (
            f"its norm is 0 in {share:.0%} of the logs: most rollouts taught nothing. Look at how many"
            " replies score at all, and at num_generations."
        )
        yield Finding("look", "gradient", text)
    elif len(values) >= TREND and last > 10 * usual:
        text = (
            f"its norm is {last:.2g}, {last / usual:.0f} times its median: training is coming apart. Lower"
            " learning_rate and max_grad_norm."
        )
        yield Finding("look", "gradient", text)
    else:
        yield Finding("ok", "gradient", f"norm {last:.2g}, median {usual:.2g}")


def _advantages(rows: Rows) -> Iterator[Finding]:
    spread, largest = recent(rows, "advantage/std"), recent(rows, "advantage/largest")
    scores = column(rows, "objective/score")
    if spread is None or largest is None:
        return
    # With a critic, advantages are whitened, and the largest is in standard deviations already
    outlier = largest
    if not any("value/explained_variance" in row for row in rows):
        outlier = largest / max(spread, 1e-12)
    # No spread teaches nothing, and too much of it lets a few replies rule
    alike = len(scores) >= TREND and max(scores) - min(scores) < 1e-6
    if spread < 1e-3 or alike:
        reason = "replies to a prompt score alike"
        if alike:
            reason = f"every rollout scores {scores[-1]:.3g}: what scores is constant"
            constant = _constant_sources(rows)
            if constant:
                reason += f" ({', '.join(constant)})"
        text = (
            f"a standard deviation of {spread:.2g}, and {reason}: there is nothing to learn from. Look at"
            " what scores, and at its prompts."
        )
        yield Finding("look", "advantages", text)
    elif outlier > 10:
        text = (
            f"the largest is {outlier:.0f} standard deviations: a few replies rule each step. Set score_clip,"
            " or look at their scores."
        )
        yield Finding("look", "advantages", text)
    else:
        yield Finding(
            "ok", "advantages", f"standard deviation {spread:.2g}, the largest {outlier:.1f} of them"
        )


def _constant_reward(rows: Rows) -> Iterator[Finding]:
    """Look for a source of reward that says the same of all, while penalties or others vary."""
    scores = column(rows, "objective/score")
    if not scores or max(scores) - min(scores) < 1e-6:
        return  # all that scores is constant, which ``_advantages`` tells
    for name, value in _constant_sources(rows).items():
        text = (
            f"{name} has a mean of {value:.3g} in every log: what it says is constant, and teaches nothing."
            " Look at what it returns for some replies."
        )
        yield Finding("look", "constant", text)


def _constant_sources(rows: Rows) -> dict[str, float]:
    """Return the sources of reward whose mean is the same in each log, with that mean."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("reward/"))
    said = {name.removeprefix("reward/"): column(rows, name) for name in names}
    # Sums in float32 differ by a little
    return {
        name: means[-1]
        for name, means in said.items()
        if len(means) >= TREND and max(means) - min(means) <= 1e-6 * max(1.0, abs(means[0]))
    }


def _clipping(rows: Rows) -> Iterator[Finding]:
    last = recent(rows, "policy/clip_fraction")
    if last is not None and last > 0.3:
        yield Finding(
            "look",
            "clipping",
            f"{last:.0%} of tokens are clipped: the steps are too large. Lower learning_rate or"
            " num_ppo_epochs.",
        )
    elif last is not None:
        yield Finding("ok", "clipping", f"{last:.1%} of tokens")


def _skipped(rows: Rows) -> Iterator[Finding]:
    values = column(rows, "policy/skipped")
    if not values:
        return
    skipped = fmean(values)
    if skipped > 0:
        text = (
            f"{skipped:.1%} of minibatches, their ratio beyond ratio_threshold. Lower learning_rate or"
            " num_ppo_epochs."
        )
        yield Finding("look", "skipped", text)
    else:
        yield Finding("ok", "skipped", "no minibatch")


def _critic(rows: Rows) -> Iterator[Finding]:
    values = column(rows, "value/explained_variance")
    if not values:
        return
    last = ends(values)[1]
    # A critic that is at 0 still, but gains, is on its way
    learns = change(values[-2 * TREND :]) > CLEAR
    if len(values) >= TREND and last < 0.05 and not learns:
        text = (
            f"explains {last:.2f} of the returns' variance: no better than a constant. Raise"
            " value_learning_rate or vf_coef."
        )
        yield Finding("look", "critic", text)
    else:
        text = f"explains {last:.2f} of the returns' variance at the end"
        if learns:
            text += ", and gains"
        yield Finding("ok", "critic", text)


# Findings of one level come in this order.
CHECKS: list[Callable[[Rows], Iterator[Finding]]] = [
    _numbers,
    _first_ratio,
    _sampling,
    _kl_sign,
    _reference,
    _kl_size,
    _learning_rate,
    _gradient,
    _advantages,
    _constant_reward,
    _clipping,
    _skipped,
    _critic,
    *REPLY_CHECKS,
]
