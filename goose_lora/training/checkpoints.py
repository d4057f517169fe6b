"""Checkpoints that are whole, or are not resumed.

``transformers.Trainer`` writes a checkpoint straight into its folder. What makes one whole here is
``checkpoint.json``: written when every other file is on the disk, with the size and checksum of
each, and renamed into its place. A folder without it was cut off.
"""

import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from goose_lora.errors import FailedWriteError, UserError
from goose_lora.files import file_sha256, first_line, free_room, sync, sync_all
from goose_lora.ownership import claim, keep_aside, release_claim, written
from goose_lora.training import checkpoint_parts

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
FORMAT = 1  # raise it when what a checkpoint carries changes: others are refused
FOLDER_NAME = re.compile(r"checkpoint-(\d+)")

Facts = Mapping[str, Any]  # of a run, as JSON: see ``resume.facts``


class SettingRules(NamedTuple):
    """Names of a trainer's own settings that a resumed run must have alike, or may have otherwise.

    Any other setting may differ too, and then the difference is told.
    """

    must_match: tuple[str, ...] = ()
    may_differ: tuple[str, ...] = ()


# Of every trainer: the data's order and the optimizer's state depend on them.
MUST_MATCH = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "packing",
    "train_sampling_strategy",
    "ignore_data_skip",
    # Kept in the optimizer's state: a resumed run has the checkpoint's, whatever the settings say.
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)
# Another length, another place, other logs: still the same run.
MAY_DIFFER = re.compile(
    r"output_dir|resume_from_checkpoint|run_name|project|max_steps|num_train_epochs|disable_tqdm"
    r"|use_cpu|do_.*|report_to|load_best_model_at_end|.*_for_(metrics|best_model)"
    r"|(log|logging|save|eval|hub|push|trackio|dataloader|ddp|torch|include)_.*"
)


# ---- One checkpoint ----


def seal(folder: str | Path, facts: Facts) -> None:
    """Make ``folder`` a whole checkpoint, with ``facts`` about the run that saved it."""
    # All files are on the disk before the manifest says so
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    sync_all(folder)
    entries = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, file_sha256(path)] for path in files
    }

    # The manifest is there whole, or not at all
    content = {"format": FORMAT, "saved": time.time(), **facts, "files": entries}
    temporary = folder / f".{MANIFEST}"
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sync(temporary)
    temporary.replace(folder / MANIFEST)
    sync(folder)
    sync(folder.parent)


def why_incomplete(folder: str | Path) -> str | None:
    """Return why ``folder`` is no whole checkpoint of this format; None if it is one."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / MANIFEST).is_file():
        return (
            f"it has no {MANIFEST}, which is written last: it was cut off while it was saved, or an older"
            " version wrote it"
        )
    try:
        manifest = read(folder)
        form, files = manifest["format"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"its {MANIFEST} cannot be read"
    if not isinstance(files, dict):
        return f"its {MANIFEST} is damaged: files is no object"
    if form != FORMAT:
        return f"it has format {form}, and this version reads format {FORMAT}"
    wrong = _wrong_manifest(folder, manifest)
    if wrong is not None:
        return f"its {MANIFEST} is damaged: {wrong}"

    # Sizes first: a file that was cut off need not be read to be refused
    for name, (size, checksum) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if file_sha256(path) != checksum:
            return f"{name} is damaged: its checksum is not the saved one"
    return checkpoint_parts.why_unusable(folder, manifest)


# Types of what a manifest says, where it does.
_TYPES = {
    "stage": str,
    "step": int,
    "start": int,
    "world_size": int,
    "rows": int,
    "base": dict,
    "adapters": dict,
    "settings": dict,
    "made_of": dict,
}


def _wrong_manifest(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """Return what in a manifest cannot be, None if all can."""
    # Each value has its type, and numbers count something
    for name, kind in _TYPES.items():
        value = manifest.get(name, kind())
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{name} is {value!r}"
        if kind is int and value < 0:
            return f"{name} is {value}"
    # Names stay inside: they are read and deleted
    for name, entry in manifest["files"].items():
        kinds = [type(value) for value in entry] if isinstance(entry, list) else []
        if kinds != [int, str] or Path(name).is_absolute() or ".." in Path(name).parts:
            return f"files has {name}: {entry!r}"
    for name, facts in manifest.get("adapters", {}).items():
        if not isinstance(facts, dict) or Path(name).name != name:
            return f"adapters has {name}: {facts!r}"
    named = FOLDER_NAME.fullmatch(folder.name)
    if named and "step" in manifest and manifest["step"] != int(named[1]):
        return f"it says step {manifest['step']}"
    return None


def read(folder: str | Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint."""
    return json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))


# ---- Those of a run ----


def newest(output_dir: str | Path) -> tuple[Path | None, dict[str, str]]:
    """Return the newest whole checkpoint, and why those that seem newer are none.

    The newest has the highest step of the run that was begun last; clocks have no say.

    The reasons are by the folder's name.
    """
    passed: dict[str, str] = {}
    for folder in reversed(_by_age(output_dir)):
        why = why_incomplete(folder)
        if why is None:
            return folder, passed
        passed[folder.name] = why
    return None, passed


def choose(
    wanted: str | bool | None,
    output_dir: str | Path,
    facts: Facts,
    *,
    rules: SettingRules = SettingRules(),  # noqa: B008  (a tuple)
    says: bool = True,
) -> str | None:
    """Return the checkpoint to resume from, or None to start from the beginning.

    Args:
        wanted: a folder; or ``latest`` or True, for the newest whole one of ``output_dir``, if
            there is one.
        facts: what is known of the run so far, as for ``seal``; what is not in it is not compared.
            Before the model is there, ``adapter`` is what the adapter that trains will be.
        rules: which of the trainer's own settings must match.
        says: whether this process logs which one it is.

    Raises:
        UserError: the folder is no whole checkpoint, or one of another run.
    """
    say = logger.warning if says else logger.debug
    if wanted in (None, False, "", "false", "False"):
        folder, _ = newest(output_dir)
        if folder is not None:
            say(
                "%s has %s of an earlier run; this one starts from the beginning. --resume_from_checkpoint"
                " latest goes on from it.",
                output_dir,
                folder.name,
            )
        return None

    # A folder that is named must be whole; of those of the run, the newest that is
    if wanted in (True, "latest", "true", "True"):
        folder, passed = newest(output_dir)
        for name, why in passed.items():
            say("%s is passed by: %s.", name, why)
        if folder is None:
            say("%s has no whole checkpoint: the run starts from the beginning.", output_dir)
            return None
    else:
        folder = Path(str(wanted))
        why = why_incomplete(folder)
        if why is not None:
            raise UserError(
                f"resume_from_checkpoint: {folder} cannot be resumed: {why}. Give another, or latest for the"
                " newest whole one."
            )

    # It must be of this run; other differences are told
    saved = read(folder)
    _refuse_another_run(folder, saved, facts, rules)
    say("going on from %s (step %s).", folder, saved.get("step", "unknown"))
    changed = {
        name: values
        for name, values in _differences(saved.get("settings", {}), facts.get("settings", {})).items()
        if not MAY_DIFFER.fullmatch(name) and name not in rules.may_differ
    }
    if changed:
        say("settings are not those of the run that saved it, so that it ends otherwise: %s.", _told(changed))
    return str(folder)


def prune(output_dir: str | Path, limit: int | None, keep: Iterable[str | Path | None]) -> None:
    """Delete checkpoints until ``limit`` are left; the newest and ``keep`` stay.

    Those that are not whole go first, then the oldest. What no run has written there is nobody's to
    delete.
    """
    own = written(output_dir).files
    folders = [folder for folder in _by_age(output_dir) if folder.name in own]
    if not limit or not folders:
        return
    # Stable: those that were cut off come first
    folders = sorted(folders, key=lambda folder: (folder / MANIFEST).is_file())
    kept = {folders[-1].resolve(), *(Path(folder).resolve() for folder in keep if folder)}
    surplus = len(folders) - limit
    for folder in folders:
        if surplus > 0 and folder.resolve() not in kept:
            discard(folder)
            surplus -= 1


def discard(folder: str | Path) -> None:
    """Delete a checkpoint, its manifest first: half of one is not whole.

    What somebody has put into a whole one is kept, in a folder of another name.
    """
    folder = Path(folder)
    try:
        listed = {MANIFEST, *read(folder)["files"]}
        foreign = [path for path in folder.rglob("*") if path.is_file()]
        foreign = [path for path in foreign if path.relative_to(folder).as_posix() not in listed]
    except (OSError, ValueError, KeyError, TypeError):
        listed, foreign = set(), []  # it was cut off, and says of no file whose it is
    (folder / MANIFEST).unlink(missing_ok=True)
    if foreign:
        for name in listed:
            (folder / name).unlink(missing_ok=True)
        for path in sorted(folder.rglob("*"), reverse=True):  # what is inside a folder comes first
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        keep_aside(folder)
    shutil.rmtree(folder, ignore_errors=True)
    release_claim(folder.parent, folder.name)


def make_room(folder: Path) -> None:
    """Let a checkpoint begin with an empty folder; one of another origin is kept beside it."""
    claim(folder.parent, folder.name)
    discard(folder)
    claim(folder.parent, folder.name)


def last_start(output_dir: str | Path, resumed: str | None) -> int:
    """Return the highest number of a run that checkpoints name, the resumed one among them."""
    folders = [*_by_age(output_dir), *([Path(resumed)] if resumed else [])]
    return max((_order(folder)[0] for folder in folders if (folder / MANIFEST).is_file()), default=0)


def unsaved(folder: Path, error: Exception) -> FailedWriteError:
    """Return the error that says that a checkpoint could not be written, and what there is.

    The half of it is removed: it may be what fills the disk.
    """
    discard(folder)
    last, _ = newest(folder.parent)
    rest = "There is none before it."
    if last is not None:
        rest = f"The last whole one is {last}: --resume_from_checkpoint latest goes on from it."
    return FailedWriteError(
        f"{folder} could not be saved{free_room(folder.parent)}: {first_line(error)}. {rest}"
    )


# ---- Comparison ----


def _by_age(output_dir: str | Path) -> list[Path]:
    """Return the folders of checkpoints, the newest at the end.

    Of those that were cut off, none is known to be older than another: they count as newest, by
    step.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if FOLDER_NAME.fullmatch(path.name)]
    return sorted((path for path in folders if path.is_dir()), key=_order)


def _order(folder: Path) -> tuple[int, int]:
    """Return which run has saved a checkpoint, by its number, and at which step."""
    step = int(folder.name.rpartition("-")[2])
    try:
        start = read(folder).get("start", 0)  # an older version numbered no runs
    except (OSError, ValueError, AttributeError):
        start = None
    return (start if isinstance(start, int) else sys.maxsize), step


def _refuse_another_run(folder: Path, saved: Facts, facts: Facts, rules: SettingRules) -> None:
    # The run itself, the rows that it goes through, and what else it is made of
    identity = {name: value for name, value in facts.items() if name in ("stage", "world_size", "rows")}
    differing = _differences(saved, identity)
    differing |= _differences(saved.get("made_of", {}), facts.get("made_of", {}))

    # Its adapters: all of them, or, before the model is there, the one that trains
    there, here = saved.get("adapters", {}), facts.get("adapters")
    if here is not None and there.keys() != here.keys():
        differing["adapters"] = (", ".join(sorted(there)), ", ".join(sorted(here)))
    for name, own in (here or {"default": facts.get("adapter", {})}).items():
        for what, pair in _differences(there.get(name, {}), own).items():
            differing[f"{what} of the adapter {name}"] = pair

    # The base under them, and the settings that continuation depends on
    base, own_base = dict(saved.get("base", {})), dict(facts.get("base", {}))
    if base.get("content") and own_base.get("content"):
        # A base that was moved or is named otherwise is the same
        base.pop("name", None)
    else:
        base.pop("content", None)
    for what, pair in _differences(base, own_base).items():
        differing[f"base {what}"] = pair
    settings = _differences(saved.get("settings", {}), facts.get("settings", {}))
    must_match = (*MUST_MATCH, *rules.must_match)
    differing |= {name: settings[name] for name in must_match if name in settings}
    if differing:
        raise UserError(
            f"resume_from_checkpoint: {folder} was saved by another run, and cannot be resumed by this one:"
            f" {_told(differing)}. Use the settings of that run, or start anew without"
            " resume_from_checkpoint."
        )


def _differences(there: Facts, here: Facts) -> dict[str, tuple[Any, Any]]:
    """Return what both have and is not the same, as pairs."""
    return {name: (there[name], here[name]) for name in here if name in there and there[name] != here[name]}


def _told(differing: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name} is {there} there and {here} here" for name, (there, here) in differing.items())
