"""The model card: README.md of an output, written from the run's own files.

Every number in it stands in one of them.
"""

import html
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCardData

from goose_lora.data.sources import READERS
from goose_lora.files import read_json, read_jsonl, write_json, write_text
from goose_lora.models.folders import read_lineage
from goose_lora.ownership import claim
from goose_lora.reporting.figures import MEASURES, STAGE_TITLES, measured_in, rounded, with_interval
from goose_lora.reporting.run_files import (
    BaseRecord,
    DataRecord,
    EvaluationFile,
    Lineage,
    VerdictFile,
    lineage_of,
    read_evaluation,
)
from goose_lora.sharing.lineage import hub_name
from goose_lora.sharing.provenance import loading_code, recorded_stages

# A card without this line is someone's own, and is left alone.
MARK = (
    "<!-- Written by goose_lora from the files of the run, and again when they change. Take this line out to"
    " keep your own text. -->"
)
# A path from the root of this machine, in a word of a command; what stands after : or // is none
_ABSOLUTE = re.compile(r"(?<![\w.~/:-])/[^'\"\],]+")
SAMPLES, CELL = 4, 300  # rows of the table of samples, and most characters of a reply in it
# What every card says, whatever was measured.
_LIMITS = [
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


def write_card(folder: str | Path, *, place: Path | None = None) -> None:
    """Write README.md of the output in ``folder``; if given, ``place`` is where it will be."""
    write_text(Path(folder) / "README.md", render_card(folder, place=place))


def refresh_card(folder: str | Path) -> None:
    """Write the card again from the files as they are now, unless someone took its mark out."""
    path = Path(folder) / "README.md"
    if path.is_file() and MARK in path.read_text(encoding="utf-8"):
        write_card(folder)


def add_evaluation(
    policy: str | Path, evaluation: Mapping[str, Any], replies: Sequence[Mapping[str, str]]
) -> None:
    """Write what recipes/evaluate.py measured beside the policy, and the card again with it.

    Does nothing for an adapter of the Hub, or for one without a lineage.
    """
    if read_lineage(policy) and hub_name(policy) == str(policy):
        claim(policy, "evaluation.json")
        write_json(Path(policy) / "evaluation.json", {**evaluation, "samples": list(replies[:SAMPLES])})
        refresh_card(policy)


def render_card(folder: str | Path, *, place: Path | None = None) -> str:
    """Return the card as text: the Hub's metadata as YAML, then Markdown."""
    # The files of the run, and where readers will find them
    folder = Path(folder)
    place = place or folder
    lineage = lineage_of(folder)
    evaluation = read_evaluation(folder)
    verdict = _verdict(folder, lineage)

    # The parts of the card. A section that does not apply to the stage is an empty list.
    name = hub_repo(lineage) or place.resolve().name
    findings = [f"In training: {finding}" for finding in lineage.get("findings", [])]
    parts = [
        f"---\n{metadata(name, lineage, evaluation, verdict).to_yaml()}\n---",
        MARK,
        f"# {name.rpartition('/')[2]}",
        _introduction(lineage),
        "## Use",
        *_use(place, lineage),
        "## How it was made",
        *_making(lineage),
        *_merged(lineage),
        *_measured(lineage, evaluation),
        *_reward_model(lineage, verdict),
        *_curves(folder),
        *_samples(folder, evaluation),
        "## Limits",
        _bullets([*_LIMITS, *findings]),
    ]
    return "\n\n".join(parts) + "\n"


def _verdict(folder: Path, lineage: Lineage) -> VerdictFile | None:
    """Return the verdict on a reward model: its own, or that on the one a policy learned from."""
    if (folder / "verdict.json").is_file():
        return cast(VerdictFile, read_json(folder / "verdict.json"))
    parent = lineage["parents"].get("reward")
    return parent["verdict"] if parent else None


def hub_repo(lineage: Lineage) -> str | None:
    """Return the repository to which the output was or will be uploaded, if there is one."""
    return lineage.get("hub_repo") or lineage.get("settings", {}).get("hub_model_id")


def hub_base(base: BaseRecord) -> str | None:
    """Return the base's name on the Hub, None for a folder without one."""
    if name := base.get("hub_id"):
        return name
    is_folder = Path(base["id"]).exists() or Path(base["id"]).is_absolute()
    return None if is_folder else base["id"]


# ---- Metadata ----


def metadata(
    name: str,
    lineage: Lineage,
    evaluation: EvaluationFile | None,
    verdict: VerdictFile | None,
) -> ModelCardData:
    """Return what the Hub reads of a card: base, library, task, licence, data sets, results."""
    # Merged weights are a model of transformers, everything else an adapter of PEFT
    stage, base = lineage["stage"], hub_base(lineage["base"])
    library, relation, tags = "peft", "adapter", ["rlhf", stage.replace("_", "-"), "lora", "goose-lora"]
    if stage == "merge":
        library, relation = "transformers", "finetune"
        tags.remove("lora")
    # Files of this machine are no data sets of the Hub
    datasets = sorted({row["name"] for row in lineage["data"] if _on_hub(row["name"])})
    results = _results(lineage, evaluation, verdict)
    # The Hub asks for a name only where there are results
    return ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        library_name=library,
        pipeline_tag=_task(stage),
        license=lineage["base"].get("licence"),
        datasets=datasets or None,
        tags=tags,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _task(stage: str) -> str:
    return "text-classification" if stage == "reward" else "text-generation"


def _on_hub(name: str) -> bool:
    return (
        name.count("/") == 1
        and not name.startswith(("embedded/", "/", "."))
        and Path(name).suffix not in READERS
        and not Path(name).exists()
    )


def _made_of(row: DataRecord) -> str:
    """Return how many pairs a stage has made of its rows, and of which kind."""
    made = ", ".join(f"{count} {kind}" for kind, count in row.get("augmented", {}).items())
    return f"; pairs made of them: {made}" if made else ""


def _data_name(name: str) -> str:
    """Return a data set's name as others may know it: of a file, its name without the folder."""
    return name if _on_hub(name) or name.startswith("embedded/") else Path(name).name


def _results(
    lineage: Lineage, evaluation: EvaluationFile | None, verdict: VerdictFile | None
) -> list[EvalResult]:
    """Return the figures that the Hub shows: a reward model's accuracy, or a policy's measures."""
    stage = lineage["stage"]
    if stage == "reward" and verdict:
        # A reward model: its accuracy on held-out pairs
        held_out = [row["name"] for row in lineage["data"] if row.get("use") == "eval"]
        dataset = _data_name([*held_out, "held-out pairs"][0])
        values = {"accuracy": ("accuracy on held-out pairs", verdict["accuracy"])}
    elif evaluation and "ppo" in evaluation["figures"]:
        # A policy: what recipes/evaluate.py measured
        dataset = _data_name(evaluation.get("dataset", "held-out prompts"))
        row = evaluation["figures"]["ppo"]
        values = {key: (MEASURES[key], value) for key, value in row.items() if key in MEASURES}
    else:
        return []
    return [
        EvalResult(
            task_type=_task(stage),
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=key,
            metric_name=name,
            metric_value=value,
        )
        for key, (name, value) in values.items()
    ]


# ---- Sections ----


def _introduction(lineage: Lineage) -> str:
    # A base in a folder has the folder's name, unless someone said what it is on the Hub
    base = lineage["base"]
    what = "The weights of" if lineage["stage"] == "merge" else "A LoRA adapter for"
    how = {"nf4": "kept in nf4", "int8": "kept in int8", "none": "not quantized"}[base["quantization"]]
    start = f"{what} `{hub_base(base) or Path(base['id']).name}`, by {STAGE_TITLES[lineage['stage']]}"
    return f"{start}. In training the base was {how}, with arithmetic in {base['dtype']}."


def _use(folder: Path, lineage: Lineage) -> list[str]:
    # A folder has its name alone: where it lies on this machine is nobody's business
    base, repo, own = lineage["base"], hub_repo(lineage), folder.resolve().name
    base_name = hub_base(base) or Path(base["id"]).name
    shown = cast(Lineage, {**lineage, "base": {**base, "id": base_name}})
    plain, quantized = loading_code(shown, repo or own)
    folders = [] if repo else [own]
    if hub_base(base) is None and lineage["stage"] != "merge":
        folders.append(base_name)
    parts = []
    if folders:
        named = " and ".join(f"`{name}`" for name in folders)
        parts.append(f"To be run where {named} can be found, or with the paths that they have:")
    parts.append(_code(plain))
    if quantized:
        parts += ["On the base as it was trained on:", _code(quantized)]
    return parts


def _making(lineage: Lineage) -> list[str]:
    """Return the stages with their figures and cost, their commands, and data and machine."""
    # Stages and commands from the first to this one
    stages = recorded_stages(lineage)
    parts = [_stages_table(stages)]
    commands = [_anywhere(stage["command"] or "") for stage in stages if stage.get("command")]
    if commands:
        parts.append(_code("\n".join(commands), "bash"))

    # What they read, and what they ran on
    data = [
        f"{stage['stage']}: `{_data_name(row['name'])}`, split {row['split'] or 'all'}, {row['rows']} rows,"
        f" sha256 `{row['sha256']}`{_made_of(row)}"
        for stage in stages
        for row in stage.get("data", [])
    ]
    machine, versions = lineage["hardware"], lineage["versions"]
    parts_of_it = ", ".join([*machine["gpus"], f"{machine['processor']}, {machine['cores']} cores"])
    packages = ", ".join(f"{package} {version}" for package, version in versions.items())
    return [*parts, _bullets([*data, f"Hardware: {parts_of_it}", f"Versions: {packages}"])]


def _anywhere(command: str) -> str:
    """Return a command with the names of files and folders alone, without where they are here."""
    if command.endswith(")"):  # a call from Python
        return _ABSOLUTE.sub(lambda found: Path(found[0]).name, command)
    words = [_ABSOLUTE.sub(lambda found: Path(found[0]).name, word) for word in shlex.split(command)]
    return shlex.join(words)


def _stages_table(stages: Sequence[Lineage]) -> str:
    rows = []
    for stage in stages:
        # The cost has columns of its own
        figures = dict(stage.get("figures", {}))
        cost = [figures.pop(key, None) for key in ("seconds", "peak_rss_gb", "peak_gpu_gb")]
        said = ", ".join(f"{key} {rounded(value)}" for key, value in figures.items())
        rows.append([stage["stage"], said, *map(rounded, cost)])
    columns = ["stage", "figures", "seconds", "memory, GB", "GPU memory, GB"]
    # Runs without a GPU have no column for it
    if all(row[-1] == rounded(None) for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return _table(columns, rows)


def _merged(lineage: Lineage) -> list[str]:
    if lineage["stage"] != "merge":
        return []
    # Figures that merge measured over its own replies
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


def _measured(lineage: Lineage, evaluation: EvaluationFile | None) -> list[str]:
    """Return the figures of recipes/evaluate.py, a row a policy and a column a measure."""
    if evaluation is None:
        # recipes/evaluate.py is for policies of PPO
        if lineage["stage"] in ("sft", "reward", "merge"):
            return []
        return ["## Measured", "recipes/evaluate.py has not been run on it."]
    figures = evaluation["figures"]
    measured = measured_in(list(figures.values()))
    rows = [[name, *(with_interval(row, key) for key in measured)] for name, row in figures.items()]
    where = f" of `{_data_name(evaluation['dataset'])}`" if "dataset" in evaluation else ""
    text = (
        f"{evaluation['prompts']} held-out prompts{where}. Win rates are against {evaluation['against']};"
        " intervals in brackets."
    )
    if judge := evaluation.get("judge"):
        text += f" The judge is `{_anywhere(judge)}`."
    return ["## Measured", text, _table(["", *(MEASURES[key] for key in measured)], rows)]


def _reward_model(lineage: Lineage, verdict: VerdictFile | None) -> list[str]:
    if verdict is None:
        return []
    # Of a reward model it is the result, of a policy what it learned from
    title = "## Measured" if lineage["stage"] == "reward" else "## The reward model"
    low, high = verdict["accuracy_ci"]
    right = (
        f"right on {rounded(verdict['accuracy'])} ({rounded(low)} to {rounded(high)}) of {verdict['n_pairs']}"
        " held-out pairs"
    )
    members = verdict.get("members", {})
    if members:
        accuracies = ", ".join(rounded(figures["accuracy"]) for figures in members.values())
        right += (
            f", as the mean of {len(members)} reward models (members.json; right on {accuracies}); the"
            " weights here are the first one's"
        )
    return [title, _bullets([right, *(verdict.get("warnings") or [])])]


def _curves(folder: Path) -> list[str]:
    if not (folder / "curves.png").is_file():
        return []
    return ["## Curves", "![score, KL, critic loss and reply length over the run](curves.png)"]


def _samples(folder: Path, evaluation: EvaluationFile | None) -> list[str]:
    """Return replies to a few prompts: those of each evaluated policy, or the run's last ones."""
    path = folder / "samples.jsonl"
    if evaluation and evaluation.get("samples"):
        rows = [_as_asked(row) for row in evaluation["samples"]]
        columns = list(rows[0])
    elif path.is_file() and (lines := read_jsonl(path)):
        rows, columns = [_as_asked(row) for row in lines[-SAMPLES:]], ["prompt", "reply", "raw_score"]
    else:
        return []
    return ["## Samples", _table(columns, [[_text(row[column]) for column in columns] for row in rows])]


def _as_asked(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row whose prompt is without its template, where the row has it so."""
    shown = {**row, "prompt": row.get("asked", row["prompt"])}
    shown.pop("asked", None)
    return shown


# ---- Markdown ----


def _text(value: object) -> str:
    """Return a reply as it is for one cell of a table: no markup, no line breaks."""
    if not isinstance(value, str):
        return rounded(value)
    # HTML is text too in Markdown, and a bar ends a cell
    text = " ".join(value.split())
    shown = html.escape(text[:CELL], quote=False)
    if len(text) > CELL:
        shown += " ..."
    return "".join(f"\\{char}" if char in "|`*_[]\\" else char for char in shown)


def _code(text: str, language: str = "python") -> str:
    return f"```{language}\n{text}\n```"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
