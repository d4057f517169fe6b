"""A chain of adapters on a tiny base, made without training: what the tests of lineage, card,
upload and merging share."""

import shutil
from pathlib import Path

import tiny
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, TrainingArguments

from goose_lora.data.rows import fingerprint
from goose_lora.files import write_json, write_jsonl
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.loading import load_base, load_tokenizer
from goose_lora.models.shared_base import SharedBase
from goose_lora.reporting.plots import plot_curves
from goose_lora.sharing import lineage, model_card
from goose_lora.sharing.export import save_policy

TOKEN = "hf_aVerySecretTokenOfOurs"
VERDICT = {
    "accuracy": 0.8125,
    "accuracy_ci": [0.5625, 0.9375],
    "n_pairs": 16,
    "warnings": ["empty reply: score 1.5 on average: add such pairs"],
}


def arguments(base: str, quantization: str = "nf4") -> ModelArguments:
    return ModelArguments(base, quantization=quantization, lora_r=3, lora_alpha=6, lora_layers="top-2")


def build(folder: Path, *, quantization: str = "nf4") -> Path:
    """``base``, ``sft``, ``reward`` and ``ppo`` in ``folder``, with all that the recipes leave
    beside them; returns ``folder``."""
    base = tiny.save_base(folder / "base", hidden_size=66, head_dim=22, intermediate_size=64)
    args = arguments(base, quantization)
    tokenizer = load_tokenizer(args)
    rows = Dataset.from_list(tiny.prompts(8))

    def record(stage, figures, parents=None, **facts):
        config = TrainingArguments(
            output_dir=str(folder / stage), learning_rate=0.0123, use_cpu=True, hub_token=TOKEN
        )
        words = ["--config", "x.yaml", "--hub_token", TOKEN]
        noted = {
            "settings": [config],
            "data": [fingerprint("tiny/prompts", "train", rows)],
            "command": lineage.recorded_command(stage, words),
        }
        figures = {**figures, "seconds": 7.5, "peak_rss_gb": 1.25}
        lineage.record(
            folder / stage,
            stage,
            model=args,
            tokenizer=tokenizer,
            figures=figures,
            parents=parents,
            **noted,
            **facts,
        )
        write_json(folder / stage / "stage.json", {"stage": stage, **figures})
        model_card.write_card(folder / stage)

    sft = tiny.shared(load_base(args, tokenizer), layers="top-2")
    tiny.randomise(sft, std=0.1)
    save_policy(sft, tokenizer, folder / "sft")
    record("sft", {"loss": 2.345, "steps": 40})

    judge = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1),
        tiny.lora(sft.get_base_model(), layers="top-2", task_type="SEQ_CLS"),
    )
    tiny.randomise(judge, std=0.1)
    judge.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    write_json(folder / "reward" / "verdict.json", VERDICT)
    record("reward", {"loss": 0.567, "steps": 12}, append_eos=True, reward_bias=0.25)

    shared = SharedBase.build(
        load_base(args, tokenizer), folder / "sft", reward=folder / "reward", critic="adapter"
    )
    tiny.randomise(shared, std=0.2, seed=9)
    save_policy(shared, tokenizer, folder / "ppo")
    metrics = [
        {
            "step": step,
            "objective/score": step / 8,
            "objective/kl": 0.5,
            "loss/value": 1.0,
            "rollout/response_tokens": 6.0,
        }
        for step in (4, 8)
    ]
    write_jsonl(folder / "ppo" / "metrics.jsonl", metrics)
    samples = [
        {"step": 8, "prompt": f"<s> {row['prompt']}", "reply": "good | ba", "raw_score": 0.375, "kl": 0.5}
        for row in tiny.prompts(6)
    ]
    write_jsonl(folder / "ppo" / "samples.jsonl", samples)
    plot_curves(metrics, folder / "ppo" / "curves.png")
    parents = {"policy": folder / "sft", "reward": folder / "reward"}
    record("ppo", {"objective/score": 1.234567, "objective/kl": 0.5}, parents, findings=["look  kl  0.5"])
    return folder


def copy(source: Path, target: Path) -> Path:
    """A copy of a chain to spoil, in which all names are those of the copy; returns ``target``."""
    shutil.copytree(source, target)
    for path in (
        path
        for path in target.rglob("*")
        if path.name in ("goose_lora.json", "adapter_config.json", "README.md")
    ):
        path.write_text(path.read_text(encoding="utf-8").replace(str(source), str(target)), encoding="utf-8")
    return target
