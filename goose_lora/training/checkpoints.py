"""Checkpoints that are whole or are not taken, and results that are whole or are not there.

``transformers.Trainer`` writes a checkpoint straight into its folder. What makes one whole here is
``checkpoint.json``: written when every other file is on the disk, with the size and checksum of
each, and renamed into its place. A folder without it was cut off.
"""

import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from goose_lora.errors import FailedWriteError, UserError
from goose_lora.files import _line, _room, _sync, _to_disk, file_sha256

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
FORMAT = 1  # raise it when what a checkpoint carries changes: others are refused
NAME = re.compile(r"checkpoint-(\d+)")

# Settings that the data's order, the optimizer's state or the form of a rollout depend on.
FIXED = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_mini_batches",
    "num_ppo_epochs",
    "num_generations",
)
FIXED += ("train_layers", "advantage_estimator", "critic", "ema_decay", "score_normalization")
FIXED += ("optim", "packing", "train_sampling_strategy", "ignore_data_skip")
# Kept in the optimizer's state, so that a resumed run has the checkpoint's, whatever the settings
# say.
FIXED += ("learning_rate", "value_learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# Settings that another run may have without being another run.
FREE = re.compile(
    r"output_dir|resume_from_checkpoint|run_name|project|max_steps|num_train_epochs|num_rollouts|disable_tqdm|use_cpu|sample_rows|do_.*|report_to"
    r"|(log|logging|save|eval|hub|push|trackio|dataloader|ddp|torch|include)_.*|.*_for_(metrics|best_model)|load_best_model_at_end|early_stopping_.*"
)


# ---- One checkpoint ----


def seal(folder: str | Path, facts: Mapping[str, Any]) -> None:
    """Make ``folder`` a whole checkpoint: all its files on the disk, then the manifest with
    ``facts`` (JSON) about the run that saved it."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    _to_disk(folder)
    entries = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, file_sha256(path)] for path in files
    }
    content = {"format": FORMAT, "saved": time.time(), **facts, "files": entries}
    temporary = folder / f".{MANIFEST}"
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _sync(temporary)
    temporary.replace(folder / MANIFEST)
    _sync(folder)
    _sync(folder.parent)


def problem(folder: str | Path) -> str | None:
    """Why ``folder`` is no whole checkpoint that this version can read; None if it is one."""
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
        form, files = manifest["format"], dict(manifest["files"])
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    if form != FORMAT:
        return f"it has format {form}, and this version reads format {FORMAT}"
    for name, (size, checksum) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if file_sha256(path) != checksum:
            return f"{name} is damaged: its checksum is not the saved one"
    return None


def read(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))


# ---- Those of a run ----


def newest(output_dir: str | Path) -> tuple[Path | None, dict[str, str]]:
    """The whole checkpoint of ``output_dir`` that was saved last, and why those that seem to be
    newer are none, by name."""
    passed: dict[str, str] = {}
    for folder in reversed(_by_age(output_dir)):
        why = problem(folder)
        if why is None:
            return folder, passed
        passed[folder.name] = why
    return None, passed


def resolve(
    wanted: str | bool | None, output_dir: str | Path, facts: Mapping[str, Any], *, says: bool = True
) -> str | None:
    """The checkpoint to go on from: ``wanted`` is a folder; or ``latest`` or True, for the newest
    whole one of ``output_dir``, or none there.

    Args:
        facts: what is known of the run so far, as for ``seal``; what is not in it is not compared.
            Before the model is there, ``adapter`` is what the adapter that trains will be.
        says: whether this process logs which one it is.

    Raises:
        ValueError: the folder is no whole checkpoint, or one of another run.
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
    if wanted in (True, "latest", "true", "True"):
        folder, passed = newest(output_dir)
        for name, why in passed.items():
            say("%s is passed by: %s.", name, why)
        if folder is None:
            say("%s has no whole checkpoint: the run starts from the beginning.", output_dir)
            return None
    else:
        folder = Path(str(wanted))
        why = problem(folder)
        if why is not None:
            raise UserError(
                f"resume_from_checkpoint: {folder} cannot be resumed: {why}. Give another, or latest for the"
                " newest whole one."
            )
    saved = read(folder)
    _refuse_another_run(folder, saved, facts)
    say("going on from %s (step %s).", folder, saved.get("step", "unknown"))
    changed = _differences(saved.get("settings", {}), facts.get("settings", {}))
    changed = {name: values for name, values in changed.items() if not FREE.fullmatch(name)}
    if changed:
        say("settings are not those of the run that saved it, so that it ends otherwise: %s.", _told(changed))
    return str(folder)


def prune(output_dir: str | Path, limit: int | None, keep: Iterable[str | None]) -> None:
    """Delete the oldest checkpoints, those that are not whole before the others, until ``limit``
    are left; the newest and ``keep`` stay."""
    folders = _by_age(output_dir)
    if not limit:
        return
    # Stable: those that were cut off come first
    folders = sorted(folders, key=lambda folder: (folder / MANIFEST).is_file())
    kept = {
        folders[-1].resolve() if folders else None,
        *(Path(folder).resolve() for folder in keep if folder),
    }
    surplus = len(folders) - limit
    for folder in folders:
        if surplus > 0 and folder.resolve() not in kept:
            discard(folder)
            surplus -= 1


def discard(folder: str | Path) -> None:
    """Delete a checkpoint; one that is deleted by half is not whole."""
    (Path(folder) / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def unsaved(folder: Path, error: Exception) -> FailedWriteError:
    """What to say when a checkpoint could not be written; the half of it is removed, since it may
    be what fills the disk."""
    discard(folder)
    last, _ = newest(folder.parent)
    rest = (
        "There is none before it."
        if last is None
        else f"The last whole one is {last}: --resume_from_checkpoint latest goes on from it."
    )
    return FailedWriteError(f"{folder} could not be saved{_room(folder.parent)}: {_line(error)}. {rest}")


def require_writable(output_dir: str | Path) -> None:
    """Raises ValueError where nothing can be written to ``output_dir``; makes the folder."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b"0")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"output_dir: nothing can be written to {output_dir} ({reason}). Give a folder that can, or make"
            " room."
        ) from error


# ---- Small things ----


def _by_age(output_dir: str | Path) -> list[Path]:
    """Folders of checkpoints, the one that was saved last at the end; of those that were cut off,
    none is known to be older than another."""

    def saved(folder: Path) -> tuple[float, int]:
        step = int(NAME.fullmatch(folder.name)[1])  # type: ignore[index]
        try:
            return float(read(folder)["saved"]), step
        except (OSError, ValueError, KeyError, TypeError):
            return float("inf"), step

    return sorted(
        (
            path
            for path in Path(output_dir).glob("checkpoint-*")
            if NAME.fullmatch(path.name) and path.is_dir()
        ),
        key=saved,
    )


def _refuse_another_run(folder: Path, saved: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    differing = _differences(
        saved, {name: value for name, value in facts.items() if name in ("stage", "world_size", "rows")}
    )
    there, here = saved.get("adapters", {}), facts.get("adapters")
    if here is not None and there.keys() != here.keys():
        differing["adapters"] = (", ".join(sorted(there)), ", ".join(sorted(here)))
    for name, own in (here or {"default": facts.get("adapter", {})}).items():
        differing |= {
            f"{what} of the adapter {name}": pair
            for what, pair in _differences(there.get(name, {}), own).items()
        }
    differing |= {
        f"base {what}": pair
        for what, pair in _differences(saved.get("base", {}), facts.get("base", {})).items()
    }
    settings = _differences(saved.get("settings", {}), facts.get("settings", {}))
    differing |= {name: settings[name] for name in FIXED if name in settings}
    if differing:
        raise UserError(
            f"resume_from_checkpoint: {folder} was saved by another run, and cannot be resumed by this one:"
            f" {_told(differing)}. Use the settings of that run, or start anew without"
            " resume_from_checkpoint."
        )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What both have and is not the same."""
    return {name: (there[name], here[name]) for name in here if name in there and there[name] != here[name]}


def _told(differing: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name} is {there} there and {here} here" for name, (there, here) in differing.items())
