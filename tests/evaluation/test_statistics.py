"""goose_lora.evaluation.statistics against closed forms, slow references in another form than the
code, and its own error messages."""

import itertools
import json
import math
import re
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from goose_lora.evaluation.statistics import (
    calibration,
    correlation,
    distinct_n,
    grouped_accuracy,
    matched_length_difference,
    mean_interval,
    pairwise_accuracy,
    repetition,
    spearman,
    wilson_interval,
    win_rate,
)
from goose_lora.files import import_function
from goose_lora.terminal import side_by_side, table

FINITE = st.floats(-1e6, 1e6)
TIED = st.integers(-3, 3).map(float)  # few values, so that ties are common
PAIRS = st.lists(st.tuples(TIED, TIED), min_size=1, max_size=30)
REPLIES = st.lists(st.tuples(TIED, st.integers(0, 6)), min_size=1, max_size=15)  # value and length
WORDS = st.lists(st.lists(st.sampled_from(["a", "b", "A", "c"]), max_size=9).map(" ".join), max_size=5)


def raises(message: str):
    return pytest.raises(ValueError, match=re.escape(message))


# Proportions


@pytest.mark.parametrize(
    ("successes", "n", "confidence", "low", "high"),
    [
        (8, 10, 0.95, 0.490162471536642, 0.943317825456725),
        (81, 263, 0.95, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.95, 0.0624, 0.1605),
        (0, 20, 0.95, 0.0, 0.1611),
        (1, 29, 0.95, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes, n, confidence, low, high):
    # The table has four digits
    assert wilson_interval(successes, n, confidence=confidence) == pytest.approx((low, high), abs=5e-5)


@given(n=st.integers(1, 500), share=st.floats(0, 1), confidence=st.floats(0.5, 0.999))
def test_wilson_ends_are_where_the_score_test_reaches_its_critical_value(n, share, confidence):
    low, high = wilson_interval(share * n, n, confidence=confidence)
    critical = math.sqrt(2) * torch.erfinv(torch.tensor(confidence, dtype=torch.float64)).item()
    observed = share * n / n
    assert 0 <= low <= observed <= high <= 1
    for end in (low, high):
        assert abs(observed - end) == pytest.approx(critical * math.sqrt(end * (1 - end) / n), abs=1e-7)


@given(n=st.integers(1, 200), data=st.data())
def test_wilson_is_mirrored_when_failures_are_counted_instead(n, data):
    k = data.draw(st.integers(0, n))
    low, high = wilson_interval(k, n)
    assert wilson_interval(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_refuses_what_is_no_proportion():
    with raises("n=0; it must be 1 or more"):
        wilson_interval(0, 0)
    with raises("successes=11 is outside [0, n=10]"):
        wilson_interval(11, 10)
    with raises("successes=nan is outside [0, n=10]"):
        wilson_interval(math.nan, 10)
    with raises("confidence=95 is not between 0 and 1; for a 95 % interval use confidence=0.95"):
        wilson_interval(5, 10, confidence=95)


def test_a_tie_counts_one_half_in_value_and_interval():
    assert pairwise_accuracy([2.0, 1.0, 0.0, 5.0], [1.0, 1.0, 1.0, 4.0]) == (
        0.625,
        *wilson_interval(2.5, 4),
        4,
    )
    assert pairwise_accuracy([7.0] * 9, [7.0] * 9).value == 0.5


@given(PAIRS)
def test_accuracy_is_the_mean_of_wins_and_half_ties(pairs):
    expected = sum((Fraction(a > b) + Fraction(a >= b)) / 2 for a, b in pairs) / len(pairs)
    assert pairwise_accuracy([a for a, _ in pairs], [b for _, b in pairs]).value == pytest.approx(
        float(expected), abs=1e-12
    )


@given(PAIRS)
def test_win_rates_of_both_sides_sum_to_one(pairs):
    a, b = zip(*pairs, strict=True)
    forward, backward = win_rate(a, b), win_rate(b, a)
    assert forward == pairwise_accuracy(a, b)
    assert forward.value + backward.value == pytest.approx(1, abs=1e-12)
    assert forward.low == pytest.approx(1 - backward.high, abs=1e-12)


@given(PAIRS)
def test_accuracy_in_groups_of_one_is_that_of_pairs(pairs):
    chosen, rejected = zip(*pairs, strict=True)
    alone = grouped_accuracy(chosen, rejected, range(len(pairs)))
    assert (alone.value, alone.n) == pairwise_accuracy(chosen, rejected)[::3]
    if all(a != b for a, b in pairs):  # half points vary less than points
        assert alone == pytest.approx(pairwise_accuracy(chosen, rejected), abs=1e-12)


@given(PAIRS, st.integers(1, 5))
def test_pairs_that_are_said_several_times_are_no_news(pairs, times):
    chosen, rejected = zip(*pairs, strict=True)
    once = grouped_accuracy(chosen, rejected, range(len(pairs)))
    groups = [group for group in range(len(pairs)) for _ in range(times)]
    many = grouped_accuracy(np.repeat(chosen, times), np.repeat(rejected, times), groups)
    if all(a != b for a, b in pairs):
        assert many == pytest.approx((*once[:3], times * len(pairs)), abs=1e-9)


def test_the_interval_of_grouped_pairs_covers_the_truth():
    """Prompts differ in how easy they are, so that their six pairs agree: the pairs' own interval
    is far too narrow."""
    random, truth, grouped, plain = np.random.default_rng(1), 0.6, 0, 0
    for _ in range(200):
        easy = random.beta(0.6 * 1.5, 0.4 * 1.5, size=60)
        right = (random.random((60, 6)) < easy[:, None]).astype(float).flatten()
        groups = np.repeat(np.arange(60), 6)
        one, other = (
            grouped_accuracy(right, np.full(360, 0.5), groups),
            pairwise_accuracy(right, np.full(360, 0.5)),
        )
        grouped += one.low <= truth <= one.high
        plain += other.low <= truth <= other.high
    assert grouped >= 180 and plain < 170


def test_lists_arrays_and_bfloat16_tensors_with_gradient_give_the_same():
    chosen, rejected = [1.5, -2.0, 3.0], [0.5, 2.0, 3.0]
    tensors = [torch.tensor(x, dtype=torch.bfloat16, requires_grad=True) for x in (chosen, rejected)]
    assert (
        pairwise_accuracy(*tensors)
        == pairwise_accuracy(np.array(chosen), np.array(rejected))
        == pairwise_accuracy(chosen, rejected)
    )


@pytest.mark.parametrize("function", [pairwise_accuracy, win_rate, correlation, spearman, calibration])
def test_bad_scores_are_named_by_size_shape_and_place(function):
    with raises("give one of each a sample, in the same order"):
        function([1.0, 2.0], [1.0])
    with raises("is empty; at least one value is needed"):
        function([], [])
    with raises("1 of 3 values are not finite, first nan at index 2; look there"):
        function([1.0, 2.0, 3.0], [1.0, 2.0, math.nan])
    with raises("2 of 2 values are not finite, first -inf at index 0; look there"):
        function(torch.tensor([-math.inf, math.inf]), [1.0, 2.0])
    with raises(
        "has shape (3, 1), expected (N,): one number a sample. For a (N, 1) score head use .squeeze(-1)"
    ):
        function(torch.zeros(3, 1), [1.0, 2.0, 3.0])


def test_unequal_lists_are_named_with_their_sizes():
    with raises("chosen has 3 values and rejected 2; give one of each a sample, in the same order"):
        pairwise_accuracy([1.0, 2.0, 3.0], [1.0, 2.0])
    with raises("scores_a has 1 values and scores_b 2"):
        win_rate([1.0], [1.0, 2.0])


# Means


def test_bootstrap_of_a_large_sample_agrees_with_the_normal_interval():
    x = np.random.default_rng(3).exponential(2.0, size=4000)
    value, low, high, n = mean_interval(x, confidence=0.9)
    half = 1.6448536 * x.std() / math.sqrt(x.size)
    assert (value, n) == (pytest.approx(x.mean(), rel=1e-12), 4000)
    # 2000 resamples fix a 5 % quantile to about 0.047 standard errors, i.e. 3 % of `half`; four
    # times that
    assert (value - low, high - value) == pytest.approx((half, half), rel=0.12)


def test_bootstrap_interval_is_that_of_the_exact_resampling_distribution():
    x = [0.0, 1.0, 5.0]
    exact = sorted(sum(draw) / 3 for draw in itertools.product(x, repeat=3))  # 27 equally likely means
    _, low, high, _ = mean_interval(x, confidence=0.8)
    # 10 % and 90 % of 27 lie inside the atoms 3rd and 25th
    assert (low, high) == pytest.approx((exact[2], exact[24]), abs=1e-12)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    intervals = [mean_interval(random.normal(1.0, 2.0, 40), resamples=200, seed=i) for i in range(300)]
    hits = sum(interval.low <= 1.0 <= interval.high for interval in intervals)
    # 0.95 less the known 1.5 % of small samples, plus or minus three standard errors of 0.0126 and
    # up
    assert 0.89 <= hits / 300 <= 0.98


def test_bootstrap_depends_on_the_seed_and_on_nothing_else():
    x = np.random.default_rng(0).normal(size=30)
    np.random.seed(1)
    first = mean_interval(x, seed=5)
    np.random.seed(2)
    assert mean_interval(x, seed=5) == first
    assert mean_interval(x, seed=6) != first


@given(st.lists(FINITE, min_size=1, max_size=12), st.floats(0.5, 0.99))
def test_bootstrap_stays_inside_the_sample_and_narrows_with_less_confidence(x, confidence):
    value, low, high, n = mean_interval(x, confidence=confidence, resamples=50)
    narrow = mean_interval(x, confidence=confidence / 2, resamples=50)
    slack = 1e-12 * max(map(abs, x))
    assert min(x) - slack <= low <= narrow.low <= narrow.high <= high <= max(x) + slack
    assert (value, n) == (pytest.approx(math.fsum(x) / len(x), abs=1e-9), len(x))


def test_one_value_has_an_interval_without_width():
    assert mean_interval([2.5]) == (2.5, 2.5, 2.5, 1)


def test_bad_settings_of_the_bootstrap_are_refused():
    with raises("confidence=0 is not between 0 and 1"):
        mean_interval([1.0], confidence=0)
    with raises("resamples=0; it must be 1 or more"):
        mean_interval([1.0], resamples=0)
    with raises("values is empty"):
        mean_interval([])


# Correlation


def test_correlation_has_its_known_values():
    assert correlation([1, 2, 3, 4], [2, 4, 6, 8]) == pytest.approx(1, abs=1e-12)
    assert correlation([1, 2, 3], [1, 2, 1]) == pytest.approx(0, abs=1e-12)
    assert correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8, abs=1e-12)


@given(st.lists(st.tuples(FINITE, FINITE), min_size=2, max_size=20))
def test_correlation_is_the_quotient_of_exact_sums(pairs):
    x, y = ([Fraction(v) for v in column] for column in zip(*pairs, strict=True))
    n = len(pairs)
    covariance = n * sum(a * b for a, b in zip(x, y, strict=True)) - sum(x) * sum(y)
    spread = [n * sum(a * a for a in v) - sum(v) ** 2 for v in (x, y)]
    expected = (
        math.copysign(math.sqrt(covariance**2 / (spread[0] * spread[1])), covariance) if all(spread) else 0.0
    )
    # 1e-7, save that values equal to 7 digits and more lose those digits when the mean is taken
    # away
    loss = max(max(map(abs, v)) / (max(v) - min(v)) for v in (x, y)) if all(spread) else 1
    assert correlation(*zip(*pairs, strict=True)) == pytest.approx(expected, abs=1e-7 + 1e-14 * float(loss))


@pytest.mark.parametrize("function", [correlation, spearman])
@pytest.mark.parametrize("constant", [0.0, 0.1, -1e300])
def test_a_constant_correlates_with_nothing(function, constant):
    assert function([constant] * 7, range(7)) == function(range(7), [constant] * 7) == 0.0
    assert function([constant], [1.0]) == 0.0


def test_correlation_survives_huge_tiny_and_far_from_zero_values():
    for x in ([1e300, -1e300, 5e299], [1e-300, 2e-300, 4e-300], [1.0, 1.0 + 2**-52, 1.0 + 2**-51]):
        assert correlation(x, x) == pytest.approx(1, abs=1e-12)
        assert correlation(x, [-v for v in x]) == pytest.approx(-1, abs=1e-12)


def test_spearman_is_the_textbook_formula_without_ties():
    x, y = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6], [2.0, 7.0, 1.0, 8.0, 2.8, 1.8]
    place = [{v: i for i, v in enumerate(sorted(column))} for column in (x, y)]
    squares = sum((place[0][a] - place[1][b]) ** 2 for a, b in zip(x, y, strict=True))
    assert spearman(x, y) == pytest.approx(1 - 6 * squares / (6 * 35), abs=1e-12)


@given(PAIRS)
def test_spearman_gives_ties_their_mean_rank(pairs):
    columns = list(zip(*pairs, strict=True))
    ranks = [[sum(w < v for w in column) + (column.count(v) + 1) / 2 for v in column] for column in columns]
    assert spearman(*columns) == pytest.approx(correlation(*ranks), abs=1e-9)


def test_spearman_sees_only_the_order():
    x = [0.1, 5.0, 2.0, 3.0]
    assert spearman(x, [math.exp(v) for v in x]) == pytest.approx(1, abs=1e-12)
    assert correlation(x, [math.exp(v) for v in x]) < 0.95


# Texts


def test_distinct_and_repetition_have_their_known_values():
    assert distinct_n(["the cat the cat", "The dog"], 1) == 3 / 6
    assert distinct_n(["the cat the cat", "The dog"], 2) == 3 / 4  # no bigram across two texts
    assert repetition(["a b c a b c", "x y z w"], n=3) == pytest.approx((1 - 3 / 4 + 0) / 2, abs=1e-12)
    assert repetition(["no no no no no"]) == pytest.approx(1 - 1 / 3, abs=1e-12)


def ngrams_by_hand(text: str, n: int) -> list[str]:
    words = text.lower().split()
    return [" ".join(words[i : i + n]) for i in range(len(words)) if i + n <= len(words)]


@given(WORDS, st.integers(1, 4))
def test_distinct_counts_each_ngram_once(texts, n):
    grams = [gram for text in texts for gram in ngrams_by_hand(text, n)]
    first_seen = sum(gram not in grams[:i] for i, gram in enumerate(grams))
    assert distinct_n(texts, n) == pytest.approx(first_seen / max(1, len(grams)), abs=1e-12)


@given(WORDS.filter(bool), st.integers(1, 4))
def test_repetition_is_the_mean_share_of_ngrams_seen_before(texts, n):
    shares = []
    for text in texts:
        grams = ngrams_by_hand(text, n)
        shares.append(sum(gram in grams[:i] for i, gram in enumerate(grams)) / max(1, len(grams)))
    assert repetition(texts, n) == pytest.approx(sum(shares) / len(shares), abs=1e-12)


def test_texts_without_an_ngram_give_zero():
    assert distinct_n([], 2) == distinct_n(["", "one"], 2) == repetition(["", "one two"], n=3) == 0.0


@pytest.mark.parametrize("function", [distinct_n, repetition])
def test_a_bare_string_is_not_read_letter_by_letter(function):
    message = (
        "texts is one string ('hello there'), which would be read letter by letter; give a list of strings"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        function("hello there", 2)
    with raises("n=0; it must be 1 or more"):
        function(["hello there"], 0)


def test_repetition_of_no_texts_is_refused():
    with raises("texts=0; it must be 1 or more"):
        repetition([])


# Matched length


def test_an_advantage_that_is_only_length_disappears():
    random = np.random.default_rng(0)
    lengths_a = random.choice([10, 20, 30, 40], 400, p=[0.1, 0.2, 0.3, 0.4])
    lengths_b = random.choice([10, 20, 30, 40], 400, p=[0.4, 0.3, 0.2, 0.1])
    raw = (lengths_a / 10).mean() - (lengths_b / 10).mean()
    value, low, high, n = matched_length_difference(
        lengths_a / 10, lengths_a, lengths_b / 10, lengths_b, bins=20
    )
    assert raw > 0.8
    assert (value, low, high, n) == (
        pytest.approx(0, abs=1e-9),
        pytest.approx(0, abs=1e-9),
        pytest.approx(0, abs=1e-9),
        400,
    )


def test_strata_are_weighted_by_the_members_of_a_and_uncovered_ones_left_out():
    # cuts at the median 10: stratum below {5}, stratum from 10 on; of a one short, three long
    value, _, _, n = matched_length_difference([1, 4, 5, 6], [5, 10, 10, 10], [0, 2, 2], [5, 5, 10], bins=2)
    assert (value, n) == (pytest.approx((1 * (1 - 1) + 3 * (5 - 2)) / 4, abs=1e-12), 4)
    # Cut at 2: the 1s meet, 2 and 50 meet 2
    value, _, _, n = matched_length_difference([1, 1, 9], [1, 2, 50], [0, 0], [1, 2], bins=2)
    assert (value, n) == (pytest.approx((1 * 1 + 2 * 5) / 3, abs=1e-12), 3)
    value, _, _, n = matched_length_difference([1, 1, 9, 9], [1, 1, 50, 50], [0, 0], [1, 1], bins=3)
    assert (value, n) == (pytest.approx(1, abs=1e-12), 2)


@given(REPLIES, REPLIES, st.integers(1, 5))
def test_matched_difference_equals_matching_each_of_a_with_the_mean_of_b_in_its_stratum(a, b, bins):
    pooled = [length for _, length in a + b]

    def stratum(length):  # by the empirical distribution function
        return math.ceil(Fraction(sum(other <= length for other in pooled), len(pooled)) * bins)

    differences = []
    for value, length in a:
        partners = [other for other, other_length in b if stratum(other_length) == stratum(length)]
        if partners:
            differences.append(value - sum(partners) / len(partners))
    columns = [*zip(*a, strict=True), *zip(*b, strict=True)]
    if not differences:
        with raises("no length stratum holds members of both"):
            matched_length_difference(*columns, bins=bins)
        return
    value, low, high, n = matched_length_difference(*columns, bins=bins, resamples=20)
    assert (value, n) == (pytest.approx(sum(differences) / len(differences), abs=1e-9), len(differences))
    assert low <= high


def test_matched_interval_agrees_with_the_normal_interval_of_two_strata():
    random = np.random.default_rng(1)
    lengths = np.repeat([10, 20], 300)
    a, b = random.normal(lengths / 10 + 0.5, 1.0), random.normal(lengths / 10, 2.0)
    value, low, high, _ = matched_length_difference(a, lengths, b, lengths, bins=2)
    variance = sum(0.25 * (x[half].var() / 300) for x in (a, b) for half in (slice(0, 300), slice(300, 600)))
    # a 2.5 % quantile of 2000 draws has a relative error near 3.5 % of the half width; three times
    # that
    assert (value - low, high - value) == pytest.approx((1.96 * math.sqrt(variance),) * 2, rel=0.12)
    assert matched_length_difference(a, lengths, b, lengths, bins=2, seed=0) == (value, low, high, 600)


def test_lengths_that_never_meet_are_refused_with_both_ranges():
    with raises("lengths of a are 50 to 60, of b 1 to 2. Use fewer bins than 2"):
        matched_length_difference([1, 2], [50, 60], [1, 2], [1, 2], bins=2)
    with raises("bins=0; it must be 1 or more"):
        matched_length_difference([1], [1], [1], [1], bins=0)
    with raises("values_b has 2 values and lengths_b 1"):
        matched_length_difference([1], [1], [1, 2], [1])


# Calibration


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_calibration_of_known_frequencies():
    # nine of ten right at 0.9 (calibrated), half right at 0.65 (overconfident by 0.15)
    chosen = [logit(0.9)] * 9 + [0.0] + [logit(0.65), 0.0] * 5
    rejected = [0.0] * 9 + [logit(0.9)] + [0.0, logit(0.65)] * 5
    bins, error = calibration(chosen, rejected)
    assert bins == [
        {"predicted": pytest.approx(0.65, abs=1e-9), "observed": 0.5, "n": 10},
        {"predicted": pytest.approx(0.9, abs=1e-9), "observed": 0.9, "n": 10},
    ]
    assert error == pytest.approx((10 * 0.15 + 10 * 0) / 20, abs=1e-9)


def test_a_constant_score_is_calibrated_and_certain_scores_need_no_bin_of_their_own():
    assert calibration([1.0] * 4, [1.0] * 4) == ([{"predicted": 0.5, "observed": 0.5, "n": 4}], 0.0)
    assert calibration([1000.0], [0.0], bins=3) == ([{"predicted": 1.0, "observed": 1.0, "n": 1}], 0.0)
    assert calibration([0.0], [1000.0], bins=3)[1] == 1.0
    assert [row["n"] for row in calibration([1000.0, logit(0.95)], [0.0, 0.0])[0]] == [2]


@given(st.lists(st.tuples(st.floats(-4, 4), st.floats(-4, 4)), min_size=1, max_size=30), st.integers(1, 7))
def test_calibration_bins_hold_every_pair_in_its_place(pairs, bins):
    rows, error = calibration(*zip(*pairs, strict=True), bins=bins)
    assert sum(row["n"] for row in rows) == len(pairs)
    assert sum(row["n"] * row["observed"] for row in rows) / len(pairs) == pytest.approx(
        pairwise_accuracy(*zip(*pairs, strict=True)).value
    )
    predicted = sorted(1 / (1 + math.exp(-abs(a - b))) for a, b in pairs)
    assert sum(row["n"] * row["predicted"] for row in rows) == pytest.approx(sum(predicted), abs=1e-9)
    for row in rows:  # rising, and exactly the pairs of one interval
        group, predicted = predicted[: row["n"]], predicted[row["n"] :]
        assert row["predicted"] == pytest.approx(sum(group) / len(group), abs=1e-9)
        assert math.floor((group[0] - 0.5) * 2 * bins + 1e-9) >= math.floor(
            (group[-1] - 0.5) * 2 * bins - 1e-9
        )
    assert error == pytest.approx(
        sum(abs(row["n"] * (row["observed"] - row["predicted"])) for row in rows) / len(pairs), abs=1e-9
    )


def test_calibration_without_bins_is_refused():
    with raises("bins=0; it must be 1 or more"):
        calibration([1.0], [0.0], bins=0)


# Import


@pytest.fixture
def reward_file(tmp_path):
    path = tmp_path / "my reward.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass"
        " Settings:\n    weight: float = 2.0\n\ndef length_reward(text):\n    return Settings().weight *"
        " len(text)\n\nLIMIT = 3\n"
    )
    before = dict(sys.modules)
    yield path
    for name in set(sys.modules) - set(before):
        del sys.modules[name]


def test_a_function_is_found_in_a_module_and_in_a_submodule():
    assert import_function("math:sqrt") is math.sqrt
    assert import_function("json.decoder:JSONDecoder") is json.decoder.JSONDecoder


def test_a_function_is_found_in_a_file_with_its_dataclasses_and_sys_path_stays(reward_file):
    before = list(sys.path)
    assert import_function(f"{reward_file}:length_reward")("abc") == 6.0
    assert sys.path == before


def test_a_relative_path_works_and_files_of_one_name_do_not_mix(tmp_path, monkeypatch):
    for folder, value in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "reward.py").write_text(f"def reward():\n    return VALUE\n\nVALUE = {value}\n")
    monkeypatch.chdir(tmp_path)
    first, second = import_function("one/reward.py:reward"), import_function("two/reward.py:reward")
    assert (first(), second()) == (1, 2)
    assert sys.modules[first.__module__] is not sys.modules[second.__module__]
    del sys.modules[first.__module__], sys.modules[second.__module__]


FORM = 'Accepted: "module:function" or "path/to/file.py:function".'


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("math.sqrt", "there is no colon"),
        ("math:", "'' after the colon is not a function name"),
        ("math:a.b", "'a.b' after the colon is not a function name"),
        (":sqrt", "'' is neither a module's name nor a .py file"),
        (".math:sqrt", "'.math' is neither a module's name nor a .py file"),
        ("some/path:sqrt", "'some/path' is neither a module's name nor a .py file"),
        ("no_such_module_here:sqrt", "there is no module 'no_such_module_here' on sys.path"),
        ("json.no_such:sqrt", "there is no module 'json.no_such' on sys.path"),
        ("math.deeper:sqrt", "there is no module 'math.deeper' on sys.path"),
        ("no/such/file.py:reward", "there is no file 'no/such/file.py'"),
        ("math:sqr", "'math' has no 'sqr'; the nearest name is 'sqrt'"),
        ("math:pi", "'pi' in 'math' is not callable but of type float"),
    ],
)
def test_a_wrong_spec_is_told_what_is_wrong_and_the_accepted_form(spec, problem):
    with pytest.raises(ValueError) as error:
        import_function(spec)
    assert str(error.value) == f"{spec!r}: {problem}. {FORM}"


def test_a_name_like_no_other_gets_no_suggestion():
    with raises("'math' has no 'zzzzzz'. Accepted"):
        import_function("math:zzzzzz")


def test_an_uncallable_name_is_never_the_suggestion(reward_file):
    with raises("has no 'LIMITS'. Accepted"):
        import_function(f"{reward_file}:LIMITS")


@pytest.mark.parametrize("as_file", [True, False])
def test_what_a_module_lacks_is_not_blamed_on_the_module(tmp_path, monkeypatch, as_file):
    (tmp_path / "needs_more.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match="failed with ModuleNotFoundError: No module named 'no_such_dependency'"
    ):
        import_function(f"{tmp_path / 'needs_more.py'}:reward" if as_file else "needs_more:reward")


# Terminal


def test_table_aligns_numbers_right_and_text_left():
    rows = [
        {"model": "sft", "score": 0.5, "n": 12},
        {"model": "ppo, long", "score": -1234.5678},
        {"score": None, "n": 7},
    ]
    assert (
        table(rows, ["model", "score", "n"]) == "model      score   n\n"
        "---------  -----  --\n"
        "sft          0.5  12\n"
        "ppo, long  -1235   -\n"
        "-              -   7"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.123"),
        (12.3456, "12.3"),
        (999.4, "999"),
        (999.6, "1000"),
        (123456.7, "123457"),
        (1e12, "1e+12"),
        (0.0000123, "1.23e-05"),
        (0.0, "0"),
        (123456, "123456"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (np.float32(0.5), "0.5"),
        (np.int64(5), "5"),
        (True, "True"),
        ("a\x1b[31m\nb", "a\\x1b[31m\\nb"),
        (None, "-"),
    ],
)
def test_table_writes_a_value_as(value, text):
    assert table([{"x": value}], ["x"]).splitlines()[2].strip() == text


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from("abc"), st.one_of(st.none(), FINITE, st.integers(), st.text(max_size=5))
        ),
        max_size=5,
    )
)
def test_table_has_a_line_a_row_and_no_control_character(rows):
    lines = table(rows, ["a", "b", "c"]).split("\n")
    assert len(lines) == 2 + len(rows)
    assert all(line.isprintable() and len(line) <= len(lines[1]) for line in lines)


def test_table_without_columns_is_refused():
    with raises("columns=0; it must be 1 or more"):
        table([{"a": 1}], [])


def test_samples_stand_side_by_side():
    columns = {"sft": ["hi", "one two three four five six", "x"], "ppo": ["", "1\n\n2", "y"]}
    text = side_by_side(["Say hi.", "Count.", "Not shown"], columns, width=28, limit=2)
    assert [line.rstrip() for line in text.split("\n")] == [
        "[1 of 3]--------------------",
        "prompt: Say hi.",
        "sft:    hi",
        "ppo:",
        "[2 of 3]--------------------",
        "prompt: Count.",
        "sft:    one two three four",
        "        five six",
        "ppo:    1",
        "",
        "        2",
    ]


def test_a_reply_cannot_colour_the_terminal_or_pass_for_another():
    text = side_by_side(["p"], {"a": ["\x1b[2J\r\x07\u202eevil\x9b\nb: forged"], "b": ["true"]})
    assert "\\x1b[2J\\r\\x07\\u202eevil\\x9b" in text
    assert [line for line in text.split("\n") if line.startswith("b:")] == ["b:      true"]


@given(st.text(max_size=80), st.integers(28, 60))
def test_samples_keep_every_word_within_the_width(reply, width):
    lines = side_by_side(["p"], {"reply": [reply]}, width=width).split("\n")
    assert all(line.isprintable() and len(line) <= width for line in lines)
    body = "".join(line[8:] for line in lines[2:])
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in reply.replace("\n", ""))
    assert body.replace(" ", "") == escaped.replace(" ", "")


def test_samples_that_do_not_fit_are_refused():
    with raises("column 'ppo' has 1 replies to 2 prompts; give one a prompt, in the same order"):
        side_by_side(["p", "q"], {"ppo": ["r"]})
    with raises("prompts=0; it must be 1 or more"):
        side_by_side([], {})
    with raises("limit=0; it must be 1 or more"):
        side_by_side(["p"], {}, limit=0)
    with raises("width=27 leaves 19 characters beside the names; use width=28 or more"):
        side_by_side(["p"], {"ppo": ["r"]}, width=27)
