"""Lineage: what every output says of where it comes from, how the chain is read back, and what in
it does not fit."""

import importlib.metadata
import shutil
import sys

import pytest
import tiny
import tiny_chain
import torch
from datasets import Dataset

from goose_lora import cli
from goose_lora.apps.session import inspect_run
from goose_lora.cli.reward_verdict import judged_model
from goose_lora.data.rows import fingerprint
from goose_lora.errors import UserError
from goose_lora.models.folders import read_lineage, write_lineage
from goose_lora.models.loading import load_base, load_tokenizer
from goose_lora.models.quantization import keep_4bit_trainable_on_cpu
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo.config import PPOConfig
from goose_lora.sharing import lineage, model_card, provenance


@pytest.fixture
def whole(adapter_chain):
    return adapter_chain


@pytest.fixture
def run(whole, tmp_path):
    return tiny_chain.copy(whole, tmp_path / "run")


def problems(folder):
    return [f"{link.stage}: {problem}" for link in provenance.read_chain(folder) for problem in link.problems]


def change(folder, **facts):
    write_lineage(folder, **(read_lineage(folder) | facts))


def test_every_output_names_base_parents_settings_data_versions_and_figures(whole):
    noted = read_lineage(whole / "ppo")
    assert noted["stage"] == "ppo" and noted["base"]["id"] == str(whole / "base")
    assert (noted["base"]["quantization"], noted["base"]["dtype"]) == ("nf4", "bfloat16")
    assert noted["settings"]["learning_rate"] == 0.0123 and noted["settings"]["lora_r"] == 3
    assert "lora_dropout" not in noted["settings"] and "weight_decay" not in noted["settings"], (
        "only what differs from the defaults"
    )
    assert noted["versions"].keys() >= {"torch", "transformers", "peft", "trl", "bitsandbytes"}
    # As installed: a build of PyPI calls itself 2.14.1+cu130
    assert noted["versions"]["torch"] == importlib.metadata.version("torch")
    assert torch.__version__.startswith(noted["versions"]["torch"])
    assert noted["figures"] == {
        "objective/score": 1.234567,
        "objective/kl": 0.5,
        "seconds": 7.5,
        "peak_rss_gb": 1.25,
    }
    assert noted["data"] == [
        {
            "name": "tiny/prompts",
            "split": "train",
            "rows": 8,
            "sha256": noted["data"][0]["sha256"],
            "chat": False,
        }
    ]
    for role, stage in (("policy", "sft"), ("reward", "reward")):
        parent = noted["parents"][role]
        assert parent["name"] == str(whole / stage) and parent["sha256"] == lineage.file_sha256(
            whole / stage / "adapter_model.safetensors"
        )
        assert parent["lineage"] == read_lineage(whole / stage)


def test_the_roles_beside_the_policy_say_what_they_are(whole):
    assert read_lineage(whole / "ppo" / "reference")["stage"] == "sft"
    kept = read_lineage(whole / "ppo" / "reward")
    assert (kept["stage"], kept["append_eos"], kept["reward_bias"]) == ("reward", True, 0.25)
    assert read_lineage(whole / "ppo" / "value")["stage"] == "ppo"
    for role in ("reference", "reward", "value"):
        weights = whole / "ppo" / role / "adapter_model.safetensors"
        assert read_lineage(whole / "ppo" / role)["sha256"] == lineage.file_sha256(weights)


def test_no_secret_is_recorded(whole):
    for path in (path for path in whole.rglob("*") if path.suffix in (".json", ".jsonl", ".md")):
        assert tiny_chain.TOKEN not in path.read_text(), path
    assert (
        lineage.recorded_command(
            "ppo", ["--hub_token=abc", "--api-key", "abc", "--env", "x=hf_abcdefgh1234"]
        ).count("(not recorded)")
        == 3
    )
    settings = lineage.changed_settings(
        PPOConfig(output_dir="x", use_cpu=True, hub_token="abc", run_name="of hf_abcdefgh1234")
    )
    assert "hub_token" not in settings and settings["run_name"] == "of (not recorded)"


def test_a_fingerprint_depends_on_every_row_and_on_nothing_else():
    rows = [{"a": "ä", "b": [1, 2]}, {"a": "x", "b": []}]
    same = fingerprint("n", "s", Dataset.from_list([{"b": row["b"], "a": row["a"]} for row in rows]))
    assert fingerprint("n", "s", Dataset.from_list(rows)) == same
    for other in (rows[:1], rows[::-1], [rows[0], {"a": "y", "b": []}]):
        assert fingerprint("n", "s", Dataset.from_list(other))["sha256"] != same["sha256"]


def test_the_chain_runs_from_the_base_to_the_policy_and_fits(whole):
    assert [(link.stage, link.role) for link in provenance.read_chain(whole / "ppo")] == [
        ("sft", "policy"),
        ("reward", "reward"),
        ("ppo", "policy"),
    ]
    assert problems(whole / "ppo") == []


def test_show_prints_chain_and_loading_code(whole, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["goose-lora", "show", str(whole / "ppo")])
    cli.main()
    shown = capsys.readouterr().out
    lines = [line.split()[:2] for line in shown.splitlines()[:4]]
    assert lines == [
        ["base", str(whole / "base")],
        *([stage, str(whole / stage)] for stage in ("sft", "reward", "ppo")),
    ]
    assert (
        "objective/score 1.235" in shown
        and "All of it fits together." in shown
        and "load_in_4bit=True" in shown
    )


def test_show_finds_a_relative_base_above_the_run_and_tells_one_that_is_gone(run, tmp_path, monkeypatch):
    change(run / "ppo", base={**read_lineage(run / "ppo")["base"], "id": "run/base"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shown = provenance.describe_chain(run / "ppo")
    assert f'from_pretrained("{run / "base"}"' in shown and "is not here" not in shown
    (run / "base").rename(tmp_path / "moved")
    assert "The base is not here" in provenance.describe_chain(run / "ppo")


def base_in_chat(folder):
    return inspect_run(folder).arguments.model_name_or_path


def base_in_verdict(folder):
    judged = judged_model(str(folder), base=None, quantization=None, dtype=None, batch_size=2)
    return judged.arguments.model_name_or_path


@pytest.mark.parametrize(("name", "base_of"), [("ppo", base_in_chat), ("reward", base_in_verdict)])
def test_a_relative_base_is_looked_for_above_the_run(run, tmp_path, monkeypatch, name, base_of):
    folder = run / name
    change(folder, base={**read_lineage(folder)["base"], "id": "run/base"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert base_of(folder) == str(run / "base")
    monkeypatch.chdir(tmp_path)
    assert base_of(folder) == "run/base", "where it is as the run named it"
    (run / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"neither here nor above.* --base PATH_OR_HUB_ID"):
        base_of(folder)


def test_the_code_for_an_adapter_without_a_tokenizer_takes_the_bases(run):
    for path in (run / "sft").glob("tokenizer*"):
        path.unlink()
    shown = provenance.describe_chain(run / "sft")
    assert f'AutoTokenizer.from_pretrained("{run / "base"}")' in shown
    assert f'AutoTokenizer.from_pretrained("{run / "ppo"}")' in provenance.describe_chain(run / "ppo")


def test_a_parent_that_is_gone_is_read_from_its_copy(run):
    shutil.rmtree(run / "sft")
    links = provenance.read_chain(run / "ppo")
    assert (
        links[0].stage == "sft"
        and links[0].lineage["figures"]["loss"] == 2.345
        and "not here any more" in links[0].name
    )
    assert problems(run / "ppo") == []


def test_a_parent_that_has_changed_since_is_noticed(run):
    shutil.copyfile(run / "ppo" / "adapter_model.safetensors", run / "sft" / "adapter_model.safetensors")
    assert any("sft: has changed since ppo started from it" in problem for problem in problems(run / "ppo"))


def test_a_parent_in_the_folder_of_its_child_ends_the_walk_and_is_shown_as_recorded(run):
    """As after a run whose output_dir is its own policy_adapter."""
    before = read_lineage(run / "sft")
    parent = {"name": str(run / "sft"), "sha256": before["sha256"], "verdict": None, "lineage": before}
    change(run / "sft", stage="ppo", parents={"policy": parent})
    assert [(link.stage, link.role) for link in provenance.read_chain(run / "sft")] == [
        ("sft", "policy"),
        ("ppo", "policy"),
    ]
    shown = provenance.describe_chain(run / "sft")
    assert f"sft       {run / 'sft'} (replaced; as recorded)" in shown
    assert "its folder is that of a later stage of this chain too, so what ppo started from" in shown


def test_two_folders_that_are_each_others_parents_end_the_walk(run):
    for stage, parent in (("sft", "reward"), ("reward", "sft")):
        copy = {"stage": parent, "base": read_lineage(run / parent)["base"]}
        sha256 = read_lineage(run / parent)["sha256"]
        noted = {"name": str(run / parent), "sha256": sha256, "verdict": None, "lineage": copy}
        change(run / stage, parents={"policy": noted})
    assert [link.stage for link in provenance.read_chain(run / "ppo")] == [
        *("sft", "reward", "sft"),
        *("reward", "sft", "reward"),
        "ppo",
    ]
    assert sum("a later stage of this chain too" in problem for problem in problems(run / "ppo")) == 2


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_circle_of_parents_ends_the_walk_wherever_it_begins(length, run):
    circle = ("sft", "reward", "ppo")[:length]
    for at, stage in enumerate(circle):
        parent = circle[(at + 1) % length]
        copy = {"stage": parent, "base": read_lineage(run / parent)["base"]}
        sha256 = read_lineage(run / parent)["sha256"]
        noted = {"name": str(run / parent), "sha256": sha256, "verdict": None, "lineage": copy}
        change(run / stage, parents={"policy": noted})
    for stage in circle:
        shown = provenance.describe_chain(run / stage)
        assert "a later stage of this chain too" in shown and len(provenance.read_chain(run / stage)) < 12
        model_card.render_card(run / stage)


def test_a_policy_whose_weights_are_not_those_it_was_written_for_is_noticed(run):
    shutil.copyfile(run / "sft" / "adapter_model.safetensors", run / "ppo" / "adapter_model.safetensors")
    assert problems(run / "ppo") == ["ppo: adapter_model.safetensors is not the one that ppo saved"]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"id": "/models/other"}, "reward: was trained on another base: /models/other, ppo on "),
        ({"id": "org/other"}, "reward: names the base org/other, and ppo /"),
        ({"quantization": "int8"}, "reward: was trained on a base in int8, ppo on one in nf4"),
    ],
)
def test_a_parent_of_another_base_or_quantization_is_noticed(run, facts, message):
    change(run / "reward", base=read_lineage(run / "reward")["base"] | {"content": None} | facts)
    assert [problem for problem in problems(run / "ppo") if problem.startswith(message)]


def test_a_parents_base_is_known_by_its_content_whatever_its_name(run):
    base = read_lineage(run / "reward")["base"]
    change(run / "reward", base=base | {"id": "/models/other"})
    assert problems(run / "ppo") == []
    change(run / "reward", base=base | {"content": "0" * 64})
    assert problems(run / "ppo")[0].startswith("reward: was trained on another base")


def test_another_commit_of_the_base_is_noticed(run):
    for stage, commit in (("sft", "a" * 40), ("reward", "b" * 40), ("ppo", "a" * 40)):
        change(run / stage, base=read_lineage(run / stage)["base"] | {"commit": commit})
    assert problems(run / "ppo") == [
        f"reward: was trained on another commit of the base: {'b' * 12}, ppo on {'a' * 12}"
    ]


def test_another_chat_template_is_noticed_in_the_run_in_the_base_and_in_a_parent(run):
    (run / "ppo" / "chat_template.jinja").write_text("other")
    assert problems(run / "ppo") == [
        f"ppo: the chat template in {run / 'ppo'} is not the one that it was trained with"
    ]
    shutil.copyfile(run / "sft" / "chat_template.jinja", run / "ppo" / "chat_template.jinja")
    assert problems(run / "ppo") == []
    change(run / "sft", chat_template_sha256="0")
    assert "sft: was trained with another chat template than ppo" in problems(run / "ppo")
    (run / "base" / "chat_template.jinja").write_text("other")
    assert f"ppo: the chat template in {run / 'base'} is not the one that it was trained with" in problems(
        run / "ppo"
    )


def test_an_adapter_of_other_origin_is_shown_with_its_base(run):
    (run / "sft" / "goose_lora.json").unlink()
    shown = provenance.describe_chain(run / "sft")
    assert (
        f"base      {run / 'base'}" in shown
        and "has no goose_lora.json" in shown
        and "PeftModel.from_pretrained" in shown
    )


def test_a_folder_without_an_adapter_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"has no adapter_config.json: no adapter"):
        provenance.describe_chain(tmp_path)


@pytest.mark.parametrize("quantized", [False, True])
@torch.no_grad()
def test_the_loading_code_runs_and_gives_the_policys_logits(whole, quantized):
    code = provenance.loading_code(read_lineage(whole / "ppo"), str(whole / "ppo"))[quantized]
    names = {}
    exec(code, names)
    # Bitsandbytes' form for AVX512-BF16 knows no layer as narrow as these
    keep_4bit_trainable_on_cpu(names["model"])
    args = tiny_chain.arguments(str(whole / "base"), "nf4" if quantized else "none")
    shared = SharedBase.build(load_base(args, load_tokenizer(args)), whole / "ppo")
    ids, mask = tiny.batch((9, 9), seed=5)
    with torch.autocast("cpu", torch.bfloat16):
        got = names["model"](input_ids=ids, attention_mask=mask).logits.float()
    with shared.role("policy") as core, shared.autocast():
        want = core(input_ids=ids, attention_mask=mask).logits.float()
    with shared.role("base") as core, shared.autocast():
        bare = core(input_ids=ids, attention_mask=mask).logits.float()
    assert (want - bare).abs().max() > 0.5, "the adapter must show"
    torch.testing.assert_close(got, want, rtol=0, atol=0.1)  # bf16: steps of 0.03 at these logits


def test_the_loading_code_of_a_reward_model_gives_its_scores(whole):
    names = {}
    exec(provenance.loading_code(read_lineage(whole / "reward"), str(whole / "reward"))[0], names)
    assert names["model"](input_ids=tiny.batch((9,))[0]).logits.shape == (1, 1)


def test_an_older_note_beside_a_reward_adapter_is_still_read(run):
    write_lineage(run / "reward", append_eos=False, reward_bias=0.5)
    args = tiny_chain.arguments(str(run / "base"))
    shared = SharedBase.build(load_base(args, load_tokenizer(args)), run / "sft", reward=run / "reward")
    assert (shared.reward_reads_eos, shared.head_bias["reward"]) == (False, 0.5)
    old = {"name": "x", "sha256": "0", "verdict": None, "lineage": {"append_eos": True}}
    change(run / "ppo", parents=read_lineage(run / "ppo")["parents"] | {"reward": old})
    assert [link.stage for link in provenance.read_chain(run / "ppo")] == ["sft", "adapter", "ppo"]
