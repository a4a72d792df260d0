"""What stages read of each other's shards beside the records: score rows and predictions, checked as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import read_jsonl, read_shards
from srcfast.data.records import Fields, Preference, Sample
from srcfast.errors import InputError

_COUNTS = ("pairs", "verdicts")
_RATES = ("flip_rate", "tie_rate")
MEND = "score these candidates anew"


def read_scores(directory: str | Path) -> Iterator[dict[str, Any]]:
    """Score rows of n candidates each: those of `srcfast score`, see `stages.scoring.scored_rows`, or of another scorer.

    Raises:
        InputError: the directory is not whole, or a row lacks a field, or one is of another shape; it is named.
    """
    for file, line, row in read_shards(directory):
        check_scores(row, file, line)
        yield row


def check_scores(row: Mapping[str, Any], file: str | Path, line: int) -> None:
    """Raises InputError where a score row is not what curation takes: file, line and field are named.

    Curation needs `sample_id`, `candidate_ids`, `scores`, `confidence`, the rates and the counts; `alone` and `win_probability`
    are checked where they are there.
    """
    fields = Fields(row, file, line)
    fields.identifier("sample_id")
    ids = fields.take("candidate_ids", "a list of ids")
    if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids) or len(set(ids)) < len(ids):
        raise fields.error("candidate_ids", "a list of ids, each once", ids, MEND)
    n = len(ids)
    for name in ("scores", *(("alone",) if "alone" in row else ())):
        values = fields.take(name, f"{n} numbers from 0 to 1")
        if not _is_shares(values, n):
            raise fields.error(name, f"{n} numbers from 0 to 1", values, MEND)
    expected = f"{n} x {n} numbers from 0 to 1"
    for name in ("confidence", *(("win_probability",) if "win_probability" in row else ())):
        matrix = fields.take(name, expected)
        if not isinstance(matrix, list) or len(matrix) != n or not all(_is_shares(one, n) for one in matrix):
            raise fields.error(name, expected, matrix, MEND)
    for name in (*_COUNTS, *_RATES):
        value = fields.number(name)
        if value < 0 or (name in _RATES and value > 1):
            raise fields.error(name, "a share" if name in _RATES else "a count", value, MEND)


def _is_shares(values: Any, count: int) -> bool:
    """Whether these are so many numbers from 0 to 1, with room for what rounding did."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) in (int, float) and -1e-6 <= value <= 1 + 1e-6 for value in values)
    )


def read_pairs(directory: str | Path, samples: Mapping[str, Sample]) -> list[Preference]:
    """The preferences that curation wrote, with the image roots of their samples, which `samples` has by id.

    Raises:
        InputError: the directory is not whole, a field is missing or of another kind, or a sample is none of these.
    """
    pairs = []
    for file, line, row in read_shards(directory):
        pair = Preference.from_json(row, file=file, line=line, image_root=Path())
        sample = samples.get(pair.sample_id)
        if sample is None:
            raise InputError(
                file=file, line=line, field="sample_id", expected="a sample of this run", found=pair.sample_id
            )
        pairs.append(replace(pair, image_root=sample.image_root))
    return pairs


def read_aligned(file: str | Path) -> dict[str, bool]:
    """Sample id -> whether its prediction is right and aligned, from predictions in JSON lines.

    Raises:
        InputError: a malformed line, a field that is missing or of another kind, or an id that occurs twice.
    """
    found: dict[str, bool] = {}
    for line, row in read_jsonl(file):
        fields = Fields(row, file, line)
        name, aligned = fields.identifier("id"), fields.take("aligned", "true, false or null")
        if aligned is not None and not isinstance(aligned, bool):
            raise fields.error("aligned", "true, false or null", aligned)
        if name in found:
            raise InputError(file=file, line=line, field="id", expected="an id that occurs once", found=name)
        found[name] = bool(aligned)
    return found
