"""One side of benchmarks/step.py: steps of GRPO or RLOO of the installed TRL.

A step is one generation and as many passes as PPO has epochs.
"""

from step_common import DTYPES, LORA, SHAPE, TARGETS, Steps, arguments, model_config, prompts, tokenizer

from datasets import Dataset  # isort: skip
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer


def share(completion_ids, **columns):
    """A reward that costs nothing: these trainers have no reward adapter."""
    return [sum(ids) / len(ids) / SHAPE["vocab_size"] for ids in completion_ids]


def main() -> None:
    case = arguments()
    steps = Steps()
    policy = AutoModelForCausalLM.from_config(model_config(), dtype=DTYPES[case["dtype"]])
    config, trainer_class = (
        (GRPOConfig, GRPOTrainer) if case["estimator"] == "grpo" else (RLOOConfig, RLOOTrainer)
    )
    texts = [
        " ".join(f"<{token}>" for token in row)
        for row in prompts(case["batch"] // case["generations"] * (1 + case["steps"]), case["prompt"])
    ]
    args = config(
        output_dir="/tmp/step_trl_group",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        logging_steps=1,
        per_device_train_batch_size=case["batch"],
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_generations=case["generations"],
        num_iterations=case["epochs"],
        max_steps=(1 + case["steps"]) * case["epochs"],
        max_completion_length=case["response"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.05,
        learning_rate=1e-4,
        generation_kwargs={"min_new_tokens": case["response"]},
        gradient_checkpointing=False,
    )
    trainer = trainer_class(
        model=policy,
        reward_funcs=share,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(**LORA, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    steps.lapped(trainer, "_generate", "generate")
    scored = trainer._generate_and_score_completions

    def scoring(*args, **kwargs):
        result = scored(*args, **kwargs)
        steps.lap("score")
        return result

    trainer._generate_and_score_completions = scoring

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                steps.begin()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % case["epochs"] == 0:
                steps.lap("update")
                steps.end()
                if state.global_step < args.max_steps:
                    steps.begin()

    trainer.add_callback(Watch())
    trainer.train()
    steps.write(case["output"], trained=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad))


if __name__ == "__main__":
    main()
