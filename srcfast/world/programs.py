"""Programs over objects: what a question asks, as plain JSON, and its answer over any set of objects.

One function, `evaluate`, serves the generator (over the scene: the truth) and the oracle (over what a
rationale claims to see: what it leads to).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from srcfast.errors import InputError
from srcfast.world.scenes import COLUMN, ROW, Object

RELATIONS = ("left of", "right of", "above", "below")
# The outer columns and rows of the grid: (lines of the places, index of the line, phrase).
SIDES = {
    "left": (COLUMN, 0, "on the left side"),
    "right": (COLUMN, 2, "on the right side"),
    "top": (ROW, 0, "in the top row"),
    "bottom": (ROW, 2, "in the bottom row"),
}

Description = dict[str, str]  # attribute -> value; what it leaves out is open
Program = dict[str, Any]


class _Undetermined(Exception):
    """The objects don't settle the answer: an attribute is unknown, or a presumption doesn't hold."""


def matches(o: Object, of: Description) -> bool | None:
    """Whether an object meets a description; None where an attribute that decides it is unknown."""
    unknown = False
    for name, value in of.items():
        found = getattr(o, name)
        if found is None:
            unknown = True
        elif found != value:
            return False
    return None if unknown else True


def implied_absent(of: Description, absent: Sequence[Object]) -> bool:
    """Whether a description is ruled out by one that no object meets: no blue object, so no blue star."""
    return any(
        all(value is None or of.get(name) == value for name, value in pattern.to_json().items()) for pattern in absent
    )


def evaluate(
    program: Program,
    objects: Sequence[Object],
    background: str | None = None,
    absent: Sequence[Object] = (),
) -> str | None:
    """The program's answer over these objects, taken as all that there are.

    None where they don't settle it: an unknown attribute decides, or the question presumes what isn't so
    ("the circle" where there are two). Raises InputError for a program of another structure.
    """
    try:
        answer = _run(program, objects, background, absent)
    except _Undetermined:
        return None
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(field="program", expected="a question's program", found=program) from error
    return {True: "yes", False: "no"}[answer] if isinstance(answer, bool) else answer


def _run(
    program: Program,
    objects: Sequence[Object],
    background: str | None,
    absent: Sequence[Object],
) -> str | bool | None:
    def select(of: Description) -> list[Object]:
        found = []
        for o in objects:
            met = matches(o, of)
            if met is None and not implied_absent(of, absent):
                raise _Undetermined
            if met:
                found.append(o)
        return found

    def the(of: Description) -> Object:
        found = select(of)
        if len(found) != 1:
            raise _Undetermined
        return found[0]

    def either(options: Sequence[Description], among: Sequence[Object]) -> list[Object]:
        chosen = [select(of) for of in options]
        return [o for o in among if any(o is one for group in chosen for one in group)]

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
        return str(len(either(program["either"], objects)))
    if op == "count_side":
        return str(len(on_side(program["side"], objects)))
    if op == "difference":
        more = len(select(program["a"])) - len(select(program["b"]))
        return str(more) if more >= 0 else None
    if op == "most_common":
        tally: dict[str, int] = {}
        for o in objects:
            value = _value(o, program["attribute"])
            tally[value] = tally.get(value, 0) + 1
        top = max(tally.values(), default=0)
        winners = [value for value, count in tally.items() if count == top]
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
        return _holds(program["relation"], a, b)
    if op in ("all", "some_not", "all_either"):
        chosen = select(program["of"])
        if not chosen:
            return None
        met = either(program["either"], chosen) if op == "all_either" else select(program["are"])
        every = all(any(o is one for one in met) for o in chosen)
        return every if op != "some_not" else not every
    if op == "and_not":
        present, ruled_out = select(program["present"]), select(program["absent"])
        return bool(present) and not ruled_out
    if op == "neighbor":
        place = _value(the(program["of"]), "place")
        for o in objects:
            if _adjacent(program["relation"], _value(o, "place"), place):
                return _value(o, program["attribute"])
        return None
    if op == "extreme":
        outermost = extreme_object(program["side"], objects)
        return None if outermost is None else _value(outermost, program["attribute"])
    if op == "beyond_all":
        o = the(program["of"])
        others = [other for other in objects if other is not o]
        return all(_holds(program["relation"], o, other) for other in others) if others else None
    if op == "both":
        return len(objects) == 2 and all(matches(o, program["of"]) is True for o in objects)
    if op == "one_each":
        if len(objects) != 2:
            return False
        (a_first, b_first), (a_second, b_second) = ([matches(o, of) is True for o in objects] for of in program["each"])
        return (a_first and b_second and not a_second and not b_first) or (
            a_second and b_first and not a_first and not b_second
        )
    raise InputError(field="program", expected="a known operation", found=op)


def _value(o: Object, attribute: str) -> str:
    value = getattr(o, attribute)
    if value is None:
        raise _Undetermined
    return value


def on_side(side: str, objects: Sequence[Object]) -> list[Object]:
    """The objects in the outer row or column that a side names."""
    line, index, _ = SIDES[side]
    return [o for o in objects if line[_value(o, "place")] == index]


def _holds(relation: str, a: Object, b: Object) -> bool:
    """Whether a is left of, right of, above or below b: by column or row, so neither within the same one."""
    line = COLUMN if relation in ("left of", "right of") else ROW
    first, second = line[_value(a, "place")], line[_value(b, "place")]
    return first < second if relation in ("left of", "above") else first > second


def _adjacent(relation: str, place: str, reference: str) -> bool:
    """Whether a place is the next cell left of, right of, above or below another."""
    columns, rows = COLUMN[place] - COLUMN[reference], ROW[place] - ROW[reference]
    return (columns, rows) == {
        "left of": (-1, 0),
        "right of": (1, 0),
        "above": (0, -1),
        "below": (0, 1),
    }[relation]


def extreme_object(side: str, objects: Sequence[Object]) -> Object | None:
    """The one object that lies furthest towards a side, or None where several do."""
    line, index, _ = SIDES[side]
    distances = [abs(line[_value(o, "place")] - index) for o in objects]
    nearest = min(distances, default=0)
    return objects[distances.index(nearest)] if distances.count(nearest) == 1 else None


def must_cover(program: Program) -> list[Description]:
    """The descriptions that a rationale must account for: by the objects that meet each, or their absence."""
    op = program["op"]
    if op in ("exists", "none", "count", "all", "some_not", "all_either"):
        return [program["of"]]
    if op == "difference":
        return [program["a"], program["b"]]
    if op == "and_not":
        return [program["present"], program["absent"]]
    return program["either"] if op == "count_either" else []


def relevant(program: Program, objects: Sequence[Object]) -> list[Object]:
    """The objects that a sufficient rationale looks at, in the order in which it tells them.

    Reading order, but for questions about named objects: those first, as the question names them. `objects`
    are those of a known scene for which the program has an answer.
    """

    def meeting(*options: Description) -> list[Object]:
        return [o for o in objects if any(matches(o, of) for of in options)]

    op = program["op"]
    if op == "most_common":
        return list(objects)
    if op == "more_side":
        return [o for o in objects if any(one is o for side in program["sides"] for one in on_side(side, objects))]
    if op == "count_side":
        return on_side(program["side"], objects)
    if op in ("same", "larger", "relation"):
        return [*meeting(program["a"]), *meeting(program["b"])]
    if op == "and_not":
        return meeting(program["present"], program["absent"])
    if op in ("exists", "none", "query"):
        return meeting(program["of"])
    if op == "query_same":
        [reference] = meeting(program["of"])
        return [
            reference,
            *[o for o in meeting({program["same"]: getattr(reference, program["same"])}) if o is not reference],
        ]
    if op == "neighbor":
        [reference] = meeting(program["of"])
        return [
            reference,
            *[o for o in objects if _adjacent(program["relation"], str(o.place), str(reference.place))],
        ]
    if op == "extreme":
        found = extreme_object(program["side"], objects)
        return [] if found is None else [found]
    if op == "beyond_all":
        [reference] = meeting(program["of"])
        others = [o for o in objects if o is not reference]
        return [reference, min(others, key=lambda o: _beyond(program["relation"], o))]
    return meeting(*must_cover(program))


def _beyond(relation: str, o: Object) -> int:
    """How far an object lies from the side that a relation points to; the nearest is the rival."""
    line = COLUMN if relation in ("left of", "right of") else ROW
    position = line[str(o.place)]
    return position if relation in ("left of", "above") else -position
