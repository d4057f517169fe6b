"""The end of a stage: lineage, card, ``stage.json``, and the upload where it is asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from goose_lora import card, hub, lineage
from goose_lora.loading import ModelArguments
from goose_lora.report import cost, write_stage


def finish(
    stage: str,
    config: TrainingArguments,
    model: ModelArguments,
    *others: Any,
    figures: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[Mapping[str, Any]],
    parents: Mapping[str, str | None] | None = None,
    args: Sequence[str] | None = None,
    log_history: Sequence[Mapping[str, Any]] | None = None,
    **facts: Any,
) -> str | None:
    """Write what the saved output of ``stage`` is, and upload it if ``push_to_hub`` says so; returns the address on the Hub.

    Args:
        others: more settings, as dataclasses.
        figures: the run's, for ``stage.json``, lineage and card.
        args: the words of the command, where they were not the process's own.
        facts: more for the lineage.
    """
    folder, figures = Path(config.output_dir or "."), {**figures, **cost()}
    command = lineage.command_line(stage, args)
    noted = {"settings": [config, *others], "data": data, "parents": parents, "command": command, "figures": figures}
    lineage.record(folder, stage, model=model, tokenizer=tokenizer, **noted, **facts)
    card.write(folder)
    write_stage(str(folder), stage, figures, log_history)
    return hub.push_result(config, model)
