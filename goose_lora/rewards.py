"""Scores of replies, and what becomes of them: one reward a token, with KL, end-of-text and normalisation terms."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from goose_lora.batch import last_counted

RewardFunction = Callable[..., Any]
RewardSource = RewardFunction | Literal["adapter"]


class RewardMix:
    """The weighted sum of what several sources say of each reply: the reward adapter (``"adapter"``) and Python functions.

    A function has TRL's signature, plain or async, ``f(prompts=, completions=, completion_ids=, **columns) -> list[float | None]``: one
    number a reply, None where it has nothing to say. Columns are those of the prompts' dataset.

    Raises:
        ValueError: no source, or not one weight to each.
    """

    def __init__(self, sources: Sequence[RewardSource], weights: Sequence[float] | None = None):
        self.sources = list(sources)
        self.weights = [1.0] * len(self.sources) if weights is None else [float(weight) for weight in weights]
        if not self.sources or len(self.weights) != len(self.sources):
            raise ValueError(f"reward_weights: {len(self.weights)} weights for {len(self.sources)} sources of reward; give one to each.")
        names = ["adapter" if source == "adapter" else getattr(source, "__name__", type(source).__name__) for source in self.sources]
        self.names = [name if names.count(name) == 1 else f"{name}_{index}" for index, name in enumerate(names)]

    @property
    def needs_adapter(self) -> bool:
        return "adapter" in self.sources

    def __call__(self, by_adapter: Float[Tensor, " B"] | None, **replies: Any) -> tuple[Float[Tensor, " B"], dict[str, Float[Tensor, " B"]]]:
        """The sum, and each source's own scores before weighting, NaN where it said None.

        Args:
            by_adapter: the reward adapter's scores, where it is a source.
            replies: ``prompts, completions, completion_ids`` and columns, for the functions.

        Raises:
            ValueError: a function that did not give one finite number or None a reply, or a reply of which no source said anything.
        """
        count = len(replies["completion_ids"])
        said = asyncio.run(_ask_all([source for source in self.sources if source != "adapter"], replies))
        answers = iter(said)
        columns = []
        for name, source in zip(self.names, self.sources, strict=True):
            columns.append(by_adapter if source == "adapter" else _numbers(next(answers), count, name))
        device = None if by_adapter is None else by_adapter.device
        scores = torch.stack([torch.as_tensor(column, dtype=torch.float32, device=device) for column in columns])
        silent = scores.isnan().all(0)
        if silent.any():
            raise ValueError(f"no source of reward said anything of {int(silent.sum())} of {count} replies: each returned None there.")
        weights = torch.tensor(self.weights, device=device)[:, None]
        return (weights * scores).nansum(0), dict(zip(self.names, scores, strict=True))


async def _ask_all(functions: Sequence[RewardFunction], replies: dict[str, Any]) -> list[Any]:
    answers = [function(**replies) for function in functions]
    waiting = [answer for answer in answers if inspect.isawaitable(answer)]
    done = iter(await asyncio.gather(*waiting))
    return [next(done) if inspect.isawaitable(answer) else answer for answer in answers]


def _numbers(answer: Any, count: int, name: str) -> Tensor:
    listed = answer.tolist() if isinstance(answer, Tensor) else list(answer) if isinstance(answer, Sequence) else None
    if listed is None or len(listed) != count:
        what = type(answer).__name__ if listed is None else f"{len(listed)} numbers"
        raise ValueError(f"the reward function {name} returned {what} for {count} replies. It must return one number (or None) a reply.")
    try:
        numbers = torch.tensor([float("nan") if number is None else float(number) for number in listed])
    except (TypeError, ValueError) as error:
        raise ValueError(f"the reward function {name} returned something that is no number: {error}") from error
    broken = [index for index, number in enumerate(listed) if number is not None and not numbers[index].isfinite()]
    if broken:
        raise ValueError(f"the reward function {name} returned {listed[broken[0]]} for reply {broken[0]}, {len(broken)} of {count} not finite.")
    return numbers


class ScoreScale(NamedTuple):
    """Mean and standard deviation of raw scores over the reference's own replies; normalised scores are counted in them."""

    mean: float = 0.0
    std: float = 1.0

    def normalise(self, raw: Tensor) -> Tensor:
        return (raw - self.mean) / self.std


def score_scale(raw: Float[Tensor, " N"]) -> ScoreScale:
    """The scale on which ``raw`` has mean 0 and standard deviation 1, so that kl_coef means the same for every reward model.

    Raises:
        ValueError: fewer than two scores, or scores that do not differ: no policy can be told from another by them.
    """
    if len(raw) < 2 or not torch.isfinite(raw).all() or raw.std() < 1e-6:
        raise ValueError(
            f"the reward model's scores cannot be normalised: {len(raw)} replies of the reference score {raw.mean():.4g} with a standard deviation "
            f"of {raw.std():.2g}. Look at the reward model's verdict, or set normalize_scores: false."
        )
    return ScoreScale(raw.mean().item(), raw.std().item())


def token_rewards(
    scores: Float[Tensor, " B"], kl: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, kl_coef: float
) -> Float[Tensor, "B T"]:
    """-kl_coef * KL at every token, and the reply's score at its last counted one (Ouyang et al. 2022, arXiv:2203.02155, eq. 2; Ziegler et al. 2019).

    TRL 0.12-1.12 puts the score on the padding after the end-of-text token, whose value enters the estimate.
    """
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    return rewards.scatter_add(1, last_counted(mask.long())[:, None], scores[:, None].to(rewards.dtype))
