"""Triton's interpreter on the memory of the simulated device: no copies of arguments, bf16 as a GPU computes it.

The interpreter keeps bf16 as 16-bit integers: casts, arithmetic and `tl.dot` on it go through fp32 here, rounded to nearest even.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from simulated_cuda import record


def install(native: types.ModuleType) -> None:
    """Let kernels that were launched on simulated CUDA tensors be interpreted; on CPU tensors they are refused."""
    _install_launches(native, interpreter.GridExecutor)
    _install_bf16(interpreter.InterpreterBuilder, interpreter.TensorHandle)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value


def _install_launches(native: types.ModuleType, executor: Any) -> None:
    run = executor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        name = self.fn.__name__
        tensors = list(_tensors([*args, *kwargs.values()]))
        if len({tensor.device for tensor in tensors}) > 1 or any(not tensor.is_cuda for tensor in tensors):
            devices = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
            raise ValueError(
                f"Pointer argument cannot be accessed from Triton (cpu tensor?): kernel {name} on {devices}"
            )
        record.note("launch", name)
        if native.is_capturing():
            native.record_python(lambda: run(self, *args, **kwargs), tensors)
        else:
            for tensor in tensors:
                native.use(tensor, True, name)
        run(self, *args, **kwargs)

    executor._init_args_hst = lambda self, args, kwargs: (list(args), dict(kwargs))
    executor._restore_args_dev = lambda *args: None
    executor.__call__ = launch


def _widened(bits: np.ndarray) -> np.ndarray:
    """bf16 bits -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrowed(values: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bits, to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def _is_bf16(handle: Any) -> bool:
    return getattr(handle.dtype, "scalar", None) == tl.bfloat16


def _install_bf16(builder: Any, handle_of: Any) -> None:
    cast, binary, unary, dot, fp_to_fp = (
        builder.cast_impl,
        builder.binary_op,
        builder.unary_op,
        builder.create_dot,
        builder.create_fp_to_fp,
    )

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        before, after = source.dtype.scalar, to.scalar
        if before == tl.bfloat16 and after != tl.bfloat16:
            return cast(self, handle_of(_widened(source.data), tl.float32), to)
        if after == tl.bfloat16 and before != tl.bfloat16:
            return handle_of(_narrowed(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, to)

    def binary_op(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if not (_is_bf16(left) and _is_bf16(right)):
            return binary(self, left, right, operation)
        result = operation(_widened(left.data), _widened(right.data))
        return handle_of(result if result.dtype == bool else _narrowed(result), tl.bfloat16)

    def unary_op(self: Any, value: Any, operation: Any) -> Any:
        if _is_bf16(value):
            return handle_of(_narrowed(operation(_widened(value.data))), tl.bfloat16)
        return unary(self, value, operation)

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        a, b = (handle_of(_widened(x.data), tl.float32) if _is_bf16(x) else x for x in (a, b))
        return dot(self, a, b, accumulator, *options)

    def create_fp_to_fp(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, to.scalar):
            return cast_impl(self, source, to)
        return fp_to_fp(self, source, to, rounding)

    builder.cast_impl, builder.binary_op, builder.unary_op = cast_impl, binary_op, unary_op
    builder.create_dot, builder.create_fp_to_fp = create_dot, create_fp_to_fp
