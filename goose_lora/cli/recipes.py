"""The recipes as commands: ``goose-lora ppo --config consumer_gpu/ppo``, from an installed package.

A checkout has its recipes in recipes/; the wheel has a copy of that folder inside the package.
"""

import difflib
import filecmp
import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from goose_lora.cli.yaml_settings import require_no_folder
from goose_lora.errors import UserError
from goose_lora.training.signals import STARTED_BY, left_to

# Commands, the script of each, and the words of --help.
RECIPES = {
    "sft": ("sft.py", "fine-tune on texts, conversations or prompts with replies"),
    "reward": ("reward.py", "train a reward model on pairs or ranked lists"),
    "ppo": ("ppo.py", "train the policy against the reward model"),
    "own-loop": ("own_loop.py", "train the policy in a loop of your own"),
    "evaluate": ("evaluate.py", "compare base, SFT and PPO on held-out prompts"),
}
# Options of accelerate launch that are passed on; each takes a value.
LAUNCHER_OPTIONS = (
    "--config_file",
    "--num_processes",
    "--num_machines",
    "--machine_rank",
    "--main_process_ip",
    "--main_process_port",
    "--gpu_ids",
    "--mixed_precision",
)


def recipes_folder() -> Path:
    """Return the folder with the scripts of the recipes and ``configs/``."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def configurations() -> list[str]:
    """Return the names of the configurations that come with the package: ``consumer_gpu/ppo``."""
    folder = recipes_folder() / "configs"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def configuration(name: str) -> str:
    """Return the file of a configuration: ``name`` itself, or the packaged one of that name.

    Raises:
        UserError: there is neither.
    """
    if Path(name).is_file():
        return name
    if name in configurations():
        return str(recipes_folder() / "configs" / f"{name}.yaml")
    require_no_folder(name)
    near = difflib.get_close_matches(name, configurations(), n=4, cutoff=0.3)
    hint = f" Near it: {', '.join(near)};" if near else ""
    raise UserError(
        f"--config {name}: no such file, nor a configuration of the package.{hint} goose-lora recipes list"
        " shows them."
    )


def run_recipe(name: str, words: Sequence[str]) -> int:
    """Run a recipe through accelerate's launcher; return its exit code.

    Args:
        name: one of ``RECIPES``.
        words: settings of the recipe, and ``LAUNCHER_OPTIONS``, in any order.

    Raises:
        UserError: no such configuration, or an option of the launcher without a value.
    """
    # What is the launcher's, and the command that a stopped run will name
    launcher, settings = split_words(words)
    script = recipes_folder() / RECIPES[name][0]
    os.environ[STARTED_BY] = shlex.join(["goose-lora", name, *launcher])

    # Imported late: it loads torch, which --help of the other commands does not need
    import psutil  # accelerate's
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # On a CPU it starts one process however many are asked for, unless it is told to use torchrun
    options = dict(zip(launcher[::2], launcher[1::2], strict=True))
    asked = options.get("--num_processes", "1")
    if asked != "1" and "--config_file" not in options and not torch.cuda.is_available():
        launcher.append("--multi_gpu")

    # It lists what it takes by default, on each start
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)

    # Asked to stop, the recipe saves a checkpoint first; this process waits for it
    try:
        with left_to(lambda: [child.pid for child in psutil.Process().children()]):
            launch_command(launch_command_parser().parse_args([*launcher, str(script), *settings]))
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        return max(failure.exitcode for failure in error.failures.values())
    return 0


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words for accelerate's launcher, and those for the recipe.

    A configuration of the package is replaced by its file.

    Raises:
        UserError: an option without its value, or no such configuration.
    """
    launcher: list[str] = []
    settings: list[str] = []
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option not in (*LAUNCHER_OPTIONS, "--config"):
            settings.append(word)
            continue

        # Both forms, --option value and --option=value
        if not equals:
            value = next(rest, "")
        if not value:
            raise UserError(f"{option} needs a value.")
        if option == "--config":
            settings += [option, configuration(value)]
        else:
            launcher += [option, value]
    return launcher, settings


def copy_recipes(target: Path) -> list[Path]:
    """Copy the scripts and configurations into ``target``; return the files.

    A copy that was cut off is completed by the next.

    Raises:
        UserError: another file of such a name is there already.
    """
    # Scripts and configurations, and nothing that Python has left beside them
    source = recipes_folder()
    found = [path for path in sorted(source.rglob("*")) if path.suffix in (".py", ".yaml")]
    files = [target / path.relative_to(source) for path in found]
    # All or nothing: no file of the user's is written over
    pairs = zip(found, files, strict=True)
    there = [copy for path, copy in pairs if copy.exists() and not filecmp.cmp(path, copy, shallow=False)]
    if there or all(copy.exists() for copy in files):
        raise UserError(f"{(there or files)[0]} is there already. Give a new folder, or move it away.")
    try:
        for path, copy in zip(found, files, strict=True):
            # Whole or not there
            copy.parent.mkdir(parents=True, exist_ok=True)
            half = copy.with_name(f".{copy.name}.half")
            shutil.copyfile(path, half)
            half.replace(copy)
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}. Give another folder.") from error
    return files
