"""goose-lora compare: what differs between runs, with which figures, and one line where a run
cannot be read."""

import sys
from statistics import fmean, stdev

import hand_made
import pytest

from goose_lora import cli
from goose_lora.reporting import compare, plots
from goose_lora.reporting.figures import rounded


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["goose-lora", "compare", *map(str, words)])
    cli.main()


@pytest.fixture
def two(tmp_path):
    """Two hand-made runs that differ in learning rate, kl_coef (set in the second only) and rows;
    one was evaluated."""
    hand_made.write(tmp_path / "one", noted=hand_made.lineage(seed=3), evaluation=hand_made.EVALUATION)
    noted = hand_made.lineage(learning_rate=0.02, kl_coef=0.3, seed=3, data="e" * 64, output_dir="elsewhere")
    hand_made.write(tmp_path / "other", noted=noted, metrics=hand_made.rows(20, 0.2))
    return tmp_path


def test_settings_that_differ_between_hand_made_runs_are_named_with_both_values_and_no_other(two):
    rows = compare.differing_settings(compare.read_runs([two / "one", two / "other"]))
    assert rows == [
        ["(rows of the data)", "8 of sha256 dddddddddddd", "8 of sha256 eeeeeeeeeeee"],
        ["kl_coef", "(default)", "0.3"],
        ["learning_rate", "0.0123", "0.02"],
    ]


def test_figures_of_a_hand_made_run_are_its_evaluations_or_means_of_its_last_rollouts_with_a_normal_interval(
    two,
):
    rows = {
        name: figures for name, *figures in compare.figures(compare.read_runs([two / "one", two / "other"]))
    }
    assert rows["measured on"] == ["77 held-out prompts", "training, last 10 logged rollouts"]
    values = [row["objective/raw_score"] for row in hand_made.rows(20, 0.2) if "objective/raw_score" in row][
        -10:
    ]
    half = 1.96 * stdev(values) / 10**0.5
    training = (
        f"{rounded(fmean(values))} ({rounded(fmean(values) - half)} to {rounded(fmean(values) + half)})"
    )
    assert rows["score of the reward model"] == ["1.877 (1.503 to 2.251)", training]
    assert rows["tokens"][1].startswith("5.5 ("), "mean of 10 to 1"
    assert rows["share that ended"][0] == "-", "not in that evaluation"


def test_the_command_prints_hand_made_runs_and_writes_a_page_that_needs_nothing_else(
    two, monkeypatch, capsys
):
    monkeypatch.chdir(two)
    run(monkeypatch, "one", "other")
    said, text = capsys.readouterr().out, (two / "compare.html").read_text(encoding="utf-8")
    read = hand_made.Page(text)
    assert read.row("learning_rate") == ["0.0123", "0.02"] and not [
        row for row in read.rows if row[0] == "seed"
    ]
    assert "learning_rate" in said and "1.877 (1.503 to 2.251)" in said and "compare.html" in said
    (picture,) = read.pictures()
    assert picture.format == "PNG" and read.links == [link for link in read.links if link.startswith("data:")]
    assert (
        "some figures are of held-out prompts, others of training's" in said
        and "some figures are of held-out prompts" in read.text
    )
    assert "last 10 logged rollouts as if these were independent" in read.text


def test_curves_of_hand_made_runs_stand_over_rollouts_whatever_the_steps_of_each():
    twice = [{**row, "step": 2 * row["step"]} for row in hand_made.rows()]
    assert plots._points(twice, "objective/kl", "rollout") == plots._points(
        hand_made.rows(), "objective/kl", "rollout"
    )
    counted = [{**row, "rollout/count": 3} for row in hand_made.rows(2)]
    assert plots._points(counted, "objective/kl", "rollout") == [(3, 0.017), (6, pytest.approx(0.317))]
    assert plots._points([{"step": 7, "a": float("nan")}, {"step": 8, "a": 1.5}], "a", "optimizer step") == [
        (8, 1.5)
    ]


@pytest.mark.parametrize(
    ("noted", "evaluation", "words"),
    [
        (hand_made.lineage(reward="b" * 64), hand_made.EVALUATION, "were not scored by the same reward"),
        (
            hand_made.lineage(reward_function=["m:f"]),
            hand_made.EVALUATION,
            "were not scored by the same reward",
        ),
        (
            hand_made.lineage(),
            {**hand_made.EVALUATION, "dataset": "org/others"},
            "not evaluated on the same prompts",
        ),
        ({}, hand_made.EVALUATION, "no goose_lora.json, so its settings are not known"),
        (hand_made.lineage(), hand_made.EVALUATION, None),
    ],
)
def test_what_keeps_hand_made_runs_from_being_compared_is_said(tmp_path, noted, evaluation, words):
    hand_made.write(tmp_path / "one", evaluation=hand_made.EVALUATION)
    hand_made.write(tmp_path / "other", noted=noted, evaluation=evaluation)
    lines = compare.notes(compare.read_runs([tmp_path / "one", tmp_path / "other"]))
    assert [words in line for line in lines] == [True] if words else lines == []


def judged(**judge):
    ppo = {**hand_made.EVALUATION["figures"]["ppo"], "judge": 0.5, "judge_win_rate": 0.75}
    return {**hand_made.EVALUATION, "figures": {"ppo": ppo}, **judge}


@pytest.mark.parametrize(
    ("noted", "evaluation", "apart"),
    [
        (hand_made.lineage(), judged(judge="m:a"), {}),
        (
            hand_made.lineage(reward_function=["m:f"]),
            judged(judge="m:a"),
            {"score": [" (one)", " (other)"]},
        ),
        (
            {},
            judged(judge="m:a"),
            {"score": [" (one)", " (other; its reward is not known)"]},
        ),
        (hand_made.lineage(), judged(judge="m:b"), {"judge": [" (one)", " (other)"]}),
        (
            hand_made.lineage(),
            judged(),
            {"judge": [" (one)", " (other; its judge is not known)"]},
        ),
    ],
)
def test_figures_by_two_rewards_or_judges_are_never_in_one_row(tmp_path, noted, evaluation, apart):
    hand_made.write(tmp_path / "one", evaluation=judged(judge="m:a"))
    hand_made.write(tmp_path / "other", noted=noted, evaluation=evaluation)
    rows = {
        name: cells
        for name, *cells in compare.figures(compare.read_runs([tmp_path / "one", tmp_path / "other"]))
    }
    for key in ("score", "judge", "judge_win_rate", "kl"):
        kinds = apart.get(key.partition("_")[0], [""])
        found = [rows[f"{compare.MEASURES[key]}{kind}"] for kind in kinds]
        if kinds == [""]:
            assert "-" not in found[0]
        else:
            assert [cells.index("-") for cells in found] == [1, 0] and compare.MEASURES[key] not in rows


def test_markup_in_the_name_of_a_hand_made_run_is_shown(tmp_path):
    names = ["<script>x</script>", "_b$a$"]
    for name in names:
        hand_made.write(tmp_path / name.replace("/", "|"))
    compare.compare([tmp_path / name.replace("/", "|") for name in names], tmp_path / "new" / "page.html")
    read = hand_made.Page((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))
    assert "script" not in read.tags and "<script>x<|script>" in read.text and "None." in read.text


def test_hand_made_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [hand_made.write(tmp_path / name / "ppo") for name in ("a", "b")]
    assert list(compare.read_runs(folders)) == [str(folder) for folder in folders]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["one", "empty"],
            "empty/metrics.jsonl: no such file. Give the output_dir of a run of recipes/ppo.py.",
        ),
        (["one", "nowhere"], "nowhere/metrics.jsonl: no such file."),
        (["one", "untrained"], "untrained/metrics.jsonl: no rollout is in these metrics."),
        (["one", "broken"], "broken/metrics.jsonl: line 1 is not JSON"),
        (["one", "strange"], "strange/evaluation.json: no figures of recipes/evaluate.py."),
        (["one"], "to compare are one: give two runs or more, each once."),
        (["one", "./one"], "give two runs or more, each once."),
        (
            ["one", "other", "--output", "x.png"],
            "--output x.png: a page of HTML is written; give a name that ends in .html.",
        ),
    ],
)
def test_a_run_that_cannot_be_compared_ends_in_one_line_and_exit_code_2(
    two, monkeypatch, capsys, words, error
):
    (two / "empty").mkdir()
    hand_made.write(two / "untrained", metrics=[{"step": 1, "train_runtime": 1.0}])
    hand_made.write(two / "broken")
    (two / "broken" / "metrics.jsonl").write_text("{")
    hand_made.write(two / "strange", evaluation={"prompts": 1})
    monkeypatch.chdir(two)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *words)
    errors = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and error in errors[0] and errors[1:] == ["(--debug shows where)"]
    assert not (two / "compare.html").exists()
