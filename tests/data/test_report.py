"""goose-lora data: what it shows of each format is what the trainers make of it."""

import re

import pytest
import tiny
import yaml
from datasets import Dataset
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from goose_lora.data.formats import take
from goose_lora.data.report import describe, row_parts
from goose_lora.data.rows import DataArguments
from goose_lora.data.tokenization import tokenize_prompts

ASKED = [{"role": "user", "content": "ba be"}]
GOOD, BAD = ([{"role": "assistant", "content": word}] for word in ("good", "bad bi"))
DIALOGUE = [*ASKED, *GOOD, {"role": "user", "content": "bo"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of the tokenizer with a template that marks roles."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.chat_tokenizer().save_pretrained(folder)
    return str(folder)


def model(tokenizer, **changes):
    built = tiny.base(**changes)
    built.resize_token_embeddings(len(tokenizer))
    return built


def joined(parts):
    """Prompt and reply together, for each reply."""
    prompt = [part.text for part in parts if part.label == "prompt"]
    return [" ".join([*prompt, part.text]).strip() for part in parts if part.label != "prompt"]


def settings(folder, **changes):
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
    } | changes


@pytest.mark.parametrize(
    "row",
    [
        {"text": "ba be good"},
        {"prompt": "ba be", "completion": " good"},
        {"prompt": ASKED, "completion": GOOD},
        {"messages": [*DIALOGUE, *BAD]},
        {"messages": ASKED},
    ],
)
def test_sft_rows_are_shown_as_trl_tokenizes_them(row, tmp_path):
    tokenizer = tiny.chat_tokenizer()
    taken = take(Dataset.from_list([row]), "sft", "x")
    (seen,) = SFTTrainer(
        model=model(tokenizer),
        args=SFTConfig(**settings(tmp_path)),
        train_dataset=taken.rows,
        processing_class=tokenizer,
    ).train_dataset
    parts = row_parts(taken.rows[0], taken, "sft", tokenizer)
    assert joined(parts) == [tokenizer.decode(seen["input_ids"])]
    assert parts[-1].whole == len(seen["input_ids"])
    if "completion_mask" in seen:
        assert parts[0].length == seen["completion_mask"].index(1)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "ba be", "chosen": " good", "rejected": " bad bi"},
        {"chosen": "ba be good", "rejected": "ba be bad bi"},
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"chosen": [*DIALOGUE, *GOOD], "rejected": [*DIALOGUE, *BAD]},
    ],
)
def test_pairs_are_shown_as_trl_tokenizes_them(row, tmp_path):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tokenizer = tiny.chat_tokenizer()
    config = AutoConfig.for_model(
        "llama", **tiny.ARCHITECTURES["llama"] | {"vocab_size": len(tokenizer), "num_labels": 1}
    )
    taken = take(Dataset.from_list([row]), "reward", "x")
    (seen,) = RewardTrainer(
        model=AutoModelForSequenceClassification.from_config(config),
        args=RewardConfig(**settings(tmp_path)),
        train_dataset=taken.rows,
        processing_class=tokenizer,
    ).train_dataset
    parts = row_parts(taken.rows[0], taken, "reward", tokenizer)
    assert joined(parts) == [tokenizer.decode(seen[side]) for side in ("chosen_ids", "rejected_ids")]
    assert [part.whole for part in parts[1:]] == [len(seen["chosen_ids"]), len(seen["rejected_ids"])]


@pytest.mark.parametrize(
    "row", [{"prompt": "ba be"}, {"messages": [*DIALOGUE, *BAD]}, {"chosen": "ba good", "rejected": "ba bad"}]
)
def test_prompts_are_shown_as_ppo_takes_them(row):
    tokenizer = tiny.chat_tokenizer()
    taken = take(Dataset.from_list([row]), "ppo", "x")
    (seen,) = tokenize_prompts(taken.rows, tokenizer, name="x", max_prompt_tokens=50)
    (part,) = row_parts(taken.rows[0], taken, "ppo", tokenizer)
    assert part.text == tokenizer.decode(seen["input_ids"]) and part.length == len(seen["input_ids"])


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_the_chat_template_is_applied_once(stage):
    tokenizer = tiny.chat_tokenizer()
    taken = take(Dataset.from_list([{"messages": [*DIALOGUE, *BAD]}]), stage, "x")
    text = " ".join(part.text for part in row_parts(taken.rows[0], taken, stage, tokenizer))
    assert (text.count("<s>"), text.count("<user>"), text.count("<assistant>")) == (1, 2, 2)


def test_the_last_turn_of_the_assistant_is_the_reply():
    taken = take(Dataset.from_list([{"messages": [*DIALOGUE, *BAD]}]), "sft", "x")
    prompt, reply = row_parts(taken.rows[0], taken, "sft", tiny.chat_tokenizer())
    assert prompt.text == "<s> <user> ba be </s> <assistant> good </s> <user> bo </s> <assistant>"
    assert (reply.label, reply.text) == ("reply", "bad bi </s>")


RANKED = {"prompt": "ba", "completions": [" bad", " good be"], "ranks": [2, 1]}


@pytest.mark.parametrize(
    ("row", "options", "lines"),
    [
        (
            {"text": "ba good"},
            {},
            ["format: texts (text), plain text", "  sft     yes (shown below)", "  text  <s> ba good </s>"],
        ),
        (
            {"prompt": "ba"},
            {},
            ["format: prompts (prompt), plain text", "  ppo     yes (shown below)", "  prompt  <s> ba"],
        ),
        (
            {"prompt": "ba", "completion": " good"},
            {"stage": "ppo"},
            [
                "  sft     yes; --stage sft shows it",
                "  ppo     yes, the prompt alone (shown below)",
                "  kept for reward functions: completion",
            ],
        ),
        (
            {"messages": [*ASKED, *GOOD]},
            {},
            [
                "format: conversations (messages), chat messages",
                "  prompt  <s> <user> ba be </s> <assistant>",
                "  reply   good </s>",
            ],
        ),
        (
            {"prompt": "ba", "messages": [*ASKED, *GOOD]},
            {"stage": "ppo"},
            [
                "format: conversations (messages), chat messages",
                "  sft     yes; --stage sft shows it",
            ],
        ),
        (
            {"prompt": "ba", "chosen": " good", "rejected": " bad"},
            {},
            [
                "format: preference pairs (prompt + chosen + rejected), plain text",
                "  chosen    good </s>",
                "  rejected  bad </s>",
            ],
        ),
        (
            {"chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *BAD]},
            {},
            [
                "format: preference pairs, the prompt inside both (chosen + rejected), chat messages",
                "  chosen    good </s>",
            ],
        ),
        (
            RANKED,
            {},
            [
                "format: ranked lists (prompt + completions), plain text",
                "  1: rank 1  good be </s>",
                "  2: rank 2  bad </s>",
            ],
        ),
    ],
)
def test_each_format_is_named_and_shown(row, options, lines, folder, tmp_path):
    report = describe(tiny.write_rows(tmp_path / "rows.jsonl", [row]), tokenizer=folder, **options).split(
        "\n"
    )
    assert [line for line in lines if line not in report] == []


def test_without_a_tokenizer_lengths_are_words_and_messages_stand_as_they_are(tmp_path):
    report = describe(tiny.write_rows(tmp_path / "rows.jsonl", [{"messages": [*ASKED, *BAD]}]))
    assert "Rows as they are in the file: chat messages without a template" in " ".join(report.split("\n"))
    assert "  prompt  user: ba be\n  reply   assistant: bad bi\n" in report
    assert re.search(
        r"^words .*\n-.*\nprompt +2 +2 +2 +2 +2\nreply +2 +2 +2 +2 +2\nprompt \+ reply +4",
        report,
        flags=re.MULTILINE,
    )


def test_lengths_are_those_of_the_tokens(folder, tmp_path):
    rows = [{"prompt": " ".join(["ba"] * length)} for length in (1, 2, 3, 4, 10)]
    report = describe(tiny.write_rows(tmp_path / "rows.jsonl", rows), tokenizer=folder)
    assert re.search(
        r"^tokens +min +median +mean +95 % +max\n-.*\nprompt +2 +4 +5 +11 +11$", report, flags=re.MULTILINE
    )


def test_rows_left_out_are_listed_by_reason_with_their_numbers_in_the_file(folder, tmp_path):
    rows = [{"prompt": text} for text in ("", "ba", "ba be bi", "be", " ", "bi", "bo")]
    report = describe(tiny.write_rows(tmp_path / "rows.jsonl", rows), tokenizer=folder, max_length=3)
    assert report.endswith(
        "3 of 7 rows left out:\n  2  prompt is empty: rows 1, 5\n  1  longer than max_length=3: row 3"
    )
    assert [line[:9].rstrip() for line in report.split("\n") if line.startswith("-- row")] == [
        "-- row 2",
        "-- row 4",
        "-- row 6",
    ]


def test_texts_for_sft_are_cut_and_shown_so(folder, tmp_path):
    report = describe(
        tiny.write_rows(tmp_path / "rows.jsonl", [{"text": "ba be bi"}, {"text": "ba"}]),
        tokenizer=folder,
        max_length=3,
    )
    assert "  text  <s> ba be\n" in report
    assert "1 of 2 rows cut at max_length=3" in report and report.endswith("No row is left out.")


def test_texts_that_have_a_bos_already_have_it_once(folder, tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"text": "<s> ba </s>"}, {"text": "ba"}])
    assert describe(path, tokenizer=folder).count("  text  <s> ba </s>\n") == 2


def test_marks_of_another_template_are_pointed_out(folder, tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"text": "<|im_start|> ba"}, {"text": "ba"}])
    report = describe(path, tokenizer=folder)
    assert "1 row: text has <|im_start|>, which are no tokens of this tokenizer but plain text." in report


def test_spaces_line_breaks_and_control_characters_can_be_seen(tmp_path):
    report = describe(tiny.write_rows(tmp_path / "rows.jsonl", [{"text": " ba\n\x1b[31mbe\n"}]))
    assert "  text  ·ba⏎\n        \\x1b[31mbe⏎\n\n" in report


def test_a_long_row_wraps_without_losing_a_letter_and_leaves_out_its_middle(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "60")
    text = " ".join(f"w{number}" for number in range(600))
    report = describe(tiny.write_rows(tmp_path / "rows.jsonl", [{"text": text}]))
    start = report.index("  text  ")
    body = report[start + 8 : report.index("\n\n", start)]
    assert all(len(line) <= 60 for line in body.split("\n"))
    assert (
        body.replace("\n        ", "")
        == f"{text[:750]} [... {len(text) - 1500:,} characters ...] {text[-750:]}"
    )


def test_what_cannot_be_shown_says_why(tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"q": "ba", "a": "be"}])
    with pytest.raises(
        ValueError,
        match=r"has the columns q, a; the stages take .* --column_mapping q=prompt",
    ):
        describe(path)
    with pytest.raises(ValueError, match="--max_length 3 counts tokens: give --tokenizer too"):
        describe(path, max_length=3)


def test_columns_are_renamed_first(folder, tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"question": "ba", "answer": " be"}])
    report = describe(path, tokenizer=folder, column_mapping=["question=prompt", "answer=completion"])
    assert "  prompt  <s> ba\n  reply   be </s>\n" in report


def test_the_settings_that_read_rows_so_are_written_as_yaml(tmp_path):
    row = {"ask": "ba", "one": " be", "two": " bi", "vote": 2}
    path = tiny.write_rows(tmp_path / "rows.jsonl", [row])
    pairs = ["a=one", "b=two", "winner=vote", "a_wins=1", "b_wins=2"]
    report = describe(path, stage="reward", column_mapping=["ask=prompt"], pairs=pairs)
    written = yaml.safe_load(report.split("settings of recipes/reward.py:\n")[1])
    assert written == {"dataset_name": path, "column_mapping": ["ask=prompt"], "pairs": pairs}
    (read,) = DataArguments(**written).train("reward").rows
    assert read["chosen"] == [{"role": "assistant", "content": "bi"}]


def test_messages_need_a_chat_template(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": ASKED}])
    with pytest.raises(
        ValueError, match="the rows are chat messages, but the tokenizer has no chat template"
    ):
        describe(path, tokenizer=str(tmp_path / "bare"))
