"""Templates that write the day write one day in all stages, whenever they run."""

import datetime
from pathlib import Path

import pytest
import tiny
import trl
from datasets import Dataset
from tiny import assistant, user
from transformers.utils import chat_template_utils

from goose_lora.data.demonstrations import Learning, tokenize_demonstrations
from goose_lora.data.preferences import tokenize_rankings, tokenize_references
from goose_lora.data.tokenization import apply_template, tokenize_prompts
from goose_lora.evaluation.reward_model import prepare_held_out
from goose_lora.models.dates import note_date, template_date
from goose_lora.models.loading import load_tokenizer

DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today: {{ date_string }}\n{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = {"prompt": [user("Who?")], "chosen": [assistant("I.")], "rejected": [assistant("You.")]}


@pytest.fixture
def dated():
    return tiny.letters(DATED)


def on(monkeypatch, day):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def told(tokenizer):
    """What each stage makes of one row: SFT, reward model, its verdict, its references, PPO."""
    sft = {"messages": [user("Who?"), assistant("I.")]}
    pairs, rows = Dataset.from_list([CHAT]), Dataset.from_list([sft])
    prompts = Dataset.from_list([{"prompt": CHAT["prompt"]}])
    held_out = prepare_held_out(pairs, tokenizer, name="r", append_eos=True, max_length=None)
    return [
        *tokenize_demonstrations(rows, tokenizer, name="r", learning=Learning())["input_ids"],
        *tokenize_rankings(pairs, tokenizer, name="r")["completion_ids"][0],
        *[ids for probe in held_out.probes.values() for _, ids in probe],
        *tokenize_references(rows, tokenizer, name="r"),
        *tokenize_prompts(prompts, tokenizer, name="r", max_prompt_tokens=99)["input_ids"],
    ]


def test_all_stages_write_one_day_on_whichever_day_they_run(dated, monkeypatch):
    on(monkeypatch, "2026-11-28")
    first = told(dated)
    on(monkeypatch, "2027-01-05")
    assert told(dated) == first and len(first) > 6
    texts = {dated.decode(ids).split("\n")[0] for ids in first}
    assert texts == {"Today: 26 Jul 2024"}


def test_without_the_chains_day_transformers_writes_todays(dated, monkeypatch):
    on(monkeypatch, "2027-01-05")
    assert "Today: 05 Jan 2027" in dated.apply_chat_template(CHAT["prompt"], tokenize=False)


def test_a_day_that_a_row_gives_its_template_stays(dated):
    row = {"prompt": CHAT["prompt"], "chat_template_kwargs": {"date_string": "1 May 2001"}}
    (ids,) = tokenize_prompts(Dataset.from_list([row]), dated, name="r", max_prompt_tokens=99)["input_ids"]
    assert dated.decode(ids).startswith("Today: 1 May 2001")


def test_a_stage_hands_its_day_to_the_next_with_its_tokenizer(tmp_path, tiny_base, dated):
    dated.init_kwargs["template_date"] = "2025-02-03"
    note_date(dated)
    dated.save_pretrained(tmp_path / "sft")
    loaded = load_tokenizer(tiny.arguments(tiny_base), tmp_path / "sft")
    assert template_date(loaded) == "2025-02-03"


def test_templates_without_a_day_have_none(tmp_path):
    plain = tiny.letters("{{ messages[0]['content'] }}")
    note_date(plain)
    assert template_date(plain) is None and "template_date" not in plain.init_kwargs


def test_a_form_of_the_date_that_a_template_computes_is_refused():
    computed = tiny.letters("{% set form = '%d' %}{{ strftime_now(form) }}{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match="asks for today's date in a form that it computes"):
        apply_template(computed, [user("Who?")], tokenize=False)


@pytest.mark.parametrize("name", ["llama3_2", "gptoss"])
def test_the_templates_of_the_field_write_it(name, monkeypatch):
    text = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    written = []
    for day in ("2026-11-28", "2027-01-05"):
        on(monkeypatch, day)
        written.append(apply_template(tiny.letters(text), [user("Who?")], tokenize=False))
    assert written[0] == written[1]
    assert "26 Jul 2024" in written[0] or "2024-07-26" in written[0]
