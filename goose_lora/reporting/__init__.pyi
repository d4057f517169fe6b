"""The public names of goose_lora.reporting."""

from .diagnosis import diagnose as diagnose
from .diagnosis import diagnosis_text as diagnosis_text
from .html_report import refresh_report as refresh_report
from .html_report import write_report as write_report
from .plots import plot_curves as plot_curves
from .run_files import read_metrics as read_metrics
from .run_files import write_stage as write_stage
