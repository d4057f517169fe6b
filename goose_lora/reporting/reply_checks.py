"""Verdicts on the score and on the replies.

They are on entropy, repetition, variety, endings, length, and signs of reward hacking. Each
compares the last fifth of the run with the first.
"""

from collections.abc import Callable, Iterator

from goose_lora.reporting.findings import CLEAR, TREND, Finding, Rows, change, column, ends


def _score(rows: Rows) -> Iterator[Finding]:
    values = column(rows, "objective/score")
    if not values:
        return
    first, last = ends(values)
    # A fall is clear early; that nothing rises is known only after twice as many rollouts
    falls, stands = change(values) < -CLEAR, len(values) >= 2 * TREND and last <= first
    if falls or stands:
        what = "falls" if falls else "does not rise"
        text = (
            f"{first:.2f} to {last:.2f}: it {what}. Look at critic, clipping and learning rate; lower"
            " kl_coef."
        )
        yield Finding("look", "score", text)
    else:
        yield Finding("ok", "score", f"{first:.2f} to {last:.2f}")


def _entropy(rows: Rows) -> Iterator[Finding]:
    values = column(rows, "policy/entropy")
    if not values:
        return
    first, last = ends(values)
    if len(values) >= TREND and last < 0.4 * first:
        text = (
            f"{first:.2f} to {last:.2f} nats a token: replies grow alike. Raise kl_coef or entropy_coef, or"
            " stop earlier."
        )
        yield Finding("look", "entropy", text)
    else:
        yield Finding("ok", "entropy", f"{first:.2f} to {last:.2f} nats a token")


def _repeats(rows: Rows) -> bool:
    """Return whether 15 percentage points more of a reply's trigrams stood in it before."""
    values = column(rows, "rollout/repetition")
    return len(values) >= TREND and ends(values)[1] > ends(values)[0] + 0.15


def _repetition(rows: Rows) -> Iterator[Finding]:
    values = column(rows, "rollout/repetition")
    if not values:
        return
    first, last = ends(values)
    if _repeats(rows):
        text = (
            f"{first:.0%} to {last:.0%} of a reply's trigrams stood in it before. Read samples.jsonl; raise"
            " kl_coef, or score repetition down."
        )
        yield Finding("look", "repetition", text)
    else:
        yield Finding("ok", "repetition", f"{first:.0%} to {last:.0%} of a reply's trigrams")


def _variety(rows: Rows) -> Iterator[Finding]:
    # Many prompts may have one good reply: what counts is how far the share falls
    values = column(rows, "rollout/distinct_replies")
    if not values:
        return
    first, last = ends(values)
    if len(values) >= TREND and last < 0.5 * first:
        text = (
            f"{first:.0%} to {last:.0%} of replies are distinct: the policy says one thing to many prompts."
            " Raise kl_coef, or stop earlier."
        )
        yield Finding("look", "variety", text)
    else:
        yield Finding("ok", "variety", f"{first:.0%} to {last:.0%} of replies are distinct")


def _endings(rows: Rows) -> Iterator[Finding]:
    values = column(rows, "rollout/eos_rate")
    if not values:
        return
    first, last = ends(values)
    if last == 0:
        text = "no reply ended by itself"
        if first > 0:
            text = f"{first:.0%} to 0%: no reply ends by itself any more"
        text += (
            ". See at which tokens replies end (printed at the start) and what SFT was trained to end with;"
            " set stop_token_ids, or raise response_length."
        )
        yield Finding("wrong", "endings", text)
    elif len(values) >= TREND and last < 0.05:
        # Did they end at the start of the run?
        reason = "replies do not end by themselves"
        if first > 0.2:
            reason = "the policy has stopped ending its replies"
        yield Finding(
            "look",
            "endings",
            f"{first:.0%} to {last:.0%}: {reason}. Set missing_eos_penalty, or raise response_length.",
        )
    else:
        yield Finding("ok", "endings", f"{first:.0%} to {last:.0%} of replies end by themselves")


def _length(rows: Rows) -> Iterator[Finding]:
    # Longer replies often score higher whatever they say, and shorter ones may be cut off
    values = column(rows, "rollout/response_tokens")
    if not values:
        return
    first, last = ends(values)
    if len(values) >= TREND and not 0.5 * first <= last <= 1.5 * first:
        text = (
            f"{first:.1f} to {last:.1f} tokens. See whether the score follows length (verdict.json), set"
            " length_penalty, compare at equal length."
        )
        yield Finding("look", "length", text)
    else:
        yield Finding("ok", "length", f"{first:.1f} to {last:.1f} tokens")


def _hacking(rows: Rows) -> Iterator[Finding]:
    """Look for signs that the score rises by something else than better replies.

    Signs are that a judge's score fell meanwhile, or that replies changed their shape.
    """
    # A score that has not risen was not hacked
    scores = column(rows, "objective/score")
    if len(scores) < TREND:
        return
    if change(scores) < CLEAR:
        yield Finding("ok", "reward hacking", "no sign: the score has not clearly risen")
        return

    # Judges: every source of reward by itself, where one that compares agrees with the rest, and
    # the score of held-out prompts
    judges = sorted(
        {
            name
            for row in rows
            for name in row
            if name.startswith(("reward/", "judge/")) or name in ("eval_score", "eval_greedy_score")
        }
    )
    columns = {name: column(rows, name) for name in judges}
    signs = [
        "{} fell from {:.2f} to {:.2f}".format(name, *ends(values))
        for name, values in columns.items()
        if change(values) < -CLEAR
    ]

    # The shape of the replies
    entropy, length = (
        ends(column(rows, name) or [1.0]) for name in ("policy/entropy", "rollout/response_tokens")
    )
    if length[1] > 1.5 * length[0]:
        signs.append(f"replies grew from {length[0]:.1f} to {length[1]:.1f} tokens")
    # Shorter replies alone may be better ones
    if length[1] < 0.6 * length[0] and entropy[1] < 0.6 * entropy[0]:
        signs.append("entropy and length fell")
    if _repeats(rows):
        signs.append("replies repeat themselves more")

    if signs:
        first, last = ends(scores)
        text = (
            f"the score rose from {first:.2f} to {last:.2f} while {', '.join(signs)}. Read samples.jsonl, and"
            " ask a judge that the policy does not learn from (one more reward_function, of weight 0)."
        )
        yield Finding("look", "reward hacking", text)
    else:
        by = ""
        if judges:
            by = f" by {', '.join(judges)}"
        yield Finding("ok", "reward hacking", f"no sign{by}: length, entropy and repetition keep")


def _disagreement(rows: Rows) -> Iterator[Finding]:
    """Look whether the score rises where the members of an ensemble of reward models disagree."""
    scores, apart = column(rows, "objective/score"), column(rows, "objective/disagreement")
    if not apart:
        return
    first, last = ends(apart)
    said = f"members of the reward ensemble are {first:.2f} to {last:.2f} of their spread apart"
    # Theirs alone: a score that stays was not bought by it
    if len(apart) >= TREND and last > 1.5 * first and change(scores) >= CLEAR:
        text = (
            f"the score rises where the members disagree: {said}. Replies have left what the reward models"
            " know. Set reward_aggregation: min or mean_minus_std, raise kl_coef, or stop earlier."
        )
        yield Finding("look", "disagreement", text)
    else:
        yield Finding("ok", "disagreement", said)


# Findings of one level come in this order, after those on PPO itself.
REPLY_CHECKS: list[Callable[[Rows], Iterator[Finding]]] = [
    _score,
    _hacking,
    _disagreement,
    _entropy,
    _repetition,
    _variety,
    _endings,
    _length,
]
