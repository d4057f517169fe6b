"""The public names of goose_lora.generation."""

from .rollout import Rollout as Rollout
from .sampling import generation_config as generation_config
from .sampling import sample as sample
from .stopping import StopStrings as StopStrings
