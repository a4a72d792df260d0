"""Trainings whose numbers are the same in every run on a GPU: by deterministic algorithms alone, which take longer.

What else sums in no fixed order there: FlashAttention's backward pass (the gradients of queries), and sums by index with
atomics. On a CPU every operation that srcfast uses sums in a fixed order anyway.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def prepare_determinism() -> None:
    """Give cuBLAS a workspace for each stream; it reads this once, at its first product.

    A value that the environment has already stays. PyTorch raises RuntimeError, and names the variable, where it is none of
    the deterministic ones.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Within, PyTorch takes deterministic algorithms alone, and raises RuntimeError for an operation that has none."""
    if not wanted:
        yield
        return
    before, filling = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what was not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filling
