"""Comparison of tensors, as the tests of the mathematics need it."""

import torch
from hypothesis import strategies as st

UNIT = st.floats(0, 1)
CLIPRANGES = st.floats(0.05, 0.5)


def close(got, want, **tolerance):
    """Equal within 1e-7, or exactly where the want is a bool or tolerance=0 is given."""
    want = torch.as_tensor(want, dtype=got.dtype)
    torch.testing.assert_close(got, want, **({"rtol": 1e-7, "atol": 1e-7} | tolerance))


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)
