"""Shapes of the field: what each stage reads in rows of the data sets that people bring."""

import json
import logging
import re

import pytest
import tiny
from datasets import Dataset, load_dataset
from field_rows import BAD, CHAT, GOOD, PAIR, REPLY, SHAPES, TEXTS, WHOLE, Q
from tiny import assistant, system, user

from goose_lora.data.formats import take
from goose_lora.data.labelled import PRESETS
from goose_lora.data.rows import DataArguments, load_rows
from goose_lora.data.shapes import Reading
from goose_lora.errors import UserError


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
    *[
        (
            "sft",
            [{"prompt": Q, "response": BAD, column: value}],
            rf"column {column} is a judgement .* \[{column}=unused_{column}\]",
        )
        for column, value in (
            ("thumbs_down", True),
            ("is_correct", False),
            ("upvoted", 0),
            ("label", "bad"),
            ("label", "dislike"),
            ("verdict", "undesirable"),
            ("label", "0"),
        )
    ],
    ("sft", [{**CHAT, "label": "undesirable"}], r"column label is a judgement .* \[label=unused_label\]"),
    (
        "reward",
        [{"prompt": Q, "completion": GOOD, "label": "good"}],
        r"label is 'good'\. A judgement on one reply is true, false, desirable, undesirable,",
    ),
    (
        "reward",
        [{**WHOLE, "prompt": "feeds"}],
        r"prompt is not what chosen and rejected begin with: 'feeds'.*\[prompt=unused_prompt\]",
    ),
    ("reward", [{**TEXTS, "margin": -2.0}], r"margin is -2: .* worse\. .* \[margin=unused_margin\]"),
    (
        "sft",
        [{**CHAT, "chat_template_kwargs": ["enable_thinking"]}],
        r"row 1: chat_template_kwargs is \['enable_thinking'\]; expected an object",
    ),
    (
        "sft",
        [{"instruction": Q, "output": GOOD, "history": [["a", None]]}],
        r"row 1: turn 1 of history is \['a', None\]; expected two texts",
    ),
    *[
        ("sft", [{**CHAT, "system": value}], r"row 1: system is .* \[system=unused_system\]")
        for value in (["Be kind.", "Be brief."], {"role": "user", "content": "Be."}, {"text": "Be."}, 7)
    ],
    *[
        (
            "sft",
            [{"messages": [user(Q), {**assistant(GOOD), **keys}]}],
            f"message 2 {what}",
        )
        for keys, what in (
            ({"train": "maybe"}, "has train: 'maybe', .* Write true or false"),
            ({"loss": 0.5}, "has loss: '0.5', .* Write true or false"),
            ({"train": False, "weight": 1}, "has train beside another weight"),
            ({"train_detail": [{"train": False}]}, r"has train_detail, .* leave_out: \[train_detail\]"),
            ({"function_call": "f(x)"}, r"has a call of a tool without a name: f\(x\)"),
            (
                {"function_call": {"name": "f"}, "tool_calls": [{"function": {"name": "g"}}]},
                "has both tool_calls and function_call",
            ),
        )
    ],
    *[
        ("sft", [{"problem": Q, **dict.fromkeys(names, GOOD)}], what)
        for names, what in (
            (("solution", "answer"), r"answer and solution could each .* \[solution=unused_solution\] to"),
            (("output", "response"), r"output and response could each .* \[response=unused_response\] to"),
        )
    ],
    ("reward", [{**TEXTS, "tie": True}], r"the column tie is a judgement .* \[tie=unused_tie\]"),
    ("sft", [{"problem": Q, "thinking": "Hm.", "solution": GOOD}], "thinking is thoughts of the reply"),
    (
        "ppo",
        [{"prompt": Q, "images": ["x.png"]}],
        r"images is a part of the prompt .* \[images=unused_images\]",
    ),
    (
        "sft",
        [{"question": Q, "context": "C.", "answers": {"text": [GOOD]}}],
        r"\[question=prompt, answers=comp",
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


@pytest.mark.parametrize("value", [False, 0, "false"])
def test_a_pair_that_is_no_tie_is_a_pair(value, tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{**TEXTS, "is_tie": value}])
    assert list(load_rows(path, stage="reward")) == [TEXTS]


def test_a_judgement_may_name_the_column_that_is_better(tmp_path):
    rows = [{"instruction": Q, "output_1": BAD, "output_2": GOOD, "preference": "output_2"}]
    assert list(load_rows(tiny.write_rows(tmp_path / "rows.jsonl", rows), stage="reward")) == [PAIR]


@pytest.mark.parametrize("key", ["train", "training", "train_on_turn", "loss", "weight"])
@pytest.mark.parametrize(("no", "yes"), [(False, True), ("false", "True"), (0, 1), ("0", "1")])
def test_a_turn_that_is_not_to_be_learned_is_so_in_all_words(key, no, yes, tmp_path):
    if key == "weight" and isinstance(no, str):
        pytest.skip("OpenAI's weight is a number, and other ones are refused where it is used")
    turns = [user("a"), {**assistant("b"), key: no}, user("c"), {**assistant("d"), key: yes}]
    (read,) = load_rows(tiny.write_rows(tmp_path / "rows.jsonl", [{"messages": turns}]), stage="sft")
    assert [turn.get("weight") for turn in read["messages"]] == [None, 0, None, 1]


def test_a_judgement_may_name_the_model_that_is_better(tmp_path):
    row = {
        "prompt": Q,
        "response_a": BAD,
        "response_b": GOOD,
        "model_a": "m1",
        "model_b": "m2",
        "winner": "m2",
    }
    assert list(load_rows(tiny.write_rows(tmp_path / "rows.jsonl", [row]), stage="reward")) == [PAIR]


def test_scores_that_are_no_numbers_rank_nothing(tmp_path):
    rows = [{"prompt": Q, "completions": [GOOD, BAD], "scores": [float("nan"), 1.0]}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(ValueError, match=r"row 1: scores .*: expected one number to each reply"):
        load_rows(str(path), stage="reward")


def scored(*pairs):
    columns = ("prompt", "response_a", "response_b", "rating_a", "rating_b")
    return [dict(zip(columns, ("What is tea?", *pair), strict=True)) for pair in pairs]


def test_of_two_replies_with_a_score_each_the_higher_one_is_chosen(tmp_path, caplog):
    rows = scored(("good", "bad", 5, 2), ("bad", "good", 1, 4), ("one", "other", 3, 3))
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    taken = load_rows(path, stage="reward")
    assert [row[-1]["content"] for row in taken["chosen"]] == ["good", "good"]
    assert [row[-1]["content"] for row in taken["rejected"]] == ["bad", "bad"]
    assert taken.column_names == ["prompt", "chosen", "rejected"]
    assert "it is a tie, no preference" in caplog.text
    assert len(load_rows(path, stage="ppo")) == 3, "a tie is a prompt all the same"


@pytest.mark.parametrize("ends", [("rank_a", "rank_b"), ("rating_a", "rating_c"), ("rating_a", "score_b")])
def test_columns_that_are_no_two_scores_decide_nothing(tmp_path, ends):
    rows = [{"prompt": "p", "response_a": "x", "response_b": "y", ends[0]: 2, ends[1]: 1}]
    with pytest.raises(ValueError, match="nothing says which is better"):
        load_rows(tiny.write_rows(tmp_path / "rows.jsonl", rows), stage="reward")


SCORES = {"prompt": "p", "response_a": "kind", "response_b": "rude"}


@pytest.mark.parametrize(
    "name", ["toxicity_score", "gpt4_toxicity_score", "reward_of_harm", "perplexity_score"]
)
def test_scores_of_which_more_may_be_worse_are_refused_with_mappings_that_work(name, tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{**SCORES, f"{name}_a": 0.1, f"{name}_b": 0.9}])
    with pytest.raises(
        ValueError, match=rf"higher {name}_a: column_mapping: .*: \[{name}_b=score_a"
    ) as error:
        load_rows(path, stage="reward")
    high, low = re.findall(r"\[(.*?)\]", str(error.value))
    for mapping, better in ((high, "rude"), (low, "kind")):
        (row,) = load_rows(path, stage="reward", column_mapping=mapping.split(", "))
        assert row["chosen"][0]["content"] == better


@pytest.mark.parametrize(
    "name", ["overall_score", "gpt4_rating", "human_rating", "reward_model_score", "reward"]
)
def test_names_that_plainly_mean_quality_choose_the_higher_one(name, tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{**SCORES, f"{name}_a": 0.1, f"{name}_b": 0.9}])
    assert load_rows(path, stage="reward")[0]["chosen"][0]["content"] == "rude"


def test_one_of_two_kinds_of_scores_is_chosen_by_the_user(tmp_path):
    row = {**SCORES, "score_a": 4, "score_b": 3, "toxicity_score_a": 0.1, "toxicity_score_b": 0.9}
    path = tiny.write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match="nothing says which is better"):
        load_rows(path, stage="reward")
    aside = ["toxicity_score_a=unused_a", "toxicity_score_b=unused_b"]
    assert load_rows(path, stage="reward", column_mapping=aside)[0]["chosen"][0]["content"] == "kind"


def test_scores_that_are_written_as_text_are_numbers_and_no_replies(tmp_path):
    row = {"prompt": "p", "score_a": "4", "score_b": "10", **SCORES}
    rows = [row, {**row, "score_a": "none"}]
    (read,) = load_rows(tiny.write_rows(tmp_path / "rows.jsonl", rows), stage="reward")
    assert read["chosen"][0]["content"] == "rude" and read["rejected"][0]["content"] == "kind"


def test_what_is_said_of_two_replies_is_none_of_them(tmp_path):
    row = {"prompt": "p", "critique_a": "Fine.", "critique_b": "Bad.", **SCORES, "score_a": 2, "score_b": 1}
    (read,) = load_rows(tiny.write_rows(tmp_path / "rows.jsonl", [row]), stage="reward")
    assert read["chosen"][0]["content"] == "kind"


@pytest.mark.parametrize("words", [("desirable", "undesirable"), ("True", "False"), (True, False)])
def test_ktos_own_words_are_thumbs(words, tmp_path):
    rows = [{**KTO, "label": words[0]}, {**KTO, "completion": f" {BAD}", "label": words[1]}]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    assert list(load_rows(path, stage="sft")["completion"]) == [f" {GOOD}"]
    (read,) = load_rows(path, stage="reward")
    assert read == {"prompt": Q, "completions": [f" {GOOD}", f" {BAD}"], "ranks": [1, 2]}


@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs"])
def test_thumbs_of_one_prompt_under_other_tools_are_of_two_prompts(column, tmp_path, caplog):
    of = {"tools": ["f", "g"], "chat_template_kwargs": ["h", "i"]}[column]
    made = [[{"name": name}] if column == "tools" else {"mode": name} for name in of]
    good, bad = KTO, {**KTO, "completion": f" {BAD}", "label": False}
    rows = [{**good, column: made[0]}, {**bad, column: made[1]}, {**bad, column: made[0]}]
    (read,) = load_rows(tiny.write_rows(tmp_path / "rows.jsonl", rows), stage="reward")
    assert read["completions"] == [f" {GOOD}", f" {BAD}"] and of[0] in str(read[column])
    assert "does not need (row 2)" in caplog.text


BE = {"role": "system", "content": "Be."}


@pytest.mark.parametrize("value", ["Be.", ["Be."], BE, [BE], json.dumps([BE]), '["Be."]'])
@pytest.mark.parametrize("row", [CHAT, {"prompt": Q, "response": GOOD}], ids=["messages", "prompt"])
def test_a_system_column_may_hold_a_text_or_a_message_or_one_in_a_list(row, value, tmp_path):
    (read,) = load_rows(tiny.write_rows(tmp_path / "rows.jsonl", [{**row, "system": value}]), stage="sft")
    assert (read["messages"] if "messages" in read else read["prompt"])[0] == BE


def test_a_system_prompt_that_is_written_as_an_object_is_text(tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{**CHAT, "system": '{"style": "brief"}'}])
    assert load_rows(path, stage="sft")[0]["messages"][0]["content"] == '{"style": "brief"}'


@pytest.mark.parametrize("call", [{"name": "f", "arguments": {"x": 1}}, '{"name": "f", "arguments": "{}"}'])
def test_openais_first_form_of_a_call_is_a_call_beside_text_too(call, tmp_path):
    turns = [user(Q), {**assistant("I call."), "function_call": call}]
    (read,) = load_rows(tiny.write_rows(tmp_path / "rows.jsonl", [{"messages": turns}]), stage="sft")
    (found,) = read["messages"][1]["tool_calls"]
    assert found["function"]["name"] == "f" and isinstance(found["function"]["arguments"], dict)
    assert "function_call" not in read["messages"][1]


def test_a_part_that_is_not_learned_may_be_left_out_and_is_nothing_to_ppo(tmp_path):
    turns = [user(Q), {**assistant(GOOD), "train_detail": [{"train": False}]}]
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])
    reading = Reading(leave_out=("train_detail",))
    assert list(load_rows(path, stage="sft", reading=reading)) == [CHAT]
    assert load_rows(path, stage="ppo")["prompt"][0] == [user(Q)]


@pytest.mark.parametrize(
    ("prompt", "replies", "read"),
    [
        ("no", ("note", "nothing"), ("note", "nothing")),
        ("What?", ("What?No", "What?Yes"), ("No", "Yes")),
        ("Say no", ("Say not", "Say nothing"), ("Say not", "Say nothing")),
    ],
)
def test_a_reply_that_begins_with_a_word_that_begins_as_the_prompt_keeps_it(prompt, replies, read, tmp_path):
    rows = [{"prompt": prompt, "chosen": replies[0], "rejected": replies[1]}]
    (row,) = load_rows(tiny.write_rows(tmp_path / "rows.jsonl", rows), stage="reward")
    assert (row["chosen"], row["rejected"]) == read
    rows = [{"prompt": prompt, "completions": list(replies), "ranks": [1, 2]}]
    (row,) = load_rows(tiny.write_rows(tmp_path / "lists.jsonl", rows), stage="reward")
    assert tuple(row["completions"]) == read


def test_a_preference_whose_sign_says_which_is_better_is_a_margin_by_its_size(tmp_path):
    rows = [{"prompt": Q, "a": GOOD, "b": BAD, "by": by} for by in (-2, 1)]
    pairs = ("a=a", "b=b", "winner=by", "a_wins=<0", "b_wins=>0", "margin=by")
    read = load_rows(tiny.write_rows(tmp_path / "rows.jsonl", rows), stage="reward", reading=Reading(pairs))
    assert read["margin"][:] == [2, 1]
    assert len(load_rows(tiny.write_rows(tmp_path / "p.jsonl", [{**TEXTS, "margin": -1}]), stage="ppo")) == 1


def test_columns_with_capitals_are_the_same_columns(tmp_path):
    row = {"Instruction": Q, "Input": "Now.", "Output": GOOD, "History": [["Hi", "Ho"]], "System": "Be."}
    (read,) = load_rows(tiny.write_rows(tmp_path / "rows.jsonl", [row]), stage="sft")
    assert read["prompt"] == [BE, user("Hi"), assistant("Ho"), user(f"{Q}\n\nNow.")]


def test_the_reply_that_is_meant_is_learned_where_the_other_is_set_aside(tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"problem": Q, "solution": GOOD, "answer": "2"}])
    (read,) = load_rows(path, stage="sft", column_mapping=["answer=unused_answer"])
    assert read["completion"] == [assistant(GOOD)]
    # TRL's name is plain; truths are for reward functions; a number is no reply
    other = {"prompt": Q, "completion": f" {GOOD}", "answer": "2", "solution": BAD}
    path = tiny.write_rows(tmp_path / "trl.jsonl", [other])
    assert load_rows(path, stage="sft")[0]["completion"] == f" {GOOD}"
    assert load_rows(path, stage="ppo")[0] == other
    path = tiny.write_rows(tmp_path / "number.jsonl", [{"problem": Q, "solution": GOOD, "answer": 2}])
    assert load_rows(path, stage="sft")[0]["completion"] == [assistant(GOOD)]


def test_a_part_to_leave_out_that_no_row_has_is_told(tmp_path, caplog):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"messages": [BE, *CHAT["messages"]]}, CHAT])
    data = DataArguments(path, leave_out=["sytem", "system", "think"])
    assert list(data.train("sft").rows) == [CHAT, CHAT]
    assert "without effect: leave_out: [sytem, think]; no row has" in caplog.text


def test_thoughts_are_left_out_where_there_are_some(tmp_path):
    turns = [user("  indented"), assistant("<think>Hm.</think>\n\nSo.")]
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])
    (read,) = load_rows(path, stage="sft", reading=Reading(leave_out=("think",)))
    assert [turn["content"] for turn in read["messages"]] == ["  indented", "So."]


def test_turns_of_a_question_and_its_answer_are_a_conversation(tmp_path):
    turns = [
        {"system": "Be brief.", "input": "Tea?", "output": "A drink."},
        {"input": "Rain?", "output": "Wet."},
    ]
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"conversation": turns}])
    (row,) = load_rows(path, stage="sft")
    want = [("system", "Be brief."), ("user", "Tea?"), ("assistant", "A drink."), ("user", "Rain?")]
    messages = row.get("messages") or row["prompt"] + row["completion"]
    assert [(one["role"], one["content"]) for one in messages] == [*want, ("assistant", "Wet.")]


def test_a_speaker_is_a_role(tmp_path):
    turns = [{"speaker": "user", "text": "Tea?"}, {"speaker": "bot", "text": "A drink."}]
    (row,) = load_rows(tiny.write_rows(tmp_path / "rows.jsonl", [{"dialogue": turns}]), stage="ppo")
    assert [(one["role"], one["content"]) for one in row["prompt"]] == [("user", "Tea?")]


# Right and wrong replies, best of N: the columns of allenai/reward-bench-2
BENCH = {
    "id": "7",
    "prompt": "Name a colour.",
    "chosen": ["Red.", "Blue."],
    "rejected": ["Seven.", "A cat."],
    "num_correct": 2,
    "num_incorrect": 2,
    "total_completions": 4,
    "models": ["a", "b", "c", "d"],
    "additional_metadata": {"category": None, "correct": "x"},
}


def test_lists_of_right_and_wrong_replies_are_one_ranked_list():
    taken = take(Dataset.from_list([BENCH]), "reward", "x", Reading(as_chat=True))
    assert taken.title == "right and wrong replies, best of N"
    row = taken.rows[0]
    assert row["prompt"] == [{"role": "user", "content": "Name a colour."}]
    said = [reply[0]["content"] for reply in row["completions"]]
    assert said == ["Red.", "Blue.", "Seven.", "A cat."] and row["ranks"] == [1, 1, 2, 2]
    assert take(Dataset.from_list([BENCH]), "ppo", "x").rows[0]["prompt"] == "Name a colour."


def test_a_list_on_one_side_will_do_and_an_empty_side_is_left_out():
    rows = [BENCH | {"chosen": "Red."}, BENCH | {"chosen": None}]
    taken = take(Dataset.from_list(rows), "reward", "x")
    assert taken.rows[0]["completions"] == ["Red.", "Seven.", "A cat."]
    assert taken.rows[0]["ranks"] == [1, 2, 2] and taken.dropped == {"chosen is missing": [2]}


def test_right_and_wrong_replies_need_a_prompt():
    without = {name: value for name, value in BENCH.items() if name != "prompt"}
    with pytest.raises(UserError, match="lists of replies, and there is no prompt"):
        take(Dataset.from_list([without]), "reward", "x")
