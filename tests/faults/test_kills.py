"""Runs that are killed without warning, again and again, end where the one that was left alone
ends: weights, metrics and samples."""

import random

import forks
import pytest
from forks import Moment, assert_same_leavings

KINDS = ("rollout", "forward", "update", "file", "file")


def killed_again_and_again(name, folder, settings, kills, seed):
    """How often it was killed until it ended as the one that is left alone, from whose moments
    those of the kills are drawn."""
    straight = forks.run(name, folder / "straight", **settings)
    assert straight.code == 0, straight.output[-3000:]
    generator = random.Random(seed)
    killed, done = 0, 0
    while killed < kills or done == 0:
        broken, moment = folder / f"broken-{done}", None
        if killed < kills:
            kind = generator.choice([kind for kind in KINDS if straight.counts[kind]])
            moment = Moment(kind, generator.randint(1, max(1, straight.counts[kind] // 2)))
        ended = forks.run(name, broken, moment, **settings, resume_from_checkpoint="latest")
        assert ended.code in (0, -9), ended.output[-3000:]
        killed += ended.code != 0
        if ended.code == 0:
            done += 1
            assert_same_leavings(folder / "straight", broken)
    return killed


ADAPTIVE = {
    "kl_target": 1.0,
    "kl_horizon": 50,
    "score_normalization": "running",
    "ema_decay": 0.9,
    "critic_warmup_rollouts": 1,
}
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "num_eval_prompts": 4,
    "load_best_model_at_end": True,
    "save_total_limit": 1,
}
RLOO = {
    "advantage_estimator": "rloo",
    "num_generations": 2,
    "lr_scheduler_type": "linear",
    "save_total_limit": 1,
}
KILLED: list[int] = []


@pytest.mark.parametrize(
    ("name", "changes", "kills", "seed"),
    [
        ("ppo", ADAPTIVE, 8, 1),
        ("ppo", BEST, 7, 2),
        ("ppo", RLOO, 7, 3),
        ("own_loop", {"critic": "shared"}, 4, 4),
        ("sft", {}, 3, 5),
        ("reward", {}, 3, 6),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_where_it_would_have_ended(
    name, changes, kills, seed, given, tmp_path
):
    settings = given[name] | changes
    if "eval_strategy" in changes:
        settings["eval_dataset_name"] = settings["dataset_name"]
    KILLED.append(killed_again_and_again(name, tmp_path, settings, kills, seed))


def test_twenty_kills_or_more_were_survived():
    assert sum(KILLED) >= 20, KILLED
