"""The public names of goose_lora.rewards."""

from .ranking_trainer import RankedRewardTrainer as RankedRewardTrainer
from .sources import RewardMix as RewardMix
