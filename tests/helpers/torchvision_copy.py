"""Run a module beside a copy of torchvision: python -m helpers.torchvision_copy COPY MODULE ARGUMENTS

The copy is made by `pip install --no-deps --target COPY torchvision`, so that it replaces no torch. Built for another torch or
CUDA, its library of operators does not load, and its import ends where it describes them; resizing needs none of them.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import torch

# By torch's minor version, which torchvision's follows by 15.
VERSION = f"0.{int(torch.__version__.split('.')[1]) + 15}.*"
DESCRIBED = ("nms", "qnms")  # operators that torchvision's import asks for


def install(directory: Path) -> str | None:
    """Install the copy. Returns pip's last words where it can't be installed."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(directory)]
    result = subprocess.run([*command, f"torchvision=={VERSION}"], capture_output=True, text=True, timeout=300)
    return None if result.returncode == 0 else result.stderr.strip()[-300:]


def main() -> None:
    copy, module, *arguments = sys.argv[1:]
    sys.path.append(copy)
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        torch.ops.load_library(str(Path(copy) / "torchvision" / "_C.so"))
    except OSError:
        for name in DESCRIBED:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
