"""One node, many ranks: who this process is, what the ranks tell each other, and who takes the next piece of work.

Started by `torchrun`; without it there is one rank, and nothing here talks to anyone. What ranks tell each other is JSON,
never a pickle. Every wait has an end: where a rank stays away, the others raise an error that names it.
"""

from __future__ import annotations

import gc
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
from torch.distributed.distributed_c10d import _get_default_group, _set_pg_timeout

from srcfast.errors import ConfigError, Interrupted, SrcfastError

Found = TypeVar("Found")

START_TIMEOUT = timedelta(minutes=30)  # models are read, kernels compiled, caches filled: ranks may be far apart
TIMEOUT = timedelta(minutes=10)
# NCCL ends the whole process, and names no rank; so it comes behind gloo, which leaves it to us to name the one that is away.
NCCL_LATER = timedelta(minutes=1)
POLL = 0.1  # seconds between two looks at who is still away
DEVICE_POLL = 0.0002  # seconds between two looks at whether a device is done
DROPPED = 0.2  # seconds in which threads that nobody ends any more drop what they hold
SETTLE = 1.0  # seconds in which the ranks that a failed exchange has in common hear of it

_store: dist.Store | None = None
_short: timedelta | None = None  # the timeout still to be set once all ranks are under way
_patience = START_TIMEOUT  # the one that holds now
_nccl = False  # whether there is NCCL beside gloo
_connected = False  # whether it has connected the ranks' devices
_arrived = 0  # exchanges that this rank has come to
_sign = 0.0  # when this rank last gave a sign of life
_alone: dict[str, int] = {}
_groups: list[dist.ProcessGroup] = []  # of some of the ranks, beside the one of all
_mesh: Any = None  # of the ranks of this node, once it was asked for


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """How many of the ranks are on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Whether this rank writes what all have in common, and shows its progress."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks. Raises SrcfastError where one does not come within the timeout."""
    gather(None)


def barrier_with_heartbeat() -> None:
    """Wait for all ranks, however long the others' work takes: as long as they show signs of life, see `heartbeat`.

    Raises:
        SrcfastError: a rank that is still away has shown none for the timeout; it is named.
    """
    if world_size() == 1:
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


def heartbeat() -> None:
    """A sign of life for the ranks that `barrier_with_heartbeat`: called by a rank whose work advances, as often as it likes.

    Raises:
        SrcfastError: the host that counts is gone.
    """
    global _sign
    if _store is not None and time.monotonic() - _sign > 1.0:
        _sign = time.monotonic()
        _add(f"alive/{rank()}", 1)


def broadcast(value: Any) -> Any:
    """Rank 0's value, of what JSON can say, on every rank. Raises SrcfastError where a rank stays away."""
    return gather(value if is_rank_zero() else None)[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value, of what JSON can say, in the order of the ranks, on every rank.

    Raises:
        SrcfastError: a rank stays away; it is named.
    """
    if world_size() == 1:
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
    if world_size() == 1:
        return own[None]
    if own.is_cuda:
        _connect()
    parts = [torch.empty_like(own) for _ in range(world_size())]
    _together(lambda: dist.all_gather(parts, own))
    return torch.stack(parts)


def wait_for(event: torch.cuda.Event) -> None:
    """Wait until a device has come to this event, behind sums over the ranks: as long as for another rank, and no longer.

    Raises:
        SrcfastError: it has not; a rank that has come to fewer exchanges is named.
    """
    if world_size() == 1:
        event.synchronize()
        return
    since = time.monotonic()
    while not event.query():
        if time.monotonic() - since > _patience.total_seconds():
            raise _in_vain("the device is still busy")
        time.sleep(DEVICE_POLL)


def all_reduce_async(tensor: Tensor) -> Callable[[], None]:
    """Begin to add up a tensor over the ranks, in place; it is whole once what is returned was called.

    On a GPU that call waits for nothing but orders what follows behind the sum.
    """
    if world_size() == 1:
        return lambda: None
    if tensor.is_cuda:
        _connect()
    work = _together(lambda: dist.all_reduce(tensor, async_op=True))
    return lambda: _finish(work.wait)


def run_on_rank_zero(work: Callable[[], Found]) -> Found:
    """Rank 0 does the work while the others wait; all get what it returns, of what JSON can say.

    Raises:
        SrcfastError: on the other ranks, when rank 0 raises anything: no rank waits for one that has failed.
    """
    if world_size() == 1:
        return work()
    if not is_rank_zero():
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


def next_index(name: str) -> int:
    """0, 1, 2, ...: each is given to one rank only, to whichever asks first. Ranks that share work take it by these.

    Raises:
        SrcfastError: the host that counts is gone.
    """
    if _store is None:
        _alone[name] = _alone.get(name, -1) + 1
        return _alone[name]
    return _add(f"next/{name}", 1) - 1


def end_startup_timeout() -> None:
    """Say that the start is over (models are read, a first step or stage is done): from now on waits are short."""
    global _short, _patience
    if _short is not None:
        _set_timeout(_short)
        _short = None


def node_mesh(device_type: str) -> Any:
    """The ranks of this node, as PyTorch's DeviceMesh; their waits end as those of all do."""
    global _mesh
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    here = local_world_size()
    if _mesh is None:  # kept: a model may be read more than once, and each time new groups would be made
        if _nccl:
            _connect()
        if here == world_size():
            _mesh = DeviceMesh.from_group(_get_default_group(), device_type)
        else:
            nodes = (world_size() // here, here)
            _mesh = init_device_mesh(device_type, nodes, mesh_dim_names=("nodes", "ranks"))["ranks"]
            _groups.append(_mesh.get_group())
            _set_timeout(_patience)
    return _mesh


@contextmanager
def process_group(timeout: timedelta = TIMEOUT, device: str = "cpu") -> Iterator[None]:
    """The ranks that `torchrun` has started, for as long as the body runs; without it, nothing.

    gloo on a CPU; with a GPU NCCL beside it, and each rank takes the device of its local rank.

    Args:
        timeout: longest wait for another rank once they are `end_startup_timeout`; before that `START_TIMEOUT` if it is longer.
        device: the settings' `model.device`.

    Raises:
        ConfigError: one GPU is named, or fewer are here than ranks.
    """
    global _store, _short, _arrived, _nccl, _connected
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
    _store, _short, _arrived, _nccl, _connected = store, timeout, 0, cuda, False
    _set_timeout(at_start)
    # After an error the group is left as it is: to end it might wait for the others, who learn of it from the closed
    # connection or from torchrun. After a signal a shared base is let go of as after the work: no rank needs it any more.
    try:
        yield
    except Interrupted:
        if _mesh is not None:
            _end()
        raise
    except RuntimeError as error:  # where ranks put a layer together, PyTorch's own words name none of them
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            raise _in_vain(_first_line(error)) from error
        raise
    _end()


def _end() -> None:
    global _store, _short
    shared = _mesh is not None
    if shared:
        _let_go()
    _store = _short = None
    dist.destroy_process_group()
    if shared:  # where PyTorch still holds the group (2.11 does), its threads let go of their tensors meanwhile
        time.sleep(DROPPED)


def _let_go() -> None:
    """Of all that holds the groups: else their threads outlive them, and one that drops a tensor while Python ends, ends all."""
    global _mesh
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _mesh = None
    _groups.clear()
    _clear_sharding_prop_cache()
    gc.collect()


def _take_gpu(device: str) -> None:
    local, here = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if torch.device(device).index is not None:
        raise ConfigError(
            f"model.device: expected cuda under torchrun, of which each rank takes its own, found {device}. "
            "Fix: model.device=cuda, and CUDA_VISIBLE_DEVICES to choose"
        )
    if local >= here:
        raise ConfigError(
            f"torchrun: expected at most as many ranks on a node as it has GPUs ({here}), found rank {local}. "
            f"Fix: --nproc-per-node={here}"
        )
    torch.cuda.set_device(local)


def _set_timeout(timeout: timedelta) -> None:
    """Of all exchanges that begin from now on."""
    global _patience
    _patience = timeout
    for group in (_get_default_group(), *_groups):
        _set_pg_timeout(timeout, group)
        if _nccl:
            group._get_backend(torch.device("cuda"))._set_default_timeout(timeout + NCCL_LATER)


def _connect() -> None:
    """Before NCCL's first exchange, in which it connects the devices and waits without an end for a rank that is away."""
    global _connected
    if not _connected:
        barrier()
        _connected = True


def _together(collective: Callable[[], Found]) -> Found:
    """A collective, counted before it begins: so that a rank which is not there can be named."""
    _arrive()
    return _finish(collective)


def _arrive() -> None:
    global _arrived
    _arrived += 1
    _add(f"arrived/{rank()}", 1)


def _add(name: str, number: int) -> int:
    """Add to a counter that all ranks see; returns what it is then. Raises SrcfastError where the host that counts is gone."""
    assert _store is not None
    store = _store
    return _finish(lambda: store.add(f"srcfast/{name}", number))


def _counter(name: str) -> int:
    """Raises RuntimeError where the host that counts is gone."""
    assert _store is not None
    return _store.add(f"srcfast/{name}", 0)


def _away() -> list[int]:
    """The ranks that have come to fewer exchanges than this one."""
    return [other for other in range(world_size()) if _counter(f"arrived/{other}") < _arrived]


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
        away = _away() or _silent()
    missing = f"rank {', '.join(map(str, away))}" if away else "another rank"
    return SrcfastError(
        f"rank {rank()} of {world_size()} waited in vain for {missing}: expected all ranks to come to the same exchange. "
        "Fix: see the first error that another rank shows; where there is none, it hangs, or it is slower than "
        f"distributed.timeout_seconds allows ({why})"
    )


def _silent() -> list[int]:
    """The one rank that has stopped within an exchange to which all have come: all others give it up, it does not.

    Empty where several don't within SETTLE: some may not have heard of it yet.
    """
    assert _store is not None
    _store.add(f"srcfast/gave up/{rank()}", 1)
    end = time.monotonic() + SETTLE
    while True:
        left = [
            other
            for other in range(world_size())
            if _counter(f"arrived/{other}") == _arrived and not _counter(f"gave up/{other}")
        ]
        if not left or time.monotonic() > end:
            return left if len(left) == 1 else []
        time.sleep(POLL)
