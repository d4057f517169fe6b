"""The first lines of a run: what it computes on and why, on machines that are made up."""

import subprocess
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from trl import SFTConfig

from goose_lora.cli.stage import Stage
from goose_lora.data.rows import DataArguments
from goose_lora.errors import UserError
from goose_lora.models.arguments import ModelArguments, usable_dtype
from goose_lora.ownership import release
from goose_lora.training import hardware

INDEX = "https://download.pytorch.org/whl"
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """Make up a machine: what torch and nvidia-smi find."""

    built = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]

    def make(smi=None, capability=(8, 6), name="NVIDIA GeForce RTX 3060", cuda="12.6", hip=None, archs=built):
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)
        card = SimpleNamespace(name=name, major=capability[0], minor=capability[1])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (11 * 10**9, 12 * 10**9))
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(hardware.shutil, "which", lambda program: smi and f"/usr/bin/{program}")

        def run(command, **options):
            if isinstance(smi, Exception):
                raise smi
            # Older ones know no capability
            asked = command[1].count(",") + 1
            if smi and len(smi.splitlines()[0].split(",")) < asked:
                raise subprocess.CalledProcessError(2, command)
            return SimpleNamespace(stdout=smi)

        monkeypatch.setattr(hardware.subprocess, "run", run)

    return make


def test_a_card_is_named_with_memory_capability_driver_and_dtype(machine):
    machine(smi="NVIDIA GeForce RTX 3060, 550.54.14\n")
    (line,) = hardware.device_lines(CUDA, "bfloat16", asked_for_cpu=False)
    assert line == (
        "device: cuda:0 (the first that torch finds), NVIDIA GeForce RTX 3060, capability 8.6, 11.0 of 12.0"
        " GB free, driver 550.54.14, CUDA 12.6; dtype: bfloat16, as the settings say"
    )


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_a_card_that_emulates_bfloat16_computes_in_float16(machine, capability):
    machine(capability=capability, name="Tesla T4")
    first, second = hardware.device_lines(CUDA, "bfloat16", asked_for_cpu=False)
    assert first.endswith("dtype: float16, in place of bfloat16")
    assert second.startswith("Tesla T4 has no instructions for bfloat16") and "float16 it is" in second
    assert usable_dtype(ModelArguments("base"), CUDA).dtype == "float16"
    # What was asked for is what there is, where the card can
    for dtype in ("float16", "float32"):
        assert len(hardware.device_lines(CUDA, dtype, asked_for_cpu=False)) == 1
        assert usable_dtype(ModelArguments("base", dtype=dtype), CUDA).dtype == dtype


@pytest.mark.parametrize(("capability", "hip"), [((8, 0), None), ((12, 0), None), ((7, 0), "6.4")])
def test_other_cards_keep_bfloat16(machine, capability, hip):
    machine(capability=capability, hip=hip)
    assert usable_dtype(ModelArguments("base"), CUDA).dtype == "bfloat16"
    assert usable_dtype(ModelArguments("base"), CPU).dtype == "bfloat16"


def test_a_stage_on_an_older_card_has_float16_in_all_that_it_passes_on(machine, tmp_path):
    """Though bf16 is on, as TRL and the shipped configurations have it."""
    machine(capability=(7, 5), name="Tesla T4")
    config = SFTConfig(output_dir=str(tmp_path / "sft"), bf16=True, use_cpu=True, report_to="none")
    vars(config)["_n_gpu"] = 1
    with patch.object(SFTConfig, "device", CUDA):
        stage = Stage.begin("sft", config, ModelArguments("org/base"), DataArguments("rows.jsonl"))
    assert stage.model.dtype == "float16"
    assert (stage.config.bf16, stage.config.mixed_precision) == (False, "no")
    assert stage.trainer_config.bf16 is False
    release(tmp_path / "sft")


@pytest.mark.parametrize(
    ("driver", "capability", "wheel"),
    [
        ("550.54.14", "8.9", "cu126"),
        ("580.65.06", "8.9", "cu130"),
        ("580.65.06", "6.1", "cu126"),  # of which CUDA 13 has none
        ("580.65.06", "7.0", "cu126"),
        ("580.65.06", "12.0", "cu130"),
        ("550.54.14", None, "cu126"),
        ("580.65.06", None, "cu130"),
    ],
)
def test_a_card_that_torch_cannot_use_is_named_with_where_to_install_from(machine, driver, capability, wheel):
    line = ", ".join(["NVIDIA RTX 4070", driver, *([capability] if capability else [])])
    machine(smi=f"{line}\n{line}\n", cuda=None)
    first, second = hardware.device_lines(CPU, "float32", asked_for_cpu=False)
    assert first.startswith("device: cpu (torch finds no CUDA device)")
    assert f"NVIDIA RTX 4070 (driver {driver})" in second and "built without CUDA" in second
    assert second.endswith(f"One that can: pip install --force-reinstall torch --index-url {INDEX}/{wheel}")
    # Who asks for the CPU is not told of a card
    (line,) = hardware.device_lines(CPU, "float32", asked_for_cpu=True)
    assert "use_cpu says so" in line


def test_a_new_card_behind_an_old_driver_needs_another(machine):
    machine(smi="NVIDIA RTX 5070, 570.1, 12.0\n", cuda=None)
    _, line = hardware.device_lines(CPU, "float32", asked_for_cpu=False)
    assert "needs a driver of 580 or newer: update it, and pip install" in line and line.endswith("/cu130")


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((6, 1), ["sm_75", "sm_80", "sm_120", "compute_120"], False),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((7, 5), ["sm_75", "sm_80"], True),
        ((8, 9), ["sm_75", "sm_86"], True),
        ((8, 0), ["sm_75", "sm_86"], False),
        ((12, 0), ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"], False),
        ((12, 1), ["sm_90a", "compute_120"], True),
        ((9, 0), ["sm_90a"], True),
    ],
)
def test_a_card_that_this_torch_was_not_built_for_is_refused(machine, capability, archs, runs):
    machine(smi="A card, 580.1, 8.0\n", name="A card", capability=capability, archs=archs)
    if runs:
        hardware.require_supported(CUDA)
        return
    wheel = "cu130" if capability >= (7, 5) else "cu126"
    with pytest.raises(UserError, match=rf"A card, capability .* nothing that runs on it\. .*/whl/{wheel}$"):
        hardware.require_supported(CUDA)


@pytest.mark.parametrize(
    "smi", [None, "", "no devices were found", subprocess.TimeoutExpired("nvidia-smi", 10), OSError("gone")]
)
def test_without_a_card_or_with_a_broken_nvidia_smi_nothing_is_guessed(machine, smi):
    machine(smi=smi, cuda=None)
    (line,) = hardware.device_lines(CPU, "float32", asked_for_cpu=False)
    assert "torch finds no CUDA device" in line


def test_rocm_is_said_to_be_untried(machine):
    machine(cuda=None, hip="6.4", name="AMD Radeon RX 7900", capability=(11, 0))
    (line,) = hardware.device_lines(CUDA, "bfloat16", asked_for_cpu=False)
    assert "ROCm 6.4, not tried by anyone yet" in line


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_devices_are_refused_in_one_line(kind):
    with pytest.raises(UserError, match=f"device {kind}: not supported, .*use_cpu: true") as refused:
        hardware.require_supported(torch.device(kind))
    assert "\n" not in str(refused.value)
    hardware.require_supported(CPU)
