"""What a stage really took: on a GPU the allocator's peak, on a CPU what is held for the model and for backward, counted."""

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
from srcfast.models.sharding import held
from srcfast.run.progress import peak_rss_bytes


@dataclass
class Measurement:
    """Filled when the stage is over.

    Attributes:
        device_type: "cuda" or "cpu".
        peak: most bytes allocated on the GPU; 0 on a CPU.
        reserved: most bytes that the GPU's allocator held, gaps and captured steps' pool included.
        saved: most bytes that autograd kept for backward, on a CPU.
        optimizer: bytes of the optimizer's state and of the gradients that it takes, on a CPU.
        rss_growth: by how much the process's most resident memory grew.
    """

    device_type: str
    peak: int = 0
    reserved: int = 0
    saved: int = 0
    optimizer: int = 0
    rss_growth: int = 0

    def record(self, forecast: Forecast, models: Iterable[nn.Module]) -> dict[str, Any]:
        """What the run's files keep: forecast against measured.

        On a GPU both are the whole peak. On a CPU, whose allocator tells nothing, both are what can be counted: the weights
        of `models`, gradients, the optimizer's state, and what is kept for backward. What is recomputed can't be.
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
    """A model's weights, the scales of 4-bit ones and its adapter included; of what ranks share out, this one's share."""
    return sum(held(own).nbytes for own in model.parameters()) + sum(own.num_bytes for own in whole_nf4(model))


@contextmanager
def measured(device: torch.device | str, parameters: Callable[[], Iterable[Tensor]]) -> Iterator[Measurement]:
    """Within: memory is measured; `parameters` are those of the models in memory, asked for when training begins."""
    device = torch.device(device)
    found = Measurement(device.type)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield found
        finally:
            found.peak = torch.cuda.max_memory_allocated(device)
            found.reserved = torch.cuda.max_memory_reserved(device)
        return

    def count(optimizer: Any, *_: Any) -> None:
        tensors = [value for state in optimizer.state.values() for value in state.values()]
        tensors += [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        found.optimizer = sum(value.nbytes for value in tensors if isinstance(value, Tensor))

    before = peak_rss_bytes()
    hook = register_optimizer_step_post_hook(count)
    try:
        with SavedTensors(parameters) as saved:
            yield found
    finally:
        hook.remove()
        found.saved = saved.peak
        found.rss_growth = peak_rss_bytes() - before


class SavedTensors:
    """Counts the storages that autograd keeps for backward, each once, while they live: `bytes` now, `peak` at most.

    Parameters are left out, as they are kept anyway. What a checkpointed group keeps while it is run again is not seen.
    """

    def __init__(self, parameters: Callable[[], Iterable[Tensor]]) -> None:
        self.bytes = 0
        self.peak = 0
        self._parameters = parameters
        self._left_out: set[int] = set()
        self._holders: dict[int, int] = {}  # storage -> how many saved tensors hold it
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Held:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if not self._holders:  # a pass begins; the optimizer may have moved the parameters since the last
            self._left_out = {held(own).untyped_storage().data_ptr() for own in self._parameters()}
        if key in self._left_out:
            return _Held(tensor, None, key, 0)
        count = self._holders.get(key, 0)
        self._holders[key] = count + 1
        if not count:
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
        return _Held(tensor, self, key, storage.nbytes())

    def let_go(self, key: int, size: int) -> None:
        """A saved tensor of this storage is gone."""
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.bytes -= size


class _Held:
    """A saved tensor: autograd drops it after its backward."""

    __slots__ = ("counter", "key", "size", "tensor")

    def __init__(self, tensor: Tensor, counter: SavedTensors | None, key: int, size: int) -> None:
        self.tensor, self.counter, self.key, self.size = tensor, counter, key, size

    def __del__(self) -> None:
        if self.counter is not None:
            self.counter.let_go(self.key, self.size)
