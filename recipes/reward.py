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

import random
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

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
    HeldOut,
    ScoredMember,
    align_members,
    evaluate_reward_model,
    held_out_verdict,
    judge_ensemble,
    prepare_held_out,
    reference_bias,
    score_held_out,
    show_verdict,
    write_verdict,
)
from goose_lora.files import file_sha256
from goose_lora.models import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MOST_MEMBERS,
    AdapterFolder,
    MemberKind,
    ModelArguments,
    bare_again,
    fresh_score_head,
    train_head_alone,
    write_lineage,
)
from goose_lora.ownership import check_place, replacing
from goose_lora.rewards import PairRewardTrainer, RankedRewardTrainer
from goose_lora.training import LARGEST_SEED, Facts, Resumable, facts, is_finished, note_finished

from datasets import Dataset  # isort: skip  (after goose_lora, which says how torch's threads wait)
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed  # isort: skip
from trl import RewardConfig, RewardTrainer  # isort: skip  (after cli, which quiets bitsandbytes)


class PairTrainer(Resumable, PairRewardTrainer):
    stage = "reward"


class ListTrainer(Resumable, RankedRewardTrainer):
    stage = "reward"


OF_EACH, OF_ALL = ("loss",), ("accuracy", "margin")  # figures of held-out pairs that can say what is best


class MemberRows(NamedTuple):
    """What a member of an ensemble trains on."""

    seed: int
    augmented: bool
    rows: Dataset


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
        check_members(self.num_members, self.members, self.reward_adapter)

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
        seed: int | None = None,
    ) -> Dataset:
        """Tokenize pairs or lists, with the pairs that are made of them by ``shares``."""
        if shares:
            return tokenize_augmented(
                row_set,
                tokenizer,
                shares,
                seed=config.seed if seed is None else seed,
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

    def member_rows(
        self, row_set: RowSet, tokenizer: PreTrainedTokenizerBase, config: RewardConfig
    ) -> list[MemberRows]:
        """Return the rows that each member trains on; the first has those of a model alone.

        Others have as many rows drawn from theirs with replacement, and every second one none of
        those that ``augment_pairs`` makes: members that differ by seed alone agree where they err.
        """
        found = []
        for place in range(self.num_members):
            seed = (config.seed + place) % (LARGEST_SEED + 1)
            shares = {} if place % 2 else self.shares
            rows = self.tokens(row_set, tokenizer, config, shares=shares, seed=seed)
            if place:
                drawn = random.Random(f"{seed} members").choices(range(len(rows)), k=len(rows))
                rows = rows.select(drawn)
            found.append(MemberRows(seed, bool(shares), rows))
        return found

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


def check_members(number: int, kind: MemberKind, reward_adapter: str | None) -> None:
    """Raise UserError for members that cannot be trained."""
    if not 1 <= number <= MOST_MEMBERS:
        raise UserError(f"num_members={number}: use 1 for one reward model, 2 to {MOST_MEMBERS} for several.")
    if number == 1 and kind != "adapters":
        raise UserError(f"members={kind}: is of num_members: 2 or more. Set that too, or leave it out.")
    if number > 1 and reward_adapter is not None:
        raise UserError(
            f"num_members={number}: members begin fresh, and reward_adapter would begin them all alike. Leave"
            " one of them out."
        )


def check_one_run(config: RewardConfig, number: int) -> None:
    """Raise UserError for settings of one reward model alone, or a folder of another stage."""
    for place in range(number):
        check_place(Path(config.output_dir or ".") / f"member_{place}", "reward")
    resumed = config.resume_from_checkpoint
    if resumed not in (None, "latest", "true", "True"):
        raise UserError(
            f"resume_from_checkpoint={resumed}: with num_members each member goes on from its own. Use"
            " latest."
        )
    if config.world_size > 1:
        raise UserError(
            f"num_members: members are trained on one process, and there are {config.world_size}. Start it"
            " with goose-lora reward on one."
        )
    if config.push_to_hub:
        raise UserError(
            "push_to_hub: an ensemble is several folders. Leave it out, and upload with hf upload."
        )


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
    if data.num_members > 1:
        check_one_run(config, data.num_members)
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
    training = data.member_rows(sets["train"], tokenizer, config)
    if made := count_made(training[0].rows):
        noted[0]["augmented"] = made
        stage.say(made_text(made, training[0].rows))
    settings = best_by(stage.trainer_config, sets=len(held_out))
    stage.check_fit(tokenizer, start, chat=True)

    # 2. One base in memory, with an adapter and a score head in fp32, fresh or saved.
    base = stage.reward_base(tokenizer)
    judge = Judge(stage, data, tokenizer, held_out, references, noted, ranked)
    if len(training) > 1:
        return train_members(judge, base, settings, training, rows)
    trainer = make_trainer(stage, base, settings, training[0].rows, rows, start=start, ranked=ranked)

    # 3. Train, judge, and leave the adapter with its verdict and its bias.
    result = trainer.train(resume_from_checkpoint=stage.checkpoint)
    bias = judge.bias(trainer)
    verdict = evaluate_reward_model(trainer, held_out["eval"], held_out.get("any"), bias=bias)

    def beside(folder: Path) -> None:  # without its verdict and its bias it is not the reward model
        judge.write_bias(folder, bias)
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


def make_trainer(
    stage: cli.Stage,
    base: PreTrainedModel,
    settings: RewardConfig,
    training_rows: Dataset,
    held_out_rows: dict[str, Dataset],
    *,
    start: AdapterFolder | None,
    ranked: bool,
) -> PairTrainer | ListTrainer:
    """Return a trainer of one reward model on ``base``, fresh or from ``start``."""
    trainer = (ListTrainer if ranked else PairTrainer)(
        model=base,
        args=settings,
        train_dataset=training_rows,
        eval_dataset=held_out_rows,
        processing_class=stage.tokenizer(),
        peft_config=stage.lora(base, start),
    )
    stage.start_from(trainer, start)
    trainer.given = stage.given
    return trainer


@dataclass
class Judge:
    """What judges a trained reward model: held-out rows and references."""

    stage: cli.Stage
    data: RewardArguments
    tokenizer: PreTrainedTokenizerBase
    held_out: dict[str, HeldOut]
    references: list[list[int]]
    noted: list[dict[str, Any]]
    ranked: bool

    def bias(self, trainer: RewardTrainer) -> float:
        """Return the mean raw score of the references, 0 without any."""
        return reference_bias(trainer, self.references) if self.references else 0.0

    def write_bias(self, folder: Path, bias: float) -> None:
        """Note beside an adapter how its scores are read."""
        write_lineage(
            folder,
            append_eos=self.data.append_eos,
            reward_bias=bias,
            reward_references=len(self.references),
        )

    def scored(self, trainer: RewardTrainer, place: int, member: MemberRows, bias: float) -> ScoredMember:
        """Return a trained member with its scores of all that is held out, less its bias."""
        any_pair = self.held_out.get("any")
        return ScoredMember(
            folder=f"member_{place}",
            sha256="",  # once it is saved
            seed=member.seed,
            augmented=member.augmented,
            has_bias=bool(self.references),
            scores=score_held_out(trainer, self.held_out["eval"]).less(bias),
            any_scores=None if any_pair is None else score_held_out(trainer, any_pair).less(bias),
        )


def train_members(
    judge: Judge,
    base: PreTrainedModel,
    settings: RewardConfig,
    training: list[MemberRows],
    held_out_rows: dict[str, Dataset],
) -> RewardTrainer:
    """Train the members of an ensemble one after another on one base, and judge them together.

    Each has a folder of its own, with its checkpoints, from which a run goes on that was killed.
    """
    stage, data = judge.stage, judge.data
    root = Path(settings.output_dir or ".")
    trained: list[Trained] = []
    for place, member in enumerate(training):
        # A base without the member before it, and a fresh head by the member's own seed
        set_seed(member.seed)
        if place:
            base = bare_again(trainer.model)
            fresh_score_head(base)
        folder = root / f"member_{place}"
        own = replace(settings, seed=member.seed, output_dir=str(folder))
        first = None
        if place and data.members == "heads":
            first = AdapterFolder.of("members", root / "member_0")
        trainer = make_trainer(stage, base, own, member.rows, held_out_rows, start=first, ranked=judge.ranked)
        if first is not None:
            fresh_score_head(trainer.model)
            train_head_alone(trainer.model)
        trained.append(train_member(judge, trainer, place, member, of=len(training)))

    # All of them as one, beside a copy of the first
    scored = [each.scored for each in trained]
    ensemble = align_members(data.members, scored)
    verdict = judge_ensemble(ensemble, scored, judge.held_out["eval"], judge.held_out.get("any"))
    first_member = replace(ensemble.members[0], folder=".")
    with replacing(root) as temporary:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copy(root / "member_0" / name, temporary / name)
        judge.tokenizer.save_pretrained(str(temporary))
        judge.write_bias(temporary, trained[0].bias)
        replace(ensemble, members=(first_member, *ensemble.members[1:])).write(temporary)
        write_verdict(temporary, verdict)
    show_verdict(verdict.mean, "The mean of the members on held-out pairs")
    show_verdict(verdict, "Members and aggregations")
    losses = [each.loss for each in trained if each.loss is not None]
    figures: dict[str, float] = {"steps": trainer.state.global_step, "members": len(trained)}
    if losses:
        figures["loss"] = sum(losses) / len(losses)
    stage.finish(
        trainer,
        figures=figures,
        data=judge.noted,
        history=[row for each in trained for row in each.history],
    )
    return trainer


class Trained(NamedTuple):
    """A trained member; without loss and history where an earlier process has trained it."""

    scored: ScoredMember
    bias: float
    loss: float | None
    history: list[dict[str, Any]]


def train_member(
    judge: Judge, trainer: PairTrainer | ListTrainer, place: int, member: MemberRows, *, of: int
) -> Trained:
    """Train a member, unless a run that was killed has done it, and save it with its verdict."""
    # Whose it is: this run's, with these settings and rows, and the member of that number
    stage, folder = judge.stage, Path(trainer.args.output_dir or ".")
    named = {**stage.given.get("made_of", {}), "member": str(place)}
    trainer.given = {**stage.given, "made_of": named}
    ours = facts(trainer)
    resumes = stage.config.resume_from_checkpoint is not None
    done = resumes and is_finished(folder, ours)
    stage.say(f"member {place + 1} of {of}: {'finished before' if done else folder}")
    loss, history = None, []
    if done:
        stage.start_from(trainer, AdapterFolder.of("members", folder))
    else:
        loss = trainer.train(resume_from_checkpoint="latest" if resumes else None).training_loss
        history = [{"member": place, **row} for row in trainer.state.log_history]

    # Judged by itself, and saved so that it loads by itself
    bias = judge.bias(trainer)
    scored = judge.scored(trainer, place, member, bias)
    if not done:
        save_member(judge, trainer, scored, bias, ours)
    scored = replace(scored, sha256=file_sha256(folder / ADAPTER_WEIGHTS))
    return Trained(scored, bias, loss, history)


def save_member(
    judge: Judge, trainer: PairTrainer | ListTrainer, member: ScoredMember, bias: float, ours: Facts
) -> None:
    """Save a member's adapter with its verdict, its lineage and the run that it is of."""
    verdict = held_out_verdict(
        judge.held_out["eval"], member.scores, judge.held_out.get("any"), member.any_scores
    )

    def beside(folder: Path) -> None:
        judge.write_bias(folder, bias)
        write_verdict(folder, verdict)
        judge.stage.record(
            folder,
            judge.tokenizer,
            figures={"steps": trainer.state.global_step, "seed": member.seed},
            data=judge.noted,
        )
        note_finished(folder, ours)

    trainer.beside = beside
    trainer.save_model()


if __name__ == "__main__":
    cli.command(main)()
