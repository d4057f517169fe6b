"""Judgements on replies: which of two is better, and ranks from scores.

The setting ``pairs`` says how a file tells it; the data sets of the field have presets.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from goose_lora.data.columns import first_of, plain_name, says_nothing
from goose_lora.data.messages import Cell
from goose_lora.errors import UserError

BEST_FIRST = "best_first"
BOTH = "both"  # a judgement that says two things at once
PAIR_KEYS = ("a", "b", "winner", "a_wins", "b_wins", "tie", "margin")
COMPARISONS: dict[str, Callable[[float, float], bool]] = {"<": operator.lt, ">": operator.gt}
MODELS = ("model_a", "model_b")  # columns that say who wrote the two replies
_TIES = re.compile(r"both|tie|draw|same|equal|neither|none|bad|unsure|skip")
YES, NO = ("1", "true", "yes"), ("0", "false", "no")
SHOWN_VALUES = 4  # of a judgement that the setting does not name


class Pairs(NamedTuple):
    """Columns of two replies and of the judgement on them.

    ``winner`` may name one column, or be empty where ``a_wins``, ``b_wins`` and ``tie`` are columns
    of yes and no. A value such as ``<0`` compares numbers.
    """

    a: str
    b: str
    winner: str
    a_wins: tuple[str, ...]
    b_wins: tuple[str, ...]
    tie: tuple[str, ...] = ()
    margin: str = ""
    title: str = "two replies and a judgement, as pairs says"

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        judged = (self.winner,) if self.winner else (*self.a_wins, *self.b_wins, *self.tie)
        return (self.a, self.b, *judged, *((self.margin,) if self.margin else ()))


# Known by their columns, and by these names in the setting pairs.
PRESETS = {
    "pku": Pairs(
        "response_0",
        "response_1",
        "better_response_id",
        ("0",),
        ("1",),
        title="PKU-SafeRLHF: two replies and better_response_id",
    ),
    "shp": Pairs(
        "human_ref_A",
        "human_ref_B",
        "labels",
        ("1",),
        ("0",),
        title="SHP: two replies, and labels is 1 where A is better",
    ),
    "helpsteer2": Pairs(
        "response_1",
        "response_2",
        "preference_strength",
        ("<0",),
        (">0",),
        ("0",),
        title="HelpSteer2 preference: two replies, and the strength is below 0 where 1 is better",
    ),
    "helpsteer3": Pairs(
        "response1",
        "response2",
        "overall_preference",
        ("<0",),
        (">0",),
        ("0",),
        title="HelpSteer3 preference: two replies, and the preference is below 0 where 1 is better",
    ),
    "arena": Pairs(
        "conversation_a",
        "conversation_b",
        "winner",
        ("model_a",),
        ("model_b",),
        ("tie", "tie (bothbad)", "both_bad"),
        title="an arena: two conversations and a winner",
    ),
    "arena_responses": Pairs(
        "response_a",
        "response_b",
        "winner",
        ("model_a", "a", "A", "response_a"),
        ("model_b", "b", "B", "response_b"),
        ("tie", "tie (bothbad)", "both_bad"),
        title="an arena: two replies and a winner",
    ),
    "arena_55k": Pairs(
        "response_a",
        "response_b",
        "",
        ("winner_model_a",),
        ("winner_model_b",),
        ("winner_tie",),
        title="the arena of 55k: two replies and three columns of winners",
    ),
    "alpacafarm": Pairs(
        "output_1",
        "output_2",
        "preference",
        ("1",),
        ("2",),
        ("0",),
        title="AlpacaFarm: two outputs, and preference names the better one",
    ),
    "argilla": Pairs(
        "response1",
        "response2",
        "preference.responses",
        ("response1",),
        ("response2",),
        ("tie",),
        title="Argilla's records: two replies and the answers of annotators",
    ),
}


def parse_pairs(words: Sequence[str]) -> Pairs | None:
    """Return the setting ``pairs``, a preset's name or KEY=VALUE; None for ``best_first``.

    Raises:
        UserError: an unknown name or key, or one that is missing.
    """
    # One word: a preset, or that lists stand best first
    if len(words) == 1 and "=" not in words[0]:
        if words[0] == BEST_FIRST:
            return None
        if words[0] in PRESETS:
            return PRESETS[words[0]]
        raise UserError(f"pairs: {words[0]!r} is none of {', '.join([*PRESETS, BEST_FIRST])}.")
    # Each key once, but values may be several
    found: dict[str, list[str]] = {key: [] for key in PAIR_KEYS}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in PAIR_KEYS or not value:
            raise UserError(
                f"pairs: {word!r}: expected {', '.join(PAIR_KEYS)} with a value each: pairs: {{a: reply_1, b:"
                " reply_2, winner: better, a_wins: 1, b_wins: 2, tie: 0}."
            )
        found[key].append(value)
    # Two replies, and what says which is better
    missing = [key for key in ("a", "b", "a_wins", "b_wins") if not found[key]]
    if missing or any(len(found[key]) > 1 for key in ("a", "b", "winner", "margin")):
        raise UserError(
            f"pairs: {' '.join(words)}: "
            + (f"{', '.join(missing)} is missing. " if missing else "")
            + "Give one each of a, b and winner, and the values of a_wins and b_wins."
        )
    # What stands for two sides judges nothing
    for one, other in combinations(("a_wins", "b_wins", "tie"), 2):
        if shared := {*map(_word, found[one])} & {*map(_word, found[other])}:
            raise UserError(
                f"pairs: {one} and {other} are both {', '.join(sorted(shared))}. Give each value, or each"
                " column of yes and no, to one of them."
            )
    return Pairs(
        found["a"][0],
        found["b"][0],
        *found["winner"] or [""],
        a_wins=tuple(found["a_wins"]),
        b_wins=tuple(found["b_wins"]),
        tie=tuple(found["tie"]),
        margin=(found["margin"] or [""])[0],
    )


def pair_words(pairs: object) -> list[str] | None:
    """Return the setting ``pairs`` of YAML or Python as words: a mapping becomes KEY=VALUE."""
    if isinstance(pairs, str):
        return [pairs]
    if isinstance(pairs, Mapping):
        return [
            f"{key}={_word(value)}"
            for key, values in pairs.items()
            for value in (values if isinstance(values, list | tuple) else [values])
        ]
    return None if pairs is None else list(pairs)  # type: ignore[call-overload]


def preset_of(columns: Sequence[str]) -> Pairs | None:
    """Return the preset whose columns are all there; None if there is none."""
    # Columns of ties may be missing where there are none
    names = {plain_name(column) for column in columns}
    return next(
        (
            preset
            for preset in PRESETS.values()
            if {plain_name(column) for column in preset.columns if column not in preset.tie} <= names
        ),
        None,
    )


def winner_of(row: Mapping[str, Any], pairs: Pairs) -> str | None:
    """Return ``a``, ``b`` or ``tie``; ``both`` for several; None where there is no judgement.

    Raises:
        UserError: a judgement that the setting does not name.
    """
    # Three columns of yes and no, of which one says yes
    if not pairs.winner:
        columns = (("a", pairs.a_wins), ("b", pairs.b_wins), ("tie", pairs.tie))
        said = [side for side, own in columns if any([_says_yes(row, column) for column in own])]
        return BOTH if len(said) > 1 else next(iter(said), None)
    # One column; several annotators agree, or it is a tie
    judged = cell(row, pairs.winner)
    votes = judged if isinstance(judged, list) else [judged]
    sides = [_side(vote, pairs, row) for vote in votes if vote is not None and vote != ""]
    if not sides:
        return None
    # A majority; as many for one as for the other is a tie
    ahead = sides.count("a") - sides.count("b")
    if ahead == 0:
        return "tie"
    return "a" if ahead > 0 else "b"


def cell(row: Mapping[str, Any], column: str) -> Cell:
    """Return the value of a column, whose name may be written with other cases and hyphens."""
    found = column if column in row else first_of(row, (plain_name(column),))
    return None if found is None else row[found]


def ranks_from(scores: Sequence[Any], *, best: str) -> list[int]:
    """Return one rank per score, 1 for the best and equal ones for ties.

    ``best`` is ``high`` or ``low``.

    Raises:
        UserError: a score that is no number.
    """
    try:
        numbers = [float(score) for score in scores]
        if not all(map(math.isfinite, numbers)):
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(
            f"scores {list(scores)}: expected one number to each reply. Leave such rows out."
        ) from None
    # Equal scores share a rank, and no rank is left out
    order = sorted(set(numbers), reverse=best == "high")
    return [order.index(number) + 1 for number in numbers]


def suggestion(a: str, b: str, others: Sequence[str], values: Sequence[Any]) -> str:
    """Return the setting that reads two replies whose judgement has no preset, to be filled in."""
    # Two of the file's own values, for the user to put in the right order
    shown = [_word(value) for value in values[:2]]
    first, second = [*shown, "VALUE", "VALUE"][:2]
    winner = others[0] if others else "COLUMN"
    return f"pairs: {{a: {a}, b: {b}, winner: {winner}, a_wins: {first}, b_wins: {second}}}"


def _says_yes(row: Mapping[str, Any], column: str) -> bool:
    value = cell(row, column)
    word = _word(value).lower()
    if not says_nothing(value) and word not in (*YES, *NO):
        raise UserError(f"{column} is {value!r}; expected yes or no (1 or 0, true or false). Mend the row.")
    return word in YES


def _side(vote: object, pairs: Pairs, row: Mapping[str, Any]) -> str:
    named = (("a", pairs.a_wins), ("b", pairs.b_wins), ("tie", pairs.tie))
    sides = [side for side, values in named if any(_is(vote, value) for value in values)]
    if len(sides) > 1:
        raise UserError(
            f"{pairs.winner} is {vote!r}, which stands for {' and '.join(sides)}: a_wins is"
            f" {', '.join(pairs.a_wins)}, b_wins {', '.join(pairs.b_wins)}, tie {', '.join(pairs.tie)}. Let"
            " it stand for one of them in pairs."
        )
    if sides:
        return sides[0]
    # Or the name of the column that is better, or of the model that wrote it
    for side, column in (("a", pairs.a), ("b", pairs.b)):
        if plain_name(_word(vote)) == plain_name(column):
            return side
    models = [cell(row, name) for name in MODELS]
    if vote in models and models[0] != models[1]:
        return "ab"[models.index(vote)]
    # What may be a tie is shown as one; for another word there is no guess
    tie = _word(vote) if _TIES.search(_word(vote).lower()) else "VALUE"
    raise UserError(
        f"{pairs.winner} is {vote!r}; a_wins is {', '.join(pairs.a_wins)}, b_wins {', '.join(pairs.b_wins)},"
        f" tie {', '.join(pairs.tie) or 'not set'}. Name it in pairs: {{a: {pairs.a}, b: {pairs.b}, winner:"
        f" {pairs.winner}, a_wins: {pairs.a_wins[0]}, b_wins: {pairs.b_wins[0]}, tie: {tie}}}."
    )


def _is(vote: object, value: str) -> bool:
    # A comparison of numbers, or one value
    if value[:1] in COMPARISONS:
        try:
            return COMPARISONS[value[0]](float(vote), float(value[1:]))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return False
    return _word(vote) == _word(value)


def _word(value: object) -> str:
    """Return a value as text, in which 1, 1.0, "1" and true, True are each one."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value).strip()
    return text.lower() if text in ("True", "False") else text
