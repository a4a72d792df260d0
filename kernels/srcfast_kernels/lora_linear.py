"""Linears with LoRA adapters beside them (Hu et al., 2021, arXiv 2106.09685): y_i = x W_i^T + bias_i + scaling_i (x A_i^T) B_i^T.

Those of one input (q, k and v; gate and up) go together: their A are one product, and in backward so are the gradients of the A,
while the gradient of x is summed by the products themselves. Of the base nothing is kept but the frozen weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from srcfast_kernels.nf4 import NF4Weight, nf4_dequantize
from srcfast_kernels.nf4_linear import frozen_linear


@dataclass(frozen=True)
class Adapted:
    """A frozen linear, weight [out, in] in whole or 4-bit numbers and bias [out], and its adapter: A [r, in], B [out, r]."""

    weight: Tensor | NF4Weight
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """x W^T + bias + scaling (x A^T) B^T. x: [T, in], weight: [out, in], A: [r, in], B: [out, r].

    For a frozen weight nothing is kept for a weight gradient; the adapter's needs x, which it shares with its neighbours,
    and x A^T [T, r].
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return torch.addmm(F.linear(x, weight, bias), x @ lora_a.T, lora_b.T, alpha=scaling)
    return lora_linears(x, [Adapted(weight, bias, lora_a, lora_b, scaling)])[0]


def lora_linears(x: Tensor, linears: Sequence[Adapted]) -> tuple[Tensor, ...]:
    """Outputs [T, out_i] of several adapted linears of one input [T, in]; all in x's dtype."""
    bases = [(one.weight, one.bias, one.scaling) for one in linears]
    return _LoRALinears.apply(x, bases, *(one.lora_a for one in linears), *(one.lora_b for one in linears))


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """`lora_linear` with the merged weight."""
    return F.linear(x, weight + scaling * lora_b @ lora_a, bias)


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bases: list[tuple[Tensor | NF4Weight, Tensor | None, float]], *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(bases)
        downs, ups = adapters[:count], adapters[count:]
        low = x @ torch.cat(downs).T  # [T, sum of r]
        ranks = [len(down) for down in downs]
        outputs = []
        for (weight, bias, scaling), up, part in zip(bases, ups, low.split(ranks, dim=-1), strict=True):
            outputs.append(frozen_linear(x, weight, bias).addmm_(part, up.T, alpha=scaling))
        ctx.save_for_backward(x, low, *adapters)
        ctx.bases, ctx.ranks = bases, ranks
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, low, *adapters = ctx.saved_tensors
        count = len(ctx.bases)
        needs_x, _, *needed = ctx.needs_input_grad
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
            torch.mul(gradient @ up, scaling, out=grad_part)
            grad_ups.append(scaling * (gradient.T @ part) if needs_up else None)
            if needs_x:
                whole = weight if isinstance(weight, Tensor) else nf4_dequantize(weight).to(gradient.dtype)
                grad_x = gradient @ whole if grad_x is None else grad_x.addmm_(gradient, whole)
        if grad_x is not None:
            grad_x.addmm_(grad_low, torch.cat(downs))
        grad_downs: Sequence[Tensor | None] = [None] * count
        if any(needed[:count]):
            grad_downs = (grad_low.T @ x).split(ctx.ranks)
        return (grad_x, None, *grad_downs, *grad_ups)
