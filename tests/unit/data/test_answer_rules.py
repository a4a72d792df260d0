"""Which answers are right by each rule, and the figures that benchmarks report, counted by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest

from srcfast.data.answer_rules import (
    RuleScores,
    categories_of,
    edit_distance,
    is_right_by,
    right_by_pix2struct,
    rule_of,
    similarity,
    yes_or_no,
)
from srcfast.data.answers import chosen_option, is_right
from srcfast.data.records import Sample
from srcfast.data.vlmeval import QUESTION_KEY

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
        ("b", "B"),
        ("(b)", "B"),
        ("b. blue", "B"),
        ("B, blue", "B"),
        ("B. A green car", "B"),  # A is an article
        ("The answer is B.", "B"),
        ("The correct answer is (B).", "B"),
        ("option B", "B"),
        ("I choose B", "B"),
        ("Answer: **B**", "B"),
        ("(B) or so", "B"),
        ("The answer is A car.", None),
        ("It is not B", None),
        ("U.S.A", None),
        ("vitamin B", None),
        ("The answer is b", None),  # in a sentence a letter is a capital
        ("B or C", None),
        ("B, C", None),
        ("B. or C.", None),
        ("The answer is B or C", None),
        ("BC", None),
        ("B. A car of kind C is larger", "B"),  # an explanation
        ("B. blue, (A) red", None),
        ("not (B)", None),
        ("It isn't (B).", None),
        ("The answer is not B", None),
        ("green", None),
        ("", None),
    ],
)
def test_the_option_that_an_answer_names(answer: str, letter: str | None) -> None:
    assert chosen_option(OPTIONS, answer) == letter


def test_a_small_letter_is_an_option_s_text_before_it_is_a_letter() -> None:
    variables = {"A": "c", "B": "d", "C": "a", "D": "b"}
    assert [chosen_option(variables, answer) for answer in ("c", "a", "(b)", "C")] == ["A", "C", "B", "C"]


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


@pytest.mark.parametrize(
    ("gold", "answer", "ours", "theirs"),
    [
        ("100", "105", True, True),
        ("100", "106", False, False),
        ("12", "12%", True, False),  # theirs is 0.12
        ("12%", "12", True, False),
        ("12%", "12.5%", True, True),
        ("0.12", "12%", False, True),
        ("1200", "1,200", True, False),
        ("1,200", "1,200", True, True),
        ("1,200", "1250", True, False),
        ("$5", "5.1", True, False),
        ("5", "$5.10", True, False),
        ("-5", "-$5", True, False),
        ("5", "5 \u20ac", True, False),
        ("5", "$", False, False),
        ("5", "$%", False, False),
        ("2010", "2012", True, True),  # a year is a number: neither rule knows better
        ("0", "0.0", True, False),
        ("0", "0.01", False, False),
        ("two", "2", True, False),
        ("Red", "red", True, True),
        ("Red", "red.", True, False),
        ("100", "1e2", False, True),
        ("100", "nan", False, False),
        ("100", "", False, False),
    ],
)
def test_relaxed_numbers_by_both_rules(gold: str, answer: str, ours: bool, theirs: bool) -> None:
    assert is_right_by("relaxed", sample(gold), answer) == ours
    assert right_by_pix2struct(answer, gold) == theirs
    assert counted("relaxed", [(sample(gold), answer), (sample(gold), None)]) == {"pix2struct": theirs / 2}


def test_relaxed_numbers_near_any_gold_answer() -> None:
    asked = sample("100", answers=["200", "red"])
    assert all(is_right_by("relaxed", asked, answer) for answer in ("98", "190", "Red"))
    assert not is_right_by("relaxed", asked, "150")
    assert counted("relaxed", [(asked, "190"), (asked, "150")]) == {"pix2struct": 0.5}


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
        ("no, there is none", "no"),
        ("**Yes**", "yes"),
        ("yes/no", None),
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


def test_hallusionbench_s_figures_are_those_of_its_paper_s_loop() -> None:
    """aAcc, fAcc and qAcc (Guan et al. 2024): all answers, figures and questions without a wrong answer, by nested loops."""
    rng = random.Random(5)
    rows = [
        (f"VD_{of}_1_{group}_{figure}_{question}", of, rng.random() < 0.7)
        for of in ("math", "ocr")
        for group in range(3)
        for figure in range(rng.randint(1, 3))
        for question in range(rng.randint(1, 3))
    ]
    for name in ("l2-category", "l2_category"):
        scores = counted("yes_no", [(sample("yes", i, **{name: of}), "yes" if ok else "no") for i, of, ok in rows])
        for figure_or_question, part in (("fAcc", 4), ("qAcc", 5)):
            right = total = 0
            for of in ("math", "ocr"):
                for group in range(3):
                    for member in range(3):
                        asked = [
                            ok
                            for i, l2, ok in rows
                            if l2 == of and i.split("_")[3] == str(group) and i.split("_")[part] == str(member)
                        ]
                        total += bool(asked)
                        right += bool(asked) and all(asked)
            assert scores[figure_or_question] == pytest.approx(right / total)


def test_pope_s_figures_count_a_question_once_for_each_of_its_categories() -> None:
    """POPE_rating of VLMEvalKit repeats a row for each category before it counts; here the rows are repeated by hand."""
    rng = random.Random(8)
    rows = [
        (
            rng.choice(["Yes", "No"]),
            rng.choice(["yes", "no", "what?"]),
            rng.sample(["adversarial", "popular", "random"], k),
        )
        for k in (1, 2, 3) * 20
    ]
    scores = RuleScores("yes_no")
    for gold, answer, categories in rows:
        asked = sample(gold, category=",".join(categories))
        assert categories_of("yes_no", asked) == [("category", name) for name in categories]
        assert categories_of("choice", asked) == [("category", ",".join(categories))]
        scores.add(asked, answer, answer == gold.lower(), len(categories))
    repeated = [(gold == "Yes", answer) for gold, answer, categories in rows for _ in categories]
    true = sum(answer == "yes" for gold, answer in repeated if gold)
    false = sum(answer == "yes" for gold, answer in repeated if not gold)
    missed = sum(answer != "yes" for gold, answer in repeated if gold)
    precision, recall = true / (true + false), true / (true + missed)
    n = len(repeated)
    assert n == 120 and scores.scores() == {
        "precision": pytest.approx(precision),
        "recall": pytest.approx(recall),
        "f1": pytest.approx(2 * precision * recall / (precision + recall)),
        "share_of_yes": pytest.approx((true + false) / n),
        "neither_yes_nor_no": pytest.approx(sum(answer == "what?" for _, answer in repeated) / n),
        "accuracy_over_categories": pytest.approx(
            sum((answer == "yes") == gold and answer != "what?" for gold, answer in repeated) / n
        ),
    }


def test_anls_is_that_of_its_paper_s_loop() -> None:
    """1 - NL where NL, edits by the longer length, is at most one half; the best gold answer counts (Biten et al. 2019)."""

    def distance(first: str, second: str) -> int:
        if not first or not second:
            return len(first) + len(second)
        return min(
            distance(first[1:], second) + 1,
            distance(first, second[1:]) + 1,
            distance(first[1:], second[1:]) + (first[0] != second[0]),
        )

    rng = random.Random(3)
    rows, expected = [], []
    for _ in range(60):
        golds = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        answer = "".join(rng.choices("ab", k=rng.randint(1, 5)))
        rows.append((sample(golds[0], answers=golds[1:]), answer))
        best = 0.0
        for gold in golds:
            share = distance(answer, gold) / max(len(answer), len(gold))
            best = max(best, 1 - share if share <= 0.5 else 0.0)
        expected.append(best)
    assert 0 in expected and 0.5 in expected and 1 in expected
    assert counted("anls", rows)["anls"] == pytest.approx(sum(expected) / len(expected))


def test_a_rotated_question_is_right_if_it_is_in_all_rotations() -> None:
    def rotated(index: int, question: str = "Which?", **more: Any) -> Sample:
        return sample("A", str(index), options={"A": "x", "B": "y"}, **{QUESTION_KEY: question}, **more)

    rows = [(7, "A"), (1_000_007, "A"), (8, "A"), (2_000_008, "B"), (9, "A")]
    assert counted("choice", [(rotated(i), said) for i, said in rows])["circular"] == pytest.approx(2 / 3)
    assert "circular" not in counted(
        "choice", [(rotated(7), "A"), (rotated(1_000_007, "What?"), "A"), (rotated(9), "A")]
    )
    assert counted("choice", [(rotated(1, g_index="3"), "A"), (rotated(2, g_index="3"), "B")])["circular"] == 0.0
    assert "circular" not in counted("choice", [(sample("A", "x", options=OPTIONS), "A"), (rotated(7), "A")])
