"""Where an operation runs: Triton on a GPU, PyTorch written for speed elsewhere, or the plain reference that defines it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import triton.language as tl
from torch import Tensor

Backend = Literal["triton", "torch", "reference"]
HOMES: tuple[Backend, ...] = ("triton", "torch", "reference")

_forced: Backend | None = None


def backend_for(tensor: Tensor) -> Backend:
    """Which home takes an operation on this tensor: what `use_backend` or SRCFAST_KERNELS says, else Triton where CUDA is.

    Raises:
        ValueError: SRCFAST_KERNELS is none of the homes.
    """
    if _forced is not None:
        return _forced
    named = os.environ.get("SRCFAST_KERNELS", "auto")
    if named == "auto":
        return "triton" if tensor.is_cuda else "torch"
    for home in HOMES:
        if named == home:
            return home
    raise ValueError(f"SRCFAST_KERNELS: expected auto, {', '.join(HOMES)}, found {named!r}")


@contextmanager
def use_backend(home: Backend) -> Iterator[None]:
    """Every operation within runs in this home. Triton on CPU tensors needs TRITON_INTERPRET=1 from the start."""
    global _forced
    before, _forced = _forced, home
    try:
        yield
    finally:
        _forced = before


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What kernels compute in: fp32, or fp64 for fp64 inputs, so that they can be checked against finite differences."""
    return tl.float64 if dtype == torch.float64 else tl.float32
