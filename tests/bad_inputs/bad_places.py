"""Bad places for a result: an output_dir that is an input, has one inside, or has others' files."""

import json
import shutil

from bad_case import Case, path_to


def _inside(setting, name, *, keep=False):
    """``setting`` names a copy of ``name`` in the output folder."""

    def change(folder):
        target = folder / "output" / ("inner" if keep else name)
        source = (folder / name).resolve()
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        return {setting: str(target)}

    return change


def _there(name, content="mine"):
    """The output folder has a file."""

    def change(folder):
        path = folder / "output" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return {}

    return change


def _link_to(name):
    def change(folder):
        (folder / "results").symlink_to((folder / name).resolve())
        return {"output_dir": str(folder / "results")}

    return change


IS, LIES = ("is output_dir", "beside its inputs"), ("lies in output_dir", "beside its inputs")
FOREIGN = ("which no run of this stage has written", "Give another output_dir")
_MANIFEST = {"format": 1, "stage": "reward", "start": 1, "files": ["adapter_config.json"]}


def _of_another_stage(folder):
    (folder / "output" / "written.json").write_text(json.dumps(_MANIFEST))
    (folder / "output" / "adapter_config.json").write_text("{}")
    return {}


CASES = [
    Case("output_dir is the policy's", "ppo", path_to("output_dir", "sft"), ("policy_adapter: ", *IS)),
    Case("output_dir is the reward model's", "ppo", path_to("output_dir", "reward"), ("reward_adapter", *IS)),
    Case("output_dir is the base's", "sft", path_to("output_dir", "base"), ("model_name_or_path: ", *IS)),
    Case("output_dir with a slash is the policy's", "own_loop", path_to("output_dir", "sft/"), IS),
    Case("output_dir is a link to the policy's", "ppo", _link_to("sft"), ("policy_adapter: ", "output_dir")),
    Case("output_dir has all inputs", "ppo", path_to("output_dir"), LIES),
    Case("the evaluation's output_dir is the policy's", "evaluate", path_to("output_dir", "sft"), IS),
    Case("a reward model in output_dir", "ppo", _inside("reward_adapter", "reward"), LIES),
    Case("a policy in output_dir", "ppo", _inside("policy_adapter", "sft", keep=True), LIES),
    Case("rows in output_dir", "sft", _inside("dataset_name", "texts.jsonl"), LIES),
    Case("held-out rows in output_dir", "reward", _inside("eval_dataset_name", "preferences.jsonl"), LIES),
    *(
        Case(f"a stranger's {name} in output_dir", recipe, _there(name), (name, *FOREIGN))
        for recipe, name in (
            ("ppo", "metrics.jsonl"),
            ("ppo", "value/adapter_config.json"),
            ("ppo", "reference"),
            ("sft", "README.md"),
            ("reward", "verdict.json"),
            ("own_loop", "adapter_model.safetensors"),
            ("evaluate", "evaluation.json"),
        )
    ),
    Case("a run of another stage in output_dir", "ppo", _of_another_stage, ("stage reward", "Give another")),
    Case(
        "a manifest of files that is no JSON", "ppo", _there("written.json", "{"), ("written.json: not JSON",)
    ),
    Case(
        "a manifest of files that leads out",
        "sft",
        _there("written.json", json.dumps(_MANIFEST | {"files": ["../prompts.jsonl"]})),
        ("written.json: damaged", "Give another output_dir"),
    ),
]
