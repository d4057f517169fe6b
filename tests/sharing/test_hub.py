"""Uploads and downloads over HTTP, by the real client and a server on loopback: what goes up, what
is checked before, what failures leave."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import fake_hub
import pytest
import tiny
import tiny_chain
import tiny_runs
import torch
from huggingface_hub import HfApi, ModelCard, constants
from peft import PeftModel
from recipe_runs import options, recipe
from transformers import AutoTokenizer, TrainingArguments

from goose_lora import cli
from goose_lora.apps.session import inspect_run
from goose_lora.files import file_sha256
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.ensembles import Member, RewardEnsemble, read_ensemble
from goose_lora.models.folders import AdapterFolder, local_folder, read_lineage, saved_template
from goose_lora.models.loading import load_base, load_tokenizer
from goose_lora.models.shared_base import SharedBase
from goose_lora.sharing import hub, provenance

REPO = f"{fake_hub.USER}/result"
ALWAYS = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "goose_lora.json",
    "stage.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
ALWAYS |= {"chat_template.jinja"}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub, to which this client alone talks, with a token that may write."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with fake_hub.running() as running:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", running.endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            running.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield running


@pytest.fixture
def run(adapter_chain, tmp_path):
    return tiny_chain.copy(adapter_chain, tmp_path / "run")


def settings(folder="x", **changes):
    return TrainingArguments(
        output_dir=str(folder), use_cpu=True, **{"push_to_hub": True, "hub_model_id": REPO} | changes
    )


BASE = ModelArguments("org/base")


# ---- Before the run ----


def test_the_check_makes_the_repository_and_needs_nothing_where_nothing_is_to_be_uploaded(server):
    hub.check_upload(settings(push_to_hub=False), BASE)
    assert server.requests == []
    hub.check_upload(settings(hub_private_repo=True), BASE)
    assert server.private == {REPO: True}
    hub.check_upload(settings(), BASE)  # it is there already: 409


@pytest.mark.parametrize(
    ("failure", "changes", "message"),
    [
        ({}, {"hub_model_id": None}, "push_to_hub: true needs the repository's name"),
        ({}, {"hub_model_id": "a/b/c"}, "a/b/c"),
        ({}, {"hub_strategy": "checkpoint"}, "checkpoints are never uploaded"),
        (
            {},
            {"hub_token": "hf_wrongTokenForTests"},
            r"the Hub token is not valid\. Make a new one, then: hf auth login",
        ),
        (
            {},
            {"hub_model_id": "bob/result"},
            r"ann's token may not write to bob/result\. Use one with the right to write",
        ),
        ({r"auth-check": 403}, {}, "ann's token may not write to ann/result"),
        ({r"whoami": 500}, {}, "the Hub token could not be checked"),
        ({r"whoami": "cut"}, {}, r"the Hub could not be reached at http://127.0.0.1:\d+ .*goose-lora push"),
        ({r"repos/create": 500}, {}, "ann/result could not be made ready for an upload"),
        ({r"repos/create": "cut"}, {}, r"the connection to http://127.0.0.1:\d+ broke"),
    ],
)
def test_what_would_make_the_upload_fail_is_an_error_before_the_run(server, failure, changes, message):
    server.failures = failure
    with pytest.raises(ValueError, match=message):
        hub.check_upload(settings(**changes), BASE)
    assert not any(server.repos.values())


def test_without_a_token_or_network_the_check_says_so(server, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"there is no Hub token.*hf auth login"):
        hub.check_upload(settings(), BASE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE=1\. Unset it"):
        hub.check_upload(settings(), BASE)


def test_a_base_in_a_folder_asks_for_its_name_on_the_hub(server, tiny_base):
    with pytest.raises(ValueError, match=rf"the base is the folder {tiny_base}.*--base_hub_id user/model"):
        hub.check_upload(settings(), ModelArguments(tiny_base))
    hub.check_upload(settings(), ModelArguments(tiny_base, base_hub_id="org/base"))


@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "own_loop"])
def test_every_recipe_checks_the_upload_before_any_model_or_data_is_loaded(server, name):
    words = options(
        model_name_or_path="no/such",
        dataset_name="no.jsonl",
        eval_dataset_name="no.jsonl",
        output_dir="x",
        use_cpu=True,
    )
    words += options(push_to_hub=True, hub_model_id="bob/x") + (
        options(num_rollouts=1) if name == "own_loop" else []
    )
    words += options(reward_function=f"{tiny_runs.__file__}:even_share") if name == "ppo" else []
    with pytest.raises(ValueError, match="ann's token may not write to bob/x"):
        recipe(name).main(words)


# ---- What goes up ----


def litter(folder):
    """What an output folder also holds, and nobody should get."""
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "notes.txt",
        "events.out.tfevents.1",
        ".env",
        "checkpoint-4/adapter_model.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no")


def test_the_upload_equals_the_list_and_roles_go_up_only_by_name(server, run):
    litter(run / "ppo")
    address = hub.push(run / "ppo", REPO, base_hub_id="org/base")
    assert address == f"{server.endpoint}/{REPO}"
    assert server.files(REPO).keys() == ALWAYS | {"metrics.jsonl", "curves.png"}
    hub.push(run / "ppo", REPO, include=["reward", "reference"])
    added = server.files(REPO).keys() - server.repos[REPO][0].keys()
    assert added == {f"{role}/{name}" for role in ("reward", "reference") for name in hub.ADAPTER_FILES[:3]}
    assert len(server.repos[REPO]) == 2, "one commit an upload"


def test_an_unknown_role_and_a_folder_without_a_result_are_errors(server, run, tmp_path):
    for include, message in (["judge"], "no such role"), (["ema"], "has no adapter ema/"):
        with pytest.raises(ValueError, match=message):
            hub.push(run / "ppo", REPO, include=include, base_hub_id="org/base")
    with pytest.raises(ValueError, match="nothing to upload"):
        hub.push(tmp_path, REPO)
    with pytest.raises(ValueError, match="Name the repository: --repo user/name"):
        hub.push(run / "ppo")
    with pytest.raises(ValueError, match="--base_hub_id user/model"):
        hub.push(run / "ppo", REPO)
    assert server.repos == {}


def test_what_goes_up_names_the_hubs_base_and_what_stays_names_the_folder(server, run):
    before = (run / "ppo" / "adapter_config.json").read_bytes()
    named = json.loads(before)["base_model_name_or_path"]
    hub.push(run / "ppo", REPO, base_hub_id="org/base")
    sent = {
        name: content.decode()
        for name, content in server.files(REPO).items()
        if name.endswith((".json", ".md"))
    }
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert json.loads(sent["goose_lora.json"])["base"]["id"] == "org/base"
    card = ModelCard(sent["README.md"])
    assert card.data.base_model == "org/base" and f'from_pretrained(base, "{REPO}")' in card.text
    assert not [name for name, text in sent.items() if f'"{named}"' in text]
    assert (run / "ppo" / "adapter_config.json").read_bytes() == before and read_lineage(run / "ppo")["base"][
        "id"
    ] == named


def test_merged_weights_go_up_as_a_whole_model(server, tmp_path):
    names = (
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "tokenizer.json",
    )
    litter(tmp_path)
    for name in names:
        (tmp_path / name).write_text("{}")
    hub.push(tmp_path, REPO)
    assert server.files(REPO).keys() == set(names)


@torch.no_grad()
def test_roles_load_from_the_hub_by_name_folder_and_revision(server, run):
    hub.push(run / "sft", REPO, base_hub_id="org/base")
    hub.push(run / "ppo", REPO, base_hub_id="org/base", include=["reward"])
    old = server.commit_id(REPO, 0)
    args = tiny_chain.arguments(str(run / "base"))
    ids, mask = tiny.batch((9, 9), seed=5)

    def logits(policy, **roles):
        shared = SharedBase.build(load_base(args, load_tokenizer(args)), policy, **roles)
        with shared.role("policy") as core, shared.autocast():
            return core(input_ids=ids, attention_mask=mask).logits, shared.head_bias["reward"]

    new_there, offset = logits(REPO, reward=f"{REPO}/reward", reference=f"{REPO}@{old}")
    new_here, _ = logits(run / "ppo")
    assert torch.equal(new_there, new_here) and offset == 0.25, (
        "the note beside the reward adapter comes along"
    )
    old_there, old_here = logits(f"{REPO}@{old}")[0], logits(run / "sft")[0]
    assert torch.equal(old_there, old_here) and not torch.equal(old_here, new_here)
    plain = PeftModel.from_pretrained(load_base(args, load_tokenizer(args)), REPO).eval()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            plain(input_ids=ids, attention_mask=mask).logits.float(), new_here.float(), rtol=0, atol=0.1
        )
    folder = AdapterFolder.open("policy_adapter", f"{REPO}@{old}", base="org/base")
    assert folder.lineage["stage"] == "sft"
    shown = provenance.describe_chain(folder.path)
    assert (
        f'PeftModel.from_pretrained(base, "{REPO}", revision="{old}")' in shown
        and 'AutoModelForCausalLM.from_pretrained("org/base"' in shown
    )
    reward = provenance.describe_chain(local_folder(f"{REPO}/reward"))
    assert (
        f'PeftModel.from_pretrained(base, "{REPO}", subfolder="reward",'
        f' revision="{server.commit_id(REPO, 1)}")' in reward
    )


def test_a_hub_that_stops_answering_takes_no_bias_away(server, run, monkeypatch):
    hub.push(run / "ppo", REPO, base_hub_id="org/base", include=["reward"])
    server.failures = {r"goose_lora\.json": 503}
    with pytest.raises(ValueError, match=r"goose_lora\.json could not be had from the Hub .*HF_HUB_OFFLINE"):
        local_folder(f"{REPO}/reward")
    # what the Hub once had, or had not, is in the cache
    server.failures = {}
    assert read_lineage(local_folder(f"{REPO}/reward"))["reward_bias"] == 0.25
    server.failures = {r".": 503}
    assert read_lineage(local_folder(f"{REPO}/reward"))["reward_bias"] == 0.25
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_lineage(local_folder(f"{REPO}/reward"))["reward_bias"] == 0.25


def test_chat_templates_by_name_go_to_the_hub_and_come_back(server, run, monkeypatch, caplog):
    tokenizer = AutoTokenizer.from_pretrained(run / "ppo")
    named = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}" + tokenizer.chat_template}
    tokenizer.chat_template = named
    tokenizer.save_pretrained(run / "ppo")
    hub.push(run / "ppo", REPO, base_hub_id="org/base")
    found = local_folder(REPO)
    assert AutoTokenizer.from_pretrained(found).chat_template == named
    # what the Hub once had is in the cache
    server.failures = {"/tree/": 503}
    assert saved_template(local_folder(REPO)) == named
    assert "did not say which chat templates it has by name" in caplog.text
    server.failures = {".": 503}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert saved_template(local_folder(REPO)) == named


def test_a_base_that_was_a_folder_elsewhere_is_no_name_of_the_hub(
    server, adapter_chain, tmp_path, monkeypatch
):
    run = tiny_chain.copy(adapter_chain, tmp_path / "here" / "run")
    for file in ("goose_lora.json", "adapter_config.json"):
        text = (run / "sft" / file).read_text().replace(str(run / "base"), "run/base")
        (run / "sft" / file).write_text(text)
    assert read_lineage(run / "sft")["base"]["id"] == "run/base"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the base is the folder run/base, which nobody else has"):
        hub.push(run / "sft", REPO)
    shutil.rmtree(run / "base")
    with pytest.raises(ValueError, match="the base is the folder run/base, which nobody else has"):
        hub.push(run / "sft", REPO)
    assert server.repos == {}


def test_an_ensemble_that_was_uploaded_as_a_folder_loads_by_its_name(server, run, tmp_path):
    whole = tmp_path / "pair"
    shutil.copytree(run / "reward", whole)
    shutil.copytree(run / "reward", whole / "member_1")
    sha = file_sha256(whole / "adapter_model.safetensors")
    members = tuple(Member(name, sha, 0.0, 1.0, seed) for seed, name in enumerate((".", "member_1")))
    ensemble = RewardEnsemble("adapters", 1.0, 0.0, members)
    ensemble.write(whole)
    api = HfApi(server.endpoint, token=fake_hub.TOKEN)
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=whole)
    found = AdapterFolder.open("reward_adapter", REPO, base="org/base", base_hub_id="org/base")
    assert read_ensemble(found.path) == ensemble
    assert [member.lineage["reward_bias"] for member in found.members] == [0.25, 0.25]
    # a member that was left out is told
    (whole / "member_1" / "adapter_model.safetensors").unlink()
    api.create_repo(f"{REPO}-2")
    api.upload_folder(repo_id=f"{REPO}-2", folder_path=whole)
    with pytest.raises(ValueError, match=r"member_1 has no adapter_model\.safetensors"):
        local_folder(f"{REPO}-2")


def test_whom_one_can_talk_to_is_found_in_a_run_of_the_hub_at_its_commit(server, run):
    hub.push(run / "ppo", REPO, base_hub_id="org/base", include=["reward", "reference"])
    found = inspect_run(REPO, base=str(run / "base"))
    assert list(found.roles) == ["base", "sft", "ppo"] and found.tokenizer.chat_template
    for folder, name in ((found.reference, "reference"), (found.reward, "reward")):
        assert folder == found.folder / name and server.commit_id(REPO, 0) in str(folder)
    found.check()


def test_a_name_that_is_neither_here_nor_on_the_hub_is_an_error_with_both_ways_out(server):
    with pytest.raises(
        ValueError,
        match=(
            r"nobody/sft is no folder here, and could not be had from the Hub"
            r" .*output_dir.*user/repo@revision"
        ),
    ):
        AdapterFolder.open("policy_adapter", "nobody/sft", base="org/base")


def test_a_folder_that_is_missing_beside_others_is_not_looked_for_on_the_hub(server, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match=r"policy_adapter: runs/sft has no adapter_config.json"):
        AdapterFolder.open("policy_adapter", "runs/sft", base="org/base")
    assert server.requests == []


# ---- Failures ----


@pytest.mark.parametrize(
    "failure",
    [{"/commit/": 500}, {"/commit/": "cut"}, {"/commit/": 403}, {"PUT /lfs": "cut"}, {"preupload": 409}],
)
def test_an_upload_that_fails_leaves_everything_and_succeeds_when_repeated(server, run, failure):
    server.failures = failure
    weights = (run / "ppo" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OSError, match=r"the upload to ann/result failed: \S"):
        hub.push(run / "ppo", REPO, base_hub_id="org/base")
    assert server.repos == {REPO: []} and (run / "ppo" / "adapter_model.safetensors").read_bytes() == weights
    server.failures = {}
    hub.push(run / "ppo", REPO, base_hub_id="org/base")
    assert server.files(REPO)["adapter_model.safetensors"] == weights


def test_the_push_command_answers_a_failure_in_one_line(server, run, monkeypatch, capsys):
    server.failures = {"/commit/": 500}
    words = ["--repo", REPO, "--include", "reward,value", "--base_hub_id", "org/base"]
    monkeypatch.setattr(sys, "argv", ["goose-lora", "push", str(run / "ppo"), *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and "error: the upload to ann/result failed" in capsys.readouterr().err
    server.failures = {}
    cli.main()
    assert (
        f"uploaded to {server.endpoint}/{REPO}" in capsys.readouterr().out
        and "value/adapter_config.json" in server.files(REPO)
    )


def test_a_trainer_never_uploads_by_itself(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"push_to_hub: Trainer would upload all that lies in output_dir.*goose_lora.sharing.hub.push",
    ):
        tiny_runs.trainer(tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match="Trainer would upload all that lies in output_dir"):
        tiny_runs.trainer(tmp_path).push_to_hub()
    config = settings()
    assert hub.without_trainers_push(config).push_to_hub is False and config.push_to_hub is True


def test_a_run_whose_upload_fails_ends_well_and_prints_the_command_that_uploads_it(
    server, tmp_path, tiny_base, caplog
):
    output = tmp_path / "sft"
    words = options(
        model_name_or_path=tiny_base,
        quantization="none",
        dtype="float32",
        lora_r=3,
        bf16=False,
        base_hub_id="org/base",
    )
    words += options(
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=8,
        max_steps=2,
        save_steps=1,
    )
    words += options(
        dataset_name=tiny.write_rows(tmp_path / "texts.jsonl", tiny.texts(16)),
        output_dir=output,
        learning_rate=1e-2,
    )
    server.failures = {"/commit/": "cut"}
    recipe("sft").main(
        [
            *words,
            *options(
                push_to_hub=True, hub_model_id=REPO, hub_private_repo=True, gradient_checkpointing=False
            ),
        ]
    )
    assert (
        (output / "stage.json").is_file()
        and (output / "checkpoint-2").is_dir()
        and server.repos == {REPO: []}
    )
    assert sum("/commit/" in request for request in server.requests) == 1, (
        "Trainer did not upload its checkpoints"
    )
    assert read_lineage(output)["base"]["hub_id"] == "org/base"
    warning = next(record.getMessage() for record in caplog.records if "To upload it:" in record.getMessage())
    assert f"Everything is saved in {output}" in warning
    command = shlex.split(re.search(r"goose-lora push .*", warning)[0])

    server.failures = {}
    environment = os.environ | {
        "HF_ENDPOINT": server.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    again = [sys.executable, "-c", "from goose_lora.cli import main; main()", *command[1:]]
    done = subprocess.run(again, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and f"uploaded to {server.endpoint}/{REPO}" in done.stdout, done.stderr[
        -2000:
    ]
    assert server.files(REPO).keys() == ALWAYS | {"metrics.jsonl"} and server.private == {REPO: True}
    assert json.loads(server.files(REPO)["goose_lora.json"])["stage"] == "sft"
