"""The public names of goose_lora.rewards."""

from .classifier import ClassifierReward as ClassifierReward
from .classifier import check_sources as check_sources
from .classifier import check_weights as check_weights
from .classifier import reward_function as reward_function
from .classifier import reward_sources as reward_sources
from .pair_trainer import PairRewardTrainer as PairRewardTrainer
from .ranking_trainer import RankedRewardTrainer as RankedRewardTrainer
from .sources import RewardMix as RewardMix
