"""docs/pitfalls.md and the other pages name tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")
PAGES = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
NAMED = sorted(set(re.findall(r"`((?:\w+/)?test_\w+\.py)::(\w+)`", PAGES)))
ROWS = [
    line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| trap", "| pain"))
]


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_each_test_that_a_page_names_exists(file):
    source = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    there = {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
    missing = [name for named, name in NAMED if named == file and name not in there]
    assert missing == [], f"tests/{file} has no such test: rename it in docs/"


def test_each_pitfall_has_tests_or_says_that_it_has_none():
    assert len(ROWS) == 17 + 21
    for row in ROWS:
        assert re.search(r"`(?:\w+/)?test_\w+\.py::test_\w+`", row) or "none yet" in row, row


def test_every_test_on_the_page_was_read_by_this_one():
    assert len(re.findall(r"::test_", PAGE)) == len(re.findall(r"`(?:\w+/)?test_\w+\.py::\w+`", PAGE)) >= 100
