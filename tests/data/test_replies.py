"""Replies are read as they are written, by what all rows of the file are, and judged once."""

import pytest
import tiny
from field_rows import TEXTS, Q

from goose_lora.data.rows import DataArguments


def read(folder, rows, stage="reward", **settings):
    path = tiny.write_rows(folder / "rows.jsonl", rows)
    return list(DataArguments(path, **settings).train(stage).rows)


# Replies that begin with their prompt

HELLO = {"prompt": "Hello", "chosen": "Hello! How can I help?", "rejected": "Hello, what do you want"}
YES = {"prompt": "Yes", "completions": ["Yes, I do.", "Yesterday."], "ranks": [1, 2]}
HELD = {"prompt": Q, "chosen": f"{Q} Him.", "rejected": f"{Q} Her."}


@pytest.mark.parametrize(
    "rows",
    [
        [TEXTS, HELLO],
        [HELD, HELLO, {**HELLO, "rejected": "Bye"}],
        [{"prompt": "x y", "completions": ["a", "b"], "ranks": [1, 2]}, YES],
        [YES],
        [{"prompt": "Yes", "chosen": "Yes, we can", "rejected": "No"}],
    ],
)
def test_a_reply_that_begins_with_its_prompt_by_chance_keeps_its_words(rows, tmp_path, caplog):
    assert read(tmp_path, rows) == rows
    assert "cut off" not in caplog.text


def test_prompts_are_cut_off_where_all_replies_of_the_file_hold_them_and_it_is_told(tmp_path, caplog):
    rows = [HELD, HELLO, {"prompt": "", "chosen": "a", "rejected": "b"}]
    cut = [(row["chosen"], row["rejected"]) for row in read(tmp_path, rows)]
    assert cut == [(" Him.", " Her."), ("! How can I help?", ", what do you want"), ("a", "b")]
    assert "the replies of all 3 rows begin with their prompt, which is cut off" in caplog.text
    # The way out that is told
    caplog.clear()
    spaced = [{**row, **{side: f" {row[side]}" for side in ("chosen", "rejected")}} for row in rows]
    assert read(tmp_path, spaced) == spaced and "cut off" not in caplog.text


def test_a_reply_of_a_list_that_is_its_prompt_alone_is_empty(tmp_path, caplog):
    lists = [
        {"prompt": Q, "completions": [f"{Q} {word}", end], "ranks": [1, 2]}
        for word, end in (("Him.", Q), ("Him.", f"{Q} Her."))
    ]
    assert [row["completions"] for row in read(tmp_path, lists)] == [[" Him.", " Her."]]
    assert "1 because a completion is missing or empty (row 1)" in caplog.text


def test_what_follows_the_prompt_is_apart_where_text_is_not_glued(tmp_path):
    rows = [{"instruction": Q, "chosen": f"{Q} Him.", "rejected": f"{Q}Her."}]
    assert read(tmp_path, rows, as_chat=False) == [{"prompt": Q, "chosen": " Him.", "rejected": "\n\nHer."}]
