"""JSON lines and whole files, written so that a reader never sees half of one: temporary name, flush, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from srcfast.data.opening import MAX_TEXT, open_text, regular
from srcfast.errors import InputError

COMPLETE = "COMPLETE"  # marker of a finished directory of shards, written last


_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return entries


DECODER = json.JSONDecoder(object_pairs_hook=_each_once, parse_float=_finite, parse_constant=_finite)
PLAIN_DECODER = json.JSONDecoder(parse_int=str)  # finds the end of what DECODER refuses: a key twice, 5,000 digits, ...


def parse_json(text: str | bytes) -> Any:
    """Parse JSON in UTF-8. Raises ValueError for anything else, a key that is there twice, or a number that is not finite."""
    text = text if isinstance(text, str) else text.decode("utf-8")
    try:
        value = DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not is_unicode(text, value):
        raise ValueError("half of a surrogate pair")
    return value


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object, as `parse_json` does. Raises ValueError for anything else."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} instead of an object")
    return value


def is_unicode(text: str, value: Any) -> bool:
    """Return whether a value read from this JSON text can be written as UTF-8: no half of a surrogate pair, even escaped."""
    try:
        text.encode("utf-8")
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (1-based line, object), without blank lines. Raises InputError at a malformed line."""
    for line, row in read_lines(path):
        if isinstance(row, InputError):
            raise row
        yield line, row


def read_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Like `read_jsonl`, but a malformed line is yielded as its InputError, so that the reader can go on."""
    with open_text(path) as file:
        yield from lines_of(file, path)


def lines_of(file: TextIO, path: str | Path) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Yield what `read_lines` does of a file that is open. Raises InputError at a line that is too long to be held."""
    for line, text in enumerate(iter(partial(file.readline, MAX_TEXT), ""), start=1):
        if len(text) == MAX_TEXT:
            expected, found = f"lines of less than {MAX_TEXT >> 20} Mi characters", f"{text[:100]!r}..."
            raise InputError(file=path, line=line, expected=expected, found=found)
        if text := text.strip():
            yield line, _parse_line(path, line, text)


def _parse_line(path: str | Path, line: int, text: str) -> dict[str, Any] | InputError:
    problem: object = "not UTF-8"
    try:
        row = DECODER.decode(text)
        if is_unicode(text, row):
            if isinstance(row, dict):
                return row
            problem = f"{type(row).__name__} instead of an object"
    except (ValueError, RecursionError) as error:
        problem = error
    found = f"{problem}: {text[:200]!r}"
    return InputError(file=path, line=line, field="record", expected="one JSON object in UTF-8", found=found)


def temporary_of(path: Path) -> Path:
    """Return where this process writes what will be `path`; a run removes what killed processes left under such names."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_temporary(path: Path) -> None:
    """Remove the file, folder or link (not its target) under a `temporary_of` name, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Return whether this path is a `temporary_of` another, of any process."""
    return _TEMPORARY.fullmatch(path.name) is not None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an OSError of the body name this file where it names a temporary one, or none, as one of a full disk does."""
    try:
        yield
    except OSError as error:
        name = Path(str(error.filename))
        if error.errno and (error.filename is None or any(map(is_temporary, (name, *name.parents)))):
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: str | Path, durable: bool = True, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` once all is written; if writing fails, nothing changes.

    `durable`: its bytes are on the disk before its name is, so that not even a power cut leaves half of it.
    `temporary`: where it is written until then, if not at `temporary_of(path)`.

    Raises:
        InputError: there is something else than a file, which would be replaced.
    """
    path = Path(path)
    _check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary or temporary_of(path)
    try:
        with naming(path):
            remove_temporary(temporary)  # left by a killed process of this number, or a link planted there
            with open(temporary, "xb") as file:  # a new file: never through a link, readable as the umask says
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _check_replaceable(path: Path) -> None:
    """Raise InputError where a path is a directory, a device, a pipe or a socket; a link is replaced, not its target."""
    with suppress(OSError):  # none is there, or writing will name the error
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            kind = "a directory" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"
            raise InputError(file=path, expected="a file to write, or nothing", found=kind, fix="name another file")


def check_writable(path: Path, *, is_file: bool = False) -> None:
    """Raise what writing a folder, or a file, would raise, before there is anything to write; nothing is left there."""
    folder = path.parent if is_file else path
    with naming(path):
        if is_file:
            _check_replaceable(path)
        with suppress(FileNotFoundError):
            os.stat(path)
        folder = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        # As long as the longest name to come, and none of them: no file of a run is begun here.
        lengths = [len(os.fsencode(part)) for part in path.relative_to(folder).parts]
        probe = temporary_of(folder / ("p" * max(lengths, default=1)))
        remove_temporary(probe)
        with open(probe, "xb"):
            probe.unlink(missing_ok=True)  # a process that locks the folder removes what is temporary


def write_text(path: str | Path, text: str) -> None:
    """Replace `path` atomically."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Replace `path` atomically by indented JSON; non-finite numbers are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Replace `path` atomically by one object a line; returns how many."""
    count = 0
    with replacing(path) as file:
        for row in rows:
            count += 1
            file.write(json.dumps(row, allow_nan=False, ensure_ascii=False).encode("utf-8") + b"\n")
    return count


def write_shards(directory: str | Path, rows: Iterable[dict[str, Any]], shard_size: int = 1000) -> int:
    """Write `00000.jsonl`, `00001.jsonl`, ..., and last the marker of a whole directory; returns the number of rows."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / COMPLETE).unlink(missing_ok=True)
    for stale in directory.glob("[0-9]*.jsonl"):
        stale.unlink()
    count = 0
    hashes: list[str] = []
    remaining = iter(rows)
    while (shard := list(islice(remaining, shard_size))) or not hashes:
        file = directory / f"{len(hashes):05d}.jsonl"
        count += write_jsonl(file, shard)
        hashes.append(file_hash(file))
    write_json(directory / COMPLETE, {"rows": count, "shards": len(hashes), "sha256": hashes})
    return count


def as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a mapping to what JSON reads back: tuples become lists, paths strings."""
    return json.loads(json.dumps(value, default=str))


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Map dotted names to the leaves of nested dicts; an empty dict is a leaf."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        leaves |= flatten(inner, f"{prefix}.{key}" if prefix else key)
    return leaves


def json_hash(value: Any) -> str:
    """Hash a value's JSON (SHA-256), whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_hash(file: str | Path) -> str:
    """Hash a file's bytes (SHA-256)."""
    with open(regular(file), "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def image_print(file: str | Path, name: str) -> str:
    """Return an image's name and SHA-256, which don't depend on its directory. Raises InputError if it can't be read."""
    try:
        return f"{name} {file_hash(file)}"
    except OSError as error:
        reason = error.strerror or error
        raise InputError(file=file, field="images", expected="a readable file", found=reason) from error


def is_complete(directory: str | Path) -> bool:
    """Return whether `write_shards` finished here."""
    return os.path.isfile(Path(directory) / COMPLETE)  # False for a path that is none, where pathlib raises OSError


def read_shards(directory: str | Path) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """Yield (file, line, object) over all shards in order.

    Raises:
        InputError: the directory is not whole, or a shard is not as it was written; a marker without hashes is taken as it is.
    """
    directory = Path(directory)
    rows, hashes = _read_marker(directory)
    count = 0
    for shard, sha256 in enumerate(hashes):
        file = directory / f"{shard:05d}.jsonl"
        _check_hash(file, sha256, rows)
        for line, row in read_jsonl(file):
            count += 1
            yield file, line, row
    if count != rows:
        expected, fix = f"{rows} rows, as {COMPLETE} says", "remove the directory and run the stage again"
        raise InputError(file=directory, expected=expected, found=count, fix=fix)


def _read_marker(directory: Path) -> tuple[int, Iterable[str | None]]:
    """Read how many rows a directory has, and each shard's hash, None in older ones. Raises InputError where it is not whole."""
    if not is_complete(directory):
        expected = f"a finished stage ({COMPLETE} marker)"
        raise InputError(file=directory, expected=expected, found="none", fix="run the stage before")
    try:
        marker = parse_object((directory / COMPLETE).read_bytes())
        shards, rows = marker["shards"], marker["rows"]
        if any(type(count) is not int or count < 0 for count in (shards, rows)):
            raise ValueError(f"{shards!r} shards of {rows!r} rows")
        hashes = marker.get("sha256")
        if hashes is not None and (not isinstance(hashes, list) or len(hashes) != shards):
            raise ValueError(f"{hashes!r} for {shards} shards")
    except (OSError, ValueError, KeyError) as error:
        expected, found = '{"rows": n, "shards": k, "sha256": [one a shard]}', repr(error)
        file, fix = directory / COMPLETE, "run the stage again"
        raise InputError(file=file, expected=expected, found=found, fix=fix) from error
    return rows, hashes or (None for _ in range(shards))  # no list: a damaged marker may speak of 10^12


def _check_hash(file: Path, sha256: str | None, rows: int) -> None:
    """Raise InputError where a shard is not the one that was written; the reader of a missing one says that it is missing."""
    if sha256 is not None and file.is_file() and (found := file_hash(file)) != sha256:
        expected = f"the shard that was written ({rows} rows in all), of SHA-256 {sha256}, as {COMPLETE} says"
        fix = "put it back as it was, or remove the directory and run the stage again; to change rows by hand, "
        raise InputError(file=file, expected=expected, found=found, fix=f"{fix}take sha256 out of {COMPLETE}")
