"""One whole turn of the loop on a tiny base: a policy's replies are labelled, a reward model learns
from the labels, PPO from the reward model, and the new policy's replies are labelled again."""

import pytest
import tiny
from recipe_runs import options, recipe

from goose_lora.apps.label import open_queue
from goose_lora.files import read_json, read_jsonl
from goose_lora.sharing.provenance import read_chain


def liking(text):
    """What the scripted labeler likes: a last word with a vowel from early in the alphabet; 1 for
    an a, 0 for a u."""
    return 1 - "aeiou".index(next(letter for letter in text.split()[-1] if letter in "aeiou")) / 4


def label_all(run, prompts, out, **how):
    """Label until there is nothing left; returns the pairs."""
    queue, pairs = open_queue(run, prompts, out, max_new_tokens=6, **how), []
    while (pair := queue.next("script")) is not None:
        left, right = liking(pair.left.text), liking(pair.right.text)
        assert queue.record(
            "script", pair.key, "tie" if left == right else "left" if left > right else "right"
        )
        pairs.append(pair)
    return pairs


@pytest.fixture(scope="module")
def turned(tiny_base, tmp_path_factory):
    """The folder of the stages, and the pairs shown of the first and of the second policy."""
    folder = tmp_path_factory.mktemp("loop")
    files = {
        name: tiny.write_rows(folder / f"{name}.jsonl", getattr(tiny, name)(24))
        for name in ("texts", "prompts")
    }
    model = {
        "model_name_or_path": tiny_base,
        "quantization": "none",
        "dtype": "float32",
        "lora_r": 3,
        "lora_alpha": 6,
        "lora_layers": "top-3",
    }
    train = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 1e-2,
    }
    short = train | {"bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 8}
    recipe("sft").main(
        options(**model, **short, dataset_name=files["texts"], output_dir=folder / "sft", max_steps=2)
    )
    before = label_all(folder / "sft", files["prompts"], folder / "pairs.jsonl")
    pairs = {"dataset_name": folder / "pairs.jsonl", "eval_dataset_name": folder / "pairs.jsonl"}
    recipe("reward").main(options(**model, **short, **pairs, output_dir=folder / "reward", max_steps=24))
    ppo = {
        "num_rollouts": 2,
        "num_ppo_epochs": 2,
        "response_length": 6,
        "per_device_train_batch_size": 12,
        "score_calibration_prompts": 24,
    }
    ppo |= {"policy_adapter": folder / "sft", "reward_adapter": folder / "reward"}
    recipe("ppo").main(
        options(**model, **train, **ppo, dataset_name=files["prompts"], output_dir=folder / "ppo")
    )
    return folder, before, label_all(folder / "ppo", files["prompts"], folder / "pairs.jsonl")


def test_the_reward_model_learns_what_the_labeler_likes_and_ties_are_kept_beside_the_pairs(turned):
    folder, _, _ = turned
    rows, passed = read_jsonl(folder / "pairs.jsonl"), read_jsonl(folder / "pairs.passed.jsonl")
    assert {row["choice"] for row in passed} == {"tie"}
    assert all(liking(row["chosen"]) > liking(row["rejected"]) for row in rows)
    verdict = read_json(folder / "reward" / "verdict.json")
    assert (
        verdict["accuracy"] > 0.9
        and verdict["n_pairs"] == sum(row["policy"] == rows[0]["policy"] for row in rows) > 8
    )


def test_the_new_policy_says_something_else_and_is_asked_about_every_prompt_again(turned):
    folder, before, after = turned
    assert len(before) == len(after) == 24 and [pair.prompt for pair in before] == [
        pair.prompt for pair in after
    ]
    assert any(old.left.text != new.left.text for old, new in zip(before, after, strict=True)), (
        "one policy would say the same again"
    )
    assert before[0].left.score is None and all(new.left.score != new.right.score for new in after)
    rows = read_jsonl(folder / "pairs.jsonl") + read_jsonl(folder / "pairs.passed.jsonl")
    asked = {(row["prompt"], row["policy"]) for row in rows}
    assert len(rows) == len(asked) == 48 and len({policy for _, policy in asked}) == 2


def test_the_new_policys_chain_leads_to_the_file_of_labels(turned):
    links = {link.stage: link for link in read_chain(turned[0] / "ppo")}
    assert [link.problems for link in links.values()] == [[], [], []]
    assert {row["name"] for row in links["reward"].lineage["data"]} == {str(turned[0] / "pairs.jsonl")}
