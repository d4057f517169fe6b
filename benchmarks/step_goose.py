"""One side of benchmarks/step.py: steps of this project's PPO, RLOO or GRPO.

step.py starts it with a case as JSON.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from step_common import DTYPES, LORA, PAD, TARGETS, Steps, arguments, model_config, prompts, tokenizer

import torch  # isort: skip
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from goose_lora.cli import keep_freed_memory
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.loading import load_base, lora_config
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.trainer import PPOTrainer


def make_models(folder: Path, case: dict[str, Any], dtype: torch.dtype) -> None:
    """The base and an untrained reward adapter, saved."""
    AutoModelForCausalLM.from_config(model_config(), dtype=dtype).save_pretrained(folder / "base")
    judge = AutoModelForSequenceClassification.from_config(model_config(num_labels=1), dtype=dtype)
    layers = None if case["layers"] == "all" else list(range(30 - int(case["layers"].partition("-")[2]), 30))
    adapter = LoraConfig(**LORA, target_modules=TARGETS, layers_to_transform=layers, task_type="SEQ_CLS")
    get_peft_model(judge, adapter).save_pretrained(folder / "reward")


def _in_a_fork(work: Callable[[], None]) -> None:
    """What ``work`` takes is not this process's memory."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the models could not be made")


def main() -> None:
    case = arguments()
    keep_freed_memory()
    folder, dtype = Path(tempfile.mkdtemp()), DTYPES[case["dtype"]]
    words = tokenizer()
    _in_a_fork(lambda: make_models(folder, case, dtype))
    steps = Steps(warm_up=1)  # the first rollout passes twice, to compare
    model = ModelArguments(
        str(folder / "base"),
        quantization=case["quantization"],
        dtype=case["dtype"],
        lora_layers=case["layers"],
    )
    base = load_base(model, words, device=torch.device("cpu"))
    estimator = case.get("estimator", "gae")
    shared = SharedBase.build(
        base,
        lora_config(model, base),
        reward=folder / "reward",
        critic=case["critic"] if estimator == "gae" else None,
    )
    args = PPOConfig(
        output_dir=str(folder / "run"),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        sample_rows=0,
        per_device_train_batch_size=case["batch"],
        num_ppo_epochs=case["epochs"],
        response_length=case["response"],
        num_rollouts=2 + case["steps"],
        kl_coef=0.05,
        learning_rate=1e-4,
        score_normalization="none",
        advantage_estimator=estimator,
        num_generations=case.get("generations", 1),
        rollout_weights=case.get("rollout_weights", "auto"),
    )
    rows = Dataset.from_dict({"input_ids": prompts(case["batch"] * (2 + case["steps"]), case["prompt"])})
    trainer = PPOTrainer(shared, args, rows, words)
    trainer.collector.generation.eos_token_id = [PAD]  # replies of full length, as in the other side
    trainer.remove_callback(
        next(type(c) for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback")
    )
    steps.lapped(trainer.collector, "generate", "generate")
    steps.lapped(trainer, "make_experience", "score")

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step % args.steps_per_rollout == 0:
                steps.begin()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % args.steps_per_rollout == 0:
                steps.lap("update")
                steps.end()

    trainer.add_callback(Watch())
    trainer.train()
    steps.write(case["output"], trained=sum(p.numel() for p in shared.parameters() if p.requires_grad))


if __name__ == "__main__":
    main()
