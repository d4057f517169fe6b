"""Launchers: the shipped configurations are accelerate's, and those that would cut the base into shards are refused."""

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from transformers import TrainingArguments

from goose_lora.launch import require_all_processes, require_ddp
from goose_lora.loading import ModelArguments
from goose_lora.stages import begin

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "recipes" / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_is_one_of_accelerates(path):
    config = load_config_from_file(str(path))
    wanted = {"one_gpu": ("NO", 1, 1), "several_gpus": ("MULTI_GPU", 1, 2), "two_machines": ("MULTI_GPU", 2, 4)}[path.stem]
    assert (str(config.distributed_type.value), config.num_machines, config.num_processes) == wanted
    assert config.mixed_precision == "no" and not config.use_cpu


@pytest.mark.parametrize(("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")])
def test_shards_of_a_quantized_base_are_refused_with_the_way_out(variable, name, monkeypatch, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    require_ddp(args, "nf4", roles=True)
    monkeypatch.setenv(variable, "true")
    for roles in (True, False):
        with pytest.raises(ValueError, match=rf"^{name}: a base in nf4 cannot be cut .*several_gpus\.yaml"):
            require_ddp(args, "nf4", roles=roles)
    with pytest.raises(ValueError, match=rf"^{name}: policy, critic, reward model and reference are adapters on one base"):
        require_ddp(args, "none", roles=True)
    require_ddp(args, "none", roles=False)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_one_process_where_several_were_asked_for_is_refused_with_the_way_out(processes, monkeypatch):
    """The environment is what accelerate's launcher makes of the command."""
    parser = launch_command_parser()
    _, environment = prepare_simple_launcher_cmd_env(parser.parse_args(["--cpu", "--num_processes", processes, "--num_machines", "1", "recipes/ppo.py"]))
    for name in ("ACCELERATE_USE_CPU", "MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
        if name in environment:
            monkeypatch.setenv(name, environment[name])
    if processes == "1":
        return require_all_processes()
    with pytest.raises(ValueError, match=r"asked for several processes and started one.*torchrun --nproc_per_node 2"):
        require_all_processes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    require_all_processes()


def test_shards_by_a_setting_are_refused_too(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    args.fsdp = "full_shard"
    with pytest.raises(ValueError, match=r"^FSDP: "):
        require_ddp(args, "nf4", roles=True)


def test_a_stage_begins_at_its_seed_whatever_was_drawn_before(tmp_path):
    """Fresh adapters are made before Trainer sets the seed: without this they were those of the process."""

    def drawn(seed, ambient):
        torch.manual_seed(ambient)
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], seed=seed)
        assert begin("sft", args, ModelArguments("base")) is None
        return torch.rand(3)

    assert torch.equal(drawn(0, 5), drawn(0, 6)) and not torch.equal(drawn(0, 5), drawn(1, 5))
