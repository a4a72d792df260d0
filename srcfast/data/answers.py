"""Decide whether an answer is right: equal to the gold answer or, where the sample has a tolerance, a number near it."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from srcfast.data.rationale_format import normalise_answer
from srcfast.data.records import Sample

_NUMBER = re.compile(r"([+-]?(?:[0-9]{1,3}(?:,[0-9]{3}){1,4}|[0-9]{1,15})?(?:\.[0-9]{1,15})?) ?%?")


def is_right(sample: Sample, answer: str | None) -> bool:
    """Return whether an answer is the sample's, both normalised; None, of a response that did not parse, is wrong.

    With `tolerance` in the sample's `extra`, a share of the gold number, every number within it is right as well. 0.05 is
    ChartQA's relaxed accuracy (Masry et al., 2022), but for the sign "%", which does not count: the question names the unit.
    """
    if answer is None:
        return False
    if normalise_answer(answer) == normalise_answer(sample.answer):
        return True
    tolerance = sample.extra.get("tolerance")
    if (
        not isinstance(tolerance, int | float) or not 0 < tolerance < 1
    ):  # in other formats than `jsonl` it may mean anything
        return False
    number, gold = as_number(answer), as_number(sample.answer)
    return number is not None and gold is not None and is_near(number, gold, tolerance)


def is_near(number: Fraction, gold: Fraction, tolerance: float) -> bool:
    """Return whether a number deviates from the gold one by at most a share `tolerance` of it."""
    return abs(number - gold) <= Fraction(str(tolerance)) * abs(gold)


def as_number(text: str) -> Fraction | None:
    """Read a decimal number ("34.", "-1,200", "12%", wide digits), exactly; None: the text is no such number."""
    text = unicodedata.normalize("NFKC", text).strip(" *!\"'").removesuffix(".")
    match = _NUMBER.fullmatch(text)
    return Fraction(match[1].replace(",", "")) if match and match[1].strip("+-") else None
