"""goose_lora.evaluation.benchmark: the best of N, subsets, and length held equal."""

import numpy as np
import pytest

from goose_lora.evaluation.benchmark import benchmark_verdict, best_of_n
from goose_lora.evaluation.reward_model import HeldOut, HeldOutScores
from goose_lora.evaluation.statistics import wilson_interval


def held(lengths, ranks):
    return HeldOut([[[0] * length for length in own] for own in lengths], ranks, {})


def scores(*own):
    return HeldOutScores([np.array(each, dtype=float) for each in own], {})


def test_the_best_of_n_needs_a_best_reply_on_top_of_all():
    found = best_of_n([np.array([3.0, 1, 2]), np.array([1.0, 2, 0])], [[1, 2, 2], [1, 2, 2]])
    assert found.value == 0.5 and found.n == 2
    assert (found.low, found.high) == wilson_interval(1, 2)


def test_equal_scores_count_as_one_nth_and_any_of_several_best_replies_will_do():
    assert best_of_n([np.zeros(4)], [[1, 2, 2, 2]]).value == 0.25
    assert best_of_n([np.array([0.0, 5, 1])], [[1, 1, 2]]).value == 1.0


def test_a_score_of_length_alone_is_at_chance_where_lengths_are_balanced():
    lengths = [[5, 3], [6, 2], [9, 4], [2, 7]]
    made = benchmark_verdict(held(lengths, [[1, 2]] * 4), scores(*lengths))
    assert made.whole.accuracy.value == 0.75
    assert made.whole.length.longer.value == 1.0 and made.whole.length.shorter.value == 0.0
    assert made.whole.length.balanced.value == 0.5
    # Independent halves: the squares of the distances add up (Zou and Donner 2008)
    longer, shorter = made.whole.length.longer, made.whole.length.shorter
    below = ((longer.value - longer.low) ** 2 + (shorter.value - shorter.low) ** 2) ** 0.5 / 2
    assert made.whole.length.balanced.low == pytest.approx(0.5 - below)


def test_subsets_are_judged_by_themselves_and_their_mean_counts_each_once():
    made = benchmark_verdict(
        held([[2, 2]] * 4, [[1, 2]] * 4),
        scores([1, 0], [1, 0], [1, 0], [0, 1]),
        ["a", "a", "a", "b"],
    )
    assert {name: subset.best_of.value for name, subset in made.subsets.items()} == {"a": 1.0, "b": 0.0}
    assert made.mean_of_subsets.value == 0.5 and made.whole.best_of.value == 0.75
    assert made.to_dict()["subsets"]["a"]["prompts"] == 3
    assert [row["subset"] for row in made.rows()] == ["a", "b", "mean of subsets", "all"]
