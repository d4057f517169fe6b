"""An adapter's configuration is read once from the start of a recipe to the base with its roles."""

import builtins
import io
from collections import Counter
from pathlib import Path

import pytest
import tiny
from recipe_runs import options, recipe

from goose_lora.models.shared_base import SharedBase


class Built(Exception):
    """The base is built; what comes after it is not of interest here."""


@pytest.fixture
def opened(monkeypatch):
    """Count the files that are opened, by path."""
    counts = Counter()
    plain = io.open

    def counting(file, *args, **kwargs):
        if isinstance(file, (str, Path)):
            counts[str(file)] += 1
        return plain(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", counting)
    monkeypatch.setattr(builtins, "open", counting)
    return counts


def test_each_adapters_configuration_is_read_once(tiny_base, tmp_path, opened, monkeypatch):
    model = {"model_name_or_path": tiny_base, "quantization": "none", "dtype": "float32"}
    shared = tiny.shared(tiny.base(), critic="adapter")
    shared.save_pretrained(str(tmp_path / "saved"))
    roles = {"policy_adapter": tmp_path / "saved", "reward_adapter": tmp_path / "saved" / "value"}
    prompts = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompts(16))
    build = SharedBase.build

    def stop_here(*args, **kwargs):
        build(*args, **kwargs)
        raise Built

    monkeypatch.setattr(SharedBase, "build", stop_here)
    opened.clear()
    with pytest.raises(Built):
        recipe("ppo").main(
            options(
                **model,
                **roles,
                dataset_name=prompts,
                output_dir=tmp_path / "ppo",
                per_device_train_batch_size=8,
                use_cpu=True,
                report_to="none",
            )
        )
    read = {path: count for path, count in opened.items() if path.endswith("adapter_config.json")}
    assert read == {f"{folder}/adapter_config.json": 1 for folder in roles.values()}
