"""Checks at the first step of a run, for what is silent when it is wrong.

Each raises, and says what to look at.
"""

from collections.abc import Collection, Iterable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from goose_lora.errors import UserError
from goose_lora.models.role_outputs import output_head
from goose_lora.models.shared_base import SharedBase
from goose_lora.ppo.config import PPOConfig

# Log-probabilities of one text in batches of two sizes: fp32 sums in another order, by 2e-5 on
# average where logits are large, on a GPU; bf16 rounds what differs.
RATIO_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
# Of one text by policy and reference in one batch.
KL_TOLERANCE = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}


class GateError(UserError):
    """The run would train on something else than it says."""


class FirstStepChecks:
    """The checks that a run makes while it takes its first step, and whether they are behind it.

    Attributes:
        learned: whether a microbatch has been learned from; the checks of the update end there.
    """

    def __init__(self, shared: SharedBase):
        self.shared = shared
        self.learned = False

    def reference(
        self,
        logprobs: Float[Tensor, "B T"],
        ref_logprobs: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        *,
        step: int,
    ) -> None:
        """Check in the first rollout that the policy is its reference.

        It need not be where the reference is an adapter in a folder, such as the SFT adapter in a
        second round of PPO.
        """
        if step == 0 and self.shared.role_plan.reference != "folder":
            check_reference(logprobs - ref_logprobs, mask, tolerance=self.tolerance(KL_TOLERANCE))

    def ratio(
        self,
        logprobs: Float[Tensor, "B T"],
        old_logprobs: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        *,
        step: int,
    ) -> None:
        """Check in the first update that new and old log-probabilities are one."""
        if step == 0 and not self.learned:
            check_ratio(logprobs, old_logprobs, mask, tolerance=self.tolerance(RATIO_TOLERANCE))

    def gradients(self, *, step: int, scaled: bool = False) -> None:
        """Check after the first backward pass that all that trains has a finite gradient.

        One of a scaled loss may overflow: its step is left out, and the scale halved.
        """
        if step == 0 and not self.learned:
            check_gradients(self.shared.named_parameters(), may_overflow=scaled)
        self.learned = True

    def tolerance(self, by_dtype: Mapping[torch.dtype, float]) -> float:
        """Return the tolerance for the dtype in which the base computes."""
        # A dtype that is not listed is held to the narrowest bound.
        dtype = output_head(self.shared.core).weight.dtype
        return by_dtype.get(dtype, by_dtype[torch.float32])


def check_roles(shared: SharedBase, args: PPOConfig) -> None:
    """Check that a shared base was built as the settings say.

    Raises:
        UserError: a critic, an average or layers that train are other than the settings want.
    """
    # The settings are the trainer's, the roles the base's: nothing else compares the two.
    plan = shared.role_plan
    if args.needs_critic != (plan.critic is not None):
        wanted = "critic=None: replies are compared with one another"
        if args.needs_critic:
            wanted = "SharedBase.build(..., critic=args.critic)"
        raise UserError(f"advantage_estimator={args.advantage_estimator} goes with {wanted}.")
    if args.ema_decay is not None and not plan.average:
        raise UserError(
            f"ema_decay={args.ema_decay:g} needs a place for the average: SharedBase.build(...,"
            " average=True)."
        )
    if args.train_layers != plan.train_layers:
        raise UserError(
            f"train_layers={args.train_layers} goes with SharedBase.build(...,"
            " train_layers=args.train_layers)."
        )


def check_trainable(named: Iterable[tuple[str, nn.Parameter]], expected: Collection[str]) -> None:
    """Check that the parameters that train are those named ``expected``, no more and no less.

    Raises:
        GateError: there are others, some are frozen, or none trains.
    """
    # PEFT marks parameters as it switches adapters, so that one switch too many is enough.
    named, expected = list(named), set(expected)
    extra = [name for name, p in named if p.requires_grad and name not in expected]
    missing = [name for name, p in named if not p.requires_grad and name in expected]
    if extra or missing:
        raise GateError(
            f"the trainable set has drifted: {len(missing)} tensors of policy and critic are frozen"
            f" ({', '.join(missing[:3])}), {len(extra)} others train ({', '.join(extra[:3])}). Switch"
            " adapters through SharedBase.role only."
        )
    if not any(p.requires_grad for _, p in named):
        raise GateError("nothing trains: no parameter of policy or critic requires a gradient.")


def check_ratio(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    tolerance: float,
) -> None:
    """Check that new over old probability is 1 before the first update.

    Log-probabilities lie within ``tolerance`` of each other on average, and within ten times that
    at every token. Rounding has a long tail where many tokens are compared; what breaks the ratio
    (dropout, padding) moves the mean.

    Raises:
        GateError: they do not.
    """
    # Written so that NaN fails, too: no comparison with it holds.
    gaps = (logprobs - old_logprobs).abs()[mask]
    mean, largest = gaps.mean().item(), gaps.max().item()
    if not (mean <= tolerance and largest <= 10 * tolerance):
        raise GateError(
            f"the ratio of the first minibatch is not 1: log-probabilities differ by {mean:.3g} on average"
            f" and by up to {largest:.3g} (allowed {tolerance:g} and {10 * tolerance:g}) between rollout and"
            " update although nothing was updated. Causes: dropout, a changed temperature, or padding that"
            " reaches the attention."
        )


def check_reference(kl: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, tolerance: float) -> None:
    """Check that the policy is its reference before the first update: k1 is 0 at every token.

    Raises:
        GateError: it is further from 0 than ``tolerance`` nats at some token.
    """
    # At every token: one that differs is a sign of two models, and a mean would hide it.
    gap = torch.where(mask, kl, 0.0).abs().max().item()
    if not gap <= tolerance:
        raise GateError(
            f"the KL at step 0 is not 0: policy and reference differ by up to {gap:.3g} nats a token (allowed"
            f" {tolerance:g}). A policy that starts from an SFT adapter needs a frozen copy of it as"
            " reference, not the bare base."
        )


def check_gradients(named: Iterable[tuple[str, nn.Parameter]], *, may_overflow: bool = False) -> None:
    """Check that every tensor that trains has a gradient, and a finite one unless it may overflow.

    Raises:
        GateError: one has none, or one that is not finite.
    """
    # Missing: the graph does not reach it. Not finite: the first step would spoil it.
    grads = [(name, p.grad) for name, p in named if p.requires_grad]
    missing = [name for name, grad in grads if grad is None]
    there = [] if may_overflow else [(name, grad) for name, grad in grads if grad is not None]
    broken = [name for name, grad in there if not torch.isfinite(grad).all()]
    if missing or broken:
        raise GateError(
            f"after the first backward, {len(missing)} trainable tensors have no gradient"
            f" ({', '.join(missing[:3])}) and {len(broken)} one that is not finite ({', '.join(broken[:3])})."
        )
