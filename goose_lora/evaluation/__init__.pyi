"""The public names of goose_lora.evaluation."""

from .ensembles import EnsembleVerdict as EnsembleVerdict
from .policies import Replies as Replies
from .policies import answer as answer
from .policies import best_of as best_of
from .policies import compare_all as compare_all
from .policies import judge_all as judge_all
from .policies import summary as summary
from .reward_model import HeldOut as HeldOut
from .reward_model import RewardTest as RewardTest
from .reward_model import evaluate_reward_model as evaluate_reward_model
from .reward_model import prepare_held_out as prepare_held_out
from .reward_model import reference_bias as reference_bias
from .verdict import require_verdict as require_verdict
from .verdict import show_verdict as show_verdict
from .verdict import write_verdict as write_verdict
