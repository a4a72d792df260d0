"""What an entry of the corpus is, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srcfast.errors import SrcfastError


@dataclass(frozen=True)
class Case:
    """One malformed input.

    Attributes:
        kind: what is read, a heading of CORPUS.md.
        wrong: what is wrong with it.
        make: writes it below a folder; returns its path.
        act: has the product read it; returns the rows set aside, if it sets rows aside.
        words: what the error says.
    """

    kind: str
    wrong: str
    make: Callable[[Path], Path]
    act: Callable[[Path], Any]
    words: tuple[str, ...] = ()


def ending(case: Case, folder: Path) -> str:
    """The text that the user is told. Any error but SrcfastError comes out; "" where nothing was found wrong."""
    path = case.make(folder)
    try:
        rejected = case.act(path)
    except SrcfastError as error:
        return str(error)
    return "\n".join(row["reason"] for row in rejected) if isinstance(rejected, list) else ""


def file_of(data: bytes | str, name: str) -> Callable[[Path], Path]:
    """Makes a file of these bytes, or of this text in UTF-8."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
        return path

    return make


def folder_of(name: str) -> Callable[[Path], Path]:
    """Makes a folder where a file is expected."""

    def make(folder: Path) -> Path:
        (folder / name).mkdir()
        return folder / name

    return make


def missing(name: str) -> Callable[[Path], Path]:
    """Makes nothing."""
    return lambda folder: folder / name


def changed(row: dict[str, Any], change: dict[str, Any]) -> str:
    """A row as JSON with some fields replaced; a field of None is taken out."""
    return json.dumps({key: value for key, value in (row | change).items() if value is not None})
