"""The plan of ``goose-lora plan`` against measured peaks, on real and on fake tensors.

    python benchmarks/memory.py steps
    python benchmarks/memory.py fake
    python benchmarks/memory.py fits
    python benchmarks/memory.py gpu
    python benchmarks/memory.py cards

steps: whole PPO runs of small models; every byte that torch's CPU allocator gives out is counted.
fake: 0.5B to 8B models in nf4; the real forward and backward on tensors that have shapes and no
memory. fits: what the plan says fits into 8, 12, 16 and 24 GB with checkpointing, and the fake
update at that size. gpu: rollout and update of these models with random weights on a GPU, and the
peak of CUDA's caching allocator. cards: the picture of what PPO by the files of consumer_gpu/ takes
of the card that each is for, docs/images/memory_by_card.svg.

Fake tensors stand on the CPU; that PEFT casts inputs there, and not on a GPU, is put right. What a
kernel takes inside itself does not show.
Prints tables: what the plan says, what was measured (MB of 10^6 bytes), and the error.
"""

import argparse
import gc
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo
import transformers.masking_utils
import trl.kernels.chunked_logprob
import yaml
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    PreTrainedTokenizerFast,
)
from trl.trainer.utils import add_fused_lm_head

from goose_lora.functional import token_logprobs
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.compatibility import meta_model
from goose_lora.models.loading import adapters_to_fp32, load_base, load_tokenizer, lora_config
from goose_lora.models.role_outputs import before_response
from goose_lora.models.shared_base import SharedBase
from goose_lora.planning.memory import Plan, Planner
from goose_lora.planning.stages import Tuning, plan_evaluation, plan_tuning
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.trainer import PPOTrainer

torch._dynamo.config.disable = True

PHASES: tuple[str, ...] = ("generate", "score", "update")
SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 768,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Shapes of Qwen2.5-0.5B, Qwen3-1.7B, Qwen2.5-3B and Llama-3.1-8B.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "0.5B": (
        "qwen2",
        {
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
        },
    ),
    "1.7B": (
        "qwen3",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "intermediate_size": 6144,
        },
    ),
    "3B": (
        "qwen2",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "intermediate_size": 11008,
        },
    ),
    "8B": (
        "llama",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
        },
    ),
}
REST = {
    "qwen2": {"vocab_size": 151936, "tie_word_embeddings": True},
    "llama": {"vocab_size": 128256, "tie_word_embeddings": False},
}
REST["qwen3"] = REST["qwen2"] | {"head_dim": 128}
LONG = {"max_prompt_tokens": 512, "response_length": 256, "rollout_weights": "shared"}


def shape(name: str) -> Any:
    architecture, sizes = MODELS[name]
    return AutoConfig.for_model(architecture, **sizes, **REST[architecture])


# The shapes of the models in recipes/configs/consumer_gpu/: layers, width, heads, inner width
QWEN3 = {"num_key_value_heads": 8, **REST["qwen3"]}
LLAMA = {"num_key_value_heads": 8, **REST["llama"]}
UNTIED = {"tie_word_embeddings": False}
NAMED: dict[str, tuple[str, tuple[int, int, int, int], dict[str, Any]]] = {
    "Qwen/Qwen2.5-1.5B-Instruct": (
        "qwen2",
        (28, 1536, 12, 8960),
        REST["qwen2"] | {"num_key_value_heads": 2},
    ),
    "Qwen/Qwen3-0.6B": ("qwen3", (28, 1024, 16, 3072), QWEN3),
    "Qwen/Qwen3-1.7B": ("qwen3", (28, 2048, 16, 6144), QWEN3),
    "Qwen/Qwen3-4B": ("qwen3", (36, 2560, 32, 9728), QWEN3),
    "Qwen/Qwen3-8B": ("qwen3", (36, 4096, 32, 12288), QWEN3 | UNTIED),
    "Qwen/Qwen3-14B": ("qwen3", (40, 5120, 40, 17408), QWEN3 | UNTIED),
    "meta-llama/Llama-3.1-8B": ("llama", (32, 4096, 32, 14336), LLAMA),
    "mistralai/Mistral-Small-24B-Base-2501": (
        "mistral",
        (40, 5120, 32, 32768),
        LLAMA | {"vocab_size": 131072, "head_dim": 128},
    ),
}
CONSUMER = Path(__file__).resolve().parents[1] / "recipes" / "configs" / "consumer_gpu"
# Those for PPO, with the bytes of the card. One that is sold as 12 GB has 12 GiB
FOR_CARDS = {
    "8gb/ppo": 8 * 10**9,
    "12gb/ppo": 12 * 10**9,
    "16gb/ppo": 16 * 10**9,
    "24gb/ppo": 24 * 10**9,
    "ppo_8b_8gb": 8 * 10**9,
    "ppo_8b": 12 * 10**9,
    "ppo_14b_12gb": 12 * 2**30,
    "ppo_24b_24gb": 24 * 10**9,
}


def shape_of_named(name: str, layers: int | None = None) -> Any:
    """The shape of a model of consumer_gpu/, with fewer layers if so asked."""
    architecture, (number, hidden, heads, inner), rest = NAMED[name]
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": inner}
    return AutoConfig.for_model(architecture, **rest | sizes, num_hidden_layers=layers or number)


def model_of(given: dict[str, Any]) -> ModelArguments:
    """The settings of the model, of those in a configuration."""
    known = ModelArguments.__dataclass_fields__
    return ModelArguments(**{name: value for name, value in given.items() if name in known})


def config_of(given: dict[str, Any], **changes: Any) -> PPOConfig:
    """Those of PPO, on a machine without a GPU; of the model, they have no say here."""
    others = {name: value for name, value in given.items() if name in PPOConfig.__dataclass_fields__}
    return PPOConfig(**others | {"use_cpu": True} | changes)


def settings(folder: str | Path, **changes: Any) -> PPOConfig:
    return PPOConfig(
        output_dir=str(folder),
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **{
            "use_cpu": True,
            "num_rollouts": 2,
            "score_normalization": "none",
            "sample_rows": 0,
            "gradient_accumulation_steps": 1,
            "num_ppo_epochs": 1,
        }
        | changes,
    )


# ---- Real steps ----


def small_model(folder: Any, architecture: str = "llama", **changes: Any) -> Any:
    """Write a small model and its tokenizer; return the tokenizer."""
    # Activations are most of its memory, as in a large one.
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SMALL | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = words(config.vocab_size)
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def words(number: int) -> Any:
    inner = Tokenizer(models.WordLevel({f"<{index}>": index for index in range(number)}, unk_token="<3>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<0>", bos_token="<1>", eos_token="<2>", padding_side="left"
    )


def ready_run(
    tokenizer: Any,
    model: ModelArguments,
    config: PPOConfig,
    reward: Path | None,
    inside: Callable[[str], Any],
) -> PPOTrainer:
    """Return a PPO run whose prompts and replies have full length, as the plan assumes.

    Each phase of it runs inside of what ``inside`` makes of the phase's name.
    """
    base = load_base(model, tokenizer, device=config.device)
    plan = config.role_plan(has_policy=False, has_reward=reward is not None)
    shared = SharedBase.build(
        base,
        lora_config(model, base),
        reward=reward,
        critic=plan.critic,
        critic_init=plan.critic_init,
    )
    generator, longest = torch.Generator().manual_seed(1), config.max_prompt_tokens
    rows = [
        torch.randint(4, len(tokenizer), (longest - row % 3,), generator=generator).tolist()
        for row in range(config.rollout_batch_size)
    ]
    function = None if reward is not None else zero_reward
    trainer = PPOTrainer(
        shared, config, Dataset.from_dict({"input_ids": rows}), tokenizer, reward_function=function
    )
    trainer.collector.generation.eos_token_id = [len(tokenizer) + 1]
    for owner, method, phase in (
        (trainer.collector, "generate", "generate"),
        (trainer, "make_experience", "score"),
        (trainer, "compute_loss", "update"),
        (trainer.accelerator, "backward", "update"),
    ):
        _mark(owner, method, phase, inside)
    return trainer


def zero_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [0.0] * len(completion_ids)


def measured_steps(
    folder: Path, tokenizer: Any, model: ModelArguments, config: PPOConfig
) -> tuple[Plan, dict[str, int]]:
    """Return the plan of a PPO run with critic and reward adapter, and its phases' peak bytes.

    A peak is what the model holds, and what torch's allocator gave out besides.
    """
    gc.collect()  # what an earlier run left would be freed during this one
    reward = folder / f"reward_{model.lora_layers}"
    if not reward.exists():
        judge = AutoModelForSequenceClassification.from_pretrained(model.model_name_or_path, num_labels=1)
        get_peft_model(judge, lora_config(model, judge, "SEQ_CLS")).save_pretrained(str(reward))
    trainer = ready_run(tokenizer, model, config, reward, lambda phase: record_function(f"phase:{phase}"))
    shared = trainer.shared
    resident = storage_bytes(
        shared, *([] if trainer.collector.dense is None else [trainer.collector.dense.model])
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        trainer.train()
    plan = Planner(meta_model(model), model, config, reward=str(reward), device="cpu").plan()
    return plan, _peaks(trace, resident)


def _mark(owner: Any, method: str, phase: str, inside: Callable[[str], Any]) -> None:
    """Let each call of ``method`` be inside of ``inside(phase)``."""
    inner = getattr(owner, method)

    def outer(*args: Any, **kwargs: Any) -> Any:
        with inside(phase):
            return inner(*args, **kwargs)

    setattr(owner, method, outer)


def storage_bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters, buffers and scales of quantization, each storage once."""
    tensors: list[Any] = [
        tensor for module in modules for tensor in (*module.parameters(), *module.buffers())
    ]
    states = [tensor.quant_state for tensor in tensors if type(tensor).__name__ == "Params4bit"]
    tensors += [
        tensor
        for state in states
        for tensor in (state.absmax, state.code, state.state2.absmax, state.state2.code)
    ]
    return sum(
        {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
        }.values()
    )


def _peaks(trace: Any, resident: int) -> dict[str, int]:
    """Highest total of allocated bytes inside each phase."""
    events = sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    spans = [
        (name, e.start_ns(), e.end_ns()) for name in PHASES for e in events if e.name() == f"phase:{name}"
    ]
    total, highest = resident, dict.fromkeys(PHASES, 0)
    for event in events:
        if event.name() == "[memory]":
            total += event.nbytes()
            for name in {name for name, start, end in spans if start <= event.start_ns() <= end}:
                highest[name] = max(highest[name], total)
    return highest


# ---- Real steps on a GPU ----


class Peak(NamedTuple):
    """Most bytes of a phase: of tensors, and of what the caching allocator kept for them."""

    allocated: int = 0
    reserved: int = 0


def measured_gpu(model: ModelArguments, config: PPOConfig) -> tuple[dict[str, int], dict[str, Peak]]:
    """Return the plan of the first rollout of a PPO run, and its phases' peaks on the GPU.

    The run has a critic and no reward adapter. AdamW makes its averages in the first step, after
    all that is measured; they, and nothing else, are left out of the plan.
    """
    peaks = dict.fromkeys(PHASES, Peak())

    @contextmanager
    def inside(phase: str) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats()
        yield
        now = Peak(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
        peaks[phase] = Peak(*map(max, peaks[phase], now))

    gc.collect()
    torch.cuda.empty_cache()
    plan = Planner(meta_model(model), model, config, device="cuda").plan()
    trainer = ready_run(load_tokenizer(model), model, config, None, inside)
    torch.cuda.empty_cache()
    trainer.train()
    averages = plan.phases["generate"]["optimizer"]  # in the update the part has the gradients too
    return {phase: plan.total(phase) - averages for phase in PHASES}, peaks


def random_model(folder: Path, name: str) -> str:
    """Write a model of that shape, and a tokenizer; return the folder.

    Its weights are random, in bfloat16.
    """
    torch.manual_seed(0)
    config = shape(name)
    config.eos_token_id, config.pad_token_id = 2, 0
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words(config.vocab_size).save_pretrained(str(folder))
    return str(folder)


# ---- Fake steps ----


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators have made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
                self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@contextmanager
def as_on(device: str) -> Iterator[LiveBytes]:
    """Make tensors fake inside, and count them; PEFT behaves as on ``device``."""
    masking, tiles, real = transformers.masking_utils, trl.kernels.chunked_logprob, torch.is_autocast_enabled
    kernels = {name: getattr(tiles, name) for name in ("_forward_tile", "_backward_tile", "_addmm_fp32")}
    before = (SharedBase.logprobs, masking._ignore_causal_mask_sdpa)
    try:
        # Fake tensors have no values: which tokens count, and whether there is padding, cannot be
        # asked.
        SharedBase.logprobs = _logprobs_of_all  # type: ignore[method-assign]
        masking._ignore_causal_mask_sdpa = lambda *args, **kwargs: False
        if device == "cuda":
            # PEFT's question, answered as with CUDA; TRL's head works in place there
            torch.is_autocast_enabled = lambda *args: real(*args) if args else True
            for name in kernels:
                setattr(tiles, name, lambda *args, **kwargs: None)
        with FakeTensorMode(), LiveBytes() as live:
            yield live
    finally:
        SharedBase.logprobs, masking._ignore_causal_mask_sdpa = before  # type: ignore[method-assign]
        for name, kernel in kernels.items():
            setattr(tiles, name, kernel)
        torch.is_autocast_enabled = real


def measured_fake_tuning(
    shapes: Any, model: ModelArguments, sizes: Tuning, *, device: str = "cuda"
) -> tuple[Plan, int]:
    """Return the plan of SFT or reward model, and the peak bytes of an update."""
    auto = AutoModelForCausalLM if sizes.words else AutoModelForSequenceClassification
    shapes.num_labels, shapes.pad_token_id = 1, 0
    with torch.device("meta"):
        base = auto.from_config(shapes, dtype=model.torch_dtype).requires_grad_(False)
        _quantize(base, model.torch_dtype)
        if sizes.words:
            add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        task = "CAUSAL_LM" if sizes.words else "SEQ_CLS"
        adapted: Any = get_peft_model(base, lora_config(model, base, task))
    with as_on(device) as live:
        _to_fake(adapted, model.torch_dtype)
        adapters_to_fp32(adapted)
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        held = [(torch.empty_like(p), torch.empty_like(p)) for p in trained]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        adapted.train()
        if sizes.checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.zeros(sizes.rows, sizes.tokens, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        live.peak = live.now
        with torch.autocast("cpu", dtype=model.torch_dtype):
            if sizes.words:
                loss = adapted(**inputs, labels=ids, fused_lm_head=True).loss
            else:
                loss = adapted(**inputs).logits.sum()
        loss.backward()
        assert held
    return plan_tuning(meta_model(model, config=shapes), model, sizes, device=device), live.peak


def measured_fake_evaluation(
    shapes: Any, model: ModelArguments, rows: int, prompt: int, reply: int, *, device: str = "cuda"
) -> tuple[Plan, dict[str, int]]:
    """Return the plan of an evaluation, and the peak bytes of generation and scoring.

    Of generation, the pass over the prompt and the step of the last token.
    """
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(shapes, dtype=model.torch_dtype).eval().requires_grad_(False)
        _quantize(base, model.torch_dtype)
        lora = lora_config(model, base)
        shared = SharedBase.build(base, lora, critic="adapter", critic_init="policy", reference="copy")
    with as_on(device) as live:
        _to_fake(shared, model.torch_dtype)
        ids = torch.zeros(rows, prompt + reply, dtype=torch.long)
        attention, mask = torch.ones_like(ids), torch.ones(rows, reply, dtype=torch.bool)
        with torch.no_grad(), shared.autocast(), shared.role("policy", generating=True) as core:
            live.peak = live.now
            out = core(
                ids[:, :prompt], attention_mask=attention[:, :prompt], logits_to_keep=1, use_cache=True
            )
            generated = live.peak
            del out
            # The cache as it is before the last token
            cache = DynamicCache(config=shapes)
            heads, size = shapes.num_key_value_heads, shapes.head_dim
            for layer in range(shapes.num_hidden_layers):
                part = torch.empty(2, rows, heads, prompt + reply - 1, size, dtype=model.torch_dtype)
                cache.update(part[0].clone(), part[1].clone(), layer)
                del part
            live.peak = live.now
            core(ids[:, -1:], attention_mask=attention, past_key_values=cache, use_cache=True)
            generated = max(generated, live.peak)
            del cache
        live.peak = live.now
        with torch.no_grad():
            for role in ("policy", "reference"):
                shared.logprobs(shared.hidden(role, ids, attention), ids, mask)
            shared.hidden("value", ids, attention)
    plan = plan_evaluation(
        meta_model(model, config=shapes),
        model,
        batch_size=rows,
        prompt_tokens=prompt,
        response_tokens=reply,
        device=device,
    )
    return plan, {"generate": generated, "score": live.peak}


def measured_fake(
    shapes: Any,
    model: ModelArguments,
    config: PPOConfig,
    *,
    device: str = "cuda",
    adapters: Path | None = None,
) -> tuple[Plan, dict[str, int]]:
    """Return the plan, and the peak bytes of scoring and update, with a policy and a critic.

    PEFT behaves as on ``device``. In the folder ``adapters``, an SFT and a reward adapter of zeros
    are written; without it, the policy is fresh and there is no reward model.
    """
    dtype = model.torch_dtype
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(shapes, dtype=dtype).eval().requires_grad_(False)
        if model.quantization == "nf4":
            _quantize(base, dtype)
        policy = reward = None
        if adapters is not None:
            policy, reward = (saved_zeros(adapters, shapes, model, task) for task in ("CAUSAL_LM", "SEQ_CLS"))
        critic = config.role_plan(has_policy=adapters is not None, has_reward=adapters is not None).critic
        start = "policy" if critic == "adapter" else None
        shared = SharedBase.build(
            base, policy or lora_config(model, base), reward=reward, critic=critic, critic_init=start
        )
    with as_on(device) as live:
        _to_fake(shared, dtype)
        peaks = _fake_step(shared, config, live)
    planned = replace(config, max_tokens_per_microbatch=10**9)  # scored without a graph, as here
    core = meta_model(model, config=shapes)
    return Planner(core, model, planned, policy=policy, reward=reward, device=device).plan(), peaks


def saved_zeros(folder: Path, shapes: Any, model: ModelArguments, task: str) -> str:
    """Write an adapter of zeros for a base of that shape; return its folder."""
    shapes.num_labels, shapes.pad_token_id = 1, 0
    auto = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    with torch.device("meta"):
        base = auto.from_config(shapes, dtype=model.torch_dtype)
        adapted: Any = get_peft_model(base, lora_config(model, base, task))
    tensors = get_peft_model_state_dict(adapted)
    target = folder / task
    adapted.peft_config["default"].save_pretrained(str(target))
    with torch.device("cpu"):
        zeros = {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}
    save_file(zeros, target / "adapter_model.safetensors")
    return str(target)


def _fake_step(shared: SharedBase, config: PPOConfig, live: LiveBytes) -> dict[str, int]:
    rows, tokens = config.per_device_train_batch_size, config.response_length
    trained = [parameter for parameter in shared.parameters() if parameter.requires_grad]
    held = [(torch.empty_like(p), torch.empty_like(p)) for p in trained]
    ids = torch.zeros(rows, config.max_prompt_tokens + tokens, dtype=torch.long)
    attention, mask = torch.ones_like(ids), torch.ones(rows, tokens, dtype=torch.bool)
    live.peak = live.now
    with torch.no_grad():
        trunk = shared.trunks(ids, attention, ["policy"])["policy"] if config.reuse_trunk else None
        features = None
        if shared.critic == "reward_features":
            features = before_response(shared.hidden("reward", ids, attention, trunk), mask).clone()
        reference = shared.hidden("reference", ids, attention, trunk)
        shared.logprobs(reference, ids, mask)
        shared(ids, attention, mask, trunk=trunk, features=features)
    scored = live.peak
    del reference
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    if config.gradient_checkpointing:
        shared.gradient_checkpointing_enable()
    shared.train()
    live.peak = live.now
    part = None if trunk is None else trunk[torch.arange(rows)]  # as a microbatch takes it
    out = shared(
        ids, attention, mask, trunk=part, features=features, entropy_gradient=config.entropy_coef > 0
    )
    (out.logprobs.sum() + (0.0 if out.values is None else out.values.sum())).backward()
    assert held
    return {"score": scored, "update": live.peak}


def _logprobs_of_all(
    self: Any,
    hidden: Any,
    input_ids: Any,
    response_mask: Any,
    *,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
) -> tuple[Any, Any]:
    """``SharedBase.logprobs`` where all tokens count."""
    head, tokens, wide = (
        self.get_base_model().get_output_embeddings(),
        response_mask.shape[1],
        hidden.shape[-1],
    )
    states, ids = before_response(hidden, response_mask).reshape(-1, wide), input_ids[:, -tokens:].reshape(-1)
    logprobs, entropies = token_logprobs(
        states, ids, head.weight, head.bias, temperature=temperature, entropy_gradient=entropy_gradient
    )
    return logprobs.view(response_mask.shape), entropies.view(response_mask.shape)


def _quantize(base: Any, dtype: torch.dtype) -> None:
    """Put 4-bit layers, still without weights, in the place of linear ones."""
    base.is_loaded_in_4bit = True  # what PEFT looks at
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and module is not base.get_output_embeddings():
            new = Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=dtype,
                quant_type="nf4",
            )
            new.weight.requires_grad_(False)
            new.bias = module.bias
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, new)


def _to_fake(shared: SharedBase, dtype: torch.dtype) -> None:
    """Give every parameter and buffer, and the scales of quantization, a fake tensor on the CPU."""
    made: dict[int, nn.Parameter] = {}

    def fresh(old: Any) -> nn.Parameter:
        if id(old) not in made:
            made[id(old)] = nn.Parameter(
                torch.empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad
            )
        return made[id(old)]

    for module in shared.modules():
        if isinstance(module, Linear4bit):
            _pack(module, dtype)
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not (isinstance(module, Linear4bit) and name == "weight"):
                module._parameters[name] = fresh(parameter)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _pack(module: Any, dtype: torch.dtype) -> None:
    """Make a 4-bit layer as bitsandbytes has it after loading."""
    # Packed numbers, 8-bit scales, and the scales' scales.
    out, into = module.out_features, module.in_features
    blocks = out * into // 64
    second = QuantState(
        absmax=torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32
    )
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        shape=torch.Size((out, into)),
        code=torch.empty(16),
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()),
        state2=second,
    )
    del module._parameters["weight"]
    module.weight = nn.Parameter(torch.empty(out * into // 2, 1, dtype=torch.uint8), requires_grad=False)
    module.forward = lambda x: matmul_4bit(
        x.to(dtype), module.weight.data, bias=module.bias, quant_state=state
    ).to(x.dtype)


# ---- Tables ----


def line(name: str, plan: Plan, peaks: dict[str, int]) -> str:
    return f"| {name} | " + " | ".join(cell(plan.total(phase), peak) for phase, peak in peaks.items()) + " |"


def cell(planned: int, peak: int) -> str:
    return f"{planned / 1e6:.1f} / {peak / 1e6:.1f} ({100 * (planned / peak - 1):+.1f} %)"


def steps() -> None:
    print(
        "| run | " + " | ".join(f"{phase}: plan / measured" for phase in PHASES) + " |\n|---|---|---|---|",
        flush=True,
    )
    common = {
        "per_device_train_batch_size": 8,
        "max_prompt_tokens": 32,
        "response_length": 32,
        "local_rollout_forward_batch_size": 8,
    }
    runs: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("fp32", {"quantization": "none"}, {"rollout_weights": "shared"}),
        (
            "fp32, checkpointing",
            {"quantization": "none"},
            {"rollout_weights": "shared", "gradient_checkpointing": True},
        ),
        (
            "fp32, top-2, dense copy",
            {"quantization": "none", "lora_layers": "top-2"},
            {"rollout_weights": "dense", "num_mini_batches": 2},
        ),
        (
            "fp32, reward_features, 24 rows",
            {"quantization": "none", "lora_layers": "top-2"},
            {"rollout_weights": "shared", "critic": "reward_features", "num_mini_batches": 3},
        ),
        (
            "fp32, 128 tokens, critic: shared",
            {"quantization": "none"},
            {"rollout_weights": "shared", "critic": "shared", "response_length": 96},
        ),
        ("nf4, fp32", {}, {"rollout_weights": "shared"}),
        ("nf4, bf16", {"dtype": "bfloat16"}, {"rollout_weights": "shared"}),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = small_model(folder / "base")
        for title, model, config in runs:
            chosen: dict[str, Any] = {"dtype": "float32", **model}
            arguments = ModelArguments(str(folder / "base"), **chosen)
            print(
                line(
                    title,
                    *measured_steps(
                        folder, tokenizer, arguments, settings(folder / "run", **common | config)
                    ),
                ),
                flush=True,
            )


def fake() -> None:
    print("| update | score: plan / measured | update: plan / measured |\n|---|---|---|", flush=True)
    for name in MODELS:
        for rows, changes, layers in (
            (4, {}, "top-8"),
            (2, {}, "all"),
            (8, {"gradient_checkpointing": True}, "all"),
        ):
            config = settings(
                "unused",
                per_device_train_batch_size=rows,
                local_rollout_forward_batch_size=rows,
                **LONG,
                **changes,
            )
            how = f"{name}, {rows} rows, {layers}{', checkpointing' if changes else ''}"
            print(
                line(how, *measured_fake(shape(name), ModelArguments(name, lora_layers=layers), config)),
                flush=True,
            )


def fits() -> None:
    print(
        "| model | memory | largest microbatch | rollout group | update there: plan / measured"
        " |\n|---|---|---|---|---|",
        flush=True,
    )
    for name in MODELS:
        model = ModelArguments(name)
        core = meta_model(model, config=shape(name))
        for gigabytes in (8, 12, 16, 24):
            common = LONG | {"gradient_checkpointing": True, "score_normalization": "reference"}
            largest = Planner(core, model, settings("unused", **common)).largest(gigabytes * 10**9)
            rows, group = largest["per_device_train_batch_size"], largest["local_rollout_forward_batch_size"]
            there = "-"
            if rows:
                config = settings(
                    "unused", per_device_train_batch_size=rows, local_rollout_forward_batch_size=1, **common
                )
                plan, peaks = measured_fake(shape(name), model, config)
                there = cell(plan.total("update"), peaks["update"])
            print(f"| {name} | {gigabytes} GB | {rows or '-'} | {group or '-'} | {there} |", flush=True)


# One rollout; parts by tokens, so that it is scored without a graph.
FIRST = {"use_cpu": False, "num_rollouts": 1, "max_tokens_per_microbatch": 10**9}


def gpu() -> None:
    """The first and the last of ``fake``'s sizes."""
    print(
        "| run | "
        + " | ".join(f"{phase}: plan / allocated; reserved" for phase in PHASES)
        + " |\n|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as top:
        for name in MODELS:
            path = random_model(Path(top) / name, name)
            for rows, changes, layers in ((4, {}, "top-8"), (8, {"gradient_checkpointing": True}, "all")):
                sizes = {"per_device_train_batch_size": rows, "local_rollout_forward_batch_size": rows}
                config = settings(Path(top) / "run", **LONG, **FIRST, **sizes, **changes)
                planned, peaks = measured_gpu(ModelArguments(path, lora_layers=layers), config)
                cells = [
                    f"{cell(planned[phase], peak.allocated)}; {peak.reserved / 1e6:.0f}"
                    for phase, peak in peaks.items()
                ]
                how = f"{name}, {rows} rows, {layers}{', checkpointing' if changes else ''}"
                print(f"| {how} | " + " | ".join(cells) + " |", flush=True)


# What a bar is made of, and its colour
PARTS_OF_BAR = {
    "base": (("base",), "#607d8b"),
    "adapters, optimizer": (("adapters", "optimizer"), "#4a7a4f"),
    "activations, logits": (("activations", "logits"), "#c98a3b"),
    "cache, trunk, copy": (("cache", "trunk", "dense copy", "vllm"), "#8d6e9f"),
}


def cards() -> None:
    """A bar a configuration, at the phase that takes most."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "memory"  # the same file each time
    figure, axes = plt.subplots(figsize=(9, 4.4), layout="constrained")
    names = []
    for row, (name, card) in enumerate(FOR_CARDS.items()):
        given = yaml.safe_load((CONSUMER / f"{name}.yaml").read_text())
        model = model_of(given)
        core = meta_model(model, config=shape_of_named(model.model_name_or_path))
        adapters = {"policy": given["policy_adapter"], "reward": given["reward_adapter"]}
        planner = Planner(core, model, config_of(given), memory=card, **adapters)
        plan, left = planner.plan(), 0.0
        parts = plan.phases[plan.phase]
        widths = [sum(parts.get(part, 0) for part in of) for of, _ in PARTS_OF_BAR.values()]
        assert sum(widths) == plan.peak, parts
        bars = [
            (width / 1e9, color, None)
            for width, (_, color) in zip(widths, PARTS_OF_BAR.values(), strict=True)
        ]
        for width, color, hatch in [*bars, ((planner.needed() - plan.peak) / 1e9, "#ffffff", "////")]:
            axes.barh(row, width, left=left, color=color, hatch=hatch, edgecolor="#90a4ae", linewidth=0.5)
            left += width
        axes.plot([card / 1e9] * 2, [row - 0.42, row + 0.42], color="#b3261e", linewidth=2)
        axes.text(card / 1e9 + 0.2, row, f"{left:.1f} of {card / 1e9:.3g} GB", va="center", fontsize=9)
        names.append(f"{name}: {model.model_name_or_path.rpartition('/')[2].removesuffix('-Base-2501')}")
        print(f"{name}: {plan.phase} {plan.peak / 1e9:.2f} GB, with the margin {left:.2f}")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 29)
    axes.set_xlabel("GB on the card, by plan; not measured on a GPU")
    handles = [matplotlib.patches.Patch(color=color, label=name) for name, (_, color) in PARTS_OF_BAR.items()]
    handles.append(
        matplotlib.patches.Patch(
            facecolor="#ffffff", edgecolor="#90a4ae", hatch="////", label="margin: 15 % and 0.6 GB"
        )
    )
    handles.append(plt.Line2D([], [], color="#b3261e", linewidth=2, label="the card"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(CONSUMER.parents[2] / "docs" / "images" / "memory_by_card.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = {"steps": steps, "fake": fake, "fits": fits, "gpu": gpu, "cards": cards}
    parser.add_argument("table", choices=tables)
    tables[parser.parse_args().table]()


if __name__ == "__main__":
    main()
