"""The recipes, run whole on the tiny base: what they write, and that each stage takes what the one
before it left."""

import math
import os
import subprocess
import sys

import pytest
import recipe_runs
import tiny
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from recipe_runs import ROOT, count_good, options, recipe, settings_of
from safetensors.torch import load_file

from goose_lora import cli
from goose_lora.errors import UserError
from goose_lora.files import read_json, read_jsonl
from goose_lora.generation.sampling import generation_config
from goose_lora.models.arguments import ModelArguments


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All four stages on a tiny nf4 base, and the folder that holds them."""
    folder = tmp_path_factory.mktemp("run")
    base = tiny.save_base(folder / "base", hidden_size=66, head_dim=22, intermediate_size=64)
    data = {
        name: tiny.write_rows(folder / f"{name}.jsonl", getattr(tiny, name)(24))
        for name in ("texts", "preferences", "prompts")
    }
    model = {
        "model_name_or_path": base,
        "quantization": "nf4",
        "lora_r": 3,
        "lora_alpha": 6,
        "lora_layers": "top-2",
    }
    train = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "save_strategy": "no",
    }
    train |= {"learning_rate": 1e-2, "gradient_checkpointing": False}
    recipe("sft").main(options(**model, **train, dataset_name=data["texts"], output_dir=folder / "sft"))
    recipe("reward").main(
        options(
            **(model | train | {"max_steps": 24}),
            dataset_name=data["preferences"],
            eval_dataset_name=data["preferences"],
            output_dir=folder / "reward",
        )
    )
    del train["max_steps"], train["gradient_checkpointing"]
    ppo = {"num_rollouts": 2, "num_ppo_epochs": 2, "response_length": 5, "score_calibration_prompts": 24}
    roles = {"policy_adapter": folder / "sft", "reward_adapter": folder / "reward"}
    recipe("ppo").main(
        options(**model, **train, **ppo, **roles, dataset_name=data["prompts"], output_dir=folder / "ppo")
    )
    recipe("evaluate").main(
        options(
            model_name_or_path=base,
            quantization="nf4",
            dataset_name=data["prompts"],
            output_dir=folder / "evaluation",
            policy_adapter=folder / "ppo",
            sft_adapter=folder / "sft",
            reward_adapter=folder / "reward",
            judge=f"{recipe_runs.__file__}:count_good",
            best_of=2,
            response_length=5,
        )
    )
    return folder


def test_the_reward_models_verdict_is_saved_and_it_learned_what_it_was_shown(run):
    verdict = read_json(run / "reward" / "verdict.json")
    assert verdict["accuracy"] > 0.9 and verdict["accuracy_ci"][0] > 0.5 and verdict["n_pairs"] == 24
    assert {"length_correlation", "score_mean", "score_std"} <= verdict.keys()


def test_the_verdict_has_margins_calibration_bins_and_probes(run):
    verdict = read_json(run / "reward" / "verdict.json")
    assert {"margin_std", "margin_negative", "margin_quantiles", "warnings"} <= verdict.keys()
    assert sum(row["n"] for row in verdict["calibration_bins"]) == verdict["n_prompts"] == 24
    assert (
        verdict["probes"].keys()
        == {"empty", "repeated", "truncated", "flattering", "gushing", "fawning", "other_prompt"}
        and verdict["probes"]["empty"]["n"] == 24
    )


@pytest.mark.parametrize("append_eos", [True, False])
def test_a_reward_model_learns_from_ranked_lists_and_its_references_score_zero(
    tiny_base, tmp_path, append_eos
):
    from goose_lora.data.preferences import tokenize_references
    from goose_lora.models.loading import load_base, load_tokenizer
    from goose_lora.models.shared_base import SharedBase

    lists = [
        {
            "prompt": row["prompt"],
            "completions": [" bad ba", " good be", " bad bi", " good bo"][: 3 + k % 2],
            "ranks": [2, 1, 2, 1][: 3 + k % 2],
        }
        for k, row in enumerate(tiny.prompts(16))
    ]
    references = [{"prompt": row["prompt"], "completion": " good da"} for row in tiny.prompts(7)]
    files = {
        name: tiny.write_rows(tmp_path / f"{name}.jsonl", rows)
        for name, rows in (("lists", lists), ("references", references))
    }
    pairs = tiny.write_rows(tmp_path / "pairs.jsonl", tiny.preferences(8))
    model = {"model_name_or_path": tiny_base, "quantization": "none", "dtype": "float32", "lora_r": 3}
    train = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "max_steps": 12,
    }
    train |= {
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "eval_strategy": "epoch",
    }
    data = {
        "dataset_name": files["lists"],
        "eval_dataset_name": files["lists"],
        "any_pairs_name": pairs,
        "append_eos": append_eos,
    }
    recipe("reward").main(
        options(
            **model,
            **train,
            **data,
            reference_dataset_name=files["references"],
            output_dir=tmp_path / "reward",
        )
    )

    verdict, lineage = (
        read_json(tmp_path / "reward" / "verdict.json"),
        read_json(tmp_path / "reward" / "goose_lora.json"),
    )
    assert verdict["n_pairs"] == 8 * 2 + 8 * 4 and verdict["n_prompts"] == 16 and verdict["n_any_pairs"] == 8
    assert verdict["accuracy"] > 0.9 and verdict["accuracy_ci"][0] > 0.5
    assert (lineage["append_eos"], lineage["reward_references"]) == (append_eos, 7) and abs(
        lineage["reward_bias"]
    ) > 1e-3
    arguments = ModelArguments(tiny_base, quantization="none", dtype="float32")
    tokenizer = load_tokenizer(arguments)
    base = load_base(arguments, tokenizer)
    shared = SharedBase.build(base, tiny.lora(base), reward=tmp_path / "reward", critic="adapter")
    tokens = tokenize_references(Dataset.from_list(references), tokenizer, name="x", append_eos=append_eos)
    scores = [
        shared.scores(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)).item() for ids in tokens
    ]
    assert sum(scores) / 7 == pytest.approx(0, abs=1e-5)


def test_adapters_stay_fp32_on_a_quantized_base(run):
    for stage in ("sft", "reward", "ppo"):
        assert {tensor.dtype for tensor in load_file(run / stage / "adapter_model.safetensors").values()} == {
            torch.float32
        }


def test_the_reward_head_is_in_the_adapter(run):
    assert any(
        name.endswith("score.weight") for name in load_file(run / "reward" / "adapter_model.safetensors")
    )


def test_ppo_writes_policy_roles_metrics_samples_and_curves(run):
    names = {path.name for path in (run / "ppo").iterdir()}
    assert {
        "adapter_model.safetensors",
        "value",
        "reward",
        "reference",
        "metrics.jsonl",
        "samples.jsonl",
        "curves.png",
        "stage.json",
    } <= names
    page = (run / "ppo" / "report.html").read_text(encoding="utf-8")
    assert "right on" in page and "win rates against sft" in page, (
        "the reward model's verdict, and what recipes/evaluate.py measured afterwards"
    )
    assert (run / "ppo" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len([row for row in read_jsonl(run / "ppo" / "metrics.jsonl") if "objective/score" in row]) == 2


def test_the_reference_is_the_sft_adapter_and_the_reward_role_is_what_reward_saved(run):
    for role, stage in (("reference", "sft"), ("reward", "reward")):
        saved, kept = (
            load_file(folder / "adapter_model.safetensors") for folder in (run / stage, run / "ppo" / role)
        )
        assert saved.keys() == kept.keys()
        assert all(torch.equal(saved[name], kept[name]) for name in saved)


def test_evaluation_compares_base_sft_ppo_and_best_of(run):
    evaluation = read_json(run / "evaluation" / "evaluation.json")
    assert list(evaluation["figures"]) == ["base", "sft", "ppo", "sft best of 2"]
    figures = evaluation["figures"]
    assert figures["sft"]["kl"] == 0 and figures["ppo"]["kl"] != 0
    assert figures["sft best of 2"]["kl"] == pytest.approx(math.log(2) - 1 / 2)
    replies = read_jsonl(run / "evaluation" / "replies.jsonl")
    judged = count_good([], [row["ppo"] for row in replies])
    assert figures["ppo"]["judge"] == pytest.approx(sum(judged) / len(judged))


def evaluated(run, folder, url, **settings):
    """Arguments of an evaluation by a judge behind a server."""
    given = {
        "model_name_or_path": run / "base",
        "quantization": "nf4",
        "dataset_name": run / "prompts.jsonl",
        "output_dir": folder,
        "policy_adapter": run / "ppo",
        "sft_adapter": run / "sft",
        "judge": "openai:m",
        "judge_base_url": url,
        "response_length": 5,
    }
    return options(**given | settings)


@pytest.fixture
def evaluation_before(run):
    """What the policy's folder says of its evaluation, put back after the test."""
    files = (run / "ppo" / "evaluation.json", run / "ppo" / "README.md")
    before = [file.read_text() for file in files]
    yield dict(zip(files, before, strict=True))
    for file, text in zip(files, before, strict=True):
        file.write_text(text)


def test_a_judge_behind_a_server_compares_pairs_and_what_fails_late_costs_nothing(
    run, evaluation_before, tmp_path, monkeypatch, capfd
):
    from judge_server import judge_server, longer, question

    monkeypatch.setenv("OPENAI_API_KEY", "Zq7planted99Value")
    with judge_server() as server:
        # It answers the made-up question and a few others, and then never again
        no = 401, {"error": {"message": "no Zq7planted99Value here"}}
        server.says = lambda body: longer(body) if len(server.bodies) <= 6 else no
        with pytest.raises(UserError, match=r"\(401\).*the same command goes on from there"):
            recipe("evaluate").main(evaluated(run, tmp_path / "out", server.url))
        saved = read_json(tmp_path / "out" / "evaluation.json")
        first = read_jsonl(tmp_path / "out" / "replies.jsonl")
        assert "judge" not in saved and saved["figures"]["ppo"].keys() >= {"kl", "tokens"}
        assert len(first) == 24 and {"base", "sft", "ppo"} < first[0].keys()
        # The policy keeps the evaluation that it had
        assert {file: file.read_text() for file in evaluation_before} == evaluation_before

    # The same command goes on, at the same address; questions in flight stay with the first server
    with judge_server(server.port) as server:
        recipe("evaluate").main(evaluated(run, tmp_path / "out", server.url))
        rows = read_jsonl(tmp_path / "out" / "replies.jsonl")
        assert rows == first
        prompts = [row["prompt"] for row in tiny.prompts(24)]
        assert {question(body)["request"] for body in server.bodies[1:]} <= set(prompts)

    # As many wins as longer replies, and each pair of texts asked about once in both orders
    evaluation = read_json(tmp_path / "out" / "evaluation.json")
    figures = evaluation["figures"]["ppo"]
    lengths = [(len(row["ppo"]), len(row["sft"])) for row in rows]
    wins = sum(1.0 if mine > other else 0.5 if mine == other else 0.0 for mine, other in lengths)
    assert figures["judge_win_rate"] == wins / 24 and figures["judge_pairs"] == 24
    low, high = figures["judge_win_rate_ci"]
    assert low < figures["judge_win_rate"] < high
    asked = evaluation["judge_asked"]
    assert asked["calls"] == len(server.bodies) and asked["cache_hits"] > 0 == asked["no_answer"]
    assert evaluation["judge"].startswith("openai:m (rubric ")
    assert "openai:m (rubric " in (run / "ppo" / "README.md").read_text()
    assert "prefers the policy" in (run / "ppo" / "report.html").read_text()

    # The key is nowhere
    said = "".join(capfd.readouterr())
    assert "judge_win_rate" in said and "Zq7planted99Value" not in said
    for path in (*run.rglob("*"), *tmp_path.rglob("*")):
        assert not path.is_file() or b"Zq7planted99Value" not in path.read_bytes(), path


def test_every_stage_leaves_its_lineage_and_a_card_with_what_was_measured_and_nothing_else(run):
    from cards import unexplained

    from goose_lora.sharing.model_card import MARK
    from goose_lora.sharing.provenance import read_chain

    links = read_chain(run / "ppo")
    assert [link.stage for link in links] == ["sft", "reward", "ppo"] and [
        link.problems for link in links
    ] == [[], [], []]
    assert [{row["rows"] for row in link.lineage["data"]} for link in links] == [{24}] * 3
    assert links[1].lineage["data"][1]["use"] == "eval" and links[1].lineage["figures"]["steps"] == 24
    assert (
        links[2].lineage["settings"]["num_ppo_epochs"] == 2
        and "--num_ppo_epochs 2" in links[2].lineage["command"]
    )
    win_rate = read_json(run / "evaluation" / "evaluation.json")["figures"]["ppo"]["score_win_rate"]
    assert f"{win_rate:.4g}" in (run / "ppo" / "README.md").read_text()
    for stage in ("sft", "reward", "ppo"):
        text = (run / stage / "README.md").read_text()
        assert MARK in text and "It has been trained using" not in text, "not the trainer's card"
        assert unexplained(run / stage, text) == []
        assert (
            read_json(run / stage / "stage.json").items()
            >= links[("sft", "reward", "ppo").index(stage)].lineage["figures"].items()
        )


def test_the_final_adapter_gives_the_shared_bases_greedy_replies_in_plain_peft(run):
    from goose_lora.generation.sampling import sample
    from goose_lora.models.loading import load_base, load_tokenizer
    from goose_lora.models.shared_base import SharedBase

    arguments = ModelArguments(str(run / "base"), quantization="nf4")
    tokenizer = load_tokenizer(arguments)
    ids, mask = tiny.batch()
    greedy = generation_config(
        response_tokens=8, temperature=1.0, eos_token_ids=[tiny.EOS], pad_token_id=tiny.PAD, do_sample=False
    )
    shared = SharedBase.build(
        load_base(arguments, tokenizer), run / "ppo", reward=run / "reward", critic="adapter"
    )
    with torch.autocast("cpu", torch.bfloat16):
        plain = PeftModel.from_pretrained(load_base(arguments, tokenizer), run / "ppo").eval()
        want = plain.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
    assert torch.equal(sample(shared, ids, mask, greedy).input_ids, want)


def test_a_recipe_runs_under_accelerate_launch(run):
    output, rewards = run / "launched", run / "my_rewards.py"
    rewards.write_text(
        "def count_letters(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )
    command = options(
        model_name_or_path=run / "base", quantization="none", dtype="float32", lora_r=3, lora_layers="top-2"
    )
    command += options(
        dataset_name=run / "prompts.jsonl",
        output_dir=output,
        num_rollouts=1,
        num_ppo_epochs=1,
        response_length=4,
    )
    command += options(
        reward_function=f"{rewards}:count_letters",
        per_device_train_batch_size=8,
        score_calibration_prompts=24,
    )
    command += options(
        use_cpu=True,
        report_to="tensorboard",
        save_strategy="no",
        advantage_estimator="rloo",
        num_generations=2,
    )
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        str(ROOT / "recipes" / "ppo.py"),
    ]
    done = subprocess.run(
        [*launch, *command],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"TORCH_COMPILE_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (output / "adapter_model.safetensors").is_file() and not (output / "value").exists()
    assert (output / "stage.json").is_file() and (output / "curves.png").is_file()
    assert list(output.rglob("events.out.tfevents*")), "report_to=tensorboard wrote nothing"


def test_an_adapter_that_is_not_there_is_an_error_before_the_model_loads(tmp_path):
    arguments = options(
        model_name_or_path="no/such/model",
        dataset_name="x.jsonl",
        output_dir=tmp_path,
        reward_adapter=tmp_path / "none",
    )
    with pytest.raises(ValueError, match=r"reward_adapter: .* has no adapter_config.json"):
        recipe("ppo").main([*arguments, "--use_cpu", "True"])


def test_a_loop_of_ones_own_trains_over_two_turns_and_goes_on_from_a_checkpoint(tiny_base, tmp_path):
    data = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompts(16))
    settings = {
        "model_name_or_path": tiny_base,
        "quantization": "none",
        "dtype": "float32",
        "lora_r": 3,
        "lora_layers": "top-2",
        "critic": "shared",
    }
    settings |= {
        "per_device_train_batch_size": 8,
        "num_rollouts": 3,
        "num_ppo_epochs": 1,
        "response_length": 4,
        "score_normalization": "none",
    }
    settings |= {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "rating": f"{recipe_runs.__file__}:count_good",
    }
    settings |= {"dataset_name": data, "questions": " bad bad", "save_strategy": "steps", "save_steps": 1}
    recipe("own_loop").main(options(**settings, output_dir=tmp_path / "straight"))
    rows = [row for row in read_jsonl(tmp_path / "straight" / "metrics.jsonl") if "objective/kl" in row]
    assert len(rows) == 3 and rows[0]["objective/kl"] == 0 != rows[2]["objective/kl"]
    assert 2 <= rows[0]["rollout/response_tokens"] <= 8, "the environment's two tokens do not count"
    options_again = options(
        **settings,
        output_dir=tmp_path / "resumed",
        resume_from_checkpoint=tmp_path / "straight" / "checkpoint-2",
    )
    recipe("own_loop").main(options_again)
    want, got = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "resumed"))
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


# Tests/training/test_launch.py
CONFIGS = sorted(
    path for path in (ROOT / "recipes" / "configs").rglob("*.yaml") if path.parent.name != "accelerate"
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_configuration_parses_with_its_recipes_own_parser(path):
    on_cpu = [] if path.stem == "evaluate" or "use_cpu" in path.read_text() else ["--use_cpu", "True"]
    # A configuration of one size of model, or of one card, has it at its end: ppo_8b_8gb
    name = path.stem if path.stem == "own_loop" else path.stem.partition("_")[0]
    of_ppo = path.parent.name == "from_trl" or name == "verifiable"
    types = settings_of("ppo" if of_ppo else name)
    parsed = cli.parse(*types, args=["--config", str(path), *on_cpu])
    settings = yaml.safe_load(path.read_text())
    assert any(
        instance.__dict__.get("model_name_or_path") == settings["model_name_or_path"] for instance in parsed
    )


WHEN_IMPORTED = """
import importlib.abc, logging, runpy, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "bitsandbytes":
            print("bitsandbytes says:", logging.getLevelName(logging.getLogger(name).getEffectiveLevel()))

sys.meta_path.insert(0, Watch())
sys.argv = [sys.argv[1], "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "evaluate", "own_loop"])
def test_what_bitsandbytes_says_of_its_kernels_when_it_is_imported_is_not_shown(name):
    """On a CPU with AVX512-BF16 it asks for a package that it does not need."""
    ended = subprocess.run(
        [sys.executable, "-c", WHEN_IMPORTED, f"recipes/{name}.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0 and "bitsandbytes says: ERROR" in ended.stdout, ended.stderr
    assert "kernels" not in ended.stderr


def test_sft_evaluates_on_its_held_out_rows_and_asks_for_them_where_it_should(tmp_path):
    base, rows = tiny.save_base(tmp_path / "base"), tiny.write_rows(tmp_path / "t.jsonl", tiny.texts(8))
    settings = {
        "model_name_or_path": base,
        "quantization": "none",
        "dtype": "float32",
        "lora_r": 3,
        "lora_alpha": 6,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "dataset_name": rows,
        "output_dir": tmp_path / "sft",
    }
    with pytest.raises(ValueError, match=r"eval_strategy: steps needs held-out rows: .* eval_dataset_name"):
        recipe("sft").main(options(**settings, eval_strategy="steps"))
    recipe("sft").main(options(**settings, eval_dataset_name=rows))
    assert any("eval_loss" in logged for logged in read_jsonl(tmp_path / "sft" / "metrics.jsonl"))


def test_a_reward_model_is_trained_on_pairs_made_of_others_and_says_so(tmp_path, capsys):
    base = tiny.save_base(tmp_path / "base")
    pairs = tiny.write_rows(tmp_path / "pairs.jsonl", tiny.preferences(24))
    held = tiny.write_rows(tmp_path / "held.jsonl", tiny.preferences(8))
    settings = {
        "model_name_or_path": base,
        "dataset_name": pairs,
        "eval_dataset_name": held,
        "augment_pairs": {"other_prompt": 0.5, "neutral": 0.25},
        "output_dir": str(tmp_path / "reward"),
        "quantization": "none",
        "dtype": "float32",
        "lora_r": 3,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "gradient_checkpointing": False,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    main, config = recipe("reward").main, ["--config", str(tmp_path / "config.yaml")]
    trainer = main(config)

    # Told, and trained on, and the held-out rows left alone
    assert "augment_pairs: 18 pairs made beside 24 of the data" in capsys.readouterr().out
    assert len(trainer.train_dataset) == 42 and len(trainer.eval_dataset["eval"]) == 8
    lineage = read_json(tmp_path / "reward" / "goose_lora.json")
    assert lineage["settings"]["augment_pairs"] == ["other_prompt=0.5", "neutral=0.25"]
    assert [row.get("augmented") for row in lineage["data"]] == [{"other_prompt": 12, "neutral": 6}, None]
    assert "pairs made of them: " in (tmp_path / "reward" / "README.md").read_text()

    # Part of what a run that goes on must have alike; the command line says the same as the file
    with pytest.raises(UserError, match="augment_pairs"):
        main([*config, "--augment_pairs", "other_prompt=1", "--resume_from_checkpoint", "latest"])
    main(
        [*config, "--augment_pairs", "other_prompt=0.5", "neutral=0.25", "--resume_from_checkpoint", "latest"]
    )
