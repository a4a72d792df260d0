"""Verdicts of people or language models on pairs of a model's candidates: JSON lines that an R-Scorer is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import json_hash, read_jsonl
from srcfast.data.records import Fields, Sample
from srcfast.errors import InputError

VERDICTS = ("first", "tie", "second")  # is better
Shares = tuple[float, float, float]  # of VERDICTS; they add up to 1
ROUNDING = 1e-3  # that a sum of shares may be from 1


@dataclass(frozen=True)
class JudgedPair:
    """What a judge says of two candidates of a sample.

    Attributes:
        sample: id, question and reference, without pictures.
        candidates: the texts.
        verdict: how likely each of VERDICTS is.
    """

    sample: Sample
    candidates: tuple[str, str]
    verdict: Shares

    @classmethod
    def from_json(cls, row: Mapping[str, Any], *, file: str | Path, line: int | None) -> JudgedPair:
        """Read a record. Raises InputError naming file, line and field."""
        fields = Fields(row, file, line)
        sample, candidates = read_pair(fields)
        expected = "the shares of first, tie and second: three numbers of at least 0 whose sum is 1"
        verdict = fields.take("verdict", expected, _are_shares)
        return cls(
            sample, candidates, (verdict[0] / sum(verdict), verdict[1] / sum(verdict), verdict[2] / sum(verdict))
        )


def pair_row(sample: Sample, first: str, second: str) -> dict[str, Any]:
    """Return the fields of a pair's record that say what is judged: id, question, reference, the two candidates."""
    row: dict[str, Any] = {"id": sample.id, "question": sample.question, "answer": sample.answer}
    row |= {"facts": list(sample.facts)} if sample.facts else {}
    row |= {"rationale": sample.rationale} if sample.rationale else {}
    return row | {"candidates": [first, second]}


def read_pair(fields: Fields) -> tuple[Sample, tuple[str, str]]:
    """Take what `pair_row` writes. Raises InputError naming file, line and field."""
    sample = Sample(
        id=fields.identifier("id"),
        images=(),
        question=fields.text("question"),
        answer=fields.answer("answer"),
        rationale=fields.optional_text("rationale"),
        facts=fields.sentences("facts"),
        source=None if fields.line is None else (str(fields.file), fields.line),
    )
    first, second = fields.take("candidates", "two texts that differ", _are_two_texts)
    return sample, (first, second)


def pair_key(row: Mapping[str, Any]) -> str:
    """Return a hash of what `pair_row` says, by which answers name a pair."""
    return json_hash({name: row.get(name) for name in ("id", "question", "answer", "facts", "rationale", "candidates")})


def read_verdicts(path: str | Path) -> list[JudgedPair]:
    """Read a file of verdicts.

    Raises:
        InputError: a line is no record, the file has none, or a sample has two questions or references.
    """
    pairs = [JudgedPair.from_json(row, file=path, line=line) for line, row in read_jsonl(path)]
    if not pairs:
        raise InputError(file=path, expected="at least one verdict", found="none")
    seen: dict[str, Sample] = {}
    for pair in pairs:
        if seen.setdefault(pair.sample.id, pair.sample) != pair.sample:
            file, line = pair.sample.source or (path, None)
            expected, fix = (
                "the question and reference that this id has before",
                "give each sample an id that no other has",
            )
            raise InputError(
                file=file, line=line, sample_id=pair.sample.id, field="id", expected=expected, found="others", fix=fix
            )
    return pairs


def reversed_shares(shares: Shares) -> Shares:
    """Return the shares of the same verdict where the candidates change their order."""
    return shares[2], shares[1], shares[0]


def mean_shares(shares: list[Shares]) -> Shares:
    """Return the mean of at least one verdict."""
    first, tie, second = (sum(column) / len(shares) for column in zip(*shares, strict=True))
    return first, tie, second


def _are_shares(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == len(VERDICTS)
        and all(type(share) in (int, float) and share >= 0 for share in value)
        and abs(sum(value) - 1.0) <= ROUNDING
    )


def _are_two_texts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(text, str) and bool(text.strip()) for text in value)
        and value[0] != value[1]
    )
