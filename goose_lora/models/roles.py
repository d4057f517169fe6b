"""The roles that one base plays, and the adapter that stands for each."""

from typing import Literal

from goose_lora.errors import UserError

Role = Literal["policy", "value", "reward", "reference", "ema", "base"]
ADAPTERS: dict[Role, str] = {
    "policy": "default",
    "value": "value",
    "reward": "reward",
    "reference": "reference",
    "ema": "ema",
}
Critic = Literal["adapter", "shared", "reward_features"]
CriticInit = Literal["reward", "policy", "zero"]


def check_critic(critic: Critic | None, critic_init: CriticInit | None, *, has_reward: bool) -> CriticInit:
    """What the critic starts from.

    Raises:
        ValueError: it cannot start so, or has nothing to read.
    """
    if critic == "reward_features" and not has_reward:
        raise UserError(
            "critic: reward_features reads the reward adapter's states, and there is no reward adapter. Use"
            " adapter or shared."
        )
    possible = {
        "adapter": ["reward", "policy", "zero"],
        "shared": ["zero"],
        "reward_features": ["reward", "zero"],
        None: ["zero"],
    }[critic]
    if not has_reward:
        possible = [start for start in possible if start != "reward"]
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
    # An embedding's adapter ends in its name: lora_embedding_A.default.
    return any(f".{adapter}." in f"{name}." for adapter in adapters)
