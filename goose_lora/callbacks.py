"""State that belongs in checkpoints, and files that a run writes as it goes."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from goose_lora.kl_control import AdaptiveKL, FixedKL

TRAINING_ARGUMENTS_PICKLE = "training_args.bin"


class RolloutState(TrainerCallback, ExportableState):
    """What PPO must remember between rollouts: the KL coefficient and the scale of scores. Saved inside ``trainer_state.json``."""

    def __init__(self, kl_control: FixedKL | AdaptiveKL):
        self.kl_control = kl_control
        self.score_scale: tuple[float, float] | None = None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"kl_control_state": self.kl_control.state_dict(), "score_scale": self.score_scale}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        callbacks: Any = state.stateful_callbacks or {}
        saved = callbacks.get(type(self).__name__)
        if state.global_step > 0 and isinstance(saved, dict):
            self.kl_control.load_state_dict(saved["attributes"]["kl_control_state"])
            scale = saved["attributes"]["score_scale"]
            self.score_scale = None if scale is None else (scale[0], scale[1])


class MetricsFile(TrainerCallback):
    """One line of JSON a log in ``metrics.jsonl``. A resumed run first drops the lines after its checkpoint."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = Path(args.output_dir or ".") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step] if state.global_step else []
            path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            append_line(Path(args.output_dir or ".") / "metrics.jsonl", {"step": state.global_step, **logs})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A pickle of settings that stand in goose_lora.json too; nothing here is ever unpickled.
        for path in Path(args.output_dir or ".").glob(f"checkpoint-{state.global_step}/{TRAINING_ARGUMENTS_PICKLE}"):
            path.unlink()


def append_line(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
