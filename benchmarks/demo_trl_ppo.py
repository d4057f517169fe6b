"""One side of benchmarks/demo_trl.py: TRL 1.12.0's PPO on the demo's models.

demo_trl.py starts it in an environment of its own, with a case as JSON.
"""

import json
import time
from pathlib import Path
from typing import Any

from step_common import DTYPES, LORA, TARGETS, arguments

import torch  # isort: skip
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer


@torch.no_grad()
def replies(model: Any, prompts: list[list[int]], tokenizer: Any, tokens: int) -> list[dict[str, Any]]:
    """A sampled reply to each prompt, with the sum of its log-probabilities (nats)."""
    rows = []
    for start in range(0, len(prompts), 50):
        part = prompts[start : start + 50]
        width = max(map(len, part))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in part])
        out = model.generate(
            input_ids=ids,
            attention_mask=(ids != tokenizer.pad_token_id).long(),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        drawn = out.sequences[:, width:]
        logprobs = (
            torch.stack(out.logits, 1).float().log_softmax(-1).gather(-1, drawn[:, :, None]).squeeze(-1)
        )
        for prompt, reply, own in zip(part, drawn.tolist(), logprobs, strict=True):
            end = reply.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in reply else len(reply)
            rows.append({"prompt": prompt, "reply": reply[:end], "logprob": own[:end].sum().item()})
    return rows


def read_before_the_end(reward: Any, eos_token_id: int) -> None:
    """Score a reply that ends with the end token at the token before."""
    # The demo's reward model has learned from texts without the end token.

    def shift(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        states, ends = output.hidden_states[-1], kwargs["input_ids"] == eos_token_id
        states[ends] = states.roll(1, dims=1)[ends]

    getattr(reward, reward.base_model_prefix).register_forward_hook(shift, with_kwargs=True)


def main() -> None:
    began = time.process_time()
    case = arguments()
    start, output, dtype = Path(case["start"]), Path(case["output"]), DTYPES[case["dtype"]]
    tokenizer = AutoTokenizer.from_pretrained(start / "policy", padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(start / "policy", dtype=dtype)
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(start / "reward", num_labels=1, dtype=dtype)
        for _ in range(2)
    )
    read_before_the_end(reward, tokenizer.eos_token_id)
    prompts = json.loads((start / "prompts.json").read_text())
    count = case["rollouts"] * case["replies"]
    args = PPOConfig(
        output_dir=str(output / "run"),
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        per_device_train_batch_size=case["replies"],
        gradient_accumulation_steps=1,
        total_episodes=count,
        num_ppo_epochs=2,
        num_mini_batches=2,
        local_rollout_forward_batch_size=case["replies"],
        response_length=case["response"],
        stop_token="eos",
        temperature=1.0,
        learning_rate=2e-4,
        kl_coef=case["kl_coef"],
        num_sample_generations=0,
        gradient_checkpointing=False,
        seed=case["seed"],
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": prompts["train"]}),
        peft_config=LoraConfig(**LORA, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(output / "saved"))
    seconds = time.process_time() - began
    rows = replies(trainer.policy_model, prompts["test"], tokenizer, case["response"])
    (output / "replies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (output / "trained.json").write_text(json.dumps({"cpu_seconds": seconds}))


if __name__ == "__main__":
    main()
