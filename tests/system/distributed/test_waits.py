"""No wait is without an end: a rank that hangs, raises or is killed ends the others with an error that names it."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers.rank_processes import LIMIT, PRELOADED, SharedClock, run_ranks, values_of, wait_until_ended

from srcfast import distributed
from srcfast.errors import InputError

SHORT = timedelta(seconds=3)


def test_what_the_fork_server_is_to_import_exists() -> None:
    assert [name for name in PRELOADED if importlib.util.find_spec(name) is None] == []


def hang(folder: Path) -> None:
    distributed.barrier()
    distributed.end_startup_timeout()
    if distributed.rank() == 1:
        wait_until_ended(folder, 0)
    distributed.barrier()


def be_killed(folder: Path) -> None:
    distributed.barrier()
    distributed.end_startup_timeout()
    if distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def fail(folder: Path) -> None:
    distributed.barrier()
    distributed.end_startup_timeout()
    if distributed.rank() == 1:
        raise InputError(field="image", expected="a picture", found="none")
    distributed.barrier()


@pytest.mark.parametrize("work", [hang, be_killed, fail])
def test_a_rank_that_stays_away_is_named_within_the_timeout(tmp_path: Path, work: Any) -> None:
    here = run_ranks(2, work, tmp_path, SHORT)[0]
    # A rank that waited for START_TIMEOUT, which holds before, would be killed at LIMIT.
    assert here["exit"] == 1 and distributed.START_TIMEOUT.total_seconds() > 2 * LIMIT
    assert "timed out waiting for rank 1" in here["error"] and "distributed.timeout_seconds" in here["error"]


def stop_within_an_exchange(folder: Path) -> None:
    distributed.SETTLE = 3.0  # on a busy machine the ranks give up at different times; this process ends with the test
    distributed.barrier()
    distributed.end_startup_timeout()
    if distributed.rank() == 2:
        distributed._arrive()  # it has come, and is stopped before it says anything
        wait_until_ended(folder, 0, 1, 3)
    distributed.barrier()


def test_of_four_ranks_one_that_stops_within_an_exchange_is_named(tmp_path: Path) -> None:
    found = run_ranks(4, stop_within_an_exchange, tmp_path, SHORT)
    assert "timed out waiting for rank 2:" in found[0]["error"]
    for here in (
        found[1],
        found[3],
    ):  # the store by which they name it may have ended with rank 0: there is no torchrun
        assert here["exit"] == 1 and "timed out waiting for" in here["error"]


def lose_the_store(folder: Path) -> None:
    distributed.barrier()
    if distributed.is_rank_zero():  # which holds the store, for there is no torchrun here
        os.kill(os.getpid(), signal.SIGKILL)
    with suppress(RuntimeError):
        while True:  # until it is gone
            distributed._counter("seen")
            time.sleep(0.01)
    {1: distributed.barrier, 2: distributed.heartbeat, 3: lambda: distributed.next_index("piece")}[distributed.rank()]()


def test_a_host_that_counts_and_is_gone_is_an_error_of_ours(tmp_path: Path) -> None:
    for here in run_ranks(4, lose_the_store, tmp_path)[1:]:
        assert "timed out waiting for another rank" in here["error"] and "SrcfastError" in here["trace"]


def be_slow(folder: Path) -> float:
    distributed.barrier()
    distributed.end_startup_timeout()
    clock = SharedClock()
    if distributed.rank() == 1:
        for _ in range(20):
            clock.spend(40)
            distributed.heartbeat()
    distributed.barrier_with_heartbeat()
    waited = clock.monotonic()
    distributed.barrier()  # rank 0 holds the store that the others ask
    return waited


def hang_at_work(folder: Path) -> None:
    distributed.barrier()
    distributed.end_startup_timeout()
    if distributed.rank() == 1:
        distributed.heartbeat()
        wait_until_ended(folder, 0)
    distributed.barrier_with_heartbeat()


def test_a_rank_that_is_slow_is_waited_for_as_long_as_it_shows_signs_of_life(tmp_path: Path) -> None:
    assert min(values_of(run_ranks(2, be_slow, tmp_path, timedelta(seconds=60)))) >= 800


def test_a_rank_that_shows_none_is_not(tmp_path: Path) -> None:
    here = run_ranks(2, hang_at_work, tmp_path, SHORT)[0]
    assert "timed out waiting for rank 1" in here["error"] and "no sign of life" in here["error"]


def main_fails(folder: Path) -> None:
    def read() -> dict[str, int]:
        raise InputError(file="config.yaml", expected="a mapping", found="a list")

    distributed.run_on_rank_zero(read)


def test_what_rank_0_alone_can_not_do_ends_all(tmp_path: Path) -> None:
    found = run_ranks(2, main_fails, tmp_path)
    assert [one["exit"] for one in found] == [1, 1]
    assert found[0]["error"].startswith("config.yaml: expected a mapping")
    assert found[1]["error"].startswith("rank 0 has failed: InputError: config.yaml: expected a mapping")


def exchange(folder: Path) -> dict[str, Any]:
    own = {"rank": distributed.rank(), "words": ["ä"] * distributed.rank()}
    numbers = [distributed.next_index("piece") for _ in range(5)]
    return {
        "gathered": distributed.gather(own),
        "broadcast": distributed.broadcast(own),
        "main": distributed.run_on_rank_zero(lambda: {"of": distributed.rank()}),
        "numbers": distributed.gather(numbers),
    }


def test_ranks_tell_each_other_values_and_share_numbers_without_a_gap(tmp_path: Path) -> None:
    everyone = [{"rank": rank, "words": ["ä"] * rank} for rank in range(3)]
    for told in values_of(run_ranks(3, exchange, tmp_path)):
        assert told["gathered"] == everyone
        assert told["broadcast"] == everyone[0]
        assert told["main"] == {"of": 0}
        assert sorted(sum(told["numbers"], [])) == list(range(15))


def test_one_process_alone_needs_no_one() -> None:
    distributed.barrier()
    distributed.end_startup_timeout()
    assert distributed.gather(3) == [3] and distributed.broadcast({"a": 1}) == {"a": 1}
    assert distributed.run_on_rank_zero(lambda: 7) == 7
    with distributed.process_group():
        assert (distributed.rank(), distributed.world_size(), distributed.is_rank_zero()) == (0, 1, True)
