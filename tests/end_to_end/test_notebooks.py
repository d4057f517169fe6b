"""The notebooks of recipes/notebooks run from top to bottom, on the tiny base."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tiny
from peft import PeftModel
from recipe_runs import ROOT
from transformers import AutoModelForCausalLM

NOTEBOOKS = sorted((ROOT / "recipes" / "notebooks").glob("*.ipynb"))


def code_of(notebook):
    """The code cells of a notebook, each as text."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture
def shown(monkeypatch):
    """What a notebook displays: files of pictures."""
    shown = []
    display = ModuleType("IPython.display")
    display.Image = lambda filename: Path(filename)
    display.display = shown.append
    ipython = ModuleType("IPython")
    ipython.version_info = (9, 0)  # matplotlib asks for it
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def run_cells(cells):
    """Run cells in one name space, as a notebook does; return it."""
    names = {"__name__": "__main__"}
    for cell in cells:
        if cell.startswith("%%writefile "):
            magic, _, text = cell.partition("\n")
            Path(magic.split()[1]).write_text(text, encoding="utf-8")
            continue
        lines = [line for line in cell.splitlines() if not line.startswith("%pip ")]
        exec(compile("\n".join(lines), "cell", "exec"), names)
    return names


def test_there_are_notebooks_and_none_has_outputs():
    assert [path.stem for path in NOTEBOOKS] == ["label_and_train", "own_rewards", "quickstart"]
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert len(cells) <= 15 and not any(cell.get("outputs") for cell in cells)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_leaves_an_adapter_that_learned(notebook, shown, tmp_path, monkeypatch):
    base = tiny.save_base(tmp_path / "base", hidden_size=66, head_dim=22, intermediate_size=64)
    monkeypatch.setattr("goose_lora.embedded.model_folder", lambda: Path(base))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    run_cells([cell.replace('"top-10"', '"all"') for cell in code_of(notebook)])
    assert shown and all(path.name == "curves.png" and path.is_file() for path in shown)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "runs" / "ppo")
    assert any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)
