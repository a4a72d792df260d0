"""Memory that calls of `decode` share on a GPU: the cache's, and that of steps captured over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srcfast.generation.cuda_graphs import StepGraphs, captured_in
from srcfast.generation.kv_cache import SlotCache
from srcfast.generation.kv_store import Layout, storage_of
from srcfast.generation.sampling import Sampling
from srcfast.generation.step import DecodingStep
from srcfast.models.protocols import HasDecoder


class DecodingMemory:
    """A context manager within which a stage's calls of `decode` share memory; at its end all of it is freed.

        with DecodingMemory() as memory:
            for samples in chunks:
                decode(model, tasks, features, memory=memory, ...)

    To a call shared memory looks like new memory: zeros, in the shapes that its tasks need, and steps captured over these. So its
    results are the same bytes whichever calls came before. On a CPU nothing is shared.

    Captured steps read weights at fixed addresses, so an adapter that is folded into the weights has to stay folded: with other
    weights, or other settings, all memory is released and allocated again.
    """

    def __init__(self) -> None:
        self._made_for: tuple[Any, ...] = ()
        self._storage: dict[str, Tensor] = {}
        self._slots = self._prompt_capacity = 0  # of the storage
        self._steps: dict[Layout, tuple[DecodingStep, StepGraphs | None]] = {}
        self._pool: Any = None  # of the graphs

    def __enter__(self) -> DecodingMemory:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Free all memory."""
        on_gpu = any(tensor.is_cuda for tensor in self._storage.values())
        if on_gpu:
            torch.cuda.synchronize()  # steps whose results nobody reads may still run
        self._steps.clear()
        self._storage.clear()
        self._slots = self._prompt_capacity = 0
        self._made_for, self._pool = (), None
        if on_gpu:
            torch.cuda.empty_cache()

    def step(self, model: HasDecoder, layout: Layout, sampling: Sampling) -> tuple[DecodingStep, StepGraphs | None]:
        """Return a step over an empty cache of this layout, and its graphs if the layout has a spare row for them."""
        weight = model.decoder.head_weight
        if not layout.fixed:
            return DecodingStep(model, SlotCache(model.decoder.cache_config, layout, weight), sampling), None
        addresses = tuple(parameter.data_ptr() for parameter in model.decoder.parameters())
        key = (addresses, layout.width, layout.row_capacity, layout.spare, sampling)
        if key != self._made_for:
            self.release()
        slots, prompt_capacity = max(layout.slots, self._slots), max(layout.prompt_capacity, self._prompt_capacity)
        if (slots, prompt_capacity) != (self._slots, self._prompt_capacity):
            self.release()  # before more is allocated
            largest = Layout(slots, layout.width, prompt_capacity, layout.row_capacity, layout.spare, fixed=True)
            self._storage = storage_of(model.decoder.cache_config, largest, weight)
            self._made_for, self._slots, self._prompt_capacity = key, slots, prompt_capacity
        if layout not in self._steps:
            cache = SlotCache(model.decoder.cache_config, layout, weight, self._storage)
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
