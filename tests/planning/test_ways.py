"""What a run that does not fit can change: in which order, with what it brings, and as a file."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from goose_lora import cli
from goose_lora.errors import UserError
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.compatibility import meta_model
from goose_lora.planning import ways
from goose_lora.planning.memory import Planner
from goose_lora.ppo.config import PPOConfig

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1536,
    "vocab_size": 8192,
}
ORDER = [
    "gradient_checkpointing",
    "rollout_weights",
    "per_device_train_batch_size",
    "embeddings",
    "lora_layers",
    "response_length",
]


def planner(*, quantization="nf4", policy=None, **changes):
    model = ModelArguments("m", quantization=quantization)
    config = PPOConfig(
        output_dir="unused",
        use_cpu=True,
        report_to=[],
        num_rollouts=1,
        rollout_weights="dense",
        max_prompt_tokens=256,
        response_length=256,
        per_device_train_batch_size=8,
        local_rollout_forward_batch_size=64,
        score_calibration_prompts=64,
    )
    for name, value in changes.items():
        setattr(config, name, value)
    core = meta_model(model, config=AutoConfig.for_model("llama", **SHAPE))
    return Planner(core, model, config, policy=policy, reward="not trained yet")


def test_changes_come_in_the_order_of_what_they_cost_and_each_has_what_the_run_then_needs():
    plan = planner()
    least = int(ways.ways_to_fit(plan, 1)[1].needed() * 1.02)
    found, after = ways.ways_to_fit(plan, least)
    names = [next(name for name in way.settings if name in ORDER) for way in found]
    assert names == ORDER
    needs = [way.need for way in found]
    assert needs == sorted(needs, reverse=True) and needs[-1] == after.needed() <= least

    # What is said of each is what a plan of these settings says, made from the beginning
    settings = {}
    for way in found:
        settings |= way.settings
        assert plan.changed(settings).needed() == way.need
    # And as many replies to an optimizer step as before
    assert settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] == 8


def test_no_more_is_changed_than_it_takes():
    plan = planner()
    for memory in range(10**9, plan.needed(), 10**8):
        found, after = ways.ways_to_fit(plan, memory)
        if not found or not after.fits(after.sizes, memory):
            continue
        before = {}
        for way in found[:-1]:
            before |= way.settings
        assert plan.changed(before).needed() > memory >= after.needed()
    assert ways.ways_to_fit(plan, plan.needed())[0] == []


def test_an_adapter_that_is_trained_already_keeps_its_layers_and_its_base(tmp_path):
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))
    lora = LoraConfig(r=16, target_modules=linears, task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(str(tmp_path))
    settings = {}
    for way in ways.ways_to_fit(planner(quantization="none", policy=str(tmp_path)), 1)[0]:
        settings |= way.settings
    assert "train_layers" in settings and not {"lora_layers", "quantization"} & settings.keys()


def test_a_base_that_is_too_large_is_said_to_be_with_the_size_that_would_do():
    plan = planner()
    with pytest.raises(UserError) as refused:
        ways.check(plan, int(6.5e8))
    message = str(refused.value)
    assert "Even with gradient_checkpointing: true (" in message
    assert re.search(r"take a smaller base, of some \d\d million parameters", message)


CONFIGURATION = """# My run, on the card that I have.
model_name_or_path: {model}
quantization: nf4  # 4 bits
output_dir: {out}
dataset_name: x
reward_function: f:g
num_rollouts: 3

per_device_train_batch_size: 16
gradient_checkpointing: false
max_prompt_tokens: 256
response_length: 256
"""


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["goose-lora", "plan", *words])
    cli.main()


def test_the_command_writes_the_configuration_that_fits_and_nothing_else_of_it_changes(
    tmp_path, monkeypatch, capsys
):
    AutoConfig.for_model("llama", **SHAPE).save_pretrained(tmp_path / "model")
    text = CONFIGURATION.format(model=tmp_path / "model", out=tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "--config", "mine.yaml", "--fit", "1.5GB")
    shown = capsys.readouterr().out
    written = (tmp_path / "mine_1.5GB.yaml").read_text()
    before, after = yaml.safe_load(text), yaml.safe_load(written)
    changed = {name for name in after if after[name] != before.get(name)}
    assert "gradient_checkpointing" in changed and "mine_1.5GB.yaml: gradient_checkpointing: true (" in shown
    assert changed <= {"gradient_checkpointing", "per_device_train_batch_size", "gradient_accumulation_steps"}
    assert "# My run, on the card that I have." in written and "  # 4 bits" in written

    # What was written fits by the plan's own word, is not written over, and needs no other
    run(monkeypatch, "--config", "mine_1.5GB.yaml", "--memory", "1.5GB")
    assert "does not fit" not in capsys.readouterr().out
    run(monkeypatch, "--config", "mine_1.5GB.yaml", "--fit", "1.5GB")
    assert "fits as it is: nothing is written" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(monkeypatch, "--config", "mine.yaml", "--fit", "1.5GB")
    assert "mine_1.5GB.yaml is there already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, "--config", "mine.yaml", "--fit", "10MB", "--out", "other.yaml")
    assert "smaller base" in capsys.readouterr().err and not (tmp_path / "other.yaml").exists()


MIXTURES = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("architecture", MIXTURES)
def test_the_plan_of_a_mixture_of_experts_counts_its_experts_as_they_are_kept(architecture):
    small = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 256}
    shape = AutoConfig.for_model(
        architecture, **{"num_attention_heads": 4, "num_key_value_heads": 2} | small | MIXTURES[architecture]
    )
    model = ModelArguments("m", quantization="none")
    core = meta_model(model, config=shape)
    plan = Planner(core, model, planner().config)
    assert plan.model.base == sum(p.numel() * p.element_size() for p in core.parameters())
    assert plan.model.experts_of_token == 2 and plan.model.layers_of_experts == (0, 1)
    assert plan.model.expert_features == 3 * 128, "gate, up and their product"


def test_the_plan_of_a_mixture_is_within_a_tenth_of_a_real_run(tmp_path):
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "memory.py"))
    shape = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    tokenizer = benchmark["small_model"](tmp_path / "base", architecture="mixtral", **shape)
    model = ModelArguments(str(tmp_path / "base"), quantization="none", dtype="float32")
    settings = benchmark["settings"](
        tmp_path / "run",
        per_device_train_batch_size=8,
        max_prompt_tokens=32,
        response_length=32,
        local_rollout_forward_batch_size=8,
        rollout_weights="shared",
    )
    plan, peaks = benchmark["measured_steps"](tmp_path, tokenizer, model, settings)
    for phase, peak in peaks.items():
        assert plan.total(phase) == pytest.approx(peak, rel=0.1), phase


def test_a_model_without_attention_heads_has_no_plan_and_is_told_so():
    model = ModelArguments("m", quantization="none")
    core = meta_model(model, config=AutoConfig.for_model("mamba", hidden_size=64, num_hidden_layers=2))
    with pytest.raises(UserError, match=r"no memory plan of m .MambaForCausalLM.*--force True"):
        Planner(core, model, planner().config)
