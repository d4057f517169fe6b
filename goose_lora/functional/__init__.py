"""The arithmetic of PPO and of the reward model; ``import goose_lora.functional as F`` has it all.

Pure functions of tensors and floats, without models or configuration; they import torch and
jaxtyping alone.

Letters in shapes: B sequences, T response tokens, V vocabulary. ``mask`` is true where a token
counts. What lies elsewhere, NaN included, has no say in a value or a gradient. Everything computes
in at least fp32; float64 stays float64.

"OpenAI" in the docstrings is lm-human-preferences (the code of Ziegler et al. 2019,
arXiv:1909.08593), "CleanRL" is its port to PyTorch by CleanRL's author,
vwxyzjn/lm-human-preference-details, and "TRL" its PPOTrainer from 0.12 to 1.12. OpenAI and CleanRL
have no mask: responses have a fixed length there, and every mean is over all positions.
"""

from goose_lora.functional.advantages import (
    alike_share,
    explained_variance,
    gae,
    group_normalised,
    leave_one_out,
    shaped_scores,
    token_rewards,
)
from goose_lora.functional.ensembles import Aggregation, aggregate_scores, disagreement
from goose_lora.functional.kl import KLEstimator, exact_kl, kl_per_token, weighted_kl
from goose_lora.functional.logprobs import CHUNK_TOKENS, entropy, gather_logprobs, token_kl, token_logprobs
from goose_lora.functional.losses import (
    SamplingCorrection,
    pairwise_loss,
    policy_loss,
    ranking_loss,
    sampling_weights,
    untied_pairs,
    value_loss,
)
from goose_lora.functional.masked import (
    Moments,
    TokenCount,
    last_counted,
    masked_mean,
    masked_sum,
    merge_moments,
    moments,
    whiten,
)

__all__ = [
    "CHUNK_TOKENS",
    "Aggregation",
    "KLEstimator",
    "Moments",
    "SamplingCorrection",
    "TokenCount",
    "aggregate_scores",
    "alike_share",
    "disagreement",
    "entropy",
    "exact_kl",
    "explained_variance",
    "gae",
    "gather_logprobs",
    "group_normalised",
    "kl_per_token",
    "last_counted",
    "leave_one_out",
    "masked_mean",
    "masked_sum",
    "merge_moments",
    "moments",
    "pairwise_loss",
    "policy_loss",
    "ranking_loss",
    "sampling_weights",
    "shaped_scores",
    "token_kl",
    "token_logprobs",
    "token_rewards",
    "untied_pairs",
    "value_loss",
    "weighted_kl",
    "whiten",
]
