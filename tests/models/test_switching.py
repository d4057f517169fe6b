"""Switching roles: what PEFT's own switching would do, at a cost that does not grow with depth."""

from collections import Counter

import pytest
import tiny
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from tiny_runs import with_reward_adapter
from torch import nn

from goose_lora.models.roles import ADAPTERS
from goose_lora.models.shared_base import SharedBase


def stances(shared):
    return {
        name: (module.active_adapter, module.disable_adapters)
        for name, module in shared.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }


def test_a_replayed_switch_leaves_what_pefts_own_leaves(tmp_path):
    shared = with_reward_adapter(tmp_path, critic="adapter", average=True)
    roles = ("value", "reward", "base", "ema", "policy")
    for _ in range(2):
        for role in roles:
            with shared.role(role):
                seen = stances(shared)
                if role == "base":
                    assert all(off for _, off in seen.values())
                    continue
                assert shared.active_adapter == shared.base_model.active_adapter == ADAPTERS[role]
            PeftModel.set_adapter(shared, ADAPTERS[role], inference_mode=True)
            want = stances(shared)
            PeftModel.set_adapter(shared, ADAPTERS["policy"], inference_mode=True)
            assert seen == want, role


def test_an_adapter_that_is_added_later_is_switched_to_and_off(tmp_path):
    shared = with_reward_adapter(tmp_path, critic="adapter")
    ids, mask = tiny.batch()
    before = shared.hidden("reward", ids, mask)
    shared.add_adapter("later", shared.peft_config["default"])
    shared.set_trainable(("policy", "value"))
    assert torch.equal(shared.hidden("reward", ids, mask), before)


def joint_loss(shared, ids, mask, response):
    output = shared(ids, mask, response)
    return output.logprobs.sum() + output.values.sum()


def counted_step(depth, monkeypatch):
    """Calls and switches of a checkpointed step, after one that has let everything be found."""
    shared = tiny.shared(tiny.base(num_hidden_layers=depth), critic="adapter")
    shared.train()
    shared.activation_checkpointing_enable()
    data = (*tiny.batch(), tiny.response_mask())
    joint_loss(shared, *data).backward()
    calls, switched = Counter(), []

    def counting(owner, name):
        plain = getattr(owner, name)

        def call(self, *args, **kwargs):
            calls[name] += 1
            return plain(self, *args, **kwargs)

        return call

    plain = SharedBase._switch_to

    def noting(self, role):
        switched.extend([role] * (role != self._role))
        plain(self, role)

    with monkeypatch.context() as patch:
        for name in ("named_modules", "named_parameters"):
            patch.setattr(nn.Module, name, counting(nn.Module, name))
        for owner in (PeftModel, BaseTunerLayer, AuxiliaryTrainingWrapper):
            patch.setattr(owner, "set_adapter", counting(owner, "set_adapter"))
        patch.setattr(SharedBase, "_switch_to", noting)
        joint_loss(shared, *data).backward()
    return calls, switched


def test_the_calls_of_a_step_do_not_grow_with_layers(monkeypatch):
    shallow, switched = counted_step(3, monkeypatch)
    deep, switched_deep = counted_step(7, monkeypatch)
    assert switched and switched == switched_deep
    assert deep == shallow
    assert shallow["set_adapter"] == 0


def test_after_a_backward_pass_the_base_is_the_policy_again(tmp_path):
    shared = tiny.shared(tiny.base(), critic="adapter")
    shared.train()
    shared.activation_checkpointing_enable()
    data = (*tiny.batch(), tiny.response_mask())
    shared(*data).values.sum().backward()
    assert shared.active_adapter == "default"
    assert all(
        active == ["default"] for active, _ in stances(shared).values() if active != [] and active != "value"
    )


class Short(RuntimeError):
    pass


def test_a_backward_pass_that_failed_leaves_roles_that_are_right(tmp_path):
    """As out of memory does: the pass ends in the middle, under the critic."""
    shared = tiny.shared(tiny.base(), critic="adapter")
    shared.train()
    data = (*tiny.batch(), tiny.response_mask())
    want = shared.hidden("policy", *data[:2]).detach()
    shared.activation_checkpointing_enable()
    values = shared(*data).values

    def fail(*_):
        raise Short

    inside = shared.layers[1].mlp.down_proj
    hook = inside.register_forward_pre_hook(fail)
    with pytest.raises(Short):
        values.sum().backward()
    hook.remove()
    assert shared._role == "value", "the pass ended under the critic"
    torch.testing.assert_close(shared.hidden("policy", *data[:2]).detach(), want)
    with shared.role("base"):
        pass
    assert shared.active_adapter == "default"
