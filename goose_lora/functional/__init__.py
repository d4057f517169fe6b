"""Pure functions of tensors; torch alone. ``import goose_lora.functional as F`` has them all."""

from goose_lora.functional.advantages import (
    explained_variance,
    gae,
    group_normalised,
    leave_one_out,
    token_rewards,
)
from goose_lora.functional.kl import KLEstimator, exact_kl, kl_per_token
from goose_lora.functional.logprobs import CHUNK_TOKENS, entropy, gather_logprobs, token_kl, token_logprobs
from goose_lora.functional.losses import pairwise_loss, policy_loss, ranking_loss, untied_pairs, value_loss
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
    "KLEstimator",
    "Moments",
    "TokenCount",
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
    "token_kl",
    "token_logprobs",
    "token_rewards",
    "untied_pairs",
    "value_loss",
    "whiten",
]
