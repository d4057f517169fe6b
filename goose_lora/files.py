"""JSON, hashes, writing that is whole or not there, and import by name.

Nothing of the project is imported here but its errors.
"""

import difflib
import glob
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import shutil
import stat
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError

from goose_lora.errors import FailedWriteError, UserError

logger = logging.getLogger(__name__)

_MOST_CHARACTERS = 300
_DAMAGED = "The file is damaged: copy it again, or train the stage again."


def brief(error: BaseException) -> str:
    """Return the message of a library's error in one line, cut after 300 characters."""
    text = " ".join(str(error).split())
    return textwrap.shorten(text, _MOST_CHARACTERS, placeholder=" ...").rstrip(".") or type(error).__name__


def globbed(name: str) -> list[str]:
    """Return the files of a glob; its folder, if that is there, is meant as it is called."""
    path = Path(name).expanduser()
    folder = glob.escape(str(path.parent)) if path.parent.is_dir() else str(path.parent)
    return sorted(glob.glob(os.path.join(folder, path.name)))


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: it cannot be read; not JSON, not UTF-8, nested too deep, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueError
        raise UserError(f"{path}: not JSON that can be read: {brief(error)}. {_DAMAGED}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON {type(content).__name__}, expected an object. {_DAMAGED}")
    return content


def _unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be read: {error.strerror or brief(error)}. Check the path and its rights."
    )


def is_number(value: object) -> bool:
    """Return whether a value of JSON is a number that a float can hold.

    JSON has NaN, and whole numbers of any size.
    """
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    )


def import_function(spec: str) -> Callable[..., object]:
    """Return the callable named by "module:function" or "path/to/file.py:function".

    Only that module is imported (a file is run anew at each call), which is said in a warning, and
    sys.path stays as it is.

    Raises:
        UserError: a malformed spec, a module or file that does not exist or that raises as it is
            imported, a name that is missing or cannot be called.
    """
    source, colon, name = spec.rpartition(":")
    if not colon:
        raise _refusal(spec, "there is no colon")
    if not name.isidentifier():
        raise _refusal(spec, f"{name!r} after the colon is not a function name")
    run = _run_file if source.endswith(".py") else _import_module
    module = run(spec, source)

    # A name that is not there is most often misspelled
    try:
        function = getattr(module, name)
    except AttributeError:
        callables = [key for key, value in vars(module).items() if callable(value)]
        near = difflib.get_close_matches(name, callables, n=1)
        hint = f"; the nearest name is {near[0]!r}" if near else ""
        raise _refusal(spec, f"{source!r} has no {name!r}{hint}") from None
    if not callable(function):
        kind = type(function).__name__
        raise _refusal(spec, f"{name!r} in {source!r} is not callable but of type {kind}")
    logger.warning("%s: runs the code of %s.", spec, getattr(module, "__file__", source))
    return function


def _run_file(spec: str, source: str) -> ModuleType:
    if not Path(source).is_file():
        raise _refusal(spec, f"there is no file {source!r}")
    key = "file_" + str(Path(source).resolve()).encode().hex()  # one name a path, whatever its characters
    module_spec = importlib.util.spec_from_file_location(key, source)
    assert module_spec and module_spec.loader  # None only for a suffix that Python does not know
    # Dataclasses and pickle look for it there
    module = sys.modules[key] = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _broken_module(spec, source, error) from error
    return module


def _import_module(spec: str, source: str) -> ModuleType:
    if not all(part.isidentifier() for part in source.split(".")):
        raise _refusal(spec, f"{source!r} is neither a module's name nor a .py file")
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if not f"{source}.".startswith(f"{error.name}."):
            # The module exists; something it imports does not
            raise _broken_module(spec, source, error) from error
        raise _refusal(spec, f"there is no module {source!r} on sys.path") from error
    except (Exception, SystemExit) as error:
        raise _broken_module(spec, source, error) from error


def _refusal(spec: str, problem: str) -> UserError:
    return UserError(f'{spec!r}: {problem}. Accepted: "module:function" or "path/to/file.py:function".')


def _broken_module(spec: str, source: str, error: BaseException) -> UserError:
    return UserError(
        f"{spec!r}: importing {source!r} failed with {type(error).__name__}: {error}. Mend it, or install"
        " what it imports."
    )


def read_sound_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the objects in a file of JSON lines, and the numbers of its lines that are none.

    A run that was killed ends in the middle of a line, and a power failure leaves zeros. Without a
    file there are none.
    """
    if not path.is_file():
        return [], []
    rows: list[dict[str, Any]] = []
    unsound: list[int] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            row = json.loads(line.decode("utf-8")) if line.strip() else None
        except (ValueError, RecursionError):
            row = ()
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None:
            unsound.append(number)
    return rows, unsound


def json_line(row: Mapping[str, Any]) -> str:
    """Return a row as one line of JSON that UTF-8 can hold, whatever its texts are."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a character, as a text of \ud800 has
        text = json.dumps(row)
    return text + "\n"


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Add ``row`` to a file of JSON lines.

    Raises:
        FailedWriteError: it cannot be written.
    """
    with writing(path), open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(json_line(row))


# What a full disk ends in: RuntimeError is torch.save's.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an OSError inside into FailedWriteError, with ``path`` and the room on its disk."""
    try:
        yield
    except OSError as error:
        folder = Path(path).parent
        raise FailedWriteError(
            f"{path} could not be written{free_room(folder)}: {error.strerror or first_line(error)}. Make"
            " room, or give a folder that can be written to."
        ) from error


# ---- Files on the disk ----


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file's content, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def share_weights(folder: Path) -> None:
    """Give weights in ``folder`` the mode of other new files.

    safetensors leaves what it writes to its owner alone, so that no server could read it.
    """
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def sync_all(folder: Path) -> None:
    """Wait until all that lies in ``folder`` is on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_room(folder: Path) -> str:
    """Return how much is free on the disk of ``folder``, to stand in an error's text."""
    if not folder.is_dir():
        return ""
    return f" ({shutil.disk_usage(folder).free / 1e6:,.0f} MB free there)"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message: those of torch go on with a stack."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__).rstrip(".")


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises as ``read_json_object``."""
    return read_json_object(Path(path))


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all: beside its place, then renamed.

    Raises:
        FailedWriteError: it cannot be written.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all, as ``write_json`` does."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", newline="\n")
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines.

    Raises:
        UserError: it cannot be read; or a line that is no object, with its number.
    """
    try:
        # By line feeds alone: text may hold other line separators
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise _unreadable(path, error) from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            # A line that is cut short is the mark of a killed process
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: line {number} is not JSON: {error}. Was the run stopped as it wrote? Delete that"
                " line."
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path}: line {number} is a JSON {type(row).__name__}, expected an object. Delete that line."
            )
        rows.append(row)
    return rows


def write_jsonl(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one object a line.

    Raises:
        FailedWriteError: it cannot be written.
    """
    with writing(path), open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(map(json_line, rows))
