"""Progress with throughput and remaining time, and peak memory."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from srcfast.data.jsonl import replacing
from srcfast.errors import InputError, printable

LINE_INTERVAL = 10.0  # seconds between two lines on a stderr that is no terminal
FILE_INTERVAL = 1.0  # seconds between two writes of the progress file
PROGRESS_FILE = "progress.json"


class StageProgress:
    """Count and show a stage's units and tokens. The counters remain readable after `close`.

    Args:
        name, total, unit, quiet, file: see `track`.
    """

    def __init__(
        self, name: str, total: int, unit: str = "samples", quiet: bool = False, file: Path | None = None
    ) -> None:
        self.name, self.total, self.unit = printable(name), total, unit
        self._file, self._last_write = file, 0.0
        self.done = 0
        self.tokens = 0
        self.on_advance: Callable[[], None] | None = None  # called at each advance
        self._began = time.perf_counter()
        self._ended: float | None = None
        self._last_line = self._began
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._lines = not quiet and not sys.stderr.isatty()
        if not quiet and sys.stderr.isatty():
            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn())
            self._bar = Progress(
                *columns, TextColumn("{task.fields[state]}", markup=False), console=Console(stderr=True)
            )
            self._task = self._bar.add_task(self.name, total=max(1, total), state="")
            self._bar.start()
        self._write()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the stage began, up to `close`."""
        return (self._ended or time.perf_counter()) - self._began

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second since the stage began."""
        return self.tokens / max(self.seconds, 1e-9)

    def set_total(self, total: int) -> None:
        """Replace the number of units to do, where it is known only after the stage began."""
        self.total = total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=max(1, total))

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        """Count `n` more units as done, and the tokens that they took."""
        self.done += n
        self.tokens += tokens
        if self.on_advance is not None:
            self.on_advance()
        if time.perf_counter() - self._last_write >= FILE_INTERVAL:
            self._write()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, state=self._state())
        elif self._lines and time.perf_counter() - self._last_line >= LINE_INTERVAL:
            self._last_line = time.perf_counter()
            print(self.line(), file=sys.stderr, flush=True)

    def resume(self, n: int, tokens: int, seconds: float) -> None:
        """Count units, tokens and seconds of an earlier process, so that throughput is that of the whole stage."""
        self._began -= seconds
        self.advance(n, tokens)

    def line(self) -> str:
        """Return the state as text: `candidates 320/1000 samples, 45.0 samples/s, 8,200 tokens/s, 0:00:15 left`."""
        return f"{self.name} {self._state()}"

    def _write(self) -> None:
        """Write the counters to the progress file, if there is one."""
        if self._file is None:
            return
        self._last_write = time.perf_counter()
        values = {
            "stage": self.name,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "written": time.time(),
        }
        # For display alone: a full disk ends the run where a result is lost, not here.
        with suppress(OSError, InputError), replacing(self._file, durable=False) as file:
            file.write(json.dumps(values).encode() + b"\n")

    def _state(self) -> str:
        rate = self.done / max(self.seconds, 1e-9)
        words = [f"{self.done}/{self.total} {self.unit}", f"{rate:,.1f} {self.unit}/s"]
        if self.tokens:
            words.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self._ended is not None:
            words.append(f"took {timedelta(seconds=round(self.seconds))}")
        elif self.done:
            remaining = (self.total - self.done) / rate
            words.append(f"{timedelta(seconds=max(0, round(remaining)))} left")
        return ", ".join(words)

    def close(self) -> None:
        """Stop the clock and show the final state. A second call does nothing."""
        if self._ended is not None:
            return
        self._ended = time.perf_counter()
        self._write()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, state=self._state())
            self._bar.stop()
        elif self._lines:
            print(self.line(), file=sys.stderr, flush=True)


def track(
    name: str, total: int, unit: str = "samples", quiet: bool = False, file: Path | None = None
) -> closing[StageProgress]:
    """Show a stage's progress: a bar on a terminal, else a line on stderr every ten seconds and at the end.

    Args:
        name: of the stage.
        total: units to do.
        unit: what is counted.
        quiet: show nothing, and only count.
        file: of the counters for other processes, written at the beginning, at most once a second, and at the end.
    """
    return closing(StageProgress(name, total, unit, quiet, file))


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
