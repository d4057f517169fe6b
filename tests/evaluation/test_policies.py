"""goose_lora.evaluation.policies: what is compared is independent, and counted as it is."""

import math
import random

import pytest
import tiny
import torch

from goose_lora.evaluation import policies
from goose_lora.evaluation.policies import Replies, answer, best_of, summary
from goose_lora.generation.sampling import generation_config

PROMPTS = 4000


def tries(random_numbers):
    return Replies(
        texts=["a b"] * PROMPTS,
        scores=[random_numbers.gauss(0, 1) for _ in range(PROMPTS)],
        kl=[0.0] * PROMPTS,
        base_loss=[2.0] * PROMPTS,
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


def test_replies_of_which_no_two_are_of_like_length_have_all_figures_but_the_one_at_equal_length():
    def replies(length):
        return Replies(
            texts=["a b"] * 12,
            scores=[float(place) for place in range(12)],
            kl=[0.0] * 12,
            base_loss=[2.0] * 12,
            lengths=[length] * 12,
            ended=[True] * 12,
            judged=[1.0] * 12,
        )

    row = summary({"sft": replies(12), "ppo": replies(64)}, against="sft")["ppo"]
    assert {"score", "score_win_rate", "judge", "judge_win_rate"} < row.keys()
    assert not any(name.endswith("at_equal_length") for name in row)


@torch.no_grad()
def test_the_bases_loss_on_replies_is_that_of_a_separately_loaded_base_at_temperature_1(monkeypatch):
    shared = tiny.shared(tiny.base())
    rollouts, plain = [], policies.sample
    monkeypatch.setattr(
        policies, "sample", lambda *args, **kwargs: rollouts.append(plain(*args, **kwargs)) or rollouts[-1]
    )
    sampling = generation_config(
        response_tokens=6, temperature=0.7, eos_token_ids=[tiny.EOS], pad_token_id=tiny.PAD
    )
    prompts = [[5, 6, 7], [8], [9, 10]]
    replies = answer(shared, "policy", prompts, tiny.tokenizer(), sampling, batch_size=2)

    model, wanted, count = tiny.base().eval(), [], 0
    for rollout in rollouts:
        for ids, mask, counted in zip(
            rollout.input_ids, rollout.attention_mask, rollout.response_mask, strict=True
        ):
            kept = ids[mask.bool()][None]
            labels = kept.clone()
            labels[:, : -int(counted.sum())] = -100
            # transformers' own loss is the mean over the labels
            wanted.append(model(input_ids=kept, labels=labels).loss.item() * int(counted.sum()))
            count += int(counted.sum())
    assert replies.base_loss == pytest.approx(wanted, rel=1e-4)
    assert summary({"it": replies}, against="it")["it"]["base_loss"] == pytest.approx(sum(wanted) / count)


def test_a_judge_is_given_what_a_reward_function_is_given():
    given = {}

    def judge(**asked):
        given.update(asked)
        return [1.0, 0.0]

    prompts = [[{"role": "user", "content": "2 + 2?"}], [{"role": "user", "content": "1 + 4?"}]]
    replies = policies.Replies(texts=["4", "6"], token_ids=[[4], [6]])
    policies.judge_all({"ppo": replies}, prompts, judge, {"solution": ["4", "5"]})
    assert replies.judged == [1.0, 0.0]
    assert given == {
        "prompts": prompts,
        "completions": ["4", "6"],
        "completion_ids": [[4], [6]],
        "solution": ["4", "5"],
    }
