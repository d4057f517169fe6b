"""What a loss of power would leave of a folder: files as they were at their last fsync, and the
latest changes of names undone."""

import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

Identity = tuple[int, int]  # device and inode, which outlive a new name


class Disk:
    """Watches one folder of this process; ``cut`` writes what the disk would have of it.

    A file has what was there at its last fsync; of what came after, any part, nothing or zeros. A
    name that was made, moved or deleted since its folder's last fsync may be as it was before:
    such changes come back to the disk in their order, so that some of the last are undone.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = Path(folder), random.Random(seed)
        self.synced: dict[Identity, tuple[int, int]] = {}  # size and time of the change, as they were
        self.undo: list[tuple[str, Callable[[Path], None]]] = []  # by the folder whose names changed
        self.fsync = os.fsync
        os.fsync = self._sync

    def _sync(self, handle: int) -> None:
        self.fsync(handle)
        found = os.fstat(handle)
        if stat.S_ISREG(found.st_mode):
            self.synced[found.st_dev, found.st_ino] = (found.st_size, found.st_mtime_ns)
        else:
            path = os.readlink(f"/proc/self/fd/{handle}")
            self.undo = [change for change in self.undo if change[0] != path]

    def see(self, event: str, args: tuple) -> None:
        """Note a change of names before it is made; ``args`` are those of Python's audit event."""
        if event == "os.rename":
            source, target = Path(args[0]), Path(args[1])
            before = target.read_bytes() if target.is_file() else None
            self._note(target, lambda copy: self._move_back(copy, source, target, before))
        elif event in ("os.remove", "os.unlink") and Path(args[0]).is_file():
            path = Path(args[0])
            content = path.read_bytes()
            self._note(path, lambda copy: self._put(copy, path, content))
        elif event == "open" and not os.path.lexists(args[0]):
            path = Path(args[0])
            self._note(path, lambda copy: self._inside(copy, path).unlink(missing_ok=True))

    def _note(self, path: Path, undo: Callable[[Path], None]) -> None:
        self.undo.append((str(path.parent), undo))

    def _inside(self, copy: Path, path: Path) -> Path:
        return copy / path.relative_to(self.folder)

    def _put(self, copy: Path, path: Path, content: bytes) -> None:
        place = self._inside(copy, path)
        if place.parent.is_dir():
            place.write_bytes(content)

    def _move_back(self, copy: Path, source: Path, target: Path, before: bytes | None) -> None:
        place = self._inside(copy, target)
        if os.path.lexists(place):
            self._inside(copy, source).parent.mkdir(parents=True, exist_ok=True)
            os.replace(place, self._inside(copy, source))
        if before is not None:
            self._put(copy, target, before)

    def cut(self, copy: Path) -> None:
        """Write to ``copy`` what the folder would be after a loss of power now."""
        shutil.copytree(self.folder, copy, symlinks=True)
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                self._lose(path, self._inside(copy, path))
        lost = self.random.randint(0, len(self.undo))
        for _, undo in reversed(self.undo[len(self.undo) - lost :]):
            undo(copy)

    def _lose(self, path: Path, copied: Path) -> None:
        """Take from a copied file what no fsync has brought to the disk."""
        found = path.stat()
        size, changed = self.synced.get((found.st_dev, found.st_ino), (0, -1))
        if (size, changed) == (found.st_size, found.st_mtime_ns):
            return
        # Appended to since: the end is lost. Never synced, or written anew: all of it may be
        kept = size if changed >= 0 and found.st_size >= size else 0
        content = copied.read_bytes()
        left = self.random.randint(kept, len(content))
        fate = self.random.choice(("cut", "zeros", "whole"))
        if fate == "cut":
            copied.write_bytes(content[:left])
        elif fate == "zeros":
            copied.write_bytes(content[:left] + b"\0" * (len(content) - left))
