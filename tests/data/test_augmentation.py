"""Pairs that are made of others: what each kind says, of which rows, and how they are drawn."""

import pytest
import tiny
from datasets import Dataset

from goose_lora.data.augmentation import (
    KINDS,
    count_made,
    made_pairs,
    made_text,
    parse_shares,
    share_words,
    split_prompt,
    tokenize_augmented,
)
from goose_lora.data.preferences import Ranked, encode_reply
from goose_lora.data.rows import RowSet
from goose_lora.errors import UserError

TOKENIZER = tiny.tokenizer()
TEXT = [
    {"prompt": f"ba {word}", "chosen": f" good {word} bi bo bu", "rejected": f" bad {word}"}
    for word in ("be", "da", "de", "di", "do", "du", "fa", "fe")
]


def said(text, role="assistant"):
    return {"role": role, "content": text}


def chat(row):
    return {
        "prompt": [said("ma", "system"), said(row["prompt"], "user")],
        "chosen": [said(row["chosen"])],
        "rejected": [said(row["rejected"])],
    }


def whole(row):
    return {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}


def ranked(rows=TEXT):
    return [
        Ranked(row.get("prompt"), [row["chosen"], row["rejected"]], [1, 2], {}, number)
        for number, row in enumerate(rows, 1)
    ]


def of(kind, rows=TEXT, share=1.0, seed=0):
    return made_pairs(ranked(rows), {kind: share}, seed=seed, name="x")


def tokens(shares, rows=TEXT, tokenizer=TOKENIZER, **settings):
    row_set = RowSet("x", None, Dataset.from_list(rows))
    return tokenize_augmented(row_set, tokenizer, shares, **{"seed": 0} | settings)


def test_a_rejected_reply_of_another_prompt_is_the_best_one_to_it_and_stands_beside_the_rows_own():
    for one in of("other_prompt"):
        row, best = TEXT[one.place], [other["chosen"] for other in TEXT]
        assert one.pair.prompt == row["prompt"] and one.pair.ranks == [1, 2]
        chosen, rejected = one.pair.completions
        assert chosen == row["chosen"] and rejected in best and rejected != chosen


def test_a_neutral_pair_has_the_best_replies_to_two_other_prompts_and_no_winner():
    for one in of("neutral"):
        replies = [TEXT[one.place]["chosen"], *one.pair.completions]
        assert one.pair.ranks == [1, 1] and len(set(replies)) == 3


def test_rows_of_the_same_prompt_lend_each_other_no_replies():
    rows = [{**row, "prompt": f"ba {k % 2}"} for k, row in enumerate(TEXT)]
    for one in of("other_prompt", rows):
        source = next(row for row in rows if row["chosen"] == one.pair.completions[1])
        assert source["prompt"] != rows[one.place]["prompt"]
    with pytest.raises(UserError, match="neutral needs replies to two other prompts"):
        of("neutral", rows)


def test_empty_cut_and_repeated_replies_are_made_of_the_best_one():
    for one in of("empty"):
        assert one.pair.completions == [TEXT[one.place]["chosen"], ""]
    cut = {one.pair.completions[1] for seed in range(9) for one in of("cut", seed=seed)}
    for one in of("cut"):
        best, shorter = one.pair.completions
        assert best.startswith(shorter) and 1 <= len(shorter.split()) < len(best.split())
    assert len({len(reply.split()) for reply in cut}) == 4  # all places, not the middle alone
    for one in of("repeated"):
        best, again = one.pair.completions
        words = again.split()
        assert len(words) == len(best.split()) and again[0] == " " and words[0] == "good"
        assert any(words == (words[:run] * 9)[: len(words)] for run in (1, 2)) and again != best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [chat, whole])
def test_chat_and_whole_texts_give_the_same_pairs_as_texts_with_a_prompt(kind, form):
    for plain, other in zip(of(kind), of(kind, [form(row) for row in TEXT]), strict=True):
        assert plain.place == other.place
        replies = other.pair.completions
        words = replies if form is whole else [reply[0]["content"] for reply in replies]
        assert words == plain.pair.completions
        if form is whole:
            prompt, own = split_prompt(ranked([whole(TEXT[plain.place])])[0])
            assert other.pair.prompt == prompt and prompt + own[0] == whole(TEXT[plain.place])["chosen"]


def test_the_same_seed_gives_the_same_pairs_another_gives_others_and_no_kind_changes_another():
    shares = dict.fromkeys(KINDS, 0.5)
    one, again, other = (made_pairs(ranked(), shares, seed=seed, name="x") for seed in (3, 3, 4))
    assert one == again != other
    assert [made for made in one if made.kind == "cut"] == of("cut", share=0.5, seed=3)


def test_a_share_counts_the_rows_of_the_data():
    rows = tokens({"other_prompt": 0.5, "cut": 0.25})
    assert count_made(rows) == {"other_prompt": 4, "cut": 2}
    assert made_text(count_made(rows), rows) == (
        "augment_pairs: 6 pairs made beside 8 of the data: 4 other_prompt, 2 cut"
    )


def test_a_made_pair_stands_behind_its_row_as_the_trainers_own_tokens_and_a_tie_has_a_target():
    rows = tokens({"neutral": 1.0}, append_eos=False)
    assert rows["augmented"] == ["", "neutral"] * 8 and rows["target"] == [1.0, 0.5] * 8
    for one in of("neutral"):
        want = [encode_reply(TOKENIZER, one.pair.prompt, r, append_eos=False) for r in one.pair.completions]
        got = rows[2 * one.place + 1]
        assert [got["chosen_ids"], got["rejected_ids"]] == want
    assert "target" not in tokens({"empty": 1.0}).column_names


def test_margins_are_of_the_data_and_made_pairs_have_none():
    rows = tokens({"other_prompt": 1.0}, [{**row, "margin": 2.5} for row in TEXT])
    assert rows["margin"] == [2.5, 0.0] * 8


def test_the_templates_keywords_stay_the_rows_own():
    row = Ranked("a", [" b c d", " e"], [1, 2], {"tools": [1]}, 7)
    (made,) = made_pairs([row], {"cut": 1.0}, seed=0, name="x")
    assert made.pair.template == {"tools": [1]} and made.pair.number == 7


def test_ranked_lists_are_augmented_by_their_best_reply_and_refuse_neutral_pairs():
    lists = [
        {"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"]], "ranks": [2, 1]}
        for row in TEXT
    ]
    rows = tokens({"empty": 1.0}, lists, append_eos=False)
    best = encode_reply(TOKENIZER, TEXT[0]["prompt"], TEXT[0]["chosen"], append_eos=False)
    assert rows[1]["completion_ids"][0] == best and rows[1]["ranks"] == [1, 2]
    with pytest.raises(UserError, match="neutral is for pairs"):
        tokens({"neutral": 1.0}, lists)


@pytest.mark.parametrize(
    ("kind", "rows", "words"),
    [
        ("other_prompt", [{**row, "prompt": ""} for row in TEXT], "all rows have one prompt or none"),
        ("other_prompt", TEXT[:1], "a reply to another prompt"),
        ("empty", [{**row, "prompt": ""} for row in TEXT], "a row with a prompt"),
        ("cut", [{**row, "chosen": " good"} for row in TEXT], "two words or more"),
        ("repeated", [{**row, "chosen": " good good"} for row in TEXT], "two words or more"),
    ],
)
def test_a_kind_that_no_row_allows_is_refused(kind, rows, words):
    with pytest.raises(UserError, match=words):
        of(kind, rows)


def test_replies_that_are_not_text_are_left_alone():
    row = {"prompt": [said("ba", "user")], "chosen": [said(None)], "rejected": [said("be")]}
    with pytest.raises(UserError, match="cut needs"):
        of("cut", [row])


def test_shares_are_read_from_a_mapping_a_list_and_one_word():
    want = ["other_prompt=0.5", "cut=1"]
    assert share_words({"other_prompt": 0.5, "cut": 1}) == want
    assert share_words({"cut": 1.0, "empty": 0, "other_prompt": "0.50"}) == share_words(want) == want
    assert share_words("cut=1") == ["cut=1"] and share_words(None) is share_words({}) is None
    assert parse_shares(["other_prompt=0.5", "cut=0", "neutral=1"]) == {"other_prompt": 0.5, "neutral": 1.0}


@pytest.mark.parametrize(
    "word", ["other_prompts=1", "cut", "cut=", "cut=x", "cut=nan", "cut=-0.1", "cut=1.5", "cut=[0.5]", "=1"]
)
def test_a_wrong_share_or_name_is_refused(word):
    with pytest.raises(UserError, match=r"^augment_pairs: "):
        parse_shares([word])
    with pytest.raises(UserError, match="stands twice"):
        parse_shares(["cut=0.5", "cut=0.5"])
