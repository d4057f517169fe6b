"""A second round of PPO: the policy goes on from the first round's, and the KL is to the first
SFT's folder. Compared with plain transformers and PEFT, a reply at a time."""

import pytest
import tiny
import tiny_runs
import torch
from peft import PeftModel, get_peft_model

from goose_lora.models.shared_base import SharedBase


def saved(folder, std, seed):
    base = tiny.base()
    adapter = get_peft_model(base, tiny.lora(base, layers="top-2"))
    tiny.randomise(adapter, std=std, seed=seed)
    adapter.save_pretrained(folder)
    return folder


@torch.no_grad()
def logprobs_of(folder, rollout):
    """Sums of log-probabilities of the replies under an adapter on a base of its own."""
    model = PeftModel.from_pretrained(tiny.base(), folder).eval()
    sums, width = [], rollout.response_mask.shape[1]
    for ids, attended, counted in zip(
        rollout.input_ids, rollout.attention_mask.bool(), rollout.response_mask, strict=True
    ):
        row, reply = ids[attended][None], int(counted.sum())
        prompt = row.shape[1] - int(attended[-width:].sum())
        log_p = model(input_ids=row).logits[0].log_softmax(-1)
        places = range(prompt, prompt + reply)
        sums.append(sum(log_p[place - 1, row[0, place]].item() for place in places))
    return torch.tensor(sums)


@pytest.mark.parametrize("critic", ["adapter", "shared"])
def test_the_kl_is_to_the_folder_of_the_first_sft_and_the_round_trains(tmp_path, critic):
    sft, first = saved(tmp_path / "sft", 0.1, 3), saved(tmp_path / "first", 0.3, 4)
    shared = SharedBase.build(tiny.base(), first, reference=sft, critic=critic)
    run = tiny_runs.trainer(
        tmp_path / "second", shared=shared, logging_steps=1, num_ppo_epochs=1, num_mini_batches=1
    )
    seen, evaluate = [], run.collector.evaluate
    run.collector.evaluate = lambda rollout, **how: seen.append(rollout) or evaluate(rollout, **how)
    before = tiny_runs.trained_parameters(shared)
    reference = {name: p.clone() for name, p in shared.role_parameters("reference")}
    run.train()
    # Past the first step, both rollouts, and the reference stays
    assert run.state.global_step == 2
    after = tiny_runs.trained_parameters(shared)
    assert any(not torch.equal(weight, after[name]) for name, weight in before.items())
    assert all(torch.equal(p, reference[name]) for name, p in shared.role_parameters("reference"))
    # The first rollout, when the policy is still what its folder says
    rollout = seen[-2]
    wanted = (logprobs_of(first, rollout) - logprobs_of(sft, rollout)).mean().item()
    row = tiny_runs.logged(tmp_path / "second")[0]
    assert row["objective/kl"] == pytest.approx(wanted, rel=1e-4, abs=1e-4) and abs(wanted) > 0.1
