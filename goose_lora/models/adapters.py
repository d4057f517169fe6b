"""What an adapter is called, what its folder holds, and whose parameters are whose."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, load_peft_weights
from torch import nn

from goose_lora.errors import UserError
from goose_lora.models.adapter_kinds import as_plain, plain_config, require_dequantizable
from goose_lora.models.folders import AdapterFolder
from goose_lora.models.role_checks import first_not_finite
from goose_lora.models.roles import ADAPTERS, WITH_HEAD, Role, belongs_to

logger = logging.getLogger(__name__)


def load_weights(model: PeftModel, role: Role, folder: AdapterFolder) -> None:
    """Load a saved adapter, and its head if the role has one, into ``role`` of a PeftModel.

    Raises as ``SharedBase.load_role``.
    """
    has_head = folder.has_head  # and so the file is whole
    weights = load_peft_weights(str(folder), device="cpu")
    if role in WITH_HEAD and not has_head:
        raise UserError(
            f"{folder} has no score head (looked for a tensor named *score.weight among {len(weights)}), so"
            f" it cannot be a {role} model. Train it with recipes/reward.py, or with trl.RewardTrainer and"
            " LoraConfig(task_type='SEQ_CLS')."
        )
    broken = first_not_finite(weights.items())
    if broken is not None:
        raise UserError(
            f"{folder}, for the role {role}: {broken} has numbers that are not finite. Copy the folder again,"
            " or train the stage again with a lower learning_rate."
        )
    weights = as_plain(weights, folder, model, ADAPTERS[role])
    # PEFT loads what it knows by name, and says what was missing or left over
    try:
        result = set_peft_model_state_dict(model, weights, adapter_name=ADAPTERS[role])
    except RuntimeError as error:  # torch lists the tensors of another size, one a line
        sizes = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        raise UserError(
            f"{folder} does not fit the role {role} on this base: {len(sizes)} tensors of another"
            f" size{first(sizes)}. Use an adapter that was trained on this base model."
        ) from error
    wanted = [key for key in result.missing_keys if belongs_to(key, ADAPTERS[role])]
    if result.unexpected_keys or wanted:
        raise UserError(
            f"{folder} does not fit the role {role} on this base: {len(wanted)} tensors"
            f" missing{first(wanted)}, {len(result.unexpected_keys)} not"
            f" known{first(result.unexpected_keys)}. Use an adapter that was trained on this base model."
        )


def make_ready(base: nn.Module, config: LoraConfig) -> None:
    """Set all dropout of a base to 0 before ``config``, the policy's, is put on it.

    Raises:
        UserError: it has adapters already, which would be taken for a part of it, or PEFT cannot
            compute this kind of adapter on its weights.
    """
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise UserError(
            f"this {type(base).__name__} has adapters already, and roles are put on a bare base. Load it"
            " without (no load_adapter, get_peft_model or earlier SharedBase), and give the adapter's folder."
        )
    require_runs(base, config, "policy")
    switch_off_dropout(base)


def require_runs(base: nn.Module, config: LoraConfig, role: Role) -> None:
    """Refuse a kind of adapter that PEFT cannot compute on the weights of ``base``."""
    int8_on_cpu = any(
        type(module).__name__ == "Linear8bitLt" and next(module.parameters()).device.type == "cpu"
        for module in base.modules()
    )
    require_dequantizable(config.use_dora, f"the adapter of the role {role}", int8_on_cpu=int8_on_cpu)


def config_without_dropout(adapter: AdapterFolder) -> LoraConfig:
    """Return PEFT's configuration of a saved adapter as plain LoRA, its dropout set to 0."""
    return without_lora_dropout(plain_config(adapter), str(adapter))


def without_lora_dropout(config: LoraConfig, name: str) -> LoraConfig:
    if config.lora_dropout:
        logger.warning(
            "%s: lora_dropout %g is set to 0 in PPO, where dropout would make the ratios noise.",
            name,
            config.lora_dropout,
        )
        config.lora_dropout = 0.0
    return config


def switch_off_dropout(base: nn.Module) -> None:
    """Set all dropout of a base to 0.

    Models keep it as Dropout modules, or as plain numbers such as attention_dropout; GPT-2 and OPT
    come with 0.1.
    """
    # Modules of dropout, and numbers that a forward reads
    found = set()
    for module in base.modules():
        for name in (
            ["p"] if isinstance(module, nn.Dropout) else [name for name in vars(module) if "drop" in name]
        ):
            if isinstance(getattr(module, name), float) and getattr(module, name) > 0:
                found.add(getattr(module, name))
                setattr(module, name, 0.0)
    if found:
        logger.warning(
            "the base's own dropout (%s) is set to 0 in PPO.", ", ".join(f"{p:g}" for p in sorted(found))
        )


def first(keys: Sequence[str]) -> str:
    return f" (such as {keys[0]})" if keys else ""


class Reentrant:
    """A context that is a fresh one of ``make`` at each entry.

    A backward pass with retain_graph recomputes again.
    """

    def __init__(self, make: Callable[[], Any]):
        self.make = make
        self.open: list[Any] = []

    def __enter__(self) -> None:
        self.open.append(self.make())
        self.open[-1].__enter__()

    def __exit__(self, *error: object) -> None:
        self.open.pop().__exit__(*error)


Stance = list[tuple[Any, Any, bool]]  # a module with adapters, those active in it, whether all are off


def stance_of(model: PeftModel) -> Stance:
    """Return which adapter is active in each module that has any, and whether it is off."""
    # PEFT has properties to read both, and none to set them.
    return [
        (module, module.active_adapter, module.disable_adapters)
        for module in model.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]


def take_stance(model: PeftModel, adapter: str | None, stance: Stance) -> None:
    """Set what ``stance_of`` has read when ``adapter`` was active, or none was.

    ``requires_grad`` stays as it is.
    """
    for module, active, off in stance:
        module._disable_adapters = off
        if not off:
            module._active_adapter = active
    if adapter is not None:
        for wrapper in (model, model.base_model):
            setattr(wrapper, "active_adapter", adapter)  # noqa: B010  (nn.Module types it as a tensor)
