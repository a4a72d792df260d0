"""Good records are read, bad ones are set aside with file, line, field, expected and found, and none is lost."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.seeds import fresh_rng
from PIL import Image

from srcfast.data.readers import check_rejected, read_logprob_rows, read_preferences, read_samples
from srcfast.data.turns import Turn
from srcfast.errors import InputError

GOOD = {"id": "s", "image": "good.png", "question": "What color?", "answer": "red"}
PAIR = {"sample_id": "s", "images": ["good.png"], "prompt": "What color?", "chosen": "red", "rejected": "blue"}
TURNS = [{"from": "human", "value": "<image>\nWhat color?"}, {"from": "gpt", "value": "red"}]

# kind -> (the line or what changes in GOOD; None takes a key out), the field named)
BAD_SAMPLES: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "half an object": (b'{"id": "x", "image": ', "record"),
    "two objects": (b'{"id": "x"} {"id": "y"}', "record"),
    "a list": (b'["x", "good.png"]', "record"),
    "a bare number": (b"7", "record"),
    "not a number": (b'{"id": "x", "question": "q", "answer": "a", "weight": NaN}', "record"),
    "not UTF-8": (b'{"id": "x", "question": "\xff\xfe", "answer": "a"}', "record"),
    "half a surrogate pair": (b'{"id": "x", "question": "\\ud800", "answer": "a"}', "record"),
    "deep nesting": (b"[" * 100_000, "record"),
    "no id": ({"id": None}, "id"),
    "an empty id": ({"id": ""}, "id"),
    "an id that is a list": ({"id": ["x"]}, "id"),
    "an id that is a boolean": ({"id": True}, "id"),
    "an id seen before": ({"id": "first"}, "id"),
    "no question": ({"question": None}, "question"),
    "an empty question": ({"question": "  "}, "question"),
    "a question of marks alone": ({"question": "<image>"}, "question"),
    "no answer": ({"answer": None}, "answer"),
    "an empty answer": ({"answer": ""}, "answer"),
    "an answer that is a list": ({"answer": ["red"]}, "answer"),
    "a yes that is a boolean": ({"answer": True}, "answer"),
    "a rationale that is a list": ({"rationale": ["It is red."]}, "rationale"),
    "facts that are numbers": ({"facts": [1, 2]}, "facts"),
    "an image that is a number": ({"image": 3}, "images"),
    "an empty image path": ({"image": ""}, "images"),
    "image and images": ({"images": ["good.png"]}, "images"),
    "more marks than images": ({"question": "<image> and <image>: the same?"}, "images"),
    "fewer marks than images": ({"image": ["good.png", "good.png"], "question": "<image> What?"}, "images"),
    "a mark without image": ({"image": None, "question": "<image> What color?"}, "images"),
    "a missing image": ({"image": "none.png"}, "image"),
    "a truncated image": ({"image": "truncated.png"}, "image"),
    "a text for an image": ({"image": "text.png"}, "image"),
    "an animated image": ({"image": "animated.gif"}, "image"),
    "a bomb": ({"image": "bomb.png"}, "image"),
    "an image outside of the root": ({"image": "../outside.png"}, "image"),
    "an image outside of the root by its full path": ({"image": "/none/outside.png"}, "image"),
    "an image outside of the root by a link": ({"image": "link.png"}, "image"),
    "a NUL in the path": ({"image": "a\0b.png"}, "image"),
    "a folder": ({"image": "folder"}, "image"),
    "a truncated JPEG": ({"image": "truncated.jpg"}, "image"),
    "the second image missing": ({"image": ["good.png", "none.png"]}, "image"),
}

BAD_PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": None}, "prompt"),
    "an empty chosen": ({"chosen": " "}, "chosen"),
    "no rejected": ({"rejected": None}, "rejected"),
    "nothing to prefer": ({"rejected": "red"}, "rejected"),
    "no confidence at all": ({"confidence": 0}, "confidence"),
    "too much confidence": ({"confidence": 1.5}, "confidence"),
    "a confidence that is true": ({"confidence": True}, "confidence"),
    "a confidence below none": ({"confidence": -0.5}, "confidence"),
    "a confidence in words": ({"confidence": "high"}, "confidence"),
    "a reference in words": ({"reference_chosen_logprob": "low"}, "reference_chosen_logprob"),
    "a missing image": ({"images": ["none.png"]}, "image"),
    "more marks than images": ({"prompt": "<image><image> What?"}, "images"),
}

BAD_TRL: dict[str, tuple[dict[str, Any], str]] = {
    "two turns": ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "prompt"),
    "another role": ({"chosen": [{"role": "user", "content": "red"}]}, "chosen"),
    "no content": ({"chosen": [{"role": "assistant"}]}, "chosen"),
    "parts that are strings": ({"rejected": [{"role": "assistant", "content": ["blue"]}]}, "rejected"),
    "a part without text": ({"rejected": [{"role": "assistant", "content": [{"type": "text"}]}]}, "rejected"),
    "an image in the response": (
        {"chosen": [{"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "red"}]}]},
        "chosen",
    ),
    "two image parts, one image": (
        {"prompt": [{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "q"}]}]},
        "images",
    ),
    "no rejected": ({"rejected": None}, "rejected"),
    "a missing image": ({"images": ["none.png"]}, "image"),
}

BAD_CONVERSATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no conversations": ({"conversations": None}, "conversations"),
    "no turns": ({"conversations": []}, "conversations"),
    "a question without answer": ({"conversations": TURNS[:1]}, "conversations"),
    "the answer first": ({"conversations": TURNS[::-1]}, "conversations"),
    "a turn that is a string": ({"conversations": ["What color?", "red"]}, "conversations"),
    "an empty answer": ({"conversations": [TURNS[0], {"from": "gpt", "value": " "}]}, "answer"),
    "an empty question": ({"conversations": [{"from": "human", "value": "<image>"}, TURNS[1]]}, "question"),
    "more marks than images": ({"conversations": TURNS * 2}, "images"),
    "an id seen before": ({"id": "first"}, "id"),
    "a missing image": ({"image": "none.png"}, "image"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    picture = Image.fromarray(fresh_rng().integers(0, 256, (11, 13, 3), dtype=np.uint8))
    picture.save(folder / "good.png")
    picture.save(tmp_path / "outside.png")
    os.symlink(tmp_path / "outside.png", folder / "link.png")
    (folder / "folder").mkdir()
    picture.save(folder / "whole.jpg")
    data = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) * 2 // 3])
    picture.save(folder / "animated.gif", save_all=True, append_images=[picture.rotate(180)])
    Image.new("1", (8000, 8000)).save(folder / "bomb.png")
    data = (folder / "good.png").read_bytes()
    (folder / "truncated.png").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("no image")
    return folder


def changed(row: dict[str, Any], **change: Any) -> dict[str, Any]:
    return {key: value for key, value in (row | change).items() if value is not None}


def assert_named(row: dict[str, Any], file: Path, line: int, field: str) -> None:
    assert (row["file"], row["line"], row["field"]) == (str(file), line, field), row
    assert row["expected"] and row["found"] and str(line) in row["reason"]
    json.dumps(row, allow_nan=False, ensure_ascii=False).encode("utf-8")


def test_every_kind_of_bad_line_is_set_aside_and_the_rest_is_read(tmp_path: Path, root: Path) -> None:
    lines = [json.dumps(GOOD | {"id": "first"}).encode()]
    for number, (change, _) in enumerate(BAD_SAMPLES.values()):
        if isinstance(change, dict):
            change = json.dumps(changed(GOOD, **({"id": f"bad-{number}"} | change))).encode()
        lines += [change, json.dumps(GOOD | {"id": f"good-{number}", "weight": number}).encode()]
    file = tmp_path / "samples.jsonl"
    file.write_bytes(b"\n".join(lines))
    rejected: list[dict[str, Any]] = []
    samples = read_samples(file, format="jsonl", image_root=root, rejected=rejected)
    assert len(samples) + len(rejected) == len(lines)
    assert [sample.id for sample in samples] == ["first", *(f"good-{i}" for i in range(len(BAD_SAMPLES)))]
    assert [sample.extra for sample in samples[1:]] == [{"weight": i} for i in range(len(BAD_SAMPLES))]
    for number, (row, (kind, (change, field))) in enumerate(zip(rejected, BAD_SAMPLES.items(), strict=True)):
        assert_named(row, file, 2 * number + 2, field)
        if isinstance(change, dict) and "id" not in change:
            assert row["sample_id"] == f"bad-{number}", kind


@pytest.mark.parametrize(
    ("format", "good", "bad"),
    [("jsonl", PAIR, BAD_PAIRS), ("trl", PAIR, BAD_PAIRS), ("trl", PAIR, BAD_TRL)],
    ids=["ours", "strings", "messages"],
)
@pytest.mark.parametrize("as_list", [False, True])
def test_bad_preferences_are_set_aside(tmp_path: Path, root: Path, format, good, bad, as_list: bool) -> None:
    if as_list and format == "jsonl":
        pytest.skip("JSON lines only")
    rows = [row for change, _ in bad.values() for row in (good, changed(good, **change))]
    file = tmp_path / "pairs.json"
    lines = [json.dumps(row) for row in rows]
    file.write_text("[\n" + ",\n".join(lines) + "\n]" if as_list else "\n".join(lines))
    rejected: list[dict[str, Any]] = []
    pairs = read_preferences(file, format=format, image_root=root, rejected=rejected)
    assert len(pairs) == len(rejected) == len(bad)
    for number, (row, (_, field)) in enumerate(zip(rejected, bad.values(), strict=True)):
        assert_named(row, file, 2 * number + 2 + as_list, field)


@pytest.mark.parametrize("as_list", [False, True])
def test_bad_conversations_are_set_aside(tmp_path: Path, root: Path, as_list: bool) -> None:
    good = {"id": "first", "image": "good.png", "conversations": TURNS}
    rows = [good]
    for number, (change, _) in enumerate(BAD_CONVERSATIONS.values()):
        rows += [changed(good, **({"id": f"bad-{number}"} | change)), good | {"id": number}]
    file = tmp_path / "llava.json"
    lines = [json.dumps(row) for row in rows]
    file.write_text("[\n" + ",\n".join(lines) + "\n]" if as_list else "\n".join(lines))
    rejected: list[dict[str, Any]] = []
    samples = read_samples(file, format="llava", image_root=root, rejected=rejected)
    assert len(samples) + len(rejected) == len(rows)
    assert [(s.question, s.answer, s.images) for s in samples] == [("What color?", "red", ("good.png",))] * len(samples)
    for number, (row, (_, field)) in enumerate(zip(rejected, BAD_CONVERSATIONS.values(), strict=True)):
        assert_named(row, file, 2 * number + 2 + as_list, field)


@pytest.mark.parametrize("format", ["llava", "trl"])
@pytest.mark.parametrize(
    "bad", ['"a": 1, "a": 2', '"a": {"b": 1, "b": 2}', '"a": [1e999]', f'"a": {"9" * 5000}', '"a": NaN']
)
def test_one_bad_record_of_a_list_is_set_aside_and_the_rest_is_read(
    tmp_path: Path, root: Path, format: str, bad: str
) -> None:
    row = {"image": "good.png", "conversations": TURNS} if format == "llava" else PAIR
    file, good, rejected = tmp_path / "rows.json", json.dumps(row), []
    file.write_text(f"[\n{good},\n{good[:-1]},\n {bad}}},\n{good}\n]")
    if format == "llava":
        found = read_samples(file, format=format, image_root=root, rejected=rejected)
        assert [sample.id for sample in found] == ["record-1", "record-3"]
    else:
        assert len(read_preferences(file, format=format, image_root=root, rejected=rejected)) == 2
    [one] = rejected
    assert_named(one, file, 3, "record")


def test_an_id_that_occurs_twice_on_one_line_is_rejected(tmp_path: Path, root: Path) -> None:
    rows = [{"id": name, "image": "good.png", "conversations": TURNS} for name in ("a", "b", "a")]
    file, rejected = tmp_path / "llava.json", []
    file.write_text(json.dumps(rows))
    samples = read_samples(file, format="llava", image_root=root, rejected=rejected)
    assert [sample.id for sample in samples] == ["a", "b"]
    assert [row["sample_id"] for row in rejected] == ["a"]
    assert_named(rejected[0], file, 1, "id")


def test_later_turns_are_questions_after_those_before(tmp_path: Path, root: Path) -> None:
    more = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "3"}]
    empty = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": ""}]
    row = {
        "id": 7,
        "image": "good.png",
        "conversations": TURNS + more + empty + more,
        "rationale": "It is red.",
        "source": "x",
    }
    unnamed = {"image": "good.png", "conversations": TURNS}
    file = tmp_path / "llava.json"
    file.write_text(json.dumps([row, unnamed, unnamed]))  # all on one line
    rejected: list[dict[str, Any]] = []
    samples = read_samples(file, format="llava", image_root=root, rejected=rejected)
    assert [s.id for s in samples] == ["7", "7-1", "record-2", "record-3"]
    assert [s.rationale for s in samples[:2]] == ["It is red.", None]
    assert [s.extra for s in samples[:2]] == [{"source": "x"}] * 2
    assert [s.turns for s in samples] == [(), (Turn("user", "What color?"), Turn("assistant", "red")), (), ()]
    assert [(s.question, s.answer, s.images) for s in samples[:2]] == [
        ("What color?", "red", ("good.png",)),
        ("How many?", "3", ("good.png",)),
    ]
    # The answer that is missing would also be context of what follows.
    assert [(row["sample_id"], row["field"]) for row in rejected] == [("7-2", "answer"), ("7-3", "answer")]


def image_code(seed: int, size: tuple[int, int] = (6, 5)) -> str:
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "png")
    return base64.b64encode(data.getvalue()).decode()


def write_tsv(file: Path, rows: list[dict[str, Any]], columns: list[str]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


COLUMNS = ["index", "image", "question", "hint", "A", "B", "answer", "category", "l2-category", "split"]


def test_a_table_gives_options_images_and_references(tmp_path: Path) -> None:
    code = image_code(0)
    rows = [
        {
            "index": 3,
            "image": 5,
            "question": "Which\none?",
            "A": "red",
            "B": "blue",
            "answer": "A",
            "category": "color",
        },
        {"index": 5, "image": code, "question": "How\tmany?", "answer": "2", "l2-category": "count", "split": "val"},
        {"index": "../x", "image": f"['{image_code(1)}', '{image_code(2)}']", "question": "Same?", "answer": "no"},
        {"index": 8, "image": code, "question": "Q", "hint": "H", "A": "x", "answer": "A"},
    ]
    file = tmp_path / "t.tsv"
    write_tsv(file, rows, COLUMNS)
    rejected: list[dict[str, Any]] = []
    out = tmp_path / "out"
    samples = read_samples(file, format="vlmeval_tsv", image_root=tmp_path, rejected=rejected, image_output=out)
    assert not rejected and [s.id for s in samples] == ["3", "5", "../x", "8"]
    end = "Please select the correct answer from the options above."
    assert samples[0].question == f"Question: Which\none?\nOptions:\nA. red\nB. blue\n{end}"
    assert samples[3].question == f"Hint: H\nQuestion: Q\nOptions:\nA. x\n{end}"
    assert samples[1].question == "How\tmany?" and samples[1].extra == {"l2-category": "count", "split": "val"}
    assert samples[0].extra["ability"] == "color" and samples[0].images == samples[1].images
    assert (out / samples[1].images[0]).read_bytes() == base64.b64decode(code)
    assert len(samples[2].images) == 2 and all((out / name).is_file() for name in samples[2].images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "t.tsv"]


def test_bad_rows_of_a_table_are_set_aside(tmp_path: Path) -> None:
    good = {"index": "first", "image": image_code(0), "question": "What?", "answer": "red"}
    bad: list[tuple[dict[str, Any], str]] = [
        ({"index": ""}, "index"),
        ({"index": "first"}, "id"),
        ({"image": ""}, "image"),
        ({"image": "7000"}, "image"),
        ({"image": "[" + " " * 99 + "]"}, "image"),
        ({"image": "?" * 99}, "image"),
        ({"image": base64.b64encode(b"no image" * 20).decode()}, "image"),
        ({"image": image_code(1, (40, 40))[:2000]}, "image"),
        ({"question": ""}, "question"),
        ({"answer": " "}, "answer"),
    ]
    rows = [good]
    for number, (change, _) in enumerate(bad):
        rows += [good | {"index": f"bad-{number}"} | change, good | {"index": number, "image": "first"}]
    file = tmp_path / "t.tsv"
    write_tsv(file, rows, ["index", "image", "question", "answer"])
    with open(file, "ab") as opened:
        opened.write(b'short\tfirst\nutf\tfirst\t\xff\tred\nquoted\tfirst\t"a" b\tred\nlast\tfirst\tWhat?\tred\n')
        opened.write(b'open\tfirst\t"What?\tred\n')
    rejected: list[dict[str, Any]] = []
    samples = read_samples(file, format="vlmeval_tsv", image_root=tmp_path, rejected=rejected)
    assert [s.id for s in samples] == ["first", *map(str, range(len(bad))), "last"]
    assert len(samples) + len(rejected) == len(rows) + 5
    fields = [(2 * number + 3, field) for number, (_, field) in enumerate(bad)]
    after = len(rows) + 2
    fields += [(after, "record"), (after + 1, "question"), (after + 2, "record"), (after + 4, "record")]
    for row, (line, field) in zip(rejected, fields, strict=True):
        assert_named(row, file, line, field)


@pytest.mark.parametrize(("opened", "rejected_lines"), [([4], [4]), ([4, 5], [4, 5]), ([4, 9], [4, 9])])
def test_a_quote_left_open_costs_no_row_but_its_own(tmp_path: Path, opened: list[int], rejected_lines) -> None:
    rows = [f"first\t{image_code(0)}\tWhat?\tred"]
    rows += ["\t".join((str(n), "first", '"What?' if n in opened else "What?", "red")) for n in range(3, 40)]
    file = tmp_path / "t.tsv"
    file.write_text("\n".join(["index\timage\tquestion\tanswer", *rows]))
    rejected: list[dict[str, Any]] = []
    samples = read_samples(file, format="vlmeval_tsv", image_root=tmp_path, rejected=rejected)
    assert [row["line"] for row in rejected] == rejected_lines
    assert [s.id for s in samples] == ["first", *(str(n) for n in range(3, 40) if n not in opened)]


def test_indexes_that_differ_by_a_space_have_images_of_their_own(tmp_path: Path) -> None:
    codes = {"1": image_code(1), " 1": image_code(2)}
    rows = [{"index": index, "image": code, "question": "Q", "answer": "a"} for index, code in codes.items()]
    rows += [{"index": f"names {one!r}", "image": one, "question": "Q", "answer": "a"} for one in ("1 ", "1", " 1")]
    file, rejected = tmp_path / "t.tsv", []
    write_tsv(file, rows, ["index", "image", "question", "answer"])
    samples = read_samples(file, format="vlmeval_tsv", image_root=tmp_path, rejected=rejected)
    found = [(s.image_root / s.images[0]).read_bytes() for s in samples]
    assert not rejected and found == [base64.b64decode(codes[one]) for one in ("1", " 1", "1", "1", " 1")]


@pytest.mark.parametrize("header", ["index\timage\tquestion", "index\timage\tquestion\tanswer\tanswer", "", "a\tb"])
def test_a_table_without_its_columns_is_refused(tmp_path: Path, header: str) -> None:
    (tmp_path / "t.tsv").write_text(f"{header}\n1\t2\t3\t4\n")
    with pytest.raises(InputError, match="line 1, field 'header'"):
        read_samples(tmp_path / "t.tsv", format="vlmeval_tsv", image_root=tmp_path, rejected=[])


@pytest.mark.parametrize("answer", [7, 3.5, -1])
def test_a_number_is_an_answer(tmp_path: Path, root: Path, answer: float) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD | {"answer": answer}))
    [sample] = read_samples(tmp_path / "a.jsonl", format="jsonl", image_root=root, rejected=[])
    assert sample.answer == str(answer)


def test_a_confidence_that_is_no_number_spoils_its_line(tmp_path: Path, root: Path) -> None:
    file, rejected = tmp_path / "p.jsonl", []
    file.write_text("\n".join([json.dumps(PAIR), json.dumps(PAIR | {"confidence": float("nan")})]))
    assert len(read_preferences(file, format="jsonl", image_root=root, rejected=rejected)) == 1
    [row] = rejected
    assert_named(row, file, 2, "record")
    assert "NaN" in row["found"] or "nan" in row["found"]


@pytest.mark.parametrize("format", ["jsonl", "llava", "vlmeval_tsv", "parquet"])
def test_a_file_that_cannot_be_read_is_refused_as_a_whole(tmp_path: Path, format: str) -> None:
    with pytest.raises(InputError, match="none.x"):
        read_samples(tmp_path / "none.x", format=format, image_root=tmp_path, rejected=[])
    if format in ("llava", "vlmeval_tsv"):
        (tmp_path / "a.x").write_text('[\n{"id": 1},\n{"id": 2\n')
        with pytest.raises(InputError, match="a.x, line"):
            read_samples(tmp_path / "a.x", format=format, image_root=tmp_path, rejected=[])


@pytest.mark.parametrize("text", ["[", "[{}", "[{},", "[{} {}]", "[{}, nope]"])
def test_a_broken_list_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match="line 1"):
        read_preferences(tmp_path / "a.json", format="trl", image_root=tmp_path, rejected=[])


def test_images_go_unchecked_only_when_told(tmp_path: Path, root: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(GOOD | {"image": "none.png"}))
    rejected: list[dict[str, Any]] = []
    assert len(read_samples(file, format="jsonl", image_root=root, rejected=rejected, check_images=False)) == 1
    assert not rejected


def test_logprob_rows_stop_at_the_first_bad_line(tmp_path: Path, root: Path) -> None:
    good = {"images": ["good.png"], "prompt": "<image>\nWhat?", "response": "red"}
    file = tmp_path / "a.jsonl"
    file.write_text("\n\n".join(map(json.dumps, [good, good | {"images": [], "prompt": " What?\n"}])))
    rows = read_logprob_rows(file, root)
    assert [(r.images, r.question, r.answer, r.image_root) for r in rows] == [
        (("good.png",), "What?", "red", root),
        ((), " What?\n", "red", root),  # not touched: its tokens count
    ]
    for change in ({"images": ["none.png"]}, {"response": ""}, {"prompt": 3}, {"images": []}):
        file.write_text("\n".join(map(json.dumps, [good, good | change])))
        with pytest.raises(InputError, match=r"a\.jsonl, line 2"):
            read_logprob_rows(file, root)


@pytest.mark.parametrize(
    ("limit", "refused"), [(2, True), (3, False), (0.29, True), (0.3, False), (1.0, False), (0, True)]
)
def test_too_many_rejected_stop_the_run(limit: float, refused: bool) -> None:
    row = {"file": "a", "line": 1, "field": "image", "expected": "an image file", "found": "x", "reason": "why"}
    rejected = [row, row, row | {"field": "answer", "expected": "a non-empty string"}]
    if not refused:
        check_rejected(rejected, 10, limit)
        return
    with pytest.raises(InputError, match="2 'image': expected an image file; 1 'answer'"):
        check_rejected(rejected, 10, limit)


def test_that_all_are_bad_is_refused_whatever_the_limit() -> None:
    row = {"file": "a", "line": 1, "field": None, "expected": "x", "found": "y", "reason": "why"}
    check_rejected([], 0, 0)
    with pytest.raises(InputError):
        check_rejected([row], 1, 1.0)
