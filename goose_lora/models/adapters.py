"""What an adapter is called, what its folder holds, and whose parameters are whose."""

import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn

from goose_lora.errors import UserError
from goose_lora.files import read_json_object
from goose_lora.models.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_lineage,
    read_adapter_config,
    reading,
    tensor_shapes,
)
from goose_lora.models.roles import ADAPTERS, Role, belongs_to

logger = logging.getLogger(__name__)

LINEAGE = "goose_lora.json"
CONFIG, WEIGHTS = ADAPTER_CONFIG, ADAPTER_WEIGHTS

_HUB_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(?:/(?P<folder>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")
_READ_BESIDE = (LINEAGE, "verdict.json", "chat_template.jinja", "tokenizer_config.json")


def local_folder(name: str | Path) -> Path:
    """The folder ``name``; or the adapter user/repo[/folder][@revision] of the Hub, all its files
    of one commit, in the Hub's cache.

    A name without a revision, whose parent is a folder here, is a folder that is missing, not one
    of the Hub.

    Raises:
        ValueError: neither a folder nor an adapter that can be had from the Hub.
    """
    match = _HUB_NAME.fullmatch(str(name))
    if Path(name).exists() or match is None or (match["revision"] is None and Path(name).parent.is_dir()):
        return Path(name)
    place: dict[str, Any] = {"repo_id": match["repo"], "subfolder": match["folder"]}
    try:
        config = Path(hf_hub_download(**place, filename=CONFIG, revision=match["revision"]))
        # What a branch points to may change in between
        place["revision"] = config.parts[config.parts.index("snapshots") + 1]
        hf_hub_download(**place, filename=WEIGHTS)
    # The Hub's client raises its own errors, the file system's, and those of its HTTP library
    except Exception as error:
        raise UserError(
            f"{name} is no folder here, and could not be had from the Hub"
            f" ({str(error).strip().splitlines()[0]}). Give the output_dir of the stage that trains it, run"
            " to its end, or an adapter of the Hub as user/repo, user/repo/folder or user/repo@revision."
        ) from error
    for filename in _READ_BESIDE:
        try:
            hf_hub_download(**place, filename=filename)
        except EntryNotFoundError:
            continue
    return config.parent


def read_lineage(folder: str | Path) -> dict[str, Any]:
    """What this project noted beside an adapter; nothing for an adapter of other origin. Raises
    ValueError for a damaged file."""
    path = Path(folder) / LINEAGE
    return check_lineage(path, read_json_object(path)) if path.is_file() else {}


def write_lineage(folder: str | Path | None, **facts: Any) -> None:
    """Note ``facts`` beside an adapter."""
    path = Path(folder or ".") / LINEAGE
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def load_weights(model: Any, role: Role, folder: str | Path) -> None:
    """Weights of a saved adapter, and its head if the role has one, into ``role`` of a PeftModel;
    raises as ``SharedBase.load_role``."""
    read_adapter_config(role, str(folder))
    tensor_shapes(Path(folder) / ADAPTER_WEIGHTS)
    weights = load_peft_weights(str(folder), device="cpu")
    if role in ("value", "reward") and not any(key.endswith("score.weight") for key in weights):
        raise UserError(
            f"{folder} has no score head (looked for a tensor named *score.weight among {len(weights)}), so"
            f" it cannot be a {role} model. Train it with recipes/reward.py, or with trl.RewardTrainer and"
            " LoraConfig(task_type='SEQ_CLS')."
        )
    try:
        result = set_peft_model_state_dict(model, weights, adapter_name=ADAPTERS[role])
    except RuntimeError as error:  # torch lists the tensors of another size, one a line
        sizes = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        raise UserError(
            f"{folder} does not fit the role {role} on this base: {len(sizes)} tensors of another"
            f" size{first(sizes)}. Use an adapter that was trained on this base model."
        ) from error
    wanted = [key for key in result.missing_keys if belongs_to(key, ADAPTERS[role])]
    if result.unexpected_keys or wanted:
        raise UserError(
            f"{folder} does not fit the role {role} on this base: {len(wanted)} tensors"
            f" missing{first(wanted)}, {len(result.unexpected_keys)} not"
            f" known{first(result.unexpected_keys)}. Use an adapter that was trained on this base model."
        )


def adapter_config(folder: str | Path) -> LoraConfig:
    read_adapter_config("an adapter", str(folder))
    with reading("adapter_config.json", str(folder)):
        config: Any = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    return without_lora_dropout(config, str(folder))


def without_lora_dropout(config: LoraConfig, name: str) -> LoraConfig:
    if config.lora_dropout:
        logger.warning(
            "%s: lora_dropout %g is set to 0 in PPO, where dropout would make the ratios noise.",
            name,
            config.lora_dropout,
        )
        config.lora_dropout = 0.0
    return config


def switch_off_dropout(base: nn.Module) -> None:
    """Models keep it as Dropout modules, or as plain numbers such as attention_dropout; GPT-2 and
    OPT come with 0.1."""
    found = set()
    for module in base.modules():
        for name in (
            ["p"] if isinstance(module, nn.Dropout) else [name for name in vars(module) if "drop" in name]
        ):
            if isinstance(getattr(module, name), float) and getattr(module, name) > 0:
                found.add(getattr(module, name))
                setattr(module, name, 0.0)
    if found:
        logger.warning(
            "the base's own dropout (%s) is set to 0 in PPO.", ", ".join(f"{p:g}" for p in sorted(found))
        )


def first(keys: Sequence[str]) -> str:
    return f" (such as {keys[0]})" if keys else ""


class Reentrant:
    """Enters a fresh context of ``make`` at each entry: a backward with retain_graph recomputes
    again."""

    def __init__(self, make: Callable[[], Any]):
        self.make = make
        self.open: list[Any] = []

    def __enter__(self) -> None:
        self.open.append(self.make())
        self.open[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self.open.pop().__exit__(*error)
