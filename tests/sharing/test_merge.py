"""Merging: plain transformers loads the result, it says what the adapter's model says, and 4 bits
are only written where asked for."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import tiny_chain
import torch
from cards import unexplained
from huggingface_hub import ModelCard
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from goose_lora import cli
from goose_lora.models.folders import read_lineage, write_lineage
from goose_lora.models.loading import load_base, load_tokenizer
from goose_lora.models.shared_base import SharedBase
from goose_lora.sharing import merge
from goose_lora.sharing.provenance import describe_chain


@pytest.fixture
def run(adapter_chain, tmp_path):
    return tiny_chain.copy(adapter_chain, tmp_path / "run")


def quantized_as(run, quantization, dtype="bfloat16"):
    noted = read_lineage(run / "ppo")
    write_lineage(
        run / "ppo", **(noted | {"base": noted["base"] | {"quantization": quantization, "dtype": dtype}})
    )


def adapter_model(run, quantization, dtype="bfloat16"):
    args = tiny.arguments(str(run / "base"), quantization=quantization, dtype=dtype)
    return SharedBase.build(load_base(args, load_tokenizer(args)), run / "ppo")


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [("nf4", "float32"), ("int8", "float32"), ("none", "float32"), ("nf4", "bfloat16"), ("none", "bfloat16")],
)
@torch.no_grad()
def test_plain_transformers_loads_the_merged_model_and_it_gives_the_adapters_logits(
    run, tmp_path, quantization, dtype
):
    quantized_as(run, quantization, dtype)
    said = merge.merge(run / "ppo", tmp_path / "out", dtype=dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        merge.DTYPES[dtype]
    }
    assert "quantization_config" not in merged.config.to_dict()
    shared = adapter_model(run, quantization, dtype)
    ids, mask = tiny.batch((11, 9), seed=5)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with shared.role("policy") as core, shared.autocast():
        want = core(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float()[mask.bool()]
    with shared.role("base") as core, shared.autocast():
        bare = core(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float()[mask.bool()]
    got = merged(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float()[mask.bool()]
    effect = (want - bare).abs().mean()
    assert effect > 0.1, "the adapter must show"
    if dtype == "float32":
        torch.testing.assert_close(got, want, rtol=0, atol=2e-4)
    # 8 bits of weights and activations, which each CPU rounds in its own way: 0.02 of what the
    # adapter does, where it was measured
    else:
        assert (got - want).abs().mean() < 0.1 * effect
    noted = read_lineage(tmp_path / "out")["figures"]
    assert 0 <= noted["kl"] + 1e-6 < 1e-2 and noted["prompts"] == 6 and "nats a token (6 prompts" in said


def test_in_float32_a_bfloat16_base_and_its_adapter_are_added_without_rounding(run, tmp_path):
    shared = adapter_model(run, "nf4")
    for dtype in (torch.float32, torch.bfloat16):
        merge.write_dense(shared, dtype, tmp_path / str(dtype))
    whole, rounded = (
        load_file(tmp_path / str(dtype) / "model.safetensors") for dtype in (torch.float32, torch.bfloat16)
    )
    assert whole.keys() == rounded.keys() and all(
        torch.equal(whole[name].bfloat16(), rounded[name]) for name in whole
    )
    finer = {name for name in whole if not torch.equal(whole[name].bfloat16().float(), whole[name])}
    assert finer == {
        name for name in whole if "proj" in name and ("layers.3." in name or "layers.4." in name)
    }, "what has an adapter"


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
@torch.no_grad()
def test_a_tied_head_is_written_once_in_the_dtype_asked_for_and_the_base_keeps_its_own(
    architecture, tmp_path
):
    shared = tiny.shared(tiny.base(architecture), layers="top-2")
    before = {name: (parameter.dtype, parameter.data_ptr()) for name, parameter in shared.named_parameters()}
    merge.write_dense(shared, torch.bfloat16, tmp_path)
    assert {
        name: (parameter.dtype, parameter.data_ptr()) for name, parameter in shared.named_parameters()
    } == before
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors and {tensor.dtype for tensor in tensors.values()} == {
        torch.bfloat16
    }
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids, _ = tiny.batch((9, 9), seed=5)
    with shared.role("policy") as core:
        want = core(input_ids=ids).logits
    with shared.role("base") as core:
        off = (core(input_ids=ids).logits - want).abs().mean()
    assert (merged(input_ids=ids).logits - want).abs().mean() < 0.05 * off, (
        "weights rounded to bf16, and nothing else"
    )


def test_tokenizer_template_and_generation_settings_come_along_with_a_card_of_measured_numbers(run, tmp_path):
    GenerationConfig(eos_token_id=2, pad_token_id=0, do_sample=True, top_k=7).save_pretrained(run / "base")
    merge.merge(run / "ppo", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny.tokenizer().chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "out").top_k == 7
    text = (tmp_path / "out" / "README.md").read_text()
    assert ModelCard(text).data.library_name == "transformers" and "nats a token" in text
    assert unexplained(tmp_path / "out", text) == []
    chain = read_lineage(tmp_path / "out")["parents"]["policy"]["lineage"]
    assert chain["stage"] == "ppo" and chain["parents"]["policy"]["lineage"]["stage"] == "sft"
    assert "merge " in describe_chain(
        tmp_path / "out"
    ) and 'AutoModelForCausalLM.from_pretrained("' in describe_chain(tmp_path / "out")


def test_four_bits_are_refused_unless_asked_for_and_then_both_kls_are_shown(
    run, tmp_path, monkeypatch, capsys
):
    words = ["goose-lora", "merge", str(run / "ppo"), "--out", str(tmp_path / "out"), "--dtype", "nf4"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        cli.main()
    assert (
        "merging into 4 bits rounds the adapter away" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )
    monkeypatch.setattr(sys, "argv", [*words, "--quantized"])
    cli.main()
    shown = capsys.readouterr().out
    figures = read_lineage(tmp_path / "out")["figures"]
    assert figures["kl_nf4"] > 10 * abs(figures["kl"]) > 0, "rounding again loses more than bf16 does"
    assert f"{figures['kl']:.3g} nats a token" in shown and f"{figures['kl_nf4']:.3g} nats a token" in shown
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.quantization_config.load_in_4bit
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"{figures['kl_nf4']:.4g} nats a token" in text and unexplained(tmp_path / "out", text) == []


@torch.no_grad()
def test_the_kl_is_that_of_the_definition(run):
    quantized_as(run, "none", "float32")
    shared = adapter_model(run, "none", "float32")
    tokenizer = load_tokenizer(tiny_chain.arguments(str(run / "base")))
    rollout = merge._replies(shared, tokenizer, [[1, 5, 6], [1, 7]])
    # No adapter: far away
    other = AutoModelForCausalLM.from_pretrained(run / "base", dtype=torch.float32).eval()
    want = []
    for row in range(2):
        real = rollout.attention_mask[row].bool()
        ids = rollout.input_ids[row][real]
        with shared.role("policy") as core:
            p = core(input_ids=ids[None]).logits[0].double().softmax(-1)
        q = other(input_ids=ids[None]).logits[0].double().softmax(-1)
        for position in range(len(ids) - int(rollout.response_mask[row].sum()), len(ids)):
            want.append(float((p[position - 1] * (p[position - 1] / q[position - 1]).log()).sum()))
    assert merge.kl_to_adapter(shared, other, rollout) == pytest.approx(sum(want) / len(want), rel=1e-4)
    assert sum(want) / len(want) > 0.05


def test_prompts_of_ones_own_are_used_and_noted(run, tmp_path):
    for name in ("samples.jsonl", "tokenizer.json"):  # as an adapter that came from the Hub
        (run / "ppo" / name).unlink()
    (run / "ppo" / "chat_template.jinja").write_text("of the run")
    with pytest.raises(ValueError, match="no prompts to measure on: --prompts FILE"):
        merge.merge(run / "ppo", tmp_path / "out")
    mine = tiny.write_rows(tmp_path / "mine.jsonl", tiny.prompts(3))
    merge.merge(run / "ppo", tmp_path / "out", prompts=mine)
    noted = read_lineage(tmp_path / "out")
    assert (
        noted["figures"]["prompts"] == 3
        and noted["data"][0]["name"] == mine
        and noted["data"][0]["rows"] == 3
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "of the run"


def test_what_cannot_be_merged_is_refused_before_anything_is_loaded(run, tmp_path):
    with pytest.raises(ValueError, match="is a reward model"):
        merge.merge(run / "reward", tmp_path / "out")
    with pytest.raises(ValueError, match="is not empty"):
        merge.merge(run / "ppo", run / "sft")
    (run / "ppo" / "goose_lora.json").unlink()
    with pytest.raises(ValueError, match=r"no goose_lora.json that tells how the base was quantized.*show"):
        merge.merge(run / "ppo", tmp_path / "out")


@pytest.mark.parametrize(
    ("setting", "value", "kind"),
    [
        ("use_dora", True, "is a DoRA adapter (use_dora)"),
        ("modules_to_save", ["embed_tokens"], "has whole modules of its own (modules_to_save)"),
        ("lora_bias", True, "has biases of its own (lora_bias)"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused_in_words_before_anything_loads(
    run, tmp_path, monkeypatch, setting, value, kind
):
    path = run / "ppo" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    monkeypatch.setattr(merge, "load_base", None)
    with pytest.raises(ValueError) as refused:
        merge.merge(run / "ppo", tmp_path / "out")
    said = str(refused.value)
    assert kind in said and f"Train one without {setting}" in said
    assert ("merge_and_unload" in said) == merge._NOT_PLAIN[setting][1] == (setting != "lora_bias")
    assert "(into the base as it is, not in nf4 as in training)" in said or setting == "lora_bias"


@pytest.mark.parametrize(
    "changes",
    [{"use_dora": True}, {"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3, 5]}],
    ids=lambda changes: next(iter(changes)),
)
@torch.no_grad()
def test_the_merge_of_peft_that_a_refusal_names_is_exact(changes):
    model = get_peft_model(tiny.base(), tiny.lora(tiny.base(), **changes)).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in (each for each in model.parameters() if each.requires_grad):
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    ids = torch.arange(3, 12)[None]
    want = model(input_ids=ids).logits
    with model.disable_adapter():
        assert (model(input_ids=ids).logits - want).abs().max() > 0.1, "the adapter must show"
    got = model.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


def test_a_base_named_relative_to_where_training_began_is_found_above_the_run(run, tmp_path, monkeypatch):
    noted = read_lineage(run / "ppo")
    relative = {**noted["base"], "id": "run/base"}
    write_lineage(run / "ppo", **(noted | {"base": relative}))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    merge.merge(run / "ppo", tmp_path / "out")
    assert read_lineage(tmp_path / "out")["base"]["id"] == str(run / "base")
    # Another model of that name is another model
    write_lineage(run / "ppo", **(noted | {"base": relative | {"content": "0"}}))
    monkeypatch.setattr(merge, "load_base", None)
    with pytest.raises(ValueError, match=r"was the folder run/base, which is neither here nor above.*--base"):
        merge.merge(run / "ppo", tmp_path / "again")


@pytest.mark.parametrize("what", ["a link", "a file", "a folder with files", "a disk of its own"])
def test_a_merge_into_what_cannot_be_replaced_is_refused_before_anything_loads(
    what, run, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    if what == "a file":
        out.write_text("mine")
    elif what == "a link":
        (tmp_path / "empty").mkdir()
        out.symlink_to("empty")
    else:
        out.mkdir()
        if what == "a folder with files":
            (out / "mine.txt").write_text("mine")
        else:
            monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(out))
    monkeypatch.setattr(merge, "load_base", None)
    with pytest.raises(ValueError, match=r"^--out .* Give a (new )?folder"):
        merge.merge(run / "ppo", out, dtype="float32")


def test_a_users_folder_under_the_name_of_an_unfinished_merge_is_kept(run, tmp_path, monkeypatch):
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "mine.txt").write_text("mine")
    monkeypatch.setattr(merge, "load_base", None)
    with pytest.raises(ValueError, match=r"is in the way of a merge into .* Move it away"):
        merge.merge(run / "ppo", tmp_path / "out", dtype="float32")
    assert (tmp_path / ".out.unfinished" / "mine.txt").read_text() == "mine"


def test_while_a_run_is_merged_nobody_writes_to_it(run, tmp_path, monkeypatch):
    held = []

    def asked(*args):
        child = [
            sys.executable,
            "-c",
            "import sys; from goose_lora import ownership as o; o.hold(sys.argv[1])",
        ]
        held.append(subprocess.run([*child, str(run / "ppo")], capture_output=True, text=True))
        raise ValueError("enough")

    monkeypatch.setattr(merge, "load_base", asked)
    with pytest.raises(ValueError, match="enough"):
        merge.merge(run / "ppo", tmp_path / "out", dtype="float32")
    assert f"is being read by process {os.getpid()} on" in held[0].stderr
    assert not list((run / "ppo").glob(".reader-*"))
