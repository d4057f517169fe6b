"""Stage 1: supervised fine-tuning of a LoRA adapter on the quantized base, by trl.SFTTrainer.

    accelerate launch recipes/sft.py --config recipes/configs/demo_cpu/sft.yaml [--any_field value]

Rows: text, messages, or prompt and completion. Writes the adapter to output_dir, loadable with plain PEFT.
"""

from trl import SFTConfig, SFTTrainer

from goose_lora import cli, demo
from goose_lora.data import DataArguments, check_chat, load_rows
from goose_lora.loading import ModelArguments, adapters_to_fp32, load_base, load_tokenizer, lora_config
from goose_lora.preflight import check_fit
from goose_lora.report import write_stage
from goose_lora.resumable import Resumable, starting_point


class Trainer(Resumable, SFTTrainer):
    stage = "sft"


def main(args: list[str] | None = None) -> None:
    config, model_args, data_args = cli.parse(SFTConfig, ModelArguments, DataArguments, args=args)
    model_args.model_name_or_path = demo.resolve(model_args.model_name_or_path)
    start = starting_point(config, "sft", model_args)
    rows = load_rows(demo.resolve(data_args.dataset_name), data_args.dataset_split, data_args.max_rows, data_args.column_mapping, stage="sft")

    tokenizer = load_tokenizer(model_args, trust_remote_code=config.trust_remote_code)
    if config.chat_template_path is None:
        check_chat(rows, tokenizer, data_args.dataset_name)
    check_fit(model_args, tokenizer, {}, trust_remote_code=config.trust_remote_code)
    base = load_base(model_args, tokenizer, device=config.device, trust_remote_code=config.trust_remote_code)
    trainer = Trainer(model=base, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=lora_config(model_args, base))
    adapters_to_fp32(trainer.model)
    result = trainer.train(resume_from_checkpoint=start)
    trainer.save_model()
    write_stage(config.output_dir, "sft", {"loss": result.training_loss, "steps": trainer.state.global_step}, trainer.state.log_history)


if __name__ == "__main__":
    cli.command(main)()
