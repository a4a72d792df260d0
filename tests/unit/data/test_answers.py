"""Right answers: equal ones and, with a tolerance, numbers exactly up to it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from srcfast.data.answers import as_number, is_near, is_right
from srcfast.data.records import Sample


def right(gold: str, answer: str | None, tolerance: Any = 0.05) -> bool:
    return is_right(Sample("s", (), "What?", gold, extra={"tolerance": tolerance}), answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("100", "105"),  # exactly 5 %
        ("100", "95"),
        ("1", "0.95"),  # 0.05000000000000004 away in floats
        ("0.7", "0.735"),  # 0.03500000000000003 away in floats
        ("-40", "-42"),
        ("-40", "-38"),
        ("1,200", "1260"),
        ("1200", "1,140"),
        ("12%", "12.6"),
        ("12", "12.6 %"),
        ("12", "+12.5."),
        ("12", "**12.5**"),
        ("0", "0"),
        ("0", "-0.0"),
        ("0", "zero"),
        (".5", "0.52"),
        ("12", "twelve"),
        ("Norway", "norway."),
    ],
)
def test_a_number_within_the_tolerance_is_right(gold: str, answer: str) -> None:
    assert right(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("100", "105.0001"),
        ("100", "94.9999"),
        ("-40", "40"),
        ("-40", "-42.1"),
        ("0", "0.0001"),  # a share of nothing is nothing
        ("100", "1,00"),
        ("1200", "12,00"),
        ("100", "about 100"),
        ("100", "1e2"),
        ("100", "١٠٠"),
        ("100", ""),
        ("100", "%"),
        ("100", "."),
        ("100", "-"),
        ("100", "nan"),
        ("100", "100/1"),
        ("100", "1" * 5000),
        ("Norway", "Chile"),
        ("yes", "100"),
        ("100", None),
    ],
)
def test_any_other_answer_is_wrong(gold: str, answer: str | None) -> None:
    assert not right(gold, answer)


@pytest.mark.parametrize("tolerance", [None, 0, 0.0, "0.05", True, -0.05, 1.0, [0.05], float("nan")])
def test_without_a_tolerance_numbers_have_to_be_equal(tolerance: Any) -> None:
    assert not right("100", "101", tolerance) and right("100", "100.", tolerance)


def test_a_wider_tolerance_takes_more() -> None:
    assert right("100", "125", 0.25) and not right("100", "126", 0.25) and not right("100", "125", 0.2)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234,567.5", Fraction(2469135, 2)),
        ("-3", Fraction(-3)),
        (" 0.1 ", Fraction(1, 10)),
        ("34.", Fraction(34)),
        ("1,23", None),
        ("3 4", None),
        ("--3", None),
    ],
)
def test_numbers_are_read_exactly(text: str, number: Fraction | None) -> None:
    assert as_number(text) == number


def test_nearness_is_a_share_of_the_gold_number_not_of_the_other() -> None:
    assert is_near(Fraction(105), Fraction(100), 0.05) and not is_near(Fraction(100), Fraction(106), 0.05)
    assert not is_near(Fraction(95), Fraction(100), 0.04)
