"""Rows from files, prompts from rows, and which process rolls out which prompt."""

import gzip
import json
import logging
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pyarrow
import pytest
import tiny
from datasets import Dataset, DatasetDict, load_dataset

from goose_lora.data import sources
from goose_lora.data.demonstrations import Learning, tokenize_demonstrations, tokenize_texts
from goose_lora.data.preferences import tokenize_references
from goose_lora.data.rows import DataArguments, load_rows, require_columns
from goose_lora.data.tokenization import left_pad, tokenize_prompts
from goose_lora.ppo.sampler import RolloutBatches


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_file_kind_gives_the_same_rows(kind, tmp_path):
    rows = Dataset.from_list(tiny.prompts(3))
    path = str(tmp_path / f"rows.{kind}")
    {"csv": rows.to_csv, "parquet": rows.to_parquet}.get(kind, rows.to_json)(path)
    assert list(load_rows(path)) == tiny.prompts(3)


SAID = [{"prompt": "ba", "completion": "7"}, {"prompt": "be, bi", "completion": "NA"}]


def packed(path, text, compression):
    with pyarrow.output_stream(str(path), compression=compression) as file:
        file.write(text.encode())


def in_parts(folder):
    folder.mkdir()
    for place, row in enumerate(SAID):
        tiny.write_rows(folder / f"train-{place}.jsonl", [row])


LINES = "".join(json.dumps(row) + "\n" for row in SAID)
KINDS = {
    "a.jsonl.gz": lambda path: packed(path, LINES, "gzip"),
    "a.jsonl.zst": lambda path: packed(path, LINES, "zstd"),
    "a.ndjson": lambda path: path.write_text(LINES),
    "a.tsv": lambda path: path.write_text("prompt\tcompletion\nba\t7\nbe, bi\tNA\n"),
    "a.csv": lambda path: path.write_text('prompt,completion\nba,7\n"be, bi",NA\n'),
    "semicolon.csv": lambda path: path.write_text("\ufeffprompt;completion\nba;7\nbe, bi;NA\n"),
    "wrapped.json": lambda path: path.write_text(json.dumps({"version": 1, "data": SAID})),
    "columns.json": lambda path: path.write_text(
        json.dumps({name: [row[name] for row in SAID] for name in ("prompt", "completion")})
    ),
    "parts": in_parts,
    "disk": lambda path: Dataset.from_list(SAID).save_to_disk(path),
    "splits": lambda path: DatasetDict(train=Dataset.from_list(SAID)).save_to_disk(path),
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_folders_of_all_kinds_give_the_same_rows(kind, tmp_path):
    KINDS[kind](tmp_path / kind)
    assert list(load_rows(str(tmp_path / kind))) == SAID


def test_a_glob_is_all_its_files_and_a_tilde_is_home(tmp_path, monkeypatch):
    in_parts(tmp_path / "parts")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(load_rows("~/parts/*.jsonl")) == SAID


def test_numbers_of_a_csv_that_no_one_says_stay_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer,score\n12,7,0.5\n13,8,\n")
    assert list(load_rows(str(tmp_path / "a.csv"))) == [
        {"prompt": "12", "answer": "7", "score": 0.5},
        {"prompt": "13", "answer": "8", "score": None},
    ]


@pytest.mark.parametrize(
    ("cells", "read"),
    [
        (["7", " 8"], [7, 8]),
        (["-7", "0.5", "1e-3", ".5"], [-7.0, 0.5, 0.001, 0.5]),
        (["00501", "7"], None),
        (["1_000", "7"], None),
        (["00.5", "7"], None),
        (["+7", "7"], None),
        (["1e999", "7"], None),
        (["123456789012345678901234", "7"], None),
        (["9007199254740993", "0.5"], None),
        (["\u0661", "7"], None),
    ],
)
def test_cells_of_a_csv_are_numbers_where_they_are_written_as_numbers(cells, read, tmp_path):
    lines = "".join(f"ba,{cell}\n" for cell in cells)
    (tmp_path / "a.csv").write_text(f"prompt,ground_truth\n{lines}")
    assert load_rows(str(tmp_path / "a.csv"), stage="ppo")["ground_truth"][:] == (read or cells)


def test_text_that_looks_like_a_time_is_the_text_of_the_file_at_any_depth(tmp_path):
    day, time = "2024-01-01", "2024-01-01 10:00:00"
    row = {"prompt": day, "truth": time, "more": {"at": [day], "turns": [{"content": time}]}}
    path = tiny.write_rows(tmp_path / "rows.jsonl", [row, row])
    # The library, read before, caches times under this file's name
    assert not isinstance(load_dataset("json", data_files=path, split="train")[0]["prompt"], str)
    (tmp_path / "rows.json").write_text(json.dumps([row, row]))
    for kind in ("jsonl", "json"):
        assert list(load_rows(str(tmp_path / f"rows.{kind}"), stage="ppo")) == [row, row]


def test_times_in_a_later_part_of_a_long_file_are_text_too(tmp_path):
    # The library reads 10 MB at a time, and casts what it finds then to what it has found first
    rows = [{"prompt": "ba" * 6_000_000, "at": "never"}, {"prompt": "ba", "at": "2024-01-01"}]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    assert load_rows(path)["at"][:] == ["never", "2024-01-01"]


@pytest.mark.parametrize("name", ["rows[1]", "rows?", "ro*ws", "[ab]"])
def test_letters_of_a_glob_in_the_name_of_what_is_there_are_letters(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    for place in range(2):
        tiny.write_rows(folder / f"{name}-{place}.jsonl", [SAID[place]])
        (folder / f"{name}.csv").write_text('prompt,completion\nba,7\n"be, bi",NA\n')
    assert list(load_rows(str(folder / f"{name}-1.jsonl"))) == SAID[1:]
    assert list(load_rows(str(folder / f"{name}.csv"))) == SAID
    assert list(load_rows(str(folder / "*.jsonl"))) == SAID


def test_a_hub_dataset_of_several_configurations_says_how_to_name_one(monkeypatch):
    asked = []

    def load(name, config=None, **place):
        asked.append((name, config, place))
        if config is None:
            raise ValueError("Config name is missing. Please pick one among ['main', 'socratic']")
        return Dataset.from_list(SAID)

    monkeypatch.setattr(sources, "load_dataset", load)
    with pytest.raises(
        ValueError, match=r"org/two: has several configurations: .*main.* dataset_config: NAME"
    ):
        load_rows("org/two")
    arguments = DataArguments("org/two", dataset_config="main", data_dir="d", dataset_revision="v1")
    assert len(arguments.train("sft")) == 2
    assert asked[-1] == ("org/two", "main", {"split": "train", "data_dir": "d", "revision": "v1"})


def test_max_rows_takes_the_first_ones(tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", tiny.prompts(5))
    assert list(load_rows(path, max_rows=2)) == tiny.prompts(2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file"),
        ("empty.jsonl", "", "the file is empty"),
        ("rows.xml", "<a/>", "cannot read this kind of file"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name))


USER = json.dumps({"prompt": "ba"}).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            USER + b'\n{"prompt": "b\n',
            "a.jsonl: line 2 is not JSON: .* at character 12. Each line must be one object",
        ),
        ("a.jsonl", USER + b"\n\n" + USER + b" x\n", "line 3 is not JSON: Extra data at character 18"),
        (
            "a.jsonl",
            USER + b'\n["ba"]\n',
            "line 2 is a JSON list; each line must be one object, with columns as keys",
        ),
        (
            "a.jsonl",
            USER + b'\n{"prompt": "caf\xe9"}\n',
            r"line 2 is not UTF-8, at byte 16 of it \(0xe9\). Save the file as UTF-8",
        ),
        ("a.csv", b"prompt,id\ncaf\xe9,1\n", r"a.csv: line 2 is not UTF-8, at byte 4 of it \(0xe9\)"),
        ("a.csv", b"prompt,id\na,1\nb,2,3\n", "Expected 2 fields in line 3, saw 3"),
        ("a.json", b'[{"prompt": "ba"},\n {"prompt"}]', "a.json: line 2 is not JSON: .* at character 11"),
        (
            "a.jsonl",
            USER + b'\n\n{"a": {"b": 1, "b": 2}}\n',
            "a.jsonl: line 3 has the key 'b' twice in one object",
        ),
        (
            "a.jsonl",
            USER + b'\n{"prompt": "\\ud83d"}\n',
            r"a.jsonl: line 2 has '\\ud83d', half of a character",
        ),
        ("a.json", b'{"data": [{"prompt": "\\ud83d"}]}', r"a.json: has '\\ud83d', half of a character"),
        ("a.parquet", b"no parquet at all", "a.parquet: .*[Pp]arquet"),
    ],
)
def test_a_broken_file_names_the_line_and_what_is_wrong_with_it(name, content, message, tmp_path, capfd):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name))
    assert "Failed to load" not in capfd.readouterr().err


def test_of_several_files_the_broken_one_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(USER + b"\n")
    (tmp_path / "b.jsonl").write_bytes(USER + b"\n{\n")
    with pytest.raises(ValueError, match=r"line 2 is not JSON.*The file is .*b\.jsonl"):
        load_rows(str(tmp_path / "*.jsonl"))


def test_columns_are_renamed_and_can_be_swapped(tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"instruction": "ba", "prompt": "be", "id": 1}])
    renamed = load_rows(path, column_mapping=["instruction=prompt", "prompt=instruction"])
    assert list(renamed) == [{"prompt": "ba", "instruction": "be", "id": 1}]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            ["question=prompt"],
            "column_mapping question=prompt: there is no column question. There are instruction, prompt.",
        ),
        (
            ["instruction=prompt"],
            "there is a column prompt already. Rename that too, for example prompt=old_prompt",
        ),
        (["instruction"], "'instruction' is not of the form FROM=TO"),
        (["=prompt"], "'=prompt' is not of the form FROM=TO"),
        (["instruction=a", "prompt=a"], "names prompt or a twice"),
    ],
)
def test_a_mapping_that_does_not_fit_says_so(mapping, message, tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"instruction": "ba", "prompt": "be"}])
    with pytest.raises(ValueError, match=message):
        load_rows(path, column_mapping=mapping)


@pytest.mark.parametrize("mapping", [["a=b", "c=d"], {"a": "b", "c": "d"}])
def test_a_mapping_is_a_list_or_an_object_in_python_too(mapping):
    assert DataArguments("rows.jsonl", column_mapping=mapping).column_mapping == ["a=b", "c=d"]


def test_missing_columns_name_those_found_and_those_accepted():
    rows = Dataset.from_list([{"question": "a", "answer": "b"}])
    with pytest.raises(
        ValueError, match=r"has the columns question, answer; needed are text or prompt\+completion"
    ):
        require_columns(rows, "file", ["text"], ["prompt", "completion"])


def test_prompts_keep_their_other_columns():
    rows = Dataset.from_list([{"prompt": "ba be", "answer": 7}])
    (row,) = tokenize_prompts(rows, tiny.tokenizer(), name="rows", max_prompt_tokens=5)
    assert row["answer"] == 7


@pytest.mark.parametrize("prompt", ["ba be", "<s> ba be"])
def test_a_text_prompt_begins_with_bos_once_as_sft_and_the_reward_model_have_it(prompt):
    (row,) = tokenize_prompts(
        Dataset.from_list([{"prompt": prompt}]), tiny.tokenizer(), name="rows", max_prompt_tokens=5
    )
    assert row["input_ids"] == [tiny.BOS, 4, 5] == tiny.tokenizer()("ba be")["input_ids"]


def test_a_text_prompt_gets_no_special_token_from_a_tokenizer_that_adds_none():
    tokenizer = tiny.tokenizer()
    tokenizer._tokenizer.post_processor = None
    (row,) = tokenize_prompts(
        Dataset.from_list([{"prompt": "ba be"}]), tokenizer, name="rows", max_prompt_tokens=5
    )
    assert row["input_ids"] == [4, 5]


def test_chat_prompts_go_through_the_template_once():
    turns = [("user", "ba"), ("assistant", "be"), ("user", "bi")]
    rows = Dataset.from_list([{"prompt": [{"role": role, "content": content} for role, content in turns]}])
    tokenizer = tiny.chat_tokenizer()
    (row,) = tokenize_prompts(rows, tokenizer, name="rows", max_prompt_tokens=20)
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert tokens == [
        "<s>",
        "<user>",
        "ba",
        "</s>",
        "<assistant>",
        "be",
        "</s>",
        "<user>",
        "bi",
        "</s>",
        "<assistant>",
    ]


def test_chat_prompts_without_a_template_are_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        tokenize_prompts(
            Dataset.from_list([{"prompt": [{"role": "user", "content": "ba"}]}]),
            tokenizer,
            name="rows",
            max_prompt_tokens=9,
        )


def test_long_and_empty_prompts_are_left_out_and_counted(caplog):
    rows = Dataset.from_list([{"prompt": "ba be bi"}, {"prompt": ""}, {"prompt": "ba"}])
    with caplog.at_level(logging.WARNING):
        kept = tokenize_prompts(rows, tiny.tokenizer(), name="rows", max_prompt_tokens=2)
    assert [row["prompt"] for row in kept] == ["ba"]  # and BOS: two tokens
    assert "2 of 3 prompts left out" in caplog.text


def test_no_prompt_left_is_an_error():
    with pytest.raises(ValueError, match="no prompt has between 1 and max_prompt_tokens=1 tokens"):
        tokenize_prompts(
            Dataset.from_list([{"prompt": "ba be"}]), tiny.tokenizer(), name="rows", max_prompt_tokens=1
        )


def test_left_pad_puts_padding_on_the_left_and_masks_it():
    ids, mask = left_pad([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def dealt(batches, process, num_processes):
    """What accelerate gives to one process: batches dealt in turn."""
    return list(batches)[process::num_processes]


def test_each_process_gets_every_one_of_its_batches_repeat_times_in_a_row_and_shares_none():
    batches = RolloutBatches(25, 3, 4, seed=1, num_processes=2)
    own = [dealt(batches, process, 2) for process in (0, 1)]
    assert len(own[0]) == len(own[1]) == 16
    for rows in own:
        for start in range(0, 16, 4):
            assert all(batch == rows[start] for batch in rows[start : start + 4])
    seen = [{row for batch in rows for row in batch} for rows in own]
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 24


def test_another_epoch_deals_in_another_order_and_the_same_epoch_in_the_same():
    batches = RolloutBatches(20, 4, 1, seed=1)
    first = list(batches)
    assert list(batches) == first and len(first) == len(batches)
    batches.set_epoch(1)
    assert list(batches) != first


def test_texts_end_with_the_end_token_and_are_cut():
    rows = Dataset.from_list([{"text": "ba be bi", "id": 1}, {"text": "good", "id": 2}])
    tokenizer = tiny.tokenizer()
    whole = tokenize_texts(rows, tokenizer, name="x", max_length=9)
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in whole["input_ids"]] == [
        ["<s>", "ba", "be", "bi", "</s>"],
        ["<s>", "good", "</s>"],
    ]
    assert whole.column_names == ["input_ids"]
    assert [len(ids) for ids in tokenize_texts(rows, tokenizer, name="x", max_length=4)["input_ids"]] == [
        4,
        3,
    ]
    with pytest.raises(ValueError, match="needed are text"):
        tokenize_texts(rows.remove_columns("text"), tokenizer, name="x", max_length=9)


# References of the reward model and texts of PPO-ptx are read as fine-tuning reads the same file
BESIDE = [
    [{"text": "ba be"}, {"text": "<s> good </s>"}],
    [
        {"instruction": "ba", "input": "be", "output": "good"},
        {"instruction": "bi", "input": "", "output": "bad"},
    ],
    [{"conversations": [{"from": "human", "value": "ba"}, {"from": "gpt", "value": "good"}]}],
    [
        {"prompt": "ba", "completion": " good", "label": True},
        {"prompt": "ba", "completion": " bad", "label": False},
    ],
]


@pytest.mark.parametrize("rows", BESIDE, ids=["texts", "Alpaca", "ShareGPT", "KTO"])
def test_references_and_texts_of_ppo_ptx_are_what_fine_tuning_reads(rows, tmp_path):
    path = tiny.write_rows(tmp_path / "beside.jsonl", rows)
    tokenizer = tiny.chat_tokenizer()
    learned = tokenize_demonstrations(
        load_rows(path, stage="sft"), tokenizer, name=path, learning=Learning(max_length=None)
    )["input_ids"]
    # The stage has a file of its own with other columns, which column_mapping is about
    beside = DataArguments("x.jsonl", column_mapping=["q=prompt"]).beside(path)
    assert tokenize_texts(beside.rows, tokenizer, name=path, max_length=99)["input_ids"] == learned
    assert tokenize_references(beside.rows, tokenizer, name=path) == list(learned)


def test_a_column_with_a_meaning_is_not_passed_over_beside_a_stage_either(tmp_path):
    path = tiny.write_rows(tmp_path / "beside.jsonl", [{"prompt": "ba", "completion": " good", "winner": 1}])
    own = tiny.write_rows(tmp_path / "own.jsonl", tiny.prompts(2))
    with pytest.raises(ValueError, match=r"column_mapping: \[winner=unused_winner\] leaves it out"):
        DataArguments(own).beside(path)
    # The setting that it names works, though the stage's own file has no such column
    data = DataArguments(own, column_mapping=["winner=unused_winner"])
    assert data.beside(path).rows[0] == {"prompt": "ba", "completion": " good"}
    assert len(data.train("ppo")) == 2


@pytest.fixture
def served(tmp_path):
    """A folder that a server on loopback serves, and its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


SERVED = [{"prompt": "ba, be", "completion": " good"}, {"prompt": "bi", "completion": "NA"}]
WEB_LINES = "".join(json.dumps(row) + "\n" for row in SERVED)
OF_THE_WEB = [
    ("rows.jsonl", WEB_LINES.encode()),
    ("rows.json", json.dumps({"data": SERVED}).encode()),
    ("rows.csv", b"prompt;completion\nba, be; good\nbi;NA\n"),
    ("rows.jsonl.gz", gzip.compress(WEB_LINES.encode())),
]


@pytest.mark.parametrize(("name", "content"), OF_THE_WEB, ids=[name for name, _ in OF_THE_WEB])
def test_an_address_is_read_as_the_file_would_be(name, content, served):
    folder, address = served
    (folder / name).write_bytes(content)
    assert list(load_rows(f"{address}/{name}?download=true")) == SERVED
    assert list(load_rows(f"{address}/{name}")) == SERVED


def test_an_address_without_a_file_and_one_with_a_broken_file_say_so(served):
    folder, address = served
    with pytest.raises(ValueError, match=r"http://.*/rows.jsonl: not to be had: .*Check the address"):
        load_rows(f"{address}/rows.jsonl")
    (folder / "page.jsonl").write_text("<html>\n")
    with pytest.raises(ValueError, match=r"http://.*/page.jsonl: line 1 is not JSON"):
        load_rows(f"{address}/page.jsonl")
    with pytest.raises(ValueError, match=r"cannot read this kind of file. Use .jsonl"):
        load_rows(f"{address}/rows.pdf")


def test_other_addresses_are_fsspecs():
    with fsspec.open("memory://rows.jsonl", "w") as file:
        file.write(WEB_LINES)
    assert list(load_rows("memory://rows.jsonl")) == SERVED


def test_what_a_run_asks_the_hub_for_is_what_the_settings_name(monkeypatch):
    asked = []

    def hub(*names, **place):
        asked.append((names, place))
        return Dataset.from_list(tiny.prompts(2))

    monkeypatch.setattr(sources, "load_dataset", hub)
    data = DataArguments(
        "org/name",
        dataset_config="main",
        data_dir="d",
        dataset_revision="v1",
        dataset_split="train[:9]",
        eval_dataset_name="org/name",
    )
    data.train("ppo")
    data.held_out("ppo")
    place = {"data_dir": "d", "revision": "v1"}
    assert asked == [
        (("org/name", "main"), {"split": "train[:9]", **place}),
        (("org/name", "main"), {"split": "test", **place}),
    ]


@pytest.mark.parametrize("name", ["votes.csv", "votes.tsv", "votes.csv.bz2", "parts", "parts/*.csv"])
def test_numbers_of_tables_are_numbers_in_parts_and_packed_too(name, tmp_path):
    (tmp_path / "parts").mkdir()
    lines = "prompt,chosen,rejected,margin\nba,1, bad,0.5\n"
    for path in ("votes.csv", "parts/a.csv", "parts/b.csv"):
        (tmp_path / path).write_text(lines)
    (tmp_path / "votes.tsv").write_text(lines.replace(",", "\t"))
    packed(tmp_path / "votes.csv.bz2", lines, "bz2")
    row = load_rows(str(tmp_path / name), stage="reward")[0]
    assert (row["chosen"], row["margin"]) == ("1", 0.5)


def test_a_name_with_a_nul_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": {"\\u0000": {}}}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="has a NUL character"):
        load_rows(str(path))
