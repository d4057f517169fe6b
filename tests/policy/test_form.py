"""The form of the code stays within its limits; ``python tests/policy/form.py`` prints it."""

import form
import pytest

LIMITS = {
    "lines that are too wide": 0,
    "inline if-else per 100 lines": 2,
    "Any in annotations": 80,
    "self annotated": 0,
    "functions over 40 statements": 0,
    "public names with two meanings": 0,
    "names imported by recipes/ppo.py": 16,
    "rooms imported by recipes/ppo.py": 8,
    "statements of its main": 35,
    "parents of PPOTrainer": 2,
}


@pytest.fixture(scope="module")
def figures():
    return form.figures()


@pytest.mark.parametrize("name", LIMITS)
def test_a_figure_of_form_is_within_its_limit(name, figures):
    assert figures[name] <= LIMITS[name]


def test_more_than_a_twentieth_of_the_lines_are_comments(figures):
    assert figures["comment lines in per cent"] > 5


def test_docstrings_begin_with_one_line():
    """A tool that lists functions shows the first line alone."""
    assert form.docstrings_without_a_first_line(form.PACKAGE) == []


def test_the_measures_see_what_they_measure(tmp_path):
    source = tmp_path / "module.py"
    body = "    x = 1 if x else 2  # why\n" * 41 + "    # " + "a" * 120 + "\n"
    source.write_text("from typing import Any\n\n\ndef long(x: Any, y: dict[str, Any]) -> Any:\n" + body)
    assert form.statements(form.parse(source).body[1]) == 41
    assert form.inline_ifs([source]) == 41 and form.comments(source) == 42
    assert form.public_names(source) == {"long"}
    assert len(form.bare_any(form.parse(source))) == 2
