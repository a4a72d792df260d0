"""The oracle: parses a rationale into claims, checks each against the scene, and all of them against the answer.

Perception claims ("There is ...", "There is no ...", "The background is ...") are checked against the
scene. Reasoning claims are checked twice: they must follow from the *claimed* world (what the rationale
says it sees), and must not be false of the scene. A rationale is right if all of its sentences are claims,
none is false, and together they suffice: the claimed world gives the gold answer, and leaves nothing open
that would change it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

from srcfast.data.rationale_format import ParsedResponse
from srcfast.world.judgement import Verdict, Verification, claim_text, judge_exactly, sentences_of
from srcfast.world.programs import (
    RELATIONS,
    SIDES,
    Description,
    Program,
    evaluate,
    implied_absent,
    matches,
    must_cover,
    on_side,
    relevant,
)
from srcfast.world.scenes import BACKGROUNDS, COLORS, PLACES, PLURALS, SHAPES, SIZES, VALUES, Object, Scene


@dataclass(frozen=True)
class Claim:
    """One parsed sentence: perception sets `present`, `absent` or `background`, reasoning the other fields."""

    kind: str  # "perception" or "reasoning"
    present: Object | None = None
    absent: tuple[Object, ...] = ()
    background: str | None = None
    checks: tuple[tuple[Program, str], ...] = ()  # programs, each with the answer that the claim states
    about_seen: bool = False  # about "both" or "one" of the claimed objects, so the scene alone can't decide it
    sum_of: tuple[int, int, int] | None = None  # (a, b, c): a minus b is c
    sizes: tuple[str, str, bool] | None = None  # the first size is larger than the second, or (False) is not


# --- Parsing ------------------------------------------------------------------------------------------------


def _one_of(words: Sequence[str]) -> str:
    """Build a pattern that matches one of the words, the longest first."""
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_NAMES = {name: name for name in PLURALS} | {plural: name for name, plural in PLURALS.items()}
_PHRASES = {phrase: side for side, (_, _, phrase) in SIDES.items()}
_DESCRIPTION = re.compile(
    rf"(?:(?P<size>{_one_of(SIZES)}) )?(?:(?P<color>{_one_of(COLORS)}) )?"
    rf"(?P<shape>{_one_of(list(_NAMES))})(?: at the (?P<place>{_one_of(PLACES)}))?"
)
_D, _WORD = r"([a-z ]+?)", r"([a-z ]+)"
_SIDE, _RELATION = f"({_one_of(list(_PHRASES))})", f"({_one_of(RELATIONS)})"
_ABSENT = re.compile(rf"there (?:is|are) no {_D}")
_NOTHING = re.compile(rf"there is nothing (?:at the ({_one_of(PLACES)})|{_SIDE})")
_COUNT = re.compile(rf"there (?:is|are) (\d{{1,3}}) {_D}")
_SIDE_COUNT = re.compile(rf"there (?:is|are) (\d{{1,3}}) {_D} {_SIDE}(?: and (\d{{1,3}}) {_SIDE})?")
_PRESENT = re.compile(rf"there is an? {_D}")
_BACKGROUND = re.compile(rf"the background is ({_one_of(BACKGROUNDS)})")
_ALL = re.compile(rf"(not )?all {_D} are {_D}(?: or {_WORD})?")
_COUNT_EITHER = re.compile(rf"(\d{{1,3}}) {_D} (?:is|are) {_D} or {_WORD}")
_BOTH = re.compile(rf"both are {_WORD}")
_ONE_EACH = re.compile(rf"one is {_D} and one is {_WORD}")
_MINUS = re.compile(r"(\d{1,3}) minus (\d{1,3}) is (\d{1,3})")
_LARGER = re.compile(rf"({_one_of(SIZES)}) is (not )?larger than ({_one_of(SIZES)})")
_MOST_COMMON = re.compile(r"the most common (shape|color) is ([a-z]+)")
_BEYOND_ALL = re.compile(rf"the {_D} is (not )?{_RELATION} all other objects")
_BETWEEN = re.compile(rf"the {_D} is (not |directly )?{_RELATION} the {_D}")
_EXTREME = re.compile(rf"the {_D} is the ({_one_of(tuple(SIDES))})most object")
_QUERY = re.compile(rf"the {_D} is {_WORD}")


class _NotAClaim(Exception):
    """A sentence has the form of a claim, but a phrase in it is no description."""


@lru_cache(maxsize=65536)
def parse_claim(sentence: str) -> Claim | None:
    """Parse one sentence of the rationale grammar. Returns None for any other text, and never raises."""
    text = claim_text(sentence)
    if text is None:
        return None
    try:
        return _parse_perception(text) or _parse_count(text) or _parse_conclusion(text) or _parse_relation(text)
    except _NotAClaim:
        return None


def _parse_perception(text: str) -> Claim | None:
    if match := _BACKGROUND.fullmatch(text):
        return Claim("perception", background=match[1])
    if match := _NOTHING.fullmatch(text):
        line, index, _ = SIDES[_PHRASES[match[2]]] if match[2] else (dict.fromkeys([match[1]], 0), 0, "")
        return Claim("perception", absent=tuple(Object(place=p) for p in PLACES if line.get(p) == index))
    if match := _ABSENT.fullmatch(text):
        return Claim("perception", absent=(Object(**_description(match[1])),))
    if match := _PRESENT.fullmatch(text):
        return Claim("perception", present=Object(**_description(match[1])))
    return None


def _parse_count(text: str) -> Claim | None:
    if match := _SIDE_COUNT.fullmatch(text):
        of = _description(match[2])
        counts = [(match[1], match[3])] + ([(match[4], match[5])] if match[4] else [])
        return _concludes(*[({"op": "count_side", "side": _PHRASES[side], "of": of}, n) for n, side in counts])
    if match := _COUNT.fullmatch(text):
        return _concludes(({"op": "count", "of": _description(match[2])}, match[1]))
    if match := _COUNT_EITHER.fullmatch(text):
        either = [_predicate(match[3]), _predicate(match[4])]
        return _concludes(({"op": "count_either", "of": _description(match[2]), "either": either}, match[1]))
    if match := _MINUS.fullmatch(text):
        return Claim("reasoning", sum_of=(int(match[1]), int(match[2]), int(match[3])))
    return None


def _parse_conclusion(text: str) -> Claim | None:
    if match := _ALL.fullmatch(text):
        of, are, answer = _description(match[2]), _predicate(match[3]), "no" if match[1] else "yes"
        if match[4] is None:
            return _concludes(({"op": "all", "of": of, "are": are}, answer))
        return _concludes(({"op": "all_either", "of": of, "either": [are, _predicate(match[4])]}, answer))
    if match := _BOTH.fullmatch(text):
        return _about_seen({"op": "both", "of": _predicate(match[1])})
    if match := _ONE_EACH.fullmatch(text):
        return _about_seen({"op": "one_each", "each": [_predicate(match[1]), _predicate(match[2])]})
    if match := _LARGER.fullmatch(text):
        return Claim("reasoning", sizes=(match[1], match[3], not match[2]))
    if (match := _MOST_COMMON.fullmatch(text)) and match[2] in VALUES[match[1]]:
        return _concludes(({"op": "most_common", "attribute": match[1]}, match[2]))
    return None


def _parse_relation(text: str) -> Claim | None:
    if match := _BEYOND_ALL.fullmatch(text):
        program: Program = {"op": "beyond_all", "relation": match[3], "of": _description(match[1])}
        return _concludes((program, "no" if match[2] else "yes"))
    if match := _BETWEEN.fullmatch(text):
        a, b = _description(match[1]), _description(match[4])
        if match[2] == "directly ":
            return _names({"op": "neighbor", "relation": match[3], "of": b}, a)
        program = {"op": "relation", "relation": match[3], "a": a, "b": b}
        return _concludes((program, "no" if match[2] else "yes"))
    if match := _EXTREME.fullmatch(text):
        return _names({"op": "extreme", "side": match[2]}, _description(match[1]))
    if match := _QUERY.fullmatch(text):
        return _names({"op": "query", "of": _description(match[1])}, _predicate(match[2]))
    return None


def _concludes(*checks: tuple[Program, str]) -> Claim:
    return Claim("reasoning", checks=checks)


def _about_seen(program: Program) -> Claim:
    return Claim("reasoning", checks=((program, "yes"),), about_seen=True)


def _names(program: Program, of: Description) -> Claim | None:
    """Build the claim that the object which a program selects has each attribute of a description."""
    return _concludes(*[({**program, "attribute": name}, value) for name, value in of.items()]) if of else None


def _description(phrase: str) -> Description:
    """Parse a description: "red circles", "object at the top". Raises _NotAClaim for any other text."""
    match = _DESCRIPTION.fullmatch(phrase)
    if match is None:
        raise _NotAClaim
    of = {name: value for name, value in match.groupdict().items() if value is not None}
    of["shape"] = _NAMES[of["shape"]]
    if of["shape"] == "object":
        del of["shape"]
    return of


def _predicate(phrase: str) -> Description:
    """Parse one attribute: "red", "large", "a circle", "circles". Raises _NotAClaim for any other text."""
    if phrase in COLORS:
        return {"color": phrase}
    if phrase in SIZES:
        return {"size": phrase}
    shape = _NAMES.get(phrase.removeprefix("a "))
    if shape not in SHAPES:
        raise _NotAClaim
    return {"shape": shape}


# --- Verification -------------------------------------------------------------------------------------------


def verify(response: ParsedResponse, program: Program, scene: Scene | dict[str, Any], gold: str) -> Verification:
    """Verify one response to a question.

    Args:
        response: sentences of perception and of reasoning (a claim may be in either list), and the stated
            answer, None for a response that did not parse.
        program: the question's program.
        scene: the truth, as `Scene` or its JSON. Claims about attributes that it leaves unknown are
            unverifiable, which doesn't make the rationale wrong.
        gold: the right answer.

    Raises:
        InputError: the program or the scene is malformed. No response text raises.
    """
    scene = scene if isinstance(scene, Scene) else Scene.from_json(scene)
    parsed = [parse_claim(sentence) for sentence in sentences_of(response)]
    claims = [claim for claim in parsed if claim is not None]
    world = claimed_world(claims, one_object=len(scene.objects) == 1)
    counts = {int(n) for claim in claims for check, n in claim.checks if check["op"].startswith("count")}
    verdicts = [Verdict() if claim is None else _verdict(claim, world, counts, scene) for claim in parsed]
    derived = evaluate(program, world.objects, world.background, world.absent)
    return judge_exactly(
        response, verdicts, derived, gold, lambda: _suffices(program, world, claims, scene, str(derived))
    )


def _verdict(claim: Claim, world: Scene, counts: set[int], scene: Scene) -> Verdict:
    if claim.kind == "perception":
        return Verdict("perception", seen(claim, scene))
    follows = _follows(claim, world, counts)
    return Verdict("reasoning", _in_scene(claim, scene) if follows else "false", follows)


def is_true(sentence: str, scene: Scene) -> bool | None:
    """Return whether a sentence is true of a scene; None if it doesn't parse, or if it alone doesn't decide that."""
    claim = parse_claim(sentence)
    if claim is None or claim.about_seen or (claim.kind == "reasoning" and not claim.checks):
        return None
    verdict = seen(claim, scene) if claim.kind == "perception" else _in_scene(claim, scene)
    return None if verdict == "unverifiable" else verdict == "true"


def claimed_world(claims: Sequence[Claim], one_object: bool = False) -> Scene:
    """Build the scene that the claims describe; two claims about the same object give one object.

    Claims are about the same object if they agree and both name shape and color, or if one has all that the
    other says; in an image of one object, if they agree.
    """
    objects: list[Object] = []
    absent: list[Object] = []
    background = None
    for claim in claims:
        background = claim.background or background
        absent += claim.absent
        if claim.present is not None:
            new = claim.present
            index = next((i for i, old in enumerate(objects) if _same_object(old, new, one_object)), None)
            if index is None:
                objects.append(new)
            else:
                objects[index] = Object(**{**new.to_json(), **objects[index].described()})
    return Scene(tuple(objects), background, tuple(absent))


def _same_object(a: Object, b: Object, one_object: bool) -> bool:
    first, second = a.described(), b.described()
    shared = first.keys() & second.keys()
    if any(first[name] != second[name] for name in shared):
        return False
    return one_object or {"shape", "color"} <= shared or len(shared) == min(len(first), len(second))


def seen(claim: Claim, scene: Scene) -> str:
    """Return the verdict on a perception claim: true, false or unverifiable."""
    if claim.background is not None:
        if scene.background is None:
            return "unverifiable"
        return "true" if claim.background == scene.background else "false"
    if claim.present is not None:
        return _exists(claim.present.described(), scene)
    verdicts = [_exists(o.described(), scene) for o in claim.absent]
    return "false" if "true" in verdicts else "unverifiable" if "unverifiable" in verdicts else "true"


def _exists(of: Description, scene: Scene) -> str:
    """Return the verdict on the claim that some object matches a description."""
    results = [matches(o, of) for o in scene.objects]
    if True in results:
        return "true"
    return "unverifiable" if None in results and not implied_absent(of, scene.absent) else "false"


def _follows(claim: Claim, world: Scene, counts: set[int]) -> bool:
    """Return whether a reasoning claim follows from the claimed world, if that is all there is."""
    if claim.sum_of is not None:
        a, b, difference = claim.sum_of
        return a - b == difference and {a, b} <= counts
    if claim.sizes is not None:
        first, second, larger = claim.sizes
        sizes = [o.size for o in world.objects]
        both_present = sizes.count(first) >= (2 if first == second else 1) and second in sizes
        return both_present and larger == ((first, second) == ("large", "small"))
    return all(
        evaluate(check, world.objects, world.background, world.absent) == expected for check, expected in claim.checks
    )


def _in_scene(claim: Claim, scene: Scene) -> str:
    """Return the verdict on a reasoning claim that follows from the claimed world: whether it is true of the scene as well."""
    if claim.about_seen or not claim.checks:
        return "true"
    answers = [evaluate(check, scene.objects, scene.background, scene.absent) for check, _ in claim.checks]
    if all(answer == expected for answer, (_, expected) in zip(answers, claim.checks, strict=True)):
        return "true"
    return "unverifiable" if None in answers and not _fully_known(scene) else "false"


def _fully_known(scene: Scene) -> bool:
    return all(None not in o.to_json().values() for o in scene.objects)


# --- Sufficiency --------------------------------------------------------------------------------------------

_COMPARISONS = frozenset(["most_common", "more_side"])
_COUNTS = frozenset(["count", "count_either", "count_not", "count_side", "difference"])
_UNIVERSALS = frozenset(["all", "some_not", "all_either"])
# These presume that a description matches one object alone, so a further object can't change the answer.
_PRESUMING = frozenset(["background", "query", "same", "larger", "query_same", "relation", "neighbor", "chain"])


def _suffices(program: Program, world: Scene, claims: Sequence[Claim], scene: Scene, answer: str) -> bool:
    """Return whether true claims whose world gives the gold answer leave nothing open that would change it.

    Counting and comparing need every relevant object. Universals need every relevant object or a closing
    claim. The others must rule out any further object that would give another answer ("There is no red
    star.").
    """
    op = program["op"]
    if op in _PRESUMING or not _fully_known(scene) or len(scene.objects) == 1:
        return True
    named = {(o.shape, o.color) for o in world.objects}
    needed = relevant(program, scene.objects)
    covered = all((o.shape, o.color) in named for o in needed)
    if op in _COMPARISONS:
        return covered
    if op in _COUNTS:
        groups = [any(matches(o, of) for o in scene.objects) for of in must_cover(program)]
        if op == "count_side":
            groups = [bool(on_side(program["side"], scene.objects))]
        return covered and (all(groups) or _closed(program, world, claims, answer))
    return (op in _UNIVERSALS and covered) or _closed(program, world, claims, answer)


def _closed(program: Program, world: Scene, claims: Sequence[Claim], answer: str) -> bool:
    """Return whether no single further object that the claims allow would change the answer.

    Shapes and colors that neither program nor claims mention give equal results, so one of each is tried.
    """
    mentioned = set(re.findall(r"[a-z]+", f"{program} {claims}"))
    occupied = {o.place for o in world.objects}
    named = {(o.shape, o.color) for o in world.objects}
    shapes, colors = _representatives(SHAPES, mentioned), _representatives(COLORS, mentioned)
    for shape, color, size, place in product(shapes, colors, SIZES, PLACES):
        if (shape, color) not in named and place not in occupied:
            extra = Object(shape, color, size, place)
            changed = evaluate(program, (*world.objects, extra), world.background)
            if changed not in (None, answer) and _allowed(extra, world, claims):
                return False
    return True


def _representatives(values: Sequence[str], mentioned: set[str]) -> list[str]:
    """Return the mentioned values, and one of the others for all of them."""
    unmentioned = [value for value in values if value not in mentioned]
    return [value for value in values if value in mentioned] + unmentioned[:1]


def _allowed(extra: Object, world: Scene, claims: Sequence[Claim]) -> bool:
    """Return whether every claim is still true with `extra` added to the world."""
    if any(matches(extra, pattern.described()) for pattern in world.absent):
        return False
    objects = (*world.objects, extra)
    return all(
        evaluate(check, objects, world.background) == expected
        for claim in claims
        if not claim.about_seen
        for check, expected in claim.checks
    )
