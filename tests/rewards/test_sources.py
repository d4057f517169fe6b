"""Several sources of reward: what each is asked, how they add up, and what a function may not
return."""

import asyncio

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import ragged

from goose_lora.functional import token_rewards
from goose_lora.rewards.sources import RewardMix

REPLIES = {
    "prompts": ["a", "b", "c"],
    "completions": ["x", "yy", "zzz"],
    "completion_ids": [[1], [2, 2], [3, 3, 3]],
    "label": [5, 6, 7],
}


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
    assert {name: column.tolist() for name, column in by_source.items()} == {
        "adapter": [1, 2, 3],
        "length": [1, 2, 3],
        "label": [6, 8, 10],
    }


def test_weights_are_one_unless_given_and_the_adapter_is_asked_only_where_it_is_named():
    mix = RewardMix([length, length])
    scores, by_source, _ = mix(None, **REPLIES)
    assert (
        not mix.needs_adapter and scores.tolist() == [2, 4, 6] and list(by_source) == ["length_0", "length_1"]
    )


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


def by_token(completion_ids, **columns):
    """The second reply's function answer is None, the others' a number a token."""
    return [[0.5], None, [1.0, 2.0, 3.0]]


def lists_and_numbers(completion_ids, **columns):
    return [4.0, [1, 2], torch.tensor([5.0, 6.0, 7.0])]


def test_rewards_of_single_tokens_are_weighted_and_added_to_what_others_say():
    mix = RewardMix(["adapter", by_token, length, lists_and_numbers], [1.0, 2.0, -1.0, 10.0])
    scores, by_source, tokens = mix(torch.tensor([1.0, 2.0, 3.0]), **REPLIES)
    # A number beside lists belongs to the last token
    parts = [[2 * 0.5 + 10 * 4], [10.0, 20.0], [2 + 50, 4 + 60, 6 + 70]]
    assert tokens.tolist() == [number for part in parts for number in part]
    assert scores.tolist() == [1 - 1 + sum(parts[0]), 2 - 2 + sum(parts[1]), 3 - 3 + sum(parts[2])]
    assert by_source["by_token"].tolist()[::2] == [0.5, 6.0] and by_source["by_token"].isnan().tolist() == [
        False,
        True,
        False,
    ]
    assert by_source["lists_and_numbers"].tolist() == [4, 3, 18]


def test_numbers_alone_belong_to_no_token():
    assert RewardMix([length, label])(None, **REPLIES).by_token is None


def test_what_only_watches_speaks_for_no_reply():
    def paid(completions, **columns):
        return [1.0, None]

    def watching(completions, **columns):
        return [5.0, 5.0]

    with pytest.raises(
        ValueError, match=r"said anything of 1 of 2 replies: each with a weight returned None"
    ):
        RewardMix([watching, paid], [0.0, 1.0])(None, completions=["a", "b"])


def test_names_stay_apart_whatever_functions_are_called():
    def reward(completions, **columns):
        return [1.0] * len(completions)

    def other(completions, **columns):
        return [2.0] * len(completions)

    def third(completions, **columns):
        return [4.0] * len(completions)

    other.__name__, third.__name__ = "reward", "reward_1"
    total, by_source, _ = RewardMix([reward, other, third])(None, completions=["a"])
    assert total.tolist() == [7.0] and [score.item() for score in by_source.values()] == [1.0, 2.0, 4.0]


def test_a_reply_of_which_only_a_silent_function_speaks_is_refused():
    with pytest.raises(ValueError, match="no source of reward said anything of 1 of 3 replies"):
        RewardMix([by_token])(None, **REPLIES)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([[1.0], [1.0], [1.0, 2.0, 3.0]], "returned 1 numbers for the 2 tokens of reply 1"),
        ([[1.0], [1.0, 2.0], []], "returned 0 numbers for the 3 tokens of reply 2"),
        ([[1.0], [1.0, None], [1.0, 2.0, 3.0]], "returned None for a token of reply 1"),
        ([[1.0], 2.0, [1.0, float("inf"), 3.0]], "returned inf for reply 2"),
        ([[1.0], [1.0, "x"], [1.0, 2.0, 3.0]], "returned something that is no number"),
        (torch.ones(3, 3), "returned 3 numbers for the 1 tokens of reply 0"),
    ],
)
def test_what_a_function_may_not_say_of_tokens_is_said_with_its_name(answer, message):
    def judge(**replies):
        return answer

    with pytest.raises(ValueError, match=f"the reward function judge {message}"):
        RewardMix([judge, length])(None, **REPLIES)


@given(ragged(tensors=3, holes=True), st.floats(0, 2))
def test_a_replys_rewards_are_its_kl_its_tokens_own_and_the_rest_of_its_score_at_the_end(batch, kl_coef):
    mask, kl, tokens, scores = batch
    keep = mask.any(-1)
    mask, kl, tokens, scores = mask[keep], kl[keep], tokens[keep], scores[keep, 0]
    junk = torch.where(mask, 0.0, float("nan")).double()
    got = token_rewards(scores, kl + junk, mask, kl_coef=kl_coef, by_token=tokens + junk)
    for row in range(len(mask)):
        places = [place for place in range(mask.shape[1]) if mask[row, place]]
        want = [0.0] * mask.shape[1]
        for place in places:
            want[place] = -kl_coef * kl[row, place].item() + tokens[row, place].item()
        want[places[-1]] += scores[row].item() - sum(tokens[row, place].item() for place in places)
        torch.testing.assert_close(got[row], torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-7)
        total = scores[row] - kl_coef * kl[row][mask[row]].sum()
        torch.testing.assert_close(got[row].sum(), total, rtol=0, atol=1e-7)
