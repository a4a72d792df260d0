"""A simulated CUDA device for a CPU build of PyTorch, for tests: see README.md.

`activate()` comes before srcfast and Triton's kernels are imported. It holds for the whole process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from simulated_cuda.record import Record, recording

__all__ = [
    "Record",
    "activate",
    "host",
    "is_active",
    "memory_limit",
    "recording",
    "stand_in_flash_attn",
    "stand_in_xformers",
    "unavailable_reason",
]

VARIABLE = "SIMULATED_CUDA"  # how many devices; set for a whole test run, and for the processes that it starts

_native: ModuleType | None = None
_held: list[Any] = []  # registrations, which end with their objects


def is_active() -> bool:
    """Whether this process has simulated devices."""
    return _native is not None


def unavailable_reason() -> str | None:
    """Why there can be none here, or None."""
    from simulated_cuda.build import unavailable_reason as reason

    return reason()


def activate(devices: int = 1) -> None:
    """Give this process simulated CUDA devices.

    Raises:
        simulated_cuda.build.Unavailable: this PyTorch, or this machine, can't have them; it says why.
    """
    global _native
    if _native is not None:
        return
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    from simulated_cuda import attention, bitsandbytes_stand_in, collectives, products, torch_cuda, triton_interpreter
    from simulated_cuda.build import load_native

    native = load_native()
    torch_cuda.install(native, devices)
    _held.append(attention.register_flash_operators(native))
    _held.append(products.register_products(native))
    collectives.install_nccl(native)
    triton_interpreter.install(native)
    bitsandbytes_stand_in.install()
    _native = native


def native() -> ModuleType:
    """The compiled part."""
    assert _native is not None, "simulated_cuda.activate() comes first"
    return _native


@contextmanager
def memory_limit(size: int, index: int = 0) -> Iterator[None]:
    """Let a device have `size` bytes and no more while the body runs."""
    module, before = native(), native().memory(index)["total"]
    module.set_total(index, size)
    try:
        yield
    finally:
        module.set_total(index, before)


def host(tensor: Any) -> Any:
    """The same memory as a CPU tensor, without a wait."""
    from simulated_cuda.memory_view import host as view

    return view(tensor)


def stand_in_flash_attn() -> Any:
    """A context in which `flash_attn` can be imported."""
    from simulated_cuda.attention import stand_in_flash_attn as stand_in

    return stand_in()


def stand_in_xformers() -> Any:
    """A context in which `xformers` can be imported."""
    from simulated_cuda.attention import stand_in_xformers as stand_in

    return stand_in()
