"""The parts of a checkpoint: whether each is there, and can be what it says.

A checksum tells that a file is as it was saved. These checks tell of one that was sealed though
something in it was missing or changed.
"""

import random
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from goose_lora.files import brief, is_number, read_json_object
from goose_lora.training.loss_scale import SCALER_FILE

_STATE, _OPTIMIZER, _SCHEDULE = "trainer_state.json", "optimizer.pt", "scheduler.pt"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_LARGEST_COUNT = 2**53
# What a loader may take in place of the run's own: by the ending of its name, or by its name.
_LOADED = (".bin", ".pt", ".pth", ".safetensors", ".pkl", ".index.json", ".distcp")
_SHARDS = re.compile(r"(pytorch_model_fsdp|optimizer|global_step)[^/]*(/.*)?|latest")


def why_unusable(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """Return what of a whole checkpoint is missing, too much or absurd; None if a run can go on."""
    # All that a run needs is there, and nothing that a loader could take in its place
    files = manifest["files"]
    parts = _parts(manifest)
    missing = [name for name in parts if name not in files]
    if missing:
        return f"{missing[0]} is missing, without which a run does not go on as it was"
    shards = _is_sharded(files)
    known = {*parts, SCALER_FILE, *(_ADAPTER if shards else ())}
    for path in sorted(folder.rglob("*")):
        # One that was sealed with the rest is no better
        name = path.relative_to(folder).as_posix()
        own = name in known or (shards and _SHARDS.fullmatch(name) and (name in files or path.is_dir()))
        if not own and (name.endswith(_LOADED) or (path.is_dir() and _SHARDS.fullmatch(name))):
            return f"it has {name}, which no run writes there: delete that file if it is yours"
    checks = (
        _wrong_state,
        _wrong_optimizer,
        _wrong_schedule,
        _wrong_scale,
        _wrong_random_state,
        _wrong_adapters,
    )
    return next((why for check in checks if (why := check(folder, manifest)) is not None), None)


def _is_sharded(files: Collection[str]) -> bool:
    """Return whether FSDP or DeepSpeed has written the optimizer, in files of their own."""
    # accelerate's save_fsdp_optimizer: optimizer.bin, optimizer_0/ with .metadata, or one a process
    whole = {"optimizer.bin", "optimizer_0/.metadata", "optimizer_0_rank0.bin", "latest"}
    return _OPTIMIZER not in files and bool(whole & set(files))


def _parts(manifest: Mapping[str, Any]) -> list[str]:
    """Return the names of the files that a run needs to go on exactly."""
    files = manifest["files"]
    roles = [name for name in manifest["adapters"] if name != "default"]
    adapters = [*_ADAPTER, *(f"{role}/{name}" for role in roles for name in _ADAPTER)]
    random_states = _random_states(manifest)
    # A run in float16 goes on at the scale of its loss
    scale = [SCALER_FILE] if manifest.get("base", {}).get("dtype") == "float16" else []
    if not _is_sharded(files):
        return [_STATE, _OPTIMIZER, _SCHEDULE, *scale, *random_states, *adapters]
    # Shards: one of the optimizer and the random state of each process; a scheduler that is not
    # DeepSpeed's own; weights in shards too, or whole
    parts = [_STATE, *random_states]
    if "latest" not in files:
        parts.append(_SCHEDULE)
    for pattern in ("optimizer_0/__{}_0.distcp", "optimizer_0_rank{}.bin"):
        if any(re.fullmatch(pattern.replace("{}", r"\d+"), name) for name in files):
            parts += [pattern.format(rank) for rank in range(manifest["world_size"])]
    if not any(_SHARDS.fullmatch(name) and "optimizer" not in name for name in files):
        parts += adapters
    return parts


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
    return _wrong_counts(state)


def _wrong_counts(state: Mapping[str, Any]) -> str | None:
    """Return what among the other facts of a state is not of its kind, by Trainer's annotations."""
    hints = get_type_hints(TrainerState)
    for name in state.keys() & hints.keys() - {"log_history", "stateful_callbacks", "trial_params"}:
        value, kinds = state[name], get_args(hints[name]) or (hints[name],)
        if value is None:
            continue
        # Counts are not negative; what is best may be any number, and was NaN if that was all
        fits = isinstance(value, bool) if bool in kinds else isinstance(value, str)
        if int in kinds or float in kinds:
            # Some counts are whole numbers that are kept as fractions
            fits = is_number(value) and value >= 0 and (float in kinds or value == int(value))
        if name == "best_metric":
            fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or (isinstance(value, int) and value > _LARGEST_COUNT):
            return f"{_STATE}: {name} is {value!r}"
    return None


def _loaded(path: Path) -> Any:
    """Return what a file of torch holds, None where it holds something else or cannot be read."""
    try:
        with safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # pickle, zipfile and torch each raise their own
        return None


def _wrong_optimizer(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    if _is_sharded(manifest["files"]):
        return None  # shards are put together by who wrote them
    # Groups and state, whatever the optimizer is
    saved = _loaded(folder / _OPTIMIZER)
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        return f"{_OPTIMIZER} holds no state of an optimizer"
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or not groups:
        return f"{_OPTIMIZER} holds no groups of parameters"
    known: set[object] = set()
    for group in groups:
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            return f"{_OPTIMIZER} holds no groups of parameters"
        known |= set(group["params"])
        rate = group.get("lr", 0.0)
        if not isinstance(rate, torch.Tensor) and not (is_number(rate) and rate >= 0):
            return f"{_OPTIMIZER}: a learning rate is {rate!r}"
    for number, entry in saved["state"].items():
        if number not in known:
            return f"{_OPTIMIZER} has a state of parameter {number}, which is in no group"
        why = _wrong_entry(number, entry, manifest["step"])
        if why is not None:
            return f"{_OPTIMIZER}: {why}"
    return _wrong_shapes(folder, manifest, saved["state"])


def _wrong_entry(number: object, entry: object, run_steps: int) -> str | None:
    """Return what in the state of one parameter cannot be."""
    if not isinstance(entry, dict):
        return f"the state of parameter {number} is no state"
    for name, value in entry.items():
        if isinstance(value, torch.Tensor) and not value.float().isfinite().all():
            return f"{name} of parameter {number} is not finite"
    # Adam's own: it has made no more steps than the run, and squares are not negative
    steps = entry.get("step", 0)
    if not (isinstance(steps, torch.Tensor) and steps.numel() == 1) and not is_number(steps):
        return f"parameter {number} has made {steps!r} steps"
    if not 0 <= float(steps) <= run_steps:
        return f"parameter {number} has made {float(steps):g} steps of {run_steps}"
    squares = entry.get("exp_avg_sq")
    if isinstance(squares, torch.Tensor) and (squares < 0).any():
        return f"the variance of parameter {number} is negative"
    return None


def _wrong_shapes(folder: Path, manifest: Mapping[str, Any], state: Mapping[Any, Any]) -> str | None:
    """Return which average of Adam has a shape that no tensor of the adapters has."""
    # torch compares none: another run's averages would fail late, or spread over the wrong tensor
    shapes: Counter[tuple[int, ...]] = Counter()
    for name in _parts(manifest):
        if not name.endswith(_ADAPTER[1]):
            continue
        try:
            with safe_open(folder / name, framework="pt") as file:
                shapes.update(tuple(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
        except SafetensorError:
            return None  # the check of adapters says so
    for number, entry in state.items():
        average = entry.get("exp_avg")
        if isinstance(average, torch.Tensor):
            shapes[tuple(average.shape)] -= 1
            if shapes[tuple(average.shape)] < 0:
                return f"{_OPTIMIZER}: parameter {number} is {list(average.shape)}, as none of the adapters"
    return None


def _wrong_schedule(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    if _SCHEDULE not in _parts(manifest):
        return None
    saved = _loaded(folder / _SCHEDULE)
    last = saved.get("last_epoch") if isinstance(saved, dict) else None
    if not isinstance(last, int) or last < 0:
        return f"{_SCHEDULE} holds no state of a schedule"
    # accelerate moves it once a process
    most = manifest["step"] * max(1, manifest["world_size"])
    if last > most:
        return f"{_SCHEDULE} is at {last}, and the run has made {manifest['step']} steps"
    return None


def _wrong_scale(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    if SCALER_FILE not in manifest["files"]:
        return None
    # What GradScaler goes on from: how large, how it moves, and steps since it was moved
    saved = _loaded(folder / SCALER_FILE)
    if not isinstance(saved, dict):
        return f"{SCALER_FILE} holds no scale of a loss"
    for name in ("scale", "growth_factor", "backoff_factor", "growth_interval"):
        if not (is_number(saved.get(name)) and saved[name] > 0):
            return f"{SCALER_FILE}: {name} is {saved.get(name)!r}"
    if saved["backoff_factor"] >= 1 or saved["growth_factor"] <= 1:
        return f"{SCALER_FILE}: a scale that overflowed would not become smaller, or none ever larger"
    steps = saved.get("_growth_tracker")
    if not isinstance(steps, int) or not 0 <= steps <= manifest["step"]:
        return f"{SCALER_FILE}: its scale is {steps!r} steps old, and the run has made {manifest['step']}"
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
