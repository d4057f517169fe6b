"""The settings that name a base model, its quantization and its LoRA adapter."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState

from goose_lora.embedded import MODEL
from goose_lora.errors import UserError
from goose_lora.kinds import require_kind, settle_types
from goose_lora.models.folders import moved_base, require_hub_name, require_name
from goose_lora.models.trunk import top_layers

_LARGEST_RANK = 2**16
# What a base computes in, and what its merged weights can be written in.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BFLOAT16_SINCE = (8, 0)  # the first capability of an NVIDIA card with instructions for bfloat16


def require_arguments(args: object, caller: str) -> None:
    """Raise UserError where a function for ModelArguments is given a name or anything else."""
    way_out = f"Give the settings of a base: {caller}(ModelArguments('org/model'))."
    require_kind(f"the first argument of {caller}", args, ModelArguments, way_out)


@dataclass
class ModelArguments:
    """The base model, its quantization, and where LoRA goes.

    They are the same three lines in every stage's configuration.
    """

    model_name_or_path: str = field(
        metadata={"help": "Hub id or folder of the base, or 'embedded' for the small model of the demo."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the base on the Hub."}
    )
    base_hub_id: str | None = field(
        default=None,
        metadata={
            "help": (
                "Hub id of the base where model_name_or_path is a folder: what an upload names instead of the"
                " folder."
            )
        },
    )
    quantization: Literal["nf4", "int8", "none"] = field(
        default="nf4",
        metadata={"help": "How the frozen base is kept: nf4 (4 bits), int8, or none (in dtype)."},
    )
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16",
        metadata={
            "help": (
                "Arithmetic of the base; float16 where a card only emulates bfloat16. Adapters, heads,"
                " log-probabilities and losses are fp32 always."
            )
        },
    )
    embeddings: Literal["device", "host"] = field(
        default="device",
        metadata={
            "help": (
                "Where the input embeddings are. host: in the host's memory, and a batch's rows cross over;"
                " not where the head is the same table."
            )
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2 ...; unset: the model's."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scaling: alpha / r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "For SFT and reward model; PPO sets it to 0, or its ratios are noise."}
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the linear layers to adapt, or all-linear."},
    )
    lora_layers: str = field(
        default="all",
        metadata={"help": "all, or top-K: adapters in the K uppermost layers, so that the rest is shared."},
    )

    def __post_init__(self) -> None:
        settle_types(self)
        self.model_name_or_path = os.path.expanduser(self.model_name_or_path)
        # Ranges that no base changes; layers and targets are compared with the base later
        if self.lora_r < 1 or self.lora_alpha <= 0:
            raise UserError(
                f"lora_r={self.lora_r}, lora_alpha={self.lora_alpha}: both must be positive, for example 16"
                " and 32."
            )
        if self.lora_r > _LARGEST_RANK:
            raise UserError(f"lora_r={self.lora_r}: no base has matrices of so many columns; 16 is usual.")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout={self.lora_dropout}: must be at least 0 and below 1.")
        if isinstance(self.lora_target_modules, str):
            self.lora_target_modules = [self.lora_target_modules]
        if not self.lora_target_modules:
            raise UserError("lora_target_modules=[]: nothing would be trained. Write all-linear.")
        top_layers(self.lora_layers, 10**6)
        if self.base_hub_id is not None:
            require_hub_name("base_hub_id", self.base_hub_id)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def emulates_bfloat16(device: torch.device) -> bool:
    """Return whether a card has no instructions for bfloat16, which torch calls supported there."""
    # ROCm answers by the same names, with capabilities of its own
    if device.type != "cuda" or torch.version.hip:
        return False
    card = torch.cuda.get_device_properties(device)
    return (card.major, card.minor) < BFLOAT16_SINCE


def device_of_process() -> torch.device:
    """Return the device that accelerate gives this process."""
    return torch.device(PartialState().device or "cpu")


def usable_dtype(args: ModelArguments, device: torch.device | None = None) -> ModelArguments:
    """Return settings whose dtype is float16 where bfloat16 would be emulated.

    That is on ``device``, the process's own by default.
    """
    if args.dtype == "bfloat16" and emulates_bfloat16(device or device_of_process()):
        return replace(args, dtype="float16")
    return args


def check_revision(args: ModelArguments) -> None:
    """Raise UserError for a revision of a base that is not the Hub's: it would be passed over."""
    if args.model_revision is not None and _is_here(args.model_name_or_path):
        raise UserError(
            f"model_revision={args.model_revision}: {args.model_name_or_path} is no model of the Hub, which"
            " alone has revisions. Leave it out, or name the folder of that revision."
        )


def _is_here(name: str) -> bool:
    """Return whether a base is a folder, or the embedded one."""
    return name == MODEL or Path(name).is_dir()


def arguments_of(run: str | Path, noted: Mapping[str, Any], base: str | None = None) -> ModelArguments:
    """Return the settings with which a run had its base, from ``base`` in its lineage.

    Args:
        run: its folder, above which the base is looked for if it is not where the run had it.
        base: where it is, if somebody says so.

    Raises:
        ValueError: the base is not there any more, or the lineage does not say how it was
            quantized.
    """
    # The lineage must say what, and how it was loaded: another quantization is another model
    missing = [
        name
        for name in ("id", "quantization", "dtype")
        if not isinstance(noted, Mapping) or not isinstance(noted.get(name), str)
    ]
    if missing:
        raise UserError(
            f"goose_lora.json does not say what the base's {missing[0]} was in training. Copy the folder"
            " again, or train it again."
        )
    # Where is it now?
    base = os.path.expanduser(base) if base else moved_base(run, noted)
    try:
        require_name(base or noted["id"])
    except ValueError as error:
        if base:
            raise
        # The way out: the Hub's name, where an upload noted it
        known = f" On the Hub it is {noted['hub_id']}." if noted.get("hub_id") else ""
        raise UserError(
            f"the run's base was {noted['id']}, and that is not here.{known} Say where it is: --base"
            " PATH_OR_HUB_ID."
        ) from error
    revision = None
    if not base and not _is_here(noted["id"]):
        revision = noted.get("commit") or noted.get("revision")
    return ModelArguments(
        base or noted["id"],
        model_revision=revision,
        base_hub_id=noted.get("hub_id"),
        quantization=noted["quantization"],
        dtype=noted["dtype"],
    )
