"""Pictures of tables and made-up ids never take the place of others."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from srcfast.data.convert import convert
from srcfast.data.images import load_image
from srcfast.data.readers import read_preferences, read_samples
from srcfast.data.records import Sample

RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 255, 0)


def code(color: tuple[int, int, int]) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_table(file: Path, *rows: tuple[str, str]) -> Path:
    lines = [f"{index}\t{image}\tWhat color?\tred" for index, image in rows]
    file.write_text("\n".join(["index\timage\tquestion\tanswer", *lines]), encoding="utf-8")
    return file


def read_table(file: Path, output: Path | None = None) -> list[Sample]:
    rejected: list[dict[str, Any]] = []
    samples = read_samples(file, format="vlmeval_tsv", image_root=file.parent, rejected=rejected, image_output=output)
    assert not rejected
    return samples


def colors(samples: list[Sample]) -> list[list[tuple[int, ...]]]:
    return [[load_image(s.image_root, name).getpixel((0, 0)) for name in s.images] for s in samples]


@pytest.mark.parametrize("output", [None, "one folder"])
def test_tables_of_one_stem_keep_their_pictures_apart(tmp_path: Path, output: str | None) -> None:
    tables = {name: color for name, color in (("b.tsv", RED), ("b.txt", BLUE), ("b", GREEN), ("b.c.tsv", BLUE))}
    folder = None if output is None else tmp_path / output
    read = [read_table(write_table(tmp_path / name, ("1", code(color))), folder) for name, color in tables.items()]
    assert [colors(samples) for samples in read] == [[[color]] for color in tables.values()]  # after all were read
    again = [read_table(tmp_path / name, folder) for name in tables]
    assert [[s.images for s in samples] for samples in again] == [[s.images for s in samples] for samples in read]


def test_indexes_whose_pictures_would_share_a_name_keep_them_apart(tmp_path: Path) -> None:
    several = str([code(RED), code(BLUE)])
    samples = read_table(write_table(tmp_path / "t.tsv", ("a", several), ("a-1", code(GREEN)), ("b", code(BLUE))))
    assert colors(samples) == [[RED, BLUE], [GREEN], [BLUE]]
    samples = read_table(write_table(tmp_path / "u.tsv", ("a-1", code(GREEN)), ("a", several)))
    assert colors(samples) == [[GREEN], [RED, BLUE]]


def test_a_table_that_has_changed_shows_its_new_picture_and_old_samples_the_old_one(tmp_path: Path) -> None:
    old = read_table(write_table(tmp_path / "t.tsv", ("1", code(RED))))
    new = read_table(write_table(tmp_path / "t.tsv", ("1", code(BLUE))))
    assert (colors(old), colors(new)) == ([[RED]], [[BLUE]])
    assert old[0].images == ("1.png",) and (tmp_path / "t.tsv.images" / "1.png").is_file()  # as runs have it stored


def test_tables_converted_into_files_of_one_stem_keep_their_pictures_apart(tmp_path: Path) -> None:
    for name, format, color in (("out.jsonl", "jsonl", RED), ("out.json", "llava", BLUE)):
        options = {"source_format": "vlmeval_tsv", "target_format": format, "image_root": tmp_path}
        source = write_table(tmp_path / f"{format}.tsv", ("1", code(color)))
        convert(source, tmp_path / name, rejected=[], lost=Counter(), **options)
    for name, format, color in (("out.jsonl", "jsonl", RED), ("out.json", "llava", BLUE)):
        assert colors(read_samples(tmp_path / name, format=format, image_root=tmp_path, rejected=[])) == [[color]]


@pytest.mark.parametrize("order", [1, -1])
def test_a_made_up_id_makes_way_for_a_real_one(tmp_path: Path, order: int) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    rows = [
        {"id": "v", "conversations": turns * 3},
        {"id": "v-1", "conversations": turns},
        {"id": "v-1-2", "conversations": turns},
        {"conversations": turns},
        {"id": "record-4", "conversations": turns},
    ]
    rows = rows if order == 1 else [*rows[2::-1], *rows[3:]]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    rejected: list[dict[str, Any]] = []
    samples = read_samples(tmp_path / "a.json", format="llava", image_root=tmp_path, rejected=rejected)
    assert not rejected and len(samples) == 7
    names = [["v", "v-1-3", "v-2"], ["v-1"], ["v-1-2"]][::order]
    assert [sample.id for sample in samples] == [*sum(names, []), "record-4-2", "record-4"]


def test_made_up_ids_without_a_real_one_stay_and_real_ones_occur_once(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    rows = [{"conversations": turns * 2}, {"id": "a", "conversations": turns}, {"id": "a", "conversations": turns}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    rejected: list[dict[str, Any]] = []
    samples = read_samples(tmp_path / "a.json", format="llava", image_root=tmp_path, rejected=rejected)
    assert [sample.id for sample in samples] == ["record-1", "record-1-1", "a"]
    assert [row["field"] for row in rejected] == ["id"]


@pytest.mark.parametrize(("format", "made_up"), [("jsonl", "line-2"), ("trl", "record-2")])
def test_a_pair_without_an_id_is_never_taken_for_another_sample_s(tmp_path: Path, format: str, made_up: str) -> None:
    pair = {"images": [], "prompt": "What?", "chosen": "red", "rejected": "blue"}
    rows = [pair | {"sample_id": made_up}, pair, pair | {"sample_id": "other"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = read_preferences(tmp_path / "a.jsonl", format=format, image_root=tmp_path, rejected=[])
    assert [read.sample_id for read in pairs] == [made_up, f"{made_up}-2", "other"]


def test_pairs_without_ids_of_several_files_have_ids_of_their_own(tmp_path: Path) -> None:
    pair = {"images": [], "prompt": "What?", "chosen": "red", "rejected": "blue"}
    files = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for file, rows in zip(files, ([pair] * 2, [pair, pair | {"sample_id": "s"}] * 2, [pair]), strict=True):
        file.write_text("\n".join(map(json.dumps, rows)))
    pairs = read_preferences(files, image_root=tmp_path, rejected=[])
    names = ["line-1", "line-2", "line-1-2", "s", "line-3", "s", "line-1-3"]
    assert [read.sample_id for read in pairs] == names
    assert [read.sample_id for read in read_preferences(files[1], image_root=tmp_path, rejected=[])] == [
        "line-1", "s", "line-3", "s"
    ]  # fmt: skip
