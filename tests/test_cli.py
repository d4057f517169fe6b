"""Settings from YAML and command line, and how bad input ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from goose_lora import cli
from goose_lora.data import DataArguments
from goose_lora.loading import ModelArguments
from goose_lora.ppo_config import PPOConfig

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"


def write(path, text):
    path.write_text(text)
    return str(path)


def test_the_command_line_wins_over_the_file(tmp_path):
    path = write(tmp_path / "c.yaml", "model_name_or_path: a\nlora_r: 4\nlora_alpha: 8\n")
    arguments = cli.parse(ModelArguments, args=["--config", path, "--lora_r", "6"])
    assert (arguments.model_name_or_path, arguments.lora_r, arguments.lora_alpha) == ("a", 6, 8)


def test_a_typo_in_the_file_names_the_nearest_setting(tmp_path):
    path = write(tmp_path / "c.yaml", "model_name_or_path: a\nlora_rank: 4\nlora_alhpa: 8\n")
    with pytest.raises(ValueError, match=r"unknown setting 'lora_rank'\. Did you mean lora_r"):
        cli.parse(ModelArguments, args=["--config", path])


def test_a_typo_on_the_command_line_names_the_nearest_setting():
    with pytest.raises(ValueError, match=r"unknown setting 'kl_coeff'\. Did you mean kl_coef\?"):
        cli.parse(PPOConfig, args=["--output_dir", "x", "--kl_coeff", "0.1"])


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n", "expected lines of the form"), ("a: [", "not a YAML file"), ("", "expected lines of the form")]
)
def test_a_file_that_is_no_mapping_says_so(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        cli.parse(ModelArguments, args=["--config", write(tmp_path / "c.yaml", text)])


def test_a_missing_file_and_a_missing_value_say_so():
    with pytest.raises(ValueError, match="no such file"):
        cli.parse(ModelArguments, args=["--config", "nowhere.yaml"])
    with pytest.raises(ValueError, match="--config needs a file"):
        cli.parse(ModelArguments, args=["--config"])


def test_a_required_setting_that_is_missing_is_named():
    with pytest.raises(ValueError, match="dataset_name"):
        cli.parse(DataArguments, args=[])


def run(*command):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)


def test_bad_input_ends_in_one_line_and_exit_code_2_before_any_model_is_loaded():
    done = run(str(RECIPES / "ppo.py"), "--config", str(RECIPES / "configs/demo_cpu/ppo.yaml"), "--kl_coeff", "0.1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors == ["error: unknown setting 'kl_coeff'. Did you mean kl_coef?"]


def test_debug_shows_the_traceback():
    done = run(str(RECIPES / "ppo.py"), "--config", "nowhere.yaml", "--debug")
    assert done.returncode == 2 and "Traceback" in done.stderr


def test_an_interrupt_ends_with_130_and_no_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        cli.command(interrupted)()
    assert end.value.code == 130
    assert "Stopped" in capsys.readouterr().err


def test_telemetry_is_off_by_default():
    done = run("-c", "from goose_lora import cli; cli.quiet_libraries(); import huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)")
    assert done.stdout.strip() == "True"
