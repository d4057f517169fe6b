"""The chain from the base to an adapter: its ancestors, what does not fit, code that loads it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from goose_lora.errors import UserError
from goose_lora.files import file_sha256, read_json
from goose_lora.models.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_place,
    has_tokenizer,
    saved_template,
)
from goose_lora.models.identity import BaseName, same_base
from goose_lora.reporting.run_files import BaseRecord, Lineage, ParentRecord, lineage_of
from goose_lora.sharing.lineage import hub_name, template_sha256


@dataclass
class Ancestor:
    """One adapter of the chain: where it is, its lineage, and what does not fit.

    ``role`` is the role in which its child uses it.
    """

    name: str
    role: str
    lineage: Lineage
    problems: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        return self.lineage.get("stage", "adapter")

    def line(self) -> str:
        """Return stage, name and figures in one line."""
        figures = [f"{key} {_short(value)}" for key, value in self.lineage.get("figures", {}).items()]
        line = f"{self.stage:9} {self.name}"
        if figures:
            line += f"   {', '.join(figures)}"
        return line


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- The chain ----


def read_chain(folder: str | Path) -> list[Ancestor]:
    """Return the adapters from which the one in ``folder`` was made, with that one last.

    A parent is read from its folder; where that is gone, or belongs to a later stage of the chain,
    it is read from the copy of its lineage that its child has.

    Raises:
        UserError: there is no adapter in ``folder``.
    """
    folder = Path(folder)
    lineage = lineage_of(folder)
    if not (folder / ADAPTER_CONFIG).is_file() and lineage.get("stage") != "merge":
        raise UserError(
            f"{folder} has no {ADAPTER_CONFIG}: no adapter. Give the output_dir of a stage, or"
            " user/repo on the Hub."
        )
    # Of an adapter of other origin, PEFT's own file names the base
    base = lineage.get("base") or {"id": read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")}
    base = {**base, "id": base_place(folder, base) or base["id"]}
    last = Ancestor(hub_name(folder), "policy", cast(Lineage, {**lineage, "base": base}))
    last.problems += _own_problems(folder, last.lineage)
    return [*_ancestors(last, frozenset([folder.resolve()])), last]


def _ancestors(child: Ancestor, later: frozenset[Path]) -> list[Ancestor]:
    """Return the parents of ``child`` and theirs, the oldest first.

    ``later`` holds the folders of ``child`` and of the stages after it. A folder is read once on
    the way from the end of the chain to its beginning, and a recorded copy has no circle, so that
    the walk ends.
    """
    # Depth first, so that each adapter comes after what it was made from
    found = []
    for role, noted in child.lineage.get("parents", {}).items():
        folder = Path(noted["name"]).resolve()
        parent = _read_parent(role, noted, child, is_later=folder in later)
        found += [*_ancestors(parent, later | {folder}), parent]
    return found


def _read_parent(role: str, noted: ParentRecord, child: Ancestor, *, is_later: bool) -> Ancestor:
    """Return a parent of ``child``, with what does not fit.

    ``is_later`` says that the parent's folder is that of a later stage too.
    """
    name = noted["name"]
    weights = Path(name) / ADAPTER_WEIGHTS
    problems = []

    # Where the parent's lineage is to be had
    if weights.is_file() and not is_later:
        lineage = lineage_of(name) or noted["lineage"]
        now = file_sha256(weights)
        if now != noted["sha256"]:
            problems.append(
                f"has changed since {child.stage} started from it: sha256 was {noted['sha256'][:12]}, is"
                f" {now[:12]}"
            )
    else:
        where = "not here any more"
        if is_later:
            where = "replaced"
            problems.append(
                "its folder is that of a later stage of this chain too, so what"
                f" {child.stage} started from is not there any more"
            )
        elif "@" in name:
            where = "on the Hub"
        lineage = noted["lineage"]
        name = f"{name} ({where}; as recorded)"

    return Ancestor(name, role, lineage, problems + _misfits(lineage, child))


def recorded_stages(lineage: Lineage) -> list[Lineage]:
    """Return the lineages from which a stage was made, as it recorded them, with its own last.

    Parents of other origin, which have no stage that made them, are left out.
    """
    known = [
        parent["lineage"]
        for parent in lineage["parents"].values()
        if parent["lineage"].get("parents") is not None
    ]
    return [*(stage for parent in known for stage in recorded_stages(parent)), lineage]


# ---- What does not fit ----


def _misfits(parent: Lineage, child: Ancestor) -> list[str]:
    """Return how a parent was trained otherwise than its child."""
    ours, theirs = child.lineage["base"], parent.get("base")
    if theirs is None:
        return []
    problems = []

    # The base: another one, one under another name, or another commit of the same
    if not same_base(_named(ours), _named(theirs)):
        if Path(ours["id"]).is_absolute() == Path(theirs["id"]).is_absolute():
            problems.append(f"was trained on another base: {theirs['id']}, {child.stage} on {ours['id']}")
        else:  # as after a push with --base_hub_id
            problems.append(
                f"names the base {theirs['id']}, and {child.stage} {ours['id']}: one is a folder, see that"
                " they are the same"
            )
    else:
        our_commit, their_commit = ours.get("commit"), theirs.get("commit")
        if our_commit and their_commit and our_commit != their_commit:
            problems.append(
                f"was trained on another commit of the base: {their_commit[:12]}, {child.stage} on"
                f" {our_commit[:12]}"
            )

    # How the base was kept, and how chats were written
    if ours.get("quantization") and ours["quantization"] != theirs["quantization"]:
        problems.append(
            f"was trained on a base in {theirs['quantization']}, {child.stage} on one in"
            f" {ours['quantization']}"
        )
    if parent.get("chat_template_sha256") != child.lineage.get("chat_template_sha256"):
        problems.append(f"was trained with another chat template than {child.stage}")
    return problems


def _named(base: BaseRecord) -> BaseName:
    revision = base.get("commit") or base.get("revision")
    return BaseName(base["id"], base.get("hub_id"), base.get("content"), revision)


def _own_problems(folder: Path, lineage: Lineage) -> list[str]:
    """Return how the files in ``folder`` are not those that its lineage was written for."""
    # The weights, and the base that PEFT's file names
    problems, base = [], lineage["base"]
    if lineage.get("sha256") and lineage["sha256"] != file_sha256(folder / ADAPTER_WEIGHTS):
        problems.append(f"{ADAPTER_WEIGHTS} is not the one that {lineage['stage']} saved")
    if (folder / ADAPTER_CONFIG).is_file():
        named = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        # A base that was moved keeps its folder's name
        if named and named != base["id"] and not same_base(BaseName(named), _named(base)):
            problems.append(f"{ADAPTER_CONFIG} names the base {named}, the lineage {base['id']}")
    # The template, of the adapter's tokenizer and of the base's. An older lineage does not name it
    if "chat_template_sha256" not in lineage:
        return problems
    for place in (folder, Path(base["id"])):
        has_tokenizer = (place / "tokenizer_config.json").is_file()
        if has_tokenizer and template_sha256(saved_template(place)) != lineage["chat_template_sha256"]:
            problems.append(f"the chat template in {place} is not the one that it was trained with")
    return problems


# ---- As text ----


def describe_chain(folder: str | Path) -> str:
    """Return what ``goose-lora show`` prints: the chain, what does not fit, and loading code."""
    chain = read_chain(folder)
    own = chain[-1].lineage
    lines = [_base_line(own["base"]), *(ancestor.line() for ancestor in chain)]
    if not own.get("stage"):
        lines.append(
            f"{folder} has no goose_lora.json: an adapter of other origin, of which only the base's name is"
            " known."
        )

    loads_base = own.get("stage") != "merge" and own["base"]["id"] is not None
    if loads_base and base_place(folder, own["base"]) is None:
        lines.append(
            "The base is not here. Commands that load it take its place as --base PATH_OR_HUB_ID, recipes as"
            " model_name_or_path."
        )

    # What does not fit
    problems = [
        f"  {ancestor.stage} {ancestor.name}: {problem}"
        for ancestor in chain
        for problem in ancestor.problems
    ]
    if problems:
        lines += ["", "Does not fit:", *problems]
    else:
        lines += ["", "All of it fits together."]

    # How to load it
    plain, quantized = loading_code(own, hub_name(folder), own_tokenizer=has_tokenizer(Path(folder)))
    lines += ["", "Without this project:", "", plain]
    if quantized:
        lines += ["", "On the base as it was trained on:", "", quantized]
    return "\n".join(lines)


def _base_line(base: BaseRecord) -> str:
    line = f"{'base':9} {base['id']}"
    if commit := base.get("commit"):
        line += f" at commit {commit[:12]}"
    elif revision := base.get("revision"):
        line += f" at {revision}"
    made = [str(base[key]) for key in ("quantization", "dtype") if base.get(key)]
    if made:
        line += f"   {', '.join(made)}"
    return line


# As models.quantization.quantization_config makes them.
_QUANTIZED = {
    "nf4": (
        'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,'
        ' bnb_4bit_compute_dtype="{dtype}")'
    ),
    "int8": "BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)",
}


def loading_code(lineage: Lineage, folder: str, *, own_tokenizer: bool = True) -> tuple[str, str | None]:
    """Return Python code that loads an adapter without this project, on two bases.

    The first is the base as it is; the second the base quantized as in training, None if it was
    not quantized. Merged weights are loaded alone, and have no second.

    Args:
        own_tokenizer: whether a tokenizer lies beside the adapter; else it is the base's.
    """
    base, place = lineage["base"], _place(folder)
    if lineage.get("stage") == "merge":
        merged = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained({place}, dtype="auto")',
            f"tokenizer = AutoTokenizer.from_pretrained({place})",
        ]
        return "\n".join(merged), None

    # How the base is loaded
    dtype = base.get("dtype") or "auto"
    revision = base.get("commit") or base.get("revision")
    of_base = f'"{base.get("hub_id") or base["id"]}"'
    if revision:
        of_base += f', revision="{revision}"'
    options = [of_base, f'dtype="{dtype}"']

    # What comes after it. A reward model is a classifier with one output, which finds the end of a
    # text by its padding.
    auto = "AutoModelForCausalLM"
    rest = [f"tokenizer = AutoTokenizer.from_pretrained({place if own_tokenizer else of_base})"]
    if lineage.get("stage") == "reward":
        auto = "AutoModelForSequenceClassification"
        options.append("num_labels=1")
        rest.append("base.config.pad_token_id = tokenizer.pad_token_id")
    rest.append(f"model = PeftModel.from_pretrained(base, {place})")

    # The same code twice: on the base as it is, and on the quantized one
    plain = _adapter_code(auto, ["AutoTokenizer"], options, rest)
    how = _QUANTIZED.get(base.get("quantization") or "none")
    if how is None:
        return plain, None
    options = [*options, f"quantization_config={how.format(dtype=dtype)}"]
    return plain, _adapter_code(auto, ["AutoTokenizer", "BitsAndBytesConfig"], options, rest)


def _adapter_code(auto: str, imports: Sequence[str], options: Sequence[str], rest: Sequence[str]) -> str:
    lines = [
        f"from transformers import {', '.join([auto, *imports])}",
        "from peft import PeftModel",
        "",
        f"base = {auto}.from_pretrained({', '.join(options)})",
        *rest,
    ]
    return "\n".join(lines)


def _place(name: str) -> str:
    """Return the arguments of from_pretrained for a folder, or for user/repo[/folder]@commit."""
    repo, at, revision = name.partition("@")
    if not at or "/" not in repo:  # a folder, whose name may have one too
        return f'"{name}"'
    owner, repo, *inside = repo.split("/")
    subfolder = "".join(f', subfolder="{part}"' for part in inside)
    return f'"{owner}/{repo}"{subfolder}, revision="{revision}"'
