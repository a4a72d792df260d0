"""Put the simulated device below `torch.cuda`.

What is replaced lies in `torch._C` and in the base classes of streams, events and graphs: `torch.cuda`'s own Python runs as
it is, so that its checks of arguments are tested, too.
"""

from __future__ import annotations

import importlib
import os
import types
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # before torch.cuda changes: it registers functions by identity

from simulated_cuda import record

CAPABILITY = (9, 0)
NAME = "NVIDIA H100 80GB HBM3 (simulated)"
TOTAL_BYTES = 80 << 30
MULTIPROCESSORS = 132
CUDA_TYPE = 1  # c10::DeviceType::CUDA


def install(native: types.ModuleType, devices: int) -> None:
    """Let `torch.cuda` see this many devices of the native module."""
    native.set_callback(record.note)
    native.set_devices(devices)
    for index in range(devices):
        native.set_total(index, TOTAL_BYTES)
    for name, value in _functions(native, devices).items():
        setattr(torch._C, name, value)
    _install_classes(native)
    _install_resize(native)
    cuda = torch.cuda
    cuda._initialized = True
    cuda._cached_device_count = None
    cuda._cudart = types.SimpleNamespace(cudaMemGetInfo=lambda index: _free_and_total(native, index))
    cuda._exchange_device = torch._C._cuda_exchangeDevice
    cuda._maybe_exchange_device = torch._C._cuda_maybeExchangeDevice
    cuda._get_device_properties = lambda index: _properties(native, index)
    cuda.default_generators = tuple(native.default_generator(index) for index in range(devices))
    cuda.memory._record_memory_history = _nothing
    cuda.memory._snapshot = lambda *args, **kwargs: {"segments": [], "device_traces": [[]], "allocator_settings": {}}
    torch.backends.cuda.is_built = lambda: True
    # A process that was forked has no context on a real device: it finds no memory.
    os.register_at_fork(after_in_child=lambda: [native.set_limit(index, 0) for index in range(devices)])


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _functions(native: types.ModuleType, devices: int) -> dict[str, Callable[..., Any]]:
    """What `torch._C` has in a build with CUDA."""

    def exchange_device(index: int) -> int:
        before = native.get_device()
        if index >= 0:
            native.set_device(index)
        return before

    def set_stream(stream_id: int, device_index: int, device_type: int) -> None:
        native.set_device(device_index)
        native.set_stream(device_index, stream_id)

    def set_sync_debug_mode(mode: int) -> None:
        record.sync_debug_mode = int(mode)

    def set_memory_fraction(fraction: float, index: int) -> None:
        native.set_limit(index, -1 if fraction >= 1.0 else int(fraction * native.memory(index)["total"]))

    def memory_fraction(index: int) -> float:
        figures = native.memory(index)
        return 1.0 if figures["limit"] < 0 else figures["limit"] / figures["total"]

    return {
        "_cuda_getDeviceCount": lambda: devices,
        "_cuda_getDevice": native.get_device,
        "_cuda_setDevice": native.set_device,
        "_cuda_exchangeDevice": exchange_device,
        "_cuda_maybeExchangeDevice": exchange_device,
        "_cuda_init": _nothing,
        "_cuda_isInBadFork": lambda: False,
        "_cuda_hasPrimaryContext": lambda index: True,
        "_cuda_synchronize": lambda: native.wait("synchronize", "device"),
        "_cuda_getCompiledVersion": lambda: 13000,
        "_cuda_getArchFlags": lambda: "sm_90",
        "_cuda_getCurrentStream": lambda index: (native.current_stream(index), index, CUDA_TYPE),
        "_cuda_getDefaultStream": lambda index: (0, index, CUDA_TYPE),
        "_cuda_getCurrentRawStream": native.current_stream,
        "_cuda_setStream": set_stream,
        "_cuda_set_sync_debug_mode": set_sync_debug_mode,
        "_cuda_get_sync_debug_mode": lambda: record.sync_debug_mode,
        "_cuda_memoryStats": lambda index: _memory_stats(native, index),
        "_cuda_hostMemoryStats": lambda: {},
        "_cuda_resetPeakMemoryStats": native.reset_peaks,
        "_cuda_resetAccumulatedMemoryStats": _nothing,
        "_cuda_emptyCache": native.empty_cache,
        "_host_emptyCache": _nothing,
        "_cuda_ipc_collect": _nothing,
        "_cuda_setMemoryFraction": set_memory_fraction,
        "_cuda_getMemoryFraction": memory_fraction,
        "_cuda_memorySnapshot": lambda *args: {"segments": [], "device_traces": [[]], "allocator_settings": {}},
        "_cuda_record_memory_history": _nothing,
        "_cuda_isCurrentStreamCapturing": native.is_capturing,
        "_graph_pool_handle": native.new_pool,
        "_cuda_getAllocatorBackend": lambda: "native",
    }


def _free_and_total(native: types.ModuleType, index: int) -> tuple[int, int]:
    figures = native.memory(index)
    return figures["total"] - figures["reserved"], figures["total"]


def _memory_stats(native: types.ModuleType, index: int) -> dict[str, Any]:
    figures = native.memory(index)

    def stat(now: int, peak: int) -> dict[str, dict[str, int]]:
        return {"all": {"current": now, "peak": peak, "allocated": peak, "freed": peak - now}}

    allocated = stat(figures["allocated"], figures["allocated_peak"])
    reserved = stat(figures["reserved"], figures["reserved_peak"])
    return {
        "allocated_bytes": allocated,
        "active_bytes": allocated,
        "requested_bytes": allocated,
        "reserved_bytes": reserved,
        "num_alloc_retries": figures["retries"],
        "num_ooms": figures["out_of_memory"],
        "num_device_alloc": figures["allocations"],
    }


def _properties(native: types.ModuleType, index: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        name=NAME,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        total_memory=native.memory(index)["total"],
        multi_processor_count=MULTIPROCESSORS,
        warp_size=32,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        L2_cache_size=50 << 20,
        is_integrated=False,
        is_multi_gpu_board=False,
        gcnArchName="",
    )


def _install_resize(native: types.ModuleType) -> None:
    """Let storages on a device change their size, as FSDP's do; a CPU build knows it for the host alone."""
    resize = torch.UntypedStorage.resize_

    def resize_(self: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        if self.device.type != "cuda":
            return resize(self, size)
        native.resize_storage(self, size)
        return self

    torch.UntypedStorage.resize_ = resize_


def _install_classes(native: types.ModuleType) -> None:
    """The bases of `torch.cuda.Stream`, `Event` and `CUDAGraph`; the modules that derive from them are read again."""

    class StreamBase(torch.Stream):
        def __new__(cls, priority=0, stream_id=None, device_index=None, device_type=CUDA_TYPE, stream_ptr=0):
            if stream_id is None:
                stream_id, device_index = native.new_stream(), native.get_device()
            made = torch.Stream.__new__(cls, stream_id=stream_id, device_index=device_index, device_type=CUDA_TYPE)
            made.priority = priority
            return made

        @property
        def cuda_stream(self) -> int:
            return self.stream_id

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            native.synchronize_stream(self.device_index, self.stream_id)

    class EventBase:
        def __new__(cls, enable_timing=False, blocking=False, interprocess=False, external=False):
            made = object.__new__(cls)
            made.native, made.device, made.cuda_event = native.Event(), None, 0
            return made

        def record(self, stream: Any) -> None:
            self.native.record(stream.device_index, stream.stream_id)
            self.device = stream.device

        def wait(self, stream: Any) -> None:
            self.native.block(stream.device_index, stream.stream_id)

        def query(self) -> bool:
            return self.native.query()

        def synchronize(self) -> None:
            self.native.synchronize()

        def elapsed_time(self, other: Any) -> float:
            return 1.0  # milliseconds: nothing is timed here

    class GraphBase:
        def __new__(cls, keep_graph=False):
            made = object.__new__(cls)
            made.native = native.Graph()
            return made

        def capture_begin(self, pool=None, capture_error_mode="global") -> None:
            record.note("capture", "")
            self.native.begin((0, 0) if pool is None else tuple(pool))

        def capture_end(self) -> None:
            self.native.end()

        def instantiate(self) -> None: ...

        def replay(self) -> None:
            record.note("replay", "")
            self.native.replay()

        def reset(self) -> None:
            self.native.reset()

        def pool(self) -> tuple[int, int]:
            return self.native.pool()

    torch._C._CudaStreamBase, torch._C._CudaEventBase, torch._C._CUDAGraph = StreamBase, EventBase, GraphBase
    for name in ("streams", "graphs"):
        module = importlib.reload(importlib.import_module(f"torch.cuda.{name}"))
        for attribute in (
            "Stream",
            "Event",
            "ExternalStream",
            "CUDAGraph",
            "graph",
            "graph_pool_handle",
            "is_current_stream_capturing",
        ):
            if hasattr(module, attribute):
                setattr(torch.cuda, attribute, getattr(module, attribute))
