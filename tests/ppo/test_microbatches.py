"""Microbatches without padding and within a number of tokens: the same gradients, and less of
everything else."""

import pytest
import torch
from tiny_runs import logged, trained_parameters, trainer

from goose_lora.generation.rollout import Rollout
from goose_lora.ppo.experience import Experience
from goose_lora.ppo.microbatches import Microbatch, split_by_tokens, split_in_two, trimmed

LENGTHS = ((3, 4), (1, 2), (5, 1), (2, 6))  # tokens of prompt and response


def batch(width=(7, 8)):
    """Rows of LENGTHS, left-padded prompts and right-padded responses, in which each tensor tells
    row and place."""
    prompt, response = width
    rows = len(LENGTHS)
    places = torch.arange(prompt + response)
    attended = torch.stack([(places >= prompt - p) & (places < prompt + r) for p, r in LENGTHS]).long()
    ids = 100 * torch.arange(1, rows + 1)[:, None] + places
    numbers = ids[:, prompt:].float()
    return Microbatch(
        input_ids=ids,
        attention_mask=attended,
        response_mask=attended[:, prompt:].bool(),
        old_logprobs=numbers + 0.25,
        ref_logprobs=numbers + 0.5,
        advantages=numbers,
        num_tokens=13.0,
        trunk=ids[:, :, None].float().expand(-1, -1, 3),
        features=numbers[:, :, None].expand(-1, -1, 2),
    )


def seen(parts):
    """What counts in each row of each part: ids of prompt and response, advantages, trunk,
    features and log-probabilities, by row number."""
    rows = {}
    for part in parts:
        width = part.response_mask.shape[1]
        for row, mask in enumerate(part.attention_mask.bool()):
            own = mask[-width:]
            key = int(part.input_ids[row, mask][0]) // 100
            rows[key] = [
                part.input_ids[row][mask],
                part.advantages[row][own],
                part.trunk[row][mask],
                part.features[row][own],
                part.old_logprobs[row][own],
                part.ref_logprobs[row][own],
            ]
            assert torch.equal(part.response_mask[row], own)
        assert part.num_tokens == 13.0
    return rows


def same(parts, others):
    got, want = seen(parts), seen(others)
    return got.keys() == want.keys() and all(
        torch.equal(a, b) for key in want for a, b in zip(got[key], want[key], strict=True)
    )


def test_trimming_takes_away_padding_and_nothing_else():
    whole = batch()
    made = trimmed(whole)
    assert (
        made.attention_mask.shape == (4, 5 + 6)
        and made.response_mask.shape == (4, 6)
        and made.trunk.shape == (4, 11, 3)
    )
    assert same([made], [whole])


@pytest.mark.parametrize(
    ("limit", "shapes"),
    [
        (100, [(4, 11)]),
        (24, [(2, 9), (2, 7)]),
        (8, [(1, 8), (1, 7), (1, 6), (1, 3)]),
        (1, [(1, 8), (1, 7), (1, 6), (1, 3)]),
    ],
)
def test_parts_hold_so_many_tokens_and_a_long_row_stands_alone(limit, shapes):
    parts = split_by_tokens(batch(), limit)
    assert [tuple(part.attention_mask.shape) for part in parts] == shapes
    assert all(part.padded_tokens <= limit or len(part) == 1 for part in parts)
    assert same(parts, [batch()])


def test_without_a_limit_there_is_one_part_in_the_order_of_the_rows():
    (part,) = split_by_tokens(batch(), None)
    assert (part.input_ids[:, -1] // 100).tolist() == [1, 2, 3, 4]


def test_halves_hold_every_row_once():
    parts = split_in_two(batch())
    assert [len(part) for part in parts] == [2, 2] and same(parts, [batch()])
    assert parts[0].padded_tokens + parts[1].padded_tokens < trimmed(batch()).padded_tokens


@pytest.mark.parametrize("limit", [None, 24, 8])
def test_shares_add_up_to_the_microbatch_and_the_first_part_reads_its_text(limit):
    parts = split_by_tokens(batch(), limit)
    halves = [half for part in parts if len(part) > 1 for half in split_in_two(part)]
    for cut in (parts, [part for part in parts if len(part) == 1] + halves):
        assert sum(part.share for part in cut) == pytest.approx(1.0)
        assert sum(part.reads_texts for part in cut) == 1
    assert [part.reads_texts for part in parts] == [True] + [False] * (len(parts) - 1)


def test_a_forward_pass_is_handed_over_once_and_is_of_no_part():
    whole = batch()
    whole.output = ("output",)
    assert all(part.output is None for part in split_by_tokens(whole, 8) + split_in_two(whole))
    assert whole.take_output() == ("output",) and whole.output is None and whole.take_output() is None


def ends_at(folder, **changes):
    """SGD, so that a difference in gradients shows as it is: Adam would blow up those of 1e-9."""
    settings = {
        "num_rollouts": 2,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
    }
    made = trainer(folder, **settings | changes)
    return made, trained_parameters(made.shared)


def experience(rows=24):
    """A rollout of prompts and replies of many lengths, in which each row knows its number."""
    generator = torch.Generator().manual_seed(1)
    prompts, replies = (torch.randint(1, most, (rows, 1), generator=generator) for most in (30, 20))
    places = torch.arange(30 + 20)
    attended = (places >= 30 - prompts) & (places < 30 + replies)
    ids = torch.arange(rows)[:, None].expand(-1, 50)
    mask = attended[:, 30:]
    numbers = torch.zeros(rows, 20)
    rollout = Rollout(ids, attended.long(), mask, torch.ones(rows, dtype=torch.bool), numbers)
    return Experience(rollout, numbers, numbers, numbers)


def test_in_a_step_of_several_microbatches_rows_of_like_length_stand_together():
    made = experience()
    whole = made.rollout.attention_mask.sum(-1)

    def cut(rows, per_step):
        torch.manual_seed(0)
        parts = list(made.microbatches(rows, per_step, mean_tokens=lambda tokens: tokens))
        return [part.input_ids[:, 0].tolist() for part in parts], [part.num_tokens for part in parts], parts

    alone, tokens_alone, _ = cut(12, 1)
    several, tokens, parts = cut(4, 3)
    # The same rows in each step, and the same number of tokens to divide by
    for step in (0, 1):
        of_step = several[3 * step : 3 * step + 3]
        assert sorted(row for rows in of_step for row in rows) == sorted(alone[step]) != alone[step]
        assert tokens[3 * step : 3 * step + 3] == [tokens_alone[step]] * 3
        lengths = [whole[row] for rows in of_step for row in rows]
        assert lengths == sorted(lengths, reverse=True)
    # In random order they would be padded to more
    unsorted = [trimmed(part).padded_tokens for rows in alone for part in _cut_as_they_are(made, rows)]
    assert sum(trimmed(part).padded_tokens for part in parts) < 0.9 * sum(unsorted)


def _cut_as_they_are(made, rows):
    return [made._take(torch.tensor(rows[start : start + 4]), 1.0) for start in (0, 4, 8)]


@pytest.mark.parametrize("limit", [40, 10])
def test_parts_end_at_the_parameters_and_metrics_of_the_whole(limit, tmp_path):
    results = []
    for name, most in (("whole", None), ("parts", limit)):
        made, _ = ends_at(tmp_path / name, max_tokens_per_microbatch=most)
        made.train()
        results.append((trained_parameters(made.shared), logged(tmp_path / name)))
    (want, rows), (got, other_rows) = results
    for name, parameter in want.items():
        # fp32 sums in another order over eight steps
        torch.testing.assert_close(got[name], parameter, rtol=1e-4, atol=1e-6)
    for row, other in zip(rows, other_rows, strict=True):
        for name in ("loss/policy", "loss/value", "policy/ratio_mean", "policy/skipped", "policy/entropy"):
            assert other[name] == pytest.approx(row[name], abs=1e-5), name


def test_out_of_memory_halves_the_parts_from_then_on_and_changes_nothing_else(tmp_path, monkeypatch, caplog):
    results, refused = [], []
    for name in ("roomy", "short"):
        made, _ = ends_at(tmp_path / name)
        if name == "short":
            forward = made.shared.forward

            def little_memory(input_ids, *args, forward=forward, **kwargs):
                output = forward(input_ids, *args, **kwargs)
                if torch.is_grad_enabled() and len(input_ids) > 3:
                    refused.append(len(input_ids))
                    # A part of the gradients is there already when memory ends
                    output.logprobs.sum().backward()
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                return output

            monkeypatch.setattr(made.shared, "forward", little_memory)
        made.train()
        results.append(trained_parameters(made.shared))
    for name, parameter in results[0].items():
        torch.testing.assert_close(results[1][name], parameter, rtol=1e-4, atol=1e-6)
    assert refused[:2] == [8, 4] and len(refused) < 6, "what was too large is not tried again each time"
    assert (
        "out of memory with a microbatch of" in caplog.text and "Set max_tokens_per_microbatch" in caplog.text
    )


def test_out_of_memory_with_one_row_ends_the_run(tmp_path, monkeypatch):
    made, _ = ends_at(tmp_path)

    def none(input_ids, *args, forward=made.shared.forward, **kwargs):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(input_ids, *args, **kwargs)

    monkeypatch.setattr(made.shared, "forward", none)
    with pytest.raises(torch.OutOfMemoryError):
        made.train()


def test_pretraining_text_counts_once_a_microbatch_however_it_is_cut(tmp_path):
    from tiny_runs import with_texts

    seen = {}
    for most in (None, 12):
        made = with_texts(tmp_path / str(most), 1.0, max_tokens_per_microbatch=most)
        made.train()
        seen[most] = [row["loss/ptx"] for row in logged(tmp_path / str(most)) if "loss/ptx" in row]
    assert seen[12][0] == pytest.approx(seen[None][0], abs=1e-4)


def test_no_part_is_asked_for_less_than_a_token(tmp_path):
    with pytest.raises(ValueError, match="max_tokens_per_microbatch=-5"):
        trainer(tmp_path, max_tokens_per_microbatch=-5)
