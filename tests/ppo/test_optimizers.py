"""Optimizers of bitsandbytes by choice: ``optim`` of transformers reaches both groups, policy and
critic."""

import pytest
import tiny
import tiny_runs
import torch


@pytest.mark.parametrize(
    ("optim", "state"),
    [("adamw_8bit", torch.uint8), ("paged_adamw_8bit", torch.uint8), ("paged_adamw_32bit", torch.float32)],
)
def test_policy_and_critic_train_by_it(optim, state, tmp_path):
    # Matrices of 4096 and more
    shared = tiny.shared(
        tiny.base(intermediate_size=1400), layers="top-1", critic="adapter", reference="copy"
    )
    tiny.randomise(shared, std=0.0)
    shared._copy_role("policy", "reference")
    trainer = tiny_runs.trainer(
        tmp_path, shared=shared, optim=optim, num_rollouts=1, value_learning_rate=3e-3
    )
    before = tiny_runs.trained_parameters(shared)
    trainer.train()
    after = tiny_runs.trained_parameters(shared)
    assert all((after[name] != before[name]).any() for name in before)
    inner = trainer.optimizer.optimizer
    assert type(inner).__module__.startswith("bitsandbytes") and inner.is_paged == optim.startswith("paged")
    assert [group["lr"] for group in inner.param_groups] == [1e-2, 3e-3]
    moments = {
        inner.state[p]["state1"].dtype
        for group in inner.param_groups
        for p in group["params"]
        if p.numel() >= 4096
    }
    assert moments == {state}
