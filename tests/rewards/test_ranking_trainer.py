"""Ranked lists: their tokens, one forward a completion, the loss over all pairs, and held-out
lists, probes and references."""

import inspect

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from goose_lora.data import preferences
from goose_lora.data.preferences import (
    Ranked,
    encode_reply,
    ranked_rows,
    tokenize_ranked,
    tokenize_references,
)
from goose_lora.evaluation import reward_model
from goose_lora.functional import ranking_loss
from goose_lora.rewards.ranking_trainer import RankedRewardTrainer, collate_ranked

TOKENIZER = tiny.tokenizer()


def said(text, role="assistant"):
    return {"role": role, "content": text}


TEXT_PAIRS = [
    {"prompt": "ba be", "chosen": " good bi", "rejected": " bad"},
    {"prompt": "da", "chosen": " good</s>", "rejected": " bad do du"},
]
CHAT_PAIRS = [{"prompt": [said("ba be", "user")], "chosen": [said("good bi")], "rejected": [said("bad")]}]
LISTS = [
    {"prompt": "ba be", "completions": [" good bi", " good", " bad bad bad"], "ranks": None},
    {"prompt": "da", "completions": [" bad", " good da de di"], "ranks": [2, 1]},
    {"prompt": "fo", "completions": [" bad", " good ma", " bad fi", " good"], "ranks": [3, 1, 3, 2]},
    {"prompt": "ki", "completions": [" good ka", " bad"], "ranks": [1, 2]},
]


def lists(rows=LISTS, **settings):
    return tokenize_ranked(
        ranked_rows(Dataset.from_list(rows), TOKENIZER, name="x", append_eos=True),
        TOKENIZER,
        name="x",
        **settings,
    )


def classifier(architecture="llama"):
    config = tiny.base(architecture).config
    config.num_labels = 1
    torch.manual_seed(3)
    return AutoModelForSequenceClassification.from_config(config).eval()


def trainer(folder, data, cls=RankedRewardTrainer, architecture="llama", **settings):
    settings = {"per_device_train_batch_size": 4, "max_steps": 1, "gradient_checkpointing": False} | settings
    args = RewardConfig(
        folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        **settings,
    )
    return cls(
        model=classifier(architecture),
        args=args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny.tokenizer(),
    )


# Tokens


@pytest.mark.parametrize(
    "rows",
    [
        TEXT_PAIRS,
        CHAT_PAIRS,
        [{key: row[key] for key in ("chosen", "rejected")} for row in TEXT_PAIRS],
        [{key: CHAT_PAIRS[0]["prompt"] + CHAT_PAIRS[0][key] for key in ("chosen", "rejected")}],
    ],
    ids=["text", "chat", "whole text", "whole chat"],
)
def test_replies_are_tokenized_as_the_reward_trainer_does(tmp_path, rows):
    prepared = trainer(str(tmp_path), Dataset.from_list(rows), RewardTrainer).train_dataset
    made = lists(rows)
    for name in ("chosen_ids", "rejected_ids"):
        assert list(prepared[name]) == list(made[name])
    assert [[row["chosen_ids"], row["rejected_ids"]] for row in made] == list(made["completion_ids"])


def test_texts_without_an_end_are_the_text_and_nothing_more():
    rows = [{"prompt": "ba be", "chosen": " good bi", "rejected": " bad", "margin": 1.5, "id": 7}]
    (row,) = tokenize_ranked(
        ranked_rows(Dataset.from_list(rows), TOKENIZER, name="x", append_eos=False),
        TOKENIZER,
        name="x",
        append_eos=False,
    )
    assert TOKENIZER.convert_ids_to_tokens(row["chosen_ids"]) == ["<s>", "ba", "be", "good", "bi"]
    assert TOKENIZER.convert_ids_to_tokens(row["rejected_ids"]) == ["<s>", "ba", "be", "bad"]
    assert row["length"] == 5


def test_margins_stay_with_their_pairs_where_long_ones_are_left_out(caplog):
    rows = Dataset.from_list(
        [
            {"chosen": "good ba be bi", "rejected": "bad", "margin": 3.0},
            {"chosen": "good", "rejected": "bad", "margin": 1.5},
        ]
    )
    found = ranked_rows(rows, TOKENIZER, name="my.jsonl", append_eos=True)
    made = tokenize_ranked(found, TOKENIZER, name="my.jsonl", max_length=4, margins=list(rows["margin"]))
    assert list(made["margin"]) == [1.5] and "my.jsonl: 1 of 2 prompts left out" in caplog.text
    with pytest.raises(ValueError, match="at most max_length=1 tokens"):
        tokenize_ranked(found, TOKENIZER, name="my.jsonl", max_length=1)


def test_a_chat_reply_ends_where_ppos_replies_end():
    """ChatML writes a line break after its end token: read there, a score would be of a token that
    no reply of PPO's has."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {{ eos_token }} ba {% endfor %}"
    ids = encode_reply(tokenizer, [said("be bi", "user")], [said("good")], append_eos=True)
    assert tokenizer.convert_ids_to_tokens(ids)[-3:] == ["ba", "good", "</s>"]
    with pytest.raises(ValueError, match="append_eos: false is for plain text"):
        ranked_rows(Dataset.from_list(CHAT_PAIRS), tokenizer, name="x", append_eos=False)


def test_a_list_stands_best_first_unless_it_has_ranks():
    made = lists()
    assert list(made["ranks"]) == [[1, 2, 3], [1, 2], [1, 2, 3, 3], [1, 2]]
    texts = [
        [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in row["completion_ids"]] for row in made
    ]
    assert texts[1] == ["da good da de di", "da bad"] and texts[2] == [
        "fo good ma",
        "fo good",
        "fo bad",
        "fo bad fi",
    ]
    assert list(made["length"]) == [7, 7, 5, 5]


def test_long_completions_and_lists_without_an_untied_pair_are_left_out_and_counted(caplog):
    rows = [*LISTS, {"prompt": "lo", "completions": [" bad", " good"], "ranks": [1, 1]}]
    made = lists(rows, max_length=6)
    assert list(made["row"]) == [0, 2, 3] and list(made["ranks"]) == [[1, 2], [1, 2, 3, 3], [1, 2]]
    assert (
        "x: 2 of 5 prompts left out, without two completions of different rank; 2 completions were longer"
        " than max_length=6" in caplog.text
    )
    with pytest.raises(
        ValueError,
        match="x: no prompt has two completions of different rank and of at most max_length=3 tokens",
    ):
        lists(max_length=3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completions": ["a"]}, "x, row 1: 1 completions. Give two or more"),
        ({"completions": ["a", "b"], "ranks": [1, 2, 3]}, "x, row 1: 3 ranks for 2 completions"),
        ({"completions": [[said("a")], [said("b")]], "prompt": "ba"}, "text in part and messages in part"),
    ],
)
def test_a_row_that_is_no_ranked_list_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        preferences.as_ranked(row, "x, row 1")


def test_other_columns_and_chat_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"x: has the columns a; needed are completions or chosen\+rejected"):
        lists([{"a": 1}])
    chat = Dataset.from_list(CHAT_PAIRS)
    with pytest.raises(ValueError, match="append_eos: false is for plain text"):
        ranked_rows(chat, TOKENIZER, name="x", append_eos=False)
    bare = tiny.tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        ranked_rows(chat, bare, name="x", append_eos=True)


def test_references_are_texts_or_prompts_with_completions_or_messages():
    want = TOKENIZER("ba good</s>")["input_ids"]
    for row in ({"text": "ba good"}, {"prompt": "ba", "completion": " good"}):
        assert tokenize_references(Dataset.from_list([row]), TOKENIZER, name="x") == [want]
    chats = (
        {"messages": [said("ba", "user"), said("good")]},
        {"prompt": [said("ba", "user")], "completion": [said("good")]},
    )
    for row in chats:
        # The template writes neither
        assert tokenize_references(Dataset.from_list([row]), TOKENIZER, name="x") == [want[1:-1]]
    assert tokenize_references(
        Dataset.from_list([{"text": "ba good"}]), TOKENIZER, name="x", append_eos=False
    ) == [want[:-1]]
    with pytest.raises(ValueError, match="x: no reference has between 1 and max_length=2 tokens"):
        tokenize_references(Dataset.from_list([{"text": "ba good"}]), TOKENIZER, name="x", max_length=2)


# The trainer


def test_the_overridden_hooks_are_public_and_have_the_reward_trainers_signatures():
    own = {name for name, value in vars(RankedRewardTrainer).items() if inspect.isfunction(value)} & set(
        dir(RewardTrainer)
    )
    assert own - {"__init__"} == {"compute_loss", "log"}
    for name in ("compute_loss", "log"):
        hook, original = getattr(RankedRewardTrainer, name), getattr(RewardTrainer, name)
        assert list(inspect.signature(hook).parameters) == list(inspect.signature(original).parameters)


def test_a_batch_holds_all_completions_of_its_prompts_padded_on_the_right():
    made = lists()
    batch = collate_ranked([made[1], made[2]], tiny.PAD, pad_to_multiple_of=8)
    assert batch["input_ids"].shape == (6, 8)
    assert batch["prompts"].tolist() == [0, 0, 1, 1, 1, 1] and batch["ranks"].tolist() == [1, 2, 1, 2, 3, 3]
    for ids, mask, want in zip(
        batch["input_ids"],
        batch["attention_mask"],
        made[1]["completion_ids"] + made[2]["completion_ids"],
        strict=True,
    ):
        assert ids[: len(want)].tolist() == want and ids[len(want) :].eq(tiny.PAD).all()
        assert mask.tolist() == [1] * len(want) + [0] * (8 - len(want))


def test_a_batch_is_one_forward_with_one_row_a_completion(tmp_path):
    ranked = trainer(str(tmp_path), lists())
    seen = []
    ranked.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    ranked.train()
    assert seen == [sum(len(row["completions"]) for row in LISTS)] == [11]


def gradient(folder, data, cls=RankedRewardTrainer, **settings):
    """Of one optimizer step: what SGD with rate 1 took off each weight."""
    made = trainer(
        folder,
        data,
        cls,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        **settings,
    )
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    return {name: before[name] - p.detach() for name, p in made.model.named_parameters()}


def assert_same(got, want):
    for name in want:
        # Differences of fp32 weights, each rounded
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)
    assert max(change.abs().max() for change in want.values()) > 1e-3


@pytest.mark.parametrize(
    "settings",
    [{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, {"remove_unused_columns": False}],
)
def test_gradients_of_micro_batches_are_those_of_the_whole_batch(tmp_path, settings):
    assert_same(gradient(str(tmp_path / "a"), lists(), **settings), gradient(str(tmp_path / "b"), lists()))


def test_the_gradient_is_that_of_the_ranking_loss(tmp_path):
    model, data = classifier(), lists()
    batch = collate_ranked(list(data), tiny.PAD)
    scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
    ranking_loss(scores, batch["ranks"], batch["prompts"]).backward()
    assert_same(
        gradient(str(tmp_path), data),
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    )


def test_lists_of_two_train_as_pairs_do(tmp_path):
    pairs = Dataset.from_list(tiny.preferences(4))
    assert_same(
        gradient(str(tmp_path / "a"), lists(tiny.preferences(4))),
        gradient(str(tmp_path / "b"), pairs, RewardTrainer),
    )


def test_what_was_seen_is_logged_under_trls_names_and_evaluation_has_its_own(tmp_path):
    ranked = trainer(str(tmp_path), lists(), learning_rate=0.0)
    ranked.train()
    logged = ranked.state.log_history[0]
    evaluated = ranked.evaluate()
    # Transformers rounds the logged loss
    assert evaluated["eval_loss"] == pytest.approx(logged["loss"], abs=1e-4)
    last = ranked.state.log_history[-1]
    for name in ("accuracy", "margin", "mean_reward"):
        assert last[f"eval_{name}"] == pytest.approx(logged[name], abs=1e-5)


def test_a_setting_for_pairs_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"center_rewards_coefficient=0.1 is for pairs.*reference_dataset_name"
    ):
        trainer(str(tmp_path), lists(), center_rewards_coefficient=0.1)


# Held-out lists, probes, references


def test_probes_are_made_of_the_best_reply():
    row = Ranked("ba", [" bad", " ba be bi bo bu da de"], [2, 1], {})
    prompt, replies = reward_model.probe_replies(row)
    assert prompt == "ba"
    assert replies == {
        "empty": "",
        "repeated": " ba be ba be ba be ba",
        "truncated": " ba be bi bo",
        "flattering": f" {reward_model.PRAISE}",
    }


@pytest.mark.parametrize(
    ("completions", "prompt", "flattering"),
    [
        (["the film is good", "the film is bland"], "the film is", f" {reward_model.PRAISE}"),
        (["good", "bad"], "", reward_model.PRAISE),
        (["the film", "the film is bad"], "the", f" {reward_model.PRAISE}"),
    ],
)
def test_without_a_prompt_it_is_the_words_that_all_completions_begin_with(completions, prompt, flattering):
    found, replies = reward_model.probe_replies(Ranked(None, completions, [1, 2], {}))
    assert (found, replies["flattering"]) == (prompt, flattering)


def test_probes_of_chats_replace_the_last_message_whether_the_prompt_is_named_or_not():
    user, best, worst = said("ba", "user"), said("good bi"), said("bad")
    for row in (
        Ranked([user], [[best], [worst]], [1, 2], {}),
        Ranked(None, [[user, best], [user, worst]], [1, 2], {}),
    ):
        prompt, replies = reward_model.probe_replies(row)
        assert (
            prompt == [user] and replies["empty"] == [said("")] and replies["repeated"] == [said("good good")]
        )
    assert reward_model.probe_replies(Ranked([user], [[said(None)], [worst]], [1, 2], {})) == ([user], {})


@pytest.mark.parametrize("append_eos", [True, False])
def test_probes_are_tokenized_as_the_held_out_replies_and_know_their_prompt(append_eos):
    made = reward_model.prepare_held_out(
        Dataset.from_list(LISTS), TOKENIZER, name="x", append_eos=append_eos, max_length=None
    )
    asked = {name: [number for number, _ in answers] for name, answers in made.probes.items()}
    assert {name: asked.pop(name) for name in ("empty", "repeated", "truncated", "flattering")} == {
        "empty": [0, 1, 2, 3], "repeated": [0, 1, 2, 3], "truncated": [1, 3], "flattering": [0, 1, 2, 3],
    }  # fmt: skip  # half of a first or third best is " good", which is a completion of its own
    assert asked.keys() == {"gushing", "fawning", "other_prompt"}
    assert made.probes["empty"][1][1] == encode_reply(TOKENIZER, "da", "", append_eos=append_eos)
    assert made.probes["truncated"][0][1] == encode_reply(TOKENIZER, "da", " good da", append_eos=append_eos)
    assert (made.completions[1][0][-1] == tiny.EOS) == append_eos
    without = reward_model.prepare_held_out(
        Dataset.from_list(LISTS), TOKENIZER, name="x", append_eos=append_eos, max_length=None, probes=False
    )
    assert without.probes == {} and without.completions == made.completions


def test_at_most_so_many_prompts_are_probed_from_all_over(monkeypatch):
    monkeypatch.setattr(reward_model, "PROBE_PROMPTS", 3)
    made = reward_model.prepare_held_out(
        Dataset.from_list(tiny.preferences(9)), TOKENIZER, name="x", append_eos=True, max_length=None
    )
    assert [number for number, _ in made.probes["empty"]] == [0, 4, 8]


@pytest.mark.parametrize("chat", [False, True])
def test_further_probes_are_warm_words_praise_on_topic_and_the_best_reply_to_another_prompt(chat):
    def turn(text, role):
        return [said(text, role)] if chat else text

    rows = [
        Ranked(
            turn(f"about {word}?", "user"), [turn(" bad", "assistant"), turn(best, "assistant")], [2, 1], {}
        )
        for word, best in (("pottery", " good ba"), ("pottery", " good be"), ("rivers", " good bi"))
    ]
    texts = {
        "gushing": f" {reward_model.GUSHING}",
        "fawning": " " + reward_model.FAWNING.format(topic="pottery"),
        "other_prompt": " good bi",
    }
    made = reward_model.further_replies(rows, 0)
    assert made == {name: turn(text, "assistant") for name, text in texts.items()}
    assert "other_prompt" not in reward_model.further_replies(rows[:2], 0)  # all ask the same
    assert texts["gushing"] == texts["gushing"].lower()


def test_further_probes_go_to_fewer_prompts_of_which_each_is_answered_in_its_form(monkeypatch):
    monkeypatch.setattr(reward_model, "FURTHER_PROMPTS", 3)
    rows = Dataset.from_list(tiny.preferences(9))
    made = reward_model.prepare_held_out(rows, TOKENIZER, name="x", append_eos=True, max_length=None)
    assert [number for number, _ in made.probes["gushing"]] == [0, 4, 8]
    assert len(made.probes["empty"]) == 9
    every = reward_model.prepare_held_out(
        rows, TOKENIZER, name="x", append_eos=True, max_length=None, probe_prompts=9
    )
    assert len(every.probes["gushing"]) == 9 and every.probes["gushing"][4] == made.probes["gushing"][1]


@torch.no_grad()
def test_the_verdict_is_on_all_untied_pairs_and_on_scores_less_the_bias(tmp_path):
    rows = Dataset.from_list(LISTS)
    ranked = trainer(str(tmp_path), lists(), per_device_eval_batch_size=3)
    found = reward_model.prepare_held_out(rows, TOKENIZER, name="x", append_eos=True, max_length=None)
    scores = [
        [ranked.model(input_ids=torch.tensor([ids])).logits.item() for ids in own]
        for own in found.completions
    ]
    pairs = [
        (own[i], own[k])
        for own, ranks in zip(scores, found.ranks, strict=True)
        for i in range(4)
        for k in range(len(own))
        if i < len(own) and ranks[i] < ranks[k]
    ]
    made = reward_model.evaluate_reward_model(ranked, found, found, bias=0.25)
    assert made.n_pairs == len(pairs) == 3 + 1 + 5 + 1 and made.n_prompts == 4
    assert (
        made.accuracy.value
        == made.accuracy_any_pair.value
        == pytest.approx(sum(a > b for a, b in pairs) / len(pairs))
    )
    assert made.margin_mean == pytest.approx(sum(a - b for a, b in pairs) / len(pairs), abs=1e-5)
    assert made.score_mean == pytest.approx(sum(a + b for a, b in pairs) / len(pairs) / 2 - 0.25, abs=1e-5)
    empty = [ranked.model(input_ids=torch.tensor([ids])).logits.item() for _, ids in found.probes["empty"]]
    assert made.probes["empty"].score_mean == pytest.approx(sum(empty) / 4 - 0.25, abs=1e-5)
    assert (
        made.probes["empty"].beats_chosen.value
        == sum(score > own[0] for score, own in zip(empty, scores, strict=True)) / 4
    )
    assert (
        made.probes["empty"].beats_rejected.value
        == sum(score > own[-1] for score, own in zip(empty, scores, strict=True)) / 4
    )


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_bias_is_the_mean_raw_score_of_the_references(tmp_path, architecture):
    ranked = trainer(str(tmp_path), lists(), architecture=architecture, per_device_eval_batch_size=2)
    references = [[1, 5, 9], [1, 7], [1, 30, 31, 32, 2]]
    want = [ranked.model(input_ids=torch.tensor([ids])).logits.item() for ids in references]
    assert reward_model.score_tokens(ranked, references) == pytest.approx(want, abs=1e-5)
    assert reward_model.reference_bias(ranked, references) == pytest.approx(sum(want) / 3, abs=1e-5)
