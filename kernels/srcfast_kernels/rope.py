"""Rotary position embedding, halves rotated as in Llama (Su et al., 2021, arXiv 2104.09864)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor, mrope_sections: Sequence[int] | None = None) -> Tensor:
    """Turn each pair (x_i, x_{i + d/2}) by its position's angle.

    Args:
        x: [T, H, d].
        cos, sin: [T, d], the angles of d/2 frequencies twice over; or [3, T, d] (time, height, width) for Qwen's
            multimodal RoPE. They are constants: they get no gradient.
        mrope_sections: how many of the d/2 frequencies take time, height and width; needed with three sets of angles.
    """
    if mrope_sections is not None:
        cos, sin = (_by_section(angles, mrope_sections) for angles in (cos, sin))
    return _RoPE.apply(x, cos, sin)


def _by_section(angles: Tensor, sections: Sequence[int]) -> Tensor:
    parts = angles.split([*sections, *sections], dim=-1)
    return torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope` as a product of complex numbers."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos[:, None, :half], sin[:, None, :half])
    return torch.cat((turned.real, turned.imag), dim=-1)


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)  # not x: a rotation's gradient is turned back
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradients[0], cos, sin, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    half = x.shape[-1] // 2
    sin = sin[:, None]
    turned = x * cos[:, None]
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return turned
