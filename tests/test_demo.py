"""The embedded data, from made-up ratings; nothing is fetched here."""

import random

import pytest

from goose_lora import demo
from goose_lora.demo import Rating


def ratings(count=600):
    rng = random.Random(0)
    openings = ["The film", "A story", "It is", "This one", "Some actors"]
    words = [f"word{i}" for i in range(50)]
    return [Rating(f"{rng.choice(openings)} {' '.join(rng.choices(words, k=8))} {i}", round(rng.uniform(-4, 4), 2)) for i in range(count)]


def sentences(rows):
    return {row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")}


def test_nothing_is_shared_between_training_and_held_out_sentences():
    data = demo.datasets_from(ratings())
    train = {row["text"] for row in data["sft"]} | sentences(data["preferences"])
    held_out = sentences(data["preferences-test"]) | sentences(data["random-pairs-test"])
    assert len(train) > 100 and len(held_out) > 50
    assert not train & held_out


def test_each_sentence_is_in_at_most_one_pair_and_pairs_begin_alike_and_differ():
    source = {rating.text: rating.mean for rating in ratings()}
    pairs = demo.preference_pairs(ratings(), random.Random(0))
    assert len(pairs) > 100
    assert len(sentences(pairs)) == 2 * len(pairs)
    for pair in pairs:
        high, low = source[pair["prompt"] + pair["chosen"]], source[pair["prompt"] + pair["rejected"]]
        assert high - low == pytest.approx(pair["margin"], abs=1e-3) and pair["margin"] >= 1


def test_the_data_are_the_same_each_time():
    assert demo.datasets_from(ratings()) == demo.datasets_from(ratings())


def test_training_sentences_are_short_and_prompts_have_one_to_three_words():
    long = [Rating(" ".join(["word"] * 40) + f" {i}", 0.0) for i in range(100)]
    data = demo.datasets_from([*ratings(), *long])
    assert max(len(row["text"].split()) for row in data["sft"]) <= demo.MAX_TRAIN_WORDS
    assert {len(row["prompt"].split()) for row in data["prompts"]} == {1, 2, 3}


def test_an_unknown_embedded_name_lists_those_there_are():
    with pytest.raises(ValueError, match=r"no such embedded data. There are embedded/sft, embedded/preferences"):
        demo.resolve("embedded/nothing")


def test_other_names_are_left_alone():
    assert demo.resolve("Qwen/Qwen3-1.7B") == "Qwen/Qwen3-1.7B"


def test_a_package_with_another_checksum_is_refused_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("GOOSE_LORA_CACHE", str(tmp_path))

    def arrive(command, **kwargs):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/thing.whl", "w") as file:
            file.write("something else")
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(demo.subprocess, "run", arrive)
    with pytest.raises(ValueError, match="sha256"):
        demo.fetch(demo.Package("thing==1", "thing.whl", "0" * 64))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_fetch_that_fails_says_what_pip_said(tmp_path, monkeypatch):
    monkeypatch.setenv("GOOSE_LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(demo.subprocess, "run", lambda *a, **k: type("Done", (), {"returncode": 1, "stderr": "warning\nERROR: no network"}))
    with pytest.raises(ValueError, match=r"could not fetch thing==1 .*ERROR: no network"):
        demo.fetch(demo.Package("thing==1", "thing.whl", "0" * 64))


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path):
    def fill(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo._make(tmp_path / "model", fill)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("fast", "stage", "options"), [
    (True, "sft", []),
    (False, "sft", ["--dtype", "float32", "--bf16", "false"]),
    (False, "reward", ["--dtype", "float32", "--bf16", "false"]),
    (False, "ppo", ["--dtype", "float32"]),
    (False, "evaluation", ["--dtype", "float32"]),
])  # fmt: skip
def test_on_a_cpu_without_bfloat16_the_demo_runs_in_float32(fast, stage, options, monkeypatch):
    monkeypatch.setattr("goose_lora.loading.cpu_multiplies_bf16", lambda: fast)
    assert demo._slow_bf16_options(stage) == options
