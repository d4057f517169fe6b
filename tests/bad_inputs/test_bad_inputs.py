"""Bad input, a table of cases: each ends in one line that says what is wrong and the way out, with
exit code 2, before the model loads, and leaves the output folder as it was. ``python -m pytest
tests/bad_inputs`` runs them all; the recipes are imported once."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import bad_commands
import bad_data
import bad_kinds
import bad_late
import bad_models
import bad_places
import bad_settings
import bad_web
import pytest
from bad_case import Case, command_line, contents, make_files, place

from goose_lora import cli
from goose_lora.cli import commands
from goose_lora.models import loading
from goose_lora.rewards.classifier import ClassifierReward

ROOT = Path(__file__).resolve().parents[2]
CASES: list[Case] = [
    *bad_settings.CASES,
    *bad_data.CASES,
    *bad_late.CASES,
    *bad_models.CASES,
    *bad_places.CASES,
    *bad_web.CASES,
    *bad_kinds.CASES,
    *bad_commands.CASES,
]
RECIPES = ("sft", "reward", "ppo", "own_loop", "evaluate")
HINT = "(--debug shows where)"


@pytest.fixture(scope="module")
def mains():
    """The recipes' main functions."""
    found = {"goose-lora": commands._main}
    for name in RECIPES:
        spec = importlib.util.spec_from_file_location(f"bad_input_{name}", ROOT / "recipes" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        found[name] = module.main
    return found


@pytest.fixture(scope="module")
def sound_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    make_files(folder)
    return folder


@pytest.fixture
def folder(sound_files, tmp_path, monkeypatch):
    """Sound files to break, a cache of its own for rows, and models that must not load."""

    def loaded(*args, **kwargs):
        raise AssertionError("the model loads")

    monkeypatch.setattr(loading, "_load", loaded)
    monkeypatch.setattr(ClassifierReward, "load", loaded)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    place(sound_files, tmp_path)
    for name, content in bad_settings.FILES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def words(folder, case):
    line = command_line(folder, case)
    return [
        word.format(folder=folder)
        for word in (case.line if "--config" in case.line or case.recipe == "goose-lora" else line)
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_ends_in_one_line_with_the_way_out_before_the_model_loads(
    case, folder, mains, monkeypatch, capsys
):
    line = words(folder, case)
    before = contents(folder / "output")
    monkeypatch.setattr(sys, "argv", [f"{case.recipe}.py", *line])
    with pytest.raises(SystemExit) as end:
        cli.command(mains[case.recipe])()
    printed = capsys.readouterr()
    assert end.value.code == 2
    errors = [text for text in printed.err.splitlines() if text.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in printed.err and printed.err.splitlines()[-1] == HINT
    place_in_line = 0
    for part in case.says:
        assert part in errors[0][place_in_line:], f"{part!r} is not in its place in: {errors[0]}"
        place_in_line = errors[0].index(part, place_in_line) + len(part)
    assert len(errors[0]) < 700, f"not one clear line: {errors[0]}"
    assert contents(folder / "output") == before


def test_a_template_given_for_fine_tuning_stands_in_for_the_tokenizers(folder, mains, monkeypatch):
    change = next(case.change for case in CASES if case.name == "messages without a template")
    (folder / "own.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    case = Case(
        "", "sft", lambda folder: {**change(folder), "chat_template_path": str(folder / "own.jinja")}, ()
    )
    monkeypatch.setattr(sys, "argv", ["sft.py", *words(folder, case)])
    with pytest.raises(AssertionError, match="the model loads"):
        mains["sft"]()


def test_debug_shows_the_traceback_too(folder, mains, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["ppo.py", *words(folder, Case("", "ppo", {"kl_coef": -1.0}, ())), "--debug"]
    )
    with pytest.raises(SystemExit) as end:
        cli.command(mains["ppo"])()
    printed = capsys.readouterr().err
    assert (
        end.value.code == 2
        and "Traceback" in printed
        and "error: kl_coef=-1.0" in printed
        and HINT not in printed
    )


def test_a_process_of_its_own_ends_alike(folder):
    line = words(folder, next(case for case in CASES if case.name == "a reward adapter that is a pickle"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "evaluate.py"), *line],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.fullmatch(r"device: [^\n]*\n", done.stdout), "what it would compute on, and no more"
    error, hint = done.stderr.splitlines()[-2:]
    assert (
        error.startswith("error: reward_adapter: ")
        and "a pickle, which can run code" in error
        and hint == HINT
    )
    assert contents(folder / "output") == {"precious.txt": b"kept"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_sound_settings_get_as_far_as_the_model(recipe, folder, mains, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *words(folder, Case("", recipe, {}, ()))])
    with pytest.raises(AssertionError, match="the model loads"):
        mains[recipe]()


def test_there_are_many_cases_and_each_has_a_name_of_its_own():
    assert len(CASES) >= 450
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.says for case in CASES)
