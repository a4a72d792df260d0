"""A decoding step replayed as a CUDA graph: a GPU gets its hundreds of small launches in one.

A graph holds shapes and addresses. So rows are filled up to a bucket's number with rows of a place that nobody reads, cache
positions to a multiple of `POSITIONS`, and what a step is given is copied to where its graph looks for it. The step function is
the one that runs without graphs. A bucket's first step runs as it is, which warms up all that its kernels need; its second is
captured; from then on it is replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

POSITIONS = 64  # of continuations, to a multiple of which the longest is rounded up

Drawn = tuple[Tensor, Tensor]
Capture = Callable[
    [Callable[[], Drawn]], tuple[Drawn, Callable[[], None]]
]  # work -> where its results will be, its replay
# (places [R], positions [R], uniform [R], lengths [places], longest) -> tokens [R], log-probabilities [R]
Step = Callable[[Tensor, Tensor, Tensor, Tensor, int], Drawn]


@dataclass
class _Graph:
    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    outputs: Drawn
    replay: Callable[[], None]


def bucket_of(rows: int) -> int:
    """Rows that a graph for this many has: a power of two up to 32, then a multiple of 32."""
    return max(8, 1 << (rows - 1).bit_length()) if rows <= 32 else -(-rows // 32) * 32


class StepGraphs:
    """Calls as the step does.

    Args:
        step: the step; it may not look at its tensors' values on the host.
        spare: a place for the rows that only fill up.
        most: positions of the longest continuation that the cache has room for.
        capture: makes a graph of a function's work, which it doesn't do yet.
    """

    def __init__(self, step: Step, spare: int, most: int, capture: Capture | None = None) -> None:
        self.step, self.spare, self.most = step, spare, most
        self.capture = capture or _captured
        self._graphs: dict[tuple[int, int], _Graph | None] = {}  # None: seen once

    def __call__(self, places: Tensor, positions: Tensor, uniform: Tensor, lengths: Tensor, longest: int) -> Drawn:
        rows = len(places)
        bucket, longest = bucket_of(rows), min(self.most, -(-longest // POSITIONS) * POSITIONS)
        graph = self._graphs.get((bucket, longest))
        if graph is None:
            given = (_filled(places, bucket, self.spare), _filled(positions, bucket, 0), _filled(uniform, bucket, 0.5))
            if (bucket, longest) not in self._graphs:
                self._graphs[bucket, longest] = None
                tokens, logprobs = self.step(*given, lengths, longest)
                return tokens[:rows], logprobs[:rows]
            graph = self._graphs[bucket, longest] = self._capture((*given, lengths.clone()), longest)
        else:
            own_places, own_positions, own_uniform, own_lengths = graph.inputs
            own_places[rows:].fill_(self.spare)
            own_positions[rows:].zero_()
            own_places[:rows].copy_(places)
            own_positions[:rows].copy_(positions)
            own_uniform[:rows].copy_(uniform)
            own_lengths.copy_(lengths)
        graph.replay()
        tokens, logprobs = graph.outputs  # the next replay writes over them
        return tokens[:rows].clone(), logprobs[:rows].clone()

    def _capture(self, inputs: tuple[Tensor, Tensor, Tensor, Tensor], longest: int) -> _Graph:
        outputs, replay = self.capture(lambda: self.step(*inputs, longest))
        return _Graph(inputs, outputs, replay)


def _filled(values: Tensor, count: int, value: float) -> Tensor:
    filled = torch.full((count,), value, dtype=values.dtype, device=values.device)
    filled[: len(values)].copy_(values)
    return filled


def _captured(work: Callable[[], Drawn]) -> tuple[Drawn, Callable[[], None]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()
    return outputs, graph.replay
