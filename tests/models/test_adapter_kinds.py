"""goose_lora.models.adapter_kinds: an adapter is exactly what PEFT reloads, or refused by name."""

import json

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from goose_lora.errors import UserError
from goose_lora.models.compatibility import check_fit
from goose_lora.models.folders import AdapterFolder
from goose_lora.models.loading import load_base
from goose_lora.models.shared_base import SharedBase

LINEAR = ["q_proj", "v_proj", "up_proj"]


def saved(folder, base, **settings):
    config = LoraConfig(**{"r": 3, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | settings)
    peft = get_peft_model(base, config)
    tiny.stir(peft, std=0.05)
    peft.save_pretrained(folder)
    return peft.eval()


def logits(model):
    ids, mask = tiny.batch()
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    return out.logits[mask.bool()]


def says(shared, role):
    with shared.role(role) as core:
        return logits(core)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


STARTS = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa, rsLoRA and patterns": {
        "init_lora_weights": "pissa",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 5},
    },
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("start", STARTS)
def test_an_initialiser_leaves_the_shared_base_alone(tmp_path, start, architecture):
    settings = dict(STARTS[start])
    if architecture == "gpt2":
        if start not in ("pissa", "olora"):
            pytest.skip("its names are another model's")
        settings |= {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    if start == "olora" and architecture == "gpt2":
        # PEFT's OLoRA passes over fan_in_fan_out: a layer that is not square has swapped factors
        settings["target_modules"] = ["attn.c_proj"]
    trained = saved(tmp_path / "sft", tiny.base(architecture), **settings)
    base = tiny.base(architecture)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    shared = SharedBase.build(base, tmp_path / "sft", critic="adapter", critic_init="policy", average=True)
    for role in ("policy", "reference", "ema", "value"):
        close(says(shared, role), logits(trained))
    close(says(shared, "base"), logits(tiny.base(architecture)))
    now = {name.replace(".base_layer", ""): tensor for name, tensor in shared.core.state_dict().items()}
    assert all(torch.equal(tensor, now[name]) for name, tensor in weights.items())
    # As a user loads what a run saves
    shared.save_pretrained(str(tmp_path / "out"))
    close(
        logits(PeftModel.from_pretrained(tiny.base(architecture), tmp_path / "out").eval()), logits(trained)
    )


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_subtracted_start_on_a_quantized_base_is_refused(tmp_path, start):
    args = tiny.arguments(
        tiny.save_base(tmp_path / "base", hidden_size=48, intermediate_size=64), quantization="nf4"
    )
    model = tiny.base(hidden_size=48, intermediate_size=64)
    saved(tmp_path / "sft", model, init_lora_weights=start)
    with pytest.raises(UserError, match="quantized base"):
        SharedBase.build(load_base(args, tiny.tokenizer()), tmp_path / "sft")


def test_what_pefts_olora_leaves_on_a_transposed_weight_is_refused_by_its_cause(tmp_path):
    """PEFT can save such an adapter, and fails itself where it is run."""
    adapter = saved(tmp_path / "sft", tiny.base("gpt2"), init_lora_weights="olora", target_modules=["c_attn"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        logits(adapter)
    with pytest.raises(UserError, match=r"olora.*c_attn.*Conv1D"):
        SharedBase.build(tiny.base("gpt2"), tmp_path / "sft")


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq", "corda", "pissa_niter_4", "lora_ga"])
def test_a_fresh_adapter_whose_start_changes_the_base_is_refused(start):
    config = tiny.lora(tiny.base())
    config.init_lora_weights = start
    with pytest.raises(UserError, match="init_lora_weights"):
        SharedBase.build(tiny.base(), config)


UNKNOWN = {
    "init_lora_weights": "loftq",
    "bias": "lora_only",
    "layer_replication": [[0, 3], [2, 5]],
    "use_qalora": True,
    "alora_invocation_tokens": [5, 6],
    "a_setting_of_next_year": 3,
}


@pytest.mark.parametrize("setting", UNKNOWN)
def test_settings_that_are_not_known_are_refused_by_name(tmp_path, setting):
    base = tiny.save_base(tmp_path / "base")
    saved(tmp_path / "sft", tiny.base())
    path = tmp_path / "sft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: UNKNOWN[setting]}))
    with pytest.raises(UserError, match=setting):
        check_fit(
            tiny.arguments(base), tiny.tokenizer(), [AdapterFolder.open("policy_adapter", tmp_path / "sft")]
        )
    with pytest.raises(UserError, match=setting):
        SharedBase.build(tiny.base(), tmp_path / "sft")


PARTS = {
    "lm_head": ({"target_modules": [*LINEAR, "lm_head"]}, "language-model head"),
    "saved head": ({"modules_to_save": ["lm_head"]}, "language-model head"),
    "embeddings": ({"modules_to_save": ["embed_tokens"]}, None),
    "norms": ({"modules_to_save": ["input_layernorm"]}, None),
    "tokens": ({"trainable_token_indices": [5, 6]}, None),
    "embedding LoRA": ({"target_modules": [*LINEAR, "embed_tokens"]}, None),
    "DoRA": ({"use_dora": True}, None),
    "bias": ({"lora_bias": True}, None),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_are_judged_before_the_base_loads(tmp_path, part):
    settings, refused = PARTS[part]
    saved(tmp_path / "sft", tiny.base(), **settings)
    args = tiny.arguments(tiny.save_base(tmp_path / "base"))
    given = [AdapterFolder.open("policy_adapter", tmp_path / "sft")]
    if refused is None:
        check_fit(args, tiny.tokenizer(), given)
        return
    with pytest.raises(UserError, match=refused):
        check_fit(args, tiny.tokenizer(), given)


@pytest.mark.parametrize(
    "settings", [{"trainable_token_indices": [5]}, {"modules_to_save": ["embed_tokens"]}]
)
def test_tokens_of_a_tied_head_are_refused(tmp_path, settings):
    saved(tmp_path / "sft", tiny.base(tie_word_embeddings=True), **settings)
    args = tiny.arguments(tiny.save_base(tmp_path / "base", tie_word_embeddings=True))
    with pytest.raises(UserError, match="tied"):
        check_fit(args, tiny.tokenizer(), [AdapterFolder.open("policy_adapter", tmp_path / "sft")])


def test_a_resized_vocabulary_is_refused_with_both_sizes(tmp_path):
    model = tiny.base()
    model.resize_token_embeddings(tiny.VOCABULARY + 2)
    saved(tmp_path / "sft", model, modules_to_save=["embed_tokens"])
    args = tiny.arguments(tiny.save_base(tmp_path / "base"))
    with pytest.raises(UserError, match=r"\[63, 33\], where the base has \[61, 33\]"):
        check_fit(args, tiny.tokenizer(), [AdapterFolder.open("policy_adapter", tmp_path / "sft")])


def test_a_resized_vocabulary_is_named_as_the_adapters_not_as_a_fault_of_the_base(tiny_base, tmp_path):
    shared = tiny.shared(tiny.base())
    shared.save_pretrained(str(tmp_path / "sft"), selected_adapters=["default"])
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"<new{number}>" for number in range(tiny.VOCABULARY)])
    tokenizer.save_pretrained(tmp_path / "sft")
    adapter = AdapterFolder.open("policy_adapter", tmp_path / "sft")
    with pytest.raises(
        UserError, match=r"policy_adapter: .*sft came with a tokenizer of .*resized vocabulary"
    ):
        check_fit(tiny.arguments(tiny_base), tokenizer, [adapter])
