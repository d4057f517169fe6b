"""The model card, README.md of an output, written from the run's own files: every number in it
stands in one of them."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from goose_lora.data.rows import READERS
from goose_lora.files import read_json, read_jsonl, write_json
from goose_lora.models.adapters import read_lineage
from goose_lora.reporting.figures import (
    MEASURES,
    STAGE_TITLES,
    rounded,
    with_interval,
)
from goose_lora.sharing.lineage import hub_name
from goose_lora.sharing.provenance import loading_code

MARK = (
    "<!-- Written by goose_lora from the files of the run, and again when they change. Take this line out to"
    " keep your own text. -->"
)
SAMPLES, CELL = 4, 300  # rows of the table of samples, and most characters of a reply in it
LIMITS = [
    (
        "A higher score is what the reward model likes, and it can be wrong in ways that PPO finds; the"
        " judge, where there is one, was not trained on."
    ),
    (
        "The figures hold for the prompts named here. Nothing was measured on other languages, subjects or"
        " lengths."
    ),
    "Safety was not measured: what the base says or repeats, this model may say too.",
]


def write_card(folder: str | Path) -> None:
    """Write README.md of the output in ``folder``."""
    (Path(folder) / "README.md").write_text(render_card(folder), encoding="utf-8")


def refresh_card(folder: str | Path) -> None:
    """Write it again from the files as they are now, unless someone took it over by taking the mark
    out."""
    path = Path(folder) / "README.md"
    if path.is_file() and MARK in path.read_text(encoding="utf-8"):
        write_card(folder)


def add_evaluation(
    policy: str | Path, evaluation: Mapping[str, Any], replies: Sequence[Mapping[str, str]]
) -> None:
    """Put what recipes/evaluate.py measured beside the policy, where its card reads it; nothing for
    an adapter of the Hub or without a lineage."""
    if read_lineage(policy) and hub_name(policy) == str(policy):
        write_json(Path(policy) / "evaluation.json", {**evaluation, "samples": list(replies[:SAMPLES])})
        refresh_card(policy)


def render_card(folder: str | Path) -> str:
    """The card as text: the Hub's metadata as YAML, then Markdown."""
    folder = Path(folder)
    lineage = read_lineage(folder)
    evaluation = read_json(folder / "evaluation.json") if (folder / "evaluation.json").is_file() else None
    verdict = _verdict(folder, lineage)
    name = hub_repo(lineage) or folder.resolve().name
    parts = [
        f"---\n{metadata(name, lineage, evaluation, verdict).to_yaml()}\n---",
        MARK,
        f"# {name.rpartition('/')[2]}",
        _introduction(lineage),
        "## Use",
        *_use(folder, lineage),
        "## How it was made",
        *_making(lineage),
        *_merged(lineage),
        *_measured(lineage, evaluation),
        *_reward_model(lineage, verdict),
        *(
            ["## Curves", "![score, KL, critic loss and reply length over the run](curves.png)"]
            if (folder / "curves.png").is_file()
            else []
        ),
        *_samples(folder, evaluation),
        "## Limits",
        _bullets([*LIMITS, *(f"In training: {finding}" for finding in lineage.get("findings", []))]),
    ]
    return "\n\n".join(parts) + "\n"


def hub_repo(lineage: Mapping[str, Any]) -> str | None:
    """Where it was or will be uploaded, if anywhere."""
    return lineage.get("hub_repo") or lineage.get("settings", {}).get("hub_model_id")


def hub_base(base: Mapping[str, Any]) -> str | None:
    """The base's name on the Hub; None for a folder that was given no such name."""
    return base.get("hub_id") or (
        None if Path(base["id"]).exists() or Path(base["id"]).is_absolute() else base["id"]
    )


# ---- Metadata ----


def metadata(
    name: str,
    lineage: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    verdict: Mapping[str, Any] | None,
) -> ModelCardData:
    stage, base = lineage["stage"], hub_base(lineage["base"])
    datasets = sorted({row["name"] for row in lineage["data"] if _on_hub(row["name"])})
    results = _results(stage, lineage, evaluation, verdict)
    return ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "finetune" if stage == "merge" else "adapter",
        library_name="transformers" if stage == "merge" else "peft",
        pipeline_tag="text-classification" if stage == "reward" else "text-generation",
        license=lineage["base"].get("licence"),
        datasets=datasets or None,
        tags=["rlhf", stage.replace("_", "-"), *([] if stage == "merge" else ["lora"]), "goose-lora"],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _on_hub(name: str) -> bool:
    return (
        name.count("/") == 1
        and not name.startswith(("embedded/", "/", "."))
        and Path(name).suffix not in READERS
        and not Path(name).exists()
    )


def _data_name(name: str) -> str:
    """A data set as others may know it: of a file, its name alone."""
    return name if _on_hub(name) or name.startswith("embedded/") else Path(name).name


def _results(
    stage: str,
    lineage: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    verdict: Mapping[str, Any] | None,
) -> list[EvalResult]:
    if stage == "reward" and verdict:
        held_out = next(
            (row["name"] for row in lineage["data"] if row.get("use") == "eval"), "held-out pairs"
        )
        values = {"accuracy": ("accuracy on held-out pairs", verdict["accuracy"])}
    elif evaluation and "ppo" in evaluation["figures"]:
        held_out = evaluation.get("dataset", "held-out prompts")
        values = {
            key: (MEASURES[key], value)
            for key, value in evaluation["figures"]["ppo"].items()
            if key in MEASURES
        }
    else:
        return []
    task = "text-classification" if stage == "reward" else "text-generation"
    dataset = _data_name(held_out)
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=key,
            metric_name=name,
            metric_value=value,
        )
        for key, (name, value) in values.items()
    ]


def _verdict(folder: Path, lineage: Mapping[str, Any]) -> dict[str, Any] | None:
    if (folder / "verdict.json").is_file():
        return read_json(folder / "verdict.json")
    return lineage["parents"].get("reward", {}).get("verdict")


# ---- Sections ----


def _introduction(lineage: Mapping[str, Any]) -> str:
    base = lineage["base"]
    what = "The weights of" if lineage["stage"] == "merge" else "A LoRA adapter for"
    how = {"nf4": "kept in nf4", "int8": "kept in int8", "none": "not quantized"}[base["quantization"]]
    start = f"{what} `{hub_base(base) or base['id']}`, by {STAGE_TITLES[lineage['stage']]}"
    return f"{start}. In training the base was {how}, with arithmetic in {base['dtype']}."


def _use(folder: Path, lineage: Mapping[str, Any]) -> list[str]:
    place = hub_repo(lineage) or str(folder)
    plain, quantized = loading_code(dict(lineage), place)
    return [_code(plain), *(["On the base as it was trained on:", _code(quantized)] if quantized else [])]


def _code(text: str, language: str = "python") -> str:
    return f"```{language}\n{text}\n```"


def _making(lineage: Mapping[str, Any]) -> list[str]:
    stages = _stages(lineage)
    rows = []
    for stage in stages:
        figures = {**stage.get("figures", {})}
        seconds, memory, gpu = (figures.pop(key, None) for key in ("seconds", "peak_rss_gb", "peak_gpu_gb"))
        said = ", ".join(f"{key} {rounded(value)}" for key, value in figures.items())
        rows.append(
            [
                stage["stage"],
                said,
                rounded(seconds),
                rounded(memory),
                *([rounded(gpu)] if gpu else []),
            ]
        )
    gpu_too = ["GPU memory, GB"] if any(len(row) > 4 for row in rows) else []
    table = _table(
        ["stage", "figures", "seconds", "memory, GB", *gpu_too],
        [row + ["-"] * (4 + len(gpu_too) - len(row)) for row in rows],
    )
    commands = [stage["command"] for stage in stages if stage.get("command")]
    data = [
        f"{stage['stage']}: `{_data_name(row['name'])}`, split {row['split'] or 'all'}, {row['rows']} rows,"
        f" sha256 `{row['sha256']}`"
        for stage in stages
        for row in stage.get("data", [])
    ]
    machine, versions = lineage["hardware"], lineage["versions"]
    on = ", ".join([*machine["gpus"], f"{machine['processor']}, {machine['cores']} cores"])
    with_what = ", ".join(f"{package} {version}" for package, version in versions.items())
    facts = [*data, f"Hardware: {on}", f"Versions: {with_what}"]
    return [table, *([_code("\n".join(commands), "bash")] if commands else []), _bullets(facts)]


def _stages(lineage: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    known = [
        parent["lineage"]
        for parent in lineage["parents"].values()
        if parent["lineage"].get("parents") is not None
    ]
    before = [stage for parent in known for stage in _stages(parent)]
    return [*before, lineage]


def _merged(lineage: Mapping[str, Any]) -> list[str]:
    if lineage["stage"] != "merge":
        return []
    figures = lineage["figures"]
    where = (
        f"over {figures['tokens']} tokens of replies that the adapter's model samples to {figures['prompts']}"
        " prompts"
    )
    lines = [
        f"KL from the model with the adapter beside the base: {rounded(figures['kl'])} nats a token, {where}."
    ]
    if "kl_nf4" in figures:
        lines.append(
            f"These weights are in nf4, which makes it {rounded(figures['kl_nf4'])} nats a token; the figure"
            " above is that of dense weights."
        )
    return ["## What merging changed", _bullets(lines)]


def _measured(lineage: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None:
        return (
            []
            if lineage["stage"] in ("sft", "reward", "merge")
            else ["## Measured", "recipes/evaluate.py has not been run on it."]
        )
    figures = evaluation["figures"]
    columns = [key for key in MEASURES if any(key in row for row in figures.values())]
    rows = [[name, *(with_interval(row, key) for key in columns)] for name, row in figures.items()]
    where = f" of `{_data_name(evaluation['dataset'])}`" if "dataset" in evaluation else ""
    text = (
        f"{evaluation['prompts']} held-out prompts{where}. Win rates are against {evaluation['against']};"
        " intervals in brackets."
    )
    return ["## Measured", text, _table(["", *(MEASURES[key] for key in columns)], rows)]


def _reward_model(lineage: Mapping[str, Any], verdict: Mapping[str, Any] | None) -> list[str]:
    if verdict is None:
        return []
    low, high = verdict["accuracy_ci"]
    lines = [
        f"right on {rounded(verdict['accuracy'])} ({rounded(low)} to {rounded(high)}) of {verdict['n_pairs']}"
        " held-out pairs"
    ]
    return [
        "## The reward model" if lineage["stage"] != "reward" else "## Measured",
        _bullets([*lines, *(verdict.get("warnings") or [])]),
    ]


def _samples(folder: Path, evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation and evaluation.get("samples"):
        rows, columns = evaluation["samples"], list(evaluation["samples"][0])
    elif (folder / "samples.jsonl").is_file() and (lines := read_jsonl(folder / "samples.jsonl")):
        rows, columns = lines[-SAMPLES:], ["prompt", "reply", "raw_score"]
    else:
        return []
    return ["## Samples", _table(columns, [[_text(row[column]) for column in columns] for row in rows])]


def _text(value: Any) -> str:
    """A reply in one cell, as it is: no markup, no line breaks."""
    if not isinstance(value, str):
        return rounded(value)
    text = " ".join(value.split())
    shown = html.escape(text[:CELL], quote=False) + (" ..." if len(text) > CELL else "")
    return "".join(f"\\{char}" if char in "|`*_[]\\" else char for char in shown)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
