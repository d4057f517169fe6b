"""The parts of a checkpoint: whether each is there, and can be what it says.

A checksum tells that a file is as it was saved. These checks tell of one that was sealed though
something in it was missing or changed.
"""

import random
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from goose_lora.files import brief, is_number, read_json_object

_STATE, _OPTIMIZER, _SCHEDULE = "trainer_state.json", "optimizer.pt", "scheduler.pt"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# Files that a loader may take in place of the run's own.
_LOADED = (".bin", ".pt", ".pth", ".safetensors", ".pkl")


def why_unusable(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """Return what of a whole checkpoint is missing, too much or absurd; None if a run can go on.

    One whose manifest names no adapters has no parts that are known.
    """
    # All that a run needs is there, and nothing that a loader could take in its place
    if "adapters" not in manifest:
        return None
    files = manifest["files"]
    parts = _parts(manifest)
    missing = [name for name in parts if name not in files]
    if missing:
        return f"{missing[0]} is missing, without which a run does not go on as it was"
    for path in sorted(folder.rglob("*")):
        # One that was sealed with the rest is no better
        name = path.relative_to(folder).as_posix()
        if path.suffix in _LOADED and name not in (*parts, "scaler.pt"):
            return f"it has {name}, which no run writes there: delete that file if it is yours"
    checks = (_wrong_state, _wrong_optimizer, _wrong_schedule, _wrong_random_state, _wrong_adapters)
    return next((why for check in checks if (why := check(folder, manifest)) is not None), None)


def _parts(manifest: Mapping[str, Any]) -> list[str]:
    """Return the names of the files that a run needs to go on exactly."""
    roles = [name for name in manifest["adapters"] if name != "default"]
    adapters = [*_ADAPTER, *(f"{role}/{name}" for role in roles for name in _ADAPTER)]
    return [_STATE, _OPTIMIZER, _SCHEDULE, *_random_states(manifest), *adapters]


def _random_states(manifest: Mapping[str, Any]) -> list[str]:
    processes = manifest.get("world_size", 1)
    if processes == 1:
        return ["rng_state.pth"]
    return [f"rng_state_{rank}.pth" for rank in range(processes)]


def _wrong_state(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    try:
        state = read_json_object(folder / _STATE)
    except ValueError as error:
        return str(error)
    # The step is the folder's, and Trainer knows every key
    step, log, epoch = state.get("global_step"), state.get("log_history"), state.get("epoch")
    if step != manifest.get("step", step) or not isinstance(step, int) or step < 0:
        return f"{_STATE} is of step {step!r}, and the checkpoint of step {manifest.get('step')}"
    unknown = sorted(state.keys() - {each.name for each in fields(TrainerState)})
    if unknown:
        return f"{_STATE} has {unknown[0]}, which Trainer does not know"
    # The log and the rest have the kinds that Trainer goes on from
    if not isinstance(log, list) or not all(isinstance(row, dict) for row in log):
        return f"{_STATE}: log_history is no list of rows"
    steps = [row.get("step") for row in log]
    if not all(isinstance(each, int) and 0 <= each <= step for each in steps):
        return f"{_STATE}: log_history has a row that is of no step up to {step}"
    if epoch is not None and not (is_number(epoch) and epoch >= 0):
        return f"{_STATE}: epoch is {epoch!r}"
    if not isinstance(state.get("stateful_callbacks", {}), dict | None):
        return f"{_STATE}: stateful_callbacks is no object"
    return None


def _loaded(path: Path) -> Any:
    """Return what a file of torch holds, None where it holds something else or cannot be read."""
    try:
        with safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # pickle, zipfile and torch each raise their own
        return None


def _wrong_optimizer(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    # Groups and state, whatever the optimizer is
    saved = _loaded(folder / _OPTIMIZER)
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        return f"{_OPTIMIZER} holds no state of an optimizer"
    if not isinstance(saved.get("param_groups"), list) or not saved["param_groups"]:
        return f"{_OPTIMIZER} holds no groups of parameters"
    for number, entry in saved["state"].items():
        if not isinstance(entry, dict):
            return f"{_OPTIMIZER}: the state of parameter {number} is no state"
        for name, value in entry.items():
            if isinstance(value, torch.Tensor) and not value.float().isfinite().all():
                return f"{_OPTIMIZER}: {name} of parameter {number} is not finite"
        # Adam's own: it has made no more steps than the run, and squares are not negative
        steps = float(entry.get("step", 0))
        if not 0 <= steps <= manifest.get("step", steps):
            return f"{_OPTIMIZER}: parameter {number} has made {steps:g} steps of {manifest.get('step')}"
        squares = entry.get("exp_avg_sq")
        if isinstance(squares, torch.Tensor) and (squares < 0).any():
            return f"{_OPTIMIZER}: the variance of parameter {number} is negative"
    return None


def _wrong_schedule(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    saved = _loaded(folder / _SCHEDULE)
    last = saved.get("last_epoch") if isinstance(saved, dict) else None
    if not isinstance(last, int) or last < 0:
        return f"{_SCHEDULE} holds no state of a schedule"
    return None


def _wrong_random_state(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    for name in _random_states(manifest):
        saved = _loaded(folder / name)
        # Each generator says itself whether it can go on from this
        try:
            random.Random().setstate(saved["python"])
            np.random.RandomState().set_state(saved["numpy"])
            torch.Generator().set_state(saved["cpu"])
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError, OverflowError) as error:
            return f"{name} holds no random state ({brief(error)})"
    return None


def _wrong_adapters(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    # Weights that are not numbers would be trained on without a word
    for name in _parts(manifest):
        try:
            if name.endswith(_ADAPTER[0]):
                read_json_object(folder / name)
            if not name.endswith(_ADAPTER[1]):
                continue
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (safe_open cannot be iterated)
                    if not file.get_tensor(key).isfinite().all():
                        return f"{name}: {key} is not finite"
        except (SafetensorError, ValueError) as error:
            return f"{name} cannot be read: {brief(error)}"
    return None
