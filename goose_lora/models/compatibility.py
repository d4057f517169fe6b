"""Checks before the weights load: whether adapters, lengths and chat templates fit the base.

Its configuration is enough for that.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from goose_lora.errors import UserError
from goose_lora.files import first_line
from goose_lora.kinds import short
from goose_lora.models.adapter_kinds import kept_base, known_tensor, require_dequantizable, require_known
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.base_files import require_whole
from goose_lora.models.folders import (
    AdapterFolder,
    Template,
    by_name,
    context_of,
    reading,
    require_model,
    saved_template,
    steady_length,
)
from goose_lora.models.loading import lora_config

_MOST_LAYERS = 10_000  # of a config.json that is not damaged


def check_fit(
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Sequence[AdapterFolder | None],
    *,
    tokens: int | None = None,
    chat: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Compare the base's configuration with what a run is about to put on it.

    Args:
        adapters: those that are put on it; the one of ``reward_adapter`` must have a head.
        tokens: of the longest text that the run will make, prompt and reply.
        chat: whether the rows are chat messages, so that chat templates have a say.

    Raises:
        ValueError: an adapter that does not fit, ``lora_layers`` or ``lora_target_modules`` that
            the base does not have, a text longer than its context, or an adapter that was trained
            with another chat template.
    """
    require_model(args.model_name_or_path)
    core = meta_model(args, trust_remote_code=trust_remote_code)
    layers = core.config.get_text_config().num_hidden_layers
    if layers < 1:
        raise UserError(
            f"{args.model_name_or_path}: its config.json has {layers} layers (num_hidden_layers): there"
            " is nothing to adapt. Copy it again."
        )
    require_whole(args, trust_remote_code=trust_remote_code)
    if tokens is not None:
        require_context(core, tokens, args.model_name_or_path)
    # Has each token an embedding?
    vocabulary = cast(nn.Embedding, core.get_input_embeddings()).weight.shape[0]
    if len(tokenizer) > vocabulary:
        # An adapter brings the tokenizer of its stage, which may have new tokens
        for adapter in adapters:
            if adapter is not None and (adapter.path / "tokenizer.json").is_file():
                raise UserError(
                    f"{adapter.setting}: {adapter} came with a tokenizer of {len(tokenizer)} tokens, and"
                    f" {args.model_name_or_path} has {vocabulary}: it was trained on a resized vocabulary."
                    " Merge it into the base that it was trained on, save that with its tokenizer, and use it"
                    " as model_name_or_path."
                )
    require_vocabulary(tokenizer, vocabulary, args.model_name_or_path)
    # Has it the layers that LoRA is to go on, and those that each adapter changes?
    _check_targets(args, core)
    for adapter in adapters:
        if adapter is None:
            continue
        _check_adapter(adapter, args.model_name_or_path, core)
        require_dequantizable(
            bool(adapter.config.get("use_dora")),
            f"{adapter.setting}: {adapter}",
            int8_on_cpu=args.quantization == "int8" and not torch.cuda.is_available(),
        )
        # A chat model reads another prompt under another template
        saved, ours = saved_template(adapter.path), tokenizer.chat_template
        if chat and saved is not None and ours is not None and _stripped(saved) != _stripped(ours):
            raise UserError(
                f"{adapter.setting}: {adapter} was trained with another chat template than this run uses,"
                " which is that of the policy's adapter where it saved one, else the base's. Train both with"
                " one template (chat_template_path)."
            )


def require_context(core: PreTrainedModel, tokens: int, name: str | None = None) -> None:
    """Raise UserError unless texts of so many tokens, prompt and reply, fit the base's context."""
    context = context_of(core.config)
    if context is not None and tokens > context:
        raise UserError(
            f"the longest prompt and a reply make {tokens} tokens, and {name or _name_of(core)} has a context"
            f" of {context} (max_position_embeddings). Lower max_prompt_tokens or response_length."
        )
    steady = steady_length(core.config)
    if steady is not None and tokens > steady:
        raise UserError(
            f"the longest prompt and a reply make {tokens} tokens, and above {steady} the positions of"
            f" {name or _name_of(core)} (rope_type: longrope) depend on the longest text of a batch, so that"
            " what it says of one text depends on others. Lower max_prompt_tokens or response_length."
        )


def require_vocabulary(tokenizer: PreTrainedTokenizerBase, vocabulary: int, name: str) -> None:
    """Raise UserError for a tokenizer of more tokens than the base has."""
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens and the model {vocabulary}. They do not"
            " belong together: use the tokenizer that the model came with."
        )


def require_prompts(
    core: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Dataset | None],
    response_length: int,
) -> None:
    """Compare the tokenizer, and tokenized prompts, with a base that is loaded.

    Args:
        prompts: rows with ``input_ids``, by what errors call them.

    Raises:
        UserError: a tokenizer of more tokens than the base has, a prompt that is empty, has an id
            that the base does not have, or leaves no room for a reply in its context.
    """
    vocabulary = core.config.get_text_config().vocab_size
    require_vocabulary(tokenizer, vocabulary, _name_of(core))
    longest = 0
    for name, rows in prompts.items():
        for row, ids in enumerate([] if rows is None else rows["input_ids"]):
            if len(ids) == 0 or min(ids) < 0 or max(ids) >= vocabulary:
                raise UserError(
                    f"{name}: row {row + 1} has the input_ids {short.repr(list(ids))}. Give one or more,"
                    f" from 0 to {vocabulary - 1}: the base's tokenizer makes such."
                )
            longest = max(longest, len(ids))
    if longest:
        require_context(core, longest + response_length)


def _name_of(core: PreTrainedModel) -> str:
    return core.name_or_path or "the base"


def _stripped(template: Template) -> dict[str, str]:
    """Return templates by name, without what stands around them; one alone is the default."""
    found = by_name(template)
    named = found if isinstance(found, dict) else {"default": found}
    return {name: str(text).strip() for name, text in named.items()}


def _check_targets(args: ModelArguments, core: PreTrainedModel) -> None:
    targets = lora_config(args, core).target_modules or []
    if args.lora_target_modules == ["all-linear"] or isinstance(targets, str):
        return
    # By the last part of their names, as PEFT looks for them
    names = {name.rpartition(".")[2] for name, module in core.named_modules() if _width(module)}
    missing = [target for target in sorted(targets) if target.rpartition(".")[2] not in names]
    if missing:
        there = ", ".join(sorted(names))
        raise UserError(
            f"lora_target_modules: {args.model_name_or_path} has no {', '.join(missing)}. There are {there};"
            " or write all-linear."
        )


def _check_adapter(adapter: AdapterFolder, base: str, core: PreTrainedModel) -> None:
    shapes, modules = adapter.shapes, dict(core.named_modules())
    if adapter.setting == "reward_adapter" and not adapter.has_head:
        raise UserError(
            f"{adapter.setting}: {adapter} has no score head (looked for a tensor named *score.weight among"
            f" {len(shapes)}), so it cannot be a reward model. Train it with recipes/reward.py, or with"
            " trl.RewardTrainer and LoraConfig(task_type='SEQ_CLS')."
        )
    if adapter.setting == "policy_adapter" and adapter.has_head:
        raise UserError(
            f"{adapter.setting}: {adapter} has a score head: it is a reward model or a critic. Give the"
            " adapter of a policy, the output_dir of recipes/sft.py or recipes/ppo.py."
        )
    require_known(adapter)
    require_shared_parts(adapter, core)
    # Tensor by tensor; an adapter without any fits nothing
    wrong = [problem for name, shape in shapes.items() if (problem := _problem(name, shape, modules, core))]
    if wrong or not shapes:
        first = f", such as {wrong[0]}" if wrong else ""
        raise UserError(
            f"{adapter.setting}: {adapter} does not fit {base}: {len(wrong)} of {len(shapes)} tensors do"
            f" not{first}. Use an adapter that was trained on this base model."
        )


def require_shared_parts(adapter: AdapterFolder, core: Any) -> None:
    """Refuse an adapter that changes the head, or tokens of a tied one: roles share one head."""
    modules = {id(module): name for name, module in core.named_modules()}
    head = modules[id(core.get_output_embeddings())]
    tied = bool(core.config.get_text_config().tie_word_embeddings)
    kept = [str(name) for name in adapter.config.get("modules_to_save") or []]
    inner = [name.removeprefix("base_model.model.") for name in adapter.shapes]
    changes = any(name.startswith(f"{head}.") and not kept_base(name) for name in inner)
    where = f"{adapter.setting}: {adapter}"
    way_out = (
        "Train one without it, or merge the adapter into the base with PEFT's merge_and_unload, save that,"
        " and use it as model_name_or_path."
    )
    if changes or head.rpartition(".")[2] in kept:
        raise UserError(
            f"{where} changes the language-model head ({head}), and roles share that of the base. {way_out}"
        )
    if tied and adapter.config.get("trainable_token_indices"):
        raise UserError(
            f"{where} has trainable_token_indices, and the base's head is tied to its embeddings: both would"
            f" change. {way_out}"
        )
    if tied and any("embed" in name for name in kept):
        raise UserError(
            f"{where} has embeddings of its own (modules_to_save), and the base's head is tied to its"
            f" embeddings. {way_out}"
        )


def _problem(name: str, shape: list[int], modules: Mapping[str, nn.Module], core: Any) -> str | None:
    """Return why a tensor of an adapter does not fit the base, or None."""
    # PEFT's names are those of the base's modules, and the factor
    inner = name.removeprefix("base_model.model.")
    if inner.endswith("score.weight"):
        width = core.get_output_embeddings().weight.shape[1]
        return (
            None if shape == [1, width] else f"{name} of shape {shape}, where the base has {width} features"
        )
    for part, place in ((".lora_A.weight", 0), (".lora_B.weight", 1)):
        if inner.endswith(part):
            module = modules.get(inner.removesuffix(part).replace(".base_layer", ""))
            if module is None:
                return f"{name}, a module that the base does not have"
            width = _width(module)
            found = shape[1 - place] if len(shape) == 2 else shape
            return (
                None
                if width is None or found == width[place]
                else f"{name} of shape {shape}, where the base has {width[place]} features"
            )
    if known_tensor(name):
        return None
    # A parameter that the adapter has instead of the base's
    whole = dict(core.named_parameters()).get(inner.replace(".base_layer", ""))
    if whole is None:
        return f"{name}, a tensor that neither LoRA nor the base has"
    if list(whole.shape) != shape:
        return f"{name} of shape {shape}, where the base has {list(whole.shape)}"
    return None


def _width(module: nn.Module) -> tuple[int, int] | None:
    """Return features in and out of a linear layer, of torch's or of GPT-2's kind.

    None for other modules.
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return None
    return (
        (weight.shape[1], weight.shape[0])
        if isinstance(module, nn.Linear)
        else (weight.shape[0], weight.shape[1])
    )


def meta_model(
    args: ModelArguments, *, trust_remote_code: bool = False, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """Return the base on the meta device."""
    name = args.model_name_or_path
    if config is None:
        require_model(name, weights=False)
        with reading("its configuration", name):
            config = AutoConfig.from_pretrained(
                name, revision=args.model_revision, trust_remote_code=trust_remote_code
            )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not trust_remote_code:
        raise UserError(
            f"{name}: {config.model_type} is not a causal language model, which a base must be. Use one that"
            " goes on with a text."
        )
    # Each layer takes time, even without memory
    layers = vars(config.get_text_config()).get("num_hidden_layers")
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise UserError(f"{name}: its config.json has {layers} layers (num_hidden_layers). Copy it again.")
    # Without memory: its shapes are enough
    how = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    with (
        reading("its configuration", name, "Check attn_implementation and the config.json"),
        torch.device("meta"),
    ):
        try:
            return AutoModelForCausalLM.from_config(
                config, dtype=args.torch_dtype, trust_remote_code=trust_remote_code, **how
            )
        except ImportError as error:  # a package for the attention that is asked for
            raise UserError(f"attn_implementation: {first_line(error)}. Use sdpa.") from error
