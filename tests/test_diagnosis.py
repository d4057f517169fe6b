"""Each verdict on a run, by metrics that are healthy but for one thing; and on a real run that is broken in that thing."""

import subprocess
import sys

import pytest
import test_ppo_trainer as ppo_runs

from goose_lora.diagnosis import diagnose
from goose_lora.report import read_jsonl, write_jsonl

RUN = 20


def healthy(**columns):
    """Rows of a run that went well; a column is given as a function of the share of the run that has passed."""
    good = {
        "objective/score": lambda t: 1.5 * t,
        "objective/kl": lambda t: 4 * t,
        "rollout/sampling_gap": lambda t: 0.05,
        "rollout/response_tokens": lambda t: 18 - 2 * t,
        "rollout/eos_rate": lambda t: 0.5 + 0.3 * t,
        "value/explained_variance": lambda t: 0.5 * t,
        "policy/clip_fraction": lambda t: 0.05,
        "policy/entropy": lambda t: 4 - t,
        "policy/skipped": lambda t: 0.0,
        "learning_rate": lambda t: 1e-4,
    }
    return [{"step": 4 * (k + 1), **{name: of(k / (RUN - 1)) for name, of in (good | columns).items()}} for k in range(RUN)]


def test_a_healthy_run_is_all_ok():
    findings = diagnose(healthy())
    assert {finding.level for finding in findings} == {"ok"}
    assert {finding.name for finding in findings} == {"sampling", "KL", "clipping", "critic", "entropy", "endings", "length", "score"}


BROKEN = {
    "numbers": ("wrong", {"objective/kl": lambda t: float("nan") if t == 1 else t}, "not finite: objective/kl"),
    "KL sign": ("wrong", {"objective/kl": lambda t: -0.5}, "negative in 100% of rollouts"),
    "sampling": ("wrong", {"rollout/sampling_gap": lambda t: 0.4}, "rollout_weights: shared"),
    "KL": ("look", {"objective/kl": lambda t: 40 * t}, "Raise kl_coef"),
    "clipping": ("look", {"policy/clip_fraction": lambda t: 0.5}, "steps are too large"),
    "ratio": ("look", {"policy/skipped": lambda t: 0.1 * (t > 0.5)}, "were skipped"),
    "critic": ("look", {"value/explained_variance": lambda t: -0.2}, "no better than a constant"),
    "entropy": ("look", {"policy/entropy": lambda t: 4 - 3.5 * t}, "replies grow alike"),
    "endings": ("look", {"rollout/eos_rate": lambda t: 0.6 * (1 - t) ** 2}, "has stopped ending its replies"),
    "length": ("look", {"rollout/response_tokens": lambda t: 18 - 12 * t}, "compare at equal length"),
    "score": ("look", {"objective/score": lambda t: -t}, "it does not rise"),
    "learning rate": ("wrong", {"learning_rate": lambda t: 0.0}, "nothing was learned"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_one_thing_wrong_is_the_one_thing_said(name):
    level, columns, text = BROKEN[name]
    found = [finding for finding in diagnose(healthy(**columns)) if finding.level != "ok"]
    assert [(finding.level, finding.name) for finding in found] == [(level, name)]
    assert text in found[0].text


def test_a_negative_kl_names_its_cause():
    apart = healthy(**{"objective/kl": lambda t: -1.0, "rollout/sampling_gap": lambda t: 0.5})
    said = {finding.name: finding.text for finding in diagnose(apart)}["KL sign"]
    assert "another distribution" in said and "sampling filter" in said
    same = {finding.name: finding.text for finding in diagnose(healthy(**{"objective/kl": lambda t: -1.0}))}["KL sign"]
    assert "the reference is not what the policy started from" in same


def test_noise_about_zero_is_no_negative_kl():
    assert not [f for f in diagnose(healthy(**{"objective/kl": lambda t: 0.3 if int(t * 19) % 2 else -0.35})) if f.name == "KL sign"]


def test_a_score_that_rises_while_length_and_entropy_fall_is_suspected():
    hacked = {"objective/score": lambda t: 5 * t, "policy/entropy": lambda t: 4 - 2.2 * t, "rollout/response_tokens": lambda t: 18 - 8.5 * t}
    assert "reward hacking" in {finding.name for finding in diagnose(healthy(**hacked)) if finding.level == "look"}


def test_the_worst_comes_first_and_a_short_run_is_read_too():
    findings = diagnose(healthy(**BROKEN["critic"][1], **BROKEN["sampling"][1]))
    assert [finding.level for finding in findings][:3] == ["wrong", "look", "ok"]
    assert diagnose(healthy()[:1])
    with pytest.raises(ValueError, match="no rollout is in these metrics"):
        diagnose([{"loss": 1.0}])


# On real runs, each broken in one thing


def said(folder):
    return {finding.name: finding for finding in diagnose(read_jsonl(folder / "metrics.jsonl"))}


def test_a_run_whose_learning_rate_is_zero(tmp_path):
    ppo_runs.trainer(tmp_path, learning_rate=0.0, value_learning_rate=0.0, num_rollouts=2).train()
    assert said(tmp_path)["learning rate"].level == "wrong"


def test_a_run_that_samples_from_another_distribution_than_it_trains(tmp_path, monkeypatch):
    ppo = ppo_runs.trainer(tmp_path, num_rollouts=6, per_device_train_batch_size=16, learning_rate=1e-4, rollout_weights="shared")
    ppo.rollouts.generation.temperature = 0.5
    evaluate = ppo.rollouts.evaluate

    def at_one(*args):
        ppo.rollouts.generation.temperature = 1.0
        try:
            return evaluate(*args)
        finally:
            ppo.rollouts.generation.temperature = 0.5

    monkeypatch.setattr(ppo.rollouts, "evaluate", at_one)
    ppo.train()
    assert said(tmp_path)["sampling"].level == "wrong"


def test_a_run_with_steps_that_are_far_too_large(tmp_path):
    ppo_runs.trainer(tmp_path, learning_rate=0.3, num_ppo_epochs=4, num_rollouts=4, per_device_train_batch_size=16, ratio_threshold=1.2).train()
    found = said(tmp_path)
    assert found["ratio"].level == "look" or found["clipping"].level == "look"


def test_the_command_prints_the_verdicts_and_refuses_what_is_no_run(tmp_path):
    write_jsonl(tmp_path / "metrics.jsonl", healthy(**BROKEN["entropy"][1]))
    doctor = [sys.executable, "-c", "from goose_lora.cli import main; main()", "doctor"]
    done = subprocess.run([*doctor, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[0].startswith("look   entropy: ")
    done = subprocess.run([*doctor, str(tmp_path / "no")], capture_output=True, text=True)
    assert done.returncode == 2 and "no such file. Give the output_dir of a run" in done.stderr
