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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from goose_lora.errors import FailedWriteError, UserError
from goose_lora.files import (
    file_sha256,
    first_line,
    free_room,
    read_json,
    sync,
    sync_all,
    write_json,
    write_text,
)
from goose_lora.models.folders import ADAPTER_WEIGHTS
from goose_lora.ownership import claim, keep_aside, release_claim, written
from goose_lora.training import checkpoint_parts

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
FORMAT = 1  # raise it when what a checkpoint carries changes: others are refused
FOLDER_NAME = re.compile(r"checkpoint-(\d+)")

Facts = Mapping[str, Any]  # of a run, as JSON: see ``resume.facts``


class SettingRules(NamedTuple):
    """Settings of a run that a resumed one may have otherwise, besides those of every trainer.

    Each that differs is told. All that is named nowhere must be alike.
    """

    may_differ: tuple[str, ...] = ()


# Where a run is kept and shown: no number of it depends on that, and nobody needs to be told.
# Rollouts are told as the steps that they are.
_PLACE = re.compile(
    r"output_dir|resume_from_checkpoint|run_name|project|disable_tqdm|report_to|local_rank|debug"
    r"|(hub|trackio|ddp|log|do)_.*|push_to_hub|skip_memory_metrics|base_hub_id|num_rollouts"
)
# How it is looked at and kept, and what it takes: still the same run.
_SAME_RUN = re.compile(
    r"(logging|save|eval|include)_.*|prediction_loss_only|batch_eval_metrics|(per_device|.*_full)_eval.*"
    r"|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor|in_order)"
    r"|dataloader_multiprocessing_context"
    r"|dataset_num_proc|torch_empty_cache_steps|enable_jit_checkpoint|use_cache|force|trust_remote_code"
    r"|any_pairs_name|reference_dataset_name|sample_rows|early_stopping_patience"
)
# Another length, other rounding, another choice at its end: it ends otherwise.
_ENDS_OTHERWISE = re.compile(
    r"max_steps|num_train_epochs|load_best_model_at_end|metric_for_best_model|greater_is_better|use_cpu"
    r"|attn_implementation|torch_compile.*|(activation|gradient)_(checkpointing|offloading).*"
    r"|auto_find_batch_size"
)
# What these name is compared by its content, in the base, the adapters and ``made_of``.
_BY_CONTENT = re.compile(
    r"model_name_or_path|model_revision|quantization|dtype|lora_.*|(policy|reward)_adapter|chat_template_path"
    r"|dataset_(name|split|config|revision)|data_dir|eval_dataset_(name|split)|max_rows|column_mapping|pairs"
    r"|as_chat|leave_out|ptx_dataset_name|ptx_max_length|reward_function|reward_weights|rating|judge_rubric"
)
# Two orders of what is best cannot be compared.
_BEST = ("metric_for_best_model", "greater_is_better")


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
    write_text(folder / MANIFEST, json.dumps(content, indent=2) + "\n")
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
    "recipe": dict,
    "made_of": dict,
    "chosen": dict,
    "versions": dict,
}
# What a run may have chosen by the memory there was, and what each can be.
_CHOSEN: Mapping[str, Callable[[Any], bool]] = {
    "local_rollout_forward_batch_size": lambda value: type(value) is int and 1 <= value <= 2**31,
    "rollout_weights": lambda value: value in ("shared", "dense"),
}
# Without these it is not known what the checkpoint is of.
_NEEDED = ("stage", "step", "world_size", "rows", "base", "adapters", "settings")


def _wrong_manifest(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """Return what in a manifest cannot be, None if all can."""
    # Each value has its type, and numbers count something
    lacking = next((name for name in _NEEDED if name not in manifest), None)
    if lacking is not None:
        return f"{lacking} is missing"
    for name, kind in _TYPES.items():
        value = manifest.get(name, kind())
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{name} is {value!r}"
        if kind is int and not 0 <= value <= sys.maxsize:
            return f"{name} is {value}"
    for name, value in manifest.get("chosen", {}).items():
        if name not in _CHOSEN or not _CHOSEN[name](value):
            return f"chosen has {name}: {value!r}"
    # Each process has left a file
    if not 1 <= manifest["world_size"] <= max(1, len(manifest["files"])):
        return f"world_size is {manifest['world_size']}"
    # Names stay inside: they are read and deleted
    for name, entry in manifest["files"].items():
        kinds = [type(value) for value in entry] if isinstance(entry, list) else []
        if kinds != [int, str] or Path(name).is_absolute() or ".." in Path(name).parts:
            return f"files has {name}: {entry!r}"
    for name, facts in manifest.get("adapters", {}).items():
        if not isinstance(facts, dict) or Path(name).name != name:
            return f"adapters has {name}: {facts!r}"
    base = manifest["base"]
    if not isinstance(base.get("name"), str) or not all(isinstance(x, str | None) for x in base.values()):
        return f"base is {base!r}"
    named = FOLDER_NAME.fullmatch(folder.name)
    if named and manifest["step"] != int(named[1]):
        return f"it says step {manifest['step']}"
    return None


def read(folder: str | Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint."""
    return json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))


def kept(folder: str | Path, settings: Facts) -> dict[str, Any]:
    """Return what the run that saved ``folder`` has chosen for settings that are the same here.

    That is by name of a setting which leaves the choice to the memory there is: another card would
    choose otherwise, and the run would end otherwise.
    """
    saved = read(folder)
    alike = saved["settings"]
    return {
        name: value
        for name, value in saved.get("chosen", {}).items()
        if name in alike and alike[name] == settings.get(name)
    }


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

    # It must be of this run; what may differ is told
    saved = read(folder)
    changed = _refuse_another_run(folder, saved, facts, rules)
    say("going on from %s (step %s).", folder, saved.get("step", "unknown"))
    harmless = {name: pair for name, pair in changed.items() if _SAME_RUN.fullmatch(name)}
    otherwise = {name: pair for name, pair in changed.items() if name not in harmless}
    if otherwise:
        say(
            "settings are not those of the run that saved it, so that it ends otherwise: %s.",
            _told(otherwise),
        )
    if harmless:
        say("from here on the new settings are used: %s.", _told(harmless))
    versions = _differences(saved.get("versions", {}), facts.get("versions", {}))
    if versions:
        say("versions are not those of the run that saved it, and may count otherwise: %s.", _told(versions))
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


# ---- Parts of a run that are trained one after another ----

FINISHED = "finished.json"


def note_finished(folder: str | Path, facts: Facts) -> None:
    """Note in the folder of a result of which run it is, as a checkpoint does."""
    content = {"format": FORMAT, **facts, "sha256": file_sha256(Path(folder) / ADAPTER_WEIGHTS)}
    write_json(Path(folder) / FINISHED, content)


def is_finished(folder: str | Path, facts: Facts) -> bool:
    """Return whether ``folder`` has the whole result of this run's training of it.

    Raises:
        UserError: the result is another run's, or was changed since.
    """
    path = Path(folder) / FINISHED
    if not path.is_file():
        return False
    noted, weights = read_json(path), path.parent / ADAPTER_WEIGHTS
    if not weights.is_file() or noted.get("sha256") != file_sha256(weights):
        raise UserError(
            f"{path}: {ADAPTER_WEIGHTS} beside it is not the one that was saved. Copy the folder again, or"
            " start anew without resume_from_checkpoint."
        )
    changed = _refuse_another_run(path.parent, noted, facts, SettingRules())
    ends = {name: pair for name, pair in changed.items() if not _SAME_RUN.fullmatch(name)}
    if ends:
        raise UserError(
            f"resume_from_checkpoint: {folder} is finished, and would have ended otherwise:"
            f" {_told(ends)}. Use the settings of that run, or start anew without resume_from_checkpoint."
        )
    return True


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
    except (OSError, ValueError, AttributeError, RecursionError):
        start = None
    return (start if isinstance(start, int) else sys.maxsize), step


def _refuse_another_run(
    folder: Path, saved: Facts, facts: Facts, rules: SettingRules
) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, and may; raise UserError for anything else that differs."""
    # The same software notes the same facts: what is not there was taken out
    versions = facts.get("versions")
    same_software = versions is not None and saved.get("versions") == versions

    def absent(name: str) -> dict[str, tuple[Any, Any]]:
        there, here = saved.get(name, {}), facts.get(name, {})
        taken_out = same_software and (there or name != "recipe")
        found = {what: ("not noted", here[what]) for what in here if taken_out and what not in there}
        # Rows held out may come to a run later
        return {what: pair for what, pair in found.items() if not what.startswith("held-out")}

    def compare(name: str) -> dict[str, tuple[Any, Any]]:
        return _differences(saved.get(name, {}), facts.get(name, {})) | absent(name)

    # The run itself, the rows that it goes through, and what else it is made of
    identity = {name: value for name, value in facts.items() if name in ("stage", "world_size", "rows")}
    differing = _differences(saved, identity) | compare("made_of")
    differing |= _of_adapters(saved.get("adapters", {}), facts)
    # What was chosen is kept, not compared; it must be there, but of an older version's run
    if "chosen" in saved:
        differing |= {f"chosen {what}": pair for what, pair in absent("chosen").items()}

    # The base under them: one that was moved or is named otherwise is the same
    base = compare("base")
    base.pop("name" if _both_have_content(saved, facts) else "content", None)
    differing |= {f"base {what}": pair for what, pair in base.items()}

    # Settings: whatever is not known to be harmless would be another run, or be ignored
    changed: dict[str, tuple[Any, Any]] = {}
    for group in ("settings", "recipe"):
        for name, pair in compare(group).items():
            if _PLACE.fullmatch(name) or _BY_CONTENT.fullmatch(name):
                continue
            free = name in rules.may_differ or _SAME_RUN.fullmatch(name) or _ENDS_OTHERWISE.fullmatch(name)
            if name in _BEST and None not in pair:
                free = False
            (changed if free else differing)[name] = pair
    if differing:
        raise UserError(
            f"resume_from_checkpoint: {folder} was saved by another run, and cannot be resumed by this one:"
            f" {_told(differing)}. Use the settings of that run, or start anew without"
            " resume_from_checkpoint."
        )
    return changed


def _both_have_content(saved: Facts, facts: Facts) -> bool:
    return all(each.get("base", {}).get("content") for each in (saved, facts))


def _of_adapters(there: Mapping[str, Any], facts: Facts) -> dict[str, tuple[Any, Any]]:
    """Return what differs in the adapters; before the model is there, in the one that trains."""
    differing: dict[str, tuple[Any, Any]] = {}
    here = facts.get("adapters")
    if here is not None and there.keys() != here.keys():
        differing["adapters"] = (", ".join(sorted(there)), ", ".join(sorted(here)))
    for name, own in (here or {"default": facts.get("adapter", {})}).items():
        for what, pair in _differences(there.get(name, {}), own).items():
            differing[f"{what} of the adapter {name}"] = pair
    return differing


def _differences(there: Facts, here: Facts) -> dict[str, tuple[Any, Any]]:
    """Return what both have and is not the same, as pairs."""
    return {name: (there[name], here[name]) for name in here if name in there and there[name] != here[name]}


def _told(differing: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name} is {there} there and {here} here" for name, (there, here) in differing.items())
