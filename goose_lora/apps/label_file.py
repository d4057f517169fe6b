"""The file that choices are appended to, a line each, by one process or several.

A line that was acknowledged is on the disk.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from goose_lora.errors import UserError
from goose_lora.files import json_line

if TYPE_CHECKING:
    from goose_lora.apps.session import Prompt

logger = logging.getLogger(__name__)

# What a line of pairs must have to be trained on.
PAIR_COLUMNS = ("prompt", "chosen", "rejected")


def key_of(prompt: "Prompt", policy: str | None) -> str:
    """Return a hash of what is labelled once: a prompt, answered by one policy."""
    named = json.dumps([prompt, policy], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(named.encode()).hexdigest()[:16]


class ChoiceFile:
    """The choices on disk.

    Pairs in TRL's preference format go to ``path``. Ties and skipped prompts, which are no pairs,
    go to ``.passed.jsonl`` beside it. Each line names the policy that replied. ``done`` has the
    keys of all lines, those of other processes as of the last ``refresh``.

    Raises:
        UserError: it is not a .jsonl file, or has lines of another kind.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.suffix != ".jsonl":
            raise UserError(
                f"--out {path}: choices are written line by line. Give a name that ends in .jsonl."
            )
        # A file of pairs alone can be given to recipes/reward.py as it is
        self.passed = self.path.with_suffix(".passed.jsonl")
        for file in (self.path, self.passed):
            if file.exists() and not file.is_file():
                raise UserError(f"--out {path}: {file} is no file. Give another name.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Processes that share the file take turns, and each has read it up to these bytes
        self._lock = FileLock(f"{self.path}.lock")
        self._seen = {self.path: 0, self.passed: 0}
        self.done: dict[str, str] = {}  # by key: pair or passed
        self.refresh()

    def refresh(self) -> None:
        """Read what was appended since, by whomever.

        A line that was cut off in the middle is taken away.
        """
        with self._lock:
            self._read()

    def append(self, prompt: "Prompt", row: Mapping[str, Any], *, policy: str, pair: bool) -> bool:
        """Write a line and wait until the disk has it.

        Returns False, and writes nothing, if the prompt has a line already.

        Raises:
            OSError: it could not be written; what was there before is whole.
        """
        path = self.path if pair else self.passed
        with self._lock:
            # Another process may have written the prompt's line meanwhile
            self._read()
            if key_of(prompt, policy) in self.done:
                return False
            # Half a line on a full disk is taken away again
            size = self._seen[path]
            text = json_line({"prompt": prompt, **row, "policy": policy})
            try:
                with open(path, "ab") as file:
                    file.write(text.encode())
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(path, size)
                raise
            self._read()
        return True

    def _read(self) -> None:
        """Read both files from where the last reading ended. The caller holds the lock."""
        for path, start in self._seen.items():
            if not path.is_file():
                continue
            # Lines are only ever appended: what was read once stays
            size = path.stat().st_size
            if size < start:
                raise UserError(f"{path} has become shorter while it was labelled into. Start again.")
            if size == start:
                continue
            with open(path, "rb") as file:
                file.seek(start)
                new = file.read()
            new = self._heal(path, start, new)
            for line in new.split(b"\n"):
                self._note(path, line)
            self._seen[path] = start + len(new)

    def _heal(self, path: Path, start: int, new: bytes) -> bytes:
        """Return ``new``, what stands in ``path`` from byte ``start`` on, with a whole last line.

        Whoever writes holds the lock. So half a line is a process that died, and is taken away; or
        a line without its end that was written by hand, which is kept.
        """
        if new.endswith(b"\n"):
            return new
        # Is the last piece a whole line but for its end?
        whole, _, last = new.rpartition(b"\n")
        if _is_object(last):
            with open(path, "ab") as file:
                file.write(b"\n")
            return new + b"\n"
        logger.warning(
            "%s: the last line was cut off in the middle and is taken away: %s",
            path,
            last[:80].decode(errors="replace"),
        )
        kept = b""
        if whole:
            kept = whole + b"\n"
        os.truncate(path, start + len(kept))
        return kept

    def _note(self, path: Path, line: bytes) -> None:
        """Remember a line's key, and that it is a pair or was passed over."""
        if not line.strip():
            return
        kind, columns = "passed", ("prompt", "choice")
        if path == self.path:
            kind, columns = "pair", PAIR_COLUMNS
        row = json.loads(line) if _is_object(line) else {}
        if not set(columns) <= row.keys():
            found = ", ".join(row) or "no JSON object"
            raise UserError(
                f"--out {path}: has a line with {found}, and choices have {', '.join(columns)}. Give another"
                " file, or mend that line."
            )
        self.done[key_of(row["prompt"], row.get("policy"))] = kind


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
