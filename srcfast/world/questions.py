"""Draw questions about a scene, with answers balanced within each kind, and write them in words."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from srcfast.errors import InputError
from srcfast.world.programs import RELATIONS, SIDES, Description, Program, evaluate, matches, relevant
from srcfast.world.scenes import COLORS, HELD_OUT, SHAPES, SIZES, Object, Scene

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


_SINGULAR = {name: name for name in (*SHAPES, "object")}
_PLURAL = {name: "crosses" if name == "cross" else name + "s" for name in (*SHAPES, "object")}


def noun(of: Description | Object, plural: bool = False) -> str:
    """Write a description as a noun phrase: "large red circle at the top left", "red objects"."""
    if isinstance(of, Object):
        of = {name: value for name, value in of.to_json().items() if value is not None}
    words = [of[name] for name in ("size", "color") if name in of]
    words.append((_PLURAL if plural else _SINGULAR)[of.get("shape", "object")])
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


def question_text(program: Program, wording: int = 0) -> str:
    """Write a program as a question; kinds in _TWO_WORDINGS have the wordings 0 and 1, the others 0 alone."""
    op = program["op"]
    p = program
    if op == "background":
        return (
            "What is the background like?",
            "Is the background plain, striped or dotted?",
        )[wording]
    if op == "most_common":
        return f"Which {p['attribute']} is the most common?"
    if op == "more_side":
        first, second = (SIDES[side][2] for side in p["sides"])
        return f"Are there more objects {first} or {second}?"
    if op == "query":
        return f"What {p['attribute']} is the {noun(p['of'])}?"
    if op == "exists":
        return (
            f"Is there {with_article(noun(p['of']))}?",
            f"Can you see {with_article(noun(p['of']))}?",
        )[wording]
    if op == "same":
        a, b = noun(p["a"]), noun(p["b"])
        return (
            f"Do the {a} and the {b} have the same {p['attribute']}?",
            f"Are the {a} and the {b} the same {p['attribute']}?",
        )[wording]
    if op == "larger":
        a, b = noun(p["a"]), noun(p["b"])
        return (
            f"Is the {a} larger than the {b}?",
            f"Is the {b} smaller than the {a}?",
        )[wording]
    if op == "query_same":
        return f"What {p['attribute']} is the object with the same {p['same']} as the {noun(p['of'])}?"
    if op == "all":
        return f"Are all {noun(p['of'], plural=True)} {predicate(p['are'], plural=True)}?"
    if op == "some_not":
        return f"Is there {with_article(noun(p['of']))} that is not {predicate(p['are'])}?"
    if op == "all_either":
        first, second = (predicate(of) for of in p["either"])
        return f"Is every {noun(p['of'])} {first} or {second}?"
    if op == "and_not":
        return f"Is there {with_article(noun(p['present']))} and no {noun(p['absent'])}?"
    if op == "count":
        many = noun(p["of"], plural=True)
        return (f"How many {many} are there?", f"What is the number of {many}?")[wording]
    if op == "count_side":
        return f"How many objects are {SIDES[p['side']][2]}?"
    if op == "difference":
        return f"How many more {noun(p['a'], plural=True)} than {noun(p['b'], plural=True)} are there?"
    if op == "count_either":
        first, second = (predicate(of, plural=True) for of in p["either"])
        return f"How many objects are {first} or {second}?"
    if op == "relation":
        return f"Is the {noun(p['a'])} {p['relation']} the {noun(p['b'])}?"
    if op == "neighbor":
        return f"What {p['attribute']} is the object directly {p['relation']} the {noun(p['of'])}?"
    if op == "extreme":
        return f"What {p['attribute']} is the {p['side']}most object?"
    if op == "beyond_all":
        return f"Is the {noun(p['of'])} {p['relation']} all other objects?"
    raise InputError(field="program", expected="a known operation", found=op)


_TWO_WORDINGS = frozenset(["background", "exists", "same", "larger", "count"])


def ask(scene: Scene, rng: random.Random, abilities: Sequence[str] = ABILITIES, n: int = 3) -> list[Question]:
    """Draw up to `n` different questions about a fully known scene, cycling through the abilities.

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
        question = _draw_question(scene, ability, rng)
        if question is not None:
            questions.setdefault(question.text, question)
    return list(questions.values())


def _draw_question(scene: Scene, ability: str, rng: random.Random) -> Question | None:
    """Draw a question of an ability; None if eight tries give none."""
    held_out = [o for o in scene.objects if (o.shape, o.color) in HELD_OUT]
    fallback = None
    for _ in range(8):
        kind = rng.choice(_KINDS[ability])
        proposal = _propose(scene, kind, rng)
        if proposal is None:
            continue
        program, answer = proposal
        wording = rng.randrange(2) if program["op"] in _TWO_WORDINGS else 0
        question = Question(
            question_text(program, wording),
            ability,
            kind.__name__.lstrip("_"),
            program,
            answer,
        )
        if not held_out or any(o in held_out for o in relevant(program, scene.objects)):
            return question
        fallback = fallback or question
    return fallback


def _propose(scene: Scene, kind: Kind, rng: random.Random) -> tuple[Program, str] | None:
    """Draw a program of a kind, uniformly over the answers of the kind's proposals. Returns it with its answer."""
    wanted = rng.choice(("yes", "no")) if kind in _YES_NO else None
    by_answer: dict[str, Program] = {}
    proposals = kind(scene, rng)
    for _ in range(10 if wanted is None else 24):
        program = next(proposals, None)
        if program is None:
            break
        answer = evaluate(program, scene.objects, scene.background)
        if answer is None:
            continue
        if answer == wanted:
            return program, answer
        by_answer.setdefault(answer, program)
    if wanted is not None or not by_answer:
        return None
    answer = rng.choice(list(by_answer))
    return by_answer[answer], answer


# A kind yields random programs; `_propose` skips those without an answer in the scene. Its name is `Question.kind`.
Kind = Callable[[Scene, random.Random], Iterator[Program]]


def _described(o: Object, *names: str) -> Description:
    return {name: getattr(o, name) for name in names}


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
        yield {"op": "query", "attribute": attribute, "of": _described(o, "place")}


def _unique_object(scene: Scene, rng: random.Random) -> Iterator[Program]:
    attribute, given = rng.choice((("color", ("size", "shape")), ("shape", ("size", "color"))))
    for o in rng.sample(scene.objects, len(scene.objects)):
        yield {"op": "query", "attribute": attribute, "of": _described(o, *given)}


def _size_of(scene: Scene, rng: random.Random) -> Iterator[Program]:
    for o in rng.sample(scene.objects, len(scene.objects)):
        yield {
            "op": "query",
            "attribute": "size",
            "of": _described(o, "shape", "color"),
        }


def _exists(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        of = _described(rng.choice(scene.objects), "shape", "color", "size")
        if rng.random() < 0.6:  # a near miss: change one attribute
            name, values = rng.choice((("shape", SHAPES), ("color", COLORS), ("size", SIZES)))
            of[name] = rng.choice(values)
        if (of["shape"], of["color"]) in HELD_OUT and not any((o.shape, o.color) in HELD_OUT for o in scene.objects):
            continue  # such a combination must not occur in text either
        yield {"op": "exists", "of": of}


def _same(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        a, b = rng.sample(scene.objects, 2)
        attribute, named = rng.choice(
            (
                ("color", ("shape",)),
                ("shape", ("color",)),
                ("size", ("shape", "color")),
                ("color", ("size", "shape")),
            )
        )
        first, second = _described(a, *named), _described(b, *named)
        if first != second:
            yield {"op": "same", "attribute": attribute, "a": first, "b": second}


def _larger(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        a, b = rng.sample(scene.objects, 2)
        yield {
            "op": "larger",
            "a": _described(a, "shape", "color"),
            "b": _described(b, "shape", "color"),
        }


def _query_same(scene: Scene, rng: random.Random) -> Iterator[Program]:
    for o in rng.sample(scene.objects, len(scene.objects)):
        for same, attribute in rng.sample(
            (
                ("shape", "color"),
                ("color", "shape"),
                ("shape", "size"),
                ("color", "size"),
            ),
            4,
        ):
            yield {
                "op": "query_same",
                "attribute": attribute,
                "same": same,
                "of": _described(o, "shape", "color"),
            }


def _all(scene: Scene, rng: random.Random) -> Iterator[Program]:
    yield from _universals("all", scene, rng)


def _some_not(scene: Scene, rng: random.Random) -> Iterator[Program]:
    yield from _universals("some_not", scene, rng)


def _universals(op: str, scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        o = rng.choice(scene.objects)
        of, are = rng.sample(("shape", "color", "size"), 2)
        if sum(getattr(other, of) == getattr(o, of) for other in scene.objects) >= 2 or rng.random() < 0.1:
            yield {"op": op, "of": _described(o, of), "are": _described(o, are)}


def _all_either(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        o, first, second = (rng.choice(scene.objects) for _ in range(3))
        of = rng.choice(("size", "shape", "color"))
        names = [name for name in ("color", "shape", "size") if name != of]
        either = [_described(first, names[0]), _described(second, names[1])]
        if sum(getattr(other, of) == getattr(o, of) for other in scene.objects) >= 2 or rng.random() < 0.1:
            yield {"op": "all_either", "of": _described(o, of), "either": either}


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
        return {name: rng.choice({"shape": SHAPES, "color": COLORS, "size": SIZES}[name])}
    return _described(rng.choice(scene.objects), name)


def _count(scene: Scene, rng: random.Random) -> Iterator[Program]:
    yield {"op": "count", "of": {}}
    while True:
        of = _single(scene, rng, ("shape", "color", "size"))
        if rng.random() < 0.3:
            of = {
                **_described(rng.choice(scene.objects), "size"),
                **_single(scene, rng, ("shape", "color")),
            }
        yield {"op": "count", "of": of}


def _count_side(scene: Scene, rng: random.Random) -> Iterator[Program]:
    for side in rng.sample(tuple(SIDES), 4):
        yield {"op": "count_side", "side": side}


def _difference(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        name = rng.choice(("shape", "color", "size"))
        first, second = rng.sample(scene.objects, 2)
        a, b = _described(first, name), _described(second, name)
        counts = [sum(matches(o, of) is True for o in scene.objects) for of in (a, b)]
        if a != b and (counts[0] != counts[1] or rng.random() < 0.2):
            yield {"op": "difference", "a": a, "b": b}


def _count_either(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        first, second = (
            _single(scene, rng, ("shape", "size")),
            _single(scene, rng, ("color",)),
        )
        yield {"op": "count_either", "either": [first, second]}


def _relation(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        a, b = rng.sample(scene.objects, 2)
        named = ("shape", "color") if rng.random() < 0.7 else ("shape",)
        yield {
            "op": "relation",
            "relation": rng.choice(RELATIONS),
            "a": _described(a, *named),
            "b": _described(b, *named),
        }


def _neighbor(scene: Scene, rng: random.Random) -> Iterator[Program]:
    attribute = rng.choice(("shape", "color", "size"))
    for o in rng.sample(scene.objects, len(scene.objects)):
        for relation in rng.sample(RELATIONS, 4):
            yield {
                "op": "neighbor",
                "attribute": attribute,
                "relation": relation,
                "of": _described(o, "shape", "color"),
            }


def _extreme(scene: Scene, rng: random.Random) -> Iterator[Program]:
    attribute = rng.choice(("shape", "color", "size"))
    for side in rng.sample(tuple(SIDES), 4):
        yield {"op": "extreme", "attribute": attribute, "side": side}


def _beyond_all(scene: Scene, rng: random.Random) -> Iterator[Program]:
    while True:
        o = rng.choice(scene.objects)
        named = ("shape", "color") if rng.random() < 0.7 else ("shape",)
        yield {
            "op": "beyond_all",
            "relation": rng.choice(RELATIONS),
            "of": _described(o, *named),
        }


_KINDS: dict[str, tuple[Kind, ...]] = {
    "coarse_perception": (_background, _most_common, _more_side),
    "fine_grained_perception": (_at_place, _unique_object, _size_of, _exists),
    "instance_reasoning": (_same, _larger, _query_same),
    "logical_reasoning": (_all, _some_not, _all_either, _and_not),
    "counting_arithmetic": (_count, _count_side, _difference, _count_either),
    "spatial_relation": (_relation, _neighbor, _extreme, _beyond_all),
}
_YES_NO = frozenset(
    [
        _exists,
        _same,
        _larger,
        _all,
        _some_not,
        _all_either,
        _and_not,
        _relation,
        _beyond_all,
    ]
)
