"""Replies end at the first stop text, stop token or end-of-text token, and everything that reads a
reply's end agrees on where that is."""

import pytest
import tiny
import torch
from tiny_runs import fresh, prompt_rows, trainer, with_reward_adapter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from goose_lora.data.tokenization import left_pad
from goose_lora.generation.rollout import Rollout
from goose_lora.generation.sampling import generation_config
from goose_lora.generation.stopping import StopStrings, ends_with_stop
from goose_lora.ppo import experience
from goose_lora.ppo.collector import RolloutCollector
from goose_lora.rewards.sources import RewardMix


def words(text):
    return tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


def written(stop, rows, prompt_tokens):
    """Answers of ``stop`` as ``rows`` are written, column by column; the prompt stands there from
    the start."""
    ids = torch.tensor(rows)
    return [stop(ids[:, :width], None).tolist() for width in range(prompt_tokens + 1, ids.shape[1] + 1)]


def test_a_text_of_several_tokens_ends_each_row_where_it_is_complete():
    stop = StopStrings(tiny.tokenizer(), ["ba be"], prompt_tokens=1)
    rows = [words(text) for text in ("bi ba be bo bu", "bi bo bu ba be", "bi ba bo be ba")]
    assert written(stop, rows, 1) == [
        [False] * 3,
        [True, False, False],
        [True, False, False],
        [True, True, False],
    ]
    mask, ended = stop.cut(torch.ones(3, 4, dtype=torch.bool), torch.tensor([False, False, True]))
    assert mask.sum(-1).tolist() == [2, 4, 4] and ended.tolist() == [True, True, True]


def test_the_prompt_is_not_searched_and_no_text_begins_in_it():
    stop = StopStrings(tiny.tokenizer(), ["ba be"], prompt_tokens=3)
    assert not any(map(any, written(stop, [words("ba be ba be bo")], 3)))


def test_any_of_several_texts_ends_a_row_and_the_first_one_counts():
    stop = StopStrings(tiny.tokenizer(), ["bo", "ba be"], prompt_tokens=0)
    written(stop, [words("bi ba be bo"), words("bi bo ba be")], 0)
    assert stop.lengths == {0: 3, 1: 2}


def test_a_call_after_all_rows_have_ended_is_no_error():
    """Where the check for the end lags behind, generate asks once more."""
    stop = StopStrings(tiny.tokenizer(), ["ba"], prompt_tokens=0)
    assert written(stop, [words("ba be bi"), words("ba bo bu")], 0) == [[True, True]] * 3
    assert stop.lengths == {0: 1, 1: 1}


def byte_tokenizer():
    """A token a byte, as the worst case of a byte-level vocabulary: a letter of two bytes is two
    tokens, each of which is no text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("text", ["née", "\n\nUser: ", "答え"])
def test_a_text_is_found_at_its_last_byte_however_long_the_reply(text):
    tokenizer = byte_tokenizer()
    stop = StopStrings(tokenizer, [text], prompt_tokens=0)
    before = tokenizer("das ist éine längere Antwort, in der es nicht steht " * 3)["input_ids"]
    reply = before + tokenizer(text)["input_ids"]
    written(stop, [reply + tokenizer("mehr")["input_ids"]], 0)
    assert stop.lengths == {0: len(reply)}


def rollouts_of(
    shared, *, stop_strings=None, ends=(tiny.EOS,), batch_size=64, weights="shared", response_tokens=12
):
    generation = generation_config(
        response_tokens=response_tokens, temperature=1.0, eos_token_ids=list(ends), pad_token_id=tiny.PAD
    )
    reward = RewardMix([lambda completion_ids, **columns: [1.0] * len(completion_ids)])
    return RolloutCollector(
        shared,
        tiny.tokenizer(),
        generation,
        batch_size=batch_size,
        weights=weights,
        stop_strings=stop_strings,
        reward=reward,
    )


def first_end(ids, texts, ends):
    """Number of tokens up to the first end, by trying every length; None if the reply has none."""
    for length in range(1, len(ids) + 1):
        said = tiny.tokenizer().decode(ids[:length])
        if ids[length - 1] in ends or any(text in said for text in texts):
            return length
    return None


def replies(**settings):
    prompts, mask = left_pad([row["input_ids"] for row in prompt_rows(9)], tiny.PAD)
    torch.manual_seed(5)
    return rollouts_of(fresh(), **settings).generate(prompts, mask)


def stops():
    """Two texts, of two tokens and of one, and two tokens, which end most of ``replies`` at
    different places."""
    long = replies(ends=[99]).response_ids()
    decode = tiny.tokenizer().decode
    return long, [decode(long[0][3:5]), decode(long[4][6:7])], [tiny.EOS, long[7][2]]


@pytest.mark.parametrize("weights", ["shared", "dense"])
def test_sampled_replies_are_those_without_stops_cut_at_their_first_end(weights):
    long, texts, ends = stops()
    lengths = [first_end(ids, texts, ends) for ids in long]
    assert len(set(lengths)) > 3 and None in lengths, lengths
    rollout = replies(stop_strings=texts, ends=ends, weights=weights)
    assert rollout.response_ids() == [ids[:length] for ids, length in zip(long, lengths, strict=True)]
    assert rollout.ended.tolist() == [length is not None for length in lengths]
    assert torch.equal(rollout.attention_mask[:, rollout.prompt_tokens :], rollout.response_mask.long()), (
        "nothing after the end is read"
    )


def test_rows_of_several_groups_each_end_by_themselves():
    _, texts, ends = stops()
    rollout = replies(stop_strings=texts, ends=ends, batch_size=2)
    for ids, ended in zip(rollout.response_ids(), rollout.ended.tolist(), strict=True):
        assert first_end(ids, texts, ends) == (len(ids) if ended else None)
        assert ended or len(ids) == 12
    assert 0 < rollout.ended.sum() < 9


def ended_by_each():
    """Replies that end by the end-of-text token, by a stop token, by a text, and not at all;
    padded, as ``generate`` leaves them."""
    said = [words("be") + [tiny.EOS], words("be bi ba"), words("bo bu be bi"), words("da de di do du")]
    mask = torch.arange(5) < torch.tensor([[len(ids)] for ids in said])
    ids = torch.tensor([[7, 8] + ids + [tiny.PAD] * (5 - len(ids)) for ids in said])
    return Rollout(
        ids,
        torch.cat([torch.ones(4, 2, dtype=torch.long), mask.long()], 1),
        mask,
        torch.tensor([True, True, True, False]),
    )


def test_the_reward_stands_at_the_last_counted_token_and_only_a_reply_without_an_end_is_fined(
    tmp_path, monkeypatch
):
    settings = {
        "score_normalization": "none",
        "missing_eos_penalty": 4.0,
        "stop_token_ids": words("ba"),
        "stop_strings": ["be bi"],
    }
    ppo = trainer(tmp_path, **settings)
    kept = []
    token_rewards = experience.F.token_rewards
    monkeypatch.setattr(
        experience.F,
        "token_rewards",
        lambda *args, **kwargs: kept.append(token_rewards(*args, **kwargs)) or kept[-1],
    )
    rollout = ended_by_each()
    ppo.experience.make(
        rollout,
        ppo.collector.evaluate(rollout),
        ppo.collector.reward(None, **{"completion_ids": rollout.response_ids()}),
    )
    scores = [sum(token % 2 == 0 for token in ids) / len(ids) for ids in rollout.response_ids()]
    want = torch.zeros(4, 5)
    for row, (place, score) in enumerate(zip([1, 2, 3, 4], scores, strict=True)):
        want[row, place] = score - 4.0 * (row == 3)
    torch.testing.assert_close(kept[0], want, rtol=0, atol=1e-5)


def test_the_trainers_own_replies_end_by_its_stop_settings(tmp_path):
    _, texts, ends = stops()
    ppo = trainer(tmp_path, stop_strings=texts, stop_token_ids=ends[1:], response_length=12)
    prompts, mask = left_pad([row["input_ids"] for row in prompt_rows(9)], tiny.PAD)
    rollout = ppo.collector.generate(prompts, mask)
    assert rollout.ended.tolist() == [
        first_end(ids, texts, ends) is not None for ids in rollout.response_ids()
    ]
    assert {ids[-1] for ids in rollout.response_ids()} & set(ends[1:]) and rollout.ended.any()


def test_a_reward_model_that_never_read_end_of_text_reads_other_ends(tmp_path):
    shared = with_reward_adapter(tmp_path / "reward", critic="adapter")
    rollout = ended_by_each()
    hidden = shared.hidden("reward", rollout.input_ids, rollout.attention_mask)
    for reads_eos, places in ((True, [3, 4, 5, 6]), (False, [2, 4, 5, 6])):
        shared.reward_reads_eos = reads_eos
        rollouts = trainer(
            tmp_path / "run", shared=shared, reward=None, stop_token_ids=words("ba"), stop_strings=["be bi"]
        ).collector
        want = shared.apply_head("reward", hidden[range(4), places])
        torch.testing.assert_close(rollouts.scores(rollout, {}).total, want, rtol=0, atol=1e-5)
        torch.testing.assert_close(rollouts.evaluate(rollout).by_adapter, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("reply", "ended"),
    [
        ("be ba", True),
        ("bo be bi", True),
        ("be bi bo", False),
        ("bo bu", False),
        ("be", False),
        ("ba bo", False),
    ],
)
def test_a_reply_that_others_sampled_has_ended_if_its_last_token_completes_a_stop(reply, ended):
    assert ends_with_stop(tiny.tokenizer(), words(reply), words("ba"), ["be bi"]) == ended


@pytest.mark.parametrize("setting", ["stop_strings", "stop_token_ids"])
def test_one_stop_need_not_be_a_list(setting, tmp_path):
    """``stop_strings: "User:"`` in YAML would else end replies at a U."""
    given = {"stop_strings": "be bi", "stop_token_ids": 9}[setting]
    ppo = trainer(tmp_path, **{setting: given})
    assert getattr(ppo.args, setting) == [given]


def test_an_empty_stop_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"stop_strings=\['a', ''\]: an empty text would end every reply"):
        trainer(tmp_path, stop_strings=["a", ""])
