"""Predictions in the forms of VLMEvalKit and lmms-eval, read as these read them."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from srcfast.cli.app import app
from srcfast.data.evaluator_files import write_lmms_eval, write_vlmevalkit
from srcfast.errors import InputError

ROWS = [
    {
        "index": "0",
        "question": 'a\tb\n<c> & "d"',
        "answer": "Yes",
        "prediction": "Yes, it is.",
        "rationale": "\x07 _x0041_\r\n",
        "l2": "",
    },
    {"index": "10", "question": "q", "answer": "['12 May', 'May 12']", "prediction": "", "rationale": "", "l2": "ocr"},
]
TEXTS = ["<see> It is. </see> <answer> Yes, it is. </answer>", "no answer at all in a text like this one"]


def write(folder: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    """Write a set's predictions as an evaluation does, and return the table's path."""
    with open(folder / "set-v1.5.tsv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        {"id": row["index"], "text": text, "right": not n}
        for n, (row, text) in enumerate(zip(rows, TEXTS, strict=True))
    ]
    (folder / "set-v1.5.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder / "set-v1.5.tsv"


def cells(path: Path) -> list[list[str | None]]:
    """Read a spreadsheet's sheet: texts, and numbers as they are written."""
    with zipfile.ZipFile(path) as archive:
        root = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
        for name in archive.namelist():
            ElementTree.fromstring(archive.read(name))
    main = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    return [
        [
            None if len(cell) == 0 else "".join(cell.itertext()) + ("" if cell.get("t") else " as a number")
            for cell in row
        ]
        for row in root.iter(f"{main}row")
    ]


def test_vlmevalkit_s_files_are_where_it_looks_with_all_columns(tmp_path: Path) -> None:
    table = write(tmp_path)
    paths = [write_vlmevalkit(table, tmp_path / "out", "m", "POPE", format) for format in ("tsv", "json", "xlsx")]
    assert [path.relative_to(tmp_path / "out").as_posix() for path in paths] == [
        f"m/T00000000-000000/m_POPE.{ending}" for ending in ("tsv", "json", "xlsx")
    ]
    with open(paths[0], encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file, delimiter="\t")) == ROWS
    first, second = json.loads(paths[1].read_text(encoding="utf-8"))
    assert first == ROWS[0] | {"index": 0, "l2": None} and second == ROWS[1] | {"index": 10, "rationale": None}
    header, one, two = cells(paths[2])
    assert header == list(ROWS[0])
    assert one == ["0 as a number", ROWS[0]["question"], "Yes", "Yes, it is.", "_x0007_ _x0041_\r\n", None]
    assert two == ["10 as a number", "q", "['12 May', 'May 12']", None, None, "ocr"]


def test_the_same_predictions_give_the_same_spreadsheet(tmp_path: Path) -> None:
    table = write(tmp_path)
    first, second = (write_vlmevalkit(table, tmp_path / name, "m", "d", "xlsx").read_bytes() for name in ("a", "b"))
    assert first == second


@pytest.mark.parametrize("index", ["VD_ocr_1_0_0_0", "007", "1.0", "", "9" * 20])
def test_indexes_that_are_no_numbers_stay_texts(tmp_path: Path, index: str) -> None:
    table = write(tmp_path, [ROWS[0], ROWS[1] | {"index": index}])
    path = write_vlmevalkit(table, tmp_path / "out", "m", "d", "json")
    assert [row["index"] for row in json.loads(path.read_text())] == ["0", index or None]


def test_lmms_eval_s_files_have_the_bare_answer_by_the_number_of_the_sample(tmp_path: Path) -> None:
    samples, log = write_lmms_eval(write(tmp_path), tmp_path / "out", "m", "docvqa_val")
    assert samples.name == "srcfast_samples_docvqa_val.jsonl" and samples.parent == log.parent == tmp_path / "out" / "m"
    first, second = (json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines())
    assert first == {
        "doc_id": 0,
        "input": ROWS[0]["question"],
        "target": "Yes",
        "resps": TEXTS[0],
        "filtered_resps": "Yes, it is.",
        "score": 1.0,
    }
    assert (second["doc_id"], second["filtered_resps"], second["score"]) == (1, "", 0.0)
    # As lmms_eval/models/simple/from_log.py takes a response out of a log.
    data: dict[str, Any] = json.loads(log.read_text(encoding="utf-8"))
    assert data["args"]["model"] == "m" and data["args"]["limit"] is None and "m" in data["args"]["model"]
    assert data["model_configs"]["task"] == "docvqa_val"
    responses = {row["doc_id"]: row["resps"][0] for row in data["logs"]}
    assert {doc: response[0] for doc, response in responses.items()} == {0: "Yes, it is.", 1: ""}


def test_a_table_s_doc_ids_are_taken(tmp_path: Path) -> None:
    rows = [row | {"doc_id": number} for row, number in zip(ROWS, ("7", "3"), strict=True)]
    samples, _ = write_lmms_eval(write(tmp_path, rows), tmp_path, "m", "t")
    assert [json.loads(line)["doc_id"] for line in samples.read_text().splitlines()] == [7, 3]
    with pytest.raises(InputError, match="line 3.*doc_id"):
        write_lmms_eval(write(tmp_path, [rows[0], rows[1] | {"doc_id": "x"}]), tmp_path, "m", "t")


def test_what_can_t_be_written_is_named(tmp_path: Path) -> None:
    table = write(tmp_path)
    for model, dataset in (("a/b", "d"), ("m", "../d"), ("", "d")):
        with pytest.raises(InputError, match="a name of a file"):
            write_vlmevalkit(table, tmp_path / "out", model, dataset, "tsv")
    with pytest.raises(InputError, match="--format tsv"):
        write_vlmevalkit(write(tmp_path, [ROWS[0] | {"l2": "x" * 32_768}, ROWS[1]]), tmp_path, "m", "d", "xlsx")
    with pytest.raises(InputError, match="set-v1.5.jsonl.*the samples of"):
        write(tmp_path)
        (tmp_path / "set-v1.5.jsonl").write_text('{"id": "0", "text": ""}\n')
        write_lmms_eval(table, tmp_path, "m", "d")
    for text in ("", "index\tquestion\n1\tq\n", "index\tquestion\tanswer\tprediction\n1\n", 'index\t"quest'):
        table.write_text(text)
        with pytest.raises(InputError, match="set-v1.5.tsv"):
            write_vlmevalkit(table, tmp_path, "m", "d", "tsv")


def test_the_command_writes_and_prints_them(tmp_path: Path) -> None:
    table = write(tmp_path)

    def run(*words: object) -> Result:
        return CliRunner().invoke(app, ["export", *map(str, words), "--output", str(tmp_path / "out")])

    named = ("--model", "m", "--dataset", "d")
    for path in (table, table.with_suffix(".jsonl"), table.with_suffix("")):
        result = run(path, "--to", "vlmevalkit", *named)
        assert result.exit_code == 0 and result.output.strip().endswith("m_d.xlsx"), result.output
    result = run(table, "--to", "lmms_eval", *named)
    assert result.exit_code == 0 and all(Path(line).is_file() for line in result.output.split())
    for words, option in ((("--to", "helm"), "--to"), (("--to", "vlmevalkit", "--format", "csv"), "--format")):
        result = run(table, *words, *named)
        assert result.exit_code == 2 and option in result.output
