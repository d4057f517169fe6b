"""Which rows each stage takes, the prompt of each, and how a row that is not sound is answered."""

import json

import pytest
import tiny
from datasets import Dataset
from tiny import assistant, system, user

from goose_lora.data.formats import (
    CONVERSATIONS,
    IMPLICIT_PAIRS,
    PAIRS,
    PROMPTS,
    PROMPTS_AND_COMPLETIONS,
    RANKED_LISTS,
    TEXTS,
    find_format,
    ranks_of,
    take,
)
from goose_lora.data.rows import load_rows
from goose_lora.data.shapes import implicit_prompt

ASKED = [user("ba")]
TWO_TURNS = [system("bo"), user("ba"), assistant("be"), user("bi")]


def prompts(tmp_path, *rows):
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    return [row["prompt"] for row in load_rows(path, stage="ppo")]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "ba"}, "ba"),
        ({"prompt": ASKED}, ASKED),
        ({"prompt": TWO_TURNS}, TWO_TURNS),
        ({"messages": [*ASKED, assistant("be")]}, ASKED),
        ({"messages": [*TWO_TURNS, assistant("bu")]}, TWO_TURNS),
        ({"messages": TWO_TURNS}, TWO_TURNS),
        ({"prompt": "ba", "completion": " be"}, "ba"),
        ({"prompt": "ba", "chosen": " good", "rejected": " bad"}, "ba"),
        ({"prompt": ASKED, "chosen": [assistant("good")], "rejected": [assistant("bad")]}, ASKED),
        ({"prompt": "ba", "completions": [" good", " bad"]}, "ba"),
        ({"prompt": ASKED, "completions": [[assistant("good")], [assistant("bad")]]}, ASKED),
        ({"chosen": "ba be good", "rejected": "ba be goof"}, "ba be"),
        ({"chosen": [*TWO_TURNS, assistant("good")], "rejected": [*TWO_TURNS, assistant("bad")]}, TWO_TURNS),
    ],
)
def test_each_format_gives_ppo_its_prompt(row, prompt, tmp_path):
    assert prompts(tmp_path, row) == [prompt]


@pytest.mark.parametrize(
    ("columns", "stage", "format"),
    [
        (["text"], "sft", TEXTS),
        (["messages"], "sft", CONVERSATIONS),
        (["prompt", "completion"], "sft", PROMPTS_AND_COMPLETIONS),
        (["prompt", "messages"], "sft", CONVERSATIONS),
        (["prompt", "messages"], "ppo", PROMPTS),
        (["chosen", "rejected"], "reward", IMPLICIT_PAIRS),
        (["chosen", "rejected", "prompt", "messages"], "reward", PAIRS),
        (["prompt", "completions", "ranks"], "reward", RANKED_LISTS),
    ],
)
def test_the_columns_tell_the_format(columns, stage, format):
    assert find_format(columns, stage, "x") == format


def test_columns_that_a_stage_does_not_take_name_those_found_those_accepted_and_who_takes_them():
    with pytest.raises(
        ValueError, match=r"my: has the columns text; ppo takes .* or messages\. They suit sft\."
    ):
        find_format(["text"], "ppo", "my")
    with pytest.raises(
        ValueError,
        match=r"has the columns q, a; sft takes prompt\+completion or messages or text\. Rename yours",
    ):
        find_format(["q", "a"], "sft", "my")


def test_a_judgement_is_no_reply_to_be_renamed():
    with pytest.raises(ValueError, match=r"column_mapping: \[completion=chosen\]\.$"):
        find_format(["prompt", "completion", "label", "score"], "reward", "my")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (
            "\n\nHuman: ba\n\nAssistant: the good",
            "\n\nHuman: ba\n\nAssistant: the bad",
            "\n\nHuman: ba\n\nAssistant:",
        ),
        ("Q: ba\nA", "Q: ba\nB", "Q: ba\n"),
        ("ba be", "ba be bi", "ba"),
        ("ba be", "ba\nbe", "ba"),
        ("good", "goof", ""),
    ],
)
def test_the_prompt_inside_a_pair_of_texts_ends_where_a_reply_can_begin(chosen, rejected, prompt):
    assert implicit_prompt(chosen, rejected) == implicit_prompt(rejected, chosen) == prompt


def test_the_prompt_inside_a_pair_of_dialogues_ends_with_the_last_common_turn_that_asks():
    chosen = [*ASKED, assistant("be"), user("good"), assistant("good")]
    rejected = [*ASKED, assistant("be"), user("bad"), assistant("bad")]
    assert implicit_prompt(chosen, rejected) == ASKED


def test_the_ranks_of_a_list_are_its_own_or_its_order():
    assert ranks_of({"completions": ["a", "b", "c"]}) == [1, 2, 3]
    assert ranks_of({"completions": ["a", "b", "c"], "ranks": [2.0, 1.0, 1.0]}) == [2, 1, 1]


RANKED = {"prompt": "ba", "completions": ["good", "bad"], "ranks": [1, 2]}
PAIR = {"prompt": ASKED, "chosen": [assistant("good")], "rejected": [assistant("bad")]}


@pytest.mark.parametrize(
    ("stage", "row", "message"),
    [
        ("ppo", {"prompt": 3}, "prompt is int; expected text or a list of chat messages"),
        ("ppo", {"prompt": [{"content": "ba"}]}, "prompt: message 1 has no role; it has content"),
        (
            "ppo",
            {"prompt": [{"from": "narrator", "value": "ba"}]},
            "message 1 has the role 'narrator'; known are .* human and gpt. Rename it",
        ),
        ("ppo", {"prompt": [{"role": "user"}]}, "prompt: message 1, of the user, has no content"),
        (
            "ppo",
            {"prompt": [{"role": "user", "content": ["ba"]}]},
            "has content of type list; it must be text",
        ),
        (
            "ppo",
            {"prompt": [user("ba"), {"role": "narrator", "content": "be"}]},
            "message 2 has the role 'narrator'; known are system,",
        ),
        ("ppo", {"prompt": ["ba"]}, "message 1 is str; expected an object with role and content"),
        (
            "ppo",
            {"prompt": [user("ba"), assistant("be")]},
            "the last message is of the assistant; a prompt ends .* into a column messages",
        ),
        ("ppo", {"prompt": [system("ba")]}, "the last message is of the system; .* Add the user's turn"),
        (
            "ppo",
            {"messages": [system("ba"), assistant("be")]},
            "before the last reply: the last message is of the system",
        ),
        (
            "ppo",
            {"chosen": "good", "rejected": "bad"},
            "chosen and rejected do not begin alike, .* Give the prompt in a column of its own",
        ),
        (
            "ppo",
            {"chosen": [user("a"), assistant("b")], "rejected": [user("b"), assistant("b")]},
            "chosen and rejected do not begin alike",
        ),
        (
            "reward",
            PAIR | {"chosen": ASKED},
            "chosen: the last message is of the user; a reply ends with a turn of the assistant",
        ),
        ("reward", RANKED | {"ranks": [1, 2, 3]}, "3 ranks for 2 completions"),
        (
            "reward",
            RANKED | {"ranks": [9, 7]},
            r"ranks \[9, 7\]: expected whole numbers from 1, the best, to 2, .* Scores are not ranks",
        ),
        ("reward", RANKED | {"ranks": [1, 1.5]}, "expected whole numbers"),
        ("reward", RANKED | {"completions": "good"}, "completions is str; expected a list of replies"),
        (
            "reward",
            RANKED | {"completions": [[assistant("good")], "bad"]},
            "completion 2 is text, but the prompt is a list of chat messages",
        ),
        (
            "sft",
            {"messages": [{"role": "narrator", "content": "ba"}]},
            "messages: message 1 has the role 'narrator'",
        ),
    ],
)
def test_a_malformed_row_is_an_error_with_its_number(stage, row, message, tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=f"rows.jsonl: row 1: .*{message}"):
        load_rows(path, stage=stage)


@pytest.mark.parametrize(
    "rows", [[{"prompt": "ba"}, {"prompt": ASKED}], [{"prompt": None}, {"prompt": ASKED}, {"prompt": "ba"}]]
)
def test_a_column_of_text_and_messages_is_refused_with_the_row(rows, tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        ValueError,
        match=(
            f"row {len(rows)}: prompt is .* but prompt of row {len(rows) - 1} is .* Write all as text or all"
            " as messages"
        ),
    ):
        load_rows(path, stage="ppo")


@pytest.mark.parametrize(
    ("stage", "sound", "row", "reason"),
    [
        ("ppo", {"prompt": "ba"}, {"prompt": " \n"}, "prompt is empty"),
        ("ppo", {"prompt": "ba"}, {"prompt": None}, "prompt is missing"),
        ("ppo", {"prompt": ASKED}, {"prompt": []}, "prompt is empty"),
        ("ppo", {"prompt": ASKED}, {"prompt": [user("")]}, "the last message of prompt is empty"),
        ("ppo", {"messages": ASKED}, {"messages": [assistant("be")]}, "there is no turn before the reply"),
        ("sft", {"text": "ba"}, {"text": ""}, "text is empty"),
        (
            "sft",
            {"prompt": "ba", "completion": "be"},
            {"prompt": "ba", "completion": ""},
            "completion is empty",
        ),
        ("reward", PAIR, PAIR | {"chosen": PAIR["rejected"]}, "chosen and rejected are the same"),
        ("reward", RANKED, RANKED | {"completions": ["good"]}, "there are fewer than two completions"),
        ("reward", RANKED, RANKED | {"completions": ["good", ""]}, "a completion is missing or empty"),
        ("reward", RANKED | {"ranks": [1, 2]}, RANKED | {"ranks": [1, 1]}, "all completions have one rank"),
    ],
)
def test_a_row_that_teaches_nothing_is_left_out_with_a_reason(stage, sound, row, reason, tmp_path):
    rows = load_rows(tiny.write_rows(tmp_path / "rows.jsonl", [sound, row, sound]))
    taken = take(rows, stage, "x")
    assert taken.dropped == {reason: [2]}
    assert len(taken.rows) == 2


def test_rows_left_out_are_counted_in_a_warning_with_their_numbers(tmp_path, caplog):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"text": "ba"}, *[{"text": ""}] * 4, {"text": None}])
    assert list(load_rows(path, stage="sft")) == [{"text": "ba"}]
    assert (
        "5 of 6 rows left out: 4 because text is empty (rows 2, 3, 4, ...); 1 because text is missing (row 6)"
        in caplog.text
    )


def test_no_row_left_is_an_error():
    with pytest.raises(ValueError, match=r"x: none of 2 rows is left: 2 because text is empty \(rows 1, 2\)"):
        take(Dataset.from_list([{"text": ""}, {"text": " "}]), "sft", "x")


def test_an_empty_text_prompt_is_sound_where_the_reply_is_given():
    assert (
        take(Dataset.from_list([{"prompt": "", "chosen": "good", "rejected": "bad"}]), "reward", "x").dropped
        == {}
    )


def test_ppo_keeps_other_columns_for_reward_functions_and_the_rest_lose_all_that_are_not_theirs():
    row = {
        "prompt": "ba",
        "messages": [*ASKED, assistant("be")],
        "chosen": "good",
        "rejected": "bad",
        "margin": 1.0,
    }
    kept = {
        stage: set(take(Dataset.from_list([row]), stage, "x").rows.column_names)
        for stage in ("sft", "reward", "ppo")
    }
    assert kept == {
        "sft": {"messages"},
        "reward": {"prompt", "chosen", "rejected", "margin"},
        "ppo": set(row),
    }


def test_calls_of_tools_stand_in_for_content(tmp_path):
    calling = {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    asked = [user("ba"), calling, {"role": "tool", "content": "bi"}]
    (prompt,) = prompts(tmp_path, {"messages": [*asked, assistant("be")]})
    assert [message["role"] for message in prompt] == ["user", "assistant", "tool"]


def test_parquet_holds_chat_messages_as_jsonl_does(tmp_path):
    rows = [{"messages": [*TWO_TURNS, assistant("bu")], "id": 7}, {"messages": ASKED, "id": 8}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert json.dumps(list(load_rows(str(tmp_path / "rows.parquet"), stage="ppo")["prompt"])) == json.dumps(
        [TWO_TURNS, ASKED]
    )
