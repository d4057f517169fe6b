"""The commands of ``goose-lora``."""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from goose_lora.cli.parser import check_names, parse_with, read_negative_numbers, settings_parser
from goose_lora.cli.process import command, quiet_libraries
from goose_lora.cli.recipes import RECIPES, configuration, configurations, copy_recipes, run_recipe
from goose_lora.cli.yaml_settings import read_config
from goose_lora.errors import UserError, printable
from goose_lora.terminal import table

if TYPE_CHECKING:
    from goose_lora.planning.memory import Planner

# Each command is a pair: one function adds its options, the other runs it. What a command needs is
# imported when it runs, so that --help is quick.
Subcommands = Any  # argparse's own class for them is private


class _Parser(argparse.ArgumentParser):
    """A parser that takes whole names of options alone, and whose errors are UserErrors."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)
        read_negative_numbers(self)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. {self.prog} --help lists what there is.")


def _true_or_false(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return word.lower() == "true"


def _say(text: str) -> None:
    """Print what was made of people's data: it moves no cursor and colours nothing."""
    print(printable(text, keep="\n\t"))


# ---- The program ----
def main() -> None:
    """Run the command ``goose-lora``."""
    # A recipe gets all of its words, --debug too, and has a parser of its own.
    words = sys.argv[1:]
    if words and words[0] in RECIPES:
        command(lambda: sys.exit(run_recipe(words[0], words[1:])))()
    command(_main)()


def _main() -> None:
    quiet_libraries()
    arguments = command_line().parse_args()
    COMMANDS[arguments.command](arguments)


def command_line() -> argparse.ArgumentParser:
    """Return the parser of ``goose-lora``. A bad argument is a UserError."""
    parser = _Parser(prog="goose-lora", description="RLHF on one small machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, what) in RECIPES.items():
        commands.add_parser(name, help=f"{what}: {name} --config NAME_OR_FILE --any_setting value")
    for add in ADDED:
        add(commands)
    return parser


_SEED, _CHOOSE, _CANDIDATES = 0, "random", 4  # where nobody says otherwise, of a policy's replies


def _add_asking(parser: argparse.ArgumentParser, *, greedy: bool) -> None:
    """Add the options of commands that sample replies."""
    or_greedy = "; 0 for greedy replies" if greedy else ""
    parser.add_argument("--temperature", type=float, help=f"of the sampling (default: the run's){or_greedy}")
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        metavar="N",
        help="most tokens of a reply (default: the run's response_length)",
    )
    parser.add_argument("--seed", type=int, default=_SEED)
    parser.add_argument(
        "--base", metavar="PATH_OR_HUB_ID", help="the base, where it is no longer where the run had it"
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help="of the page (default: the first free one from 7860)"
    )


# ---- Run and diagnose ----
def _add_demo(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "demo", help="run SFT, reward model, PPO and evaluation on the embedded model and data"
    )
    parser.add_argument("--output", default="runs/demo", help="folder of the run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)


def _demo(arguments: argparse.Namespace) -> None:
    from goose_lora.demo import run_demo
    from goose_lora.training.validation import LARGEST_SEED, require_output_folder

    # Four stages would find it one after the other, the first after a download
    require_output_folder(arguments.output, option="--output")
    if not 0 <= arguments.seed <= LARGEST_SEED:
        raise UserError(f"--seed {arguments.seed}: must be at least 0 and at most {LARGEST_SEED}.")
    run_demo(Path(arguments.output), seed=arguments.seed)


def _add_doctor(commands: Subcommands) -> None:
    parser = commands.add_parser("doctor", help="say what the metrics of a PPO run mean, and what to do")
    parser.add_argument("run", help="folder of the run, or its metrics.jsonl")


def _doctor(arguments: argparse.Namespace) -> None:
    from goose_lora.reporting.diagnosis import diagnosis_text
    from goose_lora.reporting.run_files import read_metrics

    # A run's folder, or the file of its metrics: both are what people type
    path = Path(arguments.run)
    if path.is_dir():
        path /= "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file. Give the output_dir of a run of recipes/ppo.py.")
    _say(diagnosis_text(read_metrics(path)))


def _add_recipes(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "recipes", help="list the packaged configurations, or copy recipes and configurations to a folder"
    )
    parser.add_argument("action", choices=["list", "copy"])
    parser.add_argument("folder", nargs="?", metavar="DIR", help="of the copy; made if it is not there")


def _recipes(arguments: argparse.Namespace) -> None:
    if arguments.action == "list":
        print("\n".join(configurations()))
        return
    from goose_lora.training.validation import require_output_folder

    if arguments.folder is None:
        raise UserError("recipes copy needs a folder: goose-lora recipes copy my_recipes.")
    require_output_folder(arguments.folder, option="recipes copy")
    files = copy_recipes(Path(arguments.folder))
    script = shlex.quote(str(Path(arguments.folder) / "ppo.py"))
    print(f"{len(files)} files in {arguments.folder}. Run: accelerate launch {script} --help")


def _add_env(commands: Subcommands) -> None:
    commands.add_parser("env", help="print versions and devices, for a report of a bug")


def _env(arguments: argparse.Namespace) -> None:
    import platform

    import psutil
    import torch

    from goose_lora.models.quantization import cpu_multiplies_bf16
    from goose_lora.training.versions import versions

    facts: dict[str, object] = {**versions()}
    # The machine: what a figure or a shortage depends on
    bf16 = "multiplies bfloat16" if cpu_multiplies_bf16() else "multiplies bfloat16 in software"
    facts["system"] = platform.platform()
    facts["CPU"] = f"{platform.machine()}, {torch.get_num_threads()} threads, {bf16}"
    facts["memory"] = f"{psutil.virtual_memory().total / 1e9:.1f} GB"
    facts["CUDA of torch"] = torch.version.cuda or "none"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        size, capability = f"{card.total_memory / 1e9:.1f} GB", f"{card.major}.{card.minor}"
        facts[f"GPU {index}"] = f"{card.name}, {size}, capability {capability}"
    print(table([{"what": name, "found": found} for name, found in facts.items()], ["what", "found"]))


# ---- Before a run ----
_OF_THE_HUB = ("dataset_config", "data_dir", "dataset_revision")  # the fields of a HubPlace


def _add_data(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "data", help="show rows as a stage sees them, their lengths, and which are left out"
    )
    parser.add_argument(
        "dataset",
        metavar="FILE",
        help="a .jsonl, .json, .parquet or .csv file, a Hub dataset, or embedded/NAME",
    )
    parser.add_argument(
        "--stage",
        choices=["sft", "reward", "ppo"],
        help="whose view (default: the one that the format is meant for)",
    )
    parser.add_argument(
        "--tokenizer",
        help="Hub id or folder, or embedded; without it lengths are words and no chat template is applied",
    )
    parser.add_argument(
        "--max_length",
        type=int,
        help="the stage's limit in tokens: max_length, for ppo max_prompt_tokens (default: the recipe's)",
    )
    parser.add_argument("--max_rows", type=int, help="look at the first so many rows only")
    parser.add_argument(
        "--split", default="train", help="which split, of rows that have several (default: %(default)s)"
    )
    _add_reading(parser)
    parser.add_argument(
        "--as_chat",
        type=_true_or_false,
        metavar="true|false",
        help="whether prompts of text become the user's turn, as in the recipes",
    )
    parser.add_argument(
        "--leave_out", nargs="+", metavar="PART", help="parts of messages to leave out, as in the recipes"
    )
    parser.add_argument(
        "--assistant_only_loss", action="store_true", help="show what recipes/sft.py learns with it"
    )
    parser.add_argument("--chat_template_path", metavar="FILE", help="a chat template, as in the recipes")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options by which rows are read as the recipes read them."""
    parser.add_argument(
        "--column_mapping", nargs="+", metavar="FROM=TO", help="columns to rename: instruction=prompt"
    )
    parser.add_argument(
        "--pairs",
        nargs="+",
        metavar="KEY=VALUE",
        help="which of two replies is better, as in the recipes: a=reply_1 b=reply_2 winner=better a_wins=1"
        " b_wins=2, a preset's name, or best_first",
    )
    for name in _OF_THE_HUB:
        parser.add_argument(f"--{name}", metavar="NAME", help="of a Hub dataset, as in the recipes")


def _reading_options(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options of a command that reads rows; ``names`` may be embedded/NAME."""
    from datasets import disable_progress_bars

    from goose_lora.data.sources import HubPlace
    from goose_lora.embedded import resolve

    disable_progress_bars()
    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    # What is shipped with the package has names of its own: embedded/...
    for name in names:
        options[name] = options[name] and resolve(options[name])
    place = HubPlace(*(options.pop(name) for name in _OF_THE_HUB))
    return {**options, "hub_place": place}


def _data(arguments: argparse.Namespace) -> None:
    from goose_lora.data.report import describe

    _say(describe(**_reading_options(arguments, "dataset", "tokenizer")))


def _add_plan(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "plan",
        help="say how much memory a PPO run takes, phase by phase, and what fits; no weights are loaded",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="a configuration of recipes/ppo.py, or a packaged one's name; prompts count as"
        " max_prompt_tokens long",
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="what there is, such as 24GB or 16GiB (default: what is free now)"
    )
    parser.add_argument(
        "--fit", metavar="SIZE", help="change the configuration until it fits, and write it to a new file"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="of the configuration that fits (default: here, NAME_SIZE.yaml)"
    )


def _plan(arguments: argparse.Namespace) -> None:
    from goose_lora.cli.notebook import load_recipe
    from goose_lora.data.rows import DataArguments
    from goose_lora.embedded import resolve
    from goose_lora.models.arguments import ModelArguments
    from goose_lora.models.dense_copy import free_bytes
    from goose_lora.planning import ways
    from goose_lora.planning.memory import PlannedRoles, plan_run, read_memory
    from goose_lora.planning.shapes import is_trained
    from goose_lora.ppo.config import PPOConfig
    from goose_lora.training.validation import check_types

    # The settings of recipes/ppo.py, those that do not concern memory passed over.
    types = (PPOConfig, ModelArguments, PlannedRoles)
    file = configuration(arguments.config)
    settings = read_config(file)
    recipe = load_recipe(RECIPES["ppo"][0])
    try:
        check_names(settings, (*types, DataArguments, recipe.RoleArguments), file)
    except UserError as error:
        raise UserError(f"{error} goose-lora plan reads the settings of PPO alone.") from error
    check_types(settings, types, where=f"{file}: ")
    config, model, roles, _ = parse_with(settings_parser(types), [], settings)
    model.model_name_or_path = resolve(model.model_name_or_path)
    # A plan may be made before SFT and reward model are trained
    for name in (roles.policy_adapter, roles.reward_adapter):
        if name and Path(name).is_file():
            raise UserError(f"{name} is a file; an adapter is a folder. Give the output_dir of its stage.")
        if name and not is_trained(name):
            print(
                f"{name} is not there yet: its adapter is counted as lora_r, lora_layers and"
                " lora_target_modules of this file say."
            )

    # What there is: as said, or free now.
    if arguments.memory and arguments.fit:
        raise UserError("--memory asks whether it fits, --fit changes it until it does. Give one of them.")
    if arguments.fit:
        memory = read_memory(arguments.fit, "--fit")
    else:
        memory = read_memory(arguments.memory) if arguments.memory else free_bytes(config.device)
    plan = plan_run(
        model,
        config,
        policy=roles.policy_adapter,
        reward=roles.reward_adapter,
        ptx_tokens=roles.ptx_max_length,
        memory=memory,
        device="cpu" if config.use_cpu else "cuda",
    )
    print(plan.report(memory))
    if arguments.fit:
        _write_fitting(plan, memory, Path(file), arguments)
    elif (lack := plan.lack(memory)) is not None:
        print(f"{lack} {ways.ways_out(plan, memory)}")


def _write_fitting(plan: "Planner", memory: int, file: Path, arguments: argparse.Namespace) -> None:
    from goose_lora.files import writing
    from goose_lora.planning import ways

    text, done = ways.fitting(plan, memory, file.read_text(encoding="utf-8"), str(file))
    if text is None:
        print(done)
        return
    # No file of the user's is written over
    out = Path(arguments.out or f"{file.stem}_{arguments.fit.replace(' ', '')}.yaml")
    if out.exists():
        raise UserError(f"{out} is there already. Give another --out, or move it away.")
    with writing(out):
        out.write_text(text, encoding="utf-8")
    print(f"{out}: {done}.")


# ---- What a run has left ----
def _add_show(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "show",
        help="print the chain from base to adapter, what in it does not fit, and the code that loads it",
    )
    parser.add_argument(
        "run", metavar="PATH_OR_HUB_ID", help="folder of a stage, or user/repo[/folder][@revision] on the Hub"
    )


def _show(arguments: argparse.Namespace) -> None:
    from goose_lora.models.folders import local_folder
    from goose_lora.sharing.provenance import describe_chain

    _say(describe_chain(local_folder(arguments.run)))


def _add_push(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "push",
        help="upload the result of a run to the Hub: the adapter, its card and its metrics, and nothing else",
    )
    parser.add_argument("folder", metavar="RUN", help="folder of the run, or of merged weights")
    parser.add_argument("--repo", metavar="ID", help="user/name (default: the run's hub_model_id)")
    parser.add_argument(
        "--include",
        type=lambda text: text.split(","),
        default=[],
        metavar="ROLES",
        help="further adapters: reward,value,reference",
    )
    parser.add_argument(
        "--private", action="store_true", default=None, help="a private repository, if it is made now"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    parser.add_argument(
        "--base_hub_id", metavar="ID", help="what the base is on the Hub, where the run had it in a folder"
    )


def _push(arguments: argparse.Namespace) -> None:
    from goose_lora.sharing.hub import push

    options = vars(arguments)
    del options["command"]
    print(f"uploaded to {push(**options)}")


def _add_merge(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "merge",
        help=(
            "merge the policy into the dequantized base, and measure how far that is from the adapter's model"
        ),
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run, or user/repo[@revision] on the Hub")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the merged model; must be empty or new"
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32", "nf4"],
        default="bfloat16",
        help="of the weights written (default: %(default)s)",
    )
    parser.add_argument(
        "--quantized", action="store_true", help="write them in nf4 all the same, and show what that costs"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="rows with a prompt, to measure on (default: the run's samples.jsonl)",
    )
    parser.add_argument(
        "--base", metavar="PATH_OR_HUB_ID", help="the base, where it is no longer where the run had it"
    )


def _merge(arguments: argparse.Namespace) -> None:
    from goose_lora.sharing.merge import merge

    options = vars(arguments)
    del options["command"]
    _say(merge(**options))


def _add_export(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "export", help="write the policy for Ollama, or as a GGUF file where llama.cpp's converter is"
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument("--to", required=True, choices=["ollama", "gguf"], help="the program to write for")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must be empty or new")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="rows with a prompt, to measure the merge on (default: the run's samples.jsonl)",
    )
    parser.add_argument(
        "--base", metavar="PATH_OR_HUB_ID", help="the base, where it is no longer where the run had it"
    )


def _export(arguments: argparse.Namespace) -> None:
    from goose_lora.sharing.export_programs import export

    options = vars(arguments)
    del options["command"]
    _say(export(**options))


def _add_compare(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "compare",
        help="put PPO runs side by side: settings that differ, figures with intervals, curves on one axis",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of two runs or more")
    parser.add_argument(
        "--output", default="compare.html", metavar="FILE", help="the page to write (default: %(default)s)"
    )


def _compare(arguments: argparse.Namespace) -> None:
    from goose_lora.reporting.compare import compare

    _say(compare(arguments.runs, arguments.output))


def _add_verdict(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "verdict",
        help="judge any reward model on pairs or best of N: accuracy by subset, length, probes",
    )
    parser.add_argument(
        "model",
        metavar="ADAPTER_OR_MODEL",
        help="a reward adapter, an ensemble of them, or a sequence classifier (NAME#LABEL for one of its"
        " labels): a folder, or on the Hub",
    )
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="FILE_OR_HUB_ID",
        help="prompt with chosen and rejected, each a reply or a list of them, or ranked lists; what"
        " recipes/reward.py reads",
    )
    parser.add_argument(
        "--split", default="test", help="which split, of rows that have several (default: %(default)s)"
    )
    parser.add_argument(
        "--subset", metavar="COLUMN", help="column that names each row's subset (default: subset, if there)"
    )
    parser.add_argument("--output_dir", metavar="DIR", help="folder for verdict.json")
    parser.add_argument("--max_rows", type=int, metavar="N", help="the first so many rows only")
    parser.add_argument("--max_length", type=int, metavar="N", help="leave out texts of more tokens")
    parser.add_argument(
        "--batch_size", type=int, default=16, metavar="N", help="texts at a time (default: 16)"
    )
    parser.add_argument(
        "--base",
        metavar="PATH_OR_HUB_ID",
        help="an adapter's base, where it is no longer where the run had it",
    )
    parser.add_argument(
        "--quantization", choices=["nf4", "int8", "none"], help="of the weights (default: the run's, or none)"
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the computation (default: the run's, or what suits the device)",
    )
    _add_reading(parser)
    parser.add_argument(
        "--as_chat",
        type=_true_or_false,
        metavar="true|false",
        help="whether prompts of text become the user's turn (default: whether the model reads chat)",
    )


def _verdict(arguments: argparse.Namespace) -> None:
    from goose_lora.cli.reward_verdict import verdict
    from goose_lora.embedded import resolve

    arguments.base = arguments.base and resolve(arguments.base)
    _say(verdict(**_reading_options(arguments)))


# ---- Ask and label ----
def _add_chat(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "chat", help="ask base, SFT and PPO of a run the same, in the terminal or on a local page"
    )
    parser.add_argument(
        "run", metavar="RUN_OR_HUB_ID", help="folder of the run, or user/repo[@revision] on the Hub"
    )
    parser.add_argument(
        "--roles",
        type=lambda text: text.split(","),
        default=[],
        metavar="ROLES",
        help="who answers (default: base,sft,ppo)",
    )
    parser.add_argument(
        "--serve",
        action="store_true",
        help="on a page of this machine, by gradio: pip install goose-lora[web]",
    )
    _add_asking(parser, greedy=True)


def _chat(arguments: argparse.Namespace) -> None:
    from goose_lora.apps.chat import chat
    from goose_lora.embedded import resolve

    options = vars(arguments)
    del options["command"]
    chat(**{**options, "base": arguments.base and resolve(arguments.base)})


def _add_label(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "label",
        help="choose between two replies of a policy on a local page, and write pairs for recipes/reward.py",
    )
    parser.add_argument("--policy", metavar="RUN", help="folder of the run whose replies are compared")
    parser.add_argument("--prompts", metavar="FILE", help="rows with a prompt, or embedded/NAME")
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE.jsonl",
        help="where choices are appended; what stands there is not asked again",
    )
    parser.add_argument(
        "--choose",
        choices=["random", "uncertain"],
        default=_CHOOSE,
        help="uncertain: those that the reward model scores most alike",
    )
    parser.add_argument(
        "--candidates",
        type=int,
        default=_CANDIDATES,
        metavar="N",
        help="replies sampled to a prompt, of which two are shown (default: %(default)s)",
    )
    _add_asking(parser, greedy=False)
    judge = parser.add_argument_group("a judge in place of the page")
    judge.add_argument("--judge", metavar="openai:MODEL", help="a model behind a server, which chooses")
    judge.add_argument("--judge_base_url", metavar="URL", help="its server; OpenAI's if unset")
    judge.add_argument("--judge_rubric", metavar="FILE", help="what makes a reply better, in your words")
    judge.add_argument(
        "--replies",
        metavar="FILE_OR_HUB_ID",
        help="rows with a prompt and replies to compare, in place of --policy and --prompts",
    )
    judge.add_argument(
        "--columns",
        nargs="+",
        metavar="NAME",
        help="of --replies: one with lists (default: completions), or two or more with a reply each",
    )


def _label(arguments: argparse.Namespace) -> None:
    from datasets import disable_progress_bars

    from goose_lora.apps.label import open_queue
    from goose_lora.apps.label_by_judge import judge_queue, judge_replies, labelling_judge
    from goose_lora.apps.label_page import label
    from goose_lora.embedded import resolve

    disable_progress_bars()
    _check_label(arguments)
    options = vars(arguments)
    del options["command"]
    for name in ("prompts", "replies", "base"):
        options[name] = options[name] and resolve(options[name])
    name, url, rubric = (options.pop(name) for name in ("judge", "judge_base_url", "judge_rubric"))
    replies, columns = options.pop("replies"), options.pop("columns")
    if name is None:
        label(**options)
        return
    # A server that does not answer is found before a policy is loaded
    judge = labelling_judge(name, base_url=url, rubric=rubric, out=options["out"])
    if replies is not None:
        _say(judge_replies(replies, options["out"], judge, columns=columns))
        return
    del options["port"]
    judge.check()
    _say(judge_queue(open_queue(**options), judge))


def _check_label(arguments: argparse.Namespace) -> None:
    """Raise UserError for options of ``label`` that do not go together."""
    # What belongs to a judge, or to the page
    given = vars(arguments)
    of_judge = [name for name in ("judge_base_url", "judge_rubric", "replies") if given[name] is not None]
    if arguments.judge is None and of_judge:
        raise UserError(
            f"--{of_judge[0]} is of a judge. Set --judge openai:MODEL beside it, or leave it out."
        )
    if arguments.columns is not None and arguments.replies is None:
        raise UserError("--columns is of --replies. Set that beside it, or leave it out.")
    if arguments.judge is not None and arguments.port is not None:
        raise UserError("--port is of the page, which --judge does without. Leave one of them out.")
    # Replies are in a file, or a policy writes them
    if arguments.replies is None:
        missing = [name for name in ("policy", "prompts") if given[name] is None]
        if missing:
            raise UserError(
                f"the following arguments are required: {', '.join(f'--{name}' for name in missing)}; or"
                " --replies with --judge. goose-lora label --help lists what there is."
            )
        return
    unset = dict.fromkeys(("policy", "prompts", "temperature", "max_new_tokens", "base"))
    unset |= {"choose": _CHOOSE, "candidates": _CANDIDATES, "seed": _SEED}
    besides = [name for name, value in unset.items() if given[name] != value]
    if besides:
        raise UserError(
            f"--{besides[0]} is of a policy that writes replies, and --replies has them. Leave one of them"
            " out."
        )


# In the order of --help.
ADDED = (
    _add_demo,
    _add_recipes,
    _add_env,
    _add_doctor,
    _add_data,
    _add_plan,
    _add_show,
    _add_push,
    _add_merge,
    _add_export,
    _add_compare,
    _add_verdict,
    _add_chat,
    _add_label,
)
COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": _demo,
    "recipes": _recipes,
    "env": _env,
    "doctor": _doctor,
    "data": _data,
    "plan": _plan,
    "show": _show,
    "push": _push,
    "merge": _merge,
    "export": _export,
    "compare": _compare,
    "verdict": _verdict,
    "chat": _chat,
    "label": _label,
}
