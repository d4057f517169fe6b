"""goose-lora verdict: adapters, ensembles and classifiers of any origin, against transformers' and
PEFT's own scores."""

import json
import shutil

import pytest
import reward_runs
import tiny
import torch
from peft import AutoPeftModelForSequenceClassification
from recipe_runs import recipe
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from goose_lora.cli.commands import COMMANDS, command_line
from goose_lora.cli.reward_verdict import judged_model
from goose_lora.errors import UserError
from goose_lora.files import read_json

BEST_OF = [
    {
        "prompt": f"ba de fi {tiny.WORDS[place]}",
        "chosen": [f"good {tiny.WORDS[place + 3]}", "good good"][: 1 + place % 2],
        "rejected": [f"bad {tiny.WORDS[place + 5]}", "bad lo lo", "ku"],
        "num_correct": 1 + place % 2,
        "subset": "Ties" if place % 2 else "Focus",
    }
    for place in range(10)
]


def run(*words):
    arguments = command_line().parse_args(["verdict", *map(str, words)])
    COMMANDS["verdict"](arguments)


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    recipe("reward").main(reward_runs.settings(folder))
    return folder


def classifier(folder, tokenizer):
    """A foreign classifier: its own weights, and a tokenizer with a template."""
    torch.manual_seed(3)
    shape = tiny.ARCHITECTURES["llama"] | {"vocab_size": len(tokenizer), "num_labels": 1}
    config = AutoConfig.for_model("llama", **shape)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def own_logits(folder, texts, **how):
    """Transformers' own, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt", **how)).logits.item() for text in texts]


def test_a_foreign_classifiers_figures_are_those_of_transformers_own_logits(tmp_path, capsys):
    folder = classifier(tmp_path / "model", tiny.chat_tokenizer())
    rows = tiny.write_rows(tmp_path / "rows.jsonl", BEST_OF)
    run(folder, "--dataset", rows, "--output_dir", tmp_path / "out")
    found = read_json(tmp_path / "out" / "verdict.json")

    # By hand: its template around each conversation, and who is on top
    tokenizer, right, pairs = AutoTokenizer.from_pretrained(folder), {"Ties": [], "Focus": []}, []
    for row in BEST_OF:
        turns = [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": reply}]
            for reply in row["chosen"] + row["rejected"]
        ]
        texts = [tokenizer.apply_chat_template(each, tokenize=False) for each in turns]
        scores = own_logits(folder, texts, add_special_tokens=False)
        good, bad = scores[: len(row["chosen"])], scores[len(row["chosen"]) :]
        right[row["subset"]].append(max(good) > max(bad))
        pairs += [one > other for one in good for other in bad]
    assert found["accuracy"] == pytest.approx(sum(pairs) / len(pairs))
    for name, own in right.items():
        assert found["subsets"][name]["best_of_n"] == pytest.approx(sum(own) / len(own))
    said = capsys.readouterr().out
    assert "mean of subsets" in said and "flattering reply" in said and "best of N" in said


def test_rows_without_a_subset_count_among_all_and_in_none(tmp_path, caplog):
    folder = classifier(tmp_path / "model", tiny.chat_tokenizer())
    changed = [BEST_OF[0] | {"subset": None}, BEST_OF[1] | {"subset": ""}, *BEST_OF[2:]]
    rows = tiny.write_rows(tmp_path / "rows.jsonl", changed)
    run(folder, "--dataset", rows, "--output_dir", tmp_path / "out")
    found = read_json(tmp_path / "out" / "verdict.json")
    assert {name: each["prompts"] for name, each in found["subsets"].items()} == {
        name: sum(row["subset"] == name for row in changed) for name in ("Focus", "Ties")
    }
    assert f"2 of {len(changed)} rows have no subset: they count among all, and in no subset" in caplog.text


def test_a_foreign_classifiers_scores_are_its_logits_in_batches_of_any_length(tmp_path):
    folder = classifier(tmp_path / "model", tiny.tokenizer())
    judged = judged_model(folder, base=None, quantization=None, dtype=None, batch_size=3)
    texts = [f"{row['prompt']} {reply}" for row in BEST_OF for reply in row["rejected"]]
    judged.load(None)
    got = judged.scores([judged.encode(None, text) for text in texts])[0]
    assert got == pytest.approx(own_logits(folder, texts), abs=1e-5)


def test_members_scores_are_those_of_pefts_own_reload_less_their_bias(reward):
    judged = judged_model(str(reward / "reward"), base=None, quantization=None, dtype=None, batch_size=5)
    rows = [(row["prompt"], row["chosen"]) for row in tiny.preferences(9)]
    texts = [judged.encode(prompt, reply) for prompt, reply in rows]

    class Held:
        def texts(self):
            return texts

    judged.load(Held())
    got = judged.scores(texts)
    for place, own in enumerate(got):
        folder = reward / "reward" / f"member_{place}"
        model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
        model.config.pad_token_id = 0
        with torch.no_grad():
            want = [model(input_ids=torch.tensor([ids])).logits.item() for ids in texts]
        assert own == pytest.approx(want, abs=1e-4)


def test_an_ensemble_is_judged_as_its_own_run_judged_it(reward, tmp_path, capsys):
    run(reward / "reward", "--dataset", reward / "held.jsonl", "--output_dir", tmp_path)
    found, own = read_json(tmp_path / "verdict.json"), read_json(reward / "reward" / "verdict.json")
    for name in ("accuracy", "accuracy_ci", "length_correlation", "score_mean", "margin_mean"):
        assert found[name] == pytest.approx(own[name], abs=1e-4), name
    for kind in ("members", "aggregations"):
        assert found[kind].keys() == own[kind].keys()
        for name, figures in own[kind].items():
            assert found[kind][name]["accuracy"] == figures["accuracy"]
    assert {probe: said["beats_chosen"] for probe, said in found["probes"].items()} == {
        probe: said["beats_chosen"] for probe, said in own["probes"].items()
    }
    said = capsys.readouterr().out
    assert "mean_minus_std: accuracy" in said and "members apart" in said


def test_a_classifier_is_named_as_in_ppo_and_an_adapters_base_must_be_its_own(reward, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    how = {"quantization": None, "dtype": None, "batch_size": 3}
    torch.manual_seed(3)
    shape = tiny.ARCHITECTURES["llama"] | {"vocab_size": len(tiny.tokenizer()), "num_labels": 2}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("llama", **shape))
    model.save_pretrained("a/b/two")
    tiny.tokenizer().save_pretrained("a/b/two")
    with pytest.raises(UserError, match=r"Name one of them: model:a/b/two#LABEL_0"):
        judged_model("a/b/two", base=None, **how)
    for name in ("model:a/b/two#LABEL_1", "a/b/two#LABEL_1"):
        assert judged_model(name, base=None, **how).classifier.output == 1
    # the same base elsewhere, and another of its shape
    shutil.copytree(reward / "base", "moved")
    assert judged_model(str(reward / "reward"), base="moved", **how).arguments.model_name_or_path == "moved"
    tiny.save_base("other", seed=5)
    with pytest.raises(UserError, match=r"--base other: .* was trained on .*, whose weights are others"):
        judged_model(str(reward / "reward"), base="other", **how)


def test_one_member_is_judged_alone(reward, tmp_path):
    run(reward / "reward" / "member_1", "--dataset", reward / "held.jsonl", "--output_dir", tmp_path)
    found, own = (read_json(path / "verdict.json") for path in (tmp_path, reward / "reward" / "member_1"))
    assert found["accuracy"] == own["accuracy"] and "members" not in found


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--subset", "nothing"], "has no such column"),
        (["--max_rows", "0"], "must be 1 or more"),
        (["--base", "base"], "is no adapter"),
        (["--split", "validation"], "has no splits"),
        (["--output_dir", "."], "is there already"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_weights_are_read(tmp_path, monkeypatch, words, says):
    folder = classifier(tmp_path / "model", tiny.tokenizer())
    (tmp_path / "verdict.json").write_text(json.dumps({}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        AutoModelForSequenceClassification, "from_pretrained", lambda *args, **kwargs: pytest.fail("read")
    )
    rows = tiny.write_rows(tmp_path / "rows.jsonl", BEST_OF)
    with pytest.raises(UserError, match=says) as error:
        run(folder, "--dataset", rows, *words)
    assert "\n" not in str(error.value)


def test_a_policy_is_no_reward_model(tmp_path):
    tiny.save_base(tmp_path / "base")
    with pytest.raises(UserError, match="a reward model is a sequence classifier"):
        run(tmp_path / "base", "--dataset", tiny.write_rows(tmp_path / "rows.jsonl", BEST_OF))
