"""Settings of PyTorch's CUDA allocator. Imports no torch: torch reads its environment variables once, at the first use."""

from __future__ import annotations

from collections.abc import Mapping

# torch 2.11 to 2.13 take the first of these that is set, the second on ROCm alone (c10/cuda/CUDAAllocatorConfig.h).
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def allocator_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables to add before torch is imported: none if the user has set one of the allocator's.

    The number of tokens differs from forest to forest: freed blocks of one size don't fit the next, and memory that is reserved
    but unused grows. Expandable segments grow in place.
    """
    if any(name in environment for name in VARIABLES):
        return {}
    return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
