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


# Judgements that contradict each other

LISTS = {"prompt": "p", "completions": [" a", " b", " c"]}


@pytest.mark.parametrize(
    ("row", "way_out"),
    [
        (
            {**LISTS, "ranks": [1, 2, 3], "scores": [0.1, 0.9, 0.5]},
            r"column_mapping: \[scores=unused_scores\]",
        ),
        (
            {**LISTS, "ranks": [1, 2, 3], "scores": [0.9, 0.1, 0.5]},
            r"column_mapping: \[scores=unused_scores\]",
        ),
        (
            {
                "prompt": "p",
                "completions": [
                    {"text": text, "rank": 1 + place, "score": place} for place, text in enumerate("ab")
                ],
            },
            "leave score out of the replies",
        ),
        (
            {
                "prompt": "p",
                "completions": [{"text": text, "score": place} for place, text in enumerate("ab")],
                "ranks": [1, 2],
            },
            "leave score out of the replies",
        ),
    ],
)
def test_ranks_and_scores_that_contradict_each_other_are_refused(row, way_out, tmp_path):
    with pytest.raises(UserError, match=f"row 1: .* put the replies in different orders: .*{way_out}"):
        read(tmp_path, [row])
    assert [row["prompt"] for row in read(tmp_path, [row], "ppo")] == ["p"]


@pytest.mark.parametrize("scores", [[0.9, 0.5, 0.1], [0.9, 0.5, 0.5], None])
def test_ranks_count_where_scores_are_in_their_order(scores, tmp_path):
    rows = [{**LISTS, "ranks": [1, 2, 3], "scores": each} for each in ([3, 2, 1], scores)]
    assert [row["ranks"] for row in read(tmp_path, rows)] == [[1, 2, 3]] * 2
    rows = [{**LISTS, "ranks": [1, 2, 3], "scores": [0, 1, 2]}]
    assert read(tmp_path, rows, column_mapping=["scores=unused_scores"]) == [{**LISTS, "ranks": [1, 2, 3]}]


def test_a_word_beside_a_score_ranks_nothing(tmp_path):
    replies = [{"text": text, "score": place, "rating": "N/A"} for place, text in enumerate("ab")]
    assert read(tmp_path, [{"prompt": "p", "completions": replies}])[0]["ranks"] == [2, 1]


@pytest.mark.parametrize(
    ("completions", "ranks", "kept"),
    [
        (["a", "b", "a"], [1, 2, 3], False),
        (["a", "a"], [1, 2], False),
        (["a", "b", "a"], [1, 2, 1], True),
        ([[assistant("a")], [assistant("a")]], [1, 2], False),
    ],
)
def test_one_reply_with_two_ranks_is_left_out(completions, ranks, kept, tmp_path, caplog):
    other = [[assistant("x")], [assistant("y")]] if isinstance(completions[0], list) else ["x", "y"]
    rows = [
        {"prompt": [user("p")] if isinstance(other[0], list) else "p", "completions": other, "ranks": [1, 2]}
    ]
    rows.append({**rows[0], "completions": completions, "ranks": ranks})
    assert len(read(tmp_path, rows)) == 1 + kept
    assert ("1 because one reply stands there twice, with different ranks (row 2)" in caplog.text) is not kept


WON = {"prompt": "p", "response_a": "x", "response_b": "y"}


def won(a, b, tie):
    return {**WON, "winner_model_a": a, "winner_model_b": b, "winner_tie": tie}


@pytest.mark.parametrize("says", [(1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)])
def test_a_reply_that_wins_and_does_not_is_left_out(says, tmp_path, caplog):
    assert len(read(tmp_path, [won(0, 1, 0), won(*says)])) == 1
    assert "1 because it is won by several sides at once (row 2)" in caplog.text
    assert len(read(tmp_path, [won(0, 1, 0), won(*says)], "ppo")) == 2


@pytest.mark.parametrize(
    ("yes", "no"), [("yes", "no"), ("Yes", "NO"), ("TRUE", "false"), (1.0, 0.0), (True, None), ("1", "")]
)
def test_columns_of_yes_and_no_are_read_in_words(yes, no, tmp_path):
    pairs = {"a": "one", "b": "two", "a_wins": "first", "b_wins": "second"}
    rows = [
        {"prompt": "p", "one": "x", "two": "y", "first": a, "second": b} for a, b in ((yes, no), (no, yes))
    ]
    assert [row["chosen"][0]["content"] for row in read(tmp_path, rows, pairs=pairs)] == ["x", "y"]


def test_another_word_in_a_column_of_yes_and_no_is_refused(tmp_path):
    pairs = {"a": "one", "b": "two", "a_wins": "first", "b_wins": "second"}
    rows = [
        {"prompt": "p", "one": "x", "two": "y", "first": word, "second": "no"} for word in ("yes", "maybe")
    ]
    with pytest.raises(UserError, match="row 2: first is 'maybe'; expected yes or no"):
        read(tmp_path, rows, pairs=pairs)


def test_a_value_stands_for_one_side(tmp_path):
    pairs = {"a": "one", "b": "two", "winner": "w", "a_wins": 1, "b_wins": [2, "1"]}
    with pytest.raises(UserError, match="a_wins and b_wins are both 1"):
        DataArguments("x", pairs=pairs)
    with pytest.raises(UserError, match="b_wins and tie are both wins"):
        DataArguments("x", pairs={"a": "one", "b": "two", "a_wins": "x", "b_wins": "wins", "tie": "wins"})
    row = {"prompt": "p", "one": "x", "two": "y", "w": 3}
    with pytest.raises(UserError, match="row 1: w is 3, which stands for a and b: a_wins is >0, b_wins >2"):
        read(tmp_path, [row], pairs=pairs | {"a_wins": ">0", "b_wins": ">2"})


# Cells that hold something else


@pytest.mark.parametrize("turn", [["x", None], ["x", 3], [None, "x"], ["x", ["y"]]])
def test_a_turn_of_history_is_two_texts(turn, tmp_path):
    rows = [{"history": [["Hi", "Ho"], turn], "instruction": "why?", "output": "a"}]
    with pytest.raises(
        UserError, match=r"row 1: turn 2 of history is .*; expected two texts. .*=unused_hist"
    ):
        read(tmp_path, rows, "sft")
    (row,) = read(tmp_path, rows, "sft", column_mapping=["history=unused_history"])
    assert row["prompt"] == [user("why?")]


POST = {"post": "x", "title": "t", "subreddit": "s"}
CHOICE = {"info": POST, "summaries": [{"text": " a"}, {"text": " b"}], "choice": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"info": None}, "there is no post in info"),
        ({"info": {**POST, "post": ""}}, "there is no post in info"),
        ({"info": {**POST, "subreddit": None}}, "there is no subreddit in info"),
        ({"info": {**POST, "title": None}}, "there is no title in info"),
        ({"choice": 2}, "choice is not 0 or 1"),
        ({"choice": None}, "choice is not 0 or 1"),
        ({"summaries": [{"text": "a"}]}, "there are not two summaries"),
        ({"summaries": None}, "there are not two summaries"),
        ({"summaries": [{"text": "a"}, {"text": None}]}, "there are not two summaries"),
    ],
)
@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_summaries_that_lack_something_are_left_out(change, reason, stage, tmp_path, caplog):
    assert len(read(tmp_path, [CHOICE, {**CHOICE, **change}], stage)) == 1
    assert f"1 because {reason} (row 2)" in caplog.text


@pytest.mark.parametrize("summaries", [[" a", " b"], json.dumps([" a", " b"])])
def test_summaries_may_be_texts_and_info_no_object_is_told(summaries, tmp_path):
    (row,) = read(tmp_path, [{**CHOICE, "summaries": summaries, "choice": 1.0}])
    assert (row["chosen"], row["rejected"]) == (" b", " a")
    with pytest.raises(UserError, match="none of 1 rows is left: 1 because there is no post in info"):
        read(tmp_path, [{**CHOICE, "info": "plain"}])


TASK = {"prompt": "p", "text1": "a", "text2": "b"}


def labelled(result, **change):
    return {"data": TASK, "annotations": [{"result": [result]}], **change}


LEFT = {"type": "pairwise", "value": {"selected": "left"}}


@pytest.mark.parametrize(
    "result",
    [{"value": {"selected": "left"}}, {"type": "pairwise", "value": {"choices": ["left"]}}, LEFT],
)
def test_a_result_of_label_studio_is_read_under_either_name(result, tmp_path):
    rows = [labelled(LEFT), labelled(result)]
    assert [row["chosen"] for row in read(tmp_path, rows)] == [[assistant("a")]] * 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (labelled(LEFT, annotations=None), "there is no judgement"),
        (labelled(LEFT, annotations=[{"result": None}]), "there is no judgement"),
        (labelled({"type": "choices", "value": {"choices": ["good"]}}), "there is no judgement"),
        (labelled(LEFT, data={"prompt": "p", "text2": "b"}), "text1 is missing"),
        (labelled(LEFT, data={"text1": "a", "text2": "b"}), "prompt is missing"),
    ],
)
def test_tasks_of_label_studio_that_lack_something_are_left_out(row, reason, tmp_path, caplog):
    assert len(read(tmp_path, [labelled(LEFT), row])) == 1
    assert f"1 because {reason} (row 2)" in caplog.text


def test_another_word_of_an_annotator_is_refused(tmp_path):
    with pytest.raises(UserError, match="row 1: an annotator selected 'good'; expected left or right"):
        read(tmp_path, [labelled({"type": "pairwise", "value": {"selected": "good"}})])
