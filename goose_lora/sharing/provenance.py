"""The chain from the base to a policy, what in it does not fit together, and the code that loads
its end."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from goose_lora.errors import UserError
from goose_lora.files import file_sha256, read_json
from goose_lora.models.adapters import CONFIG, WEIGHTS, read_lineage
from goose_lora.models.folders import saved_template
from goose_lora.sharing.lineage import hub_name, template_sha256


@dataclass
class Ancestor:
    """One adapter of the chain: its lineage, where it is, and what does not fit. ``role`` is what
    its child uses it as."""

    name: str
    role: str
    lineage: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        return self.lineage.get("stage", "adapter")

    def line(self) -> str:
        figures = ", ".join(
            f"{key} {_short(value)}" for key, value in self.lineage.get("figures", {}).items()
        )
        return f"{self.stage:9} {self.name}" + (f"   {figures}" if figures else "")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read_chain(folder: str | Path) -> list[Ancestor]:
    """The adapters from which the one in ``folder`` was made, it last: parents are read where they
    still are, else from their recorded copies.

    Raises:
        ValueError: there is no adapter in ``folder``.
    """
    folder = Path(folder)
    lineage = read_lineage(folder)
    if not (folder / CONFIG).is_file() and lineage.get("stage") != "merge":
        raise UserError(
            f"{folder} has no {CONFIG}: no adapter. Give the output_dir of a stage, or user/repo on the Hub."
        )
    base = lineage.get("base") or {"id": read_json(folder / CONFIG).get("base_model_name_or_path")}
    link = Ancestor(hub_name(folder), "policy", {**lineage, "base": base})
    link.problems += _own_problems(folder, link.lineage)
    return [*_parents(link), link]


def _parents(child: Ancestor) -> list[Ancestor]:
    links = []
    for role, noted in child.lineage.get("parents", {}).items():
        there = (Path(noted["name"]) / WEIGHTS).is_file()
        lineage = (read_lineage(noted["name"]) if there else {}) or noted["lineage"]
        where = "on the Hub" if "@" in noted["name"] else "not here any more"
        link = Ancestor(noted["name"] if there else f"{noted['name']} ({where}; as recorded)", role, lineage)
        if there and (now := file_sha256(Path(noted["name"]) / WEIGHTS)) != noted["sha256"]:
            link.problems.append(
                f"has changed since {child.stage} started from it: sha256 was {noted['sha256'][:12]}, is"
                f" {now[:12]}"
            )
        link.problems += _misfits(lineage, child)
        links += [*_parents(link), link]
    return links


def _misfits(parent: dict[str, Any], child: Ancestor) -> list[str]:
    """How a parent was trained otherwise than its child."""
    ours, theirs = child.lineage["base"], parent.get("base")
    if theirs is None:
        return []
    problems = []
    if _base_name(ours) != _base_name(theirs):
        if Path(ours["id"]).is_absolute() == Path(theirs["id"]).is_absolute():
            problems.append(f"was trained on another base: {theirs['id']}, {child.stage} on {ours['id']}")
        else:  # as after a push with --base_hub_id
            problems.append(
                f"names the base {theirs['id']}, and {child.stage} {ours['id']}: one is a folder, see that"
                " they are the same"
            )
    elif ours.get("commit") and theirs.get("commit") and ours["commit"] != theirs["commit"]:
        problems.append(
            f"was trained on another commit of the base: {theirs['commit'][:12]}, {child.stage} on"
            f" {ours['commit'][:12]}"
        )
    if ours.get("quantization") and ours["quantization"] != theirs["quantization"]:
        problems.append(
            f"was trained on a base in {theirs['quantization']}, {child.stage} on one in"
            f" {ours['quantization']}"
        )
    if parent.get("chat_template_sha256") != child.lineage.get("chat_template_sha256"):
        problems.append(f"was trained with another chat template than {child.stage}")
    return problems


def _base_name(base: dict[str, Any]) -> str:
    return Path(base.get("hub_id") or base["id"]).name


def _own_problems(folder: Path, lineage: dict[str, Any]) -> list[str]:
    """How the files in ``folder`` are not those that its lineage was written for."""
    problems, base = [], lineage["base"]
    if lineage.get("sha256") and lineage["sha256"] != file_sha256(folder / WEIGHTS):
        problems.append(f"{WEIGHTS} is not the one that {lineage['stage']} saved")
    named = read_json(folder / CONFIG).get("base_model_name_or_path") if (folder / CONFIG).is_file() else None
    if named and named not in (base["id"], base.get("hub_id")) and Path(named).name != Path(base["id"]).name:
        problems.append(f"{CONFIG} names the base {named}, the lineage {base['id']}")
    if "chat_template_sha256" not in lineage:
        return problems
    for place in (folder, Path(base["id"])):
        has_tokenizer = (place / "tokenizer_config.json").is_file()
        if has_tokenizer and template_sha256(saved_template(place)) != lineage["chat_template_sha256"]:
            problems.append(f"the chat template in {place} is not the one that it was trained with")
    return problems


def describe_chain(folder: str | Path) -> str:
    """What ``goose-lora show`` prints: the chain, what does not fit, and the code that loads it."""
    links = read_chain(folder)
    base = links[-1].lineage["base"]
    made = ", ".join(str(base[key]) for key in ("quantization", "dtype") if base.get(key))
    commit = (
        f" at commit {base['commit'][:12]}"
        if base.get("commit")
        else f" at {base['revision']}"
        if base.get("revision")
        else ""
    )
    lines = [
        f"{'base':9} {base['id']}{commit}" + (f"   {made}" if made else ""),
        *(link.line() for link in links),
    ]
    problems = [f"{link.stage} {link.name}: {problem}" for link in links for problem in link.problems]
    if not links[-1].lineage.get("stage"):
        lines.append(
            f"{folder} has no goose_lora.json: an adapter of other origin, of which only the base's name is"
            " known."
        )
    lines += (
        ["", "Does not fit:", *(f"  {problem}" for problem in problems)]
        if problems
        else ["", "All of it fits together."]
    )
    plain, quantized = loading_code(links[-1].lineage, hub_name(folder))
    lines += ["", "Without this project:", "", plain]
    return "\n".join(lines + (["", "On the base as it was trained on:", "", quantized] if quantized else []))


def loading_code(lineage: dict[str, Any], folder: str) -> tuple[str, str | None]:
    """Python that loads an adapter without this project: on the base as it is, and on the base
    quantized as in training, if it was."""
    base, is_reward = lineage["base"], lineage.get("stage") == "reward"
    name, dtype = base.get("hub_id") or base["id"], base.get("dtype") or "auto"
    revision = base.get("commit") or base.get("revision")
    adapter = _place(folder)
    if lineage.get("stage") == "merge":
        start = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        load = [
            f'model = AutoModelForCausalLM.from_pretrained({adapter}, dtype="auto")',
            f"tokenizer = AutoTokenizer.from_pretrained({adapter})",
        ]
        return start + "\n".join(load), None
    auto = "AutoModelForSequenceClassification" if is_reward else "AutoModelForCausalLM"
    options = [
        f'dtype="{dtype}"',
        *([f'revision="{revision}"'] if revision else []),
        *(["num_labels=1"] if is_reward else []),
    ]
    end = [
        f"tokenizer = AutoTokenizer.from_pretrained({adapter})",
        *(["base.config.pad_token_id = tokenizer.pad_token_id"] if is_reward else []),
        f"model = PeftModel.from_pretrained(base, {adapter})",
    ]

    def code(imports: list[str], options: list[str]) -> str:
        start = [
            f"from transformers import {', '.join([auto, 'AutoTokenizer', *imports])}",
            "from peft import PeftModel",
            "",
        ]
        return "\n".join([*start, f'base = {auto}.from_pretrained("{name}", {", ".join(options)})', *end])

    how = _QUANTIZED.get(base.get("quantization") or "none", "").format(dtype=dtype)
    return code([], options), (
        code(["BitsAndBytesConfig"], [*options, f"quantization_config={how}"]) if how else None
    )


# As loading.quantization_config makes them.
_QUANTIZED = {
    "nf4": (
        'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,'
        ' bnb_4bit_compute_dtype="{dtype}")'
    ),
    "int8": "BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)",
}


def _place(name: str) -> str:
    """Arguments of from_pretrained: a folder, or user/repo[/folder]@commit taken apart."""
    repo, at, revision = name.partition("@")
    if not at:
        return f'"{name}"'
    owner, repo, *inside = repo.split("/")
    return (
        f'"{owner}/{repo}"' + "".join(f', subfolder="{part}"' for part in inside) + f', revision="{revision}"'
    )
