"""One node, many ranks: who this process is, what the ranks tell each other, and who takes the next piece of work.

Started by `torchrun`; without it there is one rank, and nothing here talks to anyone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_store: dist.Store | None = None


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this rank writes what all have in common, and shows its progress."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks; RuntimeError where one does not come within the process group's timeout."""
    if size() > 1:
        dist.barrier()


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks, on every rank."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def next_number(name: str) -> int:
    """0, 1, 2, ...: each is given to one rank only, to whichever asks first. Ranks that share work take it by these."""
    if _store is None:
        _alone[name] = _alone.get(name, -1) + 1
        return _alone[name]
    return _store.add(f"srcfast/next/{name}", 1) - 1


_alone: dict[str, int] = {}


@contextmanager
def process_group(timeout: timedelta = timedelta(minutes=10)) -> Iterator[None]:
    """The ranks that `torchrun` has started, for as long as the body runs; without it, nothing.

    NCCL where there is a GPU, gloo otherwise; on a GPU each rank takes the device of its local rank.
    """
    global _store
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, own_rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("srcfast/group", store),
        rank=own_rank,
        world_size=world_size,
        timeout=timeout,
    )
    _store = store
    try:
        yield
    finally:
        _store = None
        dist.destroy_process_group()
