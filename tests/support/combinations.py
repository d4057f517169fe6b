"""PPO under settings that are drawn at random, all that go together: a run of three rollouts, and
the same run resumed after its first.

A seed is a combination. ``faults`` returns what is wrong with it, in words; nothing if it is right.
"""

import copy
import math
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import tiny
import tiny_runs
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import TrainerCallback

from goose_lora.files import read_jsonl
from goose_lora.models.loading import load_base, load_reward_base, load_tokenizer
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.trainer import PPOTrainer

CPU = torch.device("cpu")
LAYERS = ("all", "top-2")
# Adapters that a policy can start from, by what PEFT is told
STARTS = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    "bias": {"lora_bias": True},
    "PiSSA": {"init_lora_weights": "pissa"},
}


# ---- Rewards of every form that is taken ----


def even(completion_ids, **columns):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def some(completion_ids, **columns):
    return [float(len(ids)) if ids[0] % 3 else None for ids in completion_ids]


def by_token(completion_ids, **columns):
    return [[(token % 5) / 5 for token in ids] for ids in completion_ids]


def mixed(completion_ids, **columns):
    """A number a token, one for all, or none."""
    return [
        [(token % 5) / 5 for token in ids] if ids[0] % 2 else (0.5 if ids[0] % 3 else None)
        for ids in completion_ids
    ]


async def slow(completion_ids, **columns):
    return [ids[-1] % 7 for ids in completion_ids]


def as_tensor(completion_ids, **columns):
    return torch.tensor([float(ids[-1] % 4) for ids in completion_ids])


def no_score(completion_ids, **columns):
    return [None for _ in completion_ids]


def constant(completion_ids, **columns):
    return [1.0 for _ in completion_ids]


REWARDS = {f.__name__: f for f in (even, some, by_token, mixed, slow, as_tensor, no_score, constant)}
_OF_SOME = ("some", "mixed", "no_score")  # say nothing of some replies
_TEACH_NOTHING = {"no_score", "constant"}
_NOT_ALL = _TEACH_NOTHING | {"some", "mixed"}  # give some replies no score


class Combination(NamedTuple):
    """What a run is made of: the base and its roles, the sources of reward, and PPO's settings."""

    quantization: str
    dtype: str
    embeddings: str  # device or host
    layers: str  # of the policy's adapter
    start: str | None  # a kind of trained adapter, or None for a fresh one
    reference: str | None  # None, copy, or folder
    reward_layers: str | None  # of the reward adapter; None without one
    sources: list[str]
    weights: list[float]
    rows: int
    has_texts: bool
    evaluated: bool
    watched: bool  # by a callback of the user's, which only looks
    settings: dict


def draw(seed: int) -> Combination:
    """Return the combination of ``seed``."""
    chance = random.Random(seed)
    pick = chance.choice
    quantization = pick(["none", "none", "nf4", "int8"])
    refused = {"nf4": {"PiSSA"}, "int8": {"PiSSA", "DoRA"}}.get(quantization, set())
    starts = [kind for kind in STARTS if kind not in refused]
    start = pick([None, None, *starts])
    has_reward = chance.random() < 0.6

    # The form of a rollout
    settings = {
        "advantage_estimator": pick(["gae", "gae", "gae", "rloo", "grpo"]),
        "per_device_train_batch_size": pick([2, 4]),
        "gradient_accumulation_steps": pick([1, 2, 3]),
        "num_mini_batches": pick([1, 2]),
        "num_ppo_epochs": pick([1, 2]),
        "num_rollouts": 3,
    }
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches")
    size = math.prod(settings[name] for name in names)
    with_critic = settings["advantage_estimator"] == "gae"
    settings["num_generations"] = pick([n for n in (1, 2, 4) if size % n == 0 and (n > 1 or with_critic)])
    settings |= _of_critic(chance, has_reward=has_reward) if with_critic else {}
    settings |= _of_rewards(chance) | _of_updates(chance)

    # What happens between rollouts
    steps = settings["num_ppo_epochs"] * settings["num_mini_batches"]
    settings |= {"save_strategy": "steps", "save_steps": steps, "save_total_limit": None}
    settings["logging_steps"] = pick([None, 1])
    evaluated, has_texts = chance.random() < 0.35, chance.random() < 0.3
    if evaluated:
        settings |= {"eval_strategy": "steps", "eval_steps": steps, "num_eval_prompts": pick([1, 5])}
        settings["early_stopping_patience"] = pick([None, 1, 2])
        settings["load_best_model_at_end"] = chance.random() < 0.4
        settings["eval_on_start"] = chance.random() < 0.3
    if has_texts:
        settings |= {"ptx_coef": 0.5, "ptx_batch_size": pick([1, 3])}
    sources, weights = _sources(chance, has_reward=has_reward)
    return Combination(
        quantization=quantization,
        dtype=pick(["float32", "float32", "bfloat16", "float16"]),
        embeddings=pick(["device", "device", "host"]),
        layers=pick(["all", "top-2", "top-2"]),
        start=start,
        reference=pick([None, None, "copy", "folder"]),
        reward_layers=pick(LAYERS) if has_reward else None,
        sources=sources,
        weights=weights,
        rows=pick([70, 70, max(8, size // settings["num_generations"] + 1)]),
        has_texts=has_texts,
        evaluated=evaluated,
        watched=chance.random() < 0.3,
        settings=settings,
    )


def _of_critic(chance: random.Random, *, has_reward: bool) -> dict:
    pick = chance.choice
    critic = pick(["adapter", "shared"] + (["reward_features"] * 2 if has_reward else []))
    starts = {
        "adapter": ["policy", "zero"] + (["reward"] if has_reward else []),
        "shared": ["zero"],
        "reward_features": ["reward", "zero"],
    }
    return {
        "critic": critic,
        "critic_init": pick([*starts[critic], None]),
        "critic_warmup_rollouts": pick([0, 0, 1]),
        "value_learning_rate": pick([None, 3e-3]),
        "value_lr_scheduler_type": pick([None, "cosine", "constant"]),
        "value_warmup_steps": pick([0, 0, 2]),
        "cliprange_value": pick([0.2, None]),
        "vf_coef": pick([0.1, 1.0]),
        "whiten_rewards": chance.random() < 0.3,
        "gamma": pick([1.0, 0.9]),
        "lam": pick([0.95, 1.0, 0.0]),
        "lam_critic": pick([None, None, 1.0]),
    }


def _of_rewards(chance: random.Random) -> dict:
    pick = chance.choice
    location, normalization = pick(["reward", "reward", "loss"]), pick(["reference", "running", "none"])
    estimator = pick((["k1"] if location == "reward" else []) + ["k2", "k3", "exact"])
    weighed = location == "loss" and estimator != "exact"
    return {
        "kl_location": location,
        "kl_estimator": estimator,
        "kl_importance_weight": weighed and chance.random() < 0.5,
        "kl_coef": pick([0.05, 0.5]),
        "kl_target": pick([None, None, 1.0]),
        "kl_horizon": 50,
        "max_kl": pick([None, None, 1e4]),
        "score_normalization": normalization,
        "score_calibration_prompts": 8 if normalization == "reference" else pick([2, 8]),
        "score_clip": pick([None, 1.0]),
        "length_penalty": pick([0.0, 0.1, -0.1]),
        "missing_eos_penalty": pick([None, 1.0]),
        "reward_timeout": pick([None, 1800]),
    }


def _of_updates(chance: random.Random) -> dict:
    pick = chance.choice
    settings = {
        "entropy_coef": pick([0.0, 0.01]),
        "cliprange": pick([0.1, 0.2]),
        "cliprange_high": pick([None, None, 0.28]),
        "sampling_correction": pick([None, None, "truncate", "mask"]),
        "sampling_correction_cap": pick([3.0, 1.0]),
        "ema_decay": pick([None, 0.9]),
        "ratio_threshold": pick([10.0, None, 1.0001]),
        "max_tokens_per_microbatch": pick([None, None, 20, 1]),
        "gradient_checkpointing": chance.random() < 0.35,
        "train_layers": pick(["all", "all", "top-1", "top-2"]),
        "reuse_trunk": chance.random() < 0.8,
        "trunk_memory": pick(["auto", "host"]),
        "rollout_weights": pick(["auto", "shared", "auto"]),
        "temperature": pick([1.0, 0.7, 1.3]),
        "response_length": pick([1, 5, 6]),
        "local_rollout_forward_batch_size": pick([3, 16]),
        "stop_token_ids": pick([None, [7, 9]]),
        "stop_strings": pick([None, ["ba"]]),
        "lr_scheduler_type": pick(["constant", "cosine", "linear"]),
        "warmup_steps": pick([0, 1]),
        "learning_rate": pick([1e-2, 1e-3]),
        "optim": pick(["adamw_torch", "adamw_torch", "sgd"]),
        "weight_decay": pick([0.0, 0.1]),
        "max_grad_norm": pick([1.0, 0.1]),
        "sample_rows": pick([0, 2]),
        "seed": chance.randint(0, 5),
    }
    if settings["sampling_correction"] == "mask" and settings["sampling_correction_cap"] == 1.0:
        settings["sampling_correction_cap"] = 1.5  # a mask at 1 is decided by rounding, and refused
    return settings


def _sources(chance: random.Random, *, has_reward: bool) -> tuple[list[str], list[float]]:
    """Return some sources of reward of which one scores all replies, and their weights."""
    names = chance.sample(list(REWARDS), chance.randint(0 if has_reward else 1, 3))
    if has_reward and (not names or chance.random() < 0.6):
        names.append("adapter")
    if not set(names) - _NOT_ALL:
        names.append("even")
    chance.shuffle(names)
    weights = [chance.choice([1.0, 0.3, 0.0, -1.0]) for _ in names]
    if not any(weight and name not in _TEACH_NOTHING for name, weight in zip(names, weights, strict=True)):
        weights = [1.0] * len(names)
    # What only watches speaks for no reply
    if all(name in _OF_SOME for name, weight in zip(names, weights, strict=True) if weight):
        weights = [1.0] * len(names)
    return names, weights


class Watcher(TrainerCallback):
    """Looks at what is logged."""

    def __init__(self):
        self.seen: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs or {}))


class Bases:
    """Folders of a base and of the adapters on it, made once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.base = tiny.save_base(folder / "base", hidden_size=66, head_dim=22, intermediate_size=64)
        args = tiny.arguments(self.base)
        for layers in LAYERS:
            for start, settings in STARTS.items():
                self._save(f"policy {start} {layers}", load_base, args, layers, "CAUSAL_LM", settings)
            self._save(f"reward {layers}", load_reward_base, args, layers, "SEQ_CLS", {})

    def _save(self, name, load, args, layers, task, settings):
        model = load(args, load_tokenizer(args))
        adapter = get_peft_model(model, tiny.lora(model, layers=layers, task_type=task, **settings))
        tiny.stir(adapter, std=0.1)
        adapter.save_pretrained(self.folder / name)

    def trainer(self, made: Combination, folder: Path, **changes) -> PPOTrainer:
        """Return the trainer of a combination, its base loaded anew."""
        args = tiny.arguments(
            self.base,
            quantization=made.quantization,
            dtype=made.dtype,
            embeddings=made.embeddings,
            lora_layers=made.layers,
        )
        tokenizer = load_tokenizer(args)
        base = load_base(args, tokenizer, device=CPU)
        torch.manual_seed(0)
        # The roles
        policy = tiny.lora(base, layers=made.layers)
        if made.start is not None:
            policy = self.folder / f"policy {made.start} {made.layers}"
        reference = {"folder": self.folder / f"policy plain {made.layers}"}.get(
            made.reference, made.reference
        )
        reward = None if made.reward_layers is None else self.folder / f"reward {made.reward_layers}"
        settings = made.settings | changes
        shared = SharedBase.build(
            base,
            policy,
            reward=reward,
            critic=settings.get("critic") if settings["advantage_estimator"] == "gae" else None,
            critic_init=settings.get("critic_init"),
            average=settings["ema_decay"] is not None,
            train_layers=settings["train_layers"],
            reference=reference,
        )
        # The trainer
        config = PPOConfig(
            output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **copy.deepcopy(settings)
        )
        rows = tiny_runs.prompt_rows(made.rows)
        texts = Dataset.from_list([{"input_ids": ids * 2} for ids in rows["input_ids"][:9]])
        return PPOTrainer(
            shared,
            config,
            rows,
            tokenizer,
            reward_function=[REWARDS.get(name, "adapter") for name in made.sources],
            reward_weights=made.weights,
            ptx_dataset=texts if made.has_texts else None,
            eval_dataset=tiny_runs.prompt_rows(7) if made.evaluated else None,
            callbacks=[Watcher()] if made.watched else None,
        )


def adapter_weights(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """Return copies of all that adapters and heads hold."""
    named = trainer.shared.named_parameters()
    return {name: p.detach().clone() for name, p in named if "lora_" in name or ".score." in name}


def figures(folder: Path, *, after: int) -> list[dict]:
    """Return the rows of metrics.jsonl after a step, without what depends on the machine."""
    return [
        {
            name: value
            for name, value in row.items()
            if not any(word in name for word in ("second", "runtime", "flos")) and name != "train_loss"
        }
        for row in read_jsonl(folder / "metrics.jsonl")
        if row["step"] > after
    ]


def broken_figures(folder: Path) -> list[str]:
    """Return the names of figures that are no numbers, but for scores that nobody gave."""
    wrong = {
        name
        for row in read_jsonl(folder / "metrics.jsonl")
        for name, value in row.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    return sorted(wrong - {f"reward/{name}" for name in _NOT_ALL})


def copy_checkpoint(one: Path, other: Path, step: int) -> Path:
    """Copy what a run had left after ``step`` into another folder; return its checkpoint."""
    shutil.copytree(one / f"checkpoint-{step}", other / f"checkpoint-{step}")
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (one / name).exists():
            shutil.copy(one / name, other / name)
    return other / f"checkpoint-{step}"


def differences(one: list[dict], other: list[dict]) -> list[str]:
    """Return where two logs differ, the first row that does alone."""
    if [row["step"] for row in one] != [row["step"] for row in other]:
        return [f"{len(one)} rows of figures, {len(other)} resumed"]
    for row, again in zip(one, other, strict=True):
        names = [name for name in sorted(row.keys() | again.keys()) if not _same(row, again, name)]
        if names:
            return [f"step {row['step']}: {name}: {row.get(name)}, {again.get(name)}" for name in names[:4]]
    return []


def _same(one: dict, other: dict, name: str) -> bool:
    pair = (one.get(name), other.get(name))
    return pair[0] == pair[1] or all(isinstance(x, float) and math.isnan(x) for x in pair)


def unequal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]
