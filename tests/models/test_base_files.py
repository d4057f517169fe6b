"""goose_lora.models.base_files: a base that is not whole is refused before a weight is read."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from goose_lora.errors import UserError
from goose_lora.models import loading
from goose_lora.models.base_files import require_whole
from goose_lora.models.loading import load_base, load_reward_base, load_tokenizer


def changed(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


BROKEN = {
    "renamed": lambda w: {name.replace("layers.1.mlp", "layers.1.mpl"): t for name, t in w.items()},
    "a layer missing": lambda w: {name: t for name, t in w.items() if "layers.2." not in name},
    "no head": lambda w: {name: t for name, t in w.items() if name != "lm_head.weight"},
    "another shape": lambda w: w | {"model.norm.weight": torch.ones(7)},
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("load", [load_base, load_reward_base])
def test_a_base_that_is_not_whole_is_refused_before_its_weights_load(tmp_path, monkeypatch, what, load):
    args = tiny.arguments(tiny.save_base(tmp_path))
    tokenizer = load_tokenizer(args)
    assert load(args, tokenizer) is not None
    changed(tmp_path, BROKEN[what])
    monkeypatch.setattr(loading, "read_weights", None)
    with pytest.raises(UserError, match=r"tensors of the model are not in its files|has the shape"):
        load(args, tokenizer)


def test_a_tied_head_is_not_missed(tmp_path):
    args = tiny.arguments(tiny.save_base(tmp_path, tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load_base(args, load_tokenizer(args))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_that_transformers_fuses_are_not_missed(tmp_path, kind):
    sizes = tiny.ARCHITECTURES["llama"] | {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}
    config = AutoConfig.for_model(kind, **sizes, moe_intermediate_size=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    require_whole(tiny.arguments(str(tmp_path)))
    changed(
        tmp_path, lambda w: {name: t for name, t in w.items() if "layers.1." not in name or "norm" in name}
    )
    with pytest.raises(UserError, match="not in its files"):
        require_whole(tiny.arguments(str(tmp_path)))


def test_a_base_saved_in_4_bits_is_named_truthfully(tmp_path):
    tiny.save_base(tmp_path / "base", hidden_size=64, intermediate_size=64, num_attention_heads=4)
    in_4_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=in_4_bits, device_map={"": "cpu"}, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "small")
    tiny.tokenizer().save_pretrained(tmp_path / "small")
    args = tiny.arguments(str(tmp_path / "small"), quantization="nf4")
    load_base(args, load_tokenizer(args))
    for asked in ("int8", "none"):
        with pytest.raises(UserError, match=r"saved in 4 bits \(nf4\).*Set quantization: nf4"):
            require_whole(tiny.arguments(str(tmp_path / "small"), quantization=asked))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4"])
def test_other_quantizations_are_refused_by_name(tmp_path, method):
    path = Path(tiny.save_base(tmp_path)) / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}})
    )
    with pytest.raises(UserError, match=f"quantized by {method}"):
        require_whole(tiny.arguments(str(tmp_path)))
