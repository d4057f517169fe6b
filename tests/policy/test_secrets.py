"""Secrets that are planted where users put them, by name, form or place: none is in what is
printed, in a traceback, or in what is kept."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from trl import SFTConfig

from goose_lora import cli, redaction
from goose_lora.cli import commands
from goose_lora.cli.process import continuing
from goose_lora.data.rows import DataArguments
from goose_lora.models.arguments import ModelArguments
from goose_lora.ppo.config import PPOConfig
from goose_lora.sharing import lineage
from goose_lora.training.signals import Stopped

ROOT = Path(__file__).resolve().parents[2]
SECRET = "Zq7plantedValue19"
SOUND = ["--model_name_or_path", "x", "--dataset_name", "y.jsonl", "--use_cpu", "true", "--bf16", "false"]


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """Nothing is known of the secret but what the case itself tells."""
    monkeypatch.setattr(redaction, "_known", set())
    monkeypatch.setenv("HF_TOKEN", "")


def printed(monkeypatch, capsys, main, words):
    """What a command prints that ends in an error of the user's, its first words apart."""
    monkeypatch.setattr(sys, "argv", ["sft.py", *words])
    with pytest.raises(SystemExit) as end:
        cli.command(main)()
    assert end.value.code == 2
    said = capsys.readouterr()
    assert "error: " in said.err
    return said.out + said.err


def parse():
    return cli.parse(SFTConfig, ModelArguments, DataArguments)


LINES = {
    "an abbreviation": ["--hub_tok", SECRET],
    "a shorter one": ["--hub_t", SECRET],
    "a shorter one with =": [f"--hub_t={SECRET}"],
    "the setting before another error": ["--hub_token", SECRET, "--learning_rate", "-1"],
    "with a dash and =": [f"--hub-token={SECRET}", "--learning_rate", "much"],
    "without dashes": [f"hub_token={SECRET}"],
    "a colon": [f"--hub_token:{SECRET}"],
    "a setting that is not there": ["--api_key", SECRET],
    "a value too many": ["--hub_token", "x", SECRET],
    "in place of a number": ["--learning_rate", "hf_" + SECRET],
    "in a setting with names": ["--model_init_kwargs", json.dumps({"token": SECRET})],
    "deep in one": ["--model_init_kwargs", json.dumps({"a": [{"apiKey": SECRET}]})],
    "in an address": ["--output_dir", f"https://me:{SECRET}@host/x", "--learning_rate", "-1"],
}


@pytest.mark.parametrize("words", LINES.values(), ids=LINES)
@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["", "debug"])
def test_a_secret_on_the_command_line_is_in_no_error_or_traceback(monkeypatch, capsys, words, debug):
    assert SECRET not in printed(monkeypatch, capsys, parse, [*SOUND, *words, *debug])


FILES = {
    "a list that does not close": "hub_token: [{}\nlearning_rate: 1\n",
    "an alias": "hub_token: *{}\n",
    "an alias on the next line": "hub_token:\n  *{}\n",
    "a tag": "hub_token: !{} x\n",
    "a quote that does not close": 'hub_token: "{}\n',
    "a sign that YAML does not know": "hub_token: @{}\n",
    "a list": "hub_token: [{}]\n",
    "a mapping": "hub_token: {{a: {}}}\n",
    "a setting that is not there": "wandb_api_key: {}\n",
    "a key that stands twice": "hub_token: {}\nhub_token: {}\n",
    "the environment before an error": "env: {{MY_API_KEY: {}}}\nlearning_rate: much\n",
    "an environment that is none": "env: [MY_API_KEY={}]\n",
    "a tab": "password: {}\n\tx: 1\n",
    "a line that is none": "hub_token={}\n",
    "a setting with names": "model_init_kwargs: {{access_token: {}}}\n",
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["", "debug"])
def test_a_secret_in_a_file_of_settings_is_in_no_error_or_traceback(
    monkeypatch, capsys, tmp_path, text, debug
):
    config = tmp_path / "config.yaml"
    config.write_text(text.format(SECRET, SECRET))
    monkeypatch.delenv("MY_API_KEY", raising=False)
    assert SECRET not in printed(monkeypatch, capsys, parse, ["--config", str(config), *SOUND, *debug])


@pytest.mark.parametrize("words", [["push", "x", "--token", SECRET], ["chat", "x", "--api-key=" + SECRET]])
def test_a_secret_given_to_a_command_that_takes_none_is_not_repeated(monkeypatch, capsys, words):
    assert SECRET not in printed(monkeypatch, capsys, commands._main, words)


BUG = """
import os, sys
from goose_lora import cli
def main():
    token = sys.argv[-1]
    raise RuntimeError("cannot log in with " + token + " or " + os.environ["TRACKER_PASSWORD"])
cli.command(main)()
"""


def test_a_bugs_traceback_has_no_secret_of_the_command_line_or_environment():
    done = subprocess.run(
        [sys.executable, "-c", BUG, "--hub_token", SECRET],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin", "PYTHONPATH": str(ROOT), "TRACKER_PASSWORD": SECRET[::-1]},
        timeout=100,
    )
    assert done.returncode == 1 and "RuntimeError: cannot log in with" in done.stderr
    assert "This is a bug of goose_lora" in done.stderr
    assert SECRET not in done.stderr and SECRET[::-1] not in done.stderr


@pytest.mark.parametrize(
    "words", [["--hub_token", SECRET], [f"--hub_token={SECRET}"], [f"--api-key={SECRET}"]]
)
def test_the_command_that_goes_on_leaves_secrets_out(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["sft.py", "--config", "x.yaml", *words, "--seed", "3"])
    assert continuing().endswith("sft.py --config x.yaml --seed 3 --resume_from_checkpoint latest")

    def main():
        raise Stopped(2, "Stopped.")

    with pytest.raises(SystemExit):
        cli.command(main)()
    assert SECRET not in capsys.readouterr().err


def test_a_secret_is_in_no_recorded_command_and_no_recorded_setting(monkeypatch):
    words = ["--hub_token", SECRET, f"--api-key={SECRET}", "--x", f'{{"token": "{SECRET}"}}']
    assert SECRET not in lineage.recorded_command("sft", words)
    config = PPOConfig(output_dir="x", use_cpu=True, hub_token=SECRET, run_name="hf_" + SECRET)
    config.lr_scheduler_kwargs = {"a": {"apiKey": SECRET}}
    assert SECRET not in json.dumps(lineage.changed_settings(config))


SECRETS = "hub_token hub_tok --hub-token HF_TOKEN WANDB_API_KEY apiKey aws_secret_access_key password"
SECRETS += " smtp_pwd access_tokens private-key SLACK_WEBHOOK_URL my.auth.token OPENAI_KEY session_cookie"
SECRETS += " token JWT db_passwd GH_PAT"
PLAIN = "pad_token eos_token max_prompt_tokens stop_token_ids max_new_tokens tokenizer key keys author"
PLAIN += " TOKENIZERS_PARALLELISM metric_for_best_model kl_coef num_tokens image_token reward_per_token"


@pytest.mark.parametrize("name", SECRETS.split())
def test_a_name_that_means_a_secret_is_known_as_one(name):
    assert redaction.is_secret(name)


@pytest.mark.parametrize("name", PLAIN.split())
def test_a_name_that_means_no_secret_is_left_alone(name):
    assert not redaction.is_secret(name)


def test_no_setting_but_the_hubs_token_is_taken_for_a_secret():
    kinds = (SFTConfig, PPOConfig, ModelArguments, DataArguments)
    names = {field.name for kind in kinds for field in fields(kind)}
    assert {name for name in names if redaction.is_secret(name)} == {"hub_token"}
