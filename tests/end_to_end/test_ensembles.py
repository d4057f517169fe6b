"""Reward models on one base that score as one: trained, saved, gone on with, and used by PPO."""

import shutil

import pytest
import reward_runs
import tiny
import tiny_runs
import torch
import yaml
from peft import AutoPeftModelForSequenceClassification
from recipe_runs import recipe
from safetensors.torch import load_file

from goose_lora.errors import UserError
from goose_lora.evaluation.verdict import PROBES
from goose_lora.files import read_json, read_jsonl
from goose_lora.models.ensembles import read_ensemble
from goose_lora.models.loading import load_base, load_tokenizer
from goose_lora.models.shared_base import SharedBase
from goose_lora.planning.memory import plan_run
from goose_lora.sharing.hub import files_to_upload


def settings(folder, **changes):
    """Members that learn from further pairs, and leave checkpoints."""
    own = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    own["augment_pairs"] = {"other_prompt": 0.5, "neutral": 0.25}
    return reward_runs.settings(folder, **own | changes)


def train(folder, **changes):
    return recipe("reward").main(settings(folder, **changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble")
    train(folder)
    return folder


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    train(folder, members="heads")
    return folder


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def pefts_scores(folder, rows):
    """PEFT's own reload of a member, one text at a time."""
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    model.config.pad_token_id = 0
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits.item() for ids in rows]


def test_each_member_loads_by_itself_and_scores_what_the_manifest_was_made_of(run):
    tokenizer = load_tokenizer(tiny.arguments(str(run / "base")))
    chosen = [
        tokenizer(row["prompt"] + row["chosen"])["input_ids"] + [tokenizer.eos_token_id]
        for row in tiny.preferences(12)
    ]
    ensemble = read_ensemble(run / "reward")
    assert [member.folder for member in ensemble.members] == [".", "member_1", "member_2"]
    for place, member in enumerate(ensemble.members):
        scores = torch.tensor(pefts_scores(run / "reward" / f"member_{place}", chosen), dtype=torch.float64)
        assert abs(scores.mean() - member.origin) < 1e-4
        assert abs(scores.std(correction=0) - member.spread) < 1e-4
    assert same(weights(run / "reward"), weights(run / "reward" / "member_0"))


def test_the_first_member_is_the_reward_model_that_one_alone_would_be(run, tmp_path):
    shutil.copytree(run / "base", tmp_path / "base")
    train(tmp_path, num_members=1)
    assert same(weights(tmp_path / "reward"), weights(run / "reward" / "member_0"))
    assert not (tmp_path / "reward" / "members.json").exists()


def test_members_have_other_weights_and_every_second_one_no_made_pairs(run):
    members = [weights(run / "reward" / f"member_{place}") for place in range(3)]
    name = next(name for name in members[0] if "lora_A" in name)
    assert not torch.equal(members[0][name], members[1][name])
    assert not torch.equal(members[1][name], members[2][name])
    assert [member.augmented for member in read_ensemble(run / "reward").members] == [True, False, True]


def test_the_verdict_has_each_member_each_aggregation_and_their_disagreement(run):
    verdict = read_json(run / "reward" / "verdict.json")
    assert verdict["members"].keys() == {"member_0", "member_1", "member_2"}
    assert verdict["aggregations"].keys() == {"mean", "min", "mean_minus_std"}
    assert verdict["accuracy"] == verdict["aggregations"]["mean"]["accuracy"]
    assert verdict["disagreement"].keys() == {"chosen", *PROBES}
    card = (run / "reward" / "README.md").read_text()
    assert "as the mean of 3 reward models" in card and "the weights here are the first one's" in card
    own = read_json(run / "reward" / "member_1" / "verdict.json")
    assert own["accuracy"] == verdict["members"]["member_1"]["accuracy"]
    assert read_json(run / "reward" / "member_1" / "goose_lora.json")["figures"]["seed"] == 43


def losses(path):
    """Each logged loss, behind its member where one is noted, and its step."""
    rows = [row for row in read_jsonl(path) if "loss" in row]
    assert rows
    return [tuple(row[name] for name in ("member", "step", "loss") if name in row) for row in rows]


@pytest.mark.parametrize("kind", ["adapters", "heads"])
def test_a_run_that_was_killed_between_and_inside_members_goes_on_exactly(run, heads, tmp_path, kind):
    shutil.copytree(run if kind == "adapters" else heads, tmp_path, dirs_exist_ok=True)
    want = [weights(tmp_path / "reward" / f"member_{place}") for place in range(3)]
    manifest = read_json(tmp_path / "reward" / "members.json")
    logged = losses(tmp_path / "reward" / "metrics.jsonl")

    # As if it had been killed in the second member's training, after its fourth step
    for name in ("adapter_config.json", "members.json", "member_1/finished.json"):
        (tmp_path / "reward" / name).unlink()
    shutil.rmtree(tmp_path / "reward" / "member_1" / "checkpoint-6")
    shutil.rmtree(tmp_path / "reward" / "member_2")
    before = (tmp_path / "reward" / "member_0" / "adapter_model.safetensors").stat().st_mtime_ns
    train(tmp_path, members=kind, resume_from_checkpoint="latest")
    got = [weights(tmp_path / "reward" / f"member_{place}") for place in range(3)]
    assert all(same(one, other) for one, other in zip(want, got, strict=True))
    assert read_json(tmp_path / "reward" / "members.json") == manifest
    assert losses(tmp_path / "reward" / "metrics.jsonl") == logged  # of those that were finished too
    assert losses(tmp_path / "reward" / "member_0" / "metrics.jsonl") == [
        row[1:] for row in logged if not row[0]
    ]
    after = (tmp_path / "reward" / "member_0" / "adapter_model.safetensors").stat().st_mtime_ns
    assert after == before  # it was not trained again


def test_a_run_whose_members_were_all_finished_tells_what_they_took(run, tmp_path):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    before = read_json(tmp_path / "reward" / "stage.json")
    train(tmp_path, resume_from_checkpoint="latest")
    again = read_json(tmp_path / "reward" / "stage.json")
    took = {name: again[name] for name in ("steps", "loss", "members")}
    assert took == {name: before[name] for name in took}
    assert took["steps"] == 6


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 2e-2},
        {"max_steps": 8},
        {"num_members": 2},
        {"num_members": 1},
        {"augment_pairs": {"cut": 1}},
    ],
)
def test_a_run_of_other_settings_does_not_go_on_from_finished_members(run, tmp_path, change):
    shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(UserError, match="resume_from_checkpoint"):
        train(
            tmp_path / "copy",
            resume_from_checkpoint="latest",
            model_name_or_path=str(tmp_path / "copy" / "base"),
            **change,
        )


def test_references_that_come_later_shift_the_finished_members_too(run, tmp_path):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    references = tiny.write_rows(
        tmp_path / "references.jsonl",
        [{"prompt": "ba", "completion": " lo lo"}, {"prompt": "de", "completion": " ku"}],
    )
    train(tmp_path, resume_from_checkpoint="latest", reference_dataset_name=references)
    folder, tokenizer = tmp_path / "reward", load_tokenizer(tiny.arguments(str(run / "base")))
    texts = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in ("ba lo lo", "de ku")]
    for place in range(3):
        scores = pefts_scores(folder / f"member_{place}", texts)
        bias = read_json(folder / f"member_{place}" / "goose_lora.json")["reward_bias"]
        assert bias == pytest.approx(sum(scores) / 2, abs=1e-4) and abs(bias) > 1e-3
    assert same(weights(folder / "member_1"), weights(run / "reward" / "member_1"))
    first = read_json(folder / "member_0" / "goose_lora.json")
    assert read_json(folder / "goose_lora.json")["reward_bias"] == first["reward_bias"]
    assert first["figures"]["steps"] == 6 and first["stage"] == "reward"


def test_held_out_replies_that_are_one_text_are_refused_before_anything_loads(run, tmp_path):
    shutil.copytree(run / "base", tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "one.jsonl", [{"prompt": "ba", "chosen": " good", "rejected": " bad"}])
    with pytest.raises(
        UserError, match=r"eval_dataset_name: all chosen replies of its 1 prompts are one text"
    ):
        train(tmp_path, eval_dataset_name=rows)
    assert not (tmp_path / "reward" / "member_0").exists()


def test_a_finished_member_that_was_changed_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    folder = tmp_path / "copy" / "reward"
    shutil.copy(folder / "member_1" / "adapter_model.safetensors", folder / "member_0")
    with pytest.raises(UserError, match="is not the one that was saved"):
        train(tmp_path / "copy", resume_from_checkpoint="latest")


def test_a_members_folder_that_is_anothers_is_refused_before_anything_loads(tmp_path):
    (tmp_path / "reward" / "member_1").mkdir(parents=True)
    (tmp_path / "reward" / "member_1" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"member_1 has adapter_config\.json, which no run"):
        train(tmp_path)
    assert not (tmp_path / "reward" / "member_0").exists()


def test_heads_are_on_the_first_members_states(heads):
    members = [weights(heads / "reward" / f"member_{place}") for place in range(3)]
    for name in members[0]:
        equal = [torch.equal(members[0][name], member[name]) for member in members[1:]]
        assert equal == [not name.endswith("score.weight")] * 2, name
    assert read_ensemble(heads / "reward").kind == "heads"


def ppo(run, folder, **changes):
    found = {
        "model_name_or_path": str(run / "base"),
        "dataset_name": tiny.write_rows(folder / "prompts.jsonl", tiny.prompts(16)),
        "reward_adapter": str(run / "reward"),
        "output_dir": str(folder / "ppo"),
        "quantization": "none",
        "dtype": "float32",
        "lora_r": 3,
        "lora_layers": "top-2",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "num_rollouts": 2,
        "response_length": 5,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": 1,
        "num_ppo_epochs": 1,
        "score_calibration_prompts": 8,
        "save_strategy": "no",
        "force": True,  # a verdict on twelve pairs may be chance
    }
    path = folder / "ppo.yaml"
    path.write_text(yaml.safe_dump(found | changes))
    return recipe("ppo").main(["--config", str(path)])


def texts(run, count=9):
    tokenizer = load_tokenizer(tiny.arguments(str(run / "base")))
    return [tokenizer(f"{row['prompt']} good")["input_ids"] for row in tiny.prompts(count)]


def scored(shared, rows):
    longest = max(map(len, rows)) + 2
    right = [place % 3 for place in range(len(rows))]  # padded on both sides, as rollouts are
    left = [longest - len(row) - after for row, after in zip(rows, right, strict=True)]
    sides = list(zip(left, rows, right, strict=True))
    ids = torch.tensor([[0] * before + row + [0] * after for before, row, after in sides])
    mask = torch.tensor([[0] * before + [1] * len(row) + [0] * after for before, row, after in sides])
    roles = ["policy", *dict.fromkeys(shared.member_states.values())]
    with torch.no_grad():
        return shared.judge(ids, mask, shared.trunks(ids, mask, roles))


def by_hand(folder, rows, aggregation, coef=1.0):
    """The aggregated score of PEFT's own reloads, by the words of the manifest's documentation."""
    found = read_json(folder / "members.json")
    columns = []
    for member in found["members"]:
        scores = pefts_scores(folder / member["folder"], rows)
        columns.append([(score - member["origin"]) / member["spread"] for score in scores])
    whole = []
    for one in zip(*columns, strict=True):
        mean = sum(one) / len(one)
        spread = (sum((x - mean) ** 2 for x in one) / len(one)) ** 0.5
        value = {"mean": mean, "min": min(one), "mean_minus_std": mean - coef * spread}[aggregation]
        whole.append((found["shift"] + found["scale"] * value, spread))
    return zip(*whole, strict=True)


@pytest.mark.parametrize("aggregation", ["mean", "min", "mean_minus_std"])
def test_a_shared_base_scores_the_aggregate_of_what_each_members_own_reload_says(run, aggregation):
    rows = texts(run)
    got = scored(built(run, reward_aggregation=aggregation), rows)
    want, apart = by_hand(run / "reward", rows, aggregation)
    assert torch.allclose(got.scores, torch.tensor(want, dtype=torch.float32), atol=1e-4)
    assert torch.allclose(got.disagreement, torch.tensor(apart, dtype=torch.float32), atol=1e-4)


@pytest.mark.parametrize(("aggregation", "coef"), [(None, None), ("mean_minus_std", 0.5)])
def test_ppo_pays_the_aggregate_of_what_each_members_own_reload_says(run, tmp_path, aggregation, coef):
    given = {"reward_aggregation": aggregation, "uncertainty_coef": coef}
    trainer = ppo(run, tmp_path, **{name: value for name, value in given.items() if value is not None})
    rows = texts(run)
    got = scored(trainer.shared, rows)
    want, apart = by_hand(run / "reward", rows, aggregation or "mean", 1.0 if coef is None else coef)
    assert torch.allclose(got.scores, torch.tensor(want, dtype=torch.float32), atol=1e-4)
    assert torch.allclose(got.disagreement, torch.tensor(apart, dtype=torch.float32), atol=1e-4)

    # Logged, and saved so that it is the same ensemble
    logged = [row for row in trainer.state.log_history if "objective/score" in row]
    assert all(row["objective/disagreement"] > 0 for row in logged)
    again, _ = by_hand(
        tmp_path / "ppo" / "reward", rows, aggregation or "mean", 1.0 if coef is None else coef
    )
    assert again == pytest.approx(want, abs=1e-5)
    saved = read_ensemble(tmp_path / "ppo" / "reward")
    assert saved.aggregation == (aggregation or "mean")
    parent = read_json(tmp_path / "ppo" / "goose_lora.json")["parents"]["reward"]
    assert parent["members"] == [member.sha256 for member in read_ensemble(run / "reward").members]


def test_heads_that_share_states_are_scored_in_one_pass(heads, monkeypatch):
    shared = built(heads)
    assert set(shared.member_states.values()) == {"reward"}
    asked = []
    plain = SharedBase.hidden
    monkeypatch.setattr(
        SharedBase,
        "hidden",
        lambda self, role, *args, **kwargs: asked.append(role) or plain(self, role, *args, **kwargs),
    )
    rows = texts(heads)
    got = scored(shared, rows)
    assert asked == ["reward"]
    want, _ = by_hand(heads / "reward", rows, "mean")
    assert torch.allclose(got.scores, torch.tensor(want, dtype=torch.float32), atol=1e-4)


@pytest.mark.parametrize("critic", ["adapter", "reward_features"])
def test_a_critic_that_copies_the_reward_starts_as_the_first_member_in_the_units_of_all(run, critic):
    shared = built(run, critic=critic)
    rows = texts(run)
    ids = torch.tensor([rows[0]])
    with torch.no_grad():
        hidden = shared.hidden("value", ids, torch.ones_like(ids))[:, -1]
        value = shared.apply_head("value", hidden).item()
    first = read_ensemble(run / "reward")
    own = torch.tensor(pefts_scores(run / "reward", rows[:1]))
    assert value == pytest.approx(first.aligned(0, own).item(), abs=1e-4)


def test_a_ppo_run_on_an_ensemble_goes_on_exactly(run, tmp_path):
    whole = ppo(run, tmp_path, num_rollouts=2, save_strategy="steps", save_steps=1)
    want = weights(tmp_path / "ppo")
    shutil.rmtree(tmp_path / "ppo" / "checkpoint-2")
    again = ppo(
        run, tmp_path, num_rollouts=2, save_strategy="steps", save_steps=1, resume_from_checkpoint="latest"
    )
    assert same(want, weights(tmp_path / "ppo"))
    assert again.shared.reward_roles == whole.shared.reward_roles == ("reward", "reward_1", "reward_2")
    with pytest.raises(UserError, match="reward_aggregation"):
        ppo(run, tmp_path, reward_aggregation="min", resume_from_checkpoint="latest")


def test_a_member_that_is_missing_or_changed_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    folder = tmp_path / "copy" / "reward"
    shutil.copy(folder / "member_1" / "adapter_model.safetensors", folder / "member_2")
    with pytest.raises(UserError, match=r"member_2.*is not the one"):
        ppo(tmp_path / "copy", tmp_path)
    shutil.rmtree(folder / "member_2")
    with pytest.raises(UserError, match="member_2 has no adapter_model"):
        ppo(tmp_path / "copy", tmp_path)


def built(run, **roles):
    args = tiny.arguments(str(run / "base"))
    base = load_base(args, load_tokenizer(args))
    return SharedBase.build(base, tiny.lora(base, layers="top-2"), reward=run / "reward", **roles)


def test_the_plan_counts_all_members_to_the_byte(run, tmp_path):
    shared = built(run, critic="adapter")
    model = tiny.arguments(str(run / "base"), lora_r=3, lora_layers="top-2")
    config = tiny_runs.config(tmp_path, critic="adapter")

    def planned(reward):
        return plan_run(model, config, policy=None, reward=str(reward), memory=10**12, device="cpu").roles

    whole, alone = planned(run / "reward"), planned(run / "reward" / "member_0")
    own = {id(p): p for role in shared.role_plan.adapters for _, p in shared.role_parameters(role)}
    assert len(whole.members) == 2 and alone.members == ()
    assert whole.bytes == sum(p.numel() * p.element_size() for p in own.values())
    assert whole.bytes - alone.bytes == 2 * 4 * alone.reward.with_head


def test_an_ensemble_is_not_uploaded_as_its_first_member_alone(run):
    with pytest.raises(UserError, match=r"goose-lora push takes one adapter.*hf upload user/repo"):
        files_to_upload(run / "reward")
    assert "adapter_config.json" in files_to_upload(run / "reward" / "member_1")
