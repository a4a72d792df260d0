"""Turn samples into rationale-answer pairs (RAPs), which stage 1 trains on and the R-Scorer's examples are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from srcfast.data.answers import is_right
from srcfast.data.jsonl import read_jsonl
from srcfast.data.rationale_format import bare_answer, format_response, parse_response
from srcfast.data.records import Sample
from srcfast.data.sentence_marks import STOPS, WIDE_FULL_STOP
from srcfast.errors import InputError

RationalePair = tuple[Sample, str]  # a sample and its response's text: rationale, then answer


@dataclass(frozen=True)
class TeacherRationale:
    """What a teacher wrote for a sample; `answer` is None where it gave none."""

    rationale: str
    answer: str | None = None


def read_teacher(path: str | Path) -> dict[str, TeacherRationale]:
    """Read a teacher's file by sample id: JSON lines of `{id, rationale, answer?}`.

    Raises:
        InputError: a malformed line, a field that is missing or no text, or an id that occurs twice.
    """
    entries: dict[str, TeacherRationale] = {}
    for line, row in read_jsonl(path):
        for field, needed in (("id", True), ("rationale", True), ("answer", False)):
            value = row.get(field)
            if value is None and not needed:
                continue
            if not isinstance(value, str) or not value.strip():
                raise InputError(file=path, line=line, field=field, expected="a non-empty text", found=repr(value))
        if row["id"] in entries:
            raise InputError(file=path, line=line, field="id", expected="an id that no other line has", found=row["id"])
        entries[row["id"]] = TeacherRationale(row["rationale"], row.get("answer"))
    return entries


def with_teacher(samples: Sequence[Sample], teacher: Mapping[str, TeacherRationale]) -> list[Sample]:
    """Return the samples, those of whom the teacher has an entry that doesn't contradict the answer with its rationale."""
    entries = [teacher.get(sample.id) for sample in samples]
    return [
        replace(sample, rationale=entry.rationale)
        if entry is not None and (entry.answer is None or is_right(sample, entry.answer))
        else sample
        for sample, entry in zip(samples, entries, strict=True)
    ]


def build_raps(
    samples: Sequence[Sample],
    format: Literal["tagged", "plain", "answer"] = "tagged",
    teacher: Mapping[str, TeacherRationale] | None = None,
) -> tuple[list[RationalePair], Counter[str]]:
    """Build rationale-answer pairs from the teacher's entry, else the sample's rationale, else its facts.

    Facts become what is seen, with nothing concluded. In a rationale without tags the last sentence is the conclusion, and
    those before it are what is seen.

    Args:
        samples: in the order of the pairs.
        format: of the responses, "tagged" or "plain"; "answer": the answer alone, whether or not there is a rationale.
        teacher: entries by sample id.

    Returns:
        The pairs in the samples' order, and how many samples were dropped for which reason: "no_answer",
        "no_rationale_or_facts", "unreadable_rationale", "answer_contradicts_rationale" (the rationale or the
        teacher states another answer).
    """
    raps: list[RationalePair] = []
    dropped: Counter[str] = Counter()
    for sample in samples:
        response, reason = _response(sample, (teacher or {}).get(sample.id), format)
        if response is None:
            dropped[reason] += 1
        else:
            raps.append((sample, response))
    return raps, dropped


def _response(
    sample: Sample, entry: TeacherRationale | None, format: Literal["tagged", "plain", "answer"]
) -> tuple[str | None, str]:
    """Return (response, "") or (None, the reason why there is none)."""
    rationale = (sample.rationale if entry is None else entry.rationale) or ""
    if not sample.answer.strip():
        return None, "no_answer"
    if format == "answer":
        return bare_answer(sample.answer), ""
    stated = [] if entry is None else [entry.answer]  # answers of the teacher and within the rationale
    if rationale.strip():
        see, think, answer = _read_rationale(rationale)
        stated.append(answer)
    else:
        see, think = tuple(map(_as_sentence, sample.facts)), ()
    if not see and not think:
        return None, "unreadable_rationale" if rationale.strip() else "no_rationale_or_facts"
    if any(answer is not None and not is_right(sample, answer) for answer in stated):
        return None, "answer_contradicts_rationale"
    try:
        return format_response(see, think, sample.answer, format), ""
    except InputError:
        return None, "unreadable_rationale"


def _read_rationale(text: str) -> tuple[tuple[str, ...], tuple[str, ...], str | None]:
    """Return (sentences seen, sentences concluded, the answer if it states one) of a rationale with or without tags."""
    parsed = parse_response(text)
    answer = parsed.answer if parsed.has_rationale else None
    if not parsed.has_rationale:  # a rationale without an answer: the parser of responses reads it once one follows
        tagged = "<see>" in text or "<think>" in text
        parsed = parse_response(f"{text} <answer> unknown </answer>" if tagged else f"{text} Answer: unknown")
    see, think = parsed.perception, parsed.reasoning
    if not see and len(think) > 1:
        see, think = think[:-1], think[-1:]
    return see, think, answer


def _as_sentence(text: str) -> str:
    """End the text with a full stop unless it ends a sentence already."""
    text = text.strip()
    return text if text.endswith((".", "!", "?", *STOPS, WIDE_FULL_STOP)) else f"{text}."
