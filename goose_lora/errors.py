"""What is wrong with what a user gave."""

import unicodedata


def printable(text: str, *, keep: str = "") -> str:
    """Escape what would move the cursor, colour the terminal or turn the writing direction.

    Characters of ``keep`` stay: ``"\\n"`` for text of several lines.
    """
    return "".join(_escaped(char) if char not in keep else char for char in text)


def _escaped(char: str) -> str:
    # Spaces of other scripts are no letters to Python, and do no harm
    if char.isprintable() or unicodedata.category(char) == "Zs":
        return char
    return char.encode("unicode_escape").decode()


class UserError(ValueError):
    """Say what is wrong, with the values, and the way out.

    A command ends in this one line and exit code 2. Any other exception is a bug of the program and
    shows its traceback.
    """

    def __str__(self) -> str:
        """Return the text with control characters escaped, since it quotes files and settings."""
        return printable(super().__str__(), keep="\n\t")


class FailedWriteError(UserError, OSError):
    """Say that a result could not be written or sent, what is kept, and the way out."""


class LostProcessError(UserError, ChildProcessError):
    """Say that another process of the run has died, and how to go on."""


class TimeLimitError(UserError, TimeoutError):
    """Say that something of the user's has not answered in the time that a setting allows."""
