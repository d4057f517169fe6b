"""What a run computes on, and why: said in its first lines, or refused before anything loads."""

import os
import shutil
import subprocess

import psutil
import torch
from accelerate import PartialState

from goose_lora.errors import UserError
from goose_lora.models.arguments import emulates_bfloat16

# PyTorch's wheels by what the driver can: the first whose CUDA is not above the driver's.
WHEELS = ((13, "cu130"), (12, "cu126"))
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
        driver = (nvidia_smi() or ("", "unknown", 0))[1]
        built = f"driver {driver}, CUDA {torch.version.cuda}"
    instead = dtype == "bfloat16" and emulates_bfloat16(device)
    computed = "float16, in place of bfloat16" if instead else f"{dtype}, as the settings say"
    lines = [
        f"device: {device.type}:{device.index or 0} (the first that torch finds), {card.name}, capability"
        f" {card.major}.{card.minor}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, {built}; dtype:"
        f" {computed}"
    ]
    if instead:
        lines.append(
            f"{card.name} has no instructions for bfloat16 (capability {card.major}.{card.minor}; 8.0 has),"
            " and would emulate it, many times slower: float16 it is, with a loss scale where it trains."
        )
    return lines


def nvidia_smi() -> tuple[str, str, int] | None:
    """Return the first NVIDIA card's name, its driver, and the driver's CUDA; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True).stdout
        name, driver = (part.strip() for part in found.strip().splitlines()[0].rsplit(",", 1))
        # Drivers from 525 on run all of CUDA 12, from 580 on CUDA 13
        return name, driver, 13 if int(driver.split(".")[0]) >= 580 else 12
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def unused_card() -> str | None:
    """Return what to do about an NVIDIA card that torch cannot use; None where there is none."""
    found = nvidia_smi()
    if found is None:
        return None
    name, driver, cuda = found
    why = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
    wheel = next(wheel for least, wheel in WHEELS if cuda >= least)
    return (
        f"nvidia-smi finds {name} (driver {driver}), which this torch cannot use ({torch.__version__},"
        f" {why}). One that can: pip install --force-reinstall torch --index-url"
        f" https://download.pytorch.org/whl/{wheel}"
    )
