"""The public names of goose_lora.sharing."""

from .export import save_policy as save_policy
from .hub import push as push
from .hub import without_trainers_push as without_trainers_push
from .model_card import add_evaluation as add_evaluation
from .model_card import write_card as write_card
from .provenance import describe_chain as describe_chain
from .provenance import read_chain as read_chain
