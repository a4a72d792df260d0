"""Compute matrix products for forward and backward passes written by hand: on a CPU oneDNN's in fp32, PyTorch's everywhere else.

PyTorch multiplies fp32 matrices by MKL, which takes its AVX-512 kernels on Intel's processors only: on AMD's Zen 5 oneDNN's
take less than half the time. No gradient goes through any of these.
"""

from __future__ import annotations

import os
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN and PyTorch's layer over it keep what they compiled for each shape, about a mebibyte: by default of the last 1,024. Rows
# differ from step to step, so that would be a gibibyte; a step needs some twenty shapes. Read when the first product is made.
for _capacity in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_capacity, "32")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + bias. x: [..., in], weight: [out, in], bias: [out]."""
    if _by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Compute a b. a: [n, k], b: [k, m]."""
    return linear(a, b.T) if _by_onednn(a, b) else a @ b


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a b to total in place. total: [n, m], a: [n, k], b: [k, m]."""
    return total.add_(product(a, b)) if _by_onednn(a, b) else total.addmm_(a, b)


def thin_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute a b, where b [k, m] has few columns; the result [n, m] may be a transposed matrix.

    MKL's products with 8 columns take a third to a sixth of the time as b^T a^T; a GPU's would lie unaligned, and so would
    oneDNN's where `a` is no transpose itself.
    """
    if a.is_cuda or (_by_onednn(a, b) and a.is_contiguous()):
        return product(a, b)
    return product(b.T, a.T).T


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    if a.dtype != torch.float32 or b.dtype != torch.float32 or a.device.type != "cpu":
        return False
    if not _has_onednn() or not torch.backends.mkldnn.enabled or torch.is_autocast_enabled("cpu"):
        return False
    return a.numel() > 0 and b.numel() > 0


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
