"""Choose where an operation runs: Triton on a GPU, PyTorch written for speed elsewhere, or the reference that defines it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import triton.language as tl
from torch import Tensor

Backend = Literal["triton", "torch", "reference"]
BACKENDS: tuple[Backend, ...] = ("triton", "torch", "reference")

_forced: Backend | None = None


def backend_for(tensor: Tensor) -> Backend:
    """Return the backend of an operation on this tensor: what `use_backend` or SRCFAST_KERNELS says, else Triton on CUDA.

    Raises:
        ValueError: SRCFAST_KERNELS is none of the backends.
    """
    if _forced is not None:
        return _forced
    named = os.environ.get("SRCFAST_KERNELS", "auto")
    if named == "auto":
        return "triton" if tensor.is_cuda else "torch"
    for backend in BACKENDS:
        if named == backend:
            return backend
    raise ValueError(f"SRCFAST_KERNELS: expected auto, {', '.join(BACKENDS)}, found {named!r}")


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Run every operation within by this backend. Triton on CPU tensors needs TRITON_INTERPRET=1 from the start."""
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Return the type that kernels compute in: fp32, or fp64 for fp64 inputs, to check them against finite differences."""
    return tl.float64 if dtype == torch.float64 else tl.float32
