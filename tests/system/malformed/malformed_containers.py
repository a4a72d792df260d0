"""Malformed containers: parquet, Arrow, saved folders and compressed files that are damaged, cut off, or something else."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet
from malformed_case import Case, file_of
from malformed_images import picture_bytes

from srcfast.data.readers import read_preferences, read_samples

ROW = {"id": "s", "question": "What color?", "answer": "red"}
LINE = json.dumps(ROW).encode() + b"\n"
LINES = b"".join(json.dumps(ROW | {"id": str(n), "question": f"{n * n} {n}?"}).encode() + b"\n" for n in range(999))


def auto(read: Callable[..., Any] = read_samples, **settings: Any) -> Callable[[Path], list[dict[str, Any]]]:
    """Read a file of any format and return what was set aside."""

    def act(path: Path) -> list[dict[str, Any]]:
        rejected: list[dict[str, Any]] = []
        read(path, rejected=rejected, **settings)
        return rejected

    return act


def parquet(*rows: dict[str, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    arrow.parquet.write_table(arrow.Table.from_pylist(list(rows)), file, **options)
    return file.getvalue()


def stream(*rows: dict[str, Any]) -> bytes:
    file, table = io.BytesIO(), arrow.Table.from_pylist(list(rows))
    with arrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def zstandard(data: bytes) -> bytes:
    return arrow.compress(data, codec="zstd", asbytes=True)


def saved(state: str | bytes, data: bytes | None = None, name: str = "state.json") -> Callable[[Path], Path]:
    """Make a folder like one of save_to_disk."""

    def make(folder: Path) -> Path:
        file_of(state, f"saved/{name}")(folder)
        if data is not None:
            file_of(data, "saved/data-00000-of-00001.arrow")(folder)
        return folder / "saved"

    return make


def state(*names: Any) -> str:
    return json.dumps({"_data_files": [{"filename": name} for name in names]})


WHOLE, ONE = parquet(ROW), "data-00000-of-00001.arrow"
TABLES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "parquet that is cut off": (WHOLE[:-20], ("a parquet file that is whole",)),
    "parquet of its mark alone": (b"PAR1", ("a parquet file that is whole",)),
    "parquet with a footer of zeros": (WHOLE[:-60] + bytes(52) + WHOLE[-8:], ("a parquet file that is whole",)),
    "parquet with a page of zeros": (WHOLE[:4] + bytes(60) + WHOLE[64:], ("a parquet file that is whole",)),
    "parquet of other columns": (parquet({"frage": "Was?"}), ("the keys frage", "question and answer")),
    "parquet with half a picture": (parquet(ROW | {"image": picture_bytes("PNG")[:-30]}), ("line 1", "a whole image")),
    "parquet with text for a picture": (
        parquet(ROW | {"image": {"bytes": b"no image", "path": "a.png"}}),
        ("line 1", "a whole image"),
    ),
    "parquet with the path of a picture elsewhere": (
        parquet(ROW | {"image": {"bytes": None, "path": "/etc/passwd"}}),
        ("line 1", "'image'"),
    ),
    "parquet with a number that is not finite": (parquet(ROW | {"x": float("inf")}), ("line 1", "not a finite number")),
    "parquet with a null for a question": (parquet(ROW, ROW | {"id": "t", "question": None}), ("line 2", "'question'")),
    "parquet that swells": (
        parquet(ROW | {"question": "x" * (80 << 20)}, compression="zstd", use_dictionary=False),
        ("at most 200 times its size",),
    ),
    "an Arrow stream that is cut off": (stream(ROW)[:200], ("an Arrow stream that is whole",)),
    "an Arrow file of its mark alone": (b"ARROW1\0\0", ("an Arrow file that is whole",)),
    "an Arrow stream of its mark alone": (b"\xff\xff\xff\xff", ("an Arrow stream that is whole",)),
}
FOLDERS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "no JSON for a state": (saved("{", stream(ROW)), ("save_to_disk",)),
    "a state that is a list": (saved("[]", stream(ROW)), ("save_to_disk",)),
    "a state without files": (saved("{}", stream(ROW)), ("save_to_disk", "_data_files")),
    "a file that is not there": (saved(state(ONE)), ("that is whole", "No such file")),
    "a file outside of the folder": (saved(state("../x.arrow"), stream(ROW)), ("save_to_disk", "../x.arrow")),
    "a file that is a number": (saved(state(7), stream(ROW)), ("save_to_disk",)),
    "a file that is cut off": (saved(state(ONE), stream(ROW)[:-90]), ("an Arrow stream that is whole",)),
    "two splits": (saved('{"splits": ["train", "test"]}', name="dataset_dict.json"), ("2 splits", "saved/train")),
    "splits that are a number": (saved('{"splits": 3}', name="dataset_dict.json"), ("save_to_disk",)),
}
COMPRESSED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "gzip that is cut off": (gzip.compress(LINES)[:-9], ("a gzip file that is whole",)),
    "gzip of its mark alone": (b"\x1f\x8b", ("a gzip file that is whole",)),
    "gzip with another sum": (gzip.compress(LINES)[:-8] + bytes(8), ("a gzip file that is whole",)),
    "gzip with bytes behind it": (gzip.compress(LINES) + b"more", ("a gzip file that is whole",)),
    "gzip of parquet": (gzip.compress(WHOLE), ("found a parquet file",)),
    "gzip of gzip": (gzip.compress(gzip.compress(LINES)), ("found a gzip file",)),
    "gzip of a line of 70 Mi letters": (gzip.compress(b"x" * (70 << 20), 1), ("line 1", "64 Mi characters")),
    "gzip of a list that never ends": (gzip.compress(b"[" + b" " * (70 << 20)), ("200 times",)),
    "gzip of nothing": (gzip.compress(b""), ("no record",)),
    "Zstandard that is cut off": (zstandard(LINES)[:-9], ("a Zstandard file that is whole",)),
    "Zstandard of its mark alone": (b"\x28\xb5\x2f\xfd", ("a Zstandard file that is whole",)),
    "Zstandard of half a line": (zstandard(LINE + LINE[:20]), ("line 2", "one JSON object")),
    "Zstandard of an HTML page": (zstandard(b"<!doctype html>"), ("found an HTML page",)),
}
OTHERS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "an HTML page": (b"<!DOCTYPE html>\n<html></html>", ("found an HTML page",)),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        ("a Git LFS pointer", "git lfs pull"),
    ),
    "a zip archive": (b"PK\x03\x04", ("a zip archive",)),
    "a bzip2 file": (b"BZh9", ("a bzip2 file",)),
    "an xz file": (b"\xfd7zXZ\0", ("an xz file",)),
    "a pickle": (b"\x80\x04\x95", ("a pickle",)),
    "a picture": (picture_bytes("PNG"), ("a PNG image",)),
    "a PDF document": (b"%PDF-1.7", ("a PDF document",)),
    "a database": (b"SQLite format 3\0", ("an SQLite database",)),
    "a table of commas": (b"id,question,answer\n1,a,b\n", ("line 1", "id,question,answer")),
    "keys of no format": (b'{"a": 1}', ("the keys a", "jsonl (question and answer)")),
    "preferences": (b'{"prompt": "a", "chosen": "b", "rejected": "c"}', ("srcfast dpo",)),
}


def cases() -> list[Case]:
    """All of them."""
    found = [
        Case(kind, wrong, file_of(data, "rows.jsonl"), auto(), words)
        for kind, entries in (("Tables of Arrow", TABLES), ("Compressed files", COMPRESSED), ("Other files", OTHERS))
        for wrong, (data, words) in entries.items()
    ]
    found += [Case("Saved folders", wrong, make, auto(), words) for wrong, (make, words) in FOLDERS.items()]
    samples = '{"id": "s", "question": "a", "answer": "b"}'
    return [
        *found,
        Case("Other files", "samples for preferences", file_of(samples, "a"), auto(read_preferences), ("the keys id",)),
        Case(
            "Other files",
            "a glob that nothing matches",
            lambda folder: folder / "*.jsonl",
            auto(),
            ("files that match",),
        ),
    ]
