"""Every decoder-only class of the installed transformers on a tiny configuration.

    make architectures

For each class: SharedBase.build puts a random adapter on it, and log-probabilities of a padded
batch and of sampled replies are compared with transformers' own forward of each row without
padding, and the gradients of the adapter with those of that forward. Writes the table of
docs/models.md. Exits with 1 if a class is silently wrong.
"""

import contextlib
import datetime
import io
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from goose_lora.errors import UserError
from goose_lora.files import brief
from goose_lora.generation.sampling import generation_config, sample
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.loading import lora_config
from goose_lora.models.roles import ADAPTERS
from goose_lora.models.shared_base import SharedBase

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
TOLERANCE = 1e-3  # nats, of fp32
SLOPE_TOLERANCE = 1e-3  # of the largest gradient, of fp32
WORDS, LENGTHS, TOKENS = 61, (13, 9, 11), 5

# Each class reads what it knows of these
SIZES = {
    "vocab_size": WORDS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 127,
    "initializer_range": 0.25,
    "head_dim": 12,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
PLAIN = {name: SIZES[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
OLD = PLAIN | {"n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 127, "initializer_range": 0.25}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
LATENT |= {"v_head_dim": 12, "num_key_value_heads": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 8, "mamba_n_groups": 1}
INDEX = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 64}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"] * 2}

# Sizes that a class has by other names, or that would not be tiny by default
OWN = {
    "granite": {"logits_scaling": 8.0},
    "granitemoe": {"logits_scaling": 8.0},
    "granitemoeshared": {"logits_scaling": 8.0, "shared_intermediate_size": 16},
    "granitemoehybrid": MAMBA
    | {"logits_scaling": 8.0, "shared_intermediate_size": 32, "num_local_experts": 0}
    | {"layer_types": ["mamba", "attention"] * 2},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "gemma2": {"query_pre_attn_scalar": 12, "final_logit_softcapping": 5.0},
    "gemma3n_text": {"vocab_size_per_layer_input": WORDS, "hidden_size_per_layer_input": 8}
    | {"altup_num_inputs": 2, "laurel_rank": 4, "num_kv_shared_layers": 2, "intermediate_size": [32] * 4}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {"vocab_size_per_layer_input": WORDS, "hidden_size_per_layer_input": 8}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
    | {"global_head_dim": 16},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "qwen3_next": LINEAR | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": LINEAR,
    "olmo_hybrid": LINEAR,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "glm4_moe": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "lfm2": {"block_ff_dim": 32, "layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    "deepseek_v2": LATENT | {"q_lora_rank": None, "first_k_dense_replace": 1},
    "deepseek_v3": LATENT | {"first_k_dense_replace": 1, "head_dim": 8},
    "youtu": LATENT | {"head_dim": 8},
    "minicpm3": LATENT | {"v_head_dim": 16, "dim_model_base": 16},
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4}
    | {"expert_layer_period": 2, "use_mamba_kernels": False},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 12, "n_groups": 1, "expand": 2},
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 4},
    "recurrent_gemma": {"lru_width": 48, "attention_window_size": 5},
    "nanochat": {"final_logit_softcapping": 3.0},
    "vaultgemma": {"final_logit_softcapping": 5.0},
    "phi": {"partial_rotary_factor": 0.5},
    "stablelm": {"partial_rotary_factor": 1.0},
    "opt": {"word_embed_proj_dim": 24, "ffn_dim": 32, "init_std": 0.25},
    "xglm": {"d_model": 48, "num_layers": 4, "attention_heads": 4, "ffn_dim": 32},
    "bloom": {"n_layer": 4, "n_head": 4},
    "jetmoe": {"kv_channels": 12},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 96, "lm_head_multiplier": 0.3},
    "zaya": {"num_experts_per_tok": 1},
    "hy_v4": {"initializer_range": 0.1},  # at 0.25 float32 rounds to 0.001 nats (LOG)
    "blenderbot": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "deepseek_v32": LATENT | {"first_k_dense_replace": 1, "head_dim": 8} | INDEX,
    "glm_moe_dsa": LATENT | {"first_k_dense_replace": 1, "head_dim": 8} | INDEX,
    "glm4_moe_lite": LATENT | {"first_k_dense_replace": 1, "head_dim": 8},
    "axk1": LATENT | {"first_k_dense_replace": 1, "head_dim": 8},
    "longcat_flash": LATENT | {"head_dim": 8, "num_layers": 2, "ffn_hidden_size": 32, "zero_expert_num": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots3_note": {"num_key_value_heads": 4},
    "reformer": {"is_decoder": True},
    "zamba2": MAMBA | {"layers_block_type": ["mamba", "hybrid"] * 2, "layer_types": ["mamba", "hybrid"] * 2},
}
# A cache holds a window for each class whose configuration names one, so that only those have it
MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
for windowed in ("ministral", "cohere2", "exaone4", "gpt_oss", "gemma3n_text", "gemma4_text"):
    OWN[windowed] = OWN.get(windowed, {}) | MIXED
for windowed in ("mistral", "gemma2", "gemma3_text", "olmo3", "cwm", "vaultgemma", "phi3", "starcoder2"):
    OWN[windowed] = OWN.get(windowed, {}) | {"sliding_window": 5}
# Of models that see, the part that reads has the sizes, and the eyes are as small
EYES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EYES |= {"image_size": 28, "patch_size": 14, "depth": 1, "num_heads": 2, "out_hidden_size": 48}
ALONE = {
    "falcon": {
        name: value for name, value in SIZES.items() if name not in ("head_dim", "num_key_value_heads")
    },
    "gpt2": OLD,
    "gptj": OLD | {"rotary_dim": 8},
    "codegen": OLD | {"rotary_dim": 8},
    "gpt_bigcode": OLD,
    "openai-gpt": OLD,
    "gpt_neo": PLAIN
    | {"hidden_size": 48, "num_layers": 4, "num_heads": 4, "window_size": 5, "initializer_range": 0.25}
    | {"attention_types": [[["global", "local"], 2]], "max_position_embeddings": 127},
    "dbrx": PLAIN
    | {"d_model": 48, "n_heads": 4, "n_layers": 4, "max_seq_len": 127, "initializer_range": 0.25}
    | {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0}}
    | {"ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
    "mpt": PLAIN | {"d_model": 48, "n_layers": 4, "n_heads": 4, "max_seq_len": 127},
}


for seeing in ("gemma3", "gemma4", "gemma4_unified", "llama4", "qwen3_5", "qwen3_5_moe"):
    text = SIZES | OWN.get(f"{seeing}_text", {})
    ALONE[seeing] = PLAIN | {"text_config": text, "vision_config": EYES, "audio_config": None}


def tiny_model(kind: str) -> torch.nn.Module:
    """Return a random model of a class, its biases and norms random too."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(ALONE.get(kind) or SIZES | OWN.get(kind, {})))
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 20_000_000:
        raise ValueError(f"its configuration is not tiny here: {size} parameters")
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.dtype.is_floating_point:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def build(kind: str, layers: str) -> SharedBase:
    """Return a shared base of the class with random adapters."""
    model = tiny_model(kind)
    args = ModelArguments("tiny", quantization="none", dtype="float32", lora_r=3, lora_layers=layers)
    shared = SharedBase.build(model, lora_config(args, model), critic="adapter", reference="base")
    with torch.no_grad():
        for name, parameter in shared.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return shared


def own_logprobs(shared: SharedBase, ids: torch.Tensor, mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return transformers' own log-probabilities of the last tokens, each row without padding."""
    rows = []
    for row, real in zip(ids, mask.bool(), strict=True):
        text = row[real][None]
        with shared.role("policy") as core:
            logits = core(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False).logits
        log_p = logits[0, :-1].float().log_softmax(-1)
        rows.append(log_p.gather(-1, text[0, 1:, None]).squeeze(-1)[-tokens:])
    return torch.stack(rows)


def padded_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return left-padded rows, their mask, and which of their last tokens count."""
    ids = torch.randint(4, WORDS, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]).long()
    return ids, mask, torch.ones(len(ids), TOKENS, dtype=torch.bool)


def gradients(shared: SharedBase, logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradient of a weighted sum of log-probabilities in every tensor that has one."""
    weights = torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)
    shared.zero_grad()
    (logprobs * weights).sum().backward()
    return {name: p.grad.clone() for name, p in shared.named_parameters() if p.grad is not None}


def gradient_gap(shared: SharedBase) -> tuple[float, int]:
    """Return how far the policy's gradients are from autograd's of its own forward.

    It is relative to the largest. Second comes the number of tensors that train and have none.
    """
    ids, mask, counted = padded_rows()
    trunk = shared.trunks(ids, mask, ["policy"])["policy"]
    ours, _ = shared.logprobs(shared.hidden("policy", ids, mask, trunk, TOKENS + 1), ids, counted)
    found = gradients(shared, ours)
    own = gradients(shared, own_logprobs(shared, ids, mask, TOKENS))
    largest = max(grad.abs().max().item() for grad in own.values())
    gap = max(
        (found.get(name, torch.zeros_like(grad)) - grad).abs().max().item() for name, grad in own.items()
    )
    # An adapter under a layer whose weight is read past it changes nothing
    policy = [name for name, _ in shared.named_parameters() if f".{ADAPTERS['policy']}." in name]
    return gap / largest, sum(name not in own or not own[name].any() for name in policy)


@torch.no_grad()
def largest_gap(shared: SharedBase) -> float:
    """Return how far log-probabilities of a padded batch and of replies are from its own."""
    ids, mask, counted = padded_rows()
    trunk = shared.trunks(ids, mask, ["policy"])["policy"]
    ours, _ = shared.logprobs(shared.hidden("policy", ids, mask, trunk, TOKENS + 1), ids, counted)
    gap = (ours - own_logprobs(shared, ids, mask, TOKENS)).abs().max().item()
    # Replies, as rollouts sample them
    settings = generation_config(response_tokens=TOKENS, temperature=1.0, eos_token_ids=[2], pad_token_id=0)
    torch.manual_seed(5)
    rollout = sample(shared, ids, mask, settings, trunk_depth=shared.capture_depth(merged=False))
    states = shared.hidden("policy", rollout.input_ids, rollout.attention_mask, rollout.trunk)
    ours, _ = shared.logprobs(states, rollout.input_ids, rollout.response_mask)
    assert rollout.sampling_logprobs is not None
    return max(gap, (ours - rollout.sampling_logprobs).abs().max().item())


def outcome(kind: str) -> tuple[str, str]:
    """Return what becomes of a class, and a remark."""
    try:
        tiny_model(kind)
    except Exception as error:  # any: a class of another kind, or one that wants other sizes
        return "not tried", f"no tiny model: {brief(error)[:90]}"
    try:
        whole, top = build(kind, "all"), build(kind, "top-2")
        gap = max(largest_gap(whole), largest_gap(top))
        slopes = [gradient_gap(whole), gradient_gap(top)]
    except UserError as error:
        return "refused", str(error)[:150]
    except ValueError as error:  # PEFT's own refusal
        return "refused", brief(error)[:150]
    except Exception as error:  # a traceback is told, and is a fault
        return "CRASH", f"{type(error).__name__}: {brief(error)[:120]}"
    if not gap <= TOLERANCE:
        return "WRONG", f"{gap:.2g} nats"
    if not max(slope for slope, _ in slopes) <= SLOPE_TOLERANCE:
        return "WRONG", f"gradients differ by {max(slope for slope, _ in slopes):.2g} of the largest"
    still = f"{slopes[0][1]} tensors of the adapter get no gradient" if slopes[0][1] else ""
    reused = "" if top.trunk_depth() else "trunk reuse off"
    head = "its own head" if whole.own_head else ""
    return "exact" if not reused else "exact without reuse", ", ".join(filter(None, [head, reused, still]))


def main(kinds: list[str]) -> int:
    """Try ``kinds``, all if empty, and write the table; return the exit code."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    for kind in kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            found = outcome(kind)
        print(kind, *found, sep=" | ", flush=True)
        rows.append((kind, *(part.replace("|", "/").replace("\n", " ") for part in found)))
    # The table, without those of which no tiny model could be made
    counts = Counter(found for _, found, _ in rows)
    print(dict(counts))
    if not kinds:
        begin, marker, _ = PAGE.read_text(encoding="utf-8").partition("<!-- make architectures -->\n")
        tried = [row for row in rows if row[1] != "not tried"]
        numbers = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        today = datetime.datetime.now(datetime.UTC).date()
        head = f"transformers {transformers.__version__}, {today}: {numbers}.\n\n"
        untried = ", ".join(kind for kind, found, _ in rows if found == "not tried")
        head += f"Not tried, since no tiny model of text alone could be made: {untried}.\n\n"
        head += "| class | outcome | remark |\n|---|---|---|\n"
        table = "".join(f"| {kind} | {found} | {remark} |\n" for kind, found, remark in tried)
        PAGE.write_text(begin + marker + "\n" + head + table, encoding="utf-8")
    return int(counts["WRONG"] + counts["CRASH"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
