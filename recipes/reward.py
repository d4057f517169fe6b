"""Stage 2: a reward model, LoRA and a score head on the same quantized base, by trl.RewardTrainer (Bradley-Terry loss).

    accelerate launch recipes/reward.py --config recipes/configs/demo_cpu/reward.yaml [--any_field value]

Rows: chosen and rejected, with prompt, and with margin where the data has one. Ends with a verdict on held-out pairs, printed and saved as
verdict.json beside the adapter: accuracy with its interval, what the score has to do with length, mean and spread of the scores.
"""

from dataclasses import dataclass, field
from typing import Any

from trl import RewardConfig, RewardTrainer

from goose_lora import cli, demo
from goose_lora.adapters import write_lineage
from goose_lora.data import DataArguments, load_rows, require_columns, tokenize_pairs_without_end
from goose_lora.evaluation import reward_verdict
from goose_lora.loading import ModelArguments, adapters_to_fp32, load_reward_base, load_tokenizer, lora_config
from goose_lora.report import write_stage, write_verdict
from goose_lora.rewards import score_pairs


@dataclass
class RewardArguments(DataArguments):
    """The data, and a second held-out set."""

    any_pairs_name: str | None = field(default=None, metadata={"help": "More held-out pairs, of another kind, for the verdict only."})
    use_margin: bool = field(default=True, metadata={"help": "Use the data's margin column in the loss where there is one."})
    append_eos: bool = field(default=True, metadata={"help": "End each text with the end-of-text token, as TRL does; false: PPO hides it too."})


def main(args: list[str] | None = None) -> None:
    config, model_args, data_args = cli.parse(RewardConfig, ModelArguments, RewardArguments, args=args)
    model_args.model_name_or_path = demo.resolve(model_args.model_name_or_path)
    names = {"train": data_args.dataset_name, "eval": data_args.eval_dataset_name, "any": data_args.any_pairs_name}
    splits = {"train": data_args.dataset_split, "eval": data_args.eval_dataset_split, "any": data_args.eval_dataset_split}
    if names["eval"] is None:
        raise ValueError("eval_dataset_name: a reward model is judged on held-out pairs. Keep some of yours out of training and name them.")
    how = {"max_rows": data_args.max_rows, "column_mapping": data_args.column_mapping, "stage": "reward"}
    rows: dict[str, Any] = {key: load_rows(demo.resolve(name), splits[key], **how) for key, name in names.items() if name}
    for key, dataset in rows.items():
        require_columns(dataset, str(names[key]), ["chosen", "rejected"])
        if "margin" in dataset.column_names and not data_args.use_margin:
            rows[key] = dataset.remove_columns("margin")

    tokenizer = load_tokenizer(model_args, trust_remote_code=config.trust_remote_code)
    if not data_args.append_eos:
        rows = {
            key: tokenize_pairs_without_end(dataset, tokenizer, name=str(names[key]), max_length=config.max_length) for key, dataset in rows.items()
        }
    base = load_reward_base(model_args, tokenizer, device=config.device, trust_remote_code=config.trust_remote_code)
    trainer = RewardTrainer(
        model=base,
        args=config,
        train_dataset=rows.pop("train"),
        eval_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora_config(model_args, base, "SEQ_CLS", modules_to_save=["score"]),
    )
    adapters_to_fp32(trainer.model)
    result = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    write_lineage(config.output_dir, append_eos=data_args.append_eos)

    held_out = score_pairs(trainer, "eval")
    verdict = reward_verdict(*held_out, any_pair=score_pairs(trainer, "any")[:2] if "any" in rows else None)
    write_verdict(config.output_dir, verdict)
    write_stage(config.output_dir, "reward", {"loss": result.training_loss, "steps": trainer.state.global_step}, trainer.state.log_history)


if __name__ == "__main__":
    cli.command(main)()
