"""Clips: how frames follow each other, answers by hand and by an independent count, true rationales and their faults."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from srcfast.config.datasets import DatasetConfig
from srcfast.data.rationale_format import ParsedResponse, format_response, parse_response, tagged_rationale
from srcfast.errors import InputError
from srcfast.models import load_lvlm
from srcfast.stages.datasets import read_dataset
from srcfast.stages.prompts import encode_prompt
from srcfast.world.clip_oracle import parse_clip_claim, verify_clip
from srcfast.world.clip_questions import KINDS, ask_clip, clip_facts, clip_rationale
from srcfast.world.clips import SPLITS, clip_digest, clip_stream, evaluate_clip, tracks_of
from srcfast.world.questions import Question
from srcfast.world.render import render_frame
from srcfast.world.samples import clip_samples
from srcfast.world.scenes import COLORS, HELD_OUT, PLACES, SHAPES, Object, Scene
from srcfast.world.verification import can_verify, verify_sample

Frames = tuple[Scene, ...]


def drawn(split: str, n: int, seed: int) -> list[Frames]:
    return list(itertools.islice(clip_stream(split, seed), n))


def asked(n: int, seed: int, kinds: tuple[str, ...] = tuple(KINDS)) -> list[tuple[Frames, Question]]:
    rng = random.Random(seed)
    return [(clip, question) for clip in drawn("base", n, seed) for question in ask_clip(clip, rng, kinds, 9)]


def frame(*objects: str) -> Scene:
    """Build a frame from "small red star/top left"."""
    parts = [(*o.split("/")[0].split(), o.split("/")[1]) for o in objects]
    return Scene(tuple(Object(shape, color, size, place) for size, color, shape, place in parts), "plain")


# The star moves right, then down. The cross moves up at the end. The circle leaves, the square arrives and stays.
CLIP = (
    frame("small red star/top left", "large blue circle/center", "small green cross/bottom"),
    frame("small red star/top", "large blue circle/center", "large teal rectangle/left", "small green cross/bottom"),
    frame("large teal rectangle/left", "small red star/center", "small green cross/bottom right"),
)
STAR = {"shape": "star", "color": "red"}
CIRCLE = {"shape": "circle", "color": "blue"}
CROSS = {"shape": "cross", "color": "green"}
RECTANGLE = {"shape": "rectangle", "color": "teal"}


@pytest.mark.parametrize(
    ("program", "answer"),
    [
        ({"op": "mover", "attribute": "color"}, None),  # two objects move
        ({"op": "direction", "of": CROSS}, "right"),
        ({"op": "direction", "of": STAR}, None),  # right, then down
        ({"op": "direction", "of": CIRCLE}, None),
        ({"op": "direction", "of": {"shape": "star", "color": "blue"}}, None),
        ({"op": "moves", "of": STAR, "frames": [1, 2]}, "right"),
        ({"op": "moves", "of": STAR, "frames": [2, 3]}, "down"),
        ({"op": "moves", "of": STAR, "frames": [1, 3]}, None),
        ({"op": "moves", "of": CROSS, "frames": [1, 3]}, "right"),
        ({"op": "moves", "of": CROSS, "frames": [1, 2]}, None),
        ({"op": "before", "a": STAR, "b": CROSS}, None),  # the star moves twice
        ({"op": "toward", "a": CROSS, "b": STAR}, None),  # which moves at the same time
        ({"op": "toward", "a": CROSS, "b": RECTANGLE}, "no"),
        ({"op": "appears", "of": RECTANGLE}, "2"),
        ({"op": "appears", "of": STAR}, None),
        ({"op": "disappears", "of": CIRCLE}, "3"),
        ({"op": "disappears", "of": RECTANGLE}, None),
        ({"op": "count_moves"}, "2"),
        ({"op": "where", "of": STAR, "frame": 3}, "center"),
        ({"op": "where", "of": CIRCLE, "frame": 3}, None),
        ({"op": "more", "frames": [2, 1]}, "yes"),
        ({"op": "more", "frames": [3, 1]}, "no"),
        ({"op": "more", "frames": [3, 2]}, "no"),
    ],
)
def test_answers_by_hand(program: dict[str, Any], answer: str | None) -> None:
    assert evaluate_clip(program, tracks_of(CLIP)) == answer


@pytest.mark.parametrize(
    ("program", "answer", "see", "think"),
    [
        (
            {"op": "direction", "of": CROSS},
            "right",
            [
                "In frame 2, there is a green cross at the bottom.",
                "In frame 3, there is a green cross at the bottom right.",
            ],
            ["The green cross moves right between frame 2 and frame 3."],
        ),
        (
            {"op": "toward", "a": CROSS, "b": RECTANGLE},
            "no",
            [
                "In frame 2, there is a green cross at the bottom.",
                "In frame 3, there is a green cross at the bottom right.",
                "In frame 2, there is a teal rectangle at the left.",
            ],
            [
                "The green cross moves right between frame 2 and frame 3.",
                "The green cross moves away from the teal rectangle.",
            ],
        ),
        (
            {"op": "appears", "of": RECTANGLE},
            "2",
            ["In frame 1, there is no teal rectangle.", "In frame 2, there is a teal rectangle."],
            ["The teal rectangle appears in frame 2."],
        ),
        (
            {"op": "disappears", "of": CIRCLE},
            "3",
            ["In frame 2, there is a blue circle.", "In frame 3, there is no blue circle."],
            ["The blue circle disappears in frame 3."],
        ),
        ({"op": "where", "of": STAR, "frame": 3}, "center", ["In frame 3, there is a red star at the center."], []),
        (
            {"op": "more", "frames": [2, 1]},
            "yes",
            [
                "In frame 1, there is a red star.",
                "In frame 1, there is a blue circle.",
                "In frame 1, there is a green cross.",
                "In frame 2, there is a red star.",
                "In frame 2, there is a blue circle.",
                "In frame 2, there is a green cross.",
                "In frame 2, there is a teal rectangle.",
            ],
            ["In frame 1, there are 3 objects.", "In frame 2, there are 4 objects."],
        ),
        (
            {"op": "count_moves"},
            "2",
            [
                "In frame 1, there is a red star at the top left.",
                "In frame 2, there is a red star at the top.",
                "In frame 1, there is a blue circle at the center.",
                "In frame 2, there is a blue circle at the center.",
                "In frame 2, there is a green cross at the bottom.",
                "In frame 3, there is a green cross at the bottom right.",
                "In frame 2, there is a teal rectangle at the left.",
                "In frame 3, there is a teal rectangle at the left.",
            ],
            ["2 objects move."],
        ),
    ],
)
def test_rationales_by_hand(program: dict[str, Any], answer: str, see: list[str], think: list[str]) -> None:
    question = Question("", "", program["op"], program, answer)
    assert clip_rationale(CLIP, question) == (tuple(see), tuple(think))
    assert verify_clip(ParsedResponse(tuple(see), tuple(think), answer), program, CLIP, answer).aligned


def test_what_stays_takes_one_sentence() -> None:
    clip = (
        frame("small red star/top", "large gray circle/left"),
        frame("small red star/top right", "large gray circle/left"),
        frame("small red star/top right", "large gray circle/left"),
    )
    question = Question("", "motion", "count_moves", {"op": "count_moves"}, "1")
    see, think = clip_rationale(clip, question)
    assert see == (
        "In frame 1, there is a red star at the top.",
        "In frame 2, there is a red star at the top right.",
        "The gray circle stays at the left.",
    )
    assert think == ("1 object moves.",)
    assert verify_clip(ParsedResponse(see, think, "1"), question.program, clip, "1").aligned
    moved = (*see[:2], "The red star stays at the top right.")
    assert verify_clip(ParsedResponse(moved, think, "1"), question.program, clip, "1").claims[2][2] == "false"


def test_facts_by_hand() -> None:
    assert clip_facts(CLIP)[:5] == (
        "In frame 1, there is a small red star at the top left.",
        "In frame 1, there is a large blue circle at the center.",
        "In frame 1, there is a small green cross at the bottom.",
        "In frame 1, there is no teal rectangle.",
        "In frame 2, there is a small red star at the top.",
    )
    assert clip_facts(CLIP)[-1] == "In frame 3, there is no blue circle." and len(clip_facts(CLIP)) == 12


# --- What is drawn ------------------------------------------------------------------------------------------


def positions(clip: Frames) -> list[dict[tuple[str | None, str | None], tuple[int, int]]]:
    """Columns and rows of each frame's objects, by shape and color."""
    return [{(o.shape, o.color): divmod(PLACES.index(str(o.place)), 3)[::-1] for o in f.objects} for f in clip]


def test_frames_follow_each_other_by_one_or_two_changes() -> None:
    changes: Counter[str] = Counter()
    for clip in drawn("train", 400, seed=1):
        sizes: dict[tuple[str | None, str | None], str | None] = {}
        assert len({f.background for f in clip}) == 1 and len(clip) == 3
        for f in clip:
            pairs = [(o.shape, o.color) for o in f.objects]
            assert 2 <= len(pairs) == len(set(pairs)) <= 4 and not set(pairs) & HELD_OUT
            assert len({o.place for o in f.objects}) == len(pairs)
            assert [PLACES.index(str(o.place)) for o in f.objects] == sorted(
                PLACES.index(str(o.place)) for o in f.objects
            )
            for o in f.objects:
                assert sizes.setdefault((o.shape, o.color), o.size) == o.size
        for before, after in itertools.pairwise(positions(clip)):
            moved = [(before[key], after[key]) for key in before.keys() & after.keys() if before[key] != after[key]]
            assert all(abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1 for a, b in moved)
            assert not {end for _, end in moved} & set(before.values())  # into a cell that was free
            appeared, gone = after.keys() - before.keys(), before.keys() - after.keys()
            assert 1 <= len(moved) + len(appeared) + len(gone) <= 2
            changes.update({"moved": len(moved), "appeared": len(appeared), "gone": len(gone)})
        keys = [set(p) for p in positions(clip)]
        assert not (keys[0] & keys[2]) - keys[1]  # what is gone does not come back
    assert min(changes.values()) > 100


def test_the_first_clip_of_a_split_is_this_one() -> None:
    [first] = drawn("train", 1, 0)
    assert [[(o.color, o.shape, o.size, o.place) for o in f.objects] for f in first] == [
        [("red", "circle", "large", "top"), ("blue", "circle", "large", "center")],
        [("red", "circle", "large", "top right"), ("blue", "circle", "large", "center")],
        [
            ("red", "circle", "large", "top right"),
            ("brown", "rectangle", "large", "left"),
            ("blue", "circle", "large", "right"),
        ],
    ]
    assert clip_digest(first).startswith("c606b3fb786e63a6")


def test_splits_share_no_clip() -> None:
    clips = {split: drawn(split, 300, seed=2) for split in SPLITS}
    assert SPLITS == ("base", "train", "scorer", "validation", "test")
    assert len({clip for of_split in clips.values() for clip in of_split}) == 1500
    assert drawn("test", 20, 3) == drawn("test", 20, 3) != drawn("test", 20, 4)
    with pytest.raises(InputError, match=r"expected one of base, train, scorer, validation, test.*generalisation"):
        drawn("generalisation", 1, 0)


def test_an_object_looks_the_same_wherever_it_is() -> None:
    clip = (frame("small red star/top left", "large gray circle/right"), frame("small red star/top"))
    first, second = (np.asarray(render_frame(f, seed=7)).astype(int) for f in clip)
    assert first.shape == (72, 72, 3)
    assert np.array_equal(first[:24, :24], second[:24, 24:48])  # cells of 24 pixels on a plain background
    assert np.array_equal(first[48:], second[48:]) and not np.array_equal(first[24:48], second[24:48])
    assert not np.array_equal(first, np.asarray(render_frame(clip[0], seed=8)))


# --- Questions ----------------------------------------------------------------------------------------------


def brute_force(program: dict[str, Any], clip: Frames) -> str:
    """The answer once more, by grid arithmetic on plain dictionaries."""
    grid = positions(clip)
    op = program["op"]

    def key(name: str) -> tuple[str, str]:
        return program[name]["shape"], program[name]["color"]

    def steps(name: tuple[str | None, str | None]) -> dict[int, tuple[int, int]]:
        found = {}
        for i in (0, 1):
            if name in grid[i] and name in grid[i + 1] and grid[i][name] != grid[i + 1][name]:
                found[i] = (grid[i + 1][name][0] - grid[i][name][0], grid[i + 1][name][1] - grid[i][name][1])
        return found

    movers = [name for name in set().union(*grid) if steps(name)]
    if op == "mover":
        [(shape, color)] = movers
        return str(shape if program["attribute"] == "shape" else color)
    if op == "count_moves":
        return str(len(movers))
    if op == "direction":
        [step] = set(steps(key("of")).values())
        return {(-1, 0): "left", (1, 0): "right", (0, -1): "up", (0, 1): "down"}[step]
    if op == "before":
        [a], [b] = steps(key("a")), steps(key("b"))
        return "yes" if a < b else "no"
    if op == "toward":
        [i] = steps(key("a"))
        goal = grid[i][key("b")]
        assert grid[i + 1][key("b")] == goal
        a, b = (sum(abs(p - q) for p, q in zip(grid[n][key("a")], goal, strict=True)) for n in (i, i + 1))
        return "yes" if b < a else "no"
    if op in ("appears", "disappears"):
        there = [key("of") in g for g in grid]
        wanted = [False, True] if op == "appears" else [True, False]
        [i] = [i for i in (0, 1) if there[i : i + 2] == wanted]
        return str(i + 2)
    if op == "where":
        column, row = grid[program["frame"] - 1][key("of")]
        return PLACES[3 * row + column]
    a, b = (len(grid[n - 1]) for n in program["frames"])
    return "yes" if a > b else "no"


def test_answers_agree_with_an_independent_count() -> None:
    checked: Counter[str] = Counter()
    for clip, question in asked(900, seed=3):
        assert question.answer == brute_force(question.program, clip), question
        assert question.ability == KINDS[question.kind] and question.kind == question.program["op"]
        assert json.loads(json.dumps(question.program)) == question.program and question.text.endswith("?")
        checked[question.kind] += 1
    assert checked.keys() == KINDS.keys() and min(checked.values()) > 200


def test_no_kind_can_be_answered_well_without_looking() -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question in asked(900, seed=4):
        answers[question.kind][question.answer] += 1
    for kind, counts in answers.items():
        assert max(counts.values()) / sum(counts.values()) < 0.66, (kind, counts)


def test_rationales_are_short() -> None:
    lengths = [
        len(re.findall(r"\w+|[.,]", " ".join([*see, *think])))
        for clip, question in asked(500, seed=5)
        for see, think in [clip_rationale(clip, question)]
    ]
    assert max(lengths) <= 95 and sum(lengths) / len(lengths) < 55


# --- The oracle ---------------------------------------------------------------------------------------------


def test_every_true_rationale_is_aligned_in_both_formats_and_in_any_order() -> None:
    rng = random.Random(6)
    for clip, question in asked(500, seed=6):
        see, think = clip_rationale(clip, question)
        for form in ("tagged", "plain"):
            response = parse_response(format_response(see, think, question.answer, form))
            result = verify_clip(response, question.program, [f.to_json() for f in clip], question.answer)
            assert result.aligned and result.case == "both_right", (question, see, think, result)
            assert result.perception_right and result.reasoning_right and result.leads_to_answer
        shuffled = ParsedResponse(tuple(rng.sample(see, len(see))), think, question.answer)
        assert verify_clip(shuffled, question.program, clip, question.answer).aligned
        everything = ParsedResponse(clip_facts(clip), (), question.answer)
        assert verify_clip(everything, question.program, clip, question.answer).aligned


def test_each_sentence_of_what_is_seen_is_needed() -> None:
    for clip, question in asked(400, seed=7):
        see, think = clip_rationale(clip, question)
        for i in range(len(see)):
            for conclusions in (think, ()):
                response = ParsedResponse(see[:i] + see[i + 1 :], conclusions, question.answer)
                result = verify_clip(response, question.program, clip, question.answer)
                assert not result.rationale_right and not result.aligned, (question, see, i)


def test_a_wrong_answer_is_not_what_a_true_rationale_leads_to() -> None:
    for clip, question in asked(200, seed=8):
        see, think = clip_rationale(clip, question)
        wrong = {"yes": "no", "no": "yes"}.get(question.answer, "seven")
        result = verify_clip(ParsedResponse(see, think, wrong), question.program, clip, question.answer)
        assert result.case == "right_rationale_wrong_answer" and not result.leads_to_answer and not result.aligned


# Words of which one may stand for another.
CLASSES: tuple[tuple[str, ...], ...] = (
    COLORS,
    SHAPES,
    tuple(f"at the {place}" for place in PLACES),
    tuple(f"frame {n}" for n in (1, 2, 3)),
    tuple(f"moves {way} between" for way in ("left", "right", "up", "down")),
    ("moves toward", "moves away from"),
    ("appears", "disappears"),
    ("there is a", "there is no"),
    tuple(f"{n} object" for n in range(5)),
    tuple(f"are {n}" for n in range(5)),
)


def changes_of(sentence: str) -> list[str]:
    """All sentences with one word of a class in another one's place."""
    found = []
    for words in CLASSES:
        pattern = "|".join(sorted(words, key=len, reverse=True))
        for match in re.finditer(rf"(?:{pattern})\b", sentence):
            found += [sentence[: match.start()] + w + sentence[match.end() :] for w in words if w != match[0]]
    return found


def test_each_single_change_makes_a_rationale_wrong() -> None:
    counted: Counter[str] = Counter()
    for clip, question in asked(110, seed=9):
        see, think = clip_rationale(clip, question)
        true = {re.sub("small |large ", "", fact) for fact in clip_facts(clip)}
        for i, sentence in enumerate((*see, *think)):
            for changed in changes_of(sentence):
                sentences = (*see, *think)[:i] + (changed,) + (*see, *think)[i + 1 :]
                response = ParsedResponse(sentences[: len(see)], sentences[len(see) :], question.answer)
                result = verify_clip(response, question.program, clip, question.answer)
                # Two other frames may show that an object moves; and a conclusion that is said twice is true.
                is_as_good = (question.kind == "count_moves" and changed in true) or changed in think
                assert is_as_good or not result.aligned, (question, see, think, changed)
                counted[question.kind] += not result.aligned
    assert counted.keys() == KINDS.keys() and min(counted.values()) > 300


def test_an_invented_object_or_another_sentence_makes_a_rationale_wrong() -> None:
    rng = random.Random(10)
    for clip, question in asked(150, seed=10):
        see, think = clip_rationale(clip, question)
        named = {(o.shape, o.color) for f in clip for o in f.objects}
        shape, color = rng.choice([(s, c) for s in SHAPES for c in COLORS if (s, c) not in named])
        for more in (
            f"In frame {rng.randint(1, 3)}, there is a {color} {shape}.",
            f"The {color} {shape} stays at the {rng.choice(PLACES)}.",
            "The red star is happy.",
        ):
            result = verify_clip(
                ParsedResponse((*see, more), think, question.answer), question.program, clip, question.answer
            )
            assert result.case == "right_answer_wrong_rationale" and not result.perception_right


@pytest.mark.parametrize(
    ("sentence", "truth"),
    [
        ("In frame 1, there is a red object at the top left.", "true"),
        ("in frame 1, there is a small red star", "true"),
        ("In frame 1, there is a large red star.", "false"),
        ("In frame 3, there is nothing at the top.", "true"),
        ("In frame 2, there is nothing at the top.", "false"),
        ("The green cross stays at the bottom.", "false"),
        ("In frame 4, there is a red star.", None),
        ("In frame 1, the background is plain.", None),
        ("In frame 1, both are red.", None),
        ("In frame 1, 3 minus 2 is 1.", None),
        ("In frame 1, small is not larger than large.", None),
        ("In frame 1, in frame 1, there is a red star.", None),
        ("The red star moves right.", None),
        ("The red object moves right between frame 1 and frame 2.", None),
        ("The red star at the top moves right between frame 1 and frame 2.", None),
        ("There is a red star.", None),
        ("", None),
    ],
)
def test_sentences_by_hand(sentence: str, truth: str | None) -> None:
    response = ParsedResponse((sentence,), (), "2")
    [(_, kind, verdict)] = verify_clip(response, {"op": "count_moves"}, CLIP, "2").claims
    assert (kind, verdict) == (("unknown", "unverifiable") if truth is None else ("perception", truth))


@pytest.mark.parametrize(
    ("see", "conclusion", "follows", "is_true"),
    [
        (["In frame 1, there is a red star at the top left."], "In frame 1, there are 3 objects.", False, False),
        (clip_facts(CLIP), "In frame 1, there are 3 objects.", True, True),
        (clip_facts(CLIP), "In frame 1, the red star is above the blue circle.", True, True),
        (clip_facts(CLIP), "The green cross moves right between frame 1 and frame 3.", True, True),
        (clip_facts(CLIP)[:4], "The red star moves right between frame 1 and frame 2.", False, False),
        # It follows from what is claimed, but is not so.
        (
            ["In frame 1, there is a red star at the top.", "In frame 2, there is a red star at the center."],
            "The red star moves down between frame 1 and frame 2.",
            True,
            False,
        ),
    ],
)
def test_conclusions_must_follow_and_be_true(see: list[str], conclusion: str, follows: bool, is_true: bool) -> None:
    result = verify_clip(ParsedResponse(tuple(see), (conclusion,), "2"), {"op": "count_moves"}, CLIP, "2")
    assert result.reasoning_right == follows
    assert result.claims[-1][1:] == ("reasoning", "true" if is_true else "false")


@given(st.text(alphabet="in frame123,the redstaroveswdgh .\n", max_size=60), st.text(max_size=20))
def test_no_text_makes_the_oracle_raise(sentence: str, answer: str) -> None:
    for text in (sentence, "In frame 1, " + sentence, f"The {sentence} moves left between frame 1 and frame 2."):
        parse_clip_claim(text)
        assert not verify_clip(ParsedResponse((text,), (), answer), {"op": "count_moves"}, CLIP, "2").aligned


@pytest.mark.parametrize("clip", [None, {}, [], [{}, {}, {}], [CLIP[0].to_json()] * 2, "abc"])
def test_a_malformed_clip_is_refused(clip: Any) -> None:
    with pytest.raises(InputError, match="clip|scene"):
        verify_clip(ParsedResponse((), (), "2"), {"op": "count_moves"}, clip, "2")


@pytest.mark.parametrize(
    "program", [{}, {"op": "dance"}, {"op": "direction"}, {"op": "where", "of": STAR, "frame": 9}, {"op": "more"}, 3]
)
def test_a_malformed_program_is_refused(program: Any) -> None:
    with pytest.raises(InputError, match="program"):
        evaluate_clip(program, tracks_of(CLIP))


# --- Samples ------------------------------------------------------------------------------------------------


def test_the_first_sample_is_this_one(tmp_path: Path) -> None:
    [sample] = clip_samples("train", 1, seed=0, image_dir=tmp_path)
    assert sample.id == "clips-train-0-000000"
    assert sample.images == tuple(f"clips-train-c606b3fb786e63a6-{n}.png" for n in (1, 2, 3))
    assert (sample.question, sample.answer) == ("Does the red circle move before the blue circle?", "yes")
    assert sample.extra["see"] == [
        "In frame 1, there is a red circle at the top.",
        "In frame 2, there is a red circle at the top right.",
        "In frame 2, there is a blue circle at the center.",
        "In frame 3, there is a blue circle at the right.",
    ]
    assert sample.extra["think"] == [
        "The red circle moves right between frame 1 and frame 2.",
        "The blue circle moves right between frame 2 and frame 3.",
    ]


def test_samples_are_complete_records(tmp_path: Path) -> None:
    samples = clip_samples("test", 90, seed=5, image_dir=tmp_path)
    assert [sample.id for sample in samples] == [f"clips-test-5-{n:06d}" for n in range(90)]
    kinds = Counter(sample.extra["kind"] for sample in samples)
    assert kinds.keys() == KINDS.keys() and max(kinds.values()) - min(kinds.values()) <= 6
    for sample in samples:
        response = format_response(sample.extra["see"], sample.extra["think"], sample.answer, "tagged")
        result = verify_sample(sample, parse_response(response))
        assert can_verify(sample) and result is not None and result.aligned
        assert sample.rationale == tagged_rationale(sample.extra["see"], sample.extra["think"])
        assert json.loads(json.dumps(sample.extra)) == sample.extra and len(sample.images) == 3
        for name in sample.images:
            with Image.open(tmp_path / name) as image:
                assert image.size == (72, 72)
    assert {path.name for path in tmp_path.iterdir()} == {name for sample in samples for name in sample.images}
    again = clip_samples("test", 90, seed=5, image_dir=tmp_path)
    assert again == samples != clip_samples("test", 90, seed=6, image_dir=tmp_path)


def test_settings_name_them_and_the_model_reads_three_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of format clips has no end: set its limit"):
        DatasetConfig(name="clips", format="clips")
    dataset = DatasetConfig(name="clips", format="clips", split="validation", limit=2)
    sample = read_dataset(dataset, tmp_path, [])[1]
    assert sample.id == "clips-validation-0-000001"
    model = load_lvlm("embedded")
    tokens = encode_prompt(model, sample)
    shown = np.flatnonzero(tokens == model.image_token_id)
    assert len(shown) == 3 * 36 and shown[-1] - shown[0] + 1 == 3 * 36  # 36 places an image, before the question
    assert model.decode(tokens).endswith(f"{sample.question} ASSISTANT:")


def test_blind_guesses_are_right_as_often_as_the_docs_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srcfast.world.samples.draw_missing", lambda *_: None)
    train, test = (clip_samples(split, 4000, 0, image_dir=tmp_path) for split in ("train", "test"))
    shares = []
    for names in (["op"], ["op", "attribute", "frame", "frames"]):
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for sample in train:
            answers[str([sample.extra["program"].get(name) for name in names])][sample.answer] += 1
        keys = [str([sample.extra["program"].get(name) for name in names]) for sample in test]
        right = [answers[key].most_common(1)[0][0] == s.answer for key, s in zip(keys, test, strict=True)]
        shares.append(f"{100 * sum(right) / len(test):.1f}")
    docs = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    sentence = (
        f"A guess by the kind of question alone is right on {shares[0]} % of 4,000 test questions, "
        f"one by kind, property and frames on {shares[1]} %."
    )
    assert sentence in " ".join(docs.split()), sentence
