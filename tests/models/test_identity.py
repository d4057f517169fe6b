"""goose_lora.models.identity: which names mean the same base."""

import shutil

import pytest
import tiny
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from goose_lora.models.folders import AdapterFolder, saved_template
from goose_lora.models.identity import BaseName, base_content, content_of, same_base
from goose_lora.models.loading import load_base, load_tokenizer
from goose_lora.sharing.lineage import template_sha256

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def names(tmp_path, monkeypatch):
    """A base in a snapshot of the Hub's cache, a link to it, a copy in other files, and another."""
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    tiny.save_base(snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    shutil.copytree(snapshot, tmp_path / "moved")
    tiny.base().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    other = tiny.base()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    other.save_pretrained(tmp_path / "elsewhere" / "tiny")
    return snapshot


def test_the_content_of_a_base_is_its_tensors_however_they_are_filed(names, tmp_path):
    stored = base_content(str(names))
    in_shards = {}
    for file in (tmp_path / "sharded").glob("*.safetensors"):
        in_shards |= load_file(file)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert {key: t.shape for key, t in load_file(names / "model.safetensors").items()} == {
        key: t.shape for key, t in in_shards.items()
    }
    assert stored == base_content("sharded") == base_content("link") == base_content("moved/")
    assert stored != base_content("elsewhere/tiny"), "of the same shapes and another training"
    assert base_content("none") is None and base_content("") is None and base_content("org/none") is None


@pytest.mark.parametrize("form", ["snapshot", "link", "link/", "moved", "./link", "sharded", "org/tiny"])
@pytest.mark.parametrize("other", ["snapshot", "link/", "org/tiny", "moved"])
def test_all_ways_to_name_a_base_mean_the_same(form, other, names):
    one, two = (BaseName(str(names) if name == "snapshot" else name) for name in (form, other))
    if "org/tiny" in (form, other) and {"moved", "sharded"} & {form, other}:
        # A copy tells nothing of the Hub: base_hub_id does
        assert not same_base(one, two)
        one, two = one._replace(hub_id="org/tiny"), two._replace(hub_id="org/tiny")
    assert same_base(one, two) and same_base(two, one)


def test_a_base_of_the_same_name_with_other_weights_is_another(names):
    assert not same_base(BaseName("elsewhere/tiny"), BaseName("link", "org/tiny"))
    assert not same_base(BaseName("link"), BaseName("link", content="0" * 64))
    assert same_base(BaseName("/gone/tiny/"), BaseName("elsewhere/tiny")), "it was moved"
    assert not same_base(BaseName("/gone/other"), BaseName("elsewhere/tiny"))


def test_an_adapter_is_taken_or_refused_by_what_its_base_is(names, tmp_path):
    folder, model = tmp_path / "adapter", tiny.base()
    model = get_peft_model(model, tiny.lora(model))
    for trained_on, base, fits in (
        ("org/tiny", "link", True),
        (str(names), "link/", True),
        ("link/", str(names), True),
        ("moved", "link", True),
        ("elsewhere/tiny", "link", False),
        ("org/other", "link", False),
    ):
        model.peft_config["default"].base_model_name_or_path = trained_on
        model.save_pretrained(folder)
        if fits:
            AdapterFolder.open("policy_adapter", folder, base=base)
            continue
        with pytest.raises(ValueError, match=r"was trained on .*base_hub_id"):
            AdapterFolder.open("policy_adapter", folder, base=base)


def test_named_templates_are_the_same_as_a_list_as_a_dict_and_in_files(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.save_pretrained(tmp_path / "files")
    assert (tmp_path / "files" / "additional_chat_templates").is_dir()
    assert saved_template(tmp_path / "files") == tokenizer.chat_template
    as_list = [{"name": name, "template": text} for name, text in tokenizer.chat_template.items()]
    assert template_sha256(as_list) == template_sha256(tokenizer.chat_template)


def test_the_content_of_a_loaded_base_is_that_of_its_revision(tmp_path, monkeypatch):
    """transformers keeps the name of what it loads, and not its revision."""
    repository = tmp_path / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    for number, branch in enumerate(("main", "other"), 1):
        commit = str(number) * 40
        (repository / "refs" / branch).write_text(commit)
        tiny.base(seed=number).save_pretrained(repository / "snapshots" / commit)
        tiny.tokenizer().save_pretrained(repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    contents = {branch: base_content("org/tiny", branch) for branch in ("main", "other")}
    assert None not in contents.values() and len(set(contents.values())) == 2
    args = tiny.arguments("org/tiny", model_revision="other")
    model = load_base(args, load_tokenizer(args), device=torch.device("cpu"))
    assert content_of(model) == contents["other"]
