"""One score of several reward models, and how far they disagree."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from goose_lora.functional.masked import _upcast

Aggregation = Literal["mean", "min", "mean_minus_std"]


def aggregate_scores(
    scores: Float[Tensor, "K B"], *, aggregation: Aggregation, uncertainty_coef: float = 1.0
) -> Float[Tensor, " B"]:
    """Return one score of each reply, given those of K members in the same units.

    ``mean``; ``min``, worst-case optimization (WCO); ``mean_minus_std``, the mean less
    ``uncertainty_coef`` times the standard deviation among the members, uncertainty-weighted
    optimization (Coste et al. 2023, arXiv:2310.02743, section 3, who take the variance there; with
    the standard deviation: Zhai et al. 2024, arXiv:2401.00243). K copies of one member score as it
    does, and shifting or scaling all members shifts and scales the result. Raises nothing.
    """
    scores = _upcast(scores)
    if aggregation == "min":
        return scores.amin(0)
    mean = scores.mean(0)
    return mean if aggregation == "mean" else mean - uncertainty_coef * disagreement(scores)


def disagreement(scores: Float[Tensor, "K B"]) -> Float[Tensor, " B"]:
    """Return the standard deviation among the K members of each reply's score, with divisor K.

    It is 0 for one member. Raises nothing.
    """
    return _upcast(scores).std(0, correction=0)
