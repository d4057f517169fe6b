"""Lines and tables for a terminal."""

import logging
import numbers
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from goose_lora.errors import UserError, printable
from goose_lora.redaction import redacted

# What a run says, also into its log; no handler of others shows it a second time.
_said = logging.getLogger("goose_lora.said")
_said.propagate = False
_said.setLevel(logging.INFO)
_said.addHandler(logging.NullHandler())


def say(text: str) -> None:
    """Print lines for the user at once, above a bar where there is one, and log them.

    Control characters are escaped, and secrets left out.
    """
    shown = printable(redacted(text), keep="\n\t")
    _said.info("%s", shown)
    tqdm.write(shown, file=sys.stdout)
    sys.stdout.flush()


class _OneLine(logging.Formatter):
    """Writes a record with its time; its lines are indented below the first."""

    def format(self, record: logging.LogRecord) -> str:
        text = printable(redacted(super().format(record)), keep="\n\t")
        return text.replace("\n", "\n    ")


class _LogFile(logging.FileHandler):
    """A file that takes what can be written to it: it only looks, and ends no run.

    ``held`` has the records of a run that may still be refused, which leaves no file.
    """

    held: list[logging.LogRecord] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or hold it."""
        if self.held is not None:
            self.held.append(record)
        else:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Pass over a line that cannot be written: the disk is full, or gone."""


_file: _LogFile | None = None
_console = logging.lastResort  # what shows warnings where nobody has set up logging


def log_into(path: Path | None, *, anew: bool = False, later: bool = False) -> None:
    """Write what is said and warned of from here on into a file too, each line with its time.

    Args:
        path: of the file; None closes the one that there is.
        anew: replace the file, in place of going on with it.
        later: hold the lines until ``open_log``.
    """
    global _file
    # transformers' loggers pass nothing on to the root
    root = logging.getLogger()
    loggers = [_said, root, logging.getLogger("transformers")]
    if _file is not None:
        for logger in loggers:
            logger.removeHandler(_file)
        if _console is not None:
            root.removeHandler(_console)
        _file.close()
        _file = None
    if path is None:
        return
    _file = _LogFile(path, mode="w" if anew else "a", encoding="utf-8", errors="replace", delay=later)
    _file.held = [] if later else None
    _file.setFormatter(_OneLine("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
    # A root with a handler has no last resort any more, which is what shows warnings
    if not root.handlers and _console is not None:
        root.addHandler(_console)
    for logger in loggers:
        logger.addHandler(_file)


def open_log() -> None:
    """Write what ``log_into`` has held, and what comes from here on."""
    if _file is not None and _file.held is not None:
        held, _file.held = _file.held, None
        for record in held:
            _file.handle(record)


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
