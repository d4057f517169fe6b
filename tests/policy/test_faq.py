"""Answers of docs/faq.md that no other test holds."""

import re

import pytest
import tiny
import tiny_runs
import torch
from pages import ROOT, read
from transformers import AutoConfig

from goose_lora.models.arguments import ModelArguments
from goose_lora.models.compatibility import meta_model
from goose_lora.models.loading import load_base, load_tokenizer, lora_config
from goose_lora.models.shared_base import SharedBase
from goose_lora.planning.shapes import read_model

# The kernels for experts want rows of whole 16 bytes.
ROUND = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TEXT = tiny.ARCHITECTURES["llama"] | ROUND
EYES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def test_the_table_of_what_fits_is_that_of_the_memory_plan():
    planned = re.findall(
        r"^\| (\S+B) \| (\d+) GB \| (\d+|-) \|", read(ROOT / "docs" / "memory.md"), re.MULTILINE
    )
    rows = re.findall(
        r"^\| (\S+B) \| (\d+|-) \| (\d+) \| (\d+) \| (\d+) \|", read(ROOT / "docs" / "faq.md"), re.MULTILINE
    )
    shown = {
        (model, size): rows
        for model, *row in rows
        for size, rows in zip(("8", "12", "16", "24"), row, strict=True)
    }
    assert len(planned) == 16 and shown == {(model, size): rows for model, size, rows in planned}


def shared_base(folder, architecture, monkeypatch, *, layers, quantization="none", **settings):
    monkeypatch.setitem(tiny.ARCHITECTURES, architecture, settings)
    arguments = tiny.arguments(
        tiny.save_base(folder / "base", architecture), quantization=quantization, lora_layers=layers
    )
    base = load_base(arguments, load_tokenizer(arguments), device=torch.device("cpu"))
    return SharedBase.build(base, lora_config(arguments, base), critic="adapter", reference="copy")


def test_a_mixture_of_experts_trains_in_its_attention_alone_and_its_experts_stay_unquantized(
    tmp_path, monkeypatch
):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    shared = shared_base(
        tmp_path, "mixtral", monkeypatch, layers="top-2", quantization="nf4", **TEXT | experts
    )
    adapted = {
        name.split(".lora_")[0].rpartition(".")[2]
        for name, _ in shared.named_parameters()
        if ".lora_" in name
    }
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    kinds = {
        name.rpartition("layers.0.")[2]: parameter.dtype
        for name, parameter in shared.named_parameters()
        if "layers.0." in name
    }
    assert (
        kinds["mlp.experts.gate_up_proj"] == torch.float32 and kinds["self_attn.q_proj.weight"] == torch.uint8
    )

    tiny_runs.trainer(tmp_path / "run", shared=shared).train()
    first, last = tiny_runs.logged(tmp_path / "run")
    assert first["objective/kl"] == 0 != last["objective/kl"] and last["policy/first_ratio_gap"] < 1e-5


def test_the_plan_counts_experts_at_their_full_size():
    arguments = ModelArguments("tiny", quantization="nf4", dtype="bfloat16")
    core = meta_model(
        arguments, config=AutoConfig.for_model("mixtral", **TEXT, num_local_experts=4, num_experts_per_tok=2)
    )
    experts = sum(parameter.numel() for name, parameter in core.named_parameters() if ".experts." in name)
    assert experts > 0 and read_model(core, arguments, "cuda").base > 2 * experts


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "paligemma", "smolvlm"])
def test_a_vision_model_is_refused(name):
    with pytest.raises(ValueError, match="is not a causal language model, which a base must be"):
        meta_model(ModelArguments("x"), config=AutoConfig.for_model(name))


def test_one_that_passes_for_text_stops_at_the_first_step_and_its_tower_is_named(tmp_path, monkeypatch):
    shared = shared_base(tmp_path, "gemma3", monkeypatch, layers="all", text_config=TEXT, vision_config=EYES)
    with pytest.raises(ValueError, match=r"trainable tensors have no gradient \(.*vision_tower"):
        tiny_runs.trainer(tmp_path / "run", shared=shared).train()
