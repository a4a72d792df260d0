"""Splits for tests alone: new kinds of questions, another renderer, and blurred, covered and noisy pictures."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from srcfast.data.rationale_format import ParsedResponse, format_response, parse_response
from srcfast.errors import InputError
from srcfast.world.oracle import verify
from srcfast.world.other_pictures import DEGRADATIONS, HUES, degrade, render_otherwise
from srcfast.world.programs import evaluate
from srcfast.world.questions import KINDS, NEW_KINDS, Question, ask, question_text
from srcfast.world.rationales import facts, true_rationale
from srcfast.world.render import render
from srcfast.world.samples import TEST_VARIANTS, world_samples
from srcfast.world.scenes import COLORS, PLACES, SHAPES, Object, Scene, sample_scenes, split_of
from srcfast.world.verification import verify_sample

SCENE = Scene(
    (
        Object("star", "red", "small", "top left"),
        Object("circle", "red", "large", "top"),
        Object("circle", "blue", "small", "left"),
        Object("cross", "green", "small", "center"),
    ),
    "plain",
)


def asked(n: int, seed: int) -> list[tuple[Scene, Question]]:
    rng = random.Random(seed)
    scenes = sample_scenes("base", n, seed)
    return [(scene, q) for scene in scenes for q in ask(scene, rng, tuple(NEW_KINDS), 4, NEW_KINDS)]


# --- New kinds of questions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "text", "answer", "see", "think"),
    [
        (
            {"op": "count_either", "of": {"size": "small"}, "either": [{"color": "red"}, {"color": "blue"}]},
            "How many small objects are red or blue?",
            "2",
            ["There is a small red star at the top left.", "There is a small blue circle at the left."],
            ["2 small objects are red or blue."],
        ),
        (
            {"op": "count_either", "of": {"size": "large"}, "either": [{"shape": "circle"}, {"shape": "star"}]},
            "How many large objects are circles or stars?",
            "1",
            ["There is a large red circle at the top.", "There is no large star."],
            ["1 large object is a circle or a star."],
        ),
        (
            {"op": "count_not", "of": {"shape": "circle"}, "are": {"color": "red"}},
            "How many circles are there that are not red?",
            "1",
            ["There is a large red circle at the top.", "There is a small blue circle at the left."],
            ["There are 2 circles.", "There is 1 red circle.", "2 minus 1 is 1."],
        ),
        (
            {"op": "count_side", "side": "left", "of": {"color": "blue"}},
            "How many blue objects are on the left side?",
            "1",
            ["There is a small blue circle at the left."],
            ["There is 1 blue object on the left side."],
        ),
        (
            {"op": "count_side", "side": "left", "of": {"shape": "cross"}},
            "How many crosses are on the left side?",
            "0",
            ["There is a small red star at the top left.", "There is a small blue circle at the left."],
            ["There are 0 crosses on the left side."],
        ),
        (
            {"op": "count_side", "side": "bottom", "of": {"shape": "cross"}},
            "How many crosses are in the bottom row?",
            "0",
            ["There is nothing in the bottom row."],
            ["There are 0 crosses in the bottom row."],
        ),
        (
            {
                "op": "chain",
                "attribute": "shape",
                "relations": ["right of", "below"],
                "of": {"shape": "star", "color": "red"},
            },
            "What shape is the object directly right of the object directly below the red star?",
            "cross",
            [
                "There is a small red star at the top left.",
                "There is a small blue circle at the left.",
                "There is a small green cross at the center.",
            ],
            [
                "The blue circle is directly below the red star.",
                "The green cross is directly right of the blue circle.",
            ],
        ),
    ],
)
def test_new_questions_by_hand(
    program: dict[str, Any], text: str, answer: str, see: list[str], think: list[str]
) -> None:
    assert question_text(program) == text and evaluate(program, SCENE.objects) == answer
    question = Question(text, "", "", program, answer)
    assert true_rationale(SCENE, question) == (tuple(see), tuple(think))
    assert verify(ParsedResponse(tuple(see), tuple(think), answer), program, SCENE, answer).aligned


def test_a_chain_does_not_come_back() -> None:
    chain = {"op": "chain", "attribute": "shape", "relations": ["above", "below"], "of": {"shape": "star"}}
    assert evaluate(chain, SCENE.objects) is None


def brute_force(program: dict[str, Any], scene: Scene) -> str:
    """The answer once more, by grid arithmetic on plain dictionaries."""
    rows = [
        dict(o.to_json(), x=PLACES.index(str(o.place)) % 3, y=PLACES.index(str(o.place)) // 3) for o in scene.objects
    ]

    def met(of: dict[str, str], row: dict[str, Any]) -> bool:
        return of.items() <= row.items()

    if program["op"] == "count_either":
        return str(sum(met(program["of"], row) and any(met(of, row) for of in program["either"]) for row in rows))
    if program["op"] == "count_not":
        return str(sum(met(program["of"], row) and not met(program["are"], row) for row in rows))
    if program["op"] == "count_side":
        axis, line = {"left": ("x", 0), "right": ("x", 2), "top": ("y", 0), "bottom": ("y", 2)}[program["side"]]
        return str(sum(row[axis] == line and met(program["of"], row) for row in rows))
    assert program["op"] == "chain"
    steps = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    [start] = [row for row in rows if met(program["of"], row)]
    row = start
    for relation in (program["relations"][1], program["relations"][0]):
        x, y = steps[relation]
        [row] = [other for other in rows if (other["x"], other["y"]) == (row["x"] + x, row["y"] + y)]
    assert row is not start
    return str(row[program["attribute"]])


def test_answers_agree_with_an_independent_count_and_no_kind_is_a_guess() -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for scene, question in asked(700, seed=1):
        assert question.answer == brute_force(question.program, scene), question
        answers[question.kind][question.answer] += 1
    assert answers.keys() == {"count_size_either", "count_not", "count_side_of", "chain"}
    for kind, counts in answers.items():
        assert sum(counts.values()) > 400 and max(counts.values()) / sum(counts.values()) < 0.66, (kind, counts)


def test_no_training_split_asks_them() -> None:
    new = {kind for kinds in NEW_KINDS.values() for kind in kinds}
    assert len(new) == 4 and not new & {kind for kinds in KINDS.values() for kind in kinds}
    texts = {question_text(q.program) for _, q in asked(200, seed=2)}
    rng = random.Random(2)
    known = [q for scene in sample_scenes("base", 600, 2) for q in ask(scene, rng, n=6)]
    assert not texts & {q.text for q in known}
    assert not any("of" in q.program for q in known if q.program["op"] in ("count_either", "count_side"))


def test_true_rationales_are_aligned_and_each_sentence_is_needed() -> None:
    for scene, question in asked(250, seed=3):
        see, think = true_rationale(scene, question)
        for form in ("tagged", "plain"):
            response = parse_response(format_response(see, think, question.answer, form))
            assert verify(response, question.program, scene, question.answer).aligned, (question, see, think)
        assert verify(
            ParsedResponse(facts(scene), (), question.answer), question.program, scene, question.answer
        ).aligned
        for i in range(len(see)):
            less = ParsedResponse(see[:i] + see[i + 1 :], (), question.answer)
            assert not verify(less, question.program, scene, question.answer).aligned, (question, see, i)


NUMBERS = tuple("012345")


@pytest.mark.parametrize("words", [COLORS, SHAPES, PLACES, NUMBERS], ids=["color", "shape", "place", "number"])
def test_each_single_change_makes_a_rationale_wrong(words: tuple[str, ...]) -> None:
    tried = 0
    for scene, question in asked(120, seed=4):
        see, think = true_rationale(scene, question)
        pattern = rf"(?:{'|'.join(sorted(words, key=len, reverse=True))})\b"
        ahead = "at the " if words is PLACES else ""
        for i, sentence in enumerate((*see, *think)):
            for match in re.finditer(ahead + pattern, sentence):
                for word in words:
                    changed = sentence[: match.start()] + ahead + word + sentence[match.end() :]
                    if changed in (*facts(scene), *see, *think) or changed.startswith("There is no"):
                        continue  # true as well
                    sentences = (*see, *think)[:i] + (changed,) + (*see, *think)[i + 1 :]
                    response = ParsedResponse(sentences[: len(see)], sentences[len(see) :], question.answer)
                    aligned = verify(response, question.program, scene, question.answer).aligned
                    # A conclusion about other objects may follow, too: "There are 2 circles." beside 2 red objects.
                    assert not aligned or (i >= len(see) and words is not NUMBERS), (question, see, think, changed)
                    tried += not aligned
    assert tried > 400


# --- Pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_pictures_get_worse_with_each_level(kind: Any) -> None:
    scenes = sample_scenes("test", 12, seed=5)
    differences = np.zeros(3)
    for number, scene in enumerate(scenes):
        picture = render(scene, number)
        before = np.asarray(picture).astype(int)
        for level in (1, 2, 3):
            worse = np.asarray(degrade(picture, kind, level, seed=number)).astype(int)
            assert worse.shape == (72, 72, 3) and np.array_equal(np.asarray(picture), before)
            assert np.array_equal(worse, np.asarray(degrade(picture, kind, level, seed=number)))
            if kind != "blurred":
                assert not np.array_equal(worse, np.asarray(degrade(picture, kind, level, seed=number + 1)))
            differences[level - 1] += np.abs(worse - before).mean()
            if kind == "noisy":
                limit = (50, 110, 190)[level - 1]
                assert -limit <= (worse - before).min() < 0 < (worse - before).max() <= limit
            if kind == "covered":
                covered = (worse == (206, 130, 226)).all(axis=2)
                assert 18 * 18 <= covered.sum() <= (2, 4, 7)[level - 1] * 18 * 18
                assert np.array_equal(worse[~covered], before[~covered])
    assert differences[0] > 0 and differences[1] > 1.3 * differences[0] and differences[2] > 1.3 * differences[1]


@pytest.mark.parametrize(("kind", "level"), [("blurred", 0), ("blurred", 4), ("dark", 1)])
def test_no_other_kind_or_level_is_known(kind: Any, level: int) -> None:
    with pytest.raises(InputError, match=f"blurred, covered, noisy.*{kind}-{level}"):
        degrade(Image.new("RGB", (72, 72)), kind, level, 0)


def test_another_renderer_s_objects_can_be_read() -> None:
    right = []
    for number, scene in enumerate(sample_scenes("test", 120, seed=6)):
        picture = render_otherwise(scene, number)
        pixels = np.asarray(picture).astype(float)
        assert picture.mode == "RGB" and pixels.shape == (72, 72, 3)
        assert np.array_equal(pixels, np.asarray(render_otherwise(scene, number)))
        assert not np.array_equal(pixels, np.asarray(render(scene, number)))
        for o in scene.objects:
            row, column = divmod(PLACES.index(str(o.place)), 3)
            shown = pixels[24 * row + 11 : 24 * row + 14, 24 * column + 11 : 24 * column + 14].mean(axis=(0, 1))
            right.append(min(HUES, key=lambda name: np.abs(shown - HUES[name]).sum()) == o.color)
    assert np.mean(right) > 0.97  # by the nearest color at a cell's center


# --- Samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", TEST_VARIANTS)
def test_splits_show_scenes_of_the_test_split(split: str, tmp_path: Path) -> None:
    samples = world_samples(split, 25, seed=7, image_dir=tmp_path)
    test = world_samples("test", 25, seed=7, image_dir=tmp_path)
    assert [sample.id for sample in samples] == [f"world-{split}-7-{n:06d}" for n in range(25)]
    scenes = [Scene.from_json(sample.extra["scene"]) for sample in samples]
    assert {split_of(scene) for scene in scenes} == {"test"}
    assert {sample.images[0].rsplit("-", 1)[1] for sample in samples} & {s.images[0].rsplit("-", 1)[1] for s in test}
    assert (split == "new_questions") != ([s.question for s in samples] == [s.question for s in test])
    differ = False
    for sample, other, scene in zip(samples, test, scenes, strict=True):
        response = format_response(sample.extra["see"], sample.extra["think"], sample.answer, "tagged")
        result = verify_sample(sample, parse_response(response))
        assert result is not None and result.aligned and sample.extra["split"] == split
        assert sample.images[0].startswith(f"{split}-")
        if split != "new_questions":
            assert (sample.answer, sample.extra["scene"]) == (other.answer, other.extra["scene"])
            differ |= (tmp_path / sample.images[0]).read_bytes() != (tmp_path / other.images[0]).read_bytes()
        assert len(scene.objects) >= 2
    assert differ == (split != "new_questions")


def test_variants_of_the_test_split_are_these() -> None:
    levels = [f"test-{kind}-{n}" for kind in ("blurred", "covered", "noisy") for n in (1, 2, 3)]
    assert list(TEST_VARIANTS) == ["new_questions", "new_renderer", *levels]


def test_an_unknown_split_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"base, train, .*generalisation, new_questions, .*test-noisy-3.*test-dark-1"):
        world_samples("test-dark-1", 1, 0, image_dir=tmp_path)


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "fbeedac1a6bf0bca"),
        ("scorer", "8ee3b2899ab70513"),
        ("validation", "4b77299e60e7302f"),
        ("test", "bfdd95f8f0631996"),
        ("generalisation", "d39181454bf28ed3"),
    ],
)
def test_the_samples_of_older_splits_stay_as_they_are(split: str, digest: str, tmp_path: Path) -> None:
    rows = [json.dumps(sample.to_json()) for sample in world_samples(split, 60, seed=0, image_dir=tmp_path)]
    assert hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16] == digest
