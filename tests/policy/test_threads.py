"""Threads of OpenMP sleep while they wait, wherever the program starts, unless the user says."""

import subprocess
import sys

import pytest
from recipe_runs import ROOT

STARTS = [f"runpy.run_path({str(path)!r})" for path in sorted((ROOT / "recipes").glob("*.py"))]
STARTS += ["import goose_lora.cli.stage", "import goose_lora.functional"]
# Stops at the first import of torch, and prints what its OpenMP would read.
WATCHED = """
import builtins, os, runpy
plain = builtins.__import__
def watching(name, *args, **kwargs):
    if name.partition(".")[0] == "torch":
        print(os.environ.get("OMP_WAIT_POLICY"))
        raise SystemExit
    return plain(name, *args, **kwargs)
builtins.__import__ = watching
"""


def said(start, **environment):
    done = subprocess.run(
        [sys.executable, "-c", WATCHED + start],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "", **environment},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("start", STARTS)
def test_threads_sleep_while_they_wait(start):
    assert said(start) == "PASSIVE"


def test_a_user_who_says_otherwise_is_heard():
    assert said("import goose_lora.functional", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"
