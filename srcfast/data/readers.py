"""Readers of the formats that users have. A bad record is rejected with its reason; the others are read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from srcfast.data.conversations import llava_samples, message_preference, message_samples, trl_preference
from srcfast.data.gc_pauses import pause_full_collections
from srcfast.data.images import check_image
from srcfast.data.jsonl import DECODER, PLAIN_DECODER, is_unicode, read_jsonl, read_lines, regular
from srcfast.data.records import Fields, MadeUpId, Preference, Record, Row, Sample, each_record, settled_prompt
from srcfast.data.turns import Turn
from srcfast.data.vlmeval import read_vlmeval_tsv
from srcfast.errors import InputError


@dataclass(frozen=True)
class LogprobRow:
    """A response whose log-probability is to be computed."""

    images: tuple[str, ...]
    prompt: str
    response: str
    image_root: Path
    turns: tuple[Turn, ...] = ()


def read_samples(
    path: str | Path,
    *,
    format: str,
    image_root: Path,
    rejected: list[dict[str, Any]],
    check_images: bool = True,
    image_output: Path | None = None,
) -> list[Sample]:
    """Read samples; a row for `rejected.jsonl` about each bad record is appended to `rejected`.

    Args:
        path: the file.
        format: jsonl | llava | messages | vlmeval_tsv.
        image_root: folder that image paths are relative to.
        check_images: decode every image once now, so that a broken one is rejected here, not hours later.
        image_output: where a TSV's base64 images are written (default: a folder beside the TSV).

    Raises:
        InputError: the file as a whole can't be read, or the format is unknown.
    """
    if format == "jsonl":
        samples = each_record(_jsonl_sample, read_lines(path), path, image_root)
    elif format == "llava":
        samples = each_record(llava_samples, _json_items(path, "id"), path, image_root)
    elif format == "messages":
        samples = each_record(message_samples, _json_items(path, "id"), path, image_root)
    elif format == "vlmeval_tsv":
        samples = read_vlmeval_tsv(path, image_output or Path(f"{path}.images"))
    else:
        raise InputError(file=path, field="format", expected="jsonl, llava, messages or vlmeval_tsv", found=format)
    return _keep_good(
        _with_unique_ids(_settled_ids(samples), path), path, rejected, check_images and format != "vlmeval_tsv"
    )


def read_preferences(
    path: str | Path,
    *,
    format: str,
    image_root: Path,
    rejected: list[dict[str, Any]],
    check_images: bool = True,
) -> list[Preference]:
    """Read preference pairs: `jsonl` (ours), `trl` (conversational rows or strings) or `messages` (those of chat models).

    The latter two are JSON lines or one JSON list.

    Raises:
        InputError: the file as a whole can't be read, or the format is unknown.
    """
    if format == "jsonl":
        pairs = each_record(_preference, read_lines(path), path, image_root)
    elif format == "trl":
        pairs = each_record(trl_preference, _json_items(path, "sample_id"), path, image_root)
    elif format == "messages":
        pairs = each_record(message_preference, _json_items(path, "sample_id"), path, image_root)
    else:
        raise InputError(file=path, field="format", expected="jsonl, trl or messages", found=format)
    return _keep_good(_settled_ids(pairs), path, rejected, check_images)


def read_logprob_rows(path: str | Path, image_root: Path) -> list[LogprobRow]:
    """Read `{images, turns?, prompt, response}` lines. Raises InputError, with its line, at the first that is bad."""
    rows = []
    errors: dict[str, InputError | None] = {}
    for line, row in read_jsonl(path):
        fields = Fields(row, path, line)
        images, turns = fields.images(), fields.turns()
        prompt, response = fields.text("prompt"), fields.text("response")
        turns, prompt = settled_prompt(fields, "prompt", turns, prompt, len(images))
        for image in images:
            if (error := _image_error(image_root, image, errors)) is not None:
                raise _of_record(error, path, line, fields.sample_id)
        rows.append(LogprobRow(images, prompt, response, image_root, turns))
    return rows


def check_rejected(rejected: Sequence[dict[str, Any]], total: int, max_rejected: int | float) -> None:
    """Raise InputError, with counts by reason, if all records were rejected, or more than a count, or a share (float)."""
    over = len(rejected) > max_rejected * total if isinstance(max_rejected, float) else len(rejected) > max_rejected
    if over or (rejected and len(rejected) == total):
        reasons = Counter(f"{row['field'] or 'record'!r}: expected {row['expected']}" for row in rejected)
        counts = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(5))
        file, fix = rejected[0]["file"], "fix the data, or raise max_rejected"
        expected = f"at most max_rejected = {max_rejected} bad records of {total}"
        found = f"{len(rejected)} ({counts}); the first: {rejected[0]['reason']}"
        raise InputError(file=file, expected=expected, found=found, fix=fix)


# What all formats share -----------------------------------------------------------------------------------------------


def _settled_ids(records: Iterable[tuple[int, Record | InputError]]) -> Iterator[tuple[int, Record | InputError]]:
    """Rename each record whose id was made up where another has that id in the file: -2, -3, ... is added."""
    read = list(records)
    names: list[str | None] = [_id_of(record) for _, record in read]
    taken, in_file = {*names}, {name for name in names if not isinstance(name, MadeUpId)}
    for (line, record), name in zip(read, names, strict=True):
        if isinstance(name, MadeUpId) and name in in_file and not isinstance(record, InputError):
            free: Any = next(new for number in count(2) if (new := f"{name}-{number}") not in taken)
            record = replace(record, **{"id" if isinstance(record, Sample) else "sample_id": free})
        yield line, record


def _id_of(record: Sample | Preference | InputError) -> str | None:
    return record.id if isinstance(record, Sample) else record.sample_id


def _with_unique_ids(
    samples: Iterable[tuple[int, Sample | InputError]], path: str | Path
) -> Iterator[tuple[int, Sample | InputError]]:
    """Replace each sample whose id has occurred by an error."""
    lines: dict[str, int] = {}
    for line, sample in samples:
        if isinstance(sample, Sample) and sample.id in lines:
            expected, found = "an id that occurs once", f"that of line {lines[sample.id]}"
            fix = "give each sample an id of its own"
            sample = InputError(
                file=path, line=line, sample_id=sample.id, field="id", expected=expected, found=found, fix=fix
            )
        elif isinstance(sample, Sample):
            lines[sample.id] = line
        yield line, sample


@pause_full_collections()
def _keep_good(
    records: Iterable[tuple[int, Record | InputError]],
    path: str | Path,
    rejected: list[dict[str, Any]],
    check_images: bool,
) -> list[Record]:
    """List the good records, each image decoded once; the others' errors go to `rejected`."""
    good: list[Record] = []
    errors: dict[str, InputError | None] = {}
    for line, record in records:
        if isinstance(record, InputError):
            rejected.append(record.as_record())
            continue
        image_errors = (_image_error(record.image_root, image, errors) for image in record.images if check_images)
        error = next((error for error in image_errors if error is not None), None)
        if error is None:
            good.append(record)
        else:
            rejected.append(_of_record(error, path, line, _id_of(record)).as_record())
    return good


def _image_error(root: Path, image: str, errors: dict[str, InputError | None]) -> InputError | None:
    """Return what is wrong with an image below `root`, None if nothing is; `errors` remembers it."""
    if image not in errors:
        errors[image] = None
        try:
            check_image(root, image)
        except InputError as error:
            error.__cause__ = error.__context__ = None  # their traces would keep the file's bytes in memory
            errors[image] = error.with_traceback(None)
    return errors[image]


def _of_record(error: InputError, path: str | Path, line: int, sample_id: str | None) -> InputError:
    """Turn an image's error into one of the record that names the image."""
    expected, found = error.expected, f"{error.found} ({error.file})"
    return InputError(
        file=path, line=line, sample_id=sample_id, field="image", expected=expected, found=found, fix=error.fix
    )


def _json_items(path: str | Path, id_key: str) -> Iterator[Row]:
    """Yield the rows of a JSON list, each with the line it begins on, or of JSON lines; unnamed ones are called record-N."""
    for number, (line, row) in enumerate(json_list_or_lines(path), start=1):
        yield line, row if isinstance(row, InputError) else {id_key: MadeUpId(f"record-{number}")} | row


def json_list_or_lines(path: str | Path) -> Iterator[Row]:
    """Yield (line, row or its error) of a JSON list, or of JSON lines. Raises InputError where the file can't be read."""
    try:
        text = regular(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        raise InputError(file=path, expected="a readable file in UTF-8", found=error) from error
    start = _skip_space(text, 0)
    return _list_items(text, start + 1, path) if text[start : start + 1] == "[" else read_lines(path)


def _list_items(text: str, start: int, path: str | Path) -> Iterator[Row]:
    """Yield the rows of a JSON list that is opened before `start`. Raises InputError where the list itself is malformed."""
    position, line, counted = _skip_space(text, start), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, end = _read_item(text, position, path, line)
        except (ValueError, RecursionError) as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise InputError(file=path, line=line, expected="a JSON list of records", found=error) from error
        yield line, row
        position = _next_item(text, end, path)
    if (rest := _skip_space(text, position + 1)) < len(text):
        expected, found = "nothing after the list", repr(text[rest : rest + 40])
        raise InputError(file=path, line=_line_at(text, rest), expected=expected, found=found)


def _read_item(text: str, start: int, path: str | Path, line: int) -> tuple[dict[str, Any] | InputError, int]:
    """Read the record of a list that begins at `start`, or what is wrong with it; and where it ends.

    Raises:
        ValueError, RecursionError: no JSON, so that its end is unknown.
    """
    try:
        row, end = DECODER.raw_decode(text, start)
        if isinstance(row, dict) and is_unicode(text[start:end], row):
            return row, end
        found = "half of a surrogate pair" if isinstance(row, dict) else repr(row)
    except ValueError as error:
        end = PLAIN_DECODER.raw_decode(text, start)[1]
        found = f"{error}: {text[start : min(end, start + 200)]!r}"
    expected = "one JSON object in UTF-8"
    return InputError(file=path, line=line, field="record", expected=expected, found=found), end


def _next_item(text: str, end: int, path: str | Path) -> int:
    """Return where the item behind the one that ends here begins, or the list's "]". Raises InputError for anything else."""
    position = _skip_space(text, end)
    if text[position : position + 1] == ",":
        return _skip_space(text, position + 1)
    if text[position : position + 1] != "]":
        expected = "',' or ']' in a JSON list of records"
        found = repr(text[position : position + 20]) if position < len(text) else "the end of the file"
        raise InputError(file=path, line=_line_at(text, position), expected=expected, found=found)
    return position


def _line_at(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


# JSON lines -----------------------------------------------------------------------------------------------------------


def _jsonl_sample(row: dict[str, Any], path: str | Path, line: int, image_root: Path) -> list[Sample]:
    sample = Sample.from_json(row, file=path, line=line, image_root=image_root)
    fields = Fields(row, path, line)
    turns, question = settled_prompt(fields, "question", sample.turns, sample.question, len(sample.images))
    return [replace(sample, question=question, turns=turns)]


def _preference(row: dict[str, Any], path: str | Path, line: int, image_root: Path) -> list[Preference]:
    pair = Preference.from_json(row, file=path, line=line, image_root=image_root)
    turns, prompt = settled_prompt(Fields(row, path, line), "prompt", pair.turns, pair.prompt, len(pair.images))
    return [replace(pair, prompt=prompt, turns=turns)]
