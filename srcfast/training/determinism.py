"""Deterministic algorithms, slower ones, with which a training on a GPU gives the same numbers in every run.

Without them two kinds of operations add in no fixed order there: FlashAttention's backward pass (the gradients of queries), and
sums by index with atomics. On a CPU every operation that srcfast uses adds in a fixed order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def prepare_determinism() -> None:
    """Set the environment variable that gives cuBLAS one workspace a stream; cuBLAS reads it once, at its first product.

    A value that is already set stays. If it is not a deterministic one, PyTorch raises RuntimeError and names the variable.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Restrict PyTorch to deterministic algorithms while the body runs; an operation without one raises RuntimeError."""
    if not wanted:
        yield
        return
    was_enabled = torch.are_deterministic_algorithms_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # which costs time; no kernel here reads unwritten memory
    )
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_enabled)
        torch.utils.deterministic.fill_uninitialized_memory = was_filling
