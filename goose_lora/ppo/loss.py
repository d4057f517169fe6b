"""The loss of one microbatch: policy, critic, entropy, KL and pretraining text, weighted by the
settings."""

import torch
from jaxtyping import Float
from torch import Tensor

import goose_lora.functional as F
from goose_lora.models.role_outputs import PolicyAndValue
from goose_lora.ppo.config import PPOConfig

Loss = tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]


def total_loss(
    output: PolicyAndValue,
    inputs: dict[str, Tensor],
    values: Float[Tensor, "B T"] | None,
    args: PPOConfig,
    *,
    kl_coef: float,
) -> Loss:
    """policy + vf_coef value - entropy_coef entropy + kl_coef KL (kl_location: loss) + ptx_coef
    ptx, and each term by name.

    Means are over the tokens of the whole optimizer step, ``inputs["num_tokens"]``: microbatches
    and processes add up to them (docs/math.md).

    Args:
        values: the critic's output in the units of ``inputs["returns"]``, where there is a critic.
        kl_coef: the weight of the KL as it is now.
    """
    mask, num_tokens = inputs["response_mask"], inputs["num_tokens"]
    policy_loss, stats = F.policy_loss(
        output.logprobs,
        inputs["old_logprobs"],
        inputs["advantages"],
        mask,
        cliprange=args.cliprange,
        num_tokens=num_tokens,
    )
    entropy = F.masked_mean(output.entropy, mask, num_tokens=num_tokens)
    stats |= {"loss/policy": policy_loss, "policy/entropy": entropy}
    loss = policy_loss - args.entropy_coef * entropy
    if args.kl_location == "loss":
        kl = output.kl
        if kl is None:
            kl = F.kl_per_token(output.logprobs, inputs["ref_logprobs"], estimator=args.kl_estimator)  # type: ignore[arg-type]
        stats["loss/kl"] = F.masked_mean(kl, mask, num_tokens=num_tokens)
        loss = loss + kl_coef * stats["loss/kl"]
    if output.ptx_loss is not None:
        stats["loss/ptx"] = output.ptx_loss / args.gradient_accumulation_steps
        loss = loss + args.ptx_coef * stats["loss/ptx"]
    if values is not None:
        value_loss, value_stats = F.value_loss(
            values,
            inputs["old_values"],
            inputs["returns"],
            mask,
            cliprange_value=args.cliprange_value,
            num_tokens=num_tokens,
        )
        loss = loss + args.vf_coef * value_loss
        stats |= value_stats | {"loss/value": value_loss}
    return loss, stats


@torch.no_grad()
def leaves_bounds(output: PolicyAndValue, inputs: dict[str, Tensor], ratio_threshold: float) -> Tensor:
    """Whether the mean ratio of new to old probability is above ``ratio_threshold`` or below its
    inverse: true of NaN too, a 0-dim bool."""
    ratio = F.masked_mean((output.logprobs - inputs["old_logprobs"]).exp(), inputs["response_mask"])
    return ~((ratio <= ratio_threshold) & (ratio >= 1 / ratio_threshold))
