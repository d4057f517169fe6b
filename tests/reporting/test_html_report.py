"""report.html: what stands in it is the run's, and nothing in it comes from elsewhere."""

import hand_made
import pytest
import tiny_runs
from transformers import TrainingArguments

import goose_lora.cli.stage as cli_stage
from goose_lora.data.rows import DataArguments
from goose_lora.files import read_jsonl, write_json
from goose_lora.models.arguments import ModelArguments
from goose_lora.reporting import html_report
from goose_lora.reporting.diagnosis import diagnose
from goose_lora.reporting.figures import rounded, two_decimals


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The page of a hand-made run with everything, as text and as a reader has it."""
    folder = hand_made.write(tmp_path_factory.mktemp("page") / "a-run", evaluation=hand_made.EVALUATION)
    html_report.write_report(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, hand_made.Page(text)


def test_every_tag_of_the_page_of_a_hand_made_run_is_closed_and_it_has_its_sections(shown):
    text, read = shown
    assert text.startswith("<!DOCTYPE html>") and read.tags.count("h2") == 8 and "a-run" in read.text
    for spoilt in (text.replace("</tbody>", "", 1), text + "<p>"):
        with pytest.raises(AssertionError):
            hand_made.Page(spoilt)


def test_nothing_in_the_page_of_a_hand_made_run_is_loaded_from_elsewhere(shown):
    text, read = shown
    assert read.links and all(link.startswith("data:image/png;base64,") for link in read.links)
    assert not {"script", "link", "iframe", "object", "form"} & set(read.tags)
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text


def test_curves_and_frontier_of_a_hand_made_run_are_pictures(shown):
    pictures = shown[1].pictures()
    assert len(pictures) == 2
    for picture in pictures:
        assert picture.format == "PNG" and picture.size > (400, 300)
        assert len(set(picture.convert("RGB").tobytes())) > 20, "an empty picture"


def test_numbers_of_the_page_are_those_of_the_hand_made_metrics(shown):
    rows = hand_made.rows()[:-1]
    assert ["", "step 4", "step 28", "step 48"] in shown[1].rows
    for name in html_report.HEADLINE:
        if name in rows[0]:
            assert shown[1].row(name) == [rounded(rows[index][name]) for index in (0, 6, 11)], name
    assert shown[1].row("loss/value") == ["1", "0.1429", "0.08333"], "in the table of all that was logged"


def test_the_page_of_a_hand_made_run_has_each_finding_of_the_diagnosis(shown):
    findings = diagnose(hand_made.rows())
    assert len(findings) > 3
    for finding in findings:
        assert [finding.level, finding.name, finding.text] in shown[1].rows


def test_samples_of_a_hand_made_run_are_those_of_its_first_middle_and_last_step(shown):
    replies = [row[1] for row in shown[1].rows if len(row) == 4 and "a reply" in row[1]]
    assert replies == [f"a reply at {step}" for step in (0, 8, 16) for _ in range(2)]


def test_settings_verdict_and_evaluation_of_a_hand_made_run_stand_on_its_page(shown):
    read = shown[1]
    assert read.row("learning_rate") == ["0.0123"]
    assert (
        "runs/reward is right on 0.8125 (95 % interval 0.5625 to 0.9375) of 16 held-out pairs." in read.text
    )
    assert "empty reply: score <1.5> on average" in read.text
    assert ["", "sft", "ppo"] in read.rows and read.row("tokens") == ["18.50", "11.25"]
    assert read.row("score of the reward model") == ["0.01 (-0.10 to 0.12)", "1.88 (1.50 to 2.25)"]
    assert "77 prompts of org/prompts" in read.text


def test_markup_in_hand_made_samples_settings_and_names_is_shown_and_not_run(tmp_path):
    script = "<script>alert('x')</script><img src=http://example.org/x.png>"
    lines = hand_made.samples(steps=(0,), text=script)
    noted = hand_made.lineage(reward_function=[script])
    html_report.write_report(
        hand_made.write(tmp_path / "run<b>", lines=lines, noted=noted, metrics=NO_ROLLOUT)
    )
    text = (tmp_path / "run<b>" / "report.html").read_text(encoding="utf-8")
    read = hand_made.Page(text)
    assert "<script" not in text and "&lt;script&gt;alert(" in text and "b" not in read.tags
    assert (
        any(row[1].startswith(script) for row in read.rows if len(row) == 4)
        and script in read.row("reward_function")[0]
    )
    assert read.links == []


NO_ROLLOUT = [{"step": 1, "train_runtime": 1.0}]  # no pictures, which take a second


def test_a_hand_made_run_without_rollouts_samples_lineage_or_verdict_says_so(tmp_path):
    folder = hand_made.write(tmp_path / "run", metrics=NO_ROLLOUT)
    for name in ("samples.jsonl", "goose_lora.json"):
        (folder / name).unlink()
    read = hand_made.Page(html_report.render_report(folder))
    for words in (
        "No rollout was logged",
        "None were written",
        "there is no goose_lora.json",
        "is not known",
        "has not been run on it",
    ):
        assert words in read.text
    assert read.pictures() == []


def test_the_evaluation_of_a_hand_made_run_comes_on_its_page_when_it_is_made_and_on_no_other(tmp_path):
    folder = hand_made.write(tmp_path / "run", metrics=NO_ROLLOUT)
    html_report.refresh_report(folder)
    assert not (folder / "report.html").exists(), "an adapter of other origin gets no page"
    html_report.write_report(folder)
    write_json(folder / "evaluation.json", hand_made.EVALUATION)
    html_report.refresh_report(folder)
    assert "1.88 (1.50 to 2.25)" in (folder / "report.html").read_text(encoding="utf-8")
    write_json(folder / "evaluation.json", {"prompts": 3})
    with pytest.raises(ValueError, match=r"evaluation\.json: no figures of recipes/evaluate\.py"):
        html_report.refresh_report(folder)


@pytest.mark.parametrize(("stage", "has_page"), [("ppo", True), ("own_loop", True), ("sft", False)])
def test_what_ends_a_stage_of_ppo_writes_the_page_before_it_says_that_the_stage_is_whole(
    tmp_path, monkeypatch, stage, has_page
):
    folder, order = hand_made.write(tmp_path / "run", noted={}, metrics=NO_ROLLOUT), []
    monkeypatch.setattr(cli_stage.lineage, "record", lambda *args, **kwargs: order.append("lineage"))
    monkeypatch.setattr(cli_stage.model_card, "write_card", lambda folder: order.append("card"))
    monkeypatch.setattr(
        cli_stage,
        "write_stage",
        lambda *args: order.append(f"whole, page {(folder / 'report.html').is_file()}"),
    )
    monkeypatch.setattr(cli_stage.hub, "push_result", lambda *args: None)
    config = TrainingArguments(output_dir=str(folder), use_cpu=True)
    begun = cli_stage.Stage(stage, config, ModelArguments("x"), DataArguments("rows.jsonl"))
    begun.leave(None, figures={}, data=[], parents={})
    assert order == ["lineage", "card", f"whole, page {has_page}"]


def test_a_real_tiny_run_has_its_own_figures_and_replies_on_its_page(tmp_path):
    tiny_runs.trainer(tmp_path / "run", num_rollouts=3, num_ppo_epochs=1).train()
    html_report.write_report(tmp_path / "run")
    read = hand_made.Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    rollouts = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "objective/score" in row]
    assert len(rollouts) == 3
    for name in ("objective/score", "objective/kl", "rollout/response_tokens", "value/explained_variance"):
        assert read.row(name) == [rounded(row[name]) for row in rollouts]
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert {row["step"] for row in samples} == {0, 2, 4}
    assert [
        row[0] for row in read.rows if len(row) == 4 and row[0] in {sample["prompt"] for sample in samples}
    ] == [row["prompt"] for row in samples]
    assert len(read.pictures()) == 2


def test_the_page_begins_with_what_has_changed(tmp_path):
    judged = {
        **hand_made.EVALUATION,
        "judge": "my:judge",
        "figures": {
            "sft": {"judge": 0.1, "judge_ci": [0.05, 0.15], "score": 1.0},
            "ppo": {"judge": 0.6, "judge_ci": [0.5, 0.7], "score": 2.0},
        },
        "samples": [
            {
                "prompt": f"<user>question {i}<bot>",
                "asked": f"question {i}",
                "sft": f"old {i}",
                "ppo": f"new {i}",
            }
            for i in range(5)
        ],
    }
    folder = hand_made.write(tmp_path / "run", evaluation=judged)
    read = hand_made.Page(html_report.render_report(folder))
    rows = hand_made.rows()[:-1]
    before = sum(row["objective/raw_score"] for row in rows[:3]) / 3
    after = sum(row["objective/raw_score"] for row in rows[-3:]) / 3
    assert f"The score rose from {before:.2f} to {after:.2f}, at" in read.text
    assert (
        "On 77 held-out prompts my:judge rates the policy's replies 0.60 (0.50 to 0.70), those of sft 0.10"
        " (0.05 to 0.15)." in read.text
    )
    # Three prompts, as they were asked, with the replies of each policy
    assert "question 2" in read.text and "old 2" in read.text and "new 2" in read.text
    assert "question 3" not in read.text and "<user>" not in read.text
    assert read.text.index("new 2") < read.text.index("Diagnosis")


def test_a_falling_score_and_a_run_without_scores_are_said_as_they_are():
    assert html_report.outcome([], None) == ""
    falling = [{"step": i, "objective/score": -float(i), "rollout/eos_rate": 1.0} for i in range(1, 4)]
    assert html_report.outcome(falling, None) == (
        "The score fell from -1.00 to -3.00; 100% of replies end by themselves."
    )


def test_a_score_that_moves_within_its_noise_is_not_said_to_rise():
    scores = [0.0, 1.0, -1.0, 0.5, -0.5, 1.0, -1.0, 0.3]
    rows = [{"step": i, "objective/score": score} for i, score in enumerate(scores)]
    assert html_report.outcome(rows, None).startswith("The score went, within its noise, from ")
    assert "the score has not clearly risen" in " ".join(finding.text for finding in diagnose(rows))


def test_what_is_well_is_folded_and_what_is_not_stands_open(tmp_path):
    folder = hand_made.write(tmp_path / "run")
    text = html_report.render_report(folder)
    diagnosis = text[text.index("<h2>Diagnosis") : text.index("<h2>The reward model")]
    opened, folded = diagnosis.split("<details>")
    levels = [finding.level for finding in diagnose(hand_made.rows())]
    assert opened.count('"level ok"') == 0 and folded.count('"level ok"') == levels.count("ok") > 0
    assert opened.count('"level look"') == levels.count("look")
    assert opened.count('"level wrong"') == levels.count("wrong")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.877, "1.88"),
        (0.0123, "0.01"),
        (0.0042, "0.0042"),
        (0.0, "0.00"),
        (-3.0, "-3.00"),
        (7, "7"),
        (None, "-"),
    ],
)
def test_figures_of_a_table_have_two_decimals(value, text):
    assert two_decimals(value) == text
