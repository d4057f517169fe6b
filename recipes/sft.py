"""Stage 1: supervised fine-tuning of a LoRA adapter on the quantized base, by trl.SFTTrainer.

    accelerate launch recipes/sft.py --config recipes/configs/demo_cpu/sft.yaml [--any_field value]

Rows: text, messages, or prompt and completion (docs/data.md); those of eval_dataset_name are
evaluated after training, or as eval_strategy says. Writes the adapter to output_dir, loadable with
plain PEFT.
"""

from dataclasses import replace

from goose_lora import cli
from goose_lora.data import DataArguments
from goose_lora.models import ModelArguments, adapters_to_fp32, lora_config
from goose_lora.training import Resumable

from trl import SFTConfig, SFTTrainer  # isort: skip  (after cli, which quiets what bitsandbytes says)


class Trainer(Resumable, SFTTrainer):
    stage = "sft"


def main(args: list[str] | None = None) -> SFTTrainer:
    """Train an adapter on demonstrations."""
    config, model, data = cli.parse(SFTConfig, ModelArguments, DataArguments, args=args)
    stage = cli.Stage.begin("sft", config, model, data, command=args)

    # 1. Everything that can be known before a weight is read.
    rows = stage.demonstrations()
    tokenizer = stage.tokenizer()
    stage.check_fit(tokenizer)

    # 2. One base in memory, with a fresh adapter in fp32.
    base = stage.base(tokenizer)
    trainer = Trainer(
        model=base,
        args=replace(stage.trainer_config, assistant_only_loss=False),  # the labels say it already
        train_dataset=rows["train"],
        eval_dataset=rows.get("eval"),
        processing_class=tokenizer,
        peft_config=lora_config(stage.model, base),
    )
    adapters_to_fp32(trainer.model)

    # 3. Train, and leave the adapter.
    result = trainer.train(resume_from_checkpoint=stage.checkpoint)
    if "eval" in rows and config.eval_strategy == "no":
        trainer.evaluate()
    trainer.save_model()
    stage.finish(trainer, figures={"loss": result.training_loss, "steps": trainer.state.global_step})
    return trainer


if __name__ == "__main__":
    cli.command(main)()
