"""goose_lora.ppo.update: the pass that scoring has made is the first pass of the update, and the
run is the run without that."""

import pytest
import tiny
import torch
from tiny_runs import fresh, logged, trained_parameters, trainer, with_reward_adapter

from goose_lora.ppo.collector import RolloutCollector
from goose_lora.ppo.update import Updater

WHOLE = {
    "num_mini_batches": 1,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 8,
    "num_rollouts": 3,
}


def ends_at(folder, monkeypatch=None, **changes):
    """Parameters and log of a run; with ``monkeypatch``, of one that keeps no graph."""
    if monkeypatch is not None:
        monkeypatch.setattr(Updater, "goes_on_from_scoring", lambda self, rollout, *, step: False)
    run = trainer(folder, **(WHOLE | changes))
    run.train()
    return trained_parameters(run.shared), logged(folder)


def forwards(run):
    """Counts the forwards of policy and critic, and those with a graph."""
    counts = {"all": 0, "with a graph": 0}
    forward = run.shared.forward

    def counted(*args, **kwargs):
        counts["all"] += 1
        counts["with a graph"] += torch.is_grad_enabled()
        return forward(*args, **kwargs)

    run.shared.forward = counted
    return counts


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"num_ppo_epochs": 1}, 1 + 3),  # one pass for scoring and update, but in the first rollout
        ({"num_ppo_epochs": 2}, 1 + 2 * 3),
        ({"num_ppo_epochs": 1, "num_mini_batches": 2, "per_device_train_batch_size": 4}, 3 + 2 * 3),
        (
            {"num_ppo_epochs": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
            3 + 2 * 3,
        ),
        ({"num_ppo_epochs": 1, "max_tokens_per_microbatch": 10_000}, 3 + 3),
    ],
)
def test_the_first_pass_of_an_update_is_that_of_scoring_where_it_is_the_same(tmp_path, changes, want):
    run = trainer(tmp_path, score_normalization="none", **(WHOLE | changes))
    counts = forwards(run)
    run.train()
    assert counts["all"] == want


CASES = {
    "adapter": {},
    "entropy": {"entropy_coef": 0.1, "num_ppo_epochs": 1},
    "exact KL in the loss": {"kl_location": "loss", "kl_estimator": "exact", "kl_coef": 0.3},
    "k3 in the loss": {"kl_location": "loss", "kl_estimator": "k3", "kl_coef": 0.3},
    "rloo": {"advantage_estimator": "rloo", "num_generations": 2},
    "guarded": {"ratio_threshold": 1.05, "learning_rate": 5e-2},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", CASES)
def test_the_run_is_the_one_that_passes_twice(name, tmp_path, monkeypatch):
    settings = CASES[name]
    roles = {"critic": None} if name == "rloo" else {}
    got, figures = ends_at(tmp_path / "kept", shared=fresh(**roles), **settings)
    want, wanted = ends_at(tmp_path / "twice", monkeypatch, shared=fresh(**roles), **settings)
    assert got.keys() == want.keys() and len(got) > 10
    for parameter, other in zip(got.values(), want.values(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=2e-5)
    assert [row.keys() for row in figures] == [row.keys() for row in wanted]
    for key in ("loss", "grad_norm", "policy/entropy", "objective/kl"):
        assert [row[key] for row in figures] == pytest.approx(
            [row[key] for row in wanted], rel=1e-3, abs=1e-4
        ), key


@pytest.mark.parametrize("critic", ["shared", "reward_features"])
def test_so_it_is_with_a_critic_on_the_states_of_another_role(critic, tmp_path, monkeypatch):
    got, _ = ends_at(tmp_path / "kept", shared=with_reward_adapter(tmp_path / "judge", critic=critic))
    want, _ = ends_at(
        tmp_path / "twice", monkeypatch, shared=with_reward_adapter(tmp_path / "judge", critic=critic)
    )
    for parameter, other in zip(got.values(), want.values(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=2e-5)


def test_out_of_memory_with_the_graph_goes_on_without(tmp_path, monkeypatch, caplog):
    want, _ = ends_at(tmp_path / "plain")
    evaluate, asked = RolloutCollector.evaluate, []

    def short(self, rollout, *, score=True, keep_graph=False):
        asked.append(keep_graph)
        if keep_graph:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return evaluate(self, rollout, score=score)

    monkeypatch.setattr(RolloutCollector, "evaluate", short)
    got, _ = ends_at(tmp_path / "short")
    assert asked == [False, True, False, False], "once, and not again"
    assert "out of memory" in caplog.text and "Set max_tokens_per_microbatch" in caplog.text
    for parameter, other in zip(got.values(), want.values(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=2e-5)


def test_out_of_memory_in_the_backward_of_a_kept_pass_goes_on_in_halves(tmp_path, monkeypatch):
    want, _ = ends_at(tmp_path / "plain")
    run = trainer(tmp_path / "short", **WHOLE)
    backward, failed = run.accelerator.backward, []

    def short(loss, **kwargs):
        if run.state.global_step == 2 and not failed:
            failed.append(loss)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return backward(loss, **kwargs)

    monkeypatch.setattr(run.accelerator, "backward", short)
    run.train()
    assert failed
    for parameter, other in zip(trained_parameters(run.shared).values(), want.values(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=2e-5)


def test_the_graph_of_a_rollout_in_several_groups_is_refused(tmp_path):
    run = trainer(tmp_path, **WHOLE)
    ids, mask = tiny.batch()
    rollout = run.collector.generate(ids, mask)
    run.collector.batch_size = 2
    with pytest.raises(ValueError, match="3 replies are more than one group of 2"):
        run.collector.evaluate(rollout, keep_graph=True)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_no_microbatch_copies_the_gradients_of_those_before_it(accumulation, tmp_path, monkeypatch):
    clones = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda x, **how: clones.append(x.shape) or clone(x, **how))
    run = trainer(
        tmp_path,
        num_rollouts=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        num_mini_batches=1,
        num_ppo_epochs=1,
    )
    learn, counted = run.updater.learn, []

    def counting(*args):
        before = len(clones)
        loss = learn(*args)
        counted.append(len(clones) - before)
        return loss

    run.updater.learn = counting
    run.train()
    trained = len(trained_parameters(run.shared))
    assert len(counted) == accumulation and max(counted) < trained, counted
