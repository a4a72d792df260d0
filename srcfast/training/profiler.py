"""Profile time and memory of chosen training steps.

The profile is a directory with `trace.json`, which chrome://tracing and Perfetto open; `memory.json`, on a GPU the allocator's
snapshot with its history, on a CPU every allocation that the profiler recorded; `summary.json`, the table that is printed.

Time is split by kind of work. On a GPU it is the time of its kernels, classified by name, and "host" is the time without any. On
a CPU it is each operator's time without the operators it calls, and "host" is the time outside of operators: mostly Python.
"""

from __future__ import annotations

import errno
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from srcfast.data.jsonl import naming, write_json, write_text
from srcfast.errors import ConfigError

SHOWN = 12  # operations in the table
HISTORY = 200_000  # allocations that a GPU's allocator remembers
SHARES = ("gemm", "attention", "srcfast", "other", "host")
_GPU_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of a trace's events
_ATTENTION = re.compile(r"flash|fmha|attention|scaled_dot_product|aten::bmm|softmax|BmmBackward", re.IGNORECASE)
_GEMM = re.compile(
    r"gemm|gemv|nvjet|cutlass|xmma|splitk|^mkldnn::_linear|aten::(mm|addmm|addmm_|linear|matmul|addmv|mv|_scaled_mm)$",
    re.IGNORECASE,
)
# srcfast's Triton kernels on a GPU; on a CPU its autograd functions.
_SRCFAST = re.compile(r"^(?:[a-z0-9_]+_kernel(?:_\w+)?|_[A-Z]\w*|srcfast::\w+)$")


@dataclass(frozen=True)
class ProfileSummary:
    """Shares of the profiled steps' time by kind of work, and the slowest operations: (name, seconds, calls)."""

    steps: int
    seconds: float
    shares: dict[str, float]
    operations: list[tuple[str, float, int]]

    def text(self) -> str:
        """Format the summary for a terminal."""
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.shares.items())
        lines = [f"{self.steps} steps in {self.seconds:.3f} s: {shares}"]
        lines += [f"  {1000 * spent:9.2f} ms  {calls:6d} x  {name[:90]}" for name, spent, calls in self.operations]
        return "\n".join(lines)


def parse_steps(text: str) -> range:
    """Parse a range of steps: `3:6` is steps 3, 4 and 5, counted from 0. Raises ConfigError if it is empty or malformed."""
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(f"--profile: expected the first step and the one after the last, such as 3:6, found {text!r}")
    return range(int(match[1]), int(match[2]))


class StepProfiler:
    """Profile the steps of a range. The loop calls `begin` before each step, and `end` after the last one.

    Args:
        steps: to profile. If the run ends before them, its last steps are profiled instead.
        folder: directory of the profile.
    """

    def __init__(self, steps: range, folder: Path) -> None:
        self.steps, self.folder = steps, folder
        self.summary: ProfileSummary | None = None
        self._profile: torch.profiler.profile | None = None
        self._done = 0

    def begin(self, step: int, total: int) -> None:
        """Start or stop the profiler where the range begins or ends; called before step `step` of `total`."""
        back = max(0, min(self.steps.stop - total, self.steps.start))
        if self._profile is not None:
            self._done += 1
        if step == self.steps.stop - back:
            self._stop()
        elif step == self.steps.start - back and self.summary is None:
            self._start()

    def end(self) -> None:
        """Stop the profiler; called after the last step, or after an error."""
        if self._profile is not None:
            self._done += 1
            self._stop()

    def show(self) -> None:
        """Print the summary and the path of the profile."""
        if self.summary is not None:
            print(f"profile: {self.folder}\n{self.summary.text()}")

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize()  # queued work belongs to the step before
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
        with naming(file := self.folder / "trace.json"):
            profile.export_chrome_trace(str(file))
            try:
                events = json.loads(file.read_bytes())["traceEvents"]
            except (FileNotFoundError, ValueError) as error:  # all that is heard of a disk that is full
                raise OSError(errno.EIO, "could not be written whole", str(file)) from error
        if torch.cuda.is_available():
            memory: Any = torch.cuda.memory._snapshot()
            torch.cuda.memory._record_memory_history(enabled=None)
        else:
            memory = {"allocations": allocations(events)}
        write_text(self.folder / "memory.json", json.dumps(memory, default=str))
        self.summary = summarise(events, self._done)
        write_json(self.folder / "summary.json", asdict(self.summary))


def allocations(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Extract each allocation (bytes above 0) and release (below 0) from a trace's events, in order of time."""
    memory_events = [event for event in events if event.get("name") == "[memory]"]
    return [
        {
            "microseconds": event["ts"],
            "bytes": event["args"].get("Bytes"),
            "address": event["args"].get("Addr"),
            "total_bytes": event["args"].get("Total Allocated"),
        }
        for event in sorted(memory_events, key=lambda event: float(event["ts"]))
    ]


def summarise(events: Sequence[Mapping[str, Any]], steps: int) -> ProfileSummary:
    """Compute shares of time and the slowest operations from a chrome trace's events."""
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    gpu = [event for event in spans if event.get("cat") in _GPU_WORK]
    ops = [event for event in spans if event.get("cat") == "cpu_op"]
    work = [event for event in spans if event.get("cat") in _GPU_WORK | {"cpu_op", "cuda_runtime", "cuda_driver"}]
    begin = min((float(event["ts"]) for event in work), default=0.0)
    end = max((float(event["ts"]) + float(event["dur"]) for event in work), default=0.0)
    spent: dict[str, float] = defaultdict(float)  # by operation, microseconds
    calls: dict[str, int] = defaultdict(int)
    kinds = dict.fromkeys(SHARES, 0.0)
    gpu_times = [(event["name"], _kind(event["name"]), float(event["dur"])) for event in gpu]
    for name, kind, microseconds in gpu_times or _self_times(ops):
        spent[name] += microseconds
        calls[name] += 1
        kinds[kind] += microseconds
    busy = _covered(gpu or ops)
    scale = busy / max(sum(kinds.values()), 1e-9)  # below 1 where several streams, or threads, ran at a time
    shares = {kind: scale * microseconds / max(end - begin, 1e-9) for kind, microseconds in kinds.items()}
    shares["host"] = 1.0 - busy / max(end - begin, 1e-9)
    top = sorted(spent, key=lambda name: -spent[name])[:SHOWN]
    return ProfileSummary(
        steps, 1e-6 * (end - begin), shares, [(name, 1e-6 * spent[name], calls[name]) for name in top]
    )


def _self_times(events: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, str, float]]:
    """Yield (name, kind, microseconds without the operators it calls) of each operator.

    An operator of kind "other" within one of another kind counts as that: the elementwise work of attention is attention.
    """
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    for operators in threads.values():
        stack: list[list[Any]] = []  # of the operators that are running: end, name, kind, microseconds
        for event in sorted(operators, key=lambda event: (float(event["ts"]), -float(event["dur"]))):
            start, duration = float(event["ts"]), float(event["dur"])
            while stack and stack[-1][0] <= start:
                yield tuple(stack.pop()[1:])  # type: ignore[misc]
            kind = _kind(event["name"])
            if stack:
                stack[-1][3] -= duration
                if kind == "other":
                    kind = stack[-1][2]
            stack.append([start + duration, event["name"], kind, duration])
        while stack:
            yield tuple(stack.pop()[1:])  # type: ignore[misc]


def _kind(name: str) -> str:
    if _ATTENTION.search(name):
        return "attention"
    if _SRCFAST.match(name):
        return "srcfast"
    return "gemm" if _GEMM.search(name) else "other"


def _covered(events: Iterable[Mapping[str, Any]]) -> float:
    """Return the microseconds in which at least one of the events ran."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: float(event["ts"])):
        start, end = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
