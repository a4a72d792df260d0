"""bitsandbytes' optimizers on the simulated device: its CPU kernels in place of those in its CUDA library.

Its fused 4-bit products stay away, as where its CUDA library cannot be loaded: srcfast has its own way then.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from simulated_cuda.memory_view import host

NAME = "bitsandbytes"
OPERATORS = ("optimizer_update_8bit_blockwise", "optimizer_update_32bit")


def install() -> None:
    """Let `import bitsandbytes` end with the stand-ins in it."""
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != NAME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _stand_in(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _stand_in(module: ModuleType) -> None:
    from bitsandbytes.backends.cpu import ops

    library = torch.library.Library(NAME, "IMPL")
    warnings.filterwarnings("ignore", "Warning only once for all operators")  # that a kernel is replaced is the purpose
    for name in OPERATORS:
        library.impl(name, _on_host(getattr(ops, f"_{name}_cpu")), "CUDA", allow_override=True)
    module.__dict__["_simulated_library"] = library  # the registration ends with the object
    module.functional.get_paged = _get_paged
    module.functional.prefetch_tensor = lambda tensor, to_cpu=False: None


def _on_host(kernel: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> None:
        kernel(*(host(value) if isinstance(value, Tensor) else value for value in args), **kwargs)

    return run


def _get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
    """Memory that the driver moves between host and device: here it stays on the host, as bitsandbytes sees it."""
    paged: Any = torch.zeros(shape, dtype=dtype)
    paged.is_paged, paged.page_deviceid = True, getattr(device, "index", 0)
    return paged
