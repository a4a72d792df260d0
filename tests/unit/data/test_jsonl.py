"""Writers replace a file as a whole or leave it; a directory of shards is whole or refused."""

from __future__ import annotations

import json
import os
import random
import socket
from pathlib import Path

import pytest

from srcfast.data.jsonl import (
    COMPLETE,
    is_complete,
    read_jsonl,
    read_lines,
    read_shards,
    write_json,
    write_jsonl,
    write_shards,
    write_text,
)
from srcfast.errors import InputError


def rows_of(count: int) -> list[dict]:
    return [{"id": i, "text": random.choice(["a\nb", "\u2028 \u00e9 \U0001f600", "\x85\r", ""])} for i in range(count)]


def test_rows_read_back_as_written_with_their_lines(tmp_path: Path) -> None:
    rows = rows_of(17)
    assert write_jsonl(tmp_path / "new" / "a.jsonl", rows) == 17
    assert list(read_jsonl(tmp_path / "new" / "a.jsonl")) == list(enumerate(rows, start=1))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    write_jsonl(file, [{"a": 1}])

    def failing():
        yield {"a": 2}
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        write_jsonl(file, failing())
    with pytest.raises(ValueError):
        write_jsonl(file, [{"a": float("nan")}])
    with pytest.raises(ValueError):
        write_json(file, {"a": float("inf")})
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "\ud800")
    assert file.read_text() == '{"a": 1}\n' and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "write",
    [
        lambda file: write_text(file, "new"),
        lambda file: write_json(file, {"a": "new"}),
        lambda file: write_jsonl(file, [{"a": "new"}]),
    ],
    ids=["text", "json", "jsonl"],
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_reader_never_sees_half_a_file(tmp_path: Path, monkeypatch, write, step: str) -> None:
    file = tmp_path / "a"
    write_text(file, "old")
    seen = []

    def stopped(*arguments: object) -> None:
        seen.append(file.read_text())  # what a reader finds at this moment
        raise OSError("no space left")

    monkeypatch.setattr(os, step, stopped)
    with pytest.raises(OSError, match="no space"):
        write(file)
    assert seen == ["old"] and file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_shards_have_no_marker_until_all_are_written(tmp_path: Path) -> None:
    seen = []

    def rows():
        for row in rows_of(9):
            seen.append(is_complete(tmp_path))
            yield row

    write_shards(tmp_path, rows_of(3))
    write_shards(tmp_path, rows(), shard_size=2)
    assert seen == [False] * 9 and is_complete(tmp_path)


def test_malformed_lines_are_named_and_the_others_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    bad = [
        b"{",
        b"[1]",
        b"{} {}",
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b"9" * 5000,
        b"[" * 99999,
    ]
    lines = [b'{"good": 1}'] + [line for one in bad for line in (one, b"", b'{"good": 2}')]
    file.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    read = list(read_lines(file))
    errors = [(line, row) for line, row in read if isinstance(row, InputError)]
    assert [line for line, _ in errors] == [i + 1 for i, line in enumerate(lines) if line in bad]
    assert len(read) - len(errors) == 1 + len(bad)
    for line, error in errors:
        assert (error.file, error.line) == (str(file), line) and error.expected and error.found
        json.dumps(error.as_record(), ensure_ascii=False).encode("utf-8")  # it can be written to rejected.jsonl
    with pytest.raises(InputError, match="line 2"):
        list(read_jsonl(file))


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 23])
def test_shards_read_back_in_order(tmp_path: Path, count: int) -> None:
    rows = rows_of(count)
    write_shards(tmp_path, rows_of(40), shard_size=3)
    assert write_shards(tmp_path, iter(rows), shard_size=7) == count  # the longer ones of before are gone
    assert is_complete(tmp_path)
    read = list(read_shards(tmp_path))
    assert [row for _, _, row in read] == rows
    assert all((path.name, line) == (f"{i // 7:05d}.jsonl", i % 7 + 1) for i, (path, line, _) in enumerate(read))


def test_shards_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    def failing():
        yield from rows_of(5)
        raise RuntimeError("stopped")

    write_shards(tmp_path, rows_of(9), shard_size=4)
    with pytest.raises(RuntimeError):
        write_shards(tmp_path, failing(), shard_size=4)
    assert not is_complete(tmp_path)
    with pytest.raises(InputError, match="finished stage"):
        list(read_shards(tmp_path))
    write_shards(tmp_path, rows_of(9), shard_size=4)
    (tmp_path / "00001.jsonl").write_text('{"id": 4}\n')
    with pytest.raises(InputError, match="9 rows"):
        list(read_shards(tmp_path))
    (tmp_path / "00001.jsonl").unlink()
    with pytest.raises(InputError, match="00001"):
        list(read_shards(tmp_path))
    (tmp_path / COMPLETE).write_text("{}")
    with pytest.raises(InputError, match="shards"):
        list(read_shards(tmp_path))


def test_a_flipped_bit_within_a_shard_is_found(tmp_path: Path) -> None:
    write_shards(tmp_path, rows_of(9), shard_size=4)
    assert len(list(read_shards(tmp_path))) == 9
    shard = tmp_path / "00001.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b"5", b"7", 1))  # as good JSON as before
    with pytest.raises(InputError, match=r"00001.jsonl: expected the shard that was written .* SHA-256"):
        list(read_shards(tmp_path))
    (tmp_path / COMPLETE).write_text('{"rows": 9, "shards": 3}')  # a marker of before there were hashes
    assert len(list(read_shards(tmp_path))) == 9


@pytest.mark.parametrize("kind", ["directory", "pipe", "socket"])
def test_only_files_are_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "output"
    with socket.socket(socket.AF_UNIX) as bound:
        {"directory": path.mkdir, "pipe": lambda: os.mkfifo(path), "socket": lambda: bound.bind(str(path))}[kind]()
        before = path.lstat()
        with pytest.raises(InputError, match=r"output.*a file to write.*name another file"):
            write_text(path, "text")
    assert path.lstat().st_mode == before.st_mode and path.lstat().st_ino == before.st_ino
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_is_not_replaced() -> None:
    before = Path("/dev/full").lstat()
    with pytest.raises(InputError, match="/dev/full.*a device"):
        write_text("/dev/full", "text")
    assert Path("/dev/full").lstat().st_rdev == before.st_rdev


def test_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "output").symlink_to(tmp_path / "target")
    write_text(tmp_path / "output", "text")
    assert (tmp_path / "target").read_text() == "precious"
    assert not (tmp_path / "output").is_symlink() and (tmp_path / "output").read_text() == "text"
