"""Build true rationales: what must be seen to answer a question, and what follows from it, in short sentences.

The grammar is small, so that `oracle.parse_claim` parses every sentence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from srcfast.errors import InputError
from srcfast.world.programs import SIDES, Description, Program, matches, must_cover, on_side, relevant
from srcfast.world.questions import Question, noun, predicate, with_article
from srcfast.world.scenes import PLACES, VALUES, Object, Scene


def true_rationale(scene: Scene, question: Question) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Build the sentences of what is seen and of what is concluded: the fewest that suffice for the answer."""
    program = question.program
    seen = relevant(program, scene.objects)
    see = [f"There is {with_article(noun(o))}." for o in seen]
    if program["op"] == "background":
        see = [f"The background is {scene.background}."]
    for of in must_cover(program):
        if not any(matches(o, of) for o in scene.objects):
            see.append(f"There is no {noun(of)}.")
    if program["op"] == "count_side" and not seen:
        see = [f"There is nothing {SIDES[program['side']][2]}."]
    return tuple(see), tuple(_conclusions(scene, program, question.answer, seen))


def _conclusions(scene: Scene, program: Program, answer: str, seen: Sequence[Object]) -> list[str]:
    op, p = program["op"], program
    yes = answer == "yes"
    if op in ("background", "exists", "none"):
        return []
    if op == "query":
        return [f"The {noun(p['of'])} is {predicate({p['attribute']: answer})}."]
    if op == "most_common":
        return [_count_sentence(scene, {p["attribute"]: answer}), f"The most common {p['attribute']} is {answer}."]
    if op == "more_side":
        first, second = p["sides"]
        amount = _amount(len(on_side(first, scene.objects)), {})
        return [f"There {amount} {SIDES[first][2]} and {len(on_side(second, scene.objects))} {SIDES[second][2]}."]
    if op == "same":
        a, b = (getattr(o, p["attribute"]) for o in seen)
        if yes:
            return [f"Both are {predicate({p['attribute']: a}, plural=True)}."]
        first, second = (predicate({p["attribute"]: value}) for value in (a, b))
        return [f"One is {first} and one is {second}."]
    if op == "larger":
        a, b = (str(o.size) for o in seen)
        return [f"{a.capitalize()} is {'' if yes else 'not '}larger than {b}."]
    if op == "query_same":
        return [f"Both are {predicate({p['same']: getattr(seen[0], p['same'])}, plural=True)}."]
    if op in ("all", "some_not"):
        is_universal = yes if op == "all" else not yes
        of, are = noun(p["of"], plural=True), predicate(p["are"], plural=True)
        return [f"{'All' if is_universal else 'Not all'} {of} are {are}."]
    if op == "all_either":
        first, second = (predicate(of, plural=True) for of in p["either"])
        return [f"{'All' if yes else 'Not all'} {noun(p['of'], plural=True)} are {first} or {second}."]
    if op == "and_not":
        return [_count_sentence(scene, p["present"]), _count_sentence(scene, p["absent"])]
    if op == "count":
        return [_count_sentence(scene, p["of"])]
    if op == "count_side":
        return [f"There {_amount(int(answer), p.get('of', {}))} {SIDES[p['side']][2]}."]
    if op == "difference":
        counts = [_count_sentence(scene, p["a"]), _count_sentence(scene, p["b"])]
        return [*counts, f"{_count(scene, p['a'])} minus {_count(scene, p['b'])} is {answer}."]
    if op == "count_not":
        of, both = p["of"], p["of"] | p["are"]
        counts = [_count_sentence(scene, of), _count_sentence(scene, both)]
        return [*counts, f"{_count(scene, of)} minus {_count(scene, both)} is {answer}."]
    if op == "count_either":
        singular = answer == "1"
        first, second = (predicate(of, plural=not singular) for of in p["either"])
        name = noun(p.get("of", {}), plural=not singular)
        return [f"{answer} {name} {'is' if singular else 'are'} {first} or {second}."]
    if op == "relation":
        return [f"The {noun(p['a'])} is {'' if yes else 'not '}{p['relation']} the {noun(p['b'])}."]
    if op in ("neighbor", "chain"):
        names = [noun(o.described("shape", "color")) for o in seen]
        relations = reversed(p["relations"]) if op == "chain" else [p["relation"]]
        steps = zip(names[1:], relations, names[:-1], strict=True)
        return [f"The {other} is directly {relation} the {reference}." for other, relation, reference in steps]
    if op == "extreme":
        [o] = seen
        return [f"The {noun(o.described('shape', 'color'))} is the {p['side']}most object."]
    if op == "beyond_all":
        return [f"The {noun(p['of'])} is {'' if yes else 'not '}{p['relation']} all other objects."]
    raise InputError(field="program", expected="a known operation", found=op)


def _amount(count: int, of: Description) -> str:
    return f"{'is' if count == 1 else 'are'} {count} {noun(of, plural=count != 1)}"


def _count(scene: Scene, of: Description) -> int:
    return sum(matches(o, of) is True for o in scene.objects)


def _count_sentence(scene: Scene, of: Description) -> str:
    return f"There {_amount(_count(scene, of), of)}."


def facts(scene: Scene) -> tuple[str, ...]:
    """Write everything known of a scene: objects in reading order, absences, background and number of objects."""
    sentences = [f"There is {with_article(noun(o))}." for o in scene.objects]
    sentences += [f"There is no {noun(o)}." for o in scene.absent]
    if scene.background is not None:
        sentences += [f"The background is {scene.background}.", _count_sentence(scene, {})]
    return tuple(sentences)


def describe(scene: Scene) -> str:
    """Write a dense caption: the facts in one text."""
    return " ".join(facts(scene))


def perception_questions(scene: Scene, rng: random.Random, n: int) -> list[tuple[str, str]]:
    """Draw `n` questions with dense answers for training a base model to see: what is where, and where is what."""
    return [_perception_question(scene, rng) for _ in range(n)]


def _perception_question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    draw = rng.random()
    if draw < 0.6:  # all objects of a description, which rationales begin with
        names = rng.choice(
            (("shape",), ("color",), ("size",), ("shape", "color"), ("size", "shape"), ("size", "color"))
        )
        of = rng.choice(scene.objects).described(*names)
        if rng.random() < 0.15:  # a value that may have no objects
            of[names[0]] = rng.choice(VALUES[names[0]])
        return f"List the {noun(of, plural=True)}.", _listing([o for o in scene.objects if matches(o, of)], noun(of))
    if draw < 0.75:
        side = rng.choice(tuple(SIDES))
        return f"What is {SIDES[side][2]}?", _listing(on_side(side, scene.objects), "object")
    if draw < 0.9:
        place = rng.choice(scene.objects).place if rng.random() < 0.7 else rng.choice(PLACES)
        return f"What is at the {place}?", _listing([o for o in scene.objects if o.place == place], "object")
    o = rng.choice(scene.objects)
    return f"Where is the {noun(o.described('shape', 'color'))}?", f"At the {o.place}."


def _listing(objects: Sequence[Object], name: str) -> str:
    """List objects in sentences of the rationale grammar; for none "There is no red circle."."""
    if not objects:
        return f"There is no {name}."
    return " ".join(f"There is {with_article(noun(o))}." for o in objects)
