"""Tiny PPO runs, ready to train: what the tests of the trainer and of its parts share."""

from pathlib import Path

import tiny
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from goose_lora.files import read_jsonl
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.trainer import PPOTrainer


def even_share(completion_ids, **columns):
    """A toy reward: the share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def prompt_rows(count=64):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 6, (count,), generator=generator).tolist()
    return Dataset.from_list(
        [
            {"input_ids": torch.randint(4, tiny.VOCABULARY, (n,), generator=generator).tolist()}
            for n in lengths
        ]
    )


def config(folder, **changes):
    settings = {
        "num_rollouts": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "response_length": 6,
        "learning_rate": 1e-2,
        "local_rollout_forward_batch_size": 16,
        "score_calibration_prompts": 16,
        "kl_coef": 0.02,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 0,
    }
    return PPOConfig(output_dir=str(folder), **settings | changes)


def fresh(**roles):
    """A shared base whose policy is its own reference, and its own average where it has one, and
    whose critic, an adapter, is random."""
    shared = tiny.shared(tiny.base(), **{"layers": "top-2", "critic": "adapter", "reference": "copy"} | roles)
    tiny.randomise(shared, "default", std=0.0)
    for role in ("reference", "ema"):
        if shared.has(role):
            shared._copy_role("policy", role)
    return shared


def trainer(folder, *, shared=None, reward=even_share, rows=None, callbacks=None, eval_rows=None, **changes):
    shared = fresh() if shared is None else shared
    rows = prompt_rows() if rows is None else rows
    settings = config(folder, **changes)
    return PPOTrainer(
        shared,
        settings,
        rows,
        tiny.tokenizer(),
        reward_function=reward,
        callbacks=callbacks,
        eval_dataset=eval_rows,
    )


def trained_parameters(shared):
    return {name: p.detach().clone() for name, p in shared.named_parameters() if p.requires_grad}


def with_reward_adapter(folder, **roles):
    """A shared base whose reward adapter is random, and whose policy is its own reference."""
    base = tiny.base()
    judge = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("llama", **tiny.ARCHITECTURES["llama"], num_labels=1)
    )
    adapter = get_peft_model(judge, tiny.lora(base, layers="top-2", task_type="SEQ_CLS"))
    tiny.randomise(adapter, std=0.1)
    adapter.save_pretrained(folder)
    return SharedBase.build(base, tiny.lora(base, layers="top-2"), reward=folder, **roles)


def logged(folder, name="objective/score", after=-1):
    """Rows of a run's metrics.jsonl that have ``name``, of the steps after ``after``, without the
    times that they took."""
    rows = [row for row in read_jsonl(Path(folder) / "metrics.jsonl") if name in row and row["step"] > after]
    return [
        {key: value for key, value in row.items() if "second" not in key and "runtime" not in key}
        for row in rows
    ]


def assert_same_weights(one, other):
    """Bit for bit, of what trains."""
    want, got = trained_parameters(one), trained_parameters(other)
    assert want.keys() == got.keys()
    different = [name for name, parameter in want.items() if not torch.equal(got[name], parameter)]
    assert different == []


WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}  # one pass a step, for time


EVERY = {"eval_strategy": "steps", "eval_steps": 4, "num_eval_prompts": 6}


def held_out(count=8):
    return prompt_rows(80).select(range(64, 64 + count))


class Judge:
    """A reward that judges evaluations as told, one number each, and training as ``even_share``;
    and the policy at each of them."""

    def __init__(self, *objectives):
        self.objectives = list(objectives)
        self.called = 0

    def __call__(self, completion_ids, kind, **columns):
        if kind[0] == "train":
            return even_share(completion_ids)
        self.called += 1  # sampled, then greedy
        return [self.objectives[(self.called - 1) // 2]] * len(completion_ids)


def judged(folder, *objectives, **changes):
    train, rows = (
        rows.add_column("kind", [kind] * len(rows))
        for rows, kind in ((prompt_rows(), "train"), (held_out(), "eval"))
    )
    settings = {
        "kl_coef": 0.0,
        "score_normalization": "none",
        "num_rollouts": len(objectives),
        "learning_rate": 1e-3,
    }
    settings |= {"save_strategy": "steps", "save_steps": 4}
    return trainer(
        folder, rows=train, eval_rows=rows, reward=Judge(*objectives), **settings | EVERY | WHOLE | changes
    )


def own(folder, *, shared=None, reward=even_share, eval_rows=None, callbacks=None, **changes):
    """A trainer for a loop of one's own."""
    settings = config(folder, **{"score_normalization": "none"} | changes)
    shared = fresh() if shared is None else shared
    given = {"reward_function": reward, "eval_dataset": eval_rows, "callbacks": callbacks}
    return PPOTrainer(shared, settings, None, tiny.tokenizer(), **given)


def queries():
    return prompt_rows(16)["input_ids"]


def turn(ppo, score=even_share, prompts=None):
    prompts = queries() if prompts is None else prompts
    replies = ppo.generate(prompts)
    return ppo.step(prompts, replies, score([reply.tolist() for reply in replies]))


def pretraining_texts():
    generator = torch.Generator().manual_seed(8)
    return Dataset.from_list(
        [{"input_ids": torch.randint(4, 20, (9,), generator=generator).tolist()} for _ in range(12)]
    )


def with_texts(folder, coef, **changes):
    shared = SharedBase.build(base := tiny.base(), tiny.lora(base, layers="top-2"), critic="shared")
    settings = config(folder, ptx_coef=coef, ptx_batch_size=5, num_rollouts=6, learning_rate=3e-2, **changes)
    texts = pretraining_texts() if coef else None
    return PPOTrainer(
        shared, settings, prompt_rows(), tiny.tokenizer(), reward_function=even_share, ptx_dataset=texts
    )
