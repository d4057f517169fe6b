"""Memory that is short in generation and scoring: groups are halved, and the run goes on."""

import itertools
import logging

import pytest
import tiny_runs
import torch

from goose_lora.ppo import collector


def run_of(tmp_path, **changes):
    return tiny_runs.trainer(tmp_path, local_rollout_forward_batch_size=8, num_rollouts=1, **changes)


def short_above(rows, monkeypatch, owner, name, count):
    """Let a function be out of memory above ``rows`` replies, and note the groups that it gets."""
    inner, seen = getattr(owner, name), []

    def limited(*args, **kwargs):
        seen.append(count(*args))
        if seen[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, limited)
    return seen


def test_generation_goes_on_in_halves_and_says_so_once(tmp_path, monkeypatch, caplog):
    run = run_of(tmp_path)
    seen = short_above(4, monkeypatch, collector, "sample", lambda shared, ids, *rest: len(ids))
    with caplog.at_level(logging.WARNING):
        run.train()
    assert seen[0] == 8 and set(seen[1:]) == {4} and run.collector.batch_size == 4
    said = [record.message for record in caplog.records if "out of memory" in record.message]
    assert said == [
        "out of memory with a group of 8 replies: going on with groups of 4. Set"
        " local_rollout_forward_batch_size to that."
    ]


@pytest.mark.parametrize("greedy", [True, False])
def test_replies_in_halves_are_those_of_whole_groups(tmp_path, monkeypatch, greedy):
    prompts = run_of(tmp_path / "rows").collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}] * 4)
    rollouts = []
    for number, rows in enumerate((99, 3)):
        run = run_of(tmp_path / str(number))
        short_above(rows, monkeypatch, collector, "sample", lambda shared, ids, *rest: len(ids))
        torch.manual_seed(0)
        rollouts.append(
            run.collector.generate(prompts["input_ids"], prompts["attention_mask"], greedy=greedy)
        )
        monkeypatch.undo()
    whole, halves = rollouts
    assert torch.equal(halves.input_ids[:, :3], whole.input_ids[:, :3]), "each reply stays beside its prompt"
    if greedy:
        assert torch.equal(halves.input_ids, whole.input_ids)


def test_scoring_goes_on_in_halves_and_finds_the_same(tmp_path, monkeypatch):
    run = run_of(tmp_path)
    prompts = run.collate([{"input_ids": [5, 6, 7]}] * 8)
    rollout = run.collector.generate(prompts["input_ids"], prompts["attention_mask"])
    whole = run.collector.evaluate(rollout)
    seen = short_above(2, monkeypatch, run.collector, "_evaluate_group", lambda group: len(group.ended))
    halves = run.collector.evaluate(rollout)
    assert seen == [8, 4, 2, 2, 2, 2] and run.collector.batch_size == 2
    for name in ("logprobs", "ref_logprobs", "values"):
        assert torch.allclose(getattr(halves, name), getattr(whole, name), atol=1e-5), name


def test_one_reply_that_does_not_fit_and_other_errors_end_the_run(tmp_path, monkeypatch):
    run = run_of(tmp_path)
    short_above(0, monkeypatch, collector, "sample", lambda shared, ids, *rest: len(ids))
    with pytest.raises(torch.OutOfMemoryError):
        run.train()

    def broken(*args, **kwargs):
        raise RuntimeError("another error")

    monkeypatch.setattr(collector, "sample", broken)
    with pytest.raises(RuntimeError, match="another error"):
        run_of(tmp_path / "other").train()


def test_an_evaluation_that_goes_on_in_halves_asks_each_prompt_once(tmp_path, monkeypatch):
    asked = []

    def watch(completion_ids, label, **columns):
        asked.append(label)
        return tiny_runs.even_share(completion_ids)

    run = tiny_runs.trainer(
        tmp_path,
        rows=tiny_runs.prompt_rows().add_column("label", ["train"] * 64),
        reward=watch,
        eval_rows=tiny_runs.held_out().add_column("label", list("abcdefgh")),
        score_normalization="none",  # no replies before the evaluation's
        local_rollout_forward_batch_size=4,
    )
    short_above(2, monkeypatch, collector, "sample", lambda shared, ids, *rest: len(ids))
    asked.clear()
    run.evaluate()
    assert run.collector.batch_size == 2
    assert sorted(itertools.chain(*asked)) == sorted(2 * "abcdefgh"), "sampled and greedy"
