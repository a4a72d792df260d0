"""Rows of whatever holds them: JSON lines, a JSON list, parquet, Arrow files, a folder that `datasets` has saved.

JSON may be compressed. A row's line is that of its file or, where a file has no lines, the row's number from 1.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from srcfast.data.images import image_suffix
from srcfast.data.jsonl import DECODER, PLAIN_DECODER, is_unicode, lines_of, parse_object, replacing
from srcfast.data.opening import (
    ARROW_FILE,
    ARROW_STREAM,
    MAX_TEXT,
    PARQUET,
    check_ratio,
    head_of,
    kind_of,
    open_text,
    require_pyarrow,
)
from srcfast.data.records import Row
from srcfast.errors import InputError

_LIST = re.compile(r"\s*\[\s*(?:[{\]]|$)")  # where a JSON list of records begins
_SPACE = re.compile(r"[ \t\r\n]*")
_BLOCK = 1 << 20  # characters of a list that are read at once
_ROWS = 32  # of a table that are read at once: they may hold images
_STATE, _SPLITS = "state.json", "dataset_dict.json"  # of folders that `datasets` has saved


def files_of(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """List the files that a path, a glob or a list of these names; a file or folder of that very name comes before a glob.

    Raises:
        InputError: a glob matches nothing, or a file is named twice.
    """
    files: list[Path] = []
    for name in map(str, [path] if isinstance(path, str | Path) else path or [""]):
        is_glob = glob.has_magic(name) and not os.path.exists(name)
        matches = sorted(glob.glob(name, recursive=True)) if is_glob else [name]
        if not matches:
            raise InputError(file=name, expected="files that match", found="none", fix="correct the path")
        files += map(Path, matches)
    if len(set(files)) < len(files):
        twice = Counter(files).most_common(1)[0][0]
        raise InputError(file=twice, expected="each file once", found="twice", fix="name it once")
    return files


def is_table(path: Path) -> bool:
    """Return whether this is parquet, an Arrow file or a saved folder. Raises InputError where it can't be read."""
    return _table_kind(path) is not None


def _table_kind(path: Path) -> str | None:
    if any(os.path.isfile(path / name) for name in (_STATE, _SPLITS)):  # False for a path that is none
        return ARROW_STREAM
    if os.path.isdir(path):
        return None
    kind = kind_of(head_of(path))
    return kind[0] if kind is not None and kind[0] in (PARQUET, ARROW_FILE, ARROW_STREAM) else None


def read_rows(path: Path, image_output: Path | None) -> Iterator[Row]:
    """Yield (line, row or its error) of a file or saved folder; images within the rows are written into `image_output`, if any.

    Raises:
        InputError: the file as a whole can't be read, or is damaged from some line on.
    """
    if (kind := _table_kind(path)) is not None:
        yield from _table_rows(path, _saved_files(path) if path.is_dir() else [path], kind, image_output)
        return
    with open_text(path) as file:
        start = file.read(_BLOCK)
        if _LIST.match(start):
            yield from _ListReader(file, path, start).rows()
            return
    with open_text(path) as file:
        yield from lines_of(file, path)


# Tables ---------------------------------------------------------------------------------------------------------------


def _saved_files(folder: Path) -> list[Path]:
    """List the files of a folder that save_to_disk wrote. Raises InputError where it has several splits, or is not whole."""
    try:
        if (folder / _SPLITS).is_file():
            splits = [str(folder / name) for name in parse_object((folder / _SPLITS).read_bytes())["splits"]]
            fix = f"name {' or '.join(splits)}"
            raise InputError(file=folder, expected="one split of a data set", found=f"{len(splits)} splits", fix=fix)
        names = [item["filename"] for item in parse_object((folder / _STATE).read_bytes())["_data_files"]]
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{names!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected, found = "a folder that save_to_disk wrote", repr(error)
        raise InputError(file=folder, expected=expected, found=found, fix="save it again") from error
    return [folder / name for name in names]


def _table_rows(path: Path, files: Sequence[Path], kind: str, image_output: Path | None) -> Iterator[Row]:
    """Yield the rows of tables as those of one, a few at a time."""
    number, arrow = 0, require_pyarrow(path, kind)
    batches = (batch for file in files for batch in _batches(arrow, file, kind))
    while True:
        try:
            batch = next(batches, None)
        except (OSError, ValueError, TypeError, arrow.ArrowException) as error:
            expected, fix = f"{kind} that is whole", "fetch or write it again"
            raise InputError(file=path, line=number + 1, expected=expected, found=error, fix=fix) from error
        if batch is None:
            return
        for index in range(batch.num_rows):  # an image that can't be written raises OSError: the table is whole
            number += 1
            yield number, _table_row(batch, index, path, number, image_output)


def _batches(arrow: Any, file: Path, kind: str) -> Iterator[Any]:
    """Yield the record batches of a table's file, in slices of few rows; memory is bounded by one batch as it is stored."""
    if kind == PARQUET:
        with arrow.parquet.ParquetFile(file, memory_map=True, pre_buffer=False) as table:
            groups = (table.metadata.row_group(index) for index in range(table.metadata.num_row_groups))
            check_ratio(file, sum(group.total_byte_size for group in groups), file.stat().st_size)
            yield from table.iter_batches(_ROWS)
        return
    with arrow.memory_map(str(file)) as source:
        if kind == ARROW_STREAM:
            batches = arrow.ipc.open_stream(source)
        else:
            opened = arrow.ipc.open_file(source)
            batches = map(opened.get_batch, range(opened.num_record_batches))
        for batch in batches:
            batch.validate()
            yield from (batch.slice(start, _ROWS) for start in range(0, batch.num_rows, _ROWS))


def _table_row(
    batch: Any, index: int, path: Path, number: int, image_output: Path | None
) -> dict[str, Any] | InputError:
    """Return a row of a table as JSON would hold it, without what is null, or what is wrong with it."""
    try:
        return {
            name: _as_json(value, f"{path}, row {number}", image_output)
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
            if (value := column[index].as_py()) is not None
        }
    except InputError as error:
        expected, found, fix = error.expected, error.found, error.fix
    except (ValueError, TypeError, OverflowError, LookupError, RuntimeError) as error:  # of pyarrow's, too
        expected, found, fix = "values that JSON can hold", str(error), None
    return InputError(file=path, line=number, field="record", expected=expected, found=found, fix=fix)


def _as_json(value: Any, source: str, image_output: Path | None) -> Any:
    """Convert a table's value: an image, {bytes, path} or bytes, becomes its file's name, a date and the like a text.

    Raises:
        InputError: the image is none.
        ValueError: a number is not finite.
    """
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if isinstance(value, bytes):
        if image_output is None:
            return "image"
        name = f"{hashlib.sha256(value).hexdigest()}{image_suffix(value, source)}"
        if not (image_output / name).is_file():
            with replacing(image_output / name) as file:
                file.write(value)
        return name
    if isinstance(value, dict):
        return {key: _as_json(item, source, image_output) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_as_json(item, source, image_output) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return value if value is None or isinstance(value, str | int | float) else str(value)


# JSON lists -----------------------------------------------------------------------------------------------------------


class _ListReader:
    """A JSON list of records, of whose text a block or the longest record is held at a time."""

    def __init__(self, file: TextIO, path: Path, start: str) -> None:
        self.file, self.path, self.text, self.at, self.line = file, path, start, 0, 1

    def rows(self) -> Iterator[Row]:
        """Yield the rows, each with the line it begins on. Raises InputError where the list itself is malformed."""
        self._move(self.text.index("[") + 1)
        while self._next() != "]":
            line = self.line
            yield line, self._item()
            if self._next() == ",":
                self._move(self.at + 1)
            elif self._next() != "]":
                raise self._error("',' or ']' in a JSON list of records", self._shown() or "the end of the file")
        self._move(self.at + 1)
        if self._next():
            raise self._error("nothing after the list", self._shown())

    def _item(self) -> dict[str, Any] | InputError:
        """Read the item that begins here, and move behind it. Raises InputError where its end is unknown, as it is no JSON."""
        line = self.line
        while True:
            problem = "half of a surrogate pair, or not UTF-8"
            try:
                row, end = DECODER.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                row, problem = None, f"{error}: {self._shown(200)}"
                try:
                    end = PLAIN_DECODER.raw_decode(self.text, self.at)[1]
                except (ValueError, RecursionError) as fault:
                    if not isinstance(fault, RecursionError) and self._read_on():
                        continue
                    self._move(getattr(fault, "pos", self.at))
                    raise self._error("a JSON list of records", fault) from error
            if end < len(self.text) or not self._read_on():  # a number may go on
                break
        text = self.text[self.at : end]
        self._move(end)
        if isinstance(row, dict) and is_unicode(text, row):
            return row
        if row is not None and not isinstance(row, dict):
            problem = f"{type(row).__name__} instead of an object: {text[:200]!r}"
        expected = "one JSON object in UTF-8"
        return InputError(file=self.path, line=line, field="record", expected=expected, found=problem)

    def _next(self) -> str:
        """Skip white space, and return the character that follows, "" at the end of the file."""
        while True:
            self._move(_SPACE.match(self.text, self.at).end())  # type: ignore[union-attr]  # it matches nothing, too
            if self.at < len(self.text) or not self._read_on():
                return self.text[self.at : self.at + 1]

    def _read_on(self) -> bool:
        """Read as much again as is held, and return whether there was more and it may be held."""
        self.text, self.at = self.text[self.at :], 0
        more = self.file.read(max(_BLOCK, len(self.text))) if len(self.text) < MAX_TEXT else ""
        self.text += more
        return bool(more)

    def _move(self, position: int) -> None:
        self.line, self.at = self.line + self.text.count("\n", self.at, position), position

    def _shown(self, length: int = 40) -> str:
        shown = self.text[self.at : self.at + length]
        return repr(shown) if shown else ""

    def _error(self, expected: str, found: object) -> InputError:
        return InputError(file=self.path, line=self.line, expected=expected, found=found)
