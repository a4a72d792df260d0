"""Open a file of text as what it is, whatever its name says: plain, or compressed by gzip or Zstandard."""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from pathlib import Path
from typing import IO, Any, TextIO

from srcfast.errors import InputError

MAX_TEXT = 64 << 20  # bytes of one record, and of any text that a small file may be decompressed to
MAX_RATIO = 200  # of a larger text to its compressed file; conversations shrink by 4 to 20
PARQUET, ARROW_FILE, ARROW_STREAM = "a parquet file", "an Arrow file", "an Arrow stream"
GZIP, ZSTANDARD = "a gzip file", "a Zstandard file"
_PEEK = 64
_DOWNLOAD = "fetch the file itself"
# What a file may be instead of text, by its first bytes in lower case, and what to do about it.
_KINDS: dict[bytes, tuple[str, str | None]] = {
    b"par1": (PARQUET, None),
    b"arrow1": (ARROW_FILE, None),
    b"\xff\xff\xff\xff": (ARROW_STREAM, None),
    b"\x1f\x8b": (GZIP, "decompress it"),
    b"\x28\xb5\x2f\xfd": (ZSTANDARD, "decompress it"),
    b"pk\x03\x04": ("a zip archive", "unpack it"),
    b"bzh": ("a bzip2 file", "decompress it"),
    b"\xfd7zxz": ("an xz file", "decompress it"),
    b"\x80\x02": ("a pickle", None),
    b"\x80\x04": ("a pickle", None),
    b"\x93numpy": ("a NumPy array", None),
    b"\x89hdf": ("an HDF5 file", None),
    b"sqlite format 3": ("an SQLite database", None),
    b"\x89png": ("a PNG image", None),
    b"\xff\xd8\xff": ("a JPEG image", None),
    b"%pdf": ("a PDF document", None),
    b"<!doctype html": ("an HTML page", _DOWNLOAD),
    b"<html": ("an HTML page", _DOWNLOAD),
    b"version https://git-lfs": ("a Git LFS pointer", "git lfs pull"),
}


def regular(path: str | Path) -> Path:
    """Return the path if reading it comes to an end, as it may not with a pipe or a device.

    Raises:
        OSError: nothing is there, or a pipe, socket or device. A folder passes: opening it fails at once.
        ValueError: a NUL in the path.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError("a pipe, socket or device: write it into a file first")
    return Path(path)


def kind_of(head: bytes) -> tuple[str, str | None] | None:
    """Return what a file is that begins with these bytes, and what to do about it; None where it may be text."""
    head = head.lower().removeprefix(b"\xef\xbb\xbf").lstrip(b" \r\n")
    return next((kind for magic, kind in _KINDS.items() if head.startswith(magic)), None)


def head_of(path: str | Path, expected: str = "a readable file") -> bytes:
    """Return a file's first bytes. Raises InputError where it can't be read."""
    try:
        with open(regular(path), "rb") as file:
            return file.read(_PEEK)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        found = (isinstance(error, OSError) and error.strerror) or error
        fix = "name the files in it, as in FOLDER/*.parquet" if isinstance(error, IsADirectoryError) else None
        raise InputError(file=path, expected=expected, found=found, fix=fix) from error


def require_pyarrow(path: str | Path, what: str) -> Any:
    """Import pyarrow, with its parquet reader. Raises InputError, with how to install it, where that fails."""
    try:
        import pyarrow.parquet
    except Exception as error:  # as a foreign library, it may raise anything
        fix = "pip install 'srcfast[data]', or write the file as JSON lines"
        raise InputError(file=path, expected=f"pyarrow, which reads {what}", found=error, fix=fix) from error
    return pyarrow


def open_text(path: str | Path, expected: str = "a readable file", newline: str = "\n") -> TextIO:
    """Open a file as UTF-8, decompressed where need be; bytes that are none become halves of surrogate pairs.

    Raises:
        InputError: it can't be read, or is no text; or, while it is read, its compression is broken or it swells without end.
    """
    kind, file = kind_of(head_of(path, expected)), open(path, "rb")
    try:
        if kind is not None and kind[0] in (GZIP, ZSTANDARD):
            file = io.BufferedReader(_Decompressed(path, file, kind[0]), 1 << 16)
            kind = kind_of(file.peek(_PEEK))
        if kind is not None:
            raise InputError(file=path, expected="text in UTF-8", found=kind[0], fix=kind[1])
        return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    except BaseException:
        file.close()
        raise


def check_ratio(path: str | Path, size: int, compressed: int) -> None:
    """Raise InputError where so many bytes of a file would become so many in memory."""
    if size > max(MAX_TEXT, MAX_RATIO * compressed):
        expected = f"at most {MAX_RATIO} times its size once it is decompressed"
        found = f"over {size >> 20} MiB of {compressed:,} bytes"
        raise InputError(file=path, expected=expected, found=found, fix="if you trust it, decompress it")


class _Decompressed(io.RawIOBase):
    """The bytes of a compressed file. Reading raises InputError where it is damaged, or swells without end."""

    def __init__(self, path: str | Path, file: IO[bytes], kind: str) -> None:
        self.path, self.file, self.kind, self.size = path, file, kind, 0
        self.reader: Any = (
            gzip.GzipFile(fileobj=file)
            if kind == GZIP
            else require_pyarrow(path, kind).CompressedInputStream(file, "zstd")
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.reader.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            fix = "fetch or compress it again"
            raise InputError(file=self.path, expected=f"{self.kind} that is whole", found=error, fix=fix) from error
        self.size += len(data)
        check_ratio(self.path, self.size, self.file.tell())
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()
