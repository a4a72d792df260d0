"""What a run tells while it goes: progress with throughput and time left, metrics, peak memory."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from srcfast.data.jsonl import naming
from srcfast.errors import printable

if TYPE_CHECKING:
    pass

LINE_INTERVAL = 10.0  # seconds between two lines where stderr is no terminal


class StageProgress:
    """How far a stage is. `seconds` and `tokens` remain readable after it ended."""

    def __init__(self, name: str, total: int, unit: str = "samples", quiet: bool = False) -> None:
        self.name, self.total, self.unit = printable(name), total, unit
        self.done = 0
        self.tokens = 0
        self.on_advance: Callable[[], None] | None = None  # told whenever the stage advances
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

    @property
    def seconds(self) -> float:
        """Wall-clock seconds so far, or of the whole once it ended."""
        return (self._ended or time.perf_counter()) - self._began

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    def set_total(self, total: int) -> None:
        """There are so many units to do, as has been found since it began."""
        self.total = total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=max(1, total))

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        """`n` more units are done, in which `tokens` tokens were run."""
        self.done += n
        self.tokens += tokens
        if self.on_advance is not None:
            self.on_advance()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, state=self._state())
        elif self._lines and time.perf_counter() - self._last_line >= LINE_INTERVAL:
            self._last_line = time.perf_counter()
            print(self.line(), file=sys.stderr, flush=True)

    def resume(self, n: int, tokens: int, seconds: float) -> None:
        """`n` units with so many tokens were done in so many seconds before this process began."""
        self._began -= seconds
        self.advance(n, tokens)

    def line(self) -> str:
        """`candidates 320/1000 samples, 45.0 samples/s, 8,200 tokens/s, 0:00:15 left`."""
        return f"{self.name} {self._state()}"

    def _state(self) -> str:
        rate = self.done / max(self.seconds, 1e-9)
        parts = [f"{self.done}/{self.total} {self.unit}", f"{rate:,.1f} {self.unit}/s"]
        if self.tokens:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self._ended is not None:
            parts.append(f"took {timedelta(seconds=round(self.seconds))}")
        elif self.done:
            left = (self.total - self.done) / rate
            parts.append(f"{timedelta(seconds=max(0, round(left)))} left")
        return ", ".join(parts)

    def close(self) -> None:
        """End the clock and say how it went."""
        if self._ended is not None:
            return
        self._ended = time.perf_counter()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, state=self._state())
            self._bar.stop()
        elif self._lines:
            print(self.line(), file=sys.stderr, flush=True)


@contextmanager
def track(name: str, total: int, unit: str = "samples", quiet: bool = False) -> Iterator[StageProgress]:
    """Show a stage's progress: a bar on a terminal, else a line on stderr every ten seconds and at the end.

    Args:
        name: of the stage.
        total: units to do.
        unit: what is counted.
        quiet: show nothing; the counters work all the same.
    """
    progress = StageProgress(name, total, unit, quiet)
    try:
        yield progress
    finally:
        progress.close()


class MetricsWriter:
    """Appends one JSON object a line to a file, flushed at once; also a context manager."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115  (closed by close)

    def write(self, row: dict[str, Any]) -> None:
        with naming(self.path):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        with naming(self.path):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def peak_rss_bytes() -> int:
    """Most resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
