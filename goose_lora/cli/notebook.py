"""A stage as one call, for notebooks: ``goose_lora.run("ppo", "consumer_gpu/ppo", seed=3)``."""

import importlib.util
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from accelerate.utils import patch_environment

from goose_lora.cli.parser import read_config
from goose_lora.cli.recipes import RECIPES, configuration, recipes_folder
from goose_lora.errors import UserError
from goose_lora.files import read_json
from goose_lora.kinds import kind_of, plain
from goose_lora.ownership import release
from goose_lora.redaction import is_secret, redacted
from goose_lora.reporting.run_files import lineage_of
from goose_lora.training.signals import STARTED_BY


@dataclass(frozen=True)
class StageResult:
    """What a stage has left.

    Attributes:
        folder: its ``output_dir``.
        figures: the last ones, as in ``stage.json``.
        trainer: what has trained; None after ``evaluate``.
    """

    folder: Path
    figures: dict[str, Any]
    trainer: Any = None

    @property
    def files(self) -> list[Path]:
        """The files at the root of ``folder``, by name."""
        return sorted(path for path in self.folder.iterdir() if path.is_file())


def run(stage: str, config: Mapping[str, Any] | str | Path | None = None, **overrides: Any) -> StageResult:
    """Run a recipe in this process, and return what it has left.

    It is what ``goose-lora STAGE --config CONFIG --override value`` runs, on one process. Errors
    are raised; nothing ends the process.

    Args:
        stage: sft, reward, ppo, own-loop or evaluate.
        config: settings, a YAML file of them, or the name of a packaged one: ``demo_cpu/ppo``.
        overrides: settings that win over those of ``config``.

    Raises:
        UserError: no such stage or configuration, a value that no file of settings can hold, or
            whatever the recipe refuses.
    """
    if stage not in RECIPES:
        raise UserError(f"{stage!r} is no stage. There are {', '.join(RECIPES)}.")
    settings: dict[Any, Any] = {}
    if isinstance(config, Mapping):
        settings = dict(config)
    elif config is not None:
        settings = read_config(configuration(str(config)))
    settings |= overrides
    settings = {name: _of_yaml(str(name), plain(value)) for name, value in settings.items()}
    if not settings.get("output_dir"):
        raise UserError("output_dir is missing: name the folder for the results.")

    # As a file, since a value of YAML keeps its type and a word of the command line does not;
    # but for secrets, which no file gets.
    recipe = load_recipe(RECIPES[stage][0])
    secrets = [name for name in settings if is_secret(name)]
    words = [word for name in secrets for word in (f"--{name}", str(settings.pop(name)))]
    started = {STARTED_BY: f"goose_lora.run({stage!r}, ...)"}
    with tempfile.TemporaryDirectory() as folder, patch_environment(**started):
        path = Path(folder) / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
        try:
            trainer = recipe.main(["--config", str(path), *words])
        except UserError as error:
            # A notebook shows it, and is saved; the file is gone by then
            error.args = (redacted(str(error)).replace(f"{path}: ", ""),)
            raise
        finally:
            release()  # a folder that an error has left held
    results = Path(str(settings["output_dir"])).expanduser()
    return StageResult(results, _figures(results), trainer)


def _of_yaml(name: str, value: object) -> object:
    """Return the value of a setting as a file of settings holds it.

    Raises:
        UserError: a function, rows, or anything else that no file holds.
    """
    if isinstance(value, Enum):
        return _of_yaml(name, value.value)
    if isinstance(value, list):
        return [_of_yaml(name, item) for item in value]
    if isinstance(value, dict):
        return {key: _of_yaml(name, item) for key, item in value.items()}
    if type(value) in (str, int, float, bool, type(None)):
        return value
    # What it may have been given for
    way_out = "Give text, a number, true or false, or a list or dict of these."
    if name.endswith("dataset_name"):
        way_out = "Save the rows to a file, such as rows.jsonl, and give its name."
    elif callable(value):
        way_out = "Put it into a file and name both: 'my_file.py:function', or 'module:function'."
    raise UserError(f"{name}: {kind_of(value)}, and run takes what a file of settings can hold. {way_out}")


def load_recipe(script: str) -> ModuleType:
    """Import a recipe from its file, anew each time: it is no module of the package."""
    path = recipes_folder() / script
    spec = importlib.util.spec_from_file_location(f"goose_lora_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def _figures(folder: Path) -> dict[str, Any]:
    """Return the figures of a stage: those of its lineage, or of an evaluation."""
    if (folder / "evaluation.json").is_file():
        return dict(read_json(folder / "evaluation.json")["figures"])
    return dict(lineage_of(folder).get("figures", {}))
