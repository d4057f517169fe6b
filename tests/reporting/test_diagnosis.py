"""Each verdict: on a real tiny run that is broken in exactly that thing, and on hand-made rows of a
run that is healthy but for it."""

import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import tiny_runs as ppo_runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback

from goose_lora.files import read_jsonl, write_jsonl
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo import first_step_checks
from goose_lora.ppo.callbacks import Diagnosis
from goose_lora.ppo.trainer import PPOTrainer
from goose_lora.reporting.diagnosis import CHECKS, diagnose, diagnosis_text

# ---- Hand-made rows: what a real run is too slow or too noisy to show ----

RUN = 20


def healthy(**columns):
    """Rows of a run that went well; a column is given as a function of the share of the run that
    has passed."""
    good = {
        "objective/score": lambda t: 1.5 * t,
        "objective/kl": lambda t: 4 * t,
        "objective/kl_k3": lambda t: 4 * t,
        "rollout/sampling_gap": lambda t: 0.05,
        "rollout/response_tokens": lambda t: 18 - 2 * t,
        "rollout/eos_rate": lambda t: 0.5 + 0.3 * t,
        "rollout/repetition": lambda t: 0.1,
        "rollout/distinct_replies": lambda t: 1.0,
        "advantage/std": lambda t: 1 - 0.3 * t,
        "advantage/largest": lambda t: 4.0,
        "value/explained_variance": lambda t: 0.5 * t,
        "policy/first_ratio_gap": lambda t: 0.03,
        "policy/clip_fraction": lambda t: 0.05,
        "policy/kl_from_rollout": lambda t: 0.01,
        "policy/entropy": lambda t: 4 - t,
        "policy/skipped": lambda t: 0.0,
        "learning_rate": lambda t: 1e-4,
        "grad_norm": lambda t: 0.3 + 0.1 * t,
    }
    return [
        {"step": 4 * (k + 1), **{name: of(k / (RUN - 1)) for name, of in (good | columns).items()}}
        for k in range(RUN)
    ]


NAMES = {
    "first ratio",
    "sampling",
    "KL sign",
    "reference",
    "KL",
    "learning rate",
    "gradient",
    "advantages",
    "clipping",
    "skipped",
} | {"critic", "score", "reward hacking", "entropy", "repetition", "variety", "endings", "length"}


def bad(rows):
    return {finding.name: finding.text for finding in diagnose(rows) if finding.level != "ok"}


def test_a_healthy_run_is_all_ok():
    assert bad(healthy()) == {}
    assert {finding.name for finding in diagnose(healthy())} == NAMES


BROKEN = {
    "numbers": (
        "wrong",
        {"objective/reward": lambda t: float("nan") if t == 1 else t},
        "not finite: objective/reward",
    ),
    "first ratio": ("wrong", {"policy/first_ratio_gap": lambda t: 0.2}, "Turn dropout off"),
    "KL sign": (
        "wrong",
        {"objective/kl": lambda t: -0.5 * (t > 0)},
        "negative in 100% of the last 5 rollouts",
    ),
    "sampling": ("wrong", {"rollout/sampling_gap": lambda t: 0.4}, "rollout_weights: shared"),
    "reference": (
        "wrong",
        {"objective/kl": lambda t: 9 + t, "objective/kl_k3": lambda t: 9 + t},
        "not what the policy started from",
    ),
    "KL": ("look", {"objective/kl": lambda t: 40 * t}, "Raise kl_coef"),
    "clipping": ("look", {"policy/clip_fraction": lambda t: 0.5}, "steps are too large"),
    "skipped": ("look", {"policy/skipped": lambda t: 0.1 * (t > 0.5)}, "Lower learning_rate"),
    "gradient": ("look", {"grad_norm": lambda t: 0.3 + 30 * (t > 0.8)}, "training is coming apart"),
    "policy": ("wrong", {"objective/kl": lambda t: 0.0, "objective/kl_k3": lambda t: 0.0}, "does not move"),
    "advantages": ("look", {"advantage/std": lambda t: 1e-5}, "nothing to learn from"),
    "critic": ("look", {"value/explained_variance": lambda t: -0.2}, "no better than a constant"),
    "entropy": ("look", {"policy/entropy": lambda t: 4 - 3.5 * t}, "replies grow alike"),
    "variety": ("look", {"rollout/distinct_replies": lambda t: 1 - 0.9 * t}, "one thing to many prompts"),
    "endings": ("look", {"rollout/eos_rate": lambda t: 0.6 * (1 - t) ** 2}, "has stopped ending its replies"),
    "length": ("look", {"rollout/response_tokens": lambda t: 18 - 12 * t}, "compare at equal length"),
    "score": ("look", {"objective/score": lambda t: -t}, "it falls"),
    "learning rate": ("wrong", {"learning_rate": lambda t: 0.0}, "nothing was learned"),
    "reward hacking": ("look", {"eval_score": lambda t: -t}, "eval_score fell"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_one_thing_wrong_in_hand_made_rows_is_the_one_thing_said(name):
    level, columns, text = BROKEN[name]
    found = [finding for finding in diagnose(healthy(**columns)) if finding.level != "ok"]
    assert [(finding.level, finding.name) for finding in found] == [(level, name)]
    assert text in found[0].text


@pytest.mark.parametrize(
    ("columns", "cause"),
    [
        ({"rollout/sampling_gap": lambda t: 0.5}, "a sampling filter"),
        (
            {"rollout/sampling_gap": lambda t: 0.5, "policy/first_ratio_gap": lambda t: 0.3},
            "dropout or padding",
        ),
        ({"policy/first_ratio_gap": lambda t: 0.3}, "dropout or padding"),
        ({}, "the reference is no fixed distribution"),
    ],
)
def test_a_negative_kl_in_hand_made_rows_names_its_cause(columns, cause):
    assert cause in bad(healthy(**{"objective/kl": lambda t: -1.0 * (t > 0)}, **columns))["KL sign"]


def test_a_negative_kl_of_replies_that_the_trainer_did_not_draw_is_said_of_them():
    rows = healthy(**{"objective/kl": lambda t: -1.0 * (t > 0)})
    said = bad(
        [{name: value for name, value in row.items() if name != "rollout/sampling_gap"} for row in rows]
    )
    assert "were not drawn from the policy as it was" in said["KL sign"]


def test_noise_about_zero_is_no_negative_kl():
    assert bad(healthy(**{"objective/kl": lambda t: 0.3 if int(t * 19) % 2 else -0.35})) == {}


def test_a_kl_that_a_resumed_run_begins_with_is_no_wrong_reference():
    rows = healthy(**{"objective/kl": lambda t: 9 + t, "objective/kl_k3": lambda t: 9 + t})
    assert bad([row | {"step": row["step"] + 40} for row in rows]) == {}


def test_a_kl_that_leaps_is_a_wrong_reference_unless_the_updates_went_so_far():
    leap = {"objective/kl": lambda t: 0.1 + 9 * (t > 0.5), "objective/kl_k3": lambda t: 0.1 + 9 * (t > 0.5)}
    assert "at step 44" in bad(healthy(**leap))["reference"]
    assert bad(healthy(**leap, **{"policy/kl_from_rollout": lambda t: 0.1})) == {}
    assert bad(healthy(**leap, **{"policy/kl_from_rollout": lambda t: 1e-14})) == {}, (
        "one step a rollout, which is not measured"
    )
    later = [{"step": row["step"] + 2, "policy/kl_from_rollout": 0.1} for row in healthy()]
    logged_often = zip(healthy(**leap, **{"policy/kl_from_rollout": lambda t: 0.0}), later, strict=True)
    assert bad([row for pair in logged_often for row in pair]) == {}


def test_a_log_of_several_rollouts_may_begin_with_a_kl():
    """As far as the updates of the rollouts before the last can have moved the policy: 5 *
    sqrt(0.01) a rollout."""
    rows = healthy(
        **{
            "objective/kl": lambda t: 9 + t,
            "objective/kl_k3": lambda t: 9 + t,
            "rollout/count": lambda t: 3.0,
        }
    )
    assert bad(rows) == {}
    assert "read 60 rollouts, steps 4 to 80: 0 wrong, 0 to look at" in diagnosis_text(rows)


def test_a_score_that_rises_while_length_and_entropy_fall_is_suspected():
    hacked = {
        "objective/score": lambda t: 5 * t,
        "policy/entropy": lambda t: 4 - 2.2 * t,
        "rollout/response_tokens": lambda t: 18 - 8.5 * t,
    }
    assert "entropy and length fell" in bad(healthy(**hacked))["reward hacking"]


def test_a_score_that_rises_while_reward_models_part_is_said_to_rise_where_they_disagree():
    parting = {"objective/disagreement": lambda t: 0.3 + t}
    (found,) = [one for one in diagnose(healthy(**parting)) if one.name == "disagreement"]
    assert found.level == "look" and "the score rises where the members disagree" in found.text
    # Apart at all times, or parting without a gain
    calm = healthy(**{"objective/disagreement": lambda t: 1.3})
    still = healthy(**parting, **{"objective/score": lambda t: 0.0})
    for rows in (calm, still):
        assert [one.level for one in diagnose(rows) if one.name == "disagreement"] == ["ok"]
    assert not [one for one in diagnose(healthy()) if one.name == "disagreement"]


def test_a_judge_of_pairs_that_agrees_less_with_what_is_paid_is_a_sign_of_hacking():
    parting = {"judge/m": lambda t: 0.8 - 0.3 * t}
    assert "judge/m fell from 0.7" in bad(healthy(**parting))["reward hacking"]
    assert bad(healthy(**{"judge/m": lambda t: 0.8})) == {}


def test_a_judge_that_only_wavers_is_no_sign_of_hacking():
    wavers = {"reward/judge": lambda t: 0.3 * (-1) ** int(t * 19) - 0.05 * t}
    assert bad(healthy(**wavers)) == {}


def test_a_source_of_reward_that_says_nothing_in_a_rollout_is_no_divergence():
    assert bad(healthy(**{"reward/rare": lambda t: float("nan")})) == {}


def test_the_worst_comes_first_and_a_short_run_is_read_too():
    findings = diagnose(healthy(**BROKEN["critic"][1], **BROKEN["sampling"][1]))
    assert [finding.level for finding in findings][:3] == ["wrong", "look", "ok"]
    assert {finding.level for finding in diagnose(healthy()[:1])} == {"ok"}
    assert diagnosis_text(healthy()[:1]).endswith(
        "read 1 rollouts, steps 4 to 4: 0 wrong, 0 to look at (what is a trend needs 5 logs)"
    )
    with pytest.raises(ValueError, match="no rollout is in these metrics"):
        diagnose([{"loss": 1.0}])


def test_rows_between_rollouts_count_where_logging_is_more_often():
    rows = healthy()
    for row in rows:
        row["policy/clip_fraction"] = 0.0
    between = [{"step": row["step"] + 1, "policy/clip_fraction": 0.9} for row in rows]
    said = {
        finding.name: finding.level
        for finding in diagnose([row for pair in zip(rows, between, strict=True) for row in pair])
    }
    assert said["clipping"] == "look"


# ---- Real runs, each broken in one thing ----

STOPS = [10, 11, 12, 13, 14]  # so that replies of the tiny policy end by themselves


def run(folder, *, callbacks=None, rollouts=7, prepare=None, **changes):
    """Findings of a run of 32 replies a rollout, by name; ``prepare`` breaks the trainer before it
    starts."""
    fast = {
        "per_device_train_batch_size": 8,
        "num_ppo_epochs": 2,
        "response_length": 12,
        "stop_token_ids": STOPS,
        "learning_rate": 5e-3,
    }
    ppo = ppo_runs.trainer(folder, num_rollouts=rollouts, callbacks=callbacks, **fast | changes)
    if prepare:
        prepare(ppo)
    ppo.train()
    return said(folder)


def said(folder):
    return {finding.name: finding for finding in diagnose(read_jsonl(folder / "metrics.jsonl"))}


def levels(findings):
    return {name: finding.level for name, finding in findings.items() if finding.level != "ok"}


class At(TrainerCallback):
    """Does something after an optimizer step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def without_critic():
    base = tiny.base()
    return SharedBase.build(base, tiny.lora(base, layers="top-2"))


def groups(size=2):
    return {"shared": without_critic(), "advantage_estimator": "rloo", "num_generations": size}


def alike():
    return groups() | {
        "reward": lambda completions, **columns: [1.0] * len(completions),
        "score_normalization": "none",
        "kl_coef": 0.0,
    }


def test_a_run_that_is_healthy_is_all_ok_and_warns_of_nothing(tmp_path, caplog):
    findings = run(tmp_path, value_learning_rate=3e-2, rollouts=8, per_device_train_batch_size=16)
    assert levels(findings) == {}
    assert findings.keys() == NAMES
    assert "wrong" not in caplog.text and "look" not in caplog.text


def test_a_run_whose_dropout_comes_on_after_the_gates(tmp_path):
    base = tiny.base("gpt2")
    shared = SharedBase.build(base, tiny.lora(base), critic="adapter")
    dropout = At(4, lambda: setattr(base.transformer.h[0].mlp.dropout, "p", 0.5))
    findings = run(tmp_path, shared=shared, callbacks=[dropout], rollouts=4)
    assert findings["first ratio"].level == "wrong" and "Turn dropout off" in findings["first ratio"].text
    assert "see first ratio" in findings["sampling"].text, "not a sampling filter"


def test_a_run_with_a_repetition_penalty_in_its_generation_config(tmp_path):
    findings = run(
        tmp_path, prepare=lambda ppo: ppo.collector.generation.update(repetition_penalty=2.0), rollouts=2
    )
    assert (
        findings["sampling"].level == "wrong"
        and "Turn sampling filters off (repetition penalty" in findings["sampling"].text
    )
    assert findings["first ratio"].level == "ok"


def test_a_run_that_draws_from_its_likeliest_tokens_only(tmp_path):
    """Like top_k; and entropy is all that it learns, which takes from the likeliest tokens, so that
    those drawn grow unlikelier than before."""

    def keep_six(ppo):
        ids = torch.tensor([[5 + k, 9 + k, 20 + k] for k in range(30)])
        with torch.no_grad():
            likely = (
                ppo.shared.get_base_model()(ids).logits[:, -1].softmax(-1).mean(0).topk(6).indices.tolist()
            )
        ppo.collector.generation.suppress_tokens = [
            token for token in range(tiny.VOCABULARY) if token not in likely
        ]

    findings = run(
        tmp_path,
        prepare=keep_six,
        **alike(),
        entropy_coef=1.0,
        num_ppo_epochs=1,
        learning_rate=4e-3,
        rollouts=9,
    )
    assert findings["KL sign"].level == "wrong" and "a sampling filter" in findings["KL sign"].text
    assert findings["sampling"].level == "wrong" and levels(findings).keys().isdisjoint(
        {"first ratio", "reference"}
    )


def test_a_run_that_started_from_another_policy_than_its_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(first_step_checks, "check_reference", lambda *args, **options: None)
    # A policy with an effect, and the bare base as reference
    shared = tiny.shared(tiny.base(), layers="top-2", critic="adapter")
    findings = run(tmp_path, shared=shared, rollouts=2)
    assert (
        findings["reference"].level == "wrong"
        and "not what the policy started from" in findings["reference"].text
    )


def test_a_run_whose_reference_changes_on_the_way(tmp_path):
    def spoil(ppo):
        ppo.add_callback(At(8, lambda: tiny.randomise(ppo.shared, "reference")))

    findings = run(tmp_path, prepare=spoil, rollouts=3)
    assert (
        findings["reference"].level == "wrong" and "the reference has changed" in findings["reference"].text
    )


def test_a_run_whose_learning_rate_is_zero(tmp_path):
    assert run(tmp_path, learning_rate=0.0, rollouts=2)["learning rate"].level == "wrong"


def test_a_run_whose_policy_stands_still_though_it_has_a_learning_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(PPOTrainer, "critic_warms_up", property(lambda self: True))
    findings = run(tmp_path, rollouts=4)
    assert findings["policy"].level == "wrong" and "does not move" in findings["policy"].text


def test_a_run_whose_scores_are_all_alike(tmp_path):
    findings = run(tmp_path, **alike(), rollouts=3)
    assert findings["advantages"].level == "look" and "nothing to learn from" in findings["advantages"].text
    assert findings["gradient"].level == "wrong" and "its norm is 0" in findings["gradient"].text


def test_a_run_where_one_score_outweighs_all_others(tmp_path):
    def jackpot(completion_ids, **columns):
        return [1000.0, *(len(ids) for ids in completion_ids[1:])]

    findings = run(tmp_path, reward=jackpot, score_normalization="none", lam=0.0, rollouts=2)
    assert (
        findings["advantages"].level == "look"
        and "a few replies rule each step" in findings["advantages"].text
    )


def test_a_run_with_steps_that_are_far_too_large(tmp_path):
    findings = run(
        tmp_path, learning_rate=0.1, kl_coef=0.0, num_ppo_epochs=4, ratio_threshold=None, rollouts=3
    )
    assert findings["clipping"].level == "look" and findings["KL"].level == "look"
    assert levels(findings).keys().isdisjoint({"reference", "KL sign"})


def test_a_run_whose_minibatches_are_skipped(tmp_path):
    assert run(tmp_path, learning_rate=0.3, ratio_threshold=1.05, rollouts=2)["skipped"].level == "look"


def test_a_run_whose_critic_learns_nothing(tmp_path):
    assert run(tmp_path, value_learning_rate=0.0, rollouts=5)["critic"].level == "look"


def test_a_run_whose_scores_fall(tmp_path):
    calls = iter(range(100))

    def harder(completions, **columns):
        level = next(calls)
        return [-level + 0.1 * len(text) / 50 for text in completions]

    assert run(tmp_path, reward=harder, score_normalization="none", rollouts=5)["score"].level == "look"


@pytest.fixture(scope="module")
def paid_for_one_word(tmp_path_factory):
    def one_word(completion_ids, **columns):
        return [[float(token == 7) for token in ids] for ids in completion_ids]

    steep = {
        "learning_rate": 2e-2,
        "value_learning_rate": 3e-2,
        "lam": 0.5,
        "kl_coef": 0.0,
        "num_ppo_epochs": 4,
    }
    return run(
        tmp_path_factory.mktemp("one_word"), reward=one_word, stop_token_ids=None, rollouts=24, **steep
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("repetition", "stood in it before"),
        ("entropy", "replies grow alike"),
        ("reward hacking", "replies repeat themselves more"),
    ]
    + [("variety", "one thing to many prompts")],
)
def test_a_run_that_is_paid_for_one_word(name, text, paid_for_one_word):
    assert paid_for_one_word[name].level == "look" and text in paid_for_one_word[name].text


def test_a_run_whose_replies_have_no_room_to_end(tmp_path):
    findings = run(tmp_path, stop_token_ids=None, response_length=2, rollouts=5)
    assert findings["endings"].level == "look" and "raise response_length" in findings["endings"].text


def test_a_run_that_is_paid_for_length(tmp_path):
    def length(completion_ids, **columns):
        return [float(len(ids)) for ids in completion_ids]

    short = {"stop_token_ids": list(range(4, 20)), "response_length": 24, "per_device_train_batch_size": 16}
    findings = run(
        tmp_path,
        reward=length,
        **groups(8),
        **short,
        learning_rate=1e-2,
        kl_coef=0.0,
        num_ppo_epochs=4,
        rollouts=16,
    )
    assert findings["length"].level == "look" and "compare at equal length" in findings["length"].text
    assert (
        findings["reward hacking"].level == "look" and "replies grew from" in findings["reward hacking"].text
    )


def test_a_run_that_pleases_one_source_of_reward_and_not_the_judge(tmp_path):
    def judge(completion_ids, **columns):
        return [1 - share for share in ppo_runs.even_share(completion_ids)]

    def weigh(ppo):
        ppo.collector.reward.weights = [1.0, 0.0]

    findings = run(
        tmp_path, reward=[ppo_runs.even_share, judge], prepare=weigh, learning_rate=2e-2, rollouts=14
    )
    assert (
        findings["reward hacking"].level == "look" and "reward/judge fell" in findings["reward hacking"].text
    )


# ---- What is said while it runs, and by the command ----


def watch(rows, *, before=(), warmup=0):
    """The callback over ``rows``, of a run that is resumed after the rows ``before``."""
    watcher = Diagnosis()
    args = SimpleNamespace(critic_warmup_steps=4 * warmup)  # 4 steps a rollout
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, log_history=list(before))
    watcher.on_train_begin(args, state, None)
    for row in rows:
        state.global_step = row["step"]
        state.log_history.append(row)
        watcher.on_log(args, state, None, logs={name: value for name, value in row.items() if name != "step"})


def test_a_finding_is_warned_of_once_when_it_comes_and_once_when_it_has_gone(caplog):
    watch(healthy(**{"rollout/sampling_gap": lambda t: 0.4 if 0.2 < t < 0.5 else 0.05}))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2, lines
    assert lines[0].startswith("step 20: wrong  sampling        tokens are drawn")
    assert "ok     sampling        well again for 3 rollouts" in lines[1]


def test_nothing_of_a_trend_is_said_before_there_can_be_one(caplog):
    rows = healthy(**BROKEN["critic"][1], **BROKEN["endings"][1], **BROKEN["score"][1])
    watch(rows[:4])
    assert not caplog.records
    watch(rows)
    assert {"critic", "endings", "score"} == {record.getMessage().split()[3] for record in caplog.records}


def test_a_resumed_run_goes_on_from_what_was_said(caplog):
    rows = healthy(**BROKEN["critic"][1])
    watch(rows[10:], before=rows[:10])
    assert not caplog.records
    watch(rows[10:])
    assert "critic" in caplog.text, "a run without that beginning is warned of it"


def test_the_policys_learning_rate_may_be_zero_while_the_critic_warms_up(caplog):
    still = {"learning_rate": lambda t: 1e-4 if t > 0.2 else 0.0}
    watch(healthy(**still), warmup=4)
    assert not caplog.records
    watch(healthy(**still))
    assert "learning rate" in caplog.text


def test_a_real_run_warns_at_the_log_interval_where_it_breaks(tmp_path, caplog):
    base = tiny.base("gpt2")
    shared = SharedBase.build(base, tiny.lora(base), critic="adapter")
    with caplog.at_level(logging.WARNING):
        run(
            tmp_path,
            shared=shared,
            callbacks=[At(4, lambda: setattr(base.transformer.h[0].mlp.dropout, "p", 0.5))],
            rollouts=3,
        )
    lines = [record.getMessage() for record in caplog.records if "wrong  first ratio" in record.getMessage()]
    assert len(lines) == 1 and lines[0].startswith("step 8: "), lines
    assert all(
        json.loads(line)["rollout/count"] == 1
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
        if "objective" in line
    )


def test_the_command_prints_the_verdicts_and_refuses_what_is_no_run(tmp_path):
    write_jsonl(tmp_path / "metrics.jsonl", healthy(**BROKEN["entropy"][1]))
    doctor = [sys.executable, "-c", "from goose_lora.cli import main; main()", "doctor"]
    done = subprocess.run([*doctor, str(tmp_path)], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0].startswith("look   entropy         ")
    assert len({line[:23].rindex(" ") for line in lines[:-1]}) == 1, "the texts stand in one column"
    assert lines[-1] == "read 20 rollouts, steps 4 to 80: 0 wrong, 1 to look at"
    done = subprocess.run([*doctor, str(tmp_path / "no")], capture_output=True, text=True)
    assert done.returncode == 2 and "no such file. Give the output_dir of a run" in done.stderr


# ---- Whatever is logged, a diagnosis says something ----

LOGGED = st.one_of(
    st.sampled_from([0, 0.0, -1.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf"), None, "text"]),
    st.floats(-10, 10),
)
COLUMNS = sorted({*healthy()[0], "rollout/count", "reward/judge", "eval_score", "policy/not_finite"})


@settings(deadline=None, max_examples=100)
@given(st.lists(st.dictionaries(st.sampled_from(COLUMNS), LOGGED, max_size=12), min_size=1, max_size=14))
def test_no_row_that_can_be_logged_breaks_a_check(rows):
    rows[0]["objective/score"] = 1.0
    for check in CHECKS:
        assert all(str(finding) for finding in check(rows))


def test_a_gradient_that_is_mostly_0_is_looked_at_and_divides_nothing():
    findings = bad(healthy(grad_norm=lambda t: 0.5 * (t > 0.8)))
    assert "0 in 80% of the logs" in findings["gradient"]


def test_replies_that_never_end_are_wrong():
    rows = healthy(**{"rollout/eos_rate": lambda t: 0.0})
    (finding,) = [finding for finding in diagnose(rows) if finding.name == "endings"]
    assert finding.level == "wrong" and "no reply ended by itself" in finding.text


def test_a_check_that_fails_ends_neither_the_diagnosis_nor_the_run(tmp_path, monkeypatch, caplog):
    def broken(rows):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("goose_lora.reporting.diagnosis.CHECKS", [broken, *CHECKS])
    trainer = ppo_runs.trainer(tmp_path)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps
    assert "the diagnosis of broken failed" in caplog.text and "ZeroDivisionError" in caplog.text
    assert {finding.name for finding in diagnose(healthy())} == NAMES


def test_a_sparse_reward_without_kl_trains_on_after_its_first_score(tmp_path):
    calls = []

    def sparse(completion_ids, **columns):
        calls.append(0)
        return [float(len(calls) > 7 and row % 2) for row in range(len(completion_ids))]

    trainer = ppo_runs.trainer(
        tmp_path,
        shared=ppo_runs.fresh(critic=None),
        reward=sparse,
        advantage_estimator="grpo",
        num_generations=4,
        kl_coef=0.0,
        score_normalization="none",
        num_rollouts=11,
        num_ppo_epochs=1,
        num_mini_batches=1,
        gradient_accumulation_steps=1,
    )
    trainer.train()
    assert trainer.state.global_step == 11


def test_a_constant_reward_is_said_to_be_one_with_the_name_of_its_source():
    rows = healthy(
        **{"objective/score": lambda t: 0.5, "reward/judge": lambda t: 0.5, "reward/adapter": lambda t: t}
    )
    (finding,) = (finding for finding in diagnose(rows) if finding.name == "advantages")
    assert "every rollout scores 0.5: what scores is constant (judge): there is nothing to learn" in str(
        finding
    )


def test_a_constant_source_is_named_though_penalties_or_other_sources_move_the_score():
    found = bad(healthy(**{"reward/judge": lambda t: 0.1 + 1e-8 * t, "reward/length": lambda t: -t}))
    assert set(found) >= {"constant"} and found["constant"].startswith("judge has a mean of 0.1")
    assert "length" not in found["constant"]
