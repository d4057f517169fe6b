"""What makes a ``transformers.Trainer`` resumable: whole checkpoints, exact continuation, a stop on
request, and steps that cannot be made."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from goose_lora import files
from goose_lora.errors import LostProcessError
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.folders import AdapterFolder
from goose_lora.models.roles import ADAPTERS, Role
from goose_lora.models.shared_base import SharedBase
from goose_lora.training import checkpoints
from goose_lora.training.callbacks import FiniteSteps
from goose_lora.training.signals import Stopped, StopSignals

logger = logging.getLogger(__name__)

TRAINING_ARGUMENTS_PICKLE = "training_args.bin"
LOST = ("Connection closed by peer", "Connection reset by peer")  # gloo, of a process that is no longer there


def starting_point(
    args: TrainingArguments, stage: str, model: ModelArguments, policy: AdapterFolder | None = None
) -> str | None:
    """Before any model is loaded: see that ``output_dir`` can be written, and find the checkpoint
    that ``resume_from_checkpoint`` names.

    Raises:
        ValueError: it cannot be written, or the checkpoint is not whole or of another run.
    """
    checkpoints.require_writable(args.output_dir or ".")
    adapter = {"r": model.lora_r, "lora_alpha": model.lora_alpha}
    if policy is not None:
        adapter = {name: policy.config[name] for name in adapter}
    facts = {
        "stage": stage,
        "world_size": args.world_size,
        "base": {
            "name": Path(model.model_name_or_path).name,
            "quantization": model.quantization,
            "dtype": model.dtype,
        },
        "adapter": adapter,
        "settings": settings(args),
    }
    return checkpoints.resolve(
        args.resume_from_checkpoint, args.output_dir or ".", facts, says=args.process_index == 0
    )


def settings(args: TrainingArguments) -> dict[str, Any]:
    return json.loads(json.dumps(args.to_dict(), default=str))


class Resumable:
    """Before a Trainer among the bases of a class: its ``train`` goes on from whole checkpoints
    only, and writes such.

    ``train(resume_from_checkpoint=)`` takes a folder, or ``latest`` or True for the newest whole
    checkpoint of ``output_dir``, if there is one. ``save_total_limit`` is kept to when a checkpoint
    is whole, not before. SIGINT and SIGTERM end in a checkpoint and in ``Stopped``.
    """

    stage: str
    saving: Path | None = None  # the checkpoint that is being written
    steps_between_resumable: int = 1  # optimizer steps from one place that a run can go on from to the next

    def __init__(self, *args: Any, **kwargs: Any):
        self.stop, self.finite = StopSignals(), FiniteSteps()
        super().__init__(*args, **kwargs)

    def train(
        self: Any,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Overridden to choose the checkpoint, and to say in a line why a run ended that could not
        go on.

        Raises:
            ValueError: a checkpoint that cannot be resumed.
            Stopped: the run was asked to stop, and has saved.
            OSError: a checkpoint could not be saved, or a process that loads data or another
                process of the run died.
        """
        args = self.args
        chosen_here = resume_from_checkpoint in (True, "latest")  # a recipe has chosen before, and said so
        says = chosen_here and self.is_world_process_zero()
        folder = checkpoints.resolve(resume_from_checkpoint, args.output_dir, facts(self), says=says)
        keeper = CheckpointKeeper(self)
        try:
            with keeper.takes_over(), self.stop.handled():
                result = super().train(folder, trial, ignore_keys_for_eval)  # type: ignore[misc]
        except Exception as error:
            if self.args.world_size > 1 and any(says in str(error) for says in LOST):
                raise LostProcessError(
                    "another process of this run has ended, so that this one cannot go on; why is in what"
                    " that one printed. Go on with --resume_from_checkpoint latest, on as many processes."
                ) from error
            if self.saving is not None and self.args.should_save and isinstance(error, files.WRITE_ERRORS):
                raise checkpoints.unsaved(self.saving, error) from error
            if "DataLoader worker" in str(error):
                raise LostProcessError(
                    f"a process that loads data died, often for lack of memory: {str(error).splitlines()[0]}"
                    " Set dataloader_num_workers: 0, and go on with --resume_from_checkpoint latest."
                ) from error
            raise
        if keeper.stopped_by:
            raise Stopped(keeper.stopped_by, f"{args.output_dir}/checkpoint-{self.state.global_step}")
        self._load_best_roles()
        return result

    def get_batch_samples(
        self: Any, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """Overridden since Trainer, going on from the last checkpoint of a finished run, makes one
        more step before it looks at ``max_steps``."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Overridden so that a checkpoint begins in an empty folder, and a result takes its place
        when it is whole."""
        folder = Path(output_dir or self.args.output_dir)
        if checkpoints.NAME.fullmatch(folder.name):
            self.saving = folder
            if self.args.should_save:
                checkpoints.discard(folder)
            # Or this would take away the random state of a process that is ahead
            PartialState().wait_for_everyone()
            super().save_model(str(folder), True)  # type: ignore[misc]
            return
        if not self.args.should_save:
            super().save_model(str(folder), True)  # type: ignore[misc]
        else:
            with files.replacing(folder) as temporary:
                super().save_model(str(temporary), True)  # type: ignore[misc]
                # Settings that stand in plain text beside it
                (temporary / TRAINING_ARGUMENTS_PICKLE).unlink(missing_ok=True)

    def _load_best_roles(self: Any) -> None:
        """Trainer loads the policy of the best checkpoint: what was trained with it belongs to the
        same step."""
        best, shared = self.state.best_model_checkpoint, self.accelerator.unwrap_model(self.model)
        if not (self.args.load_best_model_at_end and best and isinstance(shared, SharedBase)):
            return
        trained: tuple[Role, ...] = ("value", "ema")
        roles: list[Role] = [role for role in trained if shared.has(role)]
        for role in roles:
            shared.load_role(role, Path(best) / ADAPTERS[role])
        if self.is_world_process_zero():
            logger.warning(
                "the run ends with %s of %s (%s %.4g).",
                ", ".join(["policy", *roles]),
                best,
                self.args.metric_for_best_model,
                self.state.best_metric,
            )


def facts(trainer: Any) -> dict[str, Any]:
    """What a checkpoint says of its run, and what a run that goes on from it must have in common
    with it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model()
    kinds = {type(module).__name__ for module in base.modules()}
    adapters = {
        name: {
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "target_modules": sorted(config.target_modules),
            "layers_to_transform": config.layers_to_transform,
        }
        for name, config in model.peft_config.items()
    }
    return {
        "stage": trainer.stage,
        "step": trainer.state.global_step,
        "world_size": trainer.args.world_size,
        "rows": len(trainer.train_dataset),
        "base": {
            "name": Path(base.config.name_or_path).name,
            "quantization": "nf4" if "Linear4bit" in kinds else "int8" if "Linear8bitLt" in kinds else "none",
            "dtype": str(base.get_input_embeddings().weight.dtype).removeprefix("torch."),
        },
        "adapters": adapters,
        "settings": settings(trainer.args),
    }


class CheckpointKeeper(TrainerCallback):
    """Seals checkpoints, deletes old ones when a new one is whole, and stops where a run that was
    asked to stop can go on exactly."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.every = trainer.steps_between_resumable
        self.limit: int | None = None
        self.stopped_by = 0

    @contextmanager
    def takes_over(self) -> Iterator[None]:
        """Inside, checkpoints are deleted here: Trainer does it before the new one is on the
        disk."""
        args = self.trainer.args
        self.limit, args.save_total_limit = args.save_total_limit, None
        for callback in (self, self.trainer.finite):
            self.trainer.add_callback(callback)
        self.trainer.saving = None
        try:
            yield
        finally:
            args.save_total_limit = self.limit
            for callback in (self, self.trainer.finite):
                self.trainer.remove_callback(callback)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every:
            return
        asked = self.trainer.stop.asked
        if args.world_size > 1:  # all processes stop at the same step
            anywhere = torch.tensor(asked, device=args.device)
            torch.distributed.all_reduce(anywhere, op=torch.distributed.ReduceOp.MAX)
            asked = int(anywhere)
        if asked:
            self.stopped_by = asked
            control.should_save = control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        PartialState().wait_for_everyone()  # each process has a file with its random state
        if state.is_world_process_zero:
            folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            # Settings that stand in checkpoint.json; nothing is ever unpickled
            (folder / TRAINING_ARGUMENTS_PICKLE).unlink(missing_ok=True)
            checkpoints.seal(folder, facts(self.trainer))
            checkpoints.prune(args.output_dir or ".", self.limit, [state.best_model_checkpoint])
        self.trainer.saving = None
