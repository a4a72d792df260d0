"""Load the native library of csrc/ where it was built; everything works without it."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_native.so")
# In a clone, beside torch; needs a C++ compiler. Without isolation pip installs no build requirement, and a venv of Python 3.11
# comes with setuptools 65, which by itself makes no wheel. torch 2.11 wants it below 82.
BUILD = "pip install 'setuptools>=77,<82' && pip install --no-build-isolation --no-deps --editable ."


@cache
def why_not() -> str | None:
    """Return why `torch.ops.srcfast` is missing, or None where it is loaded. SRCFAST_NATIVE=0 turns it off."""
    if os.environ.get("SRCFAST_NATIVE") == "0":
        return "SRCFAST_NATIVE=0"
    if not LIBRARY.is_file():
        return f"not built: {BUILD}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (
        OSError,
        RuntimeError,
    ) as error:  # built for another platform, or against a torch that this one doesn't serve
        return f"does not load: {error}"
    return None


def available() -> bool:
    """Return whether the native operations can be called."""
    return why_not() is None
