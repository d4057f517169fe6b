"""Stage 2: a reward model, LoRA and a score head on the same base (Bradley-Terry loss).

    accelerate launch recipes/reward.py --config recipes/configs/demo_cpu/reward.yaml [--any_field
    value]

Rows: pairs (chosen and rejected, with margin where the data has one), or ranked lists (completions,
best first, or with ranks, 1 the best and equal ones tied), of which all pairs of a prompt are
learned in one batch element; with prompt, or whole. per_device_train_batch_size counts rows. With
reward_adapter the training goes on from a saved reward model.
With augment_pairs, pairs that are made of these are learned too; with num_members, several reward
models are trained, which score as one in PPO (docs/rewards.md).
References, if named, are scored after training: their mean is the bias that PPO subtracts, so that
they score 0.

Ends with a verdict on held-out rows, printed and saved as verdict.json beside the adapter: accuracy
with its interval, what the score has to do with length, mean and spread of scores and margins,
calibration, and how often an empty, repeated, cut off or flattering reply beats the chosen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
from goose_lora.evaluation import RewardTest, prepare_held_out
from goose_lora.models import AdapterFolder, MemberKind, ModelArguments

from datasets import Dataset  # isort: skip  (after goose_lora, which says how torch's threads wait)
from transformers import PreTrainedTokenizerBase  # isort: skip
from trl import RewardConfig, RewardTrainer  # isort: skip  (after cli, which quiets bitsandbytes)

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
        default=True, metadata={"help": "Use the data's margin column in the loss of pairs, if there is one."}
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
    num_members: int = field(
        default=1,
        metadata={
            "help": (
                "Train so many reward models, by other seeds and resampled pairs, which score as one in PPO;"
                " with augment_pairs every second one without."
            )
        },
    )
    members: MemberKind = field(
        default="adapters",
        metadata={"help": "adapters: each member has its own. heads: further heads on the first one's."},
    )
    append_eos: bool = field(
        default=True,
        metadata={"help": "End each text with the end-of-text token, as TRL does; false: PPO hides it too."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.augment_pairs = share_words(self.augment_pairs)
        cli.check_members(self.num_members, self.members, self.reward_adapter)

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
        max_length: int | None,
        shares: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> Dataset:
        """Tokenize pairs or lists, with the pairs that ``seed`` makes of them by ``shares``."""
        if shares:
            return tokenize_augmented(
                row_set,
                tokenizer,
                shares,
                seed=seed,
                append_eos=self.append_eos,
                max_length=max_length,
            )
        return tokenize_rankings(
            row_set.rows,
            tokenizer,
            name=row_set.name,
            append_eos=self.append_eos,
            max_length=max_length,
            numbers=row_set.numbers,
        )

    def test(
        self, sets: Mapping[str, RowSet], tokenizer: PreTrainedTokenizerBase, max_length: int | None
    ) -> RewardTest:
        """Tokenize what a trained model is judged by: held-out rows, probes and references."""
        held_out = {
            key: prepare_held_out(
                row_set.rows,
                tokenizer,
                name=row_set.name,
                probes=key == "eval",
                append_eos=self.append_eos,
                max_length=max_length,
                numbers=row_set.numbers,
            )
            for key, row_set in sets.items()
            if key != "train"
        }
        references = []
        if self.reference_dataset_name is not None:
            references = tokenize_references(
                self.beside(self.reference_dataset_name, self.max_rows).rows,
                tokenizer,
                name=self.reference_dataset_name,
                append_eos=self.append_eos,
                max_length=max_length,
            )
        return RewardTest(held_out["eval"], held_out.get("any"), references)

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
    """Train a reward model, or several that score as one, and judge it on rows it has not seen."""
    config, model, data = cli.parse(RewardConfig, ModelArguments, RewardArguments, args=args)
    cli.check_members_run(config, data.num_members)
    stage = cli.Stage.begin("reward", config, model, data, command=args)

    # 1. Everything that can be known before a weight is read.
    start = stage.adapter("reward_adapter")  # None for a fresh adapter and head
    data.check_ending(start)
    sets = data.row_sets()
    noted = [{"use": key} | row_set.fingerprint for key, row_set in sets.items()]
    ranked = is_ranked(sets["train"])
    sets = {key: data.used(row_set) for key, row_set in sets.items()}
    tokenizer, longest = stage.tokenizer(), config.max_length
    stage.tell_hints(sets["train"])
    stage.tell_overlap(sets["train"], sets["eval"])
    test = data.test(sets, tokenizer, longest)
    held_out = {
        key: data.tokens(row_set, tokenizer, longest) for key, row_set in sets.items() if key != "train"
    }
    members = cli.rows_of_members(
        data.num_members,
        config.seed,
        data.shares,
        lambda shares, seed: data.tokens(sets["train"], tokenizer, longest, shares, seed),
    )
    if made := count_made(members[0].rows):
        noted[0]["augmented"] = made
        stage.say(made_text(made, members[0].rows))
    settings = best_by(stage.trainer_config, sets=len(held_out))
    stage.check_fit(tokenizer, start, chat=True)

    # 2. One base in memory; on it, for each member, an adapter and a score head in fp32.
    run = cli.RewardRun(stage, settings, test, members, data.members, data.append_eos, start, noted)
    for member, base in run.each(stage.reward_base(tokenizer)):
        trainer = (cli.ListTrainer if ranked else cli.PairTrainer)(
            model=base,
            args=run.settings_of(member),
            train_dataset=member.rows,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=stage.lora(base, run.start_of(member)),
        )

        # 3. Train it, judge it, and leave it with its verdict and its bias; then all as one.
        run.train(trainer, member)
    return run.finish()


if __name__ == "__main__":
    cli.command(main)()
