"""Replies are read as they are written, by what all rows of the file are, and judged once."""

import json

import pytest
import tiny
from field_rows import TEXTS, Q
from tiny import assistant, user

from goose_lora.data.rows import DataArguments
from goose_lora.errors import UserError


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


# Replies that are JSON

ARENA = {"prompt": "p", "response_a": "x", "response_b": "y", "winner": "a"}
FRUITS = {"prompt": "fruits as JSON", "response_a": '["apple", "banana"]', "response_b": '["car"]'}
MESSAGE = '{"role": "assistant", "content": "hi"}'


@pytest.mark.parametrize(
    "reply",
    [
        MESSAGE,
        f"[{MESSAGE}]",
        '{"messages": [' + MESSAGE + "]}",
        '{"from": "Paris", "to": "Rome"}',
        '["red", "green"]',
        "[1, 2]",
    ],
)
def test_a_reply_that_is_json_is_text_among_texts(reply, tmp_path):
    rows = [{"prompt": "p", "completion": " ok"}, {"prompt": "as JSON", "completion": reply}]
    assert read(tmp_path, rows, "sft") == rows
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in rows]
    assert read(tmp_path, pairs) == pairs
    lists = [{"prompt": "p", "completions": [" ok", reply], "ranks": [1, 2]}] * 2
    assert read(tmp_path, lists) == lists


@pytest.mark.parametrize(
    "reply", ['{"from": "Paris", "to": "Rome"}', '["red", "green"]', '[{"role": "admin"}]']
)
def test_replies_that_are_json_in_all_rows_are_text_unless_they_are_messages(reply, tmp_path):
    rows = [{"prompt": "as JSON", "completion": reply}] * 2
    assert read(tmp_path, rows, "sft") == rows
    pairs = [{"prompt": "as JSON", "chosen": reply, "rejected": reply.replace("r", "R")}] * 2
    assert read(tmp_path, pairs) == pairs


def test_messages_among_texts_are_told_and_texts_among_messages_refused(tmp_path, caplog):
    rows = [{"prompt": "p", "completion": reply} for reply in (MESSAGE, "b", "c")]
    assert read(tmp_path, rows, "sft") == rows
    told = "completion is chat messages as JSON in 1 rows (1) and none in 2 (2, 3); all is read as text"
    assert told in caplog.text
    rows[2]["completion"] = MESSAGE
    with pytest.raises(UserError, match="row 2: prompt is text, but prompt of row 1 is a list of chat mess"):
        read(tmp_path, rows, "sft")


def test_messages_as_json_inside_lists_are_messages_where_all_are(tmp_path):
    other = MESSAGE.replace("hi", "ho")
    rows = [{"prompt": "p", "completions": [MESSAGE, other], "ranks": [1, 2]}] * 2
    replies = [[[assistant("hi")], [assistant("ho")]]] * 2
    assert [row["completions"] for row in read(tmp_path, rows)] == replies
    rows = [{"prompt": "p", "completions": [{"text": MESSAGE, "rank": 1}, {"text": other, "rank": 2}]}] * 2
    assert [row["completions"] for row in read(tmp_path, rows)] == replies


# Two replies of an arena


@pytest.mark.parametrize("winner", ["a", "tie"])
def test_replies_of_json_to_one_prompt_of_text_are_no_turns(winner, tmp_path):
    rows = [ARENA, {**ARENA, **FRUITS}]
    replies = [row["chosen"][0]["content"] for row in read(tmp_path, rows)]
    assert replies == ["x", FRUITS["response_a"]]
    rows = [{**ARENA, **FRUITS, "winner": winner}] * 2
    assert read(tmp_path, rows, "ppo")[0]["prompt"] == [user("fruits as JSON")]


def turns(asked, a, b, winner="a"):
    columns = {"prompt": asked, "response_a": a, "response_b": b}
    return {**{name: json.dumps(texts) for name, texts in columns.items()}, "winner": winner}


TWO = turns(["q1", "q2"], ["a1", "a2"], ["b1", "b2"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (turns(["q1", "q2", "q3"], ["a1", "a2"], ["b1", "b2", "b3"]), "not as many replies as prompts"),
        (turns(["q1", "q2"], ["a1", "a2"], ["b1"]), "not as many replies as prompts"),
        (turns(["q1"], ["a1", "a2"], ["b1"]), "not as many replies as prompts"),
        (turns(["q1", "q2"], ["a1", None], ["b1", "b2"]), "a turn is missing"),
        ({**TWO, "response_b": '["b1", "b2'}, "a turn is missing"),
    ],
)
def test_conversations_of_an_arena_have_a_reply_to_each_prompt_or_are_left_out(row, reason, tmp_path, caplog):
    (found,) = {str(found) for found in read(tmp_path, [TWO, row, TWO])}
    assert found == str(
        {
            "prompt": [user("q1")],
            "chosen": [assistant("a1"), user("q2"), assistant("a2")],
            "rejected": [assistant("b1"), user("q2"), assistant("b2")],
        }
    )
    assert reason in caplog.text and "(row 2)" in caplog.text
    assert [row["prompt"] for row in read(tmp_path, [TWO, row, TWO], "ppo")] == [[user("q1")]] * 3


def test_an_arena_may_hold_its_turns_as_lists_and_equal_replies_are_prompts_all_the_same(tmp_path):
    rows = [{name: [value] if name != "winner" else "a" for name, value in ARENA.items()}] * 2
    assert read(tmp_path, rows)[0]["chosen"] == [assistant("x")]
    same = {**turns(["q"], ["a"], ["a"]), "winner": "a"}
    assert [row["prompt"] for row in read(tmp_path, [TWO, same], "ppo")] == [[user("q1")], [user("q")]]
