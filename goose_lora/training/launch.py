"""What a recipe may be launched on: one process, or several by DistributedDataParallel."""

import os

import torch
from transformers import TrainingArguments

from goose_lora.errors import UserError

# Set by torchrun and by MPI's launchers
SIZES = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
ON_CPU = (
    "For several on a CPU: accelerate launch --config_file recipes/configs/accelerate/several_gpus.yaml"
    " --num_processes 2 recipes/... --use_cpu true. For one: --num_processes 1."
)
SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


def require_all_processes(args: TrainingArguments) -> None:
    """Refuse to be fewer processes than the launcher was asked for.

    Raises:
        UserError: ``accelerate launch --num_processes 2`` on a CPU or beside one GPU, which starts
            one, without a word, and leaves the address where they should meet; or several that do
            not know one another, since there is no GPU and ``use_cpu`` is off: each would write
            over the others' files; or one that sees several GPUs.
    """
    # accelerate leaves the address where processes meet, though it has started one alone
    environment = set(os.environ)
    if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= environment and not SIZES & environment:
        raise UserError(
            "accelerate launch was asked for several processes and started one: there are not as many GPUs,"
            f" or --cpu was given, which starts several through MPI only. {ON_CPU}"
        )

    # On the CPU without use_cpu, each of several processes takes itself for the only one
    if _launched() > args.world_size:
        raise UserError(
            f"{_launched()} processes were launched and found no GPU, so that each would train alone."
            f" {ON_CPU}"
        )
    require_one_gpu(args)


def require_one_gpu(args: TrainingArguments) -> None:
    """Refuse to be one process that sees several GPUs.

    transformers would multiply the batch by their number and divide it among them (DataParallel).

    Raises:
        UserError: there are several.
    """
    if args.n_gpu > 1:
        raise UserError(
            f"one process sees {args.n_gpu} GPUs. To use one, set CUDA_VISIBLE_DEVICES=0; to use all, launch"
            " a process for each: accelerate launch --config_file"
            f" recipes/configs/accelerate/several_gpus.yaml --num_processes {args.n_gpu} recipes/..."
        )


def smallest_anywhere(number: int, args: TrainingArguments) -> int:
    """Return the smallest ``number`` of all processes, so that they decide alike."""
    if args.world_size == 1:
        return number
    numbers = torch.tensor(number, device=args.device)
    torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MIN)
    return int(numbers)


def processes_here(args: TrainingArguments) -> int:
    """Return how many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))


def require_one_process(recipe: str) -> None:
    """Refuse to be one of several processes that would each do the whole work.

    Raises:
        UserError: several were launched.
    """

    # On the CPU without use_cpu, each of several processes takes itself for the only one
    if _launched() > 1:
        raise UserError(
            f"{_launched()} processes were launched; {recipe} runs as one: accelerate launch --num_processes"
            f" 1 {recipe} ..."
        )


def _launched() -> int:
    """Return how many processes torchrun has started.

    It sets both variables; some clouds set WORLD_SIZE alone, for all of their machines.
    """
    if "LOCAL_RANK" not in os.environ:
        return 1
    return int(os.environ.get("WORLD_SIZE") or 1)


def require_ddp(args: TrainingArguments, quantization: str, *, roles: bool, dtype: str = "float32") -> None:
    """Refuse launchers that cut the base into shards, before anything is loaded.

    Args:
        roles: several adapters share the base, as in PPO; then sharding is refused for a base that
            is not quantized too.
        dtype: of the base.

    Raises:
        UserError: FSDP or DeepSpeed, by the launcher's configuration or by the settings, with a
            quantized base, one in float16, or several roles.
    """
    # Asked for by the launcher's configuration, or by settings
    asked = {
        name for variable, name in SHARDED.items() if os.environ.get(variable, "").lower() in ("true", "1")
    }
    asked |= {name for name, value in (("FSDP", args.fsdp), ("DeepSpeed", args.deepspeed)) if value}
    if not asked or not (roles or quantization != "none" or dtype == "float16"):
        return

    # Why it cannot be
    name = min(asked)
    why = (
        "policy, critic, reward model and reference are adapters on one base, switched many times a step,"
        " which shards do not follow (PEFT#2834)"
    )
    if not roles:
        why = "dtype: float16 needs a loss scale, which shards have in ways of their own"
    if quantization != "none":
        why = (
            f"a base in {quantization} cannot be cut into shards: bitsandbytes keeps its scales beside the"
            " weights"
        )
    raise UserError(
        f"{name}: {why}. Launch with DistributedDataParallel instead, each GPU with the whole base: "
        "accelerate launch --config_file recipes/configs/accelerate/several_gpus.yaml ..."
    )


def mixed_precision_of_launcher() -> str:
    """Return what accelerate's launcher has asked for: no, fp16, bf16 or fp8.

    It is to be read before the settings are made, which write over it.
    """
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def require_precision(settings: object, launched_with: str) -> None:
    """Refuse a launcher that would make another arithmetic of a run than its settings say.

    Raises:
        UserError: the launcher asks for mixed precision, and the settings for another or none.
    """
    if not isinstance(settings, TrainingArguments) or launched_with == "no":
        return
    asked = next((name for name in ("bf16", "fp16") if getattr(settings, name)), "no")
    if asked != launched_with:
        said = f"{asked}: true" if asked != "no" else "neither bf16 nor fp16"
        raise UserError(
            f"accelerate's launcher asks for mixed_precision {launched_with} (its configuration file, or"
            f" --mixed_precision), and the recipe's settings for {said}: the numbers would not be those of"
            " the settings. Launch with --mixed_precision no, or set mixed_precision: 'no' in that file."
        )


def compute_by_dtype(args: TrainingArguments) -> None:
    """Leave mixed precision to the base's dtype: trainers scale the loss of float16 themselves.

    TRL sets bf16 where nobody does.
    """
    args.bf16 = args.fp16 = args.bf16_full_eval = args.fp16_full_eval = False
    args.mixed_precision = "no"
