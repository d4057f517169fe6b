"""What a run computes on, and why: said in its first lines, or refused before anything loads."""

import os
import shutil
import subprocess
from typing import NamedTuple

import psutil
import torch
from accelerate import PartialState

from goose_lora.errors import UserError
from goose_lora.models.arguments import emulates_bfloat16

# PyTorch 2.12 to 2.14 have wheels for CUDA 12.6, 13.0 and 13.2 (pytorch/pytorch#187075, #190355):
# the first runs on all drivers of CUDA 12 and on cards of 5.0 to 9.0, the others on cards of 7.5 on
# (#182849). 2.15 is to have no 12.6 any more (#190385).
OLD_CARDS, NEW_CARDS = "cu126", "cu130"
_OLDEST_OF_NEW, _FIRST_NEW_ONLY = (7, 5), (10, 0)
_SMI_SECONDS = 10


def device_text(dtype: str) -> str:
    """Return what a recipe without a trainer computes on; raises as ``require_supported``."""
    state = PartialState()
    device = torch.device(state.device or "cpu")
    require_supported(device)
    asked = "ACCELERATE_USE_CPU" in os.environ
    return "\n".join(device_lines(device, dtype, asked_for_cpu=asked))


def require_supported(device: torch.device) -> None:
    """Raise UserError for a kind of device that the program was not made for."""
    if device.type not in ("cuda", "cpu"):
        lacks = "float64, which scores are summed in" if device.type == "mps" else "tests of this program"
        raise UserError(
            f"device {device.type}: not supported, for want of {lacks}. use_cpu: true runs on the CPU"
            " (ACCELERATE_USE_CPU=true where a recipe has no such setting)."
        )
    if device.type != "cuda" or torch.version.hip:
        return
    card = torch.cuda.get_device_properties(device)
    if not has_kernels((card.major, card.minor)):
        found = nvidia_smi()
        raise UserError(
            f"{card.name}, capability {card.major}.{card.minor}: this torch ({torch.__version__}, built for"
            f" {', '.join(torch.cuda.get_arch_list())}) has nothing that runs on it."
            f" {_wheel_for((card.major, card.minor), found.cuda if found else 12)}"
        )


def device_lines(device: torch.device, dtype: str, *, asked_for_cpu: bool) -> list[str]:
    """Return what is computed on, in which dtype, and why; and a card that could be, but is not."""
    if device.type == "cuda":
        return _of_card(device, dtype)
    memory = psutil.virtual_memory()
    why = "use_cpu says so" if asked_for_cpu else "torch finds no CUDA device"
    lines = [
        f"device: cpu ({why}), {torch.get_num_threads()} threads, {memory.available / 1e9:.1f} of"
        f" {memory.total / 1e9:.1f} GB free; dtype: {dtype}, as the settings say"
    ]
    if not asked_for_cpu and (unused := unused_card()) is not None:
        lines.append(unused)
    return lines


def _of_card(device: torch.device, dtype: str) -> list[str]:
    card = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    # ROCm answers by the same names
    built = f"ROCm {torch.version.hip}, not tried by anyone yet" if torch.version.hip else ""
    if not built:
        found = nvidia_smi()
        built = f"driver {found.driver if found else 'unknown'}, CUDA {torch.version.cuda}"
    first = "" if device.index else " (the first that torch finds)"
    instead = dtype == "bfloat16" and emulates_bfloat16(device)
    computed = "float16, in place of bfloat16" if instead else f"{dtype}, as the settings say"
    lines = [
        f"device: {device.type}:{device.index or 0}{first}, {card.name}, capability"
        f" {card.major}.{card.minor}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, {built}; dtype:"
        f" {computed}"
    ]
    if instead:
        lines.append(
            f"{card.name} has no instructions for bfloat16 (capability {card.major}.{card.minor}; 8.0 has),"
            " and would emulate it, many times slower: float16 it is, with a loss scale where it trains."
        )
    return lines


class FoundCard(NamedTuple):
    """What nvidia-smi says of the first card; no capability where it is too old to know it."""

    name: str
    driver: str
    cuda: int  # the driver's
    capability: tuple[int, int] | None


def nvidia_smi() -> FoundCard | None:
    """Return the first NVIDIA card; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    for fields in ("name,driver_version,compute_cap", "name,driver_version"):
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        try:
            found = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
            values = found.stdout.strip().splitlines()[0].rsplit(",", fields.count(","))
            name, driver, *capability = (value.strip() for value in values)
            major, minor = (int(part) for part in (capability or ["0.0"])[0].split("."))
            # Drivers from 525 on run all of CUDA 12, from 580 on CUDA 13
            cuda = 13 if int(driver.split(".")[0]) >= 580 else 12
            return FoundCard(name, driver, cuda, (major, minor) if major else None)
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            continue
    return None


def unused_card() -> str | None:
    """Return what to do about an NVIDIA card that torch cannot use; None where there is none."""
    found = nvidia_smi()
    if found is None:
        return None
    why = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
    return (
        f"nvidia-smi finds {found.name} (driver {found.driver}), which this torch cannot use"
        f" ({torch.__version__}, {why}). {_wheel_for(found.capability, found.cuda)}"
    )


def _wheel_for(capability: tuple[int, int] | None, cuda: int) -> str:
    """Return how to have a torch that a card and its driver can use."""
    needs_new = capability is not None and capability >= _FIRST_NEW_ONLY
    old = capability is not None and capability < _OLDEST_OF_NEW
    wheel = NEW_CARDS if needs_new or (cuda >= 13 and not old) else OLD_CARDS
    install = f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{wheel}"
    if needs_new and cuda < 13:
        return f"One that can needs a driver of 580 or newer: update it, and {install}"
    return f"One that can: {install}"


def has_kernels(capability: tuple[int, int]) -> bool:
    """Return whether this torch was built for cards of a capability."""
    # sm_86 is code of 8.6, which cards of 8.6 to 8.9 run; compute_120 is made ready for any later
    built = [name.rstrip("af").partition("_") for name in torch.cuda.get_arch_list()]
    for kind, _, digits in built:
        of = (int(digits[:-1]), int(digits[-1]))
        if (kind == "sm" and of[0] == capability[0] and of <= capability) or (
            kind == "compute" and of <= capability
        ):
            return True
    return not built
