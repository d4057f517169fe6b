"""What an adapter is called, what its folder holds, and whose parameters are whose."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig
from torch import nn

logger = logging.getLogger(__name__)

Role = Literal["policy", "value", "reward", "reference", "base"]
ADAPTERS: dict[Role, str] = {"policy": "default", "value": "value", "reward": "reward", "reference": "reference"}
LINEAGE = "goose_lora.json"


def read_lineage(folder: str | Path) -> dict[str, Any]:
    """What this project noted beside an adapter; nothing for an adapter of other origin."""
    path = Path(folder) / LINEAGE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_lineage(folder: str | Path | None, **facts: Any) -> None:
    """Note ``facts`` beside an adapter."""
    path = Path(folder or ".") / LINEAGE
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def adapter_config(folder: str | Path) -> LoraConfig:
    config = LoraConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder}: a {config.peft_type} adapter; the roles of a shared base are LoRA adapters.")
    config.inference_mode = False
    return without_lora_dropout(config, str(folder))


def without_lora_dropout(config: LoraConfig, name: str) -> LoraConfig:
    if config.lora_dropout:
        logger.warning("%s: lora_dropout %g is set to 0 in PPO, where dropout would make the ratios noise.", name, config.lora_dropout)
        config.lora_dropout = 0.0
    return config


def switch_off_dropout(base: nn.Module) -> None:
    """Models keep it as Dropout modules, or as plain numbers such as attention_dropout; GPT-2 and OPT come with 0.1."""
    found = set()
    for module in base.modules():
        for name in ["p"] if isinstance(module, nn.Dropout) else [name for name in vars(module) if "drop" in name]:
            if isinstance(getattr(module, name), float) and getattr(module, name) > 0:
                found.add(getattr(module, name))
                setattr(module, name, 0.0)
    if found:
        logger.warning("the base's own dropout (%s) is set to 0 in PPO.", ", ".join(f"{p:g}" for p in sorted(found)))


def belongs_to(name: str, *adapters: str) -> bool:
    # An embedding's adapter ends in its name: lora_embedding_A.default.
    return any(f".{adapter}." in f"{name}." for adapter in adapters)


def first(keys: Sequence[str]) -> str:
    return f" (such as {keys[0]})" if keys else ""


class Reentrant:
    """Enters a fresh context of ``make`` at each entry: a backward with retain_graph recomputes again."""

    def __init__(self, make: Callable[[], Any]):
        self.make = make
        self.open: list[Any] = []

    def __enter__(self) -> None:
        self.open.append(self.make())
        self.open[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self.open.pop().__exit__(*error)
