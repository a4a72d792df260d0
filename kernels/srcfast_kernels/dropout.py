"""Dropout whose mask is a function of a row's key, a layer and a column, so that no packing, rank or second run changes it.

A mask's bits are a hash in 32-bit integers, the same by every backend: the row's words from its key and the layer, each by
Wellons' two-round mixer ("lowbias32", https://nullprogram.com/blog/2018/07/31/), then that mixer over the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from srcfast_kernels.backends import Backend, accumulator, backend_for
from srcfast_kernels.cpu_products import product, thin_product

BLOCK = 1024  # columns that a program of the kernel takes
CHUNK_ELEMENTS = 1 << 16  # that the CPU hashes at once, so that its passes stay within a core's cache

FIRST = tl.constexpr(0x7FEB352D)  # lowbias32's multipliers
SECOND = tl.constexpr(0x846CA68B)
SPREAD = tl.constexpr(0x9E3779B9)  # 2^32 over the golden ratio: keeps neighbouring columns apart


def dropout(x: Tensor, keys: Tensor, layer: int, share: float) -> Tensor:
    """Set a share of x to 0 and divide the rest by 1 - share; backward computes the mask again instead of storing it.

    Args:
        x: [T, C].
        keys: [T] int64, well mixed; rows of the same key have the same mask.
        layer: from 0 below 2^31; other layers have other masks.
        share: to drop, from 0 to below 1.
    """
    return _Dropout.apply(x, keys, layer, share, backend_for(x))


def dropout_product(x: Tensor, keys: Tensor, layer: int, share: float, weight: Tensor) -> Tensor:
    """Compute dropout(x) weight^T, [T, r], for a weight [r, C]. It saves x, which linears share, not the masked x."""
    return _DropoutProduct.apply(x, keys, layer, share, weight, backend_for(x))


def dropout_reference(x: Tensor, keys: Tensor, layer: int, share: float) -> Tensor:
    """Compute `dropout` by its definition, in integers of 64 bits, cut to 32 after each step."""
    low, high = keys & 0xFFFFFFFF, (keys >> 32) & 0xFFFFFFFF  # [T] each
    first = _mixed_reference(low + layer & 0xFFFFFFFF)
    second = _mixed_reference(high ^ first)
    columns = torch.arange(x.shape[1], device=x.device) * SPREAD.value & 0xFFFFFFFF  # [C]
    bits = first[:, None] ^ columns  # [T, C]
    bits = ((bits ^ bits >> 16) * FIRST.value & 0xFFFFFFFF) ^ second[:, None]
    bits = (bits ^ bits >> 15) * (SECOND.value - (1 << 32)) & 0xFFFFFFFF
    signed = bits - (bits >> 31 << 32)
    return torch.where(signed >= threshold(share), x * (1.0 / (1.0 - share)), 0.0)


def _mixed_reference(words: Tensor) -> Tensor:
    words = (words ^ words >> 16) * FIRST.value & 0xFFFFFFFF
    words = (words ^ words >> 15) * (SECOND.value - (1 << 32)) & 0xFFFFFFFF  # less 2^32: the product fits into 64 bits
    return words ^ words >> 16


def threshold(share: float) -> int:
    """Return the signed 32-bit number below which a hash means: drop."""
    return round(share * 2**32) - 2**31


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, layer: int, share: float, backend: Backend) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.layer, ctx.share, ctx.backend = layer, share, backend
        return dropped([x], keys, layer, share, backend)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (keys,) = ctx.saved_tensors
        return dropped(gradients, keys, ctx.layer, ctx.share, ctx.backend)[0], None, None, None, None


class _DropoutProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, keys: Tensor, layer: int, share: float, weight: Tensor, backend: Backend
    ) -> Tensor:
        ctx.save_for_backward(x, keys, weight)
        ctx.layer, ctx.share, ctx.backend = layer, share, backend
        return thin_product(dropped([x], keys, layer, share, backend)[0], weight.T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients  # [T, r]
        x, keys, weight = ctx.saved_tensors
        wanted = []
        if ctx.needs_input_grad[0]:
            wanted.append(gradient @ weight.to(gradient.dtype))
        if ctx.needs_input_grad[4]:
            wanted.append(x)
        made = dropped(wanted, keys, ctx.layer, ctx.share, ctx.backend)
        grad_x = made[0] if ctx.needs_input_grad[0] else None
        grad_weight = product(gradient.T, made[-1].to(gradient.dtype)) if ctx.needs_input_grad[4] else None
        return grad_x, None, None, None, grad_weight, None


def dropped(xs: Sequence[Tensor], keys: Tensor, layer: int, share: float, backend: Backend) -> list[Tensor]:
    """Apply `dropout` without a graph to several [T, C] under one mask: to x, or to the gradient of the result."""
    if backend == "reference":
        return [dropout_reference(x, keys, layer, share) for x in xs]
    if backend == "triton":
        return [_dropped_triton(x.contiguous(), keys, layer, share) for x in xs]
    return _dropped(xs, keys, layer, share)


def _dropped(xs: Sequence[Tensor], keys: Tensor, layer: int, share: float) -> list[Tensor]:
    count, size = xs[0].shape
    first, second = _row_words(keys, layer)
    columns = torch.arange(size, dtype=torch.int32, device=keys.device).mul_(_signed(SPREAD))  # [C]
    outs = [torch.empty_like(x) for x in xs]
    rows = max(1, min(count, CHUNK_ELEMENTS // max(1, size)))
    bits, shifted = (torch.empty(rows, size, dtype=torch.int32, device=keys.device) for _ in range(2))
    for start in range(0, count, rows):
        part = slice(start, min(start + rows, count))
        bits, shifted = bits[: part.stop - start], shifted[: part.stop - start]
        torch.bitwise_xor(first[part, None], columns, out=bits)
        _shift_xor(bits, 16, shifted).mul_(FIRST.value).bitwise_xor_(second[part, None])
        _shift_xor(bits, 15, shifted).mul_(_signed(SECOND))
        mask = bits < threshold(share)
        for x, out in zip(xs, outs, strict=True):
            torch.mul(x[part], 1.0 / (1.0 - share), out=out[part]).masked_fill_(mask, 0.0)
    return outs


def _row_words(keys: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Hash each row's key and the layer to two words [T] int32."""
    low, high = (keys << 32 >> 32).int(), (keys >> 32).int()
    first = _mixed(low.add_(layer))
    return first, _mixed(high.bitwise_xor_(first))


def _mixed(words: Tensor) -> Tensor:
    shifted = torch.empty_like(words)
    _shift_xor(words, 16, shifted).mul_(FIRST.value)
    _shift_xor(words, 15, shifted).mul_(_signed(SECOND))
    return _shift_xor(words, 16, shifted)


def _shift_xor(words: Tensor, by: int, shifted: Tensor) -> Tensor:
    """Compute words ^= words >> by in place, unsigned: int32 shifts with its sign, which is masked."""
    torch.bitwise_right_shift(words, by, out=shifted)
    return words.bitwise_xor_(shifted.bitwise_and_((1 << 32 - by) - 1))


def _signed(word: tl.constexpr) -> int:
    return word.value - (1 << 32)


@triton.jit
def dropout_mixed(words):
    words = (words ^ (words >> 16)) * FIRST
    words = (words ^ (words >> 15)) * SECOND
    return words ^ (words >> 16)


@triton.jit
def dropout_kernel(
    x_ptr,
    keys_ptr,
    out_ptr,
    size,
    layer,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Drop values of some columns of one row (a program). Unsigned: shifts bring in zeros, products wrap."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    key = tl.load(keys_ptr + row)
    first = dropout_mixed(key.to(tl.uint32) + layer)
    second = dropout_mixed((key >> 32).to(tl.uint32) ^ first)
    # The mixer again, but for its last shift: that leaves the upper half as it is, which all but decides.
    bits = first ^ (column.to(tl.uint32) * SPREAD)
    bits = ((bits ^ (bits >> 16)) * FIRST) ^ second
    bits = (bits ^ (bits >> 15)) * SECOND
    x = tl.load(x_ptr + row * size + column, mask=inside, other=0.0).to(ACC)
    value = tl.where(bits.to(tl.int32, bitcast=True) >= THRESHOLD, x * SCALE, 0.0)
    tl.store(out_ptr + row * size + column, value.to(out_ptr.dtype.element_ty), mask=inside)


def _dropped_triton(x: Tensor, keys: Tensor, layer: int, share: float) -> Tensor:
    out = torch.empty_like(x)
    rows, size = x.shape
    if x.numel():
        dropout_kernel[(rows, triton.cdiv(size, BLOCK))](
            x,
            keys,
            out,
            size,
            layer,
            THRESHOLD=threshold(share),
            SCALE=1.0 / (1.0 - share),
            ACC=accumulator(x.dtype),
            BLOCK=BLOCK,
        )
    return out
