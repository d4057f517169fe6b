"""goose_lora.models.trunk: the lower layers run once, and the model resumed above them is the
model."""

import re

import pytest
import tiny
import torch
from peft import LoraConfig
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from goose_lora.models.shared_base import SharedBase
from goose_lora.models.trunk import above, below, decoder_layers, lowest_layer

ALL = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


def logits(model, ids, mask):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def count_calls(layers):
    """A list that grows by a layer's number at each call of one of its linear modules."""
    calls = []
    for number, layer in enumerate(layers):
        first = next(module for module in layer.modules() if type(module).__name__ in ("Linear", "Conv1D"))
        first.register_forward_hook(lambda *_, number=number: calls.append(number))
    return calls


@ALL
@torch.no_grad()
def test_below_then_above_is_the_full_forward_bit_for_bit(architecture):
    model = tiny.base(architecture)
    layers, (ids, mask) = decoder_layers(model), tiny.batch()
    assert (mask == 0).any(), "padding must be there to be handled"
    want = logits(model, ids, mask)
    for depth in range(1, tiny.LAYERS):
        with below(layers, depth) as output:
            logits(model, ids, mask)
        assert len(output) == 1
        with above(layers, depth, output[0]):
            assert torch.equal(logits(model, ids, mask), want)
            assert torch.equal(logits(model, ids, mask), want), "resuming twice from one trunk"
        with above(layers, depth, torch.zeros_like(output[0])):
            assert not torch.allclose(logits(model, ids, mask), want, atol=0.1), (
                "the stored states are what counts"
            )


@ALL
@torch.no_grad()
def test_each_half_runs_its_own_layers_only(architecture):
    model = tiny.base(architecture)
    layers, (ids, mask) = decoder_layers(model), tiny.batch()
    calls = count_calls(layers)
    with below(layers, 3) as output:
        logits(model, ids, mask)
    assert calls == [0, 1, 2]
    calls.clear()
    with above(layers, 3, output[0]):
        logits(model, ids, mask)
    assert calls == [3, 4]


@pytest.mark.parametrize("half", ["below", "above"])
@pytest.mark.parametrize("error", [None, RuntimeError])
def test_forwards_and_hooks_are_put_back(half, error):
    model = tiny.base()
    layers, (ids, mask) = decoder_layers(model), tiny.batch()
    want = logits(model, ids, mask)
    own = type(layers[4]).forward.__get__(layers[4])
    layers[4].forward = own  # as accelerate's hooks leave it

    def use():
        with below(layers, 2) if half == "below" else above(layers, 2, torch.zeros(3, 11, tiny.HIDDEN)):
            logits(model, ids, mask)
            if error:
                raise error

    if error:
        with pytest.raises(error):
            use()
    else:
        use()
    assert [name for layer in layers[:4] for name in layer.__dict__ if name == "forward"] == []
    assert layers[4].__dict__["forward"] is own
    assert not any(layer._forward_hooks for layer in layers)
    assert torch.equal(logits(model, ids, mask), want)


@ALL
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_with_the_trunk_are_those_without(architecture, checkpointing):
    shared = tiny.shared(tiny.base(architecture), layers="top-2", critic="adapter")
    ids, mask = tiny.batch()
    response = tiny.response_mask()
    shared.train()
    if checkpointing:
        shared.activation_checkpointing_enable({"use_reentrant": False})
    recomputed = count_calls(shared.layers)

    def gradients(trunk):
        shared.zero_grad(set_to_none=True)
        output = shared(ids, mask, response, trunk=trunk)
        recomputed.clear()
        (output.logprobs.sum() + output.values.square().sum()).backward()
        assert (set(recomputed) >= {3, 4}) == checkpointing
        return {
            name: parameter.grad.clone()
            for name, parameter in shared.named_parameters()
            if parameter.requires_grad
        }

    want, got = gradients(None), gradients(shared.trunks(ids, mask, ["policy"])["policy"])
    assert len(want) > 8 and all(
        gradient.abs().max() > 0 for name, gradient in want.items() if "lora_A" in name
    )
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6, msg=name)


def test_a_trunk_ends_where_its_role_begins_to_train():
    model = tiny.base()
    assert tiny.shared(tiny.base(), layers="top-2").trunk_depth() == tiny.LAYERS - 2
    value = tiny.lora(model, layers="top-4", task_type=None)
    shared = SharedBase.build(
        model, tiny.lora(model, layers="top-1"), critic="adapter", critic_init="zero", value=value
    )
    assert (shared.trunk_depth("policy"), shared.trunk_depth("value")) == (tiny.LAYERS - 1, tiny.LAYERS - 4)
    assert (lowest_layer(shared.layers, "default"), lowest_layer(shared.layers, "value")) == (4, 1)
    trunks = shared.trunks(*tiny.batch(), ["policy", "reference", "value"])
    assert trunks["reference"] is trunks["policy"] and not torch.equal(trunks["policy"], trunks["value"])


def test_a_head_on_the_policys_states_lowers_no_trunk():
    assert tiny.shared(tiny.base(), layers="top-2", critic="shared").trunk_depth() == tiny.LAYERS - 2


@ALL
def test_no_trunk_where_an_adapter_covers_all_layers(architecture):
    shared = tiny.shared(tiny.base(architecture))
    assert shared.trunk_depth() == 0
    assert shared.trunks(*tiny.batch(), ["policy", "reference"]) == {"policy": None, "reference": None}


def test_no_trunk_under_an_adapter_on_the_embeddings():
    model = tiny.base()
    config = LoraConfig(r=3, target_modules=r".*embed_tokens|.*layers\.4\..*_proj")
    shared = SharedBase.build(model, config)
    assert any("lora_embedding_A" in name for name, _ in shared.named_parameters())
    assert shared.trunk_depth() == 0


def test_one_traversal_tells_the_trunk_depth(monkeypatch):
    """It is asked at every forward: listing all parameters once for each adapter tensor took 0.8 s
    with 32 layers."""
    shared = tiny.shared(tiny.base(), layers="top-2", critic="adapter")
    listed, before = [], type(shared).named_parameters
    monkeypatch.setattr(
        type(shared), "named_parameters", lambda self, *a, **k: listed.append(1) or before(self, *a, **k)
    )
    assert shared.trunk_depth() == 3
    assert len(listed) <= 1


@ALL
def test_decoder_layers_finds_the_layers(architecture):
    model = tiny.base(architecture)
    layers = decoder_layers(model)
    assert len(layers) == tiny.LAYERS and all(
        isinstance(layer, GradientCheckpointingLayer) for layer in layers
    )
    assert decoder_layers(tiny.shared(model).get_base_model()) is layers


def test_a_list_of_as_many_experts_is_not_taken_for_the_layers():
    model = tiny.base()
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(tiny.LAYERS))
    deeper = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(tiny.LAYERS))})
    model.model._modules = {"before": deeper, **model.model._modules}  # nor where it comes first
    assert decoder_layers(model) is model.model.layers


def test_a_model_without_such_a_list_is_told_what_was_looked_for():
    model = tiny.base()
    model.config.num_hidden_layers = 7
    with pytest.raises(
        ValueError,
        match=re.escape("LlamaForCausalLM: looked for one list of 7 decoder layers and found none."),
    ):
        decoder_layers(model)


def test_two_lists_that_could_be_the_layers_are_an_error():
    model = tiny.base()
    model.model.others = nn.ModuleList(nn.Linear(2, 2) for _ in range(tiny.LAYERS))
    with pytest.raises(ValueError, match=re.escape("found ['model.layers', 'model.others']")):
        decoder_layers(model)
