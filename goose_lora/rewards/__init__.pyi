"""The public names of goose_lora.rewards."""

from .classifier import ClassifierReward as ClassifierReward
from .classifier import check_sources as check_sources
from .classifier import check_weights as check_weights
from .classifier import listed_sources as listed_sources
from .classifier import reward_function as reward_function
from .classifier import reward_sources as reward_sources
from .group_judge import GroupJudge as GroupJudge
from .group_judge import served_judge as served_judge
from .pair_trainer import PairRewardTrainer as PairRewardTrainer
from .pairwise_judge import CACHE_FILE as CACHE_FILE
from .pairwise_judge import SERVED as SERVED
from .pairwise_judge import PairwiseJudge as PairwiseJudge
from .pairwise_judge import check_judge_settings as check_judge_settings
from .pairwise_judge import rubric_text as rubric_text
from .pairwise_judge import served_model as served_model
from .ranking_trainer import RankedRewardTrainer as RankedRewardTrainer
from .sources import RewardMix as RewardMix
