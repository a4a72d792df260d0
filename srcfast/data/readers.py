"""Readers of the formats that users have. A bad record is rejected with its reason; the others are read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from srcfast.data.gc_pauses import pause_full_collections
from srcfast.data.images import check_image
from srcfast.data.jsonl import DECODER, PLAIN_DECODER, is_unicode, read_jsonl, read_lines, regular
from srcfast.data.records import Fields, Preference, Record, Row, Sample, each_record
from srcfast.data.vlmeval import read_vlmeval_tsv
from srcfast.errors import InputError

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class LogprobRow:
    """A response whose log-probability is to be computed."""

    images: tuple[str, ...]
    prompt: str
    response: str
    image_root: Path


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
        format: jsonl | llava | vlmeval_tsv.
        image_root: folder that image paths are relative to.
        check_images: decode every image once now, so that a broken one is rejected here, not hours later.
        image_output: where a TSV's base64 images are written (default: a folder beside the TSV).

    Raises:
        InputError: the file as a whole can't be read, or the format is unknown.
    """
    if format == "jsonl":
        samples = each_record(_jsonl_sample, read_lines(path), path, image_root)
    elif format == "llava":
        samples = each_record(_llava_samples, _json_items(path, "id"), path, image_root)
    elif format == "vlmeval_tsv":
        samples = read_vlmeval_tsv(path, image_output or Path(path).with_suffix(".images"))
    else:
        raise InputError(file=path, field="format", expected="jsonl, llava or vlmeval_tsv", found=format)
    return _keep_good(_with_unique_ids(samples, path), path, rejected, check_images and format != "vlmeval_tsv")


def read_preferences(
    path: str | Path,
    *,
    format: str,
    image_root: Path,
    rejected: list[dict[str, Any]],
    check_images: bool = True,
) -> list[Preference]:
    """Read preference pairs: `jsonl` (ours) or `trl` (conversational rows or strings, as JSON lines or one JSON list).

    Raises:
        InputError: the file as a whole can't be read, or the format is unknown.
    """
    if format == "jsonl":
        pairs = each_record(_preference, read_lines(path), path, image_root)
    elif format == "trl":
        pairs = each_record(_trl_preference, _json_items(path, "sample_id"), path, image_root)
    else:
        raise InputError(file=path, field="format", expected="jsonl or trl", found=format)
    return _keep_good(pairs, path, rejected, check_images)


def read_logprob_rows(path: str | Path, image_root: Path) -> list[LogprobRow]:
    """Read `{images, prompt, response}` lines. Raises InputError, with its line, at the first that is bad."""
    rows = []
    errors: dict[str, InputError | None] = {}
    for line, row in read_jsonl(path):
        fields = Fields(row, path, line)
        images, prompt, response = fields.images(), fields.text("prompt"), fields.text("response")
        prompt = _without_marks(prompt, len(images), fields, "prompt")
        for image in images:
            if (error := _image_error(image_root, image, errors)) is not None:
                raise _of_record(error, path, line, fields.sample_id)
        rows.append(LogprobRow(images, prompt, response, image_root))
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
            sample_id = record.id if isinstance(record, Sample) else record.sample_id
            rejected.append(_of_record(error, path, line, sample_id).as_record())
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


def _without_marks(text: str, num_images: int, fields: Fields, name: str) -> str:
    """Remove a text's image marks. Raises InputError where they are neither none nor as many as the images."""
    marks = text.count(IMAGE_MARK)
    _check_marks(fields, marks, num_images)
    unmarked = text.replace(IMAGE_MARK, "").strip() if marks else text
    if not unmarked.strip():
        raise fields.error(name, "text beside the image marks", text)
    return unmarked


def _check_marks(fields: Fields, marks: int, num_images: int) -> None:
    """Raise InputError where image marks are neither none nor as many as the images."""
    if marks not in (0, num_images):
        expected = f"{marks} images, as many as are marked in the text"
        raise fields.error("images", expected, num_images, f"give each image one {IMAGE_MARK}")


def _json_items(path: str | Path, id_key: str) -> Iterator[Row]:
    """Yield the rows of a JSON list, each with the line it begins on, or of JSON lines; unnamed ones are called record-N."""
    for number, (line, row) in enumerate(_json_list_or_lines(path), start=1):
        yield line, row if isinstance(row, InputError) else {id_key: f"record-{number}"} | row


def _json_list_or_lines(path: str | Path) -> Iterator[Row]:
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
    question = _without_marks(sample.question, len(sample.images), Fields(row, path, line), "question")
    return [replace(sample, question=question)]


def _preference(row: dict[str, Any], path: str | Path, line: int, image_root: Path) -> list[Preference]:
    pair = Preference.from_json(row, file=path, line=line, image_root=image_root)
    prompt = _without_marks(pair.prompt, len(pair.images), Fields(row, path, line), "prompt")
    return [replace(pair, prompt=prompt)]


# LLaVA conversations --------------------------------------------------------------------------------------------------


def _llava_samples(row: dict[str, Any], path: str | Path, line: int, image_root: Path) -> list[Sample | InputError]:
    """Read a sample for each pair of turns; later turns of a conversation are questions of their own (`id-1`, ...)."""
    fields = Fields(row, path, line)
    name, images = fields.identifier("id"), fields.images()
    turns = _take_turns(fields, len(images))
    rationale, facts, extra = fields.optional_text("rationale"), fields.sentences("facts"), fields.rest()
    samples: list[Sample | InputError] = []
    for number, (question, answer) in enumerate(turns):
        fields.sample_id = f"{name}-{number}" if number else name
        if question and answer:
            notes = (rationale, facts) if number == 0 else (None, ())
            samples.append(Sample(fields.sample_id, images, question, answer, *notes, dict(extra), image_root))
        else:
            empty = "answer" if question else "question"
            samples.append(fields.error(empty, f"a non-empty {empty} in turn {number}", "", "fill it in"))
    return samples


def _take_turns(fields: Fields, num_images: int) -> list[tuple[str, str]]:
    """Take a conversation's questions and answers, without image marks. Raises InputError where one is no turn of theirs."""
    turns = fields.take("conversations", "a list of turns")
    expected = "pairs of turns {from: human, value} and {from: gpt, value}"
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise fields.error("conversations", expected, turns)
    for turn, speakers in zip(turns, (("human", "user"), ("gpt", "assistant")) * (len(turns) // 2), strict=True):
        if not isinstance(turn, dict) or turn.get("from") not in speakers or not isinstance(turn.get("value"), str):
            raise fields.error("conversations", expected, turn)
    _check_marks(fields, sum(turn["value"].count(IMAGE_MARK) for turn in turns[::2]), num_images)
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [(first["value"].replace(IMAGE_MARK, "").strip(), second["value"].strip()) for first, second in pairs]


# TRL's preferences ----------------------------------------------------------------------------------------------------


def _trl_preference(row: dict[str, Any], path: str | Path, line: int, image_root: Path) -> list[Preference]:
    """Read a TRL row {images, prompt, chosen, rejected} of message lists or strings."""
    fields = Fields(row, path, line)
    num_images = len(Fields(row, path, line).images())
    plain = dict(row)
    for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        plain[name], marks = _message(fields, name, role)
        if marks and name != "prompt":
            raise fields.error(name, "a response of text", "an image part", "keep images in the prompt")
        _check_marks(fields, marks, num_images)
    return _preference(plain, path, line, image_root)


def _message(fields: Fields, name: str, role: str) -> tuple[str, int]:
    """Take the text of a string or of a single message, and how many images are marked by parts of it."""
    expected = f"a string, or one message of role {role!r} with text"
    value = fields.take(name, expected)
    if isinstance(value, str):
        return value, 0
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != role:
        raise fields.error(name, expected, value, "split several turns into rows of one turn")
    content = value[0].get("content")
    if isinstance(content, str):
        return content, 0
    if not isinstance(content, list) or any(not isinstance(part, dict) for part in content):
        raise fields.error(name, expected, value)
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    if any(not isinstance(text, str) for text in texts):
        raise fields.error(name, expected, value)
    return " ".join(texts), sum(part.get("type") == "image" for part in content)
