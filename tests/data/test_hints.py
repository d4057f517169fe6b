"""What may be meant otherwise is told, and nothing else is."""

import logging
from pathlib import Path

import pytest
import tiny
import trl
from datasets import Dataset
from tiny import assistant, user

from goose_lora.data import tokenization
from goose_lora.data.hints import hints
from goose_lora.data.report import describe
from goose_lora.data.rows import load_rows
from goose_lora.data.tokenization import render_whole

CHAT = tiny.letters("{% for m in messages %}{{ m['content'] }}{% endfor %}")
PLAIN = tiny.letters()


@pytest.mark.parametrize(
    ("row", "tokenizer", "as_chat", "told"),
    [
        ({"prompt": "Who feeds it?", "completion": " He."}, CHAT, None, "as_chat: true makes prompts"),
        ({"text": "He feeds it."}, CHAT, None, "as_chat: false says that text is meant"),
        ({"prompt": "Who feeds it?", "completion": " He."}, CHAT, False, None),
        ({"prompt": "Who feeds it?", "completion": " He."}, PLAIN, None, None),
        ({"prompt": "\n\nHuman: Who?\n\nAssistant:", "completion": " He."}, CHAT, None, None),
        ({"prompt": [user("Who feeds it?")], "completion": [assistant("He.")]}, CHAT, None, None),
        (
            {"prompt": "Who feeds it?", "completion": "He."},
            PLAIN,
            None,
            "sticks to its prompt ('ho feeds it?He.')",
        ),
        ({"prompt": "[INST] Who? [/INST]", "completion": "He."}, PLAIN, None, None),
        ({"prompt": "谁喂它？", "completion": "农夫。"}, PLAIN, None, None),
        (
            {"prompt": "Who feeds it?", "completion": " Who feeds it? He."},
            PLAIN,
            None,
            "begins with its prompt (' Who feeds it? He.')",
        ),
        (
            {"prompt": [user("Who feeds it?")], "completion": [assistant("Who feeds it? He.")]},
            CHAT,
            None,
            "read twice",
        ),
        ({"prompt": "ba", "completion": " ba be"}, PLAIN, None, None),
        ({"messages": [user("Who feeds it?")]}, CHAT, None, "no turn of the assistant"),
    ],
)
def test_it_is_told_with_the_setting_that_decides(row, tokenizer, as_chat, told):
    found = hints(Dataset.from_list([row]), tokenizer, as_chat=as_chat, numbers=[7])
    assert [told in sentence for sentence in found] == [True] * bool(told), found
    assert told is None or "plain text" in found[0] or "(row 7)" in found[0]


@pytest.mark.parametrize(
    ("tokenizer", "way_out"),
    [(CHAT, "as_chat: true parts them; or begin replies"), (PLAIN, "(row 1) have a reply")],
)
def test_turns_are_a_way_out_where_there_is_a_chat_template_alone(tokenizer, way_out):
    rows = Dataset.from_list([{"prompt": "Who feeds it?", "completion": "He."}])
    told = hints(rows, tokenizer, as_chat=None)[-1]
    assert way_out in told and ("as_chat" in told) == (tokenizer is CHAT)
    assert told.lower().endswith("begin replies with a space.")


def test_data_tells_it_too(tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "Who feeds it?", "completion": "He."}])
    CHAT.save_pretrained(tmp_path / "tokenizer")
    report = " ".join(describe(path, stage="sft", tokenizer=str(tmp_path / "tokenizer")).split())
    assert "as_chat: true makes prompts the user's turns" in report and "sticks to its prompt" in report


def test_thoughts_that_the_template_drops_from_earlier_turns_are_told(caplog):
    tokenization._tell_once.cache_clear()
    drops = tiny.letters(
        "{% for m in messages %}{% set said = m['content'] %}"
        "{{ said if loop.last else said.split('</think>')[-1] }}{% endfor %}"
    )
    thinking = [user("a"), assistant("<think>hm</think>b"), user("c"), assistant("<think>so</think>d")]
    with caplog.at_level(logging.WARNING):
        render_whole(thinking, drops)
    assert "leaves out the thoughts inside earlier turns" in caplog.text
    caplog.clear()
    tokenization._tell_once.cache_clear()
    render_whole(thinking, CHAT)
    assert not caplog.text


def test_replies_that_are_whole_conversations_are_read_without_their_prompt(tmp_path):
    whole = [[user("Who?"), assistant(word)] for word in ("I.", "You.")]
    rows = [{"prompt": "Who?", "completions": whole, "ranks": [2, 1]}]
    (read,) = load_rows(tiny.write_rows(tmp_path / "lists.jsonl", rows), stage="reward")
    assert read["completions"] == [[assistant("I.")], [assistant("You.")]]
    assert read["prompt"] == [user("Who?")]


def test_a_reply_that_begins_with_another_prompt_is_refused(tmp_path):
    rows = [{"prompt": [user("Who?")], "completion": [user("Why?"), assistant("So.")]}]
    with pytest.raises(
        ValueError, match=r"row 1: completion begins with a turn of the user, and not with the"
    ):
        load_rows(tiny.write_rows(tmp_path / "rows.jsonl", rows), stage="sft")


def test_texts_of_a_list_that_hold_the_prompt_are_read_without_it(tmp_path):
    rows = [{"prompt": "Who?", "completions": ["Who? I.", "Who? You."], "ranks": [2, 1]}]
    (read,) = load_rows(tiny.write_rows(tmp_path / "lists.jsonl", rows), stage="reward")
    assert read["completions"] == [" I.", " You."]


@pytest.mark.parametrize("stage", ["sft", "conversation", "reward", "ppo"])
def test_what_qwen3_writes_before_a_reply_is_told_until_the_prompt_has_it(stage):
    text = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    qwen = tiny.letters(text)
    prompt, reply = [user("Who feeds it?")], [assistant("He.")]
    row = {
        "sft": {"prompt": prompt, "completion": reply},
        "conversation": {"messages": prompt + reply},
        "reward": {"prompt": prompt, "chosen": reply, "rejected": [assistant("No.")]},
        "ppo": {"prompt": prompt},
    }[stage]
    (told,) = hints(Dataset.from_list([row]), qwen, as_chat=None)
    assert "writes '<think>\\n\\n</think>' between prompt and reply" in told
    off = row | {"chat_template_kwargs": {"enable_thinking": False}}
    assert hints(Dataset.from_list([off]), qwen, as_chat=None) == []
