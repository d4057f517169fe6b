"""A command as a process: one line for each error of the user's, signals, exit codes."""

import ctypes
import errno
import functools
import logging
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from goose_lora.cli.consoles import guard_consoles
from goose_lora.errors import UserError
from goose_lora.ownership import release
from goose_lora.redaction import is_secret, redacted
from goose_lora.training.signals import EXIT_BAD_INPUT, EXIT_INTERRUPTED, STARTED_BY, Stopped

REPORT = (
    "This is a bug of goose_lora, not of what you gave it. Please report it as an issue, with the lines"
    " above, the command and the output of pip freeze."
)
_TRAINING = ("sft", "reward", "ppo", "own_loop")  # recipes that leave checkpoints
# A list as YAML has it: what errors about columns advise
_IN_YAML = re.compile(r"column_mapping: \[([^\]]*)\]")
_TOO_LONG = re.compile(r"(\S{80})\S{200,}(\S{20})")  # of a file that is one word
# What the system says of a name that was given, and what to do
_OF_NAMES = {
    errno.ENAMETOOLONG: "Give a shorter one.",
    errno.ELOOP: "Mend the link, or give what it should lead to.",
    errno.EACCES: "Change its rights, or give another.",
    errno.EPERM: "Change its rights, or give another.",
    errno.ENOTDIR: "A part of its path is a file. Check the path.",
}
VERBOSE = "GOOSE_LORA_VERBOSE"  # set to 1 by --verbose, also for the processes of stages
# Options of mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def quiet_libraries() -> None:
    """Switch off telemetry, and lines and bars of libraries that tell the user nothing.

    Set HF_HUB_DISABLE_TELEMETRY=0 to send telemetry; ``--verbose`` shows the lines and bars.
    """
    import datasets
    import huggingface_hub.constants
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1") == "1":
        huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    # Bars of maps and of weights in memory; those of downloads stay
    if os.environ.get(VERBOSE) != "1":
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
        # Tensors are compared before anything loads; a fresh score head is no news
        logging.getLogger("transformers.modeling_utils").addFilter(_is_no_load_report)
    # What peft, trl and transformers say to one another.
    warnings.filterwarnings(
        "ignore", message="`(is_)?gradient_checkpointing` is deprecated", category=FutureWarning
    )


def _is_no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in str(record.msg)


def keep_freed_memory() -> None:
    """Let the process keep memory that it frees, on Linux without a GPU.

    Large tensors are otherwise returned to the system and faulted in again page by page each time
    they are made: a third of the time of fine-tuning on a CPU.
    """
    import torch

    if not sys.platform.startswith("linux") or torch.cuda.is_available():
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # a C library without it, such as musl
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def command(main: Callable[..., Any]) -> Callable[..., Any]:
    """Make a command of ``main``: what its user should see, and the exit code.

    What a user gave wrong (``UserError``) ends in one line and exit code 2; ``--debug`` shows the
    traceback too. A signal ends in one line and 128 + its number. Anything else is a bug of this
    program, which Python shows: its traceback, a line that asks for a report, and exit code 1.
    """

    @functools.wraps(main)
    def run() -> None:
        guard_consoles()
        # Options of every command, which no parser knows
        debug = "--debug" in sys.argv
        if debug:
            sys.argv.remove("--debug")
        if "--verbose" in sys.argv:
            sys.argv.remove("--verbose")
            os.environ[VERBOSE] = "1"
        try:
            main()
        except Stopped as stop:
            print(f"\n{stop} Continue with: {continuing()}", file=sys.stderr)
            sys.exit(128 + stop.signum)
        except KeyboardInterrupt:
            saved = "What was saved is kept"
            if Path(sys.argv[0]).stem in _TRAINING:
                saved += "; --resume_from_checkpoint latest goes on from it"
            print(f"\nStopped. {saved}.", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)
        except UserError as error:
            _end_in_one_line(error, debug)
        except Exception as error:
            # A name that the system does not take, or take us to, was given
            if isinstance(error, OSError) and error.errno in _OF_NAMES and error.filename is not None:
                way_out = _OF_NAMES[error.errno]
                name = os.fsdecode(error.filename)
                _end_in_one_line(UserError(f"{name}: {error.strerror}. {way_out}"), debug)
            error.add_note(REPORT)  # Python shows it below the traceback
            sys.excepthook = _show_without_secrets
            raise
        finally:
            release()

    return run


def _end_in_one_line(error: UserError, debug: bool) -> NoReturn:
    """Print an error as the user of a command should see it, and end with its exit code."""
    if debug:
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
    print(f"error: {_one_line(error)}", file=sys.stderr)
    if not debug:
        print("(--debug shows where)", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


def _one_line(error: UserError) -> str:
    """Return the words of an error, with the middle of very long ones left out.

    Where no file has settings, a setting to write is told as the command line takes it.
    """
    text = redacted(" ".join(str(error).split()))
    if not any(word.partition("=")[0] == "--config" for word in sys.argv):
        text = _IN_YAML.sub(lambda found: f"--column_mapping {shlex.join(found[1].split(', '))}", text)
    return _TOO_LONG.sub(r"\1...\2", text)


def _show_without_secrets(
    kind: type[BaseException], error: BaseException, place: TracebackType | None
) -> None:
    """Print a traceback as Python does, secrets apart."""
    lines = traceback.format_exception(kind, error, place)
    print(redacted("".join(lines)), end="", file=sys.stderr)


def continuing() -> str:
    """Return the command that resumes this recipe from its newest whole checkpoint.

    Secrets are left out of it: they belong into the environment.
    """
    words: list[str] = []
    is_value = False  # of an option that is left out
    for word in sys.argv:
        option, equals, _ = word.partition("=")
        if is_value and not word.startswith("--"):
            is_value = False
            continue
        is_option = option.startswith("--")
        is_left_out = is_option and (option == "--resume_from_checkpoint" or is_secret(option))
        is_value = is_left_out and not equals
        if not is_left_out:
            words.append(word)
    launcher = ["python"]
    if STARTED_BY in os.environ:
        # The script's own path is of no interest where goose-lora has found it
        launcher, words = shlex.split(os.environ[STARTED_BY]), words[1:]
    elif any(name.startswith("ACCELERATE_") for name in os.environ):
        launcher = ["accelerate", "launch"]
    return redacted(shlex.join([*launcher, *words, "--resume_from_checkpoint", "latest"]))
