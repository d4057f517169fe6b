"""goose_lora.models.endings: the ends of a reply are a union, and every stage reads the same."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from goose_lora.data.demonstrations import Learning, demonstration
from goose_lora.data.preferences import encode_reply
from goose_lora.data.tokenization import tokenize_prompts
from goose_lora.errors import UserError
from goose_lora.models.endings import (
    closing_text,
    closing_token,
    ends_text,
    ends_with_sources,
    note_ends,
    reply_ends,
    unwritten_end,
)
from goose_lora.models.loading import change_ends, load_base, load_tokenizer, tokenizer_of
from goose_lora.models.shared_base import SharedBase

ASK = [{"role": "user", "content": "ba de"}]
SAY = [{"role": "assistant", "content": "good"}]
# The template of Gemma's shape: its end of turn is not the tokenizer's EOS.
GEMMA = (
    "{{ bos_token }}{% for m in messages %} <{{ m['role'] }}> {{ m['content'] | trim }} <turn_end> \n"
    "{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
)
# That of GLM: nothing closes a turn, and the next one's role does.
GLM = "{% for m in messages %} <{{ m['role'] }}> {{ m['content'] }}{% endfor %}"


def chatty(template=GEMMA):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<user>", "<assistant>", "<turn_end>", "<other>"], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def save_chat_base(folder, *, ships=None, template=GEMMA):
    """A base whose generation_config.json has the ends ``ships``, as tokens."""
    tokenizer = chatty(template)
    model = tiny.base(vocab_size=len(tokenizer))
    if ships:
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids(ships))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tiny.arguments(str(folder))


def tokens_of(tokenizer, stop=None):
    return tokenizer.convert_ids_to_tokens(reply_ends(tokenizer, stop))


def test_the_ends_are_the_union_of_all_that_say_so(tmp_path):
    tokenizer = load_tokenizer(save_chat_base(tmp_path, ships=["</s>", "<other>"]))
    stop = tokenizer.convert_tokens_to_ids("be")
    assert tokens_of(tokenizer, [stop]) == ["</s>", "<other>", "<turn_end>", "be"]
    assert ends_text(tokenizer, [stop]) == (
        "replies end at </s> (2: tokenizer, generation_config), <other> (64: generation_config),"
        f" <turn_end> (63: chat template), be ({stop}: stop_token_ids)"
    )


def test_generate_of_transformers_stops_at_the_same_tokens(tmp_path):
    args = save_chat_base(tmp_path, ships=["</s>", "<other>"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    base = load_base(args, load_tokenizer(args), device=torch.device("cpu"))
    assert set(plain.generation_config.eos_token_id) < set(base.generation_config.eos_token_id)


@pytest.mark.parametrize(
    ("template", "closing"),
    [
        (GEMMA, "<turn_end>"),
        (GLM, "<user>"),
        (tiny.chat_tokenizer().chat_template, "</s>"),
        ({"default": GEMMA, "rag": GLM}, "<turn_end>"),
        (tiny.tokenizer().chat_template, None),
        ("{{ raise_exception('no assistants') }}", None),
        (None, None),
    ],
    ids=["gemma", "glm", "eos", "named", "plain text", "refuses", "none"],
)
def test_the_token_that_closes_a_turn_is_read_from_the_template(template, closing):
    tokenizer = chatty(template)
    number = closing_token(tokenizer)
    assert (None if number is None else tokenizer.convert_ids_to_tokens(number)) == closing


IN_TEXT = "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n### End\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "text"),
    [(IN_TEXT, "### End"), (IN_TEXT + "{{ eos_token }}", None), (GEMMA, None), (GLM, None), (None, None)],
    ids=["text", "text and EOS", "token", "nothing", "no template"],
)
def test_a_turn_that_closes_in_text_of_several_tokens_is_told_with_the_setting(template, text):
    tokenizer = chatty(template)
    assert closing_text(tokenizer) == text
    assert ('set stop_strings: ["### End"]' in ends_text(tokenizer)) == (text is not None)


def test_a_template_that_changes_is_read_again():
    tokenizer = chatty()
    before = closing_token(tokenizer)
    tokenizer.chat_template = GLM
    assert before != closing_token(tokenizer) == tokenizer.convert_tokens_to_ids("<user>")


def test_an_end_outside_the_vocabulary_is_told_and_left_out(tmp_path, caplog):
    tokenizer = tiny.tokenizer()
    note_ends(tokenizer, [50256], "generation_config")
    assert reply_ends(tokenizer) == [tiny.EOS] and "50256" in caplog.text


def test_ends_are_saved_with_the_tokenizer_and_transformers_loads_it(tmp_path):
    tokenizer = load_tokenizer(save_chat_base(tmp_path / "base", ships=["<other>"]))
    tokenizer.save_pretrained(tmp_path / "sft")
    again = AutoTokenizer.from_pretrained(tmp_path / "sft")
    assert ends_with_sources(again) == ends_with_sources(tokenizer)


def test_what_sft_ended_replies_with_is_what_the_next_stage_ends_them_with(tmp_path):
    args = save_chat_base(tmp_path / "base", template=None)
    sft = load_tokenizer(args)
    change_ends(sft, None, "<turn_end>")  # SFTConfig.eos_token
    sft.save_pretrained(tmp_path / "sft")
    following = tokenizer_of(tmp_path / "sft", args=args)
    assert following.eos_token == "<turn_end>" and set(tokens_of(following)) == {"</s>", "<turn_end>"}


def test_a_folder_with_a_template_alone_gives_it_to_the_bases_tokenizer(tmp_path):
    args = save_chat_base(tmp_path / "base", template=None)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "chat_template.jinja").write_text(GEMMA, encoding="utf-8")
    assert tokens_of(tokenizer_of(tmp_path / "sft", args=args)) == ["</s>", "<turn_end>"]


def test_no_end_is_used_as_padding(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|endoftext|>", "[PAD]"], special_tokens=True)
    tokenizer.pad_token = "<|endoftext|>"  # as Qwen's chat models, which also end at it
    tokenizer.save_pretrained(tmp_path)
    Path(tmp_path, "generation_config.json").write_text(
        json.dumps({"eos_token_id": [tiny.EOS, tokenizer.pad_token_id]}), encoding="utf-8"
    )
    loaded = load_tokenizer(tiny.arguments(str(tmp_path)))
    assert loaded.pad_token_id not in reply_ends(loaded) and len(reply_ends(loaded)) == 2


@pytest.mark.parametrize("stop_token_ids", [None, [9]])
def test_reward_model_rollouts_and_base_end_at_one_set(tmp_path, stop_token_ids):
    import tiny_runs

    args = save_chat_base(tmp_path / "base", ships=["</s>", "<other>"])
    tokenizer = load_tokenizer(args)
    base = load_base(args, tokenizer, device=torch.device("cpu"))
    rows = tokenize_prompts(
        Dataset.from_list([{"prompt": ASK}] * 16), tokenizer, name="x", max_prompt_tokens=64
    )
    trainer = tiny_runs.PPOTrainer(
        SharedBase.build(base, tiny.lora(base), critic="adapter"),
        tiny_runs.config(tmp_path / "run", stop_token_ids=stop_token_ids),
        rows,
        tokenizer,
        reward_function=tiny_runs.even_share,
    )
    ends = trainer.collector.generation.eos_token_id
    assert ends == reply_ends(tokenizer, stop_token_ids)
    assert base.generation_config.eos_token_id == reply_ends(tokenizer)
    # The score is read where a rollout ends, whatever the template writes after it
    ids = encode_reply(tokenizer, ASK, SAY, append_eos=True)
    assert tokenizer.decode(ids[-1]) == "<turn_end>" and ids[-1] in ends


def test_a_template_of_glms_kind_is_not_cut_before_the_reply():
    tokenizer = chatty(GLM)
    ids = encode_reply(tokenizer, ASK, SAY, append_eos=True)
    assert tokenizer.convert_ids_to_tokens(ids)[-3:] == ["<assistant>", "good", "<user>"]


def test_an_end_that_the_template_leaves_to_the_next_turn_is_learned_and_scored():
    tokenizer = chatty(GLM)
    end = unwritten_end(tokenizer)
    assert end == tokenizer.convert_tokens_to_ids("<user>") and end in reply_ends(tokenizer)
    for row in ({"messages": [*ASK, *SAY]}, {"prompt": ASK, "completion": SAY}):
        tokens = demonstration(row, tokenizer, Learning())
        assert tokens.ids[-1] == end and tokens.learned[-1] and tokens.said[-1]
        assert tokens.ids == encode_reply(tokenizer, ASK, SAY, append_eos=True)
    unlearned = {"messages": [*ASK, {**SAY[0], "weight": 0}]}
    assert not any(demonstration(unlearned, tokenizer, Learning()).learned[-2:])
    # Nothing is added where the template writes an end, and where a question comes last
    assert unwritten_end(chatty()) is None and unwritten_end(chatty(None)) is None
    asked = demonstration({"messages": [*ASK, *SAY, *ASK]}, tokenizer, Learning())
    assert tokenizer.convert_ids_to_tokens(asked.ids[-2:]) == ["ba", "de"]


def refusal(template_path, eos_token):
    with pytest.raises(UserError) as caught:
        change_ends(tiny.tokenizer(), template_path, eos_token)
    return str(caught.value)


def test_an_eos_token_that_the_base_lacks_is_refused_by_name():
    assert re.match(r"eos_token: .* no token <im_end>", refusal(None, "<im_end>"))


def test_a_template_whose_tokens_the_base_lacks_is_refused_by_name(tmp_path):
    chatty().save_pretrained(tmp_path)
    assert "chat_template_path" in (said := refusal(str(tmp_path), None)) and "<turn_end>" in said


def test_a_folder_without_a_template_is_refused(tmp_path):
    chatty(None).save_pretrained(tmp_path)
    assert "has no chat template" in refusal(str(tmp_path), None)


def test_a_template_of_another_tokenizer_comes_with_its_eos(tmp_path):
    source = chatty()
    source.eos_token = "<turn_end>"
    source.save_pretrained(tmp_path)
    tokenizer = chatty(None)
    change_ends(tokenizer, str(tmp_path), None)
    assert tokenizer.chat_template == GEMMA and tokenizer.eos_token == "<turn_end>"
