"""Draw clips: three frames in which a few objects of the world move, appear or disappear; answer programs about them.

Between two frames one or two objects move by one cell, appear or disappear. An object has the same shape, color and
size in all frames, and no two objects of a clip have the same shape and color: by these two it is named. The split of
a clip is a hash of its content.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from srcfast.errors import InputError
from srcfast.world.programs import Description, Program
from srcfast.world.scenes import (
    BACKGROUNDS,
    COLORS,
    COLUMN,
    HELD_OUT,
    PLACES,
    ROW,
    SHAPES,
    SIZES,
    Object,
    Scene,
    check_split,
    scene_digest,
    share_of,
)

FRAMES = 3
MOST_OBJECTS = 4  # in a frame
SPLITS = ("base", "train", "scorer", "validation", "test")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # columns and rows

Clip = tuple[Scene, ...]
# An object's state in each frame: its place, or one of these two, or None where it is unknown.
PRESENT, ABSENT = "present", "absent"
Track = Sequence[str | None]
Tracks = Mapping[tuple[str, str], Track]  # by shape and color


def clip_from_json(frames: Any) -> Clip:
    """Read a list of frames as `Scene.to_json` writes them. Raises InputError for any other structure."""
    if not isinstance(frames, list) or len(frames) != FRAMES:
        raise InputError(field="clip", expected=f"a list of {FRAMES} frames", found=frames)
    return tuple([Scene.from_json(frame) for frame in frames])


def clip_digest(clip: Clip) -> str:
    """Return a hexadecimal hash of the clip's content, the same on every machine."""
    return hashlib.sha256("/".join([scene_digest(frame) for frame in clip]).encode()).hexdigest()


def clip_stream(split: str, seed: int) -> Iterator[Clip]:
    """Yield distinct clips of a split, without end. Raises InputError for an unknown split."""
    check_split(split, SPLITS)
    rng = random.Random(f"clips/{split}/{seed}")
    drawn: set[Clip] = set()
    while True:
        clip = _draw_clip(rng)
        if share_of(clip_digest(clip)) == split and clip not in drawn:
            drawn.add(clip)
            yield clip


def _draw_clip(rng: random.Random) -> Clip:
    """Draw a clip of two to four objects a frame from few shapes and colors, so that both repeat within it."""
    colors = rng.sample(COLORS, rng.choice((2, 3)))
    shapes = rng.sample(SHAPES, 3)
    pairs = [(shape, color) for shape in shapes for color in colors if (shape, color) not in HELD_OUT]
    rng.shuffle(pairs)
    unused = [Object(shape, color, rng.choice(SIZES)) for shape, color in pairs]
    count = rng.choice((2, 3, 3, 4))
    chosen = [unused.pop() for _ in range(count)]
    cells = rng.sample(PLACES, len(chosen))
    frames = [{o: place for o, place in zip(chosen, cells, strict=True)}]  # each object's place, by frame
    while len(frames) < FRAMES:
        frames.append(_next_frame(frames[-1], unused, rng))
    background = rng.choice(BACKGROUNDS)
    return tuple([_frame(places, background) for places in frames])


def _frame(places: Mapping[Object, str], background: str) -> Scene:
    objects = [Object(o.shape, o.color, o.size, place) for o, place in places.items()]
    return Scene(tuple(sorted(objects, key=lambda o: PLACES.index(str(o.place)))), background)


def _next_frame(before: Mapping[Object, str], unused: list[Object], rng: random.Random) -> dict[Object, str]:
    """Draw one or two changes of a frame, each of another object. An object that appears is taken from `unused`."""
    after = dict(before)
    wanted = rng.choice((1, 1, 2))
    changed: set[Object] = set()
    while len(changed) < wanted:
        change = rng.choice(("move", "move", "move", "appear", "disappear"))
        free = [place for place in PLACES if place not in after.values() and place not in before.values()]
        if change == "appear":
            if unused and len(after) < MOST_OBJECTS:
                o = unused.pop()
                after[o] = rng.choice(free)
                changed.add(o)
            continue
        o = rng.choice([o for o in after if o not in changed])
        targets = [place for place in free if direction(before[o], place) and _steps(before[o], place) == 1]
        if change == "move" and targets:
            after[o] = rng.choice(targets)
        elif change == "disappear" and len(after) > 2:
            del after[o]
        else:
            continue
        changed.add(o)
    return after


def direction(start: str | None, end: str | None) -> str | None:
    """Return in which direction a place lies from another one; None for a diagonal, the same place, or no place."""
    if start not in ROW or end not in ROW:
        return None
    columns, rows = COLUMN[end] - COLUMN[start], ROW[end] - ROW[start]
    if bool(columns) == bool(rows):
        return None
    return ("left" if columns < 0 else "right") if columns else "up" if rows < 0 else "down"


def _steps(start: str, end: str) -> int:
    """Return how many cells lie between two places, along columns and rows."""
    return abs(COLUMN[end] - COLUMN[start]) + abs(ROW[end] - ROW[start])


# --- Answers ------------------------------------------------------------------------------------------------


def tracks_of(clip: Clip) -> dict[tuple[str, str], list[str | None]]:
    """Return the places of each object of a fully known clip over the frames, in the order in which they appear."""
    tracks: dict[tuple[str, str], list[str | None]] = {}
    for index, frame in enumerate(clip):
        for o in frame.objects:
            tracks.setdefault((str(o.shape), str(o.color)), [ABSENT] * FRAMES)[index] = o.place
    return tracks


def moves(track: Track) -> list[tuple[int, int, str | None]]:
    """Return the moves between frames in which the place is known: the two frames' indices, and the direction."""
    known = [index for index, place in enumerate(track) if place in ROW]
    steps = [(i, j) for i, j in zip(known, known[1:], strict=False) if track[i] != track[j]]
    return [(i, j, direction(track[i], track[j])) for i, j in steps]


def evaluate_clip(program: Program, tracks: Tracks) -> str | None:
    """Return the program's answer over objects' tracks, which may be known in part.

    Returns None if they don't determine it, or if the question presumes something false ("the object that moves" if
    two do). Raises InputError for a malformed program.
    """
    try:
        operation = _OPERATIONS.get(program["op"])
        answer = None if operation is None else operation(program, tracks)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(field="program", expected="a question's program", found=program) from error
    if operation is None:
        raise InputError(field="program", expected="a known operation", found=program["op"])
    return {True: "yes", False: "no"}[answer] if isinstance(answer, bool) else answer


def _track(of: Description, tracks: Tracks) -> Track:
    return tracks.get((of["shape"], of["color"]), [None] * FRAMES)


def _only_step(of: Description, tracks: Tracks) -> int | None:
    """Return the index of the frame from which to the next one an object moves; None if it moves twice, or not so."""
    steps = [(start, end) for start, end, _ in moves(_track(of, tracks))]
    return steps[0][0] if len(steps) == 1 and steps[0][1] - steps[0][0] == 1 else None


def _mover(program: Program, tracks: Tracks) -> str | None:
    movers = [{"shape": shape, "color": color} for (shape, color), track in tracks.items() if moves(track)]
    return movers[0][program["attribute"]] if len(movers) == 1 else None


def _direction(program: Program, tracks: Tracks) -> str | None:
    directions = {towards for *_, towards in moves(_track(program["of"], tracks))}
    return directions.pop() if len(directions) == 1 else None


def _moves(program: Program, tracks: Tracks) -> str | None:
    start, end = (_track(program["of"], tracks)[frame - 1] for frame in program["frames"])
    return direction(start, end)


def _before(program: Program, tracks: Tracks) -> bool | None:
    a, b = (_only_step(program[name], tracks) for name in ("a", "b"))
    return None if a is None or b is None else a < b


def _toward(program: Program, tracks: Tracks) -> bool | None:
    index = _only_step(program["a"], tracks)
    if index is None:
        return None
    mover, other = _track(program["a"], tracks), _track(program["b"], tracks)
    start, end, goal = mover[index], mover[index + 1], other[index]
    if goal not in ROW or other[index + 1] not in (goal, None):
        return None
    return _steps(str(end), str(goal)) < _steps(str(start), str(goal))


def _changes(program: Program, tracks: Tracks) -> str | None:
    """Return the frame in which an object appears, or disappears: the first one with it, or without it."""
    there = [state if state in (None, ABSENT) else PRESENT for state in _track(program["of"], tracks)]
    wanted = (ABSENT, PRESENT) if program["op"] == "appears" else (PRESENT, ABSENT)
    frames = [frame for frame in range(2, FRAMES + 1) if (there[frame - 2], there[frame - 1]) == wanted]
    return str(frames[0]) if len(frames) == 1 else None


def _count_moves(program: Program, tracks: Tracks) -> str:
    return str(sum(bool(moves(track)) for track in tracks.values()))


def _where(program: Program, tracks: Tracks) -> str | None:
    place = _track(program["of"], tracks)[program["frame"] - 1]
    return place if place in ROW else None


def _more(program: Program, tracks: Tracks) -> bool:
    first, second = (
        sum(track[frame - 1] not in (None, ABSENT) for track in tracks.values()) for frame in program["frames"]
    )
    return first > second


_OPERATIONS: dict[str, Callable[[Program, Tracks], str | bool | None]] = {
    "mover": _mover,
    "direction": _direction,
    "moves": _moves,  # of claims alone: in which direction between two frames
    "before": _before,
    "toward": _toward,
    "appears": _changes,
    "disappears": _changes,
    "count_moves": _count_moves,
    "where": _where,
    "more": _more,
}
