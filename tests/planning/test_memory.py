"""The memory plan against measured peaks, and what it says of a run that does not fit."""

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from goose_lora import cli
from goose_lora.errors import UserError
from goose_lora.models import loading
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.compatibility import meta_model
from goose_lora.models.dense_copy import dense_bytes, make_dense_copy
from goose_lora.models.folders import AdapterFolder
from goose_lora.models.shared_base import SharedBase
from goose_lora.planning import ways
from goose_lora.planning.memory import Planner, plan_run, read_memory
from goose_lora.ppo.config import PPOConfig

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "memory.py"))
SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 768,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
}


def shape(architecture="llama", **changes):
    return AutoConfig.for_model(architecture, **SHAPE | changes)


def settings(folder="unused", **changes):
    sizes = {
        "per_device_train_batch_size": 4,
        "local_rollout_forward_batch_size": 4,
        "max_prompt_tokens": 40,
        "response_length": 24,
    }
    return BENCHMARK["settings"](folder, **sizes | {"rollout_weights": "shared"} | changes)


def plan_of(model=None, memory=None, context=10**6, **changes):
    model = model or ModelArguments("m", quantization="none", dtype="float32")
    core = meta_model(model, config=shape(max_position_embeddings=context))
    return Planner(core, model, settings(**changes), memory=memory)


def test_the_plan_of_a_real_run_is_within_a_tenth_of_what_the_allocator_gave_out(tmp_path):
    tokenizer = BENCHMARK["small_model"](tmp_path / "base", num_hidden_layers=3)
    model = ModelArguments(str(tmp_path / "base"), quantization="none", dtype="float32", lora_layers="top-2")
    plan, peaks = BENCHMARK["measured_steps"](tmp_path, tokenizer, model, settings(tmp_path / "run"))
    assert set(peaks) == {"generate", "score", "update"}
    for phase, peak in peaks.items():
        assert plan.total(phase) == pytest.approx(peak, rel=0.1), phase


@pytest.mark.parametrize(
    ("architecture", "changes", "layers"),
    [
        ("llama", {}, "all"),
        ("qwen2", {"gradient_checkpointing": True}, "all"),
        ("qwen3", {}, "top-2"),
        ("llama", {"critic": "shared", "entropy_coef": 0.01}, "top-3"),
    ],
)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_plan_of_a_4_bit_base_in_bf16_is_within_a_tenth_of_a_step_on_fake_tensors(
    architecture, changes, layers, device
):
    model = ModelArguments("m", lora_layers=layers)
    plan, peaks = BENCHMARK["measured_fake"](shape(architecture), model, settings(**changes), device=device)
    for phase, peak in peaks.items():
        assert plan.total(phase) == pytest.approx(peak, rel=0.1), phase


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "opt", "phi3"])
def test_base_and_adapters_are_counted_to_the_byte(architecture):
    core = tiny.base(architecture)
    model = tiny.arguments(lora_layers="top-2")
    plan = Planner(meta_model(model, config=core.config), model, settings()).plan().phases["update"]
    base = sum(p.numel() * p.element_size() for p in core.parameters())
    shared = SharedBase.build(core, loading.lora_config(model, core), critic="adapter")
    adapters = sum(
        p.numel() * p.element_size() for role in ("policy", "value") for _, p in shared.role_parameters(role)
    )
    assert (plan["base"], plan["adapters"]) == (base, adapters)


@pytest.mark.parametrize(
    "name",
    [
        "per_device_train_batch_size",
        "local_rollout_forward_batch_size",
        "response_length",
        "max_prompt_tokens",
    ],
)
def test_more_rows_or_tokens_never_take_less(name):
    # Whether scoring keeps a graph goes by the sizes: see the next test.
    plans = [
        plan_of(**{name: number}, score_normalization="reference", max_tokens_per_microbatch=10**9).plan()
        for number in (1, 2, 16, 64)
    ]
    totals = {phase: [plan.total(phase) for plan in plans] for phase in ("generate", "score", "update")}
    assert all(numbers == sorted(numbers) for numbers in totals.values())
    assert any(numbers[0] < numbers[-1] for numbers in totals.values())


def test_scoring_with_a_graph_never_takes_most():
    for rows in (1, 4, 5, 64):
        plan, without = (
            plan_of(per_device_train_batch_size=rows, max_tokens_per_microbatch=limit).plan()
            for limit in (None, 10**9)
        )
        assert (plan.total("score") > without.total("score")) == (rows <= 4), (
            "a rollout of more rows is not one group"
        )
        assert plan.phase == "update" and plan.peak == without.peak


def test_each_largest_size_fits_and_one_more_does_not():
    memory = 10**9
    largest = plan_of().largest(memory)
    assert all(number > 0 for number in largest.values())
    rows, _, tokens = largest.values()
    assert plan_of(per_device_train_batch_size=rows, local_rollout_forward_batch_size=1).needed() <= memory
    assert plan_of(per_device_train_batch_size=rows + 1, local_rollout_forward_batch_size=1).needed() > memory
    assert plan_of(response_length=tokens).needed() <= memory < plan_of(response_length=tokens + 1).needed()


def test_no_reply_is_proposed_that_the_bases_context_has_no_room_for():
    assert plan_of(context=512).largest(10**12)["response_length"] == 512 - 40
    assert plan_of(context=40).largest(10**12)["response_length"] == 0
    assert "no response_length at these batch sizes" in plan_of(context=30).advice(10**12)


def test_a_gpu_is_left_the_margin_that_was_measured_and_a_cpu_is_not():
    plan = plan_of()
    peak = plan.plan().peak
    assert plan.needed() == pytest.approx(peak * 1.15 + 0.6e9, abs=1)
    assert plan.lack(plan.needed()) is None and "a margin of 15%" in (plan.lack(plan.needed() - 1) or "")
    host = Planner(plan.core, plan.args, plan.config, device="cpu")
    assert host.needed() == host.plan().peak and host.lack(host.needed()) is None


def test_auto_takes_the_dense_copy_only_where_the_whole_run_then_fits():
    fixed = {"quantization": "nf4", "dtype": "bfloat16"}
    model = ModelArguments("m", **fixed)
    dense, shared = (
        plan_of(model, rollout_weights=weights, gradient_checkpointing=True)
        for weights in ("dense", "shared")
    )
    assert dense.dense > 0 and dense.needed() > shared.needed()

    def auto(memory):
        return plan_of(model, memory, rollout_weights="auto", gradient_checkpointing=True)

    # Half of what is free holds the copy in each: what decides is the whole
    for memory, taken in (
        (dense.needed(), "auto"),
        (dense.needed() - 1, "shared"),
        (shared.needed(), "shared"),
    ):
        plan = auto(memory)
        assert plan.dense * 2 <= plan.free and plan.rollout_weights == taken and plan.lack(memory) is None
    assert auto(shared.needed() - 1).lack(shared.needed() - 1) is not None


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_plan_and_run_agree_on_a_dense_copy_beside_a_reward_model_as_peft_saves_it(
    tiny_base, tmp_path, changes
):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1)
    judge = get_peft_model(model, tiny.lora(model, task_type="SEQ_CLS", **changes))
    judge.save_pretrained(tmp_path / "reward")
    # PEFT notes a head that no decoder has: no whole module, which a copy could not hold
    reward = AdapterFolder.of("reward_adapter", tmp_path / "reward")
    assert "classifier" in reward.config["modules_to_save"]

    core = tiny.base()
    plan = Planner(
        core, tiny.arguments(), settings(rollout_weights="auto"), reward=tmp_path / "reward", memory=10**9
    )
    made = make_dense_copy(SharedBase.build(core, tiny.lora(core), reward=reward), "auto")
    assert (plan.rollout_weights, plan.dense > 0) == (
        ("auto", True) if made is not None else ("shared", False)
    )
    assert (made is None) == bool(changes.get("use_dora"))


def test_a_static_cache_is_there_from_the_first_token_in_whole_blocks():
    model = ModelArguments("m", quantization="nf4", dtype="bfloat16")

    def generating(**changes):
        plan = plan_of(model, response_length=300, max_prompt_tokens=500, **changes)
        return plan.plan().phases["generate"], plan

    off, _ = generating(rollout_weights="dense", rollout_compile="off")
    on, plan = generating(rollout_weights="dense", rollout_compile="auto")
    assert on["cache"] / off["cache"] == pytest.approx(832 / 800)
    # Nothing of it is copied, and all of it beside the pass over the prompt
    whole = plan.costs.forward(4, 500, None)
    assert on["activations"] == whole - on["logits"] > off["activations"]
    shared, elsewhere = generating()[1], Planner(plan.core, plan.args, plan.config, device="cpu")
    assert not shared._static_cache and not elsewhere._static_cache


def test_checkpointing_and_adapters_in_fewer_layers_take_less():
    plain = plan_of().plan().total("update")
    assert plan_of(gradient_checkpointing=True).plan().total("update") < plain
    assert (
        plan_of(ModelArguments("m", quantization="none", dtype="float32", lora_layers="top-2"))
        .plan()
        .total("update")
        < plain
    )


def test_microbatches_in_parts_take_what_their_parts_take():
    length = plan_of().sizes.length
    whole, parts, one = (
        plan_of(per_device_train_batch_size=16, max_tokens_per_microbatch=n).plan().phases["update"]
        for n in (None, 4 * length, 1)
    )
    assert (
        parts["activations"]
        == plan_of(per_device_train_batch_size=4).plan().phases["update"]["activations"]
        < whole["activations"]
    )
    assert one["activations"] == plan_of(per_device_train_batch_size=1).plan().phases["update"]["activations"]


def test_a_trunk_in_the_hosts_memory_is_not_the_devices():
    def of(where, memory=10**9):
        model = ModelArguments("m", quantization="none", dtype="float32", lora_layers="top-2")
        plan = plan_of(
            model, memory, num_mini_batches=8, trunk_memory=where, local_rollout_forward_batch_size=16
        ).plan()
        return plan, {phase: plan.phases[phase]["trunk"] for phase in ("generate", "score", "update")}

    (plan, device), (_, host) = of("device"), of("host")
    assert host["generate"] == 0 < host["update"] < device["update"] / 8 and host["score"] < device["score"]
    held = sum(plan.phases["update"][part] for part in ("base", "adapters"))
    assert of("auto", held + 2 * device["score"])[1] == device, "no more than half of what is left"
    assert of("auto", held + 2 * device["score"] - 2)[1] == host


def test_vllms_share_is_counted_while_it_generates_and_never_less_than_its_base_and_cache():
    def of(share, quantization="none", device="cuda", memory=10**9):
        model = ModelArguments("m", quantization=quantization, dtype="float32")
        args = settings(rollout_engine="vllm", vllm_memory_share=share, rollout_weights="auto")
        return Planner(meta_model(model, config=shape()), model, args, memory=memory, device=device).plan()

    plan = of(0.5)
    assert plan.phases["generate"]["vllm"] == 5 * 10**8 and plan.phases["generate"].keys() == {
        "base",
        "adapters",
        "optimizer",
        "dense copy",
        "vllm",
    }
    assert (
        all("vllm" not in plan.phases[phase] for phase in ("load", "score", "update"))
        and plan.phases["update"]["dense copy"] == 0
    )
    least = of(0.5, memory=None).phases["generate"]["vllm"]
    cache = 4 * 64 * 2 * 128 * 4 * 4  # rows, tokens, keys and values, of 4 heads of 32, bytes, layers
    assert of(0.001).phases["generate"]["vllm"] == least == plan.phases["load"]["base"] + cache
    assert of(0.001, "nf4").phases["generate"]["vllm"] > least > of(0.001, "nf4").phases["load"]["base"]
    assert {phase for phase, parts in of(0.5, device="cpu").phases.items() if "vllm" in parts} == {
        "generate",
        "score",
        "update",
    }


def test_a_refusal_names_the_largest_sizes_that_fit():
    plan = plan_of(per_device_train_batch_size=64)
    memory = 800 * 10**6
    rows, group, _ = plan.largest(memory).values()
    with pytest.raises(ValueError) as refused:
        ways.check(plan, memory)
    message = str(refused.value)
    assert (
        "\n" not in message
        and message.startswith("the run does not fit: update takes ")
        and "800.0 MB are free" in message
    )
    assert (
        f"per_device_train_batch_size={rows} and local_rollout_forward_batch_size={group} at this"
        " response_length" in message
    )
    assert message.endswith("--force True goes on anyway.")
    ways.check(plan, plan.needed())


def test_where_not_even_one_row_fits_the_refusal_says_so():
    with pytest.raises(
        ValueError, match="no per_device_train_batch_size and no local_rollout_forward_batch_size"
    ):
        ways.check(plan_of(), 10**6)


def test_adapters_that_are_not_trained_yet_are_counted_as_the_settings_say(tmp_path):
    config = PPOConfig(output_dir="out", use_cpu=True, report_to=[], num_rollouts=1, critic="adapter")
    args = ModelArguments("m", quantization="none", dtype="float32", lora_r=5)
    core = meta_model(args, config=AutoConfig.for_model("llama", **SHAPE))
    alone = Planner(core, args, config, device="cpu").roles
    later = Planner(
        core, args, config, policy=str(tmp_path / "sft"), reward=str(tmp_path / "reward"), device="cpu"
    ).roles
    assert later.plan.policy_copies == 1 and alone.plan.policy_copies == 0
    assert (
        later.reward is not None
        and later.reward.ranks == later.policy.ranks == alone.policy.ranks
        and set(later.policy.ranks.values()) == {5}
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("16 GiB", 16 * 2**30), ("0.5gb", 5 * 10**8), ("800MB", 8 * 10**8)],
)
def test_sizes_are_read_with_their_unit(text, size):
    assert read_memory(text) == size


@pytest.mark.parametrize("text", ["24", "many GB", "GB", "24 parsecs"])
def test_a_size_that_is_none_says_what_one_is(text):
    with pytest.raises(ValueError, match="such as 24GB"):
        read_memory(text)


def refuse_weights(*args, **kwargs):
    raise AssertionError("weights are loaded")


def test_the_command_plans_from_the_configuration_alone(tmp_path, monkeypatch, capsys):
    # A folder with config.json and nothing else
    AutoConfig.for_model("llama", **SHAPE).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", refuse_weights)
    lines = [
        f"model_name_or_path: {tmp_path / 'model'}",
        f"output_dir: {tmp_path}",
        "dataset_name: x",
        "reward_function: f:g",
        "learning_rate: 1e-4",
    ]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    monkeypatch.setattr(
        sys, "argv", ["goose-lora", "plan", "--config", str(tmp_path / "c.yaml"), "--memory", "2GB"]
    )
    cli.main()
    shown = capsys.readouterr().out
    assert "of 2.00 GB. Largest that fits: per_device_train_batch_size=" in shown and "Not counted" in shown
    assert [line.split()[0] for line in shown.splitlines()[2:]][:3] == ["base", "adapters", "optimizer"]


def test_the_recipe_refuses_before_it_loads_and_goes_on_by_force(tmp_path, tiny_base, monkeypatch, capsys):
    recipe = runpy.run_path(str(ROOT / "recipes" / "ppo.py"))
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.prompts())
    arguments = [
        "--model_name_or_path",
        tiny_base,
        "--dataset_name",
        rows,
        "--output_dir",
        str(tmp_path / "out"),
        "--use_cpu",
        "True",
    ]
    arguments += [
        "--reward_function",
        "goose_lora.demo:vader",
        "--quantization",
        "none",
        "--dtype",
        "float32",
    ]
    monkeypatch.setattr("goose_lora.cli.stage.free_bytes", lambda device: 10**5)
    monkeypatch.setattr("goose_lora.cli.stage.load_base", refuse_weights)
    with pytest.raises(ValueError, match="the run does not fit: "):
        recipe["main"](arguments)
    assert "together" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="weights are loaded"):
        recipe["main"]([*arguments, "--force", "True"])


def test_adapters_in_folders_are_counted_with_their_own_rank(tmp_path):
    core: Any = tiny.base()
    shared = SharedBase.build(core, loading.lora_config(tiny.arguments(lora_r=7), core))
    shared.save_pretrained(str(tmp_path / "policy"))
    core.save_pretrained(tmp_path / "base")
    model = tiny.arguments(str(tmp_path / "base"))
    config = PPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    counted = plan_run(
        model, config, policy=str(tmp_path / "policy"), reward=None, memory=None, device="cpu"
    ).roles
    assert counted.policy.parameters == sum(p.numel() for _, p in shared.role_parameters("policy"))
    assert counted.plan.policy_copies == 1  # the reference


PARTS = {
    "PiSSA": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}},
    "OLoRA": {"init_lora_weights": "olora"},
    "PiSSA, embeddings": {"init_lora_weights": "pissa", "target_modules": ["embed_tokens", "v_proj"]},
    "DoRA": {"use_dora": True},
    "bias": {"lora_bias": True, "target_modules": ["q_proj", "gate_proj"]},
    "norms": {"modules_to_save": ["input_layernorm"]},
    "norm on top": {"modules_to_save": ["norm"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "LoRA on embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [5, 7]}},
}


def on_other_parts(core, changes):
    """LoRA as everywhere here, with these settings in place of its own."""
    config = tiny.lora(core)
    return LoraConfig(**{"r": 3, "target_modules": config.target_modules, "task_type": "CAUSAL_LM"} | changes)


@pytest.mark.parametrize("train_layers", ["all", "top-1"])
@pytest.mark.parametrize("part", PARTS)
def test_all_that_an_adapter_has_is_counted_as_the_run_has_it(part, train_layers, tmp_path):
    core: Any = tiny.base(tie_word_embeddings=False)
    core.save_pretrained(tmp_path / "base")
    adapter = get_peft_model(core, on_other_parts(core, PARTS[part]))
    adapter.save_pretrained(tmp_path / "policy")
    shared = SharedBase.build(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        tmp_path / "policy",
        critic="adapter",
        critic_init="policy",
        train_layers=train_layers,
    )
    model = tiny.arguments(str(tmp_path / "base"))
    config = settings(
        tmp_path,
        critic="adapter",
        critic_init="policy",
        train_layers=train_layers,
        rollout_weights="auto",
    )
    plan = plan_run(model, config, policy=str(tmp_path / "policy"), reward=None, memory=10**12, device="cpu")
    roles = {role: dict(shared.role_parameters(role)) for role in ("policy", "value", "reference")}
    assert plan.roles.policy.parameters == sum(p.numel() for p in roles["policy"].values())
    assert plan.roles.bytes == sum(
        p.numel() * p.element_size() for named in roles.values() for p in named.values()
    )
    assert plan.roles.trained == sum(p.numel() for p in shared.parameters() if p.requires_grad)
    assert plan.roles.policy.trained_from == shared.trained_from["policy"]
    assert plan.dense == (dense_bytes(shared) if make_dense_copy(shared, "auto") else 0)


@pytest.mark.parametrize("changes", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}])
def test_an_adapter_on_the_head_is_refused_by_the_plan_too(changes, tmp_path):
    core: Any = tiny.base(tie_word_embeddings=False)
    core.save_pretrained(tmp_path / "base")
    get_peft_model(core, on_other_parts(core, changes)).save_pretrained(tmp_path / "policy")
    model = tiny.arguments(str(tmp_path / "base"))
    with pytest.raises(UserError, match=r"policy_adapter: .* changes the language-model head"):
        plan_run(
            model,
            settings(tmp_path),
            policy=str(tmp_path / "policy"),
            reward=None,
            memory=None,
            device="cpu",
        )


DECISIONS = {
    # by name: the trainer's module that asks, and the settings of runs that decide otherwise
    "takes_dense_copy": (
        "models.dense_copy",
        [{"rollout_weights": "dense"}, {"rollout_weights": "auto", "share": 0}],
    ),
    "captured_depth": ("models.shared_base", [{"lora_layers": "top-2"}, {"lora_layers": "all"}]),
    "waits_on_host": ("ppo.collector", [{"trunk_memory": "host"}, {"trunk_memory": "device"}]),
    "scoring_keeps_graph": ("ppo.update", [{}, {"num_mini_batches": 2}, {"max_tokens_per_microbatch": 40}]),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_trainer_and_plan_ask_one_function_and_get_one_answer(name, tmp_path, monkeypatch):
    home, runs = DECISIONS[name]
    places = {
        "run": importlib.import_module(f"goose_lora.{home}"),
        "plan": importlib.import_module("goose_lora.planning.memory"),
    }
    decide = getattr(places["run"], name)
    assert getattr(places["plan"], name) is decide
    answers: dict[str, list[Any]] = {}

    def noting(who):
        def asked(*args, **kwargs):
            answers.setdefault(who, []).append(decide(*args, **kwargs))
            return answers[who][-1]

        return asked

    for who, module in places.items():
        monkeypatch.setattr(module, name, noting(who))
    given = set()
    for index, changes in enumerate(runs):
        answers.clear()
        settings = {"rollout_weights": "shared"} | changes
        monkeypatch.setattr(
            importlib.import_module("goose_lora.models.dense_copy"),
            "SHARE_OF_FREE_MEMORY",
            settings.pop("share", 0.5),
        )
        layers = settings.pop("lora_layers", "top-2")
        run = tiny_runs.trainer(
            tmp_path / str(index),
            shared=tiny_runs.fresh(layers=layers),
            num_rollouts=2,
            **{"gradient_accumulation_steps": 1, "num_mini_batches": 1} | settings,
        )
        run.train()
        core = tiny.base()
        model = tiny.arguments(lora_layers=layers)
        # A CPU has no memory but the host's: the plan is of a GPU.
        Planner(meta_model(model, config=core.config), model, run.args, device="cuda").plan()
        assert len(set(answers["run"])) == 1 and set(answers["run"]) == set(answers["plan"]), changes
        given.add(bool(answers["run"][0]))
    assert given == {False, True}, "the runs are to differ in it"


STARTS = [
    {"critic": "adapter", "critic_init": "policy"},
    {"critic": "adapter", "critic_init": "zero"},
    {"critic": "adapter"},
    {"critic": "shared"},
    {"advantage_estimator": "rloo", "num_generations": 2},
]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("layers", ["all", "top-1", "top-2"])
@pytest.mark.parametrize("train_layers", ["all", "top-1"])
@pytest.mark.parametrize("start", STARTS)
def test_the_plan_counts_the_trunks_that_a_run_keeps(tmp_path, start, train_layers, layers, trained):
    model, core = tiny.arguments(lora_layers=layers), tiny.base()
    config = settings(tmp_path, train_layers=train_layers, **start)
    policy: Any = loading.lora_config(model, core)
    folder = None
    if trained:
        sft = SharedBase.build(tiny.base(), policy)
        tiny.randomise(sft, std=0.1)
        sft.save_pretrained(str(tmp_path / "sft"))
        policy = folder = str(tmp_path / "sft")
    plan = config.role_plan(has_policy=trained, has_reward=False)
    shared = SharedBase.build(
        core, policy, critic=plan.critic, critic_init=plan.critic_init, train_layers=train_layers
    )
    assert Planner(meta_model(model, config=core.config), model, config, policy=folder).roles.trunks == (
        shared.kept_trunks()
    )
