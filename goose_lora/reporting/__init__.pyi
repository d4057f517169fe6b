"""The public names of goose_lora.reporting."""

from .diagnosis import diagnose as diagnose
