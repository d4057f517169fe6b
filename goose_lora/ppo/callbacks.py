"""State that belongs in checkpoints, and files that a run writes as it goes."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from goose_lora.data.messages import asked
from goose_lora.errors import UserError
from goose_lora.files import append_line, is_number
from goose_lora.generation.rollout import Rollout
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.kl_control import AdaptiveKL, FixedKL
from goose_lora.reporting.diagnosis import diagnose
from goose_lora.reporting.findings import Finding
from goose_lora.reporting.observing import only_looks

logger = logging.getLogger(__name__)


class RolloutState(TrainerCallback, ExportableState):
    """What PPO remembers between rollouts, which is saved in ``trainer_state.json``.

    Attributes:
        kl_control: the KL coefficient.
        score_scale: mean and standard deviation in which scores are counted.
        score_moments: count, mean and variance of all scores so far.
        evaluation_scale: as ``score_scale``, at the first evaluation and for all.
        best_objective: the best evaluation so far.
        evaluations_without_gain: how many have come after it.
    """

    REMEMBERED = (
        "score_scale",
        "score_moments",
        "evaluation_scale",
        "best_objective",
        "evaluations_without_gain",
    )

    def __init__(self, kl_control: FixedKL | AdaptiveKL):
        self.kl_control = kl_control
        self.score_scale: tuple[float, ...] | None = None
        self.score_moments: tuple[float, ...] | None = None
        self.evaluation_scale: tuple[float, ...] | None = None
        self.best_objective: float | None = None
        self.evaluations_without_gain = 0

    def state(self) -> dict[str, dict]:
        """Return what ``trainer_state.json`` gets, under the name of this class."""
        remembered = {name: getattr(self, name) for name in self.REMEMBERED}
        return {"args": {}, "attributes": {"kl_control_state": self.kl_control.state_dict(), **remembered}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take what the checkpoint remembers, where the run goes on from one.

        Raises:
            UserError: it is not all there, or not what this run's KL control saves.
        """
        if state.global_step == 0:
            return
        # A list of callbacks before a run, and what each has saved once a checkpoint was read
        saved = cast("dict[str, object]", state.stateful_callbacks or {})
        remembered = _checked_state(saved.get(type(self).__name__))
        asked = self.kl_control.coef
        try:
            self.kl_control.load_state_dict(remembered["kl_control_state"])
        except ValueError as error:
            raise UserError(str(error)) from error
        if isinstance(self.kl_control, FixedKL):
            self.kl_control.coef = asked  # a price that stays is what the settings say
        for name in self.REMEMBERED:
            value = remembered[name]
            # JSON has lists where this has tuples.
            setattr(self, name, tuple(value) if isinstance(value, list) else value)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Stop after ``early_stopping_patience`` evaluations without a better objective."""
        # The best one so far is kept in checkpoints, so that a resumed run counts on.
        objective = (metrics or {}).get("eval_objective")
        if objective is None:  # an evaluation of the user's own, under another prefix
            return
        self.evaluations_without_gain += 1
        if self.best_objective is None or objective > self.best_objective:
            self.best_objective = objective
            self.evaluations_without_gain = 0
        patience = cast(PPOConfig, args).early_stopping_patience
        if patience is not None and self.evaluations_without_gain >= patience:
            control.should_training_stop = True
            logger.warning(
                "stopped at step %d: eval_objective has not been above %.3f for %d evaluations.",
                state.global_step,
                self.best_objective,
                patience,
            )


# How many numbers each has; None may stand for all but the last.
_REMEMBERED_NUMBERS = {
    "score_scale": 2,
    "score_moments": 3,
    "evaluation_scale": 2,
    "best_objective": 1,
    "evaluations_without_gain": 1,
}


def _checked_state(saved: object) -> dict[str, Any]:
    """Return what a checkpoint remembers of a run, if it is all there and numbers.

    Raises:
        UserError: something is missing or no finite number, each named.
    """
    # A file that anyone may have changed: nothing is taken for what it should be.
    remembered = saved.get("attributes") if isinstance(saved, dict) else None
    if not isinstance(remembered, dict):
        remembered = {}
    missing = [name for name in ("kl_control_state", *_REMEMBERED_NUMBERS) if name not in remembered]
    if missing:
        raise UserError(
            f"the checkpoint does not say what this version needs to go on from it: {', '.join(missing)}."
            " Start anew."
        )
    for name, count in _REMEMBERED_NUMBERS.items():
        value = remembered[name]
        numbers = value if isinstance(value, list) and count > 1 else [value]
        sound = len(numbers) == count and all(is_number(x) for x in numbers)
        may_be_unset = value is None and name != "evaluations_without_gain"
        # The last of a scale is a standard deviation, of moments a variance, the only one a count
        if sound and name != "best_objective":
            signed = [*numbers[-1:], *(numbers[:1] if name == "score_moments" else [])]
            sound = all(cast(float, number) >= 0 for number in signed)
        if not sound and not may_be_unset:
            raise UserError(
                f"the checkpoint is damaged: {name} is {value!r} in its trainer_state.json. Go on from"
                " another, or start anew."
            )
    return remembered


class PolicyAverage(TrainerCallback):
    """Moves the role ``ema`` towards the policy after each optimizer step.

    It is an adapter, so checkpoints carry it.
    """

    def __init__(self, shared: SharedBase, decay: float):
        self.shared, self.decay = shared, decay

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take the average over one more step."""
        self.shared.update_average(self.decay)


class Diagnosis(TrainerCallback):
    """Warns after each log with a rollout of each finding that is new, and says when one is gone.

    The whole log is read, so that a longer one is looked at less often: after ``OFTEN`` rollouts at
    each second, after twice as many at each third.
    """

    # Looks in a row that a finding stays away before it counts as gone: it does not come and go
    # with the noise
    CALM = 3
    OFTEN = 50

    def __init__(self):
        self.logged = 0
        self.said: dict[str, str] = {}  # level last warned of, by name of the finding
        self.calm: Counter[str] = Counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take what is there of the run that is resumed.

        It was warned of already, so that only what is new is said.
        """
        self.logged = sum("objective/score" in row for row in state.log_history)
        with only_looks("the diagnosis of the run so far"):
            if state.is_world_process_zero and self.logged:
                self.said = {name: finding.level for name, finding in _findings(state).items()}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Look at the log, where it has one more rollout."""
        if not state.is_world_process_zero or "objective/score" not in (logs or ()):
            return
        # A diagnosis reads the whole log: looking at each row of a long run would grow with its
        # square.
        self.logged += 1
        every = 1 + self.logged // self.OFTEN
        if self.logged % every:
            return
        with only_looks("the diagnosis"):
            self._look(cast(PPOConfig, args), state, every)

    def _look(self, args: PPOConfig, state: TrainerState, every: int) -> None:
        """Warn of what is new, and say what is gone."""
        findings = _findings(state)
        if state.global_step <= args.critic_warmup_steps:
            findings.pop("learning rate", None)  # the policy's is 0 on purpose

        # What is new, or worse than it was: once that it is wrong is said, that is enough.
        for name, finding in findings.items():
            if self.said.get(name) not in (finding.level, "wrong"):
                logger.warning("step %d: %s", state.global_step, finding)
                self.said[name] = finding.level

        # What has stayed away for some looks.
        for name in list(self.said):
            if name in findings:
                self.calm[name] = 0
                continue
            self.calm[name] += 1
            if self.calm[name] == self.CALM:
                logger.warning(
                    "step %d: ok     %-14s  well again for %d rollouts.",
                    state.global_step,
                    name,
                    self.CALM * every,
                )
                del self.said[name]


def _findings(state: TrainerState) -> dict[str, Finding]:
    """Return by name what a diagnosis of the log finds that is not well."""
    return {finding.name: finding for finding in diagnose(state.log_history) if finding.level != "ok"}


def write_samples(
    folder: str | Path | None,
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    scores: Tensor,
    kl: Tensor,
    *,
    step: int,
    rows: int,
    asked_of: Sequence[object] | None = None,
) -> list[dict[str, Any]]:
    """Write ``rows`` replies of a rollout into ``samples.jsonl``, and return the lines.

    They are replies to different prompts, as far as there are such. Each has its raw score and its
    KL, in nats per reply.

    Args:
        asked_of: the prompt of each reply as its row has it: text or messages.
    """
    # The first reply to each prompt, and then others
    prompts = rollout.prompt_ids()
    first: dict[tuple[int, ...], int] = {}
    others = [row for row, ids in enumerate(prompts) if first.setdefault(tuple(ids), row) != row]
    chosen = sorted([*first.values(), *others][:rows])

    # For people: the prompt as the policy read it, the reply without its end-of-text token.
    replies, raw_scores, in_nats = rollout.response_ids(), scores.tolist(), kl.tolist()
    lines = []
    for row in chosen:
        prompt = tokenizer.decode(prompts[row])
        reply = tokenizer.decode(replies[row], skip_special_tokens=True)
        line = {
            "step": step,
            "prompt": prompt,
            "asked": prompt if asked_of is None else asked(asked_of[row]),
            "reply": reply,
            "raw_score": raw_scores[row],
            "kl": in_nats[row],
        }
        append_line(Path(folder or ".") / "samples.jsonl", line)
        lines.append(line)
    return lines
