"""goose_lora.models.role_checks: a role is the model that it stands for, or is refused by name.

Compared with transformers' own logits, PEFT's own reload and transformers' own classifiers.
"""

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from goose_lora.errors import UserError
from goose_lora.models import role_checks
from goose_lora.models.compatibility import check_fit
from goose_lora.models.dense_copy import DenseCopy, make_dense_copy
from goose_lora.models.folders import steady_length
from goose_lora.models.shared_base import SharedBase
from goose_lora.models.trunk import decoder_layers

LINEAR = ["q_proj", "k_proj", "v_proj", "up_proj"]
SIZES = {
    "vocab_size": tiny.VOCABULARY,
    "pad_token_id": tiny.PAD,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 32,
    "max_position_embeddings": 127,
    "initializer_range": 0.3,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
SCALED = {
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "minicpm3": LATENT | {"v_head_dim": 16, "dim_model_base": 16, "num_key_value_heads": 4},
    "gemma2": {"sliding_window": 7, "final_logit_softcapping": 2.0},
}


def model_of(kind, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | changes)).eval()


def built(base, policy=None, **roles):
    shared = SharedBase.build(base, policy or tiny.lora(base), **roles)
    if policy is None:
        tiny.randomise(shared)
    return shared


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def own_logprobs(model, ids, mask, tokens=5):
    """Of the last tokens, and entropies, by transformers' own forward."""
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    log_p = out.logits[:, -tokens - 1 : -1].log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, ids[:, -tokens:, None]).squeeze(-1), entropy


def ours(shared, role, ids, mask, tokens=5, **options):
    counted = torch.ones(len(ids), tokens, dtype=torch.bool)
    return shared.logprobs(shared.hidden(role, ids, mask), ids, counted, **options)


def close(got, want, tolerance=2e-5):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def saved(folder, base, **settings):
    """A trained adapter of plain PEFT, and what its model says."""
    peft = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **settings))
    tiny.stir(peft, std=0.1)
    peft.save_pretrained(folder)
    return peft.eval()


@pytest.mark.parametrize("kind", SCALED)
def test_logprobs_are_those_of_the_models_own_logits(kind):
    shared, (ids, mask) = built(model_of(kind, **SCALED[kind])), tiny.batch()
    with torch.no_grad():
        with shared.role("policy") as core:
            want = own_logprobs(core, ids, mask)
        close(ours(shared, "policy", ids, mask), want)


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_gradients_through_a_scaled_head_are_autograds(entropy_gradient):
    base = model_of("granite", logits_scaling=8.0)
    shared, (ids, mask) = built(base), tiny.batch()
    weights = torch.linspace(0.3, 1, 5)

    def gradients(logprobs, entropies):
        shared.zero_grad()
        loss = (logprobs * weights).sum()
        if entropy_gradient:
            loss = loss + (entropies * weights.flip(0)).sum()
        loss.backward()
        return {n: p.grad.clone() for n, p in shared.named_parameters() if p.grad is not None}

    with shared.role("policy") as core:
        want = gradients(*own_logprobs(core, ids, mask))
    got = gradients(*ours(shared, "policy", ids, mask, entropy_gradient=entropy_gradient))
    assert want and got.keys() == want.keys()
    for name, gradient in got.items():
        close(gradient, want[name], 1e-5 * max(1.0, want[name].abs().max().item()))


def test_exact_kl_goes_through_a_scaled_head():
    shared, (ids, mask) = built(model_of("granite", logits_scaling=8.0)), tiny.batch()
    counted = torch.ones(len(ids), 5, dtype=torch.bool)
    with torch.no_grad():
        logits = {}
        for role in ("policy", "base"):
            with shared.role(role) as core:
                out = core(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
            logits[role] = out.logits[:, -6:-1].log_softmax(-1)
        want = (logits["policy"].exp() * (logits["policy"] - logits["base"])).sum(-1)
        policy, base = (shared.hidden(role, ids, mask)[:, -6:-1] for role in ("policy", "base"))
        close(shared.exact_kl(policy, base, counted), want)


@pytest.mark.parametrize("setting", ["target_modules", "modules_to_save"])
def test_an_adapter_on_the_head_is_refused_before_training(tmp_path, setting):
    settings = {"target_modules": LINEAR, setting: [*LINEAR, "lm_head"]}
    if setting == "modules_to_save":
        settings[setting] = ["lm_head"]
    saved(tmp_path, tiny.base(), **settings)
    with pytest.raises(UserError, match="language-model head"):
        built(tiny.base(), tmp_path)


def test_a_base_that_an_adapter_changes_is_refused():
    base = tiny.base()
    bare = role_checks.own_answer(base)
    shared = built(base)
    with torch.no_grad():
        next(p for n, p in shared.named_parameters() if "q_proj.base_layer" in n).add_(0.5)
    with pytest.raises(UserError, match="adapters off"):
        role_checks.check_against_model(shared, bare)


def test_a_score_is_compared_with_the_classifiers(tmp_path, monkeypatch):
    judge = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("llama", **tiny.ARCHITECTURES["llama"], num_labels=1)
    )
    peft = get_peft_model(judge, tiny.lora(judge, task_type="SEQ_CLS", modules_to_save=["score"]))
    peft.save_pretrained(tmp_path)
    assert built(tiny.base(), reward=tmp_path).has("reward")
    monkeypatch.setattr(SharedBase, "read_scores", lambda self, hidden, mask, role: hidden[:, -2, 0])
    with pytest.raises(UserError, match="the score"):
        built(tiny.base(), reward=tmp_path)


COPIED = {
    "embedding LoRA": {"target_modules": [*LINEAR, "embed_tokens"]},
    "embeddings": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": LINEAR, "trainable_token_indices": [5, 6, 7, 40, 41]},
    "DoRA": {"target_modules": LINEAR, "use_dora": True},
    "bias": {"target_modules": LINEAR, "lora_bias": True},
}


@pytest.mark.parametrize("what", COPIED)
def test_copies_of_a_role_have_all_that_it_has(tmp_path, what):
    peft, (ids, mask) = saved(tmp_path, tiny.base(), **COPIED[what]), tiny.batch()
    shared = built(tiny.base(), tmp_path, critic="adapter", critic_init="policy", average=True)
    reloaded = PeftModel.from_pretrained(tiny.base(), tmp_path).eval()
    with torch.no_grad():
        want = own_logprobs(peft, ids, mask)
        close(own_logprobs(reloaded, ids, mask), want)
        for role in ("policy", "reference", "ema"):
            close(ours(shared, role, ids, mask), want)
        close(shared.hidden("value", ids, mask), shared.hidden("policy", ids, mask))
        close(ours(shared, "base", ids, mask), own_logprobs(tiny.base(), ids, mask))
        shared.update_average(0.5)
        close(ours(shared, "ema", ids, mask), want)


def test_a_trunk_is_not_shared_where_embeddings_differ(tmp_path):
    settings = {"layers_to_transform": [3, 4], "target_modules": LINEAR}
    saved(tmp_path / "policy", tiny.base(), modules_to_save=["embed_tokens"], **settings)
    shared = built(tiny.base(), tmp_path / "policy", reference="base", train_layers="top-2")
    ids, mask = tiny.batch()
    trunks = shared.trunks(ids, mask, ["policy", "reference"])
    with torch.no_grad():
        for role, trunk in trunks.items():
            close(shared.hidden(role, ids, mask, trunk), shared.hidden(role, ids, mask))
    assert trunks["policy"] is not None and trunks["reference"] is not trunks["policy"]


@pytest.mark.parametrize("what", ["embeddings", "tokens", "DoRA", "bias"])
def test_a_merged_copy_is_refused_where_it_would_be_another_model(tmp_path, what):
    saved(tmp_path, tiny.base(), **COPIED[what])
    shared = built(tiny.base(), tmp_path)
    assert make_dense_copy(shared, "auto") is None
    for make in (lambda: make_dense_copy(shared, "dense"), lambda: DenseCopy(shared)):
        with pytest.raises(UserError, match="plain LoRA only"):
            make()


def test_a_merged_copy_that_says_something_else_is_not_used(monkeypatch):
    shared = built(tiny.base())
    assert make_dense_copy(shared, "auto") is not None
    merge = DenseCopy.merge_role
    monkeypatch.setattr(DenseCopy, "merge_role", lambda self, role: merge(self, "base"))
    assert make_dense_copy(shared, "auto") is None
    with pytest.raises(UserError, match="nats a token away from the policy"):
        make_dense_copy(shared, "dense")


def test_models_whose_layers_return_tuples_run_whole_passes():
    torch.manual_seed(0)
    config = AutoConfig.for_model("bloom", hidden_size=48, n_layer=4, n_head=4, vocab_size=tiny.VOCABULARY)
    base = AutoModelForCausalLM.from_config(config).eval()
    shared, (ids, mask) = built(base, tiny.lora(base, layers="top-2")), tiny.batch()
    assert shared.capture_depth(merged=False) == 0
    assert shared.trunks(ids, mask, ["policy", "reference"]) == {"policy": None, "reference": None}


def test_parameters_of_the_base_that_are_called_like_a_role_belong_to_none():
    """BERT's attention has a module called value."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert",
        is_decoder=True,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=32,
        vocab_size=tiny.VOCABULARY,
    )
    base = AutoModelForCausalLM.from_config(config).eval()
    shared = SharedBase.build(base, LoraConfig(r=3, target_modules=["query"]), critic="adapter")
    assert all("lora_" in name or "score" in name for name, _ in shared.role_parameters("value"))


NOT_FINITE = [float("nan"), float("inf")]


@pytest.mark.parametrize("number", NOT_FINITE)
@pytest.mark.parametrize("place", ["model.layers.3.mlp.up_proj", "model.norm", "lm_head"])
def test_a_base_with_numbers_that_are_not_finite_is_named_with_its_tensor(place, number):
    base = tiny.base()
    with torch.no_grad():
        base.get_submodule(place).weight.view(-1)[5] = number
    with pytest.raises(UserError, match=rf"the base says is not finite: .*{place}.weight has numbers"):
        built(base)


@pytest.mark.parametrize("number", NOT_FINITE)
@pytest.mark.parametrize("role", ["policy", "reference", "reward"])
def test_an_adapter_with_numbers_that_are_not_finite_is_named_with_its_tensor(tmp_path, role, number):
    task = "SEQ_CLS" if role == "reward" else "CAUSAL_LM"
    model = tiny.base()
    if role == "reward":
        model = AutoModelForSequenceClassification.from_config(
            AutoConfig.for_model("llama", **tiny.ARCHITECTURES["llama"], num_labels=1)
        )
    peft = get_peft_model(model, tiny.lora(model, task_type=task))
    # One that seven tokens need not meet
    name, last = [pair for pair in peft.named_parameters() if "lora_B" in pair[0]][-1]
    with torch.no_grad():
        last[0, 0] = number
    peft.save_pretrained(tmp_path)
    roles = {"policy": {}, "reference": {"reference": tmp_path}, "reward": {"reward": tmp_path}}[role]
    with pytest.raises(UserError, match=rf"for the role {role}: .*{name.partition('.default')[0]}.*finite"):
        built(tiny.base(), tmp_path if role == "policy" else None, **roles)


def test_logits_that_overflow_in_the_models_dtype_are_said_to_be_that():
    base = tiny.base().half()
    with torch.no_grad():
        for layer in base.model.layers:
            layer.mlp.down_proj.weight.fill_(6e4)
            layer.mlp.up_proj.weight.fill_(6e4)
    with pytest.raises(UserError, match=r"its own tensors are\. Use a wider dtype than torch.float16"):
        built(base)


def test_the_checks_take_six_passes_and_the_last_layer_once_more():
    """The base before and after, and of the policy its own pass, ours, a prompt and one step."""
    base = tiny.base()
    layers, calls = decoder_layers(base), []
    for index, layer in enumerate(layers):
        layer.self_attn.register_forward_hook(lambda *call, index=index: calls.append(index))
    SharedBase.build(base, tiny.lora(base), reference="copy", critic="adapter")
    assert [calls.count(index) for index in range(len(layers))] == [6] * (len(layers) - 1) + [7]


# ---- Frequencies that change with the longest text ----

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 7,
    "long_factor": [3.0] * 7,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 12,
}


@torch.no_grad()
def test_up_to_its_steady_length_a_text_has_the_same_logits_beside_any_other():
    model = tiny.base("phi3", original_max_position_embeddings=12, rope_parameters=LONGROPE).eval()
    steady = steady_length(model.config)
    assert steady == 12

    def beside(length):
        """How far the logits of a short text move beside one of this length."""
        ids, mask = tiny.batch((5, length), seed=4)
        both = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits[0, -5:]
        return (both - model(input_ids=ids[:1, -5:]).logits[0]).abs().max().item()

    assert beside(steady) < 1e-4 < 0.1 < beside(steady + 1)


def test_of_layers_of_several_kinds_the_first_change_counts():
    config = model_of("llama").config
    assert steady_length(config) is None
    config.rope_parameters = {
        "full_attention": LONGROPE,
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert steady_length(config) == 12


def test_a_run_whose_texts_pass_the_steady_length_is_refused(tmp_path):
    tiny.base("phi3", original_max_position_embeddings=12, rope_parameters=LONGROPE).save_pretrained(tmp_path)
    check_fit(tiny.arguments(str(tmp_path)), tiny.tokenizer(), [], tokens=12)
    with pytest.raises(
        UserError, match=r"make 13 tokens, and above 12 the positions of .* \(rope_type: longrope\)"
    ):
        check_fit(tiny.arguments(str(tmp_path)), tiny.tokenizer(), [], tokens=13)
