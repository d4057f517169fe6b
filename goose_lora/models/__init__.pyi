"""The public names of goose_lora.models."""

from .arguments import ModelArguments as ModelArguments
from .arguments import usable_dtype as usable_dtype
from .compatibility import check_fit as check_fit
from .dense_copy import DenseCopy as DenseCopy
from .dense_copy import RolloutWeights as RolloutWeights
from .dense_copy import make_dense_copy as make_dense_copy
from .endings import ends_text as ends_text
from .endings import reply_ends as reply_ends
from .endings import require_tokens as require_tokens
from .ensembles import MemberKind as MemberKind
from .folders import AdapterFolder as AdapterFolder
from .folders import require_ensemble as require_ensemble
from .folders import write_lineage as write_lineage
from .loading import adapters_to_fp32 as adapters_to_fp32
from .loading import load_base as load_base
from .loading import load_reward_base as load_reward_base
from .loading import load_tokenizer as load_tokenizer
from .loading import lora_config as lora_config
from .loading import tokenizer_of as tokenizer_of
from .roles import Critic as Critic
from .roles import CriticInit as CriticInit
from .roles import Role as Role
from .roles import RolePlan as RolePlan
from .shared_base import SharedBase as SharedBase
