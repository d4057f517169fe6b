"""The loss of one microbatch: policy, critic, entropy, KL and pretraining text."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import goose_lora.functional as F
from goose_lora.models.role_outputs import PolicyAndValue
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.microbatches import Microbatch

LossAndStats = tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]


def total_loss(
    output: PolicyAndValue,
    batch: Microbatch,
    values: Float[Tensor, "B T"] | None,
    args: PPOConfig,
    *,
    kl_coef: float,
) -> LossAndStats:
    """Return the loss that an optimizer step minimises, and each of its terms by name.

    policy + vf_coef value - entropy_coef entropy + kl_coef KL (kl_location: loss) + ptx_coef ptx.
    Means are over the tokens of the whole optimizer step, ``batch.num_tokens``: microbatches and
    processes add up to them (docs/math.md).

    Args:
        values: the critic's output in the units of ``batch.returns``, where there is a critic.
        kl_coef: the weight of the KL as it is now.
    """
    mask, num_tokens = batch.response_mask, batch.num_tokens

    # The policy: clipped surrogate objective, and a bonus for entropy.
    policy_loss, stats = F.policy_loss(
        output.logprobs,
        batch.old_logprobs,
        batch.advantages,
        mask,
        cliprange=args.cliprange,
        cliprange_high=args.cliprange_high,
        weights=batch.sampling_weights,
        num_tokens=num_tokens,
    )
    entropy = F.masked_mean(output.entropy, mask, num_tokens=num_tokens)
    stats |= {"loss/policy": policy_loss, "policy/entropy": entropy}
    loss = policy_loss - args.entropy_coef * entropy

    # What holds the policy back: the KL, where it is no part of the reward, and pretraining text.
    if args.kl_location == "loss":
        stats["loss/kl"] = F.masked_mean(_kl(output, batch, args), mask, num_tokens=num_tokens)
        loss = loss + kl_coef * stats["loss/kl"]
    if output.ptx_loss is not None:
        stats["loss/ptx"] = output.ptx_loss
        loss = loss + args.ptx_coef * stats["loss/ptx"]

    # The critic.
    if values is not None:
        assert batch.old_values is not None and batch.returns is not None, "a rollout without values"
        value_loss, value_stats = F.value_loss(
            values,
            batch.old_values,
            batch.returns,
            mask,
            cliprange_value=args.cliprange_value,
            num_tokens=num_tokens,
        )
        loss = loss + args.vf_coef * value_loss
        stats |= value_stats | {"loss/value": value_loss}
    return loss, stats


def _kl(output: PolicyAndValue, batch: Microbatch, args: PPOConfig) -> Float[Tensor, "B T"]:
    """Return the KL to the reference that is a term of the loss, per token."""
    if output.kl is not None:
        return output.kl
    # In later passes the tokens are an older policy's, of which the weight takes account.
    new, reference, estimator = output.logprobs, batch.ref_logprobs, args.sampled_kl_estimator
    if args.kl_importance_weight:
        return F.weighted_kl(new, batch.old_logprobs, reference, batch.response_mask, estimator=estimator)
    return F.kl_per_token(new, reference, estimator=estimator)


@torch.no_grad()
def leaves_bounds(output: PolicyAndValue, batch: Microbatch, ratio_threshold: float) -> Bool[Tensor, ""]:
    """Return whether the mean ratio of new to old probability is out of bounds.

    That is above ``ratio_threshold`` or below its inverse; NaN is out of bounds too.
    """
    # Written so that NaN is out of bounds: no comparison with it holds.
    mask = batch.response_mask
    ratio = F.masked_sum((output.logprobs - batch.old_logprobs).exp(), mask) / mask.sum()
    return ~((ratio <= ratio_threshold) & (ratio >= 1 / ratio_threshold))


def unless(skipped: Bool[Tensor, ""], output: PolicyAndValue, batch: Microbatch) -> PolicyAndValue:
    """Return ``output``, or numbers in its place that are finite where ``skipped``.

    The backward pass reaches the same parameters either way, which DistributedDataParallel waits
    for, and with zeros where ``skipped``. The host does not learn which it is, and so does not
    wait.
    """
    # Selected before the loss: 0 times the slope of an infinite ratio is NaN
    others = {
        name: torch.where(skipped, 0.0, x)
        for name, x in output._asdict().items()
        if name != "logprobs" and x is not None
    }
    return output._replace(logprobs=torch.where(skipped, batch.old_logprobs, output.logprobs), **others)
