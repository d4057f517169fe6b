"""Tables for a terminal."""

import numbers
import textwrap
from collections.abc import Sequence

from goose_lora.errors import UserError, printable


def _cell(value: object) -> str:
    if not isinstance(value, numbers.Real) or isinstance(value, numbers.Integral):
        return "-" if value is None else printable(str(value))
    # .3g alone would write 1234.5 as 1.23e+03
    return f"{value:.0f}" if 999.5 <= abs(float(value)) < 1e9 else f"{value:.3g}"


def table(rows: list[dict[str, object]], columns: list[str]) -> str:
    """Return aligned plain text: a header, a rule, a line a row.

    A column with a number in it stands right; floats have 3 significant digits (whole from 1000
    on), None or a missing key is "-", control characters are escaped. Raises UserError for no
    columns.
    """
    if not columns:
        raise UserError("columns=0; it must be 1 or more.")
    cells = [[printable(name) for name in columns]] + [
        [_cell(row.get(name)) for name in columns] for row in rows
    ]
    # As wide as the widest cell; numbers stand right, so that their digits line up
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    sides = [">" if any(isinstance(row.get(name), numbers.Real) for row in rows) else "<" for name in columns]
    return "\n".join("  ".join(map("{:{}{}}".format, line, sides, widths)).rstrip() for line in cells)


def side_by_side(
    prompts: Sequence[str], columns: dict[str, list[str]], *, width: int = 100, limit: int = 5
) -> str:
    """Return the first `limit` prompts, each with the replies of every column.

    Replies stand under the columns' names, wrapped to `width` characters.

    A text's line breaks stay, indented past the names so that no reply can pass for another; other
    control characters are escaped. Raises UserError for no prompts, a column of another length,
    limit < 1, a width too small for the names.
    """
    for name, count in {"prompts": len(prompts), "limit": limit}.items():
        if count < 1:
            raise UserError(f"{name}={count}; it must be 1 or more.")
    for name, replies in columns.items():
        if len(replies) != len(prompts):
            raise UserError(
                f"column {name!r} has {len(replies)} replies to {len(prompts)} prompts; give one a prompt, in"
                " the same order."
            )
    # Names in a margin of one width, texts beside it
    margin = max(len(printable(name)) for name in ["prompt", *columns]) + 2
    if width < margin + 20:
        raise UserError(
            f"width={width} leaves {width - margin} characters beside the names; use width={margin + 20} or"
            " more."
        )
    lines = []
    for i, prompt in enumerate(prompts[:limit]):
        lines.append(f"[{i + 1} of {len(prompts)}]".ljust(width, "-"))
        for name, text in [("prompt", prompt), *((name, replies[i]) for name, replies in columns.items())]:
            wrapped = [
                part
                for line in text.split("\n")
                for part in textwrap.wrap(printable(line), width - margin) or [""]
            ]
            lines.append(f"{printable(name)}: ".ljust(margin) + ("\n" + " " * margin).join(wrapped))
    return "\n".join(lines)
