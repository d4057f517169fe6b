"""The weight of the KL penalty in the reward, as plain state that a checkpoint can carry.

Standard library only. ``kl`` is in nats per sequence: the sum over a response's tokens, averaged
over responses and ranks. ``n_sequences`` counts them.
"""

import logging
import math
import sys
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)


def _checked_state(state: dict[str, float], *, zero_is_fine: bool) -> float:
    """Return the coefficient in a saved state; refuse a bad one before anything changes."""
    coef = state.get("coef") if isinstance(state, dict) else None
    # True counts as a number in Python, and no comparison with NaN holds.
    number = isinstance(coef, (int, float)) and not isinstance(coef, bool) and 0 <= coef <= sys.float_info.max
    if coef is None or not number or set(state) != {"coef"} or (coef == 0 and not zero_is_fine):
        # The adaptive one could never leave 0.
        wanted = "not negative" if zero_is_fine else "positive"
        raise ValueError(
            f"KL state {state} is not one that this controller saves: 'coef' alone, finite and {wanted}. The"
            " checkpoint is damaged or from a run with another kind of KL control: resume from another, or"
            " with that run's settings."
        )
    return float(coef)


@dataclass
class FixedKL:
    """The same coefficient throughout; 0 switches the penalty off.

    Raises ValueError if it is negative or not finite.
    """

    coef: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.coef) and self.coef >= 0):
            raise ValueError(
                f"kl_coef={self.coef} must be finite and not negative: a negative one pays the policy for"
                " leaving the reference. Use 0 for no penalty, or start from 0.05."
            )

    def update(self, kl: float, n_sequences: int) -> None:
        """Change nothing: both controllers are driven alike."""

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint carries."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take the saved coefficient.

        Raises ValueError, and keeps its own, if the state is not one of ours.
        """
        self.coef = _checked_state(state, zero_is_fine=True)


@dataclass
class AdaptiveKL:
    """A coefficient that holds the KL near ``target``.

    e = clip(kl / target - 1, -0.2, 0.2);  coef <- coef (1 + e n_sequences / horizon) (Ziegler et
    al. 2019, arXiv:1909.08593, sec. 2.2). The paper has K = 0.1 for n / horizon; its code has
    horizon = 10000 sequences. Here n / horizon is at most 1, so that one update moves the
    coefficient by at most 20 %: in OpenAI's code and TRL a batch of more than 5 horizons makes it
    negative. A KL that is not finite leaves it as
    it is, with a warning: it neither poisons the coefficient nor ends the run, since stopping on
    repeated non-finite numbers is the trainer's decision. Raises ValueError if a setting is not
    positive and finite.
    """

    init_coef: float
    target: float
    horizon: int
    coef: float = field(init=False)

    def __post_init__(self) -> None:
        # A coefficient of 0 or a KL of 0 to hold would leave nothing to adapt.
        for name, way_out in (
            ("init_coef", "From 0 it could never grow; for no penalty use FixedKL(0.0)."),
            ("target", "It is the KL to hold, in nats a sequence; 6.0 is usual for short replies."),
            ("horizon", "It is counted in sequences; 10000 is usual."),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} must be positive and finite. {way_out}")
        self.coef = self.init_coef

    def update(self, kl: float, n_sequences: int) -> None:
        """Move the coefficient by what one rollout showed.

        Raises ValueError if ``n_sequences`` is not positive.
        """
        if n_sequences <= 0:
            raise ValueError(
                f"n_sequences={n_sequences}, but a KL was measured on at least 1. Pass the rollout's size"
                " over all ranks."
            )
        if not math.isfinite(kl):
            logger.warning("The KL of this rollout is %s; the KL coefficient stays at %s.", kl, self.coef)
            return
        # One rollout, however far off, moves the coefficient by 20 % at most.
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * min(n_sequences / self.horizon, 1.0)

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint carries."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take the saved coefficient; target and horizon are settings.

        Raises ValueError, and keeps its own, if the state is not ours.
        """
        self.coef = _checked_state(state, zero_is_fine=False)


def make_kl_control(coef: float, *, target: float | None, horizon: int) -> FixedKL | AdaptiveKL:
    """Return the control of a run: adaptive where there is a KL to hold."""
    # kl_target is what tells the two apart in the settings.
    if target is None:
        return FixedKL(coef)
    return AdaptiveKL(coef, target, horizon)
