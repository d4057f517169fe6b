"""Stages that go on from an adapter of the same stage: label, reward, PPO, and label again."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from recipe_runs import options, recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from goose_lora.files import read_json, read_jsonl

ADAPTER = "adapter_model.safetensors"


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return tiny.save_base(folder, hidden_size=66, head_dim=22, intermediate_size=64)


@pytest.fixture(scope="module")
def settings(base):
    return {
        "model_name_or_path": base,
        "quantization": "none",
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 5,
    }


@pytest.fixture(scope="module")
def sft(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    rows = tiny.write_rows(folder / "texts.jsonl", tiny.texts(8))
    recipe("sft").main(
        options(**settings, lora_r=3, lora_alpha=5, dataset_name=rows, output_dir=folder / "sft")
    )
    return folder / "sft", rows


@pytest.fixture(scope="module")
def reward(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    rows = tiny.write_rows(folder / "pairs.jsonl", tiny.preferences(8))
    data = {"dataset_name": rows, "eval_dataset_name": rows}
    recipe("reward").main(options(**settings, lora_r=3, lora_alpha=5, **data, output_dir=folder / "reward"))
    return folder / "reward", rows


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_fine_tuning_starts_from_the_adapter_to_the_bit(settings, sft, quantization, tmp_path):
    folder, rows = sft
    changes = {"quantization": quantization, "learning_rate": 0.0, "max_steps": 1}
    recipe("sft").main(
        options(**(settings | changes), dataset_name=rows, policy_adapter=folder, output_dir=tmp_path / "on")
    )
    before, after = load_file(folder / ADAPTER), load_file(tmp_path / "on" / ADAPTER)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert any(tensor.abs().max() > 0 for key, tensor in after.items() if "lora_B" in key)
    config = read_json(tmp_path / "on" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (3, 5)  # its own, not those of a fresh one


def test_its_first_loss_is_that_of_the_adapter_in_plain_peft(settings, base, sft, tmp_path):
    folder, rows = sft
    recipe("sft").main(
        options(**settings, dataset_name=rows, policy_adapter=folder, output_dir=tmp_path / "on")
    )
    first = read_jsonl(tmp_path / "on" / "metrics.jsonl")[0]["loss"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    losses, counts = [], []
    for row in lines(rows):
        ids = tokenizer(row["prompt"] + row["completion"] + "</s>", return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[:, : len(tokenizer(row["prompt"])["input_ids"])] = -100
        counts.append(int((labels[:, 1:] != -100).sum()))
        losses.append(float(model(input_ids=ids, labels=labels).loss) * counts[-1])
    assert first == pytest.approx(sum(losses) / sum(counts), abs=2e-4)


def test_the_lineage_of_what_went_on_names_what_it_started_from(settings, sft, tmp_path):
    folder, rows = sft
    recipe("sft").main(
        options(**settings, dataset_name=rows, policy_adapter=folder, output_dir=tmp_path / "on")
    )
    parent = read_json(tmp_path / "on" / "goose_lora.json")["parents"]["policy"]
    first = read_json(folder / "goose_lora.json")
    assert (parent["sha256"], parent["lineage"]["stage"]) == (first["sha256"], "sft")


def test_a_reward_model_goes_on_with_its_head(settings, base, reward, tmp_path):
    folder, rows = reward
    data = {"dataset_name": rows, "eval_dataset_name": rows, "reward_adapter": folder}
    changes = {"learning_rate": 0.0, "max_steps": 1}
    recipe("reward").main(options(**(settings | changes), **data, output_dir=tmp_path / "on"))
    before, after = load_file(folder / ADAPTER), load_file(tmp_path / "on" / ADAPTER)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert read_json(tmp_path / "on" / "goose_lora.json")["parents"]["reward"]["lineage"]["stage"] == "reward"
    # Its scores are those of PEFT's own reload
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    judge = PeftModel.from_pretrained(model, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    scores = []
    for row in lines(rows):
        ids = tokenizer(row["prompt"] + row["chosen"] + "</s>", return_tensors="pt")["input_ids"]
        scores.append(float(judge(input_ids=ids).logits))
        ids = tokenizer(row["prompt"] + row["rejected"] + "</s>", return_tensors="pt")["input_ids"]
        scores.append(float(judge(input_ids=ids).logits))
    verdict = read_json(tmp_path / "on" / "verdict.json")
    assert verdict["score_mean"] == pytest.approx(sum(scores) / len(scores), abs=1e-4)


def test_a_reward_model_goes_on_with_the_ending_that_it_was_trained_with(settings, reward, tmp_path):
    folder, rows = reward
    data = {"dataset_name": rows, "eval_dataset_name": rows, "reward_adapter": folder}
    with pytest.raises(ValueError, match=r"append_eos=False.* trained with append_eos: true"):
        recipe("reward").main(options(**settings, **data, append_eos=False, output_dir=tmp_path / "on"))


def test_fine_tuning_goes_on_under_the_template_and_the_end_that_the_adapter_was_trained_with(
    settings, sft, tmp_path
):
    folder, _ = sft
    rows = tiny.write_rows(
        tmp_path / "chat.jsonl", [{"messages": [tiny.user("ba"), tiny.assistant("good")]}] * 8
    )
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}bu {{ m['content'] }} {% endfor %}{{ eos_token }}")
    recipe("sft").main(
        options(
            **(settings | {"max_steps": 1}),
            dataset_name=rows,
            policy_adapter=folder,
            output_dir=tmp_path / "a",
            **{"lora_r": 3},
        )
    )
    assert (tmp_path / "a" / "chat_template.jinja").read_text() == (
        folder / "chat_template.jinja"
    ).read_text()
    with pytest.raises(ValueError, match="trained with another chat template"):
        recipe("sft").main(
            options(
                **settings,
                dataset_name=rows,
                policy_adapter=folder,
                chat_template_path=template,
                output_dir=tmp_path / "b",
            )
        )


def test_an_adapter_of_the_other_stage_is_refused_before_the_model_loads(settings, sft, reward, tmp_path):
    data = {"dataset_name": reward[1], "eval_dataset_name": reward[1], "reward_adapter": sft[0]}
    with pytest.raises(ValueError, match=r"reward_adapter: .* no score head"):
        recipe("reward").main(options(**settings, **data, output_dir=tmp_path / "a"))
    with pytest.raises(ValueError, match=r"policy_adapter: .* has a score head"):
        recipe("sft").main(
            options(**settings, dataset_name=sft[1], policy_adapter=reward[0], output_dir=tmp_path / "b")
        )


@pytest.mark.parametrize("metric", [None, "accuracy"])
def test_the_best_reward_model_is_the_one_that_is_saved(settings, metric, tmp_path):
    rows = tiny.write_rows(tmp_path / "pairs.jsonl", tiny.preferences(8))
    changes = {"learning_rate": 0.3, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    best: dict[str, object] = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
    }
    if metric is not None:
        best["metric_for_best_model"] = metric
    # Until one is chosen that is not the last, which would be saved in any case
    name, best_of = f"eval_{metric}" if metric else "eval_eval_loss", max if metric else min
    for seed in range(4):
        folder = tmp_path / f"reward{seed}"
        data = {"dataset_name": rows, "eval_dataset_name": rows, "output_dir": folder}
        recipe("reward").main(options(**(settings | changes | {"seed": seed}), **best, **data, lora_r=3))
        # By the figures in the log: the first of the best, as Trainer has it
        state = read_json(folder / "checkpoint-4" / "trainer_state.json")
        figures = {row["step"]: row[name] for row in state["log_history"] if name in row}
        chosen = best_of(figures, key=figures.get)
        saved, kept = load_file(folder / ADAPTER), load_file(folder / f"checkpoint-{chosen}" / ADAPTER)
        assert len(figures) == 4 and all(torch.equal(saved[key], kept[key]) for key in saved)
        if chosen != 4:
            break
    assert chosen != 4


def test_a_figure_of_no_held_out_set_alone_cannot_say_which_is_best(settings, tmp_path):
    rows = tiny.write_rows(tmp_path / "pairs.jsonl", tiny.preferences(8))
    data = {"dataset_name": rows, "eval_dataset_name": rows, "output_dir": tmp_path / "reward"}
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "metric_for_best_model": "accuracy"}
    changes = {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    with pytest.raises(ValueError, match=r"metric_for_best_model=accuracy: use loss of the pairs"):
        recipe("reward").main(options(**(settings | changes), **best, **data, any_pairs_name=rows))


def test_the_lineage_says_which_day_the_template_writes_and_another_day_is_told(settings, tmp_path, caplog):
    rows = tiny.write_rows(
        tmp_path / "chat.jsonl", [{"messages": [tiny.user("ba"), tiny.assistant("good")]}] * 8
    )
    template = tmp_path / "dated.jinja"
    template.write_text(
        "{{ strftime_now('%d') }} {% for m in messages %}{{ m['content'] }} {% endfor %}{{ eos_token }}"
    )
    changes = {"max_steps": 1, "lora_r": 3, "dataset_name": rows}
    first, second = tmp_path / "first", tmp_path / "second"
    recipe("sft").main(options(**(settings | changes), chat_template_path=template, output_dir=first))
    lineage = read_json(first / "goose_lora.json")
    assert lineage["template_date"] == read_json(first / "tokenizer_config.json")["template_date"]
    # A day of its own is the next stage's too, and one that the tokenizer does not know is told
    config = read_json(first / "tokenizer_config.json") | {"template_date": "2020-02-20"}
    (first / "tokenizer_config.json").write_text(json.dumps(config))
    recipe("sft").main(options(**(settings | changes), policy_adapter=first, output_dir=second))
    assert read_json(second / "goose_lora.json")["template_date"] == "2020-02-20"
    assert f"writes {lineage['template_date']}; this stage writes 2020-02-20" in caplog.text
