"""The report of a machine in miniature: parts in processes of their own, JSON after each."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "benchmarks" / "gpu_report.py"))


def test_the_report_in_miniature_has_speeds_and_seconds_of_each_phase(script, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output = tmp_path / "runs" / "report.json"
    script["report"](["environment", "ppo", "float16", "plan"], output)
    written = json.loads(output.read_text())
    assert set(script["PARTS"]) > {"environment", "ppo", "float16", "plan"}
    assert set(written["environment"]["result"]["TFLOP/s"]) >= {"torch.float32", "torch.bfloat16"}
    phases = {name: found for name, found in written["ppo"]["result"].items() if name != "of"}
    assert len(phases) == 4 and all(
        seconds.keys() == {"generate", "score", "update"} and min(seconds.values()) > 0
        for seconds in phases.values()
    )
    assert written["float16"]["result"]["float16"]["loss_scale"] == 4096
    assert written["float16"]["result"]["bfloat16"]["rollout/sampling_gap"] < 0.1
    assert "result" in written["plan"]


def test_what_is_known_is_written_after_each_part_also_where_one_fails(script, tmp_path, monkeypatch):
    output, written = tmp_path / "report.json", []
    answers = {"environment": {"result": 1}, "ppo": {"failed": "not done in 1 s"}, "plan": {"result": 2}}

    def part(name, limit):
        written.append(sorted(json.loads(output.read_text())) if output.exists() else [])
        return dict(answers[name])

    monkeypatch.setitem(script["report"].__globals__, "_part", part)
    found = script["report"](["environment", "ppo", "plan"], output)
    assert written == [[], ["environment"], ["environment", "ppo"]]
    assert found["ppo"]["failed"] and found["plan"]["result"] == 2


def test_a_part_that_takes_too_long_or_fails_says_so(script):
    assert script["_part"]("environment", 0.01) == {"failed": "not done in 0.01 s"}
    failed = script["_part"]("environment --no-such-option", 60)
    assert failed["exit"] != 0 and "invalid choice" in failed["failed"]
