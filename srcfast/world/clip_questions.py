"""Draw questions about a clip, with answers balanced within each kind; write true rationales and facts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import permutations

from srcfast.world.clips import (
    ABSENT,
    FRAMES,
    Clip,
    Track,
    Tracks,
    evaluate_clip,
    moves,
    tracks_of,
)
from srcfast.world.programs import Program
from srcfast.world.questions import Question, noun, propose, with_article

MOST_SEEN = 6  # sentences of what is seen where objects or moves are counted: with more, a rationale gets long
ORDINALS = {1: "first", 2: "second", 3: "last"}  # of the frames

Key = tuple[str, str]  # shape and color


def name_of(key: Key) -> str:
    """Write an object's name: "red star"."""
    return noun({"shape": key[0], "color": key[1]})


def clip_question_text(program: Program, wording: int = 0) -> str:
    """Write a program as a question. Raises KeyError for an operation that none asks."""
    fields = {name: noun(program[name]) for name in ("of", "a", "b") if name in program}
    frames = program.get("frames", [program.get("frame")])
    ordinals = [ORDINALS.get(frame) for frame in frames]
    return _WORDINGS[program["op"]][wording].format(*ordinals, attribute=program.get("attribute"), **fields)


# By operation, its wordings.
_WORDINGS = {
    "mover": ("What {attribute} is the object that moves?",),
    "direction": ("In which direction does the {of} move?", "Which way does the {of} move?"),
    "toward": ("Does the {a} move toward the {b}?",),
    "count_moves": ("How many objects move?",),
    "before": ("Does the {a} move before the {b}?",),
    "appears": ("In which frame does the {of} appear?", "What is the first frame with the {of}?"),
    "disappears": ("In which frame does the {of} disappear?", "What is the first frame without the {of}?"),
    "where": ("Where is the {of} in the {0} frame?",),
    "more": ("Are there more objects in the {0} frame than in the {1} frame?",),
}
# The ability that each kind of question tests. A kind has the name of its operation.
KINDS = {
    "mover": "motion",
    "direction": "motion",
    "toward": "motion",
    "count_moves": "motion",
    "before": "order",
    "appears": "order",
    "disappears": "order",
    "where": "frames",
    "more": "frames",
}
_YES_NO = frozenset(["toward", "before", "more"])


def ask_clip(clip: Clip, rng: random.Random, kinds: Sequence[str] = tuple(KINDS), n: int = 3) -> list[Question]:
    """Draw up to `n` questions about a clip, of the first kinds for which it has one."""
    tracks = tracks_of(clip)
    questions: list[Question] = []
    for kind in kinds:
        if len(questions) == n:
            break
        proposals = _programs(kind, tracks, rng)
        proposal = propose(proposals, partial(evaluate_clip, tracks=tracks), kind in _YES_NO, rng)
        if proposal is not None:
            program, answer = proposal
            text = clip_question_text(program, rng.randrange(len(_WORDINGS[kind])))
            questions.append(Question(text, KINDS[kind], kind, program, answer))
    return questions


def _programs(kind: str, tracks: Tracks, rng: random.Random) -> Iterator[Program]:
    """Yield random programs of a kind; some have no answer."""
    keys = rng.sample(list(tracks), len(tracks))
    named = [{"shape": shape, "color": color} for shape, color in keys]
    if kind == "mover":
        for attribute in rng.sample(("color", "shape"), 2):
            yield {"op": kind, "attribute": attribute}
    elif kind in ("toward", "before"):
        for _ in range(24):
            a, b = rng.sample(named, 2)
            yield {"op": kind, "a": a, "b": b}
    elif kind == "count_moves":
        if len(_seen_of_moves(tracks)) <= MOST_SEEN:
            yield {"op": kind}
    elif kind == "where":
        for of in named:
            yield {"op": kind, "of": of, "frame": rng.randint(1, FRAMES)}
    elif kind == "more":
        counts = [sum(track[index] != ABSENT for track in tracks.values()) for index in range(FRAMES)]
        for first, second in rng.sample(list(permutations(range(FRAMES), 2)), 6):
            is_even = counts[first] == counts[second]  # in so many pairs that they would make "no" a good guess
            if counts[first] + counts[second] <= MOST_SEEN and (not is_even or rng.random() < 0.2):
                yield {"op": kind, "frames": [first + 1, second + 1]}
    else:
        for of in named:
            yield {"op": kind, "of": of}


# --- True rationales ----------------------------------------------------------------------------------------


def clip_rationale(clip: Clip, question: Question) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Build the sentences of what is seen and of what is concluded: the fewest that suffice for the answer."""
    tracks, program = tracks_of(clip), question.program
    op, answer = program["op"], question.answer
    keys = [(program[name]["shape"], program[name]["color"]) for name in ("of", "a", "b") if name in program]
    if op == "mover":
        keys = [key for key, track in tracks.items() if moves(track)]
    see: list[str] = []
    think: list[str] = []
    if op in ("mover", "direction", "before", "toward"):
        for key in keys[:1] if op == "toward" else keys:
            start, end, way = moves(tracks[key])[0]
            see += [_there_is(key, index, tracks[key][index]) for index in (start, end)]
            think.append(f"The {name_of(key)} moves {way} between frame {start + 1} and frame {end + 1}.")
        if op == "toward":
            see.append(_there_is(keys[1], start, tracks[keys[1]][start]))
            way = "toward" if answer == "yes" else "away from"
            think.append(f"The {name_of(keys[0])} moves {way} the {name_of(keys[1])}.")
    elif op in ("appears", "disappears"):
        without, frame = f"there is no {name_of(keys[0])}.", int(answer)
        with_it = f"there is {with_article(name_of(keys[0]))}."
        order = (without, with_it) if op == "appears" else (with_it, without)
        see = [f"In frame {frame - 1}, {order[0]}", f"In frame {frame}, {order[1]}"]
        think = [f"The {name_of(keys[0])} {op} in frame {frame}."]
    elif op == "count_moves":
        see = _seen_of_moves(tracks)
        think = [f"{answer} object{'' if answer == '1' else 's'} move{'s' if answer == '1' else ''}."]
    elif op == "where":
        index = program["frame"] - 1
        see = [_there_is(keys[0], index, tracks[keys[0]][index])]
    else:
        for frame in sorted(program["frames"]):
            present = [key for key, track in tracks.items() if track[frame - 1] != ABSENT]
            see += [_there_is(key, frame - 1) for key in present]
            amount = f"{'is' if len(present) == 1 else 'are'} {len(present)} {noun({}, plural=len(present) != 1)}"
            think.append(f"In frame {frame}, there {amount}.")
    return tuple(see), tuple(think)


def _there_is(key: Key, index: int, place: str | None = None) -> str:
    """Write that an object is in the frame of this index, at a place if there is one."""
    at = "" if place is None else f" at the {place}"
    return f"In frame {index + 1}, there is {with_article(name_of(key))}{at}."


def _seen_of_moves(tracks: Tracks) -> list[str]:
    """Write for each object its first move, or that it stays, or its places in the frames that have it."""
    see: list[str] = []
    for key, track in tracks.items():
        if ABSENT not in track and not moves(track):
            see.append(f"The {name_of(key)} stays at the {track[0]}.")
        else:
            see += [_there_is(key, index, track[index]) for index in _decisive(track)]
    return see


def _decisive(track: Track) -> list[int]:
    """Return the indices of the frames that show that an object moves, or, of one that doesn't, of all that have it."""
    if steps := moves(track):
        return [steps[0][0], steps[0][1]]
    return [index for index, place in enumerate(track) if place != ABSENT]


def clip_facts(clip: Clip) -> tuple[str, ...]:
    """Write everything known of a clip: the objects of each frame in reading order, then those of the clip that it lacks."""
    tracks = tracks_of(clip)
    sentences: list[str] = []
    for index, frame in enumerate(clip):
        sentences += [f"In frame {index + 1}, there is {with_article(noun(o))}." for o in frame.objects]
        lacking = [key for key, track in tracks.items() if track[index] == ABSENT]
        sentences += [f"In frame {index + 1}, there is no {name_of(key)}." for key in lacking]
    return tuple(sentences)
