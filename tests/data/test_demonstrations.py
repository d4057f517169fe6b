"""What reaches the model: tokens against TRL's own, and nothing lost on the way."""

from pathlib import Path

import pytest
import tiny
import trl
from datasets import Dataset
from trl import SFTConfig, SFTTrainer, chat_template_utils

from goose_lora.data import tokenization
from goose_lora.data.demonstrations import (
    NOT_LEARNED,
    Learning,
    demonstration,
    tokenize_demonstrations,
)
from goose_lora.data.formats import take
from goose_lora.data.preferences import encode_reply
from goose_lora.data.report import row_parts
from goose_lora.data.rows import load_rows
from goose_lora.data.shapes import Reading
from goose_lora.data.tokenization import apply_template, render_whole, text_ids, tokenize_prompts
from goose_lora.errors import UserError

USER = {"role": "user", "content": "ba be"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad bi"}
TALK = [USER, GOOD, {"role": "user", "content": "bo"}, BAD]
MARKED = (
    "{{ bos_token }}{% for m in messages %} <{{ m['role'] }}> {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} {{ eos_token }}{% endgeneration %}{% else %}"
    "{{ m['content'] }} {{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
)
TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def marked():
    tokenizer = tiny.chat_tokenizer()
    tokenizer.chat_template = MARKED
    return tokenizer


def trl_tokens(rows, tokenizer, tmp_path, **settings):
    model = tiny.base()
    model.resize_token_embeddings(len(tokenizer))
    config = SFTConfig(str(tmp_path), use_cpu=True, report_to="none", bf16=False, **settings)
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset], config


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"completion_only_loss": False},
        {"max_length": 7},
        {"max_length": 7, "truncation_mode": "keep_end"},
    ],
)
@pytest.mark.parametrize(
    "row",
    [
        {"text": "ba be good"},
        {"prompt": "ba be", "completion": " good"},
        {"prompt": [USER], "completion": [GOOD]},
        {"messages": TALK},
    ],
)
def test_tokens_and_labels_are_those_of_trl(row, settings, tmp_path):
    tokenizer, rows = tiny.chat_tokenizer(), Dataset.from_list([row])
    wanted, config = trl_tokens(rows, tokenizer, tmp_path, **settings)
    made = tokenize_demonstrations(rows, tokenizer, name="x", learning=Learning.of(config))
    assert [(row["input_ids"], row["labels"]) for row in made] == wanted


def test_the_assistants_turns_alone_are_those_of_trl(tmp_path):
    rows = Dataset.from_list([{"messages": TALK}])
    wanted, config = trl_tokens(rows, marked(), tmp_path, assistant_only_loss=True)
    made = tokenize_demonstrations(rows, marked(), name="x", learning=Learning.of(config))
    assert [(row["input_ids"], row["labels"]) for row in made] == wanted
    # and goose-lora data shows which they are
    taken = take(rows, "sft", "x")
    parts = row_parts(taken.rows[0], taken, "sft", marked(), learning=Learning(assistant_only_loss=True))
    assert [part.text for part in parts if part.label == "learned"] == ["good </s>", "bad bi </s>"]


@pytest.mark.parametrize("settings", [{}, {"completion_only_loss": False}])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"prompt": [USER], "completion": TALK[1:]},  # with a question between two replies
        {"prompt": TALK[:3], "completion": [BAD]},
    ],
)
@pytest.mark.parametrize("template", ["qwen2_5", "llama3", "gemma", "phi3", "own marks"])
def test_the_assistants_turns_alone_are_those_of_trl_under_its_own_templates(
    template, row, settings, tmp_path
):
    # All of them have the word generation, in add_generation_prompt, and not the marks
    own = MARKED if template == "own marks" else getattr(chat_template_utils, f"{template}_chat_template")
    tokenizer = tiny.letters(own)
    rows = Dataset.from_list([row])
    wanted, config = trl_tokens(rows, tokenizer, tmp_path, assistant_only_loss=True, **settings)
    made = tokenize_demonstrations(rows, tokenizer, name="x", learning=Learning.of(config))
    assert [(row["input_ids"], row["labels"]) for row in made] == wanted
    assert any(label == NOT_LEARNED for label in made[0]["labels"])


def test_marks_that_hold_nothing_or_leave_out_the_end_are_told(caplog):
    rows, learning = Dataset.from_list([{"messages": TALK}]), Learning(assistant_only_loss=True)
    tokenizer = tiny.letters(
        MARKED.replace(" {{ eos_token }}{% endgeneration %}", "{% endgeneration %} {{ eos_token }}")
    )
    tokenize_demonstrations(rows, tokenizer, name="x", learning=learning)
    assert "may not learn to stop" in caplog.text
    # marks, and what the assistant says outside of them
    tokenizer.chat_template = MARKED.replace(
        "{{ m['content'] }} {{ eos_token }}{% endgeneration %}",
        "{% endgeneration %}{{ m['content'] }} {{ eos_token }}",
    )
    with pytest.raises(ValueError, match=r"row 1: assistant_only_loss: .* marks, and none around"):
        tokenize_demonstrations(rows, tokenizer, name="x", learning=learning)


def test_a_developers_message_is_read_as_system_under_marks_too():
    tokenizer = marked()
    tokenizer.chat_template = MARKED.replace(
        "{% for m in messages %}", "{% for m in messages if m['role'] != 'developer' %}"
    )
    rows = Dataset.from_list([{"messages": [{"role": "developer", "content": "bi"}, *TALK]}])
    made = tokenize_demonstrations(rows, tokenizer, name="x", learning=Learning(assistant_only_loss=True))
    assert "bi" in tokenizer.decode(made[0]["input_ids"])
    assert tokenizer.decode([label for label in made[0]["labels"] if label >= 0]) == "good </s> bad bi </s>"


def test_a_cut_never_takes_the_reply(caplog):
    long = {"messages": [{"role": "user", "content": "ba " * 30}, GOOD]}
    rows = Dataset.from_list([long, {"messages": [USER, GOOD]}])
    made = tokenize_demonstrations(
        rows, tiny.chat_tokenizer(), name="x", learning=Learning(20), numbers=[4, 9]
    )
    assert len(made) == 1
    assert (
        "1 of 2 rows left out: nothing of the reply is left to learn at max_length=20 (rows 4)" in caplog.text
    )
    with pytest.raises(
        ValueError, match=r"no row has anything of its reply left .* truncation_mode: keep_end"
    ):
        tokenize_demonstrations(rows.select([0]), tiny.chat_tokenizer(), name="x", learning=Learning(20))


def test_a_turn_of_weight_0_is_read_and_not_learned():
    tokenizer = tiny.chat_tokenizer()
    row = {"messages": [USER, {**GOOD, "weight": 0}, TALK[2], {**BAD, "weight": 1}]}
    tokens = demonstration(row, tokenizer, Learning())
    masked = [token for token, learned in zip(tokens.ids, tokens.learned, strict=True) if not learned]
    assert tokenizer.decode(masked) == "good </s>"
    assert tokens.ids == demonstration({"messages": TALK}, tokenizer, Learning()).ids


@pytest.mark.parametrize("text", ["ba be", "<s> ba be", "ba be </s>", "<s> ba be </s>\n"])
def test_a_text_has_bos_once_and_eos_once(text):
    tokenizer = tiny.tokenizer()
    assert text_ids(tokenizer, text, ends=True) == [tiny.BOS, 4, 5, tiny.EOS]
    assert encode_reply(tokenizer, None, text, append_eos=True) == [tiny.BOS, 4, 5, tiny.EOS]


def with_template(name):
    tokenizer = tiny.chat_tokenizer()
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer


CALLING = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "fff", "arguments": {"x": "XXX"}}}],
}
THINKING = {**GOOD, "reasoning_content": "SSS"}


@pytest.mark.parametrize(
    ("template", "messages", "what"),
    [
        ("llama3_2", [USER, THINKING], "reasoning_content of message 2: 'SSS'"),
        ("qwen2_5", [USER, THINKING], "reasoning_content of message 2: 'SSS'"),
        ("phi3", [USER, CALLING, {"role": "tool", "content": "SSS"}, GOOD], "tool_calls of message 2"),
        ("llama3", [USER, CALLING, {"role": "tool", "content": "bi"}, GOOD], "tool_calls of message 2"),
        ("deepseekv3", [USER, {**GOOD, "content": "<think>\nSSS\n</think>\n\nbi"}], "think of message 2"),
    ],
)
def test_what_a_template_drops_is_refused_with_the_setting_that_leaves_it_out(template, messages, what):
    with pytest.raises(ValueError, match=f"leaves out {what}.* leave_out: \\["):
        render_whole(messages, with_template(template))


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "ba"}, {"role": "user", "content": "ba de"}, GOOD],
        [USER, CALLING, {"role": "tool", "content": "7"}, {**GOOD, "content": "7 of 7"}],
        [USER, {**GOOD, "reasoning_content": "good"}],
        [USER, {**GOOD, "content": "<think>\ngood\n</think>\n\ngood"}],
        [{"role": "user", "content": "good"}, {**GOOD, "thinking": "good"}, USER, GOOD],
    ],
    ids=["system", "tool", "reasoning", "think", "thinking"],
)
def test_words_that_stand_elsewhere_are_missed_where_a_template_of_trl_drops_them(messages):
    """What says so: TRL's template writes the same text though the words of a part are others."""
    found, wanted = {}, {}
    for name in sorted(path.stem for path in TEMPLATES.glob("*.jinja")):
        tokenizer = with_template(name)
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # the template takes no such roles
            continue
        dropped = False
        for place, message in enumerate(messages):
            for key in ("content", "reasoning_content", "thinking"):
                if not message.get(key):
                    continue
                said = str(message[key])
                other = said.replace("good", "XXX", 1) if "<think>" in said else "XXX"
                changed = [*messages[:place], {**message, key: other}, *messages[place + 1 :]]
                dropped |= tokenizer.apply_chat_template(changed, tokenize=False) == text
        wanted[name] = not dropped and not lacks_a_call(messages, text)
        found[name] = takes(tokenizer, messages)
    assert found == wanted
    assert set(found.values()) == {True, False}


def lacks_a_call(messages, text):
    return CALLING in messages and "fff" not in text


@pytest.mark.parametrize("template", ["qwen3", "qwen2_5"])
def test_a_developers_message_is_read_as_system_where_the_template_has_no_such_role(template):
    tokenizer = with_template(template)
    system, developer = ({"role": role, "content": "SSS"} for role in ("system", "developer"))
    assert render_whole([developer, USER, GOOD], tokenizer) == render_whole([system, USER, GOOD], tokenizer)


def test_what_a_template_keeps_passes():
    tokenizer = with_template("qwen3")
    messages = [USER, THINKING]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert render_whole(messages, tokenizer) == ids


def test_parts_that_are_left_out_are_in_no_row(tmp_path):
    rows = [{"messages": [{"role": "developer", "content": "bo"}, USER, THINKING]}]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    reading = Reading(leave_out=("reasoning_content", "developer"))
    assert list(load_rows(path, stage="sft", reading=reading)) == [{"messages": [USER, GOOD]}]


TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "d", "parameters": {"type": "object"}},
}


@pytest.mark.parametrize("extra", [{"tools": [TOOL]}, {"chat_template_kwargs": {"enable_thinking": False}}])
def test_tools_and_keywords_reach_the_template_in_ppo(extra):
    tokenizer = with_template("qwen3")
    taken = take(Dataset.from_list([{"prompt": [USER], **extra}]), "ppo", "x")
    (row,) = tokenize_prompts(taken.rows, tokenizer, name="x", max_prompt_tokens=900)
    keywords = {"tools": extra["tools"]} if "tools" in extra else extra["chat_template_kwargs"]
    wanted = tokenizer.apply_chat_template(
        [USER], add_generation_prompt=True, tokenize=True, return_dict=True, **keywords
    )
    assert row["input_ids"] == wanted["input_ids"]
    plain = tokenizer.apply_chat_template([USER], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert row["input_ids"] != plain["input_ids"]


CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace(
    "</s>", "{% for c in m['tool_calls'] or [] %}{{ c['function'] | tojson }}{% endfor %}</s>"
)
ASKING = {"role": "user", "content": "look into query: cats 5"}


def looking(**arguments):
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


LOOKED = {"role": "tool", "name": "look", "content": "9 lives"}


def of_template(text):
    tokenizer = tiny.chat_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


def takes(tokenizer, messages, **options):
    """Whether the rows pass; None where the template itself refuses them."""
    try:
        render_whole(messages, tokenizer, **options)
    except UserError as error:
        return None if "refuses" in str(error) else False
    return True


def differ(tokenizer, messages, others, options, other_options):
    """Whether a template makes two texts of them; None where it refuses them."""
    try:
        return apply_template(tokenizer, messages, tokenize=False, **options) != apply_template(
            tokenizer, others, tokenize=False, **other_options
        )
    except UserError:
        return None


@pytest.mark.parametrize("rows", ["tools", "calls", "both"])
def test_tools_and_calls_pass_just_where_a_template_of_trl_writes_them(rows):
    found, wanted = {}, {}
    for name in sorted(path.stem for path in TEMPLATES.glob("*.jinja")):
        tokenizer = with_template(name)
        options = {} if rows == "calls" else {"tools": [TOOL]}
        messages = [ASKING, GOOD] if rows == "tools" else [ASKING, looking(query="cats")]
        found[name] = takes(tokenizer, messages, **options)
        no_tools = differ(tokenizer, messages, messages, options, {}) if options else True
        no_call = (
            differ(tokenizer, messages, [ASKING, looking(query="dogs")], options, options)
            if rows != "tools"
            else True
        )
        wanted[name] = None if None in (no_tools, no_call) else no_tools and no_call
    assert found == wanted
    assert {True, False} <= set(found.values())


@pytest.mark.parametrize("arguments", [{"query": "cats"}, {"query": 5}, {"query": ["cats", {"into": 5}]}, {}])
def test_a_call_is_missed_though_its_words_stand_elsewhere(arguments):
    messages = [ASKING, looking(**arguments), LOOKED, GOOD]
    with pytest.raises(
        UserError, match=r"leaves out tool_calls of message 2: 'look'.*leave_out: \[tool_calls\]"
    ):
        render_whole(messages, of_template(CHATML))
    assert takes(of_template(WITH_TOOLS), messages)


def test_tools_and_calls_that_are_missed_are_named_together():
    with pytest.raises(UserError, match=r"leaves out tools: 'look'.*leave_out: \[tools, tool_calls\]"):
        render_whole([ASKING, looking(query="cats"), LOOKED, GOOD], of_template(CHATML), tools=[TOOL])


def test_of_named_templates_the_one_that_is_used_counts():
    tokenizer = of_template({"default": CHATML, "tool_use": WITH_TOOLS})
    calls = [ASKING, looking(query="cats"), LOOKED, GOOD]
    assert takes(tokenizer, calls, tools=[TOOL]) and not takes(tokenizer, calls)


def test_tools_may_stand_before_the_last_question_alone():
    # As Mistral's templates write them; the prompt before an earlier reply has them elsewhere
    tokenizer = tiny.letters(
        "{% set asked = messages | selectattr('role', 'eq', 'user') | list %}{% for m in messages %}"
        "{% if tools and m == asked[-1] %}{{ tools | tojson }}{% endif %}<{{ m['role'] }}>{{ m['content'] }}"
        "{% endfor %}"
    )
    row = {"messages": [USER, GOOD, ASKING, GOOD], "tools": [TOOL]}
    assert demonstration(row, tokenizer, Learning(None)).has_reply


def test_a_template_that_takes_no_call_of_a_tool_that_is_not_there_reads_both():
    tokenizer = of_template(
        "{% for m in messages %}{% for c in m['tool_calls'] or [] %}"
        "{% if c['function']['name'] not in (tools | map(attribute='function.name')) %}"
        "{{ raise_exception('no such tool') }}{% endif %}{{ c['function'] | tojson }}{% endfor %}"
        "{{ m['content'] }}{% endfor %}{{ tools | tojson }}"
    )
    assert takes(tokenizer, [ASKING, looking(query="cats"), LOOKED, GOOD], tools=[TOOL])


def test_rows_without_tools_are_rendered_once(monkeypatch):
    calls = []
    real = tokenization.apply_template
    monkeypatch.setattr(tokenization, "apply_template", lambda *a, **how: calls.append(1) or real(*a, **how))
    render_whole(TALK, of_template(CHATML))
    assert len(calls) == 1
    render_whole(TALK, of_template(WITH_TOOLS), tools=[TOOL])
    assert len(calls) == 3


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_tools_and_calls_that_are_left_out_leave_the_rest_of_the_row(stage, tmp_path):
    messages = [ASKING, looking(query="cats"), LOOKED, GOOD]
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"messages": messages, "tools": [TOOL]}])
    reading = Reading(leave_out=("tools", "tool_calls", "tool"))
    rows = load_rows(path, stage=stage, reading=reading)
    plain = of_template(CHATML)
    if stage == "ppo":
        (row,) = tokenize_prompts(rows, plain, name="x", max_prompt_tokens=99)
        assert row["input_ids"] == render_whole([ASKING], plain, asks=True)
    else:
        assert list(rows) == [{"messages": [ASKING, GOOD]}]


def test_a_row_that_ends_in_a_call_is_left_out_with_its_calls(tmp_path, caplog):
    ends = [ASKING, GOOD, USER, looking(query="cats")]
    rows = [{"messages": ends}, {"messages": [ASKING, {**looking(query=5), "content": "bo"}]}]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    kept = load_rows(path, stage="sft", reading=Reading(leave_out=("tool_calls",)))
    assert list(kept) == [{"messages": [ASKING, {"role": "assistant", "content": "bo"}]}]
    assert "1 because the last message of messages is empty (row 1)" in caplog.text


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"add_generation_prompt": True}, "add_generation_prompt is set by the stage"),
        ({"enable_thinking": False, "tokenize": True}, "tokenize is set by the stage"),
        ({"tools": [TOOL]}, "tools have a column of their own"),
        ({"asks": True}, "asks is set by the stage"),
        (["enable_thinking"], "is list; expected an object"),
    ],
)
def test_keywords_that_are_not_the_templates_are_refused(keywords, words):
    row = {"messages": [USER, GOOD], "chat_template_kwargs": keywords}
    with pytest.raises(UserError, match=f"chat_template_kwargs.* {words}"):
        demonstration(row, tiny.chat_tokenizer(), Learning())
