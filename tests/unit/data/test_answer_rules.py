"""Which answers are right by each rule, and the figures that benchmarks report, counted by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest

from srcfast.data.answer_rules import RuleScores, edit_distance, is_right_by, rule_of, similarity, yes_or_no
from srcfast.data.answers import chosen_option, is_right
from srcfast.data.records import Sample

OPTIONS = {"A": "red car", "B": "blue", "C": "A", "D": "a blue car"}


def sample(answer: str, id: str = "s", **extra: Any) -> Sample:
    return Sample(id, (), "What?", answer, extra=extra)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("B:", "B"),
        ("**B**", "B"),
        ("B. blue", "B"),
        ("(B) blue", "B"),
        ("B) anything else", "B"),
        ("B blue", "B"),
        ("blue", "B"),
        ("Blue.", "B"),
        ("the blue", "B"),
        ("A", "A"),
        ("A red car", "A"),
        ("red car", "A"),
        ("A blue car", "D"),  # not option A
        ("A green car", None),
        ("E", None),
        ("b", None),  # a letter is a capital
        ("B or C", None),
        ("green", None),
        ("", None),
    ],
)
def test_the_option_that_an_answer_names(answer: str, letter: str | None) -> None:
    assert chosen_option(OPTIONS, answer) == letter


def test_a_text_of_two_options_names_none() -> None:
    assert chosen_option({"A": "red", "B": "Red."}, "red") is None


def test_right_options_by_letter_and_text() -> None:
    for gold in ("B", "blue"):
        asked = sample(gold, options=OPTIONS)
        assert is_right(asked, "B. blue") and is_right(asked, "blue") and is_right_by("choice", asked, "(B)")
        assert not is_right(asked, "A") and not is_right(asked, None) and not is_right(asked, "green")
    assert is_right(sample("green", options=OPTIONS), "green") and not is_right(sample("green", options=OPTIONS), "red")
    assert not is_right(sample("B", options=["red", "blue"]), "blue")  # no lettered options


def test_any_of_several_gold_answers_is_right() -> None:
    asked = sample("12 May", answers=["May 12", 7, "12.5."])
    assert all(is_right(asked, answer) for answer in ("12 May", "may 12", "12.5")) and not is_right(asked, "7")
    assert not is_right(sample("12 May", answers="May 12"), "May 12")


def test_relaxed_numbers_of_samples_without_a_tolerance() -> None:
    assert is_right_by("relaxed", sample("100"), "105") and not is_right_by("relaxed", sample("100"), "105.1")
    assert not is_right_by("exact", sample("100"), "105") and not is_right_by("relaxed", sample("red"), "blue")
    assert not is_right_by("relaxed", sample("100", tolerance=0.01), "105")  # the sample's own


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "yes"),
        ("No.", "no"),
        ("yes, there is no doubt", None),
        ("Yes, it is.", "yes"),
        ("nothing", None),
        ("eyes", None),
        ("I do not know", None),
        ("", None),
        ("NO!", "no"),
    ],
)
def test_yes_or_no(answer: str, said: str | None) -> None:
    assert yes_or_no(answer) == said
    assert is_right_by("yes_no", sample("Yes"), answer) == (said == "yes")
    assert not is_right_by("yes_no", sample("Yes"), None)


def test_the_rule_that_samples_call_for() -> None:
    choice, yes = sample("B", options=OPTIONS), sample("Yes")
    assert rule_of([choice, choice]) == "choice" and rule_of([yes, sample("no")]) == "yes_no"
    assert rule_of([choice, yes]) == rule_of([yes, sample("two")]) == rule_of([]) == "exact"
    assert rule_of([sample("B", options={}), choice]) == "exact"


def test_the_edit_distance_is_that_of_a_table_written_out() -> None:
    rng = random.Random(7)
    for _ in range(200):
        first, second = ("".join(rng.choices("abc", k=rng.randint(0, 7))) for _ in range(2))
        table = [[max(i, j) for j in range(len(second) + 1)] for i in range(len(first) + 1)]
        for i in range(1, len(first) + 1):
            for j in range(1, len(second) + 1):
                changed = table[i - 1][j - 1] + (first[i - 1] != second[j - 1])
                table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, changed)
        assert edit_distance(first, second) == table[-1][-1]


@pytest.mark.parametrize(
    ("answer", "gold", "value"),
    [
        ("Kitten", "sitting", 1 - 3 / 7),
        ("a  B", "A b", 1.0),
        ("ab", "ac", 0.5),
        ("ab", "xy", 0.0),
        ("abc", "axy", 0.0),  # a third
        ("", "a", 0.0),
    ],
)
def test_similarities(answer: str, gold: str, value: float) -> None:
    assert similarity(answer, gold) == pytest.approx(value)


def counted(rule: Any, rows: list[tuple[Sample, str | None]]) -> dict[str, float]:
    scores = RuleScores(rule)
    for asked, answer in rows:
        scores.add(asked, answer, is_right_by(rule, asked, answer))
    return scores.scores()


def test_chance_of_multiple_choice_and_similarity_to_the_nearest_answer() -> None:
    two = {"A": "x", "B": "y"}
    assert counted("choice", [(sample("A", options=two), "A"), (sample("A", options=OPTIONS), None)]) == {
        "chance": pytest.approx((1 / 2 + 1 / 4) / 2)
    }
    rows = [(sample("kitten", answers=["sitting"]), "sittin"), (sample("kitten"), None), (sample("ab"), "ab")]
    assert counted("anls", rows) == {"anls": pytest.approx((6 / 7 + 0 + 1) / 3)}
    assert counted("exact", [(sample("A"), "A")]) == {}


def test_figures_of_yes_and_no() -> None:
    said = [("yes", "Yes"), ("yes", "Yes."), ("yes", "no"), ("yes", None), ("no", "yes"), ("no", "No"), ("no", "maybe")]
    precision, recall = 2 / 3, 2 / 4  # yes was right twice of three times; four were to be answered by it
    assert counted("yes_no", [(sample(gold), answer) for gold, answer in said]) == {
        "precision": pytest.approx(precision),
        "recall": pytest.approx(recall),
        "f1": pytest.approx(2 * precision * recall / (precision + recall)),
        "share_of_yes": pytest.approx(3 / 7),
        "neither_yes_nor_no": pytest.approx(2 / 7),
    }
    never = counted("yes_no", [(sample("no"), "no")])
    assert never["precision"] == never["recall"] == never["f1"] == 0.0


def test_figures_and_questions_of_hallusionbench_are_right_as_a_whole() -> None:
    rows = [
        ("VD_illusion_0_0_1", "illusion", True),  # set 0, figure 0, question 1
        ("VD_illusion_0_0_2", "illusion", False),
        ("VD_illusion_0_1_1", "illusion", True),
        ("VD_illusion_0_1_2", "illusion", True),
        ("VD_math_0_0_1", "math", True),  # another category's set 0
    ]
    scores = counted(
        "yes_no", [(sample("yes", name, **{"l2-category": of}), "yes" if ok else "no") for name, of, ok in rows]
    )
    assert scores["fAcc"] == pytest.approx(2 / 3)  # of figures illusion 0, illusion 1, math 0
    assert scores["qAcc"] == pytest.approx(2 / 3)  # of questions illusion 1, illusion 2, math 1
