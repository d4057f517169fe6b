"""Launchers: the shipped configurations are accelerate's, and those that would cut the base into
shards are refused."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import tiny_runs
import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import TrainingArguments

from goose_lora.cli.stage import Stage
from goose_lora.data.rows import DataArguments
from goose_lora.errors import UserError
from goose_lora.models.arguments import ModelArguments
from goose_lora.ppo.trainer import PPOTrainer
from goose_lora.training.launch import require_all_processes, require_ddp, require_one_process

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_is_one_of_accelerates(path):
    config = load_config_from_file(str(path))
    wanted = {
        "one_gpu": ("NO", 1, 1),
        "several_gpus": ("MULTI_GPU", 1, 2),
        "two_machines": ("MULTI_GPU", 2, 4),
    }[path.stem]
    assert (str(config.distributed_type.value), config.num_machines, config.num_processes) == wanted
    assert config.mixed_precision == "no" and not config.use_cpu
    assert config.gpu_ids == ("0" if path.stem == "one_gpu" else "all")


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_shards_of_a_quantized_base_are_refused_with_the_way_out(variable, name, monkeypatch, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    require_ddp(args, "nf4", roles=True)
    monkeypatch.setenv(variable, "true")
    for roles in (True, False):
        with pytest.raises(ValueError, match=rf"^{name}: a base in nf4 cannot be cut .*several_gpus\.yaml"):
            require_ddp(args, "nf4", roles=roles)
    with pytest.raises(
        ValueError, match=rf"^{name}: policy, critic, reward model and reference are adapters on one base"
    ):
        require_ddp(args, "none", roles=True)
    require_ddp(args, "none", roles=False)


def test_one_process_where_several_were_asked_for_is_refused_with_the_way_out(tmp_path, monkeypatch):
    """By accelerate's own launcher, of a script that asks."""
    script = tmp_path / "ask.py"
    launch_module = str(ROOT / "goose_lora" / "training" / "launch.py")
    ask = f"runpy.run_path({launch_module!r})['require_all_processes']"
    script.write_text(f"import runpy, types; {ask}(types.SimpleNamespace(world_size=1, n_gpu=1))")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_machines",
        "1",
        "--num_processes",
    ]
    # With --cpu, and without it where there are not as many GPUs
    without = [word for word in launch if word != "--cpu"]
    one, two, two_without = (
        subprocess.run(
            [*words, number, str(script)],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=120,
        )
        for words, number in ((launch, "1"), (launch, "2"), (without, "2"))
    )
    assert one.returncode == 0, one.stderr
    for refused in (two, two_without):
        assert refused.returncode == 1
        assert "asked for several processes and started one" in refused.stderr
        assert "--use_cpu true" in refused.stderr
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="started one"):
        require_all_processes(SimpleNamespace(world_size=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    require_all_processes(SimpleNamespace(world_size=2, n_gpu=1))


def test_one_process_that_sees_several_gpus_is_refused_with_both_ways_out():
    require_all_processes(SimpleNamespace(world_size=1, n_gpu=1))
    with pytest.raises(
        ValueError,
        match=r"^one process sees 3 GPUs.*CUDA_VISIBLE_DEVICES=0.*several_gpus\.yaml --num_processes 3",
    ):
        require_all_processes(SimpleNamespace(world_size=1, n_gpu=3))


def test_a_trainer_of_ones_own_that_sees_several_gpus_is_refused_too(tmp_path):
    args = tiny_runs.config(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"^one process sees 2 GPUs"):
        PPOTrainer(
            tiny_runs.fresh(),
            args,
            tiny_runs.prompt_rows(),
            tiny.tokenizer(),
            reward_function=tiny_runs.even_share,
        )


def test_processes_that_would_train_each_alone_are_refused(tmp_path, monkeypatch):
    """On a machine without a GPU, transformers takes several launched processes for several runs
    unless use_cpu is on."""
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[])
    monkeypatch.setenv("WORLD_SIZE", "2")
    require_all_processes(args)  # some clouds set it for all of their machines
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match=r"^2 processes .* alone.*--use_cpu true"):
        Stage.begin("sft", args, ModelArguments("never loaded"), DataArguments("rows.jsonl"))


def test_evaluation_is_one_process(tmp_path):
    """Two would each answer all prompts and write over each other's files. By accelerate's own
    launcher, which names the one line of a process."""
    require_one_process("recipes/evaluate.py")
    several = [
        "--config_file",
        str(CONFIGS[0].parent / "several_gpus.yaml"),
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    settings = ["--policy_adapter", "runs/none", "--output_dir", str(tmp_path / "out")]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *several,
        "recipes/evaluate.py",
        "--model_name_or_path",
        "base",
        *settings,
    ]
    ended = subprocess.run(
        [*launch, "--dataset_name", "prompts.jsonl"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode != 0 and "--num_processes 1 recipes/evaluate.py" in ended.stderr + ended.stdout
    assert "2 processes were launched" in ended.stderr + ended.stdout and not (tmp_path / "out").exists()


def test_shards_by_a_setting_are_refused_too(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    args.fsdp = "full_shard"
    with pytest.raises(ValueError, match=r"^FSDP: "):
        require_ddp(args, "nf4", roles=True)


def test_a_stage_begins_at_its_seed_whatever_was_drawn_before(tmp_path):
    """Fresh adapters are made before Trainer sets the seed: without this they were those of the
    process."""

    def drawn(seed, ambient):
        torch.manual_seed(ambient)
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], seed=seed)
        begun = Stage.begin("sft", args, ModelArguments("base"), DataArguments("rows.jsonl"))
        assert begun.checkpoint is None
        return torch.rand(3)

    assert torch.equal(drawn(0, 5), drawn(0, 6)) and not torch.equal(drawn(0, 5), drawn(1, 5))


def test_shards_have_no_loss_scale_for_float16(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    require_ddp(args, "none", roles=False, dtype="bfloat16")
    with pytest.raises(UserError, match=r"FSDP: dtype: float16 needs a loss scale.*DistributedDataParallel"):
        require_ddp(args, "none", roles=False, dtype="float16")
