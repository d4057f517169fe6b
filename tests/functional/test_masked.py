"""Moments, their merging, and whitening."""

import pytest
import reference
import torch
from closeness import close, tensor
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import ragged

from goose_lora.functional import (
    masked_mean,
    merge_moments,
    moments,
    whiten,
)


@given(ragged(holes=True))
def test_moments_are_count_mean_and_population_variance(batch):
    mask, x = batch
    (counted,) = reference.tokens(mask, x)
    count, mean, var = moments(x, mask)
    assert count == len(counted)
    close(mean, reference.fmean(counted))
    close(var, reference.pvariance(counted))


@given(ragged(), st.floats(-1e4, 1e4))
def test_merged_moments_are_those_of_the_whole(batch, offset):
    mask, x = batch
    # Rows of different means, so that the part between them counts
    x = x + offset * torch.arange(len(x))[:, None]
    merged, whole = (
        merge_moments([moments(x[i : i + 1], mask[i : i + 1]) for i in range(len(x))]),
        moments(x, mask),
    )
    assert merged.count == whole.count
    close(merged.mean, whole.mean)
    close(merged.var, whole.var)


def test_merging_parts_far_from_zero_does_not_cancel():
    x = tensor(1e8, 1e8 + 2, 1e8 + 4, 1e8 + 6)[None]
    ones = torch.ones(1, 2, dtype=torch.bool)
    close(merge_moments([moments(x[:, :2], ones), moments(x[:, 2:], ones)]).var, 5.0)


def test_merging_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one rank"):
        merge_moments([])


@given(ragged(holes=True))
def test_whitened_tokens_have_mean_zero_and_variance_one(batch):
    mask, x = batch
    assume(x[mask].var(unbiased=False) > 0.1)
    (counted,) = reference.tokens(mask, whiten(x, mask, eps=0.0))
    assert abs(reference.fmean(counted)) < 1e-7
    assert abs(reference.pvariance(counted) - 1) < 1e-7


@given(ragged(holes=True))
def test_whitening_without_shift_keeps_the_mean(batch):
    mask, x = batch
    assume(x[mask].var(unbiased=False) > 0.1)
    close(masked_mean(whiten(x, mask, shift_mean=False), mask), masked_mean(x, mask))
    close(whiten(x, mask, shift_mean=False)[mask], whiten(x, mask)[mask] + masked_mean(x, mask))


def test_eps_is_added_to_the_variance():
    close(whiten(tensor(-1, 1)[None], torch.ones(1, 2, dtype=torch.bool), eps=3.0), [[-0.5, 0.5]])


def test_equal_tokens_whiten_to_zero():
    mask = torch.tensor([[True, False]])
    assert (whiten(torch.tensor([[3.0, 5.0]]), mask) == 0).all()


@pytest.mark.parametrize("value", [0.7, 10.1, -100.1, 1000.1])
@pytest.mark.parametrize("count", [3, 12, 77, 4096])
def test_equal_numbers_are_exactly_zero_on_ranks_together_too(value, count):
    x, mask = torch.full((count,), value), torch.ones(count, dtype=torch.bool)
    assert not whiten(x, mask).any()
    both = merge_moments([moments(x[:2], mask[:2]), moments(x[2:], mask[2:])])
    assert not whiten(x, mask, statistics=both).any()


@given(ragged())
def test_ranks_whiten_alike_by_merged_statistics(batch):
    mask, x = batch
    rows = [(x[i : i + 1], mask[i : i + 1]) for i in range(len(x))]
    statistics = merge_moments([moments(*row) for row in rows])
    # With next to no variance, whitening blows rounding errors up by 1 / sqrt(eps) = 1e4.
    assume(statistics.var > 1e-3)
    close(torch.cat([whiten(*row, statistics=statistics) for row in rows]), whiten(x, mask))
