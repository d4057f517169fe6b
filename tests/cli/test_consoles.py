"""Consoles that are not UTF-8: they lose characters, never a result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from goose_lora.cli.consoles import for_console

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
from goose_lora.cli.process import command
from goose_lora.errors import UserError
def main():
    print("ba 你好 \U0001f9a2 ≤ \\ud800 end")
    raise UserError("Ünï 你好 \\ud800: give another.")
command(main)()
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


# What nobody should obey, by whichever way it comes

NASTY = "a\x1b[2J\x1b]0;title\x07b\rc\x9b31m\u202ed\u2066\x00\x7f\x08e"
WAYS = """
import logging, sys, warnings
from goose_lora.cli.process import command
from goose_lora.errors import UserError
early = logging.StreamHandler(sys.stderr)  # made before the streams are guarded, as transformers' own
def main():
    nasty = NASTY
    print("by print", nasty)
    sys.stdout.write("by write " + nasty + "\\n")
    sys.stdout.writelines(["by lines " + nasty + "\\n"])
    logging.getLogger("datasets").addHandler(early)
    logging.getLogger("datasets").warning("by a library's log %s", nasty)
    logging.getLogger("goose_lora.x").warning("by our log %s", nasty)
    warnings.warn("by a warning " + nasty)
    print("by print on stderr", nasty, file=sys.stderr)
    from tqdm import tqdm
    for _ in tqdm(range(2), desc="by a bar " + nasty, file=sys.stderr): pass
    print("\\x1b[1mbold of a library\\x1b[0m")
    raise UserError("by an error " + nasty)
command(main)()
"""


def test_by_no_way_does_a_control_character_reach_the_terminal(tmp_path):
    done = run(WAYS.replace("NASTY", ascii(NASTY), 1), tmp_path, PYTHONIOENCODING="utf-8")
    assert done.returncode == 2, done.stderr
    said = (done.stdout + done.stderr).decode()
    ways = ["print", "write", "lines", "a library's log", "our log", "a warning", "print on stderr"]
    for way in [*ways, "a bar", "an error"]:
        assert f"by {way} a\\x1b[2J" in said, way
    # A bar's own returns to the beginning of its line stay
    assert {char for char in said if not char.isprintable()} <= {"\n", "\t", "\r"}
    assert "c\\x9b31m\\u202ed\\u2066\\x00\\x7f\\x08e" in said and "b\rc" not in said
    assert "bold of a library\n" in said.replace("\r", "")


def test_a_bar_below_another_keeps_its_steps_up():
    assert for_console("\x1b[A\x1b[A") == "\x1b[A\x1b[A"
    assert for_console("\r 50%|##  |") == "\r 50%|##  |" and for_console("\r") == "\r"
    assert for_console("x\x1b[A") == "x\\x1b[A"


def test_a_known_secret_is_shown_by_no_stream(monkeypatch):
    monkeypatch.setenv("TRACKER_PASSWORD", "Zq7plantedValue19")
    assert for_console("log in with Zq7plantedValue19\n") == "log in with (not recorded)\n"
    assert for_console("max_tokens: 5, token: word\n") == "max_tokens: 5, token: word\n"


KEEPS_ON = """
import os, sys
from goose_lora.cli.process import command
def main():
    for number in range(3_000):
        print("line", number)
        print("line", number, file=sys.stderr)
    sys.stdout.flush()
    open("result", "w").write("whole")
command(main)()
"""


@pytest.mark.parametrize("how", ["| head -1", "2>&1 | head -1", "> /dev/full 2>&1", ">&-", ">&- 2>&-"])
@pytest.mark.skipif(sys.platform == "win32", reason="a shell")
def test_a_console_that_is_closed_or_full_costs_no_result(how, tmp_path):
    (tmp_path / "run.py").write_text(KEEPS_ON)
    line = f"{{ {sys.executable} run.py; echo $? > code; }} {how}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=200,
    )
    assert (tmp_path / "result").read_text() == "whole"
    assert (tmp_path / "code").read_text() == "0\n", done
