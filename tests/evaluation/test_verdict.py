"""The reward model's verdict: its numbers, its lines, and what it warns of."""

import json
import math
import re
from dataclasses import replace

import pytest

from goose_lora.evaluation.statistics import Proportion, calibration, grouped_accuracy, pairwise_accuracy
from goose_lora.evaluation.verdict import PROBES, ProbeScores, ProbeVerdict, reward_verdict


def raises(message: str):
    return pytest.raises(ValueError, match=re.escape(message))


def verdict(wins: int, losses: int, **changes):
    made = reward_verdict(
        [1.0] * wins + [0.0] * losses,
        [0.0] * wins + [1.0] * losses,
        [7] * (wins + losses),
        [7] * (wins + losses),
    )
    return replace(made, **changes)


def test_verdict_numbers_come_from_all_scores_and_lengths():
    made = reward_verdict([1.0, 3.0], [0.0, 4.0], [10, 30], [0, 40], any_pair=([1.0], [2.0]))
    assert (made.accuracy, made.n_pairs) == (pairwise_accuracy([1.0, 3.0], [0.0, 4.0]), 2)
    assert made.accuracy_any_pair == pairwise_accuracy([1.0], [2.0])
    assert (made.score_mean, made.score_std) == (2.0, pytest.approx(math.sqrt(2.5), abs=1e-12))
    assert (made.margin_mean, made.length_correlation) == (0.0, pytest.approx(1, abs=1e-12))
    assert (made.calibration_bins, made.calibration_error) == calibration([1.0, 3.0], [0.0, 4.0])
    assert (made.margin_std, made.margin_negative, made.n_prompts) == (1.0, 0.5, 2)
    assert made.margin_quantiles == {
        "0.05": -0.9,
        "0.25": -0.5,
        "0.5": 0.0,
        "0.75": 0.5,
        "0.95": pytest.approx(0.9),
    }


def test_a_good_model_reads_ok_on_every_line():
    lines = verdict(346, 34, calibration_error=0.04).lines()
    assert lines[0] == "accuracy 0.91 (95 % interval 0.88 to 0.94, 380 pairs): ok"
    assert len(lines) == 5
    assert all(line.endswith(": ok") for line in lines)


def test_a_model_at_chance_is_not_to_be_used():
    assert (
        verdict(11, 9).lines()[0]
        == "accuracy 0.55 (95 % interval 0.34 to 0.74, 20 pairs) includes chance: do not run PPO on this"
        " reward model; more or cleaner pairs, more epochs, or a lower learning rate"
    )


def test_the_limit_between_ok_and_chance_is_one_half():
    at = verdict(3, 1, accuracy=Proportion(0.7, 0.5, 0.9, 9)).lines()[0]
    above = verdict(3, 1, accuracy=Proportion(0.7, 0.5001, 0.9, 9)).lines()[0]
    assert "includes chance" in at
    assert above.endswith("ok")


def test_a_model_surely_below_chance_is_told_apart_from_one_at_chance():
    assert "includes chance" in verdict(1, 3, accuracy=Proportion(0.3, 0.1, 0.5, 9)).lines()[0]
    line = verdict(10, 90).lines()[0]
    assert "is below chance: do not run PPO on this reward model; chosen and rejected look swapped" in line
    assert "includes" not in line


def test_the_second_set_has_a_line_of_its_own():
    lines = verdict(90, 10, accuracy_any_pair=pairwise_accuracy([1, 0], [0, 1])).lines()
    assert lines[0].endswith("ok")
    assert (
        lines[1]
        == "accuracy on any pair 0.50 (95 % interval 0.09 to 0.91, 2 pairs) includes chance: such pairs are"
        " not told apart; train on more"
    )
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("value", "action"),
    [
        (0.5, "ok"),
        (-0.5, "ok"),
        (0.51, "PPO will learn length (longer replies); balance lengths"),
        (-0.51, "PPO will learn length (shorter replies); balance lengths"),
    ],
)
def test_a_score_that_follows_length_is_warned_of(value, action):
    assert (
        verdict(90, 10, length_correlation=value)
        .lines()[1]
        .startswith(f"correlation of score and length {value:+.2f}: {action}")
    )


@pytest.mark.parametrize(
    ("std", "action"), [(0.0, "nearly one score for every reply"), (0.0099, "nearly one score"), (0.01, "ok")]
)
def test_scores_without_spread_are_warned_of(std, action):
    line = verdict(90, 10, score_std=std).lines()[2]
    assert line.startswith(f"score mean 0.5, standard deviation {std:.3g}, mean margin 0.8: {action}")


@pytest.mark.parametrize(
    ("error", "action"), [(0.1, "ok"), (0.11, "the size of a score difference is not to be trusted")]
)
def test_miscalibration_is_warned_of(error, action):
    assert (
        verdict(90, 10, calibration_error=error)
        .lines()[4]
        .startswith(f"calibration error {error:.2f}: {action}")
    )


def test_the_dictionary_goes_through_json_unchanged():
    made = verdict(9, 1, accuracy_any_pair=Proportion(0.75, 0.3, 0.95, 4))
    plain = made.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain == {
        "accuracy": 0.9,
        "accuracy_ci": [made.accuracy.low, made.accuracy.high],
        "n_pairs": 10,
        "accuracy_any_pair": 0.75,
        "accuracy_any_pair_ci": [0.3, 0.95],
        "n_any_pairs": 4,
        "length_correlation": 0.0,
        "score_mean": 0.5,
        "score_std": 0.5,
        "margin_mean": pytest.approx(0.8),
        "calibration_error": made.calibration_error,
        "calibration_bins": made.calibration_bins,
        "n_prompts": 10,
        "probes": {},
        "margin_std": pytest.approx(0.6),
        "margin_negative": 0.1,
        "warnings": [made.lines()[1], made.lines()[-1]],
        "margin_quantiles": {"0.05": pytest.approx(-0.1), "0.25": 1.0, "0.5": 1.0, "0.75": 1.0, "0.95": 1.0},
    }
    without = verdict(9, 1).to_dict()
    assert [without[key] for key in ("accuracy_any_pair", "accuracy_any_pair_ci", "n_any_pairs")] == [
        None,
        None,
        None,
    ]


# Ranked lists and probes


def test_pairs_of_one_prompt_have_the_grouped_interval_and_are_counted_with_their_prompts():
    chosen, rejected, prompts = [1.0] * 12, [0.0] * 9 + [2.0] * 3, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    made = reward_verdict(
        chosen, rejected, [5] * 12, [6] * 12, prompts=prompts, any_pair=(chosen, rejected, prompts)
    )
    assert made.accuracy == made.accuracy_any_pair == grouped_accuracy(chosen, rejected, prompts)
    assert made.accuracy.low < pairwise_accuracy(chosen, rejected).low
    assert (made.n_pairs, made.n_prompts) == (12, 4)
    assert "12 pairs of 4 prompts)" in made.lines()[0]


def test_a_probe_is_compared_with_the_replies_to_its_own_prompts():
    scores = ProbeScores([3.0, 0.0, 1.0, 5.0], [2.0, 1.0, 1.0, 6.0], [0.0, -1.0, 3.0, 5.0])
    made = reward_verdict([1.0], [0.0], [1], [1], probes={"empty": scores})
    assert made.probes["empty"] == ProbeVerdict(
        2.25, pairwise_accuracy([3, 0, 1, 5], [2, 1, 1, 6]), pairwise_accuracy([3, 0, 1, 5], [0, -1, 3, 5])
    )
    kept = made.to_dict()["probes"]["empty"]
    assert (kept["score_mean"], kept["beats_chosen"], kept["beats_rejected"], kept["n"]) == (
        2.25,
        0.375,
        0.625,
        4,
    )
    assert kept["beats_chosen_ci"] == list(made.probes["empty"].beats_chosen[1:3])
    assert json.loads(json.dumps(made.to_dict())) == made.to_dict()


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize(("wins", "fails"), [(5, False), (6, True)])
def test_a_probe_fails_when_it_beats_the_chosen_reply_in_more_than_half(name, wins, fails):
    scores = ProbeScores([1.0] * 10, [0.0] * wins + [2.0] * (10 - wins), [0.0] * 10)
    made = verdict(
        95,
        5,
        calibration_error=0.0,
        probes=reward_verdict([1.0], [0.0], [1], [1], probes={name: scores}).probes,
    )
    start = f"{name} reply: score 1 on average, above the chosen reply to {wins / 10:.2f} of 10 prompts ("
    line = made.lines()[-1]
    assert line.startswith(start) and line.endswith(
        f"above the rejected to 1.00: {PROBES[name] if fails else 'ok'}"
    )
    assert made.to_dict()["warnings"] == ([line] if fails else [])


def test_margins_that_are_largest_on_the_wrong_side_are_warned_of():
    assert "wrong side" not in verdict(90, 10).lines()[3]
    quantiles = {"0.05": -3.0, "0.25": 0.0, "0.5": 0.5, "0.75": 1.0, "0.95": 2.9}
    line = verdict(90, 10, margin_quantiles=quantiles).lines()[3]
    assert line.startswith(
        "margins of 5 to 95 % of the pairs -3 to 2.9, standard deviation 0.6, 10% negative: the largest"
        " margins are on the wrong"
    )


@pytest.mark.parametrize("bad", [[1.0], [1.0, math.nan]])
def test_bad_scores_and_lengths_of_a_verdict_are_named(bad):
    with raises("chosen_lengths"):
        reward_verdict([1.0, 2.0], [0.0, 1.0], bad, [3, 4])
    with raises("rejected"):
        reward_verdict([1.0, 2.0], bad, [3, 4], [3, 4])
    with raises("rejected has 2 values and rejected_lengths 1"):
        reward_verdict([1.0, 2.0], [0.0, 1.0], [3, 4], [3])
