"""One step of TRL for benchmarks/gpu_report.py: GRPO of the installed TRL, or PPO of TRL 1.12.

    python benchmarks/gpu_report_peer.py '{"algorithm": "grpo", "model": FOLDER, "rows": 8, ...}'

It imports nothing of this project, so that the environment of TRL 1.12 can run it. LoRA of rank 16
on all linear layers, bfloat16 on a GPU; GRPO with rows in groups of 2 and a reward that costs
nothing, PPO with a value model and a reward model of their own. Writes the seconds of the last of
three steps, and the most bytes that were allocated.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

STEPS = 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32


class Clock(TrainerCallback):
    """Notes the seconds of each step; a step begins where the one before has ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self._note()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self._note()

    def _note(self) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def no_reward(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def main() -> None:
    case = json.loads(sys.argv[1])
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    rows = torch.randint(5, len(tokenizer) - 1, (case["rows"] * (STEPS + 1), case["prompt"])).tolist()
    trainer = {"grpo": _grpo, "ppo": _ppo}[case["algorithm"]](case, tokenizer, rows)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    found: dict[str, Any] = {"seconds": clock.ends[-1] - clock.ends[-2], "steps": len(clock.ends) - 1}
    if CUDA:
        found["peak"] = torch.cuda.max_memory_allocated()
    Path(case["result"]).write_text(json.dumps(found), encoding="utf-8")


def _common(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": f"{case['model']}/run",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": CUDA,
        "use_cpu": not CUDA,
        "per_device_train_batch_size": case["rows"],
        "gradient_accumulation_steps": 1,
        "temperature": 1.0,
        "learning_rate": 1e-4,
    }


def _lora() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")


def _grpo(case: dict[str, Any], tokenizer: Any, rows: list[list[int]]) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        **_common(case),
        num_generations=2,
        max_steps=STEPS,
        max_completion_length=case["response"],
        top_k=0,
        beta=0.05,
        generation_kwargs={"min_new_tokens": case["response"]},
    )
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(case["model"], dtype=DTYPE),
        reward_funcs=no_reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [tokenizer.decode(row) for row in rows]}),
        processing_class=tokenizer,
        peft_config=_lora(),
    )


def _ppo(case: dict[str, Any], tokenizer: Any, rows: list[list[int]]) -> Any:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    def judge() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(case["model"], num_labels=1, dtype=DTYPE)

    config = PPOConfig(
        **_common(case),
        total_episodes=case["rows"] * STEPS,
        num_ppo_epochs=1,
        num_mini_batches=1,
        response_length=case["response"],
        stop_token=None,
        kl_coef=0.05,
        num_sample_generations=0,
    )
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(case["model"], dtype=DTYPE),
        ref_model=None,
        reward_model=judge(),
        value_model=judge(),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        peft_config=_lora(),
    )


if __name__ == "__main__":
    main()
