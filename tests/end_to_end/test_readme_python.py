"""The Python of the README's first page runs as it stands, on the tiny base in the demo's place."""

import re

import tiny
from peft import PeftModel
from recipe_runs import ROOT
from transformers import AutoModelForCausalLM

from goose_lora.files import read_jsonl


def test_the_snippet_runs_and_leaves_an_adapter(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    base = tiny.save_base(tmp_path / "base", hidden_size=66, head_dim=22, intermediate_size=64)
    monkeypatch.setattr("goose_lora.models.loading.resolve", lambda name: {"embedded": base}[name])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    rows = read_jsonl(tmp_path / "runs" / "brevity" / "metrics.jsonl")
    assert sum("objective/score" in row for row in rows) == 10
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "runs" / "brevity"
    )
    assert any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)
