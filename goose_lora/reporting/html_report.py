"""``report.html``: a run on one page that opens from disk, with nothing in it from elsewhere and no
script."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from goose_lora.errors import UserError
from goose_lora.files import read_json, read_jsonl
from goose_lora.models.adapters import read_lineage
from goose_lora.reporting import plots
from goose_lora.reporting.diagnosis import diagnose
from goose_lora.reporting.figures import (
    MEASURES,
    STAGE_TITLES,
    rounded,
    with_interval,
)

REPORT_FILE = "report.html"
# Of the table that is always open, where they were logged.
HEADLINE = (
    "objective/score",
    "objective/raw_score",
    "objective/kl",
    "policy/entropy",
    "rollout/response_tokens",
    "rollout/eos_rate",
) + ("value/explained_variance", "policy/clip_fraction")

_TEMPLATES = Environment(
    loader=PackageLoader("goose_lora.reporting"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["figure"] = rounded


def fill(template: str, **values: Any) -> str:
    """A page from one of the package's templates; every value is escaped."""
    return _TEMPLATES.get_template(template).render(values)


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def write_report(folder: str | Path) -> None:
    """Write report.html of the run in ``folder`` from the files that are there."""
    (Path(folder) / REPORT_FILE).write_text(render_report(folder), encoding="utf-8")


def refresh_report(folder: str | Path) -> None:
    """Write it again, where there is one."""
    if (Path(folder) / REPORT_FILE).is_file():
        write_report(folder)


def render_report(folder: str | Path) -> str:
    """The page as text.

    Raises:
        OSError: there is no metrics.jsonl.
        ValueError: a file that cannot be read, with its name.
    """
    folder = Path(folder)
    metrics, lineage = read_jsonl(folder / "metrics.jsonl"), read_lineage(folder)
    rollouts = plots.rollouts_of(metrics)
    chosen = first_middle_last(rollouts)
    logged = list(dict.fromkeys(key for row in chosen for key in row if key != "step"))
    return fill(
        "run.html",
        title=folder.resolve().name,
        made=_made(lineage),
        command=lineage.get("command"),
        findings=diagnose(metrics) if rollouts else [],
        rollouts=rollouts,
        curves=data_uri(plots.curves({"": metrics})) if rollouts else "",
        frontier=data_uri(plots.frontier(metrics)) if rollouts else "",
        steps=[f"step {row['step']}" for row in chosen],
        headline=_numbers([name for name in HEADLINE if name in logged], chosen),
        everything=_numbers(logged, chosen),
        samples=_samples(folder / "samples.jsonl"),
        reward=reward_lines(lineage),
        evaluation=_evaluation(read_evaluation(folder)),
        settings=(
            [[name, shown(value)] for name, value in lineage["settings"].items()]
            if "settings" in lineage
            else None
        ),
    )


def first_middle_last(rows: Sequence[Any]) -> list[Any]:
    """Three of ``rows``; fewer where there are fewer."""
    return [rows[index] for index in sorted({0, len(rows) // 2, len(rows) - 1})] if rows else []


def shown(value: Any) -> str:
    """A setting as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _made(lineage: Mapping[str, Any]) -> str:
    if "base" not in lineage:
        return "A run without a lineage (goose_lora.json)."
    base, figures = lineage["base"], lineage.get("figures", {})
    said = ", ".join(f"{name} {rounded(value)}" for name, value in figures.items())
    how = "not quantized" if base.get("quantization") == "none" else f"in {base.get('quantization')}"
    return f"{STAGE_TITLES.get(lineage.get('stage', ''), 'A run')} on {base['id']}, {how}" + (
        f". At its end: {said}." if said else "."
    )


def _numbers(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [[name, *(rounded(row.get(name)) for row in rows)] for name in names]


def _samples(path: Path) -> list[tuple[int, list[dict[str, Any]]]]:
    rows = read_jsonl(path) if path.is_file() else []
    steps = first_middle_last(sorted({row["step"] for row in rows}))
    return [(step, [row for row in rows if row["step"] == step]) for step in steps]


def reward_lines(lineage: Mapping[str, Any]) -> list[str]:
    """What scored the replies, and what recipes/reward.py found it worth, a line each."""
    parent, functions = (
        lineage.get("parents", {}).get("reward"),
        lineage.get("settings", {}).get("reward_function"),
    )
    by_function = [f"Replies were scored by {', '.join(functions)}."] if functions else []
    if not parent:
        return by_function or ["Which one scored the replies is not known."]
    verdict = parent.get("verdict")
    if not verdict:
        return [
            *by_function,
            (
                f"{parent['name']} has no verdict.json: it was not judged on held-out pairs by"
                " recipes/reward.py."
            ),
        ]
    low, high = verdict["accuracy_ci"]
    among = (
        f"{rounded(verdict['accuracy'])} (95 % interval {rounded(low)} to {rounded(high)}) of"
        f" {verdict['n_pairs']} held-out pairs"
    )
    return [
        *by_function,
        f"{parent['name']} is right on {among}.",
        *(verdict.get("warnings") or ["No warnings."]),
    ]


def read_evaluation(folder: str | Path) -> dict[str, Any] | None:
    """evaluation.json, if there is one.

    Raises:
        ValueError: it is none of recipes/evaluate.py.
    """
    path = Path(folder) / "evaluation.json"
    if not path.is_file():
        return None
    evaluation = read_json(path)
    figures = evaluation.get("figures")
    sound = isinstance(figures, dict) and figures and all(isinstance(row, dict) for row in figures.values())
    if not sound or not {"prompts", "against"} <= evaluation.keys():
        raise UserError(f"{path}: no figures of recipes/evaluate.py. Run it again, or delete the file.")
    return evaluation


def _evaluation(evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    figures, dataset = evaluation["figures"], evaluation.get("dataset", "a data set")
    measured = [key for key in MEASURES if any(key in row for row in figures.values())]
    rows = [[MEASURES[key], *(with_interval(row, key) for row in figures.values())] for key in measured]
    where = (
        f"{evaluation['prompts']} prompts of {dataset}; win rates against {evaluation['against']}; 95 %"
        " intervals in brackets."
    )
    return {"where": where, "columns": ["", *figures], "rows": rows}
