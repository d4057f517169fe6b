"""PPOTrainer on tiny models: what it optimises, that it learns on every kind of base, and that
nothing depends on how work is cut."""

import inspect
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from datasets import Dataset
from peft import PeftModel
from tiny_runs import (
    config,
    even_share,
    logged,
    pretraining_texts,
    prompt_rows,
    trained_parameters,
    trainer,
    with_reward_adapter,
    with_texts,
)
from transformers import Trainer

from goose_lora.data.tokenization import left_pad
from goose_lora.files import read_jsonl
from goose_lora.generation.sampling import generation_config, sample
from goose_lora.models.loading import load_base, load_tokenizer
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo import first_step_checks, metrics
from goose_lora.ppo.microbatches import Microbatch
from goose_lora.ppo.trainer import PPOTrainer
from goose_lora.reporting.diagnosis import diagnosis_text


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_ppo_raises_a_toy_reward_on_every_kind_of_base(quantization, tmp_path):
    folder = tiny.save_base(tmp_path / "base", hidden_size=66, head_dim=22, intermediate_size=64)
    gains = []
    for seed in range(3):
        arguments = tiny.arguments(folder, quantization=quantization, lora_layers="top-2")
        tokenizer = load_tokenizer(arguments)
        base = load_base(arguments, tokenizer)
        shared = SharedBase.build(base, tiny.lora_config(arguments, base), critic="adapter")
        ppo = trainer(
            tmp_path / f"run{seed}",
            shared=shared,
            num_rollouts=10,
            per_device_train_batch_size=16,
            num_ppo_epochs=4,
            seed=seed,
        )
        rows = [row["input_ids"] for row in prompt_rows()] * 2

        def mean_reward(shared=shared, ppo=ppo, rows=rows):
            torch.manual_seed(99)
            return sum(
                even_share(sample(shared, *left_pad(rows, tiny.PAD), ppo.collector.generation).response_ids())
            ) / len(rows)

        before = mean_reward()
        ppo.train()
        gains.append(mean_reward() - before)
    gains = torch.tensor(gains)
    t = gains.mean() / (gains.std() / 3**0.5)
    assert gains.min() > 0.05, f"every seed must gain: {gains.tolist()}"
    assert t > 2.92, f"one-sided paired t-test, 2 degrees of freedom, 5 %: t={t:.2f}, gains {gains.tolist()}"


def test_base_reward_and_reference_do_not_move_and_policy_and_critic_do(tmp_path):
    ppo = trainer(tmp_path)
    before = {name: p.detach().clone() for name, p in ppo.shared.named_parameters()}
    ppo.train()
    moved = {name for name, p in ppo.shared.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".default." in name or ".value." in name}


@pytest.mark.parametrize(("rows", "accumulation"), [(2, 4), (1, 8)])
def test_cutting_the_minibatch_otherwise_gives_the_same_parameters(rows, accumulation, tmp_path):
    """4 x 2, 2 x 4 and 1 x 8 (rows x accumulation): means of microbatch means would not."""
    results = []
    for name, cut in (("whole", (4, 2)), ("cut", (rows, accumulation))):
        ppo = trainer(
            tmp_path / name,
            num_rollouts=1,
            per_device_train_batch_size=cut[0],
            gradient_accumulation_steps=cut[1],
            optim="sgd",
            learning_rate=0.1,
        )
        ppo.train()
        results.append(trained_parameters(ppo.shared))
    for name, parameter in results[0].items():
        # fp32 sums in another order over four steps
        torch.testing.assert_close(results[1][name], parameter, rtol=1e-4, atol=1e-6)


def test_reusing_the_trunk_changes_nothing(tmp_path):
    results = []
    for reuse in (True, False):
        ppo = trainer(tmp_path / str(reuse), reuse_trunk=reuse)
        assert ppo.shared.trunk_depth() == tiny.LAYERS - 2
        ppo.train()
        results.append(trained_parameters(ppo.shared))
    for name, parameter in results[0].items():
        # One sweep computes the trunk for 16 rows at a time and the update needs 4 of them: fp32
        # sums in another order.
        torch.testing.assert_close(results[1][name], parameter, rtol=1e-4, atol=1e-5)


def test_checkpointing_changes_nothing(tmp_path):
    results = []
    for checkpointing in (True, False):
        ppo = trainer(tmp_path / str(checkpointing), num_rollouts=1, gradient_checkpointing=checkpointing)
        ppo.train()
        results.append(trained_parameters(ppo.shared))
    for name, parameter in results[0].items():
        torch.testing.assert_close(results[1][name], parameter, rtol=1e-5, atol=1e-6)


def test_the_policy_is_the_root_of_the_output_and_loads_with_plain_peft(tmp_path):
    ppo = trainer(tmp_path)
    ppo.train()
    ppo.save_model()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"value", "reference"}
    plain = PeftModel.from_pretrained(tiny.base(), str(tmp_path)).eval()
    ids, mask = tiny.batch()
    greedy = generation_config(
        response_tokens=8, temperature=1.0, eos_token_ids=[tiny.EOS], pad_token_id=tiny.PAD, do_sample=False
    )
    want = plain.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
    assert torch.equal(sample(ppo.shared, ids, mask, greedy).input_ids, want)


def test_metrics_and_samples_are_written_once_a_rollout(tmp_path):
    ppo = trainer(tmp_path, num_rollouts=3, sample_rows=2)
    ppo.train()
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "objective/score" in row]
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert rows[0]["objective/kl"] == 0 and rows[1]["objective/kl"] != 0
    assert all(0 <= row["rollout/eos_rate"] <= 1 and row["seconds/update"] > 0 for row in rows)
    assert [row["step"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [0, 0, 4, 4, 8, 8]


@pytest.mark.parametrize("logging_steps", [4, 8])
def test_seconds_are_those_of_a_rollout_whatever_its_steps_and_however_often_it_is_logged(
    tmp_path, monkeypatch, logging_steps
):
    clock = itertools.count()
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    ppo = trainer(tmp_path, num_rollouts=4, logging_steps=logging_steps)
    ppo.train()
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "objective/score" in row]
    assert len(rows) == 16 // logging_steps
    # A second passes inside each part that is timed: generation, scores, each of 8 microbatches
    for row in rows:
        assert (row["seconds/generate"], row["seconds/score"], row["seconds/update"]) == (1, 1, 8)


def test_normalised_scores_have_the_references_mean_and_spread(tmp_path):
    ppo = trainer(tmp_path, score_calibration_prompts=64)
    ppo.train()
    mean, std = ppo.rollout_state.score_scale
    row = next(row for row in read_jsonl(tmp_path / "metrics.jsonl") if "objective/score" in row)
    assert row["objective/score"] == pytest.approx((row["objective/raw_score"] - mean) / std, abs=1e-5)


def test_resuming_at_a_rollouts_end_is_exact(tmp_path):
    straight = trainer(
        tmp_path / "straight",
        num_rollouts=4,
        save_strategy="steps",
        save_steps=8,
        kl_target=1.0,
        kl_horizon=50,
    )
    straight.train()
    resumed = trainer(
        tmp_path / "resumed",
        num_rollouts=4,
        save_strategy="steps",
        save_steps=8,
        kl_target=1.0,
        kl_horizon=50,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-8"))
    want, got = trained_parameters(straight.shared), trained_parameters(resumed.shared)
    assert want.keys() == got.keys()
    for name, parameter in want.items():
        assert torch.equal(got[name], parameter), name

    def logged(folder):
        rows = [
            row
            for row in read_jsonl(folder / "metrics.jsonl")
            if "objective/score" in row and row["step"] > 8
        ]
        return [
            {name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows
        ]

    assert logged(tmp_path / "resumed") == logged(tmp_path / "straight")


def test_no_pickle_is_left_in_a_checkpoint_but_what_trainer_needs_to_resume(tmp_path):
    trainer(tmp_path, num_rollouts=2, save_strategy="steps", save_steps=4).train()
    files = {path.name for path in (tmp_path / "checkpoint-8").iterdir()}
    assert "training_args.bin" not in files
    assert json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["stateful_callbacks"][
        "RolloutState"
    ]


def test_a_save_inside_a_rollout_is_refused_with_the_nearest_that_fits(tmp_path):
    with pytest.raises(ValueError, match=r"save_steps=6 falls inside a rollout .* Use save_steps=8"):
        config(tmp_path, save_strategy="steps", save_steps=6)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("gamma", 1.5),
        ("temperature", 0),
        ("cliprange", 0),
        ("response_length", 0),
        ("kl_coef", -1),
        ("kl_target", 0),
    ]
    + [("max_kl", 0), ("ratio_threshold", 1.0), ("num_generations", 3), ("bf16", True), ("fp16", True)],
)
def test_an_impossible_number_is_refused_by_name(setting, value, tmp_path):
    with pytest.raises(ValueError, match=f"^{setting}={value}"):
        config(tmp_path, **{setting: value})


def test_settings_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="kl_estimator=k1: in the loss k1 has no gradient"):
        config(tmp_path, kl_location="loss")
    with pytest.raises(ValueError, match="num_generations=1: rloo and grpo compare 2 or more"):
        config(tmp_path, advantage_estimator="grpo")


def test_rollouts_and_max_steps_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(ValueError, match="contradict"):
        config(tmp_path, num_rollouts=2, max_steps=3)


def test_too_few_prompts_for_a_rollout_say_what_to_lower(tmp_path):
    with pytest.raises(ValueError, match="10 prompts do not fill one rollout of 16"):
        trainer(tmp_path, rows=prompt_rows(10)).train()


def test_a_reward_function_with_the_wrong_number_of_scores_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"returned 1 numbers for 16 replies. It must return one number"):
        trainer(tmp_path, reward=lambda **columns: [1.0]).train()


def test_a_reference_that_is_not_the_policy_stops_the_run(tmp_path):
    # A policy with an effect, and the bare base as reference
    shared = tiny.shared(tiny.base(), critic="adapter")
    with pytest.raises(first_step_checks.GateError, match="KL at step 0 is not 0"):
        trainer(tmp_path, shared=shared).train()


def test_dropout_in_the_update_stops_the_run(tmp_path):
    base = tiny.base("gpt2")
    shared = SharedBase.build(base, tiny.lora(base), critic="adapter")
    base.transformer.h[0].mlp.dropout.p = 0.5  # after build, which turns all of it off
    with pytest.raises(first_step_checks.GateError, match=r"ratio of the first minibatch is not 1.*dropout"):
        trainer(tmp_path, shared=shared).train()


def test_a_trainable_set_that_drifted_is_named():
    model = torch.nn.ModuleDict({"default": torch.nn.Linear(2, 2), "other": torch.nn.Linear(2, 2)})
    model["default"].requires_grad_(False)
    with pytest.raises(first_step_checks.GateError, match=r"2 tensors .* frozen .*2 others train"):
        first_step_checks.check_trainable(
            [(f"x.{name}", p) for name, p in model.named_parameters()], ("x.default.weight", "x.default.bias")
        )


def test_a_missing_gradient_is_named():
    layer = torch.nn.Linear(2, 2)
    layer.weight.grad = torch.full((2, 2), float("nan"))
    with pytest.raises(
        first_step_checks.GateError,
        match=r"1 trainable tensors have no gradient \(bias\) and 1 one that is not finite \(weight\)",
    ):
        first_step_checks.check_gradients(layer.named_parameters())


def test_the_overridden_hooks_are_public_and_have_trainers_signatures():
    own = {name for name, value in vars(PPOTrainer).items() if inspect.isfunction(value)} & set(dir(Trainer))
    hooks = {
        "create_optimizer",
        "create_scheduler",
        "get_train_dataloader",
        "training_step",
        "compute_loss",
        "log",
        "evaluate",
    }
    assert own - {"__init__", "push_to_hub"} == hooks, "push_to_hub only refuses"
    for name in hooks:
        assert list(inspect.signature(getattr(PPOTrainer, name)).parameters) == list(
            inspect.signature(getattr(Trainer, name)).parameters
        )


def test_the_critic_that_shares_the_policys_states_learns_too(tmp_path):
    base = tiny.base()
    shared = SharedBase.build(base, tiny.lora(base, layers="top-2"), critic="shared")
    ppo = trainer(tmp_path, shared=shared, num_rollouts=6, value_learning_rate=3e-2)
    ppo.train()
    assert [name for name, _ in ppo.shared.role_parameters("value")] == [
        "base_model.model.score.modules_to_save.value.weight"
    ]
    errors = [
        row["value/error"] for row in read_jsonl(Path(tmp_path) / "metrics.jsonl") if "value/error" in row
    ]
    assert errors[-1] < errors[0]


def test_a_critic_on_reward_features_learns_and_the_reward_model_stays(tmp_path):
    shared = with_reward_adapter(tmp_path / "reward", critic="reward_features")
    torch.nn.init.zeros_(shared.score_head("value").weight)
    before = {name: parameter.clone() for name, parameter in shared.role_parameters("reward")}
    # The policy stands, so that the critic has one thing to learn
    still = {"learning_rate": 0.0, "value_learning_rate": 3e-2}
    ppo = trainer(
        tmp_path / "run", shared=shared, reward=None, num_rollouts=4, per_device_train_batch_size=16, **still
    )
    ppo.train()
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "value/error" in row]
    assert rows[-1]["value/error"] < 0.8 * rows[0]["value/error"]
    assert rows[-1]["value/explained_variance"] > 0.2 > abs(rows[0]["value/explained_variance"])
    assert all(
        torch.equal(parameter, before[name]) for name, parameter in ppo.shared.role_parameters("reward")
    )


def test_features_kept_from_scoring_give_the_update_of_features_computed_anew(tmp_path, monkeypatch):
    ends = []
    for keep in (True, False):
        torch.manual_seed(0)
        ppo = trainer(
            tmp_path / str(keep),
            shared=with_reward_adapter(tmp_path / f"reward{keep}", critic="reward_features"),
            reward=None,
        )
        if not keep:
            evaluate = ppo.collector.evaluate
            monkeypatch.setattr(
                ppo.collector,
                "evaluate",
                lambda *args, evaluate=evaluate, **kw: evaluate(*args, **kw)._replace(features=None),
            )
        ppo.train()
        ends.append(trained_parameters(ppo.shared))
    assert ends[0].keys() == ends[1].keys()
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("weights", ["shared", "dense"])
def test_rollouts_tell_how_far_their_probabilities_are_from_the_updates(weights, tmp_path):
    trainer(tmp_path, rollout_weights=weights).train()
    gaps = [
        row["rollout/sampling_gap"]
        for row in read_jsonl(tmp_path / "metrics.jsonl")
        if "rollout/sampling_gap" in row
    ]
    assert len(gaps) == 2 and all(0 <= gap < 1e-5 for gap in gaps), gaps


@pytest.mark.parametrize(("correction", "weight"), [("truncate", 2.0), ("mask", 0.0)])
def test_tokens_that_the_sampler_found_unlikely_are_weighed(correction, weight, tmp_path):
    ends = {}
    for shift in (0.0, 1.5):  # nats that all tokens were likelier to the update than to the sampler
        folder = tmp_path / str(shift)
        ppo = trainer(folder, sampling_correction=correction, sampling_correction_cap=2.0, num_rollouts=1)
        generate = ppo.collector.generate

        def shifted(*args, generate=generate, shift=shift, **how):
            rollout = generate(*args, **how)
            return replace(rollout, sampling_logprobs=rollout.sampling_logprobs - shift)

        ppo.collector.generate = shifted
        ppo.train()
        ends[shift] = logged(folder, "rollout/sampling_weight")[0]
    assert ends[0.0]["rollout/sampling_weight"] == pytest.approx(1.0, abs=1e-5)
    assert ends[0.0]["rollout/sampling_capped"] == 0 and ends[1.5]["rollout/sampling_capped"] == 1
    assert ends[1.5]["rollout/sampling_weight"] == pytest.approx(weight)
    assert (ends[1.5]["loss/policy"] == 0) == (correction == "mask")


def test_the_ratio_gate_allows_rounding_and_no_drift():
    mask = torch.ones(3, 5, dtype=torch.bool)
    old = torch.zeros(3, 5)
    one = old.clone()
    one[1, 2] = 0.4
    first_step_checks.check_ratio(one, old, mask, tolerance=0.05)
    for broken in (one * 2, old + 0.06, torch.where(one > 0, float("nan"), 0.0)):
        with pytest.raises(first_step_checks.GateError, match="ratio of the first minibatch is not 1"):
            first_step_checks.check_ratio(broken, old, mask, tolerance=0.05)
    first_step_checks.check_ratio(
        torch.where(mask, old, 9.0), old, mask & (torch.arange(5) < 4), tolerance=0.05
    )


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_replies_compared_with_one_another_raise_a_toy_reward_without_a_critic(estimator, tmp_path):
    shared = SharedBase.build(base := tiny.base(), tiny.lora(base, layers="top-2"))
    settings = {
        "advantage_estimator": estimator,
        "num_generations": 4,
        "num_rollouts": 12,
        "per_device_train_batch_size": 16,
        "num_ppo_epochs": 3,
    }
    ppo = trainer(tmp_path, shared=shared, **settings)
    ppo.train()
    scores = [
        row["objective/score"] for row in read_jsonl(tmp_path / "metrics.jsonl") if "objective/score" in row
    ]
    assert scores[-1] > scores[0] + 0.5, scores
    assert not ppo.shared.has("value")
    assert not any("value/" in name for row in read_jsonl(tmp_path / "metrics.jsonl") for name in row)


def test_each_prompt_is_answered_num_generations_times_in_a_row(tmp_path, monkeypatch):
    seen = []

    def watch(prompts, completions, completion_ids, id):
        seen.append((prompts, id))
        return [float(len(set(ids))) for ids in completion_ids]

    shared = SharedBase.build(base := tiny.base(), tiny.lora(base, layers="top-2"))
    rows = prompt_rows().add_column("id", list(range(64)))
    trainer(
        tmp_path,
        shared=shared,
        rows=rows,
        reward=watch,
        advantage_estimator="rloo",
        num_generations=4,
        num_rollouts=3,
    ).train()
    prompts, ids = seen[1]  # the first are for the scale of scores
    assert len(ids) == 16 and all(
        len(set(group)) == 1 for group in zip(ids[::4], ids[1::4], ids[2::4], ids[3::4], strict=True)
    )
    assert len(set(ids)) == 4 and prompts[0] == prompts[3] != prompts[4]
    assert set(seen[1][1]).isdisjoint(seen[2][1]), "each rollout has prompts of its own"


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_prompts_whose_replies_score_alike_are_counted(penalty, tmp_path):
    groups = []

    def watch(completion_ids, **columns):
        scores = [float(ids[0] % 2) for ids in completion_ids]
        lengths = [len(ids) for ids in completion_ids]
        learned = [score - penalty * length for score, length in zip(scores, lengths, strict=True)]
        groups.append([learned[i : i + 2] for i in range(0, len(learned), 2)])
        return scores

    settings = {"num_generations": 2, "score_normalization": "none", "length_penalty": penalty}
    trainer(tmp_path, reward=watch, **settings).train()
    shares = [sum(abs(a - b) < 1e-6 for a, b in pairs) / len(pairs) for pairs in groups]
    got = [row["rollout/alike_groups"] for row in logged(tmp_path, "rollout/alike_groups")]
    assert got == pytest.approx(shares) and len(got) == 2 and 0 < min(shares) <= max(shares) < 1
    trainer(tmp_path / "one", num_rollouts=1).train()
    assert logged(tmp_path / "one", "rollout/alike_groups") == []


def test_the_advantages_of_a_group_are_its_returns_against_the_others(tmp_path):
    shared = SharedBase.build(base := tiny.base(), tiny.lora(base, layers="top-2"))
    ppo = trainer(tmp_path, shared=shared, advantage_estimator="rloo", num_generations=2)
    mask = tiny.response_mask((3, 2, 3, 1))
    rewards = torch.where(mask, torch.tensor([[1.0], [2.0], [3.0], [4.0]]), 0.0)
    advantages, plain, returns = ppo.experience.advantages(rewards, None, mask)
    assert returns is None and torch.equal(plain, advantages)
    assert advantages.tolist() == [[-1.0] * 3, [1.0, 1.0, 0.0], [5.0] * 3, [-5.0, 0.0, 0.0]]


@pytest.mark.parametrize(("estimator", "critic"), [("gae", None), ("rloo", "shared"), ("grpo", "adapter")])
def test_a_critic_too_many_or_too_few_is_named(estimator, critic, tmp_path):
    shared = SharedBase.build(base := tiny.base(), tiny.lora(base), critic=critic)
    with pytest.raises(ValueError, match=f"advantage_estimator={estimator} goes with"):
        trainer(tmp_path, shared=shared, advantage_estimator=estimator, num_generations=2)


@pytest.mark.parametrize("estimator", ["k2", "k3", "exact"])
def test_the_kl_as_a_loss_holds_the_policy_back_and_leaves_the_rewards_alone(estimator, tmp_path):
    kls = {}
    for coef in (0.0, 1.0):
        folder = tmp_path / str(coef)
        trainer(
            folder,
            kl_location="loss",
            kl_estimator=estimator,
            kl_coef=coef,
            num_rollouts=6,
            per_device_train_batch_size=16,
        ).train()
        rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "objective/kl" in row]
        kls[coef] = rows[-1]["objective/kl_k3"]
        assert all(row["objective/reward"] == pytest.approx(row["objective/score"], abs=1e-5) for row in rows)
        assert rows[-1]["loss/kl"] > 0
    assert kls[1.0] < 0.5 * kls[0.0], kls


def test_the_exact_kl_is_charged_in_the_reward_and_shown_beside_the_sampled_one(tmp_path):
    trainer(
        tmp_path,
        kl_estimator="exact",
        kl_coef=0.5,
        num_rollouts=3,
        per_device_train_batch_size=16,
        temperature=0.8,
    ).train()
    first, *later = logged(tmp_path)
    assert abs(first["objective/kl_exact"]) < 1e-5
    for row in later:
        assert row["objective/reward"] == pytest.approx(
            row["objective/score"] - 0.5 * row["objective/kl_exact"], abs=1e-5
        )
        assert row["objective/kl_exact"] > 0.01 and row["objective/kl_exact"] != row["objective/kl"]


def test_a_run_stops_at_a_kl_above_max_kl_and_says_what_to_change(tmp_path, caplog):
    ppo = trainer(tmp_path, kl_coef=0.0, max_kl=0.2, num_rollouts=30, learning_rate=3e-2)
    ppo.train()
    kls = [row["objective/kl"] for row in read_jsonl(tmp_path / "metrics.jsonl") if "objective/kl" in row]
    assert ppo.state.global_step < ppo.args.max_steps
    assert all(kl <= 0.2 for kl in kls[:-1]) and len(kls) < 30
    assert "above max_kl=0.2. Raise kl_coef" in caplog.text


def test_a_minibatch_whose_ratio_has_left_all_bounds_moves_nothing(tmp_path):
    ppo = trainer(tmp_path)
    ppo.create_optimizer()
    ids, mask = tiny.batch()
    response = tiny.response_mask()
    output = ppo.shared(ids, mask, response)
    batch = Microbatch(
        input_ids=ids,
        attention_mask=mask,
        response_mask=response,
        old_logprobs=output.logprobs.detach(),
        ref_logprobs=output.logprobs.detach(),
        advantages=torch.where(response, 1.0, 0.0),
        num_tokens=float(response.sum()),
        old_values=output.values.detach(),
        returns=torch.where(response, output.values, 0.0).detach(),
    )
    for shift, moves in (
        (0.0, True),
        (2.0, True),
        (3.0, False),
        (1000.0, False),
        (-2.0, True),
        (-3.0, False),
        (-1000.0, False),
    ):
        ppo.shared.zero_grad()
        old_logprobs = torch.where(response, output.logprobs - shift, 0.0).detach()
        loss = ppo.compute_loss(ppo.shared, replace(batch, old_logprobs=old_logprobs))
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in ppo.shared.parameters() if p.grad is not None])
        assert torch.isfinite(loss) and torch.isfinite(gradients).all()
        assert moves or (gradients == 0).all(), shift
    assert ppo.metrics.of_updates()["policy/skipped"] * ppo.args.gradient_accumulation_steps == 4


def test_the_reward_adapter_and_functions_add_up_and_are_logged_one_by_one(tmp_path):
    shared = with_reward_adapter(tmp_path / "reward", critic="adapter")
    sources = {"reward_function": ["adapter", even_share], "reward_weights": [1, 3]}
    PPOTrainer(
        shared,
        config(tmp_path / "run", score_normalization="none"),
        prompt_rows(),
        tiny.tokenizer(),
        **sources,
    ).train()
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "objective/raw_score" in row]
    for row in rows:
        assert row["objective/raw_score"] == pytest.approx(
            row["reward/adapter"] + 3 * row["reward/even_share"], abs=1e-5
        )
        assert 0 <= row["reward/even_share"] <= 1 and row["reward/adapter"] != 0


def test_a_single_constant_function_is_named_in_the_diagnosis(tmp_path):
    def always_half(completions, **columns):
        return [0.5] * len(completions)

    settings = {"score_normalization": "none", "missing_eos_penalty": 1.0, "num_rollouts": 5}
    for penalty in (1.0, None):
        folder = tmp_path / str(penalty)
        settings |= {"missing_eos_penalty": penalty, "num_ppo_epochs": 1}
        trainer(folder, reward=always_half, **settings).train()
        rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "objective/raw_score" in row]
        assert all(row["reward/always_half"] == 0.5 for row in rows)
        said = diagnosis_text(rows)
        assert "always_half has a mean of 0.5" in said or "is constant (always_half)" in said, said


def test_pretraining_text_stays_likely_with_ppo_ptx(tmp_path):
    ids, mask = left_pad(list(pretraining_texts()["input_ids"]), tiny.PAD)
    likelihood = {}
    for coef in (0.0, 1.0):
        ppo = with_texts(tmp_path / str(coef), coef)
        with torch.no_grad():
            likelihood["before"] = ppo.shared.negative_log_likelihood(ids, mask).item()
        ppo.train()
        with torch.no_grad():
            likelihood[coef] = ppo.shared.negative_log_likelihood(ids, mask).item()
    assert likelihood[1.0] < likelihood["before"] - 0.3 and likelihood[1.0] < likelihood[0.0] - 0.3, (
        likelihood
    )
    rows = [row for row in read_jsonl(tmp_path / "1.0" / "metrics.jsonl") if "loss/ptx" in row]
    assert len(rows) == 6 and rows[-1]["loss/ptx"] < rows[0]["loss/ptx"]


@pytest.mark.parametrize("cut", [{}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}])
def test_the_loss_on_texts_is_a_mean_over_the_tokens_of_the_step(tmp_path, cut):
    rows = Dataset.from_list([{"input_ids": list(range(4, 4 + length))} for length in (2, 3, 14, 2, 12, 5)])
    shared = SharedBase.build(base := tiny.base(), tiny.lora(base, layers="top-2"), critic="shared")
    settings = config(tmp_path, ptx_coef=0.7, ptx_batch_size=2, num_rollouts=1, learning_rate=0.0, **cut)
    ppo = PPOTrainer(
        shared, settings, prompt_rows(), tiny.tokenizer(), reward_function=even_share, ptx_dataset=rows
    )
    losses = []
    with torch.no_grad():
        for step in range(settings.steps_per_rollout):
            nats, tokens = 0.0, 0
            for number in range(settings.gradient_accumulation_steps):
                ids, mask, _ = ppo.updater.texts.of(step=step, microbatch=number)
                for row, length in zip(ids, mask.sum(-1).tolist(), strict=True):
                    text = row[-length:][None]  # alone, by the model itself
                    loss = base(input_ids=text, labels=text).loss
                    nats, tokens = nats + loss.item() * (length - 1), tokens + length - 1
            losses.append(nats / tokens)
    ppo.train()
    row = next(row for row in read_jsonl(tmp_path / "metrics.jsonl") if "loss/ptx" in row)
    assert row["loss/ptx"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_price_that_is_logged_is_the_one_that_the_loss_has_paid(tmp_path):
    changes = {"kl_location": "loss", "kl_estimator": "k2", "entropy_coef": 0.0, "vf_coef": 0.5}
    ppo = trainer(
        tmp_path, kl_target=1.0, kl_horizon=8, kl_coef=0.3, num_ppo_epochs=1, num_rollouts=4, **changes
    )
    ppo.train()
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "loss/kl" in row]
    assert len({row["objective/kl_coef"] for row in rows}) == 4
    for row in rows:
        paid = row["loss"] - row["loss/policy"] - 0.5 * row["loss/value"]
        assert paid == pytest.approx(row["objective/kl_coef"] * row["loss/kl"], abs=1e-4)


def test_the_texts_of_a_step_follow_from_the_step(tmp_path):
    ppo, again = (with_texts(tmp_path / name, 1.0) for name in ("a", "b"))
    texts, same = ppo.updater.texts, again.updater.texts
    first, *_ = texts.of(step=0, microbatch=0)
    assert torch.equal(first, same.of(step=0, microbatch=0)[0]) and first.shape == (5, 9)
    later, *_ = texts.of(step=3, microbatch=0)
    assert torch.equal(later, same.of(step=3, microbatch=0)[0])
    assert not torch.equal(later, first)
    assert not torch.equal(texts.of(step=3, microbatch=1)[0], later)


def test_ppo_ptx_needs_both_a_weight_and_text(tmp_path):
    with pytest.raises(
        ValueError, match=r"ptx_coef=0.5: PPO-ptx needs a weight above 0 and pretraining text"
    ):
        trainer(tmp_path, ptx_coef=0.5)


def test_a_second_round_starts_from_the_first_and_is_held_to_the_sft_adapter(tmp_path):
    for name, seed in (("sft", 1), ("first_round", 2)):
        made = SharedBase.build(tiny.base(), tiny.lora(tiny.base()))
        tiny.randomise(made, std=0.05, seed=seed)
        made.save_pretrained(tmp_path / name)
    shared = SharedBase.build(
        tiny.base(), tmp_path / "first_round", reference=tmp_path / "sft", critic="adapter"
    )
    trainer(tmp_path / "run", shared=shared, num_rollouts=1).train()
    assert logged(tmp_path / "run")[0]["objective/kl_k3"] > 1e-3


def test_what_is_saved_is_logged_and_a_resumed_run_logs_the_same(tmp_path):
    # A log every second rollout, a checkpoint after the first: nothing of it may be lost
    settings = {"num_rollouts": 3, "logging_steps": 8, "save_strategy": "steps", "save_steps": 4}
    settings["save_total_limit"] = None
    straight = trainer(tmp_path / "straight", **settings)
    straight.train()
    resumed = trainer(tmp_path / "resumed", **settings)
    shutil.copytree(tmp_path / "straight" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-4"))
    whole = logged(tmp_path / "straight")
    assert [row["step"] for row in whole] == [4, 8, 12]
    assert [row["rollout/count"] for row in whole] == [1, 1, 1]
    assert logged(tmp_path / "resumed") == whole
