"""Where rows come from: files of all kinds, compressed or in parts, folders, and the Hub.

The libraries read them (datasets, pandas, pyarrow); this module says which of them, and what is
wrong in words of the file.
"""

import csv
import glob
import io
import json
import logging
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import urlopen

import fsspec
import pandas
import pyarrow
import pyarrow.json
import yaml
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.data_files import SPLIT_KEYWORDS, get_data_patterns, resolve_pattern
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.json import json as json_of_datasets
from huggingface_hub import constants, metadata_load

from goose_lora.embedded import MODEL
from goose_lora.errors import UserError
from goose_lora.files import brief, globbed

logger = logging.getLogger(__name__)

READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".ndjson": "json",
    ".tsv": "csv",
    ".txt": "text",
}
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
SECONDS = 60  # without an answer of the web
SEPARATORS = ",;\t|"
SPLITS = frozenset(word for words in SPLIT_KEYWORDS.values() for word in words)
WRAPPERS = ("data", "rows", "examples")  # keys under which a JSON object has its rows
PATTERN = re.compile(r"[*?[]")  # letters of globs, which names of files and folders may have too
# Cells of csv that are numbers: what a float reads besides (1_000, 00501, nan) is an id or a word
WHOLE = re.compile(r"-?(0|[1-9]\d*)")
DECIMAL = re.compile(r"-?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
EXACT = 2**53  # whole numbers up to here are themselves as floats


_PLACE = ("dataset_config", "data_dir", "dataset_revision")  # settings, in the order of HubPlace


class HubPlace(NamedTuple):
    """Which part of a Hub dataset: configuration, folder and revision."""

    config: str | None = None
    data_dir: str | None = None
    revision: str | None = None


def read_rows(
    name: str,
    split: str,
    place: HubPlace | None = None,
    *,
    split_by: str = "dataset_split",
    is_default: bool = True,
) -> Dataset:
    """Read rows from a file, a glob, a folder or the Hub.

    A folder whose files are named for splits, as those of the Hub are (``train.jsonl``,
    ``data/test-00000-of-00001.parquet``), and a JSON object of splits give the rows of ``split``
    alone. ``split_by`` is the setting that names it; where that is not the setting's default, rows
    without splits are refused.

    Raises:
        UserError: none are there, or they cannot be read; it says where and what to do.
    """
    rows = _read_rows(name, split, place, split_by)
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise UserError(
                f"{name}: no split {split}. There are {', '.join(map(str, rows))}:"
                f" {_said(split_by, next(iter(rows)))}."
            )
        rows = rows[split]
    elif not is_default and not _gives_one_split(name):
        raise UserError(f"{split_by}={split}: {name} has no splits. Leave it out, or name that split's file.")
    # Arrow ends such a name where it begins, and finds its values no more
    if "\\x00" in repr(rows.features):
        raise UserError(f"{name}: a name of a column, or a key in one, has a NUL character. Rename it.")
    return rows


def _said(setting: str, value: object) -> str:
    """Return how a setting of a file, or an option (``--split``), is written."""
    return f"{setting} {value}" if setting.startswith("--") else f"{setting}: {value}"


def _read_rows(name: str, split: str, place: HubPlace | None, split_by: str) -> Dataset | DatasetDict:
    # In the order of what a name can be: a folder, an address, a glob, a file, the Hub
    path = Path(name).expanduser()
    if path.is_dir() and _is_hub_copy(path):
        if PATTERN.search(str(path.absolute())):
            raise UserError(
                f"{name}: datasets reads *, ? and [ in the name of a copy from the Hub as a pattern. Rename"
                " the folder."
            )
        return _from_hub(str(path), split, place or HubPlace(), split_by)
    given = [f"{setting}={value}" for setting, value in zip(_PLACE, place or (), strict=False) if value]
    if given and (path.exists() or "://" in name or _suffix(path) in READERS):
        raise UserError(
            f"{given[0]}: {name} is no dataset of the Hub, which alone has that. Leave it out, or name the"
            " files of that part."
        )
    if path.is_dir():
        return _folder(path, split, split_by)
    if "://" in name:
        return _address(name)
    if PATTERN.search(name) and not path.exists():
        return _parts(globbed(name), name)
    if _suffix(path) in READERS:
        if not path.is_file():
            raise UserError(f"{name}: no such file. Check the path.")
        return _file(path, name)
    if path.exists():
        raise UserError(
            f"{name}: cannot read this kind of file. Use {', '.join(READERS)}, also with"
            f" {', '.join(COMPRESSED)}, a folder of them or the name of a Hub dataset."
        )
    return _from_hub(name, split, place or HubPlace(), split_by)


def _address(name: str) -> Dataset | DatasetDict:
    """Read a file of the web, which is then read as one that lies here.

    Raises:
        UserError: it is not to be had, or as ``_file``.
    """
    # An address may end in a query
    address = urlsplit(name)
    path = Path(address.netloc + address.path)
    if _suffix(path) not in READERS:
        raise UserError(f"{name}: {_unknown_kind()}")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / path.name
        try:
            # fsspec knows hf:// and s3://, and asks for a package to read https
            web = address.scheme in ("http", "https")
            source: Any = urlopen(name, timeout=SECONDS) if web else fsspec.open(name, "rb")
            with source as found, open(whole, "wb") as out:
                shutil.copyfileobj(found, out)
        except Exception as error:  # what urllib, fsspec and its packages raise
            raise UserError(
                f"{name}: not to be had: {brief(error)}. Check the address and the network, or give a file."
            ) from error
        return _file(whole, name, keep=True)


def _unknown_kind() -> str:
    return f"cannot read this kind of file. Use {', '.join(READERS)}, also with {', '.join(COMPRESSED)}."


def _suffix(path: Path) -> str:
    """Return the ending that says the kind, without that of the compression."""
    # rows.jsonl.gz is a file of lines
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() if ending in COMPRESSED else ending


def _kind(name: str) -> str:
    suffix = _suffix(Path(name))
    if suffix not in READERS:
        raise UserError(f"{name}: {_unknown_kind()}")
    return READERS[suffix]


def _folder(path: Path, split: str, split_by: str) -> Dataset | DatasetDict:
    """Read what ``save_to_disk`` wrote, or a folder of parts of one kind."""
    # Both are written by save_to_disk: one split, or several
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return load_from_disk(str(path))
    # Rows of all splits in one would train on those that are held out
    splits = splits_of(path)
    if splits and split not in splits:
        first, files = next(iter(splits.items()))
        raise UserError(
            f"{path}: no split {split}. Its files are named for {', '.join(splits)}:"
            f" {_said(split_by, first)}. Or give its files by name, such as {files[0]}."
        )
    if splits:
        read = {file for files in splits.values() for file in files}
        others = [part.name for part in _files_in(path) if str(part.absolute()) not in read]
        if others:
            logger.warning("%s: %s: of no split by its name, and not read.", path, ", ".join(others))
        return _parts(splits[split], f"{path} ({split})")
    parts = [str(part) for part in _files_in(path)]
    if not parts:
        raise UserError(
            f"{path}: cannot read this kind of file. Use {', '.join(READERS)}, a folder of them, or one that"
            " save_to_disk wrote."
        )
    return _parts(parts, str(path))


def _files_in(path: Path) -> list[Path]:
    """Return the files of rows in a folder, without hidden ones and notes beside them."""
    return [
        part for part in sorted(path.iterdir()) if _suffix(part) in READERS and not part.name.startswith(".")
    ]


def _is_hub_copy(path: Path) -> bool:
    """Return whether a folder has the card of a Hub dataset, which says what belongs together."""
    card = path / "README.md"
    if not card.is_file():
        return False
    try:
        return bool((metadata_load(card) or {}).get("configs"))
    except (ValueError, OSError, yaml.YAMLError):  # a note of the user's
        return False


def is_of_hub(name: str) -> bool:
    """Return whether ``name`` is a Hub dataset's, or a folder that is a copy of one."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _is_hub_copy(path)
    is_file = path.exists() or "://" in name or _suffix(path) in READERS or name.startswith(f"{MODEL}/")
    return not is_file and not PATTERN.search(name)


def _gives_one_split(name: str) -> bool:
    """Return whether what is read by ``name`` is one split of several, chosen by its name."""
    path = Path(name).expanduser()
    return is_of_hub(name) or (path.is_dir() and bool(splits_of(path)))


def splits_of(path: Path) -> dict[str, list[str]]:
    """Return the files of each split that names of files in a folder tell; none if none do.

    The names are those that ``datasets`` knows: train, validation, dev, test and others, in the
    file's name or its folder's.
    """
    with _plainly_named(path) as plain:
        try:
            patterns = get_data_patterns(str(plain))
        except FileNotFoundError:  # an empty folder
            return {}
        found: dict[str, list[str]] = {}
        for split, ways in patterns.items():
            if ways == ["**"]:  # no name tells a split
                return {}
            files = {file for way in ways for file in _resolved(way, plain) if _suffix(Path(file)) in READERS}
            if files:
                found[str(split)] = sorted(
                    str(path.absolute() / Path(file).relative_to(plain)) for file in files
                )
    return found


@contextmanager
def _plainly_named(path: Path) -> Iterator[Path]:
    """Give a folder by an absolute name without letters of patterns, by a link where it has some.

    An escaped name would do too, but ``datasets`` then searches the folder above and all in it.
    """
    if not PATTERN.search(str(path.absolute())):
        yield path.absolute()
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "rows"
        link.symlink_to(path.absolute(), target_is_directory=True)
        yield link


def _resolved(pattern: str, path: Path) -> list[str]:
    """Return the files of a pattern of ``datasets``, below ``path``."""
    try:
        return resolve_pattern(pattern, str(path))
    except FileNotFoundError:  # nothing has such a name
        return []


def _parts(parts: Sequence[str], name: str) -> Dataset | DatasetDict:
    if not parts:
        raise UserError(f"{name}: no such file. Check the path.")
    # Parts of one kind have one reader
    kinds = {_kind(part) for part in parts}
    if len(kinds) > 1:
        raise UserError(
            f"{name}: files of several kinds: {', '.join(Path(part).name for part in parts[:5])}. Name those"
            f" that belong together: dataset_name: {Path(parts[0]).parent}/*{Path(parts[0]).suffix}."
        )
    # One part alone is read as the file that it is
    if len(parts) == 1:
        return _file(Path(parts[0]), parts[0])
    if any(Path(part).suffix.lower() in COMPRESSED for part in parts):
        files = [_file(Path(part), part) for part in parts]
        rows = [file for file in files if isinstance(file, Dataset)]
        if len(rows) < len(files):
            raise UserError(f"{name}: each file has splits. Name one of them: dataset_name: {parts[0]}.")
        return concatenate_datasets(rows)
    return _files(list(parts), kinds.pop(), name)


def _file(path: Path, name: str, *, keep: bool = False) -> Dataset | DatasetDict:
    if path.stat().st_size == 0:
        raise UserError(f"{name}: the file is empty. Write rows into it, or give another.")
    # A file as it is
    compression = COMPRESSED.get(path.suffix.lower())
    if compression is None:
        return _files([str(path)], _kind(str(path)), name, keep=keep)
    # Arrow unpacks all three; datasets would ask for a package for one
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / path.stem
        try:
            with pyarrow.input_stream(str(path), compression=compression) as packed, open(whole, "wb") as out:
                shutil.copyfileobj(packed, out)
        except OSError as error:
            raise UserError(f"{name}: {brief(error)}. Is it whole? Pack it again.") from error
        return _files([str(whole)], _kind(str(whole)), name, keep=True)


def _files(files: list[str], kind: str, name: str, *, keep: bool = False) -> Dataset | DatasetDict:
    """Read files of one kind; ``keep``: into memory, since the files go away."""
    # What is wrong with a file is told by its line, so it is looked at first
    for file in files if kind != "parquet" else []:
        check_encoding(Path(file), name if len(files) == 1 else file)
    if kind == "json" and len(files) == 1 and (rows := _json_object(Path(files[0]), name)) is not None:
        return rows
    try:
        if kind == "csv":
            rows = concatenate_datasets([_table(file) for file in files])
        else:
            # The files are there, so that their names are no patterns
            exact = [glob.escape(file) for file in files]
            with _without_its_log(), _dates_as_text():
                # A name of ours, since the library's cache may have what was read with times
                rows = load_dataset(kind, "rows", data_files=exact, split="train", keep_in_memory=keep)
    except ImportError as error:  # fsspec's, for an address
        raise UserError(f"{name}: {brief(error)}. Install that, or download the file first.") from error
    except (DatasetGenerationError, ValueError, OSError) as error:
        broken = _first_broken(files) if kind == "json" else None
        if "corresponds to no data" in str(error):
            broken = "no rows. Was it written to its end?"
        raise UserError(
            f"{name}: {broken or f'{brief(error.__cause__ or error)}. Mend the file, or write it again.'}"
        ) from error
    assert isinstance(rows, Dataset)
    return rows


@contextmanager
def _without_its_log() -> Iterator[None]:
    """Keep back what the library logs of a broken file: the error says it, with the line."""
    library = logging.getLogger("datasets")
    before = library.level
    library.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        library.setLevel(before)


@contextmanager
def _dates_as_text() -> Iterator[None]:
    """Have text of JSON that looks like a time read as the text that it is, at any depth.

    Arrow's reader makes times of it, and ``datasets`` has no setting that says otherwise.
    """
    before = json_of_datasets.paj
    json_of_datasets.paj = _WithoutTimes
    try:
        yield
    finally:
        json_of_datasets.paj = before


class _WithoutTimes:
    """What ``datasets`` uses of ``pyarrow.json``, reading times as text."""

    ReadOptions = pyarrow.json.ReadOptions

    @staticmethod
    def read_json(lines: io.BytesIO, read_options: pyarrow.json.ReadOptions) -> pyarrow.Table:
        """Return the rows of lines, read a second time where the first has made times of text."""
        table = pyarrow.json.read_json(lines, read_options=read_options)
        schema = _text_for_times(table.schema)
        if schema == table.schema:
            return table
        lines.seek(0)
        return pyarrow.json.read_json(
            lines,
            read_options=read_options,
            parse_options=pyarrow.json.ParseOptions(explicit_schema=schema),
        )


def _text_for_times(schema: pyarrow.Schema) -> pyarrow.Schema:
    """Return an Arrow schema with text for times."""
    return pyarrow.schema([_without_times(field) for field in schema])


def _without_times(field: pyarrow.Field) -> pyarrow.Field:
    """Return an Arrow field with text for times, also in those of objects and lists."""
    kind = field.type
    if pyarrow.types.is_struct(kind):
        return field.with_type(
            pyarrow.struct([_without_times(kind.field(i)) for i in range(kind.num_fields)])
        )
    if pyarrow.types.is_list(kind):
        return field.with_type(pyarrow.list_(_without_times(kind.value_field)))
    return field.with_type(pyarrow.string()) if pyarrow.types.is_temporal(kind) else field


def _json_object(path: Path, name: str) -> Dataset | DatasetDict | None:
    """Return the rows of a file that is one JSON object; None for a list or for lines.

    The object holds a list of rows, one to each split, or a list to each column, as pandas writes
    it.
    """
    # Lines are read by the library; a list is too
    if path.suffix.lower() != ".json":
        return None
    with open(path, encoding="utf-8-sig") as file:
        if not file.read(100).lstrip().startswith("{"):
            return None
        file.seek(0)
        try:
            held = json.load(file)
        except (ValueError, RecursionError):
            return None  # several objects, or broken: the reader of lines says which
    # Rows under a key: those of a split, or as exports of web services have them
    lists = {key: value for key, value in held.items() if isinstance(value, list)}
    tables = {key: rows for key, rows in lists.items() if all(isinstance(row, dict) for row in rows)}
    is_columns = len(lists) == len(held) and len({len(value) for value in lists.values()}) == 1
    if not SPLITS.isdisjoint(tables) and not (is_columns and len(tables) < len(lists)):
        return DatasetDict({key: _of_objects(rows, name) for key, rows in tables.items()})
    rows = next((tables[key] for key in WRAPPERS if tables.get(key)), None)
    if rows:
        return _of_objects(rows, name)
    # A list to each column, all of one length
    if is_columns:
        rows = [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
        return _of_objects(rows, name)
    return None


def _of_objects(rows: list[dict[str, object]], name: str) -> Dataset:
    try:
        return Dataset.from_list(rows, on_mixed_types="use_json")
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: has {_half(error)}") from error


def _table(file: str) -> Dataset:
    """Read a csv file as text: words such as NA stay words, and numbers that are replies too."""
    separator = _separator(Path(file))
    # datasets reads with pandas as well, but has no setting for text
    cells = pandas.read_csv(file, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    if not isinstance(cells.index, pandas.RangeIndex):
        raise ValueError("rows have more cells than the header has columns")
    if not len(cells):
        raise ValueError("corresponds to no data")
    return Dataset.from_dict({str(column): cells[column].tolist() for column in cells.columns})


def _separator(path: Path) -> str:
    """Return what separates the columns of a csv file: what its header has most of."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    # The header has no commas inside texts
    with open(path, encoding="utf-8-sig", newline="") as file:
        header = file.readline()
    found = {sep: len(next(csv.reader([header], delimiter=sep), [])) for sep in SEPARATORS}
    return max(SEPARATORS, key=lambda sep: (found[sep], -SEPARATORS.index(sep)))


def is_table(name: str) -> bool:
    """Return whether rows of this name come from csv, whose cells are all text."""
    path = Path(name.split("?")[0] if "://" in name else name).expanduser()
    parts = _files_in(path) if path.is_dir() else [path]
    return any(_suffix(part) in (".csv", ".tsv") for part in parts)


def numbers_again(rows: Dataset, text: Mapping[str, object]) -> Dataset:
    """Return rows of csv with columns of numbers as such, but for columns that are ``text``."""
    # Ids, scores and labels; a column of any text stays text
    for column in rows.column_names:
        cells = [cell.strip() for cell in rows[column] if cell != ""]
        number = None if column in text or not cells else _number_of(cells)
        if number is None:
            continue
        kind = "int64" if number is int else "float64"
        filled = [None if cell == "" else number(cell) for cell in rows[column]]
        replaced = Dataset.from_dict({column: filled}, features=Features({column: Value(kind)}))
        order = rows.column_names
        rows = concatenate_datasets([rows.remove_columns(column), replaced], axis=1).select_columns(order)
    return rows


def _number_of(cells: Sequence[str]) -> type[int | float] | None:
    """Return the type that these cells are written in; None if numbers would not say the same."""
    # A whole number that does not fit, a long id, would be another one
    if all(WHOLE.fullmatch(cell) for cell in cells):
        fits = all(-(2**63) <= int(cell) < 2**63 for cell in cells) and "-0" not in cells
        return int if fits else None
    for cell in cells:
        if not DECIMAL.fullmatch(cell) or not math.isfinite(float(cell)):
            return None
        if WHOLE.fullmatch(cell) and abs(int(cell)) > EXACT:
            return None
    return float


def _from_hub(name: str, split: str, place: HubPlace, split_by: str) -> Dataset:
    try:
        with _dates_as_text():
            rows = load_dataset(
                name, place.config, split=split, data_dir=place.data_dir, revision=place.revision
            )
    except Exception as error:  # what httpx, fsspec, pyarrow and pandas raise, passed on
        if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
            raise UserError(
                f"{name}: has several configurations: {brief(error)}. Name one: dataset_config: NAME."
            ) from error
        way_out = (
            "Unset HF_HUB_OFFLINE"
            if constants.HF_HUB_OFFLINE
            else f"Check the name, {split_by} and the network"
        )
        raise UserError(
            f"{name}: no file here, and not to be had from the Hub: {brief(error)}. {way_out}, or give a"
            " file."
        ) from error
    # Several splits are a folder of rows, not rows
    if not isinstance(rows, Dataset):
        raise UserError(f"{name}: expected one split of rows; name it with {split_by}.")
    return rows


def check_encoding(path: Path, name: str) -> None:
    """Raise UserError, naming the line, unless a file of text is UTF-8.

    The reader of JSON would notice only when the row is used.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                place = (
                    f"line {number} is not UTF-8, at byte {error.start + 1} of it (0x{line[error.start]:02x})"
                )
                raise UserError(f"{name}: {place}. Save the file as UTF-8.") from error


def _keys_once(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """Return an object of JSON; raise UserError where a key stands twice in it."""
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise UserError(f"has the key {twice[0]!r} twice in one object. Keep one of them.")
    return dict(pairs)


def _half(error: UnicodeEncodeError) -> str:
    return f"{error.object[error.start]!r}, half of a character. Write the whole one, or leave it out."


def _first_broken(files: Sequence[str]) -> str | None:
    """Return what is wrong with the first file of JSON that is broken; of several, which it is."""
    for file in files:
        if broken := broken_json(Path(file)):
            return broken if len(files) == 1 else f"{broken} The file is {file}."
    return None


def broken_json(path: Path) -> str | None:
    """Find the first line that is not JSON, or not for the reader of rows; None if all are.

    The file is one list, or one object per line.
    """
    text = path.read_text(encoding="utf-8-sig")
    # One list
    if text.lstrip().startswith("["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            return f"line {error.lineno} is not JSON: {error.msg} at character {error.colno}."
        except RecursionError:
            return "the JSON is nested too deep."
        return None
    # One object per line; empty lines are allowed
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_keys_once)
            json.dumps(row, ensure_ascii=False).encode()
        except UserError as error:
            return f"line {number} {error}"
        except UnicodeEncodeError as error:
            return f"line {number} has {_half(error)}"
        except json.JSONDecodeError as error:
            return (
                f"line {number} is not JSON: {error.msg} at character {error.colno}. Each line must be one"
                " object."
            )
        except RecursionError:
            return (
                f"line {number} is JSON nested too deep. Each line must be one object, with text or a list of"
                " messages."
            )
        if not isinstance(row, dict):
            return (
                f"line {number} is a JSON {type(row).__name__}; each line must be one object, with columns as"
                " keys."
            )
    return None
