"""The commands of ``goose-lora``."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from goose_lora.cli.parser import _raise, read_config
from goose_lora.cli.process import command, quiet_libraries
from goose_lora.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. {self.prog} --help lists what there is.")


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
    demo = commands.add_parser(
        "demo", help="run SFT, reward model, PPO and evaluation on the embedded model and data"
    )
    demo.add_argument("--output", default="runs/demo", help="folder of the run (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0)
    doctor = commands.add_parser("doctor", help="say what the metrics of a PPO run mean, and what to do")
    doctor.add_argument("run", help="folder of the run, or its metrics.jsonl")
    data = commands.add_parser(
        "data", help="show rows as a stage sees them, their lengths, and which are left out"
    )
    data.add_argument(
        "dataset",
        metavar="FILE",
        help="a .jsonl, .json, .parquet or .csv file, a Hub dataset, or embedded/NAME",
    )
    data.add_argument(
        "--stage",
        choices=["sft", "reward", "ppo"],
        help="whose view (default: the one that the format is meant for)",
    )
    data.add_argument(
        "--tokenizer",
        help="Hub id or folder, or embedded; without it lengths are words and no chat template is applied",
    )
    data.add_argument(
        "--max_length", type=int, help="the stage's limit in tokens: max_length, for ppo max_prompt_tokens"
    )
    data.add_argument("--max_rows", type=int, help="look at the first so many rows only")
    data.add_argument("--split", default="train", help="split of a Hub dataset (default: %(default)s)")
    data.add_argument(
        "--column_mapping", nargs="+", metavar="FROM=TO", help="columns to rename: instruction=prompt"
    )
    plan = commands.add_parser(
        "plan",
        help="say how much memory a PPO run takes, phase by phase, and what fits; no weights are loaded",
    )
    plan.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="a configuration of recipes/ppo.py; prompts count as max_prompt_tokens long",
    )
    plan.add_argument(
        "--memory", metavar="SIZE", help="what there is, such as 24GB or 16GiB (default: what is free now)"
    )
    show = commands.add_parser(
        "show",
        help="print the chain from base to adapter, what in it does not fit, and the code that loads it",
    )
    show.add_argument(
        "run", metavar="PATH_OR_HUB_ID", help="folder of a stage, or user/repo[/folder][@revision] on the Hub"
    )
    push = commands.add_parser(
        "push",
        help="upload the result of a run to the Hub: the adapter, its card and its metrics, and nothing else",
    )
    push.add_argument("folder", metavar="RUN", help="folder of the run, or of merged weights")
    push.add_argument("--repo", metavar="ID", help="user/name (default: the run's hub_model_id)")
    push.add_argument(
        "--include",
        type=lambda text: text.split(","),
        default=[],
        metavar="ROLES",
        help="further adapters: reward,value,reference",
    )
    push.add_argument(
        "--private", action="store_true", default=None, help="a private repository, if it is made now"
    )
    push.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    push.add_argument(
        "--base_hub_id", metavar="ID", help="what the base is on the Hub, where the run had it in a folder"
    )
    merge = commands.add_parser(
        "merge",
        help=(
            "merge the policy into the dequantized base, and measure how far that is from the adapter's model"
        ),
    )
    merge.add_argument("run", metavar="RUN", help="folder of the run, or user/repo[@revision] on the Hub")
    merge.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the merged model; must be empty or new"
    )
    merge.add_argument(
        "--dtype",
        choices=["bfloat16", "float32", "nf4"],
        default="bfloat16",
        help="of the weights written (default: %(default)s)",
    )
    merge.add_argument(
        "--quantized", action="store_true", help="write them in nf4 all the same, and show what that costs"
    )
    merge.add_argument(
        "--prompts",
        metavar="FILE",
        help="rows with a prompt, to measure on (default: the run's samples.jsonl)",
    )
    merge.add_argument(
        "--base", metavar="PATH_OR_HUB_ID", help="the base, where it is no longer where the run had it"
    )
    compare = commands.add_parser(
        "compare",
        help="put PPO runs side by side: settings that differ, figures with intervals, curves on one axis",
    )
    compare.add_argument("runs", nargs="+", metavar="RUN", help="folders of two runs or more")
    compare.add_argument(
        "--output", default="compare.html", metavar="FILE", help="the page to write (default: %(default)s)"
    )
    chat = commands.add_parser(
        "chat", help="ask base, SFT and PPO of a run the same, in the terminal or on a local page"
    )
    chat.add_argument(
        "run", metavar="RUN_OR_HUB_ID", help="folder of the run, or user/repo[@revision] on the Hub"
    )
    chat.add_argument(
        "--roles",
        type=lambda text: text.split(","),
        default=[],
        metavar="ROLES",
        help="who answers (default: base,sft,ppo)",
    )
    chat.add_argument(
        "--serve",
        action="store_true",
        help="on a page of this machine, by gradio: pip install goose-lora[web]",
    )
    label = commands.add_parser(
        "label",
        help="choose between two replies of a policy on a local page, and write pairs for recipes/reward.py",
    )
    label.add_argument(
        "--policy", required=True, metavar="RUN", help="folder of the run whose replies are compared"
    )
    label.add_argument(
        "--prompts", required=True, metavar="FILE", help="rows with a prompt, or embedded/NAME"
    )
    label.add_argument(
        "--out",
        required=True,
        metavar="FILE.jsonl",
        help="where choices are appended; what stands there is not asked again",
    )
    label.add_argument(
        "--choose",
        choices=["random", "uncertain"],
        default="random",
        help="uncertain: those that the reward model scores most alike",
    )
    label.add_argument(
        "--candidates",
        type=int,
        default=4,
        metavar="N",
        help="replies sampled to a prompt, of which two are shown (default: 4)",
    )
    for asking in (chat, label):
        asking.add_argument(
            "--temperature",
            type=float,
            help="of the sampling (default: the run's)" + "; 0 for greedy replies" * (asking is chat),
        )
        asking.add_argument(
            "--max_new_tokens",
            type=int,
            metavar="N",
            help="most tokens of a reply (default: the run's response_length)",
        )
        asking.add_argument("--seed", type=int, default=0)
        asking.add_argument(
            "--base", metavar="PATH_OR_HUB_ID", help="the base, where it is no longer where the run had it"
        )
        asking.add_argument(
            "--port", type=int, metavar="N", help="of the page (default: the first free one from 7860)"
        )
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from goose_lora.demo import run_demo

    run_demo(Path(arguments.output), seed=arguments.seed)


def _doctor(arguments: argparse.Namespace) -> None:
    from goose_lora.reporting.diagnosis import diagnosis_text
    from goose_lora.reporting.run_files import read_metrics

    path = Path(arguments.run)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file. Give the output_dir of a run of recipes/ppo.py.")
    print(diagnosis_text(read_metrics(path)))


def _data(arguments: argparse.Namespace) -> None:
    from datasets import disable_progress_bars

    from goose_lora.data.report import describe
    from goose_lora.embedded import resolve

    disable_progress_bars()
    options = vars(arguments)
    del options["command"]
    for name in ("dataset", "tokenizer"):
        options[name] = options[name] and resolve(options[name])
    print(describe(**options))


def _plan(arguments: argparse.Namespace) -> None:
    from trl import TrlParser

    from goose_lora.embedded import resolve
    from goose_lora.models.arguments import ModelArguments
    from goose_lora.models.dense_copy import free_bytes
    from goose_lora.planning.memory import PlannedRoles, planner, read_memory
    from goose_lora.planning.shapes import is_trained
    from goose_lora.ppo.config import PPOConfig
    from goose_lora.training.validation import check_types

    check_types(
        read_config(arguments.config),
        (PPOConfig, ModelArguments, PlannedRoles),
        where=f"{arguments.config}: ",
    )
    parser: Any = TrlParser((PPOConfig, ModelArguments, PlannedRoles))  # type: ignore[arg-type]
    parser.error = _raise
    options = ["--config", arguments.config]
    config, model, roles, _ = parser.parse_args_and_config(
        options, return_remaining_strings=True, fail_with_unknown_args=False
    )
    model.model_name_or_path = resolve(model.model_name_or_path)
    for name in (roles.policy_adapter, roles.reward_adapter):
        if name and not is_trained(name):
            print(
                f"{name} is not there yet: its adapter is counted as lora_r, lora_layers and"
                " lora_target_modules of this file say."
            )
    memory = read_memory(arguments.memory) if arguments.memory else free_bytes(config.device)
    print(
        planner(model, config, roles, memory=memory, device="cpu" if config.use_cpu else "cuda").report(
            memory
        )
    )


def _show(arguments: argparse.Namespace) -> None:
    from goose_lora.models.adapters import local_folder
    from goose_lora.sharing.provenance import describe_chain

    print(describe_chain(local_folder(arguments.run)))


def _push(arguments: argparse.Namespace) -> None:
    from goose_lora.sharing.hub import push

    options = vars(arguments)
    del options["command"]
    print(f"uploaded to {push(**options)}")


def _merge(arguments: argparse.Namespace) -> None:
    from goose_lora.sharing.merge import merge

    options = vars(arguments)
    del options["command"]
    print(merge(**options))


def _compare(arguments: argparse.Namespace) -> None:
    from goose_lora.reporting.compare import compare

    print(compare(arguments.runs, arguments.output))


def _chat(arguments: argparse.Namespace) -> None:
    from goose_lora.apps.chat import chat
    from goose_lora.embedded import resolve

    options = vars(arguments)
    del options["command"]
    chat(**{**options, "base": options["base"] and resolve(options["base"])})


def _label(arguments: argparse.Namespace) -> None:
    from datasets import disable_progress_bars

    from goose_lora.apps.label_page import label
    from goose_lora.embedded import resolve

    disable_progress_bars()
    options = vars(arguments)
    del options["command"]
    label(
        **{
            **options,
            "base": options["base"] and resolve(options["base"]),
            "prompts": resolve(options["prompts"]),
        }
    )


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": _demo,
    "doctor": _doctor,
    "data": _data,
    "plan": _plan,
    "show": _show,
    "push": _push,
    "merge": _merge,
    "compare": _compare,
    "chat": _chat,
    "label": _label,
}
