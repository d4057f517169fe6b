"""A limit of time for what strangers have written: reward functions, chat templates."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from goose_lora.errors import TimeLimitError


@contextmanager
def time_limit(seconds: float | None, what: str, way_out: str) -> Iterator[None]:
    """Interrupt what is inside after ``seconds``, by an alarm of the system.

    ``way_out`` ends the sentence that tells it. There is no limit on Windows, or in another thread
    than the main one.

    Raises:
        TimeLimitError: the time is over.
    """
    if seconds is None or not _has_alarms():
        yield
        return

    def ring(signum: int, frame: object) -> None:
        raise TimeLimitError(f"{what} has not answered for {seconds:g} s{way_out}")

    # An alarm of the caller's goes on where this one ends
    handler = signal.signal(signal.SIGALRM, ring)
    began, (before, interval) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        _set_again(before, interval, began)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def kept_alarm() -> Iterator[None]:
    """Set the caller's alarm again after code that sets, and so ends, an alarm of its own."""
    if not _has_alarms():
        yield
        return
    began, (before, interval) = time.monotonic(), signal.getitimer(signal.ITIMER_REAL)
    try:
        yield
    finally:
        if before:
            _set_again(before, interval, began)


def _has_alarms() -> bool:
    return sys.platform != "win32" and threading.current_thread() is threading.main_thread()


def _set_again(before: float, interval: float, began: float) -> None:
    """Set an alarm that had ``before`` seconds left at ``began``; 0 is none.

    One that has become due meanwhile rings at once.
    """
    left = max(before - (time.monotonic() - began), 0.001) if before else 0
    signal.setitimer(signal.ITIMER_REAL, left, interval)
