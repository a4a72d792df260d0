"""Draw questions about a scene, with answers balanced within each kind, and write them in words."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from typing import Any

from srcfast.errors import InputError
from srcfast.world.programs import RELATIONS, SIDES, Description, Program, evaluate, matches, relevant
from srcfast.world.scenes import HELD_OUT, PLURALS, VALUES, Object, Scene

ABILITIES = (
    "coarse_perception",
    "fine_grained_perception",
    "instance_reasoning",
    "logical_reasoning",
    "counting_arithmetic",
    "spatial_relation",
)


@dataclass(frozen=True)
class Question:
    """A question with its answer, the ability it tests, its kind, and its program."""

    text: str
    ability: str
    kind: str
    program: Program
    answer: str


def noun(of: Description | Object, plural: bool = False) -> str:
    """Write a description as a noun phrase: "large red circle at the top left", "red objects"."""
    if isinstance(of, Object):
        of = of.described()
    words = [of[name] for name in ("size", "color") if name in of]
    name = of.get("shape", "object")
    words.append(PLURALS[name] if plural else name)
    if "place" in of:
        words.append(f"at the {of['place']}")
    return " ".join(words)


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def predicate(of: Description, plural: bool = False) -> str:
    """Write a description of one attribute as it follows "is" or "are": "red", "a circle", "circles"."""
    if "shape" in of:
        return noun(of, plural=True) if plural else with_article(noun(of))
    [value] = of.values()
    return value


# By operation, its wordings. A field takes a value of the program, in one of the _FORMS.
_WORDINGS = {
    "background": ("What is the background like?", "Is the background plain, striped or dotted?"),
    "most_common": ("Which {attribute} is the most common?",),
    "more_side": ("Are there more objects {sides[0]:at} or {sides[1]:at}?",),
    "query": ("What {attribute} is the {of}?",),
    "exists": ("Is there {of:a}?", "Can you see {of:a}?"),
    "same": ("Do the {a} and the {b} have the same {attribute}?", "Are the {a} and the {b} the same {attribute}?"),
    "larger": ("Is the {a} larger than the {b}?", "Is the {b} smaller than the {a}?"),
    "query_same": ("What {attribute} is the object with the same {same} as the {of}?",),
    "all": ("Are all {of:many} {are:are}?",),
    "some_not": ("Is there {of:a} that is not {are:is}?",),
    "all_either": ("Is every {of} {either[0]:is} or {either[1]:is}?",),
    "and_not": ("Is there {present:a} and no {absent}?",),
    "count": ("How many {of:many} are there?", "What is the number of {of:many}?"),
    "count_side": ("How many {of:many} are {side:at}?",),
    "difference": ("How many more {a:many} than {b:many} are there?",),
    "count_either": ("How many {of:many} are {either[0]:are} or {either[1]:are}?",),
    "count_not": ("How many {of:many} are there that are not {are:are}?",),
    "relation": ("Is the {a} {relation} the {b}?",),
    "neighbor": ("What {attribute} is the object directly {relation} the {of}?",),
    "chain": ("What {attribute} is the object directly {relations[0]} the object directly {relations[1]} the {of}?",),
    "extreme": ("What {attribute} is the {side}most object?",),
    "beyond_all": ("Is the {of} {relation} all other objects?",),
}
_FORMS: dict[str, Callable[[Any], str]] = {
    "": lambda value: noun(value) if isinstance(value, dict) else value,
    "a": lambda of: with_article(noun(of)),
    "many": partial(noun, plural=True),
    "is": predicate,
    "are": partial(predicate, plural=True),
    "at": lambda side: SIDES[side][2],
}


class _Wording(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        return _FORMS[format_spec](value)


def question_text(program: Program, wording: int = 0) -> str:
    """Write a program as a question; some operations have the wordings 0 and 1, the others 0 alone."""
    if program["op"] not in _WORDINGS:
        raise InputError(field="program", expected="a known operation", found=program["op"])
    return _Wording().vformat(_WORDINGS[program["op"]][wording], (), {"of": {}, **program})


# A kind yields random programs; `propose` skips those without an answer in the scene. Its name is `Question.kind`.
Kind = Callable[[Scene, random.Random], Iterator[Program]]
Kinds = Mapping[str, tuple[Kind, ...]]  # by ability


def ask(
    scene: Scene,
    rng: random.Random,
    abilities: Sequence[str] = ABILITIES,
    n: int = 3,
    kinds: Kinds | None = None,
) -> list[Question]:
    """Draw up to `n` different questions about a fully known scene, cycling through the abilities; of KINDS by default.

    An answer is drawn first and then a question with that answer, so that no kind can be answered well
    without looking at the image. An ability for which the scene has no question is skipped. If the scene has a
    held-out combination, questions about it are preferred.
    """
    order = list(abilities)
    rng.shuffle(order)
    questions: dict[str, Question] = {}
    for ability in (order * n)[: max(n, len(order)) * 2]:
        if len(questions) == n:
            break
        question = _draw_question(scene, ability, (kinds or KINDS)[ability], rng)
        if question is not None:
            questions.setdefault(question.text, question)
    return list(questions.values())


def _draw_question(scene: Scene, ability: str, kinds: tuple[Kind, ...], rng: random.Random) -> Question | None:
    """Draw a question of an ability's kinds; None if eight tries give none."""
    held_out = [o for o in scene.objects if (o.shape, o.color) in HELD_OUT]
    fallback = None
    for _ in range(8):
        kind = rng.choice(kinds)
        answer_of = partial(evaluate, objects=scene.objects, background=scene.background)
        proposal = propose(kind(scene, rng), answer_of, kind in _YES_NO, rng)
        if proposal is None:
            continue
        program, answer = proposal
        wording = rng.randrange(2) if len(_WORDINGS[program["op"]]) == 2 else 0
        name = kind.__name__.lstrip("_")
        question = Question(question_text(program, wording), ability, name, program, answer)
        if not held_out or any(o in held_out for o in relevant(program, scene.objects)):
            return question
        fallback = fallback or question
    return fallback


def propose(
    proposals: Iterator[Program], answer_of: Callable[[Program], str | None], is_yes_no: bool, rng: random.Random
) -> tuple[Program, str] | None:
    """Draw one of a kind's programs, uniformly over the answers. Returns it with its answer; None if none has one."""
    wanted = rng.choice(("yes", "no")) if is_yes_no else None
    by_answer: dict[str, Program] = {}
    for program in islice(proposals, 10 if wanted is None else 24):
        answer = answer_of(program)
        if answer is None:
            continue
        if answer == wanted:
            return program, answer
        by_answer.setdefault(answer, program)
    if wanted is not None or not by_answer:
        return None
    answer = rng.choice(list(by_answer))
    return by_answer[answer], answer


def _background(scene: Scene, rng: random.Random) -> Iterator[Program]:
    yield {"op": "background"}


def _most_common(scene: Scene, rng: random.Random) -> Iterator[Program]:
    for attribute in rng.sample(("color", "shape"), 2):
        yield {"op": "most_common", "attribute": attribute}


def _more_side(scene: Scene, rng: random.Random) -> Iterator[Program]:
    for sides in rng.sample((["left", "right"], ["top", "bottom"]), 2):
        yield {"op": "more_side", "sides": sides}


def _at_place(scene: Scene, rng: random.Random) -> Iterator[Program]:
    attribute = rng.choice(("shape", "color", "size"))
    for o in rng.sample(scene.objects, len(scene.objects)):
        yield {"op": "query", "attribute": attribute, "of": o.described("place")}


def _unique_object(scene: Scene, rng: random.Random) -> Iterator[Program]:
    attribute, given = rng.choice((("color", ("size", "shape")), ("shape", ("size", "color"))))
    for o in rng.sample(scene.objects, len(scene.objects)):
        yield {"op": "query", "attribute": attribute, "of": o.described(*given)}


def _size_of(scene: Scene, rng: random.Random) -> Iterator[Program]:
    for o in rng.sample(scene.objects, len(scene.objects)):
        yield {"op": "query", "attribute": "size", "of": o.described("shape", "color")}


def _exists(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        of = rng.choice(scene.objects).described("shape", "color", "size")
        if rng.random() < 0.6:  # a near miss: change one attribute
            name, values = rng.choice(tuple(VALUES.items()))
            of[name] = rng.choice(values)
        if (of["shape"], of["color"]) in HELD_OUT and not any((o.shape, o.color) in HELD_OUT for o in scene.objects):
            continue  # such a combination must not occur in text either
        yield {"op": "exists", "of": of}


# Attributes to compare, and those by which the two objects are named.
_SAME = (("color", ["shape"]), ("shape", ["color"]), ("size", ["shape", "color"]), ("color", ["size", "shape"]))


def _same(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        a, b = rng.sample(scene.objects, 2)
        attribute, named = rng.choice(_SAME)
        first, second = a.described(*named), b.described(*named)
        if first != second:
            yield {"op": "same", "attribute": attribute, "a": first, "b": second}


def _larger(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        a, b = rng.sample(scene.objects, 2)
        yield {"op": "larger", "a": a.described("shape", "color"), "b": b.described("shape", "color")}


def _query_same(scene: Scene, rng: random.Random) -> Iterator[Program]:
    pairs = (("shape", "color"), ("color", "shape"), ("shape", "size"), ("color", "size"))
    for o in rng.sample(scene.objects, len(scene.objects)):
        for same, attribute in rng.sample(pairs, 4):
            of = o.described("shape", "color")
            yield {"op": "query_same", "attribute": attribute, "same": same, "of": of}


def _all(scene: Scene, rng: random.Random) -> Iterator[Program]:
    yield from _universals("all", scene, rng)


def _some_not(scene: Scene, rng: random.Random) -> Iterator[Program]:
    yield from _universals("some_not", scene, rng)


def _universals(op: str, scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        o = rng.choice(scene.objects)
        of, are = rng.sample(("shape", "color", "size"), 2)
        if sum(getattr(other, of) == getattr(o, of) for other in scene.objects) >= 2 or rng.random() < 0.1:
            yield {"op": op, "of": o.described(of), "are": o.described(are)}


def _all_either(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        o, first, second = (rng.choice(scene.objects) for _ in range(3))
        of = rng.choice(("size", "shape", "color"))
        names = [name for name in ("color", "shape", "size") if name != of]
        either = [first.described(names[0]), second.described(names[1])]
        if sum(getattr(other, of) == getattr(o, of) for other in scene.objects) >= 2 or rng.random() < 0.1:
            yield {"op": "all_either", "of": o.described(of), "either": either}


def _and_not(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        present = _single(scene, rng, ("shape", "color"))
        absent = _single(scene, rng, ("color", "shape", "size"))
        if present.keys() != absent.keys():
            yield {"op": "and_not", "present": present, "absent": absent}


def _single(scene: Scene, rng: random.Random, names: Sequence[str]) -> Description:
    """Draw a description of one attribute: of an object of the scene or, with probability 1/4, any value."""
    name = rng.choice(names)
    if rng.random() < 0.25:
        return {name: rng.choice(VALUES[name])}
    return rng.choice(scene.objects).described(name)


def _count(scene: Scene, rng: random.Random) -> Iterator[Program]:
    yield {"op": "count", "of": {}}
    while True:
        of = _single(scene, rng, ("shape", "color", "size"))
        if rng.random() < 0.3:
            of = rng.choice(scene.objects).described("size") | _single(scene, rng, ("shape", "color"))
        yield {"op": "count", "of": of}


def _count_side(scene: Scene, rng: random.Random) -> Iterator[Program]:
    for side in rng.sample(tuple(SIDES), 4):
        yield {"op": "count_side", "side": side}


def _difference(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        name = rng.choice(("shape", "color", "size"))
        first, second = rng.sample(scene.objects, 2)
        a, b = first.described(name), second.described(name)
        counts = [sum(matches(o, of) is True for o in scene.objects) for of in (a, b)]
        if a != b and (counts[0] != counts[1] or rng.random() < 0.2):
            yield {"op": "difference", "a": a, "b": b}


def _count_either(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        yield {
            "op": "count_either",
            "either": [_single(scene, rng, ("shape", "size")), _single(scene, rng, ("color",))],
        }


def _relation(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        a, b = rng.sample(scene.objects, 2)
        named = ("shape", "color") if rng.random() < 0.7 else ("shape",)
        relation = rng.choice(RELATIONS)
        yield {"op": "relation", "relation": relation, "a": a.described(*named), "b": b.described(*named)}


def _neighbor(scene: Scene, rng: random.Random) -> Iterator[Program]:
    attribute = rng.choice(("shape", "color", "size"))
    for o in rng.sample(scene.objects, len(scene.objects)):
        for relation in rng.sample(RELATIONS, 4):
            of = o.described("shape", "color")
            yield {"op": "neighbor", "attribute": attribute, "relation": relation, "of": of}


def _extreme(scene: Scene, rng: random.Random) -> Iterator[Program]:
    attribute = rng.choice(("shape", "color", "size"))
    for side in rng.sample(tuple(SIDES), 4):
        yield {"op": "extreme", "attribute": attribute, "side": side}


def _beyond_all(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        o = rng.choice(scene.objects)
        named = ("shape", "color") if rng.random() < 0.7 else ("shape",)
        yield {"op": "beyond_all", "relation": rng.choice(RELATIONS), "of": o.described(*named)}


def _count_size_either(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        name = rng.choice(("color", "shape"))
        first, second = (o.described(name) for o in rng.sample(scene.objects, 2))
        if first != second:
            of = rng.choice(scene.objects).described("size")
            yield {"op": "count_either", "of": of, "either": [first, second]}


def _count_not(scene: Scene, rng: random.Random) -> Iterator[Program]:
    yield from _universals("count_not", scene, rng)


def _count_side_of(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        of = _single(scene, rng, ("shape", "color", "size"))
        yield {"op": "count_side", "side": rng.choice(tuple(SIDES)), "of": of}


def _chain(scene: Scene, rng: random.Random) -> Iterator[Program]:
    attribute = rng.choice(("shape", "color"))
    for o in rng.sample(scene.objects, len(scene.objects)):
        for first, second in rng.sample(list(product(RELATIONS, repeat=2)), 16):
            of = o.described("shape", "color")
            yield {"op": "chain", "attribute": attribute, "relations": [first, second], "of": of}


KINDS: Kinds = {
    "coarse_perception": (_background, _most_common, _more_side),
    "fine_grained_perception": (_at_place, _unique_object, _size_of, _exists),
    "instance_reasoning": (_same, _larger, _query_same),
    "logical_reasoning": (_all, _some_not, _all_either, _and_not),
    "counting_arithmetic": (_count, _count_side, _difference, _count_either),
    "spatial_relation": (_relation, _neighbor, _extreme, _beyond_all),
}
# Kinds that no training split asks: operations of KINDS, composed in other ways.
NEW_KINDS: Kinds = {
    "counting_arithmetic": (_count_size_either, _count_not, _count_side_of),
    "spatial_relation": (_chain,),
}
_YES_NO = frozenset([_exists, _same, _larger, _all, _some_not, _all_either, _and_not, _relation, _beyond_all])
