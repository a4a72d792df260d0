"""One node, many ranks: who this process is, what the ranks tell each other, and who takes the next piece of work.

Started by `torchrun`; without it there is one rank, and nothing here talks to anyone. What ranks tell each other is JSON,
never a pickle. Every wait has an end: where a rank stays away, the others raise an error that names it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from srcfast.errors import ConfigError, Interrupted, SrcfastError

Found = TypeVar("Found")

START_TIMEOUT = timedelta(minutes=30)  # models are read, kernels compiled, caches filled: ranks may be far apart
TIMEOUT = timedelta(minutes=10)
POLL = 0.1  # seconds between two looks at who is still away

_store: dist.Store | None = None
_short: timedelta | None = None  # the timeout still to be set once all ranks are under way
_patience = START_TIMEOUT  # the one that holds now
_arrived = 0  # exchanges that this rank has come to
_sign = 0.0  # when this rank last gave a sign of life
_alone: dict[str, int] = {}
_groups: list[dist.ProcessGroup] = []  # of some of the ranks, beside the one of all


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_of_node() -> int:
    """How many of the ranks are on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size())) if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this rank writes what all have in common, and shows its progress."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks. Raises SrcfastError where one does not come within the timeout."""
    gather(None)


def meet() -> None:
    """Wait for all ranks, however long the others' work takes: as long as they show signs of life, see `alive`.

    Raises:
        SrcfastError: a rank that is still away has shown none for the timeout; it is named.
    """
    if size() == 1:
        return
    _arrive()
    signs, since = None, time.monotonic()
    while away := _finish(_away):
        found = _finish(lambda: [_counter(f"alive/{other}") for other in away])  # noqa: B023  (called at once)
        if found != signs:
            signs, since = found, time.monotonic()
        elif time.monotonic() - since > _patience.total_seconds():
            raise _in_vain("no sign of life")
        time.sleep(POLL)


def alive() -> None:
    """A sign of life for the ranks that `meet`: called by a rank whose work advances, as often as it likes."""
    global _sign
    if _store is not None and time.monotonic() - _sign > 1.0:
        _sign = time.monotonic()
        _store.add(f"srcfast/alive/{rank()}", 1)


def broadcast(value: Any) -> Any:
    """Rank 0's value, of what JSON can say, on every rank. Raises SrcfastError where a rank stays away."""
    return gather(value if is_main() else None)[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value, of what JSON can say, in the order of the ranks, on every rank.

    Raises:
        SrcfastError: a rank stays away; it is named.
    """
    if size() == 1:
        return [value]
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)  # [n]
    lengths = gather_tensor(torch.tensor([len(own)])).flatten().tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(own)] = own
    parts = gather_tensor(padded)  # [ranks, longest]
    return [json.loads(bytes(part[:length].tolist())) for part, length in zip(parts, lengths, strict=True)]


def gather_tensor(own: Tensor) -> Tensor:
    """Every rank's tensor of this shape and dtype: [ranks, ...], on its device.

    Raises:
        SrcfastError: a rank stays away; it is named.
    """
    if size() == 1:
        return own[None]
    parts = [torch.empty_like(own) for _ in range(size())]
    _together(lambda: dist.all_gather(parts, own))
    return torch.stack(parts)


def start_sum(tensor: Tensor) -> Callable[[], None]:
    """Begin to add up a tensor over the ranks, in place; it is whole once what is returned was called.

    On a GPU that call waits for nothing but orders what follows behind the sum.
    """
    if size() == 1:
        return lambda: None
    work = _together(lambda: dist.all_reduce(tensor, async_op=True))
    return lambda: _finish(work.wait)


def from_main(work: Callable[[], Found]) -> Found:
    """Rank 0 does the work while the others wait; all get what it returns, of what JSON can say.

    Raises:
        SrcfastError: on the other ranks, when rank 0 raises anything: no rank waits for one that has failed.
    """
    if size() == 1:
        return work()
    if not is_main():
        told = broadcast(None)
        if "error" in told:
            raise SrcfastError(f"rank 0 has failed: {told['error']}")
        return told["value"]
    try:
        value = work()
    except (Exception, Interrupted) as error:
        broadcast({"error": f"{type(error).__name__}: {error}"})
        raise
    broadcast({"value": value})
    return value


def next_number(name: str) -> int:
    """0, 1, 2, ...: each is given to one rank only, to whichever asks first. Ranks that share work take it by these."""
    if _store is None:
        _alone[name] = _alone.get(name, -1) + 1
        return _alone[name]
    return _store.add(f"srcfast/next/{name}", 1) - 1


def under_way() -> None:
    """Say that the start is over (models are read, a first step or stage is done): from now on waits are short."""
    global _short, _patience
    if _short is not None:
        for group in (None, *_groups):
            _set_pg_timeout(_short, group)
        _patience, _short = _short, None


def join(group: dist.ProcessGroup) -> None:
    """A group of some of the ranks, whose waits are to end as those of all do."""
    _groups.append(group)
    _set_pg_timeout(_patience, group)


@contextmanager
def process_group(timeout: timedelta = TIMEOUT, device: str = "cpu") -> Iterator[None]:
    """The ranks that `torchrun` has started, for as long as the body runs; without it, nothing.

    gloo on a CPU; with a GPU NCCL beside it, and each rank takes the device of its local rank.

    Args:
        timeout: longest wait for another rank once they are `under_way`; before that `START_TIMEOUT` if it is longer.
        device: the settings' `model.device`.

    Raises:
        ConfigError: one GPU is named, or fewer are here than ranks.
    """
    global _store, _short, _arrived, _patience
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        yield
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        _take_gpu(device)
    at_start = max(timeout, START_TIMEOUT)
    store, own_rank, world_size = next(dist.rendezvous("env://", timeout=at_start))
    store.set_timeout(at_start)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("srcfast/group", store),
        rank=own_rank,
        world_size=world_size,
        timeout=at_start,
    )
    _store, _short, _arrived, _patience = store, timeout, 0, at_start
    # After an error the group is left as it is: to end it might wait for the others, who learn of it from the closed
    # connection or from torchrun.
    try:
        yield
    except RuntimeError as error:  # where ranks put a layer together, PyTorch's own words name none of them
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            raise _in_vain(_first_line(error)) from error
        raise
    _store = _short = None
    _groups.clear()
    dist.destroy_process_group()


def _take_gpu(device: str) -> None:
    local, here = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if torch.device(device).index is not None:
        raise ConfigError(
            f"model.device: expected cuda under torchrun, of which each rank takes its own, found {device}. "
            "Mend: model.device=cuda, and CUDA_VISIBLE_DEVICES to choose"
        )
    if local >= here:
        raise ConfigError(
            f"torchrun: expected at most as many ranks on a node as it has GPUs ({here}), found rank {local}. "
            f"Mend: --nproc-per-node={here}"
        )
    torch.cuda.set_device(local)


def _together(collective: Callable[[], Found]) -> Found:
    """A collective, counted before it begins: so that a rank which is not there can be named."""
    _arrive()
    return _finish(collective)


def _arrive() -> None:
    global _arrived
    assert _store is not None
    _arrived += 1
    _store.add(f"srcfast/arrived/{rank()}", 1)


def _counter(name: str) -> int:
    assert _store is not None
    return _store.add(f"srcfast/{name}", 0)


def _away() -> list[int]:
    """The ranks that have come to fewer exchanges than this one."""
    return [other for other in range(size()) if _counter(f"arrived/{other}") < _arrived]


def _finish(wait: Callable[[], Found]) -> Found:
    try:
        return wait()
    except RuntimeError as error:
        raise _in_vain(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _in_vain(why: str) -> SrcfastError:
    away: list[int] = []
    with suppress(RuntimeError):  # who counts may be gone with its host
        away = _away()
    missing = f"rank {', '.join(map(str, away))}" if away else "another rank"
    return SrcfastError(
        f"rank {rank()} of {size()} waited in vain for {missing}: expected all ranks to come to the same exchange. "
        "Mend: see the first error that another rank shows; where there is none, it hangs, or it is slower than "
        f"distributed.timeout_seconds allows ({why})"
    )
