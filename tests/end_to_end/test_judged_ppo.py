"""recipes/ppo.py with a judge behind a server as reward, from the first line to the last."""

import pytest
import recipe_runs
import tiny
import torch
from judge_server import completion, judge_server, longer, question
from recipe_runs import options, recipe
from safetensors.torch import load_file

from goose_lora.errors import UserError
from goose_lora.files import read_json, read_jsonl
from goose_lora.ownership import written
from goose_lora.rewards import pairwise_judge

KEY = "Zq7planted55Value"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base and prompts: chat messages with a system's turn."""
    folder = tmp_path_factory.mktemp("judged")
    rows = [
        {
            "prompt": [
                {"role": "system", "content": "ba"},
                {"role": "user", "content": row["prompt"]},
            ]
        }
        for row in tiny.prompts(16)
    ]
    return {
        "model_name_or_path": tiny.save_base(folder / "base"),
        "dataset_name": tiny.write_rows(folder / "prompts.jsonl", rows),
    }


def arguments(files, folder, server, *words, **changes):
    settings = {
        "output_dir": folder,
        "quantization": "none",
        "dtype": "float32",
        "lora_r": 3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "num_rollouts": 3,
        "num_ppo_epochs": 1,
        "response_length": 5,
        "advantage_estimator": "rloo",
        "num_generations": 4,
        "score_calibration_prompts": 8,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "judge_base_url": server.url,
    }
    sources = ["--reward_function", "openai:org/m", f"{recipe_runs.__file__}:count_good"]
    return [*options(**files, **settings | changes), *sources, "--reward_weights", "1.0", "0.5", *words]


def test_a_run_tells_its_calls_survives_a_server_and_keeps_the_key_to_itself(
    files, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(pairwise_judge, "ANSWER_RETRIES", 1)
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    with judge_server() as server:
        recipe("ppo").main(arguments(files, whole, server))
        said = "".join(capfd.readouterr())
        assert "at most 12 calls a prompt, 24 a rollout, 72 for the run of 3 rollouts, and 24 before" in said
        asked = len(server.bodies)
        assert "openai:org/m (rubric " in said
        assert f": {asked} calls, 0 answers from {whole / 'judge_cache.jsonl'}." in said
        # Chat prompts come as the rows have them, the made-up question apart
        prompts = [row["prompt"] for row in read_jsonl(files["dataset_name"])]
        assert all(question(body)["request"] in prompts for body in server.bodies[1:])

        # The same run in another folder, where the server stops in the middle of it
        no = 401, {"error": {"message": f"no {KEY} here"}}
        count = len(server.bodies)
        server.says = lambda body: longer(body) if len(server.bodies) - count <= asked - 15 else no
        with pytest.raises(UserError, match=r"\(401\).*--resume_from_checkpoint latest goes on"):
            recipe("ppo").main(arguments(files, broken, server))
        server.says = longer
        count = len(server.bodies)
        recipe("ppo").main(arguments(files, broken, server, "--resume_from_checkpoint", "latest"))
        assert len(server.bodies) - count <= 20  # one made-up, what was not answered, and four in flight
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, broken))
    assert all(torch.equal(one[key], other[key]) for key in one)
    # What was paid for stays, and another save does not take it away
    assert "judge_cache.jsonl" in written(whole).files
    assert len(read_jsonl(whole / "judge_cache.jsonl")) == asked - 1
    calls = [row["rollout/judge_calls"] for row in read_jsonl(whole / "metrics.jsonl") if "loss" in row]
    assert len(calls) == 3 and all(0 < each <= 24 for each in calls)
    assert read_json(whole / "goose_lora.json")["settings"]["judge_base_url"] == server.url
    said += "".join(capfd.readouterr())
    assert KEY not in said
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_what_a_server_says_wrong_ends_it_before_a_weight_is_read(files, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with judge_server() as server:
        server.says = lambda body: completion("Both are fine.")
        with pytest.raises(UserError, match="answered a made-up question with 'Both are fine'"):
            recipe("ppo").main(arguments(files, tmp_path / "out", server))
        assert len(server.bodies) == 1 and "loading" not in "".join(capfd.readouterr())


def test_a_resumed_run_may_not_have_another_judge(files, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "rubric.txt").write_text("Shorter is better.")
    with judge_server() as server:
        recipe("ppo").main(arguments(files, tmp_path / "out", server, num_rollouts=1))
        resumed = ("--resume_from_checkpoint", "latest")
        with pytest.raises(UserError, match="reward m"):
            recipe("ppo").main(
                arguments(files, tmp_path / "out", server, *resumed, judge_rubric=tmp_path / "rubric.txt")
            )
