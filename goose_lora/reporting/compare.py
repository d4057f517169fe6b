"""Runs beside each other: settings that differ, figures with intervals, curves on one axis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from goose_lora.errors import UserError
from goose_lora.reporting import plots
from goose_lora.reporting.figures import MEASURES, measured_in, rounded, setting_text, with_interval
from goose_lora.reporting.findings import rollouts_of
from goose_lora.reporting.html_report import data_uri, fill
from goose_lora.reporting.run_files import (
    EvaluationFile,
    Lineage,
    lineage_of,
    read_evaluation,
    read_metrics,
)
from goose_lora.terminal import table
from goose_lora.training.validation import require_output_folder

LAST_ROLLOUTS = 10  # logged ones, over which the figures of a run without an evaluation are means
# Settings that say where a run is kept. No two runs have the same.
PLACES = {"output_dir", "run_name", "logging_dir", "hub_model_id"}
# Where a figure of evaluation.json stands in training's logs.
LOGGED = {
    "score": "objective/raw_score",
    "kl": "objective/kl",
    "tokens": "rollout/response_tokens",
    "ended": "rollout/eos_rate",
}
HOW = (
    "Intervals are of 95 %: those of recipes/evaluate.py over prompts, or, where it was not run, normal ones"
    f" over the last {LAST_ROLLOUTS} logged rollouts as if these were independent, which a trend makes too"
    " narrow. None of them knows of other seeds: two seeds of one setting differ too."
)


# ---- The runs ----


@dataclass(frozen=True)
class Run:
    """The files of a run.

    ``lineage`` is empty if it was not saved to its end, ``evaluation`` None if recipes/evaluate.py
    was not run.
    """

    folder: Path
    metrics: list[dict[str, Any]]
    lineage: Lineage
    evaluation: EvaluationFile | None


def read_runs(folders: Sequence[str | Path]) -> dict[str, Run]:
    """Return runs by name: the folder's own, or its path where two folders have one name.

    Raises:
        UserError: there are fewer than two, one is named twice, or one cannot be read, has no
            metrics.jsonl or no rollout.
    """
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        raise UserError(f"to compare are {', '.join(map(str, paths))}: give two runs or more, each once.")
    names = [path.resolve().name for path in paths]
    runs = {}
    for path, name in zip(paths, names, strict=True):
        is_shared = names.count(name) > 1
        runs[str(path) if is_shared else name] = _read(path)
    return runs


def _read(folder: Path) -> Run:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file. Give the output_dir of a run of recipes/ppo.py.")
    metrics = read_metrics(path)
    if not rollouts_of(metrics):
        raise UserError(
            f"{path}: no rollout is in these metrics. A run of recipes/ppo.py writes one line a rollout."
        )
    return Run(folder, metrics, lineage_of(folder), read_evaluation(folder))


# ---- Settings ----


def differing_settings(runs: Mapping[str, Run]) -> list[list[str]]:
    """Return a row for each setting that differs between runs: its name, and each run's value.

    The rows of the data sets are one setting. A run without a lineage has no known settings.
    """
    # A setting that is missing has its default, in a run whose settings are known
    known = {name: _settings(run) for name, run in runs.items() if run.lineage}
    differ = []
    for key in sorted({key for settings in known.values() for key in settings}):
        values = [known[name].get(key, "(default)") if name in known else "(not known)" for name in runs]
        if len(set(values) - {"(not known)"}) > 1:
            differ.append([key, *values])
    return differ


def _settings(run: Run) -> dict[str, str]:
    settings = {
        name: setting_text(value)
        for name, value in run.lineage.get("settings", {}).items()
        if name not in PLACES
    }
    data = [f"{row['rows']} of sha256 {row['sha256'][:12]}" for row in run.lineage.get("data", [])]
    if data:
        settings["(rows of the data)"] = "; ".join(data)
    return settings


def notes(runs: Mapping[str, Run]) -> list[str]:
    """Return what makes these runs hard to compare, a line each."""
    lines = [
        f"{name}: no goose_lora.json, so its settings are not known. Was it stopped before its end?"
        for name in runs
        if not runs[name].lineage
    ]
    # Scores of two rewards have nothing to do with each other
    scored = {_scorer(run.lineage) for run in runs.values() if run.lineage}
    if len(scored) > 1:
        lines.append(
            "the replies were not scored by the same reward: scores of one run say nothing about those of"
            " another."
        )
    # Neither have figures over other prompts, or over training's
    evaluations = [run.evaluation for run in runs.values() if run.evaluation]
    if len({(evaluation.get("dataset"), evaluation.get("prompts")) for evaluation in evaluations}) > 1:
        lines.append("the runs were not evaluated on the same prompts.")
    if 0 < len(evaluations) < len(runs):
        lines.append(
            "some figures are of held-out prompts, others of training's: run recipes/evaluate.py on all, or"
            " read the curves."
        )
    return lines


def _scorer(lineage: Lineage) -> str:
    """Return what scored the replies of a run: equal texts are equal rewards."""
    settings = lineage.get("settings", {})
    parent = lineage.get("parents", {}).get("reward")
    sha256 = parent.get("sha256") if parent else None
    given = [settings.get(name) for name in ("reward_function", "reward_weights")]
    # Of an ensemble also the others, and how they score as one
    members = parent.get("members") if parent else None
    if members:
        given += [members, settings.get("reward_aggregation"), settings.get("uncertainty_coef")]
    return setting_text([sha256, *given])


# ---- Figures ----


def figures(runs: Mapping[str, Run]) -> list[list[str]]:
    """Return a row for each measure: what was measured, and each run's figure.

    Figures are means, with 95 % intervals in brackets where there are any. The first row says what
    they were measured on. Scores of two rewards, and ratings of two judges, have rows of their own;
    a reward or judge that is not known is another one.
    """
    found = {name: _row(run) for name, run in runs.items()}
    rows = [["measured on", *(where for where, _ in found.values())]]
    for key in measured_in([row for _, row in found.values()]):
        alike = _measured_alike(key, {name: run for name, run in runs.items() if key in found[name][1]})
        for what, names in alike:
            cells = [with_interval(found[name][1], key) if name in names else rounded(None) for name in runs]
            rows.append([f"{MEASURES[key]}{what}", *cells])
    return rows


def _measured_alike(key: str, runs: Mapping[str, Run]) -> list[tuple[str, list[str]]]:
    """Return groups of runs whose figures of a measure can stand in one row.

    Each has what to add to the measure's name, nothing where there is one group.
    """
    # By what a measure depends on beside the replies; None is not known
    by: dict[str, str | None] = dict.fromkeys(runs, "")
    of = key.partition("_")[0]
    if key.startswith("score"):
        by = {name: _scorer(run.lineage) if run.lineage else None for name, run in runs.items()}
    elif key.startswith("judge"):
        by = {name: (run.evaluation or {}).get("judge") for name, run in runs.items()}

    # Runs of one kind, and each unknown one by itself
    groups: dict[str, list[str]] = {}
    for name, kind in by.items():
        groups.setdefault(f"? {name}" if kind is None else f"= {kind}", []).append(name)
    if len(groups) == 1:
        return [("", list(runs))]
    unknown = {"score": "its reward is not known", "judge": "its judge is not known"}
    return [
        (f" ({names[0]}; {unknown[of]})" if kind.startswith("?") else f" ({', '.join(names)})", names)
        for kind, names in groups.items()
    ]


def _row(run: Run) -> tuple[str, Mapping[str, Any]]:
    """Return what a run was measured on, and its figures: of evaluation, or else of training."""
    if run.evaluation is not None and "ppo" in run.evaluation["figures"]:
        return f"{run.evaluation['prompts']} held-out prompts", run.evaluation["figures"]["ppo"]
    # Not evaluated: the same measures over the last logged rollouts
    last = rollouts_of(run.metrics)[-LAST_ROLLOUTS:]
    row: dict[str, Any] = {}
    for key, name in LOGGED.items():
        values = [float(logged[name]) for logged in last if name in logged and abs(logged[name]) < inf]
        if values:
            row[key] = fmean(values)
        if len(values) > 1:
            row[f"{key}_ci"] = normal_interval(values)
    return f"training, last {len(last)} logged rollouts", row


def normal_interval(values: Sequence[float]) -> list[float]:
    """Return the 95 % interval of the mean, as if the values were independent and many."""
    half = 1.96 * stdev(values) / len(values) ** 0.5
    return [fmean(values) - half, fmean(values) + half]


# ---- The comparison ----


def compare(folders: Sequence[str | Path], output: str | Path = "compare.html") -> str:
    """Write a comparison as HTML to ``output``; return it without the curves as text.

    Raises:
        UserError: as ``read_runs``, or ``output`` does not end in .html.
    """
    output = Path(output)
    if output.suffix not in (".html", ".htm"):
        raise UserError(f"--output {output}: a page of HTML is written; give a name that ends in .html.")
    require_output_folder(str(output.parent), option="--output")
    runs = read_runs(folders)
    settings, said, measured = differing_settings(runs), notes(runs), figures(runs)

    # For a browser. Runs of unequal batches have the rollout as their common axis
    curves = plots.curves({name: run.metrics for name, run in runs.items()}, over="rollout")
    html = fill(
        "compare.html",
        title=" / ".join(runs),
        names=list(runs),
        folders=[(name, run.folder.resolve()) for name, run in runs.items()],
        notes=said,
        settings=settings,
        figures=measured,
        how=HOW,
        curves=data_uri(curves),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(html, encoding="utf-8")

    # For a terminal
    differ = "No setting differs."
    if not all(run.lineage for run in runs.values()):
        differ = "No setting is known to differ."
    if settings:
        differ = _text(["setting", *runs], settings)
    parts = [
        differ,
        _text(["", *runs], measured),
        *(f"Look: {line}" for line in said),
        HOW,
        f"With the curves: {output}",
    ]
    return "\n\n".join(parts)


def _text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table([dict(zip(columns, row, strict=True)) for row in rows], list(columns))
