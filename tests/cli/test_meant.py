"""Settings mean what is written: numbers, text and names, in a file and on the command line. A
terminal shows what people and models wrote, and obeys none of it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from trl import SFTConfig

from goose_lora import cli
from goose_lora.cli import commands
from goose_lora.cli.yaml_settings import read_config
from goose_lora.errors import printable
from goose_lora.models.arguments import ModelArguments
from goose_lora.ppo.config import PPOConfig

ROOT = Path(__file__).resolve().parents[2]


def settings(tmp_path, text, *words):
    """What a file and words make of PPO's settings."""
    config = tmp_path / "config.yaml"
    config.write_text(text)
    return cli.parse(
        PPOConfig,
        args=["--config", str(config), "--output_dir", str(tmp_path / "run"), "--use_cpu", "true", *words],
    )


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("010", 10),
        ("0100", 100),
        ("-012", -12),
        ("0o10", 8),
        ("0x1F", 31),
        ("+5", 5),
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-1e-4", -1e-4),
        (".5", 0.5),
        ("5.", 5.0),
        ("1:30", "1:30"),
        ("190:20:30", "190:20:30"),
        ("no", "no"),
        ("Off", "Off"),
        ("yes", "yes"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("2020-01-01", "2020-01-01"),
        ("1.2.3", "1.2.3"),
        ("'010'", "010"),
        ("[010, no]", [10, "no"]),
    ],
)
def test_a_value_of_yaml_is_what_it_looks_like(tmp_path, text, means):
    (tmp_path / "x.yaml").write_text(f"a: {text}\n")
    got = read_config(str(tmp_path / "x.yaml"))["a"]
    assert got == means and type(got) is type(means)


def test_words_that_yaml_once_took_for_false_are_the_settings_own(tmp_path):
    config = settings(
        tmp_path, "save_strategy: no\nrun_name: on\nlogging_first_step: yes\nnum_rollouts: 010\n"
    )
    assert (config.save_strategy, config.run_name, config.logging_first_step) == ("no", "on", True)
    assert config.num_rollouts == 10


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["b.yaml", "a.yml", "c.txt"], "Give one of the files in it: a.yml, b.yaml."),
        ([], "It has no .yaml file."),
    ],
)
def test_a_folder_in_place_of_a_file_is_told_with_the_files_in_it(tmp_path, files, says, monkeypatch, capsys):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ValueError) as refused:
        read_config(str(tmp_path))
    assert str(refused.value) == f"--config {tmp_path}: a folder, not a file. {says}"
    monkeypatch.setattr(sys, "argv", ["goose-lora", "plan", "--config", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert f"a folder, not a file. {says}" in capsys.readouterr().err


def test_the_command_that_recipes_copy_prints_names_a_file_that_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["goose-lora", "recipes", "copy", str(tmp_path / "my recipes")])
    cli.main()
    *_, script, option = shlex.split(capsys.readouterr().out)
    assert (script, option) == (str(tmp_path / "my recipes" / "ppo.py"), "--help")
    assert Path(script).is_file()


def test_a_file_behind_an_equals_sign_is_read(tmp_path):
    (tmp_path / "c.yaml").write_text("kl_coef: 0.125\n")
    words = [f"--config={tmp_path / 'c.yaml'}", f"--output_dir={tmp_path / 'run'}", "--use_cpu", "true"]
    assert cli.parse(PPOConfig, args=[*words, "--num_rollouts", "1"]).kl_coef == 0.125


def test_a_negative_number_with_an_exponent_is_a_number(tmp_path):
    with pytest.raises(ValueError, match=r"learning_rate=-0\.0001: must not be negative"):
        settings(tmp_path, "num_rollouts: 1\n", "--learning_rate", "-1e-4")
    with pytest.raises(ValueError, match=r"--temperature -0\.0001: must be a number above 0"):
        commands.COMMANDS["chat"](commands.command_line().parse_args(["chat", "x", "--temperature", "-1e-4"]))


@pytest.mark.parametrize("word", ["--learning_rat", "--learn", "--kl_co", "--num_roll", "--output"])
@pytest.mark.parametrize("form", ["{} 1", "{}=1"])
def test_the_beginning_of_a_name_is_no_name(tmp_path, word, form):
    with pytest.raises(ValueError, match=rf"unknown setting '{word[2:]}'\. Did you mean \w+\?"):
        settings(tmp_path, "num_rollouts: 1\n", *form.format(word).split())


def test_whole_names_with_dashes_or_no_before_them_are_known(tmp_path):
    config = settings(tmp_path, "num_rollouts: 1\n", "--learning-rate=1e-3", "--kl-coef", "0.5")
    assert (config.learning_rate, config.kl_coef) == (1e-3, 0.5)


def test_the_environment_of_a_file_is_set_as_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("GOOSE_A", "before")
    monkeypatch.setenv("GOOSE_B", "before")
    settings(tmp_path, "env: {GOOSE_A: no, GOOSE_B: 010}\nnum_rollouts: 1\n")
    assert (os.environ["GOOSE_A"], os.environ["GOOSE_B"]) == ("no", "10")


# The launcher's own precision


@pytest.mark.parametrize("launched_with", ["fp16", "bf16", "fp8"])
@pytest.mark.parametrize("kind", [PPOConfig, SFTConfig])
def test_mixed_precision_of_the_launcher_against_the_recipes_is_named(
    tmp_path, monkeypatch, launched_with, kind
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched_with)
    words = ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true", "--bf16", "false"]
    words += ["--num_rollouts", "1"] if kind is PPOConfig else []
    with pytest.raises(
        ValueError, match=rf"mixed_precision {launched_with} .*Launch with --mixed_precision no"
    ):
        cli.parse(kind, ModelArguments, args=[*words, "--model_name_or_path", "x"])


@pytest.mark.parametrize(("launched_with", "bf16"), [("no", "false"), ("no", "true"), ("bf16", "true")])
def test_a_launcher_that_says_the_same_or_nothing_is_let_through(tmp_path, monkeypatch, launched_with, bf16):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched_with)
    words = ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true", "--bf16", bf16]
    assert cli.parse(SFTConfig, args=words).bf16 is (bf16 == "true")


# Control characters

NASTY = "a\x1b[31mred\x1b]0;title\x07\r\x08\x9b2J\u202eright\u2066\x00\u200b\tb"


def test_what_could_move_the_cursor_is_escaped_and_spaces_of_other_scripts_are_not():
    shown = printable(NASTY)
    assert shown.isprintable() and shown.startswith("a\\x1b[31mred")
    assert printable("一\u3000二\xa0three\n", keep="\n") == "一\u3000二\xa0three\n"


PRINTS = """
import sys
from goose_lora import cli
from goose_lora.cli import commands
from goose_lora.errors import UserError
def bad(): raise UserError(NASTY)
def bug(): raise RuntimeError(NASTY)
NASTY = sys.argv.pop().encode().decode("unicode_escape")
cli.command({"bad": bad, "bug": bug, "data": commands._main}[sys.argv.pop(1)])()
"""


@pytest.mark.parametrize("how", [["bad"], ["bad", "--debug"], ["bug"], ["data", "data", "{file}"]])
def test_no_control_character_reaches_the_terminal(tmp_path, how):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "\\u001b[31m \\u009b2J \\u202e", "a\\u001b]0;x\\u0007": 1}\n' * 3)
    words = [word.format(file=rows) for word in how]
    escaped = NASTY.replace("\x00", "").encode("unicode_escape").decode()
    done = subprocess.run(
        [sys.executable, "-c", PRINTS, *words, escaped], capture_output=True, timeout=200, cwd=ROOT
    )
    said = (done.stdout + done.stderr).decode()
    assert "\\x1b" in said or "\\u001b" in said, said
    assert {char for char in said if not char.isprintable()} <= {"\n", "\t"}, repr(said)
    assert "(not recorded)" not in said, "nothing of it is a secret"


def test_a_reply_with_control_characters_is_escaped_in_the_terminal(capsys):
    from goose_lora.apps import chat

    chat._to_stdout(NASTY + "\n")
    assert {char for char in capsys.readouterr().out if not char.isprintable()} == {"\n", "\t"}
