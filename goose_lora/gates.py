"""Checks at the first step of a run, for what is silent when it is wrong: each raises, and says what to look at."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class GateError(ValueError):
    """The run would train on something else than it says."""


def check_trainable(named: Iterable[tuple[str, nn.Parameter]], marks: Sequence[str]) -> None:
    """The parameters that train are those whose name has one of ``marks``, no more and no less."""
    named = list(named)
    extra = [name for name, p in named if p.requires_grad and not any(mark in name for mark in marks)]
    missing = [name for name, p in named if not p.requires_grad and any(mark in name for mark in marks)]
    if extra or missing:
        raise GateError(
            f"the trainable set has drifted: {len(missing)} tensors of policy and critic are frozen ({', '.join(missing[:3])}), "
            f"{len(extra)} others train ({', '.join(extra[:3])}). Switch adapters through SharedBase.role only."
        )
    if not any(p.requires_grad for _, p in named):
        raise GateError("nothing trains: no parameter of policy or critic requires a gradient.")


def check_ratio(logprobs: Float[Tensor, "B T"], old_logprobs: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, tolerance: float) -> None:
    """Before the first update, new over old probability is 1: within ``tolerance`` on average, within ten times that at every token.

    Rounding has a long tail where many tokens are compared; what breaks the ratio (dropout, padding) moves the mean.
    """
    gaps = (logprobs - old_logprobs).abs()[mask]
    mean, largest = gaps.mean().item(), gaps.max().item()
    if not (mean <= tolerance and largest <= 10 * tolerance):
        raise GateError(
            f"the ratio of the first minibatch is not 1: log-probabilities differ by {mean:.3g} on average and by up to {largest:.3g} (allowed "
            f"{tolerance:g} and {10 * tolerance:g}) between rollout and update although nothing was updated. "
            "Causes: dropout, a changed temperature, or padding that reaches the attention."
        )


def check_reference(kl: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, tolerance: float) -> None:
    """Before the first update, the policy is its reference: k1 is 0 at every token."""
    gap = torch.where(mask, kl, 0.0).abs().max().item()
    if not gap <= tolerance:
        raise GateError(
            f"the KL at step 0 is not 0: policy and reference differ by up to {gap:.3g} nats a token (allowed {tolerance:g}). "
            "A policy that starts from an SFT adapter needs a frozen copy of it as reference, not the bare base."
        )


def refuse_upload(*args: object, **kwargs: object) -> None:
    """Stands in place of Trainer's ``push_to_hub``. Raises ValueError."""
    raise ValueError("push_to_hub: Trainer would upload all that lies in output_dir. Save, then call goose_lora.hub.push(output_dir, repo).")


def check_gradients(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Every tensor that trains has a finite gradient."""
    grads = [(name, p.grad) for name, p in named if p.requires_grad]
    missing = [name for name, grad in grads if grad is None]
    broken = [name for name, grad in grads if grad is not None and not torch.isfinite(grad).all()]
    if missing or broken:
        raise GateError(
            f"after the first backward, {len(missing)} trainable tensors have no gradient ({', '.join(missing[:3])}) and {len(broken)} one that is "
            f"not finite ({', '.join(broken[:3])})."
        )
