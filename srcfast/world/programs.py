"""Programs: questions as plain JSON, and their answers over any set of objects.

The generator calls `evaluate` over the scene, which gives the true answer; the oracle calls it over the objects
that a rationale claims, which gives the answer that the rationale leads to.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import multimode
from typing import Any

from srcfast.errors import InputError
from srcfast.world.scenes import COLUMN, ROW, Object

_STEPS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # columns and rows
RELATIONS = tuple(_STEPS)
# The outer columns and rows of the grid: (lines of the places, index of the line, phrase).
SIDES = {
    "left": (COLUMN, 0, "on the left side"),
    "right": (COLUMN, 2, "on the right side"),
    "top": (ROW, 0, "in the top row"),
    "bottom": (ROW, 2, "in the bottom row"),
}

Description = dict[str, str]  # attribute -> value; a missing attribute may have any value
Program = dict[str, Any]


class _Undetermined(Exception):
    """The objects don't determine the answer: an attribute is unknown, or a presumption is false."""


def matches(o: Object, of: Description) -> bool | None:
    """Return whether an object matches a description; None if that depends on an unknown attribute."""
    unknown = False
    for name, value in of.items():
        actual = getattr(o, name)
        if actual is None:
            unknown = True
        elif actual != value:
            return False
    return None if unknown else True


def implied_absent(of: Description, absent: Sequence[Object]) -> bool:
    """Return whether absent descriptions rule out a description: no blue object, so no blue star."""
    return any(
        all(value is None or of.get(name) == value for name, value in pattern.to_json().items()) for pattern in absent
    )


def evaluate(
    program: Program, objects: Sequence[Object], background: str | None = None, absent: Sequence[Object] = ()
) -> str | None:
    """Return the program's answer if these objects are all there are.

    Returns None if they don't determine it: it depends on an unknown attribute, or the question presumes
    something false ("the circle" if there are two). Raises InputError for a malformed program.
    """
    try:
        answer = _run(program, objects, background, absent)
    except _Undetermined:
        return None
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(field="program", expected="a question's program", found=program) from error
    return {True: "yes", False: "no"}[answer] if isinstance(answer, bool) else answer


def _run(
    program: Program, objects: Sequence[Object], background: str | None, absent: Sequence[Object]
) -> str | bool | None:
    def select(of: Description) -> list[Object]:
        selected = []
        for o in objects:
            is_match = matches(o, of)
            if is_match is None and not implied_absent(of, absent):
                raise _Undetermined
            if is_match:
                selected.append(o)
        return selected

    def the(of: Description) -> Object:
        selected = select(of)
        if len(selected) != 1:
            raise _Undetermined
        return selected[0]

    def either(options: Sequence[Description], among: Sequence[Object]) -> list[Object]:
        chosen = [select(of) for of in options]
        return [o for o in among if any(o is other for group in chosen for other in group)]

    op = program["op"]
    if op == "background":
        return background
    if op == "exists":
        return any(matches(o, program["of"]) for o in objects) or bool(select(program["of"]))
    if op == "none":
        return not any(matches(o, program["of"]) for o in objects) and not select(program["of"])
    if op == "query":
        return _value(the(program["of"]), program["attribute"])
    if op == "count":
        return str(len(select(program["of"])))
    if op == "count_either":
        return str(len(either(program["either"], select(program.get("of", {})))))
    if op == "count_not":
        chosen = select(program["of"])
        return str(len(chosen) - len(either([program["are"]], chosen)))
    if op == "count_side":
        return str(len(either([program.get("of", {})], on_side(program["side"], objects))))
    if op == "difference":
        more = len(select(program["a"])) - len(select(program["b"]))
        return str(more) if more >= 0 else None
    if op == "most_common":
        winners = multimode(_value(o, program["attribute"]) for o in objects)
        return winners[0] if len(winners) == 1 else None
    if op == "more_side":
        first, second = program["sides"]
        counts = len(on_side(first, objects)), len(on_side(second, objects))
        return None if counts[0] == counts[1] else first if counts[0] > counts[1] else second
    if op == "query_same":
        reference = the(program["of"])
        shared = _value(reference, program["same"])
        others = [o for o in select({program["same"]: shared}) if o is not reference]
        return _value(others[0], program["attribute"]) if len(others) == 1 else None
    if op in ("same", "larger", "relation"):
        a, b = the(program["a"]), the(program["b"])
        if a is b:
            return None
        if op == "same":
            return _value(a, program["attribute"]) == _value(b, program["attribute"])
        if op == "larger":
            return (_value(a, "size"), _value(b, "size")) == ("large", "small")
        return _distance(program["relation"], a) > _distance(program["relation"], b)
    if op in ("all", "some_not", "all_either"):
        chosen = select(program["of"])
        if not chosen:
            return None
        fitting = either(program["either"], chosen) if op == "all_either" else select(program["are"])
        all_fit = all(any(o is other for other in fitting) for o in chosen)
        return all_fit if op != "some_not" else not all_fit
    if op == "and_not":
        present, ruled_out = select(program["present"]), select(program["absent"])
        return bool(present) and not ruled_out
    if op in ("neighbor", "chain"):
        path = _path(program, the(program["of"]), objects)
        return None if path is None else _value(path[-1], program["attribute"])
    if op == "extreme":
        outermost = extreme_object(program["side"], objects)
        return None if outermost is None else _value(outermost, program["attribute"])
    if op == "beyond_all":
        o = the(program["of"])
        others = [other for other in objects if other is not o]
        distance = _distance(program["relation"], o)
        return all(distance > _distance(program["relation"], other) for other in others) if others else None
    if op == "both":
        return len(objects) == 2 and all(matches(o, program["of"]) is True for o in objects)
    if op == "one_each":
        if len(objects) != 2:
            return False
        # One object matches the first description alone, the other one the second alone.
        results = sorted(tuple(matches(o, of) is True for of in program["each"]) for o in objects)
        return results == [(False, True), (True, False)]
    raise InputError(field="program", expected="a known operation", found=op)


def _value(o: Object, attribute: str) -> str:
    value = getattr(o, attribute)
    if value is None:
        raise _Undetermined
    return value


def on_side(side: str, objects: Sequence[Object]) -> list[Object]:
    """Return the objects in the outer row or column of a side."""
    line, index, _ = SIDES[side]
    return [o for o in objects if line[_value(o, "place")] == index]


def _distance(relation: str, o: Object) -> int:
    """Return how far an object lies to the left or right, above or below: a is left of b if a lies further to the left."""
    columns, rows = _STEPS[relation]
    place = _value(o, "place")
    return columns * COLUMN[place] + rows * ROW[place]


def _adjacent(relation: str, o: Object, reference: Object) -> bool:
    """Return whether an object is in the next cell left of, right of, above or below `reference`."""
    place, origin = _value(o, "place"), _value(reference, "place")
    return (COLUMN[place] - COLUMN[origin], ROW[place] - ROW[origin]) == _STEPS[relation]


def _path(program: Program, reference: Object, objects: Sequence[Object]) -> list[Object] | None:
    """Return `reference` and the object directly beside it; for a chain also the one beside that. None if one is missing."""
    path = [reference]
    for relation in reversed(program["relations"]) if program["op"] == "chain" else [program["relation"]]:
        beside = next((o for o in objects if _adjacent(relation, o, path[-1]) and o is not reference), None)
        if beside is None:
            return None
        path.append(beside)
    return path


def extreme_object(side: str, objects: Sequence[Object]) -> Object | None:
    """Return the object nearest to a side; None if several are equally near."""
    line, index, _ = SIDES[side]
    distances = [abs(line[_value(o, "place")] - index) for o in objects]
    nearest = min(distances, default=0)
    return objects[distances.index(nearest)] if distances.count(nearest) == 1 else None


def must_cover(program: Program) -> list[Description]:
    """Return the descriptions that a rationale must cover, each by its objects or by their absence."""
    op = program["op"]
    if op in ("exists", "none", "count", "count_not", "all", "some_not", "all_either"):
        return [program["of"]]
    if op == "difference":
        return [program["a"], program["b"]]
    if op == "and_not":
        return [program["present"], program["absent"]]
    return [{**program.get("of", {}), **option} for option in program["either"]] if op == "count_either" else []


def relevant(program: Program, objects: Sequence[Object]) -> list[Object]:
    """Return the objects that a sufficient rationale names, in the order in which it names them.

    That is reading order, except for questions about named objects, which come first in the question's order.
    `objects` are those of a fully known scene for which the program has an answer.
    """

    def matching(*options: Description) -> list[Object]:
        return [o for o in objects if any(matches(o, of) for of in options)]

    op = program["op"]
    if op == "most_common":
        return list(objects)
    if op == "more_side":
        return [o for o in objects if any(other is o for side in program["sides"] for other in on_side(side, objects))]
    if op == "count_side":
        there = on_side(program["side"], objects)
        return [o for o in there if matches(o, program.get("of", {}))] or there
    if op in ("same", "larger", "relation"):
        return [*matching(program["a"]), *matching(program["b"])]
    if op == "query":
        return matching(program["of"])
    if op == "extreme":
        outermost = extreme_object(program["side"], objects)
        return [] if outermost is None else [outermost]
    if op in ("query_same", "neighbor", "chain", "beyond_all"):
        [reference] = matching(program["of"])
        others = [o for o in objects if o is not reference]
        if op == "query_same":
            same = reference.described(program["same"])
            return [reference, *[o for o in others if matches(o, same)]]
        if op in ("neighbor", "chain"):
            return _path(program, reference, objects) or []
        # The nearest to the side that the relation points to decides the answer.
        return [reference, max(others, key=lambda o: _distance(program["relation"], o))]
    return matching(*must_cover(program))
