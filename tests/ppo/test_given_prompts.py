"""PPOTrainer tokenizes prompts itself: texts, chat messages, or rows with a prompt."""

from pathlib import Path

import pandas as pd
import pytest
import tiny
from datasets import Dataset, DatasetDict
from tiny_runs import config, even_share, fresh

from goose_lora.data.tokenization import tokenize_prompts
from goose_lora.errors import UserError
from goose_lora.ppo.trainer import PPOTrainer

TEXTS = [row["prompt"] for row in tiny.prompts(64)]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]


def made(folder, prompts, tokenizer=None, **more):
    return PPOTrainer(
        fresh(), config(folder), prompts, tokenizer or tiny.tokenizer(), reward_function=even_share, **more
    )


@pytest.mark.parametrize(
    "prompts",
    [
        TEXTS,
        tuple(TEXTS),
        [{"prompt": text} for text in TEXTS],
        Dataset.from_dict({"prompt": TEXTS}),
        pd.DataFrame({"prompt": TEXTS}),
        {"prompt": TEXTS},
    ],
    ids=["texts", "tuple", "rows", "dataset", "pandas", "columns"],
)
def test_texts_become_the_recipes_tokens(prompts, tmp_path):
    rows = Dataset.from_dict({"prompt": TEXTS})
    want = tokenize_prompts(rows, tiny.tokenizer(), name="x", max_prompt_tokens=512)["input_ids"]
    trainer = made(tmp_path, prompts, eval_dataset=prompts)
    assert list(trainer.train_dataset["input_ids"]) == list(want) == list(trainer.eval_dataset["input_ids"])


def test_messages_go_through_the_chat_template(tmp_path):
    tokenizer = tiny.chat_tokenizer()
    base = tiny.base(vocab_size=len(tokenizer))
    shared = tiny.shared(base, layers="top-2", critic="adapter", reference="copy")
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    want = [tokenizer.apply_chat_template(chat, **how)["input_ids"] for chat in CHATS]
    trainer = PPOTrainer(shared, config(tmp_path), CHATS, tokenizer, reward_function=even_share)
    assert list(trainer.train_dataset["input_ids"]) == want


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_prompt_that_leaves_no_room_for_a_reply_is_refused(architecture, tmp_path):
    shared = tiny.shared(tiny.base(architecture), layers="top-2", critic="adapter", reference="copy")

    def made_of(words):
        prompts = [TEXTS[0]] * 15 + [" ".join(["ba"] * words)]  # and <s>
        return PPOTrainer(shared, config(tmp_path), prompts, tiny.tokenizer(), reward_function=even_share)

    assert max(map(len, made_of(120).train_dataset["input_ids"])) == 121
    with pytest.raises(UserError, match=r"make 128 tokens, and the base has a context of 127"):
        made_of(121)


@pytest.mark.parametrize("ids", [[5, 6, tiny.VOCABULARY], [-1], []], ids=str)
def test_ids_that_the_base_does_not_have_are_refused(ids, tmp_path):
    rows = [{"input_ids": [5, 6]}] * 15 + [{"input_ids": ids}]
    with pytest.raises(UserError, match=r"train_dataset: row 16 has the input_ids \[.* from 0 to 60"):
        made(tmp_path, rows)
    good = [{"input_ids": [5, 6]}] * 16
    with pytest.raises(UserError, match=r"eval_dataset: row 16 has the input_ids"):
        made(tmp_path, good, eval_dataset=rows)


def test_a_tokenizer_of_more_tokens_than_the_base_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"the tokenizer has 64 tokens and the model 61\. They do not"):
        made(tmp_path, TEXTS, tiny.chat_tokenizer())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": tiny.base()}, "model is of the kind LlamaForCausalLM, .* SharedBase.build"),
        ({"args": None}, "args is None, not of the kind PPOConfig"),
        ({"processing_class": None}, "processing_class is None, .*load_tokenizer"),
        ({"processing_class": "base"}, "processing_class is 'base', .*load_tokenizer"),
    ],
    ids=["model", "args", "no tokenizer", "name of a tokenizer"],
)
def test_parts_of_another_kind_are_refused(given, said, tmp_path):
    sound = {"model": fresh(), "args": config(tmp_path), "processing_class": tiny.tokenizer()}
    with pytest.raises(UserError, match=said):
        PPOTrainer(**{**sound, "train_dataset": TEXTS, "reward_function": even_share, **given})


def test_columns_go_to_the_reward_function(tmp_path):
    rows = [{"prompt": text, "target": place} for place, text in enumerate(TEXTS)]
    assert made(tmp_path, rows).train_dataset["target"][5] == 5
    assert made(tmp_path, pd.DataFrame(rows)).train_dataset["target"][5] == 5


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([], "train_dataset: no prompts"),
        ([1, 2], "train_dataset has int: give texts alone"),
        ([TEXTS[0], CHATS[0]], "train_dataset has list, str: give texts alone"),
        ([{"number": 3}], "train_dataset: has the columns number"),
        ("data/prompts.jsonl", "train_dataset is 'data/prompts.jsonl'. Give prompts in a list, or the rows"),
        (
            Path("prompts.jsonl"),
            "train_dataset is of the kind PosixPath. Give prompts in a list",
        ),
        (5, "train_dataset is 5. Give prompts in a list"),
        (
            DatasetDict({"train": Dataset.from_dict({"prompt": TEXTS})}),
            r"train_dataset has the splits train. Give one of them: \['train'\]",
        ),
        ({"prompt": "ba be"}, "train_dataset is one row, or columns that are no lists"),
        ([{"prompt": "ba"}, {"prompt": 1}], "train_dataset: its rows make no table: .* values of one kind"),
        ({"prompt": TEXTS, "gold": [1]}, "train_dataset: its rows make no table"),
    ],
)
def test_other_things_are_refused(prompts, said, tmp_path):
    with pytest.raises(UserError, match=said):
        made(tmp_path, prompts)


def test_a_tokenizer_without_a_pad_token_is_refused(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(UserError, match=r"no pad token. Load it with goose_lora.load_tokenizer"):
        made(tmp_path, TEXTS, tokenizer)
