"""The tries of the field, to the token: what a stage trains on, and that ``goose-lora data`` shows
just that.

The texts that are expected are written by a function of this file, not by a template.
"""

import json

import pytest
import tiny
from field_rows import REFUSED, SHAPES
from recipe_runs import recipe
from trl import RewardConfig, SFTConfig

from goose_lora import cli
from goose_lora.data import report
from goose_lora.data.preferences import tokenize_rankings
from goose_lora.data.rows import DataArguments
from goose_lora.ppo.config import PPOConfig

END = "<end>"
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m['role'] }}>"
    "{{ m['content'] }}{% for call in m['tool_calls'] or [] %}<call>{{ call['function'] | tojson }}"
    "{% endfor %}<end>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.letters(TEMPLATE, eos_token=END).save_pretrained(folder)
    return str(folder)


def chat(messages, tools=None, *, asks=False):
    """What the template writes, by hand."""
    text = f"<tools>{json.dumps(tools)}" if tools else ""
    for message in messages:
        calls = [f"<call>{json.dumps(call['function'])}" for call in message.get("tool_calls", [])]
        text += f"<{message['role']}>{message['content']}{''.join(calls)}<end>\n"
    return text + "<assistant>" * asks


def together(prompt, reply, tools=None):
    """Prompt and reply as the reward model sees them: they end where replies end."""
    if isinstance(prompt, str):
        return prompt + reply + END
    return chat([*prompt, *reply], tools).removesuffix("\n")


def expected(stage, read):
    """A row as it is trained on: pieces of SFT with whether they are learned; replies with ranks;
    or the prompt."""
    if stage == "ppo":
        return read if isinstance(read, str) else chat(read, asks=True)
    tools = read.get("tools")
    if stage == "reward":
        replies = read.get("completions") or [read["chosen"], read["rejected"]]
        ranks = read.get("ranks", [1, 2])
        return sorted(
            (rank, together(read["prompt"], reply, tools)) for rank, reply in zip(ranks, replies, strict=True)
        )
    if "text" in read:
        return [(True, read["text"] + END)]
    if "messages" in read:
        return [(True, chat(read["messages"], tools))]
    prompt, reply = read["prompt"], read["completion"]
    if isinstance(prompt, str):
        return [(False, prompt), (True, reply + END)]
    before, whole = chat(prompt, tools, asks=True), chat([*prompt, *reply], tools)
    return [(False, before), (True, whole.removeprefix(before))]


def runs(ids, labels, decode):
    """Tokens and labels as pieces of text, each with whether it is learned."""
    pieces = []
    for token, label in zip(ids, labels, strict=True):
        if not pieces or pieces[-1][0] != (label != -100):
            pieces.append((label != -100, []))
        pieces[-1][1].append(token)
    return [(learned, decode(part)) for learned, part in pieces]


def trained_on(stage, path, tokenizer, folder, **settings):
    """The rows that the stage's own dataset holds, decoded."""
    kinds = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}
    own = {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "bf16": False}
    if stage == "ppo":
        own |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_mini_batches": 1}
    data_kind = recipe("reward").RewardArguments if stage == "reward" else DataArguments
    data = data_kind(path, **settings)
    run = cli.Stage(stage, kinds[stage](**own), tiny.arguments(tokenizer), data)
    words = run.tokenizer()

    def decode(ids):
        return words.decode(ids, skip_special_tokens=False)

    if stage == "sft":
        rows = run.demonstrations()["train"]
        return [runs(row["input_ids"], row["labels"], decode) for row in rows]
    if stage == "ppo":
        return [decode(ids) for ids in run.prompts().train["input_ids"]]
    row_set = data.used(data.train("reward"))
    lists = tokenize_rankings(
        row_set.rows, words, name=path, max_length=run.config.max_length, numbers=row_set.numbers
    )
    return [list(zip(row["ranks"], map(decode, row["completion_ids"]), strict=True)) for row in lists]


def shown(stage, path, tokenizer, monkeypatch, **settings):
    """The rows that ``goose-lora data`` shows, in the same form."""
    seen = []
    monkeypatch.setattr(report, "_row_lines", lambda number, parts, width: seen.append(parts) or [])
    text = report.describe(path, stage=stage, tokenizer=tokenizer, **settings)
    if stage == "ppo":
        return [part.text for (part,) in seen]
    rows = []
    for parts in seen:
        before = "".join(part.text for part in parts if part.label == "prompt")
        replies = [part for part in parts if part.label != "prompt"]
        if stage == "reward":
            ranks = {"chosen": 1, "rejected": 2}
            rows.append(
                [
                    (ranks.get(part.label) or int(part.label.rpartition("rank ")[2]), before + part.text)
                    for part in replies
                ]
            )
        else:
            pieces = [(False, before)] if before else []
            pieces += [(part.label != "read only", part.text) for part in replies]
            if "the loss is on all of it" in text:
                pieces = [(True, "".join(piece for _, piece in pieces))]
            rows.append(pieces)
    return rows


@pytest.mark.parametrize(("name", "stage", "row", "read"), SHAPES, ids=[shape[0] for shape in SHAPES])
def test_a_try_of_the_field_is_trained_on_as_its_columns_say_and_shown_so(
    name, stage, row, read, tokenizer, tmp_path, monkeypatch
):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [row, row])
    trained = trained_on(stage, path, tokenizer, tmp_path / "out")
    assert trained == [expected(stage, read)] * 2
    assert shown(stage, path, tokenizer, monkeypatch) == trained


@pytest.mark.parametrize(("name", "stage", "row", "way_out"), REFUSED, ids=[each[0] for each in REFUSED])
def test_what_is_not_understood_is_refused_alike_with_what_to_do(
    name, stage, row, way_out, tokenizer, tmp_path, monkeypatch
):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [row, row])
    with pytest.raises(ValueError, match="looks like") as by_stage:
        trained_on(stage, path, tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match="looks like") as by_data:
        shown(stage, path, tokenizer, monkeypatch)
    assert str(by_stage.value) == str(by_data.value) and way_out in str(by_stage.value)


LONG = "a" * 1100
CUTS = [
    ("sft", [{"text": LONG}, {"prompt": "b", "completion": "c"}][:1]),
    ("sft", [{"prompt": LONG, "completion": " c"}, {"prompt": "b", "completion": LONG}]),
    ("reward", [{"prompt": "b", "completions": ["c", LONG, "d"], "ranks": [2, 1, 3]}]),
    (
        "reward",
        [{"prompt": "b", "chosen": "c", "rejected": LONG}, {"prompt": "b", "chosen": "c", "rejected": "d"}],
    ),
    ("ppo", [{"prompt": LONG}, {"prompt": "b"}, {"prompt": "a" * 600}]),
]


@pytest.mark.parametrize(("stage", "rows"), CUTS)
def test_data_cuts_and_leaves_out_where_the_recipes_settings_do(
    stage, rows, tokenizer, tmp_path, monkeypatch
):
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    trained = trained_on(stage, path, tokenizer, tmp_path / "out")
    assert trained and shown(stage, path, tokenizer, monkeypatch) == trained


def test_the_limits_of_data_are_those_of_the_recipes():
    assert {
        "sft": SFTConfig.max_length,
        "reward": RewardConfig.max_length,
        "ppo": PPOConfig.max_prompt_tokens,
    } == report.RECIPE_LIMITS


def test_the_tries_are_those_of_the_field():
    tries = {(name, stage) for name, stage, *_ in SHAPES}
    assert len(tries) == len(SHAPES) >= 70 and len(REFUSED) == 3


BROKEN = [
    ("reward", {"margin": None}, r"row 4: margin is None"),
    (
        "reward",
        {"chosen": [tiny.assistant("ba") | {"reasoning_content": "hm"}]},
        r"row 4: .* reasoning_content",
    ),
    ("ppo", {"prompt": [tiny.user("ba"), tiny.assistant("b")]}, r"row 4: "),
]


@pytest.mark.parametrize(("stage", "change", "message"), BROKEN)
def test_a_broken_row_is_named_by_its_number_in_the_file_by_stage_and_data(
    stage, change, message, tokenizer, tmp_path, monkeypatch
):
    good = {"prompt": [tiny.user("ba")], "chosen": [tiny.assistant("a")], "rejected": [tiny.assistant("b")]}
    rows = [{**good, "prompt": None}, good, {**good, "rejected": good["chosen"]}, {**good, **change}]
    rows = [{"margin": 1.0, **row} for row in rows]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    for look in (
        lambda: trained_on(stage, path, tokenizer, tmp_path / "out"),
        lambda: shown(stage, path, tokenizer, monkeypatch),
    ):
        with pytest.raises(ValueError, match=message):
            look()
