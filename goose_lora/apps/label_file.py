"""The file that choices are appended to, a line each, by one process or several: a line that was
acknowledged is on the disk."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from goose_lora.errors import UserError

logger = logging.getLogger(__name__)

PAIR_COLUMNS = ("prompt", "chosen", "rejected")


def key_of(prompt: Any, policy: str | None) -> str:
    """What is labelled once: a prompt, answered by one policy."""
    return hashlib.sha256(
        json.dumps([prompt, policy], sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()[:16]


class ChoiceFile:
    """Pairs in TRL's preference format go to ``path``; ties and what was skipped, which are none,
    to ``.passed.jsonl`` beside it.

    Each line names the policy that replied. ``done`` has the keys of all lines, those of other
    processes as of the last ``refresh``.

    Raises:
        ValueError: not a .jsonl file, or one with lines of another kind.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.suffix != ".jsonl":
            raise UserError(
                f"--out {path}: choices are written line by line. Give a name that ends in .jsonl."
            )
        self.passed = self.path.with_suffix(".passed.jsonl")
        for file in (self.path, self.passed):
            if file.exists() and not file.is_file():
                raise UserError(f"--out {path}: {file} is no file. Give another name.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{self.path}.lock")
        self._seen = {self.path: 0, self.passed: 0}  # bytes
        self.done: dict[str, str] = {}  # by key: pair or passed
        self.refresh()

    def refresh(self) -> None:
        """Read what was appended since, by whomever; a line that was cut off in the middle is taken
        away."""
        with self._lock:
            self._read()

    def append(self, prompt: Any, row: Mapping[str, Any], *, policy: str, pair: bool) -> bool:
        """Write a line and wait until the disk has it. False, and nothing is written, if the prompt
        has one already.

        Raises:
            OSError: it could not be written; what was there before is whole.
        """
        path = self.path if pair else self.passed
        with self._lock:
            self._read()
            if key_of(prompt, policy) in self.done:
                return False
            size = self._seen[path]
            line = (
                json.dumps({"prompt": prompt, **row, "policy": policy}, ensure_ascii=False).encode() + b"\n"
            )
            try:
                with open(path, "ab") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(path, size)
                raise
            self._read()
        return True

    def _read(self) -> None:
        for path, start in self._seen.items():
            if not path.is_file():
                continue
            size = path.stat().st_size
            if size < start:
                raise UserError(f"{path} has become shorter while it was labelled into. Start again.")
            if size == start:
                continue
            with open(path, "rb") as file:
                file.seek(start)
                new = file.read()
            new = self._heal(path, start, new)
            for line in new.splitlines():
                self._note(path, line)
            self._seen[path] = start + len(new)

    def _heal(self, path: Path, start: int, new: bytes) -> bytes:
        """``new``, what stands in ``path`` from byte ``start`` on, with a whole last line. Whoever
        writes holds the lock, so half a line is a process that died, or a line without its end that
        was written by hand, which is kept."""
        if new.endswith(b"\n"):
            return new
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
        kept = whole + b"\n" if whole else b""
        os.truncate(path, start + len(kept))
        return kept

    def _note(self, path: Path, line: bytes) -> None:
        if not line.strip():
            return
        columns = PAIR_COLUMNS if path == self.path else ("prompt", "choice")
        row = json.loads(line) if _is_object(line) else {}
        if not set(columns) <= row.keys():
            found = ", ".join(row) or "no JSON object"
            raise UserError(
                f"--out {path}: has a line with {found}, and choices have {', '.join(columns)}. Give another"
                " file, or mend that line."
            )
        self.done[key_of(row["prompt"], row.get("policy"))] = "pair" if path == self.path else "passed"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
