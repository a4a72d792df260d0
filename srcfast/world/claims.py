"""Single claims about a scene, true and false: what the embedded R-Scorer learns to check before it compares."""

from __future__ import annotations

import random

from srcfast.data.corruptions import Vocabulary, swap_word
from srcfast.world.oracle import is_true
from srcfast.world.questions import ask, noun, with_article
from srcfast.world.rationales import true_rationale
from srcfast.world.scenes import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, Object, Scene

# Words of which one may stand where another stood: what makes a true sentence false.
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


def draw_claims(scene: Scene, rng: random.Random, count: int) -> dict[str, bool]:
    """At most `count` distinct sentences of the rationale grammar, each with whether it holds; half are to be false."""
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
    """What is seen (rationales begin with it), what is absent, or what follows, which is the hardest to check."""
    fully_known = all(o.place is not None for o in scene.objects)  # easy-VQA's scenes are not
    draw = rng.random() * (1.0 if fully_known else 0.5)
    o = rng.choice(scene.objects)
    if draw < 0.4:
        return f"There is {with_article(noun(o))}."
    if draw < 0.5:  # as it stands false; a swapped word makes it true
        of = rng.choice((Object(shape=o.shape, color=o.color), Object(color=o.color), Object(shape=o.shape)))
        return f"There is no {noun(of)}."
    [question] = ask(scene, rng, n=1)
    _, conclusions = true_rationale(scene, question)
    return rng.choice(conclusions) if conclusions else None
