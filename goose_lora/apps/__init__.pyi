"""The public names of goose_lora.apps."""

from .label import LabelQueue as LabelQueue
from .label import open_queue as open_queue
from .label_by_judge import judge_queue as judge_queue
from .label_by_judge import judge_replies as judge_replies
from .label_by_judge import labelling_judge as labelling_judge
from .session import PolicySession as PolicySession
from .session import RunInfo as RunInfo
from .session import SampledReply as SampledReply
from .session import inspect_run as inspect_run
