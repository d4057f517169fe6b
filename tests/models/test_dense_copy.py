"""The dense copy for rollouts: it is the role's model, holds nothing twice, and follows
training."""

import pytest
import tiny
import torch
from peft import LoraConfig

from goose_lora.generation.sampling import generation_config, sample
from goose_lora.models.dense_copy import DenseCopy, dense_bytes, make_dense_copy
from goose_lora.models.loading import load_base, load_tokenizer
from goose_lora.models.shared_base import SharedBase


def logits(model, ids, mask):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[
        mask.bool()
    ]


@pytest.fixture(params=["none", "int8", "nf4"])
def shared(request, tmp_path):
    folder = tiny.save_base(tmp_path / "base", hidden_size=66, head_dim=22, intermediate_size=64)
    arguments = tiny.arguments(folder, quantization=request.param)
    built = tiny.shared(
        load_base(arguments, load_tokenizer(arguments)), layers="top-2", critic="adapter", reference="copy"
    )
    tiny.randomise(built, std=0.1)
    return built


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@torch.no_grad()
def test_the_copy_computes_what_the_role_computes(architecture):
    shared = tiny.shared(tiny.base(architecture), layers="top-2", critic="adapter")
    ids, mask = tiny.batch()
    copy = DenseCopy(shared)
    seen = []
    for role in ("policy", "value", "reference", "policy"):
        with shared.role(role) as core:
            want = logits(core, ids, mask)
        torch.testing.assert_close(logits(copy.merge_role(role), ids, mask), want, rtol=0, atol=2e-4)
        seen.append(want)
    assert (seen[0] - seen[1]).abs().max() > 0.1 and (seen[0] - seen[2]).abs().max() > 0.1, (
        "the roles must differ"
    )


def assert_computes_alike(shared):
    ids, mask = tiny.batch()
    copy = DenseCopy(shared)
    for role in ("policy", "base"):
        with shared.role(role) as core:
            want = logits(core, ids, mask)
        torch.testing.assert_close(logits(copy.merge_role(role), ids, mask), want, rtol=0, atol=2e-3)


@torch.no_grad()
def test_a_quantized_base_is_copied_as_it_computes(shared):
    assert_computes_alike(shared)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@torch.no_grad()
def test_gpt2_whose_matrices_bitsandbytes_turns_is_copied_the_right_way_round(quantization, tmp_path):
    arguments = tiny.arguments(tiny.save_base(tmp_path / "base", "gpt2"), quantization=quantization)
    shared = tiny.shared(load_base(arguments, load_tokenizer(arguments)), layers="top-2")
    assert_computes_alike(shared)


@torch.no_grad()
def test_the_copy_follows_the_policy_and_leaves_the_base_alone(shared):
    ids, mask = tiny.batch()
    before = {name: parameter.clone() for name, parameter in shared.named_parameters()}
    copy = DenseCopy(shared)
    first = logits(copy.merge_role("policy"), ids, mask)
    with shared.role("policy") as core:
        still = logits(core, ids, mask)
    assert all(torch.equal(parameter, before[name]) for name, parameter in shared.named_parameters())
    tiny.randomise(shared, std=0.1, seed=7)
    second = logits(copy.merge_role("policy"), ids, mask)
    assert (first - second).abs().max() > 0.01
    torch.testing.assert_close(still, first, rtol=0, atol=2e-3)


def test_only_quantized_and_adapted_matrices_take_memory(shared):
    ours = {parameter.data_ptr() for parameter in shared.parameters()}
    added = [
        parameter for parameter in DenseCopy(shared).model.parameters() if parameter.data_ptr() not in ours
    ]
    assert sum(parameter.numel() * parameter.element_size() for parameter in added) == dense_bytes(shared) > 0
    # Seven matrices a layer: those of all five layers where the base is quantized, of the two
    # adapted layers where it is not.
    quantized = any(
        type(parameter).__name__ in ("Params4bit", "Int8Params") for parameter in shared.parameters()
    )
    assert len(added) == 7 * (tiny.LAYERS if quantized else 2)


def test_the_copy_is_never_saved_or_trained(shared, tmp_path):
    names = [name for name, _ in shared.named_parameters()]
    copy = DenseCopy(shared)
    assert [name for name, _ in shared.named_parameters()] == names
    assert not any(
        parameter.requires_grad for name, parameter in copy.model.named_parameters() if ".weight" in name
    )
    shared.set_trainable(("policy", "value"))
    assert any(parameter.requires_grad for parameter in shared.parameters())


@torch.no_grad()
def test_greedy_replies_are_those_of_the_shared_weights():
    shared = tiny.shared(tiny.base(), layers="top-2")
    ids, mask = tiny.batch()
    greedy = generation_config(
        response_tokens=8, temperature=1.0, eos_token_ids=[tiny.EOS], pad_token_id=tiny.PAD, do_sample=False
    )
    copy = DenseCopy(shared)
    copy.merge_role("policy")
    want = sample(shared, ids, mask, greedy)
    got = sample(shared, ids, mask, greedy, dense=copy)
    assert torch.equal(got.input_ids, want.input_ids)
    torch.testing.assert_close(got.sampling_logprobs, want.sampling_logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("share_needed", "expected"), [(0.4, True), (0.6, False)])
def test_auto_makes_a_copy_where_half_of_the_free_memory_holds_it(
    share_needed, expected, shared, monkeypatch
):
    monkeypatch.setattr(
        "goose_lora.models.dense_copy.free_bytes", lambda device: int(dense_bytes(shared) / share_needed)
    )
    assert (make_dense_copy(shared, "auto") is not None) == expected
    assert make_dense_copy(shared, "dense") is not None and make_dense_copy(shared, "shared") is None


def test_a_variant_of_lora_is_never_merged_wrongly():
    base = tiny.base()
    shared = SharedBase.build(
        base, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    )
    assert make_dense_copy(shared, "auto") is None
    with pytest.raises(ValueError, match="rollout_weights: shared"):
        make_dense_copy(shared, "dense")
