"""Stage 2: a reward model, LoRA and a score head on the same base (Bradley-Terry loss).

    accelerate launch recipes/reward.py --config recipes/configs/demo_cpu/reward.yaml [--any_field
    value]

Rows: pairs (chosen and rejected, with margin where the data has one), or ranked lists (completions,
best first, or with ranks, 1 the best and equal ones tied), of which all pairs of a prompt are
learned in one batch element; with prompt, or whole. per_device_train_batch_size counts rows. With
reward_adapter the training goes on from a saved reward model.
References, if named, are scored after training: their mean is the bias that PPO subtracts, so that
they score 0.

Ends with a verdict on held-out rows, printed and saved as verdict.json beside the adapter: accuracy
with its interval, what the score has to do with length, mean and spread of scores and margins,
calibration, and how often an empty, repeated, cut off or flattering reply beats the chosen.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from goose_lora import cli
from goose_lora.data import (
    DataArguments,
    RowSet,
    count_made,
    made_text,
    parse_shares,
    require_pairs,
    share_words,
    tokenize_augmented,
    tokenize_rankings,
    tokenize_references,
)
from goose_lora.errors import UserError
from goose_lora.evaluation import (
    evaluate_reward_model,
    prepare_held_out,
    reference_bias,
    show_verdict,
    write_verdict,
)
from goose_lora.models import AdapterFolder, ModelArguments, write_lineage
from goose_lora.rewards import PairRewardTrainer, RankedRewardTrainer
from goose_lora.training import Resumable

from trl import RewardConfig, RewardTrainer  # isort: skip  (after cli, which quiets bitsandbytes)


class PairTrainer(Resumable, PairRewardTrainer):
    stage = "reward"


class ListTrainer(Resumable, RankedRewardTrainer):
    stage = "reward"


OF_EACH, OF_ALL = ("loss",), ("accuracy", "margin")  # figures of held-out pairs that can say what is best


@dataclass
class RewardArguments(DataArguments):
    """The data, a second held-out set, and references."""

    reward_adapter: str | None = field(
        default=None,
        metadata={"help": "Folder of a reward model to train further; a fresh adapter and head if unset."},
    )
    any_pairs_name: str | None = field(
        default=None, metadata={"help": "More held-out pairs, of another kind, for the verdict only."}
    )
    reference_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": ("Replies that should score 0 on average, such as SFT's: rows as fine-tuning takes them.")
        },
    )
    use_margin: bool = field(
        default=True, metadata={"help": "Use the data's margin column in the loss where there is one."}
    )
    augment_pairs: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Pairs made of the best replies, KIND=SHARE of the pairs to train on: other_prompt, neutral,"
                " empty, cut, repeated. In YAML {other_prompt: 0.5}."
            )
        },
    )
    append_eos: bool = field(
        default=True,
        metadata={"help": "End each text with the end-of-text token, as TRL does; false: PPO hides it too."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.augment_pairs = share_words(self.augment_pairs)

    def row_sets(self) -> dict[str, RowSet]:
        """Read the rows to train on and those held out, as ``train``, ``eval`` and ``any``.

        Raises:
            UserError: no held-out pairs, or rows of another kind than pairs and lists.
        """
        if self.eval_dataset_name is None:
            raise UserError(
                "eval_dataset_name: a reward model is judged on held-out pairs. Keep some of yours out of"
                " training and name them."
            )
        sets = {"train": self.train("reward")}
        for key, name in (("eval", self.eval_dataset_name), ("any", self.any_pairs_name)):
            row_set = replace(self, eval_dataset_name=name).held_out("reward")
            if row_set is not None:
                sets[key] = row_set
        ranked = is_ranked(sets["train"])
        for row_set in sets.values():
            require_pairs(row_set.rows, row_set.name, or_lists=ranked)
        return sets

    @property
    def shares(self) -> dict[str, float]:
        """The share of each kind of pairs that are made of those to train on."""
        return parse_shares(self.augment_pairs or [])

    def tokens(
        self,
        row_set: RowSet,
        tokenizer: PreTrainedTokenizerBase,
        config: RewardConfig,
        *,
        shares: dict[str, float] | None = None,
    ) -> Dataset:
        """Tokenize pairs or lists, with the pairs that are made of them by ``shares``."""
        if shares:
            return tokenize_augmented(
                row_set,
                tokenizer,
                shares,
                seed=config.seed,
                append_eos=self.append_eos,
                max_length=config.max_length,
            )
        return tokenize_rankings(
            row_set.rows,
            tokenizer,
            name=row_set.name,
            append_eos=self.append_eos,
            max_length=config.max_length,
            numbers=row_set.numbers,
        )

    def check_ending(self, adapter: AdapterFolder | None) -> None:
        """Raise UserError where texts would end otherwise than those of ``adapter``."""
        if adapter is None or adapter.lineage.get("append_eos", True) == self.append_eos:
            return
        before = str(not self.append_eos).lower()
        raise UserError(
            f"append_eos={self.append_eos}: {adapter} was trained with append_eos: {before}. Go on with"
            f" append_eos: {before}."
        )

    def used(self, row_set: RowSet) -> RowSet:
        """Return the rows without the columns that settings leave out."""
        if self.use_margin or "margin" not in row_set.rows.column_names:
            return row_set
        return replace(row_set, rows=row_set.rows.remove_columns("margin"))


def is_ranked(row_set: RowSet) -> bool:
    """Return whether the rows are ranked lists; a pair is the shortest list."""
    return "completions" in row_set.rows.column_names


def best_by(config: RewardConfig, *, sets: int) -> RewardConfig:
    """Return settings whose best checkpoint is that of the pairs of eval_dataset_name.

    Trainer writes eval_eval_loss and eval_any_loss, and TRL's figures once for all held-out sets.

    Raises:
        UserError: a figure that is not written, or not of those pairs alone.
    """
    metric = (config.metric_for_best_model or "").removeprefix("eval_").removeprefix("eval_")
    if not metric:
        return config
    known = OF_EACH if sets > 1 else (*OF_EACH, *OF_ALL)
    if metric not in known:
        raise UserError(
            f"metric_for_best_model={config.metric_for_best_model}: use {' or '.join(known)} of the pairs of"
            " eval_dataset_name."
        )
    prefix = "eval_eval_" if metric in OF_EACH else "eval_"
    return replace(config, metric_for_best_model=f"{prefix}{metric}")


def main(args: list[str] | None = None) -> RewardTrainer:
    """Train a reward model, and judge it on pairs that it has not seen."""
    config, model, data = cli.parse(RewardConfig, ModelArguments, RewardArguments, args=args)
    stage = cli.Stage.begin("reward", config, model, data, command=args)

    # 1. Everything that can be known before a weight is read.
    start = stage.adapter("reward_adapter")  # None for a fresh adapter and head
    data.check_ending(start)
    sets = data.row_sets()
    noted = [{"use": key} | row_set.fingerprint for key, row_set in sets.items()]
    ranked = is_ranked(sets["train"])
    sets = {key: data.used(row_set) for key, row_set in sets.items()}
    tokenizer = stage.tokenizer()
    stage.tell_hints(sets["train"])
    held_out = {
        key: prepare_held_out(
            row_set.rows,
            tokenizer,
            name=row_set.name,
            probes=key == "eval",
            append_eos=data.append_eos,
            max_length=config.max_length,
            numbers=row_set.numbers,
        )
        for key, row_set in sets.items()
        if key != "train"
    }
    references = []
    if data.reference_dataset_name is not None:
        references = tokenize_references(
            data.beside(data.reference_dataset_name, data.max_rows).rows,
            tokenizer,
            name=data.reference_dataset_name,
            append_eos=data.append_eos,
            max_length=config.max_length,
        )
    rows = {key: data.tokens(row_set, tokenizer, config) for key, row_set in sets.items() if key != "train"}
    training_rows = data.tokens(sets["train"], tokenizer, config, shares=data.shares)
    if made := count_made(training_rows):
        noted[0]["augmented"] = made
        stage.say(made_text(made, training_rows))
    settings = best_by(stage.trainer_config, sets=len(held_out))
    stage.check_fit(tokenizer, start, chat=True)

    # 2. One base in memory, with an adapter and a score head in fp32, fresh or saved.
    base = stage.reward_base(tokenizer)
    trainer = (ListTrainer if ranked else PairTrainer)(
        model=base,
        args=settings,
        train_dataset=training_rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        peft_config=stage.lora(base, start),
    )
    stage.start_from(trainer, start)
    trainer.given = stage.given

    # 3. Train, judge, and leave the adapter with its verdict and its bias.
    result = trainer.train(resume_from_checkpoint=stage.checkpoint)
    bias = reference_bias(trainer, references) if references else 0.0
    verdict = evaluate_reward_model(trainer, held_out["eval"], held_out.get("any"), bias=bias)

    def beside(folder: Path) -> None:  # without its verdict and its bias it is not the reward model
        write_lineage(folder, append_eos=data.append_eos, reward_bias=bias, reward_references=len(references))
        write_verdict(folder, verdict)

    trainer.beside = beside
    trainer.save_model()
    if trainer.is_world_process_zero():
        show_verdict(verdict)
    stage.finish(
        trainer,
        figures={"loss": result.training_loss, "steps": trainer.state.global_step},
        data=noted,
        parents={"reward": start},
    )
    return trainer


if __name__ == "__main__":
    cli.command(main)()
