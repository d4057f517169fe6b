"""docs/data.md says of each shape what the code does with it."""

import re

import pytest
import tiny
import yaml
from field_rows import REFUSED, SHAPES
from recipe_runs import ROOT

from goose_lora.data.labelled import PRESETS
from goose_lora.data.rows import DataArguments, load_rows
from goose_lora.data.sources import COMPRESSED, READERS

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
STAGES = {"SFT": "sft", "reward": "reward", "PPO": "ppo"}
TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.split("## Shapes that are")[1].split("\n## ")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| shape")
]


def taken_by(row, path):
    """The stages that read a row."""
    found = set()
    for stage in STAGES.values():
        try:
            found.add(load_rows(tiny.write_rows(path, [row, row]), stage=stage) and stage)
        except ValueError:
            continue
    return found


@pytest.mark.parametrize("line", TABLE, ids=[line[0] for line in TABLE])
def test_each_shape_of_the_table_is_taken_by_the_stages_that_it_names(line, tmp_path):
    shapes, columns, stages = line[:3]
    claimed = {STAGES[name] for name in stages.split(", ")}
    for name in shapes.split(", "):
        rows = [row for title, _, row, _ in SHAPES if name.lower() in title.lower()]
        assert rows, f"no try is named {name}"
        assert any(claimed <= taken_by(row, tmp_path / "rows.jsonl") for row in rows), name
    for column in re.findall(r"`([^`]+)`", columns):
        assert any(column in str(row) for _, _, row, _ in SHAPES), column


def test_all_settings_of_the_page_are_settings():
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    for block in blocks:
        DataArguments(**yaml.safe_load(block))
    assert len(blocks) >= 5


def test_presets_files_and_what_is_not_understood_are_all_named():
    for word in (*PRESETS, *READERS, *COMPRESSED, *(name.partition("'")[0] for name, *_ in REFUSED)):
        assert word in PAGE, word
