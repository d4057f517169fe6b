"""One side of benchmarks/step.py: steps of TRL 1.12.0's PPO as its users run it.

It runs in an environment of its own (``make bench`` makes it). LoRA on the policy, whose reference
is the base with adapters off; a value model and a reward model of their own, the value model
trained whole: ``peft_config`` does not reach it.
"""

from step_common import DTYPES, LORA, TARGETS, Steps, arguments, model_config, prompts, tokenizer

import trl.experimental.ppo.ppo_trainer as inside  # isort: skip
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer


def main() -> None:
    case = arguments()
    steps, dtype = Steps(), DTYPES[case["dtype"]]
    policy = AutoModelForCausalLM.from_config(model_config(), dtype=dtype)
    value, reward = (
        AutoModelForSequenceClassification.from_config(model_config(num_labels=1), dtype=dtype)
        for _ in range(2)
    )
    rows = case["batch"] * (1 + case["steps"])
    args = PPOConfig(
        output_dir="/tmp/step_trl_ppo",
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        per_device_train_batch_size=case["batch"],
        gradient_accumulation_steps=1,
        total_episodes=rows,
        num_ppo_epochs=case["epochs"],
        num_mini_batches=1,
        response_length=case["response"],
        stop_token=None,
        temperature=1.0,
        learning_rate=1e-4,
        kl_coef=0.05,
        num_sample_generations=0,
        gradient_checkpointing=False,
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer(),
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": prompts(rows, case["prompt"])}),
        peft_config=LoraConfig(**LORA, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    steps.lapped(inside, "batch_generation", "generate")
    whiten = inside.masked_whiten  # its first call of a step comes after all scoring

    def whitened(*args, **kwargs):
        steps.lap("score")
        return whiten(*args, **kwargs)

    inside.masked_whiten = whitened

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            steps.begin()

        def on_step_end(self, args, state, control, **kwargs):
            steps.lap("update")
            steps.end()
            if state.global_step < case["steps"] + 1:
                steps.begin()

    trainer.add_callback(Watch())
    trainer.train()
    steps.write(case["output"], trained=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad))


if __name__ == "__main__":
    main()
