"""The model card: metadata that the Hub takes, and no number that the run did not measure."""

import shlex
from pathlib import Path

import pytest
import tiny_chain
from cards import unexplained
from huggingface_hub import ModelCard
from peft import PeftModel

from goose_lora.files import read_json
from goose_lora.models.folders import read_lineage, write_lineage
from goose_lora.models.loading import load_base, load_tokenizer
from goose_lora.reporting import figures
from goose_lora.sharing import lineage, model_card

EVALUATION = {
    "prompts": 200,
    "dataset": "org/prompts",
    "against": "sft",
    "figures": {
        "base": {
            "score": -1.23456,
            "score_ci": [-1.5, -0.98765],
            "kl": 3.25,
            "tokens": 19.75,
            "ended": 0.4125,
            "distinct_2": 0.93215,
        },
        "sft": {
            "score": 0.0123456,
            "score_ci": [-0.1, 0.12],
            "kl": 0.0,
            "tokens": 18.5,
            "ended": 0.5,
            "distinct_2": 0.925,
        },
        "ppo": {
            "score": 1.87654,
            "score_ci": [1.5, 2.25],
            "kl": 8.5125,
            "tokens": 11.0,
            "ended": 0.955,
            "distinct_2": 0.888,
        }
        | {"score_win_rate": 0.9345, "score_win_rate_ci": [0.8912, 0.9612]},
    },
}
REPLIES = [
    {"prompt": f"word {k}", "base": "<b>x</b> | y", "sft": "a *star*", "ppo": "good\n```\nend"}
    for k in (3, 5)
]


@pytest.fixture
def run(adapter_chain, tmp_path):
    return tiny_chain.copy(adapter_chain, tmp_path / "run")


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_every_number_of_a_card_stands_in_the_runs_files(run, stage):
    if stage == "ppo":
        model_card.add_evaluation(run / "ppo", EVALUATION, REPLIES)
    text = (run / stage / "README.md").read_text()
    assert unexplained(run / stage, text) == []
    assert unexplained(run / stage, text + " 0.77123 ") == ["0.77123"], (
        "the search must see a number that nobody measured"
    )


def test_the_metadata_is_what_the_hub_reads(run):
    for stage in ("sft", "ppo"):
        noted = read_lineage(run / stage)
        write_lineage(
            run / stage, **(noted | {"base": noted["base"] | {"hub_id": "org/base", "licence": "mit"}})
        )
        model_card.write_card(run / stage)
    model_card.add_evaluation(run / "ppo", EVALUATION, REPLIES)
    data = ModelCard.load(run / "ppo" / "README.md").data
    assert (data.base_model, data.library_name, data.license, data.datasets) == (
        "org/base",
        "peft",
        "mit",
        ["tiny/prompts"],
    )
    assert data.pipeline_tag == "text-generation" and {"lora", "ppo", "rlhf"} <= set(data.tags)
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {
        key: value for key, value in EVALUATION["figures"]["ppo"].items() if key in figures.MEASURES
    }
    assert {result.dataset_name for result in data.eval_results} == {"org/prompts"}
    assert ModelCard.load(run / "sft" / "README.md").data.eval_results is None, (
        "nothing measured, nothing claimed"
    )


def test_what_is_not_known_is_left_out_of_the_metadata(run):
    data = ModelCard.load(run / "ppo" / "README.md").data
    assert data.license is None and data.base_model is None, "the base is a folder, without a card"


def test_the_base_licence_is_taken_from_its_own_card(run):
    (run / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    args = tiny_chain.arguments(str(run / "base"))
    assert (
        lineage.record(run / "sft", "sft", model=args, tokenizer=None, figures={})["base"]["licence"]
        == "apache-2.0"
    )


def test_the_card_of_a_policy_tells_its_making_figures_and_limits(run):
    model_card.add_evaluation(run / "ppo", EVALUATION, REPLIES)
    text = (run / "ppo" / "README.md").read_text()
    for line in (
        "| ppo | 1.877 (1.5 to 2.25) | 8.512 |",
        "| sft | loss 2.345, steps 40 | 7.5 | 1.25 |",
        "recipes/reward.py --config x.yaml",
        "right on 0.8125 (0.5625 to 0.9375) of 16 held-out pairs",
        "empty reply: score 1.5 on average",
        "![score, KL, critic loss and reply length over the run](curves.png)",
        "- In training: look  kl  0.5",
        "Win rates are against sft",
        "PeftModel.from_pretrained",
    ):
        assert line in text, line


def test_replies_cannot_break_the_table_of_samples(run):
    model_card.add_evaluation(run / "ppo", EVALUATION, REPLIES)
    text = (run / "ppo" / "README.md").read_text()
    assert "| word 3 | &lt;b&gt;x&lt;/b&gt; \\| y | a \\*star\\* | good \\`\\`\\` end |" in text


def test_a_policy_that_was_not_evaluated_shows_samples_of_training(run):
    text = (run / "ppo" / "README.md").read_text()
    assert "recipes/evaluate.py has not been run on it." in text and "good \\| ba | 0.375 |" in text


def test_peft_does_not_keep_its_own_card_in_place_of_ours(run):
    base = load_base(
        tiny_chain.arguments(str(run / "base")), load_tokenizer(tiny_chain.arguments(str(run / "base")))
    )
    ours = (run / "sft" / "README.md").read_text()
    PeftModel.from_pretrained(base, run / "sft").save_pretrained(run / "sft")
    assert (run / "sft" / "README.md").read_text() != ours, "PEFT writes into a card that it finds"
    model_card.refresh_card(run / "sft")
    assert (run / "sft" / "README.md").read_text() == ours


def test_a_card_that_someone_took_over_is_left_alone(run):
    path = run / "ppo" / "README.md"
    path.write_text(path.read_text().replace(model_card.MARK, "My own words."))
    model_card.add_evaluation(run / "ppo", EVALUATION, REPLIES)
    assert "My own words." in path.read_text() and "8.512" not in path.read_text()
    assert read_json(run / "ppo" / "evaluation.json")["samples"] == REPLIES


def test_an_evaluation_writes_nothing_beside_an_adapter_of_other_origin_or_in_the_hubs_cache(tmp_path):
    model_card.add_evaluation(tmp_path, EVALUATION, REPLIES)
    assert list(tmp_path.iterdir()) == []
    cached = tmp_path / "models--ann--result" / "snapshots" / ("a" * 40)
    cached.mkdir(parents=True)
    write_lineage(cached, stage="ppo")
    model_card.add_evaluation(cached, EVALUATION, REPLIES)
    assert [path.name for path in cached.iterdir()] == ["goose_lora.json"]
    assert lineage.hub_name(cached / "reward") == f"ann/result/reward@{'a' * 40}"


def test_parents_of_other_origin_have_no_history_to_tell(run):
    """Adapters that were trained elsewhere, or before there was lineage, have an empty one or a
    short note."""
    noted = read_lineage(run / "ppo")
    for role, facts in zip(noted["parents"], ({}, {"append_eos": False}), strict=False):
        noted["parents"][role]["lineage"] = facts
    assert len(noted["parents"]) == 2
    write_lineage(run / "ppo", **noted)
    text = model_card.render_card(run / "ppo")
    assert not unexplained(run / "ppo", text)
    assert "recipes/ppo.py" in text and "recipes/sft.py" not in text


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_card_says_nothing_of_where_things_lie_on_this_machine(run, stage):
    noted = read_lineage(run / stage)
    words = ["recipes/ppo.py", "--config", "/home/ann/my own/p.yaml", f"--dataset_name={run}/rows.jsonl"]
    words += ["--reward_function", f"{run}/words.py:brief", "hf://org/model", "--seed", "0"]
    noted["command"] = shlex.join(words)
    write_lineage(run / stage, **noted)
    evaluation = {**EVALUATION, "judge": f"{run}/judges.py:kind"}
    if stage == "ppo":
        model_card.add_evaluation(run / stage, evaluation, REPLIES)
    text = model_card.render_card(run / stage)
    assert str(run) not in text and "/home/ann" not in text and str(Path.home()) not in text
    assert "recipes/ppo.py --config p.yaml --dataset_name=rows.jsonl" in text
    assert "--reward_function words.py:brief hf://org/model --seed 0" in text
    assert f'from_pretrained(base, "{stage}")' in text and 'from_pretrained("base"' in text
    assert f"where `{stage}` and `base` can be found" in text
    assert ("The judge is `judges.py:kind`" in text) == (stage == "ppo")


def test_the_code_of_a_card_runs_where_the_named_folders_are(run, monkeypatch):
    monkeypatch.chdir(run)
    code = model_card.render_card(run / "sft").split("```python")[1].split("```")[0]
    found: dict = {}
    exec(code, found)
    assert found["model"].peft_config["default"].r == 3


def test_a_folder_with_an_at_in_its_name_has_a_card(run):
    (run / "sft").rename(run / "sft@home")
    assert '"sft@home"' in model_card.render_card(run / "sft@home")
