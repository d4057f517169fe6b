"""What --help shows of a recipe, and the reference of all settings in docs/settings.md.

    PYTHONPATH=tests/support python tests/cli/test_settings_help.py --write

writes that page anew.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_runs import settings_of

from goose_lora.cli import settings_help
from goose_lora.cli.recipes import RECIPES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "settings.md"


def dataclasses_of(recipe):
    return settings_of(recipe.replace("-", "_"))


def page():
    return settings_help.reference({recipe: dataclasses_of(recipe) for recipe in RECIPES})


def test_the_reference_has_all_settings_as_they_are():
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "PYTHONPATH=tests/support python tests/cli/test_settings_help.py --write"
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_setting_stands_once_with_its_default_and_what_it_does(recipe):
    kinds = dataclasses_of(recipe)
    members = [one for group in settings_help.groups(kinds, everything=True).values() for one in group]
    names = [one.name for one in members]
    assert len(names) == len(set(names))
    assert set(names) == {f.name for kind in kinds for f in dataclasses.fields(kind) if f.init}
    own = [
        one
        for title, group in settings_help.groups(kinds).items()
        for one in group
        if title != settings_help.LIBRARIES
    ]
    assert own and all(one.text for one in own), [one.name for one in own if not one.text]


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_is_short_and_help_all_has_all(recipe):
    kinds = dataclasses_of(recipe)
    short, full = (
        settings_help.help_text(kinds, everything=everything, command="goose-lora ppo", page="How to.")
        for everything in (False, True)
    )
    assert short.startswith("How to.") and "goose-lora ppo --help-all lists" in short
    assert short.count("\n") < 200 and max(map(len, short.splitlines())) <= 100
    assert "--output_dir" in short and "--adam_beta1" not in short
    if recipe != "evaluate":
        assert "--adam_beta1" in full and "--help-all" not in full


def test_values_and_defaults_are_written_as_a_user_writes_them():
    found = {one.name: one for group in settings_help.groups(dataclasses_of("ppo")).values() for one in group}
    assert found["quantization"].values == "nf4 | int8 | none" and found["quantization"].default == "nf4"
    assert found["stop_strings"].values == "text ..." and found["stop_strings"].default == "unset"
    assert found["reuse_trunk"].values == "true | false" and found["reuse_trunk"].default == "true"
    assert found["dataset_name"].default == "required"
    assert "max_steps" not in found, "a PPO run is as long as its rollouts"


@pytest.mark.parametrize("option", ["-h", "--help", "--help-all"])
def test_a_recipe_answers_with_exit_code_0(option):
    done = subprocess.run(
        [sys.executable, ROOT / "recipes" / "ppo.py", option], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("Stage 3: PPO.") and ("--adam_beta1" in done.stdout) == (
        option == "--help-all"
    )


if __name__ == "__main__" and "--write" in sys.argv:
    PAGE.write_text(page(), encoding="utf-8")
