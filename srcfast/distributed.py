"""Ranks of one node: process group, barriers, exchange of JSON values and tensors, and a shared counter for chunks of work.

The process group exists under `torchrun`; without it there is one rank, and no function here communicates. Ranks exchange
JSON, never pickles. Every wait has a timeout: when a rank is missing, the others raise a SrcfastError that names it.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_group, _set_pg_timeout

from srcfast.errors import ConfigError, Interrupted, SrcfastError
from srcfast.launch import read_launch, whole_number

Result = TypeVar("Result")

START_TIMEOUT = timedelta(minutes=30)  # ranks load models, compile kernels and fill caches, at different speeds
TIMEOUT = timedelta(minutes=10)
# NCCL's watchdog aborts the process without naming a rank. gloo raises an error that this module explains, so it must be first.
NCCL_LATER = timedelta(minutes=1)
POLL = 0.1  # seconds between two queries of the ranks' counters
DEVICE_POLL = 0.0002  # seconds between two queries of a CUDA event
THREAD_EXIT = 0.2  # seconds in which the threads of a destroyed group release their tensors
SETTLE = 1.0  # seconds in which all ranks of a failed exchange notice the failure

_store: dist.Store | None = None
_timeout_after_start: timedelta | None = None  # to be set by `end_startup_timeout`; None: it is set
_timeout = START_TIMEOUT  # of the exchanges that begin now
_has_nccl = False  # whether the group has NCCL beside gloo
_nccl_connected = False  # whether NCCL has connected the ranks' devices
_num_exchanges = 0  # that this rank has begun
_last_heartbeat = 0.0  # of this rank, by time.monotonic
_local_counters: dict[str, int] = {}  # of `next_index` without a process group
_subgroups: list[dist.ProcessGroup] = []  # groups of fewer than all ranks
_mesh: Any = None  # the DeviceMesh of this node's ranks, cached by `node_mesh`


def rank() -> int:
    """Return this process's rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Return the number of ranks on this node."""
    if not dist.is_initialized():
        return 1
    return whole_number(os.environ, "LOCAL_WORLD_SIZE", world_size(), 1, world_size())


def is_rank_zero() -> bool:
    """Return whether this is the rank that writes shared files and shows progress."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks. Raises SrcfastError if one does not arrive within the timeout."""
    gather(None)


def barrier_with_heartbeat() -> None:
    """Wait for all ranks without a limit as long as each missing rank calls `heartbeat`.

    Raises:
        SrcfastError: no missing rank has called it for the timeout; the missing ranks are named.
    """
    if world_size() == 1:
        return
    _arrive()
    last_counts, since = None, time.monotonic()
    while missing := _run_or_name_missing(_missing_ranks):
        counts = _run_or_name_missing(lambda: [_counter(f"alive/{other}") for other in missing])  # noqa: B023  (called at once)
        if counts != last_counts:
            last_counts, since = counts, time.monotonic()
        elif time.monotonic() - since > _timeout.total_seconds():
            raise _timeout_error("no sign of life")
        time.sleep(POLL)


def heartbeat() -> None:
    """Tell the ranks in `barrier_with_heartbeat` that this rank's work advances. Cheap: at most one message a second.

    Raises:
        SrcfastError: the host of the counters is gone.
    """
    global _last_heartbeat
    if _store is not None and time.monotonic() - _last_heartbeat > 1.0:
        _last_heartbeat = time.monotonic()
        _add(f"alive/{rank()}", 1)


def broadcast(value: Any) -> Any:
    """Return rank 0's JSON value on every rank. Raises SrcfastError if a rank is missing."""
    return gather(value if is_rank_zero() else None)[0]


def gather(value: Any) -> list[Any]:
    """Return every rank's JSON value, in the order of the ranks, on every rank.

    Raises:
        SrcfastError: a rank is missing; it is named.
    """
    if world_size() == 1:
        return [value]
    encoded = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)  # [n]
    lengths = gather_tensor(torch.tensor([len(encoded)])).flatten().tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(encoded)] = encoded
    per_rank = gather_tensor(padded)  # [ranks, max(lengths)]
    return [json.loads(bytes(row[:length].tolist())) for row, length in zip(per_rank, lengths, strict=True)]


def gather_tensor(local_tensor: Tensor) -> Tensor:
    """Return every rank's tensor of this shape and dtype, stacked: [ranks, ...], on its device.

    Raises:
        SrcfastError: a rank is missing; it is named.
    """
    if world_size() == 1:
        return local_tensor[None]
    if local_tensor.is_cuda:
        _connect_nccl()
    per_rank = [torch.empty_like(local_tensor) for _ in range(world_size())]
    _run_collective(lambda: dist.all_gather(per_rank, local_tensor))
    return torch.stack(per_rank)


def wait_for(event: torch.cuda.Event) -> None:
    """Wait for a CUDA event that may depend on other ranks, at most for the timeout.

    Raises:
        SrcfastError: the event is still pending; ranks that have begun fewer exchanges are named.
    """
    if world_size() == 1:
        event.synchronize()
        return
    since = time.monotonic()
    while not event.query():
        if time.monotonic() - since > _timeout.total_seconds():
            raise _timeout_error("the device is still busy")
        time.sleep(DEVICE_POLL)


def all_reduce_async(tensor: Tensor) -> Callable[[], None]:
    """Start to sum a tensor over the ranks, in place; the sum is complete after a call of the function returned.

    On a GPU that call does not block the host: it orders later work of the current stream after the sum.
    """
    if world_size() == 1:
        return lambda: None
    if tensor.is_cuda:
        _connect_nccl()
    work = _run_collective(lambda: dist.all_reduce(tensor, async_op=True))
    return lambda: _run_or_name_missing(work.wait)


def run_on_rank_zero(work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 while the others wait, and return its JSON value on every rank.

    Raises:
        SrcfastError: on the other ranks, when `work` raises anything on rank 0, so that no rank waits for a failed one.
    """
    if world_size() == 1:
        return work()
    if not is_rank_zero():
        message = broadcast(None)
        if "error" in message:
            raise SrcfastError(f"rank 0 has failed: {message['error']}")
        return message["value"]
    try:
        value = work()
    except (Exception, Interrupted) as error:
        broadcast({"error": f"{type(error).__name__}: {error}"})
        raise
    broadcast({"value": value})
    return value


def run_long_on_rank_zero(work: Callable[[], Result]) -> Result:
    """As `run_on_rank_zero`, for work that may take longer than ranks wait for each other, and that calls `heartbeat`."""
    outcome: Callable[[], Result] = work
    if is_rank_zero():
        try:
            value = work()
            outcome = lambda: value  # noqa: E731
        except (Exception, Interrupted) as error:
            outcome = partial(_raise, error)
    barrier_with_heartbeat()
    return run_on_rank_zero(outcome)


def _raise(error: BaseException) -> Any:
    raise error


def next_index(name: str) -> int:
    """Return 0, 1, 2, ... from a counter that all ranks share: each index goes to one rank alone.

    Raises:
        SrcfastError: the host of the counters is gone.
    """
    if _store is None:
        _local_counters[name] = _local_counters.get(name, -1) + 1
        return _local_counters[name]
    return _add(f"next/{name}", 1) - 1


def end_startup_timeout() -> None:
    """Replace START_TIMEOUT by the configured timeout; called once a first step or stage is done."""
    global _timeout_after_start
    if _timeout_after_start is not None:
        _set_timeout(_timeout_after_start)
        _timeout_after_start = None


def node_mesh(device_type: str) -> Any:
    """Return the DeviceMesh of this node's ranks. Its collectives have the same timeout as all others."""
    global _mesh
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    local_size = local_world_size()
    if _mesh is None:  # cached: each model that is loaded would create new groups
        if _has_nccl:
            _connect_nccl()
        if local_size == world_size():
            _mesh = DeviceMesh.from_group(_get_default_group(), device_type)
        else:
            shape = (world_size() // local_size, local_size)
            _mesh = init_device_mesh(device_type, shape, mesh_dim_names=("nodes", "ranks"))["ranks"]
            _subgroups.append(_mesh.get_group())
            _set_timeout(_timeout)
    return _mesh


@contextmanager
def process_group(timeout: timedelta = TIMEOUT, device: str = "cpu") -> Iterator[None]:
    """Join the process group of `torchrun` while the body runs; without torchrun, do nothing.

    The backend is gloo on CPUs. With GPUs it is gloo and NCCL, and each rank uses the device of its local rank.

    Args:
        timeout: of each exchange after `end_startup_timeout`; before it, START_TIMEOUT where that is longer.
        device: the settings' `model.device`.

    Raises:
        ConfigError: PyTorch can't use `device`, it names one GPU for several ranks, the node has fewer GPUs than ranks, or a
            variable of torchrun's is wrong.
        SrcfastError: a collective of PyTorch's in the body has failed; missing ranks are named.
    """
    global _store, _timeout_after_start, _num_exchanges, _has_nccl, _nccl_connected
    launch = read_launch(os.environ)
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        _check_gpu(device)
    if launch.world_size == 1:
        yield
        return
    if on_gpu:
        _take_gpu(device, launch.local_rank)
    start_timeout = max(timeout, START_TIMEOUT)
    store, this_rank, num_ranks = next(dist.rendezvous("env://", timeout=start_timeout))
    store.set_timeout(start_timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("srcfast/group", store),
        rank=this_rank,
        world_size=num_ranks,
        timeout=start_timeout,
    )
    _store, _timeout_after_start = store, timeout
    _num_exchanges = 0
    _has_nccl, _nccl_connected = on_gpu, False
    _set_timeout(start_timeout)
    # After an error the group is not destroyed: that might wait for the other ranks, which learn of the error from the
    # closed connection or from torchrun. After a signal a sharded model is released, for no rank needs it any more.
    try:
        yield
    except Interrupted:
        if _mesh is not None:
            _destroy_group()
        raise
    except RuntimeError as error:  # collectives of sharded layers are PyTorch's own, and its message names no rank
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            raise _timeout_error(_first_line(error)) from error
        raise
    _destroy_group()


def _destroy_group() -> None:
    global _store, _timeout_after_start, _mesh
    was_sharded = _mesh is not None
    if was_sharded:
        # Drop all references to the groups. Their threads would outlive them, and a thread that frees a tensor while Python
        # shuts down aborts the process.
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _mesh = None
        _subgroups.clear()
        _clear_sharding_prop_cache()
        gc.collect()
    _store = _timeout_after_start = None
    dist.destroy_process_group()
    if was_sharded:  # PyTorch 2.11 still refers to the group: its threads release their tensors meanwhile
        time.sleep(THREAD_EXIT)


def _check_gpu(device: str) -> None:
    """Raise ConfigError where PyTorch can't use a CUDA device."""
    number, count = torch.device(device).index or 0, torch.cuda.device_count()
    if number < count and torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        found, fix = f"PyTorch {torch.__version__}, which is built without CUDA", "install a build of PyTorch with CUDA"
    elif count == 0:
        found, fix = "no GPU that PyTorch sees", "see whether nvidia-smi lists one and CUDA_VISIBLE_DEVICES shows it"
    else:
        found, fix = f"{count} GPUs, numbered from 0", f"choose one from cuda:0 to cuda:{count - 1}"
    raise ConfigError(f"model.device: expected a GPU for {device}, found {found}. Fix: {fix}, or set model.device=cpu")


def _take_gpu(device: str, local_rank: int) -> None:
    """Make the GPU of the local rank the current one. Raises ConfigError, see `process_group`."""
    num_gpus = torch.cuda.device_count()
    if torch.device(device).index is not None:
        raise ConfigError(
            f"model.device: expected cuda under torchrun, where each rank uses the GPU of its local rank, found {device}. "
            "Fix: model.device=cuda, and CUDA_VISIBLE_DEVICES to choose"
        )
    if local_rank >= num_gpus:
        raise ConfigError(
            f"torchrun: expected at most as many ranks on a node as it has GPUs ({num_gpus}), found rank {local_rank}. "
            f"Fix: --nproc-per-node={num_gpus}"
        )
    torch.cuda.set_device(local_rank)


def _set_timeout(timeout: timedelta) -> None:
    """Set the timeout of all exchanges that begin from now on."""
    global _timeout
    _timeout = timeout
    for group in (_get_default_group(), *_subgroups):
        _set_pg_timeout(timeout, group)
        if _has_nccl:
            group._get_backend(torch.device("cuda"))._set_default_timeout(timeout + NCCL_LATER)


def _connect_nccl() -> None:
    """Wait for all ranks before NCCL's first exchange, which connects the devices and would wait for a missing rank forever."""
    global _nccl_connected
    if not _nccl_connected:
        barrier()
        _nccl_connected = True


def _run_collective(collective: Callable[[], Result]) -> Result:
    """Count a collective, then run it. The count tells the other ranks that this one has arrived."""
    _arrive()
    return _run_or_name_missing(collective)


def _arrive() -> None:
    global _num_exchanges
    _num_exchanges += 1
    _add(f"arrived/{rank()}", 1)


def _add(name: str, number: int) -> int:
    """Add to a counter that all ranks share and return its new value. Raises SrcfastError if the counters' host is gone."""
    assert _store is not None
    store = _store
    return _run_or_name_missing(lambda: store.add(f"srcfast/{name}", number))


def _counter(name: str) -> int:
    """Return a shared counter's value. Raises RuntimeError if the counters' host is gone."""
    assert _store is not None
    return _store.add(f"srcfast/{name}", 0)


def _missing_ranks() -> list[int]:
    """Return the ranks that have begun fewer exchanges than this one."""
    return [other for other in range(world_size()) if _counter(f"arrived/{other}") < _num_exchanges]


def _run_or_name_missing(operation: Callable[[], Result]) -> Result:
    """Run an operation that waits for other ranks; turn its RuntimeError into a SrcfastError that names the missing ones."""
    try:
        return operation()
    except RuntimeError as error:
        raise _timeout_error(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _timeout_error(reason: str) -> SrcfastError:
    """Return the error of a wait that has failed, with the ranks that it failed for."""
    ranks: list[int] = []
    with suppress(RuntimeError):  # the counters may be gone with their host
        ranks = _missing_ranks() or _stalled_rank()
    missing = f"rank {', '.join(map(str, ranks))}" if ranks else "another rank"
    return SrcfastError(
        f"rank {rank()} of {world_size()} timed out waiting for {missing}: expected all ranks to come to the same exchange. "
        "Fix: see the first error that another rank shows; where there is none, it hangs, or it is slower than "
        f"distributed.timeout_seconds allows ({reason})"
    )


def _stalled_rank() -> list[int]:
    """Return the one rank that hangs in an exchange which all ranks have begun: all others have given it up.

    Empty where several ranks have not given it up after SETTLE seconds: some of them may not have noticed the failure yet.
    """
    assert _store is not None
    _store.add(f"srcfast/gave up/{rank()}", 1)
    end = time.monotonic() + SETTLE
    while True:
        stalled = [
            other
            for other in range(world_size())
            if _counter(f"arrived/{other}") == _num_exchanges and not _counter(f"gave up/{other}")
        ]
        if not stalled or time.monotonic() > end:
            return stalled if len(stalled) == 1 else []
        time.sleep(POLL)
