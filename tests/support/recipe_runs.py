"""Recipes as tests run them: their modules, their options, and the dataclasses of their
settings."""

import importlib.util
import sys
from pathlib import Path

from goose_lora.data.rows import DataArguments
from goose_lora.models.arguments import ModelArguments
from goose_lora.ppo.config import PPOConfig

ROOT = Path(__file__).resolve().parents[2]


def recipe(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def options(**settings):
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def count_good(prompts, completions, **columns):
    return [float(completion.split().count("good")) for completion in completions]


def settings_of(name):
    """The dataclasses that a recipe's settings are parsed into."""
    from trl import RewardConfig, SFTConfig

    return {
        "sft": lambda: (SFTConfig, ModelArguments, DataArguments, recipe("sft").StartArguments),
        "reward": lambda: (RewardConfig, ModelArguments, recipe("reward").RewardArguments),
        "ppo": lambda: (PPOConfig, ModelArguments, DataArguments, recipe("ppo").RoleArguments),
        "own_loop": lambda: (PPOConfig, ModelArguments, DataArguments, recipe("own_loop").InterviewArguments),
        "evaluate": lambda: (recipe("evaluate").EvaluationArguments, ModelArguments, DataArguments),
        "ppo_in_one_file": lambda: (recipe("ppo_in_one_file").Settings,),
    }[name]()
