"""Matrix products whose result has another type than their operands (`out_dtype`), which PyTorch has for CUDA alone."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from simulated_cuda.memory_view import host

OPERATORS = ("mm", "bmm", "addmm", "baddbmm")


def register_products(native: types.ModuleType) -> torch.library.Library:
    """Register `aten::mm.dtype` and its kin: half-precision operands, a result in fp32. Keep the result."""
    library = torch.library.Library("aten", "IMPL")
    for name in OPERATORS:
        library.impl(f"{name}.dtype", _kernel(native, name, with_out=False), "CUDA")
        library.impl(f"{name}.dtype_out", _kernel(native, name, with_out=True), "CUDA")
    return library


def _kernel(native: types.ModuleType, name: str, with_out: bool) -> Any:
    operands = 3 if "add" in name else 2

    def kernel(*args: Any, beta: float = 1, alpha: float = 1, out: Tensor | None = None) -> Tensor:
        tensors, out_dtype = list(args[:operands]), args[operands]
        a, b = tensors[-2:]
        if a.dtype != b.dtype or a.device != b.device or not a.is_cuda:
            raise RuntimeError(f"{name} (simulated): expected two CUDA operands of one type and device")
        if out_dtype != a.dtype and not (out_dtype == torch.float32 and a.dtype in (torch.float16, torch.bfloat16)):
            raise RuntimeError(f"{name} (simulated): out_dtype must be float32 or the operands' type, not {out_dtype}")
        shape = (*a.shape[:-1], b.shape[-1])
        if out is None:
            out = torch.empty(shape, dtype=out_dtype, device=a.device)
        if tuple(out.shape) != shape or out.dtype != out_dtype:
            raise RuntimeError(f"{name} (simulated): out is {tuple(out.shape)} of {out.dtype}")

        if name == "baddbmm" and tuple(tensors[0].shape) != shape:
            raise RuntimeError(
                f"baddbmm (simulated): self must have the same shape as the output, not {tuple(tensors[0].shape)}"
            )
        # Views of the memory: a tape that held the tensors would keep a graph's pool from handing their memory out again.
        views, result = [host(tensor) for tensor in tensors], host(out)

        def run() -> None:
            product = torch.matmul(views[-2].float(), views[-1].float()) * alpha
            if operands == 3 and beta != 0:
                product = product + beta * views[0].float()
            result.copy_(product)

        if native.is_capturing():
            native.record_python(run, [*tensors, out])
        run()
        return out

    return kernel
