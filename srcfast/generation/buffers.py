"""What decoding keeps on a GPU from one call to the next: the cache's memory, and steps captured over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srcfast.generation.cuda_graphs import StepGraphs, captured_in
from srcfast.generation.kv_cache import Layout, SlotCache, storage_of
from srcfast.generation.sampling import Sampling
from srcfast.generation.step import DecodingStep
from srcfast.models.protocols import HasDecoder


class DecodingMemory:
    """A context manager that a stage owns; within, its calls of `decode` share memory, and at its end none is left.

        with DecodingMemory() as memory:
            for samples in chunks:
                decode(model, tasks, features, memory=memory, ...)

    A call finds what it would find in memory of its own: zeros, in the shapes that its own tasks need, and steps captured over
    these. So its results are the same bytes whichever calls came before. On a CPU nothing is shared.

    Steps compute with the weights at the addresses that they were captured with, so an adapter that is folded into weights has
    to stay folded in: with other weights, or other settings, everything is made anew.
    """

    def __init__(self) -> None:
        self._made_for: tuple[Any, ...] = ()
        self._storage: dict[str, Tensor] = {}
        self._slots = self._prompt_room = 0  # for which there is storage
        self._steps: dict[Layout, tuple[DecodingStep, StepGraphs | None]] = {}
        self._pool: Any = None  # of the graphs

    def __enter__(self) -> DecodingMemory:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Hand everything back to the device."""
        on_gpu = any(held.is_cuda for held in self._storage.values())
        if on_gpu:
            torch.cuda.synchronize()  # steps whose results nobody waits for may be under way
        self._steps.clear()
        self._storage.clear()
        self._slots = self._prompt_room = 0
        self._made_for, self._pool = (), None
        if on_gpu:
            torch.cuda.empty_cache()

    def step(self, model: HasDecoder, layout: Layout, sampling: Sampling) -> tuple[DecodingStep, StepGraphs | None]:
        """The step over a cache of this layout that holds nothing, and its graphs where it has a spare row for them."""
        weight = model.decoder.head_weight
        if not layout.fixed:
            return DecodingStep(model, SlotCache(model.decoder.config, layout, weight), sampling), None
        addresses = tuple(parameter.data_ptr() for parameter in model.decoder.parameters())
        wanted = (addresses, layout.width, layout.own_room, layout.spare, sampling)
        if wanted != self._made_for:
            self.release()
        slots, prompt_room = max(layout.slots, self._slots), max(layout.prompt_room, self._prompt_room)
        if (slots, prompt_room) != (self._slots, self._prompt_room):
            self.release()  # before more is allocated
            largest = Layout(slots, layout.width, prompt_room, layout.own_room, layout.spare, fixed=True)
            self._storage = storage_of(model.decoder.config, largest, weight)
            self._made_for, self._slots, self._prompt_room = wanted, slots, prompt_room
        if layout not in self._steps:
            cache = SlotCache(model.decoder.config, layout, weight, self._storage)
            step = DecodingStep(model, cache, sampling)
            self._steps[layout] = step, self._graphs(step, layout) if layout.spare else None
        step, captured = self._steps[layout]
        step.cache.reset()
        step.pending.zero_()
        return step, captured

    def _graphs(self, step: DecodingStep, layout: Layout) -> StepGraphs:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return StepGraphs(step, layout, step.cache.device, captured_in(self._pool))
