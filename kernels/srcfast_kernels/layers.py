"""The decoder's small operations: RMS normalisation, rotary embedding, SwiGLU, and a linear with a LoRA adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019). x: [..., D], weight: [D]."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`rms_norm` by its definition."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope(x: Tensor, cos: Tensor, sin: Tensor, mrope_sections: Sequence[int] | None = None) -> Tensor:
    """Rotary position embedding, halves rotated as in Llama (Su et al., 2021).

    Args:
        x: [T, H, d].
        cos, sin: [T, d], or [3, T, d] (time, height, width) for Qwen's multimodal RoPE.
        mrope_sections: how many of the d/2 frequencies take time, height and width; needed with three sets of angles.
    """
    if mrope_sections is not None:
        cos, sin = (_by_section(angles, mrope_sections) for angles in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * cos[:, None] + rotated * sin[:, None]


def _by_section(angles: Tensor, sections: Sequence[int]) -> Tensor:
    parts = angles.split([*sections, *sections], dim=-1)
    return torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope` as a product of complex numbers."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos[:, None, :half], sin[:, None, :half])
    return torch.cat((turned.real, turned.imag), dim=-1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020); backward recomputes silu instead of storing it. [..., I] each."""
    return _SwiGLU.apply(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` by its definition."""
    return gate * torch.sigmoid(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        (gradient,) = gradients
        grad_up = gradient * F.silu(gate)
        return torch.ops.aten.silu_backward(gradient * up, gate), grad_up


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """x W^T + bias + scaling (x A^T) B^T (Hu et al., 2021). x: [T, in], weight: [out, in], A: [r, in], B: [out, r].

    For a frozen weight nothing is kept for a weight gradient; the adapter's needs x, which it shares with its neighbours.
    """
    return torch.addmm(F.linear(x, weight, bias), x @ lora_a.T, lora_b.T, alpha=scaling)


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """`lora_linear` with the merged weight."""
    return F.linear(x, weight + scaling * lora_b @ lora_a, bias)
