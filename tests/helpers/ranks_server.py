"""Runs `srcfast` on several ranks in forked children, as torchrun starts them, and a fault befalls one of them.

A program, see `attempts_server`. A request: `words`, `ranks`, `logs` (a file for each rank), `limit` and `small_pieces` (whether
even a few samples are shared out); and for a fault `victim` (a rank), `fault` (a "moment", see `Faults`) and `agent`. The
answer: each rank's `status`, and `seconds` from the victim's end, or its stop, to the end of the last of the others (None:
nothing befell it, or the limit was reached).

As under torchrun the store is none of the ranks': it outlives them all. With `agent` the other ranks are asked to stop as soon
as one has failed, as torchrun does it; without it they are left to themselves.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from types import FrameType
from typing import Any

from helpers.attempts_server import Faults, import_once, run_and_end

START_TIMEOUT = timedelta(seconds=20)  # nothing is compiled here, and no large model is read


class RankFailed(BaseException):
    """What a rank raises at SIGUSR1, wherever it is: where an image is read, too, and is not taken for a bad image."""


def keep_store() -> tuple[int, int]:
    """Fork the process that holds the store; returns its number and its port."""
    from torch.distributed import TCPStore

    reading, writing = os.pipe()
    if (process := os.fork()) == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, f"{store.port}\n".encode())
        os.close(writing)
        while True:
            signal.pause()
    os.close(writing)
    with os.fdopen(reading) as told:
        return process, int(told.readline())


def fail(number: int, frame: FrameType | None) -> None:
    raise RankFailed("a rank that fails")


def take_small_pieces() -> None:
    """Pieces of one answer, one sample, two pairs, four samples to be judged; and a start that is over soon."""
    from srcfast import distributed
    from srcfast.stages import candidates, evaluation, logprobs, scoring

    distributed.START_TIMEOUT = START_TIMEOUT
    candidates.BATCHES = evaluation.BATCHES = 1
    logprobs.PAIRS, scoring.CHUNK = 2, 4


def child(request: dict[str, Any], rank: int, port: int) -> None:
    """Run the command line as this rank and end with its status."""
    log = os.open(request["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGUSR1, fail)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(request["ranks"]),
        "LOCAL_WORLD_SIZE": str(request["ranks"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    if request.get("small_pieces"):
        take_small_pieces()
    if rank == request.get("victim"):
        Faults(request["fault"], points=log).begin()
    run_and_end(request["words"])


def attempt(request: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks, wait for all, and tell how they ended; those that still are there at the limit are killed."""
    keeper, port = keep_store()
    ranks: dict[int, int] = {}  # of each process
    for rank in range(request["ranks"]):
        if (process := os.fork()) == 0:
            child(request, rank, port)
        ranks[process] = rank
    statuses: dict[int, int] = {}
    began, struck, asked, overdue = time.monotonic(), None, None, False
    victim = request.get("victim")
    while len(statuses) < len(ranks):
        for process, rank in ranks.items():
            if rank in statuses:
                continue
            ended, status = os.waitpid(process, os.WNOHANG | os.WUNTRACED)
            if not ended:
                continue
            if rank == victim and struck is None and status != 0:
                struck = time.monotonic()
            if not os.WIFSTOPPED(status):
                statuses[rank] = os.waitstatus_to_exitcode(status)
        left = [process for process, rank in ranks.items() if rank not in statuses]
        last = time.monotonic()
        if request.get("agent") and asked is None and any(statuses.values()):
            asked = last
            for process in left:
                os.kill(process, signal.SIGTERM)
        overdue = last > began + request["limit"]
        # A victim that was stopped is all that's left, or the limit is reached.
        if [ranks[process] for process in left] == [victim] and struck or overdue:
            for process in left:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.002)
    os.kill(keeper, signal.SIGKILL)
    os.waitpid(keeper, 0)
    seconds = None if struck is None or overdue else last - struck
    return {"statuses": [statuses[rank] for rank in sorted(statuses)], "seconds": seconds}


def main() -> None:
    import_once()
    for line in sys.stdin:
        print(json.dumps(attempt(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
