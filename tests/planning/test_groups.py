"""Groups of replies where the settings leave their size to the memory plan."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from goose_lora.models.arguments import ModelArguments
from goose_lora.models.compatibility import meta_model
from goose_lora.planning import ways
from goose_lora.planning.memory import Planner
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.memory_rules import largest_group

SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 768,
    "vocab_size": 8192,
}


def planner(memory=None, **changes):
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 50,
        "response_length": 64,
        "max_prompt_tokens": 64,
        "score_normalization": "none",
        "rollout_weights": "shared",
    }
    config = PPOConfig(output_dir="unused", use_cpu=True, report_to=[], num_rollouts=1, **settings | changes)
    model = ModelArguments("m", quantization="none", dtype="float32")
    core = meta_model(model, config=AutoConfig.for_model("llama", **SHAPE))
    return Planner(core, model, config, reward="not trained yet", memory=memory, device="cpu")


def needed(rows, **changes):
    """Bytes that the run needs with groups of so many, set by the user."""
    return planner(local_rollout_forward_batch_size=rows, **changes).needed()


@given(replies=st.integers(1, 500), bound=st.integers(0, 600))
def test_a_group_is_the_whole_rollout_or_the_largest_power_of_two_that_fits(replies, bound):
    group = largest_group(lambda rows: rows <= bound, replies=replies)
    allowed = {replies, *(2**n for n in range(20) if 2**n <= max(replies, 64))}
    assert group in allowed and (group <= bound or group == 1)
    assert not [rows for rows in allowed if group < rows <= bound]


@pytest.mark.parametrize(("rows", "replies"), [(50, 100), (24, 48), (1, 2)])
def test_with_memory_enough_a_rollout_is_one_group_and_others_are_64_at_least(rows, replies):
    plan = planner(10**12, per_device_train_batch_size=rows, gradient_accumulation_steps=2)
    assert plan.sizes.replies == replies and plan.sizes.rollout_rows == max(replies, 64)
    # What is counted is what such a run takes
    assert plan.needed() == needed(
        64 if replies < 64 else 100, **{"per_device_train_batch_size": rows, "gradient_accumulation_steps": 2}
    )


def test_less_memory_gives_smaller_groups_that_fit_and_no_larger_one_does():
    taken = []
    for rows in (100, 64, 32):
        for memory, group in ((needed(rows), rows), (needed(rows) - 1, None)):
            plan = planner(memory)
            taken.append(plan.sizes.rollout_rows)
            assert group in (None, taken[-1])
            assert plan.lack(memory) is None and plan.needed() == needed(taken[-1])
            assert f"Replies at a time: {taken[-1]}, as many as fit" in plan.report(memory)
    assert taken == [100, 64, 64, 32, 32, 16]


def test_a_number_that_is_set_stays_and_nothing_is_said_of_it():
    for memory in (10**6, 10**12):
        plan = planner(memory, local_rollout_forward_batch_size=24)
        assert plan.sizes.rollout_rows == 24 and "is not set" not in plan.report(memory)


def test_a_run_that_does_not_fit_is_not_told_to_set_groups_that_fit_by_themselves():
    memory = planner(1, gradient_checkpointing=True, per_device_train_batch_size=8).needed()
    plan = planner(memory, per_device_train_batch_size=64, gradient_accumulation_steps=1)
    found, after = ways.ways_to_fit(plan, memory)
    assert plan.lack(memory) is not None and after.lack(memory) is None
    changed = {name for way in found for name in way.settings}
    assert "per_device_train_batch_size" in changed and "local_rollout_forward_batch_size" not in changed
    # Groups are no smaller than the rest of the run makes room for
    larger = replace(after.sizes, rollout_rows=2 * after.sizes.rollout_rows)
    assert after.fits(after.sizes, memory) and not after.fits(larger, memory)


def test_a_dense_copy_is_taken_as_with_64_replies_and_groups_grow_beside_it():
    def auto(memory):
        return planner(memory, rollout_weights="auto")

    full = planner(rollout_weights="dense", local_rollout_forward_batch_size=64).needed()
    with_copy, without = auto(full), auto(full - 1)
    assert with_copy.dense > 0 and with_copy.sizes.rollout_rows == 64
    assert without.dense == 0 and without.needed() <= full - 1
