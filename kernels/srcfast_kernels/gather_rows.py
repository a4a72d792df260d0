"""Gather rows of two tensors by one index; sum their gradients over the copies in a fixed order, without atomics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from srcfast_kernels.backends import accumulator, backend_for

BLOCK = 1024  # columns of a program
TILE = 4096  # values that a program copies at a time: narrow rows are taken several together
COPIES = 4  # of a row that are read at once, so that a much shared row doesn't wait for each of its copies in turn


@dataclass(frozen=True)
class RowCopies:
    """The rows to gather, and the positions of each row's copies, so that backward needs no atomics.

    `index` is [K] int32: the row that each gathered row copies. Row t's copies are the gathered rows
    `places[starts[t]:starts[t + 1]]`, ascending; `starts` is [T + 1] and `places` [K], both int32.
    """

    index: Tensor
    starts: Tensor
    places: Tensor

    @classmethod
    def of(cls, index: Tensor, rows: int) -> RowCopies:
        """Build them from an index [K] into `rows` rows. Some rows may have no copy."""
        starts = torch.zeros(rows + 1, dtype=torch.int32, device=index.device)
        torch.cumsum(torch.bincount(index, minlength=rows), 0, out=starts[1:])
        return cls(index.int(), starts, index.sort(stable=True).indices.int())


def gather_rows(keys: Tensor, values: Tensor, copies: RowCopies) -> tuple[Tensor, Tensor]:
    """Return keys[index] and values[index], both [T, H, d] -> [K, H, d]; differentiable.

    A row's gradient is the sum over its copies in the order of `copies.places`, in fp32 (fp64 for fp64), rounded once.
    """
    backend = backend_for(keys)
    if backend == "reference":
        return gather_rows_reference(keys, copies.index), gather_rows_reference(values, copies.index)
    function = _GatherRowsTriton if backend == "triton" else _GatherRows
    return function.apply(keys, values, copies)


def gather_rows_reference(x: Tensor, index: Tensor) -> Tensor:
    """Gather one tensor as `gather_rows` does, its gradient left to autograd."""
    return x[index]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor, copies: RowCopies) -> tuple[Tensor, Tensor]:
        ctx.copies = copies
        return keys.index_select(0, copies.index), values.index_select(0, copies.index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return _sum_copies(gradients[0], ctx.copies), _sum_copies(gradients[1], ctx.copies), None


def _sum_copies(gradient: Tensor, copies: RowCopies) -> Tensor:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    ordered = gradient.index_select(0, copies.places).to(wide)
    summed = torch.segment_reduce(ordered, "sum", offsets=copies.starts, axis=0, initial=0)
    return summed.to(gradient.dtype)


@triton.jit
def gather_rows_kernel(
    keys_ptr,
    values_ptr,
    index_ptr,
    out_keys_ptr,
    out_values_ptr,
    keys_stride,
    values_stride,
    num_rows,
    row_size,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gather some columns of some rows (a program)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None]
    inside = (row < num_rows) & (column < row_size)
    source = tl.load(index_ptr + row, mask=row < num_rows, other=0).to(tl.int64)
    keys = tl.load(keys_ptr + source * keys_stride + column, mask=inside)
    values = tl.load(values_ptr + source * values_stride + column, mask=inside)
    offset = row.to(tl.int64) * row_size + column
    tl.store(out_keys_ptr + offset, keys, mask=inside)
    tl.store(out_values_ptr + offset, values, mask=inside)


@triton.jit
def gather_rows_backward_kernel(
    gradient_keys_ptr,
    gradient_values_ptr,
    starts_ptr,
    places_ptr,
    out_keys_ptr,
    out_values_ptr,
    keys_stride,
    values_stride,
    row_size,
    ACC: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum some columns of one row (a program): it alone reads the row's copies and writes their sum."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < row_size
    keys = tl.zeros((BLOCK,), ACC)
    values = tl.zeros((BLOCK,), ACC)
    end = tl.load(starts_ptr + row + 1)
    for begin in range(tl.load(starts_ptr + row), end, COPIES):
        copy = begin + tl.arange(0, COPIES)
        position = tl.load(places_ptr + copy, mask=copy < end, other=0).to(tl.int64)[:, None]
        present = (copy < end)[:, None] & inside[None]
        part = tl.load(gradient_keys_ptr + position * keys_stride + column[None], mask=present, other=0.0)
        keys += tl.sum(part.to(ACC), 0)
        part = tl.load(gradient_values_ptr + position * values_stride + column[None], mask=present, other=0.0)
        values += tl.sum(part.to(ACC), 0)
    out = row * row_size + column
    tl.store(out_keys_ptr + out, keys.to(out_keys_ptr.dtype.element_ty), mask=inside)
    tl.store(out_values_ptr + out, values.to(out_values_ptr.dtype.element_ty), mask=inside)


class _GatherRowsTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor, copies: RowCopies) -> tuple[Tensor, Tensor]:
        ctx.copies = copies
        count, inner = len(copies.index), keys.shape[1:]
        out_keys, out_values = keys.new_empty(count, *inner), values.new_empty(count, *inner)
        keys, values = _flat(keys), _flat(values)
        row_size = keys.shape[1]
        block = min(BLOCK, triton.next_power_of_2(row_size))
        rows = min(TILE // block, triton.next_power_of_2(count))
        if out_keys.numel():
            gather_rows_kernel[(triton.cdiv(count, rows), triton.cdiv(row_size, block))](
                keys,
                values,
                copies.index,
                out_keys,
                out_values,
                keys.stride(0),
                values.stride(0),
                count,
                row_size,
                ROWS=rows,
                BLOCK=block,
                num_warps=4,
            )
        return out_keys, out_values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        copies: RowCopies = ctx.copies
        rows, inner = len(copies.starts) - 1, gradients[0].shape[1:]
        grad_keys, grad_values = (part.new_empty(rows, *inner) for part in gradients)
        keys, values = (_flat(part) for part in gradients)
        row_size = keys.shape[1]
        block = min(BLOCK, triton.next_power_of_2(row_size))
        if grad_keys.numel():
            gather_rows_backward_kernel[(rows, triton.cdiv(row_size, block))](
                keys,
                values,
                copies.starts,
                copies.places,
                grad_keys,
                grad_values,
                keys.stride(0),
                values.stride(0),
                row_size,
                ACC=accumulator(keys.dtype),
                COPIES=COPIES,
                BLOCK=block,
                num_warps=backward_warps(block),
            )
        return grad_keys, grad_values, None


def backward_warps(block: int) -> int:
    """Return so few warps that a thread holds eight columns of all copies, and their sum needs no other thread."""
    return max(1, block // 256)


def _flat(x: Tensor) -> Tensor:
    """Reshape [n, H, d] to [n, H * d] with contiguous rows: a view wherever only the distance between rows is unusual."""
    flat = x.flatten(1)
    return flat if flat.stride(1) == 1 else flat.contiguous()
