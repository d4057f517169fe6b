"""``report.html``: a run in one file that opens from disk.

Nothing in it is loaded from elsewhere, and there is no script in it.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from goose_lora.files import read_jsonl, write_text
from goose_lora.reporting import plots
from goose_lora.reporting.diagnosis import diagnose
from goose_lora.reporting.figures import (
    MEASURES,
    STAGE_TITLES,
    measured_in,
    rounded,
    setting_text,
    two_decimals,
    with_interval,
)
from goose_lora.reporting.findings import CLEAR, TREND, Rows, change, column, ends, recent, rollouts_of
from goose_lora.reporting.run_files import EvaluationFile, Lineage, lineage_of, read_evaluation

REPORT_FILE = "report.html"
# Metrics of the table that is always open, where they were logged.
HEADLINE = (
    "objective/score",
    "objective/raw_score",
    "objective/kl",
    "policy/entropy",
    "rollout/response_tokens",
    "rollout/eos_rate",
    "value/explained_variance",
    "policy/clip_fraction",
)

COMPARED = 3  # prompts with the replies of each policy
Item = TypeVar("Item")

# A name in a template that nobody gave is an error, not a blank.
_TEMPLATES = Environment(
    loader=PackageLoader("goose_lora.reporting"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["figure"] = rounded


def fill(template: str, **values: object) -> str:
    """Return HTML from one of the templates beside this module; every value is escaped."""
    return _TEMPLATES.get_template(template).render(values)


def data_uri(png: bytes) -> str:
    """Return a picture as an address that holds the picture itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def write_report(folder: str | Path) -> None:
    """Write report.html of the run in ``folder`` from the files that are there."""
    write_text(Path(folder) / REPORT_FILE, render_report(folder))


def refresh_report(folder: str | Path) -> None:
    """Write report.html again, if there is one."""
    if (Path(folder) / REPORT_FILE).is_file():
        write_report(folder)


def render_report(folder: str | Path) -> str:
    """Return the report as HTML.

    Raises:
        OSError: there is no metrics.jsonl.
        UserError: a file cannot be read; its name is in the message.
    """
    folder = Path(folder)
    metrics, lineage = read_jsonl(folder / "metrics.jsonl"), lineage_of(folder)
    rollouts = rollouts_of(metrics)
    evaluation = read_evaluation(folder)

    # A run that was stopped before its first log has metrics, and nothing to judge or to draw
    findings, curves, frontier = [], "", ""
    if rollouts:
        findings = diagnose(metrics)
        curves = data_uri(plots.curves({"": metrics}))
        frontier = data_uri(plots.frontier(metrics))

    # Tables of metrics have a column for the first, the middle and the last rollout
    chosen = first_middle_last(rollouts)
    logged = list(dict.fromkeys(key for row in chosen for key in row if key != "step"))

    # No settings at all are another thing than settings that are all defaults
    settings = None
    if "settings" in lineage:
        settings = [[name, setting_text(value)] for name, value in lineage["settings"].items()]

    # What the template shows
    return fill(
        "run.html",
        title=folder.resolve().name,
        made=_made(lineage),
        outcome=outcome(metrics, evaluation),
        command=lineage.get("command"),
        compared=_compared(evaluation),
        findings=[finding for finding in findings if finding.level != "ok"],
        well=[finding for finding in findings if finding.level == "ok"],
        rollouts=rollouts,
        curves=curves,
        frontier=frontier,
        steps=[f"step {row['step']}" for row in chosen],
        headline=_metrics_table([name for name in HEADLINE if name in logged], chosen),
        everything=_metrics_table(logged, chosen),
        samples=_samples(folder / "samples.jsonl"),
        reward=reward_lines(lineage),
        evaluation=_evaluation(evaluation),
        settings=settings,
    )


def first_middle_last(rows: Sequence[Item]) -> list[Item]:
    """Return the first, the middle and the last of ``rows``, or fewer if there are fewer."""
    if not rows:
        return []
    return [rows[index] for index in sorted({0, len(rows) // 2, len(rows) - 1})]


def _made(lineage: Lineage) -> str:
    """Return stage and base in one sentence."""
    # Others' adapters have no lineage
    if "base" not in lineage:
        return "A run without a lineage (goose_lora.json)."
    base = lineage["base"]
    how = f"in {base.get('quantization')}"
    if base.get("quantization") == "none":
        how = "not quantized"
    # A folder of this machine is its last name to others
    name = base["id"]
    if Path(name).is_absolute():
        name = Path(name).name
    return f"{STAGE_TITLES.get(lineage.get('stage', ''), 'A run')} on {name}, {how}."


def outcome(metrics: Rows, evaluation: EvaluationFile | None) -> str:
    """Return what a run has changed, in a sentence or two: score, KL and endings, then the judge.

    Figures of the run are the means of its first and its last fifth of rollouts.
    """
    said = []
    rows = rollouts_of(metrics)
    scores = column(rows, "objective/raw_score") or column(rows, "objective/score")
    if scores:
        before, after = ends(scores)
        went = "rose" if after > before else "fell"
        # As the diagnosis says it further down
        if len(scores) >= TREND and abs(change(scores)) < CLEAR:
            went = "went, within its noise,"
        text = f"The score {went} from {two_decimals(before)} to {two_decimals(after)}"
        kl, ended = recent(rows, "objective/kl"), recent(rows, "rollout/eos_rate")
        if kl is not None:
            text += f", at {two_decimals(kl)} nats of KL a reply"
        if ended is not None:
            text += f"; {ended:.0%} of replies end by themselves"
        said.append(f"{text}.")
    judged = _judged(evaluation)
    return " ".join([*said, *judged])


def _judged(evaluation: EvaluationFile | None) -> list[str]:
    """Return a sentence on what the judge says of the policy and of what it is compared with."""
    if evaluation is None:
        return []
    policy = evaluation["figures"].get("ppo", {})
    against = evaluation["figures"].get(evaluation["against"], {})
    judge = evaluation.get("judge", "the judge")
    if not {"judge"} <= policy.keys() & against.keys():
        # A judge of pairs prefers one of two, and has no number a reply
        if "judge_win_rate" not in policy:
            return []
        return [
            f"On {evaluation['prompts']} held-out prompts {judge} prefers the policy's reply to that of"
            f" {evaluation['against']} in {with_interval(policy, 'judge_win_rate', two_decimals)} of all, a"
            " tie as half."
        ]
    return [
        f"On {evaluation['prompts']} held-out prompts {judge} rates the policy's replies"
        f" {with_interval(policy, 'judge', two_decimals)}, those of {evaluation['against']}"
        f" {with_interval(against, 'judge', two_decimals)}."
    ]


def _compared(evaluation: EvaluationFile | None) -> dict[str, object] | None:
    """Return replies of each evaluated policy to the first prompts; None if there are none."""
    rows = (evaluation or {}).get("samples") or []
    if not rows:
        return None
    policies = [name for name in rows[0] if name not in ("prompt", "asked")]
    return {"policies": policies, "rows": rows[:COMPARED]}


def _metrics_table(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [[name, *(rounded(row.get(name)) for row in rows)] for name in names]


def _samples(path: Path) -> list[tuple[int, list[dict[str, Any]]]]:
    """Return the sampled replies of three steps, each step with its rows."""
    if not path.is_file():
        return []
    rows = read_jsonl(path)
    # Few enough to be read
    steps = first_middle_last(sorted({row["step"] for row in rows}))
    return [(step, [row for row in rows if row["step"] == step]) for step in steps]


def reward_lines(lineage: Lineage) -> list[str]:
    """Return what scored the replies and what recipes/reward.py found it worth, a line each."""
    # Functions and a reward model may score together
    functions = lineage.get("settings", {}).get("reward_function")
    parent = lineage.get("parents", {}).get("reward")
    lines = []
    if functions:
        lines.append(f"Replies were scored by {', '.join(functions)}.")
    if not parent:
        return lines or ["Which one scored the replies is not known."]

    # Its verdict on held-out pairs, as it was when PPO started
    verdict = parent.get("verdict")
    if not verdict:
        lines.append(
            f"{parent['name']} has no verdict.json: it was not judged on held-out pairs by recipes/reward.py."
        )
        return lines
    low, high = verdict["accuracy_ci"]
    lines.append(
        f"{parent['name']} is right on {rounded(verdict['accuracy'])} (95 % interval {rounded(low)} to"
        f" {rounded(high)}) of {verdict['n_pairs']} held-out pairs."
    )
    return [*lines, *(verdict.get("warnings") or ["No warnings."])]


def _evaluation(evaluation: EvaluationFile | None) -> dict[str, object] | None:
    """Return the table of recipes/evaluate.py: a row a measure, a column a policy."""
    if evaluation is None:
        return None
    # A table that reads down: measures in rows, policies in columns
    figures, dataset = evaluation["figures"], evaluation.get("dataset", "a data set")
    rows = [
        [MEASURES[key], *(with_interval(row, key, two_decimals) for row in figures.values())]
        for key in measured_in(list(figures.values()))
    ]
    where = (
        f"{evaluation['prompts']} prompts of {dataset}; win rates against {evaluation['against']}; 95 %"
        " intervals in brackets."
    )
    return {"where": where, "columns": ["", *figures], "rows": rows}
