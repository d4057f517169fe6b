"""Consoles that are not UTF-8: they lose characters, never a result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONSOLES = {
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "gbk": {"PYTHONIOENCODING": "gbk"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "strict": {"PYTHONIOENCODING": "ascii:strict"},
    "POSIX": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def run(code, folder, **variables):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", code.encode("ascii", "backslashreplace").decode()],
        env=environment,
        cwd=folder,
        capture_output=True,
        timeout=200,
    )


PRINTS = """
from goose_lora import cli
from goose_lora.errors import UserError
def main():
    print("ba 你好 \U0001f9a2 ≤ \\ud800 end")
    raise UserError("Ünï 你好 \\ud800: give another.")
cli.command(main)()
"""


@pytest.mark.parametrize("console", [*CONSOLES, "utf-8"])
def test_what_a_console_cannot_show_is_replaced_and_the_command_goes_on(console, tmp_path):
    done = run(PRINTS, tmp_path, **CONSOLES.get(console, {"PYTHONIOENCODING": "utf-8"}))
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith(b"ba ") and done.stdout.endswith(b" end\n")
    assert b"error: " in done.stderr and b": give another." in done.stderr


def test_a_path_that_the_locale_cannot_name_is_told_with_the_way_out(tmp_path):
    code = """
from goose_lora import ownership
for setting in ("output_dir", "dataset_name"):
    names = {"output_dir": "x", "dataset_name": "y", setting: "Ergebnisse 你好"}
    try:
        ownership.refuse_inputs_inside(names["output_dir"], {"dataset_name": [names["dataset_name"]]})
    except ValueError as error:
        print(error)
"""
    done = run(code, tmp_path, **CONSOLES["POSIX"])
    lines = done.stdout.decode().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["output_dir", "dataset_name"], done.stderr
    assert all("Set PYTHONUTF8=1" in line for line in lines)


@pytest.mark.parametrize("console", ["cp1252", "POSIX"])
def test_rows_are_shown_on_any_console(console, tmp_path):
    rows = '{"prompt": "ba 你好 \U0001f9a2 \\u2028 ≤"}\n' * 3
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    code = "import sys; from goose_lora.cli import main; sys.argv[1:] = {}; main()"
    code = code.format(["data", "rows.jsonl", "--stage", "ppo"])
    done = run(code, tmp_path, **CONSOLES[console])
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-500:]
    assert b"3" in done.stdout
