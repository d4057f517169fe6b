"""A loop of the user's own: the same training as the trainer's, told token by token what the policy
wrote and what it earned."""

import numpy as np
import pytest
import tiny
import torch
from tiny_runs import (
    assert_same_weights,
    even_share,
    fresh,
    logged,
    own,
    prompt_rows,
    queries,
    trained_parameters,
    trainer,
    turn,
    with_reward_adapter,
)
from transformers import TrainerCallback

import goose_lora.functional as F
from goose_lora.errors import UserError
from goose_lora.ppo.own_loop import rollout_of, scores_of

pytestmark = pytest.mark.timeout(100)  # a deadlock must not last


def even_tokens(completion_ids, **columns):
    return [[float(token % 2 == 0) for token in ids] for ids in completion_ids]


@pytest.mark.parametrize("score", [even_share, even_tokens])
def test_a_loop_with_the_trainers_prompts_and_scores_ends_where_the_trainer_ends(
    score, tmp_path, monkeypatch
):
    prompts = []
    # One rollout an epoch, as the loop has: at the start of an epoch the library draws a random
    # number.
    straight = trainer(tmp_path / "straight", reward=score, rows=prompt_rows(16), score_normalization="none")
    generate = straight.collector.generate

    def watched(ids, mask, **how):
        prompts.append([row[counts.bool()].tolist() for row, counts in zip(ids, mask, strict=True)])
        # Without the trunk's states, which round otherwise than those that step computes
        return generate(ids, mask)

    monkeypatch.setattr(straight.collector, "generate", watched)
    straight.train()
    ppo = own(tmp_path / "own")
    figures = [turn(ppo, score, batch) for batch in prompts]
    assert len(prompts) == 2 and prompts[0] != prompts[1]
    assert_same_weights(straight.shared, ppo.shared)
    # Scores that are given have no source to be named by
    others = ("rollout/sampling_gap", "reward/even_share", "reward/even_tokens")
    want = [
        {name: value for name, value in row.items() if name not in others}
        for row in logged(tmp_path / "straight")
    ]
    assert logged(tmp_path / "own") == want
    for row, figure in zip(want, figures, strict=True):
        assert {name: figure[name] for name in row if "/" in name} == {
            name: row[name] for name in row if "/" in name
        }


def test_a_stopped_loop_goes_on_from_its_checkpoint_exactly(tmp_path):
    settings = {
        "num_rollouts": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "save_total_limit": None,
        "kl_target": 1.0,
        "kl_horizon": 50,
    }
    straight = own(tmp_path / "straight", **settings)
    assert straight.start() == 0
    for _ in range(3):
        turn(straight)
    resumed = own(tmp_path / "resumed", **settings)
    assert resumed.start(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4")) == 1
    for _ in range(2):
        turn(resumed)
    assert_same_weights(straight.shared, resumed.shared)
    # In another folder too: the rows before it come from the checkpoint's log
    assert logged(tmp_path / "resumed") == logged(tmp_path / "straight")


# ---- What a rollout is made of ----

QUERIES = [[5, 6, 7], [8, 9]]
RESPONSES = [[10, 11, 12, 13, 14, tiny.EOS], torch.tensor([20, 21])]
# Others begin, stand between, and end
MASKS = [[False, True, True, False, True, False], torch.tensor([True, True])]


def given_rollout(ppo, responses=RESPONSES, masks=MASKS):
    return rollout_of(QUERIES, responses, masks, ppo.processing_class, ppo.collector)


def test_tokens_of_others_are_attended_to_and_do_not_count(tmp_path):
    rollout = given_rollout(own(tmp_path))
    assert rollout.input_ids.tolist() == [[5, 6, 7, 10, 11, 12, 13, 14, 2], [0, 8, 9, 20, 21, 0, 0, 0, 0]]
    assert rollout.attention_mask.tolist() == [[1] * 9, [0, 1, 1, 1, 1, 0, 0, 0, 0]]
    assert rollout.response_mask.int().tolist() == [[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0]]
    assert rollout.response_ids() == [[11, 12, 14], [20, 21]]
    assert rollout.ended.tolist() == [False, False], "the end-of-text token is another's"


def test_a_score_on_a_token_of_others_counts_for_the_policys_token_before_it_or_its_first(tmp_path):
    rollout = given_rollout(own(tmp_path))
    scores = scores_of([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0], 5.0], rollout)
    assert scores.by_token.tolist() == [1.0 + 2.0, 4.0 + 8.0, 16.0 + 32.0, 0.0, 5.0]
    assert scores.total.tolist() == [63.0, 5.0]
    assert scores_of(torch.tensor([1.0, 2.0]), rollout).by_token is None


def test_a_reply_of_several_turns_has_ended_if_its_last_turn_has(tmp_path):
    """A stop text that ended the first turn as well, and one that would stand across two turns."""
    ppo = own(tmp_path, stop_strings=["ba be"])
    said = {word: 4 + index for index, word in enumerate(tiny.WORDS)}
    a, b, other = said["ba"], said["be"], said["du"]
    replies = [[other, a, b, other, other, a, b], [other, a, other, b]]
    masks = [[True, True, True, False, True, True, True], [True, True, False, True]]
    assert given_rollout(ppo, replies, masks).ended.tolist() == [True, False]


def test_tokens_of_others_change_what_comes_after_and_get_no_gradient_or_kl(tmp_path, monkeypatch):
    ppo = own(tmp_path, kl_coef=0.1)
    kept = []
    make = ppo.experience.make
    monkeypatch.setattr(ppo.experience, "make", lambda *args: kept.append(make(*args)) or kept[-1])
    answers, masks = [RESPONSES[0]] * 16, [MASKS[0]] * 16
    ppo.step([QUERIES[0]] * 16, answers, [[0.0, 0.0, 0.0, 1.0, 0.0, 0.0]] * 16, masks)
    made, shown = kept[0]
    holes = ~torch.tensor([MASKS[0]] * 16)
    assert not any(
        x[holes].any() for x in (made.logprobs, made.ref_logprobs, made.advantages, made.values, made.returns)
    )
    assert shown["rollout/response_tokens"] == 3
    shared = fresh()  # as it was before that step
    ids, attention = made.rollout.input_ids[:1], made.rollout.attention_mask[:1]
    hidden = shared.hidden("policy", ids, attention)
    logits = shared.get_base_model().lm_head(hidden)[:, :-1]
    want = F.gather_logprobs(logits, ids[:, 1:])[:, -6:]
    torch.testing.assert_close(made.logprobs[:1], torch.where(~holes[:1], want, 0.0), rtol=0, atol=1e-5)
    changed = ids.clone()
    changed[0, 6] = 40  # the other's token before the policy's last
    with torch.no_grad():
        other = shared(changed, attention, ~holes[:1]).logprobs
    assert (
        torch.equal(other[0, :3], made.logprobs[0, :3])
        or (other[0, :3] - made.logprobs[0, :3]).abs().max() < 1e-6
    )
    assert (other[0, 4] - made.logprobs[0, 4]).abs() > 1e-3


def test_what_follows_the_policys_last_token_does_not_change_the_update(tmp_path):
    """A gradient through it would."""
    ends = []
    for tail in ([30, 31], [40, 50]):
        ppo = own(tmp_path / str(tail[0]), num_rollouts=1, kl_coef=0.1)
        answers = [[10 + row, 20, 21, *tail] for row in range(16)]
        ppo.step(queries(), answers, [float(row % 3) for row in range(16)], [[True] * 3 + [False] * 2] * 16)
        ends.append(trained_parameters(ppo.shared))
    for name, parameter in ends[0].items():
        assert torch.equal(parameter, ends[1][name]), name


# ---- Refusals, errors and ends ----


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"queries": QUERIES}, "2 samples for a rollout of 16"),
        ({"responses": [[5]] * 15}, "16 queries, 15 responses and 15 response masks"),
        ({"masks": [[True]] * 15}, "16 queries, 16 responses and 15 response masks"),
        (
            {"masks": [[True, True]] + [[True]] * 15},
            "sample 0: 3 query tokens, 1 response tokens, 2 in its mask",
        ),
        (
            {"masks": [[True]] * 15 + [[False]]},
            "sample 15: 3 query tokens, 1 response tokens, 1 in its mask, 0 of them the policy's",
        ),
        ({"responses": [[5]] * 15 + [[]]}, "sample 15: 3 query tokens, 0 response tokens"),
        ({"queries": [[5, 6, 7]] * 15 + [[]]}, "sample 15: 0 query tokens"),
        ({"queries": ["ba be"] * 16}, r"queries: sample 0 is 'ba be'. Give token ids: tokenizer\(text\)"),
        ({"queries": [5, 6, 7]}, "queries: sample 0 is 5. Give token ids"),
        ({"queries": [[5, 6, 61]] * 16}, "queries: sample 0 has 61, which is no token id: .* from 0 to 60"),
        ({"responses": ["ba"] * 16}, "responses: sample 0 is 'ba'. Give token ids"),
        ({"responses": [[5]] * 15 + [[999]]}, "responses: sample 15 has 999, which is no token id"),
        ({"responses": [[5]] * 15 + [[-1]]}, "responses: sample 15 has -1, which is no token id"),
        ({"responses": [[5.5]] * 16}, "responses: sample 0 has 5.5, which is no token id"),
        ({"responses": [[5]] * 15 + [[5] * 125]}, "make 128 tokens, and the base has a context of 127"),
        ({"masks": [[True]] * 15 + [["yes"]]}, r"response mask 15 is \['yes'\]. Give a list of one truth"),
        ({"scores": [1.0] * 15}, "15 scores for 16 responses"),
        ({"scores": 1.0}, "1.0 scores for 16 responses; give one number"),
        ({"scores": [None] * 16}, "score 0 is None; give a finite number"),
        ({"scores": [1.0] * 15 + ["good"]}, "score 15 is 'good'; give a finite number"),
        ({"scores": [1.0] * 15 + [[None]]}, r"score 15 is \[None\]; give a finite number"),
        (
            {"scores": [1.0] * 15 + [float("nan")]},
            r"score 15 has the shape \(\) for 1 response tokens; give a finite number",
        ),
        ({"scores": [1.0] * 15 + [[1.0, 2.0]]}, r"score 15 has the shape \(2,\) for 1 response tokens"),
        ({"scores": torch.ones(16, 2)}, r"score 0 has the shape \(2,\) for 1 response tokens"),
    ],
)
def test_what_does_not_belong_together_is_refused(given, message, tmp_path):
    plain = {"queries": [[5, 6, 7]] * 16, "responses": [[5]] * 16, "scores": [1.0] * 16, "masks": None}
    ppo = own(tmp_path)
    with pytest.raises(ValueError, match=message):
        ppo.step(*(plain | given).values())
    assert ppo.state.global_step == 0
    ppo.finish()


@pytest.mark.parametrize(
    ("queries", "said"),
    [
        ([], r"queries: \[\]: give a list of samples"),
        (["ba be"], "queries: sample 0 is 'ba be'. Give token ids"),
        ([4, 5, 6], "queries: sample 0 is 4. Give token ids"),
        ([[5], []], "queries: sample 1 is empty"),
        ([[999]], "queries: sample 0 has 999, which is no token id"),
        ([[5] * 122], "make 128 tokens, and the base has a context of 127"),
    ],
    ids=["nothing", "text", "one query", "empty", "no token", "too long"],
)
def test_queries_that_are_none_are_refused_and_the_loop_goes_on(queries, said, tmp_path):
    ppo = own(tmp_path)
    with pytest.raises(UserError, match=said):
        ppo.generate(queries)
    replies = ppo.generate(torch.tensor([[5, 6], [7, 8]]))
    assert len(replies) == 2 and all(len(reply) > 0 for reply in replies)
    ppo.finish()


def test_lists_of_numpy_and_torch_are_those_of_python(tmp_path):
    """Also one number a token, truth values, and scores that are true or false."""
    ppo = own(tmp_path)
    queries, responses = np.array([[5, 6]] * 2), torch.tensor([[10, 11], [20, 21]])
    made = rollout_of(queries, responses, np.ones((2, 2), dtype=bool), ppo.processing_class, ppo.collector)
    assert made.input_ids.tolist() == [[5, 6, 10, 11], [5, 6, 20, 21]]
    assert scores_of(np.array([0.5, 1.5]), made).total.tolist() == [0.5, 1.5]
    assert scores_of([torch.tensor([1.0, 2.0]), [np.float32(4), 8]], made).total.tolist() == [3.0, 12.0]
    assert scores_of([True, False], made).total.tolist() == [1.0, 0.0]


def test_a_refused_step_changes_nothing(tmp_path):
    straight, other = own(tmp_path / "straight", num_rollouts=1), own(tmp_path / "other", num_rollouts=1)
    turn(straight)
    replies = other.generate(queries())
    with pytest.raises(ValueError, match="15 scores"):
        other.step(queries(), replies, [1.0] * 15)
    other.step(queries(), replies, even_share([reply.tolist() for reply in replies]))
    assert_same_weights(straight.shared, other.shared)


class Broken(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyError("out of luck")


def test_an_error_of_the_training_is_raised_in_step_and_named_afterwards(tmp_path):
    ppo = own(tmp_path, callbacks=[Broken()])
    with pytest.raises(KeyError, match="out of luck"):
        turn(ppo)
    with pytest.raises(ValueError, match=r"the training ended by an error, KeyError\('out of luck'\)"):
        turn(ppo)
    ppo.finish()


def test_a_checkpoint_that_is_not_there_is_an_error_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="checkpoint"):
        own(tmp_path).start(resume_from_checkpoint=str(tmp_path / "nothing"))


def test_a_step_after_the_last_one_says_that_the_training_is_over(tmp_path):
    ppo = own(tmp_path, num_rollouts=1)
    turn(ppo)
    before = trained_parameters(ppo.shared)
    with pytest.raises(ValueError, match=r"the training is over: max_steps is reached .* Raise num_rollouts"):
        turn(ppo)
    assert all(
        torch.equal(parameter, before[name]) for name, parameter in trained_parameters(ppo.shared).items()
    )
    ppo.finish()
    assert not ppo.own_loop.thread.is_alive()


def test_a_loop_that_is_finished_early_leaves_no_thread_and_what_it_has_learned(tmp_path):
    ended = []

    class End(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            ended.append(state.global_step)

    ppo = own(tmp_path, num_rollouts=5, callbacks=[End()])
    turn(ppo)
    ppo.finish()
    ppo.finish()
    assert ended == [4]
    assert not ppo.own_loop.thread.is_alive()
    with pytest.raises(ValueError, match="the training is over"):
        turn(ppo)
    assert len(ppo.generate(queries())) == 16
    ppo.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_loop_starts_once(tmp_path):
    ppo = own(tmp_path)
    ppo.start()
    with pytest.raises(ValueError, match="has been started already"):
        ppo.start()
    ppo.finish()


def test_a_stop_at_max_kl_ends_the_loop_and_hangs_nowhere(tmp_path):
    ppo = own(tmp_path, kl_coef=0.0, max_kl=0.01, num_rollouts=9, learning_rate=3e-2)
    while not ppo.control.should_training_stop:
        turn(ppo)
    assert ppo.state.global_step < 36
    with pytest.raises(ValueError, match="a callback stopped it"):
        turn(ppo)


def test_an_early_stop_ends_the_loop_and_hangs_nowhere(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "early_stopping_patience": 1,
        "num_eval_prompts": 4,
    }
    ppo = own(
        tmp_path,
        reward=lambda completion_ids, **columns: [0.0] * len(completion_ids),
        eval_rows=prompt_rows(4),
        num_rollouts=9,
        **settings,
    )
    turn(ppo)
    ppo.args.kl_coef = 9.0  # whatever the policy does now is worse
    turn(ppo)
    with pytest.raises(ValueError, match="a callback stopped it"):
        turn(ppo)
    assert ppo.state.global_step == 8


def test_a_trainer_without_prompts_does_not_train_by_itself(tmp_path):
    with pytest.raises(ValueError, match="there is no train_dataset"):
        own(tmp_path).train()


def test_train_in_the_middle_of_a_loop_is_an_error_and_no_deadlock(tmp_path):
    ppo = own(tmp_path)
    ppo.start()
    with pytest.raises(ValueError, match="a loop of your own has been started"):
        ppo.train()
    ppo.finish()


def test_a_loop_needs_no_source_of_reward_but_for_score(tmp_path):
    ppo = own(tmp_path, reward=None, num_rollouts=1)
    turn(ppo)
    with pytest.raises(ValueError, match="nothing scores the replies"):
        ppo.score(queries(), queries())


def test_score_is_what_the_reward_adapter_says(tmp_path):
    shared = with_reward_adapter(tmp_path / "reward", critic="adapter")
    ppo = own(tmp_path / "run", shared=shared, reward=None, num_rollouts=1, score_normalization="reference")
    replies = ppo.generate(queries(), greedy=True)
    scores = ppo.score(queries(), replies)
    for query, reply, score in zip(queries(), replies, scores, strict=True):
        ids = torch.tensor([query + reply.tolist()])
        torch.testing.assert_close(score, shared.scores(ids, torch.ones_like(ids))[0], rtol=0, atol=1e-5)
    ppo.step(queries(), replies, scores)
    assert ppo.rollout_state.score_scale == pytest.approx((scores.mean().item(), scores.std().item())), (
        "the first rollout is the reference's"
    )
    assert [reply.tolist() for reply in replies] != [
        reply.tolist() for reply in ppo.generate(queries(), greedy=True)
    ]


def test_a_loop_of_ones_own_cannot_be_corrected_for_its_sampler(tmp_path):
    ppo = own(tmp_path, sampling_correction="mask")
    with pytest.raises(
        ValueError, match="sampling_correction=mask: a loop of your own gives replies without"
    ):
        ppo.start()
