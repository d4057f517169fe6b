"""The quantized base and its tokenizer: the rules for padding, dtypes and quantization, in one place."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from goose_lora.adapters import local_folder, read_lineage
from goose_lora.model_files import read_adapter_config, reading, require_model, require_name, saved_template
from goose_lora.trunk import decoder_layers, top_layers

logger = logging.getLogger(__name__)

# Tokens that model families keep for padding or for nothing, best first.
SPARE_TOKENS = ("<|endoftext|>", "<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|vision_pad|>", "<|reserved_special_token_0|>")
# Byte 0xFF never occurs in UTF-8 text, so no text can contain its token: byte-level BPE writes it "ÿ", SentencePiece "<0xFF>".
IMPOSSIBLE_BYTES = ("ÿ", "<0xFF>")


@dataclass
class ModelArguments:
    """The base model, its quantization, and where LoRA goes: the same three lines in every stage's configuration."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the base, or 'embedded' for the small model of the demo."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base on the Hub."})
    base_hub_id: str | None = field(
        default=None, metadata={"help": "Hub id of the base where model_name_or_path is a folder: what an upload names instead of the folder."}
    )
    quantization: Literal["nf4", "int8", "none"] = field(
        default="nf4", metadata={"help": "How the frozen base is kept: nf4 (4 bits), int8, or none (in dtype)."}
    )
    dtype: Literal["bfloat16", "float32"] = field(
        default="bfloat16", metadata={"help": "Arithmetic of the base. Adapters, heads, log-probabilities and losses are fp32 always."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2 ...; the model's default if unset."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scaling: alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "For SFT and reward model; PPO sets it to 0, or its ratios are noise."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Names of the linear layers to adapt, or all-linear."}
    )
    lora_layers: str = field(default="all", metadata={"help": "all, or top-K: adapters in the K uppermost layers, so that the rest is shared."})

    def __post_init__(self) -> None:
        if self.lora_r < 1 or self.lora_alpha <= 0:
            raise ValueError(f"lora_r={self.lora_r}, lora_alpha={self.lora_alpha}: both must be positive, for example 16 and 32.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: must be at least 0 and below 1.")
        if isinstance(self.lora_target_modules, str):
            self.lora_target_modules = [self.lora_target_modules]
        top_layers(self.lora_layers, 10**6)

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[self.dtype]


def load_tokenizer(args: ModelArguments, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The base's tokenizer, left-padding, with a pad token that no text uses."""
    require_name(args.model_name_or_path)
    with reading("the tokenizer", args.model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(
            args.model_name_or_path, revision=args.model_revision, trust_remote_code=trust_remote_code, padding_side="left"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{args.model_name_or_path}: the tokenizer has no EOS token, so replies cannot end. Set one in its tokenizer_config.json.")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = spare_token(tokenizer)
    return tokenizer


def spare_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A token in the vocabulary that can serve as padding: not EOS, nor one that text contains. No embedding is added.

    With pad = EOS, a sequence classifier does not see the final EOS (TRL#3750), and a reply that ended scores like one that was cut.

    Raises:
        ValueError: the vocabulary has no such token.
    """
    vocabulary = tokenizer.get_vocab()
    for token in (*SPARE_TOKENS, *IMPOSSIBLE_BYTES):
        if token in vocabulary and vocabulary[token] not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            return token
    raise ValueError("The tokenizer has no pad token other than its EOS, and no unused token was found. Set pad_token in its tokenizer_config.json.")


def load_base(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> Any:
    """The frozen base as a causal language model, in evaluation mode, on one device (never device_map="auto").

    ``device`` and ``trust_remote_code`` may be given by keyword; the device is accelerate's by default.
    """
    return _load(AutoModelForCausalLM, args, tokenizer, **kwargs)


def load_reward_base(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> Any:
    """The same base as a sequence classifier with one output, for ``trl.RewardTrainer``."""
    return _load(AutoModelForSequenceClassification, args, tokenizer, num_labels=1, **kwargs)


def _load(
    auto_class: Any, args: ModelArguments, tokenizer: PreTrainedTokenizerBase, *, device: torch.device | None = None, **kwargs: Any
) -> Any:
    place: Any = device or PartialState().device
    if place.type == "cpu" and args.dtype == "bfloat16" and not cpu_multiplies_bf16():
        logger.warning("this CPU multiplies bfloat16 many times slower than float32: set dtype: float32, and bf16: false where a recipe has it.")
    if args.attn_implementation:
        kwargs["attn_implementation"] = args.attn_implementation
    require_model(args.model_name_or_path)
    model = read_weights(auto_class, args.model_name_or_path, args, place, revision=args.model_revision, **kwargs)
    keep_4bit_trainable_on_cpu(model)
    keep_8bit_alike_on_cpu(model)
    model.requires_grad_(False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    # Sampling filters that a model ships with would make sampled and computed log-probabilities differ.
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**tokens)
    return model.eval()


def read_weights(auto_class: Any, name: str, args: ModelArguments, place: Any, **kwargs: Any) -> Any:
    """The model ``name`` on one device, quantized and in the dtype as ``args`` says, from safetensors alone.

    Raises:
        ValueError: it cannot be read.
    """
    with reading("the weights", name):
        return auto_class.from_pretrained(
            name, dtype=args.torch_dtype, device_map={"": place}, quantization_config=quantization_config(args), use_safetensors=True, **kwargs
        )


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bfloat16, so that a product takes no longer than twice that in float32; it is tried, in 0.1 s or so.

    Without them (x86 without AVX512-BF16 or AMX) it is done in software: 8 times slower forward and 40 times backward, where it was measured.
    """
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other on a busy machine tell nothing
    try:
        for _ in range(8):  # in turns, so that other work on the machine slows both
            for dtype in best:
                x, weight = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
                started = time.perf_counter()
                torch.mm(x, weight)
                best[dtype] = min(best[dtype], time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return best[torch.bfloat16] <= 2 * best[torch.float32]


def quantization_config(args: ModelArguments) -> BitsAndBytesConfig | None:
    """bitsandbytes settings. int8 goes without its outlier columns: which they are is decided over the whole batch, padding included, so that
    a row's log-probabilities would depend on its batch-mates (by up to 2.9 nats on SmolLM2-135M), and with them PPO's ratios.
    """
    if args.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=args.torch_dtype
        )
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0) if args.quantization == "int8" else None


def keep_4bit_trainable_on_cpu(model: Any) -> None:
    """Keep 4-bit layers in the form that has gradients.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a layer at its first forward in evaluation mode, for good, into a form without
    autograd: LoRA gradients are then missing or wrong, without an error. Repacking is only for speed.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def keep_8bit_alike_on_cpu(model: Any) -> None:
    """Compute 8-bit layers in evaluation mode as in training mode.

    On a CPU, bitsandbytes 0.50 multiplies by dequantized weights in training mode, and rounds activations to int8 too in evaluation mode:
    log-probabilities of rollout and update differ by 0.2 nats. The state of a layer, which its forward tells the mode, stays in training.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt" and module.weight.device.type == "cpu":
            state = type(module.state)
            module.state.__class__ = type(state.__name__, (state,), {"is_training": property(lambda self: True, lambda self, mode: None)})


def lora_config(args: ModelArguments, model: Any, task_type: str | None = "CAUSAL_LM", **kwargs: Any) -> LoraConfig:
    """LoRA in the layers that ``lora_layers`` names; all-linear is written out, since PEFT refuses it together with layers."""
    layers = decoder_layers(model)
    chosen = top_layers(args.lora_layers, len(layers))
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=linear_names(layers) if args.lora_target_modules == ["all-linear"] else args.lora_target_modules,
        layers_to_transform=None if len(chosen) == len(layers) else chosen,
        task_type=task_type,
        **kwargs,
    )


def linear_names(layers: nn.ModuleList) -> list[str]:
    """Names of all linear layers inside the decoder layers: q_proj, c_attn, dense_h_to_4h ..., as PEFT's target_modules."""
    linear = (nn.Linear, Conv1D)
    return sorted({name.rpartition(".")[2] for name, module in layers[0].named_modules() if isinstance(module, linear)})


def adapters_to_fp32(model: Any) -> None:
    """Undo the bf16 cast that TRL's trainers give LoRA on a quantized base: in bf16, AdamW's small steps round to nothing."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def require_adapter(setting: str, folder: str | None, args: ModelArguments) -> str | None:
    """Check, before any model is loaded, that ``folder`` (or an adapter of the Hub) is for this base; returns the folder that it lies in.

    Raises:
        ValueError: no adapter there, or one that was trained on another base.
    """
    if folder is None:
        return None
    path = local_folder(folder)
    base = read_adapter_config(setting, str(path)).get("base_model_name_or_path")
    read_lineage(path)
    if base and base not in (args.model_name_or_path, args.base_hub_id) and Path(base).name != Path(args.model_name_or_path).name:
        require_model(args.model_name_or_path)
        raise ValueError(f"{setting}: {folder} was trained on {base}, not on {args.model_name_or_path}. All stages share one base.")
    return str(path)


def arguments_of(noted: Mapping[str, Any], base: str | None = None) -> ModelArguments:
    """Those with which a run had its base, from ``base`` in its lineage; ``base`` says where it is, if not where the run had it.

    Raises:
        ValueError: the base is not there any more, or the lineage does not say how it was quantized.
    """
    missing = [name for name in ("id", "quantization", "dtype") if not isinstance(noted, Mapping) or not isinstance(noted.get(name), str)]
    if missing:
        raise ValueError(f"goose_lora.json does not say what the base's {missing[0]} was in training. Copy the folder again, or train it again.")
    try:
        require_name(base or noted["id"])
    except ValueError as error:
        if base:
            raise
        known = f" On the Hub it is {noted['hub_id']}." if noted.get("hub_id") else ""
        raise ValueError(f"the run's base was {noted['id']}, and that is not here.{known} Say where it is: --base PATH_OR_HUB_ID.") from error
    return ModelArguments(
        base or noted["id"],
        model_revision=None if base else noted.get("commit") or noted.get("revision"),
        base_hub_id=noted.get("hub_id"),
        quantization=noted["quantization"],
        dtype=noted["dtype"],
    )


def tokenizer_of(folder: Path, args: ModelArguments) -> PreTrainedTokenizerBase:
    """A run's own tokenizer, where it saved one; otherwise the base's with the run's chat template."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return load_tokenizer(replace(args, model_name_or_path=str(folder), model_revision=None))
    tokenizer = load_tokenizer(args)
    tokenizer.chat_template = saved_template(folder) or tokenizer.chat_template
    return tokenizer
