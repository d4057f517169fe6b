"""The public names of goose_lora.reporting."""

from .diagnosis import diagnose as diagnose
from .diagnosis import diagnosis_text as diagnosis_text
from .html_report import write_report as write_report
from .plots import plot_curves as plot_curves
