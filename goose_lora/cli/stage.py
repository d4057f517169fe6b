"""The beginning of a stage, before anything is loaded, and its end: lineage, card, page,
``stage.json``, and the upload where it is asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from goose_lora.generation.vllm import require_vllm
from goose_lora.models.arguments import ModelArguments
from goose_lora.ppo.config import PPOConfig
from goose_lora.reporting import html_report
from goose_lora.reporting.run_files import write_stage
from goose_lora.sharing import hub, lineage, model_card
from goose_lora.training.cost import cost
from goose_lora.training.launch import require_all_processes, require_ddp
from goose_lora.training.resume import starting_point


def begin(
    stage: str, config: TrainingArguments, model: ModelArguments, policy_adapter: str | None = None
) -> str | None:
    """See that the launcher fits, that what generates is installed, and that the result can be
    saved and uploaded; find the checkpoint to resume from, if any is asked for.

    Random numbers begin at ``seed`` here: fresh adapters and heads are made before Trainer sets it.

    Raises:
        ValueError: one of these fails.
    """
    require_all_processes(config)
    require_ddp(config, model.quantization, roles=stage in ("ppo", "own_loop"))
    if isinstance(config, PPOConfig) and config.rollout_engine == "vllm":
        require_vllm()
    start = starting_point(config, stage, model, policy_adapter)
    hub.check_upload(config, model)
    set_seed(config.seed)
    return start


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
    """Write what the saved output of ``stage`` is, and upload it if ``push_to_hub`` says so;
    returns the address on the Hub.

    Args:
        others: more settings, as dataclasses.
        figures: the run's, for ``stage.json``, lineage and card.
        args: the words of the command, where they were not the process's own.
        facts: more for the lineage.
    """
    folder, figures = Path(config.output_dir or "."), {**figures, **cost()}
    command = lineage.recorded_command(stage, args)
    noted = {
        "settings": [config, *others],
        "data": data,
        "parents": parents,
        "command": command,
        "figures": figures,
    }
    lineage.record(folder, stage, model=model, tokenizer=tokenizer, **noted, **facts)
    model_card.write_card(folder)
    if stage in ("ppo", "own_loop"):
        html_report.write_report(folder)
    write_stage(str(folder), stage, figures, log_history)
    return hub.push_result(config, model)
