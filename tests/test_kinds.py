"""Values that Python users give to settings: what the command line refuses is refused here too."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers.trainer_utils import SchedulerType

from goose_lora.errors import UserError
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.loading import load_base, load_tokenizer
from goose_lora.ppo.config import PPOConfig


def config(folder, **changes):
    return PPOConfig(output_dir=folder, use_cpu=True, report_to=[], **changes)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kl_location": "Loss"}, "kl_location: 'Loss' is not one of reward, loss."),
        ({"score_normalization": "runnning"}, "score_normalization: .* reference, running, none"),
        ({"sampling_correction": "clip"}, "sampling_correction: .* truncate, mask or null"),
        ({"rollout_engine": "vlm"}, "rollout_engine: .* transformers, vllm"),
        ({"rollout_weights": "dens"}, "rollout_weights: .* auto, shared, dense"),
        ({"critic_init": "zeros"}, "critic_init: .* reward, policy, zero or null"),
        ({"critic": "sharde"}, "critic: .* adapter, shared, reward_features or null"),
        ({"kl_estimator": "k5"}, "kl_estimator: .* k1, k2, k3, exact"),
        ({"reuse_trunk": "no"}, "reuse_trunk: 'no' is not true or false"),
        ({"kl_coef": "0.1"}, "kl_coef: '0.1' is not a number"),
        ({"kl_coef": None}, "kl_coef: null is not a number"),
        ({"num_rollouts": "2"}, "num_rollouts: '2' is not a whole number or null"),
        ({"response_length": 5.5}, "response_length: 5.5 is not a whole number"),
        ({"num_ppo_epochs": 2.0}, "num_ppo_epochs: 2.0 is not a whole number"),
        ({"response_length": np.float64(5)}, "response_length: 5.0 is not a whole number"),
        ({"stop_token_ids": ["5"]}, r"stop_token_ids: \['5'\] is not a list of whole numbers"),
        (
            {"eval_strategy": "setps"},
            "eval_strategy: 'setps' is none of the values of its setting. Near it: steps",
        ),
        ({"lr_scheduler_type": "constnt"}, "lr_scheduler_type=constnt: must be one of .*constant"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_of_ppo_of_another_kind_is_refused(given, said, tmp_path):
    with pytest.raises(UserError, match=said):
        config(tmp_path, **given)


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("kl_coef", np.float32(0.5), 0.5),
        ("kl_coef", torch.tensor(0.5), 0.5),
        ("response_length", np.int64(5), 5),
        ("response_length", torch.tensor(5), 5),
        ("reuse_trunk", np.bool_(False), False),
        ("stop_token_ids", np.array([7, 8]), [7, 8]),
        ("stop_token_ids", np.int64(7), [7]),
        ("stop_strings", ("a", "b"), ["a", "b"]),
        ("lr_scheduler_type", SchedulerType.COSINE, SchedulerType.COSINE),
    ],
)
def test_a_number_of_numpy_or_torch_is_that_number(name, given, kept, tmp_path):
    found = vars(config(tmp_path, **{name: given}))[name]
    assert found == kept and type(found) is type(kept)


def test_settings_that_are_made_anew_from_others_are_taken(tmp_path):
    """transformers has put objects in the place of its own values by then."""
    first = config(tmp_path, eval_strategy="steps", gradient_checkpointing_kwargs={"use_reentrant": False})
    again = replace(first, kl_coef=0.25)
    assert again.kl_coef == 0.25 and again.eval_strategy == "steps"
    assert again.accelerator_config == first.accelerator_config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"quantization": "NF4"}, "quantization: 'NF4' is not one of nf4, int8, none."),
        ({"quantization": "4bit"}, "quantization: '4bit' is not"),
        ({"quantization": ""}, "quantization: '' is not one of nf4"),
        ({"dtype": "flaot32"}, "dtype: 'flaot32' is not one of bfloat16, float16, float32."),
        ({"dtype": torch.int8}, "dtype: 'int8' is not one of"),
        ({"embeddings": "cpu"}, "embeddings: 'cpu' is not one of device, host."),
        ({"lora_r": "3"}, "lora_r: '3' is not a whole number"),
        ({"model_name_or_path": None}, "model_name_or_path: null is not text"),
    ],
    ids=str,
)
def test_a_setting_of_the_base_of_another_kind_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        ModelArguments(**{"model_name_or_path": "org/model"} | given)


def test_a_base_is_named_by_a_path_and_its_dtype_by_torch(tiny_base):
    args = ModelArguments(Path(tiny_base), quantization="none", dtype=torch.float32)
    assert (args.model_name_or_path, args.dtype) == (tiny_base, "float32")
    assert load_base(args, load_tokenizer(args)).dtype == torch.float32


def test_a_base_in_the_home_folder_is_found(tiny_base, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(tiny_base).parent))
    name = f"~/{Path(tiny_base).name}"
    assert ModelArguments(name).model_name_or_path == tiny_base
    assert load_tokenizer(ModelArguments(name)).get_vocab() == tiny.tokenizer().get_vocab()


def test_what_loads_a_base_takes_its_settings_and_a_tokenizer_alone(tiny_base):
    with pytest.raises(UserError, match="first argument of load_tokenizer is 'base', not of the kind ModelA"):
        load_tokenizer("base")
    with pytest.raises(UserError, match=r"first argument of load_base is 'base', .*ModelArguments\('org"):
        load_base("base", tiny.tokenizer())
    with pytest.raises(UserError, match=r"second argument of load_base is None, .*load_tokenizer\("):
        load_base(tiny.arguments(tiny_base), None)
