"""goose_lora.evaluation.policies: what is compared is independent, and counted as it is."""

import math
import random

import pytest

from goose_lora.evaluation.policies import Replies, best_of, summary

PROMPTS = 4000


def tries(random_numbers):
    return Replies(
        texts=["a b"] * PROMPTS,
        scores=[random_numbers.gauss(0, 1) for _ in range(PROMPTS)],
        kl=[0.0] * PROMPTS,
        lengths=[2] * PROMPTS,
        ended=[True] * PROMPTS,
    )


@pytest.mark.parametrize("number", [1, 2, 4, 16])
def test_the_kl_of_best_of_n_is_its_bound_and_it_wins_n_of_n_plus_1(number):
    random_numbers = random.Random(number)
    sft, *others = [tries(random_numbers) for _ in range(number + 1)]
    row = summary({"sft": sft, "best": best_of(others)}, against="sft")["best"]
    assert row["kl"] == pytest.approx(math.log(number) - (number - 1) / number)
    # Of N + 1 independent scores each is the highest equally often
    error = 3 * (number / (number + 1) ** 2 / PROMPTS) ** 0.5
    assert row["score_win_rate"] == pytest.approx(number / (number + 1), abs=error)
