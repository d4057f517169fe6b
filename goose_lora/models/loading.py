"""The quantized base and its tokenizer: padding, dtypes and quantization in one place."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from goose_lora.embedded import resolve
from goose_lora.errors import UserError
from goose_lora.kinds import require_kind
from goose_lora.models.arguments import ModelArguments, device_of_process, require_arguments, usable_dtype
from goose_lora.models.base_files import require_loaded, require_whole
from goose_lora.models.dates import note_date
from goose_lora.models.endings import note_ends, reply_ends, shipped_ends
from goose_lora.models.folders import (
    has_tokenizer,
    reading,
    require_model,
    require_name,
    require_tokenizer,
    saved_template,
)
from goose_lora.models.host_embeddings import keep_embeddings_on_host
from goose_lora.models.identity import note_place
from goose_lora.models.quantization import (
    compute_4bit_in,
    cpu_multiplies_bf16,
    keep_4bit_trainable_on_cpu,
    keep_8bit_alike_on_cpu,
    quantization_config,
)
from goose_lora.models.trunk import decoder_layers, top_layers

AutoClass = type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification]
logger = logging.getLogger(__name__)

# Tokens that model families keep for padding or for nothing, best first.
SPARE_TOKENS = (
    "<|endoftext|>",
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|vision_pad|>",
    "<|reserved_special_token_0|>",
)
# Byte 0xFF never occurs in UTF-8 text, so no text can contain its token: byte-level BPE writes it
# "ÿ", SentencePiece "<0xFF>".
IMPOSSIBLE_BYTES = ("ÿ", "<0xFF>")


def load_tokenizer(
    args: ModelArguments, folder: Path | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer, left-padding, with a pad token that no text uses.

    It knows the ends of a reply that the base ships (``reply_ends``), and the day that its chat
    template writes (``template_date``).

    Args:
        folder: what a stage saved, whose tokenizer takes the place of the base's.
    """
    require_arguments(args, "load_tokenizer")
    args = replace(args, model_name_or_path=resolve(args.model_name_or_path))
    name, revision = args.model_name_or_path, args.model_revision
    require_name(name)
    if folder is not None:
        name, revision = str(folder), None
    require_tokenizer(name)
    with reading("the tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            padding_side="left",
        )
    # Without an end, no reply ends
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{name}: the tokenizer has no EOS token, so replies cannot end. Set one in"
            " its tokenizer_config.json."
        )
    # A stage may change EOS and template; what the base ends replies with stays an end
    _note_shipped(tokenizer, args)
    # With an end as padding, masks made from ids would hide the end of a reply
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in reply_ends(tokenizer):
        tokenizer.pad_token = spare_token(tokenizer)
    note_date(tokenizer)
    return tokenizer


def _note_shipped(tokenizer: PreTrainedTokenizerBase, args: ModelArguments) -> None:
    with reading("the generation settings", args.model_name_or_path):
        ends = shipped_ends(args.model_name_or_path, args.model_revision)
    note_ends(tokenizer, ends, "generation_config")
    note_ends(tokenizer, [cast(int, tokenizer.eos_token_id)], "tokenizer")


def spare_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a token that can serve as padding: no end of a reply, nor one that text contains.

    It is in the vocabulary: no embedding is added.

    With pad = EOS, a sequence classifier does not see the final EOS (TRL#3750), and a reply that
    ended scores like one that was cut.

    Raises:
        ValueError: the vocabulary has no such token.
    """
    vocabulary, ends = tokenizer.get_vocab(), reply_ends(tokenizer)
    for token in (*SPARE_TOKENS, *IMPOSSIBLE_BYTES):
        if token in vocabulary and vocabulary[token] not in (*ends, tokenizer.bos_token_id):
            return token
    raise UserError(
        "The tokenizer has no pad token other than its EOS, and no unused token was found. Set pad_token in"
        " its tokenizer_config.json."
    )


def load_base(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> PreTrainedModel:
    """Load the frozen base as a causal language model, in evaluation mode, on one device.

    ``device_map="auto"`` is never used.

    ``device`` and ``trust_remote_code`` may be given by keyword; the device is accelerate's by
    default.
    """
    require_arguments(args, "load_base")
    require_tokenizer_object("the second argument of load_base", tokenizer)
    return _load(AutoModelForCausalLM, args, tokenizer, **kwargs)


def load_reward_base(
    args: ModelArguments, tokenizer: PreTrainedTokenizerBase, **kwargs: Any
) -> PreTrainedModel:
    """Load the same base as a sequence classifier of one output, for ``trl.RewardTrainer``."""
    require_arguments(args, "load_reward_base")
    require_tokenizer_object("the second argument of load_reward_base", tokenizer)
    return _load(AutoModelForSequenceClassification, args, tokenizer, num_labels=1, **kwargs)


def require_tokenizer_object(name: str, tokenizer: object) -> None:
    """Raise UserError where a Python user gives no tokenizer, or the name of one, as ``name``."""
    way_out = "Give the base's tokenizer, from goose_lora.load_tokenizer(args)."
    require_kind(name, tokenizer, PreTrainedTokenizerBase, way_out)


def _load(
    auto_class: AutoClass,
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: torch.device | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    place = device or device_of_process()
    usable = usable_dtype(args, place)
    if usable.dtype != args.dtype:
        logger.warning(
            "%s has no instructions for bfloat16: the base computes in float16.",
            torch.cuda.get_device_name(place),
        )
        args = usable
    # Slow, but right: told, not refused
    if place.type == "cpu" and args.dtype == "float16":
        logger.warning("a CPU multiplies float16 many times slower than float32: it is for trying it.")
    if place.type == "cpu" and args.dtype == "bfloat16" and not cpu_multiplies_bf16():
        logger.warning(
            "this CPU multiplies bfloat16 many times slower than float32: set dtype: float32, and bf16: false"
            " where a recipe has it."
        )
    if args.attn_implementation:
        kwargs["attn_implementation"] = args.attn_implementation
    args = replace(args, model_name_or_path=resolve(args.model_name_or_path))
    require_model(args.model_name_or_path)
    require_whole(args, trust_remote_code=kwargs.get("trust_remote_code", False))
    loaded: Any = read_weights(
        auto_class,
        args.model_name_or_path,
        args,
        place,
        revision=args.model_revision,
        output_loading_info=True,
        **kwargs,
    )
    model, found = loaded
    note_place(model, args.model_name_or_path, args.model_revision)
    # A classifier's head is fresh; what is on the Hub is looked at only now
    classifier = auto_class is AutoModelForSequenceClassification
    require_loaded(args.model_name_or_path, found, without="score.weight" if classifier else None)
    if args.embeddings == "host":
        keep_embeddings_on_host(model, args.model_name_or_path)
    keep_4bit_trainable_on_cpu(model)
    keep_8bit_alike_on_cpu(model)
    model.requires_grad_(False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    # Sampling filters that a model ships with would make sampled and computed log-probabilities
    # differ.
    _note_shipped(tokenizer, args)
    ends: Any = reply_ends(tokenizer)
    if len(ends) == 1:
        (ends,) = ends
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval()


def read_weights(
    auto_class: AutoClass, name: str, args: ModelArguments, place: torch.device, **kwargs: Any
) -> PreTrainedModel:
    """Load a model on one device, quantized and in the dtype as ``args`` says.

    Weights come from safetensors alone.

    Raises:
        ValueError: it cannot be read.
    """
    # On one device as a whole: layers on several could not share a trunk
    with reading("the weights", name):
        loaded = auto_class.from_pretrained(
            name,
            dtype=args.torch_dtype,
            device_map={"": place},
            quantization_config=quantization_config(args),
            use_safetensors=True,
            **kwargs,
        )
    # With output_loading_info, it comes beside what was found
    compute_4bit_in(loaded[0] if isinstance(loaded, tuple) else loaded, args.torch_dtype)
    return cast(PreTrainedModel, loaded)


def lora_config(
    args: ModelArguments, model: PreTrainedModel, task_type: str | None = "CAUSAL_LM", **kwargs: Any
) -> LoraConfig:
    """Return PEFT's configuration of LoRA in the layers that ``lora_layers`` names.

    all-linear is written out, since PEFT refuses it together with layers.
    """
    # Layers by number, as PEFT takes them; None stands for all
    layers = decoder_layers(model)
    chosen = top_layers(args.lora_layers, len(layers))
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=(
            linear_names(layers) if args.lora_target_modules == ["all-linear"] else args.lora_target_modules
        ),
        layers_to_transform=None if len(chosen) == len(layers) else chosen,
        task_type=task_type,
        **kwargs,
    )


def linear_names(layers: nn.ModuleList) -> list[str]:
    """Return the names of all linear layers inside the decoder layers, as PEFT's target_modules.

    They are q_proj, c_attn, dense_h_to_4h and so on.
    """
    # Of the first layer: models of mixed layers name their targets themselves
    linear = (nn.Linear, Conv1D)
    return sorted(
        {name.rpartition(".")[2] for name, module in layers[0].named_modules() if isinstance(module, linear)}
    )


def adapters_to_fp32(model: nn.Module | None) -> None:
    """Undo the bf16 cast that TRL's trainers give LoRA on a quantized base.

    In bf16, AdamW's small steps round to nothing.
    """
    assert model is not None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def bare_again(model: nn.Module | None) -> PreTrainedModel:
    """Take a trained adapter off a classifier, for another one to be trained on the same base."""
    base = cast(PreTrainedModel, cast(PeftModel, model).unload())
    base.requires_grad_(False)
    return base


def fresh_score_head(model: nn.Module | None) -> None:
    """Give a classifier's heads the weights that transformers begins with."""
    assert model is not None
    for name, parameter in model.named_parameters():
        if ".score." in f".{name}":
            config = cast(PreTrainedModel, model).config.get_text_config()
            nn.init.normal_(parameter.data, std=config.to_dict().get("initializer_range", 0.02))


def train_head_alone(model: nn.Module | None) -> None:
    """Freeze an adapter but for its head."""
    assert model is not None
    for name, parameter in model.named_parameters():
        if ".score." not in name:
            parameter.requires_grad_(False)


def tokenizer_of(
    *folders: Path, args: ModelArguments, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the first of a run's ``folders`` saved, or the base's.

    The latter gets the chat template of the first of them that has one.
    """
    for folder in folders:
        if has_tokenizer(folder):
            return load_tokenizer(args, folder, trust_remote_code=trust_remote_code)
        if template := saved_template(folder):
            tokenizer = load_tokenizer(args, trust_remote_code=trust_remote_code)
            tokenizer.chat_template = template
            note_date(tokenizer)
            return tokenizer
    return load_tokenizer(args, trust_remote_code=trust_remote_code)


def change_ends(tokenizer: PreTrainedTokenizerBase, template_path: str | None, eos_token: str | None) -> None:
    """Give a tokenizer the chat template of TRL's ``chat_template_path``, and an ``eos_token``.

    A folder's template comes with its EOS, as in TRL; but no token is added to the base, whose
    embeddings are shared.

    Raises:
        UserError: there is no template there, or a token that the base does not have.
    """
    ends = eos_token
    if template_path is not None:
        path = Path(template_path)
        if not template_path.strip() or (path.suffix in (".jinja", ".j2", ".txt") and not path.is_file()):
            raise UserError(f"chat_template_path={template_path!r}: no such file. Check the path.")
        if path.is_file():
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        else:
            require_name(template_path)
            with reading("the tokenizer", template_path):
                source = AutoTokenizer.from_pretrained(template_path)
            if not source.chat_template:
                raise UserError(
                    f"chat_template_path: the tokenizer of {template_path} has no chat template. Give a file"
                    " (.jinja), or a tokenizer that has one."
                )
            _require_tokens(
                tokenizer, "chat_template_path", [str(t) for t in source.added_tokens_decoder.values()]
            )
            tokenizer.chat_template, ends = source.get_chat_template(), eos_token or str(source.eos_token)
    if ends is not None:
        _require_tokens(tokenizer, "eos_token", [ends])
        tokenizer.eos_token = ends
    note_date(tokenizer)


def _require_tokens(tokenizer: PreTrainedTokenizerBase, setting: str, tokens: list[str]) -> None:
    missing = [token for token in tokens if token not in tokenizer.get_vocab()]
    if missing:
        raise UserError(
            f"{setting}: the base's tokenizer has no token {', '.join(missing[:5])}, and the shared base gets"
            " no new ones. Use tokens that it has; a template alone can be given as a .jinja file."
        )
