"""What export writes for other programs: a Modelfile that says what the chat template says."""

import json
import sys

import pytest
import tiny
import tiny_chain

from goose_lora import cli
from goose_lora.errors import UserError
from goose_lora.sharing import export_programs
from goose_lora.sharing.export_programs import chat_form, export, modelfile

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe a goose.<|im_end|>\n{% endif %}" + CHATML
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
COUNTS_TURNS = "{% for m in messages %}{{ loop.index }}:{{ m.role }}:{{ m.content }}\n{% endfor %}go:"
DROPS_EARLIER = "<|im_start|>{{ messages[-1].content }}<|im_end|>\n<|im_start|>assistant\n"
TOKENS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TOKENS += ["<start_of_turn>", "<end_of_turn>"]


def tokenizer_with(template):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    tokenizer.chat_template = template
    return tokenizer


def played(template, messages):
    """What Ollama's template says of messages: its few words of Go, read by regular rules."""
    body, end = template.split("{{ end }}{{ end }}")
    body = body.removeprefix("{{ range .Messages }}{{ ")
    parts = []
    bodies = body.replace("{{ else ", "").split('if eq .Role "')
    branches = dict(part.split('" }}', 1) for part in bodies if part)
    for message in messages:
        parts.append(branches[message["role"]].replace("{{ .Content }}", message["content"]))
    return "".join(parts).replace("{{ ", "") + end


@pytest.mark.parametrize(
    ("template", "system"),
    [
        (CHATML, ("<|im_start|>system\n", "<|im_end|>\n")),
        (WITH_DEFAULT, ("<|im_start|>system\n", "<|im_end|>\n")),
        (LLAMA_3, ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>")),
        (ZEPHYR, ("<|system|>\n", "</s>\n")),
        (GEMMA, None),
        (MISTRAL, None),
    ],
    ids=["chatml", "default", "llama3", "zephyr", "gemma", "mistral"],
)
def test_the_form_is_the_templates_own_and_none_of_it_is_bos(template, system):
    tokenizer = tokenizer_with(template)
    form = chat_form(tokenizer)
    assert form.system == system
    assert form.default_system == ("Be a goose." if template == WITH_DEFAULT else None)
    messages = [tiny.user("a"), tiny.assistant("b"), tiny.user("c")]
    if system:
        messages = [tiny.system("s"), *messages]
    want = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert form.render(messages) == want.removeprefix(tokenizer.bos_token)


def test_the_day_of_the_template_is_the_chains():
    dated = WITH_DEFAULT.replace("Be a goose.", "Today is {{ strftime_now('%Y') }}.")
    form = chat_form(tokenizer_with(dated))
    assert form.default_system == "Today is 2024.", "what all stages write, whatever the day is"


def test_a_header_without_a_message_is_refused_since_ollama_would_leave_it_out():
    headed = (
        "<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
        "<|im_end|>\n{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    with pytest.raises(UserError, match="vLLM or transformers"):
        chat_form(tokenizer_with(headed))


def test_a_first_token_that_the_tokenizer_does_not_add_stays_in_the_template():
    # SmolLM2's BOS is the token that begins each message
    tokenizer = tokenizer_with(CHATML)
    tokenizer.bos_token = "<|im_start|>"
    assert tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id
    assert chat_form(tokenizer).system == ("<|im_start|>system\n", "<|im_end|>\n")


@pytest.mark.parametrize("template", [COUNTS_TURNS, DROPS_EARLIER, "{{ raise_exception('never') }}"])
def test_a_template_that_does_more_is_refused_with_the_way_out(template):
    with pytest.raises(UserError, match=r"goose-lora merge RUN --out DIR"):
        chat_form(tokenizer_with(template))


def test_the_modelfile_has_template_stops_and_temperature():
    tokenizer = tokenizer_with(CHATML)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    text = modelfile(tokenizer, chat_form(tokenizer), ends, 0.7)
    assert text.startswith("FROM .\nTEMPLATE ") and text.endswith("PARAMETER temperature 0.7\n")
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\n' in text
    template = text.split('"""')[1]
    assert template == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )
    messages = [tiny.system("s"), tiny.user("a"), tiny.assistant("b"), tiny.user("c")]
    assert played(template, messages) == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_a_default_system_message_is_said_and_plain_text_has_a_plain_template():
    spoken, plain = tokenizer_with(WITH_DEFAULT), tokenizer_with(None)
    assert 'SYSTEM """Be a goose."""' in modelfile(spoken, chat_form(spoken), [])
    text = modelfile(plain, chat_form(plain), [2])
    assert 'TEMPLATE """{{ .Prompt }}"""' in text and "PARAMETER temperature 1\n" in text


@pytest.fixture
def run(adapter_chain, tmp_path):
    return tiny_chain.copy(adapter_chain, tmp_path / "run") / "ppo"


def test_a_run_becomes_a_folder_for_ollama_with_the_ends_of_its_merged_model(run, tmp_path):
    said = export(run, tmp_path / "out", to="ollama")
    assert "ollama create ppo --file" in said and "KL to the adapter's model" in said
    text = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM .\n") and (tmp_path / "out" / "model.safetensors").is_file()
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert text.count("PARAMETER stop") == len(ends) > 0


def test_without_samples_of_the_run_the_option_that_the_refusal_names_gives_prompts(
    run, tmp_path, monkeypatch, capsys
):
    (run / "samples.jsonl").unlink()
    words = ["goose-lora", "export", str(run), "--to", "ollama", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        cli.main()
    assert "no prompts to measure on: --prompts FILE" in capsys.readouterr().err
    mine = tiny.write_rows(tmp_path / "mine.jsonl", tiny.prompts(3))
    monkeypatch.setattr(sys, "argv", [*words, "--prompts", mine])
    cli.main()
    assert "(3 prompts," in capsys.readouterr().out and (tmp_path / "out" / "Modelfile").is_file()


def test_a_template_that_ollama_cannot_say_is_refused_before_anything_is_merged(run, tmp_path, monkeypatch):
    (run / "chat_template.jinja").write_text(COUNTS_TURNS)
    monkeypatch.setattr(export_programs, "merge", lambda *args, **kwargs: pytest.fail("merged"))
    with pytest.raises(UserError, match="vLLM or transformers"):
        export(run, tmp_path / "out", to="ollama")


FAKE = """import pathlib, sys
out = sys.argv[sys.argv.index("--outfile") + 1]
assert pathlib.Path(sys.argv[1], "model.safetensors").is_file()
{}
"""


@pytest.mark.parametrize("works", [True, False])
def test_gguf_is_made_by_the_converter_of_the_machine(run, tmp_path, monkeypatch, works):
    ends = "pathlib.Path(out).write_bytes(b'GGUF')" if works else "sys.exit('no such architecture')"
    (tmp_path / export_programs.CONVERTER).write_text(FAKE.format(ends))
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    if works:
        assert "llama-cli --model" in export(run, tmp_path / "out", to="gguf")
        assert (tmp_path / "out" / "model.gguf").read_bytes() == b"GGUF"
        return
    with pytest.raises(UserError, match="no such architecture The merged model is in"):
        export(run, tmp_path / "out", to="gguf")
    assert (tmp_path / "out" / "model.safetensors").is_file(), "the merged model is kept"


def test_without_the_converter_the_way_to_it_is_said_before_anything_is_merged(run, tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"github\.com/ggml-org/llama\.cpp.*LLAMA_CPP"):
        export(run, tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()
