"""Several sources of reward: what each is asked, how they add up, and what a function may not return."""

import asyncio

import pytest
import torch

from goose_lora.rewards import RewardMix

REPLIES = {"prompts": ["a", "b", "c"], "completions": ["x", "yy", "zzz"], "completion_ids": [[1], [2, 2], [3, 3, 3]], "label": [5, 6, 7]}


def length(completions, **columns):
    return [float(len(text)) for text in completions]


def label(label, completion_ids, prompts, **others):
    return [number + len(ids) for number, ids in zip(label, completion_ids, strict=True)]


async def slow(completions, **columns):
    await asyncio.sleep(0.01)
    return [10.0, None, 30.0]


def test_sources_are_weighted_and_added_and_kept_apart():
    mix = RewardMix(["adapter", length, label], [1.0, -0.5, 2.0])
    scores, by_source, _ = mix(torch.tensor([1.0, 2.0, 3.0]), **REPLIES)
    assert mix.needs_adapter
    assert scores.tolist() == [1 - 0.5 + 2 * 6, 2 - 1 + 2 * 8, 3 - 1.5 + 2 * 10]
    assert {name: column.tolist() for name, column in by_source.items()} == {"adapter": [1, 2, 3], "length": [1, 2, 3], "label": [6, 8, 10]}


def test_weights_are_one_unless_given_and_the_adapter_is_asked_only_where_it_is_named():
    mix = RewardMix([length, length])
    scores, by_source, _ = mix(None, **REPLIES)
    assert not mix.needs_adapter and scores.tolist() == [2, 4, 6] and list(by_source) == ["length_0", "length_1"]


def test_none_has_no_say_and_async_functions_are_awaited_together():
    scores, by_source, _ = RewardMix([slow, length, slow])(None, **REPLIES)
    assert scores.tolist() == [21, 2, 63]
    assert by_source["slow_0"].isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="no source of reward said anything of 1 of 3 replies"):
        RewardMix([slow])(None, **REPLIES)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, 2.0], "returned 2 numbers for 3 replies"),
        (None, "returned NoneType for 3 replies"),
        (7.0, "returned float for 3 replies"),
        ([1.0, float("nan"), float("inf")], r"returned nan for reply 1, 2 of 3 not finite"),
        (torch.tensor([1.0, 2.0, float("-inf")]), r"returned -inf for reply 2, 1 of 3 not finite"),
        ([1.0, "good", 2.0], "returned something that is no number"),
    ],
)
def test_what_a_function_may_not_return_is_said_with_its_name(answer, message):
    def judge(**replies):
        return answer

    with pytest.raises(ValueError, match=f"the reward function judge {message}"):
        RewardMix([length, judge])(None, **REPLIES)


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 2.0, 3.0]])
def test_one_weight_to_each_source(weights):
    with pytest.raises(ValueError, match=f"{len(weights)} weights for 2 sources"):
        RewardMix([length, "adapter"], weights)
    with pytest.raises(ValueError, match="0 sources"):
        RewardMix([])
