"""Draw true and false claims about a scene, with which the embedded R-Scorer learns to check before it compares."""

from __future__ import annotations

import random

from srcfast.data.corruptions import Vocabulary, swap_word
from srcfast.world.oracle import is_true
from srcfast.world.questions import ask, noun, with_article
from srcfast.world.rationales import true_rationale
from srcfast.world.scenes import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, Object, Scene

# Classes of interchangeable words: swapping one for another of its class can make a true sentence false.
VOCABULARY: Vocabulary = {
    "color": COLORS,
    "shape": SHAPES,
    "shapes": ("circles", "rectangles", "triangles", "stars", "crosses"),
    "size": SIZES,
    "place": PLACES,
    "background": BACKGROUNDS,
    "number": tuple("012345"),
    "relation": ("left of", "right of", "above", "below"),
    "side": ("leftmost", "rightmost", "topmost", "bottommost"),
    "quantity": ("all", "not all"),
    "answer": ("yes", "no"),
}
# Those classes whose words describe an object, or count objects.
ATTRIBUTES: Vocabulary = {name: VOCABULARY[name] for name in ("color", "shape", "shapes", "size", "place", "number")}


def draw_claims(scene: Scene, rng: random.Random, count: int) -> dict[str, bool]:
    """Draw up to `count` distinct sentences of the rationale grammar, half of them false. Returns each with its truth."""
    claims: dict[str, bool] = {}
    for _ in range(4 * count):
        if len(claims) == count:
            break
        sentence, wanted = _true_sentence(scene, rng), rng.random() < 0.5
        truth = None if sentence is None else is_true(sentence, scene)
        for _ in range(4):
            swapped = None if sentence is None or truth in (None, wanted) else swap_word(sentence, rng, VOCABULARY)
            if swapped is None:
                break
            sentence, truth = swapped, is_true(swapped, scene)
        if sentence is not None and truth is not None:
            claims[sentence] = truth
    return claims


def _true_sentence(scene: Scene, rng: random.Random) -> str | None:
    """Draw a claim: what is seen, which rationales begin with, what is absent, or a conclusion, which is hardest to check."""
    # easy-VQA's scenes leave places unknown, and have no conclusions here.
    fully_known = all(o.place is not None for o in scene.objects)
    draw = rng.random() * (1.0 if fully_known else 0.5)
    o = rng.choice(scene.objects)
    if draw < 0.4:
        return f"There is {with_article(noun(o))}."
    if draw < 0.5:  # false, unless a swapped word makes it true
        of = rng.choice((Object(shape=o.shape, color=o.color), Object(color=o.color), Object(shape=o.shape)))
        return f"There is no {noun(of)}."
    [question] = ask(scene, rng, n=1)
    _, conclusions = true_rationale(scene, question)
    return rng.choice(conclusions) if conclusions else None
