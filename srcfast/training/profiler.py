"""A profile of chosen training steps: where time and memory went.

Written into a folder: `trace.json`, which chrome://tracing and Perfetto open; `memory.json`, on a GPU the allocator's
snapshot with its history, on a CPU every allocation as the profiler saw it; `summary.json`, the table that is printed.

Time is divided by what ran. On a GPU that is its kernels by name, and as host the time in which it ran none. On a CPU it is
each operator's own time, without the operators it calls, and as host the time outside of operators: Python, mostly.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from srcfast.errors import ConfigError

SHOWN = 12  # operations in the table
HISTORY = 200_000  # allocations that a GPU's allocator remembers
SHARES = ("gemm", "attention", "srcfast", "other", "host")
_GPU_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of the trace
_ATTENTION = re.compile(r"flash|fmha|attention|scaled_dot_product|aten::bmm|softmax|BmmBackward", re.IGNORECASE)
_GEMM = re.compile(
    r"gemm|gemv|nvjet|cutlass|xmma|splitk|^mkldnn::_linear|aten::(mm|addmm|addmm_|linear|matmul|addmv|mv|_scaled_mm)$",
    re.IGNORECASE,
)
# The house's Triton kernels on a GPU; on a CPU its autograd functions, which PyTorch names without underscore.
_SRCFAST = re.compile(r"^(?:[a-z0-9_]+_kernel(?:_\w+)?|_[A-Z]\w*|srcfast::\w+)$")


@dataclass(frozen=True)
class ProfileSummary:
    """Seconds of the profiled steps by kind of work, and the operations that took most: (name, seconds, calls)."""

    steps: int
    seconds: float
    shares: dict[str, float]
    operations: list[tuple[str, float, int]]

    def text(self) -> str:
        """For a terminal."""
        share = ", ".join(f"{name} {100 * part:.1f} %" for name, part in self.shares.items())
        lines = [f"{self.steps} steps in {self.seconds:.3f} s: {share}"]
        lines += [f"  {1000 * spent:9.2f} ms  {calls:6d} x  {name[:90]}" for name, spent, calls in self.operations]
        return "\n".join(lines)


def parse_steps(text: str) -> range:
    """`3:6` is steps 3, 4 and 5, counted from 0. Raises ConfigError where it names none."""
    found = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if found is None or int(found[1]) >= int(found[2]):
        raise ConfigError(f"--profile: expected the first step and the one after the last, such as 3:6, found {text!r}")
    return range(int(found[1]), int(found[2]))


class StepProfiler:
    """Profiles the steps of a range; `begin` is called before each step, `end` after the last one.

    Args:
        steps: to profile. Those of a run that ends before are moved back to its last ones.
        folder: for the files.
    """

    def __init__(self, steps: range, folder: Path) -> None:
        self.steps, self.folder = steps, folder
        self.summary: ProfileSummary | None = None
        self._profile: torch.profiler.profile | None = None
        self._done = 0

    def begin(self, step: int, total: int) -> None:
        """Step `step` of `total` is about to begin."""
        back = max(0, min(self.steps.stop - total, self.steps.start))
        if self._profile is not None:
            self._done += 1
        if step == self.steps.stop - back:
            self._stop()
        elif step == self.steps.start - back and self.summary is None:
            self._start()

    def end(self) -> None:
        """The last step is done, or the run has failed."""
        if self._profile is not None:
            self._done += 1
            self._stop()

    def show(self) -> None:
        """Print where time went, and where the files are."""
        if self.summary is not None:
            print(f"profile: {self.folder}\n{self.summary.text()}")

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize()  # what is queued belongs to the step before
            torch.cuda.memory._record_memory_history(max_entries=HISTORY)
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profile.start()

    def _stop(self) -> None:
        profile, self._profile = self._profile, None
        if profile is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(self.folder / "trace.json"))
        events = json.loads((self.folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
        if torch.cuda.is_available():
            memory: Any = torch.cuda.memory._snapshot()
            torch.cuda.memory._record_memory_history(enabled=None)
        else:
            memory = {"allocations": allocations(events)}
        (self.folder / "memory.json").write_text(json.dumps(memory, default=str), encoding="utf-8")
        self.summary = summarise(events, self._done)
        (self.folder / "summary.json").write_text(json.dumps(asdict(self.summary), indent=2), encoding="utf-8")


def allocations(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of a trace's events each allocation (bytes above 0) and release: when, how much, and the total that it left."""
    found = [event for event in events if event.get("name") == "[memory]"]
    return [
        {
            "microseconds": event["ts"],
            "bytes": event["args"].get("Bytes"),
            "address": event["args"].get("Addr"),
            "total_bytes": event["args"].get("Total Allocated"),
        }
        for event in sorted(found, key=lambda event: float(event["ts"]))
    ]


def summarise(events: Sequence[Mapping[str, Any]], steps: int) -> ProfileSummary:
    """Shares of time and top operations of a chrome trace's events."""
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    gpu = [event for event in spans if event.get("cat") in _GPU_WORK]
    ops = [event for event in spans if event.get("cat") == "cpu_op"]
    whole = [event for event in spans if event.get("cat") in _GPU_WORK | {"cpu_op", "cuda_runtime", "cuda_driver"}]
    begin = min((float(event["ts"]) for event in whole), default=0.0)
    end = max((float(event["ts"]) + float(event["dur"]) for event in whole), default=0.0)
    spent: dict[str, float] = defaultdict(float)  # by operation, microseconds
    calls: dict[str, int] = defaultdict(int)
    kinds = dict.fromkeys(SHARES, 0.0)
    for name, kind, own in _gpu_times(gpu) if gpu else _own_times(ops):
        spent[name] += own
        calls[name] += 1
        kinds[kind] += own
    busy = _covered(gpu or ops)
    scale = busy / max(sum(kinds.values()), 1e-9)  # several streams, or threads, at a time
    shares = {kind: scale * own / max(end - begin, 1e-9) for kind, own in kinds.items()}
    shares["host"] = 1.0 - busy / max(end - begin, 1e-9)
    top = sorted(spent, key=lambda name: -spent[name])[:SHOWN]
    return ProfileSummary(
        steps, 1e-6 * (end - begin), shares, [(name, 1e-6 * spent[name], calls[name]) for name in top]
    )


def _gpu_times(events: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, str, float]]:
    for event in events:
        yield event["name"], _kind(event["name"]), float(event["dur"])


def _own_times(events: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, str, float]]:
    """(name, kind, own microseconds) of nested operators; what is no product takes the kind of the function that it is in."""
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    for own in threads.values():
        open_ones: list[list[Any]] = []  # end, name, kind, own microseconds
        for event in sorted(own, key=lambda event: (float(event["ts"]), -float(event["dur"]))):
            start, duration = float(event["ts"]), float(event["dur"])
            while open_ones and open_ones[-1][0] <= start:
                yield tuple(open_ones.pop()[1:])  # type: ignore[misc]
            kind = _kind(event["name"])
            if open_ones:
                open_ones[-1][3] -= duration
                if kind == "other":
                    kind = open_ones[-1][2]
            open_ones.append([start + duration, event["name"], kind, duration])
        while open_ones:
            yield tuple(open_ones.pop()[1:])  # type: ignore[misc]


def _kind(name: str) -> str:
    if _ATTENTION.search(name):
        return "attention"
    if _SRCFAST.match(name):
        return "srcfast"
    return "gemm" if _GEMM.search(name) else "other"


def _covered(events: Iterable[Mapping[str, Any]]) -> float:
    """Microseconds in which at least one of them ran."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: float(event["ts"])):
        start, end = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
