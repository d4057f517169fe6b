"""A run whose groups of replies go by the memory there is: what it takes, and that it goes on so on
another card."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
from ranks import on_ranks
from recipe_runs import count_good, options, recipe
from safetensors.torch import load_file
from tiny_runs import assert_same_weights, config, logged, trainer

from goose_lora import cli
from goose_lora.cli import stage
from goose_lora.data.rows import DataArguments
from goose_lora.errors import UserError
from goose_lora.files import read_json
from goose_lora.models.arguments import ModelArguments
from goose_lora.training import checkpoints

GROUP = "local_rollout_forward_batch_size"


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A tiny run, of which rollouts take most; its folder; the memory for groups of so many."""
    folder = tmp_path_factory.mktemp("groups")
    base = tiny.save_base(folder / "base")
    data = tiny.write_rows(folder / "prompts.jsonl", tiny.prompts(64))
    settings = {
        "model_name_or_path": base,
        "dataset_name": data,
        "quantization": "none",
        "dtype": "float32",
        "lora_r": 3,
        "lora_layers": "top-1",
        "critic": "shared",
        "reward_function": f"{count_good.__code__.co_filename}:count_good",
        "score_normalization": "none",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 32,
        "num_rollouts": 3,
        "num_ppo_epochs": 1,
        "response_length": 6,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 5,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "rollout_weights": "shared",
    }

    def run(name, **changes):
        return recipe("ppo").main(options(**settings | changes, output_dir=folder / name))

    with pytest.MonkeyPatch.context() as patch:
        plans, real = [], stage.plan_run
        patch.setattr(stage, "plan_run", lambda *args, **kwargs: plans.append(real(*args, **kwargs)))
        with pytest.raises(AttributeError):
            run("never")
    plan = plans[0]
    return run, folder, lambda rows: plan.needed(replace(plan.sizes, rollout_rows=rows))


@pytest.fixture
def card(monkeypatch):
    """A card of so much memory, as the plan sees it."""
    return lambda memory: monkeypatch.setattr(stage, "free_bytes", lambda device: memory)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_takes_what_its_memory_holds_and_goes_on_so_on_a_larger_card(ready, card, capsys):
    run, folder, memory = ready
    card(memory(8))
    straight = run("straight")
    assert straight.collector.batch_size == 8 and straight.args.world_size == 1
    assert capsys.readouterr().out.count("Replies at a time: 8, ") == 1
    chosen = {GROUP: 8, "rollout_weights": "shared"}
    manifest = read_json(folder / "straight" / "checkpoint-1" / "checkpoint.json")
    assert manifest["chosen"] == read_json(folder / "straight" / "goose_lora.json")["chosen"] == chosen
    assert manifest["settings"][GROUP] is None, "what was asked stays what it was"

    # Another card would take the whole rollout at once, and draw other replies
    card(10**12)
    assert run("large").collector.batch_size == 64
    (folder / "resumed").mkdir()
    shutil.copytree(folder / "straight" / "checkpoint-1", folder / "resumed" / "checkpoint-1")
    resumed = run("resumed", resume_from_checkpoint=folder / "resumed" / "checkpoint-1")
    assert resumed.collector.batch_size == 8
    assert capsys.readouterr().out.count(f"kept from the checkpoint: {GROUP}: 8\n") == 1
    want, got, other = (weights(folder / name) for name in ("straight", "resumed", "large"))
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert not all(torch.equal(want[name], other[name]) for name in want)
    assert logged(folder / "resumed", after=1) == logged(folder / "straight", after=1)


def test_on_a_smaller_card_a_resumed_run_says_what_to_set_and_then_goes_on(ready, card, caplog):
    run, folder, memory = ready
    card(memory(8))
    run("wide", num_rollouts=1)
    card(memory(4))
    (folder / "narrow").mkdir()
    shutil.copytree(folder / "wide" / "checkpoint-1", folder / "narrow" / "checkpoint-1")
    resume = {"resume_from_checkpoint": folder / "narrow" / "checkpoint-1", "num_rollouts": 2}
    with pytest.raises(UserError, match=f"does not fit: .*{GROUP}"):
        run("narrow", **resume)
    went_on = run("narrow", **resume, **{GROUP: 4})
    assert went_on.collector.batch_size == 4
    assert "so that it ends otherwise: " in caplog.text and f"{GROUP} is None there and 4 here" in caplog.text


def test_two_processes_take_what_the_smaller_memory_holds(ready, tmp_path, monkeypatch):
    _, _, memory = ready

    def work(rank):
        # On a CPU both share the memory of one machine
        monkeypatch.setattr(stage, "free_bytes", lambda device: 2 * (memory(8) if rank else memory(32)))
        found = config(tmp_path / "run", **{GROUP: None}, per_device_train_batch_size=1)
        here = cli.Stage("ppo", found, ModelArguments("m"), DataArguments(dataset_name="rows"))
        seen = []
        monkeypatch.setattr(stage, "plan_run", lambda *args, memory, **kwargs: seen.append(memory))
        with pytest.raises(AttributeError):
            here.memory_plan(None, None, prompt_tokens=4, pretraining_length=8, force=False)
        return seen

    one, other = on_ranks(work, tmp_path)
    assert one == other == [memory(8)]


def test_a_group_that_was_halved_stays_halved_after_a_resume(tmp_path):
    settings = {
        "num_rollouts": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "save_total_limit": 5,
        GROUP: None,
    }
    straight = trainer(tmp_path / "straight", **settings)
    assert straight.collector.batch_size == 64
    straight.collector.batch_size = 4  # as after memory was short
    straight.train()
    resumed = trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    assert resumed.collector.batch_size == 4
    assert_same_weights(straight.shared, resumed.shared)
    # Whoever asks for other groups gets them
    asked = trainer(tmp_path / "asked", **settings | {GROUP: 8})
    asked.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    assert asked.collector.batch_size == 8


@pytest.mark.parametrize("first", ["shared", "dense"])
def test_auto_keeps_the_weights_that_the_run_began_with(first, tmp_path, monkeypatch):
    from goose_lora.models import dense_copy

    settings = {"num_rollouts": 2, "save_strategy": "steps", "save_steps": 4, "rollout_weights": "auto"}
    room = {"shared": 0, "dense": 10**12}
    monkeypatch.setattr(dense_copy, "free_bytes", lambda device: room[first])
    straight = trainer(tmp_path / "straight", **settings)
    straight.train()
    assert (straight.collector.dense is not None) == (first == "dense")
    monkeypatch.setattr(dense_copy, "free_bytes", lambda device: 10**12 - room[first])
    resumed = trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    assert (resumed.collector.dense is None) == (straight.collector.dense is None)
    assert_same_weights(straight.shared, resumed.shared)


@pytest.mark.parametrize(
    ("name", "value"),
    [(GROUP, 0), (GROUP, True), (GROUP, "8"), (GROUP, None), ("rollout_weights", "auto"), ("new", 1)],
)
def test_a_choice_that_cannot_be_is_no_checkpoint(name, value, tmp_path):
    trainer(tmp_path, num_rollouts=1, save_strategy="steps", save_steps=4).train()
    path = tmp_path / "checkpoint-4" / "checkpoint.json"
    manifest = json.loads(path.read_text())
    manifest["chosen"][name] = value
    path.write_text(json.dumps(manifest))
    why = checkpoints.why_incomplete(path.parent)
    assert why is not None and f"chosen has {name}: {value!r}" in why


def test_a_checkpoint_of_before_that_notes_no_choice_is_gone_on_from(tmp_path):
    settings = {"num_rollouts": 2, "save_strategy": "steps", "save_steps": 4}
    straight = trainer(tmp_path / "straight", **settings)
    straight.train()
    path = tmp_path / "straight" / "checkpoint-4" / "checkpoint.json"
    manifest = json.loads(path.read_text())
    del manifest["chosen"]
    path.write_text(json.dumps(manifest))
    resumed = trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(path.parent))
    assert_same_weights(straight.shared, resumed.shared)
