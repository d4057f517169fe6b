"""What vLLM is asked, what is made of its answers, and what is refused. vLLM itself is a stand-in
here; tests/end_to_end/test_vllm_engine.py has the real one."""

import random
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_runs
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_runs import config, even_share, logged
from transformers import AutoModelForCausalLM, AutoTokenizer

from goose_lora.cli import stage
from goose_lora.data.rows import DataArguments
from goose_lora.generation.sampling import generation_config
from goose_lora.generation.vllm import VLLMEngine
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo.collector import RolloutCollector
from goose_lora.rewards.sources import RewardMix

TEMPERATURE, TOKENS = 0.7, 5
B = {name: place + 4 for place, name in enumerate(tiny.WORDS)}  # words by their ids


class StandIn:
    """vllm.LLM, which notes what it is asked and answers ``script``, (ids, why they end) for each
    prompt, or other ids to each."""

    script: Any = None
    refusal = ""

    def __init__(self, model, **settings):
        self.settings, self.events, self.asked, self.loaded = settings, [], [], {}
        self.base = AutoModelForCausalLM.from_pretrained(model)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.llm_engine = self
        torch.manual_seed(0), random.seed(0), np.random.seed(0)  # as vLLM does when it starts

    def add_lora(self, request):
        if self.refusal:
            raise ValueError(self.refusal)
        self.events.append("add")
        self.loaded[request.lora_int_id] = load_file(f"{request.lora_path}/adapter_model.safetensors")
        self.config = LoraConfig.from_pretrained(request.lora_path)

    def remove_lora(self, number):
        self.events.append("remove")
        del self.loaded[number]

    def generate(self, prompts, parameters, *, lora_request, use_tqdm):
        self.events.append("generate")
        torch.rand(7)
        self.asked.append(
            ([prompt["prompt_token_ids"] for prompt in prompts], parameters, lora_request, dict(self.loaded))
        )
        lengths = [given["max_tokens"] for given in parameters]
        script = StandIn.script or [
            ([4 + row * (place + 1) % 50 for place in range(n)], "length") for row, n in enumerate(lengths)
        ]
        assert len(script) == len(prompts) == len(parameters)
        return [SimpleNamespace(outputs=[answer(ids, why)]) for ids, why in script]

    def sleep(self, level):
        self.events.append(f"sleep {level}")

    def wake_up(self):
        self.events.append("wake")


def answer(ids, why):
    logprobs = [{token: SimpleNamespace(logprob=-float(place + 1))} for place, token in enumerate(ids)]
    return SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason=why)


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    monkeypatch.setattr(StandIn, "script", None)
    monkeypatch.setattr(StandIn, "refusal", "")
    package, platforms, request = (
        ModuleType("vllm"),
        ModuleType("vllm.platforms"),
        ModuleType("vllm.lora.request"),
    )
    package.LLM, package.SamplingParams = StandIn, lambda **given: given
    platforms.current_platform = SimpleNamespace(device_type="cpu")
    request.LoRARequest = lambda name, number, path: SimpleNamespace(
        lora_name=name, lora_int_id=number, lora_path=path
    )
    for module in (package, platforms, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "")
    return platforms.current_platform


@pytest.fixture(scope="module")
def shared():
    made = tiny.shared(tiny.base())
    tiny.randomise(made, "default")
    return made


def start(shared, **changes):
    how = {"rows": 8, "prompt_tokens": 11, "memory_share": 0.25} | changes
    generation = generation_config(
        response_tokens=TOKENS, temperature=TEMPERATURE, eos_token_ids=[tiny.EOS, 9], pad_token_id=tiny.PAD
    )
    return VLLMEngine(shared, tiny.tokenizer(), generation, **how)


def test_vllm_is_asked_for_the_policy_at_the_temperature_and_nothing_else(shared):
    engine = start(shared, stop_strings=["ba be"])
    assert engine.llm.settings == {
        "dtype": "float32",
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": 8,
        "max_num_seqs": 8,
        "max_model_len": 16,
        "gpu_memory_utilization": 0.25,
        "enable_sleep_mode": False,
    }
    torch.manual_seed(1)
    seeds = torch.randint(2**31, (3,)).tolist()
    torch.manual_seed(1)
    ids, mask = tiny.batch()
    engine.sample(ids, mask)
    engine.sample(ids, mask, greedy=True)
    (prompts, sampled, _, _), (_, greedy, _, _) = engine.llm.asked
    assert prompts == [row[-n:].tolist() for row, n in zip(ids, (11, 7, 9), strict=True)]
    same = {
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stop_token_ids": [tiny.EOS, 9],
        "stop": ["ba be"],
        "detokenize": True,
        "skip_special_tokens": False,
        "logprobs": 0,
    }
    assert sampled == [same | {"temperature": TEMPERATURE, "seed": seed} for seed in seeds]
    assert greedy == [same | {"temperature": 0.0, "seed": None}] * 3


def test_the_base_that_vllm_reads_is_the_one_here_without_adapters(shared):
    ids, mask = tiny.batch()
    engine = start(shared)
    with torch.no_grad(), shared.role("base") as base:
        want = base(input_ids=ids, attention_mask=mask).logits
    with torch.no_grad():
        assert torch.equal(engine.llm.base(input_ids=ids, attention_mask=mask).logits, want)
        with shared.role("policy") as policy:
            assert not torch.allclose(policy(input_ids=ids, attention_mask=mask).logits, want)
    assert engine.llm.tokenizer("ba be").input_ids == tiny.tokenizer()("ba be").input_ids


def test_each_rollout_has_the_adapter_as_it_is_under_a_number_of_its_own():
    shared = tiny.shared(tiny.base())
    engine = start(shared)
    for seed in (5, 6):
        tiny.randomise(shared, "default", seed=seed)
        engine.sample(*tiny.batch())
    (_, _, one, first), (_, _, two, second) = engine.llm.asked
    assert len({one.lora_int_id, two.lora_int_id}) == len({one.lora_name, two.lora_name}) == 2
    now = {name.replace(".default", ""): p for name, p in shared.role_parameters("policy")}
    assert (
        second.keys() == {two.lora_int_id} and first.keys() == {one.lora_int_id} and engine.llm.loaded == {}
    )
    assert second[two.lora_int_id].keys() == now.keys()
    assert all(torch.equal(x, now[name]) for name, x in second[two.lora_int_id].items())
    assert not any(torch.equal(x, now[name]) for name, x in first[one.lora_int_id].items())
    assert engine.llm.config.r == 3 and engine.llm.config.lora_alpha == 6


def test_replies_stand_behind_left_padded_prompts_and_each_counts_to_its_end(shared):
    engine = start(shared)
    StandIn.script = [([20, tiny.PAD, tiny.EOS], "stop"), ([20, 21, 22, 23], "length"), ([9], "stop")]
    ids, mask = tiny.batch()
    rollout = engine.sample(ids, mask)
    assert rollout.input_ids[:, :11].equal(ids) and rollout.attention_mask[:, :11].equal(mask)
    assert rollout.input_ids[:, 11:].tolist() == [[20, 0, 2, 0], [20, 21, 22, 23], [9, 0, 0, 0]]
    assert (
        rollout.response_mask.long().tolist()
        == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
        == rollout.attention_mask[:, 11:].tolist()
    )
    assert rollout.ended.tolist() == [True, False, True] and rollout.trunk is None
    assert rollout.sampling_logprobs.tolist() == [[-1, -2, -3, 0], [-1, -2, -3, -4], [-1, 0, 0, 0]]


def test_a_stop_text_that_vllm_sees_late_or_alone_ends_the_reply(shared):
    """The first reply has it two tokens before the end, the second where vLLM, which decodes in
    another way, says that one is there."""
    engine = start(shared, stop_strings=["ba be"])
    StandIn.script = [
        ([B["bi"], B["ba"], B["be"], B["bo"], B["bu"]], "length"),
        ([B["bi"], B["ba"]], "stop"),
        ([B["be"], tiny.EOS], "stop"),
    ]
    rollout = engine.sample(*tiny.batch())
    assert (
        rollout.lengths.tolist() == [3, 2, 2]
        and rollout.ended.tolist() == [True, True, True]
        and rollout.response_tokens == 3
    )


def test_training_draws_the_numbers_that_it_would_have_drawn(shared):
    def drawn(work):
        torch.manual_seed(4), random.seed(4), np.random.seed(4)
        work()
        return torch.rand(2).tolist(), random.random(), np.random.rand()

    engine = start(shared)
    assert drawn(lambda: start(shared)) == drawn(lambda: None)
    assert drawn(lambda: engine.sample(*tiny.batch(), greedy=True)) == drawn(lambda: None)
    assert drawn(lambda: engine.sample(*tiny.batch())) == drawn(lambda: torch.randint(2**31, (3,)))


def test_on_a_gpu_it_wakes_for_a_rollout_and_sleeps_again_errors_included(shared):
    engine = start(shared)
    engine._sleeps, engine.llm.events = True, []
    engine.sample(*tiny.batch())
    assert engine.llm.events == ["wake", "add", "generate", "remove", "sleep 1"]
    StandIn.script, engine.llm.events = [([20], "length")], []
    with pytest.raises(AssertionError):
        engine.sample(*tiny.batch())
    assert engine.llm.events == ["wake", "add", "generate", "remove", "sleep 1"]


def test_log_probabilities_that_are_not_finite_end_the_run(shared):
    StandIn.script = [([20, 21], "length")] * 3
    engine = start(shared)
    broken = answer([20, 21], "length")
    broken.logprobs[1][21].logprob = float("nan")
    engine.llm.generate = lambda *args, **kwargs: [
        SimpleNamespace(outputs=[x]) for x in (answer([20], "length"), broken, broken)
    ]
    with pytest.raises(ValueError, match="not finite in 2 of 3 replies"):
        engine.sample(*tiny.batch())


def test_a_prompt_that_vllm_has_no_room_for_is_refused_by_its_length(shared):
    with pytest.raises(ValueError, match="a prompt of 11 tokens, and rollout_engine: vllm has room for 10"):
        start(shared, prompt_tokens=10).sample(*tiny.batch())


def test_without_vllm_the_error_says_how_to_get_it_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    args = config(tmp_path, rollout_engine="vllm")
    with pytest.raises(ValueError, match=r"vllm is not installed\. pip install vllm, then"):
        stage.Stage.begin("ppo", args, ModelArguments("nowhere"), DataArguments("rows.jsonl"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "plain LoRA on linear layers only"),
        ({"lora_bias": True}, "plain LoRA on linear layers only"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "plain LoRA on linear layers only"),
        ({"r": 600}, "lora_r=600: vLLM takes adapters up to rank 512"),
    ],
)
def test_an_adapter_that_vllm_cannot_hold_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        start(
            SharedBase.build(
                tiny.base(), LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"]} | changes)
            )
        )


def test_room_is_made_for_the_largest_rank():
    policy = LoraConfig(
        task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 17}
    )
    assert start(SharedBase.build(tiny.base(), policy)).llm.settings["max_lora_rank"] == 32


def test_what_vllm_says_against_an_adapter_or_a_device_is_passed_on(shared, vllm):
    StandIn.refusal = "expected target modules in {'qkv_proj'}"
    with pytest.raises(
        ValueError,
        match=(
            r"does not load the policy's adapter: expected target modules .*Use rollout_engine: transformers"
        ),
    ):
        start(shared)
    vllm.device_type = "cuda"
    with pytest.raises(ValueError, match="which runs on cuda here, and the base is on cpu"):
        start(shared)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout_weights": "dense"}, "rollout_weights=dense: rollout_engine: vllm has weights of its own"),
        ({"temperature": 0.001}, "temperature=0.001: vLLM takes 0.01"),
        ({"vllm_memory_share": 1.0}, "vllm_memory_share=1.0: must lie between 0 and 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, rollout_engine="vllm", **changes)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("goose_lora.ppo.config.PPOConfig.world_size", 2)
    with pytest.raises(ValueError, match="rollout_engine=vllm: serves one process, not 2"):
        config(tmp_path, rollout_engine="vllm")
    assert config(tmp_path).rollout_engine == "transformers"


def test_all_rollouts_of_a_run_are_vllms_and_the_gap_to_its_log_probabilities_is_logged(
    tmp_path, monkeypatch
):
    rows = tiny_runs.prompt_rows()
    monkeypatch.setattr("goose_lora.ppo.collector.sample", None)
    run = tiny_runs.trainer(
        tmp_path,
        rows=rows,
        rollout_engine="vllm",
        max_prompt_tokens=7,
        eval_strategy="steps",
        eval_steps=4,
        eval_rows=rows,
    )
    run.train()
    llm = run.collector.engine.llm
    assert (
        llm.settings["max_model_len"] == 7 + 6
        and llm.settings["max_num_seqs"] == 16
        and run.collector.dense is None
    )
    # Scale, rollouts, and after each 4 groups to evaluate, sampled and greedy
    assert len(llm.asked) == 1 + 2 + 2 * 2 * 4 and llm.loaded == {}
    assert [row["rollout/sampling_gap"] > 0.1 for row in logged(tmp_path)] == [True, True]


def test_groups_are_not_cut_for_vllm_which_has_rows_of_its_own(shared):
    engine = start(shared, rows=2)
    own = RolloutCollector(
        shared,
        tiny.tokenizer(),
        engine.generation,
        batch_size=2,
        reward=RewardMix([even_share]),
        engine=engine,
    )
    own.generate(*tiny.batch())
    assert len(engine.llm.asked) == 1
