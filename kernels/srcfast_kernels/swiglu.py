"""The gated activation of Llama's feed-forward layer (Shazeer, 2020, arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from srcfast_kernels.homes import Home, accumulator, home_of

BLOCK = 1024  # values that a program of a kernel takes


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; backward recomputes silu instead of storing it. [..., I] each."""
    return _SwiGLU.apply(gate, up, home_of(gate))


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` by its definition."""
    return gate * torch.sigmoid(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, home: Home) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.home = home
        if home == "triton":
            return _swiglu_triton(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        (gradient,) = gradients
        if ctx.home == "triton":
            return *_swiglu_backward_triton(gradient, gate, up), None
        grad_up = gradient * F.silu(gate)
        return torch.ops.aten.silu_backward(gradient * up, gate), grad_up, None


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, count, ACC: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    gate = tl.load(gate_ptr + places, mask=inside, other=0.0).to(ACC)
    up = tl.load(up_ptr + places, mask=inside, other=0.0).to(ACC)
    tl.store(out_ptr + places, (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    gradient_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, count, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    gradient = tl.load(gradient_ptr + places, mask=inside, other=0.0).to(ACC)
    gate = tl.load(gate_ptr + places, mask=inside, other=0.0).to(ACC)
    up = tl.load(up_ptr + places, mask=inside, other=0.0).to(ACC)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    grad_gate = gradient * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_up_ptr + places, (gradient * gate * sigmoid).to(grad_up_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_gate_ptr + places, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)


def _swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if grid := triton.cdiv(out.numel(), BLOCK):
        swiglu_kernel[(grid,)](gate, up, out, out.numel(), ACC=accumulator(gate.dtype), BLOCK=BLOCK)
    return out


def _swiglu_backward_triton(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    gradient, gate, up = gradient.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    if grid := triton.cdiv(gate.numel(), BLOCK):
        swiglu_backward_kernel[(grid,)](
            gradient, gate, up, grad_gate, grad_up, gate.numel(), ACC=accumulator(gate.dtype), BLOCK=BLOCK
        )
    return grad_gate, grad_up
