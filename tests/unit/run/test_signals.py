"""Signals wait for a boundary where there are any; where there are none, and the second time, they stop at once."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from srcfast.errors import Interrupted
from srcfast.run import signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_a_loop_a_signal_waits_for_the_boundary(number: signal.Signals) -> None:
    done = []
    with signals.listening(), signals.at_boundaries(), pytest.raises(Interrupted) as error:
        for piece in range(3):
            if piece == 1:
                signal.raise_signal(number)
            done.append(piece)
            signals.stop_if_pending(f"piece {piece + 1} of 3")
    assert done == [0, 1]
    assert error.value.status == 128 + number
    assert str(error.value) == f"stopped by {number.name} after piece 2 of 3. The same command continues"


def test_outside_of_loops_a_signal_stops_at_once() -> None:
    with signals.listening(), pytest.raises(Interrupted, match="SIGTERM at once"):
        with signals.at_boundaries():
            pass
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("went on")


def test_a_second_signal_stops_at_once() -> None:
    with signals.listening(), signals.at_boundaries():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGINT at once"):
            signal.raise_signal(signal.SIGINT)


def test_signals_are_what_they_were_afterwards() -> None:
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with signals.listening(), signals.at_boundaries():
        signal.raise_signal(signal.SIGTERM)
        assert signals.pending() == signal.SIGTERM
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    assert not signals.pending()
    signals.stop_if_pending()


def test_in_another_thread_nothing_is_listened_to() -> None:
    def listen() -> str:
        with signals.listening():  # signal.signal would raise in a thread
            return "done"

    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(listen).result() == "done"
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


def test_where_any_error_is_handled_a_signal_is_none() -> None:
    """As where an image is decoded, whose library raises whatever it meets."""
    with pytest.raises(Interrupted), signals.listening():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("the signal was taken for an error")
