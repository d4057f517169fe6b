"""goose_lora.models.loading: the rules for padding, dtypes, quantization and where adapters go."""

import re

import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from goose_lora.models import loading
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.folders import AdapterFolder, require_model
from goose_lora.models.loading import (
    adapters_to_fp32,
    linear_names,
    load_base,
    load_reward_base,
    load_tokenizer,
    lora_config,
    spare_token,
    top_layers,
)
from goose_lora.models.quantization import quantization_config
from goose_lora.models.trunk import decoder_layers

LINEAR_NAMES = {
    **{
        name: ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
        for name in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text")
    },
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "gpt_neox": ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
    "opt": ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
    "phi3": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],
}


def raises(message):
    return pytest.raises(ValueError, match=re.escape(message))


def word_tokenizer(*words, **special):
    inner = Tokenizer(
        models.WordLevel(
            {word: index for index, word in enumerate(words)}, unk_token=special.get("unk_token")
        )
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def byte_tokenizer():
    """Byte-level BPE with nothing but the 256 bytes and one special token, as GPT-2's."""
    vocabulary = {
        character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    inner = Tokenizer(models.BPE({**vocabulary, "<end>": 256}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", bos_token="<end>", pad_token="<end>"
    )


# Padding


def loaded(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return load_tokenizer(ModelArguments(str(folder)))


def test_a_pad_token_of_its_own_is_kept_and_prompts_pad_on_the_left(tmp_path):
    saved = tiny.tokenizer()
    saved.padding_side = "right"
    tokenizer = loaded(saved, tmp_path)
    assert tokenizer.pad_token_id == tiny.PAD and tokenizer.padding_side == "left"
    batch = tokenizer(["ba be bi", "bo"], padding=True, return_tensors="pt")
    assert batch["input_ids"][1].tolist()[:2] == [tiny.PAD, tiny.PAD]


@pytest.mark.parametrize("spare", ["<|endoftext|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<0xFF>"])
@pytest.mark.parametrize("pad", [None, "</s>"])
def test_where_pad_is_eos_or_missing_a_spare_token_becomes_pad(spare, pad, tmp_path):
    saved = word_tokenizer("<s>", "</s>", "word", spare, eos_token="</s>", bos_token="<s>", pad_token=pad)
    tokenizer = loaded(saved, tmp_path)
    assert tokenizer.pad_token == spare and tokenizer.pad_token_id == 3 == len(tokenizer) - 1, (
        "no embedding is added"
    )
    assert tokenizer.eos_token_id == 1
    assert tokenizer("word word", padding="max_length", max_length=4)["attention_mask"] == [0, 0, 1, 1]


def test_the_spare_token_is_neither_eos_nor_bos():
    tokenizer = word_tokenizer(
        "<|endoftext|>", "<pad>", "word", "[PAD]", eos_token="<|endoftext|>", bos_token="<pad>"
    )
    assert spare_token(tokenizer) == "[PAD]"


def test_unknown_words_are_not_taken_for_padding():
    tokenizer = word_tokenizer("<unk>", "</s>", "word", eos_token="</s>", unk_token="<unk>")
    assert tokenizer("word nonsense")["input_ids"] == [2, 0], "the unknown token is a token of texts"
    with raises("no unused token was found"):
        spare_token(tokenizer)


def test_a_byte_level_vocabulary_pads_with_a_byte_that_is_in_no_text(tmp_path):
    tokenizer = loaded(byte_tokenizer(), tmp_path)
    assert tokenizer.pad_token == "ÿ" and len(tokenizer) == 257
    for text in ("plain", "naïve ÿ L'Haÿ", "\u00ff\u0fff\U0001f9a2", "".join(map(chr, range(1, 0x800)))):
        assert tokenizer.pad_token_id not in tokenizer(text)["input_ids"]


def test_without_any_spare_token_it_is_an_error(tmp_path):
    with raises(
        "The tokenizer has no pad token other than its EOS, and no unused token was found. Set pad_token in"
        " its tokenizer_config.json."
    ):
        loaded(
            word_tokenizer("<s>", "</s>", "word", eos_token="</s>", bos_token="<s>", pad_token="</s>"),
            tmp_path,
        )


def test_without_an_end_of_text_token_it_is_an_error(tmp_path):
    with raises("the tokenizer has no EOS token, so replies cannot end"):
        loaded(word_tokenizer("<pad>", "word", pad_token="<pad>"), tmp_path)


# Layers and modules


def test_top_layers_are_the_uppermost():
    assert top_layers("all", 5) == [0, 1, 2, 3, 4]
    assert top_layers("top-2", 5) == [3, 4]
    assert top_layers("top-5", 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "text", ["top", "top-", "top-0", "top--1", "top-2.5", "top-x", "bottom-2", "2", "", "Top-2", "top-²"]
)
def test_other_layer_names_are_an_error_before_any_model_loads(text):
    with raises(f"lora_layers={text!r}: write all, or top-K"):
        ModelArguments("model", lora_layers=text)


def test_more_layers_than_the_model_has_are_an_error():
    with raises("lora_layers='top-6': the model has 5 layers. Write top-5 or less, or all."):
        top_layers("top-6", 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 0}, "lora_r=0, lora_alpha=32: both must be positive"),
        ({"lora_alpha": 0}, "lora_r=16, lora_alpha=0: both must be positive"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0: must be at least 0 and below 1."),
    ],
)
def test_impossible_adapters_are_an_error(changes, message):
    with raises(message):
        ModelArguments("model", **changes)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_all_linear_is_every_linear_layer_of_the_decoder(architecture):
    model = tiny.base(architecture)
    layers = decoder_layers(model)
    assert linear_names(layers) == LINEAR_NAMES[architecture]
    linear = {id(module) for module in layers.modules() if isinstance(module, nn.Linear | Conv1D)}
    adapted = get_peft_model(model, lora_config(tiny.arguments(), model))
    assert {id(module.base_layer) for module in adapted.modules() if hasattr(module, "lora_A")} == linear


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_all_linear_is_the_same_on_a_quantized_base(quantization, tiny_base):
    args = tiny.arguments(tiny_base, quantization=quantization)
    assert linear_names(decoder_layers(load_base(args, load_tokenizer(args)))) == LINEAR_NAMES["llama"]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_top_layers_with_all_linear_adapts_those_layers_alone(architecture):
    model = tiny.base(architecture)
    adapted = get_peft_model(model, lora_config(tiny.arguments(lora_layers="top-2"), model))
    layers = decoder_layers(adapted.get_base_model())
    count = [sum(hasattr(module, "lora_A") for module in layer.modules()) for layer in layers]
    assert count[:3] == [0, 0, 0] and count[3] == count[4] > 0
    assert sum(count) == sum(hasattr(module, "lora_A") for module in adapted.modules())


def test_the_adapters_configuration_is_what_the_arguments_say():
    model = tiny.base()
    args = ModelArguments("model", lora_r=7, lora_alpha=11, lora_dropout=0.2, lora_target_modules="q_proj")
    config = lora_config(args, model, "SEQ_CLS", modules_to_save=["score"])
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (7, 11, 0.2, "SEQ_CLS")
    assert (
        config.target_modules == {"q_proj"}
        and config.modules_to_save == ["score"]
        and config.layers_to_transform is None
    )


# Dtypes and quantization


@pytest.mark.parametrize(
    ("quantization", "kind"), [("none", nn.Linear), ("nf4", Linear4bit), ("int8", Linear8bitLt)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("load", [load_base, load_reward_base])
def test_the_base_has_the_quantization_and_dtype_that_were_asked_for(
    quantization, kind, dtype, load, tiny_base
):
    args = tiny.arguments(tiny_base, quantization=quantization, dtype=dtype)
    model = load(args, load_tokenizer(args))
    wanted = getattr(torch, dtype)
    inner = [module for module in decoder_layers(model).modules() if isinstance(module, nn.Linear)]
    assert {type(module) for module in inner} == {kind}
    head = model.lm_head if load is load_base else model.score
    assert type(head) is nn.Linear and head.weight.dtype == wanted
    assert {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()} == {wanted}
    if quantization == "nf4":
        assert {module.weight.quant_type for module in inner} == {"nf4"}
        assert {module.compute_dtype for module in inner} == {wanted}
        assert all(module.weight.quant_state.nested for module in inner)
        assert not any(module.support_avx512bf16_for_cpu for module in inner)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert model.config.pad_token_id == tiny.PAD


def test_a_base_that_was_saved_in_4_bits_computes_in_the_dtype_that_is_asked_for(tiny_base, tmp_path):
    saved_as = BitsAndBytesConfig(  # its default of bnb_4bit_compute_dtype is float32
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny_base, quantization_config=saved_as, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path)
    load_tokenizer(tiny.arguments(tiny_base)).save_pretrained(tmp_path)
    ids, mask = tiny.batch((9, 9), seed=5)
    logits = []
    for folder in (tiny_base, tmp_path):
        args = tiny.arguments(str(folder), quantization="nf4", dtype="bfloat16")
        loaded = load_base(args, load_tokenizer(args))
        layers = [module for module in loaded.modules() if isinstance(module, Linear4bit)]
        assert layers and {layer.compute_dtype for layer in layers} == {torch.bfloat16}
        logits.append(loaded(input_ids=ids, attention_mask=mask).logits)
    assert torch.equal(*logits)


def test_a_sequence_classifier_has_one_output(tiny_base):
    args = tiny.arguments(tiny_base)
    assert load_reward_base(args, load_tokenizer(args)).score.weight.shape == (1, tiny.HIDDEN)


def test_quantization_settings():
    four = quantization_config(tiny.arguments(quantization="nf4", dtype="bfloat16"))
    assert isinstance(four, BitsAndBytesConfig) and four.load_in_4bit and four.bnb_4bit_use_double_quant
    assert four.bnb_4bit_quant_type == "nf4" and four.bnb_4bit_compute_dtype == torch.bfloat16
    eight = quantization_config(tiny.arguments(quantization="int8"))
    assert eight.load_in_8bit and eight.llm_int8_threshold == 0.0
    assert quantization_config(tiny.arguments(quantization="none")) is None


@pytest.mark.parametrize("load", [load_base, load_reward_base])
@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_the_whole_model_goes_to_one_device(load, device, tiny_base, monkeypatch):
    seen = []
    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        auto = getattr(loading, name)
        real = auto.from_pretrained
        monkeypatch.setattr(
            auto,
            "from_pretrained",
            lambda *args, real=real, **kwargs: seen.append(kwargs) or real(*args, **kwargs),
        )
    args = tiny.arguments(tiny_base, attn_implementation="eager", model_revision="main")
    model = load(args, load_tokenizer(args), device=device, trust_remote_code=False)
    assert seen[0]["device_map"] == {"": torch.device("cpu")}
    assert seen[0]["revision"] == "main" and seen[0]["trust_remote_code"] is False
    assert model.config._attn_implementation == "eager"


def test_sampling_settings_of_the_model_are_dropped(tmp_path):
    model = tiny.base()
    model.generation_config.update(do_sample=True, top_p=0.3, repetition_penalty=2.0, max_length=99)
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    args = tiny.arguments(str(tmp_path))
    config = load_base(args, load_tokenizer(args)).generation_config
    left = {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}
    assert left | {"bos_token_id": tiny.BOS} == {
        "pad_token_id": tiny.PAD,
        "bos_token_id": tiny.BOS,
        "eos_token_id": tiny.EOS,
    }


def test_adapters_are_put_back_to_fp32_and_the_base_is_left():
    model = tiny.base().bfloat16()
    adapted = get_peft_model(model, tiny.lora(model)).bfloat16()
    tiny.randomise(adapted)
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    adapters_to_fp32(adapted)
    for name, parameter in adapted.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
        assert torch.equal(parameter.to(torch.bfloat16), before[name])


# Folders


def adapter_folder(folder, base="org/tiny"):
    model = tiny.base()
    model.name_or_path = base
    get_peft_model(model, tiny.lora(model)).save_pretrained(folder)
    return folder


def test_a_folder_with_an_adapter_for_this_base_is_fine(tmp_path):
    folder = adapter_folder(tmp_path)
    for name in ("org/tiny", "elsewhere/tiny", "/a/path/tiny"):
        AdapterFolder.open("policy_adapter", str(folder), base=name)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            ["adapter_config.json"],
            "has no adapter_config.json. Give the output_dir of the stage that trains it, run to its end.",
        ),
        (["adapter_model.safetensors"], "has no adapter_model.safetensors."),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "has no adapter_config.json and no adapter_model.safetensors.",
        ),
    ],
)
def test_a_folder_without_an_adapter_is_told_what_is_missing(missing, message, tmp_path):
    folder = adapter_folder(tmp_path)
    for name in missing:
        (folder / name).unlink()
    with raises(f"reward_adapter: {folder} {message}"):
        AdapterFolder.open("reward_adapter", str(folder), base="org/tiny")


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with raises(f"policy_adapter: {tmp_path / 'none'} has no adapter_config.json"):
        AdapterFolder.open("policy_adapter", str(tmp_path / "none"), base="org/tiny")


def test_an_adapter_of_another_base_is_told_both_names(tmp_path):
    folder = adapter_folder(tmp_path, "org/big")
    with raises(
        f"policy_adapter: {folder} was trained on org/big, not on org/tiny. All stages share one base."
    ):
        AdapterFolder.open("policy_adapter", str(folder), base="org/tiny")


@pytest.mark.parametrize(
    ("dtype", "fast", "warned"),
    [("bfloat16", False, True), ("bfloat16", True, False), ("float32", False, False)],
)
def test_a_cpu_that_multiplies_bfloat16_in_software_is_told_of(
    dtype, fast, warned, tiny_base, monkeypatch, caplog
):
    monkeypatch.setattr("goose_lora.models.loading.cpu_multiplies_bf16", lambda: fast)
    arguments = tiny.arguments(tiny_base, dtype=dtype)
    load_base(arguments, load_tokenizer(arguments), device=torch.device("cpu"))
    assert ("set dtype: float32" in caplog.text) == warned


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "has no config.json, so it is no model. Give the folder that save_pretrained wrote."),
        (["m-q4.gguf"], "has no weights in safetensors, only m-q4.gguf, and GGUF cannot be trained on. Give"),
        (
            ["config.json"],
            "has no tokenizer (looked for tokenizer.json and what others are called). Download",
        ),
    ],
)
def test_a_folder_without_a_tokenizer_is_told_by_what_it_lacks(tmp_path, files, says):
    for name in files:
        (tmp_path / name).write_text("{}")
    with raises(f"{tmp_path}: {says}"):
        load_tokenizer(ModelArguments(str(tmp_path)))


def test_gguf_beside_a_configuration_is_no_model_either(tmp_path):
    for name in ("config.json", "m-q4.gguf"):
        (tmp_path / name).write_text("{}")
    require_model(str(tmp_path), weights=False)
    with raises("only m-q4.gguf, and GGUF cannot be trained on"):
        require_model(str(tmp_path))
