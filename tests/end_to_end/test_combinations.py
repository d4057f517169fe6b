"""Settings drawn at random: whatever goes together trains on finite numbers, goes on after a stop
as if there had been none, and leaves all processes alike.

``--full`` draws 150 combinations for one process, 60 for two, and 30 in which settings of memory
and speed are turned on and off; the usual suite a few of each.
"""

import math

import combinations
import pytest
import torch
from combinations import (
    Bases,
    adapter_weights,
    broken_figures,
    copy_checkpoint,
    differences,
    figures,
    unequal,
)
from ranks import on_ranks


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    for name, (few, all_of_them) in {"alone": (6, 150), "together": (2, 60), "toggled": (1, 30)}.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, range(all_of_them if full else few))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return Bases(tmp_path_factory.mktemp("bases"))


def test_a_combination_is_finite_and_equal_on_resume(alone, bases, tmp_path):
    made = combinations.draw(alone)
    run = bases.trainer(made, tmp_path / "run")
    before = adapter_weights(run)
    run.train()
    after, steps = adapter_weights(run), run.args.steps_per_rollout
    assert not [name for name, weight in after.items() if not torch.isfinite(weight).all()]
    assert broken_figures(tmp_path / "run") == []
    if not made.settings.get("load_best_model_at_end"):
        assert unequal(before, after), "something trains"
    if run.state.global_step == steps:
        return  # it has stopped early
    checkpoint = copy_checkpoint(tmp_path / "run", tmp_path / "again", steps)
    again = bases.trainer(made, tmp_path / "again")
    torch.manual_seed(12345)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == run.state.global_step
    assert unequal(after, adapter_weights(again)) == []
    of_run, of_again = (figures(tmp_path / name, after=steps) for name in ("run", "again"))
    assert differences(of_run, of_again) == []


def test_processes_are_alike_and_equal_on_resume(together, bases, tmp_path):
    made = combinations.draw(10_000 + together)
    made = made._replace(rows=max(made.rows, 40))
    made.settings["load_best_model_at_end"] = False  # both would read what one writes
    checkpoint = None

    def work(rank):
        folder = tmp_path / ("run" if checkpoint is None else "again")
        trainer = bases.trainer(made, folder)
        if checkpoint is not None:
            torch.manual_seed(99)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return {
            "weights": adapter_weights(trainer),
            "done": trainer.state.global_step,
            "steps": trainer.args.steps_per_rollout,
        }

    one, other = on_ranks(work, tmp_path / "ranks")
    assert unequal(one["weights"], other["weights"]) == []
    assert broken_figures(tmp_path / "run") == []
    if one["done"] == one["steps"]:
        return
    checkpoint = copy_checkpoint(tmp_path / "run", tmp_path / "again", one["steps"])
    for before, after in zip((one, other), on_ranks(work, tmp_path / "ranks again"), strict=True):
        assert after["done"] == before["done"]
        assert unequal(before["weights"], after["weights"]) == []
    of_run, of_again = (figures(tmp_path / name, after=one["steps"]) for name in ("run", "again"))
    assert differences(of_run, of_again) == []


PLAIN = {"reuse_trunk": False, "gradient_checkpointing": False, "max_tokens_per_microbatch": None}
TOGGLES = {
    "trunk": {"reuse_trunk": True},
    "trunk on the host": {"reuse_trunk": True, "trunk_memory": "host"},
    "checkpointing": {"gradient_checkpointing": True},
    "parts": {"max_tokens_per_microbatch": 17},
    "all": {"reuse_trunk": True, "gradient_checkpointing": True, "max_tokens_per_microbatch": 17},
    "dense": {"reuse_trunk": True, "rollout_weights": "auto"},
}
# One update by plain gradient descent, in which nothing hides a small difference or blows it up
ONE_UPDATE = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "value_learning_rate": 0.05,
    "ratio_threshold": None,
    "num_rollouts": 1,
    "save_strategy": "no",
    "eval_strategy": "no",
    "lr_scheduler_type": "constant",
    "value_lr_scheduler_type": None,
    "warmup_steps": 0,
    "value_warmup_steps": 0,
    "critic_warmup_rollouts": 0,
    "max_grad_norm": 1e9,
    "weight_decay": 0.0,
    "rollout_weights": "shared",
    "early_stopping_patience": None,
    "load_best_model_at_end": False,
    "eval_on_start": False,
    "num_ppo_epochs": 1,
    "logging_steps": 1,
}


def test_memory_and_speed_are_turned_on_and_off_without_another_result(toggled, bases, tmp_path):
    made = combinations.draw(20_000 + toggled)._replace(dtype="float32", evaluated=False)
    for name in ("save_steps", "eval_steps"):
        made.settings.pop(name, None)

    def update(name, changes):
        trainer = bases.trainer(made, tmp_path / name, **ONE_UPDATE | PLAIN | changes)
        before = adapter_weights(trainer)
        trainer.train()
        return {key: weight - before[key] for key, weight in adapter_weights(trainer).items()}

    def size(of):
        return math.sqrt(sum(x.double().square().sum().item() for x in of.values()))

    want = update("plain", {})
    for name, changes in TOGGLES.items():
        got = update(name, changes)
        assert size({key: got[key] - want[key] for key in want}) <= 2e-3 * size(want), name
