"""Copy between the host and a GPU without making the host wait: copies start from, or end in, page-locked memory.

PyTorch's allocator of page-locked memory notes the copies that read a block and hands it out again only after them. So the
buffers that are made here may be dropped at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: for pointers that are aligned less, Triton compiles other code


def indexed(device: torch.device | str) -> torch.device:
    """Return the device with an index, as tensors have it: `cuda` alone stands for the current GPU."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def to_device(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Put an array, a tensor or a list of numbers on the device; to a GPU they go from page-locked memory, unwaited for.

    A tensor that is page-locked already must stay as it is until the copy has been made.
    """
    device, tensor = torch.device(device), torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    tensor = tensor.contiguous()  # else the copy would go through memory that can be paged
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def to_device_together(arrays: Sequence[Any], device: torch.device | str) -> list[Tensor]:
    """Put several arrays or tensors of the host on the device, to a GPU in one copy: there they are views of one buffer."""
    device, tensors = torch.device(device), [torch.as_tensor(array).contiguous() for array in arrays]
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    for tensor, start in zip(tensors, starts, strict=True):
        _part(buffer, start, tensor).copy_(tensor)
    there = buffer.to(device, non_blocking=True)
    return [_part(there, start, tensor) for tensor, start in zip(tensors, starts, strict=True)]


def _part(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """Return the view that begins at byte `start` of a buffer, with the type and shape of `like`."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


@dataclass(frozen=True)
class Fetched:
    """A tensor on its way to the host.

    Attributes:
        tensor: on the host; complete once `arrived` is.
        arrived: None where there is nothing to wait for.
    """

    tensor: Tensor
    arrived: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """Wait until the tensor is complete, and return it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensor


def fetch(tensor: Tensor) -> Fetched:
    """Start to copy a tensor to the host; from a GPU into page-locked memory, behind what the GPU has been given so far."""
    if not tensor.is_cuda:
        return Fetched(tensor, None)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensor.device))
    return Fetched(host, arrived)
