"""Each setting of each recipe with values of wrong types and absurd sizes: it is taken, or refused
in one line that names it. Nothing else is raised, and nothing is loaded. The settings are those of
the dataclasses, so that a new one is tried as it comes. ``--full`` tries every value on each."""

import hashlib
import importlib.util
import os
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from bad_case import make_files, place, sound
from trl import RewardConfig, SFTConfig

from goose_lora import cli
from goose_lora.data.rows import DataArguments
from goose_lora.errors import UserError
from goose_lora.models.arguments import ModelArguments
from goose_lora.ppo.config import PPOConfig

ROOT = Path(__file__).resolve().parents[2]
# In a file of settings
NUMBERS = [0, 1, -1, 10**6, 2**31, 2**63, 10**400, -(2**40), 0.5, 1.5, -1e-4, 1e-300, 1e300]
NUMBERS += [float("nan"), float("inf"), -float("inf")]
TEXTS = ["", " ", "nope", "none", "no", "a\0b", "\u2212 1", "-1", "1e999", "../..", "/dev/null"]
TEXTS += ["\x1b[31m\r\u202e", "x" * 5000, '{"a": 1}', "[1]", "auto"]
LISTS = [[], [None], [0], [-1], [1.5], ["x"], [""], [[1]], [{}], ["a=b"]]
MAPPINGS = [{}, {"a": 1}, {"": None}, {1: 2}, {"a": {"b": [1]}}]
VALUES = [None, True, False, *NUMBERS, *TEXTS, *LISTS, *MAPPINGS]
# On the command line
WORDS = ["", "0", "-1", "1.5", "nan", "inf", "-inf", "1e999", "nope", "{}", "[1]", "\u2212 1", "a\udcffb"]
SHARE = 100  # without --full, one of so many


def dataclasses_of(recipe):
    spec = importlib.util.spec_from_file_location(f"any_{recipe}", ROOT / "recipes" / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return {
        "sft": lambda: (SFTConfig, ModelArguments, DataArguments),
        "reward": lambda: (RewardConfig, ModelArguments, module.RewardArguments),
        "ppo": lambda: (PPOConfig, ModelArguments, DataArguments, module.RoleArguments),
        "own_loop": lambda: (PPOConfig, ModelArguments, DataArguments, module.InterviewArguments),
        "evaluate": lambda: (module.EvaluationArguments, ModelArguments, DataArguments),
    }[recipe]()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    source, folder = tmp_path_factory.mktemp("sound"), tmp_path_factory.mktemp("any")
    make_files(source)
    place(source, folder)
    return folder


@pytest.fixture(autouse=True)
def environment(files, monkeypatch):
    """What a setting does to the process concerns no other test."""
    before = dict(os.environ)
    monkeypatch.chdir(files)
    yield
    os.environ.clear()
    os.environ.update(before)


def tries(recipe, full):
    """Every setting with every value, or a share of them that is always the same."""
    for field in (field for kind in dataclasses_of(recipe) for field in fields(kind) if field.init):
        for value, on_the_line in [*((v, False) for v in VALUES), *((w, True) for w in WORDS)]:
            drawn = hashlib.sha256(f"{recipe} {field.name} {value!r} {on_the_line}".encode()).digest()
            if full or int.from_bytes(drawn[:2]) % SHARE == 0:
                yield field.name, value, on_the_line


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo", "own_loop", "evaluate"])
def test_any_value_of_any_setting_is_taken_or_refused_by_its_name(recipe, files, request):
    kinds, said = dataclasses_of(recipe), []
    for name, value, on_the_line in tries(recipe, request.config.option.full):
        settings = sound(files, recipe) | ({} if on_the_line else {name: value})
        (files / "any.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True))
        words = ["--config", str(files / "any.yaml"), *([f"--{name}", value] if on_the_line else [])]
        try:
            cli.parse(*kinds, args=words)
        except UserError as error:
            line = str(error)
            other_name = name.replace("activation_checkpointing", "gradient_checkpointing")
            other_name = other_name if other_name != name else f"activation{name.removeprefix('gradient')}"
            if name not in line and other_name not in line:
                said.append(f"{name}={value!r:.40} is not named: {line[:150]}")
        except Exception as error:
            said.append(f"{name}={value!r:.40}: {type(error).__name__}: {str(error)[:150]}")
        os.fstat(1)  # a number that is taken for a file closes none of ours
    assert said == [], "\n".join(said)
