"""Settings from YAML and command line, and how bad input ends."""

import runpy
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from goose_lora import cli
from goose_lora.cli import process
from goose_lora.data.rows import DataArguments
from goose_lora.models.arguments import ModelArguments
from goose_lora.ppo.config import PPOConfig

ROOT = Path(__file__).resolve().parents[2]
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
    ("text", "message"),
    [
        ("- a\n", "expected lines of the form"),
        ("a: [", "not a YAML file"),
        ("", "expected lines of the form"),
    ],
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


def test_bf16_without_a_gpu_is_answered_with_the_setting_for_the_cpu(tmp_path):
    from trl import SFTConfig

    with pytest.raises(ValueError, match=r"^bf16: torch finds no GPU\. .*--use_cpu true"):
        cli.parse(SFTConfig, args=["--output_dir", str(tmp_path), "--bf16", "true"])


@pytest.mark.parametrize(
    ("recipe", "types"),
    [
        ("sft", "SFTConfig, ModelArguments, DataArguments, StartArguments"),
        ("reward", "RewardConfig, ModelArguments, RewardArguments"),
        ("ppo", "PPOConfig, ModelArguments, DataArguments, RoleArguments"),
        ("evaluate", "EvaluationArguments, ModelArguments, DataArguments"),
    ],
)
@pytest.mark.parametrize("mapping", ["{q: prompt, a: b}", "[q=prompt, a=b]"])
def test_every_recipe_takes_a_column_mapping_from_yaml_and_from_the_command_line(
    recipe, types, mapping, tmp_path
):
    names = runpy.run_path(str(RECIPES / f"{recipe}.py"))
    config = (RECIPES / "configs" / "demo_cpu" / f"{recipe}.yaml").read_text()
    path = write(tmp_path / "c.yaml", f"{config}\ncolumn_mapping: {mapping}\n")
    parser = [names[name] for name in types.split(", ")]
    assert cli.parse(*parser, args=["--config", path])[2].column_mapping == ["q=prompt", "a=b"]
    assert cli.parse(*parser, args=["--config", path, "--column_mapping", "x=prompt", "y=b"])[
        2
    ].column_mapping == ["x=prompt", "y=b"]


def test_a_column_mapping_of_another_form_is_refused_when_parsed():
    with pytest.raises(ValueError, match="'prompt' is not of the form FROM=TO"):
        cli.parse(DataArguments, args=["--dataset_name", "x.jsonl", "--column_mapping", "prompt"])


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo", "evaluate"])
def test_every_recipe_renames_columns_and_names_those_found_before_any_model_is_loaded(
    recipe, tmp_path, monkeypatch
):
    path = write(tmp_path / "rows.jsonl", '{"prompt": "ba"}\n')
    monkeypatch.setattr("goose_lora.models.folders.AdapterFolder.open", lambda *args, **kwargs: None)
    main = runpy.run_path(str(RECIPES / f"{recipe}.py"))["main"]
    arguments = [
        "--model_name_or_path",
        "no/such/model",
        "--dataset_name",
        path,
        "--output_dir",
        str(tmp_path / "out"),
        "--column_mapping",
        "q=prompt",
    ]
    arguments += {
        "sft": ["--use_cpu", "True"],
        "reward": ["--use_cpu", "True", "--eval_dataset_name", path],
        "ppo": ["--use_cpu", "True", "--reward_function", "goose_lora.demo:vader"],
        "evaluate": ["--policy_adapter", str(tmp_path / "policy")],
    }[recipe]
    with pytest.raises(
        ValueError, match=r"column_mapping q=prompt: there is no column q\. There are prompt\."
    ):
        main(arguments)


def data_command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["goose-lora", "data", *arguments])
    cli.main()
    return capsys.readouterr().out


def test_the_data_command_shows_rows_with_the_tokenizer_of_a_folder(monkeypatch, capsys, tmp_path, tiny_base):
    path = write(tmp_path / "rows.csv", "question,answer\nba, be\nbi,\n")
    shown = data_command(
        monkeypatch,
        capsys,
        path,
        "--tokenizer",
        tiny_base,
        "--column_mapping",
        "question=prompt",
        "answer=completion",
    )
    assert shown.startswith(f"{path}: 2 rows, columns prompt, completion\n")
    assert "  prompt  <s> ba\n" in shown
    assert "1 of 2 rows left out:\n  1  completion is empty: row 2\n" in shown
    shown = data_command(
        monkeypatch, capsys, path, "--stage", "ppo", "--max_rows", "1", "--column_mapping", "question=prompt"
    )
    assert "1 row, columns prompt, answer" in shown and "ppo     yes (shown below)" in shown


def test_the_data_command_answers_a_malformed_row_in_one_line(monkeypatch, capsys, tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"prompt": [{"role": "narrator", "content": "ba"}]}\n')
    with pytest.raises(SystemExit) as end:
        data_command(monkeypatch, capsys, path)
    assert end.value.code == 2
    assert f"error: {path}: row 1: prompt: message 1 has the role 'narrator'" in capsys.readouterr().err


def run(*command):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)


def test_bad_input_ends_in_one_line_and_exit_code_2_before_any_model_is_loaded():
    done = run(
        str(RECIPES / "ppo.py"), "--config", str(RECIPES / "configs/demo_cpu/ppo.yaml"), "--kl_coeff", "0.1"
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors == ["error: unknown setting 'kl_coeff'. Did you mean kl_coef?"]


def test_debug_shows_the_traceback():
    done = run(str(RECIPES / "ppo.py"), "--config", "nowhere.yaml", "--debug")
    assert done.returncode == 2 and "Traceback" in done.stderr


BUGS = [ZeroDivisionError("division"), KeyError("name"), ValueError("plain"), OSError("unforeseen")]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
def test_a_bug_shows_its_traceback_and_asks_for_a_report(bug, monkeypatch, capsys):
    def broken(*arguments):
        raise bug

    monkeypatch.setattr("goose_lora.cli.stage.require_all_processes", broken)
    config = str(RECIPES / "configs/demo_cpu/sft.yaml")
    monkeypatch.setattr(sys, "argv", ["sft.py", "--config", config, "--model_name_or_path", "no/model"])
    with pytest.raises(type(bug)) as end:
        cli.command(runpy.run_path(str(RECIPES / "sft.py"))["main"])()
    shown = "".join(traceback.format_exception(end.value))
    assert "in broken" in shown and shown.splitlines()[-1] == process.REPORT
    assert capsys.readouterr().err == ""


def test_a_bug_ends_a_process_with_its_traceback_the_report_line_and_exit_code_1():
    code = "from goose_lora.cli.process import command; command(lambda: 1 / 0)()"
    done = run("-c", code)
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-2:] == ["ZeroDivisionError: division by zero", process.REPORT]


def test_an_error_of_the_users_asks_for_no_report(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["goose-lora", "data", "nowhere.jsonl"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in printed and process.REPORT not in printed


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda folder: folder / ("x" * 400), "File name too long. Give a shorter one."),
        (lambda folder: folder / "loop", "Too many levels of symbolic links. Mend the link"),
        (lambda folder: folder / "file" / "rows", "Not a directory. A part of its path is a file."),
    ],
)
def test_a_name_that_the_system_does_not_take_is_no_bug(made, says, tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        cli.command(lambda: made(tmp_path).open())()
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert says in printed and printed.count("error:") == 1 and process.REPORT not in printed


def test_an_interrupt_ends_with_130_and_no_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        cli.command(interrupted)()
    assert end.value.code == 130
    assert "Stopped" in capsys.readouterr().err


def test_telemetry_is_off_by_default():
    done = run(
        "-c",
        "from goose_lora import cli; cli.quiet_libraries(); import huggingface_hub.constants as c;"
        " print(c.HF_HUB_DISABLE_TELEMETRY)",
    )
    assert done.stdout.strip() == "True"
