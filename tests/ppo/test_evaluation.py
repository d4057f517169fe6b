"""Evaluation while training: it changes nothing, is the same each time, and decides on the best
checkpoint and on an early stop."""

import itertools
import json

import pytest
import tiny
import torch
from peft import PeftModel, load_peft_weights
from tiny_runs import (
    EVERY,
    WHOLE,
    assert_same_weights,
    config,
    even_share,
    fresh,
    held_out,
    judged,
    logged,
    prompt_rows,
    trained_parameters,
    trainer,
)
from transformers import TrainerCallback

from goose_lora.data.tokenization import left_pad


def evaluated(folder):
    return logged(folder, "eval_objective")


@pytest.mark.parametrize("changes", [{}, {"eval_on_start": True}, {"score_normalization": "running"}])
def test_a_run_with_evaluation_ends_where_one_without_ends(changes, tmp_path):
    with_it = trainer(tmp_path / "with", eval_rows=held_out(), **EVERY, **WHOLE, **changes)
    with_it.train()
    without = trainer(
        tmp_path / "without",
        **WHOLE,
        **{name: value for name, value in changes.items() if name != "eval_on_start"},
    )
    without.train()
    assert_same_weights(with_it.shared, without.shared)
    assert logged(tmp_path / "with") == logged(tmp_path / "without")
    steps = [row["step"] for row in evaluated(tmp_path / "with")]
    assert steps == ([0] if "eval_on_start" in changes else []) + [4, 8]


def test_the_objective_is_the_score_less_the_price_of_the_kl(tmp_path):
    trainer(tmp_path, eval_rows=held_out(), kl_coef=0.3, kl_target=2.0, kl_horizon=20, **EVERY).train()
    for row in evaluated(tmp_path):
        assert row["eval_objective"] == pytest.approx(row["eval_score"] - 0.3 * row["eval_kl"], abs=1e-12)
        assert {
            "eval_response_tokens",
            "eval_eos_rate",
            "eval_greedy_score",
            "eval_greedy_response_tokens",
        } <= row.keys()
    assert evaluated(tmp_path)[-1]["eval_kl"] != 0


def test_the_same_prompts_and_random_numbers_are_used_each_time(tmp_path):
    seen = []

    def watch(completion_ids, prompts, label, **columns):
        seen.append((label, completion_ids))
        return even_share(completion_ids)

    rows = held_out().add_column("label", list("abcdefgh"))
    train = prompt_rows().add_column("label", ["train"] * 64)
    ppo = trainer(
        tmp_path,
        rows=train,
        reward=watch,
        eval_rows=rows,
        learning_rate=0.0,
        local_rollout_forward_batch_size=4,
        **EVERY,
    )
    ppo.train()
    evaluations = [entry for entry in seen if "train" not in entry[0]]
    assert [labels for labels, _ in evaluations[:4]] == [list("abcd"), list("abcd"), list("ef"), list("ef")]
    assert evaluations[:4] == evaluations[4:], "a policy that stands still is judged alike"
    assert evaluations[0][1] != evaluations[1][1], "sampled and greedy"
    first, second = (
        {name: value for name, value in row.items() if name.startswith("eval_")}
        for row in evaluated(tmp_path)
    )
    assert first == second


def test_the_figures_are_means_over_the_prompts(tmp_path):
    ppo = trainer(
        tmp_path,
        eval_rows=held_out(),
        score_normalization="none",
        local_rollout_forward_batch_size=4,
        num_eval_prompts=7,
    )
    tiny.randomise(ppo.shared, "default", std=0.05)  # away from the reference
    kept = []
    generate = ppo.collector.generate
    ppo.collector.generate = lambda *args, **kwargs: kept.append(generate(*args, **kwargs)) or kept[-1]
    figures = ppo.evaluate()
    for rollouts, prefix in ((kept[::2], "eval_"), (kept[1::2], "eval_greedy_")):
        replies = [ids for rollout in rollouts for ids in rollout.response_ids()]
        assert len(replies) == 7
        assert figures[f"{prefix}score"] == pytest.approx(sum(even_share(replies)) / 7, abs=1e-6)
        assert figures[f"{prefix}response_tokens"] == pytest.approx(sum(map(len, replies)) / 7)
    assert figures["eval_eos_rate"] == pytest.approx(
        sum(rollout.ended.sum().item() for rollout in kept[::2]) / 7
    )
    kl = 0.0
    for rollout in kept[::2]:
        given = rollout.input_ids, rollout.attention_mask
        of_policy, of_reference = (
            ppo.shared.logprobs(ppo.shared.hidden(role, *given), rollout.input_ids, rollout.response_mask)[0]
            for role in ("policy", "reference")
        )
        kl += (of_policy - of_reference).sum().item()
    assert figures["eval_kl"] == pytest.approx(kl / 7, abs=1e-4) and kl > 0.1


def test_evaluations_are_counted_in_one_scale_where_the_trainings_moves(tmp_path):
    """Against a mean that rises with the policy, a policy that gets better would look no better."""
    replies = iter(range(1000))

    def rising(completion_ids, **columns):
        level = next(replies)
        return [level + share for share in even_share(completion_ids)]

    trainer(
        tmp_path,
        reward=rising,
        eval_rows=held_out(),
        score_normalization="running",
        num_rollouts=4,
        **EVERY,
        **WHOLE,
    ).train()
    scores = [row["eval_score"] for row in evaluated(tmp_path)]
    gains = [later - earlier for earlier, later in itertools.pairwise(scores)]
    assert min(gains) > 0.8 * max(gains) > 0, scores


def test_the_best_checkpoint_is_kept_by_rotation_and_is_what_the_run_ends_with(tmp_path):
    ppo = judged(tmp_path, 1.0, 3.0, 2.0, 2.5, load_best_model_at_end=True, save_total_limit=2)
    ppo.train()
    assert ppo.state.best_model_checkpoint.endswith("checkpoint-8") and ppo.state.best_metric == 3.0
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-16"}
    best, last = (
        load_peft_weights(str(tmp_path / name), device="cpu") for name in ("checkpoint-8", "checkpoint-16")
    )
    policy = {name.replace(".default", ""): p for name, p in ppo.shared.role_parameters("policy")}
    assert best.keys() == policy.keys()
    assert all(torch.equal(policy[name], tensor) for name, tensor in best.items())
    assert any(not torch.equal(last[name], tensor) for name, tensor in best.items())
    ids, mask = left_pad([[5, 6]], tiny.PAD)
    assert ppo.collector.generate(ids, mask).response_mask.any(), "it can still be used"


def test_an_early_stop_comes_after_so_many_evaluations_without_a_gain_and_says_so(tmp_path, caplog):
    ppo = judged(tmp_path, 1.0, 2.0, 1.5, 2.0, 9.0, 9.0, early_stopping_patience=2)
    ppo.train()
    assert ppo.state.global_step == 16, "as good is no gain"
    assert "stopped at step 16: eval_objective has not been above 2.000 for 2 evaluations" in caplog.text


def test_a_gain_begins_the_count_anew(tmp_path):
    ppo = judged(tmp_path, 2.0, 1.0, 3.0, 1.0, 1.0, early_stopping_patience=2)
    ppo.train()
    assert ppo.state.global_step == 20


def test_a_resumed_run_stops_early_where_the_uninterrupted_one_does(tmp_path):
    straight = judged(
        tmp_path / "straight", 2.0, 1.0, 1.0, 9.0, early_stopping_patience=2, save_total_limit=None
    )
    straight.train()
    resumed = judged(tmp_path / "resumed", 1.0, 9.0, 9.0, 9.0, early_stopping_patience=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-8"))
    assert straight.state.global_step == resumed.state.global_step == 12
    assert_same_weights(straight.shared, resumed.shared)


def test_another_evaluation_of_ones_own_has_no_say_in_the_early_stop(tmp_path):
    ppo = judged(tmp_path, 2.0, 1.0, 1.0, early_stopping_patience=1)
    for prefix in ("test", "held_out"):
        ppo.evaluate(ppo.eval_dataset, metric_key_prefix=prefix)
    assert ppo.rollout_state.evaluations_without_gain == 0 and ppo.rollout_state.best_objective is None


def test_an_evaluation_before_the_training_changes_nothing_either(tmp_path):
    ends = []
    for first in (False, True):
        ppo = trainer(tmp_path / str(first), eval_rows=held_out(), num_rollouts=1)
        if first:
            ppo.evaluate()
        ppo.train()
        ends.append(ppo.shared)
    assert_same_weights(*ends)


def test_settings_that_do_not_fit_are_refused_before_training(tmp_path):
    with pytest.raises(
        ValueError, match=r"early_stopping_patience=2: nothing is evaluated; set eval_strategy: steps"
    ):
        config(tmp_path, early_stopping_patience=2)
    with pytest.raises(ValueError, match=r"early_stopping_patience=0: must be 1 or more"):
        config(tmp_path, early_stopping_patience=0, **EVERY)
    with pytest.raises(ValueError, match=r"eval_steps=6 falls inside a rollout .* Use eval_steps=8"):
        config(tmp_path, **EVERY | {"eval_steps": 6})
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer(tmp_path, **EVERY)
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer(tmp_path).evaluate()


# ---- The average of the policy ----


class History(TrainerCallback):
    """The policy's tensors at the start and after each optimizer step."""

    def __init__(self):
        self.policies = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.policies.append({name: p.detach().clone() for name, p in model.role_parameters("policy")})

    on_step_end = on_train_begin


def averaged(folder, **changes):
    history = History()
    ppo = trainer(folder, shared=fresh(average=True), callbacks=[history], ema_decay=0.75, **WHOLE, **changes)
    return ppo, history


def average(ppo):
    return {name: p.detach().clone() for name, p in ppo.shared.role_parameters("ema")}


def test_the_average_follows_the_policy_step_by_step_and_loads_with_plain_peft(tmp_path):
    ppo, history = averaged(tmp_path)
    ppo.train()
    assert len(history.policies) == 9
    got = average(ppo)
    for name, start in history.policies[0].items():
        want = start.double()
        for policy in history.policies[1:]:
            want = 0.75 * want + 0.25 * policy[name].double()
        torch.testing.assert_close(got[name.replace(".default.", ".ema.")].double(), want, rtol=0, atol=1e-6)
        assert not torch.equal(got[name.replace(".default.", ".ema.")], history.policies[-1][name])
    assert not any(p.requires_grad for _, p in ppo.shared.role_parameters("ema"))
    assert not any(".ema." in name for name in trained_parameters(ppo.shared))
    ppo.save_model()
    plain = PeftModel.from_pretrained(tiny.base(), str(tmp_path / "ema")).eval()
    ids, mask = tiny.batch()
    with torch.no_grad():
        want = plain(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(
            ppo.shared.hidden("ema", ids, mask)[mask.bool()], want[mask.bool()], rtol=0, atol=1e-4
        )


def test_a_resumed_run_goes_on_with_the_average(tmp_path):
    settings = {"num_rollouts": 3, "save_strategy": "steps", "save_steps": 4, "save_total_limit": None}
    straight, _ = averaged(tmp_path / "straight", **settings)
    straight.train()
    resumed, _ = averaged(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-8"))
    want, got = average(straight), average(resumed)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_an_average_needs_a_place(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"ema_decay=0.9 needs a place for the average: SharedBase.build\(..., average=True\)",
    ):
        trainer(tmp_path, ema_decay=0.9)


def test_state_that_decides_is_in_the_checkpoint(tmp_path):
    judged(tmp_path, 2.0, 1.0, early_stopping_patience=3).train()
    saved = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["stateful_callbacks"][
        "RolloutState"
    ]["attributes"]
    assert saved["best_objective"] == 2.0 and saved["evaluations_without_gain"] == 1


def test_a_resumed_run_does_not_evaluate_its_start_again(tmp_path):
    settings = {"eval_on_start": True, "early_stopping_patience": 3, "save_total_limit": None}
    straight = judged(tmp_path / "straight", 3.0, 2.0, 1.0, 0.5, 9.0, **settings)
    straight.train()
    resumed = judged(tmp_path / "resumed", 0.5, 9.0, 9.0, 9.0, 9.0, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-8"))
    assert straight.state.global_step == resumed.state.global_step == 12
    assert_same_weights(straight.shared, resumed.shared)
    assert [row["step"] for row in evaluated(tmp_path / "resumed")] == [0, 4, 8, 12]
    assert resumed.args.eval_on_start, "checkpoints note the setting as it was given"
