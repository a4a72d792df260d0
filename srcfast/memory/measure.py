"""Measure the memory of a stage: on a GPU the allocator's peak, on a CPU the model's and the saved tensors' bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from srcfast.memory.forecast import Forecast
from srcfast.memory.model_sizes import whole_nf4
from srcfast.models.sharding import local_values
from srcfast.run.progress import peak_rss_bytes


@dataclass
class Measurement:
    """Memory of a stage in bytes, filled when the stage is over.

    Attributes:
        device_type: "cuda" or "cpu".
        peak: maximum allocated on the GPU; 0 on a CPU.
        reserved: maximum reserved by the GPU's allocator, gaps and the captured steps' pool included.
        saved: maximum that autograd saved for backward, on a CPU.
        optimizer: the optimizer's state and the gradients that it takes, on a CPU.
        rss_growth: growth of the process's peak resident memory.
    """

    device_type: str
    peak: int = 0
    reserved: int = 0
    saved: int = 0
    optimizer: int = 0
    rss_growth: int = 0

    def record(self, forecast: Forecast, models: Iterable[nn.Module]) -> dict[str, Any]:
        """Return the entry of the run's files that compares forecast and measurement.

        On a GPU both are the whole peak. On a CPU, whose allocator has no statistics, both are what can be counted: the weights
        of `models`, gradients, the optimizer's state, and what is saved for backward. What is recomputed can't be counted.
        """
        if self.device_type == "cuda":
            forecast_bytes = round(forecast.peak)
            return {"forecast_bytes": forecast_bytes, "measured_bytes": self.peak, "reserved_bytes": self.reserved}
        measured = sum(weight_bytes(model) for model in models) + self.optimizer + self.saved
        return {
            "forecast_bytes": round(forecast.counted),
            "measured_bytes": None if forecast.checkpoint_every else measured,
            "rss_growth_bytes": self.rss_growth,
        }


def weight_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's weights, scales and adapter on this rank; of a sharded parameter, those of its shard."""
    parameters = sum(local_values(parameter).nbytes for parameter in model.parameters())
    return parameters + sum(weight.num_bytes for weight in whole_nf4(model))


@contextmanager
def measured(device: torch.device | str, parameters: Callable[[], Iterable[Tensor]]) -> Iterator[Measurement]:
    """Measure memory within; `parameters` returns those of the models in memory, and is called when training begins."""
    device = torch.device(device)
    measurement = Measurement(device.type)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield measurement
        finally:
            measurement.peak = torch.cuda.max_memory_allocated(device)
            measurement.reserved = torch.cuda.max_memory_reserved(device)
        return

    def count(optimizer: Any, *_: Any) -> None:
        tensors = [value for state in optimizer.state.values() for value in state.values()]
        tensors += [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        measurement.optimizer = sum(value.nbytes for value in tensors if isinstance(value, Tensor))

    before = peak_rss_bytes()
    hook = register_optimizer_step_post_hook(count)
    try:
        with SavedTensors(parameters) as saved:
            yield measurement
    finally:
        hook.remove()
        measurement.saved = saved.peak
        measurement.rss_growth = peak_rss_bytes() - before


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Count the live storages that autograd has saved for backward, each once: `bytes` now, `peak` at most.

    Parameters are not counted: they live anyway. What a checkpointed group saves while it is recomputed is not seen.
    """

    def __init__(self, parameters: Callable[[], Iterable[Tensor]]) -> None:
        super().__init__(self._pack, lambda saved: saved.tensor)
        self.bytes = 0
        self.peak = 0
        self._parameters = parameters
        self._left_out: set[int] = set()
        self._holders: dict[int, int] = {}  # storage -> how many saved tensors hold it

    def __enter__(self) -> SavedTensors:
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> _SavedTensor:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        # When a pass begins, the optimizer may have replaced the parameters' storages since the last one.
        if not self._holders:
            self._left_out = {local_values(parameter).untyped_storage().data_ptr() for parameter in self._parameters()}
        if key in self._left_out:
            return _SavedTensor(tensor, None, key, 0)
        count = self._holders.get(key, 0)
        self._holders[key] = count + 1
        if not count:
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
        return _SavedTensor(tensor, self, key, storage.nbytes())

    def release(self, key: int, size: int) -> None:
        """Count a saved tensor of this storage as freed."""
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.bytes -= size


class _SavedTensor:
    """A saved tensor, which autograd drops after its backward."""

    __slots__ = ("counter", "key", "size", "tensor")

    def __init__(self, tensor: Tensor, counter: SavedTensors | None, key: int, size: int) -> None:
        self.tensor, self.counter, self.key, self.size = tensor, counter, key, size

    def __del__(self) -> None:
        if self.counter is not None:
            self.counter.release(self.key, self.size)
