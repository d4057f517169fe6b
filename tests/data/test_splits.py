"""Folders whose files are named for splits, and settings that only a dataset of the Hub has."""

import gzip
import json
import logging
from pathlib import Path

import pytest
import tiny
from datasets import Dataset, load_dataset

from goose_lora.data import sources
from goose_lora.data.report import describe
from goose_lora.data.rows import DataArguments, load_rows
from goose_lora.errors import UserError

CARD = """---
configs:
- config_name: main
  data_files: [{split: train, path: main/train.jsonl}]
- config_name: extra
  data_files: [{split: train, path: extra/train.jsonl}]
---
"""
LAYOUTS = {
    "names": ["train.jsonl", "test.jsonl"],
    "parts": ["train-1.jsonl", "train-2.jsonl", "dev.jsonl"],
    "words around": ["my_train_rows.jsonl", "my_validation_rows.jsonl"],
    "a copy of the Hub's": ["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"],
    "folders": ["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"],
    "no splits": ["contest.jsonl", "latest.jsonl"],
    "hidden files": ["a.jsonl", ".a.jsonl", "._a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl"],
    "hidden files of splits": ["train.jsonl", "._train.jsonl", "s/test.jsonl", "s/.c/test-1.jsonl"],
}
OF_SPLITS = {"train": [{"prompt": "a"}], "test": [{"prompt": "b"}, {"prompt": "c"}]}


def write(folder, files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        tiny.write_rows(folder / file, [{"prompt": f"of {file}"}])
    return str(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_split_of_a_folder_has_the_rows_that_datasets_gives_it(layout, tmp_path):
    folder = write(tmp_path / "rows", LAYOUTS[layout])
    for split, rows in load_dataset(folder).items():
        assert sorted(sources.read_rows(folder, str(split))["prompt"]) == sorted(rows["prompt"])


def test_held_out_rows_of_a_folder_are_not_trained_on(tmp_path):
    folder = write(tmp_path / "rows", LAYOUTS["names"])
    data = DataArguments(folder, eval_dataset_name=folder)
    assert data.train("ppo").rows["prompt"][:] == ["of train.jsonl"]
    assert data.held_out("ppo").rows["prompt"][:] == ["of test.jsonl"]


@pytest.mark.parametrize("name", ["runs[1]", "ru?s", "r*", "[ab]"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_with_letters_of_a_glob_in_its_name_has_the_same_splits(layout, name, tmp_path):
    plain = write(tmp_path / "rows", LAYOUTS[layout])
    # What these patterns would find, were they read as such
    write(tmp_path / "runs1", ["train.jsonl", "train/a.jsonl", "b/test.jsonl"])
    folder = write(tmp_path / name, LAYOUTS[layout])
    for split in sources.splits_of(Path(plain)) or ("train",):
        found = sources.read_rows(folder, split)["prompt"]
        assert found[:] == sources.read_rows(plain, split)["prompt"][:]


def test_held_out_rows_of_a_table_are_not_trained_on_whatever_its_folder_is_called(tmp_path):
    folder = tmp_path / "runs[1]"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text(f"prompt,completion\nof {split},x\n")
    assert load_rows(str(folder))["prompt"][:] == ["of train"]


def test_a_copy_with_a_card_in_a_folder_that_datasets_cannot_name_is_refused(tmp_path):
    folder = write(tmp_path / "rows[1]", ["main/train.jsonl"])
    (tmp_path / "rows[1]" / "README.md").write_text(CARD)
    with pytest.raises(UserError, match=r"\[ in the name of a copy .* Rename the folder"):
        DataArguments(folder, dataset_config="main").train("ppo")


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    folder = write(tmp_path / "rows", LAYOUTS["names"])
    with pytest.raises(UserError, match=r"no split validation\. Its files are named for train, test"):
        DataArguments(folder, dataset_split="validation").train("ppo")
    # with the setting by which it was named, be it a default
    names = ["train.jsonl", "dev.jsonl"]
    folder = write(tmp_path / "others", names)
    with pytest.raises(UserError, match=r"no split test\..*: eval_dataset_split: train\."):
        DataArguments(folder, eval_dataset_name=folder).held_out("ppo")
    with pytest.raises(UserError, match=r"no split test\..*: --split train\."):
        sources.read_rows(folder, "test", split_by="--split")


def test_a_file_of_no_split_beside_others_is_told(tmp_path, caplog):
    folder = write(tmp_path / "rows", ["train.jsonl", "more.jsonl"])
    assert sources.read_rows(folder, "train")["prompt"][:] == ["of train.jsonl"]
    assert "more.jsonl: of no split by its name, and not read" in caplog.text


def test_a_copy_with_a_card_of_configurations_is_read_by_its_card(tmp_path):
    folder = write(tmp_path / "rows", ["main/train.jsonl", "extra/train.jsonl"])
    (tmp_path / "rows" / "README.md").write_text(CARD)
    data = DataArguments(folder, dataset_config="extra")
    assert data.train("ppo").rows["prompt"][:] == ["of extra/train.jsonl"]
    with pytest.raises(UserError, match=r"several configurations: .*dataset_config: NAME"):
        DataArguments(folder).train("ppo")


@pytest.mark.parametrize("name", ["rows.jsonl", "folder", "folder/*.jsonl", "embedded/prompts"])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("dataset_split", "validation"),
        ("dataset_split", "train[:9]"),
        ("dataset_config", "main"),
        ("data_dir", "d"),
        ("dataset_revision", "v1"),
    ],
)
def test_what_only_a_dataset_of_the_hub_has_is_refused_for_another(
    name, setting, value, tmp_path, monkeypatch
):
    there = {"embedded/prompts": "rows.jsonl"}
    monkeypatch.setattr("goose_lora.data.rows.resolve", lambda name: there.get(name, name))
    write(tmp_path, ["rows.jsonl", "folder/a.jsonl"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"{setting}={value.replace('[', '.')[:6]}.*Leave it out, or name"):
        DataArguments(name, **{setting: value}).train("ppo")


def test_held_out_rows_may_be_of_the_hub_beside_a_file(tmp_path, monkeypatch):
    rows = write(tmp_path, ["rows.jsonl"]) + "/rows.jsonl"
    monkeypatch.setattr(
        sources,
        "load_dataset",
        lambda *names, **place: Dataset.from_list([{"prompt": f"{names[1]} {place['split']}"}]),
    )
    data = DataArguments(rows, eval_dataset_name="org/name", dataset_config="main", eval_dataset_split="dev")
    assert data.held_out("ppo").rows["prompt"][:] == ["main dev"]


def test_a_split_of_held_out_rows_that_nobody_names_is_told(tmp_path, caplog):
    rows = write(tmp_path, ["rows.jsonl"]) + "/rows.jsonl"
    assert DataArguments(rows, eval_dataset_split="dev").held_out("ppo") is None
    assert "Without effect here: eval_dataset_split (needs eval_dataset_name)" in caplog.text


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz", "folder"])
def test_a_json_object_of_splits_gives_the_rows_of_the_split_that_is_asked_for(name, tmp_path):
    text = json.dumps(OF_SPLITS, indent=1)
    (tmp_path / "rows.json").write_text(text)
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "rows.json").write_text(text)
    path = str(tmp_path / name)
    data = DataArguments(path, eval_dataset_name=path)
    assert data.train("ppo").rows["prompt"][:] == ["a"]
    assert data.held_out("ppo").rows["prompt"][:] == ["b", "c"]
    swapped = DataArguments(path, dataset_split="test", eval_dataset_name=path, eval_dataset_split="train")
    assert swapped.train("ppo").rows["prompt"][:] == ["b", "c"]
    assert swapped.held_out("ppo").rows["prompt"][:] == ["a"]
    with pytest.raises(UserError, match=r"no split validation\. There are train, test"):
        DataArguments(path, dataset_split="validation").train("ppo")


def test_packed_parts_that_hold_splits_each_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.json.gz").write_bytes(gzip.compress(json.dumps(OF_SPLITS).encode()))
    with pytest.raises(
        UserError, match=r"each file has splits\. Name one of them: dataset_name: .*a\.json\.gz"
    ):
        load_rows(str(tmp_path / "*.json.gz"))


def test_columns_that_are_named_as_splits_are_columns(tmp_path):
    columns = {"prompt": ["a", "b"], "test": [{"asserts": 1}, {"asserts": 2}]}
    (tmp_path / "rows.json").write_text(json.dumps(columns))
    assert load_rows(str(tmp_path / "rows.json"), "test").to_dict() == columns


def test_a_split_of_a_file_without_splits_is_refused_by_data_too(tmp_path):
    path = write(tmp_path, ["rows.jsonl"]) + "/rows.jsonl"
    assert "1 row, columns prompt" in describe(path, split="train")
    with pytest.raises(UserError, match=r"--split=test: .*rows\.jsonl has no splits\. Leave it out, or name"):
        describe(path, split="test")


def test_a_hidden_table_beside_rows_makes_no_table_of_them(tmp_path):
    tiny.write_rows(tmp_path / "a.jsonl", [{"prompt": "7"}])
    (tmp_path / "._a.csv").write_text("prompt\n7\n")
    assert list(load_rows(str(tmp_path))) == [{"prompt": "7"}]


def test_notes_in_a_folder_of_rows_are_passed_over_in_silence(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    folder = write(tmp_path / "rows", ["a.jsonl"])
    (tmp_path / "rows" / "README.md").write_text("# Mine")
    assert DataArguments(folder).train("ppo").rows["prompt"][:] == ["of a.jsonl"]
    assert not caplog.text
