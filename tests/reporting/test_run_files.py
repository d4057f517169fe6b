"""Files that a stage leaves: whole or not there."""

import json
from dataclasses import replace

import pytest

from goose_lora import files
from goose_lora.evaluation import verdict
from goose_lora.evaluation.verdict import ProbeScores, reward_verdict
from goose_lora.reporting import plots, run_files


def test_json_is_written_whole_and_read_back(tmp_path):
    files.write_json(tmp_path / "new" / "a.json", {"ä": [1, 2.5]})
    assert files.read_json(tmp_path / "new" / "a.json") == {"ä": [1, 2.5]}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    files.write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"new": object()})
    assert files.read_json(tmp_path / "a.json") == {"old": 1}


def test_a_stage_ends_with_its_figures_seconds_and_memory(tmp_path):
    run_files.write_stage(str(tmp_path), "sft", {"loss": 1.5}, [{"step": 1, "loss": 2.0}])
    stage = json.loads((tmp_path / "stage.json").read_text())
    assert (
        stage["stage"] == "sft"
        and stage["loss"] == 1.5
        and stage["seconds"] > 0
        and stage["peak_rss_gb"] > 0.1
    )
    assert files.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_curves_are_a_picture_of_the_rollouts(tmp_path):
    names = ("objective/score", "objective/kl", "loss/value", "rollout/response_tokens")
    plots.plot_curves(
        [{"step": step, **dict.fromkeys(names, step / 2)} for step in (4, 8)]
        + [{"step": 8, "train_loss": 1}],
        tmp_path / "c.png",
    )
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_reward_model_that_may_know_nothing_is_refused_unless_forced(tmp_path):
    def save(low, high):
        files.write_json(
            tmp_path / "verdict.json", {"accuracy": 0.55, "accuracy_ci": [low, high], "n_pairs": 80}
        )

    verdict.require_verdict(tmp_path, force=False)  # none there: of other origin
    save(0.51, 0.62)
    verdict.require_verdict(tmp_path, force=False)
    save(0.44, 0.66)
    with pytest.raises(
        ValueError,
        match=r"right on 0.55 of 80 held-out pairs \(0.44 to 0.66\), which may be chance.*force: true",
    ):
        verdict.require_verdict(tmp_path, force=False)
    verdict.require_verdict(tmp_path, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_what_the_verdict_warns_of_is_logged_before_ppo_forced_or_not(tmp_path, caplog, force):
    few = ([2.0] * 9, [1.0] * 9, [9, 8, 7, 6, 5, 4, 3, 2, 1], [1] * 9)
    probes = {
        "empty": ProbeScores([5.0] * 9, few[0], few[1]),
        "repeated": ProbeScores([0.0] * 9, few[0], few[1]),
    }
    verdict.write_verdict(str(tmp_path), reward_verdict(*few, probes=probes))
    verdict.require_verdict(tmp_path, force=force)
    logged = [record.getMessage() for record in caplog.records]
    assert [line for line in logged if "empty reply" in line and "PPO will learn to say nothing" in line]
    assert not [line for line in logged if "repeated reply" in line]
    verdict.write_verdict(
        str(tmp_path), replace(reward_verdict(*few, probes=probes), length_correlation=0.8, probes={})
    )
    caplog.clear()
    verdict.require_verdict(tmp_path, force=force)
    assert any(
        "correlation of score and length +0.80: PPO will learn length" in record.getMessage()
        for record in caplog.records
    )
