"""Apply RMS normalisation (Zhang and Sennrich, 2019, arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from srcfast_kernels.backends import Backend, accumulator, backend_for

PROGRAMS = 512  # of the backward pass; each keeps a part of the weight's gradient


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last dimension. x: [..., D], weight: [D].

    Saved for backward: x as it is, and a number a row. Of a frozen weight no gradient is computed.
    """
    backend = backend_for(x)
    if backend == "reference":
        return rms_norm_reference(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps, backend)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Compute `rms_norm` by its definition; in fp32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, backend: Backend) -> Tensor:
        out, inverse = rms_norm_forward(x, weight, eps, backend)
        ctx.save_for_backward(x, weight, inverse)
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        return *rms_norm_backward(gradients[0], x, weight, inverse, ctx.needs_input_grad[1], ctx.backend), None, None


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, backend: Backend) -> tuple[Tensor, Tensor]:
    """Compute `rms_norm` of x [..., D] without a graph, and 1 / sqrt(mean(x^2) + eps) of each row for backward, fp32 or fp64."""
    if backend == "triton":
        return _forward_triton(x.contiguous(), weight.contiguous(), eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    inverse = mean_square.add_(eps).rsqrt_()  # [..., 1]
    return (wide * inverse).mul_(weight).to(x.dtype), inverse


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, needs_weight: bool, backend: Backend
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradients of x [..., D] and, where needed, of the weight [D]."""
    if backend == "triton":
        return _backward_triton(gradient.contiguous(), x.contiguous(), weight.contiguous(), inverse, needs_weight)
    wide = x.to(inverse.dtype)
    grad_weight = None
    if needs_weight:
        grad_weight = (gradient * wide).mul_(inverse).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    scaled = gradient.to(inverse.dtype) * weight
    shared = (scaled * wide).sum(-1, keepdim=True).div_(x.shape[-1]).mul_(inverse.pow(3))  # [..., 1]
    return scaled.mul_(inverse).addcmul_(wide, shared, value=-1.0).to(x.dtype), grad_weight


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, inverse_ptr, size, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """Normalise one row (a program)."""
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
    """Compute gradients of some rows (a program), and its part of the weight's gradient: summed later, in a fixed order."""
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


def _forward_triton(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, size = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // max(1, size)
    inverse = torch.empty(rows, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    block = triton.next_power_of_2(size)
    if rows:
        rms_norm_kernel[(rows,)](
            x, weight, out, inverse, size, EPS=eps, ACC=accumulator(x.dtype), BLOCK=block, num_warps=warps_of(block)
        )
    return out, inverse


def _backward_triton(
    gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    rows, size = len(inverse), x.shape[-1]
    programs = min(rows, PROGRAMS)
    grad_x = torch.empty_like(x)
    parts = torch.zeros(programs, size, dtype=inverse.dtype, device=x.device) if needs_weight else None
    block = triton.next_power_of_2(size)
    if rows:
        rms_norm_backward_kernel[(programs,)](
            gradient,
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
    return grad_x, None if parts is None else parts.sum(0).to(weight.dtype)


def warps_of(block: int) -> int:
    """Return the warps of a program that takes a row of this many values."""
    return max(1, min(16, block // 256))  # eight values a thread
