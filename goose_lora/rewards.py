"""Scores of replies, and what becomes of them: one reward a token, with KL, end-of-text and normalisation terms."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from goose_lora.batch import last_counted


@torch.no_grad()
def score_pairs(trainer: Any, name: str) -> tuple[list[float], list[float], list[int], list[int]]:
    """Scores and lengths in tokens, of the chosen and of the rejected, over a ``trl.RewardTrainer``'s evaluation set ``name``."""
    model = trainer.model.eval()
    scores: tuple[list[float], list[float]] = ([], [])
    lengths: tuple[list[int], list[int]] = ([], [])
    for batch in trainer.get_eval_dataloader(name):
        with trainer.compute_loss_context_manager():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        both = trainer.accelerator.gather_for_metrics(logits.float().view(2, -1).T.contiguous())
        tokens = trainer.accelerator.gather_for_metrics(batch["attention_mask"].sum(-1).view(2, -1).T.contiguous())
        for side in (0, 1):
            scores[side].extend(both[:, side].tolist())
            lengths[side].extend(tokens[:, side].tolist())
    return *scores, *lengths


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
