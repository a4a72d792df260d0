"""Draw true and false claims about an image, with which the embedded R-Scorer learns to check before it compares."""

from __future__ import annotations

import random

from srcfast.data.corruptions import Vocabulary, swap_word
from srcfast.data.records import Sample
from srcfast.world import clip_oracle, number_oracle, oracle
from srcfast.world.clip_questions import KINDS, ask_clip, clip_facts, clip_rationale
from srcfast.world.clips import DIRECTIONS, FRAMES, Clip, clip_from_json
from srcfast.world.numbers import LETTERS, Numbers, Program, answer_text
from srcfast.world.numbers import true_rationale as number_rationale
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
_OF_NUMBERS: Vocabulary = {
    **{f"numbers from {n}": tuple(map(str, range(n, n + 10))) for n in range(0, 500, 10)},
    "order": ("larger", "smaller"),
    "operation": ("plus", "minus"),
    "answer": ("yes", "no"),
}
_OF_DIGITS: Vocabulary = {"place": PLACES, "extreme": ("largest", "smallest"), "parity": ("even", "odd"), **_OF_NUMBERS}
_OF_CHARTS: Vocabulary = {"letter": LETTERS, "extreme": ("highest", "lowest"), **_OF_NUMBERS}
# Those classes whose words describe an object, or count objects.
ATTRIBUTES: Vocabulary = {name: VOCABULARY[name] for name in ("color", "shape", "shapes", "size", "place", "number")}
# A direction is no place, but for an answer: "left" may be either.
_OF_CLIPS: Vocabulary = {
    **{name: VOCABULARY[name] for name in ("color", "shape", "size", "number", "answer")},
    "place": tuple([f"at the {place}" for place in PLACES]),
    "frame": tuple([f"frame {number}" for number in range(1, FRAMES + 1)]),
    "direction": tuple([f"moves {direction}" for direction in DIRECTIONS]),
    "approach": ("moves toward", "moves away from"),
    "change": ("appears", "disappears"),
    "presence": ("there is a", "there is no"),
    "place as an answer": PLACES,
    "direction as an answer": tuple(DIRECTIONS),
}

Truth = Scene | Numbers | Clip  # about the images of a sample


def truth_of(sample: Sample) -> Truth | None:
    """Return what a sample's `extra` says about its images; None: nothing. Raises InputError where that is malformed."""
    for name, read in (("scene", Scene.from_json), ("numbers", Numbers.from_json), ("clip", clip_from_json)):
        if (value := sample.extra.get(name)) is not None:
            return read(value)
    return None


def vocabulary_of(truth: Truth | None) -> Vocabulary:
    """Return the classes of interchangeable words for claims about an image; the embedded world's for an unknown one."""
    if isinstance(truth, tuple):
        return _OF_CLIPS
    if not isinstance(truth, Numbers):
        return VOCABULARY
    return _OF_DIGITS if truth.axis is None else {**_OF_CHARTS, "category": tuple(truth.categories.values())}


def attributes_of(truth: Truth | None) -> Vocabulary:
    """Return those classes whose words describe or count objects, or are values, of which a noisy fact may have a wrong one."""
    if isinstance(truth, tuple):
        return {name: _OF_CLIPS[name] for name in ("color", "shape", "size", "place")}
    if not isinstance(truth, Numbers):
        return ATTRIBUTES
    return {name: words for name, words in _OF_NUMBERS.items() if name.startswith("numbers")}


def draw_claims(image: Truth, rng: random.Random, count: int) -> dict[str, bool]:
    """Draw up to `count` distinct sentences of the rationale grammar, half of them false. Returns each with its truth."""
    vocabulary = vocabulary_of(image)
    claims: dict[str, bool] = {}
    for _ in range(4 * count):
        if len(claims) == count:
            break
        sentence, wanted = _true_sentence(image, rng), rng.random() < 0.5
        truth = None if sentence is None else _is_true(sentence, image)
        for _ in range(4):
            swapped = None if sentence is None or truth in (None, wanted) else swap_word(sentence, rng, vocabulary)
            if swapped is None:
                break
            sentence, truth = swapped, _is_true(swapped, image)
        if sentence is not None and truth is not None:
            claims[sentence] = truth
    return claims


def _is_true(sentence: str, image: Truth) -> bool | None:
    """Return whether a sentence is true of an image; None if that can't be said."""
    if isinstance(image, tuple):
        return clip_oracle.is_true(sentence, image)
    return number_oracle.is_true(sentence, image) if isinstance(image, Numbers) else oracle.is_true(sentence, image)


def _true_sentence(image: Truth, rng: random.Random) -> str | None:
    """Draw a claim: what is seen, which rationales begin with, what is absent, or a conclusion, which is hardest to check."""
    if isinstance(image, tuple):
        return _true_of_clip(image, rng)
    return _true_number(image, rng) if isinstance(image, Numbers) else _true_of_scene(image, rng)


def _true_number(numbers: Numbers, rng: random.Random) -> str | None:
    """Draw a number that is seen, or a conclusion about which is the largest, what it stands for, or how many are larger."""
    if rng.random() < 0.6:
        return rng.choice(numbers.facts())
    programs: list[Program] = [{"op": "where", "which": which} for which in ("largest", "smallest")]
    than = int(rng.choice(list(numbers.values.values())))
    programs += [{"op": "count", "test": test, "than": than} for test in ("larger", "smaller")]
    if numbers.axis is None:
        programs += [{"op": "extreme", "which": "largest"}, {"op": "count", "test": "even"}]
    program = rng.choice(programs)
    return None if answer_text(program, numbers) is None else rng.choice(number_rationale(program, numbers)[1])


def _true_of_clip(clip: Clip, rng: random.Random) -> str:
    """Draw a fact of a frame, as it is or without the size, or a sentence of a rationale."""
    fact = rng.choice(clip_facts(clip))
    draw = rng.random()
    if draw < 0.4:
        return fact if draw < 0.15 else fact.replace(" small ", " ").replace(" large ", " ")
    [question] = ask_clip(clip, rng, rng.sample(list(KINDS), len(KINDS)), n=1)
    see, think = clip_rationale(clip, question)
    return rng.choice([*see, *think, *think])


def _true_of_scene(scene: Scene, rng: random.Random) -> str | None:
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
