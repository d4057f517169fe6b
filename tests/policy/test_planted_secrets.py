"""Twenty secrets, planted where users put them, and a fine-tuning and a PPO run among them: none is
in any file that is left, or in any line that is printed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bad_case import make_files

ROOT = Path(__file__).resolve().parents[2]
PLACES = [
    "HF_TOKEN of the environment",
    "a password of the environment",
    "a key of AWS in the environment",
    "hub_token in a file of settings",
    "a key under env in a file of settings",
    "hub_token in Python's settings",
    "hub_token on the command line",
    "hub_token behind =",
    "a shortened name",
    "a name that there is not",
    "a list in YAML that does not close",
    "an alias in YAML",
    "a setting with names of its own",
    "a password in an address",
    "a reward function's error",
    "a traceback of a bug",
    "the command that goes on",
    "the launcher's command",
    "the address of git's remote",
    "a word of a token's form in a setting",
]
SECRETS = {place: f"Zq7planted{number:02}Value" for number, place in enumerate(PLACES)}
SECRETS["a word of a token's form in a setting"] = "hf_Zq7planted19ValueLong"

PROGRAM = """
import json, os, sys
from pathlib import Path
import goose_lora
from goose_lora import cli
from goose_lora.cli import commands
from goose_lora.cli.notebook import load_recipe
from goose_lora.training.signals import STARTED_BY, Stopped

secrets, files = json.loads(os.environ.pop("PLANTED")), Path(os.environ["FILES"])
def given(place): return secrets[place]
def said(main, *words):
    sys.argv = ["recipe.py", *words]
    try:
        cli.command(main)()
    except SystemExit as end:
        print("ended with", end.code, flush=True)
    except Exception:
        sys.excepthook(*sys.exc_info())

common = {
    "model_name_or_path": str(files / "base"), "quantization": "none", "dtype": "float32", "lora_r": 3,
    "lora_alpha": 6, "use_cpu": True, "disable_tqdm": True, "report_to": "tensorboard",
    "per_device_train_batch_size": 4, "save_total_limit": 1,
}
word = given("a word of a token's form in a setting")
said(load_recipe("sft.py").main, "--output_dir", "x", "--model_name_or_path", "x", "--dataset_name", "x",
     "--use_cpu", "true", "--bf16", "false", "--run_name", word)
texts = {**common, "bf16": False, "dataset_name": str(files / "texts.jsonl"), "output_dir": "sft",
         "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
goose_lora.run("sft", texts, hub_token=given("hub_token in Python's settings"))

Path("scores.py").write_text(
    "import os\\ndef words(completions, **columns): return [float(len(text)) for text in completions]\\n"
    "def fails(**columns): raise ValueError('cannot log in with ' + os.environ['JUDGE_PW'])\\n"
)
ppo = {**common, "policy_adapter": "sft", "dataset_name": str(files / "prompts.jsonl"), "output_dir": "ppo",
       "num_rollouts": 1, "response_length": 5, "reward_function": "scores.py:words",
       "score_calibration_prompts": 8, "save_strategy": "steps", "save_steps": 4,
       "hub_token": given("hub_token in a file of settings"),
       "env": {"TRACKER_API_KEY": given("a key under env in a file of settings")}}
import yaml
Path("ppo.yaml").write_text(yaml.safe_dump(ppo))
os.environ[STARTED_BY] = "goose-lora ppo --hub_token " + given("the launcher's command")
main = load_recipe("ppo.py").main
said(main, "--config", "ppo.yaml", "--hub_token", given("hub_token on the command line"))
del os.environ[STARTED_BY]
os.environ["JUDGE_PW"] = given("a reward function's error")
said(main, "--config", "ppo.yaml", "--reward_function", "scores.py:fails", "--output_dir", "other")
said(main, "--config", "ppo.yaml", "--hub_token=" + given("hub_token behind ="), "--kl_coef", "-1")
said(main, "--config", "ppo.yaml", "--hub_tok", given("a shortened name"))
said(main, "--config", "ppo.yaml", "--service_api_key", given("a name that there is not"), "--debug")
Path("list.yaml").write_text("hub_token: [" + given("a list in YAML that does not close") + "\\nseed: 1\\n")
said(main, "--config", "list.yaml", "--debug")
Path("alias.yaml").write_text("hub_token: *" + given("an alias in YAML") + "\\n")
said(main, "--config", "alias.yaml")
own = json.dumps({"access_token": given("a setting with names of its own")})
said(main, "--config", "ppo.yaml", "--lr_scheduler_kwargs", own)
address = "https://me:" + given("a password in an address") + "@127.0.0.1:9/rows.jsonl"
said(main, "--config", "ppo.yaml", "--dataset_name", address, "--output_dir", "third")
os.environ["BUG_SECRET"] = given("a traceback of a bug")
def bug(): raise RuntimeError("cannot log in with " + os.environ["BUG_SECRET"])
said(bug)
def stops(): raise Stopped(2, "Stopped.")
said(stops, "--config", "ppo.yaml", "--hub_token", given("the command that goes on"))
said(commands._main, "show", "ppo")
said(commands._main, "doctor", "ppo")
for name in ("list.yaml", "alias.yaml", "ppo.yaml"): Path(name).unlink()  # the plants themselves
print("THE END")
"""


@pytest.mark.timeout(600)
def test_none_of_twenty_planted_secrets_is_in_any_file_or_line(tmp_path):
    files, here = tmp_path / "files", tmp_path / "here"
    here.mkdir()
    make_files(files)
    remote = f"https://me:{SECRETS['the address of git' + chr(39) + 's remote']}@host/x.git"
    for words in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *words], cwd=here, check=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "FILES": str(files)}
    environment |= {
        "PLANTED": json.dumps(SECRETS),
        "TMPDIR": str(tmp_path),
        "HF_HOME": str(tmp_path / "hub"),
        "HF_TOKEN": SECRETS["HF_TOKEN of the environment"],
        "TRACKER_PASSWORD": SECRETS["a password of the environment"],
        "AWS_SECRET_ACCESS_KEY": SECRETS["a key of AWS in the environment"],
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=here, env=environment, capture_output=True, timeout=550
    )
    printed = done.stdout + done.stderr
    assert done.stdout.endswith(b"THE END\n"), printed[-3000:].decode(errors="replace")

    # Both runs are there, with all that they leave, and every error was met
    for name in ("sft/README.md", "sft/goose_lora.json", "ppo/metrics.jsonl", "ppo/samples.jsonl"):
        assert (here / name).stat().st_size > 0, name
    assert (here / "ppo" / "report.html").is_file() and list(here.rglob("events.out.*"))
    assert printed.count(b"ended with 2") >= 8, printed[-3000:].decode(errors="replace")
    assert b"Continue with: " in printed and b"cannot log in with (not recorded)" in printed

    leaks = []
    own = here / ".git" / "config"  # where its user put it
    for place, secret in SECRETS.items():
        found = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if _has(path, secret, own)]
        if secret.encode() in printed:
            found.append("what was printed")
        leaks += [f"{place}: {name}" for name in found]
    assert len(SECRETS) == 20 and leaks == []


def _has(path, secret, own):
    return path != own and path.is_file() and secret.encode() in path.read_bytes()
