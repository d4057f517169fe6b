"""The public names of goose_lora.planning."""

from .memory import Plan as Plan
from .memory import Planner as Planner
from .memory import plan_run as plan_run
from .ways import ways_to_fit as ways_to_fit
