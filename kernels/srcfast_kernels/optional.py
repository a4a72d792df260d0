"""Import packages that are not required: usable only where the import of what is called succeeds.

That a package can be located says little: its library may be built for another PyTorch or CUDA, and another distribution may
fill its namespace (flash-attn 4 brings `flash_attn.cute` and no `flash_attn/__init__.py`).
"""

from __future__ import annotations

import importlib
from functools import cache


@cache
def import_failure(module: str, name: str) -> str | None:
    """Import `name` from `module`, once a process. Returns None, or in one line why it can't be imported.

    Any exception counts: a foreign library raises OSError, RuntimeError or AttributeError as well as ImportError.
    """
    try:
        getattr(importlib.import_module(module), name)
    except Exception as error:
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text[:300]}"
    return None
