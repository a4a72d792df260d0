"""Compute linears with LoRA adapters (Hu et al., 2021, arXiv 2106.09685): y_i = x W_i^T + bias_i + scaling_i (x A_i^T) B_i^T.

Those of one input (q, k and v; gate and up) go together: their A are one product, and in backward so are the gradients of the A,
while the gradient of x is summed by the products themselves. Of the base nothing is saved but the frozen weight. The adapter's
gradient needs its input, but that is cheap to have again where a layer computes it from what is saved anyway: the norm before q,
k and v (gate and up) from the norm's input, and the gated activation before down from gate and up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from srcfast_kernels.backends import Backend, backend_for
from srcfast_kernels.cpu_products import add_product, product, thin_product
from srcfast_kernels.nf4 import NF4Weight, nf4_dequantize
from srcfast_kernels.nf4_linear import frozen_linear
from srcfast_kernels.rms_norm import rms_norm_backward, rms_norm_forward, rms_norm_reference
from srcfast_kernels.swiglu import swiglu_backward, swiglu_forward, swiglu_reference


@dataclass(frozen=True)
class Adapted:
    """A frozen linear, weight [out, in] in whole or 4-bit numbers and bias [out], and its adapter: A [r, in], B [out, r]."""

    weight: Tensor | NF4Weight
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float


class Norm(NamedTuple):
    """An RMS normalisation whose weight [in] is frozen."""

    weight: Tensor
    eps: float


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """Compute x W^T + bias + scaling (x A^T) B^T. x: [T, in], weight: [out, in], A: [r, in], B: [out, r].

    For a frozen weight nothing is saved for a weight gradient; the adapter's needs x, which it shares with its neighbours,
    and x A^T [T, r]. An adapter of another type than x's is taken in x's.
    """
    lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    if backend_for(x) == "reference":
        return lora_linear_reference(x, weight, bias, lora_a, lora_b, scaling)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return torch.addmm(F.linear(x, weight, bias), x @ lora_a.T, lora_b.T, alpha=scaling)
    return lora_linears(x, [Adapted(weight, bias, lora_a, lora_b, scaling)])[0]


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """Compute `lora_linear` with the merged weight."""
    return F.linear(x, weight + scaling * lora_b @ lora_a, bias)


def lora_linears(x: Tensor, linears: Sequence[Adapted], norm: Norm | None = None) -> tuple[Tensor, ...]:
    """Compute the outputs [T, out_i] of several adapted linears of one input [T, in]; all in x's dtype.

    With a norm, x is normalised first, and saved as it was before: the layer has that anyway.
    """
    backend = backend_for(x)
    if backend == "reference":
        normed = x if norm is None else rms_norm_reference(x, norm.weight, norm.eps)
        return tuple(_reference(normed, linear) for linear in linears)
    bases = [(linear.weight, linear.bias, linear.scaling) for linear in linears]
    return _LoRALinears.apply(
        x, norm, backend, bases, *(linear.lora_a for linear in linears), *(linear.lora_b for linear in linears)
    )


def swiglu_lora_linear(gate: Tensor, up: Tensor, down: Adapted) -> Tensor:
    """Compute the adapted linear [T, out] of silu(gate) * up, both [T, in]; gate and up are saved, their product is not."""
    backend = backend_for(gate)
    if backend == "reference":
        return _reference(swiglu_reference(gate, up), down)
    return _SwiGLULoRALinear.apply(gate, up, backend, down.weight, down.bias, down.scaling, down.lora_a, down.lora_b)


def _reference(x: Tensor, adapted: Adapted) -> Tensor:
    return lora_linear_reference(
        x, _whole(adapted.weight, x.dtype), adapted.bias, adapted.lora_a, adapted.lora_b, adapted.scaling
    )


def _whole(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] in the type of products, which under autocast isn't the weight's."""
    return (weight if isinstance(weight, Tensor) else nf4_dequantize(weight)).to(dtype)


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Norm | None,
        backend: Backend,
        bases: list[tuple[Tensor | NF4Weight, Tensor | None, float]],
        *adapters: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(bases)
        downs, ups = adapters[:count], adapters[count:]
        normed, inverse = (x, None) if norm is None else rms_norm_forward(x, norm.weight, norm.eps, backend)
        low = thin_product(normed, torch.cat(downs).T)  # [T, sum of r]
        ranks = [len(down) for down in downs]
        outputs = []
        for (weight, bias, scaling), up, part in zip(bases, ups, low.split(ranks, dim=-1), strict=True):
            outputs.append(frozen_linear(normed, weight, bias).addmm_(part, up.to(part.dtype).T, alpha=scaling))
        ctx.save_for_backward(x, inverse, low, *adapters)
        ctx.norm, ctx.backend, ctx.bases, ctx.ranks = norm, backend, bases, ranks
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, low, *adapters = ctx.saved_tensors
        count = len(ctx.bases)
        needs_x, _, _, _, *needed = ctx.needs_input_grad
        downs, ups = adapters[:count], adapters[count:]
        grad_low = torch.empty_like(low)
        grad_x, grad_ups = None, []
        parts = zip(
            gradients,
            ctx.bases,
            ups,
            low.split(ctx.ranks, -1),
            grad_low.split(ctx.ranks, -1),
            needed[count:],
            strict=True,
        )
        for gradient, (weight, _, scaling), up, part, grad_part, needs_up in parts:
            torch.mul(thin_product(gradient, up.to(gradient.dtype)), scaling, out=grad_part)
            grad_ups.append(scaling * thin_product(gradient.T, part) if needs_up else None)
            if needs_x:
                whole = _whole(weight, gradient.dtype)
                grad_x = product(gradient, whole) if grad_x is None else add_product(grad_x, gradient, whole)
        if grad_x is not None:
            grad_x.addmm_(grad_low, torch.cat(downs).to(grad_x.dtype))
        grad_downs: Sequence[Tensor | None] = [None] * count
        if any(needed[:count]):
            normed = x if ctx.norm is None else rms_norm_forward(x, ctx.norm.weight, ctx.norm.eps, ctx.backend)[0]
            grad_downs = product(grad_low.T, normed.to(grad_low.dtype)).split(ctx.ranks)
        if grad_x is not None and ctx.norm is not None:
            grad_x, _ = rms_norm_backward(grad_x, x, ctx.norm.weight, inverse, False, ctx.backend)
        return (grad_x, None, None, None, *grad_downs, *grad_ups)


class _SwiGLULoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        backend: Backend,
        weight: Tensor | NF4Weight,
        bias: Tensor | None,
        scaling: float,
        lora_a: Tensor,
        lora_b: Tensor,
    ) -> Tensor:
        x = swiglu_forward(gate, up, backend)  # [T, in]
        low = thin_product(x, lora_a.T)  # [T, r]
        ctx.save_for_backward(gate, up, low, lora_a, lora_b)
        ctx.backend, ctx.weight, ctx.scaling = backend, weight, scaling
        return frozen_linear(x, weight, bias).addmm_(low, lora_b.to(low.dtype).T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients  # [T, out]
        gate, up, low, lora_a, lora_b = ctx.saved_tensors
        lora_a, lora_b = lora_a.to(gradient.dtype), lora_b.to(gradient.dtype)  # wider under autocast
        grad_low = thin_product(gradient, lora_b).mul_(ctx.scaling)
        grad_b = thin_product(gradient.T, low).mul_(ctx.scaling)
        grad_x = product(gradient, _whole(ctx.weight, gradient.dtype)).addmm_(grad_low, lora_a)  # [T, in]
        grad_gate, grad_up, x = swiglu_backward(grad_x, gate, up, ctx.backend, again=True)
        assert x is not None  # asked for again
        return grad_gate, grad_up, None, None, None, None, product(grad_low.T, x.to(gradient.dtype)), grad_b
