"""A judge behind a server as a source of reward of PPO: paid, watched, evaluated, and resumed."""

import pytest
from judge_server import completion, impatient_server, longer, question
from ranks import on_ranks
from tiny_runs import (
    EVERY,
    WHOLE,
    assert_same_weights,
    config,
    even_share,
    fresh,
    held_out,
    logged,
    prompt_rows,
    trainer,
    with_reward_adapter,
)

from goose_lora.errors import UserError
from goose_lora.files import read_jsonl
from goose_lora.ppo.judging import judging_plan
from goose_lora.rewards.group_judge import served_judge
from goose_lora.rewards.pairwise_judge import CACHE_FILE
from goose_lora.rewards.sources import RewardMix


@pytest.fixture
def server(monkeypatch):
    with impatient_server(monkeypatch, retries=1) as served:
        yield served


def a_judge(server, folder):
    folder.mkdir(exist_ok=True)
    return served_judge("openai:m", base_url=server.url, rubric=None, cache=folder / CACHE_FILE)


def run(folder, server, *others, weights=None, resume=None, **changes):
    """A run of PPO by a judge and other sources, in groups of 4 unless told otherwise."""
    settings = {"advantage_estimator": "rloo", "num_generations": 4, "kl_coef": 0.0, **WHOLE} | changes
    judges = [] if server is None else [a_judge(server, folder)]
    critic = "adapter" if settings["advantage_estimator"] == "gae" else None
    shared = settings.pop("shared", None) or fresh(critic=critic)
    ppo = trainer(folder, shared=shared, reward=[*others, *judges], eval_rows=held_out(), **settings)
    if weights is not None:
        ppo.collector.reward.weights = weights
    ppo.train(resume_from_checkpoint=resume)
    return ppo


def one_rollout(folder, server, rows, estimator):
    """One rollout of these prompts by a judge alone, in groups of 2."""
    trainer(
        folder,
        shared=fresh(critic=None),
        reward=[a_judge(server, folder)],
        rows=rows,
        num_generations=2,
        advantage_estimator=estimator,
        num_rollouts=1,
        score_normalization="none",
    ).train()


def scores_of_bodies(bodies):
    """Who met whom, and who is longer, from what the server was sent."""
    asked = {(found["request"], found["reply_a"], found["reply_b"]) for found in map(question, bodies)}
    assert all((request, b, a) in asked for request, a, b in asked)
    return asked


@pytest.mark.parametrize(
    ("estimator", "size"), [("rloo", 2), ("grpo", 4), ("gae", 2), ("rloo", 8), ("grpo", 16)]
)
def test_a_paid_judge_trains_by_every_estimator_and_each_group_is_compared(estimator, size, server, tmp_path):
    ppo = run(
        tmp_path,
        server,
        advantage_estimator=estimator,
        num_generations=size,
        score_normalization="none",
        cliprange_value=None,
    )
    rows = logged(tmp_path)
    assert len(rows) == 2 and all(row["objective/raw_score"] == pytest.approx(0.5) for row in rows)
    assert sum(row["rollout/judge_calls"] for row in rows) == len(server.bodies) > 0
    assert "judge/m" not in rows[0]  # nothing else is paid
    scores_of_bodies(server.bodies)
    assert ppo.collector.reward.judges["m"].judge.asked.calls == len(server.bodies)


def test_the_scale_is_learned_from_groups_and_costs_what_was_told(server, tmp_path):
    settings = {"score_calibration_prompts": 16, "num_generations": 4, "advantage_estimator": "rloo"}
    args = config(tmp_path, **settings, **WHOLE)
    mix = RewardMix([a_judge(server, tmp_path)])
    (line,) = judging_plan(mix, args, 64, resumed=False)
    assert "the 4 replies to a prompt, each with all others in both orders: at most 12 calls a prompt" in line
    assert "48 a rollout, 96 for the run of 2 rollouts, and 48 before them for the scale of scores" in line
    (resumed,) = judging_plan(mix, args, 64, resumed=True)
    assert "before them" not in resumed and "Answers are kept" in resumed
    ppo = run(tmp_path, server, **settings)
    mean, deviation = ppo.rollout_state.score_scale
    assert mean == pytest.approx(0.5) and deviation > 0.1
    assert 0.5 * 144 < len(server.bodies) <= 144


def test_a_watched_judge_changes_nothing_and_says_where_it_agrees(server, tmp_path):
    plain = run(tmp_path / "plain", None, even_share)
    watched = run(tmp_path / "watched", server, even_share, weights=[1.0, 0.0])
    assert_same_weights(plain.shared, watched.shared)
    rows = logged(tmp_path / "watched")
    for row, without in zip(rows, logged(tmp_path / "plain"), strict=True):
        assert 0 <= row.pop("judge/m") <= 1 and "reward/m" not in row
        row.pop("reward/even_share")
        assert 0 < row.pop("rollout/judge_calls") <= 48
        without.pop("reward/even_share", None)
        assert row == without
    # The scale of scores does not depend on it: nobody is asked for that
    assert len(server.bodies) <= 96


def test_a_watched_judge_agrees_with_a_reward_that_is_its_own_measure(server, tmp_path):
    def length(completions, **columns):
        return [float(len(text)) for text in completions]

    def shortness(completions, **columns):
        return [-float(len(text)) for text in completions]

    for name, reward, wanted in (("same", length, 1.0), ("opposite", shortness, 0.0)):
        run(tmp_path / name, server, reward, weights=[1.0, 0.0], num_rollouts=1)
        assert [row["judge/m"] for row in logged(tmp_path / name)] == [wanted]


def test_it_is_paid_beside_a_reward_adapter(server, tmp_path):
    shared = with_reward_adapter(tmp_path / "reward")
    run(tmp_path / "run", server, "adapter", weights=[1.0, 0.5], shared=shared, score_normalization="none")
    for row in logged(tmp_path / "run"):
        assert row["objective/raw_score"] == pytest.approx(row["reward/adapter"] + 0.25, abs=1e-5)
        assert 0 <= row["judge/m"] <= 1 and row["rollout/judge_calls"] > 0


def test_a_resumed_run_is_the_same_and_asks_nothing_twice(server, tmp_path):
    # A question without a verdict is no other score the next time
    silent = []

    def mostly_longer(body):
        silent.append(body)
        return completion("Hm.") if len(silent) == 30 else longer(body)

    settings = {"num_rollouts": 3, "save_strategy": "steps", "save_steps": 4, "save_total_limit": None}
    server.says = mostly_longer
    straight = run(tmp_path, server, **settings)
    asked = len(server.bodies)
    wanted = logged(tmp_path)
    server.says = lambda body: completion("B")  # would say otherwise
    resumed = run(tmp_path, server, resume=str(tmp_path / "checkpoint-4"), **settings)
    assert len(server.bodies) == asked > 30
    assert_same_weights(straight.shared, resumed.shared)
    for row, before in zip(logged(tmp_path, after=4), wanted[1:], strict=True):
        assert row.pop("rollout/judge_calls") == 0 < before.pop("rollout/judge_calls")
        assert row == before


def test_an_evaluation_asks_nobody_and_counts_a_tie(server, tmp_path):
    plain = run(tmp_path / "plain", None, even_share, score_normalization="none", **EVERY)
    before = len(server.bodies)
    watched = run(
        tmp_path / "watched", server, even_share, weights=[1.0, 0.0], score_normalization="none", **EVERY
    )
    assert_same_weights(plain.shared, watched.shared)
    assert logged(tmp_path / "plain", "eval_score") == logged(tmp_path / "watched", "eval_score")
    calls = sum(row["rollout/judge_calls"] for row in logged(tmp_path / "watched"))
    assert len(server.bodies) - before == calls
    run(tmp_path / "paid", server, even_share, weights=[1.0, 1.0], score_normalization="none", **EVERY)
    (first, *_) = logged(tmp_path / "paid", "eval_score")
    assert 0.5 < first["eval_score"] < 1.5 and "eval_objective" in first
    args = config(tmp_path, num_generations=4, advantage_estimator="rloo", **EVERY)
    (line,) = judging_plan(RewardMix([even_share, a_judge(server, tmp_path)]), args, 64, resumed=False)
    assert "Evaluations have one reply to a prompt, which counts as a tie" in line


def test_what_a_judge_cannot_compare_is_refused(server, tmp_path):
    with pytest.raises(UserError, match=r"m compares the replies.*num_generations=1.*Set num_generations: 2"):
        run(tmp_path, server, even_share, advantage_estimator="gae", num_generations=1)
    with pytest.raises(UserError, match=r"eval_strategy: .*Set eval_strategy: no"):
        run(tmp_path, server, **EVERY)
    assert server.bodies == []


def test_a_server_that_fails_ends_the_run_and_the_checkpoint_goes_on(server, tmp_path):
    settings = {"num_rollouts": 3, "save_strategy": "steps", "save_steps": 4, "score_normalization": "none"}
    refused = 401, {"error": {"message": "no"}}
    server.says = lambda body: longer(body) if len(server.bodies) <= 60 else refused
    with pytest.raises(UserError, match=r"\(401\).*--resume_from_checkpoint latest goes on"):
        run(tmp_path, server, **settings)
    server.says = longer
    resumed = run(tmp_path, server, resume="latest", **settings)
    straight = run(tmp_path / "straight", server, **settings)
    assert_same_weights(straight.shared, resumed.shared)


def test_prompts_of_text_are_sent_as_they_are(server, tmp_path):
    rows = prompt_rows(64).map(lambda row: {"prompt": [{"role": "user", "content": str(row["input_ids"])}]})
    one_rollout(tmp_path, server, rows, "grpo")
    sent = [question(body)["request"] for body in server.bodies]
    assert sent and all(request in rows["prompt"] for request in sent)


def test_each_of_two_processes_asks_about_its_own_prompts(server, tmp_path):
    folder = tmp_path / "run"

    def work(rank):
        judge = served_judge(
            "openai:m", base_url=server.url, rubric=None, cache=folder / CACHE_FILE, process=rank
        )
        ppo = trainer(
            folder,
            shared=fresh(critic=None),
            reward=[even_share, judge],
            advantage_estimator="rloo",
            num_generations=4,
            **WHOLE,
        )
        ppo.train()
        return judge.judge.asked.calls

    calls = on_ranks(work, tmp_path / "ranks")
    assert min(calls) > 0 and sum(calls) == len(server.bodies)
    cached = [read_jsonl(folder / name) for name in (CACHE_FILE, "judge_cache_1.jsonl")]
    assert [len(rows) for rows in cached] == calls
    # One row of both: calls are a sum, and agreement is of all pairs
    rows = logged(folder)
    assert len(rows) == 2
    assert sum(row["rollout/judge_calls"] for row in rows) <= sum(calls) < 3 * 96
    assert all(0 <= row["judge/m"] <= 1 for row in rows)


def test_a_prompt_that_is_drawn_twice_in_a_row_costs_no_more_than_was_told(server, tmp_path):
    rows = prompt_rows(64).select([0] * 64)
    one_rollout(tmp_path, server, rows, "rloo")
    assert 0 < len(server.bodies) <= 16
