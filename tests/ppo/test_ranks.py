"""What the processes of a run exchange has one form and one order on all of them, whatever each of
them has seen."""

import random

import pytest
import tiny_runs
import torch
from ranks import on_ranks

from goose_lora.ppo import update
from goose_lora.ppo.metrics import RunMetrics

SETTINGS = {
    "num_rollouts": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_mini_batches": 2,
    "logging_steps": 2,
    "learning_rate": 1e-3,
}


def run_on_two(folder, skips, **changes):
    """A run on two processes of which each skips what ``skips(rank, call)`` says; what each has
    logged, what went into it, and its weights."""

    def work(rank):
        calls, seen = [], {"local": [], "logged": []}
        real, take = update.leaves_bounds, RunMetrics.take

        def leaves(output, inputs, threshold):
            calls.append(0)
            said = skips(rank, len(calls))
            return real(output, inputs, threshold) if said is None else torch.tensor(said)

        def noting(self):
            steps = self.steps
            seen["local"].append({name: float(total) / steps for name, total in self._totals.items()})
            seen["logged"].append(take(self))
            return seen["logged"][-1]

        update.leaves_bounds, RunMetrics.take = leaves, noting
        trainer = tiny_runs.trainer(
            folder / "run", shared=tiny_runs.fresh(critic="adapter"), **SETTINGS | changes
        )
        trainer.train()
        return seen | {"weights": tiny_runs.trained_parameters(trainer.shared)}

    return on_ranks(work, folder / "ranks")


def assert_one_log_and_one_policy(ranks):
    one, other = ranks
    assert [list(row) for row in one["logged"]] == [list(row) for row in other["logged"]], "keys in order"
    torch.testing.assert_close(one["logged"], other["logged"], rtol=0, atol=0, equal_nan=True)
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name]), name
    for row, mine, theirs in zip(one["logged"], one["local"], other["local"], strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert row[name] == pytest.approx((mine[name] + theirs[name]) / 2, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    "skips",
    [
        lambda rank, call: rank == 0 and call == 1,  # what one has seen first, the other has not
        lambda rank, call: rank == 1,  # one process never learns
        lambda rank, call: True,
    ],
    ids=["first on one", "all on one", "all"],
)
def test_a_microbatch_skipped_on_one_process_leaves_each_figure_its_own(tmp_path, skips):
    assert_one_log_and_one_policy(run_on_two(tmp_path, skips, ratio_threshold=2.0))


@pytest.mark.parametrize("seed", range(3))
def test_fuzzed_skipping_near_a_ratio_of_1(tmp_path, seed):
    chance = random.Random(seed)
    changes = {
        "ratio_threshold": 1 + 10 ** chance.uniform(-6, -2),
        "num_mini_batches": chance.choice([1, 2]),
        "num_ppo_epochs": chance.choice([1, 3]),
        "logging_steps": chance.choice([1, 2, 3]),
        "max_tokens_per_microbatch": chance.choice([None, 12]),
    }
    ranks = run_on_two(tmp_path, lambda rank, call: None, **changes)
    assert_one_log_and_one_policy(ranks)
