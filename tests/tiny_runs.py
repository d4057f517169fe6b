"""Tiny PPO runs, ready to train: what the tests of the trainer and of its parts share."""

from pathlib import Path

import tiny
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from goose_lora.ppo_config import PPOConfig
from goose_lora.ppo_trainer import PPOTrainer
from goose_lora.report import read_jsonl
from goose_lora.shared_base import SharedBase


def even_share(completion_ids, **columns):
    """A toy reward: the share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def prompt_rows(count=64):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 6, (count,), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": torch.randint(4, tiny.VOCABULARY, (n,), generator=generator).tolist()} for n in lengths])


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
    """A shared base whose policy is its own reference, and its own average where it has one, and whose critic, an adapter, is random."""
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
    return PPOTrainer(shared, settings, rows, tiny.tokenizer(), reward_function=reward, callbacks=callbacks, eval_dataset=eval_rows)


def trained_parameters(shared):
    return {name: p.detach().clone() for name, p in shared.named_parameters() if p.requires_grad}


def with_reward_adapter(folder, **roles):
    """A shared base whose reward adapter is random, and whose policy is its own reference."""
    base = tiny.base()
    judge = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("llama", **tiny.ARCHITECTURES["llama"], num_labels=1))
    adapter = get_peft_model(judge, tiny.lora(base, layers="top-2", task_type="SEQ_CLS"))
    tiny.randomise(adapter, std=0.1)
    adapter.save_pretrained(folder)
    return SharedBase.build(base, tiny.lora(base, layers="top-2"), reward=folder, **roles)


def logged(folder, name="objective/score", after=-1):
    """Rows of a run's metrics.jsonl that have ``name``, of the steps after ``after``, without the times that they took."""
    rows = [row for row in read_jsonl(Path(folder) / "metrics.jsonl") if name in row and row["step"] > after]
    return [{key: value for key, value in row.items() if "second" not in key and "runtime" not in key} for row in rows]


def assert_same_weights(one, other):
    """Bit for bit, of what trains."""
    want, got = trained_parameters(one), trained_parameters(other)
    assert want.keys() == got.keys()
    different = [name for name, parameter in want.items() if not torch.equal(got[name], parameter)]
    assert different == []
