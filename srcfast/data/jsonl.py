"""JSON lines and whole files, written so that a reader never sees half of one: temporary name, flush, rename."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from srcfast.errors import InputError

COMPLETE = "COMPLETE"  # marker of a finished directory of shards, written last


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (1-based line, object); blank lines are passed over. Raises InputError at a malformed line."""
    for line, row in read_lines(path):
        if isinstance(row, InputError):
            raise row
        yield line, row


def read_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Like `read_jsonl`, but a malformed line is yielded as its InputError, so that the reader can go on."""
    try:
        file = open(path, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise InputError(file=path, expected="a readable file", found=error.strerror or error) from error
    with file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                text.encode("utf-8")
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield (
                    line,
                    InputError(
                        file=path, line=line, expected="one JSON object in UTF-8", found=f"{text.strip()!r} ({error})"
                    ),
                )
                continue
            if not isinstance(row, dict):
                row = InputError(file=path, line=line, expected="one JSON object", found=repr(row))
            yield line, row


def write_text(path: str | Path, text: str) -> None:
    """Replace `path` atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: str | Path, value: Any) -> None:
    """Replace `path` atomically by indented JSON; non-finite numbers are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Replace `path` atomically by one object a line; returns how many."""
    lines = [json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))
    return len(lines)


def write_shards(directory: str | Path, rows: Iterable[dict[str, Any]], shard_size: int = 1000) -> int:
    """Write `00000.jsonl`, `00001.jsonl`, ... and last the marker that says the directory is whole; returns the rows."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / COMPLETE).unlink(missing_ok=True)
    for stale in directory.glob("[0-9]*.jsonl"):
        stale.unlink()
    count = shards = 0
    shard: list[dict[str, Any]] = []
    for row in rows:
        shard.append(row)
        count += 1
        if len(shard) == shard_size:
            write_jsonl(directory / f"{shards:05d}.jsonl", shard)
            shard, shards = [], shards + 1
    if shard or not shards:
        write_jsonl(directory / f"{shards:05d}.jsonl", shard)
        shards += 1
    write_json(directory / COMPLETE, {"rows": count, "shards": shards})
    return count


def is_complete(directory: str | Path) -> bool:
    """Whether `write_shards` finished here."""
    return (Path(directory) / COMPLETE).is_file()


def read_shards(directory: str | Path) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """Yield (file, line, object) over all shards in order. Raises InputError where the directory is not whole."""
    directory = Path(directory)
    if not is_complete(directory):
        raise InputError(
            file=directory, expected=f"a finished stage ({COMPLETE} marker)", found="none", mend="run the stage before"
        )
    for path in sorted(directory.glob("[0-9]*.jsonl")):
        for line, row in read_jsonl(path):
            yield path, line, row
