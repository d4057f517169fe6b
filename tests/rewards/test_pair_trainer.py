"""Training on pairs of which some are ties."""

import reference
import tiny
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig

from goose_lora.data.augmentation import tokenize_augmented
from goose_lora.data.rows import RowSet
from goose_lora.rewards.pair_trainer import PairRewardTrainer
from goose_lora.rewards.ranking_trainer import pad_id


def trainer(folder, data, **settings):
    """A trainer of a tiny classifier on these rows."""
    config = tiny.base().config
    config.num_labels = 1
    torch.manual_seed(3)
    plain = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    plain |= {"disable_tqdm": True, "logging_steps": 1, "max_steps": 1, "gradient_checkpointing": False}
    return PairRewardTrainer(
        model=AutoModelForSequenceClassification.from_config(config).eval(),
        args=RewardConfig(str(folder), **plain | settings),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny.tokenizer(),
    )


def rows(**shares):
    row_set = RowSet("x", None, Dataset.from_list(tiny.preferences(16)))
    return tokenize_augmented(row_set, tiny.tokenizer(), shares, seed=0)


def scores_of(made, batch):
    """Transformers' own scores, a text alone at a time: padding has no say."""
    found = []
    for ids in [one["chosen_ids"] for one in batch] + [one["rejected_ids"] for one in batch]:
        found.append(made.model(input_ids=torch.tensor([ids])).logits.item())
    return found[: len(batch)], found[len(batch) :]


def test_ties_are_learned_as_the_cross_entropy_to_one_half(tmp_path):
    data = rows(neutral=0.5)
    made = trainer(tmp_path, data)
    batch = [data[place] for place in range(8)]
    assert {one["target"] for one in batch} == {0.5, 1.0}
    got = made.compute_loss(made.model, made.data_collator(batch)).item()
    chosen, rejected = scores_of(made, batch)
    targets = [one["target"] for one in batch]
    want = reference.pairwise_loss_with_targets(chosen, rejected, [0.0] * 8, targets)
    assert abs(got - want) < 1e-5


def test_figures_of_training_are_of_pairs_that_have_a_winner(tmp_path):
    data = rows(neutral=1.0)
    made = trainer(tmp_path, data)
    batch = [data[place] for place in range(8)]
    made.compute_loss(made.model.train(), made.data_collator(batch))
    chosen, rejected = scores_of(made, batch)
    margins = [c - r for c, r, one in zip(chosen, rejected, batch, strict=True) if one["target"] == 1.0]
    assert len(margins) == 4 and abs(made.seen["margin"][-1] - sum(margins) / 4) < 1e-5
    assert made.seen["accuracy"][-1] == sum(margin > 0 for margin in margins) / 4


def test_ties_reach_the_loss_though_unused_columns_are_removed(tmp_path):
    made = trainer(tmp_path, rows(neutral=1.0), remove_unused_columns=True)
    assert "target" in next(iter(made.get_train_dataloader()))
    made.train()
    assert {"loss", "accuracy", "margin"} <= made.state.log_history[0].keys()


def test_without_ties_the_trainer_is_trls(tmp_path):
    data = rows(other_prompt=0.5)
    made = trainer(tmp_path, data)
    batch = [data[place] for place in range(4)]
    chosen, rejected = scores_of(made, batch)
    got = made.compute_loss(made.model, made.data_collator(batch)).item()
    assert "target" not in data.column_names
    assert abs(got - reference.pairwise_loss(chosen, rejected, [0.0] * 4)) < 1e-5


def test_texts_are_filled_up_with_the_token_that_the_model_is_told_of(tmp_path):
    made = trainer(tmp_path, rows(neutral=1.0), pad_token="<unk>")
    assert made.data_collator.pad_token_id == made.model.config.pad_token_id == 3
    assert pad_id(made.args, tiny.tokenizer()) == 3
