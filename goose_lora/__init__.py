"""RLHF on one small machine: SFT, reward model and PPO as LoRA adapters on one shared base."""

import importlib
import importlib.metadata
import os
import sys

# Before torch is loaded, whose OpenMP reads it then: on a CPU that other work shares, threads that
# spin while they wait for each other take ten times as long as threads that sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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


def _missing(name: str) -> str:
    """Return what is said of a name that is not here: what it is, where it is TRL's."""
    from goose_lora.ppo.trl_names import IMPORTS

    if name in IMPORTS:
        return f"goose_lora has no {name}: it is TRL's, and here it is {IMPORTS[name]} (docs/migration.md)"
    return f"module 'goose_lora' has no attribute {name!r}; it has {', '.join(_HOMES)}"


def __getattr__(name: str) -> object:
    if name == "__version__":
        try:
            return importlib.metadata.version("goose-lora")
        except importlib.metadata.PackageNotFoundError:
            return "0+not.installed"  # used from a folder
    if name not in _HOMES:
        raise AttributeError(_missing(name))
    return getattr(importlib.import_module(f"goose_lora.{_HOMES[name]}"), name)


class _NamesOfTRL:
    """Answers ``from goose_lora import X``, which drops the text of an AttributeError.

    Python looks for a module of that name next, and an ImportError of a finder has its say.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        package, _, inner = name.rpartition(".")
        if package != __name__:
            return
        from goose_lora.ppo.trl_names import IMPORTS

        # What begins with a capital letter is no module
        if inner[:1].isupper() or inner in IMPORTS:
            raise ImportError(_missing(inner))


sys.meta_path.append(_NamesOfTRL)
