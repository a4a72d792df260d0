"""RMS normalisation (Zhang and Sennrich, 2019, arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from srcfast_kernels.homes import accumulator, home_of

PROGRAMS = 512  # of the backward pass; each keeps a part of the weight's gradient


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x: [..., D], weight: [D].

    Of a frozen weight no gradient is computed.
    """
    home = home_of(x)
    if home == "triton":
        return _RMSNormTriton.apply(x, weight, eps)
    if home == "torch" and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return _RMSNorm.apply(x, weight, eps)  # half the time of PyTorch's, which is fused on GPUs alone
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`rms_norm` by its definition."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients  # [..., D]
        x, weight, inverse = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if needs_weight:
            grad_weight = (gradient * x).mul_(inverse).reshape(-1, x.shape[-1]).sum(0)
        if needs_x:
            scaled = gradient * weight
            shared = (scaled * x).sum(-1, keepdim=True).div_(x.shape[-1]).mul_(inverse.pow(3))  # [..., 1]
            grad_x = scaled.mul_(inverse).addcmul_(x, shared, value=-1.0)
        return grad_x, grad_weight, None


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, inverse_ptr, size, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(x_ptr + row * size + columns, mask=inside, other=0.0).to(ACC)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(ACC)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / size + EPS)
    tl.store(inverse_ptr + row, inverse)
    tl.store(out_ptr + row * size + columns, (x * inverse * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    gradient_ptr,
    x_ptr,
    weight_ptr,
    inverse_ptr,
    grad_x_ptr,
    grad_weight_ptr,
    rows,
    size,
    rows_a_program,
    NEEDS_WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes some rows, and keeps its own part of the weight's gradient: summed later, in a fixed order."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(ACC)
    part = tl.zeros((BLOCK,), ACC)
    for row in range(program * rows_a_program, tl.minimum((program + 1) * rows_a_program, rows)):
        normed = tl.load(x_ptr + row * size + columns, mask=inside, other=0.0).to(ACC)
        inverse = tl.load(inverse_ptr + row)
        normed *= inverse
        gradient = tl.load(gradient_ptr + row * size + columns, mask=inside, other=0.0).to(ACC)
        if NEEDS_WEIGHT:
            part += gradient * normed
        gradient *= weight
        grad_x = (gradient - normed * (tl.sum(gradient * normed, 0) / size)) * inverse
        tl.store(grad_x_ptr + row * size + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if NEEDS_WEIGHT:
        tl.store(grad_weight_ptr + program * size + columns, part, mask=inside)


class _RMSNormTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        out, size = torch.empty_like(x), x.shape[-1]
        rows = x.numel() // max(1, size)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        inverse = torch.empty(rows, dtype=dtype, device=x.device)
        block = triton.next_power_of_2(size)
        if rows:
            rms_norm_kernel[(rows,)](
                x, weight, out, inverse, size, EPS=eps, ACC=accumulator(x.dtype), BLOCK=block, num_warps=warps_of(block)
            )
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        rows, size = len(inverse), x.shape[-1]
        programs = min(rows, PROGRAMS)
        grad_x = torch.empty_like(x)
        parts = torch.zeros(programs, size, dtype=inverse.dtype, device=x.device) if needs_weight else None
        block = triton.next_power_of_2(size)
        if rows:
            rms_norm_backward_kernel[(programs,)](
                gradients[0].contiguous(),
                x,
                weight,
                inverse,
                grad_x,
                parts,
                rows,
                size,
                triton.cdiv(rows, programs),
                NEEDS_WEIGHT=needs_weight,
                ACC=accumulator(x.dtype),
                BLOCK=block,
                num_warps=warps_of(block),
            )
        return grad_x, None if parts is None else parts.sum(0).to(weight.dtype), None


def warps_of(block: int) -> int:
    """Of a program that takes a row of this many values."""
    return max(1, min(16, block // 256))  # eight values a thread
