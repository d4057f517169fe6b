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
    assert len(phases) == 6 and all(
        seconds.keys() == {"generate", "score", "update"} and min(seconds.values()) > 0
        for seconds in phases.values()
    )
    assert written["float16"]["result"]["float16"]["loss_scale"] == 4096
    assert written["float16"]["result"]["bfloat16"]["rollout/sampling_gap"] < 0.1
    assert "result" in written["plan"]


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def part(script, name):
    return script["PARTS"][name][0]()


def test_the_share_of_each_phase_in_which_the_device_works(script, on_cpu):
    share = part(script, "busy")["share"]
    assert share.keys() == {"generate", "score", "update"} and all(0 < x < 1 for x in share.values())


def test_work_at_the_same_time_counts_once_and_only_inside_a_phase(script):
    spans = [("score", 0, 100), ("update", 100, 200), ("score", 200, 300)]
    working = [(250, 260), (10, 30), (20, 40), (22, 25), (90, 120), (400, 500)]
    assert script["busy_share"](spans, working) == {"score": 50 / 200, "update": 20 / 100}


def test_the_forms_of_the_cache_each_serve(script, on_cpu):
    found = part(script, "caches")
    assert set(found) == {"of", "growing", "static", "compiled"}
    assert all(found[form]["serves"] and found[form]["tokens a second"] > 0 for form in set(found) - {"of"})


def test_a_capped_run_takes_what_the_plan_lets_into_the_cap(script, on_cpu):
    less, more = part(script, "8B_12GB"), part(script, "8B_24GB")
    assert 0 < less["rows"] <= more["rows"] <= 64 and min(more["seconds"].values()) > 0


def test_trls_grpo_on_the_same_work_and_its_ppo_where_its_environment_is(script, on_cpu):
    grpo = part(script, "trl_grpo")
    assert grpo["steps"] == 3 and grpo["seconds"] > 0
    ppo = script["peer"]("ppo", "/nowhere/.venv-parity/bin/python")
    assert ppo == {"skipped": "there is no /nowhere/.venv-parity/bin/python: make .venv-parity/.installed"}
    assert set(part(script, "demo")) == {"skipped"}


def test_no_part_begins_when_the_time_is_over(script, tmp_path):
    found = script["report"](["environment"], tmp_path / "report.json", minutes=0.0)
    assert found["environment"]["failed"] == "not begun: 0 minutes are over"


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
