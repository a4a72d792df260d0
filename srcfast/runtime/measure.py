"""What a stage really took: on a GPU the allocator's peak, on a CPU what is held for the model and for backward, counted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class SavedTensors:
    """Counts the storages that autograd keeps for backward, each once, while they live: `bytes` now, `peak` at most.

    Parameters are left out, as they are kept anyway. On a GPU nothing is counted: the allocator knows.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.bytes = 0
        self.peak = 0
        self._left_out = {tensor.untyped_storage().data_ptr() for tensor in parameters}
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
