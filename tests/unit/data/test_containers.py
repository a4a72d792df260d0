"""Rows are the same out of whatever holds them: lines, lists, compressed files, parquet, folders that `datasets` saved."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from srcfast.data import containers, jsonl, opening
from srcfast.data.readers import read_preferences, read_samples
from srcfast.errors import InputError

arrow = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")
MiB = 1 << 20

ROWS = [
    {"id": "a", "images": ["1.png"], "question": "What color?", "answer": "red", "weight": 1},
    {"id": "b", "images": ["1.png", "2.png"], "question": "Is it <image> or <image>?", "answer": "é", "weight": 2},
    {"id": "c", "images": [], "question": "What is\n1 + 1?", "answer": "2", "weight": 3},
]


def picture(seed: int) -> bytes:
    """A PNG of random pixels."""
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "png")
    return data.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "1.png").write_bytes(picture(1))
    (tmp_path / "2.png").write_bytes(picture(2))
    return tmp_path


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zstandard(data: bytes) -> bytes:
    return arrow.compress(data, codec="zstd", asbytes=True)


def write(write_bytes: Callable[[list[dict[str, Any]]], bytes], name: str = "rows.data"):
    def writer(folder: Path, rows: list[dict[str, Any]]) -> Path:
        (folder / name).write_bytes(write_bytes(rows))
        return folder / name

    return writer


def parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def plain_parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    arrow.parquet.write_table(arrow.Table.from_pylist(rows), folder / "rows", compression="zstd", row_group_size=2)
    return folder / "rows"


def saved(folder: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def arrow_file(folder: Path, rows: list[dict[str, Any]]) -> Path:
    table = arrow.Table.from_pylist(rows)
    with arrow.OSFile(str(folder / "rows.arrow"), "wb") as file, arrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return folder / "rows.arrow"


def indented(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=2).encode()


CONTAINERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "lines": write(lines),
    "a list": write(lambda rows: json.dumps(rows).encode()),
    "an indented list with a byte order mark": write(lambda rows: b"\xef\xbb\xbf" + indented(rows)),
    "lines, gzip": write(lambda rows: gzip.compress(lines(rows))),
    "two members of gzip": write(lambda rows: gzip.compress(lines(rows[:1])) + gzip.compress(lines(rows[1:]))),
    "a list, gzip": write(lambda rows: gzip.compress(indented(rows))),
    "lines, zstd": write(lambda rows: zstandard(lines(rows))),
    "a list, zstd": write(lambda rows: zstandard(indented(rows))),
    "parquet by datasets": parquet,
    "parquet by pyarrow": plain_parquet,
    "a saved folder": saved,
    "an Arrow file": arrow_file,
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("format", ["auto", "jsonl"])
def test_samples_are_the_same_out_of_every_container(root: Path, name: str, format: str) -> None:
    rejected: list[dict[str, Any]] = []
    samples = read_samples(CONTAINERS[name](root, ROWS), format=format, image_root=root, rejected=rejected)
    assert rejected == []
    assert [(s.id, s.images, s.question, s.answer, s.extra, s.image_root) for s in samples] == [
        ("a", ("1.png",), "What color?", "red", {"weight": 1}, root),
        ("b", ("1.png", "2.png"), "Is it <image> or <image>?", "é", {"weight": 2}, root),
        ("c", (), "What is\n1 + 1?", "2", {"weight": 3}, root),
    ]


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_bad_row_is_named_by_its_number_in_every_container(root: Path, name: str) -> None:
    rows = [ROWS[2] | {"id": str(number)} for number in range(100)]
    rows[70] = rows[70] | {"question": " "}
    rejected: list[dict[str, Any]] = []
    file = CONTAINERS[name](root, rows)
    assert len(read_samples(file, rejected=rejected)) == 99
    [bad] = rejected
    line = {"a list": 1, "an indented list with a byte order mark": 2 + 70 * 7}.get(name, 71)
    if name in ("a list, gzip", "a list, zstd"):
        line = 2 + 70 * 7  # seven lines a row
    assert (bad["file"], bad["line"], bad["field"], bad["sample_id"]) == (str(file), line, "question", "70")


@pytest.mark.parametrize("name", ["parquet by datasets", "a saved folder"])
def test_embedded_images_are_written_under_their_hash_and_read(tmp_path: Path, name: str) -> None:
    """As `datasets` stores its Image feature, alone and in a list, and a column of bytes without it."""
    one, two = picture(3), picture(4)
    rows = [
        {"id": "a", "image": {"bytes": one, "path": "x.png"}, "question": "What?", "answer": "red"},
        {"id": "b", "image": {"bytes": two, "path": None}, "question": "What?", "answer": "blue"},
        {"id": "c", "image": {"bytes": one, "path": "y.png"}, "question": "Which?", "answer": "red"},
    ]
    features = datasets.Features(
        {name: datasets.Image() if name == "image" else datasets.Value("string") for name in rows[0]}
    )
    table = datasets.Dataset.from_list(rows, features=features)
    path = tmp_path / "rows"
    table.to_parquet(path) if name == "parquet by datasets" else table.save_to_disk(path)
    rejected: list[dict[str, Any]] = []
    samples = read_samples(path, rejected=rejected)
    names = [hashlib.sha256(data).hexdigest() + ".png" for data in (one, two, one)]
    assert rejected == [] and [s.images for s in samples] == [(name,) for name in names]
    assert [(s.image_root / s.images[0]).read_bytes() for s in samples] == [one, two, one]
    assert {file.name for file in (tmp_path / "rows.images").iterdir()} == set(names)
    assert all(s.image_root == tmp_path / "rows.images" and s.extra == {} for s in samples)


def test_parts_of_messages_hold_images_too_and_nulls_of_structs_are_no_values(tmp_path: Path) -> None:
    """Parquet gives all parts of all messages the same keys: what a part does not have is null."""
    data = picture(5)
    parts = [{"type": "image", "text": None, "image": {"bytes": data, "path": None}}]
    parts += [{"type": "text", "text": "What?", "image": None}]
    rows = [{"messages": [{"role": "user", "content": parts}], "rejected_response": "no", "system": None}]
    answer = [{"type": "text", "text": "yes", "image": None}]
    rows[0]["messages"].append({"role": "assistant", "content": answer})
    file, rejected = plain_parquet(tmp_path, rows), []
    [pair] = read_preferences(file, rejected=rejected)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("What?", "yes", "no") and not rejected
    assert (pair.image_root / pair.images[0]).read_bytes() == data


def test_values_that_json_does_not_have(tmp_path: Path) -> None:
    from datetime import date

    base = {"question": "q", "answer": "a"}
    rows = [
        {"id": "1", **base, "day": date(2024, 2, 29), "x": 0.5},
        {"id": "2", **base, "day": None, "x": float("nan")},
    ]
    broken = {"id": "3", **base, "image": b"no image"}
    rejected: list[dict[str, Any]] = []
    [sample] = read_samples(plain_parquet(tmp_path, rows), rejected=rejected)
    assert sample.extra == {"day": "2024-02-29", "x": 0.5}
    assert [(row["line"], row["found"]) for row in rejected] == [(2, "nan is not a finite number")]
    rejected = []
    assert len(read_samples(plain_parquet(tmp_path, [broken, rows[0]]), rejected=rejected)) == 1
    assert "a whole image" in rejected[0]["expected"] and rejected[0]["line"] == 1


def test_a_glob_and_a_list_are_read_in_order_as_one_set(root: Path) -> None:
    for name, number in (("b.jsonl", 1), ("a.jsonl", 0), ("c.json.gz", 2)):
        data = lines([ROWS[number]])
        (root / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (root / "a[1].jsonl").write_bytes(lines([ROWS[2]]))  # a name, and no pattern

    def ids(path: Any) -> list[str]:
        rejected: list[dict[str, Any]] = []
        return [sample.id for sample in read_samples(path, rejected=rejected)] + [row["file"] for row in rejected]

    assert ids(str(root / "?.json*")) == ["a", "b", "c"]
    assert ids([root / "c.json.gz", root / "a.jsonl"]) == ["c", "a"]
    assert ids([str(root / "b.*"), root / "a.jsonl"]) == ["b", "a"]
    assert ids(root / "a[1].jsonl") == ["c"]
    assert ids([root / "c.json.gz", root / "a[1].jsonl"]) == ["c", str(root / "a[1].jsonl")]
    for path, words in (
        (str(root / "d*.jsonl"), "expected files that match, found none"),
        ([root / "a.jsonl", str(root / "*.jsonl")], "expected each file once, found twice"),
    ):
        with pytest.raises(InputError, match=words):
            ids(path)


def test_unnamed_records_of_several_files_have_different_names(tmp_path: Path) -> None:
    talk = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]}
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(lines([talk, talk]))
    samples = read_samples(str(tmp_path / "*.jsonl"), rejected=[])
    assert [sample.id for sample in samples] == ["record-1", "record-2", "record-3", "record-4"]


def test_several_splits_are_named_and_one_is_read(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"id": "a", "question": "q", "answer": "a"}])
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "both")
    with pytest.raises(InputError, match="2 splits. Fix: name .*both/train or .*both/test"):
        read_samples(tmp_path / "both", rejected=[])
    [sample] = read_samples(tmp_path / "both" / "test", rejected=[])
    assert sample.question == "q"


# Damage, bombs, what is missing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [gzip.compress, zstandard], ids=["gzip", "zstd"])
@pytest.mark.parametrize("unit", [b"\0", b"\n", b'{"id": "x", "question": "q", "answer": "a"}\n', b"[" + b" " * 99])
def test_a_bomb_is_refused_by_a_limit_and_not_by_memory(
    tmp_path: Path, pack: Any, unit: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 MiB out of some KiB, under a limit of 4 MiB in place of 64: one record's worth is held at most."""
    for module in (opening, jsonl, containers):
        monkeypatch.setattr(module, "MAX_TEXT", 4 * MiB)
    data = pack(unit * (40 * MiB // len(unit)))
    assert len(data) < MiB // 4
    (tmp_path / "bomb.jsonl").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="bomb.jsonl.*(200 times its size|lines of less than 4 Mi)"):
            for _ in iter_rows(tmp_path / "bomb.jsonl"):
                pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30 * MiB  # of 4 Mi characters: a text, what it was joined from, its buffers


def iter_rows(path: Path) -> Any:
    from srcfast.data.containers import read_rows

    return read_rows(path, None)


def test_a_parquet_bomb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    table = arrow.table({"id": arrow.array(["x" * MiB * 4] * 64), "question": ["q"] * 64, "answer": ["a"] * 64})
    arrow.parquet.write_table(table, tmp_path / "bomb", compression="zstd", use_dictionary=False)
    assert (tmp_path / "bomb").stat().st_size < MiB
    with pytest.raises(InputError, match="bomb.*at most 200 times its size"):
        read_samples(tmp_path / "bomb", rejected=[])


def test_honest_text_that_compresses_well_is_read(tmp_path: Path) -> None:
    """A hundred times: under 64 MiB any ratio will do."""
    rows = [{"id": str(number), "question": "What? " * 50, "answer": "a"} for number in range(2000)]
    data = gzip.compress(lines(rows))
    assert len(lines(rows)) > 20 * len(data)
    (tmp_path / "rows.gz").write_bytes(data)
    assert len(read_samples(tmp_path / "rows.gz", rejected=[])) == 2000


@pytest.mark.parametrize("pack", [gzip.compress, zstandard], ids=["gzip", "zstd"])
def test_damaged_compression_is_named(tmp_path: Path, pack: Any) -> None:
    rng = np.random.default_rng(7)
    rows = [{"id": str(n), "question": rng.bytes(40).hex(), "answer": "a"} for n in range(500)]
    data = pack(lines(rows))
    damaged = {"cut": data[:-20], "changed": data[:20] + b"\0\1\2\3" * 9 + data[56:], "more": data + b"more"}
    for name, whole in damaged.items():
        (tmp_path / name).write_bytes(whole)
        with pytest.raises(InputError, match=f"{name}.*expected a (gzip|Zstandard) file that is whole"):
            read_samples(tmp_path / name, rejected=[])


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_memory_is_bounded_whatever_the_table_s_length(tmp_path: Path, compression: str) -> None:
    """Ten times the rows, and about the same peak while they are read past."""

    def peak(size: int) -> int:
        text = np.random.default_rng(size).bytes(2000).hex()
        rows = [{"id": str(n), "question": f"{n} {text}", "answer": "a"} for n in range(size)]
        arrow.parquet.write_table(
            arrow.Table.from_pylist(rows), tmp_path / str(size), compression=compression, use_dictionary=False
        )
        before = arrow.total_allocated_bytes()
        tracemalloc.start()
        try:
            most = max(arrow.total_allocated_bytes() for _ in iter_rows(tmp_path / str(size))) - before
            return most + tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)
    assert peak(5000) < peak(500) + 4 * MiB  # a page and a batch of 32; all rows together are 20 MiB


def test_a_long_list_is_read_block_by_block(tmp_path: Path) -> None:
    def peak(size: int) -> int:
        rows = [{"id": str(n), "question": "What? " * 500, "answer": "a"} for n in range(size)]
        (tmp_path / str(size)).write_text(json.dumps(rows))
        tracemalloc.start()
        try:
            assert sum(1 for _ in iter_rows(tmp_path / str(size))) == size
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(8000) < peak(2000) + MiB  # 24 MB and 6 MB of text, of which a block of 1 MB is held


def test_without_pyarrow_the_error_names_the_extra(root: Path) -> None:
    """Where it can't be imported, JSON lines and gzip are read all the same."""
    files = [CONTAINERS[name](root, ROWS) for name in ("parquet by datasets", "a saved folder")]
    (root / "rows.zst").write_bytes(zstandard(lines(ROWS)))
    (root / "rows.gz").write_bytes(gzip.compress(lines(ROWS)))
    script = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from srcfast.data.readers import read_samples\n"
        "from srcfast.errors import InputError\n"
        "from pathlib import Path\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(len(read_samples(Path(name), rejected=[])))\n"
        "    except InputError as error: print(error)\n"
    )
    names = [*map(str, files), str(root / "rows.zst"), str(root / "rows.gz")]
    found = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True, check=True)
    *refused, read = found.stdout.splitlines()
    for text, what in zip(refused, ("a parquet file", "an Arrow stream", "a Zstandard file"), strict=True):
        assert f"expected pyarrow, which reads {what}" in text and "pip install 'srcfast[data]'" in text
    assert read == "3"


def test_the_limits_are_what_the_page_says() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    assert f"{opening.MAX_TEXT >> 20} MiB" in page and f"{opening.MAX_RATIO} times" in page


def test_ids_that_occur_twice_are_renamed_where_that_is_set(tmp_path: Path) -> None:
    rows = [{"id": name, "question": "q", "answer": str(n)} for n, name in enumerate(["a", "a", "b", "a", "a-2"])]
    (tmp_path / "rows.jsonl").write_bytes(lines(rows))
    rejected: list[dict[str, Any]] = []
    samples = read_samples(tmp_path / "rows.jsonl", rejected=rejected)
    assert [s.id for s in samples] == ["a", "b", "a-2"] and [row["line"] for row in rejected] == [2, 4]
    assert "duplicate_ids" in rejected[0]["reason"]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        samples = read_samples(tmp_path / "rows.jsonl", rejected=[], duplicate_ids="rename")
    assert [(s.id, s.answer) for s in samples] == [("a", "0"), ("a-3", "1"), ("b", "2"), ("a-4", "3"), ("a-2", "4")]
    [warning] = found  # a-2 is an id of the file
    text = str(warning.message)
    assert "2 ids" in text and f"'a' of {tmp_path / 'rows.jsonl'}, line 2: 'a-3'" in text


def test_an_image_that_can_not_be_written_is_not_a_damaged_table(tmp_path: Path) -> None:
    row = {"id": "a", "image": {"bytes": picture(1), "path": None}, "question": "What?", "answer": "red"}
    arrow.parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    (tmp_path / "rows.parquet.images").write_text("in the way")
    with pytest.raises(FileExistsError, match=r"rows\.parquet\.images"):
        read_samples(tmp_path / "rows.parquet", rejected=[])


def test_two_stars_name_files_at_every_depth(tmp_path: Path) -> None:
    names = ["b.jsonl", "c/a.jsonl", "c/d/e/f.jsonl", "c/d/g.jsonl"]  # in the order of their paths
    for name in [*names, "c/other.txt"]:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}\n")
    assert containers.files_of(tmp_path / "**" / "*.jsonl") == [tmp_path / name for name in names]
    assert containers.files_of(tmp_path / "*" / "*.jsonl") == [tmp_path / "c/a.jsonl"]
    assert containers.files_of([tmp_path / "c/d/**/*.jsonl", tmp_path / "b.jsonl"]) == [
        tmp_path / name for name in ("c/d/e/f.jsonl", "c/d/g.jsonl", "b.jsonl")
    ]
