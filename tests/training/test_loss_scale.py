"""Training in float16, which a CPU simulates: the scale of the loss, what it leaves out, and what
is a fault all the same."""

import json
import logging
import math
import shutil

import pytest
import tiny
import torch
from datasets import Dataset
from ranks import on_ranks
from tiny_runs import assert_same_weights, even_share, logged, prompt_rows, trainer
from trl import SFTConfig, SFTTrainer

from goose_lora.data.tokenization import left_pad
from goose_lora.errors import UserError
from goose_lora.generation.sampling import sample
from goose_lora.models.loading import load_base, load_tokenizer
from goose_lora.models.shared_base import SharedBase
from goose_lora.training import loss_scale
from goose_lora.training.callbacks import NotFinite
from goose_lora.training.resume import Resumable

SAVING = {"save_strategy": "steps", "save_steps": 4}


class SFT(Resumable, SFTTrainer):
    stage = "sft"


def built(dtype=torch.float16):
    """A base whose policy is its own reference, and whose critic is random."""
    shared = tiny.shared(tiny.base().to(dtype), layers="top-2", critic="adapter", reference="copy")
    tiny.randomise(shared, "default", std=0.0)
    shared._copy_role("policy", "reference")
    return shared


def ppo(folder, *, scale=None, **changes):
    """A run in float16, at a loss scale of the test's."""
    run = trainer(folder, shared=built(), **changes)
    if scale is not None:
        run.accelerator.scaler._init_scale = scale
    return run


def test_what_trains_is_fp32_and_the_scale_is_logged(tmp_path):
    run = ppo(tmp_path)
    run.train()
    assert {p.dtype for p in run.shared.parameters() if p.requires_grad} == {torch.float32}
    rows = logged(tmp_path, "loss")
    assert [(row["loss_scale"], row["loss_scale_skips"]) for row in rows] == [(4096.0, 0)] * 2
    assert all(row["policy/not_finite"] == 0 for row in rows)


def test_gradients_are_those_of_fp32_before_they_are_clipped(tmp_path):
    """A gradient that were clipped with its scale on would be nothing but its direction."""
    runs = {torch.float32: trainer(tmp_path / "32", shared=built(torch.float32)), torch.float16: None}
    runs[torch.float16] = ppo(tmp_path / "16")
    prompts, norms = prompt_rows()[:8]["input_ids"], {}
    replies = [[5 + row, 7, 9, 4] for row in range(8)]
    for dtype, run in runs.items():
        run.args.max_grad_norm = 1e-3
        texts = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
        width = max(map(len, texts))
        ids = torch.tensor([[tiny.PAD] * (width - len(text)) + text for text in texts])
        run.create_optimizer()
        run.optimizer = run.accelerator.prepare(run.optimizer)
        shown = torch.ones(8, 4, dtype=torch.bool)
        loss = -run.shared(ids, (ids != tiny.PAD).long(), shown).logprobs.mean()
        run.accelerator.backward(loss)
        norms[dtype] = run.accelerator.clip_grad_norm_(run.shared.parameters(), 1e-3).item()
        clipped = [p.grad for p in run.shared.parameters() if p.grad is not None]
        assert torch.nn.utils.get_total_norm(clipped).item() == pytest.approx(1e-3, rel=1e-2)
    assert norms[torch.float16] == pytest.approx(norms[torch.float32], rel=0.02)


def test_a_scale_that_is_too_large_is_halved_and_is_no_fault(tmp_path, caplog):
    run = ppo(tmp_path, scale=2.0**30, num_rollouts=5)
    with caplog.at_level(logging.INFO, logger="goose_lora"):
        run.train()
    rows = logged(tmp_path, "loss")
    assert rows[0]["loss_scale_skips"] == 4, "as many as there were steps, and more than three in a row"
    assert rows[-1]["loss_scale_skips"] == 0 and rows[-1]["loss_scale"] < 2.0**25
    assert sum(row["loss_scale_skips"] for row in rows) == 30 - math.log2(rows[-1]["loss_scale"])
    assert all(row["policy/not_finite"] == 0 for row in rows)
    assert "step 1 is left out: a gradient overflowed at the loss scale 1.07374e+09" in caplog.text
    assert "Causes:" not in caplog.text, "nothing is wrong with the run"
    # A norm that is none is no figure
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()
    json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)


def test_a_loss_that_is_not_finite_is_a_fault_at_any_scale(tmp_path):
    run = ppo(tmp_path, num_rollouts=3)
    compute = run.compute_loss
    run.compute_loss = lambda *args, **kwargs: compute(*args, **kwargs) * float("nan")
    with pytest.raises(NotFinite, match="step 3: the gradient is not finite for the 3rd time in a row"):
        run.train()


def test_gradients_that_overflow_without_a_scale_are_a_fault(tmp_path):
    run = ppo(tmp_path, scale=1.0, num_rollouts=3)
    compute = run.compute_loss

    def steep(*args, **kwargs):
        loss = compute(*args, **kwargs)
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    run.compute_loss = steep
    with pytest.raises(NotFinite, match="step 3"):
        run.train()


def test_a_run_goes_on_at_its_scale(tmp_path):
    scale = {"scale": 2.0**33, "num_rollouts": 4}
    straight = ppo(tmp_path / "straight", **scale)
    straight.train()
    saving = SAVING | {"save_steps": 8}
    first = ppo(tmp_path / "run", **scale, **saving)
    first.train()
    checkpoint = tmp_path / "run" / "checkpoint-8"
    kept = torch.load(checkpoint / loss_scale.SCALER_FILE, weights_only=True)
    assert kept["scale"] < 2.0**33, "it had overflowed by then"
    again = ppo(tmp_path / "run", num_rollouts=4, **saving)  # whose own would be 4096
    again.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(straight.shared, again.shared)
    assert logged(tmp_path / "straight", "loss") == logged(tmp_path / "run", "loss")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "scaler.pt is missing, without which a run does not go on as it was"),
        ({"scale": 0.0}, "scaler.pt: scale is 0.0"),
        ({"scale": float("inf")}, "scaler.pt: scale is inf"),
        ({"backoff_factor": 2.0}, "would not become smaller"),
        ({"_growth_tracker": 99}, "its scale is 99 steps old"),
        ("nothing", "holds no scale of a loss"),
    ],
)
def test_a_checkpoint_without_a_scale_is_not_gone_on_from(saved, tmp_path, change, said):
    from goose_lora.training import checkpoints

    folder = shutil.copytree(saved, tmp_path / "run") / "checkpoint-4"
    file = folder / loss_scale.SCALER_FILE
    if change is None:
        file.unlink()
    elif isinstance(change, dict):
        torch.save(torch.load(file, weights_only=True) | change, file)
    else:
        torch.save([change], file)
    # Sealed again: what is wrong is in the file, not in its checksum
    manifest = json.loads((folder / checkpoints.MANIFEST).read_text())
    checkpoints.seal(folder, {key: value for key, value in manifest.items() if key != "files"})
    with pytest.raises(UserError, match=said):
        ppo(tmp_path / "run", **SAVING).train(resume_from_checkpoint=str(folder))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    ppo(folder, num_rollouts=1, **SAVING).train()
    return folder


def test_two_processes_leave_out_the_same_steps(tmp_path):
    """Though the gradients of one of them alone overflow."""

    def work(rank):
        run = ppo(tmp_path / "run", scale=2.0**14, num_rollouts=2)
        compute = run.compute_loss

        def steeper(*args, **kwargs):
            loss = compute(*args, **kwargs)
            return loss * 2.0**40 if rank == 1 and run.state.global_step == 1 else loss

        run.compute_loss = steeper
        run.train()
        weights = {n: p.detach().clone() for n, p in run.shared.named_parameters() if p.requires_grad}
        scale = run.accelerator.scaler.get_scale()
        return {"weights": weights, "scale": scale, "steps": run.state.global_step}

    one, other = on_ranks(work, tmp_path / "ranks")
    assert (one["scale"], one["steps"]) == (other["scale"], other["steps"]) == (2.0**13, 8)
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name]) and weight.isfinite().all()
    assert sum(row["loss_scale_skips"] for row in logged(tmp_path / "run", "loss")) == 1


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_ppo_raises_a_toy_reward_in_float16(quantization, tmp_path):
    folder = tiny.save_base(tmp_path / "base", hidden_size=66, head_dim=22, intermediate_size=64)
    arguments = tiny.arguments(folder, quantization=quantization, dtype="float16", lora_layers="top-2")
    base = load_base(arguments, load_tokenizer(arguments))
    shared = SharedBase.build(base, tiny.lora_config(arguments, base), critic="adapter")
    run = trainer(
        tmp_path / "run",
        shared=shared,
        num_rollouts=8,
        per_device_train_batch_size=16,
        num_ppo_epochs=4,
    )
    assert run.accelerator.scaler is not None
    rows = [row["input_ids"] for row in prompt_rows()] * 2

    def mean_reward():
        torch.manual_seed(99)
        replies = sample(shared, *left_pad(rows, tiny.PAD), run.collector.generation).response_ids()
        return sum(even_share(replies)) / len(replies)

    before = mean_reward()
    run.train()
    assert mean_reward() - before > 0.1
    # Less of what is sampled is rounded away than in bfloat16, where it is 0.01
    gaps = [row["rollout/sampling_gap"] for row in logged(tmp_path / "run", "rollout/sampling_gap")]
    assert max(gaps) < (0.003 if quantization == "none" else 0.02)


def test_fine_tuning_learns_in_float16_and_its_loss_is_that_of_fp32(tmp_path):
    losses = {}
    for dtype in (torch.float32, torch.float16):
        base = tiny.base().to(dtype)
        rows = Dataset.from_list([{"input_ids": [5, 7, 9, 11, 13, 15], "labels": [5, 7, 9, 11, 13, 15]}] * 8)
        run = SFT(
            model=base,
            args=SFTConfig(
                output_dir=str(tmp_path / str(dtype)),
                max_steps=12,
                learning_rate=3e-2,
                bf16=False,
                use_cpu=True,
                report_to="none",
                logging_steps=1,
                save_strategy="no",
                gradient_checkpointing=False,
                disable_tqdm=True,
            ),
            train_dataset=rows,
            processing_class=tiny.tokenizer(),
            peft_config=tiny.lora(base),
        )
        run.train()
        losses[dtype] = [row["loss"] for row in run.state.log_history if "loss" in row]
        assert (run.accelerator.scaler is not None) == (dtype == torch.float16)
    assert losses[torch.float16][-1] < losses[torch.float16][0] / 2
    assert losses[torch.float16][:4] == pytest.approx(losses[torch.float32][:4], rel=0.1)
