"""Hold what users and their files rely on: names, files, keys, checkpoints, commands and messages.

``promises.json`` has them. The tests go through promised doors alone (recipes, ``goose_lora.cli``,
the package's top, files of a run), so that modules may move freely behind them.
"""

import dataclasses
import difflib
import importlib
import json
import os
import re
import runpy
import sys
import typing
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments
from trl import TrlParser

import goose_lora
from goose_lora import cli

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
PROMISES = Path(__file__).resolve().with_name("promises.json")
OURS = ("goose_lora.json", "verdict.json", "stage.json", "evaluation.json", "samples.jsonl", "replies.jsonl")
THEIRS = {field.name for field in dataclasses.fields(TrainingArguments)}
# Rewards in PPO, rates in own_loop and judges in evaluate; STAND_IN is for what it downloads.
VADER = "goose_lora.demo:vader"
STAND_IN = """class SentimentIntensityAnalyzer:
    def polarity_scores(self, text): return {'compound': len(text) % 7 / 7}
"""
BASE = "--model_name_or_path ./base --quantization none --dtype float32"
TRAIN = f"{BASE} --lora_r 3 --lora_alpha 6 --lora_layers top-2 --use_cpu true --report_to none"
TRAIN += " --disable_tqdm true --per_device_train_batch_size 8 --save_strategy steps --save_steps 2"
TUNE = f"{TRAIN} --max_steps 2 --logging_steps 1 --bf16 false"
ROLL_OUT = f"{TRAIN} --dataset_name prompts.jsonl --num_rollouts 1 --num_ppo_epochs 2 --response_length 4"
PPO = f"{ROLL_OUT} --policy_adapter sft --reward_adapter reward --score_calibration_prompts 8 --force true"
# All that adds files or metrics to a run of PPO.
MORE = f"--reward_function adapter {VADER} --kl_estimator exact --kl_location loss --kl_target 6"
MORE += " --critic adapter --ema_decay 0.9 --ptx_coef 0.1 --ptx_dataset_name texts.jsonl"
MORE += " --eval_strategy steps --eval_steps 2 --eval_dataset_name prompts.jsonl"
PAIRS = "--dataset_name pairs.jsonl --eval_dataset_name pairs.jsonl --any_pairs_name pairs.jsonl"
RUNS = {
    "sft": f"{TUNE} --dataset_name texts.jsonl",
    "reward": f"{TUNE} {PAIRS} --reference_dataset_name texts.jsonl",
    "ppo": PPO,
    "ppo_with_more": f"{PPO} {MORE}",
    "own_loop": f"{ROLL_OUT} --policy_adapter sft --critic shared --score_normalization none",
    "evaluate": f"{BASE} --policy_adapter ppo --sft_adapter sft --reward_adapter reward --best_of 2"
    f" --judge {VADER} --dataset_name prompts.jsonl --response_length 4",
}


def write() -> None:
    """Write ``promises.json`` anew, as the code is now: ``python tests/policy/test_promises.py
    --write``.

    A change in that file is a change for users: a script, a configuration, a checkpoint or a
    dashboard of theirs may depend on it. So it needs a line in CHANGELOG.md. A move of code never
    changes the file.
    """
    PROMISES.unlink(missing_ok=True)
    os.environ["WRITE_PROMISES"] = "1"
    raise SystemExit(pytest.main([str(Path(__file__).resolve()), "-p", "no:cacheprovider"]))


def compare(section, found):
    """Assert that a section of ``promises.json`` says what was found; show lines that differ."""
    promised = json.loads(PROMISES.read_text(encoding="utf-8")) if PROMISES.is_file() else {}
    if os.environ.get("WRITE_PROMISES"):
        promised[section] = json.loads(json.dumps(found))
        PROMISES.write_text(json.dumps(promised, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    want, got = (list(lines(value, section)) for value in (promised.get(section), found))
    differing = list(difflib.unified_diff(want, got, "promised", "found", n=0, lineterm=""))
    way_out = "Is it meant so? Add a line to CHANGELOG.md, then run this file with --write."
    assert not differing, "\n".join(["", *(line for line in differing if line[0] != "@"), way_out])


def lines(value, path):
    """Yield ``value`` as lines that each name their whole path; order counts in lists alone."""
    if isinstance(value, dict) and value:
        for name, inner in sorted(value.items()):
            yield from lines(inner, f"{path} > {name}")
    elif isinstance(value, list) and value:
        for inner in value:
            yield from lines(inner, f"{path}:")
    else:
        yield f"{path} {value!r}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run each recipe of ``RUNS`` on a tiny base; return the folder that holds the results."""
    tiny = importlib.import_module("tiny")  # late, since --write imports this file from any folder
    folder = tmp_path_factory.mktemp("promised")
    rows = {"prompts": tiny.prompts(16), "pairs": tiny.preferences(16)}
    rows["texts"] = [{"text": f"{row['prompt']} good"} for row in rows["prompts"]]
    package = folder / "cache" / "vader" / "vaderSentiment"
    package.mkdir(parents=True)
    (package / "vaderSentiment.py").write_text(STAND_IN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GOOSE_LORA_CACHE", str(folder / "cache"))
        tiny.save_base("base")
        for name, content in rows.items():
            tiny.write_rows(f"{name}.jsonl", content)
        for run, words in RUNS.items():
            recipe(run.removesuffix("_with_more"))([*words.split(), "--output_dir", run])
    return folder


def recipe(name):
    """Return the main function of a recipe."""
    return runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))["main"]


def read(path):
    """Return a .json file, or the rows of a .jsonl file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


# Objects whose keys others fill: packages, files, rows, settings.
_OTHERS = ("versions", "lineage", "files", "made_of", "recipe", "further")


def keys(value, path=""):
    """Return the path of each key but for what others fill. Rows of a list count together."""
    found = {path}
    if isinstance(value, dict) and value and not path.endswith(_OTHERS):
        own = [name for name in value if path != "settings" or name not in THEIRS]
        found = {key for name in own for key in keys(value[name], f"{path}.{name}".lstrip("."))}
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        found = {key for inner in value for key in keys(inner, f"{path}[]")}
    return sorted(found)


def test_each_stage_leaves_the_promised_files(runs):
    files = {run: [path for path in (runs / run).rglob("*") if path.is_file()] for run in RUNS}
    compare("files", {run: sorted(p.relative_to(runs / run).as_posix() for p in files[run]) for run in RUNS})


def test_the_files_of_a_run_have_the_promised_keys(runs):
    """Compare the keys of our files, also in folders of roles; a file like another names it."""
    found, earlier = {}, {}
    for path in (path for run in RUNS for path in sorted((runs / run).rglob("*.json*"))):
        name = path.relative_to(runs).as_posix()
        if path.name in OURS and "checkpoint-" not in name:
            same = earlier.setdefault(tuple(keys(read(path))), name)
            found[name] = keys(read(path)) if same == name else f"as {same}"
    compare("keys", found)


def test_metrics_have_the_promised_names(runs):
    found, marks = {}, {"train_runtime": "summary", "eval_objective": "evaluation"}
    for run in ("ppo", "ppo_with_more", "own_loop"):
        for row in read(runs / run / "metrics.jsonl"):
            kind = next((kind for mark, kind in marks.items() if mark in row), "rollout")
            found.setdefault(f"{run}: {kind}", set()).update(row)
    compare("metrics", {rows: sorted(names) for rows, names in found.items()})


def test_stages_have_the_promised_names(runs):
    """Compare all files that name a stage: other stages and a resumed run read it there."""
    files = {path.relative_to(runs).as_posix(): read(path) for path in runs.glob("*/**/*.json")}
    compare("stages", {name: files[name]["stage"] for name in sorted(files) if "stage" in files[name]})


@pytest.mark.parametrize("run", ["ppo", "ppo_with_more"])
def test_a_checkpoint_has_the_promised_format(runs, run):
    """Compare manifest, state and tensors: whatever reads format 1 must go on from them."""
    folder = runs / run / "checkpoint-2"
    manifest, state = read(folder / "checkpoint.json"), read(folder / "trainer_state.json")
    assert manifest["format"] == 1
    assert settings("ppo")["PPOConfig"].keys() <= manifest["settings"].keys()
    found = {"manifest": keys(manifest | {"settings": None}), "tensors": {}}
    found["stateful_callbacks"] = keys({"RolloutState": state["stateful_callbacks"].get("RolloutState")})
    groups = torch.load(folder / "optimizer.pt", weights_only=True)["param_groups"]
    found["optimizer"] = [f"a group of {len(group['params'])} parameters" for group in groups]
    for path in folder.rglob("*.safetensors"):
        names = {re.sub(r"\.layers\..*\.lora_", ".layers.*.lora_", name) for name in load_file(path)}
        found["tensors"][path.relative_to(folder).as_posix()] = sorted(names)
    compare(f"checkpoint of {run}", found)


def settings(name):
    """Return a recipe's settings by dataclass; of transformers' what is added or changed."""
    stopped = mock.patch.object(TrlParser, "__init__", side_effect=InterruptedError)
    with stopped as parser, pytest.raises(InterruptedError):
        recipe(name)([])
    found = {}
    for kind in [*parser.call_args.args, *parser.call_args.kwargs.values()][0]:
        plain = described(TrainingArguments) if issubclass(kind, TrainingArguments) else {}
        own = {} if kind.__module__.startswith("trl.") else described(kind)
        found[kind.__name__] = {name: text for name, text in own.items() if plain.get(name) != text}
    return found


def described(kind):
    """Return type and default of each setting of a dataclass."""
    hints, found, required = typing.get_type_hints(kind), {}, dataclasses.MISSING
    for field in (field for field in dataclasses.fields(kind) if field.init):
        text = re.sub(r"typing\.|<class '(\w+)'>", r"\1", str(hints[field.name]))
        text = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", text)
        default = field.default if field.default_factory is required else field.default_factory()
        found[field.name] = text if default is required else f"{text} = {default!r}"
    return found


def test_recipes_have_the_promised_settings():
    found = {name: settings(name) for name in RUNS if name != "ppo_with_more"}
    compare("recipes", {name: list(kinds) for name, kinds in found.items()})
    compare("settings", {kind: own for kinds in found.values() for kind, own in kinds.items() if own})


def options(parser):
    """Return the options of a parser, and those of its commands below their names."""
    found = {}
    for action in parser._actions:
        if isinstance(action.choices, dict):
            found |= {name: options(command) for name, command in action.choices.items()}
        elif action.dest != "help":
            text = "required" if action.required else f"default {action.default!r}"
            text += f", one of {', '.join(action.choices)}" if action.choices else ""
            text += f", nargs {action.nargs}" if action.nargs else ""
            found["/".join(action.option_strings) or action.metavar or action.dest] = text
    return found


def test_goose_lora_has_the_promised_commands():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '\n[project.scripts]\ngoose-lora = "goose_lora.cli:main"\n' in project and callable(cli.main)
    compare("commands", options(cli.command_line()))


def test_the_package_has_the_promised_names_at_its_top():
    found = {name: getattr(goose_lora, name) for name in dir(goose_lora) if not name.startswith("_")}
    homes = {name: getattr(value, "__module__", None) or "" for name, value in found.items()}
    compare("top", sorted(name for name, home in homes.items() if home.startswith("goose_lora.")))


def test_the_table_of_bad_input_has_the_promised_cases(monkeypatch):
    """Compare each case in its order: name, recipe, and the words that the answer must have."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bad_inputs"))
    cases = importlib.import_module("test_bad_inputs").CASES
    compare("bad_inputs", [f"{len(cases)} cases", *(" | ".join((c.name, c.recipe, *c.says)) for c in cases)])


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write()
