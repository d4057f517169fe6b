"""The configurations for cards of 8 to 24 GB: each fits by the plan, and the plan holds on tensors.

Shapes are the models' own; on fake tensors, a few of their layers.
"""

import re
import runpy
from pathlib import Path

import pytest
import yaml

from goose_lora.models.compatibility import meta_model
from goose_lora.planning.memory import Planner, with_margin
from goose_lora.planning.stages import Tuning, plan_evaluation, plan_tuning

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "recipes" / "configs" / "consumer_gpu"
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "memory.py"))
arguments, ppo = BENCHMARK["model_of"], BENCHMARK["config_of"]
CARDS, STAGES = (8, 12, 16, 24), ("sft", "reward", "ppo", "evaluate")
LAYERS = 6


def read(card, stage):
    text = (FOLDER / f"{card}gb" / f"{stage}.yaml").read_text()
    return text, yaml.safe_load(text)


def shape_of(settings, layers=None):
    return BENCHMARK["shape_of_named"](settings["model_name_or_path"], layers)


# PPO with policy, critic, reward model and reference where a base nearly fills the card
LARGE = [name for name in BENCHMARK["FOR_CARDS"] if "/" not in name]


def large(name, layers=None):
    text = (FOLDER / f"{name}.yaml").read_text()
    settings = yaml.safe_load(text)
    return text, settings, shape_of(settings, layers), BENCHMARK["FOR_CARDS"][name]


@pytest.mark.parametrize("name", LARGE)
def test_ppo_of_a_base_that_nearly_fills_the_card_fits_it_by_the_plan_with_the_margin(name):
    text, settings, shapes, memory = large(name)
    model = arguments(settings)
    core = meta_model(model, config=shapes)
    policy, reward = settings["policy_adapter"], settings["reward_adapter"]
    config = ppo(settings)
    assert config.rollout_batch_size == 8
    assert config.max_prompt_tokens == config.response_length == 256
    planner = Planner(core, model, config, policy=policy, reward=reward, memory=memory)
    roles = planner.roles
    assert roles.value is not None and roles.reward is not None and roles.plan.reference == "copy"
    said = re.search(r"by plan ([\d.]+) GB, with 15 % and 0.6 GB to spare", text)
    assert said and said[1] == f"{planner.needed() / 1e9:.1f}" and planner.needed() <= memory


def test_the_plan_of_embeddings_on_the_host_is_within_5_percent_of_fake_tensors(tmp_path):
    _, settings, shapes, _ = large("ppo_8b_8gb", LAYERS)
    model, device = arguments(settings), arguments(settings | {"embeddings": "device"})
    config = ppo(settings, gradient_accumulation_steps=1, local_rollout_forward_batch_size=1)
    plan, peaks = BENCHMARK["measured_fake"](shapes, device, config, adapters=tmp_path)
    core = meta_model(model, config=shapes)
    table = core.get_input_embeddings().weight.numel() * 2
    roles = {"policy": str(tmp_path / "CAUSAL_LM"), "reward": str(tmp_path / "SEQ_CLS")}
    host = Planner(core, model, config, **roles).plan()
    assert host.total("load") == plan.total("load")
    assert plan.total("update") - host.total("update") == table
    # What the device's table took is not there: nothing else changes
    measured = with_margin(peaks["update"] - table, "cuda")
    assert with_margin(host.total("update"), "cuda") == pytest.approx(measured, rel=0.05)


def tuning(stage, settings):
    rows = settings["per_device_train_batch_size"] * (2 if stage == "reward" else 1)
    words = stage == "sft"
    return Tuning(rows, settings["max_length"], settings["gradient_checkpointing"], words)


def need(card, stage, settings):
    model = arguments(settings)
    core = meta_model(model, config=shape_of(settings))
    if stage in ("sft", "reward"):
        return with_margin(plan_tuning(core, model, tuning(stage, settings)).peak, "cuda")
    if stage == "evaluate":
        assert settings["rollout_weights"] == "shared"
        sizes = {"batch_size": settings["batch_size"], "response_tokens": settings["response_length"]}
        return with_margin(plan_evaluation(core, model, prompt_tokens=512, **sizes).peak, "cuda")
    policy, reward = settings["policy_adapter"], settings["reward_adapter"]
    memory = card * 10**9
    return Planner(core, model, ppo(settings), policy=policy, reward=reward, memory=memory).needed()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("card", CARDS)
def test_each_configuration_fits_its_card_with_the_margin_and_says_what_it_needs(card, stage):
    text, settings = read(card, stage)
    planned = need(card, stage, settings)
    assert planned <= card * 10**9
    said = re.search(r"Not measured on a GPU: by plan ([\d.]+) GB, with 15 % and 0.6 GB to spare", text)
    assert said and said[1] == f"{planned / 1e9:.1f}"


def test_grpo_of_sums_without_a_critic_or_a_reward_model_fits_12_gb_and_says_what_it_needs():
    text = (FOLDER / "verifiable.yaml").read_text()
    settings, memory = yaml.safe_load(text), 12 * 10**9
    model = arguments(settings)
    planner = Planner(meta_model(model, config=shape_of(settings)), model, ppo(settings), memory=memory)
    assert planner.roles.value is None and planner.roles.reward is None
    said = re.search(r"by plan ([\d.]+) GB, with 15 % and 0.6 GB to spare", text)
    assert said and said[1] == f"{planner.needed() / 1e9:.1f}" and planner.needed() <= memory


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("card", CARDS)
def test_its_plan_with_the_margin_is_within_5_percent_of_fake_tensors(card, stage, tmp_path):
    _, settings = read(card, stage)
    model, shapes = arguments(settings), shape_of(settings, LAYERS)
    if stage in ("sft", "reward"):
        plan, peak = BENCHMARK["measured_fake_tuning"](shapes, model, tuning(stage, settings))
        planned = plan.peak
    elif stage == "evaluate":
        sizes = (settings["batch_size"], 512, settings["response_length"])
        plan, peaks = BENCHMARK["measured_fake_evaluation"](shapes, model, *sizes)
        planned, peak = max((plan.total(phase), found) for phase, found in peaks.items())
    else:
        # Scoring is measured at a microbatch's size, and its groups are generation's concern.
        rows = settings["per_device_train_batch_size"]
        one = {"gradient_accumulation_steps": 1, "num_mini_batches": 1, "rollout_weights": "shared"}
        config = ppo(settings, local_rollout_forward_batch_size=rows, **one)
        plan, peaks = BENCHMARK["measured_fake"](shapes, model, config, adapters=tmp_path)
        planned, peak = plan.total("update"), peaks["update"]
    assert with_margin(planned, "cuda") == pytest.approx(with_margin(peak, "cuda"), rel=0.05)
