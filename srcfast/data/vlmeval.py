"""Read and write VLMEvalKit's tables: tab-separated, with images in base64."""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import io
import re
import string
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from srcfast.data.images import from_base64, image_suffix, resolve
from srcfast.data.jsonl import is_unicode, replacing
from srcfast.data.opening import open_text
from srcfast.data.records import Fields, Row, Sample, each_record, settled_prompt
from srcfast.data.turns import IMAGE_MARK
from srcfast.errors import InputError

REFERENCE_CHARACTERS = 64  # an image cell of at most so many is the index of the row that holds the image
OPTION_LETTERS = string.ascii_uppercase
QUESTION_KEY = "vlmeval_question"  # the question of the table, without the options
_NUMBERED_MARK = re.compile(r"<image ([1-9]\d{0,3})>", re.ASCII)  # as in MMMU's tables
_COLUMNS = ("index", "image", "question", "answer")
REFERENCE_KEY = "gpt4_ans"  # the reference's answers in LLaVA-Bench's table, which has no other


def read_vlmeval_tsv(
    path: str | Path, image_output: Path, image_root: Path
) -> Iterator[tuple[int, Sample | InputError]]:
    """Yield (line, sample or its error), and write each image once into `image_output`.

    Columns: index, image (or image_path, below `image_root`), question, answer (or gpt4_ans); optional: hint, A, B, ...,
    category, l2-category, split, rationale.
    Options are appended to the question as in VLMEvalKit's multiple-choice prompt. Images stand where the texts have marks,
    `<image>` for each in their order or `<image 1>` for the first, and before the text where they have none.

    Raises:
        InputError: the file can't be read, or a column is missing.
    """
    images: dict[str, list[str] | InputError] = {}
    for line, row in _rows(path):  # all images first: a row may refer to the image of a later one
        cell = "" if isinstance(row, InputError) else row.get("image", "").strip()
        if not isinstance(row, InputError) and len(cell) > REFERENCE_CHARACTERS and row["index"] not in images:
            images[row["index"]] = _write_images(cell, row["index"], f"{path}, line {line}", image_output)
    yield from each_record(partial(_samples, images=images, image_output=image_output), _rows(path), path, image_root)


def _rows(path: str | Path) -> Iterator[Row]:
    """Yield (line, cells by column, or the row's error). Raises InputError if the file or its header is malformed."""
    csv.field_size_limit(sys.maxsize)
    try:
        with open_text(path, "a readable table", newline="") as file:
            reread: deque[str] = deque()  # lines to read once more
            row_lines: list[str] = []  # of the row that is being read

            def lines() -> Iterator[str]:
                while (text := reread.popleft() if reread else file.readline()) != "":
                    row_lines.append(text)
                    yield text

            reader = csv.reader(lines(), delimiter="\t", strict=True)
            header = next(reader, [])
            names = ", ".join(header)
            stand_ins = {"image": "image_path", "answer": REFERENCE_KEY}
            needed = {name for name in _COLUMNS if stand_ins.get(name) not in header}
            if not needed <= set(header) or len(set(header)) < len(header) or not is_unicode(names, header):
                expected = f"columns {', '.join(_COLUMNS)} (or image_path), each once, in UTF-8"
                raise InputError(file=path, line=1, field="header", expected=expected, found=ascii(names[:200]))
            line = 1
            while True:
                line += len(row_lines)
                row_lines.clear()
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    yield line, InputError(file=path, line=line, field="record", expected="a table row", found=error)
                    # An unclosed quote swallows the rows after it: read these again, as separate rows.
                    reread.extendleft(reversed(row_lines[1:]))
                    del row_lines[1:]
                    reader = csv.reader(lines(), delimiter="\t", strict=True)
                    continue
                if cells is None:
                    return
                if cells:
                    yield line, _row(header, cells, path, line)
    except (OSError, ValueError, csv.Error) as error:  # ValueError: a NUL in the path
        raise InputError(file=path, expected="a readable table", found=error) from error


def _row(header: Sequence[str], cells: Sequence[str], path: str | Path, line: int) -> dict[str, str] | InputError:
    """Return the cells by column, or an error about their number or encoding."""
    if len(cells) != len(header):
        expected, found = f"{len(header)} cells, as the header has", str(len(cells))
        return InputError(file=path, line=line, sample_id=cells[0], field="record", expected=expected, found=found)
    row = dict(zip(header, cells, strict=True))
    for name, cell in row.items():
        is_undecoded = not cell.isascii() and any("\udc80" <= character <= "\udcff" for character in cell)
        if is_undecoded or "\0" in cell:
            expected = "text in UTF-8 without a NUL"
            return InputError(file=path, line=line, field=name, expected=expected, found=ascii(cell[:100]))
    return row


def _write_images(cell: str, index: str, source: str, image_output: Path) -> list[str] | InputError:
    """Write a cell's images (one in base64, or a list literal of several) and return their names, or what is wrong."""
    codes = re.findall(r"[^\s'\",\[\]]+", cell) if cell.startswith("[") else [cell]
    names = []
    try:
        if not codes:
            raise InputError(expected="an image in base64", found="an empty list", fix="encode the image again")
        for number, code in enumerate(codes):
            data = from_base64(code, source)
            stem = re.sub(r"[^\w.-]", "_", index, flags=re.ASCII)[:100].lstrip(".")
            if stem != index:  # two indexes must not share a name
                stem += "-" + hashlib.sha256(index.encode("utf-8", "surrogateescape")).hexdigest()[:12]
            name, suffix = f"{stem}{f'-{number}' if number else ''}", image_suffix(data, source)
            if (
                file := image_output / f"{name}{suffix}"
            ).is_file() and file.read_bytes() != data:  # of another index or table
                file = image_output / f"{name}-{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
            if not file.is_file():
                with replacing(file) as opened:
                    opened.write(data)
            names.append(file.name)
    except InputError as error:
        return error
    return names


def _samples(
    fields: Fields, image_root: Path, *, images: Mapping[str, list[str] | InputError], image_output: Path
) -> list[Sample]:
    """Read the sample of a row."""
    row = fields.left
    fields.left = {name: cell for name, cell in row.items() if cell != ""}
    fields.sample_id = row["index"] or None
    index = fields.identifier("index")
    if "image" in row:
        cell, image_root = fields.text("image"), image_output
        is_base64 = len(cell.strip()) > REFERENCE_CHARACTERS
        names = images.get(index) if is_base64 else images.get(cell, images.get(cell.strip()))
    else:
        names = _paths(fields.text("image_path"))
    if names is None:
        raise fields.error("image", "base64, or the index of a row that has it", cell)
    if isinstance(names, InputError):
        raise fields.error("image", names.expected, names.found, names.fix)
    question, rationale = fields.text("question"), fields.optional_text("rationale")
    reference = {} if "answer" in row else {REFERENCE_KEY: fields.answer(REFERENCE_KEY)}
    answer, *others = reference.values() if reference else _answers(fields.answer("answer"))
    extra = fields.rest() | ({"answers": others} if others else {}) | reference
    options = {letter: extra.pop(letter) for letter in OPTION_LETTERS if letter in extra}
    if "category" in extra:
        extra.setdefault("ability", extra["category"])
    shown = [*([extra["hint"]] if options and "hint" in extra else []), question, *options.values()]
    names, shown = _in_order(fields, names, shown)
    question = shown[-1 - len(options)]
    if options:
        options = dict(zip(options, shown[len(shown) - len(options) :], strict=True))
        extra |= {"options": options, QUESTION_KEY: question} | ({"hint": shown[0]} if "hint" in extra else {})
    prompt = _with_options(question, extra.get("hint"), options)
    _, prompt = settled_prompt(fields, "question", (), prompt, len(names))
    return [Sample(index, tuple(names), prompt, answer, rationale, (), extra, image_root)]


def _paths(cell: str) -> list[str]:
    """Return the paths of a cell: one, or a list of them as Python or JSON write it."""
    return re.findall(r"[\"']([^\"']+)[\"']", cell) if re.fullmatch(r"\s*\[.*\]\s*", cell) else [cell]


def _answers(cell: str) -> list[str]:
    """Return the gold answers of a cell: one, or a list of them as Python or JSON write it, as in DocVQA's tables."""
    if not re.fullmatch(r"\s*\[.*\]\s*", cell, re.DOTALL):
        return [cell]
    try:
        answers = ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # a text in brackets
        return [cell]
    is_list = isinstance(answers, list) and answers and all(isinstance(one, str) and one.strip() for one in answers)
    return list(dict.fromkeys(answers)) if is_list else [cell]


def _in_order(fields: Fields, names: list[str], texts: list[str]) -> tuple[list[str], list[str]]:
    """Return a row's images in the order in which its texts name them as `<image 1>`, and the texts with marks there.

    An image that is named twice occurs twice. Texts that name none by number are returned as they are.

    Raises:
        InputError: a number of no image, an image without its number, or marks without numbers beside others.
    """
    numbers = [int(number) for text in texts for number in _NUMBERED_MARK.findall(text)]
    if not numbers:
        return names, texts
    if {*numbers} != {*range(1, len(names) + 1)} or any(IMAGE_MARK in text for text in texts):
        expected = f"each of the row's {len(names)} images as <image 1>, <image 2>, ..., and no other mark"
        raise fields.error("question", expected, sorted({*numbers}))
    return [names[number - 1] for number in numbers], [_NUMBERED_MARK.sub(IMAGE_MARK, text) for text in texts]


def _with_options(question: str, hint: str | None, options: Mapping[str, str]) -> str:
    """Build the prompt of VLMEvalKit's ImageMCQDataset.build_prompt; without options, the question alone."""
    if not options:
        return question
    lines = [] if hint is None else [f"Hint: {hint}"]
    lines += [f"Question: {question}", "Options:", *(f"{letter}. {text}" for letter, text in options.items())]
    return "\n".join((*lines, "Please select the correct answer from the options above."))


def write_vlmeval_tsv(path: str | Path, samples: Sequence[Sample], lost: Counter[str]) -> int:
    """Write samples with their images in base64, and return the number of rows.

    An image that occurs again is written as the index of its first row.

    Args:
        path: of the table.
        samples: to write.
        lost: counts, by name, the fields that a table can't hold: nested ones, and `facts`.

    Raises:
        InputError: an image can't be read, or an extra field has the name of a column.
    """
    extra_columns = {name: None for sample in samples for name in _cells(sample, Counter())}
    return write_table(path, (*_COLUMNS, *extra_columns), _table_rows(samples, lost))


def _table_rows(samples: Iterable[Sample], lost: Counter[str]) -> Iterator[dict[str, str]]:
    first_rows: dict[tuple[Path, tuple[str, ...]], str] = {}  # images -> index of the first row that has them
    for sample in samples:
        if not sample.images:
            raise InputError(
                sample_id=sample.id, field="images", expected="an image, as each row has one", found="none"
            )
        if sample.turns:
            found, fix = f"{len(sample.turns)} turns before it", "convert to jsonl, or leave this sample out"
            raise InputError(sample_id=sample.id, field="turns", expected="a question alone", found=found, fix=fix)
        image = first_rows.setdefault((sample.image_root, sample.images), sample.id)
        if image == sample.id or len(image) > REFERENCE_CHARACTERS:
            files = [resolve(sample.image_root, name) for name in sample.images]
            codes = [base64.b64encode(file.read_bytes()).decode("ascii") for file in files]
            image = codes[0] if len(codes) == 1 else str(codes)
        question = sample.extra.get(QUESTION_KEY, sample.question)
        yield {
            "index": sample.id,
            "image": image,
            "question": question,
            "answer": sample.answer,
            **_cells(sample, lost),
        }


def _cells(sample: Sample, lost: Counter[str]) -> dict[str, str]:
    """Return the cells of a sample beside the four columns of every table; count fields that a cell can't hold as lost."""
    options = sample.extra.get("options") if QUESTION_KEY in sample.extra else None
    cells: dict[str, str] = dict(options) if isinstance(options, dict) else {}
    if sample.rationale is not None:
        cells["rationale"] = sample.rationale
    lost.update(["facts"] if sample.facts else [])
    for name, value in sample.extra.items():
        if name in (QUESTION_KEY, "options") and options:
            continue
        if name == "ability" and value == sample.extra.get("category"):
            continue
        if name in _COLUMNS:
            raise InputError(sample_id=sample.id, field=name, expected="no extra field of a column's name", found=value)
        if isinstance(value, str | int | float):
            cells["category" if name == "ability" and "category" not in sample.extra else name] = str(value)
        else:
            lost[name] += 1
    return cells


def write_table(path: str | Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Replace `path` atomically by a tab-separated table, and return the number of rows."""
    count = 0
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        plain, quoted = (
            csv.DictWriter(text, columns, restval="", delimiter="\t", lineterminator="\n", quoting=quoting)
            for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
        )
        plain.writeheader()
        for row in rows:
            # Python before 3.13 leaves a lone carriage return unquoted, and then can't read the row back.
            writer = quoted if any("\r" in str(value) for value in row.values()) else plain
            writer.writerow(row)
            count += 1
        text.detach()  # flushes, and leaves `file` open, for `replacing` to synchronise
    return count
