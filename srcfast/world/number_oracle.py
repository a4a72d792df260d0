"""The oracle of mosaics of digits and of charts: parses a rationale into claims about numbers, and checks them.

Perception claims ("The digit at the top is 7.", "A is 34.") are checked against the truth: digits exactly, a chart's values
within 5 % or, where that is more, 2 % of its axis, which is about two pixels. Reasoning must follow from the *claimed* numbers,
and what it says of the image (which is the highest, how many are larger) must be true of the image as well. A rationale is right
if all of its sentences are claims, none is false, every number that the question needs is claimed, and they give the gold answer.
Where it draws conclusions of the question's operation, one of them must be the question's: true arithmetic about other
numbers does not lead to an answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from srcfast.data.answers import as_number, is_right
from srcfast.data.rationale_format import ParsedResponse, normalise_answer
from srcfast.data.records import Sample
from srcfast.world.judgement import Verdict, Verification, claim_text, judge, sentences_of
from srcfast.world.numbers import (
    ARITHMETIC,
    LETTERS,
    TESTS,
    Numbers,
    Program,
    Values,
    answer_text,
    check_program,
    evaluate,
    needed,
    selected,
)
from srcfast.world.scenes import PLACES

VALUE_TOLERANCE, AXIS_TOLERANCE = Fraction(5, 100), Fraction(2, 100)  # of a chart's value, of its axis
ROUNDING = Fraction(1, 20)  # quotients and answers may be rounded to tenths


@dataclass(frozen=True)
class Claim:
    """One parsed sentence, of one kind."""

    seen: tuple[str, Fraction] | None = None  # a name and its number
    stands_for: tuple[str, str] | None = None  # a letter and its category, in lower case
    check: tuple[Program, Fraction | str] | None = None  # a program with the answer that the claim states
    arithmetic: tuple[str, tuple[Fraction, ...], Fraction] | None = None  # plus, minus or divided by; operands, result
    comparison: tuple[Fraction, Fraction, str, bool] | None = None  # a is larger (smaller) than b, or (False) is not


# --- Parsing ------------------------------------------------------------------------------------------------

_N = r"([0-9]{1,6}(?:\.[0-9]{1,4})?)"
_PLACE = "(" + "|".join(sorted(PLACES, key=len, reverse=True)) + ")"
_LETTER = "([" + "".join(LETTERS).lower() + "])"
_DIGIT = re.compile(rf"the digit at the {_PLACE} is {_N}")
_BAR = re.compile(rf"{_LETTER} is {_N}")
_STANDS_FOR = re.compile(rf"{_LETTER} stands for (.{{1,60}})")
_PLUS = re.compile(rf"{_N}((?: plus {_N}){{1,8}}) is {_N}")
_OTHER_ARITHMETIC = re.compile(rf"{_N} (minus|divided by) {_N} is {_N}")
_LARGER = re.compile(rf"{_N} is (not )?(larger|smaller) than {_N}")
_EXTREME = re.compile(rf"the (largest|smallest) digit is {_N}")
_WHERE = re.compile(rf"the (largest|smallest) digit is at the {_PLACE}")
_HIGHEST = re.compile(rf"{_LETTER} is the (highest|lowest)")
_COUNT = re.compile(r"there (?:is|are) ([0-9]{1,3}) (?:(even|odd) )?(?:digit|value)s?")
_COUNT_THAN = re.compile(rf"there (?:is|are) ([0-9]{{1,3}}) (?:digit|value)s? (larger|smaller|equal) (?:than|to) {_N}")


@lru_cache(maxsize=65536)
def parse_claim(sentence: str) -> Claim | None:
    """Parse one sentence of the grammar. Returns None for any other text, and never raises."""
    text = claim_text(sentence)
    if text is None:
        return None
    if match := _DIGIT.fullmatch(text):
        return Claim(seen=(match[1], Fraction(match[2])))
    if match := _BAR.fullmatch(text):
        return Claim(seen=(match[1].upper(), Fraction(match[2])))
    if match := _STANDS_FOR.fullmatch(text):
        return Claim(stands_for=(match[1].upper(), match[2]))
    if match := _PLUS.fullmatch(text):
        operands = map(Fraction, re.findall(_N, match[1] + match[2]))
        return Claim(arithmetic=("plus", tuple(operands), Fraction(match[4])))
    if match := _OTHER_ARITHMETIC.fullmatch(text):
        return Claim(arithmetic=(match[2], (Fraction(match[1]), Fraction(match[3])), Fraction(match[4])))
    if match := _LARGER.fullmatch(text):
        return Claim(comparison=(Fraction(match[1]), Fraction(match[4]), match[3], not match[2]))
    return _parse_check(text)


def _parse_check(text: str) -> Claim | None:
    if match := _EXTREME.fullmatch(text):
        return Claim(check=({"op": "extreme", "which": match[1]}, Fraction(match[2])))
    if match := _WHERE.fullmatch(text):
        return Claim(check=({"op": "where", "which": match[1]}, match[2]))
    if match := _HIGHEST.fullmatch(text):
        which = "largest" if match[2] == "highest" else "smallest"
        return Claim(check=({"op": "where", "which": which}, match[1].upper()))
    if match := _COUNT.fullmatch(text):
        return Claim(check=({"op": "count"} | ({"test": match[2]} if match[2] else {}), Fraction(match[1])))
    if match := _COUNT_THAN.fullmatch(text):
        than = Fraction(match[3])
        program = {"op": "count", "test": match[2], "than": than.numerator if than.denominator == 1 else float(than)}
        return Claim(check=(program, Fraction(match[1])))
    return None


# --- Verification -------------------------------------------------------------------------------------------


def verify(sample: Sample, response: ParsedResponse) -> Verification:
    """Verify one response to a question whose sample has `numbers` and `program` in its `extra`.

    A claim may be in either list of the response; sentences that are none make its rationale wrong.

    Raises:
        InputError: the program or the numbers are malformed. No response text raises.
    """
    truth, program = Numbers.from_json(sample.extra["numbers"]), sample.extra["program"]
    check_program(program)
    parsed = [parse_claim(sentence) for sentence in sentences_of(response)]
    claims = [claim for claim in parsed if claim is not None]
    seen = [claim.seen for claim in claims if claim.seen is not None]
    claimed = dict(seen)
    available = Counter(claimed.values())

    def verdict(claim: Claim | None) -> Verdict:
        if claim is None:
            return Verdict()
        if claim.seen is not None:
            return Verdict("perception", "true" if _is_seen(claim.seen, truth) else "false")
        follows = _follows(claim, claimed, available, truth)
        return Verdict("reasoning", "true" if follows and _holds(claim, truth) else "false", follows)

    is_consistent = len(set(seen)) == len(claimed)
    derived = answer_text(program, Numbers(claimed, truth.categories, truth.axis)) if is_consistent else None
    exact = evaluate(program, claimed) if is_consistent else None

    def leads_right() -> bool:
        return (
            derived is not None
            and claimed.keys() >= set(needed(program, truth.values))
            and _reaches(program, exact, claims, claimed)
            and is_right(sample, derived)
        )

    quotients = [claim.arithmetic[2] for claim in claims if claim.arithmetic and claim.arithmetic[0] == "divided by"]
    leads_to_answer = (
        response.answer is not None
        and derived is not None
        and _is_answer(response.answer, exact, derived, quotients if program["op"] == "average" else ())
    )
    verdicts = [verdict(claim) for claim in parsed]
    return judge(response, verdicts, leads_right, is_right(sample, response.answer), leads_to_answer)


def is_true(sentence: str, truth: Numbers) -> bool | None:
    """Return whether a sentence is true of an image; None if it doesn't parse, or is about claimed numbers alone."""
    claim = parse_claim(sentence)
    if claim is None or claim.arithmetic is not None or claim.comparison is not None:
        return None
    return _is_seen(claim.seen, truth) if claim.seen is not None else _holds(claim, truth)


def _is_seen(seen: tuple[str, Fraction], truth: Numbers) -> bool:
    """Return whether a name has the claimed number, in a chart within the tolerance of reading."""
    name, value = seen
    if name not in truth.values:
        return False
    true_value = truth.values[name]
    allowed = Fraction(0) if truth.axis is None else max(VALUE_TOLERANCE * true_value, AXIS_TOLERANCE * truth.axis)
    return abs(value - true_value) <= allowed


def _follows(claim: Claim, claimed: Values, available: Counter[Fraction], truth: Numbers) -> bool:
    """Return whether a reasoning claim follows from the claimed numbers, if these are all there are.

    `available` has the numbers that arithmetic may use, each as often as it is claimed; a result is added to it.
    """
    if claim.arithmetic is not None:
        op, operands, result = claim.arithmetic
        dividing = op == "divided by"
        used = Counter(operands[:1] if dividing else operands)
        if any(available[value] < times for value, times in used.items()):
            return False
        if dividing:
            follows = operands[1] == len(claimed) and abs(operands[0] / operands[1] - result) <= ROUNDING
        else:
            follows = result == (sum(operands, Fraction(0)) if op == "plus" else operands[0] - operands[1])
        if follows:
            available[result] += 1
        return follows
    if claim.comparison is not None:
        a, b, relation, stated = claim.comparison
        if not {a, b} <= set(claimed.values()):
            return False
        return TESTS[relation](a, b) == stated
    if claim.check is not None:
        program, stated_answer = claim.check
        return evaluate(program, claimed) == stated_answer
    return _holds(claim, truth)  # what a letter stands for, which the question says


def _holds(claim: Claim, truth: Numbers) -> bool:
    """Return whether a reasoning claim is true of the image; one about claimed numbers alone is."""
    if claim.stands_for is not None:
        letter, category = claim.stands_for
        return truth.categories.get(letter, "").lower() == category
    return claim.check is None or evaluate(claim.check[0], truth.values) == claim.check[1]


def _reaches(program: Program, exact: Fraction | str | None, claims: Sequence[Claim], claimed: Values) -> bool:
    """Return whether one of the conclusions of the program's operation is the program's, if there are any."""
    if program["op"] == "larger":
        compared = [set(claim.comparison[:2]) for claim in claims if claim.comparison is not None]
        return not compared or {claimed[name] for name in program["of"]} in compared
    arithmetic = [claim.arithmetic for claim in claims if claim.arithmetic is not None]
    if program["op"] == "average":
        total = sum((selected(program, claimed) or {}).values(), Fraction(0))
        return not arithmetic or any(op == "divided by" and operands[0] == total for op, operands, _ in arithmetic)
    if program["op"] in ARITHMETIC:
        return not arithmetic or any(result == exact for _, _, result in arithmetic)
    stated = [claim.check[0] for claim in claims if claim.check is not None and claim.check[0]["op"] == program["op"]]
    return not stated or program in stated


def _is_answer(answer: str, exact: Fraction | str | None, derived: str, quotients: Sequence[Fraction]) -> bool:
    """Return whether a stated answer is the one that the claims give: a number as a quotient was rounded, else to tenths."""
    number = as_number(answer)
    if quotients:
        return number in quotients
    if normalise_answer(answer) == normalise_answer(derived):
        return True
    return number is not None and isinstance(exact, Fraction) and abs(number - exact) <= ROUNDING
