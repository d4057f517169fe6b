"""The public names of goose_lora.training."""

from .hardware import device_text as device_text
from .launch import require_one_process as require_one_process
from .resume import Resumable as Resumable
from .signals import Stopped as Stopped
from .validation import require_at_least_one as require_at_least_one
