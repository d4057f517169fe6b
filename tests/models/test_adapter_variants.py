"""Every way of PEFT to write an adapter that the field knows: each is exactly what PEFT reloads, in
each role, or refused with its own name before the base loads, or at the latest as it is built."""

import copy
import json
import warnings
from functools import partial

import peft
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from goose_lora.errors import UserError
from goose_lora.models.compatibility import check_fit
from goose_lora.models.folders import AdapterFolder
from goose_lora.models.loading import load_base
from goose_lora.models.shared_base import SharedBase

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
QUANTIZABLE = {"hidden_size": 66, "head_dim": 22, "intermediate_size": 64}
HEAD, RESIZED = "language-model head", r"resized vocabulary|\[63, 66\], where the base has \[61, 66\]"
TIED = "head is tied to its embeddings"


def llama(**changes):
    return tiny.base("llama", **QUANTIZABLE | changes)


def mixtral():
    # Fused products take rows of whole 16 bytes
    sizes = tiny.ARCHITECTURES["llama"] | {"hidden_size": 48, "head_dim": 16, "intermediate_size": 32}
    sizes |= {"num_local_experts": 3, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes)).eval()


tied = partial(llama, tie_word_embeddings=True)
with_bias = partial(llama, attention_bias=True)
gpt2 = partial(tiny.base, "gpt2")

# What PEFT is told, and the name with which it is refused; None where it is exact
LORA = {
    "plain": (llama, {}, None),
    "all-linear": (llama, {"target_modules": "all-linear"}, None),
    "a pattern": (llama, {"target_modules": r".*\.[34]\.(self_attn|mlp)\.(q|v|up)_proj"}, None),
    "some layers": (llama, {"layers_to_transform": [1, 4]}, None),
    "excluded": (llama, {"exclude_modules": ["k_proj"]}, None),
    "rsLoRA": (llama, {"use_rslora": True}, None),
    "patterns": (llama, {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"k_proj": 11}}, None),
    "rsLoRA, patterns": (llama, {"use_rslora": True, "rank_pattern": {"layers.3.mlp.up_proj": 2}}, None),
    "DoRA": (llama, {"use_dora": True}, None),
    "DoRA, rsLoRA": (llama, {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 5}}, None),
    "DoRA on embeddings": (llama, {"use_dora": True, "target_modules": [*LINEAR, "embed_tokens"]}, None),
    "fan_in_fan_out": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, None),
    "lora_bias": (with_bias, {"lora_bias": True}, None),
    "PiSSA": (llama, {"init_lora_weights": "pissa"}, None),
    "OLoRA": (llama, {"init_lora_weights": "olora"}, None),
    "PiSSA, embeddings": (
        llama,
        {"init_lora_weights": "pissa", "target_modules": [*LINEAR, "embed_tokens"]},
        None,
    ),
    "OLoRA, rsLoRA, embeddings": (
        llama,
        {"init_lora_weights": "olora", "use_rslora": True, "target_modules": ["up_proj", "embed_tokens"]},
        None,
    ),
    "PiSSA, DoRA": (llama, {"init_lora_weights": "pissa", "use_dora": True}, None),
    "PiSSA, last norm": (llama, {"init_lora_weights": "pissa", "modules_to_save": ["norm"]}, None),
    "PiSSA, rsLoRA, patterns": (
        llama,
        {
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": {r".*\.3\.mlp\.up_proj": 2, "q_proj": 5},
            "alpha_pattern": {"k_proj": 11},
        },
        None,
    ),
    "orthogonal": (llama, {"init_lora_weights": "orthogonal", "r": 4}, None),
    "gaussian": (llama, {"init_lora_weights": "gaussian"}, None),
    "saved embeddings": (llama, {"modules_to_save": ["embed_tokens"]}, None),
    "saved norms": (llama, {"modules_to_save": ["input_layernorm"]}, None),
    "saved blocks": (llama, {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}, None),
    "a saved layer": (llama, {"modules_to_save": ["4"], "target_modules": ["q_proj"]}, None),
    "saved positions": (
        gpt2,
        {"target_modules": ["c_attn"], "modules_to_save": ["wpe"], "fan_in_fan_out": True},
        None,
    ),
    "LoRA on positions": (gpt2, {"target_modules": ["c_attn", "wpe"], "fan_in_fan_out": True}, None),
    "saved last norm": (llama, {"modules_to_save": ["norm"]}, None),
    "embedding LoRA": (llama, {"target_modules": [*LINEAR, "embed_tokens"]}, None),
    "embedding LoRA alone": (llama, {"target_modules": ["embed_tokens"]}, None),
    "tokens": (llama, {"trainable_token_indices": [5, 6, 7]}, None),
    "tokens by name": (llama, {"trainable_token_indices": {"embed_tokens": [5, 40]}}, None),
    "experts": (
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
        None,
    ),
    "mixtral": (mixtral, {"target_modules": ["q_proj", "v_proj"]}, None),
    "tied embedding LoRA": (tied, {"target_modules": [*LINEAR, "embed_tokens"]}, None),
    "head LoRA": (llama, {"target_modules": [*LINEAR, "lm_head"]}, HEAD),
    "head LoRA alone": (llama, {"target_modules": ["lm_head"]}, HEAD),
    "saved head": (llama, {"modules_to_save": ["lm_head"]}, HEAD),
    "saved head, embeddings": (llama, {"modules_to_save": ["embed_tokens", "lm_head"]}, HEAD),
    "tokens of the head": (llama, {"trainable_token_indices": {"lm_head": [5]}}, HEAD),
    "tied tokens": (tied, {"trainable_token_indices": [5, 6]}, TIED),
    "tied saved embeddings": (tied, {"modules_to_save": ["embed_tokens"]}, TIED),
    "kept tied": (
        tied,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "ensure_weight_tying",
    ),
    "bias all": (with_bias, {"bias": "all"}, "bias='all'"),
    "bias of LoRA's": (with_bias, {"bias": "lora_only"}, "bias='lora_only'"),
    "layer_replication": (llama, {"layer_replication": [[0, 3], [2, 5]]}, "layer_replication"),
    "aLoRA": (llama, {"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
}
# Of these PEFT wants data, other adapters or other libraries: what its file says is enough
SAID = {
    "CorDA": {"init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}},
    "LoftQ": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "PiSSA by iterations": {"init_lora_weights": "pissa_niter_4"},
    "LoRA-GA": {"init_lora_weights": "lora_ga"},
    "MiLoRA": {"init_lora_weights": "milora"},
    "QALoRA": {"use_qalora": True, "qalora_group_size": 16},
    "Arrow": {"arrow_config": {"top_k": 3}},
    "BD-LoRA": {"use_bdlora": {"target_modules_bd_a": ["q_proj"]}},
    "KaSA": {"kasa_config": {"beta": 1e-4}},
    "VeLoRA": {"velora_config": {"groups": 2}},
    "Monte Carlo": {"monteclora_config": {"samples": 2}},
    "Megatron": {"megatron_config": {"tensor_model_parallel_size": 2}},
    "of next year": {"use_of_next_year": True},
}
CHOSEN = {"target_modules": ["q_proj", "up_proj"]}
OTHERS = {
    "VERA": lambda: peft.VeraConfig(**CHOSEN),
    "IA3": lambda: peft.IA3Config(**CHOSEN, feedforward_modules=["up_proj"]),
    "OFT": lambda: peft.OFTConfig(**CHOSEN, oft_block_size=2, use_cayley_neumann=False),
    "LOHA": lambda: peft.LoHaConfig(**CHOSEN),
    "LOKR": lambda: peft.LoKrConfig(**CHOSEN),
    "ADALORA": lambda: peft.AdaLoraConfig(**CHOSEN, total_step=9),
    "MISS": lambda: peft.MissConfig(**CHOSEN, r=2),
    "FOURIERFT": lambda: peft.FourierFTConfig(**CHOSEN, n_frequency=9),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=[5]),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def saved(folder, model, config):
    """Save an adapter of plain PEFT, all of it moved from its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config)
        tiny.stir(model, std=0.05)
        model.save_pretrained(folder)
    return model


def lora(**settings):
    return LoraConfig(
        **{"r": 3, "lora_alpha": 6, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | settings
    )


def says(core):
    ids, mask = tiny.batch((13, 9, 11))
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = core(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return out.logits[mask.bool()].float()


def close(got, want, tolerance=1e-4):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def assert_exact(shared, want, plain, load, tolerance=1e-4):
    """Compare each role with what PEFT reloads, ``want``, and with the base alone, ``plain``."""
    ids, mask = tiny.batch((13, 9, 11))
    for role in ("policy", "reference", "ema"):
        with shared.role(role) as core:
            close(says(core), want, tolerance)
    with shared.role("base") as core:
        close(says(core), plain)
    # What the trainer computes: through its own head, and resumed from the trunk
    counted = torch.ones(3, 5, dtype=torch.bool)
    with torch.no_grad(), shared.role("policy") as core:
        logits = core(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        log_p = logits.logits[:, -6:-1].float().log_softmax(-1)
    with torch.no_grad():
        for role, trunk in shared.trunks(ids, mask, ["policy", "reference", "value"]).items():
            states = shared.hidden(role, ids, mask)
            if role != "value":
                got = shared.logprobs(states, ids, counted)[0]
                close(got, log_p.gather(-1, ids[:, -5:, None]).squeeze(-1))
            if trunk is not None:
                close(shared.hidden(role, ids, mask, trunk)[mask.bool()], states[mask.bool()])
        close(shared.hidden("value", ids, mask), shared.hidden("policy", ids, mask))
    close(says(load()), want, tolerance)


def outcome(args, folder, base, **roles):
    """Return the shared base, or the one line with which the adapter is refused."""
    try:
        given = AdapterFolder.open("policy_adapter", folder)
        check_fit(args, tiny.tokenizer(), [given])
        return SharedBase.build(base, given, **roles)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("name", LORA)
def test_a_kind_of_lora_is_exact_in_each_role_or_refused_by_name(tmp_path, name):
    make, settings, refused = LORA[name]
    make().save_pretrained(tmp_path / "base")
    saved(tmp_path / "sft", make(), lora(**settings))
    built = outcome(
        tiny.arguments(str(tmp_path / "base")),
        tmp_path / "sft",
        make(),
        critic="adapter",
        critic_init="policy",
        average=True,
        reference="copy",
    )
    if refused is not None:
        assert isinstance(built, str) and refused in built
        assert "policy_adapter" in built and "needs a frozen copy" not in built
        return
    assert isinstance(built, SharedBase), built
    reloaded = PeftModel.from_pretrained(make(), tmp_path / "sft").eval()
    want, plain = says(reloaded), says(make())
    assert not torch.allclose(want, plain, atol=1e-2), "the adapter has an effect"
    # PEFT takes an OLoRA's start out of the weights by rounding, and is itself so far from float64
    own = (says(reloaded.double()) - want).abs().max().item() if name == "OLoRA" else 0.0
    built.save_pretrained(str(tmp_path / "out"))
    load = lambda: PeftModel.from_pretrained(make(), tmp_path / "out").eval()  # noqa: E731
    assert_exact(built, want, plain, load, tolerance=max(1e-4, 3 * own))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize(
    "name", ["rsLoRA", "DoRA", "lora_bias", "PiSSA", "saved norms", "embedding LoRA", "tokens", "head LoRA"]
)
def test_on_a_quantized_base_it_is_what_peft_makes_of_it_there(tmp_path, name, quantization):
    make, settings, refused = LORA[name]
    make().save_pretrained(tmp_path / "base")
    saved(tmp_path / "sft", make(), lora(**settings))
    args = tiny.arguments(str(tmp_path / "base"), quantization=quantization)
    refused = {("PiSSA", quantization): "quantized base", ("DoRA", "int8"): "use_dora"}.get(
        (name, quantization), refused
    )

    def load():
        return load_base(args, tiny.tokenizer(), device=torch.device("cpu"))

    roles = {"critic": "adapter", "critic_init": "policy", "average": True, "reference": "copy"}
    built = outcome(args, tmp_path / "sft", load(), **roles)
    if refused is not None:
        assert isinstance(built, str) and refused in built
        return
    assert isinstance(built, SharedBase), built
    built.save_pretrained(str(tmp_path / "out"))
    want = says(PeftModel.from_pretrained(load(), tmp_path / "sft").eval())
    assert_exact(
        built, want, says(load()), lambda: PeftModel.from_pretrained(load(), tmp_path / "out").eval()
    )


@pytest.mark.parametrize("name", SAID)
def test_a_kind_whose_start_or_forward_is_not_loras_is_refused_by_its_setting(tmp_path, name):
    llama().save_pretrained(tmp_path / "base")
    saved(tmp_path / "sft", llama(), lora())
    path = tmp_path / "sft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SAID[name]))
    line = outcome(tiny.arguments(str(tmp_path / "base")), tmp_path / "sft", llama())
    setting = next(iter(SAID[name]))
    assert isinstance(line, str) and f"{setting}={SAID[name][setting]!r}" in line


@pytest.mark.parametrize("kind", OTHERS)
def test_another_method_of_peft_is_refused_by_its_type(tmp_path, kind):
    llama().save_pretrained(tmp_path / "base")
    saved(tmp_path / "sft", llama(), OTHERS[kind]())
    line = outcome(tiny.arguments(str(tmp_path / "base")), tmp_path / "sft", llama())
    assert isinstance(line, str) and f"is a {kind} adapter" in line


def test_eva_as_peft_itself_starts_it_is_exact(tmp_path):
    ids, mask = tiny.batch((13, 9, 11))
    model = get_peft_model(llama(), lora(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0)))
    data = DataLoader([{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)] * 8)
    peft.initialize_lora_eva_weights(model, data)
    tiny.stir(model, std=0.05)
    model.save_pretrained(tmp_path / "sft")
    plain = copy.deepcopy(llama())
    plain.save_pretrained(tmp_path / "base")
    shared = outcome(tiny.arguments(str(tmp_path / "base")), tmp_path / "sft", llama())
    assert isinstance(shared, SharedBase), shared
    with shared.role("policy") as core:
        close(says(core), says(model.eval()))


@pytest.mark.parametrize("how", ["modules_to_save", "save_embedding_layers"])
def test_a_resized_vocabulary_is_refused_with_its_sizes_and_a_way_out(tmp_path, how):
    llama().save_pretrained(tmp_path / "base")
    model = llama()
    model.resize_token_embeddings(tiny.VOCABULARY + 2)
    if how == "modules_to_save":
        saved(tmp_path / "sft", model, lora(modules_to_save=["embed_tokens"]))
    else:
        get_peft_model(model, lora()).save_pretrained(tmp_path / "sft", save_embedding_layers=True)
    args = tiny.arguments(str(tmp_path / "base"))
    given = AdapterFolder.open("policy_adapter", tmp_path / "sft")
    with pytest.raises(UserError, match=rf"{RESIZED}|{HEAD}"):
        check_fit(args, tiny.tokenizer(), [given])
