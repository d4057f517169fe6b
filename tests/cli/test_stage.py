"""What a stage says of its rows before it trains."""

import logging

import pytest
import reward_runs
import tiny
from recipe_runs import recipe

from goose_lora.errors import UserError
from goose_lora.rewards.pair_trainer import PairRewardTrainer


def said(caplog, folder, **changes):
    """The warnings of recipes/reward.py up to its training."""
    with caplog.at_level(logging.WARNING), pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairRewardTrainer, "__init__", lambda *args, **kwargs: stop())
        with pytest.raises(UserError, match="before training"):
            recipe("reward").main(reward_runs.settings(folder, num_members=1, **changes))
    return caplog.text


def stop():
    raise UserError("before training")


def test_held_out_rows_that_are_trained_on_are_told(caplog, tmp_path):
    rows = tiny.write_rows(tmp_path / "mixed.jsonl", [*tiny.preferences(30)[26:], *tiny.preferences(3)])
    assert "mixed.jsonl: 3 of 7 held-out rows are in" in said(caplog, tmp_path, eval_dataset_name=rows)


def test_rows_of_their_own_are_not(caplog, tmp_path):
    rows = tiny.write_rows(tmp_path / "other.jsonl", tiny.preferences(30)[24:])
    assert "held-out rows are in" not in said(caplog, tmp_path, eval_dataset_name=rows)
