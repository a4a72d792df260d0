"""A decoding step replayed as a CUDA graph: a GPU gets its hundreds of small launches in one.

A graph holds shapes and addresses. So rows are filled up to a bucket's number with a row that nobody reads, positions of
continuations are rounded up to a bucket's, and what a step is given is copied to where its graph looks for it. The step function
is the one that runs without graphs. A bucket's first step runs as it is, which warms up all that its kernels need; its second is
captured; from then on it is replayed.

All graphs allocate from one pool. The largest is captured first: what the others need fits into what it has left free, so that
the pool holds one step's memory, not one for each graph. A replay therefore overwrites what other graphs computed, and their
results are copied before anything else runs.

Buckets are few, since each costs a step, a capture and a graph. Of rows there are the most, and quarters of it down to 8 (halves
while it is above 128): up to some 150 to 300 rows a GPU reads weights for longer than it multiplies by them, so that a quarter
of the rows takes nearly the time of all; attention reads all places' positions anyhow. Of positions there are four, evenly
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

from srcfast.generation.kv_cache import LANES, Layout, rounded
from srcfast.generation.step import Drawn, step_numbers
from srcfast_kernels.transfers import to_device

LEAST_ROWS = 8
MANY_ROWS = 128  # above, a product's time grows with its rows
POSITION_BUCKETS = 4

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Drawn]], tuple[Drawn, Replay]]  # work -> where its results will be, its replay
# (numbers of `step_numbers`, rows, used slots, longest continuation) -> tokens [R], log-probabilities [R]
Step = Callable[[Tensor, int, int, int], Drawn]


@dataclass
class _Graph:
    numbers: Tensor  # what its step is given
    outputs: Drawn
    replay: Replay


def row_buckets(most: int) -> list[int]:
    """Numbers of rows that graphs have, the largest first."""
    buckets = [rounded(most, LEAST_ROWS)]
    while buckets[-1] > LEAST_ROWS:
        parts = 2 if buckets[-1] > MANY_ROWS else 4
        buckets.append(rounded(-(-buckets[-1] // parts), LEAST_ROWS))
    return buckets


def position_buckets(most: int) -> list[int]:
    """Longest continuations that graphs have room for, the largest first."""
    step = rounded(-(-most // POSITION_BUCKETS), LANES)
    return [most, *range((most - 1) // step * step, 0, -step)]


class StepGraphs:
    """Steps over one cache, as captured graphs.

    Args:
        step: the step; it may not look at its tensors' values on the host.
        layout: of the cache, with a spare row.
        device: of the step's tensors.
        capture: makes a graph of a function's work, which it doesn't do yet; see `captured_in`.
    """

    def __init__(self, step: Step, layout: Layout, device: torch.device, capture: Capture) -> None:
        self.step, self.layout, self.device, self.capture = step, layout, device, capture
        self.rows, self.positions = row_buckets(layout.slots * layout.width), position_buckets(layout.own_room)
        self._graphs: dict[tuple[int, int], _Graph | None] = {}  # None: seen once
        self.spare = layout.slots * layout.width
        # The largest one's warm-up and capture, of the spare row alone.
        nothing = np.zeros(0, dtype=np.int64)
        for _ in range(2):
            self(nothing, nothing, np.zeros(0), np.zeros(layout.rows, dtype=np.int64), layout.own_room)

    def __call__(
        self, places: np.ndarray, positions: np.ndarray, uniform: np.ndarray, lengths: np.ndarray, longest: int
    ) -> Drawn:
        """The step of the rows at these places; arguments as those of `step_numbers`.

        `longest` is at least the number of positions of the longest continuation, the next one included.
        """
        rows, room = self._bucket(len(places), longest)
        numbers = step_numbers(places, positions, uniform, lengths, rows, self.spare)
        if (rows, room) not in self._graphs:
            self._graphs[rows, room] = None
            tokens, logprobs = self.step(to_device(numbers, self.device), rows, self.layout.slots, room)
            return tokens[: len(places)], logprobs[: len(places)]
        graph = self._graphs[rows, room]
        if graph is None:
            given = to_device(numbers, self.device)  # outside of the pool, in which replays write
            outputs, replay = self.capture(partial(self.step, given, rows, self.layout.slots, room))
            graph = self._graphs[rows, room] = _Graph(given, outputs, replay)
        else:
            host = torch.from_numpy(numbers)
            graph.numbers.copy_(host.pin_memory() if self.device.type == "cuda" else host, non_blocking=True)
        graph.replay()
        tokens, logprobs = graph.outputs  # the next replay, of whichever graph, writes over them
        return tokens[: len(places)].clone(), logprobs[: len(places)].clone()

    def _bucket(self, rows: int, longest: int) -> tuple[int, int]:
        if not rows:  # all that there is
            return self.rows[0], self.positions[0]
        return min(n for n in self.rows if n >= rows), min(n for n in self.positions if n >= longest)


def captured_in(pool: Any) -> Capture:
    """Captures into a pool of `torch.cuda.graph_pool_handle()`."""

    def capture(work: Callable[[], Drawn]) -> tuple[Drawn, Replay]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            outputs = work()
        return outputs, graph.replay

    return capture
