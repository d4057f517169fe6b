"""What Hypothesis draws: ragged batches in float64, and small vocabularies."""

import torch
from hypothesis import strategies as st

NUMBERS = st.floats(-3, 3, width=32)
JUNK = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e9])


def _tensor(draw, *shape):
    count = torch.Size(shape).numel()
    return torch.tensor(draw(st.lists(NUMBERS, min_size=count, max_size=count)), dtype=torch.float64).reshape(
        shape
    )


@st.composite
def ragged(draw, tensors=1, holes=False):
    """(mask, tensors...) of shape (B, T): rows of 1 to T counted tokens, then padding; with
    ``holes``, tokens that do not count anywhere (at least one of the batch does)."""
    B, T = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    if holes:
        mask = torch.tensor(
            draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T).filter(any))
        ).reshape(B, T)
    else:
        mask = (
            torch.arange(T) < torch.tensor(draw(st.lists(st.integers(1, T), min_size=B, max_size=B)))[:, None]
        )
    return (mask, *(_tensor(draw, B, T) for _ in range(tensors)))


@st.composite
def two_logits(draw):
    """Logits of a policy and of a reference at N positions over a small vocabulary."""
    shape = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    return _tensor(draw, *shape), _tensor(draw, *shape)


@st.composite
def pairs(draw):
    """Scores (chosen, rejected, margin) of some pairs."""
    count = draw(st.integers(1, 5))
    return tuple(_tensor(draw, count) for _ in range(3))


@st.composite
def groups(draw):
    """(returns, group_size): one to four groups of two to five returns."""
    size = draw(st.integers(2, 5))
    return _tensor(draw, size * draw(st.integers(1, 4))), size


@st.composite
def ranked(draw):
    """(scores, ranks, prompts) of completions to some prompts, shuffled: two to five a prompt, with
    ties, but not all of one rank."""
    ranks, prompts = [], []
    for prompt in range(draw(st.integers(1, 4))):
        own = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5).filter(lambda own: len(set(own)) > 1))
        ranks += own
        prompts += [3 * prompt] * len(own)
    order = draw(st.permutations(range(len(ranks))))
    return _tensor(draw, len(ranks)), torch.tensor(ranks)[list(order)], torch.tensor(prompts)[list(order)]
