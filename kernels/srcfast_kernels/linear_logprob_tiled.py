"""Compute `linear_logprob` without logits in device memory, not even a chunk of them: every tile stays on the chip.

The vocabulary is split over programs; each has a running maximum and sum of its part, and the parts are reduced in a fixed
order: no locks, no atomics, the same bits every time. Backward computes each tile once more (three products in all, against
two of the chunked method) and sums its gradients in fp32, one partial a split. For frozen heads only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from srcfast_kernels.backends import accumulator

PROGRAMS = 132  # fewer than this leave multiprocessors of an H100 idle, so the vocabulary is split
PARTIAL_BYTES = 256 << 20  # at most, of the gradient's partials


class Tiles(NamedTuple):
    """The sizes of a program's tile: rows x columns of logits, `depth` of the hidden size at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def tiles_of(dtype: torch.dtype, architecture: int) -> Tiles:
    """Return the largest tiles that no GPU of this architecture (90 for sm_90) spills; fp32 and fp64 are for checks."""
    if dtype not in (torch.bfloat16, torch.float16):
        return Tiles(32, 32, 16, 4, 2)
    return Tiles(128, 64 if architecture >= 100 else 128, 64, 8, 3)


def _tiles(weight: Tensor) -> Tiles:
    major, minor = torch.cuda.get_device_capability(weight.device) if weight.is_cuda else (0, 0)
    return tiles_of(weight.dtype, 10 * major + minor)


def linear_logprob_tiled(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
) -> Tensor:
    """Compute `linear_logprob` [T] for hidden [T, D] and a frozen head [V, D]; arguments as there.

    Raises:
        ValueError: the head or its bias wants a gradient.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("method: expected 'chunked' for a head that is trained, found 'tiled'")
    bias = None if bias is None else bias.contiguous()
    return _Tiled.apply(
        hidden, weight.contiguous(), targets.contiguous(), bias, logit_scale, softcap or 0.0, ignore_index
    )


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float,
        ignore_index: int,
    ) -> Tensor:
        hidden = hidden.contiguous().to(weight.dtype)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        tiles = _tiles(weight)
        splits, columns = _splits(len(hidden), len(weight), tiles)
        parts = torch.empty(3, splits, len(hidden), dtype=dtype, device=hidden.device)  # largest, sum, target's logit
        if len(hidden):
            _launch(tile_forward_kernel, hidden, weight, bias, targets, parts, columns, splits, logit_scale, softcap)
        largest, total, at_target = parts
        top = largest.amax(0)
        lse = top + ((largest - top).exp() * total).sum(0).log()  # [T]
        counted = targets != ignore_index
        ctx.save_for_backward(hidden, weight, bias, targets, lse, counted)
        ctx.head = logit_scale, softcap
        # Rounding may put a certain token a hair above 0; a log-probability never is.
        return (at_target.sum(0) - lse).clamp(max=0.0).where(counted, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, counted = ctx.saved_tensors
        logit_scale, softcap = ctx.head
        rows, size = hidden.shape
        tiles = _tiles(weight)
        splits, columns = _splits(rows, len(weight), tiles, PARTIAL_BYTES // max(1, rows * size * lse.element_size()))
        partial = torch.empty(splits, rows, size, dtype=lse.dtype, device=hidden.device)
        if rows:
            coefficient = gradients[0].to(lse.dtype).where(counted, 0.0) * logit_scale  # [T]
            last = (logit_scale, softcap, lse, coefficient)
            _launch(tile_backward_kernel, hidden, weight, bias, targets, partial, columns, splits, *last)
        return (partial.sum(0).to(hidden.dtype), *[None] * 6)


def _splits(rows: int, vocabulary: int, tiles: Tiles, max_splits: int = PROGRAMS) -> tuple[int, int]:
    """Return the number of parts of the vocabulary, and the columns of each, whole tiles."""
    wanted = max(1, min(PROGRAMS // max(1, triton.cdiv(rows, tiles.rows)), max_splits))
    columns = triton.cdiv(triton.cdiv(vocabulary, wanted), tiles.columns) * tiles.columns
    return triton.cdiv(vocabulary, columns), columns


def _launch(
    kernel: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    out: Tensor,
    columns: int,
    splits: int,
    logit_scale: float,
    softcap: float,
    *more: Tensor,
) -> None:
    rows, size = hidden.shape
    tiles = _tiles(weight)
    kernel[(triton.cdiv(rows, tiles.rows), splits)](
        hidden,
        weight,
        bias,
        targets,
        out,
        *more,
        rows,
        len(weight),
        size,
        columns,
        LOGIT_SCALE=logit_scale,
        SOFTCAP=softcap,
        HAS_BIAS=bias is not None,
        WHOLE=size % tiles.depth == 0,
        ACC=accumulator(hidden.dtype),
        PRECISION="ieee",  # of fp32 products: TF32 has three digits
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


@triton.jit
def tile_forward_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    parts_ptr,
    num_rows,
    vocabulary,
    size,
    split_columns,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,  # 0 for none
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,  # the hidden size is a multiple of DEPTH
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Reduce some rows over a part of the vocabulary (a program): largest logit, sum of exponentials, target's logit."""
    first = tl.program_id(0) * ROWS
    rows = tl.arange(0, ROWS)
    inside_rows = first + rows < num_rows
    near_rows = tl.minimum(rows, num_rows - 1 - first)  # the last row again where there is none: a mask costs registers
    hidden_ptr += first.to(tl.int64) * size  # offsets from here fit 32 bits, which saves registers
    targets_ptr += first
    split = tl.program_id(1)
    end = tl.minimum((split + 1) * split_columns, vocabulary)
    targets = tl.load(targets_ptr + rows, mask=inside_rows, other=-1).to(tl.int32)
    largest = tl.full((ROWS,), float("-inf"), ACC)
    total = tl.zeros((ROWS,), ACC)
    at_target = tl.zeros((ROWS,), ACC)
    for start in range(split * split_columns, end, COLUMNS):
        columns = tl.arange(0, COLUMNS)
        inside = start + columns < end
        near = tl.minimum(columns, end - 1 - start)
        weight_tile = weight_ptr + tl.cast(start, tl.int64) * size
        x = _tile(
            hidden_ptr, weight_tile, bias_ptr, start, near_rows, near, size,
            LOGIT_SCALE, SOFTCAP, HAS_BIAS, WHOLE, ACC, PRECISION, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        at_target += tl.sum(tl.where(columns[None] == (targets - start)[:, None], x, 0.0), 1)
        x = tl.where(inside[None], x, float("-inf"))
        new = tl.maximum(largest, tl.max(x, 1))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new[:, None]), 1)
        largest = new
    parts_ptr += split.to(tl.int64) * num_rows + first + rows
    plane = tl.num_programs(1).to(tl.int64) * num_rows
    tl.store(parts_ptr, largest, mask=inside_rows)
    tl.store(parts_ptr + plane, total, mask=inside_rows)
    tl.store(parts_ptr + 2 * plane, at_target, mask=inside_rows)


@triton.jit
def tile_backward_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    partial_ptr,
    lse_ptr,
    coefficient_ptr,
    num_rows,
    vocabulary,
    size,
    split_columns,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,  # the hidden size is a multiple of DEPTH
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Compute the same tiles again, and sum (onehot - p) W over a part of the vocabulary in the program's partial."""
    first = tl.program_id(0) * ROWS
    rows = tl.arange(0, ROWS)
    inside_rows = first + rows < num_rows
    near_rows = tl.minimum(rows, num_rows - 1 - first)  # the last row again where there is none: a mask costs registers
    hidden_ptr += first.to(tl.int64) * size
    targets_ptr += first
    split = tl.program_id(1)
    end = tl.minimum((split + 1) * split_columns, vocabulary)
    targets = tl.load(targets_ptr + rows, mask=inside_rows, other=-1).to(tl.int32)
    lse = tl.load(lse_ptr + first + rows, mask=inside_rows, other=0.0)
    coefficient = tl.load(coefficient_ptr + first + rows, mask=inside_rows, other=0.0)
    partial_ptr += (split.to(tl.int64) * num_rows + first) * size
    for start in range(split * split_columns, end, COLUMNS):
        columns = tl.arange(0, COLUMNS)
        inside = start + columns < end
        near = tl.minimum(columns, end - 1 - start)
        weight_tile = weight_ptr + tl.cast(start, tl.int64) * size
        x = _tile(
            hidden_ptr, weight_tile, bias_ptr, start, near_rows, near, size,
            LOGIT_SCALE, SOFTCAP, HAS_BIAS, WHOLE, ACC, PRECISION, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        residual = tl.where(columns[None] == (targets - start)[:, None], 1.0, 0.0) - tl.exp(x - lse[:, None])
        if SOFTCAP != 0.0:
            residual *= 1.0 - (x / SOFTCAP) * (x / SOFTCAP)
        residual = tl.where(inside[None], residual * coefficient[:, None], 0.0).to(weight_ptr.dtype.element_ty)
        for begin in range(0, size, DEPTH):
            depth = begin + tl.arange(0, DEPTH)
            inside_depth = True if WHOLE else (depth < size)[None]
            w = tl.load(weight_tile + near[:, None] * size + depth[None], mask=inside_depth, other=0.0)
            pointers = partial_ptr + rows[:, None] * size + depth[None]
            mask = inside_rows[:, None] & inside_depth
            so_far = tl.zeros((ROWS, DEPTH), ACC)
            if start > split * split_columns:
                so_far = tl.load(pointers, mask=mask, other=0.0)
            tl.store(pointers, tl.dot(residual, w, so_far, input_precision=PRECISION, out_dtype=ACC), mask=mask)
        # The next tile's loads of the partial may be other threads' than these stores.
        tl.debug_barrier()


@triton.jit
def _tile(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    start,
    rows,
    columns,
    size,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,  # the hidden size is a multiple of DEPTH
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Compute a tile of logits [ROWS, COLUMNS], scaled and capped."""
    x = tl.zeros((ROWS, COLUMNS), ACC)
    for begin in range(0, size, DEPTH):
        depth = begin + tl.arange(0, DEPTH)
        inside_depth = True if WHOLE else (depth < size)[None]
        h = tl.load(hidden_ptr + rows[:, None] * size + depth[None], mask=inside_depth, other=0.0)
        w = tl.load(weight_ptr + columns[:, None] * size + depth[None], mask=inside_depth, other=0.0)
        x = tl.dot(h, w.T, x, input_precision=PRECISION, out_dtype=ACC)
    if HAS_BIAS:
        x += tl.load(bias_ptr + start + columns).to(ACC)[None]
    x *= LOGIT_SCALE
    if SOFTCAP != 0.0:
        x = SOFTCAP * (2.0 / (1.0 + tl.exp(-2.0 / SOFTCAP * x)) - 1.0)  # tanh; where exp overflows, -1
    return x
