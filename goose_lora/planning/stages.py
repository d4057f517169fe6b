"""Memory of the stages besides PPO: fine-tuning, reward model, and evaluation."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from goose_lora.models.arguments import ModelArguments
from goose_lora.models.loading import lora_config
from goose_lora.planning.costs import PassCosts
from goose_lora.planning.memory import Plan, Planner
from goose_lora.planning.shapes import FP32, AdapterShape, read_adapter, read_model
from goose_lora.ppo.config import PPOConfig

# TRL's head goes over so many tokens and words at a time (trl.kernels.chunked_logprob).
TILE_TOKENS, TILE_WORDS = 4096, 32768
# In fp32, for each token, while TRL's head reads it: sums over the vocabulary and its results.
_SUMS = 12


@dataclass(frozen=True)
class Tuning:
    """The sizes of a training of one adapter.

    Attributes:
        rows: texts that are read at a time; a pair is two.
        tokens: of the longest.
        words: whether the language-model head reads them all (SFT), or a scalar head each's last.
    """

    rows: int
    tokens: int
    checkpointing: bool
    words: bool


def plan_tuning(core: PreTrainedModel, args: ModelArguments, sizes: Tuning, *, device: str = "cuda") -> Plan:
    """Return the bytes of each phase of recipes/sft.py or recipes/reward.py, by part.

    Args:
        core: the base as a causal language model, on the meta device. As a classifier it has no
            language-model head, which counts here where it is not tied.
    """
    model = read_model(core, args, device)
    adapter = read_adapter(lora_config(args, core), model, head=not sizes.words)
    costs = PassCosts(model, PPOConfig(output_dir="unused", use_cpu=True, report_to=[], num_rollouts=1))
    costs.config.gradient_checkpointing = sizes.checkpointing
    base = model.base if sizes.words else model.base - _head_bytes(core, model.compute)

    # One adapter, AdamW's two averages and the gradients, and what the backward pass needs
    number = FP32 * (adapter.trained + adapter.head)
    activations, logits = _backward(costs, adapter, sizes)
    return Plan(
        {
            "load": {"base": base + model.loaded - model.base, "activations": model.largest_weight},
            "update": {
                "base": base,
                "adapters": FP32 * adapter.with_head,
                "optimizer": 3 * number,
                "activations": activations,
                "logits": max(0, logits - activations),
            },
        }
    )


def _head_bytes(core: PreTrainedModel, compute: int) -> int:
    head, embeddings = core.get_output_embeddings(), core.get_input_embeddings()
    assert head is not None
    return 0 if head.weight is embeddings.weight else head.weight.numel() * compute


def _backward(costs: PassCosts, adapter: AdapterShape, sizes: Tuning) -> tuple[int, int]:
    """Return the bytes at the widest points of the backward pass: in a layer, and in the head."""
    model, rows, tokens = costs.model, sizes.rows, sizes.tokens
    # The final norm keeps its input in fp32
    kept = costs.kept(adapter, rows, tokens) + rows * tokens * FP32 * model.hidden
    again = costs.kept_again(adapter, rows, tokens)
    in_layer = kept + again + costs.backward(rows, tokens)
    if not sizes.words:
        return in_layer, 0

    # The head keeps its states, and has a tile of logits and their gradient in fp32
    states = rows * tokens * model.states * (2 * model.compute + FP32)
    tile = min(rows * tokens, TILE_TOKENS) * TILE_WORDS * model.compute
    return in_layer, kept + states + tile + _SUMS * FP32 * rows * tokens


def plan_evaluation(
    core: PreTrainedModel,
    args: ModelArguments,
    *,
    batch_size: int,
    prompt_tokens: int,
    response_tokens: int,
    device: str = "cuda",
) -> Plan:
    """Return the plan of recipes/evaluate.py, without a dense copy: PPO's phases but the update.

    SFT, policy and reward model are adapters on the base, and nothing trains.
    """
    config = PPOConfig(
        output_dir="unused",
        use_cpu=True,
        report_to=[],
        num_rollouts=1,
        per_device_train_batch_size=batch_size,
        local_rollout_forward_batch_size=batch_size,
        max_prompt_tokens=prompt_tokens,
        response_length=response_tokens,
        critic="shared",
        score_normalization="none",
        max_tokens_per_microbatch=1,
        reuse_trunk=False,
        rollout_weights="shared",
    )
    planner = Planner(core, args, config, policy="sft", reward="reward", device=device)
    plan = planner.plan()
    phases = {phase: plan.phases[phase] | {"optimizer": 0} for phase in ("load", "generate", "score")}
    # One role's states at a time, where PPO has two
    model = planner.model
    states = batch_size * (prompt_tokens + response_tokens) * model.hidden * model.compute
    phases["score"]["activations"] -= states
    return Plan(phases)
