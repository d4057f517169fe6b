"""Names of TRL's PPO: every field and keyword of both generations works here or is answered, and
the page says the same."""

import importlib.util
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

import goose_lora
from goose_lora import cli
from goose_lora.data.rows import DataArguments
from goose_lora.models.arguments import ModelArguments
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.trainer import PPOTrainer
from goose_lora.ppo.trl_names import FROM_TRL, IMPORTS, TRAINER_ARGUMENTS, refuse_trl_arguments

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
CONFIGS = sorted((ROOT / "recipes" / "configs" / "from_trl").glob("*.yaml"))


def words(text):
    return text.split()


# trl/trainer/ppo_config.py of the wheel trl-0.11.4: all fields of PPOConfig, in their order.
FIELDS_0_11 = words("""
exp_name seed log_with task_name model_name query_dataset reward_model remove_unused_columns
tracker_kwargs accelerator_kwargs project_kwargs tracker_project_name push_to_hub_if_best_kwargs steps
learning_rate adap_kl_ctrl init_kl_coef kl_penalty target horizon gamma lam cliprange cliprange_value
vf_coef batch_size forward_batch_size mini_batch_size gradient_accumulation_steps world_size ppo_epochs
max_grad_norm optimize_cuda_cache optimize_device_cache early_stopping target_kl compare_steps
ratio_threshold use_score_scaling use_score_norm score_clip whiten_rewards gradient_checkpointing
is_encoder_decoder is_peft_model backward_batch_size global_backward_batch_size global_batch_size
dataset_num_proc
""")

# trl/experimental/ppo/ppo_config.py of the wheel trl-1.12.0: the fields of PPOConfig itself, then
# those of its base in trl/trainer/base_config.py.
FIELDS_1_12 = words("""
learning_rate dataset_num_proc num_mini_batches total_episodes local_rollout_forward_batch_size
num_sample_generations response_length stop_token stop_token_id temperature missing_eos_penalty
sft_model_path world_size num_total_batches micro_batch_size local_batch_size batch_size
local_mini_batch_size mini_batch_size push_to_hub reward_model_path model_adapter_name ref_adapter_name
num_ppo_epochs whiten_rewards kl_coef kl_estimator cliprange vf_coef cliprange_value gamma lam
ds3_gather_for_generation logging_steps gradient_checkpointing bf16 lr_scheduler_kwargs use_liger_kernel
torch_empty_cache_steps
""")

# What the examples of 1.12 parse beside it: trl/scripts/utils.py (ScriptArguments) and
# trl/trainer/model_config.py (ModelConfig).
FIELDS_OF_EXAMPLES = words("""
dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming ignore_bias_buffers
model_name_or_path model_revision dtype torch_dtype attn_implementation use_peft lora_r lora_alpha
lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type use_rslora
use_dora load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage
trust_remote_code
""")

# PPOTrainer.__init__ of trl/trainer/ppo_trainer.py (0.11.4) and trl/experimental/ppo/ppo_trainer.py
# (1.12.0).
KEYWORDS_0_11 = words(
    "config model ref_model tokenizer dataset optimizer data_collator num_shared_layers lr_scheduler"
    " training_data_collator"
)
KEYWORDS_1_12 = words("""
args processing_class model ref_model reward_model train_dataset value_model data_collator eval_dataset
optimizers callbacks peft_config
""")


def roles():
    spec = importlib.util.spec_from_file_location("recipe_ppo_for_names", ROOT / "recipes" / "ppo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.RoleArguments


TYPES = (PPOConfig, ModelArguments, DataArguments, roles())
HERE = {f.name for kind in TYPES for f in fields(kind)}
BASE = [f.name for f in fields(TrainingArguments)]


@pytest.mark.parametrize("name", sorted({*FIELDS_0_11, *FIELDS_1_12, *BASE, *FIELDS_OF_EXAMPLES}))
def test_a_field_of_either_ppo_config_works_here_or_is_answered(name):
    assert (name in HERE) != (name in FROM_TRL), "one of the two, and not both: an answered name is refused"


@pytest.mark.parametrize("name", FROM_TRL)
def test_an_answer_names_a_setting_that_exists(name, tmp_path):
    (tmp_path / "old.yaml").write_text(f"{name}: 1\n")
    with pytest.raises(ValueError, match=f"unknown setting '{name}'. It is TRL's; here it is ") as error:
        cli.parse(PPOConfig, args=["--config", str(tmp_path / "old.yaml")])
    here = str(error.value).partition("here it is ")[2]
    assert here.startswith(("nothing:", "samples.jsonl")) or re.match(r"\w+", here).group() in HERE, here


@pytest.mark.parametrize("name", ["ppo_epochs", "init_kl_coef", "total_episodes", "stop_token"])
def test_an_old_setting_is_answered_in_python_too(name, tmp_path):
    with pytest.raises(ValueError, match=f"'{name}' is here ") as error:
        PPOConfig(output_dir=str(tmp_path), **{name: 1})
    assert FROM_TRL[name] in str(error.value) and "docs/migration.md" in str(error.value)


def test_an_unknown_setting_that_is_not_trls_is_pythons_business(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_setting'"):
        PPOConfig(output_dir=str(tmp_path), no_such_setting=1)


@pytest.mark.parametrize(
    "name", sorted({*KEYWORDS_0_11, *KEYWORDS_1_12} - {"args", "processing_class", "model", "train_dataset"})
)
def test_a_keyword_of_either_trainer_is_answered_or_is_trainers_own(name):
    if name in ("eval_dataset", "optimizers", "callbacks"):
        refuse_trl_arguments([name])
        assert name not in TRAINER_ARGUMENTS
    else:
        with pytest.raises(ValueError, match=f"'{name}' is here "):
            refuse_trl_arguments([name])


@pytest.mark.parametrize("keywords", [KEYWORDS_0_11, KEYWORDS_1_12], ids=["0.11", "1.12"])
def test_a_call_of_either_trainer_is_answered_whole(keywords):
    call = dict.fromkeys(keywords)
    with pytest.raises(ValueError) as error:
        PPOTrainer(**call)
    for name in set(keywords) & TRAINER_ARGUMENTS.keys():
        assert f"'{name}' is here {TRAINER_ARGUMENTS[name]}" in str(error.value)


def test_a_keyword_that_is_missing_is_still_pythons_business():
    with pytest.raises(TypeError, match="train_dataset"):
        PPOTrainer(model=None, args=None, processing_class=None)


@pytest.mark.parametrize("name", IMPORTS)
def test_a_name_that_was_imported_from_trl_is_answered(name):
    with pytest.raises(ImportError, match=f"goose_lora has no {name}: it is TRL's, and here it is") as error:
        exec(f"from goose_lora import {name}")
    assert IMPORTS[name] in str(error.value)


@pytest.mark.parametrize("name", [*IMPORTS, "Nothing", "nothing"])
def test_to_ask_for_a_name_that_is_not_there_raises_nothing_but_attribute_error(name):
    assert not hasattr(goose_lora, name)
    assert getattr(goose_lora, name, None) is None


def test_a_module_that_is_not_there_is_pythons_own_error():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'goose_lora\.nothing'"):
        importlib.import_module("goose_lora.nothing")


def test_create_reference_model_and_the_two_classes_keep_their_names():
    assert (
        goose_lora.PPOConfig is PPOConfig
        and goose_lora.PPOTrainer is PPOTrainer
        and callable(goose_lora.create_reference_model)
    )


def rows_of(text):
    return dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text, flags=re.MULTILINE))


def section(title):
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize(
    ("title", "answers"),
    [("Settings", FROM_TRL), ("Arguments of PPOTrainer", TRAINER_ARGUMENTS), ("Imports", IMPORTS)],
)
def test_the_page_has_every_answer_and_no_other(title, answers):
    assert rows_of(section(title)) == answers


def test_names_that_the_page_says_to_look_at_twice_are_settings_of_both():
    twice = rows_of(section("The same name, another number"))
    assert {"gradient_accumulation_steps", "temperature", "learning_rate", "save_steps"} <= twice.keys()
    assert twice.keys() <= HERE & {*FIELDS_0_11, *FIELDS_1_12, *BASE, *FIELDS_OF_EXAMPLES}


def test_the_page_s_examples_of_python_are_python():
    examples = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(examples) >= 2
    for example in examples:
        compile(example, "docs/migration.md", "exec")


def test_the_example_configurations_are_both_there():
    assert [path.name for path in CONFIGS] == ["ppo.yaml", "ppo_tldr.yaml"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_example_of_trl_parses_with_the_recipes_own_parser(path):
    text = path.read_text(encoding="utf-8")
    assert "A TRANSLATION, NOT RUN HERE" in text
    config, model, data, roles = cli.parse(*TYPES, args=["--config", str(path), "--use_cpu", "True"])
    settings = yaml.safe_load(text)
    for name, value in settings.items():
        kept = next(part for part in (config, model, data, roles) if name in {f.name for f in fields(part)})
        assert getattr(kept, name) in (value, [value]) or name in ("report_to", "learning_rate"), name
    episodes = {"ppo": (10_000, 16), "ppo_tldr": (30_000, 64)}[path.stem]
    assert config.rollout_batch_size == episodes[1] and config.num_rollouts == -(-episodes[0] // episodes[1])


def test_the_pages_yaml_is_the_shipped_file():
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    shipped = yaml.safe_load(CONFIGS[0].read_text(encoding="utf-8"))
    assert yaml.safe_load(example).items() <= shipped.items()
