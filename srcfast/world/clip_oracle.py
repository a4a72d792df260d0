"""The oracle of clips: parses a rationale into claims about frames and moves, and checks them as that of scenes does.

"In frame 2, ..." followed by a claim about a scene is a claim about that frame. "The red star stays at the top." says
what is seen in all frames. Claims about moves, appearances and numbers of moves are reasoning: they must follow from
the claimed frames, and must not be false of the clip.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from srcfast.data.rationale_format import ParsedResponse
from srcfast.world.clips import (
    ABSENT,
    DIRECTIONS,
    FRAMES,
    PRESENT,
    Clip,
    Tracks,
    clip_from_json,
    evaluate_clip,
    moves,
    tracks_of,
)
from srcfast.world.judgement import Verdict, Verification, claim_text, judge_exactly, sentences_of
from srcfast.world.oracle import Claim, claimed_world, parse_claim, seen
from srcfast.world.programs import Program, evaluate, implied_absent
from srcfast.world.scenes import PLACES, Scene


@dataclass(frozen=True)
class ClipClaim:
    """One parsed sentence: what is seen in which frames, or programs with the answers that the claim states."""

    perceived: tuple[tuple[int, Claim], ...] = ()  # frames' indices, each with a perception claim about that frame
    frame: int | None = None  # the index of the frame that the programs are about; None: about the clip
    checks: tuple[tuple[Program, str], ...] = ()


_FRAME = f"frame ([1-{FRAMES}])"
_IN_FRAME = re.compile(rf"in {_FRAME}, (.*)")
_STAYS = re.compile(rf"the ([a-z ]+?) stays at the ({'|'.join(sorted(PLACES, key=len, reverse=True))})")
_MOVES = re.compile(rf"the ([a-z ]+?) moves ({'|'.join(DIRECTIONS)}) between {_FRAME} and {_FRAME}")
_TOWARD = re.compile(r"the ([a-z ]+?) moves (toward|away from) the ([a-z ]+)")
_CHANGES = re.compile(rf"the ([a-z ]+?) (appears|disappears) in {_FRAME}")
_COUNT_MOVES = re.compile(r"(\d{1,3}) objects? moves?")


@lru_cache(maxsize=65536)
def parse_clip_claim(sentence: str) -> ClipClaim | None:
    """Parse one sentence of the rationale grammar of clips. Returns None for any other text, and never raises."""
    text = claim_text(sentence)
    if text is None:
        return None
    if match := _IN_FRAME.fullmatch(text):
        claim, index = parse_claim(match[2]), int(match[1]) - 1
        if claim is None or claim.background is not None:
            return None
        if claim.kind == "perception":
            return ClipClaim(((index, claim),))
        return ClipClaim((), index, claim.checks) if claim.checks and not claim.about_seen else None
    if match := _STAYS.fullmatch(text):
        claim = parse_claim(f"there is a {match[1]} at the {match[2]}")
        return None if claim is None else ClipClaim(tuple([(index, claim) for index in range(FRAMES)]))
    if match := _MOVES.fullmatch(text):
        frames = [int(match[3]), int(match[4])]
        return _concludes({"op": "moves", "of": match[1], "frames": frames}, match[2])
    if match := _TOWARD.fullmatch(text):
        return _concludes({"op": "toward", "a": match[1], "b": match[3]}, "yes" if match[2] == "toward" else "no")
    if match := _CHANGES.fullmatch(text):
        return _concludes({"op": match[2], "of": match[1]}, match[3])
    if match := _COUNT_MOVES.fullmatch(text):
        return _concludes({"op": "count_moves"}, match[1])
    return None


def _concludes(program: Program, answer: str) -> ClipClaim | None:
    """Build a reasoning claim; the program's phrases become descriptions. None if one is no shape with its color."""
    for name in program.keys() & {"of", "a", "b"}:
        claim = parse_claim(f"there is a {program[name]}")
        of = {} if claim is None or claim.present is None else claim.present.described()
        if of.keys() != {"shape", "color"}:
            return None
        program[name] = of
    return ClipClaim(checks=((program, answer),))


def verify_clip(response: ParsedResponse, program: Program, clip: Clip | list[Any], gold: str) -> Verification:
    """Verify one response to a question about a clip, as `oracle.verify` does for a scene.

    Raises:
        InputError: the program or the clip, whose JSON is a list of frames, is malformed. No response text raises.
    """
    clip = clip if isinstance(clip, tuple) else clip_from_json(clip)
    truth = tracks_of(clip)
    parsed = [parse_clip_claim(sentence) for sentence in sentences_of(response)]
    frames = claimed_frames([claim for claim in parsed if claim is not None])
    tracks = claimed_tracks(frames)
    verdicts = [Verdict() if claim is None else _verdict(claim, frames, tracks, clip, truth) for claim in parsed]
    return judge_exactly(
        response, verdicts, evaluate_clip(program, tracks), gold, lambda: _suffices(program, tracks, truth)
    )


def is_true(sentence: str, clip: Clip) -> bool | None:
    """Return whether a sentence is true of a clip; None if it doesn't parse."""
    claim = parse_clip_claim(sentence)
    if claim is None:
        return None
    return _is_seen(claim, clip) if claim.perceived else _holds(claim, clip, tracks_of(clip))


def _is_seen(claim: ClipClaim, clip: Clip) -> bool:
    return all(seen(part, clip[index]) == "true" for index, part in claim.perceived)


def _verdict(claim: ClipClaim, frames: Clip, tracks: Tracks, clip: Clip, truth: Tracks) -> Verdict:
    if claim.perceived:
        return Verdict("perception", "true" if _is_seen(claim, clip) else "false")
    follows = _holds(claim, frames, tracks)
    return Verdict("reasoning", "true" if follows and _holds(claim, clip, truth) else "false", follows)


def claimed_frames(claims: Sequence[ClipClaim]) -> Clip:
    """Build the frames that the claims describe, each from the claims about it."""
    parts = [part for claim in claims for part in claim.perceived]
    return tuple([claimed_world([claim for at, claim in parts if at == index]) for index in range(FRAMES)])


def claimed_tracks(frames: Clip) -> dict[tuple[str, str], list[str | None]]:
    """Return the states over the claimed frames of all objects whose shape and color some claim states."""
    named = [(o.shape, o.color) for frame in frames for o in (*frame.objects, *frame.absent) if o.shape and o.color]
    tracks: dict[tuple[str, str], list[str | None]] = {}
    for shape, color in named:
        states = [_state(shape, color, frame) for frame in frames]
        tracks[str(shape), str(color)] = states
    return tracks


def _state(shape: str | None, color: str | None, frame: Scene) -> str | None:
    """Return an object's state in a claimed frame: its place, PRESENT, ABSENT, or None if no claim tells."""
    for o in frame.objects:
        if (o.shape, o.color) == (shape, color):
            return o.place or PRESENT
    return ABSENT if implied_absent({"shape": str(shape), "color": str(color)}, frame.absent) else None


def _holds(claim: ClipClaim, frames: Clip, tracks: Tracks) -> bool:
    """Return whether all that a reasoning claim states is so in these frames."""
    if claim.frame is None:
        return all(evaluate_clip(check, tracks) == answer for check, answer in claim.checks)
    frame = frames[claim.frame]
    return all(evaluate(check, frame.objects, None, frame.absent) == answer for check, answer in claim.checks)


def _suffices(program: Program, tracks: Tracks, truth: Tracks) -> bool:
    """Return whether true claims that give the gold answer leave nothing open that would change it.

    Counting needs every object: of its frames, or of the clip, each with a move or with its places in all frames that have
    it. All other questions presume that their object, or one alone, moves or changes, so what is claimed of it decides.
    """
    if program["op"] == "count_moves":
        return all(
            key in tracks and (moves(tracks[key]) or _covers(tracks[key], places)) for key, places in truth.items()
        )
    if program["op"] == "more":
        counted = [(key, frame - 1) for key in truth for frame in program["frames"] if truth[key][frame - 1] != ABSENT]
        return all(key in tracks and tracks[key][index] not in (None, ABSENT) for key, index in counted)
    return True


def _covers(track: Sequence[str | None], places: Sequence[str | None]) -> bool:
    return all(place in (ABSENT, claimed) for claimed, place in zip(track, places, strict=True))
