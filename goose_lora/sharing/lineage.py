"""Where an adapter comes from: ``goose_lora.json`` in every output names base, parents, settings,
data, versions and figures.

A parent stands in it with the sha256 of its weights and a copy of its own lineage, so that the
chain can be read where the parent is gone.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import ModelCard, hf_hub_download, try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from goose_lora.files import file_sha256
from goose_lora.models.adapters import WEIGHTS, read_lineage, write_lineage
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.roles import ADAPTERS

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "goose-lora")
SECRET_NAMES = re.compile(r"(hub_token|access_token|api_key|password|secret)s?$")
SECRET_VALUES = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
HIDDEN = "(not recorded)"
_SNAPSHOT = re.compile(
    r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]+)(?P<rest>[/\\].*)?$"
)


def record(
    folder: str | Path,
    stage: str,
    *,
    model: ModelArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    figures: Mapping[str, Any],
    settings: Sequence[Any] = (),
    data: Sequence[Mapping[str, Any]] = (),
    parents: Mapping[str, str | Path | None] | None = None,
    command: str | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Write the lineage of the adapter in ``folder`` and of the roles in folders below it; returns
    the former.

    Args:
        settings: dataclasses; what differs from their defaults is kept, and no secret.
        data: what ``fingerprint`` gave.
        parents: folders of the adapters that the stage started from, by role.
        facts: more to be noted beside it, such as ``append_eos``.
    """
    commit = base_commit(model.model_name_or_path, model.model_revision)
    folder, given = Path(folder), {role: parent for role, parent in (parents or {}).items() if parent}
    lineage: dict[str, Any] = {
        "stage": stage,
        "base": {
            "id": model.model_name_or_path,
            "hub_id": model.base_hub_id,
            "revision": model.model_revision,
            "commit": commit,
            "quantization": model.quantization,
            "dtype": model.dtype,
            "licence": _licence(model.base_hub_id or model.model_name_or_path, commit),
        },
        "sha256": file_sha256(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else None,
        "chat_template_sha256": None if tokenizer is None else template_sha256(tokenizer.chat_template),
        "parents": {role: _parent(parent) for role, parent in given.items()},
        "command": command,
        "settings": changed_settings(model, *settings),
        "data": list(data),
        "figures": dict(figures),
        "hardware": hardware(),
        "versions": versions(),
    }
    write_lineage(folder, **((read_lineage(folder) if stage == "reward" else {}) | lineage | facts))
    for role, name in ADAPTERS.items():
        if role != "policy" and (folder / name / WEIGHTS).is_file():
            came_from = lineage["parents"].get("policy" if role == "reference" else role)
            own = (
                came_from["lineage"]
                if came_from
                else {key: lineage[key] for key in ("stage", "base", "chat_template_sha256", "versions")}
            )
            write_lineage(
                folder / name,
                **(own | read_lineage(folder / name) | {"sha256": file_sha256(folder / name / WEIGHTS)}),
            )
    return lineage | facts


def fingerprint(name: str, split: str | None, rows: Dataset) -> dict[str, Any]:
    """A data set as a stage saw it: name, split, number of rows, the sha256 of the rows as lines of
    JSON with sorted keys, and whether anything in the first row is chat messages."""
    digest = hashlib.sha256()
    chat = any(
        isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]
        for value in rows[0].values()
    )
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return {"name": name, "split": split, "rows": len(rows), "sha256": digest.hexdigest(), "chat": chat}


def changed_settings(*instances: Any) -> dict[str, Any]:
    """The settings of dataclasses that are not their defaults, as JSON values; secrets are left
    out."""
    found = {}
    for instance in instances:
        for field in fields(instance):
            if not field.init or field.name.startswith("_") or SECRET_NAMES.search(field.name):
                continue
            default = _plain(field.default if field.default_factory is MISSING else field.default_factory())
            value = getattr(instance, field.name)
            value = changed_settings(value) if is_dataclass(value) else _plain(value)
            # An unset list may be kept as None or as []
            if value != default and not (value in ([], {}, "", None) and not default):
                found[field.name] = value
    return found


def recorded_command(recipe: str, words: Sequence[str] | None) -> str:
    """The command that ran, with no secret in it: ``words``, or what the process was started
    with."""
    kept = list(sys.argv[1:] if words is None else words)
    for index, word in enumerate(kept):
        name, equals, _ = word.partition("=")
        if name.startswith("-") and SECRET_NAMES.search(name.replace("-", "_")):
            if equals:
                kept[index] = f"{name}={HIDDEN}"
            elif index + 1 < len(kept):
                kept[index + 1] = HIDDEN
    return SECRET_VALUES.sub(HIDDEN, shlex.join([f"recipes/{recipe}.py", *kept]))


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str):
        return SECRET_VALUES.sub(HIDDEN, value)
    if isinstance(value, Mapping):
        return {
            str(key): HIDDEN if SECRET_NAMES.search(str(key)) else _plain(inner)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, (bool, int, float, type(None))) else str(value)


def _parent(folder: str | Path) -> dict[str, Any]:
    path = Path(folder)
    verdict = path / "verdict.json"
    kept = ("accuracy", "accuracy_ci", "n_pairs", "warnings")
    return {
        "name": hub_name(path),
        "sha256": file_sha256(path / WEIGHTS),
        "verdict": (
            {key: json.loads(verdict.read_text(encoding="utf-8")).get(key) for key in kept}
            if verdict.is_file()
            else None
        ),
        "lineage": read_lineage(path),
    }


def hub_name(folder: str | Path) -> str:
    """``folder`` as it was given; user/repo[/folder]@commit where it lies in the Hub's cache."""
    match = _SNAPSHOT.search(str(folder))
    if match is None:
        return str(folder)
    return f"{match['owner']}/{match['name']}{(match['rest'] or '').replace(os.sep, '/')}@{match['commit']}"


def template_sha256(template: Any) -> str | None:
    """Of a chat template, or of several by name; None for none."""
    text = json.dumps(template, sort_keys=True) if isinstance(template, (dict, list)) else template
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def hardware() -> dict[str, Any]:
    """Processor, cores and GPUs of this machine."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"processor": _processor(), "cores": os.cpu_count(), "gpus": gpus}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of Python and of each of ``PACKAGES`` that is installed; this project may be used from a
    folder."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def base_commit(base: str, revision: str | None) -> str | None:
    """Hash of the commit from which a base of the Hub was loaded; None for a folder."""
    path = None if Path(base).exists() else try_to_load_from_cache(base, "config.json", revision=revision)
    match = _SNAPSHOT.search(path) if isinstance(path, str) else None
    return match["commit"] if match else None


def _licence(base: str, commit: str | None) -> str | None:
    """What the base's own card says, where it can be read."""
    try:
        path = (
            Path(base) / "README.md"
            if Path(base).exists()
            else Path(hf_hub_download(base, "README.md", revision=commit))
        )
        licence = ModelCard.load(path).data.get("license")
    except Exception:  # a card is no condition of training, whatever keeps it from being read
        return None
    return licence if isinstance(licence, str) else None
