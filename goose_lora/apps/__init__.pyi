"""The public names of goose_lora.apps."""

from .label import LabelQueue as LabelQueue
from .label import open_queue as open_queue
from .session import PolicySession as PolicySession
from .session import RunInfo as RunInfo
from .session import SampledReply as SampledReply
from .session import inspect_run as inspect_run
