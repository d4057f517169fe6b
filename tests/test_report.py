"""Files that a stage leaves: whole or not there."""

import json

import pytest

from goose_lora import report


def test_json_is_written_whole_and_read_back(tmp_path):
    report.write_json(tmp_path / "new" / "a.json", {"ä": [1, 2.5]})
    assert report.read_json(tmp_path / "new" / "a.json") == {"ä": [1, 2.5]}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    report.write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        report.write_json(tmp_path / "a.json", {"new": object()})
    assert report.read_json(tmp_path / "a.json") == {"old": 1}


def test_a_stage_ends_with_its_figures_seconds_and_memory(tmp_path):
    report.write_stage(str(tmp_path), "sft", {"loss": 1.5}, [{"step": 1, "loss": 2.0}])
    stage = json.loads((tmp_path / "stage.json").read_text())
    assert stage["stage"] == "sft" and stage["loss"] == 1.5 and stage["seconds"] > 0 and stage["peak_rss_gb"] > 0.1
    assert report.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_curves_are_a_picture_of_the_rollouts(tmp_path):
    names = ("objective/score", "objective/kl", "loss/value", "rollout/response_tokens")
    report.plot_curves([{"step": step, **dict.fromkeys(names, step / 2)} for step in (4, 8)] + [{"step": 8, "train_loss": 1}], tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_reward_model_that_may_know_nothing_is_refused_unless_forced(tmp_path):
    def save(low, high):
        report.write_json(tmp_path / "verdict.json", {"accuracy": 0.55, "accuracy_ci": [low, high], "n_pairs": 80})

    report.require_verdict(tmp_path, force=False)  # none there: of other origin
    save(0.51, 0.62)
    report.require_verdict(tmp_path, force=False)
    save(0.44, 0.66)
    with pytest.raises(ValueError, match=r"right on 0.55 of 80 held-out pairs \(0.44 to 0.66\), which may be chance.*force: true"):
        report.require_verdict(tmp_path, force=False)
    report.require_verdict(tmp_path, force=True)
