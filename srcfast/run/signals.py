"""Stop at SIGTERM or SIGINT where no work is lost: at the next boundary of the loop that runs.

A loop that saves its work chunk by chunk runs within `at_boundaries` and calls `stop_if_pending` after each chunk. Outside such
loops (while data are read or a model is loaded) a signal stops the process at once, since there is no work to save. A second
signal stops it at once everywhere.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from srcfast.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_pending_signal = 0  # received, but the process has not stopped yet; 0: none
_loop_depth = 0  # how many loops with boundaries are running, one within the other


@contextmanager
def listening() -> Iterator[None]:
    """Install this module's signal handlers while the body runs. Outside the main thread, do nothing.

    Only the command line does this: as a library, srcfast leaves its user's handlers in place.
    """
    global _pending_signal
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _pending_signal = 0
    previous = {number: signal.signal(number, _receive) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _pending_signal = 0


@contextmanager
def at_boundaries() -> Iterator[None]:
    """Defer the first signal while the body runs; the body calls `stop_if_pending` after each chunk of its work."""
    global _loop_depth
    _loop_depth += 1
    try:
        yield
    finally:
        _loop_depth -= 1


def pending() -> int:
    """Return the number of the signal that was received and deferred; 0: none."""
    return _pending_signal


def stop_if_pending(done: str = "") -> None:
    """Stop if a signal is pending. Called when all work so far is on disk; does not communicate with other ranks.

    Args:
        done: what was done last, such as "sample 12 of 40", for the message.

    Raises:
        Interrupted: a signal is pending.
    """
    if _pending_signal:
        raise Interrupted(_pending_signal, done)


def _receive(number: int, frame: FrameType | None) -> None:
    global _pending_signal
    if _loop_depth and not _pending_signal:
        _pending_signal = number
        return
    for handled in SIGNALS:  # a third signal ends the process, even while this exception is handled
        signal.signal(handled, signal.SIG_DFL)
    raise Interrupted(number, "at once")
