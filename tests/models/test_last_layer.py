"""goose_lora.models.trunk: the states that heads read are those of the whole layer, and the rest is
not computed."""

from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from goose_lora.models.shared_base import SharedBase
from goose_lora.models.trunk import BY_POSITION, by_position, decoder_layers, only_columns

ALL = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
SPARED = {"gpt2": 1, "gpt_neox": 1, "opt": 1, "phi3": 2}  # of BY_POSITION; all three where it is not said


def built(architecture="llama", quantization="none", checkpointing=False):
    base = (
        tiny.base(architecture, quantization=quantization)
        if quantization != "none"
        else tiny.base(architecture)
    )
    shared = SharedBase.build(base, tiny.lora(base), critic="adapter", critic_init="policy")
    torch.manual_seed(1)
    for parameter in shared.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    if checkpointing:
        shared.gradient_checkpointing_enable()
        shared.train()
    return shared


def gradients(shared, ids, mask, response):
    shared.zero_grad()
    output = shared(ids, mask, response)
    (output.logprobs.sum() + output.values.square().sum()).backward()
    return {name: p.grad for name, p in shared.named_parameters() if p.grad is not None}


@ALL
@torch.no_grad()
def test_the_states_that_are_read_are_those_of_the_whole_layer(architecture):
    shared, (ids, mask) = built(architecture), tiny.batch()
    for role in ("policy", "value", "reference"):
        want = shared.hidden(role, ids, mask)
        for columns in (1, 4, ids.shape[1], ids.shape[1] + 3):
            got = shared.hidden(role, ids, mask, columns=columns)
            assert got.shape == want.shape
            torch.testing.assert_close(got[:, -columns:], want[:, -columns:], rtol=1e-5, atol=1e-5)
        rows, one = torch.arange(len(ids)), torch.randint(ids.shape[1], (len(ids),))
        got = shared.hidden(role, ids, mask, columns=one)[rows, one]
        torch.testing.assert_close(got, want[rows, one], rtol=1e-5, atol=1e-5)
    assert torch.equal(
        shared.hidden("policy", ids, mask), shared.hidden("policy", ids, mask, columns=None)
    ), "all columns again afterwards"


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "phi3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_whole_layer(architecture, checkpointing, monkeypatch):
    shared, (ids, mask) = built(architecture, checkpointing=checkpointing), tiny.batch()
    response = mask[:, -4:].bool()
    got = gradients(shared, ids, mask, response)
    monkeypatch.setattr("goose_lora.models.trunk.BY_POSITION", ())
    want = gradients(shared, ids, mask, response)
    assert got.keys() == want.keys() and len(got) > 10
    for name, gradient in got.items():
        assert (gradient - want[name]).abs().max() <= 1e-4 * want[name].abs().max(), name


@ALL
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_prompt_is_spared_in_forward_and_recompute(architecture, checkpointing):
    shared, (ids, mask) = built(architecture, checkpointing=checkpointing), tiny.batch()
    widths = []
    for name, module in decoder_layers(shared.get_base_model())[-1].named_modules():
        if name.rpartition(".")[2] in BY_POSITION:
            linear = next(m for m in module.modules() if type(m) in (nn.Linear, Conv1D))
            linear.register_forward_hook(
                lambda module, args, out: widths.append(out.numel() // out.shape[-1])
            )
    gradients(shared, ids, mask, mask[:, -4:].bool())
    passes = 4 if checkpointing else 2
    assert widths == [5 * len(ids)] * SPARED.get(architecture, 3) * passes


@torch.no_grad()
def test_experts_are_chosen_for_the_positions_that_are_read():
    torch.manual_seed(0)
    experts = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "hidden_size": 48,
        "head_dim": 16,
        "intermediate_size": 16,
    }
    base: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mixtral", **(tiny.ARCHITECTURES["mistral"] | experts))
    )
    shared, (ids, mask) = (
        SharedBase.build(base, LoraConfig(target_modules=["q_proj", "v_proj"])),
        tiny.batch(),
    )
    want = shared.hidden("policy", ids, mask)[:, -4:]
    torch.testing.assert_close(
        shared.hidden("policy", ids, mask, columns=4)[:, -4:], want, rtol=1e-5, atol=1e-5
    )


def test_forwards_are_put_back_after_an_error():
    layer = decoder_layers(built().get_base_model())[-1]
    before = [module.__dict__.get("forward") for module in layer.modules()]
    with pytest.raises(KeyError), only_columns(by_position(layer), 2):
        assert layer.mlp.__dict__["forward"] is not None
        raise KeyError
    assert [module.__dict__.get("forward") for module in layer.modules()] == before
