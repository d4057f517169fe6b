"""One score of several reward models, against the words of its definition."""

from statistics import fmean, pstdev

import pytest
import torch
from closeness import close
from hypothesis import given
from hypothesis import strategies as st

from goose_lora.functional import aggregate_scores, disagreement

SCORES = st.integers(1, 5).flatmap(
    lambda members: st.lists(
        st.lists(st.floats(-20, 20, width=32), min_size=members, max_size=members), min_size=1, max_size=6
    )
)


def slowly(reply, aggregation, coef):
    whole = {"mean": fmean(reply), "min": min(reply), "mean_minus_std": fmean(reply) - coef * pstdev(reply)}
    return whole[aggregation]


@given(SCORES, st.sampled_from(["mean", "min", "mean_minus_std"]), st.floats(0, 3))
def test_each_aggregation_is_what_it_says(replies, aggregation, coef):
    scores = torch.tensor(replies, dtype=torch.float64).T
    got = aggregate_scores(scores, aggregation=aggregation, uncertainty_coef=coef)
    close(got, [slowly(reply, aggregation, coef) for reply in replies])
    close(disagreement(scores), [pstdev(reply) for reply in replies])


@pytest.mark.parametrize("aggregation", ["mean", "min", "mean_minus_std"])
def test_copies_of_one_member_score_as_it_does_and_a_common_scale_passes_through(aggregation):
    one = torch.randn(7, dtype=torch.float64)
    copies = one.expand(4, -1)
    close(aggregate_scores(copies, aggregation=aggregation), one)
    several = torch.randn(3, 7, dtype=torch.float64)
    whole = aggregate_scores(several, aggregation=aggregation)
    close(aggregate_scores(2.5 * several - 3, aggregation=aggregation), 2.5 * whole - 3)
