"""From YAML and command line to dataclasses, and errors that end in one clear line."""

import argparse
import ctypes
import difflib
import functools
import logging
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from goose_lora.from_trl import FROM_TRL
from goose_lora.interrupts import Stopped

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc
for _name in ("bitsandbytes", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # not later: imported after this module, it would say that a kernel could be faster


def parse(*types: type, args: Sequence[str] | None = None) -> Any:
    """One instance of each dataclass in ``types``, from ``--config FILE.yaml`` and ``--field value``, the command line winning.

    Raises:
        ValueError: an unknown setting (with the nearest known one), a value of the wrong type, or a configuration file that is not there.
    """
    from trl import TrlParser

    quiet_libraries()
    keep_freed_memory()
    args = list(sys.argv[1:] if args is None else args)
    if "--config" in args:
        index = args.index("--config") + 1
        if index == len(args):
            raise ValueError("--config needs a file: --config recipes/configs/demo_cpu/ppo.yaml")
        _check_keys(args[index], types)
    parser: Any = TrlParser(types)  # type: ignore[arg-type]
    parser.error = _raise  # argparse would print its usage of some 150 options and leave
    try:
        *instances, unknown = parser.parse_args_and_config(args, return_remaining_strings=True, fail_with_unknown_args=False)
    except ValueError as error:
        raise ValueError(_nearest_choice(str(error))) from error
    if unknown:
        _unknown(next((word for word in unknown if word.startswith("--")), unknown[0]), types)
    for settings in instances:
        check_settings(settings)
    return instances[0] if len(instances) == 1 else tuple(instances)


def check_settings(settings: Any) -> None:
    """Raise ValueError unless what holds of all settings holds: finite numbers, ranges, a folder for results. Takes the Hub's token out of them."""
    from transformers import TrainingArguments

    from goose_lora.settings import check_finite, check_training, require_output_folder, token_to_environment

    check_finite(settings)
    if isinstance(settings, TrainingArguments):
        check_training(settings)
        token_to_environment(settings)
    if vars(settings).get("output_dir") is not None:
        require_output_folder(vars(settings)["output_dir"])


def read_config(path: str) -> dict[Any, Any]:
    """The settings in a YAML file.

    Raises:
        ValueError: no such file, not YAML, or not settings.
    """
    import yaml

    if not Path(path).is_file():
        raise ValueError(f"--config {path}: no such file. The shipped ones are in recipes/configs/.")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, LookupError, ArithmeticError, RecursionError, TypeError, AttributeError) as error:
        # All but the first from PyYAML's constructors, of a date such as 2020-99-99.
        raise ValueError(f"{path}: not a YAML file that can be read: {' '.join(str(error).split())}. Mend it there.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected lines of the form 'setting: value', found {type(config).__name__}.")
    return config


def _check_keys(path: str, types: Sequence[type]) -> None:
    from goose_lora.settings import check_types

    config = read_config(path)
    known = {f.name for t in types for f in fields(t) if f.init} | {"env"}
    for key in config:
        if key not in known:
            _unknown(f"--{key}", types, where=f"{path}: ")
    environment = config.get("env") or {}
    if not isinstance(environment, dict) or not all(isinstance(name, str) and name and not {"=", "\0"} & set(name) for name in environment):
        raise ValueError(f"{path}: env: expected names of environment variables with a value each: env: {{CUDA_VISIBLE_DEVICES: 0}}.")
    check_types(config, types, where=f"{path}: ")


def _unknown(option: str, types: Sequence[type], where: str = "") -> None:
    name = option.lstrip("-").replace("-", "_")
    known = [f.name for t in types for f in fields(t) if f.init]
    near = difflib.get_close_matches(name, known, n=1)
    if name in FROM_TRL and "num_ppo_epochs" in known:
        raise ValueError(f"{where}unknown setting {name!r}. It is TRL's; here it is {FROM_TRL[name]}.")
    hint = f"Did you mean {near[0]}?" if near else "--help lists the settings."
    raise ValueError(f"{where}unknown setting {name!r}. {hint}")


def _nearest_choice(message: str) -> str:
    """transformers answers an unknown choice with all that there are, some fifty of optimizers."""
    found = re.search(r"^(\S+) is not a valid \w+, please select one of (\[.*\])", message)
    if found is None:
        return message
    choices = [choice.strip("' ") for choice in found[2].strip("[]").split(",")]
    near = difflib.get_close_matches(found[1], choices, n=8, cutoff=0.4) or choices[:8]
    return f"{found[1]!r} is none of the values of its setting. Near it: {', '.join(near)}."


def _raise(message: str) -> None:
    raise ValueError(message)


def quiet_libraries() -> None:
    """No telemetry, and no lines that tell the user nothing. Set HF_HUB_DISABLE_TELEMETRY=0 to send it."""
    import huggingface_hub.constants

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1") == "1":
        huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    # What peft, trl and transformers say to one another.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing` is deprecated", category=FutureWarning)


def keep_freed_memory() -> None:
    """On Linux without a GPU, let the process keep memory that it frees. Large tensors are otherwise returned to the system and faulted in
    again page by page each time they are made: a third of the time of fine-tuning on a CPU.
    """
    import torch

    if not sys.platform.startswith("linux") or torch.cuda.is_available():
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # a C library without it, such as musl
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def command(main: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``main`` as a command: bad input ends in one line and exit code 2, Ctrl-C in one line and 130. ``--debug`` shows the traceback."""

    @functools.wraps(main)
    def run() -> None:
        debug = "--debug" in sys.argv
        if debug:
            sys.argv.remove("--debug")
        try:
            main()
        except Stopped as stop:
            print(f"\n{stop} Continue with: {continuing()}", file=sys.stderr)
            sys.exit(128 + stop.signum)
        except KeyboardInterrupt:
            print("\nStopped at once. What was saved is kept; --resume_from_checkpoint latest goes on from it.", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)
        except (ValueError, OSError, argparse.ArgumentError, ImportError) as error:
            if debug:
                traceback.print_exc()
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            if not debug:
                print("(--debug shows where)", file=sys.stderr)
            sys.exit(EXIT_BAD_INPUT)

    return run


def continuing() -> str:
    """The command of a recipe that goes on from the newest whole checkpoint of this one."""
    words = list(sys.argv)
    if "--resume_from_checkpoint" in words:
        at = words.index("--resume_from_checkpoint")
        del words[at : at + 2]
    launcher = ["accelerate", "launch"] if any(name.startswith("ACCELERATE_") for name in os.environ) else ["python"]
    return shlex.join([*launcher, *words, "--resume_from_checkpoint", "latest"])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. {self.prog} --help lists what there is.")


def main() -> None:
    """The ``goose-lora`` command."""
    command(_main)()


def _main() -> None:
    quiet_libraries()
    arguments = command_line().parse_args()
    COMMANDS[arguments.command](arguments)


def command_line() -> argparse.ArgumentParser:
    """The parser of ``goose-lora``. A bad argument is a ValueError."""
    parser = _Parser(prog="goose-lora", description="RLHF on one small machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="run SFT, reward model, PPO and evaluation on the embedded model and data")
    demo.add_argument("--output", default="runs/demo", help="folder of the run (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0)
    doctor = commands.add_parser("doctor", help="say what the metrics of a PPO run mean, and what to do")
    doctor.add_argument("run", help="folder of the run, or its metrics.jsonl")
    data = commands.add_parser("data", help="show rows as a stage sees them, their lengths, and which are left out")
    data.add_argument("dataset", metavar="FILE", help="a .jsonl, .json, .parquet or .csv file, a Hub dataset, or embedded/NAME")
    data.add_argument("--stage", choices=["sft", "reward", "ppo"], help="whose view (default: the one that the format is meant for)")
    data.add_argument("--tokenizer", help="Hub id or folder, or embedded; without it lengths are words and no chat template is applied")
    data.add_argument("--max_length", type=int, help="the stage's limit in tokens: max_length, for ppo max_prompt_tokens")
    data.add_argument("--max_rows", type=int, help="look at the first so many rows only")
    data.add_argument("--split", default="train", help="split of a Hub dataset (default: %(default)s)")
    data.add_argument("--column_mapping", nargs="+", metavar="FROM=TO", help="columns to rename: instruction=prompt")
    plan = commands.add_parser("plan", help="say how much memory a PPO run takes, phase by phase, and what fits; no weights are loaded")
    plan.add_argument("--config", required=True, metavar="FILE", help="a configuration of recipes/ppo.py; prompts count as max_prompt_tokens long")
    plan.add_argument("--memory", metavar="SIZE", help="what there is, such as 24GB or 16GiB (default: what is free now)")
    show = commands.add_parser("show", help="print the chain from base to adapter, what in it does not fit, and the code that loads it")
    show.add_argument("run", metavar="PATH_OR_HUB_ID", help="folder of a stage, or user/repo[/folder][@revision] on the Hub")
    push = commands.add_parser("push", help="upload the result of a run to the Hub: the adapter, its card and its metrics, and nothing else")
    push.add_argument("folder", metavar="RUN", help="folder of the run, or of merged weights")
    push.add_argument("--repo", metavar="ID", help="user/name (default: the run's hub_model_id)")
    push.add_argument("--include", type=lambda text: text.split(","), default=[], metavar="ROLES", help="further adapters: reward,value,reference")
    push.add_argument("--private", action="store_true", default=None, help="a private repository, if it is made now")
    push.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    push.add_argument("--base_hub_id", metavar="ID", help="what the base is on the Hub, where the run had it in a folder")
    merge = commands.add_parser("merge", help="merge the policy into the dequantized base, and measure how far that is from the adapter's model")
    merge.add_argument("run", metavar="RUN", help="folder of the run, or user/repo[@revision] on the Hub")
    merge.add_argument("--out", required=True, metavar="DIR", help="folder for the merged model; must be empty or new")
    merge.add_argument("--dtype", choices=["bfloat16", "float32", "nf4"], default="bfloat16", help="of the weights written (default: %(default)s)")
    merge.add_argument("--quantized", action="store_true", help="write them in nf4 all the same, and show what that costs")
    merge.add_argument("--prompts", metavar="FILE", help="rows with a prompt, to measure on (default: the run's samples.jsonl)")
    merge.add_argument("--base", metavar="PATH_OR_HUB_ID", help="the base, where it is no longer where the run had it")
    compare = commands.add_parser("compare", help="put PPO runs side by side: settings that differ, figures with intervals, curves on one axis")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="folders of two runs or more")
    compare.add_argument("--output", default="compare.html", metavar="FILE", help="the page to write (default: %(default)s)")
    chat = commands.add_parser("chat", help="ask base, SFT and PPO of a run the same, in the terminal or on a local page")
    chat.add_argument("run", metavar="RUN_OR_HUB_ID", help="folder of the run, or user/repo[@revision] on the Hub")
    chat.add_argument("--roles", type=lambda text: text.split(","), default=[], metavar="ROLES", help="who answers (default: base,sft,ppo)")
    chat.add_argument("--serve", action="store_true", help="on a page of this machine, by gradio: pip install goose-lora[web]")
    label = commands.add_parser("label", help="choose between two replies of a policy on a local page, and write pairs for recipes/reward.py")
    label.add_argument("--policy", required=True, metavar="RUN", help="folder of the run whose replies are compared")
    label.add_argument("--prompts", required=True, metavar="FILE", help="rows with a prompt, or embedded/NAME")
    label.add_argument("--out", required=True, metavar="FILE.jsonl", help="where choices are appended; what stands there is not asked again")
    label.add_argument("--choose", choices=["random", "uncertain"], default="random", help="uncertain: those that the reward model scores most alike")
    label.add_argument("--candidates", type=int, default=4, metavar="N", help="replies sampled to a prompt, of which two are shown (default: 4)")
    for asking in (chat, label):
        asking.add_argument("--temperature", type=float, help="of the sampling (default: the run's)" + "; 0 for greedy replies" * (asking is chat))
        asking.add_argument("--max_new_tokens", type=int, metavar="N", help="most tokens of a reply (default: the run's response_length)")
        asking.add_argument("--seed", type=int, default=0)
        asking.add_argument("--base", metavar="PATH_OR_HUB_ID", help="the base, where it is no longer where the run had it")
        asking.add_argument("--port", type=int, metavar="N", help="of the page (default: the first free one from 7860)")
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from goose_lora.demo import run_demo

    run_demo(Path(arguments.output), seed=arguments.seed)


def _doctor(arguments: argparse.Namespace) -> None:
    from goose_lora.diagnosis import report
    from goose_lora.report import read_metrics

    path = Path(arguments.run)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Give the output_dir of a run of recipes/ppo.py.")
    print(report(read_metrics(path)))


def _data(arguments: argparse.Namespace) -> None:
    from datasets import disable_progress_bars

    from goose_lora.data_report import describe
    from goose_lora.demo import resolve

    disable_progress_bars()
    options = vars(arguments)
    del options["command"]
    for name in ("dataset", "tokenizer"):
        options[name] = options[name] and resolve(options[name])
    print(describe(**options))


def _plan(arguments: argparse.Namespace) -> None:
    from trl import TrlParser

    from goose_lora.demo import resolve
    from goose_lora.dense import free_bytes
    from goose_lora.loading import ModelArguments
    from goose_lora.memory import PlannedRoles, planner, read_memory
    from goose_lora.ppo_config import PPOConfig
    from goose_lora.settings import check_types
    from goose_lora.shapes import is_trained

    check_types(read_config(arguments.config), (PPOConfig, ModelArguments, PlannedRoles), where=f"{arguments.config}: ")
    parser: Any = TrlParser((PPOConfig, ModelArguments, PlannedRoles))  # type: ignore[arg-type]
    parser.error = _raise
    options = ["--config", arguments.config]
    config, model, roles, _ = parser.parse_args_and_config(options, return_remaining_strings=True, fail_with_unknown_args=False)
    model.model_name_or_path = resolve(model.model_name_or_path)
    for name in (roles.policy_adapter, roles.reward_adapter):
        if name and not is_trained(name):
            print(f"{name} is not there yet: its adapter is counted as lora_r, lora_layers and lora_target_modules of this file say.")
    memory = read_memory(arguments.memory) if arguments.memory else free_bytes(config.device)
    print(planner(model, config, roles, memory=memory, device="cpu" if config.use_cpu else "cuda").report(memory))


def _show(arguments: argparse.Namespace) -> None:
    from goose_lora.adapters import local_folder
    from goose_lora.chain import describe

    print(describe(local_folder(arguments.run)))


def _push(arguments: argparse.Namespace) -> None:
    from goose_lora.hub import push

    options = vars(arguments)
    del options["command"]
    print(f"uploaded to {push(**options)}")


def _merge(arguments: argparse.Namespace) -> None:
    from goose_lora.merge import merge

    options = vars(arguments)
    del options["command"]
    print(merge(**options))


def _compare(arguments: argparse.Namespace) -> None:
    from goose_lora.compare import compare

    print(compare(arguments.runs, arguments.output))


def _chat(arguments: argparse.Namespace) -> None:
    from goose_lora.chat import chat
    from goose_lora.demo import resolve

    options = vars(arguments)
    del options["command"]
    chat(**{**options, "base": options["base"] and resolve(options["base"])})


def _label(arguments: argparse.Namespace) -> None:
    from datasets import disable_progress_bars

    from goose_lora.demo import resolve
    from goose_lora.label_page import label

    disable_progress_bars()
    options = vars(arguments)
    del options["command"]
    label(**{**options, "base": options["base"] and resolve(options["base"]), "prompts": resolve(options["prompts"])})


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": _demo, "doctor": _doctor, "data": _data, "plan": _plan, "show": _show, "push": _push, "merge": _merge, "compare": _compare,
    "chat": _chat, "label": _label,
}  # fmt: skip
