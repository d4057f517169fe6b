"""Chatting with a run: each role says what its own model says, streamed, and a terminal, a pipe and
a page show the same."""

import io
import re
import shlex
import socket
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import tiny_chain
import torch
from datasets import Dataset
from peft import PeftModel
from recipe_runs import recipe
from trl import RewardConfig

from goose_lora import cli
from goose_lora.apps import chat_page, gradio_pages, session
from goose_lora.apps.chat import Conversation, readable
from goose_lora.apps.session import PolicySession, RunInfo, SampledReply, inspect_run
from goose_lora.cli import commands
from goose_lora.data.rows import fingerprint
from goose_lora.data.tokenization import prompt_ids
from goose_lora.errors import UserError
from goose_lora.evaluation.policies import answer
from goose_lora.generation.sampling import generation_config
from goose_lora.models.folders import read_lineage, write_lineage
from goose_lora.models.loading import load_base, load_tokenizer
from goose_lora.ppo.config import PPOConfig

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 6
TYPES = {
    "recipes/reward.py": (RewardConfig, recipe("reward").RewardArguments),
    "recipes/ppo.py": (PPOConfig, recipe("ppo").RoleArguments),
}


@pytest.fixture(scope="module")
def loaded(adapter_chain):
    return PolicySession(inspect_run(adapter_chain / "ppo"), max_new_tokens=TOKENS)


def say(monkeypatch, capsys, run, lines, *options):
    monkeypatch.setattr(
        sys, "argv", ["goose-lora", "chat", str(run), "--max_new_tokens", str(TOKENS), *options]
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    cli.main()
    return capsys.readouterr().out


# What is said


@torch.no_grad()
def test_each_role_of_a_run_says_what_its_own_separately_loaded_model_says(adapter_chain, tmp_path):
    run = tiny_chain.copy(adapter_chain, tmp_path / "run")
    noted = read_lineage(run / "ppo")
    # In bfloat16 two ways of adding may differ
    write_lineage(run / "ppo", **(noted | {"base": noted["base"] | {"dtype": "float32"}}))
    greedy = PolicySession(inspect_run(run / "ppo"), temperature=0, max_new_tokens=TOKENS)
    args = tiny.arguments(str(run / "base"), quantization="nf4")
    tokenizer = load_tokenizer(args)
    config = generation_config(
        response_tokens=TOKENS,
        temperature=1.0,
        eos_token_ids=[tiny.EOS],
        pad_token_id=tiny.PAD,
        do_sample=False,
    )
    ids = torch.tensor([prompt_ids("ba be", tokenizer)])
    said = {}
    for name, folder in (("base", None), ("sft", "sft"), ("ppo", "ppo")):
        model = load_base(args, tokenizer)
        model = PeftModel.from_pretrained(model, run / folder).eval() if folder else model
        (alone,) = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
        want = tokenizer.decode(alone, skip_special_tokens=True).removeprefix("ba be")
        (said[name],) = (reply.text for reply in greedy.reply(name, "ba be", seed=0))
        assert said[name] == want
    assert len(set(said.values())) == 3, "the adapters must show"


def test_reply_score_length_and_end_are_those_of_the_evaluation(loaded):
    for name in ("base", "sft", "ppo"):
        (got,) = loaded.reply(name, "ba be", seed=3)
        ids = [prompt_ids("ba be", loaded.tokenizer)]
        how = {"batch_size": 1, "seed": 3, "dense": loaded.dense}
        want = answer(loaded.shared, loaded.info.roles[name], ids, loaded.tokenizer, loaded.sampling, **how)
        assert (got.text.strip(), got.tokens, got.ended) == (want.texts[0], want.lengths[0], want.ended[0])
        assert got.score == pytest.approx(want.scores[0]) and f"score {got.score:.3f}" in got.facts()


def test_a_reply_is_streamed_in_words_that_make_up_the_reply_and_begin_with_their_space(loaded):
    pieces = []
    (reply,) = loaded.reply("ppo", "ba be", seed=1, write=pieces.append)
    assert len(pieces) >= reply.tokens - 1 > 1, "word by word"
    assert "".join(pieces) == reply.text and reply.text.startswith(" ")
    assert loaded.reply("ppo", "ba be", seed=1) == [reply] != loaded.reply("ppo", "ba be", seed=2)


def test_a_conversation_goes_through_the_chat_template_once(loaded, monkeypatch):
    seen, plain = [], session.sample
    monkeypatch.setattr(
        session,
        "sample",
        lambda shared, ids, *args, **kwargs: seen.append(ids) or plain(shared, ids, *args, **kwargs),
    )
    monkeypatch.setattr(
        loaded.tokenizer,
        "chat_template",
        "{{ bos_token }}{% for m in messages %} {{ m['content'] }}{% endfor %}",
    )
    (reply,) = loaded.reply("ppo", turns("ba", "be", "bi"), seed=0)
    assert loaded.tokenizer.decode(seen[0][0]) == "<s> ba be bi" and reply.text[0] != " "


def test_a_prompt_that_leaves_no_room_is_refused_and_the_voices_go_on(loaded):
    with pytest.raises(
        ValueError,
        match=r"the prompt is 123 tokens long, and with a reply of 6 .* context of 127\. Begin anew",
    ):
        loaded.reply("ppo", "ba " * 122, seed=0)
    with pytest.raises(ValueError, match="no tokens"):
        loaded.reply("ppo", "", seed=0)
    assert loaded.reply("ppo", "ba", seed=0)


# The terminal and the pipe


def test_lines_of_a_pipe_are_answered_one_by_one_until_it_ends(monkeypatch, capsys, adapter_chain, loaded):
    shown = say(monkeypatch, capsys, adapter_chain / "ppo", "ba be\n\nbi\n")
    want = [
        loaded.reply(name, prompt, seed=seed)[0]
        for seed, prompt in enumerate(("ba be", "bi"))
        for name in ("base", "sft", "ppo")
    ]
    lines = [line for line in shown.splitlines() if line]
    assert [lines[0], lines[7]] == ["> ba be", "> bi"] and len(lines) == 14
    for place, (reply, name, prompt) in enumerate(
        zip(want, ("base", "sft", "ppo") * 2, ("ba be",) * 3 + ("bi",) * 3, strict=True)
    ):
        at = 1 + 2 * place + (place >= 3)
        assert lines[at] == f"{name:6}{prompt}{reply.text}" and lines[at + 1] == f"      ({reply.facts()})"


def test_a_role_says_the_same_whoever_else_is_asked_and_another_seed_says_something_else(
    monkeypatch, capsys, adapter_chain, loaded
):
    alone = say(monkeypatch, capsys, adapter_chain / "ppo", "ba be\n", "--roles", "ppo", "--seed", "5")
    (reply,) = loaded.reply("ppo", "ba be", seed=5)
    assert alone == f"> ba be\nppo  ba be{reply.text}\n     ({reply.facts()})\n\n"
    assert reply != loaded.reply("ppo", "ba be", seed=0)[0]


class Talker:
    """Answers with a count, and notes what it was asked."""

    def __init__(self, chat):
        self.info = RunInfo(None, None, None, {"base": "base", "ppo": "policy"}, None, None, chat, {})
        self.asked = []

    def reply(self, name, prompt, *, seed, write):
        if prompt == "bad":
            raise UserError("too long")
        self.asked.append((name, prompt, seed))
        write("hm")
        return [SampledReply(f"{name} {len(self.asked)}", 1, True, None)]


def turns(*contents):
    return [
        {"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)
    ]


def test_each_role_has_its_own_turns_until_the_conversation_begins_anew():
    talker = Talker(chat=True)
    talk = Conversation(talker, ["base", "ppo"], seed=7, write=lambda text: None)
    for line in ("a", "b", "/new", "c"):
        talk.hear(line)
    assert [prompt for _, prompt, _ in talker.asked] == [
        turns("a"),
        turns("a"),
        turns("a", "base 1", "b"),
        turns("a", "ppo 2", "b"),
        turns("c"),
        turns("c"),
    ]
    assert [seed for *_, seed in talker.asked] == [7, 7, 8, 8, 9, 9]


@pytest.mark.parametrize("where", ["terminal", "page"])
def test_another_sample_takes_the_place_of_the_last_replies_with_another_seed(where):
    talker = Talker(chat=True)
    written = []
    talk = Conversation(talker, ["base", "ppo"], seed=7, write=written.append)
    tab = chat_page.Talk(talker, ["base", "ppo"], seed=7)
    for line in ("a", "b", "/again", "/again", "c"):
        if where == "terminal":
            talk.hear(line)
        else:
            list(tab.again() if line == "/again" else tab.say(line))
    # The second question is asked three times, each time after the first reply alone
    first, *again, last = [ask for ask in talker.asked if ask[0] == "ppo"]
    assert [prompt for _, prompt, _ in again] == [turns("a", "ppo 2", "b")] * 3
    assert [seed for *_, seed in (first, *again, last)] == [7, 8, 9, 10, 11]
    assert last[1] == turns("a", "ppo 2", "b", "ppo 8", "c"), "the last sample is what was said"


def test_another_sample_of_nothing_is_said_and_the_next_line_is_answered():
    written = []
    talk = Conversation(Talker(chat=True), ["ppo"], seed=0, write=written.append)
    talk.hear("/again")
    talk.hear("a")
    talk.hear("/new")
    talk.hear("/again")
    refused = ["nothing was asked" in text for text in written]
    assert refused[0] and refused[-1] and refused.count(True) == 2


def test_a_pipe_can_ask_for_another_sample_of_its_last_line():
    talker = Talker(chat=False)
    talk = Conversation(talker, ["ppo"], seed=0, write=lambda text: None)
    for line in ("a", "/again", "b"):
        talk.hear(line, alone=True)
    assert talker.asked == [("ppo", "a", 0), ("ppo", "a", 1), ("ppo", "b", 2)]


def test_lines_of_a_pipe_are_conversations_of_their_own_and_text_has_no_turns():
    for chat, alone in ((True, True), (False, False)):
        talker = Talker(chat)
        talk = Conversation(talker, ["ppo"], seed=0, write=lambda text: None)
        for line in ("a", "b"):
            talk.hear(line, alone=alone)
        assert [prompt for _, prompt, _ in talker.asked] == ([turns("a"), turns("b")] if chat else ["a", "b"])


def test_what_cannot_be_answered_is_said_and_the_next_line_is_answered():
    written = []
    talk = Conversation(Talker(chat=False), ["ppo"], seed=0, write=written.append)
    talk.hear("bad")
    talk.hear("good")
    assert "".join(written) == "ppo  bad(too long)\n\nppo  goodhm\n     (1 token, ended)\n\n"


# What is found of a run


def test_sft_and_reward_of_a_run_are_those_beside_it_or_its_parents_and_what_is_gone_is_left_out(
    adapter_chain, tmp_path
):
    run = tiny_chain.copy(adapter_chain, tmp_path / "run")
    info = inspect_run(run / "ppo")
    assert (info.reference, info.reward) == (run / "ppo" / "reference", run / "ppo" / "reward") and list(
        info.roles
    ) == ["base", "sft", "ppo"]
    for name in ("reference", "reward"):
        (run / "ppo" / name).rename(tmp_path / name)
    info = inspect_run(run / "ppo")
    assert (info.reference, info.reward) == (run / "sft", run / "reward")
    for name in ("sft", "reward"):
        (run / name).rename(tmp_path / f"{name} of old")
    info = inspect_run(run / "ppo")
    assert (info.reference, info.reward, list(info.roles)) == (None, None, ["base", "ppo"])


def test_adapters_of_a_run_of_the_hub_are_sought_in_its_folders_at_its_commit(adapter_chain, monkeypatch):
    asked, folder = [], adapter_chain / "ppo"
    monkeypatch.setattr(session, "hub_name", lambda folder: "user/repo@abc")
    monkeypatch.setattr(session, "local_folder", lambda name: asked.append(str(name)) or folder)
    session._adapter_of(folder, {}, "reference")
    assert asked == ["user/repo/reference@abc"]


def test_a_run_is_chat_if_it_was_trained_on_chat_messages_and_text_otherwise(adapter_chain, tmp_path):
    rows = {
        "text": {"prompt": "x"},
        "chat": {"prompt": [{"role": "user", "content": "x"}]},
        "ranked": {"completions": ["x", "y"]},
    }
    noted = {kind: fingerprint("n", None, Dataset.from_list([row]))["chat"] for kind, row in rows.items()}
    assert noted == {"text": False, "chat": True, "ranked": False}
    run = tiny_chain.copy(adapter_chain, tmp_path / "run")
    assert inspect_run(run / "ppo").chat is False and inspect_run(run / "ppo").tokenizer.chat_template
    facts = read_lineage(run / "ppo")
    facts["data"][0]["chat"] = True
    write_lineage(run / "ppo", **facts)
    assert inspect_run(run / "ppo").chat is True


def test_a_base_that_has_moved_is_asked_for_and_taken_from_where_it_is_now(
    monkeypatch, capsys, adapter_chain, tmp_path
):
    run = tiny_chain.copy(adapter_chain, tmp_path / "run")
    (run / "base").rename(tmp_path / "moved")
    with pytest.raises(
        ValueError, match=r"the folder .*/run/base, which is neither here nor above .*Say where it is: --base"
    ):
        inspect_run(run / "ppo")
    shown = say(
        monkeypatch, capsys, run / "ppo", "ba\n", "--base", str(tmp_path / "moved"), "--roles", "sft,base"
    )
    assert [line.split()[0] for line in shown.splitlines() if line and line[0] not in "> "] == ["sft", "base"]


# The page


def refuse(monkeypatch, capsys, *words):
    def loads(*args, **kwargs):
        raise AssertionError("the model loads")

    monkeypatch.setattr(session, "load_base", loads)
    monkeypatch.setattr(sys, "argv", ["goose-lora", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    return line


def test_without_gradio_a_page_is_refused_in_one_line_that_says_how_to_install_it(
    monkeypatch, capsys, adapter_chain, tmp_path
):
    monkeypatch.setitem(sys.modules, "gradio", None)
    rows = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompts(2))
    label = ["label", "--policy", adapter_chain / "ppo", "--prompts", rows, "--out", tmp_path / "pairs.jsonl"]
    for words in (["chat", adapter_chain / "ppo", "--serve"], label):
        assert refuse(monkeypatch, capsys, *words).endswith(
            "gradio, which is not installed: pip install goose-lora[web]"
        )
    assert not (tmp_path / "pairs.jsonl").exists()


def test_a_port_that_is_taken_is_refused_before_anything_loads(monkeypatch, capsys, adapter_chain):
    monkeypatch.setattr(gradio_pages, "load_gradio", lambda: None)
    with socket.socket() as other:
        other.bind((gradio_pages.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        said = refuse(monkeypatch, capsys, "chat", adapter_chain / "ppo", "--serve", "--port", port)
    assert f"--port {port} cannot be had on 127.0.0.1: Address already in use. Give another" in said


def test_a_stream_ends_with_the_reply_and_raises_what_went_wrong():
    talker = Talker(chat=False)
    assert list(chat_page.stream(talker, "ppo", "x", seed=0)) == ["hm", SampledReply("ppo 1", 1, True, None)]
    with pytest.raises(ValueError, match="too long"):
        list(chat_page.stream(talker, "ppo", "bad", seed=0))


def test_pages_are_served_on_the_loopback_address_with_nothing_shared_recorded_or_reported():
    given = {}
    page = SimpleNamespace(
        launch=lambda **options: given.update(options) or (None, "http://127.0.0.1:1/", None)
    )
    address, _, key = gradio_pages.open_page(page, port=None).partition("?key=")
    assert address == "http://127.0.0.1:1/" and len(key) == 32
    off = ("share", "run_history", "enable_monitoring", "mcp_server", "ssr_mode", "pwa", "inbrowser")
    assert given["server_name"] == "127.0.0.1" and [given[name] for name in off] == [False] * 7


# What the documentation says


@pytest.mark.parametrize("name", ["trying", "labeling"])
def test_commands_in_the_documentation_of_chat_and_label_are_ones_that_the_parsers_take(name, monkeypatch):
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]
    taken = []
    monkeypatch.setattr(
        commands,
        "COMMANDS",
        {command: lambda arguments: taken.append(arguments.command) for command in commands.COMMANDS},
    )
    for line in lines:
        words = shlex.split(line.rpartition("| ")[2])
        monkeypatch.setattr(sys, "argv", words)
        if words[0] == "goose-lora":
            commands._main()
        elif words[0] == "python":
            recipe, _, config, *options = words[1:]
            known = {field.name for kind in TYPES[recipe] for field in fields(kind)}
            assert (
                (ROOT / recipe).is_file()
                and (ROOT / config).is_file()
                and {word[2:] for word in options[::2]} <= known
            )
        else:
            assert words[:2] == ["pip", "install"] and words[2] in ("goose-lora[web]", "goose-lora[judge]")
    assert len(taken) == len([line for line in lines if "goose-lora " in line]) >= 2


def test_a_line_in_another_encoding_than_the_consoles_is_told_with_the_way_out():
    lines = readable(io.TextIOWrapper(io.BytesIO("ba\n你好\n".encode()), encoding="ascii"))
    with pytest.raises(UserError, match=r"stdin: is not ascii.*PYTHONIOENCODING=utf-8"):
        list(lines)
