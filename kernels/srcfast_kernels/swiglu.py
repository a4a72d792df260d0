"""The gated activation of Llama's feed-forward layer (Shazeer, 2020, arXiv 2002.05202)."""

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
    """silu(gate) * up; backward recomputes silu instead of storing it. [..., I] each."""
    home = backend_for(gate)
    if home == "reference":
        return swiglu_reference(gate, up)
    return _SwiGLU.apply(gate, up, home)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` by its definition."""
    return gate * torch.sigmoid(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, home: Backend) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.home = home
        return swiglu_forward(gate, up, home)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *swiglu_backward(gradients[0], gate, up, ctx.home)[:2], None


def swiglu_forward(gate: Tensor, up: Tensor, home: Backend) -> Tensor:
    """`swiglu` without a graph."""
    if home == "triton":
        return _forward_triton(gate.contiguous(), up.contiguous())
    return F.silu(gate).mul_(up)


def swiglu_backward(
    gradient: Tensor, gate: Tensor, up: Tensor, home: Backend, again: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of gate and up; and, asked for again, silu(gate) * up. `gradient` may then be written over."""
    if home == "triton":
        return _backward_triton(gradient.contiguous(), gate.contiguous(), up.contiguous(), again)
    silu = F.silu(gate)
    grad_up = gradient * silu
    scaled = gradient.mul_(up) if again else gradient * up
    product = silu.mul_(up) if again else None
    return torch.ops.aten.silu_backward(scaled, gate), grad_up, product


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, count, ACC: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    gate = tl.load(gate_ptr + places, mask=inside, other=0.0).to(ACC)
    up = tl.load(up_ptr + places, mask=inside, other=0.0).to(ACC)
    tl.store(out_ptr + places, (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=inside)


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
    """With AGAIN silu(gate) * up takes the place of its gradient."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    gradient = tl.load(gradient_ptr + places, mask=inside, other=0.0).to(ACC)
    gate = tl.load(gate_ptr + places, mask=inside, other=0.0).to(ACC)
    up = tl.load(up_ptr + places, mask=inside, other=0.0).to(ACC)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    grad_gate = gradient * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_up_ptr + places, (gradient * silu).to(grad_up_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_gate_ptr + places, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)
    if AGAIN:
        tl.store(gradient_ptr + places, (silu * up).to(gradient_ptr.dtype.element_ty), mask=inside)


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
