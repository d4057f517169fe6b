"""Words to runs: parser, process, stages and the commands of ``goose-lora``."""

from goose_lora.cli.commands import COMMANDS, command_line, main
from goose_lora.cli.parser import check_settings, parse, read_config
from goose_lora.cli.process import command, continuing, keep_freed_memory, quiet_libraries

__all__ = [
    "COMMANDS",
    "check_settings",
    "command",
    "command_line",
    "continuing",
    "keep_freed_memory",
    "main",
    "parse",
    "quiet_libraries",
    "read_config",
]
