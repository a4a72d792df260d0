"""Claims: what is drawn is said truly to be true or false, and some of both."""

import random

import pytest

from srcfast.data.corruptions import swap_word
from srcfast.world.claims import VOCABULARY, draw_claims
from srcfast.world.oracle import is_true, parse_claim
from srcfast.world.rationales import facts
from srcfast.world.scenes import COLORS, SHAPES, SIZES, Object, Scene, sample_scenes

SCENE = Scene(
    (
        Object("circle", "red", "small", "top left"),
        Object("star", "blue", "large", "center"),
        Object("circle", "blue", "small", "right"),
    ),
    "striped",
)


@pytest.mark.parametrize(
    ("sentence", "truth"),
    [
        ("There is a small red circle at the top left.", True),
        ("There is a small red circle at the top.", False),
        ("There is a large circle.", False),
        ("There is no green object.", True),
        ("There is no blue star.", False),
        ("There are 2 circles.", True),
        ("There are 3 circles.", False),
        ("The background is dotted.", False),
        ("The red circle is left of the blue star.", True),
        ("All circles are small.", True),
        ("All circles are blue.", False),
        ("Both are red.", None),  # of which two?
        ("3 minus 1 is 2.", None),
        ("What a lovely picture.", None),
    ],
)
def test_one_sentence_is_true_false_or_not_to_be_told(sentence, truth):
    assert is_true(sentence, SCENE) is truth


def test_claims_about_what_is_unknown_cannot_be_told():
    known_by_shape = Scene((Object("circle", None, None, None),))
    assert is_true("There is a circle.", known_by_shape) is True
    assert is_true("There is a red circle.", known_by_shape) is None


def test_drawn_claims_are_distinct_true_and_false_and_told_apart_rightly():
    rng = random.Random(4)
    seen = {True: 0, False: 0}
    for scene in sample_scenes("scorer", 60, 8):
        claims = draw_claims(scene, rng, 10)
        assert 5 < len(claims) <= 10
        for sentence, truth in claims.items():
            claim = parse_claim(sentence)
            assert claim is not None and is_true(sentence, scene) is truth
            if claim.present is not None:  # checked here by other means than the oracle's
                assert truth == any(
                    all(value is None or getattr(o, name) == value for name, value in claim.present.to_json().items())
                    for o in scene.objects
                )
            seen[truth] += 1
    assert min(seen.values()) > 0.3 * sum(seen.values())


def test_false_claims_are_mostly_near_the_truth():
    """A judge learns little from claims that share nothing with the facts."""
    rng = random.Random(5)
    near = total = 0
    for scene in sample_scenes("scorer", 40, 9):
        known = [set(fact.split()) for fact in facts(scene)]
        for sentence, truth in draw_claims(scene, rng, 12).items():
            if not truth and sentence.startswith("There is a "):
                total += 1
                near += max(len(set(sentence.split()) & words) for words in known) >= len(set(sentence.split())) - 2
    assert near > 0.8 * total > 0


def test_a_swapped_word_is_another_of_its_class():
    rng = random.Random(6)
    words = {*SHAPES, *COLORS, *SIZES}
    for _ in range(30):
        swapped = swap_word("There is a large red star.", rng, VOCABULARY)
        assert swapped is not None
        old, new = (set(s.removesuffix(".").split()) for s in ("There is a large red star.", swapped))
        assert len(old - new) == len(new - old) == 1
        assert old - new <= words and new - old <= words
    assert swap_word("Nothing to swap here", rng, VOCABULARY) is None
