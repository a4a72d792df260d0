"""Parse and format sizes in bytes: 12GiB, 80 GB."""

from __future__ import annotations

import re

from srcfast.errors import ConfigError

MOST = 1024**5  # bytes
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY = {"k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}


def parse_bytes(text: str, setting: str = "--memory") -> int:
    """Parse a size such as `12GiB`, `80 GB` or `500000` into bytes.

    Raises:
        ConfigError: the text is not a size above 0; the error names `setting`.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise ConfigError(f"{setting}: expected a size such as 12GiB, found {text!r}")
    unit = match[2].lower()
    size = int(float(match[1]) * (_BINARY[unit] if match[3] else _UNITS[unit]))
    if not 1 <= size <= MOST:
        raise ConfigError(f"{setting}: expected a size above 0 and of at most 1024 TiB, found {text!r}")
    return size


def show_bytes(count: float) -> str:
    """Format bytes as `12.3 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
