"""The public names of goose_lora.generation."""

from .rollout import Rollout as Rollout
from .sampling import generation_config as generation_config
from .sampling import sample as sample
from .static_cache import RolloutCompile as RolloutCompile
from .static_cache import StaticCache as StaticCache
from .static_cache import make_static_cache as make_static_cache
from .stopping import StopStrings as StopStrings
