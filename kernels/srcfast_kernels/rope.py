"""Apply rotary position embedding, halves rotated as in Llama (Su et al., 2021, arXiv 2104.09864)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from srcfast_kernels.backends import Backend, accumulator, backend_for

HEADS = 8  # that a program of the kernel turns


def rope(x: Tensor, cos: Tensor, sin: Tensor, mrope_sections: Sequence[int] | None = None) -> Tensor:
    """Turn each pair (x_i, x_{i + d/2}) by its position's angle.

    Args:
        x: [T, H, d].
        cos, sin: [T, d], the angles of d/2 frequencies twice over; or [3, T, d] (time, height, width) for Qwen's
            multimodal RoPE. They are constants: they get no gradient.
        mrope_sections: how many of the d/2 frequencies take time, height and width; needed with three sets of angles.

    Raises:
        ValueError: three sets of angles without sections, or sections without three sets.
    """
    if (cos.ndim == 3) != (mrope_sections is not None):
        raise ValueError(
            f"mrope_sections: expected with angles [3, T, d] and only there, found {mrope_sections} and {tuple(cos.shape)}"
        )
    if mrope_sections is not None:
        cos, sin = (_by_section(angles, mrope_sections) for angles in (cos, sin))
    return _RoPE.apply(x, cos, sin, backend_for(x))


def _by_section(angles: Tensor, sections: Sequence[int]) -> Tensor:
    parts = angles.split([*sections, *sections], dim=-1)
    return torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute `rope` as a product of complex numbers."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos[:, None, :half], sin[:, None, :half])
    return torch.cat((turned.real, turned.imag), dim=-1)


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, backend: Backend) -> Tensor:
        ctx.save_for_backward(cos, sin)  # not x: a rotation's gradient is turned back
        ctx.turn = _turn_triton if backend == "triton" else _turn
        return ctx.turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return ctx.turn(gradients[0], cos, sin, -1.0), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    half = x.shape[-1] // 2
    sin = sin[:, None]
    turned = x * cos[:, None]
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return turned


@triton.jit
def rope_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    token_stride,
    head_stride,
    heads,
    half,
    DIRECTION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Turn some heads of one token (a program); their angles are the same."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    dim = tl.arange(0, BLOCK_HALF)[None]
    inside = (head < heads) & (dim < half)
    cos = tl.load(cos_ptr + token * 2 * half + dim, mask=dim < half, other=0.0).to(ACC)
    sin = tl.load(sin_ptr + token * 2 * half + dim, mask=dim < half, other=0.0).to(ACC) * DIRECTION
    x_ptr += token * token_stride + head * head_stride + dim
    real = tl.load(x_ptr, mask=inside, other=0.0).to(ACC)
    imaginary = tl.load(x_ptr + half, mask=inside, other=0.0).to(ACC)
    out_ptr += (token * heads + head) * 2 * half + dim
    tl.store(out_ptr, (real * cos - imaginary * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + half, (imaginary * cos + real * sin).to(out_ptr.dtype.element_ty), mask=inside)


def _turn_triton(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    tokens, heads, size = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_heads = min(HEADS, triton.next_power_of_2(heads))
    if tokens:
        rope_kernel[(tokens, triton.cdiv(heads, block_heads))](
            x,
            cos.contiguous(),
            sin.contiguous(),
            out,
            x.stride(0),
            x.stride(1),
            heads,
            size // 2,
            DIRECTION=direction,
            ACC=accumulator(x.dtype),
            BLOCK_HEADS=block_heads,
            BLOCK_HALF=triton.next_power_of_2(size // 2),
            num_warps=2,
        )
    return out
