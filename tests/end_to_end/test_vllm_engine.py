"""The real vLLM beside transformers: the same tokens, the same log-probabilities, the policy as it
is now. By ``-m gpu``, or ``make vllm``."""

import importlib.util
import os

import pytest
import tiny
import tiny_runs
import torch
from tiny_runs import assert_same_weights, even_share, logged, prompt_rows

from goose_lora.data.tokenization import left_pad
from goose_lora.generation.sampling import generation_config
from goose_lora.generation.vllm import VLLMEngine
from goose_lora.models.loading import load_base
from goose_lora.ppo.collector import RolloutCollector
from goose_lora.ppo.trainer import PPOTrainer
from goose_lora.rewards.sources import RewardMix

GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="needs vLLM, in an environment of its own: make vllm"
    ),
    *([pytest.mark.gpu] if GPU or torch.version.cuda else []),  # vLLM's build for CUDA needs one
]
DEVICE, DTYPE, TOLERANCE = ("cuda", torch.bfloat16, 0.1) if GPU else ("cpu", torch.float32, 1e-4)
TEMPERATURE, TOKENS = 0.7, 12
# Heads of a size that vLLM's attention has.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 3,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module", autouse=True)
def little_memory():
    """On a CPU vLLM takes its share of all memory for the cache, unless this says how many GiB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def fresh(**roles):
    shared = tiny.shared(
        tiny.base(**SIZES).to(DEVICE, DTYPE),
        **{"layers": "top-2", "critic": "adapter", "reference": "copy"} | roles,
    )
    tiny.randomise(shared, "default", std=0.0)
    shared._copy_role("policy", "reference")
    return shared


def rollouts(shared, engine=None, stop_strings=None):
    how = {
        "batch_size": 8,
        "weights": "shared",
        "reward": RewardMix([even_share]),
        "stop_strings": stop_strings,
    }
    return RolloutCollector(shared, tiny.tokenizer(), sampling(), engine=engine, **how)


def sampling():
    return generation_config(
        response_tokens=TOKENS, temperature=TEMPERATURE, eos_token_ids=[tiny.EOS, 7], pad_token_id=tiny.PAD
    )


def start(shared, stop_strings=None):
    how = {"rows": 32, "prompt_tokens": 16, "memory_share": 0.3, "stop_strings": stop_strings}
    return VLLMEngine(shared, tiny.tokenizer(), sampling(), **how)


@pytest.fixture(scope="module")
def shared():
    made = fresh()
    tiny.randomise(made, "default", std=0.2)
    return made


@pytest.fixture(scope="module")
def engine(shared):
    return start(shared)


def prompts():
    return left_pad(prompt_rows(8)["input_ids"], tiny.PAD, DEVICE)


def gap(shared, rollout):
    """Largest distance between the log-probabilities of sampling and those that the update
    computes."""
    mask = rollout.response_mask
    hidden = shared.hidden("policy", rollout.input_ids, rollout.attention_mask, None)
    own, _ = shared.logprobs(hidden, rollout.input_ids, mask, temperature=TEMPERATURE)
    return (own - rollout.sampling_logprobs)[mask].abs().max().item()


def test_greedy_replies_and_their_log_probabilities_are_those_of_transformers(shared, engine):
    want = rollouts(shared).generate(*prompts(), greedy=True)
    got = rollouts(shared, engine).generate(*prompts(), greedy=True)
    assert got.response_ids() == want.response_ids() and got.ended.tolist() == want.ended.tolist()
    assert (
        got.input_ids.tolist() == want.input_ids.tolist()
        and got.attention_mask.tolist() == want.attention_mask.tolist()
    )
    torch.testing.assert_close(got.sampling_logprobs, want.sampling_logprobs, rtol=0, atol=TOLERANCE)
    assert len({tuple(ids) for ids in got.response_ids()}) > 4 and set(got.ended.tolist()) == {True, False}


def test_sampled_tokens_have_the_log_probability_that_the_update_computes(shared, engine):
    torch.manual_seed(0)
    rollout = rollouts(shared, engine).generate(*prompts())
    assert gap(shared, rollout) < TOLERANCE
    greedy = rollouts(shared, engine).generate(*prompts(), greedy=True)
    assert rollout.response_ids() != greedy.response_ids()


def test_tokens_come_as_often_as_the_policy_says(shared, engine):
    """The first token of 1024 replies to one prompt, by chi-square: its 99.9 % point is that of a
    normal approximation."""
    ids, mask = prompts()
    ids, mask = ids[:1].repeat(1024, 1), mask[:1].repeat(1024, 1)
    torch.manual_seed(1)
    rollout = rollouts(shared, engine).generate(ids, mask)
    first = rollout.input_ids[:, ids.shape[1]].cpu()
    with shared.role("policy") as model, torch.no_grad():
        probabilities = (
            model(input_ids=ids[:1], attention_mask=mask[:1]).logits[0, -1].float().cpu() / TEMPERATURE
        ).softmax(-1)
    expected, counts = 1024 * probabilities, torch.bincount(first, minlength=tiny.VOCABULARY)
    common = expected > 5
    distance = ((counts - expected).square() / expected)[common].sum().item()
    freedom = int(common.sum()) - 1
    assert freedom > 5 and distance < freedom + 3.1 * (2 * freedom) ** 0.5 + 4


def test_the_engine_follows_the_policy_and_does_not_keep_an_old_one(shared, engine):
    own = rollouts(shared, engine)
    before = own.generate(*prompts(), greedy=True)
    kept = {name: p.detach().clone() for name, p in shared.role_parameters("policy")}
    optimizer = torch.optim.AdamW([p for _, p in shared.role_parameters("policy")], lr=0.05)
    for _, parameter in shared.role_parameters("policy"):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.manual_seed(2)
    after = own.generate(*prompts())
    assert gap(shared, after) < TOLERANCE  # by the new policy
    assert own.generate(*prompts(), greedy=True).response_ids() != before.response_ids()
    with torch.no_grad():
        for name, parameter in shared.role_parameters("policy"):
            parameter.copy_(kept[name])
    assert gap(shared, after) > 10 * TOLERANCE  # and not by the old one
    assert own.generate(*prompts(), greedy=True).response_ids() == before.response_ids()
    assert engine.llm.llm_engine.list_loras() == set()


def test_a_seed_gives_the_same_replies_again_and_training_draws_what_it_would_have(shared, engine):
    own, found = rollouts(shared, engine), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append((own.generate(*prompts()).response_ids(), torch.rand(1).item()))
    assert found[0] == found[1] and found[0][0] != found[2][0]
    torch.manual_seed(3)
    torch.randint(2**31, (8,))
    assert found[0][1] == torch.rand(1).item()


def test_a_stop_text_ends_replies_where_it_does_with_transformers(shared):
    """Each text that ends one is two words of what greedy replies say."""
    said = rollouts(shared).generate(*prompts(), greedy=True).response_ids()
    texts = [tiny.tokenizer().decode(said[row][2:4]) for row in (0, 1)]
    want = rollouts(shared, stop_strings=texts).generate(*prompts(), greedy=True)
    got = rollouts(shared, start(shared, texts)).generate(*prompts(), greedy=True)
    assert got.response_ids() == want.response_ids() != said and got.ended.tolist() == want.ended.tolist()


def test_a_4_bit_base_is_sampled_as_it_computes(tmp_path):
    args = tiny.arguments(
        tiny.save_base(tmp_path, **SIZES), quantization="nf4", dtype=str(DTYPE).removeprefix("torch.")
    )
    shared = tiny.shared(load_base(args, tiny.tokenizer(), device=torch.device(DEVICE)))
    tiny.randomise(shared, "default", std=0.2)
    rollout = rollouts(shared, start(shared)).generate(*prompts())
    assert gap(shared, rollout) < TOLERANCE
    whole = tiny.shared(tiny.base(**SIZES).to(DEVICE, DTYPE))
    tiny.randomise(whole, "default", std=0.2)
    assert gap(whole, rollout) > 10 * TOLERANCE


def trainer(folder, shared=None, **changes):
    settings = {
        "rollout_engine": "vllm",
        "use_cpu": not GPU,
        "max_prompt_tokens": 16,
        "per_device_train_batch_size": 4,
    } | changes
    args = tiny_runs.config(folder, **settings)
    return PPOTrainer(shared or fresh(), args, prompt_rows(), tiny.tokenizer(), reward_function=even_share)


def test_ppo_trains_on_its_replies_and_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    saving = {"num_rollouts": 3, "save_strategy": "steps", "save_steps": 4}
    whole = trainer(tmp_path / "whole", **saving)
    whole.train()
    gaps = [row["rollout/sampling_gap"] for row in logged(tmp_path / "whole")]
    assert len(gaps) == 3 and max(gaps) < TOLERANCE
    start = fresh()
    moved = [
        name
        for name, p in start.role_parameters("policy")
        if not torch.equal(p, dict(whole.shared.role_parameters("policy"))[name])
    ]
    assert moved
    again = trainer(tmp_path / "whole", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert_same_weights(whole.shared, again.shared)


@pytest.mark.gpu  # on a CPU vLLM does not sleep
def test_asleep_the_engine_leaves_the_memory_of_its_cache_to_the_update(shared, engine):
    asleep = torch.cuda.mem_get_info()[0]
    with engine._awake():
        awake = torch.cuda.mem_get_info()[0]
    assert asleep - awake > 10**8 and torch.cuda.mem_get_info()[0] == pytest.approx(asleep, abs=10**8)
