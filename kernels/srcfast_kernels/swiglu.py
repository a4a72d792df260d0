"""Compute the gated activation of Llama's feed-forward layer (Shazeer, 2020, arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from srcfast_kernels.backends import Backend, accumulator, backend_for

BLOCK = 1024  # values that a program of a kernel takes


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up; backward recomputes silu instead of storing it. [..., I] each."""
    backend = backend_for(gate)
    if backend == "reference":
        return swiglu_reference(gate, up)
    return _SwiGLU.apply(gate, up, backend)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Compute `swiglu` by its definition."""
    return gate * torch.sigmoid(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, backend: Backend) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return swiglu_forward(gate, up, backend)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *swiglu_backward(gradients[0], gate, up, ctx.backend)[:2], None


def swiglu_forward(gate: Tensor, up: Tensor, backend: Backend) -> Tensor:
    """Compute `swiglu` without a graph."""
    if backend == "triton":
        return _forward_triton(gate.contiguous(), up.contiguous())
    return F.silu(gate).mul_(up)


def swiglu_backward(
    gradient: Tensor, gate: Tensor, up: Tensor, backend: Backend, again: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the gradients of gate and up and, if requested by `again`, silu(gate) * up. `gradient` may then be written over."""
    if backend == "triton":
        return _backward_triton(gradient.contiguous(), gate.contiguous(), up.contiguous(), again)
    silu = F.silu(gate)
    grad_up = gradient * silu
    scaled = gradient.mul_(up) if again else gradient * up
    product = silu.mul_(up) if again else None
    return torch.ops.aten.silu_backward(scaled, gate), grad_up, product


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, count, ACC: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(ACC)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(ACC)
    tl.store(out_ptr + offsets, (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    gradient_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    count,
    AGAIN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute both gradients; with AGAIN, silu(gate) * up is written over its gradient."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(ACC)
    gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(ACC)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(ACC)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    grad_gate = gradient * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_up_ptr + offsets, (gradient * silu).to(grad_up_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_gate_ptr + offsets, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)
    if AGAIN:
        tl.store(gradient_ptr + offsets, (silu * up).to(gradient_ptr.dtype.element_ty), mask=inside)


def _forward_triton(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    if grid := triton.cdiv(out.numel(), BLOCK):
        swiglu_kernel[(grid,)](gate, up, out, out.numel(), ACC=accumulator(gate.dtype), BLOCK=BLOCK)
    return out


def _backward_triton(gradient: Tensor, gate: Tensor, up: Tensor, again: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    if grid := triton.cdiv(gate.numel(), BLOCK):
        swiglu_backward_kernel[(grid,)](
            gradient,
            gate,
            up,
            grad_gate,
            grad_up,
            gate.numel(),
            AGAIN=again,
            ACC=accumulator(gate.dtype),
            BLOCK=BLOCK,
        )
    return grad_gate, grad_up, gradient if again else None
