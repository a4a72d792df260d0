"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

from srcfast.errors import ConfigError

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}


_BINARY = {"k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}


def parse_bytes(text: str, setting: str = "--memory") -> int:
    """`12GiB`, `80 GB`, `500000`: a size in bytes. Raises ConfigError, which names the setting, where it is none."""
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ConfigError(f"{setting}: expected a size such as 12GiB, found {text!r}")
    unit = found[2].lower()
    size = int(float(found[1]) * (_BINARY[unit] if found[3] else _UNITS[unit]))
    if size < 1:
        raise ConfigError(f"{setting}: expected a size above 0, found {text!r}")
    return size


def show_bytes(count: float) -> str:
    """`12.3 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
