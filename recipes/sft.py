"""Stage 1: supervised fine-tuning of a LoRA adapter on the quantized base, by trl.SFTTrainer.

    accelerate launch recipes/sft.py --config recipes/configs/demo_cpu/sft.yaml [--any_field value]

Rows: text, messages, or prompt and completion. Writes the adapter to output_dir, loadable with
plain PEFT.
"""

from trl import (
    SFTConfig,
    SFTTrainer,
)  # isort: skip  (after cli, which quiets what bitsandbytes says when it is imported)

from goose_lora import cli, embedded
from goose_lora.cli.stage import begin, finish
from goose_lora.data.rows import DataArguments, load_rows
from goose_lora.data.tokenization import check_chat
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.compatibility import check_fit
from goose_lora.models.loading import adapters_to_fp32, load_base, load_tokenizer, lora_config
from goose_lora.sharing import hub
from goose_lora.sharing.lineage import fingerprint
from goose_lora.training.resume import Resumable


class Trainer(Resumable, SFTTrainer):
    stage = "sft"


def main(args: list[str] | None = None) -> None:
    config, model_args, data_args = cli.parse(SFTConfig, ModelArguments, DataArguments, args=args)
    model_args.model_name_or_path = embedded.resolve(model_args.model_name_or_path)
    start = begin("sft", config, model_args)
    rows = load_rows(
        embedded.resolve(data_args.dataset_name),
        data_args.dataset_split,
        data_args.max_rows,
        data_args.column_mapping,
        stage="sft",
    )

    tokenizer = load_tokenizer(model_args, trust_remote_code=config.trust_remote_code)
    if config.chat_template_path is None:
        check_chat(rows, tokenizer, data_args.dataset_name)
    check_fit(model_args, tokenizer, {}, trust_remote_code=config.trust_remote_code)
    base = load_base(model_args, tokenizer, device=config.device, trust_remote_code=config.trust_remote_code)
    arguments = hub.without_trainers_push(config)
    trainer = Trainer(
        model=base,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora_config(model_args, base),
    )
    adapters_to_fp32(trainer.model)
    result = trainer.train(resume_from_checkpoint=start)
    trainer.save_model()
    if trainer.is_world_process_zero():
        figures = {"loss": result.training_loss, "steps": trainer.state.global_step}
        data = [fingerprint(data_args.dataset_name, data_args.dataset_split, rows)]
        options = {
            "figures": figures,
            "tokenizer": tokenizer,
            "data": data,
            "args": args,
            "log_history": trainer.state.log_history,
        }
        finish("sft", config, model_args, data_args, **options)


if __name__ == "__main__":
    cli.command(main)()
