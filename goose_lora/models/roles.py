"""The roles that one base plays, the adapter that stands for each, and which of them a run has."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from goose_lora.errors import UserError

# The reward model, or the members of an ensemble of them
RewardRole = Literal[
    "reward", "reward_1", "reward_2", "reward_3", "reward_4", "reward_5", "reward_6", "reward_7"
]
Role = Literal["policy", "value", RewardRole, "reference", "ema", "base"]
REWARD_ROLES: tuple[RewardRole, ...] = get_args(RewardRole)
WITH_HEAD: tuple[Role, ...] = ("value", *REWARD_ROLES)  # roles that score
ADAPTERS: dict[Role, str] = {
    "policy": "default",
    "value": "value",
    **{role: str(role) for role in REWARD_ROLES},
    "reference": "reference",
    "ema": "ema",
}
Critic = Literal["adapter", "shared", "reward_features"]
CriticInit = Literal["reward", "policy", "zero"]
Reference = Literal["copy", "base", "folder"]

# What each kind of critic can start from; from the reward adapter only where there is one.
_CRITIC_STARTS: dict[Critic | None, list[CriticInit]] = {
    "adapter": ["reward", "policy", "zero"],
    "shared": ["zero"],
    "reward_features": ["reward", "zero"],
    None: ["zero"],
}

# PEFT keeps an adapter's tensors in containers by its name. A base has modules called value, too.
_ADAPTERS_OWN = re.compile(r"\.(?:lora_\w+|modules_to_save|trainable_tokens_\w+)\.(?P<adapter>[^.]+)\.")


@dataclass(frozen=True)
class RolePlan:
    """Which roles a run has, and what each starts from. ``RolePlan.of`` makes one.

    Attributes:
        critic: its kind; None where there is no critic.
        critic_init: what the critic starts from.
        has_reward: whether a reward adapter is among the roles.
        reference: a frozen copy of the policy, the base with its adapters off, or an adapter in a
            folder.
        average: whether the role ``ema`` holds a moving average of the policy.
        train_layers: ``all``, or ``top-K``.
        reward_members: reward adapters that score as one, where there is any.
    """

    critic: Critic | None
    critic_init: CriticInit
    has_reward: bool
    reference: Reference
    average: bool
    train_layers: str
    reward_members: int = 1

    @classmethod
    def of(
        cls,
        *,
        critic: Critic | None,
        critic_init: CriticInit | None = None,
        has_policy: bool,
        has_reward: bool,
        reference: Reference | None = None,
        average: bool = False,
        train_layers: str = "all",
        reward_members: int = 1,
    ) -> "RolePlan":
        """Return the plan of these settings, with the defaults filled in.

        Args:
            critic_init: by default ``reward`` where the critic can start so, else ``zero``.
            has_policy: whether the policy starts from a trained adapter.
            has_reward: whether there is a reward adapter.
            reference: by default ``copy`` where the policy starts from a trained adapter, else
                ``base``.

        Raises:
            UserError: the critic cannot start as ``critic_init`` says, or has nothing to read.
        """
        return cls(
            critic=critic,
            critic_init=_critic_start(critic, critic_init, has_reward=has_reward),
            has_reward=has_reward,
            reference=reference or ("copy" if has_policy else "base"),
            average=average,
            train_layers=train_layers,
            reward_members=reward_members,
        )

    @property
    def adapters(self) -> tuple[Role, ...]:
        """The roles for which an adapter of their own stands."""
        # In the order in which they are put on the base
        present: dict[Role, bool] = {
            "policy": True,
            "value": self.critic is not None,
            "reward": self.has_reward,
            "reference": self.reference != "base",
            "ema": self.average,
        }
        found: list[Role] = [role for role, is_there in present.items() if is_there]
        if self.has_reward:
            found += REWARD_ROLES[1 : self.reward_members]
        return tuple(found)

    @property
    def training(self) -> tuple[Role, ...]:
        """The roles that have parameters that train, be they a head alone."""
        return ("policy",) if self.critic is None else ("policy", "value")

    @property
    def training_adapters(self) -> tuple[Role, ...]:
        """The roles whose LoRA matrices train: a critic that is a head alone has none."""
        return ("policy", "value") if self.critic == "adapter" else ("policy",)

    @property
    def value_states(self) -> Role:
        """The role whose hidden states the critic's head reads."""
        readers: dict[Critic | None, Role] = {"shared": "policy", "reward_features": "reward"}
        return readers.get(self.critic, "value")

    @property
    def value_source(self) -> Role:
        """The role whose adapter or head the critic copies.

        Where it starts at zero, it has the form of that role's.
        """
        return "reward" if self.has_reward and self.critic_init != "policy" else "policy"

    @property
    def values_are_scores(self) -> bool:
        """Whether the critic starts as the reward model and speaks in units of its scores."""
        return self.critic is not None and self.critic_init == "reward"

    @property
    def policy_copies(self) -> int:
        """Number of frozen copies of the policy: as reference, and for its average."""
        return int(self.reference == "copy") + int(self.average)


def default_critic(*, has_reward: bool) -> Critic:
    """Return the kind of critic of a run that needs one and names none."""
    return "reward_features" if has_reward else "adapter"


def _critic_start(critic: Critic | None, critic_init: CriticInit | None, *, has_reward: bool) -> CriticInit:
    """Return what the critic starts from; raises as ``RolePlan.of``."""
    if critic == "reward_features" and not has_reward:
        raise UserError(
            "critic: reward_features reads the reward adapter's states, and there is no reward adapter. Use"
            " adapter or shared."
        )
    if critic not in _CRITIC_STARTS:
        known = ", ".join(get_args(Critic))
        raise UserError(f"critic: {critic!r} is not one of {known}, or None for no critic.")
    possible = [start for start in _CRITIC_STARTS[critic] if has_reward or start != "reward"]
    if critic_init is None:
        return "reward" if "reward" in possible else "zero"
    if critic_init not in possible:
        without = "" if has_reward else " without a reward adapter"
        raise UserError(
            f"critic_init: {critic_init} does not go with critic: {critic}{without}. Possible:"
            f" {', '.join(possible)}, or leave it out."
        )
    return critic_init


def belongs_to(name: str, *adapters: str) -> bool:
    """Return whether the parameter ``name`` is one of these adapters', heads included."""
    match = _ADAPTERS_OWN.search(f"{name}.")
    return match is not None and match["adapter"] in adapters


def of_another(name: str, adapter: str, other: str) -> str:
    """Return what the parameter ``name`` of ``adapter`` is called in ``other``."""
    match = _ADAPTERS_OWN.search(f"{name}.")
    if match is None or match["adapter"] != adapter:
        raise ValueError(f"{name} is no parameter of the adapter {adapter}")
    start, end = match.span("adapter")
    return name[:start] + other + name[end:]
