"""Runs of recipes/reward.py on a tiny base."""

import tiny
import yaml


def settings(folder, **changes):
    """Three members' settings on a tiny base, in a file; returns the words of its command."""
    if not (folder / "base").exists():
        tiny.save_base(folder / "base")
    found = {
        "model_name_or_path": str(folder / "base"),
        "dataset_name": tiny.write_rows(folder / "pairs.jsonl", tiny.preferences(24)),
        "eval_dataset_name": tiny.write_rows(folder / "held.jsonl", tiny.preferences(12)),
        "output_dir": str(folder / "reward"),
        "quantization": "none",
        "dtype": "float32",
        "lora_r": 3,
        "lora_layers": "top-2",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "num_members": 3,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(found | changes))
    return ["--config", str(path)]
