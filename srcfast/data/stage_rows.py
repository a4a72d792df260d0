"""Read and check the rows that stages exchange beside records: scores, preference pairs, predictions."""

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
FIX = "score these candidates anew"


def read_scores(directory: str | Path) -> Iterator[dict[str, Any]]:
    """Yield score rows: those of `srcfast score`, see `stages.scoring.scored_rows`, or of another scorer.

    Raises:
        InputError: the directory is incomplete, or a field of a row is missing or has another type or shape; it is named.
    """
    for file, line, row in read_shards(directory):
        check_scores(row, file, line)
        yield row


def check_scores(row: Mapping[str, Any], file: str | Path, line: int) -> None:
    """Check a score row of n candidates. Raises InputError that names file, line and field.

    Curation needs `sample_id`, `candidate_ids`, `scores`, `confidence`, the rates and the counts; `alone`, `raw` and
    `win_probability` are checked if they are present.
    """
    fields = Fields(row, file, line)
    fields.identifier("sample_id")
    ids = fields.take("candidate_ids", "a list of ids")
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids) or len(set(ids)) < len(ids):
        raise fields.error("candidate_ids", "a list of ids, each once", ids, FIX)
    n = len(ids)

    def is_matrix(value: Any) -> bool:
        return isinstance(value, list) and len(value) == n and all(_is_probabilities(row, n) for row in value)

    for name in ("scores", *(("alone",) if "alone" in row else ())):
        fields.take(name, f"{n} numbers from 0 to 1", lambda value: _is_probabilities(value, n), FIX)
    for name in ("confidence", *(("win_probability",) if "win_probability" in row else ())):
        fields.take(name, f"{n} x {n} numbers from 0 to 1", is_matrix, FIX)
    if "raw" in row:
        expected = f"{n} or {n} x {n} numbers from 0 to 1"
        fields.take("raw", expected, lambda value: _is_probabilities(value, n) or is_matrix(value), FIX)
    for name in (*_COUNTS, *_RATES):
        value = fields.number(name)
        if value < 0 or (name in _RATES and value > 1):
            raise fields.error(name, "a share" if name in _RATES else "a count", value, FIX)


def _is_probabilities(values: Any, count: int) -> bool:
    """Return whether a value is a list of so many numbers from 0 to 1, within rounding."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) in (int, float) and -1e-6 <= value <= 1 + 1e-6 for value in values)
    )


def read_pairs(directory: str | Path, samples: Mapping[str, Sample]) -> list[Preference]:
    """Read the preferences that curation wrote, with the image roots of their samples.

    Args:
        directory: of the shards.
        samples: by id.

    Raises:
        InputError: the directory is incomplete, a field is missing or has another type, or a sample is not in `samples`.
    """
    pairs = []
    for file, line, row in read_shards(directory):
        pair = Preference.from_json(row, file=file, line=line, image_root=Path())
        sample = samples.get(pair.sample_id)
        if sample is None:
            expected = "a sample of this run"
            raise InputError(file=file, line=line, field="sample_id", expected=expected, found=pair.sample_id)
        pairs.append(replace(pair, image_root=sample.image_root))
    return pairs


def read_aligned(file: str | Path) -> dict[str, bool]:
    """Read from predictions in JSON lines, by sample id, whether each is right and aligned.

    Raises:
        InputError: a line is malformed, a field is missing or has another type, or an id occurs twice.
    """
    aligned_by_id: dict[str, bool] = {}
    for line, row in read_jsonl(file):
        fields = Fields(row, file, line)
        name = fields.identifier("id")
        aligned = fields.take("aligned", "true, false or null", lambda value: isinstance(value, bool | None))
        if name in aligned_by_id:
            raise InputError(file=file, line=line, field="id", expected="an id that occurs once", found=name)
        aligned_by_id[name] = bool(aligned)
    return aligned_by_id
