"""Ctrl-C and SIGTERM: the run reaches a place from which it can resume exactly, saves, and stops.

Standard library only.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Exit codes of a command; another signal's is 128 + its number.
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143
# Variable with the words that started a recipe, where they are goose-lora's: goose-lora ppo. With
# them a stopped run names the command that continues it.
STARTED_BY = "GOOSE_LORA_COMMAND"


class Stopped(KeyboardInterrupt):
    """Raised out of ``train`` when the run was asked to stop and has saved.

    ``signum`` is the signal, ``checkpoint`` the folder.
    """

    def __init__(self, signum: int, checkpoint: str):
        super().__init__(f"Stopped by {signal.Signals(signum).name}; saved in {checkpoint}.")
        self.signum, self.checkpoint = signum, checkpoint


class StopSignals:
    """Whether the run was asked to stop. A second signal has its default effect."""

    def __init__(self):
        self.asked = 0  # the signal's number
        self._handles = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Note the first signal inside.

        It does nothing inside itself, and in a thread other than the main one, which alone gets
        signals.
        """
        if self._handles or not _gets_signals():
            yield
            return

        def ask(signum: int, put_back: Callable[[], None]) -> None:
            # print could be what the signal has interrupted; a write to the terminal cannot
            self.asked = signum
            put_back()
            os.write(
                2,
                (
                    f"\n{signal.Signals(signum).name}: what is under way is finished (PPO: the rollout's"
                    " optimizer steps), saved, and then the run stops. A second one stops it at once, and"
                    " what was done since the last checkpoint is lost.\n"
                ).encode(),
            )

        self.asked, self._handles = 0, True
        try:
            with _answered(ask):
                yield
        finally:
            self._handles = False


@contextmanager
def left_to(children: Callable[[], Iterable[int]]) -> Iterator[None]:
    """Leave the signals inside to processes that this one waits for, by their numbers.

    Ctrl-C reaches them by itself, as it does all that runs in a terminal; SIGTERM, which is sent to
    one process, is sent on.
    """

    # An answer to both, since a signal that is ignored would be ignored by the children as well
    def send_on(signum: int, put_back: Callable[[], None]) -> None:
        for number in children() if signum == signal.SIGTERM else ():
            with suppress(ProcessLookupError):
                os.kill(number, signum)

    with _answered(send_on):
        yield


def _gets_signals() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _answered(answer: Callable[[int, Callable[[], None]], None]) -> Iterator[None]:
    """Answer signals inside by ``answer``, which is given what puts their handlers back.

    Those that are ignored, as under nohup, stay so. It does nothing in a thread that gets none.
    """
    # None is a handler that was not made in Python
    before = {signum: signal.getsignal(signum) for signum in SIGNALS} if _gets_signals() else {}
    before = {signum: handler for signum, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def put_back() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    for signum in before:
        signal.signal(signum, lambda signum, frame: answer(signum, put_back))
    try:
        yield
    finally:
        put_back()
