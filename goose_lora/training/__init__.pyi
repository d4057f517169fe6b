"""The public names of goose_lora.training."""

from .resume import Resumable as Resumable
from .signals import Stopped as Stopped
