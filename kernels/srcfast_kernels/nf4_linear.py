"""Compute a linear over a frozen 4-bit weight."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from srcfast_kernels.backends import backend_for
from srcfast_kernels.cpu_products import linear
from srcfast_kernels.nf4 import NF4Weight, dynamic_codes, nf4_dequantize
from srcfast_kernels.optional import import_failure

FEW_ROWS = 64  # above these, one dequantisation and PyTorch's product are faster

# How bitsandbytes chooses between its fused kernel and a dequantisation in two passes, followed by F.linear. Read from
# bitsandbytes 0.50.2, bitsandbytes/backends/cuda/ops.py (0.50.0 and 0.50.1 have the same names): the kernel registered for
# gemm_4bit falls back, with a warning, where the inner dimension is no multiple of the blocksize; else the table
# `_gemm_4bit_use_custom_fn`, which its authors calibrated by device, dtype and shape, decides. Up to `_GEMM_4BIT_CUSTOM_FLOOR_M`
# = 4 rows it says yes on every CUDA device.
RULE = "_gemm_4bit_use_custom_fn"
RULE_TAKES = ["device_index", "dtype", "M", "N", "K"]
ALWAYS_FUSED_ROWS = 4


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + bias for a frozen 4-bit weight. x: [..., in], W: [out, in].

    Backward dequantises once more: neither the dequantised weight nor x is saved between. On a GPU a few rows, as decoding
    has them, go through bitsandbytes' fused product where it is installed and has one for the shape: the weight is then read in
    4 bits. Otherwise `nf4_dequantize`, in one pass, and PyTorch's product.
    """
    return _NF4Linear.apply(x, weight, bias)


def nf4_linear_reference(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Compute `nf4_linear` as an ordinary linear over the dequantised weight."""
    return F.linear(x, nf4_dequantize(weight).to(x.dtype), bias)


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return frozen_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (gradient,) = gradients  # [..., out]
        needs_x, _, needs_bias = ctx.needs_input_grad
        grad_x = gradient @ nf4_dequantize(ctx.weight).to(gradient.dtype) if needs_x else None
        grad_bias = gradient.flatten(0, -2).sum(0) if needs_bias else None
        return grad_x, None, grad_bias


def frozen_linear(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> Tensor:
    """Compute x W^T + bias for a weight in whole or 4-bit numbers; for forward passes, the result may be written over."""
    if isinstance(weight, Tensor):
        return linear(x, weight, bias)
    if _is_fused(x, weight):
        return _few_rows(x, weight, bias)
    return linear(x, nf4_dequantize(weight).to(x.dtype), bias)


def _is_fused(x: Tensor, weight: NF4Weight) -> bool:
    """Return whether bitsandbytes multiplies x [..., in] by this weight [out, in] without dequantising it first."""
    if not x.is_cuda or backend_for(x) != "triton" or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    out_size, in_size = weight.shape
    rows = x.numel() // in_size
    if not 0 < rows <= FEW_ROWS or in_size % weight.blocksize != 0 or why_not_fused() is not None:
        return False
    return _dispatch_rule()(x.device.index, x.dtype, rows, out_size, in_size)


@cache
def _dispatch_rule() -> Callable[[int, torch.dtype, int, int, int], bool]:
    """Return bitsandbytes' rule; for a version without one of this name, what every device is known to fuse."""
    from bitsandbytes.backends.cuda import ops

    rule = getattr(ops, RULE, None)
    if rule is not None and list(inspect.signature(rule).parameters) == RULE_TAKES:
        return rule
    return lambda device, dtype, rows, out_size, in_size: rows <= ALWAYS_FUSED_ROWS


def _few_rows(x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
    nested = {}
    if weight.nested_absmax is not None:
        nested = {"absmax_8bit": weight.absmax, "absmax_code": dynamic_codes(x.device), "absmax_offset": weight.offset}
    return torch.ops.bitsandbytes.gemm_4bit.default(
        x.contiguous(),
        weight.packed[:, None],
        list(weight.shape),
        weight.absmax if weight.nested_absmax is None else weight.nested_absmax,
        weight.blocksize,
        "nf4",
        bias=bias,
        **nested,
    )


@cache
def why_not_fused() -> str | None:
    """Return why bitsandbytes' fused product can't be called on a GPU, or None where it can.

    Importing the package registers the product, from 0.50 on. Where its CUDA library does not load, the import succeeds all the
    same and a stand-in raises at the first call (0.50.2, bitsandbytes/cextension.py).
    """
    if (reason := import_failure("bitsandbytes.cextension", "lib")) is not None:
        return reason
    if not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        return "it has no gemm_4bit: expected 0.50 or later"
    from bitsandbytes.cextension import lib

    if not getattr(lib, "compiled_with_cuda", False):
        return "its CUDA library is not loaded: see python -m bitsandbytes"
    return None
