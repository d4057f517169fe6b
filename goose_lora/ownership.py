"""Who writes to the folder of a run, and what in it is the run's.

``written.json`` names what runs have written there. That alone is replaced or deleted; what else
stands in the way keeps its content under another name. One process at a time may write.
"""

import atexit
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from goose_lora.errors import FailedWriteError, UserError
from goose_lora.files import (
    WRITE_ERRORS,
    first_line,
    free_room,
    globbed,
    read_json,
    share_weights,
    sync,
    sync_all,
    write_json,
)

logger = logging.getLogger(__name__)

WRITTEN = "written.json"
_FORMAT = 1
_LAST = "adapter_config.json"  # without it nothing loads an adapter
_UNFINISHED, _REPLACED = ".unfinished", ".replaced"
# Of the run that is under way, not of its result; each process has paid answers of its own
_LOGS = re.compile(r"metrics\.jsonl|samples\.jsonl|log\.txt|judge_cache(_\d+)?\.jsonl")
_ADAPTER = (_LAST, "adapter_model.safetensors", "goose_lora.json", "README.md")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_PPO = ("samples.jsonl", "curves.png", "report.html", "judge_cache.jsonl")
_ROLE_FOLDERS = ("value", "reward", "reference", *(f"reward_{place}" for place in range(1, 8)))
_ROLES = (*(f"{role}/{name}" for role in _ROLE_FOLDERS for name in _ADAPTER), "reward/members.json")
_TRAINED = (*_ADAPTER, *_TOKENIZER, "stage.json", "metrics.jsonl", "log.txt")
# What a stage leaves in its output_dir, besides checkpoints.
RESULTS = {
    "sft": _TRAINED,
    "reward": (*_TRAINED, "verdict.json", "members.json", "finished.json"),
    "ppo": (*_TRAINED, *_PPO, *_ROLES),
    "own_loop": (*_TRAINED, *_PPO, *_ROLES),
    "evaluate": ("evaluation.json", "replies.jsonl", "stage.json", "judge_cache.jsonl"),
    "ppo_in_one_file": (*_TRAINED, *_ROLES),
}


class Written(NamedTuple):
    """What ``written.json`` says: names below the folder, the stage, and how many runs began."""

    files: tuple[str, ...] = ()
    stage: str | None = None
    start: int = 0


# ---- What is the run's ----


def written(folder: str | Path) -> Written:
    """Read ``written.json``; where there is none, what a run of an older version has left.

    Raises:
        UserError: it is damaged.
    """
    path = Path(folder) / WRITTEN
    if not path.is_file():
        return _of_older_version(path.parent)
    # A file that anyone may have changed: what it names is deleted later
    content = read_json(path)
    files, stage, start = content.get("files"), content.get("stage"), content.get("start")
    sound = isinstance(files, list) and all(isinstance(name, str) and _is_below(name) for name in files)
    if content.get("format") != _FORMAT or not sound or not isinstance(start, int):
        raise UserError(
            f"{path}: damaged, so that it is not known what in {folder} a run has written. Give another"
            " output_dir, or delete that file, after which all that lies there is kept."
        )
    return Written(tuple(files or ()), stage if isinstance(stage, str) else None, start)


def _is_below(name: str) -> bool:
    # A name that leads out of the folder would have a stranger's file deleted
    path = Path(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and str(path) != "."


def _note(folder: str | Path, found: Written) -> None:
    content = {"format": _FORMAT, "stage": found.stage, "start": found.start, "files": sorted(found.files)}
    write_json(Path(folder) / WRITTEN, content)


def claim(folder: str | Path, *names: str) -> None:
    """Note that the run writes ``names`` in ``folder``, before it does.

    What stands there under one of them and is nobody's is kept under another name.
    """
    # Noted before it is written: whoever is killed in between has claimed too much, not too little
    folder, found = Path(folder), written(folder)
    for name in names:
        _clear(folder, name, found.files)
    if not set(names) <= set(found.files):
        folder.mkdir(parents=True, exist_ok=True)
        _note(folder, found._replace(files=tuple({*found.files, *names})))


def _clear(folder: Path, name: str, own: Sequence[str]) -> None:
    """Set aside what keeps ``name`` from being written: a stranger's, or of another kind."""
    # On the way to it: a file, or a link to a folder that may be anyone's
    for parent in reversed(Path(name).parents[:-1]):
        if (folder / parent).is_symlink() or (folder / parent).is_file():
            keep_aside(folder / parent)
    path = folder / name
    is_folder = name in (_UNFINISHED, _REPLACED) or name.startswith("checkpoint-")
    fits = not path.is_symlink() and path.is_dir() == is_folder
    if os.path.lexists(path) and (name not in own or not fits):
        keep_aside(path)


def release_claim(folder: str | Path, *names: str) -> None:
    """Note that ``names`` are no longer there."""
    found = written(folder)
    if set(names) & set(found.files):
        _note(folder, found._replace(files=tuple(set(found.files) - set(names))))


def keep_aside(path: Path) -> None:
    """Rename what stands in the way, and say so. Its content stays as it is."""
    kept = path.with_name(f"{path.name}.kept")
    number = 2
    while os.path.lexists(kept):
        kept = path.with_name(f"{path.name}.kept-{number}")
        number += 1
    os.rename(path, kept)
    logger.warning("%s was written by no run in its folder: it is kept as %s.", path, kept.name)


def begin(folder: str | Path, stage: str, *, after: int = 0) -> int:
    """Note that a run of ``stage`` begins in ``folder``; return its number.

    Each run there, one that is resumed too, has a number above all before it and above ``after``.
    """
    # A counter in the folder, and no clock, tells which of two runs came later
    found = written(folder)
    start = max(found.start, after) + 1
    Path(folder).mkdir(parents=True, exist_ok=True)
    _note(folder, found._replace(stage=stage, start=start))
    return start


def check_place(folder: str | Path, stage: str) -> None:
    """Look whether a run of ``stage`` may write its result to ``folder``. Nothing is changed.

    Raises:
        UserError: there is another stage's result, or something under the name of a result that no
            run has written.
    """
    folder = Path(folder)
    found = written(folder)
    way_out = "Give another output_dir, or move that away."
    # Another stage's result is somebody's work, though a run has written it
    if found.stage not in (None, stage):
        there = [name for name in found.files if (folder / name).exists()][:3]
        raise UserError(
            f"output_dir: {folder} has a run of the stage {found.stage} ({', '.join(there)} ...), which this"
            f" one would replace. {way_out}"
        )
    # What stands under the name of a result, or as a file where a role's folder goes
    foreign = [name for name in RESULTS[stage] if os.path.lexists(folder / name) and name not in found.files]
    needed = {name.partition("/")[0] for name in RESULTS[stage] if "/" in name}
    foreign += [
        name for name in sorted(needed) if os.path.lexists(folder / name) and not _plain(folder / name)
    ]
    if foreign:
        raise UserError(
            f"output_dir: {folder} has {', '.join(foreign[:5])}, which no run of this stage has written"
            f" there, and a result needs {_plural(foreign)}. {way_out}"
        )


def _plain(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _plural(names: Sequence[str]) -> str:
    return "that name" if len(names) == 1 else "those names"


def _of_older_version(folder: Path) -> Written:
    """Return what a run of an older version has left, by the stage that its files name."""
    sealed = [path for path in sorted(folder.glob("checkpoint-*")) if (path / "checkpoint.json").is_file()]
    notes = [
        folder / "goose_lora.json",
        folder / "stage.json",
        *(path / "checkpoint.json" for path in sealed),
    ]
    stage = next((noted for path in notes if (noted := _stage_in(path)) is not None), None)
    names = [*RESULTS.get(stage or "", ()), "evaluation.json"] if stage else []
    checkpoints = [path.name for path in sealed if _stage_in(path / "checkpoint.json") == stage]
    return Written((*(name for name in names if (folder / name).is_file()), *checkpoints), stage)


def _stage_in(path: Path) -> str | None:
    """Return the stage that a file of a run names, None where there is none to be read."""
    try:
        stage = json.loads(path.read_text(encoding="utf-8"))["stage"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return stage if isinstance(stage, str) else None


# ---- What the run reads ----

# Settings that name a file or a folder to read. What is resumed may lie in the run's own folder.
_INPUTS = re.compile(
    r".*(_adapter|dataset_name|pairs_name|name_or_path|_function|_file|_path|_teacher|_config|_dir)|judge"
    r"|judge_rubric|rating|deepspeed"
)


def named_inputs(*settings: object) -> dict[str, list[str]]:
    """Return by setting what dataclasses name to be read: paths, and names that are none."""
    found = {}
    for name, value in (pair for given in settings for pair in vars(given).items()):
        if not _INPUTS.fullmatch(name) or name.startswith("_") or name in ("output_dir", "logging_dir"):
            continue
        words = [word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str)]
        words = [word for word in words if not word.startswith("openai:")]  # a model behind a server
        # A function stands behind the file's name, and a model behind what it is
        pieces = [
            piece for word in words for piece in (word, word.rpartition(":")[0], word.partition(":")[2])
        ]
        found[name] = [piece for piece in pieces if piece]
    return found


def refuse_inputs_inside(folder: str | Path, inputs: Mapping[str, Sequence[str]]) -> None:
    """Refuse inputs that lie in ``folder``, where the run writes, or are the folder itself.

    Args:
        inputs: by setting, what may be paths.

    Raises:
        UserError: there is one.
    """
    # The folder by its name and by what it is
    _require_encodable("output_dir", str(folder))
    folder = Path(folder)
    places = {Path(os.path.abspath(folder)), folder.resolve()}
    for setting, values in inputs.items():
        for value in values:
            _require_encodable(setting, value)
            for path in _paths(value):
                # By its name and by what it points to: a link may lead in or out
                ways = (Path(os.path.abspath(path)), path.resolve())
                where = _relation(setting, ways, places, folder)
                if where is not None:
                    raise UserError(
                        f"{setting}: {value} {where} output_dir, {folder}, where this run writes, so that it"
                        " may lose what it reads. Give another output_dir, beside its inputs."
                    )


def _paths(value: str) -> list[Path]:
    """Return what is there under a name: a path, an address of a file here, or a glob."""
    path = Path(value.removeprefix("file://")).expanduser()
    if value and path.exists():
        return [path]
    return [Path(found) for found in globbed(str(path))] if value else []


# Rows are read from all files below a folder; below an adapter's, these are parts of it.
_ROWS = re.compile(r".*(dataset_name|pairs_name|data_dir)")
_PARTS = re.compile(r"value|reward(_\d)?|reference|ema|checkpoint-\d+|member_\d")


def _relation(setting: str, ways: Sequence[Path], places: Collection[Path], folder: Path) -> str | None:
    """Return what an input has to do with the folder that a run writes to; None if nothing."""
    for way in ways:
        if way in places:
            return "is"
        if set(places) & {*way.parents} or _same_folder(way, folder):
            return "lies in"
        if way.is_file() and way.stat().st_nlink > 1 and _linked(way, folder):
            return "is a hard link to a file in"
        around = [place.relative_to(way).parts[0] for place in places if way in place.parents]
        part = setting.endswith("_adapter") and any(_PARTS.fullmatch(name) for name in around)
        if around and way.is_dir() and (_ROWS.fullmatch(setting) or part):
            return "is a folder around"
    return None


def _linked(path: Path, folder: Path) -> bool:
    """Return whether a file of the run is this one under another name."""
    own = {*written(folder).files, *(name for names in RESULTS.values() for name in names)}
    return any((folder / name).is_file() and os.path.samefile(folder / name, path) for name in own)


def _require_encodable(setting: str, value: str) -> None:
    """Raise UserError for a name that the system cannot be asked for: a locale of ASCII."""
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise UserError(
            f"{setting}: {value!a} cannot be a path here, since Python takes paths to be"
            f" {sys.getfilesystemencoding()} on this system. Set PYTHONUTF8=1, or a locale of UTF-8."
        ) from None


def _same_folder(path: Path, folder: Path) -> bool:
    # Names may differ in case, and a folder be mounted twice
    return folder.exists() and any(
        parent.exists() and os.path.samefile(parent, folder) for parent in (path, *path.parents)
    )


# ---- One writer ----

LOCK, _HOLDER, _READER = ".writer.lock", ".writer.json", ".reader-"
_held: dict[Path, FileLock] = {}
_shared: dict[Path, FileLock] = {}
_made: list[Path] = []  # folders that were not there, the outermost first


def hold(folder: str | Path) -> None:
    """Make this process the only one that writes to ``folder``, until ``release`` or its end.

    The system frees the lock of a process that is killed; whoever comes next says so.

    Raises:
        UserError: another process writes there or reads all of it, or the folder cannot be locked.
    """
    path = Path(folder).resolve()
    if path in _held:
        return
    # The system's lock ends with its process, on whichever host; the note beside it is for people
    lock = FileLock(path / LOCK, timeout=0, thread_local=False)
    before = _holder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        reader = _reader(path)
    except Timeout:
        raise UserError(
            f"output_dir: {folder} is being written by {before or 'another process'}, and of two runs in one"
            " folder neither is whole. Wait for it, end it, or give another folder."
        ) from None
    except (OSError, NotImplementedError) as error:
        raise UserError(
            f"output_dir: {folder} cannot be locked ({first_line(error)}). Give another folder."
        ) from error
    if reader is not None:
        lock.release()
        raise UserError(
            f"output_dir: {folder} is being read by {reader}, as goose-lora label and merge do. Wait until it"
            " has ended, or give another folder."
        )
    if before:
        logger.warning("%s: taken over from %s", folder, before + _of_another_host(path))
    write_json(path / _HOLDER, {"pid": os.getpid(), "host": socket.gethostname()})
    _held[path] = lock


def _of_another_host(path: Path) -> str:
    """Return the end of the sentence that says whose lock is taken over."""
    if json.loads((path / _HOLDER).read_text(encoding="utf-8"))["host"] == socket.gethostname():
        return ", which has ended without a word."
    return ", whose lock is free. Not every network disk shares locks: see that it has ended there."


def holds(folder: str | Path) -> bool:
    """Return whether this process is the one that writes to ``folder``."""
    return Path(folder).resolve() in _held


def share(folder: str | Path) -> None:
    """Keep others from writing to ``folder`` while this process reads it, until ``release``.

    Several may read. A folder that cannot be written to, such as one of the Hub's cache, needs no
    lock.

    Raises:
        UserError: another process writes there.
    """
    path = Path(folder).resolve()
    if path in _held or path in _shared:
        return
    # A lock of each reader's own: whoever wants to write asks for all of them
    lock = FileLock(
        path / f"{_READER}{socket.gethostname()}-{os.getpid()}.lock", timeout=0, thread_local=False
    )
    try:
        lock.acquire()
    except (OSError, NotImplementedError, Timeout):
        require_free(folder)
        return
    _shared[path] = lock
    try:
        require_free(folder)
    except UserError:
        release(folder)
        raise


@contextmanager
def kept_from_writers(folder: str | Path) -> Iterator[None]:
    """Read ``folder`` inside, as ``share`` says, and let others write to it afterwards."""
    path = Path(folder).resolve()
    before = path in _held or path in _shared
    share(folder)
    try:
        yield
    finally:
        if not before:
            release(folder)


def _reader(path: Path) -> str | None:
    """Return who reads ``path``, and delete the locks of readers that have ended."""
    for file in sorted(path.glob(f"{_READER}*.lock")):
        host, _, pid = file.name.removeprefix(_READER).removesuffix(".lock").rpartition("-")
        try:
            with FileLock(file, timeout=0):
                file.unlink(missing_ok=True)
        except Timeout:
            if path not in _shared or pid != str(os.getpid()):
                return f"process {pid} on {host}"
    return None


def require_free(folder: str | Path) -> None:
    """Raise UserError if another process writes to ``folder``."""
    path = Path(folder).resolve()
    if path in _held or not (path / LOCK).exists():
        return
    try:
        with FileLock(path / LOCK, timeout=0):
            pass
    except Timeout:
        raise UserError(
            f"{folder} is being written by {_holder(path) or 'another process'}. Wait until it has ended."
        ) from None
    except (OSError, NotImplementedError):
        return  # what cannot be locked, as a folder that is only read, nobody holds


def _holder(path: Path) -> str | None:
    try:
        noted = json.loads((path / _HOLDER).read_text(encoding="utf-8"))
        return f"process {noted['pid']} on {noted['host']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def begin_in(folder: str | Path, stage: str, *settings: object, writes: bool = True) -> None:
    """Look whether a run may write to ``folder``, and hold it.

    Args:
        settings: dataclasses that name the inputs.
        writes: whether this process is the one of its run that writes.

    Raises:
        UserError: one of these fails.
    """
    refuse_inputs_inside(folder, named_inputs(*settings))
    require_writable(folder)
    if writes:
        hold(folder)
    check_place(folder, stage)


def require_writable(output_dir: str | Path) -> None:
    """Make the folder ``output_dir``; ``release`` takes it away again if it stays empty.

    Raises:
        UserError: nothing can be written to it.
    """
    try:
        path = Path(output_dir).resolve()
        _made.extend(place for place in (*reversed(path.parents), path) if not place.exists())
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b"0")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"output_dir: nothing can be written to {output_dir} ({reason}). Give a folder that can, or make"
            " room."
        ) from error


def release(folder: str | Path | None = None) -> None:
    """Let others write to ``folder``, or to all that this process holds.

    Of all, folders that were made for results and have none go, as of a run that was refused.
    """
    for held, names in ((_held, (_HOLDER, LOCK)), (_shared, ())):
        for path in [Path(folder).resolve()] if folder is not None else list(held):
            lock = held.pop(path, None)
            if lock is None:
                continue
            # While it is held: whoever waits sees that the file has gone, and makes it anew
            for name in names or (Path(lock.lock_file).name,):
                (path / name).unlink(missing_ok=True)
            lock.release()
    while folder is None and _made:
        with suppress(OSError):  # there are results in it, or it has gone
            _made.pop().rmdir()


atexit.register(release)


# ---- A result that is whole or not there ----


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder, whose content moves to ``folder`` when the block ends.

    The earlier result, as ``written.json`` names it, goes when the new one is in its place.
    ``adapter_config.json`` goes first and comes last: whoever is killed in between leaves nothing
    that loads.

    Raises:
        FailedWriteError: it could not be written, such as to a full disk; what was there before is
            untouched.
    """
    folder = Path(folder)
    temporary = folder / _UNFINISHED
    # All is on the disk before anything of the old result goes
    try:
        claim(folder, _UNFINISHED, _REPLACED)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        share_weights(temporary)
        sync_all(temporary)
        _exchange(temporary, folder)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, WRITE_ERRORS):
            raise
        raise FailedWriteError(
            f"the result could not be saved in {folder}{free_room(folder)}: {first_line(error)}. What was"
            " there before is untouched."
        ) from error


def _exchange(temporary: Path, folder: Path) -> None:
    """Put what is in ``temporary`` in the place of the earlier result, or leave all as it was."""
    new = [path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file()]
    found, old = written(folder), folder / _REPLACED
    before = [name for name in found.files if not _LOGS.fullmatch(name) and (folder / name).is_file()]
    undo: list[tuple[Path, Path]] = []
    try:
        # The old result moves aside, first what makes it load. Of a save that was killed here, its
        # old one may still lie there
        for name in sorted(before, key=lambda name: name != _LAST):
            (old / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / name, old / name)
            undo.append((folder / name, old / name))
        sync(folder)
        claim(folder, *new)

        # The new one comes in, last what makes it load
        for name in sorted(new, key=lambda name: name == _LAST):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).replace(folder / name)
            undo.append((temporary / name, folder / name))
            sync((folder / name).parent)
        sync(folder)
    except Exception:
        for back, now in reversed(undo):
            os.replace(now, back)
        raise

    # The successor is whole: what it replaces may go
    for place in (old, temporary):
        shutil.rmtree(place, ignore_errors=True)
    for parent in {Path(name).parent for name in before} - {Path()}:
        if not any((folder / parent).iterdir()):
            (folder / parent).rmdir()
    release_claim(folder, _UNFINISHED, _REPLACED, *(set(before) - set(new)))
