"""Stage 2: a reward model, LoRA and a score head on the same quantized base, by trl.RewardTrainer
(Bradley-Terry loss).

    accelerate launch recipes/reward.py --config recipes/configs/demo_cpu/reward.yaml [--any_field
    value]

Rows: pairs (chosen and rejected, with margin where the data has one), or ranked lists (completions,
best first, or with ranks, 1 the best and equal ones tied), of which all pairs of a prompt are
learned in one batch element; with prompt, or whole. per_device_train_batch_size counts rows.
References, if named, are scored after training: their mean is the bias that PPO subtracts, so that
they score 0.

Ends with a verdict on held-out rows, printed and saved as verdict.json beside the adapter: accuracy
with its interval, what the score has to do with length, mean and spread of scores and margins,
calibration, and how often an empty, repeated, cut off or flattering reply beats the chosen.
"""

from dataclasses import dataclass, field
from typing import Any

from trl import (
    RewardConfig,
    RewardTrainer,
)  # isort: skip  (after cli, which quiets what bitsandbytes says when it is imported)

from goose_lora import cli, embedded
from goose_lora.cli.stage import begin, finish
from goose_lora.data.preferences import LIST, PAIR, ranked_rows, tokenize_ranked, tokenize_references
from goose_lora.data.rows import DataArguments, load_rows, require_columns
from goose_lora.errors import UserError
from goose_lora.evaluation.reward_model import judge, prepare_held_out, reference_bias
from goose_lora.evaluation.verdict import write_verdict
from goose_lora.models.adapters import write_lineage
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.compatibility import check_fit
from goose_lora.models.loading import adapters_to_fp32, load_reward_base, load_tokenizer, lora_config
from goose_lora.rewards.ranking_trainer import RankedRewardTrainer
from goose_lora.sharing import hub
from goose_lora.sharing.lineage import fingerprint
from goose_lora.training.resume import Resumable


class PairTrainer(Resumable, RewardTrainer):
    stage = "reward"


class ListTrainer(Resumable, RankedRewardTrainer):
    stage = "reward"


@dataclass
class RewardArguments(DataArguments):
    """The data, a second held-out set, and references."""

    any_pairs_name: str | None = field(
        default=None, metadata={"help": "More held-out pairs, of another kind, for the verdict only."}
    )
    reference_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": (
                "Replies that should score 0 on average, such as SFT's: rows with text, prompt+completion or"
                " messages."
            )
        },
    )
    use_margin: bool = field(
        default=True, metadata={"help": "Use the data's margin column in the loss where there is one."}
    )
    append_eos: bool = field(
        default=True,
        metadata={"help": "End each text with the end-of-text token, as TRL does; false: PPO hides it too."},
    )


def main(args: list[str] | None = None) -> None:
    config, model_args, data_args = cli.parse(RewardConfig, ModelArguments, RewardArguments, args=args)
    model_args.model_name_or_path = embedded.resolve(model_args.model_name_or_path)
    names = {
        "train": data_args.dataset_name,
        "eval": data_args.eval_dataset_name,
        "any": data_args.any_pairs_name,
    }
    splits = {
        "train": data_args.dataset_split,
        "eval": data_args.eval_dataset_split,
        "any": data_args.eval_dataset_split,
    }
    start = begin("reward", config, model_args)
    if names["eval"] is None:
        raise UserError(
            "eval_dataset_name: a reward model is judged on held-out pairs. Keep some of yours out of"
            " training and name them."
        )
    how = {"max_rows": data_args.max_rows, "column_mapping": data_args.column_mapping, "stage": "reward"}
    rows: dict[str, Any] = {
        key: load_rows(embedded.resolve(name), splits[key], **how) for key, name in names.items() if name
    }
    data = [
        {"use": key, **fingerprint(str(names[key]), splits[key], dataset)} for key, dataset in rows.items()
    ]
    ranked = "completions" in rows["train"].column_names
    for key, dataset in rows.items():
        require_columns(dataset, str(names[key]), PAIR, *([LIST] if ranked else []))
        if "margin" in dataset.column_names and not data_args.use_margin:
            rows[key] = dataset.remove_columns("margin")

    tokenizer = load_tokenizer(model_args, trust_remote_code=config.trust_remote_code)
    reading = {"append_eos": data_args.append_eos, "max_length": config.max_length}
    held_out = {
        key: prepare_held_out(rows[key], tokenizer, name=str(names[key]), probes=key == "eval", **reading)
        for key in rows
        if key != "train"
    }
    references = []
    if data_args.reference_dataset_name is not None:
        found = load_rows(
            embedded.resolve(data_args.reference_dataset_name), data_args.dataset_split, data_args.max_rows
        )
        references = tokenize_references(found, tokenizer, name=data_args.reference_dataset_name, **reading)
    for key, dataset in rows.items():  # a pair is the shortest list
        lists = ranked_rows(dataset, tokenizer, name=str(names[key]), append_eos=data_args.append_eos)
        margins = list(dataset["margin"]) if "margin" in dataset.column_names else None
        rows[key] = tokenize_ranked(lists, tokenizer, name=str(names[key]), margins=margins, **reading)
    check_fit(model_args, tokenizer, {}, trust_remote_code=config.trust_remote_code)
    base = load_reward_base(
        model_args, tokenizer, device=config.device, trust_remote_code=config.trust_remote_code
    )
    trainer = (ListTrainer if ranked else PairTrainer)(
        model=base,
        args=hub.without_trainers_push(config),
        train_dataset=rows.pop("train"),
        eval_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora_config(model_args, base, "SEQ_CLS", modules_to_save=["score"]),
    )
    adapters_to_fp32(trainer.model)
    result = trainer.train(resume_from_checkpoint=start)
    bias = reference_bias(trainer, references) if references else 0.0
    verdict = judge(trainer, held_out["eval"], held_out.get("any"), bias=bias)
    if trainer.is_world_process_zero():
        write_lineage(
            config.output_dir,
            append_eos=data_args.append_eos,
            reward_bias=bias,
            reward_references=len(references),
        )
        write_verdict(config.output_dir, verdict)
    trainer.save_model()  # last: without its verdict and its bias it is not the reward model
    if trainer.is_world_process_zero():
        figures = {"loss": result.training_loss, "steps": trainer.state.global_step}
        options = {
            "figures": figures,
            "tokenizer": tokenizer,
            "data": data,
            "args": args,
            "log_history": trainer.state.log_history,
        }
        finish("reward", config, model_args, data_args, **options)


if __name__ == "__main__":
    cli.command(main)()
