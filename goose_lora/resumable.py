"""What makes a ``transformers.Trainer`` resumable: whole checkpoints, exact continuation, a stop on request, and steps that cannot be made."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from goose_lora import checkpoints
from goose_lora.adapters import ADAPTERS, Role
from goose_lora.interrupts import Stopped, StopSignals
from goose_lora.loading import ModelArguments
from goose_lora.model_files import read_adapter_config
from goose_lora.ppo_config import PPOConfig
from goose_lora.shared_base import SharedBase

logger = logging.getLogger(__name__)

TRAINING_ARGUMENTS_PICKLE = "training_args.bin"
SKIPPED_IN_A_ROW = 3
LOST = ("Connection closed by peer", "Connection reset by peer")  # gloo, of a process that is no longer there


class NotFinite(ValueError):
    """Several optimizer steps in a row had gradients that are not finite."""


def starting_point(args: TrainingArguments, stage: str, model: ModelArguments, policy_adapter: str | None = None) -> str | None:
    """Before any model is loaded: see that ``output_dir`` can be written, and find the checkpoint that ``resume_from_checkpoint`` names.

    Raises:
        ValueError: it cannot be written, or the checkpoint is not whole or of another run.
    """
    checkpoints.require_writable(args.output_dir or ".")
    adapter = {"r": model.lora_r, "lora_alpha": model.lora_alpha}
    if policy_adapter is not None:
        saved = read_adapter_config("policy_adapter", policy_adapter)
        adapter = {name: saved[name] for name in adapter}
    facts = {
        "stage": stage,
        "world_size": args.world_size,
        "base": {"name": Path(model.model_name_or_path).name, "quantization": model.quantization, "dtype": model.dtype},
        "adapter": adapter,
        "settings": settings(args),
    }
    return checkpoints.resolve(args.resume_from_checkpoint, args.output_dir or ".", facts, says=args.process_index == 0)


def settings(args: TrainingArguments) -> dict[str, Any]:
    return json.loads(json.dumps(args.to_dict(), default=str))


class Resumable:
    """Before a Trainer among the bases of a class: its ``train`` goes on from whole checkpoints only, and writes such.

    ``train(resume_from_checkpoint=)`` takes a folder, or ``latest`` or True for the newest whole checkpoint of ``output_dir``, if there is one.
    ``save_total_limit`` is kept to when a checkpoint is whole, not before. SIGINT and SIGTERM end in a checkpoint and in ``Stopped``.
    """

    stage: str
    saving: Path | None = None  # the checkpoint that is being written

    def __init__(self, *args: Any, **kwargs: Any):
        self.stop, self.finite = StopSignals(), FiniteSteps()
        super().__init__(*args, **kwargs)

    def train(self: Any, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None) -> Any:
        """Overridden to choose the checkpoint, and to say in a line why a run ended that could not go on.

        Raises:
            ValueError: a checkpoint that cannot be resumed.
            Stopped: the run was asked to stop, and has saved.
            OSError: a checkpoint could not be saved, or a process that loads data or another process of the run died.
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
                raise ChildProcessError(
                    "another process of this run has ended, so that this one cannot go on; why is in what that one printed. "
                    "Go on with --resume_from_checkpoint latest, on as many processes."
                ) from error
            if self.saving is not None and self.args.should_save:
                raise checkpoints.unsaved(self.saving, error) from error
            if "DataLoader worker" in str(error):
                raise ChildProcessError(
                    f"a process that loads data died, often for lack of memory: {str(error).splitlines()[0]} Set dataloader_num_workers: 0, "
                    "and go on with --resume_from_checkpoint latest."
                ) from error
            raise
        if keeper.stopped_by:
            raise Stopped(keeper.stopped_by, f"{args.output_dir}/checkpoint-{self.state.global_step}")
        self._load_best_roles()
        return result

    def get_batch_samples(self: Any, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Overridden since Trainer, going on from the last checkpoint of a finished run, makes one more step before it looks at ``max_steps``."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Overridden so that a checkpoint begins in an empty folder, and a result takes its place when it is whole."""
        folder = Path(output_dir or self.args.output_dir)
        if checkpoints.NAME.fullmatch(folder.name):
            self.saving = folder
            if self.args.should_save:
                checkpoints.discard(folder)
            PartialState().wait_for_everyone()  # or this would take away the random state of a process that is ahead
            super().save_model(str(folder), True)  # type: ignore[misc]
            return
        if not self.args.should_save:
            super().save_model(str(folder), True)  # type: ignore[misc]
        else:
            with checkpoints.replacing(folder) as temporary:
                super().save_model(str(temporary), True)  # type: ignore[misc]
                (temporary / TRAINING_ARGUMENTS_PICKLE).unlink(missing_ok=True)  # settings that stand in plain text beside it

    def _load_best_roles(self: Any) -> None:
        """Trainer loads the policy of the best checkpoint: what was trained with it belongs to the same step."""
        best, shared = self.state.best_model_checkpoint, self.accelerator.unwrap_model(self.model)
        if not (self.args.load_best_model_at_end and best and isinstance(shared, SharedBase)):
            return
        trained: tuple[Role, ...] = ("value", "ema")
        roles: list[Role] = [role for role in trained if shared.has(role)]
        for role in roles:
            shared.load_role(role, Path(best) / ADAPTERS[role])
        if self.is_world_process_zero():
            logger.warning("the run ends with %s of %s (%s %.4g).", ", ".join(["policy", *roles]), best, self.args.metric_for_best_model,
                           self.state.best_metric)  # fmt: skip


def facts(trainer: Any) -> dict[str, Any]:
    """What a checkpoint says of its run, and what a run that goes on from it must have in common with it."""
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
    """Seals checkpoints, deletes old ones when a new one is whole, and stops where a run that was asked to stop can go on exactly."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.every = trainer.args.steps_per_rollout if isinstance(trainer.args, PPOConfig) else 1  # steps between places to go on from
        self.limit: int | None = None
        self.stopped_by = 0

    @contextmanager
    def takes_over(self) -> Iterator[None]:
        """Inside, checkpoints are deleted here: Trainer does it before the new one is on the disk."""
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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
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

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # each process has a file with its random state
        if state.is_world_process_zero:
            folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            (folder / TRAINING_ARGUMENTS_PICKLE).unlink(missing_ok=True)  # settings that stand in checkpoint.json; nothing is ever unpickled
            checkpoints.seal(folder, facts(self.trainer))
            checkpoints.prune(args.output_dir or ".", self.limit, [state.best_model_checkpoint])
        self.trainer.saving = None


class FiniteSteps(TrainerCallback):
    """Makes no optimizer step with gradients that are not finite: it is skipped, counted and told of, and the third in a row ends the run."""

    def __init__(self):
        self.skipped = 0  # since the last log
        self.in_a_row = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        parameters = [p for p in model.parameters() if p.grad is not None]  # type: ignore[union-attr]
        if not parameters or torch.stack([p.grad.isfinite().all() for p in parameters]).all():  # type: ignore[union-attr]
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        for parameter in parameters:
            parameter.grad = None  # not 0: the optimizer passes it by, and its averages stay as they are
        step = state.global_step + 1
        advice = "Causes: a learning rate that is too high, a reward or text that overflows, a base whose dtype is too narrow."
        if self.in_a_row == SKIPPED_IN_A_ROW:
            raise NotFinite(
                f"step {step}: the gradient is not finite for the {SKIPPED_IN_A_ROW}rd time in a row, so nothing is learned any more. {advice} "
                "--resume_from_checkpoint latest goes on from the last checkpoint."
            )
        logger.warning("step %d is skipped: its gradient is not finite, so a logit, the loss or the gradient itself was not. %s", step, advice)
