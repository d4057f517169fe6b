"""Stage 1: supervised fine-tuning of a LoRA adapter on the quantized base, by trl.SFTTrainer.

    accelerate launch recipes/sft.py --config recipes/configs/demo_cpu/sft.yaml [--any_field value]

Rows: text, messages, or prompt and completion (docs/data.md); those of eval_dataset_name are
evaluated after training, or as eval_strategy says. With policy_adapter the training goes on from a
saved adapter. Writes the adapter to output_dir, loadable with plain PEFT.
"""

from dataclasses import dataclass, field, replace

from goose_lora import cli
from goose_lora.data import DataArguments
from goose_lora.models import ModelArguments
from goose_lora.training import Resumable

from trl import SFTConfig, SFTTrainer  # isort: skip  (after cli, which quiets what bitsandbytes says)


class Trainer(Resumable, SFTTrainer):
    stage = "sft"


@dataclass
class StartArguments:
    """Where the adapter comes from."""

    policy_adapter: str | None = field(
        default=None,
        metadata={"help": "Folder of an adapter to train further, SFT's or PPO's; a fresh one if unset."},
    )


def main(args: list[str] | None = None) -> SFTTrainer:
    """Train an adapter on demonstrations."""
    config, model, data, start = cli.parse(
        SFTConfig, ModelArguments, DataArguments, StartArguments, args=args
    )
    stage = cli.Stage.begin("sft", config, model, data, start, command=args)

    # 1. Everything that can be known before a weight is read.
    policy = stage.adapter("policy_adapter")  # None for a fresh adapter
    rows = stage.demonstrations()
    tokenizer = stage.tokenizer()
    stage.check_fit(tokenizer, policy, chat=True)

    # 2. One base in memory, with a fresh or a saved adapter in fp32.
    base = stage.base(tokenizer)
    trainer = Trainer(
        model=base,
        args=replace(stage.trainer_config, assistant_only_loss=False),  # the labels say it already
        train_dataset=rows["train"],
        eval_dataset=rows.get("eval"),
        processing_class=tokenizer,
        peft_config=stage.lora(base, policy),
    )
    stage.start_from(trainer, policy)
    trainer.given = stage.given

    # 3. Train, and leave the adapter.
    result = trainer.train(resume_from_checkpoint=stage.checkpoint)
    if "eval" in rows and config.eval_strategy == "no":
        trainer.evaluate()
    trainer.save_model()
    stage.finish(
        trainer,
        figures={"loss": result.training_loss, "steps": trainer.state.global_step},
        parents={"policy": policy},
    )
    return trainer


if __name__ == "__main__":
    cli.command(main)()
