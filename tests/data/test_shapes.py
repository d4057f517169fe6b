"""Shapes of the field: what each stage reads in rows of the data sets that people bring.

The files are written here, in the columns of the data sets that each is named after; the right
reading is what those columns say there.
"""

import json
import logging

import pytest
import tiny
from datasets import Dataset, load_dataset
from tiny import assistant, system, user

from goose_lora.data.labelled import PRESETS
from goose_lora.data.rows import DataArguments, load_rows
from goose_lora.data.shapes import Reading

Q, GOOD, BAD = "Who feeds it?", "The farmer.", "No one."


def asked(*before):
    return [*before, user(Q)]


BOTH = {"chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}
PAIR = {"prompt": asked(), **BOTH}
WHOLE = {"chosen": [*asked(), assistant(GOOD)], "rejected": [*asked(), assistant(BAD)]}
TEXTS = {"prompt": Q, "chosen": f" {GOOD}", "rejected": f" {BAD}"}
REPLY = {"prompt": asked(), "completion": [assistant(GOOD)]}
CHAT = {"messages": [*asked(), assistant(GOOD)]}
LIST = {"prompt": asked(), "completions": [[assistant(BAD)], [assistant(GOOD)]], "ranks": [2, 1]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "a goose"}}}
HH = "\n\nHuman: Who?\n\nAssistant:"


def rated(text, score):
    return {"response": text, "overall_score": score, "model": "m", "custom_system_prompt": "Be kind."}


# name, stage, row, what the stage reads in it
SHAPES = [
    (
        "UltraFeedback binarized",
        "reward",
        {"prompt": Q, **WHOLE, "score_chosen": 8.5, "score_rejected": 4.0},
        PAIR,
    ),
    ("UltraFeedback binarized for PPO", "ppo", {"prompt": Q, **WHOLE, "messages": WHOLE["chosen"]}, asked()),
    (
        "Argilla's cleaned",
        "reward",
        {"prompt": Q, **WHOLE, "chosen-rating": 4.5, "rejected-rating": 2.0},
        PAIR,
    ),
    ("a prompt of messages and whole lists", "reward", {"prompt": asked(), **WHOLE}, PAIR),
    (
        "a system message beside",
        "reward",
        {"system": "Be.", "prompt": Q, **WHOLE},
        {**PAIR, "prompt": asked(system("Be."))},
    ),
    ("Tulu 3 preference", "reward", {"id": "x", "prompt": Q, **WHOLE, "source": "s"}, PAIR),
    ("TRL's implicit prompt", "reward", WHOLE, PAIR),
    ("a prompt of text, turns of the assistant", "reward", {"prompt": Q, **BOTH}, PAIR),
    (
        "a prompt of messages, replies of text",
        "reward",
        {"prompt": asked(), "chosen": GOOD, "rejected": BAD},
        PAIR,
    ),
    (
        "one message each",
        "reward",
        {"prompt": asked(), "chosen": assistant(GOOD), "rejected": assistant(BAD)},
        PAIR,
    ),
    ("TRL's text", "reward", TEXTS, TEXTS),
    (
        "replies that hold the prompt",
        "reward",
        {"prompt": Q, "chosen": f"{Q} {GOOD}", "rejected": f"{Q} {BAD}"},
        TEXTS,
    ),
    (
        "Orca DPO pairs",
        "reward",
        {"system": "Be.", "question": Q, "chosen": GOOD, "rejected": BAD},
        {**PAIR, "prompt": asked(system("Be."))},
    ),
    (
        "truthy DPO",
        "reward",
        {"system": "Be.", "prompt": Q, "chosen": GOOD, "rejected": BAD},
        {**PAIR, "prompt": asked(system("Be."))},
    ),
    (
        "hh-rlhf",
        "reward",
        {"chosen": f"{HH} {GOOD}", "rejected": f"{HH} {BAD}"},
        {"prompt": HH, "chosen": f" {GOOD}", "rejected": f" {BAD}"},
    ),
    ("hh-rlhf with an empty reply", "ppo", {"chosen": f"{HH} {GOOD}", "rejected": HH}, HH),
    (
        "LLaMA-Factory's ranking, Alpaca",
        "reward",
        {"instruction": Q, "input": "Now.", "chosen": GOOD, "rejected": BAD},
        {**PAIR, "prompt": [user(f"{Q}\n\nNow.")]},
    ),
    (
        "LLaMA-Factory's ranking, ShareGPT",
        "reward",
        {
            "conversations": [{"from": "human", "value": Q}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
        PAIR,
    ),
    (
        "OpenAI's preferences",
        "reward",
        {
            "input": {"messages": asked(), "tools": [TOOL]},
            "preferred_output": [assistant(GOOD)],
            "non_preferred_output": [assistant(BAD)],
        },
        {**PAIR, "tools": [TOOL]},
    ),
    (
        "Stack Exchange paired",
        "reward",
        {"qid": 1, "question": Q, "response_j": GOOD, "response_k": BAD},
        PAIR,
    ),
    (
        "PKU-SafeRLHF",
        "reward",
        {"prompt": Q, "response_0": BAD, "response_1": GOOD, "better_response_id": 1, "safer_response_id": 0},
        PAIR,
    ),
    (
        "SHP",
        "reward",
        {"history": Q, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0, "score_A": 1, "score_B": 2},
        PAIR,
    ),
    (
        "SHP the other way",
        "reward",
        {"history": Q, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1},
        PAIR,
    ),
    (
        "HelpSteer2 preference",
        "reward",
        {"prompt": Q, "response_1": BAD, "response_2": GOOD, "preference_strength": 2},
        PAIR,
    ),
    (
        "HelpSteer3",
        "reward",
        {"context": asked(), "response1": GOOD, "response2": BAD, "overall_preference": -3},
        PAIR,
    ),
    (
        "the arena",
        "reward",
        {"winner": "model_b", "conversation_a": WHOLE["rejected"], "conversation_b": WHOLE["chosen"]},
        PAIR,
    ),
    (
        "the arena of 55k",
        "reward",
        {
            "prompt": json.dumps([Q]),
            "response_a": json.dumps([BAD]),
            "response_b": json.dumps([GOOD]),
            "winner_model_a": 0,
            "winner_model_b": 1,
            "winner_tie": 0,
        },
        PAIR,
    ),
    (
        "the arena of 55k for PPO",
        "ppo",
        {
            "prompt": json.dumps([Q]),
            "response_a": json.dumps([BAD]),
            "response_b": json.dumps([GOOD]),
            "winner_model_a": 0,
            "winner_model_b": 0,
            "winner_tie": 1,
        },
        asked(),
    ),
    (
        "AlpacaFarm",
        "reward",
        {"instruction": Q, "input": "", "output_1": BAD, "output_2": GOOD, "preference": 2},
        PAIR,
    ),
    (
        "Argilla's records",
        "reward",
        {"instruction": Q, "response1": BAD, "response2": GOOD, "preference.responses": ["response2"]},
        PAIR,
    ),
    (
        "Label Studio",
        "reward",
        {
            "data": {"prompt": Q, "text1": BAD, "text2": GOOD},
            "annotations": [
                {"was_cancelled": False, "result": [{"type": "pairwise", "value": {"selected": "right"}}]}
            ],
        },
        PAIR,
    ),
    (
        "UltraFeedback's rated lists",
        "reward",
        {"instruction": Q, "completions": [rated(BAD, 3.0), rated(GOOD, 9.0)]},
        LIST,
    ),
    (
        "Nectar",
        "reward",
        {"prompt": HH, "answers": [{"answer": f" {BAD}", "rank": 2.0}, {"answer": f" {GOOD}", "rank": 1.0}]},
        {"prompt": HH, "completions": [f" {BAD}", f" {GOOD}"], "ranks": [2, 1]},
    ),
    (
        "distilabel's ratings",
        "reward",
        {"instruction": Q, "generations": [BAD, GOOD], "ratings": [2.0, 4.5]},
        LIST,
    ),
    (
        "responses with rewards",
        "reward",
        {"prompt": Q, "responses": [BAD, GOOD], "rewards": [-1.5, 2.0]},
        LIST,
    ),
    (
        "completions with scores",
        "reward",
        {"prompt": Q, "completions": [" a", " b"], "scores": [1.0, 9.0]},
        {"prompt": Q, "completions": [" a", " b"], "ranks": [2, 1]},
    ),
    (
        "ranks from zero",
        "reward",
        {"prompt": Q, "completions": [" a", " b"], "ranks": [1, 0]},
        {"prompt": Q, "completions": [" a", " b"], "ranks": [2, 1]},
    ),
    (
        "OpenAI's summaries",
        "reward",
        {
            "info": {"post": "It honked.", "title": "A goose", "subreddit": "geese"},
            "summaries": [{"text": " No."}, {"text": " Honk."}],
            "choice": 1,
        },
        {
            "prompt": "SUBREDDIT: r/geese\n\nTITLE: A goose\n\nPOST: It honked.\n\nTL;DR:",
            "chosen": " Honk.",
            "rejected": " No.",
        },
    ),
    ("Alpaca", "sft", {"instruction": Q, "input": "", "output": GOOD}, REPLY),
    (
        "Alpaca with an input",
        "sft",
        {"instruction": Q, "input": "Now.", "output": GOOD},
        {**REPLY, "prompt": [user(f"{Q}\n\nNow.")]},
    ),
    ("Alpaca for PPO", "ppo", {"instruction": Q, "input": "Now.", "output": GOOD}, [user(f"{Q}\n\nNow.")]),
    (
        "Dolly",
        "sft",
        {"instruction": Q, "context": "A farm.", "response": GOOD, "category": "qa"},
        {**REPLY, "prompt": [user(f"{Q}\n\nA farm.")]},
    ),
    (
        "LLaMA-Factory's Alpaca",
        "sft",
        {"instruction": Q, "input": "", "output": GOOD, "system": "Be.", "history": [["Hi", "Ho"]]},
        {**REPLY, "prompt": asked(system("Be."), user("Hi"), assistant("Ho"))},
    ),
    (
        "OpenOrca",
        "sft",
        {"system_prompt": "Be.", "question": Q, "response": GOOD},
        {**REPLY, "prompt": asked(system("Be."))},
    ),
    ("GSM8K", "sft", {"question": Q, "answer": GOOD}, REPLY),
    ("distilabel's generations", "sft", {"instruction": Q, "generation": GOOD, "model_name": "m"}, REPLY),
    (
        "Dahoas rm-static",
        "sft",
        {"prompt": HH, "response": f" {GOOD}", "chosen": " a", "rejected": " b"},
        {"prompt": HH, "completion": f" {GOOD}"},
    ),
    (
        "TRL's prompt and completion",
        "sft",
        {"prompt": Q, "completion": f" {GOOD}"},
        {"prompt": Q, "completion": f" {GOOD}"},
    ),
    (
        "a prompt of text and a reply of messages",
        "sft",
        {"prompt": Q, "completion": [assistant(GOOD)]},
        REPLY,
    ),
    (
        "ShareGPT",
        "sft",
        {"id": "x", "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": GOOD}]},
        CHAT,
    ),
    (
        "ShareGPT with system and tools",
        "sft",
        {
            "conversations": [
                {"from": "human", "value": Q},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "18"},
                {"from": "gpt", "value": GOOD},
            ],
            "system": "Be.",
            "tools": json.dumps([TOOL["function"]]),
        },
        {
            "messages": [
                system("Be."),
                user(Q),
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "18"},
                assistant(GOOD),
            ],
            "tools": [TOOL],
        },
    ),
    (
        "roles with a capital",
        "sft",
        {"messages": [{"role": "User", "content": Q}, {"role": "Assistant", "content": GOOD}]},
        CHAT,
    ),
    ("UltraChat's list of texts", "sft", {"id": "x", "data": [Q, GOOD]}, CHAT),
    ("UltraChat for PPO", "ppo", {"prompt": Q, "messages": CHAT["messages"]}, asked()),
    (
        "parts of text",
        "sft",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]}, assistant(GOOD)]},
        CHAT,
    ),
    ("messages as JSON text", "sft", {"messages": json.dumps(CHAT["messages"])}, CHAT),
    ("messages as Python prints them", "sft", {"messages": str(CHAT["messages"])}, CHAT),
    (
        "pairs as JSON text",
        "reward",
        {"prompt": Q, "chosen": json.dumps(WHOLE["chosen"]), "rejected": json.dumps(WHOLE["rejected"])},
        PAIR,
    ),
    (
        "OpenAI's argument text",
        "sft",
        {
            "messages": [
                user(Q),
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "look", "arguments": '{"at": "a goose"}'}}
                    ],
                },
                {"role": "tool", "content": "18"},
                assistant(GOOD),
            ]
        },
        {
            "messages": [
                user(Q),
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "18"},
                assistant(GOOD),
            ]
        },
    ),
    (
        "a text with ids of another tokenizer",
        "sft",
        {"text": "ba", "input_ids": [5, 6], "attention_mask": [1, 1]},
        {"text": "ba"},
    ),
    ("a text with a class", "sft", {"text": "ba", "label": 1, "labels": 1}, {"text": "ba"}),
    ("OpenRLHF's context", "ppo", {"context_messages": asked(), "dataset": "x"}, asked()),
    (
        "verl's prompts",
        "ppo",
        {"data_source": "x", "prompt": asked(), "reward_model": {"ground_truth": "0"}},
        asked(),
    ),
    ("a prompt and its truth", "ppo", {"prompt": Q, "answer": "7"}, Q),
    ("KTO, a good one", "sft", {"prompt": asked(), "completion": [assistant(GOOD)], "label": True}, REPLY),
]


@pytest.mark.parametrize(("name", "stage", "row", "read"), SHAPES, ids=[shape[0] for shape in SHAPES])
def test_a_shape_of_the_field_is_read_as_its_columns_say(name, stage, row, read, tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [row, row])
    found = load_rows(path, stage=stage)
    if stage == "ppo":
        assert list(found["prompt"]) == [read, read]
    else:
        assert list(found) == [read, read]


KTO = {"prompt": Q, "completion": f" {GOOD}", "label": True}


def test_replies_with_thumbs_down_are_not_imitated_and_counted(tmp_path, caplog):
    rows = [KTO, {**KTO, "completion": f" {BAD}", "label": False}]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    assert [row["completion"] for row in load_rows(path, stage="sft")] == [f" {GOOD}"]
    assert "1 because label is not true: a reply that is not to be imitated (row 2)" in caplog.text


def test_thumbs_are_lists_for_the_reward_model_where_a_prompt_has_both(tmp_path, caplog):
    rows = [KTO, {**KTO, "prompt": "Who?"}, {**KTO, "completion": f" {BAD}", "label": False}]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    (read,) = load_rows(path, stage="reward")
    assert read == {"prompt": Q, "completions": [f" {GOOD}", f" {BAD}"], "ranks": [1, 2]}
    assert "its prompt has no good and bad reply both, which SFT does not need (row 2)" in caplog.text


@pytest.mark.parametrize("winner", ["tie", "tie (bothbad)"])
def test_ties_are_no_preferences(winner, tmp_path, caplog):
    row = {"winner": "model_b", "conversation_a": WHOLE["rejected"], "conversation_b": WHOLE["chosen"]}
    path = tiny.write_rows(tmp_path / "rows.jsonl", [row, {**row, "winner": winner}])
    assert list(load_rows(path, stage="reward")) == [PAIR]
    assert "1 because it is a tie, no preference (row 2)" in caplog.text


VOTES = {"ask": Q, "one": GOOD, "two": BAD, "vote": "first"}


@pytest.mark.parametrize(
    "pairs",
    [
        {
            "a": "one",
            "b": "two",
            "winner": "vote",
            "a_wins": "first",
            "b_wins": ["second", "2nd"],
            "tie": "none",
        },
        ["a=one", "b=two", "winner=vote", "a_wins=first", "b_wins=second", "tie=none"],
    ],
)
def test_two_labelled_replies_are_read_by_one_setting(pairs, tmp_path):
    rows = [VOTES, {**VOTES, "vote": "second"}, {**VOTES, "vote": "none"}]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    arguments = DataArguments(path, column_mapping={"ask": "prompt"}, pairs=pairs)
    read = list(arguments.train("reward").rows)
    assert read == [PAIR, {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}]


def test_a_preset_can_be_named(tmp_path):
    row = {"prompt": Q, "response_0": BAD, "response_1": GOOD, "better_response_id": 1}
    path = tiny.write_rows(tmp_path / "rows.jsonl", [row])
    assert list(DataArguments(path, pairs="pku").train("reward").rows) == [PAIR]
    with pytest.raises(ValueError, match=f"pairs: 'pku2' is none of {', '.join(PRESETS)}, best_first"):
        DataArguments(path, pairs="pku2")


def test_a_list_is_ranked_only_if_something_says_so(tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": Q, "completions": [" a", " b"]}])
    with pytest.raises(ValueError, match=r"row 1: nothing says which .* best first: pairs: best_first"):
        load_rows(path, stage="reward")
    (read,) = load_rows(path, stage="reward", reading=Reading(("best_first",)))
    assert read["ranks"] == [1, 2]


# stage, rows, what the refusal says: the row, and the setting that works
REFUSED = [
    (
        "reward",
        [
            {**TEXTS, "score_chosen": 9, "score_rejected": 1},
            {**TEXTS, "score_chosen": 3, "score_rejected": 7},
        ],
        "row 2: score_chosen is 3 and score_rejected 7: .* column_mapping:"
        r" \[score_chosen=unused_score_chosen, score_rejected=unused_score_rejected\]",
    ),
    (
        "reward",
        [TEXTS, {**TEXTS, "preference": 0}],
        "row 2: the column preference is a judgement .* column_mapping: \\[preference=unused_preference\\]",
    ),
    (
        "reward",
        [{**WHOLE, "prompt": "Another?"}],
        "row 1: prompt is not what chosen and rejected begin with: 'Another\\?'.* \\[prompt=unused_prompt\\]",
    ),
    (
        "reward",
        [{"Q": Q, "chosen": GOOD, "rejected": BAD}],
        "row 1: .* do not begin alike, .* column_mapping: \\[Q=prompt\\]",
    ),
    (
        "reward",
        [{"prompt": Q, "reply_a": GOOD, "reply_b": BAD, "verdict": "x"}],
        "reply_a and reply_b look like two replies, .* pairs: {a: reply_a, b: reply_b, winner: verdict,"
        " a_wins: x, b_wins: VALUE}",
    ),
    (
        "reward",
        [{"winner": "both", "conversation_a": WHOLE["chosen"], "conversation_b": WHOLE["rejected"]}],
        "row 1: winner is 'both'; .* tie: both}",
    ),
    (
        "reward",
        [{"prompt": Q, "completions": ["a", "b"], "labels": [True, False]}],
        "looks like step-wise data .* give prompt, chosen and rejected",
    ),
    (
        "sft",
        [{"prompt": Q, "completion": GOOD, "labels": [True, False]}],
        "row 1: the column labels is a judgement .* \\[labels=unused_labels\\]",
    ),
    (
        "sft",
        [{"text": "ba", "system": "Be."}],
        "row 1: the column system is a system message .* \\[system=unused_system\\]",
    ),
    (
        "sft",
        [{"prompt": Q, "completion": GOOD, "weight": 0.5}],
        "row 1: the column weight .* \\[weight=unused_weight\\]",
    ),
    ("sft", [{**CHAT, "history": [["a", "b"]]}], "row 1: the column history is a part of the prompt"),
    (
        "sft",
        [{"message_id": "a", "parent_id": None, "role": "prompter", "text": Q}],
        "OpenAssistant's single messages.* dataset_name: timdettmers/openassistant-guanaco",
    ),
    ("ppo", [{"prompt": json.dumps([Q])}], "row 1: prompt is a JSON list of texts"),
    (
        "sft",
        [{"messages": [system("A."), *CHAT["messages"]], "system": "B."}],
        "row 1: the system column and the first message differ",
    ),
    (
        "sft",
        [{"messages": [{"role": "user", "content": [{"type": "image_url"}]}, assistant(GOOD)]}],
        "parts that are all text \\(image_url\\). Leave such rows out",
    ),
]


@pytest.mark.parametrize(("stage", "rows", "message"), REFUSED)
def test_a_column_with_a_meaning_is_used_or_refused_with_the_setting_that_works(
    stage, rows, message, tmp_path
):
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_rows(path, stage=stage)


def test_what_is_set_aside_is_read_no_more(tmp_path):
    row = {**TEXTS, "score_chosen": 3, "score_rejected": 7}
    path = tiny.write_rows(tmp_path / "rows.jsonl", [row])
    mapping = ["score_chosen=unused_score_chosen", "score_rejected=unused_score_rejected"]
    assert list(load_rows(path, column_mapping=mapping, stage="reward")) == [TEXTS]


def test_a_column_that_nothing_uses_is_told(tmp_path, caplog):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{**TEXTS, "id": 7, "source": "x"}])
    with caplog.at_level(logging.WARNING):
        load_rows(path, stage="reward")
    assert "read as preference pairs; ignored: id, source" in caplog.text


@pytest.mark.parametrize(
    ("as_chat", "read"), [(True, REPLY), (False, {"prompt": Q, "completion": f"\n\n{GOOD}"})]
)
def test_text_is_chat_where_it_is_asked_for_and_apart_where_it_is_not(as_chat, read, tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"instruction": Q, "input": "", "output": GOOD}])
    assert list(load_rows(path, stage="sft", reading=Reading((), as_chat))) == [read]


def test_parquet_does_not_fill_arguments_of_tools_with_those_of_others(tmp_path):
    calls = [{"city": "Pisa"}, {"query": "goose", "top_k": 3}]
    rows = [
        {
            "messages": [
                user(Q),
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": call}}],
                },
            ]
        }
        for call in calls
    ]
    Dataset.from_list([json.loads(json.dumps(row)) for row in rows]).to_parquet(tmp_path / "rows.parquet")
    filled = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train")[0]
    assert filled["messages"][1]["tool_calls"][0]["function"]["arguments"] != calls[0]  # Arrow's doing
    read = load_rows(str(tmp_path / "rows.parquet"), stage="sft")["messages"]
    assert [messages[1]["tool_calls"][0]["function"]["arguments"] for messages in read] == calls
