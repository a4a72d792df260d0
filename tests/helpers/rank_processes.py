"""Real ranks for tests: processes that meet over gloo as torchrun's would, each running one function."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from srcfast import distributed

LIMIT = 600.0  # seconds that a test waits for its ranks: a hang is a failure, a busy machine is not

# The fork server imports these once, and each rank is a fork of it. It skips without an error what it cannot import, and then
# each rank spends 2 s on it. It does not see pytest's `sys.path`, so modules beside the tests cannot be named here.
PRELOADED = (
    "hypothesis",
    "numpy.ma",
    "pytest",
    "srcfast.calibrate",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "torch.profiler",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
)

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(list(PRELOADED))


def run_ranks(
    ranks: int, work: Callable[[Path], Any], folder: Path, timeout: timedelta = timedelta(seconds=60)
) -> list[dict[str, Any]]:
    """What each rank's `work(folder)` returned (`value`) or raised (`error`), and its `exit` status.

    A rank that is still there after `LIMIT` is killed, and `exit` is negative.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_rank, args=(rank, ranks, port, work, folder, timeout)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + LIMIT
    found = []
    for rank, process in enumerate(processes):
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
        file = folder / f"rank-{rank}-of-{ranks}.json"
        told = json.loads(file.read_text()) if file.is_file() else {}
        found.append(told | {"exit": process.exitcode})
    return found


def values_of(found: list[dict[str, Any]]) -> list[Any]:
    """The ranks' values; fails with the first error."""
    for rank, one in enumerate(found):
        assert one["exit"] == 0, f"rank {rank}: {one.get('trace', one)}"
    return [one["value"] for one in found]


def wait_until_ended(folder: Path, *others: int) -> None:
    """Wait until these ranks have ended: for one that hangs as long as the others need, and no longer."""
    files = [folder / f"rank-{other}-of-{distributed.world_size()}.json" for other in others]
    while not all(file.is_file() for file in files):
        time.sleep(0.01)


class SharedClock:
    """The clock of `distributed` for two ranks, which counts what they do: a busy machine does not make it go faster.

    A second passes each time the rank that waits looks whether the other has come. It looks only as often as the other, by
    `spend`, has said that its work takes.
    """

    def __init__(self) -> None:
        distributed.time, distributed._last_heartbeat = self, 0.0  # type: ignore[assignment]  # this process ends with the test

    def monotonic(self) -> float:
        return float(distributed._counter("clock/seconds"))

    def sleep(self, seconds: float) -> None:
        now = distributed._add("clock/seconds", 1)
        while distributed._counter("clock/spent") < now and distributed._missing_ranks():
            time.sleep(0.001)

    def spend(self, seconds: int) -> None:
        end = distributed._add("clock/spent", seconds)
        while self.monotonic() < end:
            time.sleep(0.001)


def _rank(rank: int, ranks: int, port: int, work: Callable[[Path], Any], folder: Path, timeout: timedelta) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    file = folder / f"rank-{rank}-of-{ranks}.json"
    try:
        with distributed.process_group(timeout):
            file.write_text(json.dumps({"value": work(folder)}))
    except Exception as error:
        file.write_text(json.dumps({"error": str(error), "trace": traceback.format_exc()}))
        os._exit(1)  # as a process that dies: nothing is tidied up
