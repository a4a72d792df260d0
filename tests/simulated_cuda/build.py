"""Compile native/device.cpp once, and load it."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).parent
NAME = "simulated_device"
FLAGS = ("-O1", "-g0", "-std=c++20", "-w", "-shared", "-fPIC", f"-DTORCH_EXTENSION_NAME={NAME}")


class Unavailable(Exception):
    """The simulated device cannot be used here; the message says why."""


def unavailable_reason() -> str | None:
    """Why this PyTorch cannot have a simulated CUDA device, or None."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        return f"PyTorch {torch.__version__} has CUDA kernels of its own; the simulated device needs a CPU build"
    if sys.platform != "linux":
        return f"it is built for Linux, not for {sys.platform}"
    if shutil.which(_compiler()) is None:
        return f"no C++ compiler ({_compiler()}) to build it with"
    return None


def load_native() -> ModuleType:
    """Load the compiled device; compile it first where no library of these sources and this PyTorch is in the cache.

    Raises:
        Unavailable: it cannot be compiled here.
    """
    reason = unavailable_reason()
    if reason is not None:
        raise Unavailable(reason)
    library = _cache_directory() / f"{NAME}-{_digest()}.so"
    if not library.exists():
        with open(library.with_suffix(".lock"), "w") as lock:  # several test processes start at once
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _compile(library)
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _cache_directory() -> Path:
    """`build/` of the clone, or a folder of this user's where the clone cannot be written to."""
    directory = HERE.parents[1] / "build" / "simulated_cuda"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
    except OSError:
        pass
    directory = Path(tempfile.gettempdir()) / f"simulated_cuda-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def _digest() -> str:
    digest = hashlib.sha256(f"{torch.__version__} {sys.version} {_compiler()} {FLAGS}".encode())
    for source in sorted((HERE / "native").iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(library: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    partial = library.with_suffix(f".{os.getpid()}.partial")
    command = [
        _compiler(),
        *FLAGS,
        *(f"-I{directory}" for directory in (*include_paths(), sysconfig.get_paths()["include"])),
        str(HERE / "native" / "device.cpp"),
        "-o",
        str(partial),
        *(f"-L{directory}" for directory in library_paths()),
        *("-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        raise Unavailable(f"PyTorch {torch.__version__}: it does not compile: {' | '.join(lines[:3])}")
    partial.rename(library)
