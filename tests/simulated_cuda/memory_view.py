"""Device memory as CPU tensors, without a wait: for what is written in Python in place of a CUDA kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def host(tensor: Tensor) -> Tensor:
    """The same memory as a CPU tensor; a CPU tensor as it is."""
    if not tensor.is_cuda:
        return tensor
    storage = tensor.untyped_storage()
    count = storage.nbytes() // tensor.element_size()
    if count == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    buffer = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(buffer, dtype=tensor.dtype, count=count)
    return flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def on_device(values: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Host values in new memory of the device of `like`."""
    made = torch.empty(values.shape, dtype=dtype or values.dtype, device=like.device)
    host(made).copy_(values)
    return made
