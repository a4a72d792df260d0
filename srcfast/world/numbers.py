"""Programs over named numbers, which mosaics of digits and charts share: questions as plain JSON, their answers, true rationales.

A program selects numbers by name (`of`; all of them if it is missing), then those that pass a test (`test`, `than`), and then
computes `op` of them: {"op": "count", "test": "larger", "than": 5}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from srcfast.errors import InputError
from srcfast.world.scenes import PLACES

Program = dict[str, Any]
Values = Mapping[str, Fraction]

LETTERS = ("A", "B", "C", "D", "E")
YES_NO = {True: "yes", False: "no"}
TESTS: dict[str, Callable[[Fraction, Fraction], bool]] = {
    "larger": lambda value, than: value > than,
    "smaller": lambda value, than: value < than,
    "equal": lambda value, than: value == than,
    "even": lambda value, _: value % 2 == 0,
    "odd": lambda value, _: value % 2 == 1,
}


@dataclass(frozen=True)
class Numbers:
    """What an image shows: numbers by name in reading order, a digit's place or a bar's letter."""

    values: dict[str, Fraction]
    categories: dict[str, str] = field(default_factory=dict)  # of a chart: what each letter stands for
    axis: Fraction | None = None  # of a chart: the largest number on its axis

    def to_json(self) -> dict[str, Any]:
        """Convert to `{values, categories?, axis?}`; whole numbers as integers, others as floats."""
        numbers: dict[str, Any] = {"values": {name: _as_json(value) for name, value in self.values.items()}}
        if self.axis is not None:
            numbers |= {"categories": dict(self.categories), "axis": _as_json(self.axis)}
        return numbers

    @classmethod
    def from_json(cls, numbers: Any) -> Numbers:
        """Read what `to_json` wrote. Raises InputError for any other structure."""
        try:
            values = {name: _exactly(value) for name, value in numbers["values"].items()}
            categories, axis = dict(numbers.get("categories", {})), numbers.get("axis")
            known = PLACES if axis is None else [letter for letter in LETTERS if type(categories.get(letter)) is str]
            if not values or not set(values) <= set(known) or min(values.values()) < 0:
                raise ValueError
            return cls(values, categories, None if axis is None else _exactly(axis))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                field="numbers",
                expected="{'values': {place: number}}, or {'values': {letter: number}, 'categories': {letter: name}, 'axis'}",
                found=numbers,
            ) from error

    def seen(self, name: str) -> str:
        """Write the claim that a name has its number."""
        number = number_text(self.values[name])
        return f"The digit at the {name} is {number}." if self.axis is None else f"{name} is {number}."

    def facts(self) -> tuple[str, ...]:
        """Write everything that the image shows."""
        return tuple(self.seen(name) for name in self.values)


def _exactly(value: Any) -> Fraction:
    """Return a finite JSON number as the decimal that it is written as. Raises ValueError for any other value."""
    if type(value) not in (int, float):
        raise ValueError
    return Fraction(str(value))


def _as_json(value: Fraction) -> int | float:
    return value.numerator if value.denominator == 1 else float(value)


def number_text(value: Fraction) -> str:
    """Write a number of at least 0, rounded to tenths, halves up: "12", "12.5"."""
    whole, tenths = divmod(int(value * 10 + Fraction(1, 2)), 10)
    return f"{whole}.{tenths}" if tenths else str(whole)


# --- Answers ------------------------------------------------------------------------------------------------


def _where(program: Program, values: Values) -> str | None:
    wanted = (max if program["which"] == "largest" else min)(values.values())
    names = [name for name, value in values.items() if value == wanted]
    return names[0] if len(names) == 1 else None


def _of_two(compute: Callable[[Fraction, Fraction], Fraction | str]) -> Operation:
    def operation(program: Program, values: Values) -> Fraction | str | None:
        return compute(*values.values()) if len(values) == 2 else None

    return operation


Operation = Callable[[Program, Values], Fraction | str | None]
_OPERATIONS: dict[str, Operation] = {
    "value": lambda program, values: next(iter(values.values())) if len(values) == 1 else None,
    "sum": lambda program, values: sum(values.values(), Fraction(0)),
    "average": lambda program, values: sum(values.values(), Fraction(0)) / len(values),
    "difference": _of_two(lambda a, b: abs(a - b)),
    "range": lambda program, values: max(values.values()) - min(values.values()),
    "extreme": lambda program, values: (max if program["which"] == "largest" else min)(values.values()),
    "where": _where,
    "count": lambda program, values: Fraction(len(values)),
    "larger": _of_two(lambda a, b: YES_NO[a > b]),
}
ARITHMETIC = frozenset(["sum", "average", "difference", "range"])


def check_program(program: Any) -> None:
    """Raise InputError for what is no program over numbers."""
    try:
        op, of, test = program["op"], program.get("of", []), program.get("test", "even")
        _exactly(program.get("than", 0))
        known = op in _OPERATIONS and test in TESTS and type(of) is list and all(type(name) is str for name in of)
        if not known or (op in ("extreme", "where") and program["which"] not in ("largest", "smallest")):
            raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(field="program", expected="a known operation over numbers", found=program) from error


def needed(program: Program, values: Values) -> list[str]:
    """Return the names of the numbers that decide the answer, in the question's order or in reading order."""
    return program.get("of") or list(values)


def selected(program: Program, values: Values) -> dict[str, Fraction] | None:
    """Return the numbers that the program computes with; None if one of them is missing."""
    names = needed(program, values)
    if not names or not values.keys() >= set(names):
        return None
    chosen = {name: values[name] for name in names}
    if "test" not in program:
        return chosen
    passes, than = TESTS[program["test"]], _exactly(program.get("than", 0))
    return {name: value for name, value in chosen.items() if passes(value, than)}


def evaluate(program: Program, values: Values) -> Fraction | str | None:
    """Return the answer of a checked program if these numbers are all there are: a number, a name, "yes" or "no".

    None: they don't determine it, because one is missing or because two are the largest.
    """
    chosen = selected(program, values)
    if chosen is None or (not chosen and program["op"] not in ("count", "sum")):
        return None
    return _OPERATIONS[program["op"]](program, chosen)


def answer_text(program: Program, numbers: Numbers) -> str | None:
    """Write the answer of a program, the largest or smallest bar by what it stands for; None: it has none."""
    result = evaluate(program, numbers.values)
    return number_text(result) if isinstance(result, Fraction) else numbers.categories.get(result or "", result)


# --- True rationales ----------------------------------------------------------------------------------------


def true_rationale(program: Program, numbers: Numbers) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write the sentences of what is seen and of what is concluded, for a program that has an answer."""
    names = needed(program, numbers.values)
    chosen = selected(program, numbers.values)
    assert chosen is not None
    named = [stands_for(name, numbers) for name in program.get("of", []) if name in numbers.categories]
    conclusions = _conclusions(program, numbers, list(chosen.values()))
    return tuple(numbers.seen(name) for name in names), (*named, *conclusions)


def stands_for(letter: str, numbers: Numbers) -> str:
    """Write what a letter stands for."""
    return f"{letter} stands for {numbers.categories[letter]}."


def _conclusions(program: Program, numbers: Numbers, chosen: Sequence[Fraction]) -> list[str]:
    op, result = program["op"], evaluate(program, numbers.values)
    text = number_text(result) if isinstance(result, Fraction) else str(result)
    if op == "sum":
        return _steps(chosen)
    if op == "average":
        return [*_steps(chosen), f"{number_text(sum(chosen, Fraction(0)))} divided by {len(chosen)} is {text}."]
    if op in ("difference", "range"):
        high, low = number_text(max(chosen)), number_text(min(chosen))
        extremes = [f"The largest digit is {high}.", f"The smallest digit is {low}."] if op == "range" else []
        return [*extremes, f"{high} minus {low} is {text}."]
    if op == "extreme":
        return [f"The {program['which']} digit is {text}."]
    if op == "where" and numbers.axis is None:
        return [f"The {program['which']} digit is at the {text}."]
    if op == "where":
        highest = "highest" if program["which"] == "largest" else "lowest"
        return [f"{text} is the {highest}.", stands_for(text, numbers)]
    if op == "count":
        return [_count_sentence(program, len(chosen), "digit" if numbers.axis is None else "value")]
    if op == "larger":
        a, b = map(number_text, chosen)
        return [f"{a} is {'' if text == 'yes' else 'not '}larger than {b}."]
    return []


def _steps(values: Sequence[Fraction]) -> list[str]:
    """Add numbers up, one sentence a step; none for a single number."""
    sentences = []
    total = values[0]
    for value in values[1:]:
        sentences.append(f"{number_text(total)} plus {number_text(value)} is {number_text(total + value)}.")
        total += value
    return sentences


def _count_sentence(program: Program, count: int, noun: str) -> str:
    test, than = program.get("test"), program.get("than")
    noun, verb = (noun, "is") if count == 1 else (noun + "s", "are")
    if test in ("even", "odd"):
        return f"There {verb} {count} {test} {noun}."
    if test is None:
        return f"There {verb} {count} {noun}."
    words = {"larger": "larger than", "smaller": "smaller than", "equal": "equal to"}
    return f"There {verb} {count} {noun} {words[test]} {than}."
