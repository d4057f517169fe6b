"""Tiny models, a tiny tokenizer and tiny data, built in code: what the tests of the core and of the
recipes run on.

Dimensions are odd or prime where the architecture allows, so that a transposed or wrongly broadcast
tensor does not fit. Weights are large, so that attention, padding and adapters show in the output.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from goose_lora.models.arguments import ModelArguments
from goose_lora.models.loading import lora_config
from goose_lora.models.roles import ADAPTERS
from goose_lora.models.shared_base import SharedBase

# bitsandbytes compiles its CPU kernels at first use: 24 s on a machine that has not cached them,
# for nothing at this size.
torch._dynamo.config.disable = True

PAD, BOS, EOS, UNK = range(4)
LAYERS, VOCABULARY, HIDDEN = 5, 61, 33
WORDS = [f"{first}{second}" for first in "bdfklmnprst" for second in "aeiou"] + ["good", "bad"]

_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_ROPE = _COMMON | {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 17,
    "max_position_embeddings": 127,
    "initializer_range": 0.3,
}
_HEADS = {"head_dim": 14}
_WINDOW = {"sliding_window": 7}  # shorter than the sequences of the tests, or it would never show
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _ROPE | _HEADS,
    "qwen2": _ROPE | {"hidden_size": 42},
    "qwen3": _ROPE | _HEADS,
    "mistral": _ROPE | _HEADS | _WINDOW,
    "gemma2": _ROPE | _HEADS | _WINDOW | {"query_pre_attn_scalar": 14},
    "gemma3_text": _ROPE | _HEADS | _WINDOW | {"query_pre_attn_scalar": 14},
    "gpt2": (
        _COMMON
        | {
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": 3,
            "n_positions": 127,
            "n_inner": 17,
            "initializer_range": 0.3,
        }
    ),
    "gpt_neox": (
        {key: value for key, value in _ROPE.items() if key != "num_key_value_heads"} | {"hidden_size": 42}
    ),
    "opt": (
        _COMMON
        | {
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": 13,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 3,
            "ffn_dim": 17,
            "max_position_embeddings": 127,
            "init_std": 0.3,
        }
    ),
    "phi3": _ROPE | {"hidden_size": 42},
}


def base(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> nn.Module:
    """A causal language model with random weights, biases and norms included, in evaluation
    mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **ARCHITECTURES[architecture] | changes)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with pad, bos, eos and unknown all distinct; pads on the left; has a chat
    template."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=127,
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a template that, like real ones, begins with bos, marks roles with tokens of
    their own, and ends turns with eos."""
    chatty = tokenizer()
    chatty.add_tokens(["<system>", "<user>", "<assistant>"], special_tokens=True)
    chatty.chat_template = (
        "{{ bos_token }}{% for m in messages %} <{{ m['role'] }}> {{ m['content'] }} {{ eos_token }}{% endfor"
        " %}{% if add_generation_prompt %} <assistant>{% endif %}"
    )
    return chatty


def letters(template: str | None = None, **tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a byte, whose texts can be read again to the letter; begins no text
    with bos. ``tokens`` are special ones, such as eos_token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | tokens
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(named.values()), *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, padding_side="left", chat_template=template, **named
    )


def save_base(folder: str | Path, architecture: str = "llama", **changes: Any) -> str:
    """Model and tokenizer into ``folder``, as from_pretrained and the recipes read them."""
    base(architecture, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def arguments(folder: str = "tiny", **changes: Any) -> ModelArguments:
    """Model arguments for an fp32 base with rank-3 adapters; not quantized unless ``changes`` says
    so."""
    return ModelArguments(
        folder, **{"quantization": "none", "dtype": "float32", "lora_r": 3, "lora_alpha": 6} | changes
    )


def lora(
    model: nn.Module, *, layers: str = "all", task_type: str | None = "CAUSAL_LM", **changes: Any
) -> LoraConfig:
    """A rank-3 adapter on all linear layers of the layers that ``layers`` names."""
    return lora_config(arguments(lora_layers=layers), model, task_type, **changes)


def randomise(model: nn.Module, adapter: str = "default", *, std: float = 0.3, seed: int = 1) -> None:
    """Give an adapter, whose B starts as zero, an effect: normal numbers of ``std`` in B and in its
    head, if it has one."""
    generator = torch.Generator().manual_seed(seed)
    changed = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in f"{name}.":
                scale = parameter.shape[1] ** -0.5 if "lora_A" in name else std
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
                changed += 1
    assert changed, f"no adapter {adapter}"


def stir(model: nn.Module, *, std: float = 0.05, seed: int = 3) -> None:
    """Add normal numbers of ``std`` to all that trains, as a training would move it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)


def shared(model: nn.Module, *, layers: str = "all", seed: int = 1, **roles: Any) -> SharedBase:
    """A shared base whose policy and critic, where it has them, are random: no view is that of the
    bare base."""
    built = SharedBase.build(model, lora(model, layers=layers), **roles)
    for offset, role in enumerate(("policy", "value")):
        if built.has(role):
            randomise(built, ADAPTERS[role], seed=seed + offset)
    return built


def batch(
    lengths: tuple[int, ...] = (11, 7, 9), *, side: str = "left", seed: int = 2
) -> tuple[Tensor, Tensor]:
    """Random tokens and their attention mask, (B, L) each, padded on ``side``. A row's tokens do
    not depend on side or width."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(max(lengths) - length, None) if side == "left" else slice(0, length)
        ids[row, place] = torch.randint(4, VOCABULARY, (length,), generator=generator)
        mask[row, place] = 1
    return ids, mask


def response_mask(lengths: tuple[int, ...] = (5, 3, 4)) -> Tensor:
    """(B, T): rows of so many counted tokens, then padding."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def prompts(count: int = 8) -> list[dict[str, str]]:
    """Rows for PPO: two to four words."""
    return [
        {"prompt": " ".join(WORDS[(7 * row + 3 * k) % 55] for k in range(2 + row % 3))}
        for row in range(count)
    ]


def texts(count: int = 8) -> list[dict[str, str]]:
    """Rows for SFT: a prompt and a completion that says "good"."""
    return [
        {"prompt": row["prompt"], "completion": " good " + WORDS[k % 55]}
        for k, row in enumerate(prompts(count))
    ]


def preferences(count: int = 8) -> list[dict[str, str]]:
    """Rows for the reward model: "good" replies are chosen, "bad" ones rejected."""
    return [
        {
            "prompt": row["prompt"],
            "chosen": f" good {WORDS[k % 55]}",
            "rejected": f" bad {WORDS[(k + 1) % 55]}",
        }
        for k, row in enumerate(prompts(count))
    ]


def write_rows(path: str | Path, rows: list[dict[str, Any]]) -> str:
    """``rows`` as a .jsonl file; returns its path."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
