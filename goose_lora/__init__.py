"""RLHF on one small machine: SFT, reward model and PPO as LoRA adapters on one shared base."""

import importlib
import importlib.metadata
import os

# Before torch is loaded, whose OpenMP reads it then: on a CPU that other work shares, threads that
# spin while they wait for each other take ten times as long as threads that sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = importlib.metadata.version("goose-lora")

# Loaded when first used, so that `import goose_lora.functional` needs torch alone.
_HOMES = {
    "SharedBase": "models.shared_base",
    "ModelArguments": "models.arguments",
    "load_base": "models.loading",
    "load_tokenizer": "models.loading",
    "lora_config": "models.loading",
    "push": "sharing.hub",
    "run": "cli.notebook",
    "PPOConfig": "ppo.config",
    "PPOTrainer": "ppo.trainer",
    "Agent": "instruct",
    "PairwiseLoss": "instruct",
    "RLHFConfig": "instruct",
    "RLHFTrainer": "instruct",
    "RewardModel": "instruct",
    "create_reference_model": "instruct",
}


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]


def __getattr__(name: str) -> object:
    from goose_lora.ppo.trl_names import IMPORTS

    if name in IMPORTS:
        # ImportError, since "from goose_lora import" drops the text of an AttributeError.
        raise ImportError(
            f"goose_lora has no {name}: it is TRL's, and here it is {IMPORTS[name]} (docs/migration.md)"
        )
    if name not in _HOMES:
        raise AttributeError(f"module 'goose_lora' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(importlib.import_module(f"goose_lora.{_HOMES[name]}"), name)
