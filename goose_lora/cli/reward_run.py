"""The training of recipes/reward.py: one reward model, or several on one base that score as one.

Each member is trained, judged by itself and saved so that it loads by itself. A reward model alone
is a run of one member, whose folder is that of the run.
"""

import random
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import RewardConfig, RewardTrainer

from goose_lora.cli.stage import Stage
from goose_lora.errors import UserError
from goose_lora.evaluation.ensembles import (
    EnsembleVerdict,
    ScoredMember,
    align_members,
    judge_ensemble,
    require_spread,
)
from goose_lora.evaluation.reward_model import RewardTest
from goose_lora.evaluation.verdict import JudgedRewards, RewardVerdict, show_verdict, write_verdict
from goose_lora.files import file_sha256, is_number, read_json_object, read_sound_lines, write_jsonl
from goose_lora.models.ensembles import MOST_MEMBERS, MemberKind, RewardEnsemble
from goose_lora.models.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LINEAGE,
    AdapterFolder,
    write_lineage,
)
from goose_lora.models.loading import bare_again, fresh_score_head, train_head_alone
from goose_lora.ownership import check_place, replacing, written
from goose_lora.rewards.pair_trainer import PairRewardTrainer
from goose_lora.rewards.ranking_trainer import RankedRewardTrainer
from goose_lora.training.callbacks import METRICS_FILE
from goose_lora.training.checkpoints import Facts, is_finished, note_finished
from goose_lora.training.resume import Resumable, facts
from goose_lora.training.validation import LARGEST_SEED


class PairTrainer(Resumable, PairRewardTrainer):
    """The trainer of pairs, resumable."""

    stage = "reward"


class ListTrainer(Resumable, RankedRewardTrainer):
    """The trainer of ranked lists, resumable."""

    stage = "reward"


class MemberRows(NamedTuple):
    """What a member trains on."""

    place: int
    seed: int
    augmented: bool
    rows: Dataset


class TrainedMember(NamedTuple):
    """A trained member; without history where an earlier process has trained it."""

    scored: ScoredMember
    verdict: RewardVerdict
    bias: float
    steps: int
    loss: float | None
    history: list[dict[str, Any]]


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


def check_members_run(config: RewardConfig, number: int) -> None:
    """Raise UserError for settings of one reward model alone, or a member's folder of another's."""
    root, resumed = Path(config.output_dir or "."), config.resume_from_checkpoint
    if number == 1:
        members = [path for path in root.glob("member_*") if written(path).stage == "reward"]
        if resumed is not None and members and not any(root.glob("checkpoint-*")):
            raise UserError(
                f"num_members: {root} has {len(members)} members of an ensemble, and no checkpoint of one"
                " model to go on from. Set num_members as it was, or leave resume_from_checkpoint out."
            )
        return
    for place in range(number):
        check_place(root / f"member_{place}", "reward")
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
            "push_to_hub: an ensemble is several folders. Leave it out, and upload them afterwards: hf"
            f" upload user/repo {shlex.quote(str(config.output_dir))}"
        )


def rows_of_members(
    number: int, seed: int, shares: Mapping[str, float], tokens: Callable[[Mapping[str, float], int], Dataset]
) -> list[MemberRows]:
    """Return the rows that each member trains on; the first has those of a model alone.

    Others have as many rows drawn from theirs with replacement, and every second one none of those
    that ``augment_pairs`` makes: members that differ by seed alone agree where they err. ``tokens``
    gives the rows with pairs made by some shares and a seed.
    """
    found = []
    for place in range(number):
        own_seed = (seed + place) % (LARGEST_SEED + 1)
        own_shares = {} if place % 2 else shares
        rows = tokens(own_shares, own_seed)
        if place:
            drawn = random.Random(f"{own_seed} members").choices(range(len(rows)), k=len(rows))
            rows = rows.select(drawn)
        found.append(MemberRows(place, own_seed, bool(own_shares), rows))
    return found


@dataclass
class RewardRun:
    """A run of recipes/reward.py from its base on: members one after another, then all as one.

    Attributes:
        settings: of the trainer, for a model alone.
        test: what each member is judged by.
        kind: of ``members``; heads have the first member's adapter.
        start: the reward model to train further, for a model alone.
        noted: fingerprints of the rows, for the lineage.
    """

    stage: Stage
    settings: RewardConfig
    test: RewardTest
    members: Sequence[MemberRows]
    kind: MemberKind
    append_eos: bool
    start: AdapterFolder | None
    noted: list[dict[str, Any]]
    trained: list[TrainedMember] = field(default_factory=list)
    _trainer: PairTrainer | ListTrainer | None = None

    def __post_init__(self) -> None:
        """Refuse what would end several members after their training."""
        if self.is_ensemble:
            require_spread(self.test.held_out)

    @property
    def root(self) -> Path:
        """The folder of the run."""
        return Path(self.settings.output_dir or ".")

    @property
    def is_ensemble(self) -> bool:
        """Whether there are several members."""
        return len(self.members) > 1

    @property
    def trainer(self) -> PairTrainer | ListTrainer:
        """The trainer of the last member."""
        assert self._trainer is not None
        return self._trainer

    # ---- Each member ----

    def each(self, base: PreTrainedModel) -> Iterator[tuple[MemberRows, PreTrainedModel]]:
        """Yield members, each with the base without the one before it."""
        for member in self.members:
            if self.is_ensemble:
                set_seed(member.seed)
            if member.place:
                base = bare_again(self.trainer.model)
                fresh_score_head(base)
            yield member, base

    def settings_of(self, member: MemberRows) -> RewardConfig:
        """Return the trainer's settings for a member: its folder and its seed."""
        if not self.is_ensemble:
            return self.settings
        return replace(self.settings, seed=member.seed, output_dir=str(self.root / _name(member)))

    def start_of(self, member: MemberRows) -> AdapterFolder | None:
        """Return the adapter that a member begins with, None for a fresh one."""
        if self._is_head_alone(member):
            return AdapterFolder.of("members", self.root / "member_0")
        return self.start

    def _is_head_alone(self, member: MemberRows) -> bool:
        return bool(member.place) and self.kind == "heads"

    def train(self, trainer: PairTrainer | ListTrainer, member: MemberRows) -> None:
        """Train a member, unless an earlier process has, and save it with its verdict."""
        # Its weights, and whose they are: this run's, and the member of that number
        self._trainer = trainer
        self.stage.start_from(trainer, self.start_of(member))
        if self._is_head_alone(member):
            fresh_score_head(trainer.model)
            train_head_alone(trainer.model)
        trainer.given = self._given(member)
        folder = Path(trainer.args.output_dir or ".")
        ours: Facts = facts(trainer) if self.is_ensemble else {}
        noted = self._finished(folder, ours, member)
        history: list[dict[str, Any]] = []
        if noted is not None:
            steps, loss = int(noted.get("steps", 0)), noted.get("loss")
            history, _ = read_sound_lines(folder / METRICS_FILE)
            self.stage.start_from(trainer, AdapterFolder.of("members", folder))
        else:
            loss = trainer.train(resume_from_checkpoint=self._checkpoint()).training_loss
            steps, history = trainer.state.global_step, trainer.state.log_history

        # Judged by itself, and saved so that it loads by itself
        bias = self.test.bias(trainer)
        scored = self._scored(trainer, member, bias)
        verdict = self.test.verdict(scored.scores, scored.any_scores)
        trained = TrainedMember(scored, verdict, bias, steps, loss, history)
        if noted is None:
            self._save(trainer, trained, ours)
        else:  # references may be others now, and with them its bias and its verdict
            self._write_beside(folder, trained, ours)
        if self.is_ensemble:
            rows = [{"member": member.place, **row} for row in history]
            scored = replace(scored, sha256=file_sha256(folder / ADAPTER_WEIGHTS))
            trained = trained._replace(scored=scored, history=rows)
        self.trained.append(trained)

    def _given(self, member: MemberRows) -> Mapping[str, Any]:
        given = self.stage.given
        if not self.is_ensemble:
            return given
        return {**given, "made_of": {**given.get("made_of", {}), "member": str(member.place)}}

    def _checkpoint(self) -> str | None:
        """Return what a member goes on from: an ensemble's have checkpoints of their own."""
        if not self.is_ensemble:
            return self.stage.checkpoint
        return "latest" if self._resumes else None

    @property
    def _resumes(self) -> bool:
        return self.stage.config.resume_from_checkpoint is not None

    def _finished(self, folder: Path, ours: Facts, member: MemberRows) -> dict[str, float] | None:
        """Return the figures of a member that an earlier process has finished, None if none has."""
        if not self.is_ensemble:
            return None
        done = self._resumes and is_finished(folder, ours)
        said = "finished before" if done else folder
        self.stage.say(f"member {member.place + 1} of {len(self.members)}: {said}")
        if not done:
            return None
        figures = read_json_object(folder / LINEAGE).get("figures", {})
        return {name: figures[name] for name in ("steps", "loss") if is_number(figures.get(name))}

    def _scored(self, trainer: RewardTrainer, member: MemberRows, bias: float) -> ScoredMember:
        """Return a member with its scores of all that is held out, less its bias."""
        scores, any_scores = self.test.scores(trainer)
        return ScoredMember(
            folder=_name(member),
            sha256="",  # once it is saved
            seed=member.seed,
            augmented=member.augmented,
            has_bias=bool(self.test.references),
            scores=scores.less(bias),
            any_scores=None if any_scores is None else any_scores.less(bias),
        )

    def _save(self, trainer: PairTrainer | ListTrainer, member: TrainedMember, ours: Facts) -> None:
        """Save a member with its verdict; one of several also with its lineage and its run."""
        trainer.beside = lambda folder: self._write_beside(folder, member, ours)
        trainer.save_model()

    def _write_beside(self, folder: Path, member: TrainedMember, ours: Facts) -> None:
        """Write verdict and bias, without which a folder is not the reward model, and the rest."""
        self._write_bias(folder, member.bias)
        write_verdict(folder, member.verdict)
        if self.is_ensemble:
            figures = {"steps": member.steps, "seed": member.scored.seed, "loss": member.loss}
            self.stage.record(folder, self._tokenizer, figures=figures, data=self.noted)
            write_jsonl(folder / METRICS_FILE, member.history)
            note_finished(folder, ours)

    def _write_bias(self, folder: Path, bias: float) -> None:
        """Note beside an adapter how its scores are read."""
        write_lineage(
            folder,
            append_eos=self.append_eos,
            reward_bias=bias,
            reward_references=len(self.test.references),
        )

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return self.stage.tokenizer()

    # ---- All of them as one ----

    def finish(self) -> RewardTrainer:
        """Leave the result, with a verdict that is printed too; return the last trainer."""
        # What is in the folder of the run, and what it took
        verdict: JudgedRewards = self.trained[0].verdict
        figures: dict[str, float] = {"steps": self.trained[-1].steps}
        losses = [each.loss for each in self.trained if each.loss is not None]
        if losses:
            figures["loss"] = sum(losses) / len(losses)
        if self.is_ensemble:
            ensemble = align_members(self.kind, [each.scored for each in self.trained])
            verdict = self._judged(ensemble)
            self._join(ensemble, verdict)
            figures["members"] = len(self.trained)

        # Shown, and told where it comes from
        if self.trainer.is_world_process_zero():
            if isinstance(verdict, EnsembleVerdict):
                show_verdict(verdict.mean, "The mean of the members on held-out pairs")
                show_verdict(verdict, "Members and aggregations")
            else:
                show_verdict(verdict)
        self.stage.finish(
            self.trainer,
            figures=figures,
            data=self.noted,
            parents={"reward": self.start},
            history=[row for each in self.trained for row in each.history],
        )
        return self.trainer

    def _judged(self, ensemble: RewardEnsemble) -> EnsembleVerdict:
        scored = [each.scored for each in self.trained]
        return judge_ensemble(ensemble, scored, self.test.held_out, self.test.any_pair)

    def _join(self, ensemble: RewardEnsemble, verdict: JudgedRewards) -> None:
        """Write the ensemble into the folder of the run, beside a copy of the first member."""
        first_member = replace(ensemble.members[0], folder=".")
        with replacing(self.root) as temporary:
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                shutil.copy(self.root / "member_0" / name, temporary / name)
            self._tokenizer.save_pretrained(str(temporary))
            self._write_bias(temporary, self.trained[0].bias)
            replace(ensemble, members=(first_member, *ensemble.members[1:])).write(temporary)
            write_verdict(temporary, verdict)


def _name(member: MemberRows) -> str:
    return f"member_{member.place}"
