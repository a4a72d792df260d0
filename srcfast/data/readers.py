"""Readers of the formats that users have. A bad record is rejected with its reason; the others are read."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

from srcfast.data.containers import files_of, is_table, read_rows
from srcfast.data.conversations import (
    alpaca_preference,
    alpaca_samples,
    llava_samples,
    message_preference,
    message_samples,
    rlhf_v_preference,
    trl_preference,
)
from srcfast.data.gc_pauses import pause_full_collections
from srcfast.data.images import check_image, locate
from srcfast.data.jsonl import read_jsonl
from srcfast.data.opening import open_text
from srcfast.data.records import Fields, MadeUpId, Preference, Row, Sample, each_record, of_record, settled_prompt
from srcfast.data.templated_texts import check_untemplated
from srcfast.data.vlmeval import read_vlmeval_tsv
from srcfast.errors import InputError

Paths = str | Path | Sequence[str | Path]  # a file, a glob, or a list of these
Found = Sample | Preference | InputError  # what stands in a line
_FIRST = 100  # rows that the format is determined by


@dataclass(frozen=True)
class Format:
    """A format of rows.

    Attributes:
        read: reads the records of a row.
        needs: groups of keys of which a row has one.
        id_key: the key that names a record; rows without it are called record-N.
        is_text: whether the values of the needed keys are texts.
    """

    read: Callable[[Fields, Path], Sequence[Any]]
    needs: tuple[tuple[str, ...], ...]
    id_key: str | None = None
    is_text: bool = False

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row has what the format needs."""
        return any(
            all(isinstance(row.get(key), str) if self.is_text else row.get(key) is not None for key in keys)
            for keys in self.needs
        )


def read_samples(
    path: Paths,
    *,
    format: str = "auto",
    image_root: Path | Sequence[Path] | None = None,
    rejected: list[dict[str, Any]],
    check_images: bool = True,
    image_output: Path | None = None,
    follow_links: bool = False,
    duplicate_ids: str = "reject",
) -> list[Sample]:
    """Read samples; a row for `rejected.jsonl` about each bad record is appended to `rejected`.

    Args:
        path: a file, a glob, or a list of these.
        format: auto (determined by the first rows), one of SAMPLES, or vlmeval_tsv.
        image_root: folder, or folders, that image paths are relative to; default: the file's.
        check_images: decode every image once now, so that a broken one is rejected here, not hours later.
        image_output: where images within the file are written (default: a folder beside it).
        follow_links: let symbolic links lead out of the image roots.
        duplicate_ids: `reject` a sample whose id has occurred, or `rename` it and warn.

    Raises:
        InputError: a file as a whole can't be read, or the format is unknown.
    """
    found = _read_records(path, SAMPLES, format, image_root, image_output, follow_links)
    return _good(_with_settled_ids(found, duplicate_ids), rejected, check_images)


def read_preferences(
    path: Paths,
    *,
    format: str = "auto",
    image_root: Path | Sequence[Path] | None = None,
    rejected: list[dict[str, Any]],
    check_images: bool = True,
    image_output: Path | None = None,
    follow_links: bool = False,
) -> list[Preference]:
    """Read preference pairs as `read_samples` does samples; `format` is auto or one of PREFERENCES.

    Raises:
        InputError: a file as a whole can't be read, or the format is unknown.
    """
    found = _read_records(path, PREFERENCES, format, image_root, image_output, follow_links)
    return _good(_with_settled_ids(found, "keep"), rejected, check_images)


def read_logprob_rows(path: str | Path, image_root: Path) -> list[Sample]:
    """Read `{images, turns?, prompt, response}` lines as samples "request 1", ... whose answers are the responses.

    Raises:
        InputError: a line is bad.
    """
    rows: list[Sample] = []
    errors: dict[tuple[Path, str], InputError | None] = {}
    for line, row in read_jsonl(path):
        fields = Fields(row, path, line)
        images, turns = fields.images(), fields.turns()
        prompt, response = fields.text("prompt"), fields.text("response")
        turns, prompt = settled_prompt(fields, "prompt", turns, prompt, len(images))
        name, source = f"request {len(rows) + 1}", (str(path), line)
        request = Sample(name, images, prompt, response, image_root=image_root, turns=turns, source=source)
        try:
            check_untemplated(request)
        except InputError as error:
            error.field = {"question": "prompt", "answer": "response"}.get(error.field or "", error.field)
            raise of_record(error, request) from error
        for image in images:
            if (broken := _image_error(image_root, image, errors)) is not None:
                raise of_record(broken, request)
        rows.append(request)
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


def _read_records(
    path: Paths,
    formats: Mapping[str, Format],
    format: str,
    image_root: Path | Sequence[Path] | None,
    image_output: Path | None,
    follow_links: bool,
) -> Iterator[Found]:
    """Yield the records of all files, their images located."""
    files, names, numbers = files_of(path), [*formats, *(["vlmeval_tsv"] if formats is SAMPLES else [])], count(1)
    format = find_format(files[0], formats) if format == "auto" else format
    if format not in names:
        expected = f"auto, {', '.join(names)}"
        raise InputError(file=files[0], field="format", expected=expected, found=format)
    for file in files:
        roots = [image_root] if isinstance(image_root, Path) else [*(image_root or [file.parent])]
        output = image_output or file.with_name(f"{file.name}.images")
        if format == "vlmeval_tsv":
            records: Iterator[tuple[int, Any]] = read_vlmeval_tsv(file, output, roots[0])
        else:
            rows = _named(read_rows(file, output), formats[format].id_key, numbers)
            records = each_record(formats[format].read, rows, file, roots[0])
            roots += [output] if is_table(file) else []
        for line, record in records:
            if not isinstance(record, InputError):
                record = replace(record, source=(str(file), line))
                try:
                    check_untemplated(record)
                    if record.image_root != output:  # the images of a table's cells are there
                        root, images = locate(roots, record.images, follow_links)
                        record = replace(record, image_root=root, images=images)
                except InputError as error:
                    record = of_record(error, record)
            yield record


def _named(rows: Iterable[Row], id_key: str | None, numbers: Iterator[int]) -> Iterator[Row]:
    """Yield the rows; those without the key get record-N, where there is such a key."""
    for (line, row), number in zip(rows, numbers, strict=False):
        yield (
            line,
            row if id_key is None or isinstance(row, InputError) else {id_key: MadeUpId(f"record-{number}")} | row,
        )


def _with_settled_ids(records: Iterable[Found], duplicates: str) -> Iterator[Found]:
    """Keep, reject or rename records whose ids occur twice, and rename those whose ids were made up where another has that id.

    To an id -2, -3, ... is added.
    """
    read = list(records)
    names = [record.sample_id if isinstance(record, InputError) else record.id for record in read]
    taken, in_file = {*names}, {name for name in names if not isinstance(name, MadeUpId)}
    sources: dict[str | None, tuple[str, int] | None] = {}
    numbers: Counter[str | None] = Counter()
    renamed: list[str] = []
    for record, name in zip(read, names, strict=True):
        if not isinstance(record, InputError):
            (file, line), is_twice = record.source or ("", 0), name in sources
            # Lines of several files bear the same made-up ids.
            is_made_up_twice = isinstance(name, MadeUpId) and (name in in_file or is_twice and duplicates == "keep")
            if is_made_up_twice or (is_twice and duplicates == "rename"):
                free: Any = name
                while free in taken:
                    numbers[name] += 1
                    free = f"{name}-{numbers[name] + 1}"
                taken.add(free)
                if is_twice and duplicates == "rename":
                    renamed.append(f"{name!r} of {file}, line {line}: {free!r}")
                record = replace(record, **{"id" if isinstance(record, Sample) else "sample_id": free})
            elif is_twice and duplicates == "reject":
                of_file, of_line = sources[name] or ("", 0)
                found = f"that of line {of_line}" + ("" if of_file == file else f" of {of_file}")
                fix = "give each sample an id of its own, or set duplicate_ids: rename"
                error = InputError(field="id", expected="an id that occurs once", found=found, fix=fix)
                record = of_record(error, record)
            else:
                sources[name] = record.source
        yield record
    if renamed:
        shown = "; ".join(renamed[:3]) + ("; ..." if len(renamed) > 3 else "")
        warnings.warn(f"{len(renamed)} ids had occurred before and were renamed: {shown}", stacklevel=2)


@pause_full_collections()
def _good(records: Iterable[Found], rejected: list[dict[str, Any]], check_images: bool) -> list[Any]:
    """List the good records, each image decoded once; the others' errors go to `rejected`."""
    good = []
    errors: dict[tuple[Path, str], InputError | None] = {}
    for record in records:
        error: InputError | None = record if isinstance(record, InputError) else None
        if not isinstance(record, InputError) and check_images:
            image_errors = (_image_error(record.image_root, image, errors) for image in record.images)
            broken = next((error for error in image_errors if error is not None), None)
            error = None if broken is None else of_record(broken, record)
        if error is None:
            good.append(record)
        else:
            rejected.append(error.as_record())
    return good


def _image_error(root: Path, image: str, errors: dict[tuple[Path, str], InputError | None]) -> InputError | None:
    """Return what is wrong with an image below `root`, None if nothing is; `errors` remembers it."""
    key = root, image
    if key not in errors:
        errors[key] = None
        try:
            check_image(root, image)
        except InputError as error:
            error.__cause__ = error.__context__ = None  # their traces would keep the file's bytes in memory
            errors[key] = error.with_traceback(None)
    return errors[key]


# Formats --------------------------------------------------------------------------------------------------------------


def _jsonl_sample(fields: Fields, image_root: Path) -> list[Sample]:
    sample = Sample.from_json(fields.left, file=fields.file, line=fields.line, image_root=image_root)
    turns, question = settled_prompt(fields, "question", sample.turns, sample.question, len(sample.images))
    return [replace(sample, question=question, turns=turns)]


def _preference(fields: Fields, image_root: Path) -> list[Preference]:
    pair = Preference.from_json(fields.left, file=fields.file, line=fields.line, image_root=image_root)
    turns, prompt = settled_prompt(fields, "prompt", pair.turns, pair.prompt, len(pair.images))
    return [replace(pair, prompt=prompt, turns=turns)]


# What rows can be, in the order in which that is asked.
SAMPLES = {
    "llava": Format(llava_samples, (("conversations",),), "id"),
    "messages": Format(message_samples, (("messages",), ("query", "response")), "id"),
    "alpaca": Format(alpaca_samples, (("instruction", "output"),), "id"),
    "jsonl": Format(_jsonl_sample, (("question", "answer"),)),
}
_RANKED = (("messages", "rejected"), ("conversations", "rejected"), ("messages", "rejected_response"))
_RLHF_V = (("question", "chosen", "rejected"), ("text", "image"), ("text", "image_path"))
PREFERENCES = {
    "messages": Format(message_preference, _RANKED, "sample_id"),
    "alpaca": Format(alpaca_preference, (("instruction", "chosen", "rejected"),), "sample_id"),
    "jsonl": Format(_preference, (("prompt", "chosen", "rejected"),), is_text=True),
    "rlhf_v": Format(rlhf_v_preference, _RLHF_V, "sample_id"),
    "trl": Format(trl_preference, (("chosen", "rejected"),), "sample_id"),
}


def holds_preferences(path: Path) -> bool:
    """Return whether the first records of a file are preferences. Raises InputError where the file can't be read."""
    return any(_is_preference(row) for row in _first_rows(path) if isinstance(row, dict))


def find_format(path: Path, formats: Mapping[str, Format]) -> str:
    """Determine the format of a file, one of `formats` or vlmeval_tsv, by its first rows.

    Raises:
        InputError: it is none of these; the text has the keys that were seen, and what each format needs.
    """
    if formats is SAMPLES and not is_table(path):
        with open_text(path) as file:
            header = file.readline(1 << 16)
        if "\t" in header and header.lstrip()[:1] not in ("[", "{"):
            return "vlmeval_tsv"
    rows = _first_rows(path)
    objects = [row for row in rows if isinstance(row, dict)]
    together = {key: value for row in objects for key, value in row.items()}  # each may lack something
    fitting = (
        name
        for row in (*objects, together)
        if formats is PREFERENCES or not _is_preference(row)
        for name, format in formats.items()
        if format.fits(row)
    )
    if (name := next(fitting, None)) is not None:
        return name
    needs = "; ".join(
        f"{name} ({' or '.join(' and '.join(keys) for keys in format.needs)})" for name, format in formats.items()
    )
    reasons = [f"no JSON in line {row.line} ({row.found})" for row in rows if isinstance(row, InputError)]
    found = f"the keys {', '.join(together)}" if together else reasons[0] if reasons else "no record"
    if formats is SAMPLES and any(map(_is_preference, objects)):
        found += ", as preferences have them, which `srcfast dpo` reads"
    expected = f"{'samples' if formats is SAMPLES else 'preferences'} as one of the formats has them: {needs}"
    raise InputError(file=path, field="format", expected=expected, found=found, fix="rename the keys")


def _first_rows(path: Path) -> list[dict[str, Any] | InputError]:
    return [row for _, row in islice(read_rows(path, None), _FIRST)]


def _is_preference(row: Mapping[str, Any]) -> bool:
    """Return whether a row has two responses, of which one is rejected."""
    return "rejected" in row or "rejected_response" in row or PREFERENCES["rlhf_v"].fits(row)
