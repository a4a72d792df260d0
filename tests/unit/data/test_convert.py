"""What is converted there and back is what it was; what a format can't carry is named."""

from __future__ import annotations

import base64
import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.seeds import fresh_rng
from PIL import Image

from srcfast.data.convert import convert, prediction_columns, write_predictions_tsv
from srcfast.data.readers import read_preferences, read_samples
from srcfast.data.records import Sample
from srcfast.data.vlmeval import write_vlmeval_tsv
from srcfast.errors import InputError

NESTED = {"scene": {"objects": [1, {"a": None}]}, "tags": ["x"]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.png", "below/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(fresh_rng().integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def sample_rows() -> list[dict[str, Any]]:
    return [
        {"id": "1", "images": ["a.png"], "question": 'Is it "red"\tor\nblue?', "answer": "red", "ability": "color"},
        {"id": "x/2", "images": ["a.png"], "question": "\u00e9?", "answer": "'1'", "rationale": "It is. So it is."},
        {"id": "3", "images": ["a.png", "below/b.png"], "question": "Same?", "answer": "no", "split": "val"},
        {"id": "4", "images": ["below/b.png"], "question": "What?", "answer": "a ball", "facts": ["It rolls."]},
    ]


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def run(source: Path, target: Path, formats: str, root: Path, lost: Counter | None = None) -> int:
    rejected: list[dict[str, Any]] = []
    one, other = formats.split(">")
    count = convert(
        source, target, source_format=one, target_format=other, image_root=root, rejected=rejected, lost=lost
    )
    assert not rejected
    return count


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_conversations_carry_all_that_samples_hold(root: Path) -> None:
    rows = [row | NESTED for row in sample_rows()]
    lost: Counter[str] = Counter()
    source = write_lines(root / "s.jsonl", rows)
    assert run(source, root / "s.json", "jsonl>llava", root, lost) == 4
    assert run(root / "s.json", root / "back.jsonl", "llava>jsonl", root, lost) == 4
    assert lines_of(root / "back.jsonl") == rows and not lost


def test_tables_carry_samples_and_the_very_bytes_of_their_images(root: Path) -> None:
    source = write_lines(root / "s.jsonl", [row | NESTED for row in sample_rows()])
    lost: Counter[str] = Counter()
    assert run(source, root / "t.tsv", "jsonl>vlmeval_tsv", root, lost) == 4
    assert lost == {"facts": 1, "scene": 4, "tags": 4}
    run(root / "t.tsv", root / "back.jsonl", "vlmeval_tsv>jsonl", root)
    back, rows = lines_of(root / "back.jsonl"), sample_rows()
    for key in ("id", "question", "answer", "rationale", "ability", "split"):
        assert [row.get(key) for row in back] == [row.get(key) for row in rows], key
    for row, old in zip(back, rows, strict=True):
        assert [(root / name).read_bytes() for name in row["images"]] == [
            (root / n).read_bytes() for n in old["images"]
        ]
    rejected: list[dict[str, Any]] = []  # the paths hold from the target's folder on
    assert len(read_samples(root / "back.jsonl", format="jsonl", image_root=root, rejected=rejected)) == 4
    with open(root / "t.tsv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file, delimiter="\t"))
    assert [len(row["image"]) > 64 for row in table] == [True, False, True, True]  # the second names the first
    assert table[1]["image"] == "1"


def test_a_table_with_options_comes_back_as_it_was(root: Path) -> None:
    run(write_lines(root / "s.jsonl", sample_rows()[:1]), root / "one.tsv", "jsonl>vlmeval_tsv", root)
    with open(root / "one.tsv", encoding="utf-8", newline="") as file:
        code = next(csv.DictReader(file, delimiter="\t"))["image"]
    header = "index\timage\tquestion\tanswer\tA\tB\tcategory\n"
    table = f"{header}7\t{code}\tWhich?\tB\tred\tblue\tcolor\n8\t7\tIs it?\tyes\t\t\tlogic\n"
    (root / "t.tsv").write_text(table)
    run(root / "t.tsv", root / "t.jsonl", "vlmeval_tsv>jsonl", root)
    run(root / "t.jsonl", root / "back.tsv", "jsonl>vlmeval_tsv", root)
    assert (root / "back.tsv").read_text() == table


def test_preferences_come_back_from_trl(root: Path) -> None:
    pair = {
        "sample_id": "s",
        "images": ["a.png"],
        "prompt": " Q?",
        "chosen": "A.\nB",
        "rejected": "C ",
        "confidence": 0.5,
    }
    reference = {"reference_chosen_logprob": -1.25, "reference_rejected_logprob": -3.5}
    rows = [pair | reference, pair | {"images": [], "chosen": "\u00e9"} | dict.fromkeys(reference)]
    lost: Counter[str] = Counter()
    source = write_lines(root / "p.jsonl", [row | {"round": 1} | NESTED for row in rows])
    assert run(source, root / "p.json", "jsonl>trl", root, lost) == 2
    assert lost == {"scene": 2, "tags": 2}
    run(root / "p.json", root / "back.jsonl", "trl>jsonl", root)
    assert lines_of(root / "back.jsonl") == [row | {"round": 1} for row in rows]


def test_fields_of_the_names_of_a_record_s_own_are_counted_as_left_out(root: Path) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A ball."}]
    rows = [
        {"id": "1", "conversations": turns, "answer": "ball"},
        {"id": "2", "conversations": turns, "answer": 2, "question": "?", "tag": 1},
    ]
    lost: Counter[str] = Counter()
    assert run(write_lines(root / "s.json", rows), root / "s.jsonl", "llava>jsonl", root, lost) == 2
    record = {"images": [], "question": "What?", "answer": "A ball."}
    assert lines_of(root / "s.jsonl") == [{"id": "1", **record}, {"id": "2", **record, "tag": 1}]
    assert lost == {"answer": 2, "question": 1}
    pair = {"messages": [{"role": "user", "content": "What?"}], "chosen": "A", "rejected": "B", "turns": 7}
    for target in ("jsonl", "trl"):
        lost = Counter()
        assert run(write_lines(root / "p.json", [pair]), root / f"p.{target}", f"messages>{target}", root, lost) == 1
        assert lost == {"turns": 1}


def test_trl_takes_the_rows(root: Path) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    pair = {"sample_id": "s", "images": ["a.png"], "prompt": "Q?", "chosen": "A", "rejected": "B"}
    run(write_lines(root / "p.jsonl", [pair]), root / "p.json", "jsonl>trl", root)
    [row] = json.loads((root / "p.json").read_text())
    assert data_utils.is_conversational(row)
    [message] = data_utils.prepare_multimodal_messages(row["prompt"], images=["picture"])
    assert message["content"] == [{"type": "image", "image": "picture"}, {"type": "text", "text": "Q?"}]
    # with the parts spelled out, as data sets on the hub have them
    row["prompt"] = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Q?"}]}]
    [read] = read_preferences(write_lines(root / "q.json", [row]), format="trl", image_root=root, rejected=[])
    assert (read.images, read.prompt, read.chosen, read.rejected) == (("a.png",), "Q?", "A", "B")


def test_preferences_stay_preferences_in_our_own_format(root: Path) -> None:
    pair = {"sample_id": "s", "images": ["a.png"], "prompt": "Q?", "chosen": "A", "rejected": "B", "confidence": 0.5}
    source = write_lines(root / "p.jsonl", [pair, pair | {"chosen": "C"}])
    assert run(source, root / "q.jsonl", "jsonl>jsonl", root) == 2
    none = dict.fromkeys(("reference_chosen_logprob", "reference_rejected_logprob"))
    assert lines_of(root / "q.jsonl") == [pair | none, pair | {"chosen": "C"} | none]
    with pytest.raises(InputError, match="found preferences from jsonl to llava"):
        run(source, root / "q.json", "jsonl>llava", root)


def test_a_source_is_not_overwritten_by_itself(root: Path) -> None:
    source = write_lines(root / "s.jsonl", sample_rows())
    before = source.read_bytes()
    with pytest.raises(InputError, match="the source itself"):
        run(source, root / "below" / ".." / "s.jsonl", "jsonl>llava", root)
    assert source.read_bytes() == before


@pytest.mark.parametrize("formats", ["jsonl>parquet", "llava>trl", "trl>vlmeval_tsv", "easy_vqa>jsonl"])
def test_other_conversions_are_refused(root: Path, formats: str) -> None:
    with pytest.raises(InputError, match="format"):
        run(write_lines(root / "s.jsonl", sample_rows()), root / "t", formats, root)
    assert not (root / "t").exists()


def test_nothing_is_written_where_nothing_is_good(root: Path) -> None:
    source = write_lines(root / "s.jsonl", [{"id": 1}])
    with pytest.raises(InputError, match="question"):
        run(source, root / "t.json", "jsonl>llava", root)
    samples = write_lines(root / "s.jsonl", [row | {"images": []} for row in sample_rows()])
    with pytest.raises(InputError, match="image"):
        run(samples, root / "t.tsv", "jsonl>vlmeval_tsv", root)
    assert not list(root.glob("*t.*"))


def test_good_records_are_converted_and_bad_ones_handed_out(root: Path) -> None:
    source = write_lines(root / "s.jsonl", [*sample_rows(), {"id": "bad"}])
    rejected: list[dict[str, Any]] = []
    formats = {"source_format": "jsonl", "target_format": "llava"}
    assert convert(source, root / "t.json", **formats, image_root=root, rejected=rejected) == 4
    assert [(row["line"], row["field"]) for row in rejected] == [(5, "question")]


def test_predictions_are_a_table_with_the_bare_answer(tmp_path: Path) -> None:
    samples = [
        Sample("1", (), "a\tb\nc", "A", extra={"options": {"A": "x", "B": "y"}, "hint": "h", "nested": [1]}),
        Sample(
            "2",
            (),
            "q",
            "yes",
            extra={"ability": "logic", "hint": " ", "prediction": "old", "set": 7, "answers": ["no"]},
        ),
    ]
    columns, rows = prediction_columns(samples), [(samples[0], "B", ""), (samples[1], "", 'It "is".')]
    assert write_predictions_tsv(tmp_path / "p.tsv", iter(rows), columns) == 2
    with open(tmp_path / "p.tsv", encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file, delimiter="\t"))
    assert list(read[0]) == [
        "index",
        "question",
        "A",
        "B",
        "answer",
        "prediction",
        "rationale",
        "hint",
        "category",
        "set",
    ]
    assert [row["index"] for row in read] == ["1", "2"] and [row["prediction"] for row in read] == ["B", ""]
    assert (read[0]["answer"], read[1]["answer"]) == ("A", "['yes', 'no']")
    assert read[0]["question"] == "a\tb\nc" and read[0]["B"] == "y" and read[0]["hint"] == "h"
    assert read[1]["rationale"] == 'It "is".' and (read[1]["category"], read[1]["set"], read[1]["hint"]) == (
        "logic",
        "7",
        "",
    )


@pytest.mark.parametrize("options", [["A", "B"], {"a": "red"}, "ABLE", None])
def test_options_in_another_form_do_not_stop_the_predictions(tmp_path: Path, options: object) -> None:
    sample = Sample("1", (), "q", "a", extra={"options": options} if isinstance(options, list | dict) else {})
    assert write_predictions_tsv(tmp_path / "p.tsv", [(sample, "a", "")], prediction_columns([sample])) == 1
    assert (tmp_path / "p.tsv").read_text().splitlines() == [
        "index\tquestion\tanswer\tprediction\trationale",
        "1\tq\ta\ta\t",
    ]


def test_a_lone_carriage_return_survives_a_table(root: Path) -> None:
    row = sample_rows()[0] | {"question": "Which one?\rThis or that?"}
    run(write_lines(root / "s.jsonl", [row]), root / "t.tsv", "jsonl>vlmeval_tsv", root)
    run(root / "t.tsv", root / "back.jsonl", "vlmeval_tsv>jsonl", root)
    assert json.loads((root / "back.jsonl").read_text())["question"] == row["question"]


def test_a_table_holds_each_image_once_and_those_of_another_folder_as_others(tmp_path: Path) -> None:
    """The same name stands below both folders; images in another order are others, too."""
    for number, name in enumerate(("one/a.png", "one/b.png", "two/a.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes([number]) * 99)
    a, b, other = (base64.b64encode(bytes([number]) * 99).decode() for number in range(3))
    of = [
        ("one", "a"),
        ("two", "a"),
        ("one", "a"),
        ("two", "a"),
        ("one", "ab"),
        ("one", "ba"),
        ("one", "ab"),
        ("one", "b"),
    ]
    samples = [
        Sample(f"{number}", tuple(f"{c}.png" for c in names), "q", "w", None, (), {}, tmp_path / folder)
        for number, (folder, names) in enumerate(of)
    ]
    assert write_vlmeval_tsv(tmp_path / "t.tsv", samples, Counter()) == 8
    csv.field_size_limit(1 << 20)
    with (tmp_path / "t.tsv").open(newline="") as file:
        images = [row["image"] for row in csv.DictReader(file, delimiter="\t")]
    assert images == [a, other, "0", "1", str([a, b]), str([b, a]), "4", b]


def test_a_row_of_a_table_is_a_sample_of_these_parts(root: Path) -> None:
    """By VLMEvalKit's names of columns; an ability of its own is not replaced by the category."""
    columns = [
        "index",
        "image_path",
        "question",
        "answer",
        "hint",
        "A",
        "B",
        "category",
        "ability",
        "l2-category",
        "split",
    ]
    rows = [
        ["7", "a.png", "Which?", "B", "Look up.", "red", "blue", "colors", "", "perception", "dev"],
        ["8", "below/b.png", "Which?", "A", "", "one", "two", "numbers", "counting", "", ""],
        ["9", "a.png", "What is it?", "a ball", "", "", "", "", "naming", "", ""],
        ["10", "a.png", "What is it?", "a cube", "", "", "", "", "", "", ""],
    ]
    with (root / "t.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([columns, *rows])
    samples = read_samples(root / "t.tsv", format="vlmeval_tsv", image_root=root, rejected=[])
    assert [(sample.id, sample.images, sample.answer) for sample in samples] == [
        ("7", ("a.png",), "B"),
        ("8", ("below/b.png",), "A"),
        ("9", ("a.png",), "a ball"),
        ("10", ("a.png",), "a cube"),
    ]
    assert [sample.extra.get("ability") for sample in samples] == ["colors", "counting", "naming", None]
    assert [sample.extra.get("category") for sample in samples] == ["colors", "numbers", None, None]
    assert [sample.extra.get("split") for sample in samples] == ["dev", None, None, None]
    assert samples[0].extra["options"] == {"A": "red", "B": "blue"} and samples[0].extra["hint"] == "Look up."
    end = "Please select the correct answer from the options above."
    assert samples[0].question == f"Hint: Look up.\nQuestion: Which?\nOptions:\nA. red\nB. blue\n{end}"
    assert samples[2].question == "What is it?"
