"""One bad input: what is changed of a sound run, and what the one line must say. Sound runs of all
recipes are here too."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tiny
import yaml
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

Changes = Mapping[str, Any]


class Case(NamedTuple):
    """``change`` gives settings over the sound ones, None to leave one out, and may write files
    into the folder that it is given, where ``base``, ``sft`` and ``reward`` are sound copies to
    break. ``says``: words of the line, in their order; the last are the way out. ``line``: further
    words of the command line.
    """

    name: str
    recipe: str
    change: Changes | Callable[[Path], Changes]
    says: tuple[str, ...]
    line: tuple[str, ...] = ()


def sound(folder: Path, recipe: str) -> dict[str, Any]:
    """Settings that get a recipe as far as the model."""
    model = {
        "model_name_or_path": str(folder / "base"),
        "quantization": "none",
        "dtype": "float32",
        "lora_r": 3,
        "lora_alpha": 6,
    }
    common = {**model, "output_dir": str(folder / "output"), "dataset_name": str(folder / "prompts.jsonl")}
    train = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
    }
    adapters = {"policy_adapter": str(folder / "sft"), "reward_adapter": str(folder / "reward")}
    return {
        "sft": {**common, **train, "bf16": False, "dataset_name": str(folder / "texts.jsonl")},
        "reward": (
            {**common, **train, "bf16": False}
            | {name: str(folder / "preferences.jsonl") for name in ("dataset_name", "eval_dataset_name")}
        ),
        "ppo": {**common, **train, **adapters, "num_rollouts": 1, "response_length": 5},
        "own_loop": {
            **common,
            **train,
            "policy_adapter": adapters["policy_adapter"],
            "num_rollouts": 1,
            "response_length": 5,
        },
        "goose-lora": {},
        "evaluate": {**common, **adapters, "sft_adapter": adapters["policy_adapter"], "response_length": 5},
    }[recipe]


def make_files(folder: Path) -> None:
    """A tiny base, an SFT adapter with its tokenizer, a reward adapter with its head, and rows for
    each stage."""
    tiny.save_base(folder / "base")
    for name in ("texts", "preferences", "prompts"):
        tiny.write_rows(folder / f"{name}.jsonl", getattr(tiny, name)(8))
    base = tiny.base()
    base.name_or_path = "org/base"
    get_peft_model(base, tiny.lora(base, layers="top-2")).save_pretrained(folder / "sft")
    tiny.tokenizer().save_pretrained(folder / "sft")
    judge = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("llama", **tiny.ARCHITECTURES["llama"], num_labels=1)
    )
    judge.name_or_path = "org/base"
    plain = tiny.base()
    get_peft_model(judge, tiny.lora(plain, layers="top-2", task_type="SEQ_CLS")).save_pretrained(
        folder / "reward"
    )


def place(source: Path, folder: Path) -> None:
    """Links to what ``make_files`` made, and an output folder with something to lose in it."""
    for entry in source.iterdir():
        (folder / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    (folder / "output").mkdir()
    (folder / "output" / "precious.txt").write_text("kept")


def own_copy(folder: Path, name: str) -> Path:
    """A copy in place of a link, to break."""
    link = folder / name
    target = link.resolve()
    link.unlink()
    (shutil.copytree if target.is_dir() else shutil.copy)(target, link)
    return link


def command_line(folder: Path, case: Case) -> list[str]:
    """The words after the recipe's name: a YAML file with the sound settings and the changes."""
    changes = case.change(folder) if callable(case.change) else case.change
    settings = sound(folder, case.recipe) | changes
    (folder / "config.yaml").write_text(
        yaml.safe_dump(
            {name: value for name, value in settings.items() if value is not LEFT_OUT}, allow_unicode=True
        )
    )
    return ["--config", str(folder / "config.yaml"), *case.line]


LEFT_OUT = object()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# Ways to break things


def file(
    name: str, content: str | bytes, setting: str = "dataset_name", **settings: Any
) -> Callable[[Path], Changes]:
    """``setting`` names a new file with ``content``."""

    def change(folder: Path) -> Changes:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return {setting: str(path), **settings}

    return change


def rows(*found: Mapping[str, Any], **settings: Any) -> Callable[[Path], Changes]:
    return file("rows.jsonl", "".join(json.dumps(row) + "\n" for row in found), **settings)


def without(folder_name: str, *names: str) -> Callable[[Path], Changes]:
    """Files are missing in a folder."""

    def change(folder: Path) -> Changes:
        for name in names:
            (
                own_copy(folder, folder_name) if (folder / folder_name).is_symlink() else folder / folder_name
            ).joinpath(name).unlink()
        return {}

    return change


def edited(
    folder_name: str, name: str, edit: Callable[[bytes], bytes] | bytes | str
) -> Callable[[Path], Changes]:
    """A file in a folder has other content, or is there in addition."""

    def change(folder: Path) -> Changes:
        path = own_copy(folder, folder_name) / name
        content = edit(path.read_bytes()) if callable(edit) else edit
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return {}

    return change


def json_edited(folder_name: str, name: str, **changes: Any) -> Callable[[Path], Changes]:
    def edit(content: bytes) -> bytes:
        found = {
            key: value for key, value in (json.loads(content) | changes).items() if value is not LEFT_OUT
        }
        return json.dumps(found).encode()

    return edited(folder_name, name, edit)


def path_to(setting: str, *parts: str) -> Callable[[Path], Changes]:
    """``setting`` names something below the folder."""
    return lambda folder: {setting: os.path.join(folder, *parts)}
