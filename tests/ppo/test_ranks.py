"""What the processes of a run exchange has one form and one order on all of them, whatever each of
them has seen."""

import random

import pytest
import tiny_runs
import torch
from ranks import on_ranks

from goose_lora.ppo import update
from goose_lora.ppo.metrics import LEFT_OUT, RunMetrics

SETTINGS = {
    "num_rollouts": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_mini_batches": 2,
    "logging_steps": 2,
    "learning_rate": 1e-3,
}


def run_on(folder, skips, processes=2, **changes):
    """A run on some processes of which each skips what ``skips(rank, call)`` says; what each has
    logged, what went into it, ratios and entropies of all that was not skipped, and its weights."""

    def work(rank):
        calls, seen = [], {"local": [], "logged": [], "kept": []}
        real, take = update.leaves_bounds, RunMetrics.take

        def leaves(output, inputs, threshold):
            calls.append(0)
            said = skips(rank, len(calls))
            left = real(output, inputs, threshold) if said is None else torch.tensor(said)
            if not left:
                mask = inputs.response_mask
                ratio = (output.logprobs.detach() - inputs.old_logprobs).exp()[mask]
                seen["kept"].append([ratio.sum(), output.entropy.detach()[mask].sum(), mask.sum()])
            return left

        def noting(self):
            steps = self.steps
            rollouts = len(self._rollouts.get("objective/score", [])) or 1
            of_one = {name: rollouts if name.startswith("seconds/") else steps for name in self._totals}
            seen["local"].append({name: float(total) / of_one[name] for name, total in self._totals.items()})
            seen["kept"] = [*seen["kept"], None]  # a log
            seen["logged"].append(take(self))
            return seen["logged"][-1]

        update.leaves_bounds, RunMetrics.take = leaves, noting
        trainer = tiny_runs.trainer(
            folder / "run", shared=tiny_runs.fresh(critic="adapter"), **SETTINGS | changes
        )
        trainer.train()
        return seen | {"weights": tiny_runs.trained_parameters(trainer.shared)}

    return on_ranks(work, folder / "ranks", processes)


def assert_one_log_and_one_policy(ranks):
    one, other = ranks
    assert [list(row) for row in one["logged"]] == [list(row) for row in other["logged"]], "keys in order"
    torch.testing.assert_close(one["logged"], other["logged"], rtol=0, atol=0, equal_nan=True)
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name]), name
    for row, mine, theirs in zip(one["logged"], one["local"], other["local"], strict=True):
        both = {
            name: (mine.get(name, 0.0) + theirs.get(name, 0.0)) / 2 for name in mine.keys() | theirs.keys()
        }
        for name in (name for name in both if not name.startswith(LEFT_OUT)):
            counted = 1 - both.get(LEFT_OUT + name, 0.0)  # the part of all tokens that was not skipped
            if counted < 1e-6:
                assert name not in row, "a mean of nothing"
            else:
                assert row[name] == pytest.approx(both[name] / counted, rel=1e-4, abs=1e-6), name


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
    assert_one_log_and_one_policy(run_on(tmp_path, skips, ratio_threshold=2.0))


@pytest.mark.parametrize("one_process", [True, False])
def test_figures_are_means_over_what_was_not_skipped(one_process, tmp_path):
    def skips(rank, call):
        return call % 3 == rank  # in each step another part, and here and there a whole one

    settings = {"ratio_threshold": 2.0, "logging_steps": 1, "num_mini_batches": 2, "num_ppo_epochs": 2}
    ranks = run_on(tmp_path, skips, 1 if one_process else 2, **settings)
    kept = [_by_log(rank["kept"]) for rank in ranks]
    seen = 0
    for number, row in enumerate(ranks[0]["logged"]):
        ratios, entropies, tokens = torch.stack([each[number] for each in kept]).sum(0).tolist()
        if not tokens:
            assert "policy/ratio_mean" not in row and "policy/entropy" not in row
            assert row["policy/skipped"] == pytest.approx(1)
            continue
        seen += row["policy/skipped"] > 0
        assert row["policy/ratio_mean"] == pytest.approx(ratios / tokens, rel=1e-5)
        assert row["policy/entropy"] == pytest.approx(entropies / tokens, rel=1e-5)
    assert seen >= 2


def _by_log(kept):
    """Sums of what was not skipped between one log and the next: a row each."""
    sums, rows = torch.zeros(3), []
    for part in kept:
        if part is None:
            rows.append(sums)
            sums = torch.zeros(3)
        else:
            sums = sums + torch.stack([torch.as_tensor(x, dtype=torch.float32) for x in part])
    return rows


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
    ranks = run_on(tmp_path, lambda rank, call: None, **changes)
    assert_one_log_and_one_policy(ranks)
