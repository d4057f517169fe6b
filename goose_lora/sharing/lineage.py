"""Where an adapter comes from: ``goose_lora.json`` in every output.

It names base, parents, settings, data, versions and figures. A parent stands in it with the sha256
of its weights and a copy of its own lineage, so that the chain can be read when the parent is gone.
"""

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import ModelCard, hf_hub_download, try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from goose_lora.files import file_sha256, read_json
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.dates import template_date
from goose_lora.models.endings import ends_with_sources
from goose_lora.models.ensembles import read_ensemble
from goose_lora.models.folders import ADAPTER_WEIGHTS, by_name, read_lineage, write_lineage
from goose_lora.models.identity import HUB_SNAPSHOT, base_content
from goose_lora.models.roles import ADAPTERS
from goose_lora.redaction import HIDDEN, is_secret, redacted, without_secrets
from goose_lora.reporting.run_files import (
    BaseRecord,
    DataRecord,
    HardwareRecord,
    Lineage,
    ParentRecord,
    VerdictFile,
    lineage_of,
)
from goose_lora.training.signals import STARTED_BY
from goose_lora.training.versions import versions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# What a child copies of its reward model's verdict: the rest is calibration and probes.
_VERDICT_KEYS = ("accuracy", "accuracy_ci", "n_pairs", "warnings")


# ---- Writing ----


def record(
    folder: str | Path,
    stage: str,
    *,
    model: ModelArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    figures: Mapping[str, Any],
    settings: Sequence["DataclassInstance"] = (),
    data: Sequence[Mapping[str, Any]] = (),
    parents: Mapping[str, str | Path | None] | None = None,
    command: str | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Write the lineage of the adapter in ``folder`` and of the roles below it; return the former.

    Args:
        settings: dataclasses; what differs from their defaults is kept, and no secret.
        data: fingerprints of the data sets.
        parents: folders of the adapters that the stage started from, by role.
        facts: more to be noted beside it, such as ``append_eos``.
    """
    # What is the same for the result and for all roles below it
    folder = Path(folder)
    given = {role: parent for role, parent in (parents or {}).items() if parent}
    template = tokenizer.chat_template if tokenizer is not None else None
    lineage: Lineage = {
        "stage": stage,
        "base": _base_record(model),
        "sha256": _weights_sha256(folder),
        "chat_template_sha256": template_sha256(template),
        "reply_ends": _reply_ends(tokenizer, settings),
        "parents": {role: _parent_record(parent) for role, parent in given.items()},
        "command": command,
        "settings": changed_settings(model, *settings),
        "data": [cast(DataRecord, row) for row in data],
        "figures": dict(figures),
        "hardware": hardware(),
        "versions": versions(),
    }
    if tokenizer is not None and (day := template_date(tokenizer)) is not None:
        lineage["template_date"] = day
    # A reward model's folder has its bias and its ending already
    before = read_lineage(folder) if stage == "reward" else {}
    write_lineage(folder, **(before | lineage | facts))
    _record_roles(folder, lineage)
    return {**lineage, **facts}


def _reply_ends(
    tokenizer: PreTrainedTokenizerBase | None, settings: Sequence["DataclassInstance"]
) -> dict[str, int]:
    """Return the tokens at which the stage ended replies, or was trained to end them."""
    if tokenizer is None:
        return {}
    stops = [vars(instance).get("stop_token_ids") for instance in settings]
    also = [number for numbers in stops for number in numbers or []]
    return {end.token: end.id for end in ends_with_sources(tokenizer, also)}


def _record_roles(folder: Path, lineage: Lineage) -> None:
    """Write the lineages of the roles below ``folder``: of their parent, or of the stage itself.

    A frozen reference has the policy's parent. What a role's folder says already stays.
    """
    for role, name in ADAPTERS.items():
        sha256 = _weights_sha256(folder / name)
        if role == "policy" or sha256 is None:
            continue
        # A critic that was trained here has no parent
        source = "policy" if role == "reference" else role.partition("_")[0]
        parent = lineage["parents"].get(source)
        if parent:
            own = dict(parent["lineage"])
        else:
            own = {
                key: lineage[key]
                for key in ("stage", "base", "chat_template_sha256", "reply_ends", "versions")
            }
        write_lineage(folder / name, **(own | read_lineage(folder / name) | {"sha256": sha256}))


def _base_record(model: ModelArguments) -> BaseRecord:
    commit = base_commit(model.model_name_or_path, model.model_revision)
    return {
        "id": model.model_name_or_path,
        "hub_id": model.base_hub_id,
        "revision": model.model_revision,
        "commit": commit,
        "content": base_content(model.model_name_or_path, model.model_revision),
        "quantization": model.quantization,
        "dtype": model.dtype,
        "licence": _licence(model.base_hub_id or model.model_name_or_path, commit),
    }


def _weights_sha256(folder: Path) -> str | None:
    """Return the sha256 of an adapter's weights, None for merged weights or an empty folder."""
    path = folder / ADAPTER_WEIGHTS
    return file_sha256(path) if path.is_file() else None


def _parent_record(folder: str | Path) -> ParentRecord:
    path = Path(folder)
    verdict: VerdictFile | None = None
    if (path / "verdict.json").is_file():
        said = read_json(path / "verdict.json")
        verdict = cast(VerdictFile, {key: said.get(key) for key in _VERDICT_KEYS})
    record: ParentRecord = {
        "name": hub_name(path),
        "sha256": file_sha256(path / ADAPTER_WEIGHTS),
        "verdict": verdict,
        "lineage": lineage_of(path),
    }
    if (ensemble := read_ensemble(path)) is not None:
        record["members"] = [member.sha256 for member in ensemble.members]
    return record


# ---- Settings and command, without secrets ----


def changed_settings(*instances: "DataclassInstance") -> dict[str, Any]:
    """Return the settings of dataclasses that are not their defaults, as JSON values.

    Secrets are left out.
    """
    found = {}
    for instance in instances:
        # Private fields and those that nobody can give are no settings
        for field in fields(instance):
            if not field.init or field.name.startswith("_") or is_secret(field.name):
                continue
            default = field.default
            if field.default_factory is not MISSING:
                default = field.default_factory()
            default = _plain(default)
            value = getattr(instance, field.name)
            if is_dataclass(value) and not isinstance(value, type):
                value = changed_settings(value)
            else:
                value = _plain(value)
            # An unset list may be kept as None or as []
            both_unset = value in ([], {}, "", None) and not default
            if value != default and not both_unset:
                found[field.name] = value
    return found


def recorded_command(recipe: str, words: Sequence[str] | None) -> str:
    """Return the command that ran, with no secret in it.

    It is made of ``words``, or of what the process was started with.
    """
    asked = os.environ.get(STARTED_BY, "")
    if asked.endswith(")"):
        return asked  # a call from Python, whose words are a file that is gone
    kept, started = list(words or []), [f"recipes/{recipe}.py"]
    if words is None:
        kept = sys.argv[1:]
        started = shlex.split(asked) or started
    return redacted(shlex.join([*started, *without_secrets(kept)]))


def _plain(value: object) -> object:
    """Return a setting as a value of JSON, with no secret in it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        plain = {}
        for key, inner in value.items():
            plain[str(key)] = HIDDEN if is_secret(key) else _plain(inner)
        return plain
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (bool, int, float, type(None))):
        return value
    return redacted(str(value))


# ---- Names and hashes ----


def hub_name(folder: str | Path) -> str:
    """Return ``folder`` as it is, or user/repo[/folder]@commit if it lies in the Hub's cache."""
    match = HUB_SNAPSHOT.search(str(folder))
    if match is None:
        return str(folder)
    inside = (match["rest"] or "").replace(os.sep, "/")
    repository = "/".join(part for part in (match["owner"], match["name"]) if part)
    return f"{repository}{inside}@{match['commit']}"


def template_sha256(template: str | list[Any] | dict[str, Any] | None) -> str | None:
    """Return the sha256 of a chat template, or of several by name; None if there is none."""
    if template is None:
        return None
    text = template if isinstance(template, str) else json.dumps(by_name(template), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def base_commit(base: str, revision: str | None) -> str | None:
    """Return the commit from which a base of the Hub was loaded, None for any other folder."""
    if Path(base).exists():
        inside = HUB_SNAPSHOT.search(str(Path(base).resolve()))
        return inside["commit"] if inside else None
    # The cache knows which commit a branch or tag was
    path = try_to_load_from_cache(base, "config.json", revision=revision)
    match = HUB_SNAPSHOT.search(path) if isinstance(path, str) else None
    return match["commit"] if match else None


def _licence(base: str, commit: str | None) -> str | None:
    """Return the licence that the base's own card names, None if it cannot be read."""
    try:
        path = Path(base) / "README.md"
        if not Path(base).exists():
            path = hf_hub_download(base, "README.md", revision=commit)
        licence = ModelCard.load(path).data.get("license")
    except Exception:  # a card is no condition of training, whatever keeps it from being read
        return None
    return licence if isinstance(licence, str) else None


# ---- The machine and its software ----


def hardware() -> HardwareRecord:
    """Return processor, cores and GPUs of this machine."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"processor": _processor(), "cores": os.cpu_count(), "gpus": gpus}


def _processor() -> str:
    # Linux alone has this file, and platform.processor() is empty or "x86_64" there
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
