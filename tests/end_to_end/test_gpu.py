"""What only a GPU shows: that nothing is left on the CPU, CUDA's own quantized kernels, its
generators over a checkpoint, its memory and the plan's.

``make test-gpu``. The other tests run on the CPU on every machine.
"""

import gc
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import matrix
import pytest
import tiny
import tiny_runs
import torch
from datasets import Dataset
from matrix import assert_step
from recipe_runs import count_good, options, recipe
from tiny_runs import assert_same_weights, logged, trainer

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU, and -m gpu", allow_module_level=True)

from peft import PeftModel
from transformers import AutoModelForCausalLM

from goose_lora import cli
from goose_lora.files import read_json
from goose_lora.models.compatibility import meta_model
from goose_lora.models.loading import load_base, load_tokenizer, lora_config
from goose_lora.models.shared_base import SharedBase
from goose_lora.planning.memory import Planner
from goose_lora.ppo import first_step_checks

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
WIDTHS = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "intermediate_size": 128}


def gpu_base(folder, **changes):
    """A base on the GPU whose widths its 4-bit and 8-bit kernels can multiply, and its
    arguments."""
    path = tiny.save_base(folder / "base", **WIDTHS)
    args = tiny.arguments(path, lora_layers="top-2", **changes)
    return load_base(args, load_tokenizer(args), device=CUDA), args


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    architectures = {}

    def get(name, quantization, dtype):
        if name not in architectures:
            architectures[name] = matrix.Architecture(tmp_path_factory.mktemp(name), name)
        return matrix.Base(architectures[name], quantization, dtype, device=CUDA)

    return get


@pytest.mark.parametrize(
    "cell", [cell for cell in matrix.cells(False) if not cell[-1]], ids=lambda cell: "-".join(cell[:-1])
)
def test_a_step_is_finite_trains_policy_and_critic_alone_and_its_views_are_those_of_plain_models(
    cell, base_of, tmp_path
):
    *kind, critic, reference, checkpointing = cell
    shared = assert_step(base_of(*kind), critic, reference, checkpointing, tmp_path)
    assert {p.device.type for p in shared.parameters()} == {"cuda"}


def test_the_gpu_computes_what_the_cpu_computes():
    ids, mask = tiny.batch()
    response, seen = tiny.response_mask(), {}
    for device in ("cpu", "cuda"):
        shared = tiny_runs.fresh().to(device)
        at = [x.to(device) for x in (ids, mask, response)]
        output = shared(*at)
        (output.logprobs.sum() + output.values.sum()).backward()
        gradients = {name: p.grad.cpu() for name, p in shared.named_parameters() if p.grad is not None}
        seen[device] = {
            "logprobs": output.logprobs.detach().cpu(),
            "values": output.values.detach().cpu(),
            **gradients,
        }
    assert len(seen["cpu"]) > 10 and seen["cpu"].keys() == seen["cuda"].keys()
    for name, want in seen["cpu"].items():
        torch.testing.assert_close(seen["cuda"][name], want, rtol=1e-4, atol=1e-5)


HOW = {
    "as it is": {},
    "rloo": {"advantage_estimator": "rloo", "num_generations": 2},
    "grpo, k3 in the loss": {
        "advantage_estimator": "grpo",
        "num_generations": 4,
        "kl_location": "loss",
        "kl_estimator": "k3",
    },
    "exact KL in the loss": {"kl_location": "loss", "kl_estimator": "exact"},
    "adaptive KL": {"kl_target": 1.0, "kl_horizon": 50},
    "running scores": {"score_normalization": "running"},
    "average": {"ema_decay": 0.9},
    "parts": {"max_tokens_per_microbatch": 20},
    "8-bit optimizer": {"optim": "adamw_bnb_8bit"},
    "paged optimizer": {"optim": "paged_adamw_8bit"},
    "checkpointing": {"gradient_checkpointing": True},
    "shared weights": {"rollout_weights": "shared"},
    "dense copy": {"rollout_weights": "dense"},
    "one pass for both": {
        "num_mini_batches": 1,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 16,
    },
    "stop string": {"stop_strings": ["good"]},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 4},
    "entropy, skipping": {"entropy_coef": 0.01, "ratio_threshold": 10.0},
    "whitened, temperature": {"whiten_rewards": True, "temperature": 0.7},
}


@pytest.mark.parametrize("how", HOW)
def test_a_run_goes_through_on_the_gpu_and_trains_what_it_should(how, tmp_path):
    changes = HOW[how]
    alone = changes.get("advantage_estimator") in ("rloo", "grpo")
    shared = tiny_runs.fresh(critic=None if alone else "adapter", average="ema_decay" in changes)
    before = {name: p.detach().cpu().clone() for name, p in shared.named_parameters()}
    rows = tiny_runs.prompt_rows(8) if "eval_strategy" in changes else None
    run = trainer(tmp_path, shared=shared, eval_rows=rows, use_cpu=False, sample_rows=2, **changes)
    run.train()
    assert {p.device.type for p in shared.parameters()} == {"cuda"}
    moved = {name for name, p in shared.named_parameters() if not torch.equal(p.cpu(), before[name])}
    wanted = {
        name
        for name in before
        if ".default." in name or ".value." in name or (".ema." in name and "lora_" in name)
    }
    assert moved == wanted
    rows = logged(tmp_path)
    assert (
        len(rows) == 2
        and all(torch.tensor(list(row.values())).isfinite().all() for row in rows)
        and rows[0]["objective/kl"] == 0
    )


@pytest.mark.parametrize(
    ("quantization", "dtype"), [("none", "float32"), ("nf4", "bfloat16"), ("int8", "bfloat16")]
)
def test_a_toy_reward_rises_and_the_first_ratios_are_one(quantization, dtype, tmp_path):
    base, args = gpu_base(tmp_path, quantization=quantization, dtype=dtype)
    shared = SharedBase.build(base, lora_config(args, base), critic="adapter")
    run = trainer(
        tmp_path,
        shared=shared,
        num_rollouts=14,
        per_device_train_batch_size=16,
        num_ppo_epochs=4,
        use_cpu=False,
    )
    run.train()
    rows = logged(tmp_path)
    rewards = [row["objective/raw_score"] for row in rows]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 0.05, rewards
    assert rows[0]["policy/first_ratio_gap"] < first_step_checks.RATIO_TOLERANCE[getattr(torch, dtype)]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_resuming_at_a_rollouts_end_is_exact(quantization, tmp_path):
    base, args = gpu_base(tmp_path, quantization=quantization)
    ends = []
    for name, resume in (("straight", None), ("resumed", str(tmp_path / "straight" / "checkpoint-8"))):
        torch.manual_seed(0)
        if name == "resumed":
            base, args = gpu_base(tmp_path, quantization=quantization)
        shared = SharedBase.build(base, lora_config(args, base), critic="adapter")
        how = {
            "num_rollouts": 4,
            "save_strategy": "steps",
            "save_steps": 8,
            "kl_target": 1.0,
            "kl_horizon": 50,
            "use_cpu": False,
        }
        run = trainer(tmp_path / name, shared=shared, **how)
        run.train(resume_from_checkpoint=resume)
        ends.append((shared, logged(tmp_path / name, after=8)))
    assert_same_weights(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1] and len(ends[0][1]) == 2


def test_out_of_memory_halves_the_microbatch_and_the_run_goes_on(tmp_path, caplog):
    """With a real allocator at its limit: the update of 32 rows of 500 tokens does not fit, that of
    some fewer does."""
    wide = {
        "hidden_size": 256,
        "head_dim": 64,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "max_position_embeddings": 1024,
    }
    path = tiny.save_base(tmp_path / "base", **wide)
    args = tiny.arguments(path)
    base = load_base(args, load_tokenizer(args), device=CUDA)
    shared = SharedBase.build(base, lora_config(args, base), critic="shared")
    generator = torch.Generator().manual_seed(1)
    rows = Dataset.from_dict(
        {"input_ids": torch.randint(4, tiny.VOCABULARY, (32, 400), generator=generator).tolist()}
    )
    how = {
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": 1,
        "response_length": 100,
        "use_cpu": False,
    }
    how |= {
        "max_prompt_tokens": 400,
        "local_rollout_forward_batch_size": 4,
        "rollout_weights": "shared",
        "critic": "shared",
    }
    run = trainer(tmp_path / "run", shared=shared, rows=rows, reward=tiny_runs.even_share, **how)
    run.collector.generation.eos_token_id = [tiny.VOCABULARY]  # replies of full length
    gc.collect()
    torch.cuda.empty_cache()
    planned = Planner(meta_model(args), args, run.args).plan().total("update")
    torch.cuda.set_per_process_memory_fraction(
        0.6 * planned / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        run.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory with a microbatch of 16000 tokens" in caplog.text
    assert len(logged(tmp_path / "run")) == 2


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """All four recipes with nf4 in bf16, by their own choice of the device: the folder, and the
    bytes of the GPU that each took."""
    taken = {}

    def run(name, **settings):
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        recipe(name).main(options(**settings))
        taken[name] = torch.cuda.max_memory_allocated() - before

    folder = tmp_path_factory.mktemp("run")
    base = tiny.save_base(folder / "base", **WIDTHS)
    data = {
        name: tiny.write_rows(folder / f"{name}.jsonl", getattr(tiny, name)(24))
        for name in ("texts", "preferences", "prompts")
    }
    model = {"model_name_or_path": base, "lora_r": 3, "lora_alpha": 6, "lora_layers": "top-2"}
    train = {
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "learning_rate": 1e-2,
    }
    supervised = model | train | {"bf16": True, "max_steps": 24}
    run("sft", **supervised, dataset_name=data["texts"], output_dir=folder / "sft")
    pairs = {"dataset_name": data["preferences"], "eval_dataset_name": data["preferences"]}
    run("reward", **supervised, **pairs, output_dir=folder / "reward")
    roles = {
        "policy_adapter": folder / "sft",
        "reward_adapter": folder / "reward",
        "dataset_name": data["prompts"],
    }
    ppo = {
        "num_rollouts": 2,
        "num_ppo_epochs": 2,
        "response_length": 5,
        "score_calibration_prompts": 24,
        "gradient_checkpointing": True,
    }
    run("ppo", **model, **train, **ppo, **roles, output_dir=folder / "ppo")
    roles |= {
        "policy_adapter": folder / "ppo",
        "sft_adapter": folder / "sft",
        "judge": f"{count_good.__code__.co_filename}:count_good",
    }
    run(
        "evaluate",
        model_name_or_path=base,
        best_of=2,
        response_length=5,
        output_dir=folder / "evaluation",
        **roles,
    )
    return folder, taken


def test_the_recipes_run_on_the_gpu_and_say_which(stages):
    stages, taken = stages
    assert taken.keys() == {"sft", "reward", "ppo", "evaluate"} and min(taken.values()) > 10**5
    assert read_json(stages / "reward" / "verdict.json")["accuracy"] > 0.9
    assert read_json(stages / "evaluation" / "evaluation.json")["figures"].keys() >= {"base", "sft", "ppo"}
    for stage in ("sft", "reward", "ppo"):
        lineage = read_json(stages / stage / "goose_lora.json")
        assert torch.cuda.get_device_name(0) in str(lineage), stage


def test_an_adapter_from_the_gpu_is_merged_and_loads_with_plain_peft(stages, tmp_path, monkeypatch):
    stages, _ = stages
    monkeypatch.setattr(
        sys, "argv", ["goose-lora", "merge", str(stages / "ppo"), "--out", str(tmp_path / "merged")]
    )
    cli.main()
    args = tiny.arguments(str(stages / "base"), quantization="nf4", dtype="bfloat16")
    adapted = PeftModel.from_pretrained(
        load_base(args, load_tokenizer(args), device=CUDA), str(stages / "ppo")
    ).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").to(CUDA).eval()
    ids, mask = (x.to(CUDA) for x in tiny.batch())
    with torch.no_grad():
        want, got = (
            model(input_ids=ids, attention_mask=mask).logits[mask.bool()].float().softmax(-1)
            for model in (adapted, merged)
        )
    assert (want - got).abs().mean() < 0.01 and (want.argmax(-1) == got.argmax(-1)).float().mean() > 0.8


def test_the_plan_is_within_a_tenth_of_the_allocators_peak_and_the_workspaces_of_cublas(tmp_path):
    """Of a first rollout. On Hopper, torch gives each of cuBLAS' handles some 34 MB, of which there
    may be two."""
    memory = SimpleNamespace(
        **runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"))
    )
    path = memory.random_model(tmp_path / "0.5B", "0.5B")
    sizes = {
        "per_device_train_batch_size": 8,
        "local_rollout_forward_batch_size": 8,
        "max_prompt_tokens": 256,
        "response_length": 32,
    }
    for model, changes in (({"quantization": "none"}, {}), ({}, {"gradient_checkpointing": True})):
        config = memory.settings(tmp_path / "run", **memory.LONG | memory.FIRST | sizes | changes)
        planned, peaks = memory.measured_gpu(memory.ModelArguments(path, **model), config)
        for phase, peak in peaks.items():
            gap = peak.allocated - planned[phase]
            assert -0.1 * peak.allocated < gap < 0.1 * peak.allocated + 68e6, (
                phase,
                planned[phase],
                peak,
                model,
                changes,
            )
