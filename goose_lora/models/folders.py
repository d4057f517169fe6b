"""What stands in the folders of models and adapters, looked at before any weights are loaded, and
said in one line where it is wrong.

Weights are read from safetensors alone: .bin and .pt files are pickles, which can run code as they
are read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open

from goose_lora.errors import UserError
from goose_lora.files import brief, is_number, read_json_object

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@contextmanager
def reading(
    what: str, name: str, way_out: str = "Save or download it again, or update transformers"
) -> Iterator[None]:
    """Turn whatever libraries raise of a model's files into a ValueError of one line. tokenizers
    raises bare Exception, safetensors an error of its own, transformers KeyError, TypeError and
    others. Want of memory, of a package, or of a working GPU is something else, and passes."""
    try:
        yield
    except Exception as error:
        other = isinstance(error, RuntimeError) and "mismatch" not in str(error)
        if other or isinstance(error, (torch.OutOfMemoryError, MemoryError, ImportError)):
            raise
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
    """Raise ValueError unless ``name`` is the folder of a model, with ``weights`` in safetensors,
    or may be a name on the Hub."""
    require_name(name)
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            adapter = (path / ADAPTER_CONFIG).is_file()
            hint = (
                " It is an adapter: model_name_or_path is its base, and the folder goes to policy_adapter or"
                " reward_adapter."
                if adapter
                else ""
            )
            raise UserError(
                f"{name}: has no config.json, so it is no"
                f" model.{hint or ' Give the folder that save_pretrained wrote.'}"
            )
        if weights and not any(path.glob("*.safetensors")):
            pickled = [file.name for file in sorted(path.iterdir()) if file.suffix in (".bin", ".pt", ".pth")]
            raise UserError(f"{name}: has no weights in safetensors{_pickles(pickled)}.")
        for file in path.glob("*.safetensors") if weights else ():
            tensor_shapes(file, "Download or save the model again.")


def _pickles(names: list[str]) -> str:
    if not names:
        return ". Download or save it again"
    return (
        f", only {', '.join(names)}, a pickle, which can run code as it is read. Convert it where you trust"
        " it, with save_pretrained"
    )


def read_adapter_config(setting: str, folder: str) -> dict[str, Any]:
    """What ``adapter_config.json`` says.

    Raises:
        ValueError: ``folder`` holds no whole LoRA adapter in safetensors.
    """
    path = Path(folder)
    if path.is_file():
        raise UserError(
            f"{setting}: {folder} is a file. Give the folder that holds it, the output_dir of the stage that"
            " trains it."
        )
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
    return config


def tensor_shapes(
    path: Path, way_out: str = "Copy it again, or train the stage again."
) -> dict[str, list[int]]:
    """Names and shapes of the tensors of a file, read from its head.

    Raises:
        ValueError: the file is cut short or no safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({brief(error)}). {way_out}") from error


def saved_template(folder: str | Path) -> Any:
    """The chat template of the tokenizer in ``folder``, or several by name; None without a
    tokenizer or without a template."""
    path = Path(folder)
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    settings = path / "tokenizer_config.json"
    return read_json_object(settings).get("chat_template") if settings.is_file() else None


def saved_chat_template(folder: str) -> str | None:
    """``saved_template`` where it is one; None where there are several."""
    template = saved_template(folder)
    return template if isinstance(template, str) else None


def check_lineage(path: Path, lineage: dict[str, Any]) -> dict[str, Any]:
    """``lineage`` as it is, if what the reward role reads of it can be used.

    Raises:
        ValueError: a bias that is no finite number, or an append_eos that is not true or false.
    """
    bias, eos = lineage.get("reward_bias", 0.0), lineage.get("append_eos", True)
    if not is_number(bias) or not isinstance(eos, bool):
        raise UserError(
            f"{path}: reward_bias={bias!r}, append_eos={eos!r}: expected a finite number, and true or false."
            " Train the stage again."
        )
    return lineage
