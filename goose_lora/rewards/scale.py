"""Shifting, scaling and clipping of scores before they become rewards."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from goose_lora.errors import UserError


class ScoreScale(NamedTuple):
    """Mean and standard deviation of raw scores; normalised scores are counted in them."""

    mean: float = 0.0
    std: float = 1.0

    def normalise(self, raw: Tensor) -> Tensor:
        return (raw - self.mean) / self.std


def score_scale(raw: Float[Tensor, " N"], sources: Sequence[str] = ("adapter",)) -> ScoreScale:
    """Return the scale on which ``raw`` has mean 0 and standard deviation 1.

    On it kl_coef means the same for every reward model.

    Args:
        sources: names of what scores, for the error.

    Raises:
        UserError: fewer than two scores, or scores that do not differ: no policy can be told from
            another by them.
    """
    if len(raw) < 2 or not torch.isfinite(raw).all() or raw.std() < 1e-6:
        whose, look = "the reward model", "the reward model's verdict"
        if list(sources) != ["adapter"]:
            whose = look = f"what scores ({', '.join(sources)})"
        constant = "" if len(raw) < 2 or raw.max() > raw.min() else ", all the same"
        raise UserError(
            f"the scores of {whose} cannot be normalised: {len(raw)} replies of the reference score"
            f" {raw.mean():.4g} with a standard deviation of {raw.std():.2g}{constant}. Look at {look}, or"
            " set score_normalization: none."
        )
    return ScoreScale(raw.mean().item(), raw.std().item())
