"""Names out of settings and data that become names of files and folders."""

from __future__ import annotations

import unicodedata

DEVICES = {"AUX", "CON", "NUL", "PRN", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))}
MAX_BYTES = 200  # a file system's names have 255 bytes; endings and temporary names add some


def check_file_name(name: str) -> str:
    """Return the name. Raises ValueError where it leads elsewhere, or is no name of a file on every system."""
    ends = f"{name[:1]}{name[-1:]}"
    is_device = name.partition(".")[0].strip().upper() in DEVICES
    if (
        not (name and name.isprintable())
        or {*name} & {*"/\\"}
        or {*ends} & {*". "}
        or len(name.encode()) > MAX_BYTES
        or is_device
    ):
        expected = (
            f"names without '/', '\\', control characters, dots or spaces at an end, of at most {MAX_BYTES} bytes"
        )
        raise ValueError(f"expected {expected}, none of a device (CON, NUL, ...): they name files; found {name[:80]!r}")
    return name


def as_stored(name: str) -> str:
    """Return the form in which two names are one to some file system: without case, in one of Unicode's forms."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
