"""Write predictions in the forms of VLMEvalKit and lmms-eval, so that these score the bare answers.

VLMEvalKit's form is that of `infer_data_job` in vlmeval/inference.py: the table's columns without pictures, and `prediction`.
lmms-eval's are those of `save_results_samples` in lmms_eval/loggers/evaluation_tracker.py, and what its model `from_log` reads.
"""

from __future__ import annotations

import csv
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args
from xml.sax.saxutils import escape

from srcfast.data.file_names import check_file_name
from srcfast.data.jsonl import read_jsonl, replacing, write_json, write_jsonl
from srcfast.data.opening import open_text
from srcfast.data.vlmeval import write_table
from srcfast.errors import InputError

Format = Literal["xlsx", "tsv", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)
RUN = "T00000000-000000"  # a run of VLMEvalKit, by the pattern of their names
LONGEST_CELL = 32_767  # characters, of a spreadsheet
_NEEDED = ("index", "question", "answer", "prediction")
_NUMBERS = ("index", "g_index")  # columns that VLMEvalKit compares as numbers
_WHOLE = re.compile(r"0|[1-9]\d{0,14}", re.ASCII)
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_DATE = (1980, 1, 1, 0, 0, 0)  # of the files in a spreadsheet, so that the same predictions give the same bytes


def read_predictions(path: Path) -> tuple[list[str], list[dict[str, str]], list[dict[str, Any]]]:
    """Read predictions by the name of their table, of their JSON lines, or of both without its ending.

    Returns:
        The table's columns, its rows, and the rows of the JSON lines.

    Raises:
        InputError: a file can't be read, has no predictions in it, or the two have other samples.
    """
    stem = path.with_suffix("") if path.suffix in (".tsv", ".jsonl") else path
    table, lines = stem.with_name(f"{stem.name}.tsv"), stem.with_name(f"{stem.name}.jsonl")
    csv.field_size_limit(sys.maxsize)
    try:
        with open_text(table, "a readable table", newline="") as file:
            reader = csv.reader(file, delimiter="\t", strict=True)
            columns, *cells = reader
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(file=table, expected="a table of predictions", found=error) from error
    if not set(_NEEDED) <= set(columns) or any(len(row) != len(columns) for row in cells):
        expected = f"columns {', '.join(_NEEDED)}, and a cell for each in each row"
        raise InputError(file=table, field="header", expected=expected, found=ascii(", ".join(columns)[:200]))
    rows = [dict(zip(columns, row, strict=True)) for row in cells]
    answers = [row for _, row in read_jsonl(lines)]
    if [row["index"] for row in rows] != [row.get("id") for row in answers] or not rows:
        expected = f"the samples of {table.name}, in their order, and at least one"
        raise InputError(file=lines, expected=expected, found=f"{len(answers)} others", fix="evaluate again")
    return columns, rows, answers


def write_vlmevalkit(predictions: Path, output: Path, model: str, dataset: str, format: Format) -> Path:
    """Write `output`/MODEL/T00000000-000000/MODEL_DATASET.FORMAT, where `run.py --work-dir output --reuse` looks for it.

    Raises:
        InputError: `read_predictions`; or a name is none of a file, or a cell is too long for a spreadsheet.
    """
    columns, rows, _ = read_predictions(predictions)
    name = f"{_checked(model, 'model')}_{_checked(dataset, 'dataset')}.{format}"
    path = output / model / RUN / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "tsv":
        write_table(path, columns, rows)
        return path
    typed = list(_typed(columns, rows))
    if format == "json":
        write_json(path, typed)
    else:
        _write_xlsx(path, columns, typed)
    return path


def write_lmms_eval(predictions: Path, output: Path, model: str, task: str) -> list[Path]:
    """Write `output`/MODEL/srcfast_samples_TASK.jsonl as `--log_samples` does, and srcfast_TASK.json, which `from_log` reads.

    A sample's `doc_id` is its cell in a column of that name, else its number in the table, from 0.

    Raises:
        InputError: `read_predictions`; or a name is none of a file, or a `doc_id` is no number.
    """
    _, rows, answers = read_predictions(predictions)
    folder = output / _checked(model, "model")
    samples, log = folder / f"srcfast_samples_{_checked(task, 'dataset')}.jsonl", folder / f"srcfast_{task}.json"
    folder.mkdir(parents=True, exist_ok=True)
    entries = [
        {
            "doc_id": _doc_id(predictions, number, row),
            "input": row["question"],
            "target": row["answer"],
            "resps": answer.get("text", ""),
            "filtered_resps": row["prediction"],
            "score": float(bool(answer.get("right"))),
        }
        for number, (row, answer) in enumerate(zip(rows, answers, strict=True))
    ]
    write_jsonl(samples, entries)
    logs = [
        {key: entry[key] for key in ("doc_id", "target")} | {"resps": [[entry["filtered_resps"]]]} for entry in entries
    ]
    args = {"model": model, "model_args": "", "limit": None}
    write_json(log, {"args": args, "model_configs": {"task": task}, "logs": logs})
    return [samples, log]


def _checked(name: str, option: str) -> str:
    """Return a name that is one of a file, and the last part of a path. Raises InputError for any other."""
    try:
        return check_file_name(name)
    except ValueError as error:
        expected = "a name of a file, without '/' and control characters"
        raise InputError(field=f"--{option}", expected=expected, found=ascii(name[:80])) from error


def _doc_id(predictions: Path, number: int, row: Mapping[str, str]) -> int:
    if "doc_id" not in row:
        return number
    if not _WHOLE.fullmatch(row["doc_id"]):
        expected, fix = "a whole number", "leave the column out: samples are numbered then"
        raise InputError(
            file=predictions, line=number + 2, field="doc_id", expected=expected, found=ascii(row["doc_id"]), fix=fix
        )
    return int(row["doc_id"])


def _typed(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> Iterator[dict[str, str | int | None]]:
    """Yield rows whose indexes are numbers, if all of the column are; cells that are empty are None, but for predictions."""
    numbers = {name for name in _NUMBERS if name in columns and all(_WHOLE.fullmatch(row[name]) for row in rows)}
    for row in rows:
        yield {
            name: int(cell) if name in numbers else cell if cell or name == "prediction" else None
            for name, cell in row.items()
        }


def _write_xlsx(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str | int | None]]) -> None:
    """Write a spreadsheet of one sheet, whose texts stand in their cells (ECMA-376, inline strings)."""
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    package = "http://schemas.openxmlformats.org/package/2006"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    type_of = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types"><Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{type_of}.sheet.main+xml"/>'
        f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{type_of}.worksheet+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="rId1" '
        f'Type="{office}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets>'
        '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="rId1" '
        f'Type="{office}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
    }
    lines = (
        f"<row>{''.join(_cell(path, value) for value in row)}</row>" for row in (columns, *(r.values() for r in rows))
    )
    parts["xl/worksheets/sheet1.xml"] = f'<worksheet xmlns="{main}"><sheetData>{"".join(lines)}</sheetData></worksheet>'
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in parts.items():
            entry = zipfile.ZipInfo(name, _DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n{text}')


def _cell(path: Path, value: str | int | None) -> str:
    """Write a cell. Characters that XML can't hold are written as _x0000_, as spreadsheets have them."""
    if value is None or value == "":
        return "<c/>"
    if isinstance(value, int):
        return f"<c><v>{value}</v></c>"
    if len(value) > LONGEST_CELL:
        expected, fix = f"cells of at most {LONGEST_CELL} characters", "--format tsv"
        raise InputError(file=path, field="record", expected=expected, found=f"one of {len(value)}", fix=fix)
    text = _NOT_XML.sub(lambda match: f"_x{ord(match[0]):04X}_", value)
    return f'<c t="inlineStr"><is><t xml:space="preserve">{escape(text, {chr(13): "&#13;"})}</t></is></c>'
