"""A decoding step replayed as a CUDA graph: a GPU gets its hundreds of small launches in one.

A graph has fixed shapes and addresses. So the rows of a step are padded to a bucket's number by a row that nobody reads, lengths
of continuations are rounded up to a bucket's, and a step's input is copied to the address that its graph reads. The step function
is the one that runs without graphs. A bucket's first step runs without capture, which warms up its kernels; its second is
captured; all later ones are replayed.

All graphs allocate from one pool. The largest is captured first: the others fit into the memory that it has freed, so that
the pool has one step's memory, not one for each graph. A replay therefore overwrites what other graphs computed, and its
results are copied before anything else runs.

Buckets are few, since each costs a step, a capture and a graph. Numbers of rows are the maximum, and quarters of it down to 8
(halves above 128): up to some 150 to 300 rows a GPU reads weights for longer than it multiplies by them, so that a quarter
of the rows takes nearly the time of all; attention reads the positions of all rows in any case. Lengths are four, evenly
spaced: attention's time is proportional to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srcfast.generation.kv_store import LANES, Layout, rounded
from srcfast.generation.step import Drawn, step_numbers
from srcfast_kernels.transfers import to_device

MIN_ROWS = 8
MANY_ROWS = 128  # above, a product's time grows with its rows
POSITION_BUCKETS = 4

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Drawn]], tuple[Drawn, Replay]]  # work -> the tensors of its results, its replay
# (numbers of `step_numbers`, rows, used slots, longest continuation) -> tokens [R], log-probabilities [R]
Step = Callable[[Tensor, int, int, int], Drawn]


@dataclass
class _Graph:
    numbers: Tensor  # its step's input
    outputs: Drawn
    replay: Replay


def row_buckets(max_rows: int) -> list[int]:
    """List the numbers of rows that graphs are captured for, the largest first."""
    buckets = [rounded(max_rows, MIN_ROWS)]
    while buckets[-1] > MIN_ROWS:
        divisor = 2 if buckets[-1] > MANY_ROWS else 4
        buckets.append(rounded(-(-buckets[-1] // divisor), MIN_ROWS))
    return buckets


def position_buckets(capacity: int) -> list[int]:
    """List the lengths of continuations that graphs are captured for, the largest first."""
    step = rounded(-(-capacity // POSITION_BUCKETS), LANES)
    return [capacity, *range((capacity - 1) // step * step, 0, -step)]


class StepGraphs:
    """Steps over one cache, as captured graphs.

    Args:
        step: the step; it may not read its tensors' values on the host.
        layout: of the cache, with a spare row.
        device: of the step's tensors.
        capture: records a function's work as a graph without running it; see `captured_in`.
    """

    def __init__(self, step: Step, layout: Layout, device: torch.device, capture: Capture) -> None:
        self.step, self.layout, self.device, self.capture = step, layout, device, capture
        self.rows, self.positions = row_buckets(layout.slots * layout.width), position_buckets(layout.row_capacity)
        self._graphs: dict[tuple[int, int], _Graph | None] = {}  # None: run once
        self.spare = layout.slots * layout.width
        # Warm up and capture the largest graph, on the spare row alone.
        nothing = np.zeros(0, dtype=np.int64)
        for _ in range(2):
            self(nothing, nothing, np.zeros(0), np.zeros(layout.rows, dtype=np.int64), layout.row_capacity)

    def __call__(
        self, rows: np.ndarray, positions: np.ndarray, uniform: np.ndarray, lengths: np.ndarray, longest: int
    ) -> Drawn:
        """Run the step of these rows; arguments as those of `step_numbers`.

        `longest` is at least the number of positions of the longest continuation, the next one included.
        """
        count, capacity = self._bucket(len(rows), longest)
        numbers = step_numbers(rows, positions, uniform, lengths, count, self.spare)
        if (count, capacity) not in self._graphs:
            self._graphs[count, capacity] = None
            tokens, logprobs = self.step(to_device(numbers, self.device), count, self.layout.slots, capacity)
            return tokens[: len(rows)], logprobs[: len(rows)]
        graph = self._graphs[count, capacity]
        if graph is None:
            inputs = to_device(numbers, self.device)  # outside of the pool, in which replays write
            outputs, replay = self.capture(partial(self.step, inputs, count, self.layout.slots, capacity))
            graph = self._graphs[count, capacity] = _Graph(inputs, outputs, replay)
        else:
            host = torch.from_numpy(numbers)
            graph.numbers.copy_(host.pin_memory() if self.device.type == "cuda" else host, non_blocking=True)
        graph.replay()
        tokens, logprobs = graph.outputs  # the next replay, of whichever graph, writes over them
        return tokens[: len(rows)].clone(), logprobs[: len(rows)].clone()

    def _bucket(self, rows: int, longest: int) -> tuple[int, int]:
        """Return the smallest bucket for so many rows and positions; without rows, the largest one."""
        if not rows:
            return self.rows[0], self.positions[0]
        return min(n for n in self.rows if n >= rows), min(n for n in self.positions if n >= longest)


def captured_in(pool: Any) -> Capture:
    """Return a function that captures into a pool of `torch.cuda.graph_pool_handle()`."""

    def capture(work: Callable[[], Drawn]) -> tuple[Drawn, Replay]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            outputs = work()
        return outputs, graph.replay

    return capture
