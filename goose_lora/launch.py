"""What a recipe may be launched on: one process, or several by DistributedDataParallel."""

import os
from typing import Any

SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


def require_ddp(args: Any, quantization: str, *, roles: bool) -> None:
    """Refuse launchers that cut the base into shards, before anything is loaded.

    Args:
        args: TrainingArguments.
        roles: several adapters share the base, as in PPO; then sharding is refused for a base that is not quantized too.

    Raises:
        ValueError: FSDP or DeepSpeed, by the launcher's configuration or by the settings, with a quantized base or several roles.
    """
    asked = {name for variable, name in SHARDED.items() if os.environ.get(variable, "").lower() in ("true", "1")}
    asked |= {name for name, value in (("FSDP", args.fsdp), ("DeepSpeed", args.deepspeed)) if value}
    if not asked or not (roles or quantization != "none"):
        return
    name = min(asked)
    why = (
        f"a base in {quantization} cannot be cut into shards: bitsandbytes keeps its scales beside the weights"
        if quantization != "none"
        else "policy, critic, reward model and reference are adapters on one base, switched many times a step, which shards do not follow (PEFT#2834)"
    )
    raise ValueError(
        f"{name}: {why}. Launch with DistributedDataParallel instead, each GPU with the whole base: "
        "accelerate launch --config_file recipes/configs/accelerate/several_gpus.yaml ..."
    )
