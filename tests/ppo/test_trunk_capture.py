"""The trunk noted while generating is the trunk of a pass over the finished rollout, and training
from it is training."""

import pytest
import tiny
import tiny_runs
import torch

from goose_lora.generation.sampling import generation_config, sample
from goose_lora.generation.stopping import StopStrings
from goose_lora.models.dense_copy import DenseCopy
from goose_lora.models.loading import load_base, load_tokenizer
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo.collector import RolloutCollector
from goose_lora.rewards.sources import RewardMix


def config(**changes):
    how = {"response_tokens": 6, "temperature": 0.7, "eos_token_ids": [tiny.EOS], "pad_token_id": tiny.PAD}
    return generation_config(**how | changes)


def assert_is_the_trunk(shared, rollout):
    own = shared.trunks(rollout.input_ids, rollout.attention_mask, ["policy"])["policy"]
    assert rollout.trunk.shape == own.shape
    counted = rollout.attention_mask.bool()
    close = 1e-6 if own.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(rollout.trunk[counted], own[counted], rtol=close, atol=close)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@torch.no_grad()
def test_what_was_noted_is_what_a_pass_of_its_own_gives(architecture, dense):
    shared = tiny.shared(tiny.base(architecture), layers="top-2")
    if architecture != "gemma2":  # whose library code overflows in fp64 under padding
        shared.double()  # norms compute in fp32 all the same
    copy = DenseCopy(shared) if dense else None
    if copy:
        copy.merge_role("policy")
    torch.manual_seed(0)
    rollout = sample(
        shared, *tiny.batch((7, 4, 5)), config(), dense=copy, trunk_depth=shared.capture_depth(merged=dense)
    )
    assert rollout.attention_mask.shape[1] > 7 + 1
    assert_is_the_trunk(shared, rollout)
    assert not any(layer._forward_hooks for layer in shared.layers)


@torch.no_grad()
def test_replies_that_end_early_or_at_a_text_are_noted_to_their_end():
    shared = tiny.shared(tiny.base(), layers="top-2").double()
    ids, mask = tiny.batch((7, 4, 5))
    torch.manual_seed(1)
    free = sample(shared, ids, mask, config(response_tokens=12))
    ends = sorted({int(row[2]) for row in free.input_ids[:, 7:]})  # what they said third: now they stop there
    torch.manual_seed(1)
    rollout = sample(shared, ids, mask, config(response_tokens=12, eos_token_ids=ends), trunk_depth=3)
    assert rollout.ended.all() and rollout.lengths.max() <= 3
    assert_is_the_trunk(shared, rollout)
    tokenizer = tiny.tokenizer()
    stop = StopStrings(tokenizer, tokenizer.batch_decode([[end] for end in ends]), 7)
    torch.manual_seed(1)
    rollout = sample(shared, ids, mask, config(response_tokens=12), stop=stop, trunk_depth=3)
    assert rollout.ended.all() and rollout.lengths.max() <= 4
    assert_is_the_trunk(shared, rollout)


def rollouts_of(shared, **changes):
    how = {"batch_size": 2, "weights": "dense", "reward": RewardMix([tiny_runs.even_share])}
    return RolloutCollector(shared, tiny.tokenizer(), config(response_tokens=9), **how | changes)


def test_prompts_of_like_length_are_answered_together_and_replies_stand_where_their_prompts_stood():
    shared = tiny.shared(tiny.base(), layers="top-2", reference="copy").double()
    makers, (ids, mask) = rollouts_of(shared, weights="shared"), tiny.batch((7, 3, 6, 4, 5))
    seen = []
    shared.get_base_model().model.embed_tokens.register_forward_hook(
        lambda module, args, out: seen.append(tuple(args[0].shape))
    )
    torch.manual_seed(0)
    rollout = makers.generate(ids, mask, greedy=True)
    assert [shape for shape in seen if shape[1] > 1] == [(2, 4), (2, 6), (1, 7)]
    assert rollout.prompt_ids() == [
        row[row_mask.bool()].tolist() for row, row_mask in zip(ids, mask, strict=True)
    ]
    alone = rollouts_of(shared, weights="shared", batch_size=1)
    assert rollout.response_ids() == alone.generate(ids, mask, greedy=True).response_ids()


def test_groups_of_other_widths_are_put_together():
    shared = tiny.shared(tiny.base(), layers="top-2", reference="copy").double()
    makers = rollouts_of(shared)
    makers.generation.eos_token_id = list(range(4, 20))
    torch.manual_seed(0)
    rollout = makers.generate(*tiny.batch((7, 4, 5, 6)), keep_trunk=True)
    assert len({int(rollout.lengths[pair].max()) for pair in ([1, 2], [0, 3])}) == 2, "two widths"
    assert_is_the_trunk(shared, rollout)


def test_no_pass_over_the_lower_layers_is_made_for_what_was_noted():
    shared = tiny.shared(tiny.base(), layers="top-2", critic="adapter", reference="copy")
    makers = rollouts_of(shared)
    rollout = makers.generate(*tiny.batch((7, 4, 5, 6)), keep_trunk=True)
    calls = []
    for number, layer in enumerate(shared.layers):
        layer.self_attn.register_forward_hook(lambda *_, number=number: calls.append(number))
    seen = makers.evaluate(rollout)
    assert set(calls) == {3, 4}
    assert seen.trunk is rollout.trunk, "nothing is kept twice"
    plain = rollouts_of(shared).evaluate(makers.generate(*tiny.batch((7, 4, 5, 6))))
    assert set(calls) == {0, 1, 2, 3, 4} and plain.trunk is not None


def test_merged_lower_layers_are_not_noted():
    shared = SharedBase.build(tiny.base(), tiny.lora(tiny.base()), train_layers="top-2")
    # Fresh: it adds nothing yet
    assert shared.capture_depth(merged=True) == shared.capture_depth(merged=False) == 3
    tiny.randomise(shared, std=0.1)
    assert (shared.capture_depth(merged=True), shared.capture_depth(merged=False)) == (0, 3)
    assert rollouts_of(shared).generate(*tiny.batch((7, 4, 5, 6)), keep_trunk=True).trunk is None


def test_training_from_what_was_noted_is_training(tmp_path, monkeypatch):
    ends = []
    for noted in (True, False):
        if not noted:
            monkeypatch.setattr(SharedBase, "capture_depth", lambda self, merged: 0)
        trainer = tiny_runs.trainer(tmp_path / str(noted), num_rollouts=2)
        trainer.train()
        ends.append(tiny_runs.trained_parameters(trainer.shared))
    assert not all(torch.equal(p, ends[1][name]) for name, p in ends[0].items()), (
        "the two must have gone different ways"
    )
    for name, parameter in ends[0].items():
        # Adam's first steps magnify rounding
        torch.testing.assert_close(parameter, ends[1][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(("quantization", "noted"), [("int8", False), ("nf4", True)])
def test_a_dense_copy_of_int8_layers_notes_no_trunk(quantization, noted, tmp_path):
    args = tiny.arguments(tiny.save_base(tmp_path), quantization=quantization)
    shared = tiny.shared(load_base(args, load_tokenizer(args)), layers="top-2")
    assert bool(shared.capture_depth(merged=True)) == noted
    assert shared.capture_depth(merged=False) > 0
