"""Programs over numbers and their oracle, by hand-written mosaics and charts: answers, rationales right and wrong."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srcfast.data.rationale_format import ParsedResponse, parse_response
from srcfast.data.records import Sample
from srcfast.errors import InputError
from srcfast.world.judgement import CASES, Verification
from srcfast.world.number_oracle import is_true, parse_claim
from srcfast.world.numbers import Numbers, answer_text, check_program, number_text, true_rationale
from srcfast.world.verification import can_verify, verify_sample

DIGITS: dict[str, Any] = {"values": {"top left": 7, "top": 5, "center": 7, "bottom": 2}}
CHART: dict[str, Any] = {
    "values": {"A": 34, "B": 50, "C": 12.5},
    "categories": {"A": "Japan", "B": "Norway", "C": "Chile"},
    "axis": 50,
}

# By hand: a program over the mosaic or the chart, its answer, what is seen, what is concluded.
TRUE = [
    (DIGITS, {"op": "value", "of": ["top"]}, "5", "The digit at the top is 5.", ""),
    (
        DIGITS,
        {"op": "sum", "of": ["top", "bottom"]},
        "7",
        "The digit at the top is 5. The digit at the bottom is 2.",
        "5 plus 2 is 7.",
    ),
    (
        DIGITS,
        {"op": "sum"},
        "21",
        "The digit at the top left is 7. The digit at the top is 5. The digit at the center is 7. The digit at the bottom is 2.",
        "7 plus 5 is 12. 12 plus 7 is 19. 19 plus 2 is 21.",
    ),
    (
        DIGITS,
        {"op": "sum", "test": "even"},
        "2",
        "The digit at the top left is 7. The digit at the top is 5. The digit at the center is 7. The digit at the bottom is 2.",
        "",
    ),
    (
        DIGITS,
        {"op": "difference", "of": ["bottom", "center"]},
        "5",
        "The digit at the bottom is 2. The digit at the center is 7.",
        "7 minus 2 is 5.",
    ),
    (
        DIGITS,
        {"op": "range"},
        "5",
        "The digit at the top left is 7. The digit at the top is 5. The digit at the center is 7. The digit at the bottom is 2.",
        "The largest digit is 7. The smallest digit is 2. 7 minus 2 is 5.",
    ),
    (
        DIGITS,
        {"op": "extreme", "which": "largest"},
        "7",
        "The digit at the top left is 7. The digit at the top is 5. The digit at the center is 7. The digit at the bottom is 2.",
        "The largest digit is 7.",
    ),
    (
        DIGITS,
        {"op": "where", "which": "smallest"},
        "bottom",
        "The digit at the top left is 7. The digit at the top is 5. The digit at the center is 7. The digit at the bottom is 2.",
        "The smallest digit is at the bottom.",
    ),
    (
        DIGITS,
        {"op": "count", "test": "larger", "than": 5},
        "2",
        "The digit at the top left is 7. The digit at the top is 5. The digit at the center is 7. The digit at the bottom is 2.",
        "There are 2 digits larger than 5.",
    ),
    (
        DIGITS,
        {"op": "count", "test": "even"},
        "1",
        "The digit at the top left is 7. The digit at the top is 5. The digit at the center is 7. The digit at the bottom is 2.",
        "There is 1 even digit.",
    ),
    (
        DIGITS,
        {"op": "count"},
        "4",
        "The digit at the top left is 7. The digit at the top is 5. The digit at the center is 7. The digit at the bottom is 2.",
        "There are 4 digits.",
    ),
    (
        DIGITS,
        {"op": "larger", "of": ["top left", "center"]},
        "no",
        "The digit at the top left is 7. The digit at the center is 7.",
        "7 is not larger than 7.",
    ),
    (CHART, {"op": "value", "of": ["B"]}, "50", "B is 50.", "B stands for Norway."),
    (
        CHART,
        {"op": "difference", "of": ["C", "A"]},
        "21.5",
        "C is 12.5. A is 34.",
        "C stands for Chile. A stands for Japan. 34 minus 12.5 is 21.5.",
    ),
    (
        CHART,
        {"op": "where", "which": "largest"},
        "Norway",
        "A is 34. B is 50. C is 12.5.",
        "B is the highest. B stands for Norway.",
    ),
    (
        CHART,
        {"op": "where", "which": "smallest"},
        "Chile",
        "A is 34. B is 50. C is 12.5.",
        "C is the lowest. C stands for Chile.",
    ),
    (
        CHART,
        {"op": "average"},
        "32.2",
        "A is 34. B is 50. C is 12.5.",
        "34 plus 50 is 84. 84 plus 12.5 is 96.5. 96.5 divided by 3 is 32.2.",
    ),
    (
        CHART,
        {"op": "count", "test": "smaller", "than": 40},
        "2",
        "A is 34. B is 50. C is 12.5.",
        "There are 2 values smaller than 40.",
    ),
    (
        CHART,
        {"op": "larger", "of": ["A", "C"]},
        "yes",
        "A is 34. C is 12.5.",
        "A stands for Japan. C stands for Chile. 34 is larger than 12.5.",
    ),
]


def sample_of(numbers: dict[str, Any], program: Any, answer: str) -> Sample:
    tolerance = {} if numbers is DIGITS or program["op"] in ("where", "count", "larger") else {"tolerance": 0.05}
    return Sample("s", (), "What?", answer, extra={"numbers": numbers, "program": program, **tolerance})


def judged(sample: Sample, see: str, think: str, answer: str | None = None) -> Verification:
    parsed = parse_response(f"<see> {see} </see> <think> {think} </think> <answer> {answer or sample.answer} </answer>")
    judgement = verify_sample(sample, parsed)
    assert judgement is not None
    return judgement


@pytest.mark.parametrize(("numbers", "program", "answer", "see", "think"), TRUE)
def test_answers_and_true_rationales_are_those_written_by_hand(
    numbers: dict[str, Any], program: Any, answer: str, see: str, think: str
) -> None:
    truth = Numbers.from_json(numbers)
    assert answer_text(program, truth) == answer
    seen, concluded = true_rationale(program, truth)
    assert (" ".join(seen), " ".join(concluded)) == (see, think)
    sample = sample_of(numbers, program, answer)
    assert can_verify(sample)
    judgement = judged(sample, see, think)
    assert judgement.aligned and judgement.case == "both_right"
    assert judgement.perception_right and judgement.reasoning_right and judgement.leads_to_answer
    assert {verdict for _, _, verdict in judgement.claims} == {"true"}


@pytest.mark.parametrize(
    ("numbers", "program"),
    [
        (DIGITS, {"op": "where", "which": "largest"}),  # two are
        (DIGITS, {"op": "value", "of": ["left"]}),  # there is none
        (DIGITS, {"op": "difference", "of": ["top", "left"]}),
        (DIGITS, {"op": "difference", "of": ["top", "top"]}),
        (DIGITS, {"op": "difference"}),
        (DIGITS, {"op": "extreme", "which": "largest", "test": "larger", "than": 8}),
        (DIGITS, {"op": "average", "test": "equal", "than": 8}),
    ],
)
def test_a_question_that_presumes_something_false_has_no_answer(numbers: dict[str, Any], program: Any) -> None:
    assert answer_text(program, Numbers.from_json(numbers)) is None


FOUR = TRUE[2][3]
SUM, COUNT, LARGER = TRUE[1], TRUE[8], TRUE[11]
DIFFERENCE, WHERE, AVERAGE = TRUE[13], TRUE[14], TRUE[16]


@pytest.mark.parametrize(
    ("true", "see", "think"),
    [
        # False perception.
        (SUM, "The digit at the top is 6. The digit at the bottom is 2.", "6 plus 2 is 8."),
        (SUM, "The digit at the top is 2. The digit at the bottom is 5.", "2 plus 5 is 7."),
        (SUM, "The digit at the top is 5. The digit at the bottom is 2. The digit at the left is 3.", "5 plus 2 is 7."),
        (SUM, "A is 5. The digit at the top is 5. The digit at the bottom is 2.", "5 plus 2 is 7."),
        # Contradictions.
        (SUM, "The digit at the top is 5. The digit at the top is 4. The digit at the bottom is 2.", "5 plus 2 is 7."),
        (DIFFERENCE, "C is 12.5. C is 12.6. A is 34.", "34 minus 12.5 is 21.5."),
        (DIFFERENCE, "C is 12.6. C is 12.5. A is 34.", "34 minus 12.5 is 21.5."),
        # Something is missing.
        (SUM, "The digit at the top is 5.", "5 plus 2 is 7."),
        (SUM, "", "5 plus 2 is 7."),
        (SUM, "There are 4 digits.", ""),
        (COUNT, "The digit at the top left is 7. The digit at the center is 7.", "There are 2 digits larger than 5."),
        (WHERE, "A is 34. B is 50.", "B is the highest. B stands for Norway."),
        # Conclusions that do not follow.
        (SUM, SUM[3], "5 plus 2 is 8."),
        (SUM, SUM[3], "5 plus 5 is 10. 5 plus 2 is 7."),  # there is one 5
        (SUM, SUM[3], "5 minus 2 is 3."),  # true, and of another question
        (SUM, FOUR, "7 plus 2 is 9."),
        (SUM, SUM[3], "2 minus 5 is 3."),
        (SUM, SUM[3], "10 minus 3 is 7."),
        (COUNT, FOUR, "There are 3 digits larger than 5."),
        (COUNT, FOUR, "There are 2 digits larger than 6."),  # true, and of another question
        (LARGER, LARGER[3], "7 is larger than 7."),
        (LARGER, FOUR, "2 is not larger than 7."),
        (WHERE, WHERE[3], "A is the highest. A stands for Japan."),
        (WHERE, WHERE[3], "B is the lowest. B stands for Norway."),
        (WHERE, WHERE[3], "B is the highest. B stands for Chile."),
        (WHERE, WHERE[3], "B is the highest. D stands for Norway."),
        (AVERAGE, AVERAGE[3], "34 plus 50 is 84. 84 plus 12.5 is 96.5. 96.5 divided by 2 is 48.25."),
        (AVERAGE, AVERAGE[3], "34 plus 50 is 84. 84 plus 12.5 is 96.5. 96.5 divided by 3 is 32."),
        (AVERAGE, AVERAGE[3], "34 plus 50 is 84."),
        (AVERAGE, AVERAGE[3], "34 plus 50 is 84. 84 divided by 3 is 28."),
        # What is no claim.
        (SUM, "The digit at the top is 5. The digit at the bottom is 2. Nice digits.", "5 plus 2 is 7."),
        (SUM, SUM[3], "So it is 7."),
        (SUM, SUM[3], "5 plus 2 is seven."),
        (WHERE, "A is 34. B is 50. C is 12.5. B is high.", WHERE[4]),
    ],
)
def test_a_wrong_rationale_is_wrong_with_the_right_answer(true: Any, see: str, think: str) -> None:
    numbers, program, answer, _, _ = true
    judgement = judged(sample_of(numbers, program, answer), see, think)
    assert judgement.answer_right and not judgement.rationale_right and not judgement.aligned
    assert judgement.case == "right_answer_wrong_rationale"


@pytest.mark.parametrize(
    ("true", "see", "think", "answer"),
    [
        (SUM, SUM[3], "", None),  # without conclusions, what is seen suffices
        (SUM, "The digit at the bottom is 2. The digit at the top is 5.", "2 plus 5 is 7.", None),
        (SUM, FOUR, "5 plus 2 is 7.", None),
        (SUM, FOUR, "7 plus 7 is 14. 5 plus 2 is 7.", None),
        (SUM, SUM[3], "5 is larger than 2. 2 is smaller than 5. 5 plus 2 is 7.", None),
        (TRUE[2], FOUR, "7 plus 5 plus 7 plus 2 is 21.", None),
        (COUNT, FOUR, "There is 1 even digit. There are 2 digits larger than 5.", None),
        (DIFFERENCE, "C is 12.5. A is 34.", "34 minus 12.5 is 21.5.", None),
        (
            DIFFERENCE,
            "C is 12. A is 34.",
            "34 minus 12 is 22.",
            "22",
        ),  # read within the tolerance, the answer within 5 %
        (WHERE, "A is 33. B is 49. C is 13.", "B is the highest.", None),
        (AVERAGE, AVERAGE[3], "34 plus 50 is 84. 84 plus 12.5 is 96.5. 96.5 divided by 3 is 32.17.", "32.17"),
    ],
)
def test_a_right_rationale_may_take_another_way(true: Any, see: str, think: str, answer: str | None) -> None:
    numbers, program, gold, _, _ = true
    assert judged(sample_of(numbers, program, gold), see, think, answer).aligned


@pytest.mark.parametrize(
    ("value", "is_seen"),
    [
        ("34", True), ("35.7", True), ("32.3", True), ("35.71", False), ("32.29", False),  # 5 % of 34
        ("0", False), ("340", False),
    ],
)  # fmt: skip
def test_a_bar_is_read_within_five_percent(value: str, is_seen: bool) -> None:
    assert is_true(f"A is {value}.", Numbers.from_json(CHART)) is is_seen


@pytest.mark.parametrize(("value", "is_seen"), [("3", True), ("4", True), ("2", True), ("4.1", False), ("1.9", False)])
def test_a_low_bar_is_read_within_two_percent_of_the_axis(value: str, is_seen: bool) -> None:
    low = CHART | {"values": {"A": 3}}
    assert is_true(f"A is {value}.", Numbers.from_json(low)) is is_seen


def test_what_follows_from_a_misread_bar_must_be_true_of_the_chart() -> None:
    near = CHART | {"values": {"A": 49, "B": 50, "C": 12.5}}
    sample = sample_of(near, {"op": "where", "which": "largest"}, "Norway")
    right = judged(sample, "A is 49. B is 50. C is 12.5.", "B is the highest. B stands for Norway.")
    misread = judged(sample, "A is 50.5. B is 50. C is 12.5.", "A is the highest. B stands for Norway.")
    assert right.aligned and not misread.rationale_right
    assert [verdict for _, _, verdict in misread.claims] == ["true", "true", "true", "false", "true"]
    assert misread.perception_right and misread.reasoning_right and not misread.leads_to_answer


def test_an_answer_off_the_claims_does_not_follow_from_them() -> None:
    numbers, program, answer, see, think = DIFFERENCE
    judgement = judged(sample_of(numbers, program, answer), see, think, "22")  # within 5 %, and not what was computed
    assert (
        judgement.answer_right and judgement.rationale_right and not judgement.leads_to_answer and not judgement.aligned
    )
    judgement = judged(sample_of(numbers, program, answer), see, think, "20")
    assert judgement.case == "right_rationale_wrong_answer" and not judgement.aligned
    judgement = judged(sample_of(numbers, program, answer), "C is 3. A is 34.", "34 minus 3 is 31.", "31")
    assert judgement.case == "both_wrong" and judgement.leads_to_answer and judgement.reasoning_right
    assert not judgement.perception_right


@pytest.mark.parametrize(
    ("quotient", "answer", "leads"), [("2.3", "2.3", True), ("2.2", "2.2", True), ("2.3", "2.2", False)]
)
def test_an_average_is_rounded_as_its_quotient_is(quotient: str, answer: str, leads: bool) -> None:
    numbers = {"values": {"top": 2, "left": 2, "right": 2, "bottom": 3}}
    sample = Sample("s", (), "?", "2.3", extra={"numbers": numbers, "program": {"op": "average"}, "tolerance": 0.05})
    think = f"2 plus 2 plus 2 plus 3 is 9. 9 divided by 4 is {quotient}."
    judgement = judged(sample, " ".join(Numbers.from_json(numbers).facts()), think, answer)
    assert judgement.rationale_right and judgement.leads_to_answer is leads and judgement.aligned is leads
    assert judged(sample, " ".join(Numbers.from_json(numbers).facts()), "", answer).leads_to_answer


def test_a_bare_answer_has_no_right_rationale() -> None:
    numbers, program, answer, _, _ = SUM
    judgement = verify_sample(sample_of(numbers, program, answer), parse_response("7"))
    assert judgement is not None and judgement.case == "right_answer_wrong_rationale"
    assert not (judgement.perception_right or judgement.reasoning_right or judgement.leads_to_answer)
    nothing = verify_sample(sample_of(numbers, program, answer), ParsedResponse((), (), None))
    assert nothing is not None and nothing.case == "both_wrong"


@pytest.mark.parametrize(
    "sentence",
    [
        "", ".", "The digit at the top is five.", "The digit at the attic is 5.", "The digit is 5.", "F is 34.", "A is -3.",
        "A is 1e3.", "A is 3.4.5.", "A is 1234567.", "5 times 2 is 10.", "5 plus 2.", "There are many digits.",
        "There are 2 red circles.", "There are 1234 digits.", "A stands for .", "The largest digit is at the attic.",
        "A is 34. B is 50.", "A is ３.", "5 plus " * 30 + "5 is 5.", "A stands for " + "x" * 61 + ".",
    ],
)  # fmt: skip
def test_other_sentences_are_no_claims(sentence: str) -> None:
    assert parse_claim(sentence) is None


PIECES = st.sampled_from(
    [
        "the digit at the top is 5",
        "a is 34",
        "b stands for norway",
        "5 plus 2 is 7",
        "0 divided by 0 is 0",
        "7 minus 9 is 2",
    ]
    + [
        "there are 2 digits larger than 5",
        "c is the highest",
        "999999 plus 0.0001 is 1",
        ".",
        " ",
        "\n",
        "٣",
        "\ud800",
        "$",
    ]
)


@given(
    st.lists(PIECES | st.text(max_size=6), max_size=8), st.lists(PIECES, max_size=8), st.none() | st.text(max_size=9)
)
@settings(max_examples=200)
def test_no_text_makes_the_oracle_raise(see: list[str], think: list[str], answer: str | None) -> None:
    for numbers, program, gold, _, _ in TRUE:
        judgement = verify_sample(sample_of(numbers, program, gold), ParsedResponse(tuple(see), tuple(think), answer))
        assert judgement is not None and judgement.case in CASES and len(judgement.claims) == len(see) + len(think)


@pytest.mark.parametrize(
    "numbers",
    [
        None, [], {}, {"values": {}}, {"values": {"attic": 3}}, {"values": {"top": "3"}}, {"values": {"top": True}},
        {"values": {"top": float("nan")}}, {"values": {"top": float("inf")}}, {"values": {"top": -1}}, {"values": [3]},
        {"values": {"A": 3}}, {"values": {"A": 3}, "categories": {}, "axis": 10},
        {"values": {"A": 3}, "categories": {"A": 1}, "axis": 10}, {"values": {"A": 3}, "categories": {"A": "x"}, "axis": "10"},
        {"values": {"F": 3}, "categories": {"F": "x"}, "axis": 10}, {"values": {"A": 3}, "categories": [1], "axis": 10},
    ],
)  # fmt: skip
def test_malformed_numbers_are_an_error(numbers: Any) -> None:
    with pytest.raises(InputError, match="numbers"):
        Numbers.from_json(numbers)


@pytest.mark.parametrize(
    "program",
    [
        "sum", [], {}, {"op": "median"}, {"op": ["sum"]}, {"op": "sum", "of": "top"}, {"op": "sum", "of": [1]},
        {"op": "where"}, {"op": "extreme", "which": "widest"}, {"op": "count", "test": "prime"},
        {"op": "count", "test": "larger", "than": "5"}, {"op": "count", "test": "larger", "than": float("nan")},
    ],
)  # fmt: skip
def test_malformed_programs_are_an_error(program: Any) -> None:
    with pytest.raises(InputError, match="program"):
        check_program(program)
    with pytest.raises(InputError, match="program"):
        verify_sample(Sample("s", (), "What?", "5", extra={"numbers": DIGITS, "program": program}), parse_response("5"))


def test_numbers_are_written_and_read_back() -> None:
    for numbers in (DIGITS, CHART):
        assert Numbers.from_json(json.loads(json.dumps(numbers))).to_json() == numbers
    assert Numbers.from_json(CHART).facts() == ("A is 34.", "B is 50.", "C is 12.5.")
    assert Numbers.from_json(DIGITS).facts()[0] == "The digit at the top left is 7."


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("0", "0"),
        ("12", "12"),
        ("3.4", "3.4"),
        ("32.1666", "32.2"),
        ("0.04", "0"),
        ("0.05", "0.1"),
        ("29.25", "29.3"),
        ("29.24", "29.2"),
        ("9.96", "10"),
        ("120", "120"),
    ],
)
def test_numbers_are_rounded_to_tenths(value: str, text: str) -> None:
    assert number_text(Fraction(value)) == text


def test_each_sum_of_random_digits_is_what_python_adds_up() -> None:
    for _ in range(200):
        digits = {place: random.randrange(10) for place in ("top", "left", "right", "bottom")}
        truth = Numbers.from_json({"values": digits})
        chosen = random.sample(list(digits), random.randint(2, 4))
        than = random.randrange(10)
        expected = {
            "sum": sum(digits[place] for place in chosen),
            "count": sum(digits[place] > than for place in digits),
            "odd": sum(value for value in digits.values() if value % 2),
            "range": max(digits.values()) - min(digits.values()),
        }
        programs: dict[str, Any] = {
            "sum": {"op": "sum", "of": chosen},
            "count": {"op": "count", "test": "larger", "than": than},
            "odd": {"op": "sum", "test": "odd"},
            "range": {"op": "range"},
        }
        assert {name: answer_text(program, truth) for name, program in programs.items()} == {
            name: str(value) for name, value in expected.items()
        }
