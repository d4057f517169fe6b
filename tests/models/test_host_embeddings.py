"""Input embeddings on the host: the same tokens, log-probabilities, gradients and files."""

import pytest
import tiny
import tiny_runs
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from goose_lora.errors import UserError
from goose_lora.files import read_jsonl
from goose_lora.generation.sampling import generation_config, sample
from goose_lora.models.dense_copy import DenseCopy
from goose_lora.models.host_embeddings import HostEmbedding, keep_embeddings_on_host
from goose_lora.models.loading import load_base, load_tokenizer, lora_config
from goose_lora.models.shared_base import SharedBase

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return tiny.save_base(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)


def loaded(folder, where, quantization="none"):
    arguments = tiny.arguments(folder, quantization=quantization, embeddings=where)
    return load_base(arguments, load_tokenizer(arguments), device=CPU)


def built(folder, where, quantization="none"):
    base = loaded(folder, where, quantization)
    shared = SharedBase.build(base, lora_config(tiny.arguments(), base), critic="adapter", reference="copy")
    for role in ("default", "value"):
        tiny.randomise(shared, role, std=0.1)
    shared._copy_role("policy", "reference")
    return shared


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_tokens_log_probabilities_values_and_gradients_are_the_same_to_the_bit(untied, quantization):
    found = []
    for where in ("device", "host"):
        shared = built(untied, where, quantization)
        embeddings = shared.core.get_input_embeddings()
        assert isinstance(embeddings, HostEmbedding) == (where == "host")
        ids, attention = tiny.batch()
        settings = generation_config(response_tokens=5, temperature=1.0, eos_token_ids=[2], pad_token_id=0)
        torch.manual_seed(0)
        rollout = sample(shared, ids, attention, settings)
        out = shared(rollout.input_ids, rollout.attention_mask, rollout.response_mask)
        (out.logprobs.sum() + out.values.sum()).backward()
        gradients = [p.grad for p in shared.parameters() if p.requires_grad]
        assert any(gradient.any() for gradient in gradients)
        found.append([rollout.input_ids, out.logprobs, out.entropy, out.values, *gradients])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_logits_are_those_of_transformers_own_model(untied):
    base = loaded(untied, "host")
    ids = torch.tensor([[5, 9, 5, 30], [7, 7, 7, 7]])
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(untied)(ids).logits
        assert torch.equal(base(ids).logits, wanted)


def test_the_table_is_no_parameter_and_does_not_move_with_the_model(untied):
    base = loaded(untied, "host")
    table = base.get_input_embeddings()
    assert not list(table.parameters()) and not any("embed_tokens" in name for name in base.state_dict())
    base.to("meta")
    assert table.weight.device == CPU and {p.device.type for p in base.parameters()} == {"meta"}


def test_only_distinct_rows_of_a_batch_are_read(untied, monkeypatch):
    table = loaded(untied, "host").get_input_embeddings()
    read = []

    class Watched:
        device = CPU

        def __getitem__(self, rows):
            read.append(rows.tolist())
            return table._table[0][rows]

    monkeypatch.setattr(HostEmbedding, "weight", Watched())
    ids = torch.tensor([[8, 3, 8], [3, 3, 9]])
    assert torch.equal(table(ids), table._table[0][ids])
    assert read == [[3, 8, 9]]


@pytest.mark.parametrize("weights", ["shared", "dense"])
def test_a_run_ends_with_the_same_figures_and_the_same_adapters(untied, tmp_path, weights):
    for where in ("device", "host"):
        run = tiny_runs.trainer(tmp_path / where, shared=built(untied, where), rollout_weights=weights)
        assert isinstance(run.collector.dense, DenseCopy) == (weights == "dense")
        run.train()
        run.save_model()
    device, host = (load_file(tmp_path / where / "adapter_model.safetensors") for where in ("device", "host"))
    assert device.keys() == host.keys() and all(torch.equal(device[name], host[name]) for name in device)
    rows = [
        [
            row["objective/score"]
            for row in read_jsonl(tmp_path / where / "metrics.jsonl")
            if "objective/score" in row
        ]
        for where in ("device", "host")
    ]
    assert rows[0] == rows[1] and rows[0]


@pytest.mark.parametrize("first", ["device", "host"])
def test_a_run_is_resumed_with_its_embeddings_elsewhere(untied, tmp_path, first):
    other = "host" if first == "device" else "device"
    straight = tiny_runs.trainer(tmp_path / "straight", shared=built(untied, first), num_rollouts=2)
    straight.train()
    saving = {"save_strategy": "steps", "num_rollouts": 2, "save_steps": 4}
    run = tiny_runs.trainer(tmp_path / "run", shared=built(untied, first), **saving)
    run.train()
    resumed = tiny_runs.trainer(tmp_path / "run", shared=built(untied, other), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    wanted = dict(straight.shared.role_parameters("policy"))
    assert all(torch.equal(p, wanted[name]) for name, p in resumed.shared.role_parameters("policy"))


def test_a_table_that_is_the_head_too_is_refused(tmp_path):
    folder = tiny.save_base(tmp_path, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"one table for its embeddings and its head .*embeddings: device"):
        loaded(folder, "host")


def test_a_table_that_does_more_than_look_up_is_refused():
    base = tiny.base("gemma3_text", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"of a kind of their own .Gemma3TextScaledWordEmbedding"):
        keep_embeddings_on_host(base, "gemma")


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [3]},
    ],
)
def test_an_adapter_that_changes_embeddings_is_refused(untied, changes):
    base = loaded(untied, "host")
    config = lora_config(tiny.arguments(), base)
    for name, value in changes.items():
        setattr(config, name, set(value) if name == "target_modules" else value)
    with pytest.raises(UserError, match=r"embeddings: host: the adapter changes model.embed_tokens"):
        SharedBase.build(base, config)
