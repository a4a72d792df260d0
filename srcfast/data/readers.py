"""Readers of the formats that users have. A bad record is set aside with its reason; the rest goes on."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from srcfast.data.images import decode_image, from_base64, load_image
from srcfast.data.jsonl import read_lines
from srcfast.data.records import Fields, Preference, Sample
from srcfast.errors import InputError

IMAGE_MARK = "<image>"
OPTIONS = "ABCDEFGHIJ"

Record = TypeVar("Record", Sample, Preference)


def read_samples(
    path: str | Path,
    *,
    format: str,
    image_root: Path,
    rejected: list[dict[str, Any]],
    check_images: bool = True,
    image_output: Path | None = None,
) -> list[Sample]:
    """Read samples; what is wrong with the others is appended to `rejected`, as `rejected.jsonl` keeps it.

    Args:
        path: the file; for easy_vqa the split, "train" or "test".
        format: jsonl | llava | vlmeval_tsv | easy_vqa.
        image_root: folder that image paths are relative to.
        check_images: decode every image once now, so that a broken one is set aside instead of met hours later.
        image_output: where a TSV's base64 images are written (default: a folder beside the TSV).

    Raises:
        InputError: the file as a whole can't be read, or the format is unknown.
    """
    if format == "easy_vqa":
        from srcfast.data.easy_vqa import read_easy_vqa

        return read_easy_vqa(str(path))
    readers: dict[str, Callable[[], Iterator[Sample | InputError]]] = {
        "jsonl": lambda: _jsonl_samples(path, image_root),
        "llava": lambda: _llava_samples(path, image_root),
        "vlmeval_tsv": lambda: _tsv_samples(path, image_output or Path(path).with_suffix(".images")),
    }
    if format not in readers:
        raise InputError(file=path, field="format", expected=", ".join((*readers, "easy_vqa")), found=format)
    return _keep_good(readers[format](), path, rejected, check_images, key=lambda sample: sample.id)


def read_preferences(
    path: str | Path,
    *,
    format: str,
    image_root: Path,
    rejected: list[dict[str, Any]],
    check_images: bool = True,
) -> list[Preference]:
    """Read preference pairs: `jsonl` (ours) or `trl` (conversational rows, as JSON lines or one JSON list).

    Raises:
        InputError: the file as a whole can't be read, or the format is unknown.
    """
    if format not in ("jsonl", "trl"):
        raise InputError(file=path, field="format", expected="jsonl or trl", found=format)

    def rows() -> Iterator[Preference | InputError]:
        source = _json_list(path) if format == "trl" else read_lines(path)
        for line, row in source:
            try:
                if isinstance(row, InputError):
                    raise row
                ours = trl_to_ours(row, path, line) if format == "trl" else row
                pair = Preference.from_json(ours, file=path, line=line, image_root=image_root)
                if pair.chosen == pair.rejected:
                    raise InputError(
                        file=path,
                        line=line,
                        sample_id=pair.sample_id,
                        field="rejected",
                        expected="a response other than the chosen one",
                        found=repr(pair.rejected),
                    )
                yield pair
            except InputError as error:
                yield error

    return _keep_good(rows(), path, rejected, check_images, key=None)


def _keep_good(
    found: Iterable[Record | InputError],
    path: str | Path,
    rejected: list[dict[str, Any]],
    check_images: bool,
    key: Callable[[Record], str] | None,
) -> list[Record]:
    """The good records; ids (by `key`) must differ and images must decode."""
    good: list[Record] = []
    seen: set[str] = set()
    sound: dict[tuple[Path, str], InputError | None] = {}
    for record in found:
        if isinstance(record, InputError):
            rejected.append(record.as_record())
            continue
        name = key(record) if key is not None else record.sample_id  # type: ignore[attr-defined]
        line = record.extra.pop("_line", None)
        try:
            if key is not None and name in seen:
                raise InputError(expected="an id that occurs once", found=name, field="id")
            for image in record.images if check_images else ():
                place = (record.image_root, image)
                if place not in sound:
                    sound[place] = _problem(*place)
                if (problem := sound[place]) is not None:
                    raise problem
        except InputError as error:
            found_file = f"{error.found} ({error.file})" if error.file else error.found
            rejected.append(
                InputError(
                    file=path,
                    line=line,
                    sample_id=name,
                    field=error.field,
                    expected=error.expected,
                    found=found_file,
                    mend=error.mend,
                ).as_record()
            )
            continue
        seen.add(name)
        good.append(record)
    return good


def _problem(root: Path, image: str) -> InputError | None:
    try:
        load_image(root, image)
    except InputError as error:
        return error
    return None


def check_rejected(rejected: Sequence[dict[str, Any]], total: int, max_rejected: int | float) -> None:
    """Raises InputError, with the counts by field, if more was set aside than allowed: a count, or a share (float)."""
    over = len(rejected) > max_rejected * total if isinstance(max_rejected, float) else len(rejected) > max_rejected
    if over or (rejected and len(rejected) == total):
        fields = Counter(str(row["field"] or "record") for row in rejected)
        counts = ", ".join(f"{count} by {field!r}" for field, count in fields.most_common())
        raise InputError(
            file=rejected[0]["file"],
            expected=f"at most max_rejected = {max_rejected} bad records of {total}",
            found=f"{len(rejected)} ({counts}); the first: {rejected[0]['reason']}",
            mend="mend the data, or raise max_rejected",
        )


# JSON lines -----------------------------------------------------------------------------------------------------------


def _jsonl_samples(path: str | Path, image_root: Path) -> Iterator[Sample | InputError]:
    for line, row in read_lines(path):
        try:
            if isinstance(row, InputError):
                raise row
            sample = Sample.from_json(row, file=path, line=line, image_root=image_root)
            yield replace(sample, question=_without_marks(sample, path, line), extra=sample.extra | {"_line": line})
        except InputError as error:
            yield error


def _without_marks(sample: Sample, path: str | Path, line: int | None) -> str:
    """The question without image marks, of which there must be as many as images, or none."""
    marks = sample.question.count(IMAGE_MARK)
    if marks and marks != len(sample.images):
        raise InputError(
            file=path,
            line=line,
            sample_id=sample.id,
            field="images",
            expected=f"{marks} images, as the question marks",
            found=len(sample.images),
            mend=f"make the number of {IMAGE_MARK} and of images the same",
        )
    question = sample.question.replace(IMAGE_MARK, "").strip()
    if not question:
        raise InputError(
            file=path, line=line, sample_id=sample.id, field="question", expected="a question", found=sample.question
        )
    return question


# LLaVA conversations --------------------------------------------------------------------------------------------------


def _json_list(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Items of one JSON list (numbered from 1), or of JSON lines."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(file=path, expected="a readable file in UTF-8", found=error) from error
    if not text.lstrip().startswith("["):
        yield from read_lines(path)
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        raise InputError(file=path, line=line, expected="a JSON list of records", found=error) from error
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict):
            yield number, row
        else:
            yield number, InputError(file=path, line=number, expected="a JSON object", found=repr(row))


def _llava_samples(path: str | Path, image_root: Path) -> Iterator[Sample | InputError]:
    """One sample for each pair of turns; later turns of a conversation are questions of their own (`id-1`, ...)."""
    for line, row in _json_list(path):
        try:
            if isinstance(row, InputError):
                raise row
            yield from _conversation(row, path, line, image_root)
        except InputError as error:
            yield error


def _conversation(row: dict[str, Any], path: str | Path, line: int, image_root: Path) -> list[Sample]:
    fields = Fields(row, path, line)
    name = fields.identifier("id", default=f"line-{line}")
    images = fields.images()
    turns = fields.take("conversations", "a list of turns")
    expected = "pairs of turns {from: human, value} and {from: gpt, value}"
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise fields.error("conversations", expected, turns)
    rest = fields.rest()
    samples = []
    marks = 0
    for number, (asked, answered) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
        for turn, speakers in ((asked, ("human", "user")), (answered, ("gpt", "assistant"))):
            if not isinstance(turn, dict) or turn.get("from") not in speakers or not isinstance(turn.get("value"), str):
                raise fields.error("conversations", expected, turn)
        marks += asked["value"].count(IMAGE_MARK)
        question, answer = asked["value"].replace(IMAGE_MARK, "").strip(), answered["value"].strip()
        if not question or not answer:
            empty = "question" if not question else "answer"
            raise fields.error("conversations", f"a non-empty {empty} in turn {number}", "", "fill it in")
        own = f"{name}-{number}" if number else name
        rationale = rest.get("rationale") if number == 0 else None
        extra = {key: value for key, value in rest.items() if key not in ("rationale", "facts")}
        facts = tuple(rest.get("facts") or ()) if number == 0 else ()
        samples.append(Sample(own, images, question, answer, rationale, facts, extra | {"_line": line}, image_root))
    if marks not in (0, len(images)):
        raise fields.error("images", f"{marks} images, as the turns mark", len(images), "make the two numbers the same")
    return samples


# VLMEvalKit TSV -------------------------------------------------------------------------------------------------------


def _tsv_samples(path: str | Path, image_output: Path) -> Iterator[Sample | InputError]:
    """Rows of `index, image, question, A.., answer, category, l2-category, split`; images are written to files."""
    csv.field_size_limit(sys.maxsize)
    written: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            if not {"index", "image", "question", "answer"} <= set(reader.fieldnames or ()):
                raise InputError(
                    file=path, line=1, expected="columns index, image, question, answer", found=reader.fieldnames
                )
            for row in reader:
                try:
                    yield _tsv_row(row, path, reader.line_num, image_output, written)
                except InputError as error:
                    yield error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(file=path, expected="a readable TSV in UTF-8", found=error) from error


def _tsv_row(row: dict[str, Any], path: str | Path, line: int, image_output: Path, written: dict[str, str]) -> Sample:
    kept = {key: value for key, value in row.items() if key is not None and value not in (None, "")}
    fields = Fields(kept, path, line)
    fields.sample_id = kept.get("index")
    index = fields.identifier("index")
    image = fields.text("image").strip()
    if len(image) <= 64:  # another row's index
        if image not in written:
            raise fields.error("image", "base64, or the index of an earlier row", image)
    else:
        data = from_base64(image, f"{path}, line {line}")
        decoded = decode_image(data, f"{path}, line {line}")
        image_output.mkdir(parents=True, exist_ok=True)
        name = f"{index.replace('/', '_')}.png"
        decoded.save(image_output / name)
        written[index] = name
        image = index
    question = fields.text("question")
    options = {letter: str(kept[letter]) for letter in OPTIONS if letter in kept}
    if options:
        question += "\nOptions:\n" + "\n".join(f"{letter}. {text}" for letter, text in options.items())
    answer = fields.answer("answer")
    extra = {key: value for key, value in fields.rest().items() if key not in options}
    if "category" in extra:
        extra["ability"] = extra["category"]
    if options:
        extra["options"] = options
    return Sample(index, (written[image],), question, answer, None, (), extra | {"_line": line}, image_output)


# TRL's conversational preferences -------------------------------------------------------------------------------------


def trl_to_ours(row: dict[str, Any], path: str | Path, line: int) -> dict[str, Any]:
    """A TRL row {images, prompt, chosen, rejected} with message lists or strings as our preference record."""
    fields = Fields(row, path, line)
    ours = {"sample_id": f"line-{line}"} | {k: v for k, v in row.items() if k not in ("prompt", "chosen", "rejected")}
    for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        ours[name] = _message_text(fields, name, fields.take(name, "messages or a string"), role)
    return ours


def _message_text(fields: Fields, name: str, value: Any, role: str) -> str:
    if isinstance(value, str):
        return value.replace(IMAGE_MARK, "").strip()
    expected = f"one message of role {role!r} with text"
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != role:
        raise fields.error(name, expected, value, "split several turns into rows of one turn")
    content = value[0].get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or any(not isinstance(part, dict) for part in parts):
        raise fields.error(name, expected, value)
    texts = [part.get("text") for part in parts if part.get("type") == "text"]
    if any(not isinstance(text, str) for text in texts):
        raise fields.error(name, expected, value)
    return " ".join(texts).replace(IMAGE_MARK, "").strip()
