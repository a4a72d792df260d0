"""Stop where nothing is lost: SIGTERM and SIGINT are heard at once and obeyed at a loop's next boundary.

A loop that stores its work chunk by chunk runs within `at_boundaries` and calls `stop_if_pending` after each chunk. Elsewhere
(data is read, a model is loaded) a signal stops at once, for nothing is half-done there. A second signal stops at once anywhere.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from srcfast.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_asked = 0  # the signal that was received and not yet obeyed
_loops = 0  # how many loops with boundaries the process is in, one within the other


@contextmanager
def listening() -> Iterator[None]:
    """Signals are received as this module says for as long as the body runs; only in the main thread, elsewhere nothing.

    The command line does this once. As a library srcfast leaves the signals as they are.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked = 0
    before = {number: signal.signal(number, _receive) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = 0


@contextmanager
def at_boundaries() -> Iterator[None]:
    """The body calls `stop_if_pending` between pieces: until then the first signal waits."""
    global _loops
    _loops += 1
    try:
        yield
    finally:
        _loops -= 1


def pending() -> int:
    """The number of the signal that this process was asked to stop by; 0 for none."""
    return _asked


def stop_if_pending(done: str = "") -> None:
    """A boundary: all work so far is on disk. Talks to no other rank.

    Args:
        done: what was done last, such as "sample 12 of 40"; shown.

    Raises:
        Interrupted: a signal asked to stop.
    """
    if _asked:
        raise Interrupted(_asked, done)


def _receive(number: int, frame: FrameType | None) -> None:
    global _asked
    if _loops and not _asked:
        _asked = number
        return
    for each in SIGNALS:  # whoever asks a third time need not be asked for more patience
        signal.signal(each, signal.SIG_DFL)
    raise Interrupted(number, "at once")
