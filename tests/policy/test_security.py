"""What comes from outside stays data: nothing is unpickled, no code runs that was not asked for, no
token is written, no name in a row is a path."""

import ast
import contextlib
import importlib.util
import io
import json
import logging
import os
import pickle
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import modeling_utils
from trl import SFTConfig

from goose_lora import cli
from goose_lora.data.rows import DataArguments
from goose_lora.files import import_function, read_jsonl
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.compatibility import meta_model
from goose_lora.models.folders import reading
from goose_lora.models.loading import load_tokenizer
from goose_lora.models.shared_base import SharedBase

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path for folder in ("goose_lora", "recipes", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
TOKEN, HUB_TOKEN = "hf_fakeFakeFakeFakeFakeFakeFakeFakeF1", "hf_fakeFakeFakeFakeFakeFakeFakeFakeF2"
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
} | {"pd.read_pickle", "pandas.read_pickle", "torch.jit.load", "torch.serialization.load"}


def calls(path):
    return [
        (node, ast.unparse(node.func))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]


def keywords(node):
    return {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_unpickles_or_runs_text(path):
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        )
    }
    assert not imported & PICKLES
    for node, name in calls(path):
        where = f"line {node.lineno}: {name}"
        assert name not in UNSAFE, where
        assert name != "torch.load" or keywords(node).get("weights_only") == "True", where
        assert keywords(node).get("allow_pickle") in (None, "False"), where
        assert keywords(node).get("shell") in (None, "False"), where


def test_the_scan_sees_what_it_looks_for(tmp_path):
    path = tmp_path / "bad.py"
    for text in (
        "import joblib",
        "from pickle import loads",
        "torch.load(x)",
        "eval(x)",
        "np.load(x, allow_pickle=True)",
        "run(x, shell=True)",
    ):
        path.write_text(text)
        with pytest.raises(AssertionError):
            test_no_code_unpickles_or_runs_text(path)


# A run with tokens in its settings and names of files in its rows


def recipe(name):
    spec = importlib.util.spec_from_file_location(f"secure_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


def share_of_good(prompts, completions, **columns):
    """Rows carry names of files and of modules: they come here, as text."""
    assert columns["path"][0].endswith("stolen") and columns["reward_function"][0] == "evil_module_of_a_row:f"
    return [float(len(completion)) for completion in completions]


class Refused(AssertionError):
    pass


def no_pickles(patch):
    """Nothing may be unpickled but weights and random states, which torch reads without pickle."""
    real = torch.load

    def load(*args, **options):
        if options.get("weights_only") is not True:
            raise Refused("torch.load without weights_only=True")
        return real(*args, **options)

    def refuse(*args, **options):
        raise Refused("something was unpickled")

    patch.setattr(torch, "load", load)
    patch.setattr(pickle, "load", refuse)
    patch.setattr(pickle, "loads", refuse)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a fine-tuning and of a PPO run that was resumed, and what they printed and
    logged."""
    folder = tmp_path_factory.mktemp("secure") / "inner"
    folder.mkdir()
    base = tiny.save_base(folder / "base")
    evil = {
        "path": "../../stolen",
        "folder": "/etc/passwd",
        "id": "../../../x",
        "reward_function": "evil_module_of_a_row:f",
    }
    data = tiny.write_rows(folder / "prompts.jsonl", [row | evil for row in tiny.prompts(16)])
    texts = tiny.write_rows(folder / "texts.jsonl", tiny.texts(8))
    common = {
        "model_name_or_path": base,
        "quantization": "none",
        "dtype": "float32",
        "lora_r": 3,
        "lora_layers": "top-2",
        "use_cpu": True,
    }
    common |= {
        "report_to": ["tensorboard"],
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "hub_token": HUB_TOKEN,
        "save_strategy": "steps",
    }
    ppo = common | {
        "dataset_name": data,
        "num_ppo_epochs": 1,
        "save_steps": 1,
        "response_length": 4,
        "score_normalization": "none",
    }
    ppo |= {
        "reward_function": [f"{__file__}:share_of_good"],
        "critic": "shared",
        "output_dir": str(folder / "ppo"),
    }
    sft = common | {
        "dataset_name": texts,
        "max_steps": 1,
        "save_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    said, handler = io.StringIO(), logging.StreamHandler()
    handler.setStream(said)
    logging.getLogger().addHandler(handler)
    stages = [("sft", sft | {"output_dir": str(folder / "sft")}), ("ppo", ppo | {"num_rollouts": 1})]
    stages += [
        ("ppo", ppo | {"num_rollouts": 2, "resume_from_checkpoint": str(folder / "ppo" / "checkpoint-1")})
    ]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        no_pickles(patch)
        for name, settings in stages:
            patch.setenv("HF_TOKEN", TOKEN)
            config = folder.parent / "config.json"  # JSON is YAML
            config.write_text(json.dumps(settings))
            recipe(name)(["--config", str(config)])
            config.unlink()
    logging.getLogger().removeHandler(handler)
    return folder, said.getvalue()


def test_a_run_is_resumed_without_unpickling(run):
    folder, _ = run
    assert len([row for row in read_jsonl(folder / "ppo" / "metrics.jsonl") if "objective/score" in row]) == 2


def test_what_refuses_pickles_would_have_seen_them():
    with pytest.MonkeyPatch.context() as patch:
        no_pickles(patch)
        for read in (lambda: pickle.loads(pickle.dumps(1)), lambda: torch.load(io.BytesIO())):
            with pytest.raises(Refused):
                read()


def test_no_token_is_in_any_file_or_line_of_a_run(run):
    folder, said = run
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {"metrics.jsonl", "adapter_config.json", "stage.json"}
    assert any("tfevents" in path.name for path in written)
    for token in (TOKEN, HUB_TOKEN):
        assert [path for path in written if token.encode() in path.read_bytes()] == []
        assert token not in said


def test_a_token_in_the_settings_goes_to_the_hubs_client_and_nowhere_else(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    config = cli.parse(
        SFTConfig,
        args=[
            "--output_dir",
            str(tmp_path),
            "--hub_token",
            HUB_TOKEN,
            "--use_cpu",
            "True",
            "--bf16",
            "False",
        ],
    )
    assert HUB_TOKEN not in repr(config) + config.to_json_string() + repr(vars(config))
    from huggingface_hub import get_token

    assert os.environ["HF_TOKEN"] == HUB_TOKEN == get_token()


def test_names_in_rows_are_text_and_never_paths_or_modules(run):
    folder, _ = run
    assert {path.name for path in folder.parent.iterdir()} == {"inner"}
    assert {path.name for path in folder.iterdir()} == {"base", "ppo", "sft", "prompts.jsonl", "texts.jsonl"}
    assert not list(folder.rglob("*stolen*")) and "evil_module_of_a_row" not in sys.modules


def test_it_is_said_whose_code_scores_the_replies(run):
    _, said = run
    assert f"{__file__}:share_of_good: runs the code of {__file__}." in said


@pytest.mark.parametrize(
    "spec",
    [
        "__import__('os'):system",
        "os;system:f",
        "../x:f",
        "math:sqrt()",
        "math:__class__.x",
        "lambda:f()",
        "a b:f",
    ],
)
def test_a_reward_functions_name_is_looked_up_and_never_evaluated(spec, monkeypatch):
    monkeypatch.setattr(os, "system", lambda *command: pytest.fail("it ran"))
    with pytest.raises(ValueError, match="Accepted"):
        import_function(spec)


# Models and adapters


class Writes:
    """A pickle that writes a file as it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("role", ["policy", "reward", "reference"])
def test_an_adapter_that_is_a_pickle_is_refused_unread(role, tmp_path):
    base = tiny.base()
    config = tiny.lora(base)
    config.save_pretrained(tmp_path)
    torch.save({"x": Writes(tmp_path / "ran")}, tmp_path / "adapter_model.bin")
    roles = {"policy": tmp_path if role == "policy" else config} | (
        {} if role == "policy" else {role: tmp_path}
    )
    with pytest.raises(
        ValueError,
        match=(
            r"only adapter_model.bin, a pickle, which can run code as it is read\. Convert it where you"
            r" trust it"
        ),
    ):
        SharedBase.build(base, **roles)
    assert not (tmp_path / "ran").exists()


def test_a_model_of_the_hub_with_nothing_but_pickles_is_refused():
    libraries_words = (
        "does not appear to have a file named model.safetensors. Please do not set `use_safetensors=True`."
    )
    refusal = pytest.raises(
        ValueError,
        match=(
            r"org/old: has no weights in safetensors\. Pickled ones can run code as they are read: convert"
            r" them"
        ),
    )
    with refusal, reading("the weights", "org/old"):
        raise OSError(libraries_words)
    assert all(
        keywords(node).get("use_safetensors") == "True"
        for path in FILES
        for node, name in calls(path)
        if loads_weights(path, node, name)
    )
    assert "Please do not set `use_safetensors=True`" in Path(modeling_utils.__file__).read_text(
        encoding="utf-8"
    )


def loads_weights(path, node, name):
    """A call that reads a model which the user names; the demo's own comes as GGUF."""
    auto = name.startswith(("AutoModel", "auto_class")) and name.endswith("from_pretrained")
    return auto and path.parent.name == "goose_lora" and "gguf_file" not in keywords(node)


@pytest.fixture
def with_code(tmp_path, tiny_base):
    """A model's folder with Python code of its own, which writes a file as it runs."""
    folder = tmp_path / "coded"
    folder.mkdir()
    for path in Path(tiny_base).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "a_kind_of_its_own", "auto_map": {"AutoConfig": "own_code.Own"}}
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "own_code.OwnTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    ran = tmp_path / "ran"
    (folder / "own_code.py").write_text(
        f"open({str(ran)!r}, 'w')\nraise RuntimeError('mismatch of nothing: enough')\n"
    )
    return ModelArguments(str(folder), quantization="none"), ran


@pytest.mark.parametrize("read", [load_tokenizer, meta_model])
def test_code_of_a_models_own_runs_only_when_asked_for(read, with_code, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    arguments, ran = with_code
    with pytest.raises(
        ValueError,
        match=r"needs Python code of its own repository. Read that code, and set trust_remote_code: true",
    ):
        read(arguments)
    assert not ran.exists()
    with pytest.raises(ValueError, match="enough"):
        read(arguments, trust_remote_code=True)
    assert ran.exists()


def test_no_setting_trusts_code_unless_it_says_so():
    assert SFTConfig(output_dir="x", use_cpu=True, bf16=False).trust_remote_code is False
    assert not any("trust" in name for name in vars(DataArguments("x.jsonl")))
    for path in FILES:
        for node, name in calls(path):
            assert keywords(node).get("trust_remote_code") != "True", (
                f"{path.name}, line {node.lineno}: {name}"
            )
