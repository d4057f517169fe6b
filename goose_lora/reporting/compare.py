"""Runs beside each other: the settings that differ, figures with intervals, and curves on one
axis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from goose_lora.errors import UserError
from goose_lora.models.adapters import read_lineage
from goose_lora.reporting import plots
from goose_lora.reporting.figures import MEASURES, with_interval
from goose_lora.reporting.html_report import data_uri, fill, read_evaluation, shown
from goose_lora.reporting.run_files import read_metrics
from goose_lora.terminal import table

LAST_ROLLOUTS = 10  # logged rollouts that the figures of a run without an evaluation are means of
PLACES = {"output_dir", "run_name", "logging_dir", "hub_model_id"}  # where a run is kept: of no run the same
# Where a figure of evaluation.json stands in training's logs.
LOGGED = {
    "score": "objective/raw_score",
    "kl": "objective/kl",
    "tokens": "rollout/response_tokens",
    "ended": "rollout/eos_rate",
}


@dataclass(frozen=True)
class Run:
    """The files of a run. ``lineage`` is empty where it was not saved to its end, ``evaluation``
    None where recipes/evaluate.py was not run."""

    folder: Path
    metrics: list[dict[str, Any]]
    lineage: dict[str, Any]
    evaluation: dict[str, Any] | None


def read_runs(folders: Sequence[str | Path]) -> dict[str, Run]:
    """Runs by name: the folder's own, or its path where two folders have one name.

    Raises:
        ValueError: fewer than two, one that is named twice, no metrics.jsonl, or one that cannot be
            read or has no rollout.
    """
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        raise UserError(f"to compare are {', '.join(map(str, paths))}: give two runs or more, each once.")
    names = [path.resolve().name for path in paths]
    return {
        str(path) if names.count(name) > 1 else name: _read(path)
        for path, name in zip(paths, names, strict=True)
    }


def _read(folder: Path) -> Run:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file. Give the output_dir of a run of recipes/ppo.py.")
    metrics = read_metrics(path)
    if not plots.rollouts_of(metrics):
        raise UserError(
            f"{path}: no rollout is in these metrics. A run of recipes/ppo.py writes one line a rollout."
        )
    return Run(folder, metrics, read_lineage(folder), read_evaluation(folder))


def differing_settings(runs: Mapping[str, Run]) -> list[list[str]]:
    """The settings that are not the same in all runs of known settings: the name, and each run's
    value. The rows of a data set are one too."""
    known = {name: _settings(run) for name, run in runs.items() if run.lineage}
    names = sorted({key for settings in known.values() for key in settings})
    rows = [
        [key, *(known[name].get(key, "(default)") if name in known else "(not known)" for name in runs)]
        for key in names
    ]
    return [row for row in rows if len(set(row[1:]) - {"(not known)"}) > 1]


def _settings(run: Run) -> dict[str, str]:
    settings = {
        name: shown(value) for name, value in run.lineage.get("settings", {}).items() if name not in PLACES
    }
    data = [f"{row['rows']} of sha256 {row['sha256'][:12]}" for row in run.lineage.get("data", [])]
    return settings | ({"(rows of the data)": "; ".join(data)} if data else {})


def notes(runs: Mapping[str, Run]) -> list[str]:
    """What keeps these runs from being compared, a line each."""
    lines = [
        f"{name}: no goose_lora.json, so its settings are not known. Was it stopped before its end?"
        for name in runs
        if not runs[name].lineage
    ]
    scored = {_scorer(run.lineage) for run in runs.values() if run.lineage}
    if len(scored) > 1:
        lines.append(
            "the replies were not scored by the same reward: scores of one run say nothing about those of"
            " another."
        )
    prompts = {
        (run.evaluation.get("dataset"), run.evaluation.get("prompts"))
        for run in runs.values()
        if run.evaluation
    }
    if len(prompts) > 1:
        lines.append("the runs were not evaluated on the same prompts.")
    if 0 < sum(run.evaluation is not None for run in runs.values()) < len(runs):
        lines.append(
            "some figures are of held-out prompts, others of training's: run recipes/evaluate.py on all, or"
            " read the curves."
        )
    return lines


def _scorer(lineage: Mapping[str, Any]) -> str:
    settings = lineage.get("settings", {})
    parent = lineage.get("parents", {}).get("reward") or {}
    return shown([parent.get("sha256"), settings.get("reward_function"), settings.get("reward_weights")])


def figures(runs: Mapping[str, Run]) -> list[list[str]]:
    """What was measured, on what, and each run's: means with 95 % intervals in brackets where there
    are any."""
    found = {name: _row(run) for name, run in runs.items()}
    measured = [key for key in MEASURES if any(key in row for _, row in found.values())]
    rows = [[MEASURES[key], *(with_interval(row, key) for _, row in found.values())] for key in measured]
    return [["measured on", *(where for where, _ in found.values())], *rows]


def _row(run: Run) -> tuple[str, Mapping[str, Any]]:
    if run.evaluation is not None and "ppo" in run.evaluation["figures"]:
        return f"{run.evaluation['prompts']} held-out prompts", run.evaluation["figures"]["ppo"]
    last = plots.rollouts_of(run.metrics)[-LAST_ROLLOUTS:]
    row: dict[str, Any] = {}
    for key, name in LOGGED.items():
        values = [float(logged[name]) for logged in last if name in logged and abs(logged[name]) < inf]
        row |= {key: fmean(values)} if values else {}
        if len(values) > 1:
            row[f"{key}_ci"] = normal_interval(values)
    return f"training, last {len(last)} logged rollouts", row


def normal_interval(values: Sequence[float]) -> list[float]:
    """95 % interval of the mean, as if the values were independent and many."""
    half = 1.96 * stdev(values) / len(values) ** 0.5
    return [fmean(values) - half, fmean(values) + half]


HOW = (
    "Intervals are of 95 %: those of recipes/evaluate.py over prompts, or, where it was not run, normal ones"
    f" over the last {LAST_ROLLOUTS} logged rollouts as if these were independent, which a trend makes too"
    " narrow. None of them knows of other seeds: two seeds of one setting differ too."
)


def compare(folders: Sequence[str | Path], output: str | Path = "compare.html") -> str:
    """Write the page of a comparison to ``output``; returns it as text for a terminal, without the
    curves.

    Raises:
        ValueError: as ``read_runs``, or ``output`` is no name of a page.
    """
    output = Path(output)
    if output.suffix not in (".html", ".htm"):
        raise UserError(f"--output {output}: a page of HTML is written; give a name that ends in .html.")
    runs = read_runs(folders)
    settings, said, measured = differing_settings(runs), notes(runs), figures(runs)
    page = fill(
        "compare.html",
        title=" / ".join(runs),
        names=list(runs),
        folders=[(name, run.folder.resolve()) for name, run in runs.items()],
        notes=said,
        settings=settings,
        figures=measured,
        how=HOW,
        curves=data_uri(plots.curves({name: run.metrics for name, run in runs.items()}, over="rollout")),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    differ = _text(["setting", *runs], settings) if settings else "No setting differs."
    return "\n\n".join(
        [
            differ,
            _text(["", *runs], measured),
            *(f"Look: {line}" for line in said),
            HOW,
            f"With the curves: {output}",
        ]
    )


def _text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table([dict(zip(columns, row, strict=True)) for row in rows], list(columns))
