"""Where a device's time goes, by torch.profiler: its busy share of the wall clock, and the kernels that took most."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from srcfast.training.profiler import summarise

GIB = 2**30


def memory() -> dict[str, float]:
    """What tensors hold now, and what the allocator has reserved of the device, in GiB."""
    torch.cuda.synchronize()
    return {"allocated_gib": torch.cuda.memory_allocated() / GIB, "reserved_gib": torch.cuda.memory_reserved() / GIB}


def peaks() -> dict[str, float]:
    """The highest values of both since `torch.cuda.reset_peak_memory_stats`, in GiB."""
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"peak_allocated_gib": allocated / GIB, "peak_reserved_gib": reserved / GIB}


def profiled(call: Callable[[], Any]) -> dict[str, Any]:
    """Run a call once under the profiler.

    Returns:
        seconds; busy: the share of them in which the device worked; kernels that took most. Where `device` is false the
        profiler has seen no kernel, and all is about operators on the host.
    """
    profile = _begin()
    call()
    return _end(profile)


class LastStep:
    """For `train(profiler=...)`: profiles the last step alone, without the allocator's history that `StepProfiler` keeps."""

    def __init__(self) -> None:
        self.summary: dict[str, Any] | None = None
        self._profile: torch.profiler.profile | None = None

    def begin(self, step: int, total: int) -> None:
        if step == total - 1:
            self._profile = _begin()

    def end(self) -> None:
        if self._profile is not None:
            self.summary, self._profile = _end(self._profile), None


def _begin() -> torch.profiler.profile:
    torch.cuda.synchronize()  # what is queued is not the call's
    kinds = torch.profiler.ProfilerActivity
    device = {kinds.CUDA} & torch.profiler.supported_activities()  # a CPU build of PyTorch sees operators alone
    profile = torch.profiler.profile(activities=[kinds.CPU, *device])
    profile.start()
    return profile


def _end(profile: torch.profiler.profile) -> dict[str, Any]:
    torch.cuda.synchronize()
    profile.stop()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    summary = summarise(events, 1)
    kernels = [{"name": name[:120], "ms": 1000 * spent, "calls": calls} for name, spent, calls in summary.operations]
    shares, device = summary.shares, any(event.get("cat") == "kernel" for event in events)
    return {
        "seconds": summary.seconds,
        "device": device,
        "busy": 1.0 - shares["host"],
        "shares": shares,
        "kernels": kernels,
    }
