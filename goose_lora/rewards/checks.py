"""Rewards that a rule decides: 1.0 for a reply that keeps it, 0.0 for one that does not."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn, cast

from goose_lora.errors import UserError
from goose_lora.files import first_line

_UNITS = ("words", "characters", "tokens")


def matches_regex(completions: Sequence[str], pattern: Sequence[str], **columns: object) -> list[float]:
    """Return 1.0 where Python's ``re.search`` finds a reply's pattern in it.

    Anchor a pattern by ``^`` and ``$`` for the whole reply; ``(?s)`` lets a dot cross lines.

    Raises:
        UserError: a pattern that is no regular expression.
    """
    scores = []
    for reply, wanted in zip(completions, pattern, strict=True):
        try:
            found = re.search(wanted, reply)
        except (re.error, TypeError) as error:
            raise UserError(
                f"check:matches_regex: pattern={wanted!r} is no regular expression ({error})."
            ) from None
        scores.append(float(found is not None))
    return scores


def json_schema(
    completions: Sequence[str], schema: Sequence[Mapping[str, object] | bool | str], **columns: object
) -> list[float]:
    """Return 1.0 where the whole reply is JSON that its schema allows.

    A schema is a mapping, or its JSON as text; ``$schema`` says its draft, 2020-12 if unset. What
    ``$ref`` names must be inside it: nothing is fetched.

    Raises:
        UserError: no schema, or jsonschema is not installed.
    """
    try:
        from jsonschema import Draft202012Validator, SchemaError, validators
        from referencing import Registry
    except ImportError:
        raise UserError(
            "check:json_schema needs the package jsonschema: pip install 'goose-lora[rewards]'."
        ) from None
    # A schema is read first: a fault of it concerns the user, one of the reply is a score
    scores = []
    for reply, wanted in zip(completions, schema, strict=True):
        try:
            read = json.loads(wanted) if isinstance(wanted, str) else wanted
            rules = cast("dict[str, object]", read)  # or true or false, which allow all or nothing
            kind = validators.validator_for(rules, default=Draft202012Validator)
            kind.check_schema(rules)
        except (ValueError, TypeError, SchemaError) as error:
            raise UserError(
                f"check:json_schema: schema={wanted!r} is no JSON schema ({first_line(error)})."
            ) from None
        try:
            value = json.loads(reply, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            scores.append(0.0)
            continue
        scores.append(float(kind(rules, registry=Registry()).is_valid(value)))
    return scores


def _refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity, which Python reads and JSON has not."""
    raise ValueError(name)


def length_within(
    completions: Sequence[str],
    minimum: Sequence[int],
    maximum: Sequence[int],
    completion_ids: Sequence[Sequence[int]] | None = None,
    unit: Sequence[str] | None = None,
    **columns: object,
) -> list[float]:
    """Return 1.0 where a reply has ``minimum`` to ``maximum`` words, characters or tokens.

    Raises:
        UserError: a unit of another name (words if unset), tokens where none are given, or bounds
            that no length meets.
    """
    scores = []
    for row, (reply, low, high) in enumerate(zip(completions, minimum, maximum, strict=True)):
        # Which length is meant, and can any meet the bounds?
        counted = "words" if unit is None else unit[row]
        if counted not in _UNITS or (counted == "tokens" and completion_ids is None):
            raise UserError(
                f"check:length_within: unit={counted!r} is none of {', '.join(_UNITS)} given here."
            )
        if not (isinstance(low, int) and isinstance(high, int) and 0 <= low <= high):
            raise UserError(
                f"check:length_within: minimum={low!r} and maximum={high!r} must be whole numbers, and"
                " 0 <= minimum <= maximum."
            )
        length = len(reply.split())
        if counted == "characters":
            length = len(reply)
        elif counted == "tokens" and completion_ids is not None:
            length = len(completion_ids[row])
        scores.append(float(low <= length <= high))
    return scores
