"""Folders of models and adapters, looked at before any weights are loaded.

What is wrong with one is said in one line.

Weights are read from safetensors alone: .bin and .pt files are pickles, which can run code as they
are read.
"""

import copy
import json
import logging
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import _CACHED_NO_EXIST, HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from goose_lora.errors import UserError
from goose_lora.files import brief, first_line, is_number, read_json_object, write_text
from goose_lora.models.ensembles import MEMBERS_FILE, RewardEnsemble, member_folders, read_ensemble
from goose_lora.models.identity import BaseName, base_content, same_base

logger = logging.getLogger(__name__)

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LINEAGE = "goose_lora.json"
NAMED_TEMPLATES = "additional_chat_templates"  # a folder of transformers', a file a template
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
Template = str | dict[str, str] | list[dict[str, str]] | None  # of chat: one, several by name, or none

_HUB_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(?:/(?P<folder>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")
_READ_BESIDE = (
    LINEAGE,
    MEMBERS_FILE,
    "verdict.json",
    "chat_template.jinja",
    "tokenizer_config.json",
    "tokenizer.json",
)


@contextmanager
def reading(
    what: str, name: str, way_out: str = "Save or download it again, or update transformers"
) -> Iterator[None]:
    """Turn whatever libraries raise of a model's files into a UserError of one line.

    tokenizers raises bare Exception, safetensors an error of its own, transformers KeyError,
    TypeError and others. Want of memory, of a package, or of a working GPU is something else, and
    passes.
    """
    try:
        yield
    except Exception as error:
        # What is not about the files passes as it is
        of_shapes = any(words in str(error) for words in ("mismatch", "negative dimension"))
        other = isinstance(error, RuntimeError) and not of_shapes
        if other or isinstance(error, (torch.OutOfMemoryError, MemoryError, ImportError)):
            raise
        # What users can mend has a line of its own; the rest is quoted
        if "use_safetensors" in str(error):
            way_out = (
                "Pickled ones can run code as they are read: convert them where you trust them, with"
                " save_pretrained"
            )
            raise UserError(f"{name}: has no weights in safetensors. {way_out}.") from error
        if not Path(name).exists() and isinstance(error, OSError):
            raise UserError(f"{name}: {_not_found()}") from error
        if "trust_remote_code" in str(error):
            own_code = (
                "it needs Python code of its own repository. Read that code, and set trust_remote_code: true"
                " if you trust it."
            )
            raise UserError(f"{name}: {own_code}") from error
        raise UserError(f"{name}: {what} cannot be read: {brief(error)}. {way_out}.") from error


def _not_found() -> str:
    if constants.HF_HUB_OFFLINE:
        return (
            "not a folder here, and not in the cache of the Hub, which HF_HUB_OFFLINE=1 forbids to ask. Check"
            " the name, or unset it."
        )
    return (
        "not a folder here, and not to be had from the Hub. Check the name, the network, and for a gated"
        " model the token (hf auth login)."
    )


def require_name(name: str) -> None:
    """Raise ValueError unless ``name`` is a folder or may be a name on the Hub."""
    if Path(name).is_file():
        raise UserError(
            f"{name}: a file, not a model. Give the folder that holds its config.json, or a name on the Hub."
        )
    if not Path(name).is_dir() and (
        name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name.strip()
    ):
        raise UserError(
            f"{name or repr(name)}: no such folder. Check the path, or give a name on the Hub, such as"
            " org/model."
        )


def require_model(name: str, *, weights: bool = True) -> None:
    """Raise UserError unless ``name`` is the folder of a model, or may be a name on the Hub.

    With ``weights`` the folder must have them in safetensors.
    """
    require_name(name)
    path = Path(name)
    if path.is_dir():
        # A folder here: configuration, then weights, then whether they are whole
        configured = (path / "config.json").is_file()
        if (weights or not configured) and not any(path.glob("*.safetensors")):
            for file in path.glob("*.gguf"):
                raise UserError(
                    f"{name}: has no weights in safetensors, only {file.name}, and GGUF cannot be trained on."
                    " Give the model that it was made from, or turn it back into one (docs/faq.md)."
                )
        if not configured:
            hint = "Give the folder that save_pretrained wrote."
            if (path / ADAPTER_CONFIG).is_file():
                hint = (
                    "It is an adapter: model_name_or_path is its base, and the folder goes to policy_adapter"
                    " or reward_adapter."
                )
            raise UserError(f"{name}: has no config.json, so it is no model. {hint}")
        if weights and not any(path.glob("*.safetensors")):
            pickled = [file.name for file in sorted(path.iterdir()) if file.suffix in (".bin", ".pt", ".pth")]
            raise UserError(f"{name}: has no weights in safetensors{_pickles(pickled)}.")
        for file in path.glob("*.safetensors") if weights else ():
            tensor_shapes(file, "Download or save the model again.")


def has_tokenizer(folder: Path) -> bool:
    """Return whether a stage has saved a tokenizer in ``folder``."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def require_tokenizer(name: str) -> None:
    """Raise UserError for a folder that has no file of a tokenizer."""
    path = Path(name)
    if not path.is_dir() or any(file for pattern in _TOKENIZER_FILES for file in path.glob(pattern)):
        return
    # A folder without a model is told as such
    require_model(name, weights=False)
    raise UserError(
        f"{name}: has no tokenizer (looked for tokenizer.json and what others are called). Download or save"
        " it again beside the model."
    )


def _pickles(names: list[str]) -> str:
    if not names:
        return ". Download or save it again"
    return (
        f", only {', '.join(names)}, a pickle, which can run code as it is read. Convert it where you trust"
        " it, with save_pretrained"
    )


def read_adapter_config(setting: str, folder: str) -> dict[str, Any]:
    """Return what ``adapter_config.json`` says.

    Raises:
        UserError: ``folder`` holds no whole LoRA adapter in safetensors.
    """
    path = Path(folder)
    if path.is_file():
        raise UserError(
            f"{setting}: {folder} is a file. Give the folder that holds it, the output_dir of the stage that"
            " trains it."
        )
    # Both files, the weights in safetensors
    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (path / name).is_file()]
    if missing == [ADAPTER_WEIGHTS] and any(path.glob("adapter_model.*")):
        raise UserError(
            f"{setting}: {folder} has no"
            f" {ADAPTER_WEIGHTS}{_pickles([file.name for file in path.glob('adapter_model.*')])}."
        )
    if missing:
        raise UserError(
            f"{setting}: {folder} has no {' and no '.join(missing)}. Give the output_dir of the stage that"
            " trains it, run to its end."
        )
    # Of a kind that can be a role, with what every such adapter has
    config = read_json_object(path / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise UserError(
            f"{setting}: {folder} is a {kind} adapter; the roles of a shared base are LoRA adapters. Train"
            " one with the recipes."
        )
    base, rank = config.get("base_model_name_or_path"), config.get("r")
    if not isinstance(rank, int) or rank < 1 or not isinstance(base, str | None):
        raise UserError(
            f"{path / ADAPTER_CONFIG}: r={rank!r}, base_model_name_or_path={base!r}: damaged. Copy the folder"
            " again, or train it again."
        )
    _check_adapter_facts(path / ADAPTER_CONFIG, config)
    return config


def _check_adapter_facts(path: Path, config: Mapping[str, Any]) -> None:
    """Raise UserError for a value of ``adapter_config.json`` that PEFT would stumble over later."""
    targets, alpha = config.get("target_modules"), config.get("lora_alpha", 8)
    dropout = config.get("lora_dropout", 0.0)
    sound = {
        "lora_alpha": is_number(alpha) and alpha > 0,
        "lora_dropout": is_number(dropout) and 0 <= dropout < 1,
        "target_modules": isinstance(targets, str | None) or bool(_texts(targets)),
        "modules_to_save": config.get("modules_to_save") is None
        or _texts(config["modules_to_save"]) is not None,
        "rank_pattern": isinstance(config.get("rank_pattern"), dict | None),
        "alpha_pattern": isinstance(config.get("alpha_pattern"), dict | None),
        "layers_to_transform": _is_places(config.get("layers_to_transform")),
        "fan_in_fan_out": isinstance(config.get("fan_in_fan_out"), bool | None),
    }
    for name, holds in sound.items():
        if not holds:
            raise UserError(
                f"{path}: {name}={config.get(name)!r}: damaged. Copy the folder again, or train it again."
            )


def _texts(value: object) -> list[str] | None:
    """Return a list of texts as it is, and None for anything else."""
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None


def _is_places(value: object) -> bool:
    places = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(place, int) for place in places)


def tensor_shapes(
    path: Path, way_out: str = "Copy it again, or train the stage again."
) -> dict[str, list[int]]:
    """Return names and shapes of the tensors of a file, read from its head.

    Raises:
        UserError: the file is cut short or no safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({brief(error)}). {way_out}") from error


def context_of(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model can read by its configuration, if that sets a bound."""
    # Under GPT-2's own name too, which its configuration maps; XLNet says -1
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def steady_length(config: PretrainedConfig) -> int | None:
    """Return up to how many tokens a text has the same states whatever stands beside it.

    With LongRoPE (Phi-3 and 4) the frequencies of a whole batch change where its longest text
    passes the length of pretraining, and with them keys and values that a cache has kept. None
    where nothing changes.
    """
    found = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [found, *(each for each in found.values() if isinstance(each, dict))]  # by kind of layer
    lengths = [
        each.get("original_max_position_embeddings") for each in kinds if each.get("rope_type") == "longrope"
    ]
    return min((length for length in lengths if length), default=None)


def saved_template(folder: str | Path) -> Template:
    """Return the chat template of the tokenizer in ``folder``, or several by name.

    None without a tokenizer or without a template.
    """
    path, found = Path(folder), None
    if (path / "tokenizer_config.json").is_file():
        found = read_json_object(path / "tokenizer_config.json").get("chat_template")
    if (path / "chat_template.jinja").is_file():
        found = (path / "chat_template.jinja").read_text(encoding="utf-8")
    named = path.glob(f"{NAMED_TEMPLATES}/*.jinja")
    more = {file.stem: file.read_text(encoding="utf-8") for file in named}
    return by_name({"default": found, **more} if more and isinstance(found, str) else found)


def by_name(template: Template) -> Template:
    """Return named templates as a dict, as a tokenizer has them: files may keep them as a list."""
    if not isinstance(template, list):
        return template
    sound = all(isinstance(each, dict) and {"name", "template"} <= each.keys() for each in template)
    return {each["name"]: each["template"] for each in template} if sound else template


def saved_chat_template(folder: str) -> str | None:
    """Return ``saved_template`` where it is one; None where there are several."""
    template = saved_template(folder)
    return template if isinstance(template, str) else None


# Of goose_lora.json, what other facts are looked for in.
_FACTS: dict[str, type] = {
    "stage": str,
    "base": dict,
    "parents": dict,
    "settings": dict,
    "data": list,
    "figures": dict,
    "hardware": dict,
    "versions": dict,
    "reply_ends": dict,
}
_KIND_WORDS = {str: "text", dict: "an object", list: "a list"}


def require_hub_name(setting: str, name: str) -> None:
    """Raise UserError unless a repository on the Hub may have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(
            f"{setting}={name!r}: no repository on the Hub has such a name. It is user/name, of letters,"
            " digits, - _ and dots."
        ) from None


def check_lineage(path: Path, lineage: dict[str, Any]) -> dict[str, Any]:
    """Return ``lineage`` as it is, if what stages and commands read of it can be used.

    Raises:
        UserError: a fact of another kind than stages write, a bias that is no finite number, or an
            append_eos that is not true or false.
    """
    base, parents = lineage.get("base"), lineage.get("parents")
    kinds = [(name, lineage.get(name), kind) for name, kind in _FACTS.items()]
    kinds += [("base.id", base.get("id"), str)] if isinstance(base, dict) else []
    kinds += [("parents", parent, dict) for parent in parents.values()] if isinstance(parents, dict) else []
    for name, value, kind in kinds:
        if value is not None and not isinstance(value, kind):
            raise UserError(
                f"{path}: {name} is {str(value)[:60]!r}, expected {_KIND_WORDS[kind]}. The file is damaged:"
                " copy it again, or train the stage again."
            )
    bias, eos = lineage.get("reward_bias", 0.0), lineage.get("append_eos", True)
    if not is_number(bias) or not isinstance(eos, bool):
        raise UserError(
            f"{path}: reward_bias={bias!r}, append_eos={eos!r}: expected a finite number, and true or false."
            " Train the stage again."
        )
    return lineage


def local_folder(name: str | Path) -> Path:
    """Return the folder ``name``, or that of an adapter of the Hub in the Hub's cache.

    An adapter is user/repo[/folder][@revision]; all its files are of one commit.

    A name without a revision, whose parent is a folder here, is a folder that is missing, not one
    of the Hub.

    Raises:
        ValueError: neither a folder nor an adapter that can be had from the Hub.
    """
    # A folder here comes first; what looks like a missing folder is not asked for on the Hub
    match, path = _HUB_NAME.fullmatch(str(name)), Path(os.path.expanduser(name))
    if path.exists() or match is None or (match["revision"] is None and path.parent.is_dir()):
        return path
    place: dict[str, Any] = {"repo_id": match["repo"], "subfolder": match["folder"]}
    try:
        config = Path(hf_hub_download(**place, filename=ADAPTER_CONFIG, revision=match["revision"]))
        # What a branch points to may change in between
        place["revision"] = config.parts[config.parts.index("snapshots") + 1]
        hf_hub_download(**place, filename=ADAPTER_WEIGHTS)
    # The Hub's client raises its own errors, the file system's, and those of its HTTP library
    except Exception as error:
        raise UserError(
            f"{name} is no folder here, and could not be had from the Hub"
            f" ({first_line(error)}). Give the output_dir of the stage that trains it, run"
            " to its end, or an adapter of the Hub as user/repo, user/repo/folder or user/repo@revision."
        ) from error
    _fetch_beside(str(name), place)
    # Each further member of an ensemble has a folder of its own
    for member in member_folders(config.parent):
        own = Path(posixpath.normpath(posixpath.join(match["folder"] or "", member))).as_posix()
        if own.startswith(".."):
            raise UserError(f"{name}: its {MEMBERS_FILE} names a member outside of the repository: {member}.")
        elsewhere = place | {"subfolder": own}
        _fetch(str(name), elsewhere, (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
        _fetch_beside(str(name), elsewhere)
    return config.parent


def _fetch_beside(name: str, place: Mapping[str, Any]) -> None:
    """Have what is read beside an adapter of the Hub in its cache; others' adapters lack it."""
    _fetch(name, place, _READ_BESIDE, needed=False)
    if constants.HF_HUB_OFFLINE:
        return
    # Templates by name, such as that for tools, of which nobody knows the names
    under = posixpath.join(place["subfolder"] or "", NAMED_TEMPLATES)
    try:
        tree = HfApi().list_repo_tree(place["repo_id"], under, revision=place["revision"])
        found = [posixpath.basename(entry.path) for entry in tree if entry.path.endswith(".jinja")]
    except EntryNotFoundError:
        return
    except Exception as error:  # as above
        logger.warning(
            "%s: the Hub did not say which chat templates it has by name (%s): those in the cache are taken.",
            name,
            first_line(error),
        )
        return
    _fetch(name, place, [posixpath.join(NAMED_TEMPLATES, file) for file in found])


def _fetch(name: str, place: Mapping[str, Any], files: Sequence[str], *, needed: bool = True) -> None:
    """Have files of the Hub in its cache; those that are not ``needed`` may be missing there.

    Raises:
        UserError: one cannot be had, or nobody knows whether it is there.
    """
    for filename in files:
        try:
            hf_hub_download(**place, filename=filename)
        except Exception as error:  # of the Hub's client, the file system, and its HTTP library
            missing = isinstance(error, EntryNotFoundError)
            if isinstance(error, LocalEntryNotFoundError):
                # No answer: a bias or a template that is there would be left out unseen. Who asks
                # for the cache alone takes what it holds
                missing = constants.HF_HUB_OFFLINE or _known_to_be_missing(place, filename)
            if missing and needed:
                raise UserError(
                    f"{name}: {place['subfolder']} has no {filename}. Upload the whole folder."
                ) from error
            if not missing:
                raise UserError(
                    f"{name}: {filename} could not be had from the Hub ({first_line(error)}). Try again; or"
                    " set HF_HUB_OFFLINE=1 to go on with the files that are in its cache."
                ) from error


def _known_to_be_missing(place: Mapping[str, Any], filename: str) -> bool:
    """Return whether the Hub has said before that a file is not in this commit."""
    path = posixpath.join(place["subfolder"] or "", filename)
    return try_to_load_from_cache(place["repo_id"], path, revision=place["revision"]) is _CACHED_NO_EXIST


def read_lineage(folder: str | Path) -> dict[str, Any]:
    """Read what this project noted beside an adapter; nothing for one of other origin.

    Raises UserError for a damaged file.
    """
    path = Path(folder) / LINEAGE
    return check_lineage(path, read_json_object(path)) if path.is_file() else {}


def base_place(run: str | Path, base: Mapping[str, Any]) -> str | None:
    """Return where the base of a run is now: as it is named, or a folder; None if it is nowhere.

    A stage names a folder relative to where it was started, which is a folder above the run as a
    rule. What is found there must have the tensors that the base had.

    Args:
        base: of the run's lineage.
    """
    name, content = base.get("id"), base.get("content")
    if name is None or Path(name).is_dir():
        return name
    # Of the Hub's models, those that were loaded have a commit
    hubs = base.get("commit") is not None or content is None or name == base.get("hub_id")
    if hubs and not Path(name).is_absolute():
        return name
    places = [str(above / name) for above in Path(run).absolute().parents]
    return next((place for place in places if content and base_content(place) == content), None)


def moved_base(run: str | Path, base: Mapping[str, Any]) -> str | None:
    """Return where the base of a run is, if not where the run had it; None where it is there.

    Raises:
        UserError: it was a folder, and is neither here nor above the run.
    """
    place = base_place(run, base)
    if place is None and base.get("id") is not None:
        known = f" On the Hub it is {base['hub_id']}." if base.get("hub_id") else ""
        raise UserError(
            f"the run's base was the folder {base['id']}, which is neither here nor above {run}.{known} Say"
            " where it is: --base PATH_OR_HUB_ID."
        )
    return None if place == base.get("id") else place


def write_lineage(folder: str | Path | None, **facts: object) -> None:
    """Note ``facts`` beside an adapter."""
    write_text(Path(folder or ".") / LINEAGE, json.dumps(facts, indent=2) + "\n")


@dataclass(frozen=True)
class AdapterFolder:
    """A saved LoRA adapter, opened once: what its files say, before any weight is loaded.

    ``setting`` names the setting that gave it, and ``name`` is what stands there: a folder, or
    user/repo[/folder][@revision] on the Hub. ``config`` is adapter_config.json as it is.
    """

    setting: str
    name: str
    path: Path
    config: Mapping[str, Any]

    @classmethod
    def open(
        cls,
        setting: str,
        name: str | Path,
        *,
        base: str | None = None,
        base_hub_id: str | None = None,
    ) -> "AdapterFolder":
        """Open an adapter, and with ``base`` check that it was trained on that base.

        Raises:
            UserError: no whole LoRA adapter there, a damaged lineage, or another base.
        """
        path = local_folder(name)
        folder = cls(setting, str(name), path, read_adapter_config(setting, str(path)))
        # Read now, so that a damaged one is told before anything loads
        read_lineage(path)
        for member in folder.members[1:]:
            read_lineage(member.path)
        if base is not None:
            folder._check_base(base, base_hub_id)
        return folder

    @classmethod
    def of(cls, setting: str, adapter: "AdapterFolder | str | Path") -> "AdapterFolder":
        """Return ``adapter``, opened if it is not."""
        if isinstance(adapter, AdapterFolder):
            return adapter
        path = local_folder(adapter)
        return cls(setting, str(adapter), path, read_adapter_config(setting, str(path)))

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """Names and shapes of the adapter's tensors. Raises UserError where the file is damaged."""
        return tensor_shapes(self.path / ADAPTER_WEIGHTS)

    @cached_property
    def lineage(self) -> dict[str, Any]:
        """What this project noted beside the adapter; nothing where it is of other origin."""
        return read_lineage(self.path)

    @cached_property
    def ensemble(self) -> RewardEnsemble | None:
        """The ensemble of reward models whose first member it is; None where it is one alone."""
        return read_ensemble(self.path)

    @cached_property
    def members(self) -> tuple["AdapterFolder", ...]:
        """The members of the ensemble, itself the first of them; itself alone where it is none."""
        if self.ensemble is None:
            return (self,)
        others = [self.path / member.folder for member in self.ensemble.members[1:]]
        return (self, *(AdapterFolder.of(self.setting, other) for other in others))

    @cached_property
    def chat_template(self) -> str | None:
        """The chat template saved beside it; None where there is none, or several."""
        return saved_chat_template(str(self.path))

    @property
    def has_head(self) -> bool:
        """Whether it has a score head, as a reward model or a critic must."""
        return any(name.endswith("score.weight") for name in self.shapes)

    def lora_config(self) -> LoraConfig:
        """Return PEFT's configuration of the adapter, to be trained further or loaded."""
        with reading(ADAPTER_CONFIG, str(self.path)):
            # As from_pretrained does, without reading the file again
            settings = LoraConfig.check_kwargs(**copy.deepcopy(dict(self.config)))
            config = cast(LoraConfig, LoraConfig.from_peft_type(**settings))
        config.inference_mode = False
        return config

    def _check_base(self, base: str, base_hub_id: str | None) -> None:
        trained_on = self.config.get("base_model_name_or_path")
        if not trained_on:
            return
        noted = self.lineage.get("base")
        if not isinstance(noted, dict):
            noted = {}
        theirs = BaseName(trained_on, noted.get("hub_id"), noted.get("content"))
        if same_base(theirs, BaseName(base, base_hub_id)):
            return
        # A base that is not there is the mistake to name first.
        require_model(base)
        raise UserError(
            f"{self.setting}: {self.name} was trained on {trained_on}, not on {base}. All stages share one"
            " base. If that is the same one under another name, say so: base_hub_id."
        )


def require_ensemble(reward: AdapterFolder | None, aggregation: str | None, *, asked: bool) -> None:
    """Raise UserError for an aggregation of one reward model, or members that nobody asks.

    ``asked`` tells whether the reward adapter scores replies.
    """
    is_ensemble = reward is not None and reward.ensemble is not None
    if aggregation is not None and not is_ensemble:
        raise UserError(
            f"reward_aggregation={aggregation}: is of several reward models in one folder (num_members of"
            " recipes/reward.py), and reward_adapter is not that. Leave it out."
        )
    if is_ensemble and not asked:
        raise UserError(
            f"reward_adapter: {reward} is an ensemble, and reward_function leaves it no say. Add adapter to"
            f" reward_function, or name one member: {reward}/member_0."
        )
