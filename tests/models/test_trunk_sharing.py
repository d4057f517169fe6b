"""goose_lora.models.trunk: roles that are the same below share one trunk, each resumes from its
own, and only the layers above train."""

import bitsandbytes
import pytest
import tiny
import tiny_runs
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForSequenceClassification

from goose_lora.models.roles import ADAPTERS
from goose_lora.models.shared_base import SharedBase

ROLES = ("policy", "reference", "reward", "value")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An SFT adapter and a reward adapter in all layers, both random."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny.shared(tiny.base()).save_pretrained(str(folder / "sft"))
    judge = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("llama", **tiny.ARCHITECTURES["llama"], num_labels=1)
    )
    adapter = get_peft_model(judge, tiny.lora(tiny.base(), task_type="SEQ_CLS"))
    tiny.randomise(adapter, std=0.1, seed=5)
    adapter.save_pretrained(folder / "reward")
    return {"policy": folder / "sft", "reward": folder / "reward"}


def build(folders, **changes):
    return SharedBase.build(tiny.base(), **folders | {"critic": "adapter", "train_layers": "top-2"} | changes)


def test_two_trunks_where_policy_and_reference_are_the_same_below_and_critic_and_reward_another(folders):
    trunks = build(folders).trunks(*tiny.batch(), ROLES)
    assert trunks["policy"] is trunks["reference"] and trunks["value"] is trunks["reward"]
    assert not torch.allclose(trunks["policy"], trunks["value"], atol=0.01)


@pytest.mark.parametrize("role", ROLES)
@torch.no_grad()
def test_each_role_resumed_from_its_trunk_is_the_role(folders, role):
    shared, (ids, mask) = build(folders), tiny.batch()
    trunk = shared.trunks(ids, mask, ROLES)[role]
    assert trunk is not None
    assert torch.equal(shared.hidden(role, ids, mask, trunk), shared.hidden(role, ids, mask))
    assert not torch.allclose(
        shared.hidden(role, ids, mask, torch.zeros_like(trunk)), shared.hidden(role, ids, mask), atol=0.01
    )


@torch.no_grad()
def test_a_critic_that_trains_from_the_bottom_has_no_trunk_where_the_policy_has(folders):
    """A policy in the top layers, and a critic that starts as a reward model in all of them."""
    base, (ids, mask) = tiny.base(), tiny.batch()
    shared = SharedBase.build(
        base, tiny.lora(base, layers="top-2"), reward=folders["reward"], critic="adapter"
    )
    trunks, counted = shared.trunks(ids, mask, ROLES), tiny.response_mask()
    assert trunks["policy"] is not None and trunks["value"] is None
    whole, resumed = shared(ids, mask, counted), shared(ids, mask, counted, trunk=trunks["policy"])
    assert torch.equal(whole.values, resumed.values) and torch.equal(whole.logprobs, resumed.logprobs)


def test_gradients_from_two_trunks_are_those_without(folders):
    shared, (ids, mask) = build(folders), tiny.batch()
    tiny.randomise(shared, "value", seed=9)  # below too: it is another adapter than the reward model's now
    trunks = shared.trunks(ids, mask, ROLES)
    assert trunks["reward"] is None and trunks["value"] is not None

    def gradients(*trunks):
        shared.zero_grad(set_to_none=True)
        output = shared(ids, mask, tiny.response_mask(), *trunks)
        (output.logprobs.sum() + output.values.square().sum()).backward()
        return {name: p.grad.clone() for name, p in shared.named_parameters() if p.requires_grad}

    want, got = gradients(), gradients(trunks["policy"], trunks["value"])
    assert sum("lora_A" in name for name in want) == 2 * 2 * 7
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6, msg=name)


def test_a_role_that_differs_below_has_no_share(folders):
    shared = build(folders)
    assert shared.trunks(*tiny.batch(), ["base"]) == {"base": None}
    with torch.no_grad():
        lowest = next(p for _, p in shared.role_parameters("reference"))
        lowest[0, 0] += 1e-3
    trunks = shared.trunks(*tiny.batch(), ROLES)
    assert trunks["reference"] is None and trunks["policy"] is not None
    assert shared.trunk_depth("reference") == 0


def test_an_adapter_that_adds_nothing_below_is_the_base_there():
    shared = SharedBase.build(tiny.base(), tiny.lora(tiny.base()), train_layers="top-2")  # fresh: all B are 0
    trunks = shared.trunks(*tiny.batch(), ["policy", "base", "reference"])
    assert trunks["policy"] is trunks["base"] is trunks["reference"] is not None
    with torch.no_grad():
        next(
            p for name, p in shared.role_parameters("policy") if "layers.0" in name and "lora_B" in name
        ).fill_(0.1)
    trunks = shared.trunks(*tiny.batch(), ["policy", "base"])
    assert trunks["base"] is None and trunks["policy"] is not None


@pytest.mark.parametrize("optimizer", ["torch, fused", "torch, each", "bitsandbytes"])
def test_what_an_optimizer_has_written_is_seen(optimizer):
    """Fused ones leave a tensor's count of versions as it is."""
    shared = SharedBase.build(tiny.base(), tiny.lora(tiny.base()), critic="adapter", reference="base")
    assert shared.says_the_same("policy", "base")
    weights = [p for _, p in shared.training_parameters("policy")]
    made = {
        "torch, fused": lambda: torch.optim.AdamW(weights, fused=True),
        "torch, each": lambda: torch.optim.AdamW(weights, foreach=False),
        "bitsandbytes": lambda: bitsandbytes.optim.AdamW8bit(weights),
    }[optimizer]()
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    made.step()
    assert not shared.says_the_same("policy", "base")


def test_another_scaling_is_another_effect(folders):
    shared = build(folders)
    for module in shared.modules():
        if isinstance(module, LoraLayer):
            module.scaling["reference"] *= 2
    assert shared.trunks(*tiny.batch(), ["reference"]) == {"reference": None}


def test_the_layers_below_stay_and_those_above_train(folders, tmp_path):
    shared = build(folders)
    before = {name: p.detach().clone() for name, p in shared.named_parameters()}
    trainer = tiny_runs.trainer(
        tmp_path, shared=shared, train_layers="top-2", num_rollouts=2, critic="adapter"
    )
    trainer.train()
    moved = {name for name, p in shared.named_parameters() if not torch.equal(p, before[name])}
    wanted = {
        name for name in before if any(f".{ADAPTERS[role]}." in f"{name}." for role in ("policy", "value"))
    }
    wanted = {name for name in wanted if ".3." in name or ".4." in name or ".score." in name}
    assert moved == wanted and len(moved) == 2 * 2 * 7 * 2 + 1
    optimized = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert optimized == sum(before[name].numel() for name in wanted)


def test_training_with_and_without_the_trunks_ends_at_the_same_weights(folders, tmp_path):
    ends = []
    for reuse in (True, False):
        shared = build(folders)
        trainer = tiny_runs.trainer(
            tmp_path / str(reuse),
            shared=shared,
            train_layers="top-2",
            reuse_trunk=reuse,
            reward="adapter",
            critic="adapter",
        )
        trainer.train()
        ends.append(tiny_runs.trained_parameters(shared))
    for name, parameter in ends[0].items():
        # 16 rows a sweep, 4 a microbatch
        torch.testing.assert_close(parameter, ends[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_train_layers_that_do_not_fit_are_refused(folders, tmp_path):
    with pytest.raises(
        ValueError, match=r"train_layers='top-9': the model has 5 layers\. Write top-5 or less, or all\."
    ):
        build(folders, train_layers="top-9")
    with pytest.raises(ValueError, match="train_layers='upper'"):
        tiny_runs.config(tmp_path, train_layers="upper")
    with pytest.raises(
        ValueError,
        match=r"train_layers=top-1 goes with SharedBase.build\(..., train_layers=args.train_layers\)",
    ):
        tiny_runs.trainer(tmp_path, shared=build(folders), train_layers="top-1")
    lowest = tiny.lora(tiny.base())
    lowest.layers_to_transform = [0]
    with pytest.raises(
        ValueError, match="train_layers='top-2': the adapter has nothing in these layers, so nothing trains"
    ):
        SharedBase.build(tiny.base(), lowest, train_layers="top-2")
