"""What makes a ``transformers.Trainer`` resumable.

Whole checkpoints, exact continuation, a stop on request, and steps that cannot be made.
"""

import hashlib
import json
import logging
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import SaveStrategy, TrainOutput

from goose_lora import files, ownership
from goose_lora.errors import LostProcessError, UserError
from goose_lora.files import first_line
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.ensembles import MEMBERS_FILE
from goose_lora.models.folders import ADAPTER_WEIGHTS, AdapterFolder, tensor_shapes
from goose_lora.models.identity import base_content, content_of
from goose_lora.redaction import is_secret
from goose_lora.training import checkpoints, loss_scale
from goose_lora.training.callbacks import METRICS_FILE, SAMPLES_FILE, FiniteSteps
from goose_lora.training.checkpoints import Facts, SettingRules
from goose_lora.training.launch import require_ddp
from goose_lora.training.progress import Progress
from goose_lora.training.signals import Stopped, StopSignals
from goose_lora.training.versions import versions

logger = logging.getLogger(__name__)

TRAINING_ARGUMENTS_PICKLE = "training_args.bin"
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
)  # gloo, of a process that is no longer there


# What quantization makes of a linear layer, and how settings call it.
_QUANTIZED = {"Linear4bit": "nf4", "Linear8bitLt": "int8"}

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    _Trainer = Trainer  # so that a type checker knows what stands behind super()
else:
    _Trainer = object


def starting_point(
    args: TrainingArguments,
    stage: str,
    model: ModelArguments,
    given: Facts,
    policy: AdapterFolder | None = None,
    *,
    rules: SettingRules = SettingRules(),  # noqa: B008  (a tuple)
) -> str | None:
    """Find the checkpoint that ``resume_from_checkpoint`` names, before any model is loaded.

    Args:
        given: what the recipe was given, from ``given_facts``.
        policy: the adapter that the run starts from, where there is one.
        rules: which of the trainer's own settings may differ.

    Raises:
        UserError: nothing can be written to ``output_dir``, or the checkpoint is not whole or of
            another run.
    """
    ownership.require_writable(args.output_dir or ".")
    adapter = {"r": model.lora_r, "lora_alpha": model.lora_alpha}
    if policy is not None:
        adapter = {name: policy.config[name] for name in adapter}
    facts = {
        "stage": stage,
        "world_size": args.world_size,
        "base": {
            "name": Path(model.model_name_or_path).name,
            "content": base_content(model.model_name_or_path, model.model_revision),
            "quantization": model.quantization,
            "dtype": model.dtype,
        },
        "adapter": adapter,
        **given,
    }
    return checkpoints.choose(
        args.resume_from_checkpoint,
        args.output_dir or ".",
        facts,
        rules=rules,
        says=args.process_index == 0,
    )


def given_facts(
    args: TrainingArguments,
    *others: "DataclassInstance",
    parents: Mapping[str, AdapterFolder | None] | None = None,
) -> Facts:
    """Return what a checkpoint notes of what its recipe was given, with no secret in it.

    Args:
        args: the trainer's settings.
        others: the recipe's other settings.
        parents: the adapters that the run starts from, by setting.
    """
    recipe = {name: value for each in others for name, value in vars(each).items()}
    made_of = {
        name: _sha256_of_parent(parent) for name, parent in (parents or {}).items() if parent is not None
    }
    given = {"settings": settings(args), "recipe": _plain(recipe), "made_of": made_of}
    return given | {"versions": versions()}


def _sha256_of_parent(parent: AdapterFolder) -> str:
    # A reward model is its weights, and what is taken off their scores
    digest = files.file_sha256(parent.path / ADAPTER_WEIGHTS)
    if parent.ensemble is not None:
        digest += files.file_sha256(parent.path / MEMBERS_FILE)
    scored = [member.lineage.get(name) for member in parent.members for name in ("reward_bias", "append_eos")]
    return hashlib.sha256(f"{digest} {scored}".encode()).hexdigest()[:12]


def settings(args: TrainingArguments) -> dict[str, Any]:
    """Return the settings as values of JSON."""
    return _plain(args.to_dict())


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of JSON by name, but for secrets and private ones."""
    shown = {
        name: value for name, value in values.items() if not name.startswith("_") and not is_secret(name)
    }
    return json.loads(json.dumps(shown, default=str))


class Resumable(_Trainer):
    """A mixin for Trainers, which comes before them: ``train`` resumes from whole checkpoints only.

    It writes such, too. ``train(resume_from_checkpoint=)`` takes a folder; or ``latest`` or True,
    for the newest whole checkpoint of ``output_dir``, if there is one. ``save_total_limit`` is kept
    to when a checkpoint is whole, not before. SIGINT and SIGTERM end in a checkpoint and in
    ``Stopped``.
    """

    stage: str
    resume_rules = SettingRules()  # those of its own settings that may differ
    given: Facts = MappingProxyType({})  # by a recipe: ``given_facts``
    unit: str = "step"  # that lines of progress count
    steps_between_resumable: int = 1  # optimizer steps from one place that a run can go on from to the next
    saving: Path | None = None  # the checkpoint that is being written
    _made_of: dict[str, str] | None = None
    start_number: int = 0  # of the run among those in its folder
    beside: Callable[[Path], None] | None = None  # writes what belongs to the result into its folder

    def __init__(self, *args: Any, **kwargs: Any):
        self.stop, self.finite = StopSignals(), FiniteSteps()
        super().__init__(*args, **kwargs)
        if loss_scale.is_float16(self.model):
            self._train_in_float16()
        self.finite.scaler = self.accelerator.scaler
        self.progress = Progress.put_into(self, every=self.steps_between_resumable, unit=self.unit)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: object = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train. Overridden to choose the checkpoint, and to say why a run has ended early.

        Raises:
            UserError: a checkpoint that cannot be resumed.
            Stopped: the run was asked to stop, and has saved.
            FailedWriteError: a checkpoint could not be saved.
            LostProcessError: a process that loads data, or another process of the run, died.
        """
        # A run goes on from what is whole and its own
        args = self.args
        output_dir = args.output_dir or "."
        chosen_here = resume_from_checkpoint in (True, "latest")  # a recipe has chosen before, and said so
        says = chosen_here and self.is_world_process_zero()
        here = facts(self)
        folder = checkpoints.choose(
            resume_from_checkpoint,
            output_dir,
            here,
            rules=self.resume_rules,
            says=says,
        )

        if folder is not None:
            self._check_tensors(Path(folder))
            self.keep(checkpoints.kept(folder, here["settings"]))

        # What ends it from outside is told in the user's words
        keeper = CheckpointKeeper(self, resumes=folder is not None)
        try:
            with self._writing_alone(folder), keeper.takes_over(), self.stop.handled():
                result = super().train(folder, trial, ignore_keys_for_eval)
        except Exception as error:
            if self.args.world_size > 1 and any(words in str(error) for words in _LOST):
                raise LostProcessError(
                    "another process of this run has ended, so that this one cannot go on; why is in what"
                    " that one printed. Go on with --resume_from_checkpoint latest, on as many processes."
                ) from error
            if self.saving is not None and self.args.should_save and isinstance(error, files.WRITE_ERRORS):
                raise checkpoints.unsaved(self.saving, error) from error
            # What was checked may still not fit the libraries that read it
            if folder is not None and _LOADING & set(_functions_of(error)):
                raise UserError(
                    f"resume_from_checkpoint: {folder} cannot be loaded ({type(error).__name__}:"
                    f" {files.brief(error)}). Give another checkpoint, or start anew."
                ) from error
            if "DataLoader worker" in str(error):
                raise LostProcessError(
                    f"a process that loads data died, often for lack of memory: {first_line(error)}."
                    " Set dataloader_num_workers: 0, and go on with --resume_from_checkpoint latest."
                ) from error
            raise
        finally:
            self.progress.close()
        if keeper.stopped_by:
            raise Stopped(keeper.stopped_by, f"{args.output_dir}/checkpoint-{self.state.global_step}")
        best = self.state.best_model_checkpoint
        if args.load_best_model_at_end and best:
            self.load_best(Path(best))
        return cast(TrainOutput, result)

    forwards_in_dtype: bool = False  # whether the model's own forward computes in the base's dtype

    def _train_in_float16(self) -> None:
        """Scale the loss, and compute in float16 unless the model sees to that itself."""
        args = self.args
        require_ddp(args, "none", roles=False, dtype="float16")
        loss_scale.scale_loss(self.accelerator, lambda: self.optimizer)
        if not self.forwards_in_dtype:
            assert self.model is not None
            loss_scale.compute_in_float16(self.model, args.device)

    def training_step(
        self, model: nn.Module, inputs: dict, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Train on a batch. Overridden to know whether its loss was finite, where it is scaled."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.finite.scaler is not None:
            self.finite.see_loss(loss)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss scale too, and how many steps were left out for a smaller one."""
        if self.finite.scaler is not None and "loss" in logs:
            logs["loss_scale"] = self.finite.scaler.get_scale()
            logs["loss_scale_skips"] = self.finite.rescaled
            # The norm of a gradient that overflowed is no figure
            if self.finite.rescaled and not math.isfinite(logs.get("grad_norm", 0.0)):
                del logs["grad_norm"]
            self.finite.rescaled = 0
        super().log(logs, start_time)

    def made_of(self) -> dict[str, str]:
        """Return hashes, by what they are of, that a run which resumes this one must have alike."""
        # Once a run: each checkpoint notes it, and rows may be many
        if self._made_of is None:
            rows, tokenizer = self.train_dataset, cast(Any, self.processing_class)
            found: dict[str, str] = {}
            if isinstance(rows, Dataset):
                found["rows' content"] = rows_sha256(rows)
            held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
            for name, those in held_out.items():
                if isinstance(those, Dataset):
                    found[f"held-out rows' content {name}".rstrip()] = rows_sha256(those)
            template = getattr(tokenizer, "chat_template", None)
            text = json.dumps(template, sort_keys=True)
            found["chat template"] = hashlib.sha256(text.encode()).hexdigest()[:12]
            found |= self.given.get("made_of", {})
            self._made_of = found
        return self._made_of

    def chosen(self) -> Facts:
        """Return what the run has chosen by the memory there is, by name of the setting."""
        return {}

    def keep(self, chosen: Facts) -> None:
        """Go on with what the checkpoint's run has chosen: here nothing."""

    def _check_tensors(self, checkpoint: Path) -> None:
        """Raise UserError unless the checkpoint's adapters have the tensors that the model has."""
        # PEFT passes over what a file lacks, and the run would go on with fresh weights. Shards
        # that FSDP has written are put together by it
        model = cast(PeftModel, self.accelerator.unwrap_model(self.model))
        for name in cast(dict[str, Any], model.peft_config):
            place = checkpoint if name == "default" else checkpoint / name
            if self.is_fsdp_enabled and not (place / ADAPTER_WEIGHTS).is_file():
                continue
            there = tensor_shapes(place / ADAPTER_WEIGHTS)
            state = get_peft_model_state_dict(model, adapter_name=name)
            here = {key: list(tensor.shape) for key, tensor in state.items()}
            # Names and shapes, both ways
            wrong = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
            if wrong:
                key = wrong[0]
                saved, own = there.get(key, "missing"), here.get(key, "missing")
                raise UserError(
                    f"resume_from_checkpoint: {place / ADAPTER_WEIGHTS} does not fit the adapter {name}:"
                    f" {key} is {saved} there and {own} here. Give another checkpoint, or start anew."
                )

    @contextmanager
    def _writing_alone(self, resumed: str | None) -> Iterator[None]:
        """Hold ``output_dir``, and number the run: its checkpoints are in order by that."""
        # One process of a run writes; a recipe holds the folder from its first line on
        if not self.is_world_process_zero():
            yield
            return
        output_dir = self.args.output_dir or "."
        held_before = ownership.holds(output_dir)
        ownership.hold(output_dir)
        after = checkpoints.last_start(output_dir, resumed)
        self.start_number = ownership.begin(output_dir, self.stage, after=after)
        try:
            yield
        finally:
            if not held_before:
                ownership.release(output_dir)

    def load_best(self, checkpoint: Path) -> None:
        """Load what the best checkpoint has besides what Trainer has loaded of it: here nothing."""

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """Return batches. Overridden so that a finished run that is resumed makes no step.

        Trainer makes one before it looks at ``max_steps``.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Write none. Overridden since TRL's takes the place of any README.md at checkpoints."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save. Overridden so that a checkpoint begins empty, and a result is whole or absent."""
        folder = Path(output_dir or self.args.output_dir or ".")
        if checkpoints.FOLDER_NAME.fullmatch(folder.name):
            self.saving = folder
            if self.args.should_save:
                checkpoints.make_room(folder)
            # Or this would take away the random state of a process that is ahead
            PartialState().wait_for_everyone()
            super().save_model(str(folder), True)
            return
        if not self.args.should_save:
            super().save_model(str(folder), True)
            return
        with ownership.replacing(folder) as temporary:
            super().save_model(str(temporary), True)
            # Settings that stand in plain text beside it
            (temporary / TRAINING_ARGUMENTS_PICKLE).unlink(missing_ok=True)
            if self.beside is not None:
                self.beside(temporary)


def facts(trainer: Resumable) -> Facts:
    """Return what a checkpoint says of its run, which a run that resumes it must have alike."""
    model = cast(PeftModel, trainer.accelerator.unwrap_model(trainer.model))
    base = cast(PreTrainedModel, model.get_base_model())
    kinds = {_QUANTIZED[kind] for module in base.modules() if (kind := type(module).__name__) in _QUANTIZED}
    # All adapters, whatever their role
    adapters = {
        name: _adapter_facts(config) for name, config in cast(dict[str, Any], model.peft_config).items()
    }
    return {
        "stage": trainer.stage,
        "start": trainer.start_number,
        "step": trainer.state.global_step,
        "world_size": trainer.args.world_size,
        "rows": len(cast(Dataset, trainer.train_dataset)),
        "base": {
            "name": Path(str(base.config.name_or_path)).name,
            "content": content_of(base),
            "quantization": min(kinds, default="none"),
            "dtype": str(cast(nn.Embedding, base.get_input_embeddings()).weight.dtype).removeprefix("torch."),
        },
        "adapters": adapters,
        "made_of": trainer.made_of(),
        "settings": trainer.given.get("settings") or settings(trainer.args),
        "recipe": trainer.given.get("recipe", {}),
        "chosen": trainer.chosen(),
        "versions": versions(),
    }


def _adapter_facts(config: LoraConfig) -> dict[str, Any]:
    """Return what an adapter is: rank, places, and in ``further`` what else is not the default."""
    named = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules or []),
        "layers_to_transform": config.layers_to_transform,
    }
    plain = {name: value for name, value in config.to_dict().items() if name not in (*named, *_OF_A_FILE)}
    usual = LoraConfig().to_dict()
    further = {name: value for name, value in plain.items() if value != usual.get(name)}
    return named | {"further": json.loads(json.dumps(further, default=_sorted_or_text, sort_keys=True))}


# What PEFT notes of the file, or changes as it loads it.
_OF_A_FILE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")


def _sorted_or_text(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(value)


# Functions of Trainer in which a checkpoint's files are read.
_LOADING = {
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
    "_load_scaler",
    "_load_callback_state",
    "load_from_json",
}


def _functions_of(error: BaseException) -> list[str]:
    """Return the names of the functions that an error has passed through."""
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


def rows_sha256(rows: Dataset) -> str:
    """Return the beginning of a hash of all that rows hold, in their order."""
    digest = hashlib.sha256()
    for batch in rows.with_format(None).iter(batch_size=1000):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:12]


class CheckpointKeeper(TrainerCallback):
    """Seals checkpoints, deletes old ones, and stops a run that was asked to stop.

    Old ones go when a new one is whole; a run stops where it can go on exactly.
    """

    def __init__(self, trainer: Resumable, *, resumes: bool):
        self.trainer = trainer
        self.resumes = resumes
        self.every = trainer.steps_between_resumable
        self.limit: int | None = None
        self.stopped_by = 0

    @contextmanager
    def takes_over(self) -> Iterator[None]:
        """Delete checkpoints here, not by Trainer, inside.

        Trainer does it before the new one is on the disk.
        """
        args = self.trainer.args
        self.limit, args.save_total_limit = args.save_total_limit, None
        # A run that goes on has evaluated at its start: once more would count for early stopping
        self.eval_on_start = args.eval_on_start
        args.eval_on_start = args.eval_on_start and not self.resumes
        for callback in (self, self.trainer.finite):
            self.trainer.add_callback(callback)
        self.trainer.saving = None
        try:
            yield
        finally:
            args.save_total_limit, args.eval_on_start = self.limit, self.eval_on_start
            for callback in (self, self.trainer.finite):
                self.trainer.remove_callback(callback)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the settings back that only the start of the run reads: checkpoints note them."""
        args.eval_on_start = self.eval_on_start

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop if a process was asked to; all stop at the same step.

        Whatever saves also logs: a run that goes on from there has forgotten what came before.
        """
        if state.global_step % self.every == 0:
            self._stop_if_asked(args, control)
        saves_best = args.save_strategy == SaveStrategy.BEST and control.should_evaluate
        control.should_log = control.should_log or control.should_save or saves_best

    def _stop_if_asked(self, args: TrainingArguments, control: TrainerControl) -> None:
        asked = self.trainer.stop.asked
        if args.world_size > 1:
            anywhere = torch.tensor(asked, device=args.device)
            torch.distributed.all_reduce(anywhere, op=torch.distributed.ReduceOp.MAX)
            asked = int(anywhere)
        if asked:
            self.stopped_by = asked
            control.should_save = control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Seal the checkpoint that has been written, and delete old ones."""
        PartialState().wait_for_everyone()  # each process has a file with its random state
        if state.is_world_process_zero:
            folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            # Settings that stand in checkpoint.json; nothing is ever unpickled
            (folder / TRAINING_ARGUMENTS_PICKLE).unlink(missing_ok=True)
            # What a resumed run reads of the steps so far outlives a power failure too
            for log in (METRICS_FILE, SAMPLES_FILE):
                path = folder.parent / log
                if path.is_file():
                    files.sync(path)
            checkpoints.seal(folder, facts(self.trainer))
            checkpoints.prune(args.output_dir or ".", self.limit, [state.best_model_checkpoint, folder])
        self.trainer.saving = None
