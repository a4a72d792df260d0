"""Corruptions: each kind does what its name says, and nothing else."""

import random

import pytest

from srcfast.data.corruptions import KINDS, corrupt, swap_one, swap_word
from srcfast.errors import InputError

VOCABULARY = {
    "colour": ("red", "blue", "green", "dark green"),
    "shape": ("circle", "square", "triangle"),
    "size": ("small", "large"),
    "relation": ("left of", "right of", "above", "below"),
    "count": ("0", "1", "2", "3", "4"),
    "verdict": ("yes", "no"),
}
WORDS = [word for words in VOCABULARY.values() for word in words]
SEE = ("There is a small red circle.", "There is a large blue square.", "There is a dark green triangle.")
THINK = ("Of these, 2 are not triangles.", "So the answer is 2.")
ANSWER = "2"


def many(kind, count=200, see=SEE, think=THINK, answer=ANSWER):
    return [corrupt(see, think, answer, kind, random.Random(seed), VOCABULARY) for seed in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_corruption_changes_something_and_is_repeatable(kind):
    results = many(kind)
    assert all(result != (SEE, THINK, ANSWER) for result in results)
    assert results == many(kind)
    assert len(set(results)) > 1


def test_counterfactual_says_that_something_is_seen_which_is_not():
    for see, think, answer in many("counterfactual"):
        new = [sentence for sentence in see if sentence not in SEE]
        assert len(new) == 1
        if len(see) == len(SEE) + 1:  # an invented object: a known sentence, its every attribute another
            assert set(SEE) <= set(see) and (think, answer) == (THINK, ANSWER)
            assert new[0].startswith("There is a ")
        else:
            assert len(see) == len(SEE) and sum(a != b for a, b in zip(see, SEE, strict=True)) == 1


def test_a_word_is_swapped_for_one_of_its_own_class_and_phrases_are_whole():
    for see, _, _ in many(
        "counterfactual", see=("A dark green triangle is above a red circle.",), think=(), answer="x"
    ):
        for sentence in see:
            assert "dark red" not in sentence and "dark blue" not in sentence
            left = sentence.split(" is ")[0] if " is " in sentence else sentence
            assert any(
                left == f"A {colour} {shape}" for colour in VOCABULARY["colour"] for shape in VOCABULARY["shape"]
            )


def test_an_error_of_perception_may_be_carried_on_to_reasoning_and_answer():
    see, think = ("There is a red circle.",), ("The circle is red.",)
    results = many("counterfactual", see=see, think=think, answer="red")
    carried = [r for r in results if r[2] != "red"]
    assert carried and any(r[2] == "red" for r in results)
    for seen, thought, answer in carried:
        assert thought == (f"The circle is {answer}.",) and seen == (f"There is a {answer} circle.",)


def test_insufficient_only_leaves_out():
    kept_answers = set()
    for see, think, answer in many("insufficient"):
        kept_answers.add(answer)
        assert (len(see) == len(SEE) - 1 and set(see) < set(SEE) and think == THINK) or (see == SEE and think == ())
    assert kept_answers == {ANSWER}
    assert {len(think) for _, think, _ in many("insufficient")} == {0, len(THINK)}


def test_insufficient_drops_a_sentence_that_the_conclusion_needs():
    think = ("The triangle is dark green.",)
    for see, thought, _ in many("insufficient", think=think, answer="dark green"):
        assert thought == () or SEE[2] not in see


def test_unreasonable_leaves_perception_and_breaks_the_conclusion():
    changed = set()
    for see, think, answer in many("unreasonable"):
        assert see == SEE and (think != THINK) != (answer != ANSWER)
        changed.add("answer" if answer != ANSWER else "think")
        assert answer in VOCABULARY["count"]
    assert changed == {"answer", "think"}


def test_plain_rationales_are_corrupted_in_their_one_list():
    for kind in KINDS:
        for see, think, answer in many(kind, see=(), think=SEE + THINK, count=30):
            assert see == () and (think != SEE + THINK or answer != ANSWER)


def test_capitals_are_kept():
    result = corrupt(("Red circles are here.",), (), "x", "counterfactual", random.Random(3), {"c": ("red", "blue")})
    assert result[0] == ("Blue circles are here.",)


def test_words_with_capitals_keep_them():
    rng, words = random.Random(0), {"name": ["New Zealand", "Sierra Leone", "iPhone"]}
    swapped = {swap_word("B stands for New Zealand.", rng, words) for _ in range(40)}
    assert swapped == {"B stands for Sierra Leone.", "B stands for IPhone."}
    swapped = {swap_word("b stands for new zealand.", rng, words) for _ in range(40)}
    assert swapped == {"b stands for sierra leone.", "b stands for iphone."}


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_corrupted_is_refused_by_name(kind):
    with pytest.raises(InputError, match=kind):
        corrupt(("Nothing to swap.",), (), "x", kind, random.Random(0), VOCABULARY)


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="counterfactual, insufficient, unreasonable"):
        corrupt(SEE, THINK, ANSWER, "rude", random.Random(0), VOCABULARY)


def test_a_swapped_sentence_is_none_that_is_there_already():
    """Of two sentences that one swap makes equal, no corruption has the same sentence twice."""
    see = ("There is a red circle.", "There is a blue circle.")
    results = {r[0] for r in many("counterfactual", count=400, see=see, think=("So it is.",), answer="7")}
    assert len(results) > 5
    assert all(len(set(seen)) == len(seen) for seen in results)


def test_a_word_is_swapped_wherever_one_alternative_is_new():
    """Of eight colors seven are named: each word has seven alternatives, of which one makes a new sentence."""
    colors = ("red", "blue", "green", "gray", "pink", "teal", "black", "white")
    see = tuple(f"There is no {color} object." for color in colors[:-1])
    for seed in range(50):
        swapped = swap_one(see, random.Random(seed), {"color": colors})
        assert swapped is not None and set(swapped) - set(see) == {"There is no white object."}
    assert swap_one((*see, "There is no white object."), random.Random(0), {"color": colors}) is None


def test_omitting_draws_among_all_sentences_where_the_conclusion_needs_none():
    left_out = {
        next(s for s in SEE if s not in see)
        for see, think, _ in many("insufficient", think=("So it is.",), answer="yes")
        if think
    }
    assert left_out == set(SEE)


def test_an_object_is_invented_from_a_sentence_of_several_attributes_and_stands_anywhere():
    """ "There is a thing." has no attribute, "It is red." one: neither is copied."""
    see = ("There is a red circle.", "It is red.", "There is a thing.")
    places, invented = set(), set()
    for seen, think, answer in many("counterfactual", count=600, see=see, think=("So it is.",), answer="7"):
        if len(seen) == 4:
            (new,) = [sentence for sentence in seen if sentence not in see]
            assert tuple(sentence for sentence in seen if sentence != new) == see
            assert (think, answer) == (("So it is.",), "7")
            places.add(seen.index(new))
            invented.add(new)
    assert places == {0, 1, 2, 3}
    assert len(invented) > 3 and all(new.startswith("There is a ") for new in invented)
    assert not any("red" in new or "circle" in new for new in invented)  # all attributes are others
