"""More pairs for a reward model, made of those that there are.

A reward model that has seen only two replies to one prompt may learn marks of a good reply that
have nothing to do with the prompt. RRM (Liu et al. 2024, arXiv:2409.13156) puts replies to other
prompts beside the chosen one, and pairs of two such replies that are neither's.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from goose_lora.data.preferences import Ranked, Reply, ranked_rows, tokenize_ranked
from goose_lora.data.rows import RowSet
from goose_lora.errors import UserError

# What the rejected reply of a made pair is; of a neutral pair, both are of other prompts
KINDS = ("other_prompt", "neutral", "empty", "cut", "repeated")
MOST = 1.0  # pairs of a kind, for each that there is
_LONGEST_RUN = 4  # words that are repeated


class MadePair(NamedTuple):
    """A made pair: its kind, the place of the row that it was made of, and the pair."""

    kind: str
    place: int
    pair: Ranked


def share_words(shares: object) -> list[str] | None:
    """Return the setting ``augment_pairs`` as words KIND=SHARE in one order, None for no pairs.

    It is a mapping, words or one word. So two ways to write the same are the same to a run that is
    resumed.

    Raises:
        UserError: as ``parse_shares``.
    """
    if isinstance(shares, Mapping):
        words = [f"{kind}={share}" for kind, share in shares.items()]
    elif shares is None or isinstance(shares, str):
        words = [] if shares is None else [shares]
    else:
        words = [str(word) for word in cast(Sequence[object], shares)]
    return [f"{kind}={share:g}" for kind, share in parse_shares(words).items()] or None


def parse_shares(words: Sequence[str]) -> dict[str, float]:
    """Return the share of each kind, of words KIND=SHARE; a share of 0 is left out.

    Raises:
        UserError: another form, an unknown kind, one that stands twice, or a share that is not
            between 0 and ``MOST``.
    """
    found: dict[str, float] = {}
    for word in words:
        # Both halves, and each kind once
        kind, equals, said = word.partition("=")
        if not equals or kind not in KINDS:
            raise UserError(
                f"augment_pairs: {word!r}: expected a share for any of {', '.join(KINDS)}: augment_pairs:"
                " {other_prompt: 0.5}."
            )
        if kind in found:
            raise UserError(f"augment_pairs: {kind} stands twice. Give it one share.")
        try:
            share = float(said)
        except ValueError:
            share = math.nan
        if not 0 <= share <= MOST:
            raise UserError(
                f"augment_pairs: {kind}={said}: a share is a number from 0 to {MOST:g}, of the pairs to train"
                " on: 0.5 for half as many more."
            )
        found[kind] = share
    return {kind: found[kind] for kind in KINDS if found.get(kind)}


def made_pairs(
    rows: Sequence[Ranked], shares: Mapping[str, float], *, seed: int, name: str
) -> list[MadePair]:
    """Return pairs made of the best replies of ``rows``, as many of each kind as its share says.

    The chosen reply is the row's best; a neutral pair has two replies to two other prompts, ranked
    alike. Which rows, and which replies, is drawn by ``seed``, for each kind by itself: another
    share of one changes no other. Prompt, form and the template's keywords are the row's.

    Raises:
        UserError: a kind that cannot be made of any row.
    """
    sources = [_source(row) for row in rows]
    made: list[MadePair] = []
    for kind, share in shares.items():
        # Rows in an order of the kind's own, until there are enough
        rng = random.Random(f"{seed} {kind}")
        order = rng.sample(range(len(rows)), len(rows))
        wanted = max(1, round(share * len(rows)))
        found = []
        for place in order:
            replies = _replies(kind, place, sources, rng)
            if replies is not None:
                ranks = [1, 1] if kind == "neutral" else [1, 2]
                row = rows[place]
                pair = Ranked(sources[place].prompt, replies, ranks, row.template, row.number)
                found.append(MadePair(kind, place, pair))
            if len(found) == wanted:
                break
        if not found:
            raise UserError(f"{name}: augment_pairs: {kind} needs {_NEEDS[kind]}. Leave it out.")
        made += found
    return made


_NEEDS = {
    "other_prompt": "a reply to another prompt, and all rows have one prompt or none",
    "neutral": "replies to two other prompts, and there are not as many",
    "empty": "a row with a prompt or messages, and a reply of text",
    "cut": "a best reply of two words or more",
    "repeated": "a best reply of two words or more",
}


def tokenize_augmented(
    row_set: RowSet,
    tokenizer: PreTrainedTokenizerBase,
    shares: Mapping[str, float],
    *,
    seed: int,
    append_eos: bool = True,
    max_length: int | None = None,
) -> Dataset:
    """Tokenize pairs and ranked lists as ``tokenize_rankings``, each with what was made of it.

    A made pair stands behind its row. A column ``augmented`` has its kind, and nothing for a row of
    the file; where there are neutral pairs, a column ``target`` has the probability that the first
    reply is the better one: 1, and 0.5. Where rows have margins, made pairs have 0.

    Raises:
        UserError: as ``made_pairs``, or neutral pairs among ranked lists, whose loss passes over
            ties.
    """
    rows, name = row_set.rows, row_set.name
    if "neutral" in shares and "completions" in rows.column_names:
        raise UserError(
            f"{name}: augment_pairs: neutral is for pairs; these are ranked lists, of which replies of one"
            " rank make no pair. Leave it out."
        )
    ranked = ranked_rows(rows, tokenizer, name=name, append_eos=append_eos, numbers=row_set.numbers)
    made = made_pairs(ranked, shares, seed=seed, name=name)
    # In the order of the rows, in which a made pair follows its own
    both = [(place, "", row) for place, row in enumerate(ranked)]
    both += [(one.place, one.kind, one.pair) for one in made]
    both.sort(key=lambda each: each[0])
    margins = None
    if "margin" in rows.column_names:
        own = list(rows["margin"])
        margins = [0.0 if kind else own[place] for place, kind, _ in both]
    tokens = tokenize_ranked(
        [row for _, _, row in both],
        tokenizer,
        name=name,
        append_eos=append_eos,
        max_length=max_length,
        margins=margins,
        ties="neutral" in shares,
    )
    kinds = [both[place][1] for place in tokens["row"]]
    return tokens.add_column("augmented", kinds)  # type: ignore[call-arg]


def count_made(tokens: Dataset) -> dict[str, int]:
    """Return how many made pairs of each kind there are among tokenized rows."""
    if "augmented" not in tokens.column_names:
        return {}
    found = Counter(tokens["augmented"])
    return {kind: found[kind] for kind in KINDS if found[kind]}


def made_text(counts: Mapping[str, int], tokens: Dataset) -> str:
    """Return a line that tells how many pairs were made."""
    parts = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    total = sum(counts.values())
    return f"augment_pairs: {total} pairs made beside {len(tokens) - total} of the data: {parts}"


class _Source(NamedTuple):
    """What of a row pairs are made of: its prompt, its best reply, and what that says."""

    prompt: Reply | None
    best: Reply
    said: str | None  # None where it is not text
    own: list[Reply]  # all of the row's replies


def _source(row: Ranked) -> _Source:
    prompt, replies = split_prompt(row)
    best = replies[row.ranks.index(min(row.ranks))]
    return _Source(prompt, best, words_of(best), replies)


def split_prompt(row: Ranked) -> tuple[Reply, list[Reply]]:
    """Return a row's prompt and its replies; without a prompt it is what all replies begin with."""
    if row.prompt is not None:
        return row.prompt, row.completions
    prompt = _common_start(row.completions)
    return prompt, [reply[len(prompt) :] for reply in row.completions]


def words_of(reply: Reply) -> str | None:
    """Return what a reply says: a text, or the text of its last message; None for other content."""
    if isinstance(reply, str):
        return reply
    said = reply[-1].get("content") if reply else None
    return said if isinstance(said, str) else None


def saying(reply: Reply, text: str) -> Reply:
    """Return a reply of the same form that says ``text``, in its last message where it has some."""
    return text if isinstance(reply, str) else [*reply[:-1], {**reply[-1], "content": text}]


def _replies(kind: str, place: int, sources: Sequence[_Source], rng: random.Random) -> list[Reply] | None:
    """Return the two replies of a pair, the better one first; None where the row allows none."""
    row = sources[place]
    if kind in ("other_prompt", "neutral"):
        # To no prompt, every reply is one to it
        others = _others(place, sources, rng) if row.prompt else iter(())
        first = next(others, None)
        if kind == "other_prompt" or first is None:
            return None if first is None else [row.best, first.best]
        second = next((other for other in others if other.prompt != first.prompt), None)
        return None if second is None else [first.best, second.best]
    # What is made of the reply itself
    if row.said is None:
        return None
    if kind == "empty":
        text = "" if row.said.strip() and row.prompt else None
    else:
        text = _WAYS[kind](row.said, rng)
    return None if text is None or text == row.said else [row.best, saying(row.best, text)]


def _others(place: int, sources: Sequence[_Source], rng: random.Random) -> Iterator[_Source]:
    """Yield rows of other prompts whose best reply is none of this row's, from a drawn place on."""
    row, start = sources[place], rng.randrange(len(sources))
    for step in range(len(sources)):
        other = sources[(start + step) % len(sources)]
        if other.prompt != row.prompt and other.best not in row.own and (other.said or "").strip():
            yield other


def _cut(said: str, rng: random.Random) -> str | None:
    """Return the beginning of a reply up to a drawn word, its own space before it included."""
    ends = list(_ends_of_words(said))[:-1]
    return said[: rng.choice(ends)] if ends else None


def _repeated(said: str, rng: random.Random) -> str | None:
    """Return the first words of a reply over and over, up to its number of words."""
    words = said.split()
    if len(words) < 2:
        return None
    run = words[: rng.randint(1, min(_LONGEST_RUN, len(words) // 2))]
    start = said[: len(said) - len(said.lstrip())]
    return start + " ".join((run * len(words))[: len(words)])


_WAYS: dict[str, Callable[[str, random.Random], str | None]] = {"cut": _cut, "repeated": _repeated}


def _ends_of_words(said: str) -> Iterator[int]:
    for place, letter in enumerate(said):
        if not letter.isspace() and (place + 1 == len(said) or said[place + 1].isspace()):
            yield place + 1


def _common_start(replies: Sequence[Reply]) -> Reply:
    """Return what all replies begin with: whole words, or whole messages.

    The space after the words is left to the replies, and the last message of each is left to it.
    """
    if isinstance(replies[0], str):
        # What the first and the last by alphabet share, all between them do
        low, high = min(map(str, replies)), max(map(str, replies))
        length = next(
            (place for place, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low)
        )
        return low[: max((place for place in range(length) if low[place].isspace()), default=0)]
    # Chat: turns that all replies share, the last of each left out
    turns = list(zip(*(reply[:-1] for reply in replies), strict=False))
    same = next(
        (
            place
            for place, messages in enumerate(turns)
            if any(message != messages[0] for message in messages)
        ),
        len(turns),
    )
    return replies[0][:same]
