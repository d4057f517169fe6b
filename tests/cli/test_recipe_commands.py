"""The recipes as commands of an installed package, without a checkout."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest
import tiny
from recipe_runs import ROOT

from goose_lora.cli import recipes
from goose_lora.cli.process import continuing
from goose_lora.errors import UserError
from goose_lora.files import read_json, read_jsonl
from goose_lora.training import checkpoints

TRAIN = {
    "quantization": "none",
    "dtype": "float32",
    "lora_r": 3,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel's content in a folder of its own, which stands before the checkout in sys.path."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".venv*", ".git", "runs", "tests", "docs", "__pycache__", "site"),
    )
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", folder, source], check=True, timeout=240)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    shutil.rmtree(source)
    return folder / "site"


def goose_lora(installed, folder, *words, code=0):
    done = subprocess.run(
        [sys.executable, "-c", "from goose_lora.cli import main; main()", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(installed), "ACCELERATE_USE_CPU": "true"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == code, done.stderr + done.stdout
    return done


def options(**settings):
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def test_the_wheel_holds_every_recipe_configuration_and_notebook(installed):
    kinds = (".py", ".yaml", ".ipynb")
    every = [path for path in (ROOT / "recipes").rglob("*") if path.suffix in kinds]
    here = {path.relative_to(ROOT / "recipes") for path in every}
    folder = installed / "goose_lora" / "recipes"
    assert {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} == here


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stage_is_trained_from_the_installed_package(installed, tmp_path, processes):
    base = tiny.save_base(tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "texts.jsonl", tiny.texts(16))
    settings = options(model_name_or_path=base, dataset_name=rows, output_dir="sft", **TRAIN)
    goose_lora(installed, tmp_path, "sft", *settings, "--num_processes", processes)
    assert (tmp_path / "sft" / "adapter_model.safetensors").is_file()
    command = read_json(tmp_path / "sft" / "goose_lora.json")["command"]
    assert command.startswith(f"goose-lora sft --num_processes {processes} --model_name_or_path ")
    # As many as were asked for have trained: two steps of four rows each, of sixteen
    last = read_jsonl(tmp_path / "sft" / "metrics.jsonl")[-1]
    assert last["epoch"] == 2 * 4 * processes / 16


def test_sigterm_of_the_command_reaches_the_recipe_which_saves(installed, tmp_path):
    base = tiny.save_base(tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "texts.jsonl", tiny.texts(16))
    settings = options(model_name_or_path=base, dataset_name=rows, output_dir="sft", **TRAIN)
    words = ["sft", *settings, "--max_steps", 100_000]
    command = [sys.executable, "-c", "from goose_lora.cli import main; main()", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(installed), "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(
        command,
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            for line in process.stdout:
                if line.strip().startswith("2/100000"):
                    break
            process.terminate()  # this process alone, as docker stop does
            said = process.stdout.read()
            assert process.wait(120) == 143, said
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert "Stopped by SIGTERM; saved in" in said and "Continue with: goose-lora sft" in said
    assert "Traceback" not in said
    assert checkpoints.newest(tmp_path / "sft")[0] is not None


def test_bad_input_of_a_recipe_ends_in_its_line_and_its_exit_code(installed, tmp_path):
    done = goose_lora(installed, tmp_path, "ppo", "--config", "demo_cpu/ppo", "--kl_coeff", "0.1", code=2)
    assert "error: unknown setting 'kl_coeff'. Did you mean kl_coef?" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_configuration_is_answered_with_those_there_are(installed, tmp_path):
    done = goose_lora(installed, tmp_path, "reward", "--config", "consumer/reward", code=2)
    assert "error: --config consumer/reward: no such file, nor a configuration" in done.stderr
    assert "consumer_gpu/reward" in done.stderr


def test_recipes_are_copied_once(installed, tmp_path):
    goose_lora(installed, tmp_path, "recipes", "copy", "mine")
    assert (tmp_path / "mine" / "ppo.py").read_text() == (ROOT / "recipes" / "ppo.py").read_text()
    assert (tmp_path / "mine" / "configs" / "demo_cpu" / "sft.yaml").is_file()
    done = goose_lora(installed, tmp_path, "recipes", "copy", "mine", code=2)
    assert "is there already" in done.stderr


def test_words_of_the_launcher_are_told_from_those_of_the_recipe():
    words = "--num_processes 2 --config demo_cpu/ppo --kl_coef 0.1 --gpu_ids=0,1 --seed 3"
    launcher, settings = recipes.split_words(words.split())
    assert launcher == ["--num_processes", "2", "--gpu_ids", "0,1"]
    file = str(ROOT / "recipes" / "configs" / "demo_cpu" / "ppo.yaml")
    assert settings == ["--config", file, "--kl_coef", "0.1", "--seed", "3"]


@pytest.mark.parametrize("words", ["--num_processes", "--seed 1 --config", "--config="])
def test_an_option_without_a_value_is_named(words):
    with pytest.raises(UserError, match=r"needs a value"):
        recipes.split_words(words.split())


def test_a_stopped_run_names_the_command_that_continues_it(monkeypatch):
    monkeypatch.setenv("GOOSE_LORA_COMMAND", "goose-lora ppo --num_processes 2")
    monkeypatch.setattr(sys, "argv", ["/somewhere/recipes/ppo.py", "--config", "a b.yaml"])
    want = ["goose-lora", "ppo", "--num_processes", "2", "--config", "a b.yaml"]
    assert shlex.split(continuing()) == [*want, "--resume_from_checkpoint", "latest"]


def test_env_prints_what_a_report_needs(monkeypatch, capsys):
    from goose_lora.cli import main

    monkeypatch.setattr(sys, "argv", ["goose-lora", "env"])
    main()
    shown = capsys.readouterr().out
    for name in (
        "python",
        "torch",
        "transformers",
        "peft",
        "trl",
        "system",
        "CPU",
        "memory",
        "CUDA of torch",
    ):
        assert name in shown


def test_a_copy_of_the_recipes_that_was_cut_off_is_completed_and_a_strangers_file_is_kept(
    tmp_path, monkeypatch
):
    copied, copy = [], shutil.copyfile

    def killed(source, target):
        if len(copied) == 5:
            target.write_text("half")
            raise KeyboardInterrupt
        copied.append(target)
        return copy(source, target)

    monkeypatch.setattr(recipes.shutil, "copyfile", killed)
    with pytest.raises(KeyboardInterrupt):
        recipes.copy_recipes(tmp_path / "mine")
    monkeypatch.setattr(recipes.shutil, "copyfile", copy)
    files = recipes.copy_recipes(tmp_path / "mine")
    source = recipes.recipes_folder()
    assert len(files) > 20
    assert all(
        file.read_bytes() == (source / file.relative_to(tmp_path / "mine")).read_bytes() for file in files
    )
    assert {path for path in (tmp_path / "mine").rglob("*") if path.is_file()} == set(files)
    files[3].write_text("mine now")
    with pytest.raises(UserError, match="is there already"):
        recipes.copy_recipes(tmp_path / "mine")
    assert files[3].read_text() == "mine now"
