"""The public names of goose_lora.training."""

from .checkpoints import Facts as Facts
from .checkpoints import is_finished as is_finished
from .checkpoints import note_finished as note_finished
from .hardware import device_text as device_text
from .launch import require_one_process as require_one_process
from .resume import Resumable as Resumable
from .resume import facts as facts
from .signals import Stopped as Stopped
from .validation import LARGEST_SEED as LARGEST_SEED
from .validation import require_at_least_one as require_at_least_one
