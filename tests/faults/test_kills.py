"""Runs that are killed without warning, again and again, end where the one that was left alone ends: weights, metrics and samples."""

import random
from pathlib import Path

import forks
import pytest
import tiny
from forks import Moment

from goose_lora.report import read_jsonl

KINDS = ("rollout", "forward", "update", "file", "file")


def count_good(completions, **columns):
    return [text.split().count("good") + 0.1 * len(text.split()) for text in completions]


@pytest.fixture(scope="module")
def given(tiny_base, tmp_path_factory):
    """What each recipe is told, at its smallest."""
    folder = tmp_path_factory.mktemp("data")
    data = {name: tiny.write_rows(folder / f"{name}.jsonl", getattr(tiny, name)(24)) for name in ("texts", "preferences", "prompts")}
    model = {"model_name_or_path": tiny_base, "quantization": "none", "dtype": "float32", "lora_r": 3, "lora_alpha": 6, "lora_layers": "top-2"}
    train = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2, "save_strategy": "steps", "per_device_train_batch_size": 4}
    small = {"bf16": False, "max_steps": 6, "save_steps": 2, "logging_steps": 1, "gradient_checkpointing": False}
    ppo = {"num_rollouts": 4, "num_ppo_epochs": 2, "save_steps": 2, "response_length": 4, "score_calibration_prompts": 8, "rollout_weights": "shared"}
    ppo |= {"reward_function": f"{__file__}:count_good", "dataset_name": data["prompts"], "sample_rows": 1}
    pairs = {"dataset_name": data["preferences"], "eval_dataset_name": data["preferences"]}
    own = {"rating": f"{__file__}:count_good", "score_normalization": "none"}
    return {
        "sft": model | train | small | {"dataset_name": data["texts"]},
        "reward": model | train | small | pairs,
        "ppo": model | train | ppo,
        "own_loop": model | train | {name: value for name, value in ppo.items() if name != "reward_function"} | own,
    }


def leavings(folder: Path):
    """All that a run leaves and that must not depend on how often it was killed."""
    weights = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("adapter_model.safetensors") if "checkpoint-" not in str(path)}
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "train_runtime" not in row]  # a summary of the process, not of the run
    # num_tokens is TRL's count, which begins anew in each process
    metrics = [{name: value for name, value in row.items() if "second" not in name and name != "num_tokens"} for row in rows]
    samples = folder / "samples.jsonl"
    return weights, metrics, samples.read_text() if samples.is_file() else ""


def assert_same_leavings(straight, broken):
    want, got = leavings(straight), leavings(broken)
    assert want[0] and want[1]
    for one, other in zip(want, got, strict=True):
        assert one == other


def killed_again_and_again(name, folder, settings, kills, seed):
    """How often it was killed until it ended as the one that is left alone, from whose moments those of the kills are drawn."""
    straight = forks.run(name, folder / "straight", **settings)
    assert straight.code == 0, straight.output[-3000:]
    generator = random.Random(seed)
    killed, done = 0, 0
    while killed < kills or done == 0:
        broken, moment = folder / f"broken-{done}", None
        if killed < kills:
            kind = generator.choice([kind for kind in KINDS if straight.counts[kind]])
            moment = Moment(kind, generator.randint(1, max(1, straight.counts[kind] // 2)))
        ended = forks.run(name, broken, moment, **settings, resume_from_checkpoint="latest")
        assert ended.code in (0, -9), ended.output[-3000:]
        killed += ended.code != 0
        if ended.code == 0:
            done += 1
            assert_same_leavings(folder / "straight", broken)
    return killed


ADAPTIVE = {"kl_target": 1.0, "kl_horizon": 50, "score_normalization": "running", "ema_decay": 0.9, "critic_warmup_rollouts": 1}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "num_eval_prompts": 4, "load_best_model_at_end": True, "save_total_limit": 1}
RLOO = {"advantage_estimator": "rloo", "num_generations": 2, "lr_scheduler_type": "linear", "save_total_limit": 1}
KILLED: list[int] = []


@pytest.mark.parametrize(
    ("name", "changes", "kills", "seed"),
    [
        ("ppo", ADAPTIVE, 8, 1),
        ("ppo", BEST, 7, 2),
        ("ppo", RLOO, 7, 3),
        ("own_loop", {"critic": "shared"}, 4, 4),
        ("sft", {}, 3, 5),
        ("reward", {}, 3, 6),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_where_it_would_have_ended(name, changes, kills, seed, given, tmp_path):
    settings = given[name] | changes
    if "eval_strategy" in changes:
        settings["eval_dataset_name"] = settings["dataset_name"]
    KILLED.append(killed_again_and_again(name, tmp_path, settings, kills, seed))


def test_twenty_kills_or_more_were_survived():
    assert sum(KILLED) >= 20, KILLED
