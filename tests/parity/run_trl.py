"""Step 2 of `make parity`: watch TRL 1.12.0's own PPOTrainer on the frozen rollouts.

    .venv-parity/bin/python tests/parity/run_trl.py FOLDER

It runs in an environment with trl==1.12.0. Only the sampling of replies is replaced, by the frozen
ones with the logits that sampling would have had. Everything else is TRL's code as released: local
variables of its ``train`` are read where it calls ``masked_whiten`` and ``accelerator.backward``.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

OF_ROLLOUT = (
    "logprobs",
    "ref_logprobs",
    "kl",
    "rewards",
    "values",
    "advantages",
    "returns",
    "scores",
    "padding_mask",
    "padding_mask_p1",
)
OF_UPDATE = (
    "new_logprobs",
    "vpred",
    "ratio",
    "pg_loss",
    "vf_loss",
    "loss",
    "micro_batch_inds",
    "mb_advantage",
)


def build(folder, facts, case):
    """Return the trainer, its policy a PEFT model and its critic's body frozen.

    So both have the trainable tensors of the shared base.
    """
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
    policy = get_peft_model(base, LoraConfig(**facts["lora"])).double()
    adapters = load_file(folder / "adapters.safetensors")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.copy_(adapters[name])
    load = AutoModelForSequenceClassification.from_pretrained
    value, reward = (load(folder / name, dtype=torch.float64, num_labels=1) for name in ("value", "reward"))
    value.requires_grad_(False)
    value.score.requires_grad_(True)
    texts = load_file(folder / "rollouts.safetensors")[case["replies"].replace(" ", "_")]
    prompts = [row[row != facts["pad"]].tolist() for row in texts[:, : facts["prompt_tokens"]]]
    args = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=case["rows"],
        gradient_accumulation_steps=case["accumulation"],
        num_mini_batches=case["mini_batches"],
        num_ppo_epochs=case["epochs"],
        total_episodes=len(texts) * case["rollouts"],
        response_length=texts.shape[1] - facts["prompt_tokens"],
        optim="sgd",
        learning_rate=0.02,
        lr_scheduler_type="constant",
        **{
            name: case[name]
            for name in (
                "temperature",
                "kl_coef",
                "kl_estimator",
                "whiten_rewards",
                "missing_eos_penalty",
                "stop_token",
            )
        },
        **{name: case[name] for name in ("cliprange", "cliprange_value", "vf_coef", "gamma", "lam")},
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"input_ids": prompts * case["rollouts"]})
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    trainer = PPOTrainer(
        args,
        tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
    )
    trainer.callback_handler.remove_callback(PrinterCallback)
    return trainer, texts


def watch(trainer, texts, facts, monkey):
    """Note what TRL computes, by name; ``order`` tells which frozen reply each of its rows is."""
    found, metrics, counts = {}, [], [0]
    prompt = facts["prompt_tokens"]

    def frozen(model, queries, batch_size, pad_token_id, generation_config):
        width = queries.shape[1]  # a batch of short prompts alone is narrower
        left_out = prompt - width
        order = [
            next(i for i, text in enumerate(texts) if text[left_out:prompt].tolist() == query.tolist())
            for query in queries
        ]
        found.setdefault("order", torch.tensor(order))
        ids = texts[order][:, left_out:]
        # Generate attends to all it wrote
        seen = torch.cat([queries != pad_token_id, torch.ones_like(ids[:, width:], dtype=torch.bool)], dim=1)
        logits = model(
            input_ids=ids, attention_mask=seen.long(), position_ids=(seen.long().cumsum(1) - 1).clamp(min=0)
        ).logits
        return ids.clone(), logits[:, width - 1 : -1] / generation_config.temperature

    whiten, backward = ppo_trainer.masked_whiten, trainer.accelerator.backward

    def watched_whiten(values, mask, shift_mean=True):
        whitened = whiten(values, mask, shift_mean)
        local = sys._getframe(1).f_locals
        names = OF_ROLLOUT if shift_mean else ("rewards",)
        prefix = "rollout" if shift_mean else "before whitening"
        for name in names:
            found.setdefault(f"{prefix}/{name}", local[name].detach().clone())
        found.setdefault(f"{prefix}/whitened", whitened.detach().clone())
        return whitened

    def watched_backward(loss, **kwargs):
        local = sys._getframe(1).f_locals
        step = sum(name.endswith("/loss") for name in found)
        trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        for name in OF_UPDATE:
            found[f"update {step}/{name}"] = torch.as_tensor(local[name]).detach().clone()
        found.update({f"update {step}/weight/{name}": p.detach().clone() for name, p in trainable.items()})
        backward(loss, **kwargs)
        found.update({f"update {step}/gradient/{name}": p.grad.clone() for name, p in trainable.items()})

    steps = []
    inner = trainer.optimizer.optimizer
    real_step = inner.step

    def counted_step(*args, **kwargs):
        counts[0] += 1
        return real_step(*args, **kwargs)

    def log(logged, *args, **kwargs):
        metrics.append(dict(logged))
        steps.append(counts[0])
        counts[0] = 0

    inner.step, trainer.log, trainer.accelerator.backward = counted_step, log, watched_backward
    monkey |= {"masked_whiten": whiten, "batch_generation": ppo_trainer.batch_generation}
    ppo_trainer.masked_whiten, ppo_trainer.batch_generation = watched_whiten, frozen
    return found, metrics, steps


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    facts = json.loads((folder / "facts.json").read_text())
    summary = {"trl": trl.__version__, "metrics": {}, "steps": {}}
    for number, (name, case) in enumerate(facts["cases"].items()):
        trainer, texts = build(folder, facts, case)
        monkey = {}
        found, summary["metrics"][name], summary["steps"][name] = watch(trainer, texts, facts, monkey)
        trainer.train()
        for attribute, original in monkey.items():
            setattr(ppo_trainer, attribute, original)
        save_file(
            {key: value.contiguous() for key, value in found.items()}, folder / f"trl_{number}.safetensors"
        )
    (folder / "trl.json").write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
