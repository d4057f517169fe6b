"""What is printed, on any console: it moves no cursor, shows no secret, and ends no run.

Texts of people and models reach the terminal by many ways: prints, log lines, warnings, progress
bars and the messages of libraries. All of them end in ``write`` of two streams, which is replaced
here once.
"""

import io
import os
import re
import sys
from collections.abc import Callable
from typing import TextIO

from goose_lora.errors import printable
from goose_lora.redaction import without_known_secrets

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_UP = re.compile(r"(?:\x1b\[A)+")  # what tqdm writes, by itself, between bars that stand below one another


def guard_consoles() -> None:
    """Let standard output and error take any text, and lose it where nobody reads it any more.

    Characters that a console lacks (cp1252, gbk, ASCII) become question marks; control characters
    are escaped, colours are dropped. A reader that has gone (``| head``), a full disk or a closed
    stream loses what is printed, and no result.
    """
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:  # closed before Python began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for good)
        elif isinstance(stream, io.TextIOWrapper) and "write" not in vars(stream):
            stream.reconfigure(errors="replace")
            _guard(stream)


def _guard(stream: io.TextIOWrapper) -> None:
    """Replace two methods of a stream, for all who hold it already, such as handlers of logging."""
    write, flush = stream.write, stream.flush

    def guarded_write(text: str) -> int:
        _or_lost(stream, lambda: write(for_console(text)))
        return len(text)

    vars(stream)["write"] = guarded_write
    vars(stream)["flush"] = lambda: _or_lost(stream, flush)


def _or_lost(stream: io.TextIOWrapper, act: Callable[[], object]) -> None:
    """Act on a stream; where it cannot be written to, what follows is lost too."""
    try:
        act()
    except OSError:
        # What is still in the buffer would fail again when Python ends
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def for_console(text: str) -> str:
    """Return a text as a console may have it: one that is written at once.

    A carriage return at its beginning and steps up by themselves are those of progress bars.
    """
    if text.isprintable() or _UP.fullmatch(text):
        return without_known_secrets(text)
    back = "\r" * text.startswith("\r")
    plain = _COLOURS.sub("", text.removeprefix("\r")).replace("\r\n", "\n")
    return back + printable(without_known_secrets(plain), keep="\n\t")
