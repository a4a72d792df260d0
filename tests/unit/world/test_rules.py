"""The world's rules case by case: splits by hash, claims about one object, conclusions, what a further object may change."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from srcfast.data.rationale_format import parse_response
from srcfast.world.claims import draw_claims
from srcfast.world.oracle import claimed_world, is_true, parse_claim, verify
from srcfast.world.programs import evaluate, extreme_object, implied_absent, matches, relevant
from srcfast.world.rationales import perception_questions
from srcfast.world.samples import world_samples
from srcfast.world.scenes import HELD_OUT, Object, Scene, sample_scenes, scene_digest, split_of

UPPER = (("base", 48), ("train", 72), ("scorer", 82), ("validation", 90), ("test", 100))


@pytest.mark.parametrize("split", [name for name, _ in UPPER])
def test_a_scene_s_split_is_a_share_of_its_hash(split: str) -> None:
    for scene in sample_scenes(split, 60, seed=9):
        assert not any((o.shape, o.color) in HELD_OUT for o in scene.objects)
        percent = int(scene_digest(scene)[:12], 16) % 100
        assert next(name for name, bound in UPPER if percent < bound) == split == split_of(scene)


def test_a_scene_s_hash_is_of_its_content_alone() -> None:
    scene = Scene((Object("circle", "red", "large", "top"), Object("star", "blue", "small", "left")), "dotted")
    content = b"dotted|circle,red,large,top;star,blue,small,left"
    assert scene_digest(scene) == hashlib.sha256(content).hexdigest()


def test_sizes_and_numbers_of_scenes_are_drawn_evenly() -> None:
    """Of 400 scenes: a share of a half of 1,500 objects scatters by 1.3 %, and three numbers of objects by 2.5 %."""
    scenes = sample_scenes("train", 400, seed=1)
    objects = [o for scene in scenes for o in scene.objects]
    assert 0.44 < sum(o.size == "large" for o in objects) / len(objects) < 0.56
    counts = [len(scene.objects) for scene in scenes]
    for count, share in ((2, 1 / 8), (3, 2 / 8), (4, 3 / 8), (5, 2 / 8)):
        assert abs(counts.count(count) / 400 - share) < 0.1


def world_of(*sentences: str, one: bool = False) -> list[dict[str, str]]:
    claims = [claim for sentence in sentences if (claim := parse_claim(sentence)) is not None]
    assert len(claims) == len(sentences)
    return [o.described() for o in claimed_world(claims, one).objects]


@pytest.mark.parametrize(
    ("sentences", "count"),
    [
        (("There is a red circle.", "There is a large red circle."), 1),  # one says all that the other says
        (("There is a red circle.", "There is a large circle."), 2),
        (("There is a large red circle.", "There is a red circle at the top."), 1),  # shape and color agree
        (("There is a red circle.", "There is a blue circle."), 2),
        (("There is a circle.", "There is a red object."), 2),
        (("There is a circle.", "There is a circle at the left."), 1),
        (("There is a large red circle.", "There is a small red circle."), 2),
    ],
)
def test_claims_about_one_object(sentences: tuple[str, ...], count: int) -> None:
    assert len(world_of(*sentences)) == len(world_of(*reversed(sentences))) == count
    assert len(world_of(*sentences, one=True)) == (
        1 if count == 1 or "red object" in sentences[1] or "large circle" in sentences[1] else 2
    )


A, B, C = (
    Object("circle", "red", "large", "top left"),
    Object("rectangle", "blue", "small", "top"),
    Object("star", "green", "small", "bottom right"),
)
SCENE = Scene((A, B, C), "plain")


def judged(sentences: str, answer: str, program: dict[str, Any], gold: str, scene: Scene = SCENE) -> Any:
    see, _, think = sentences.partition(" | ")
    text = f"<see> {see} </see> {f'<think> {think} </think> ' if think else ''}<answer> {answer} </answer>"
    return verify(parse_response(text), program, scene, gold)


LARGER = {"op": "larger", "a": {"shape": "circle"}, "b": {"shape": "star"}}
RECTANGLE_AND_STAR = {"op": "larger", "a": {"shape": "rectangle"}, "b": {"shape": "star"}}


@pytest.mark.parametrize(
    ("sentences", "answer", "program", "right"),
    [
        (
            "There is a large red circle. There is a small green star. | Large is larger than small.",
            "yes",
            LARGER,
            True,
        ),
        (
            "There is a large red circle. There is a small green star. | Small is larger than large.",
            "yes",
            LARGER,
            False,
        ),
        (
            "There is a large red circle. There is a small green star. | Small is not larger than large.",
            "yes",
            LARGER,
            True,
        ),
        # Two small objects are claimed; of one alone nothing can be compared.
        (
            "There is a small blue rectangle. There is a small green star. | Small is not larger than small.",
            "no",
            RECTANGLE_AND_STAR,
            True,
        ),
        (
            "There is a large red circle. There is a small green star. | Small is not larger than small.",
            "yes",
            LARGER,
            False,
        ),
    ],
)
def test_sizes_are_compared_where_both_are_claimed(
    sentences: str, answer: str, program: dict[str, Any], right: bool
) -> None:
    assert judged(sentences, answer, program, answer).reasoning_right == right


DIFFERENCE = {"op": "difference", "a": {"size": "small"}, "b": {"shape": "circle"}}


@pytest.mark.parametrize(
    ("think", "right"),
    [
        ("There are 2 small objects. There is 1 circle. 2 minus 1 is 1.", True),
        ("There are 2 small objects. 2 minus 1 is 1.", False),  # the 1 was not counted
        ("There are 2 small objects. There is 1 circle. 2 minus 1 is 2.", False),
        ("2 objects are circles or blue. There is 1 circle. 2 minus 1 is 1.", True),
        ("There are 2 objects in the top row. There is 1 circle. 2 minus 1 is 1.", True),
    ],
)
def test_a_difference_is_of_numbers_that_were_counted(think: str, right: bool) -> None:
    see = "There is a large red circle at the top left. There is a small blue rectangle at the top."
    see += " There is a small green star at the bottom right."
    assert judged(f"{see} | {think}", "1", DIFFERENCE, "1").reasoning_right == right


AT_TOP_LEFT = {"op": "exists", "of": {"shape": "star", "color": "red", "place": "top left"}}


@pytest.mark.parametrize(
    ("see", "right"),
    [
        ("There is a large red circle at the top left.", True),  # the place is taken: no further object can stand there
        ("There is a large red circle.", False),
        ("There is no red star.", True),
        ("There is no star at the top.", False),
        ("There is nothing at the top left.", False),  # false of the scene
    ],
)
def test_a_further_object_must_find_a_place(see: str, right: bool) -> None:
    assert judged(see, "no", AT_TOP_LEFT, "no").rationale_right == right


def test_a_rationale_with_another_sentence_is_not_right() -> None:
    whole = "There is a large red circle at the top left."
    assert judged(whole, "no", AT_TOP_LEFT, "no").aligned
    beside = judged(f"{whole} I like it.", "no", AT_TOP_LEFT, "no")
    assert not beside.rationale_right and beside.answer_right and beside.case == "right_answer_wrong_rationale"
    wrong = judged(whole, "yes", AT_TOP_LEFT, "no")
    assert wrong.rationale_right and not wrong.leads_to_answer and wrong.case == "right_rationale_wrong_answer"
    assert judged("There is a red star.", "yes", AT_TOP_LEFT, "no").case == "both_wrong"


KNOWN = Scene((Object("circle", "red", "large", "top left"), Object("star", "red", "small", "top")), "plain")
UNKNOWN = Scene((Object("circle", None, "large", None),), "plain", (Object(color="blue"),))


@pytest.mark.parametrize(
    ("sentence", "scene", "truth"),
    [
        ("There is a red star.", KNOWN, True),
        ("There is a blue star.", KNOWN, False),
        ("There are 2 red objects.", KNOWN, True),
        ("There are 2 stars.", KNOWN, False),
        ("The star is blue.", KNOWN, False),
        ("The triangle is blue.", KNOWN, False),  # all is known, and there is none
        ("There is a red circle.", UNKNOWN, None),
        ("There is a blue circle.", UNKNOWN, False),  # nothing is blue
        ("There is no blue circle.", UNKNOWN, True),
        ("There is 1 red circle.", UNKNOWN, None),
        ("Both are red.", KNOWN, None),
        ("So it is.", KNOWN, None),
    ],
)
def test_a_sentence_is_true_false_or_open(sentence: str, scene: Scene, truth: bool | None) -> None:
    assert is_true(sentence, scene) is truth


ROW = (
    Object("circle", "red", "large", "top left"),
    Object("circle", "blue", "small", "top right"),
    Object("star", "red", "small", "bottom"),
)


@pytest.mark.parametrize(
    ("program", "answer"),
    [
        ({"op": "difference", "a": {"size": "small"}, "b": {"color": "red"}}, "0"),
        ({"op": "difference", "a": {"shape": "star"}, "b": {"color": "red"}}, None),
        ({"op": "count", "of": {}}, "3"),
        ({"op": "count_either", "either": [{"shape": "circle"}, {"color": "red"}]}, "3"),
        ({"op": "count_side", "side": "top"}, "2"),
        ({"op": "more_side", "sides": ["top", "bottom"]}, "top"),
        ({"op": "more_side", "sides": ["left", "right"]}, None),
        ({"op": "most_common", "attribute": "shape"}, "circle"),
        ({"op": "relation", "relation": "above", "a": {"color": "blue"}, "b": {"shape": "star"}}, "yes"),
        ({"op": "relation", "relation": "above", "a": {"color": "blue"}, "b": {"size": "large"}}, "no"),  # one row
        ({"op": "relation", "relation": "left of", "a": {"size": "large"}, "b": {"color": "blue"}}, "yes"),
        ({"op": "relation", "relation": "above", "a": {"shape": "star"}, "b": {"shape": "star"}}, None),  # one object
        ({"op": "same", "attribute": "color", "a": {"size": "large"}, "b": {"shape": "star"}}, "yes"),
        ({"op": "same", "attribute": "color", "a": {"size": "large"}, "b": {"color": "blue"}}, "no"),
        ({"op": "larger", "a": {"size": "large"}, "b": {"shape": "star"}}, "yes"),
        ({"op": "larger", "a": {"color": "blue"}, "b": {"shape": "star"}}, "no"),
        ({"op": "beyond_all", "relation": "above", "of": {"size": "large"}}, "no"),  # another is as high
        ({"op": "beyond_all", "relation": "below", "of": {"shape": "star"}}, "yes"),
        ({"op": "beyond_all", "relation": "left of", "of": {"size": "large"}}, "yes"),
        ({"op": "extreme", "side": "top", "attribute": "color"}, None),
        ({"op": "extreme", "side": "right", "attribute": "color"}, "blue"),
        ({"op": "extreme", "side": "bottom", "attribute": "shape"}, "star"),
        ({"op": "all", "of": {"shape": "circle"}, "are": {"color": "red"}}, "no"),
        ({"op": "all", "of": {"shape": "star"}, "are": {"color": "red"}}, "yes"),
        ({"op": "all", "of": {"shape": "cross"}, "are": {"color": "red"}}, None),
        ({"op": "some_not", "of": {"shape": "circle"}, "are": {"color": "red"}}, "yes"),
        ({"op": "all_either", "of": {"shape": "circle"}, "either": [{"color": "red"}, {"size": "small"}]}, "yes"),
        ({"op": "and_not", "present": {"shape": "star"}, "absent": {"shape": "cross"}}, "yes"),
        ({"op": "and_not", "present": {"shape": "star"}, "absent": {"color": "blue"}}, "no"),
        ({"op": "query", "attribute": "color", "of": {"shape": "star"}}, "red"),
        ({"op": "query", "attribute": "color", "of": {"shape": "circle"}}, None),  # there are two
        ({"op": "query_same", "attribute": "shape", "same": "color", "of": {"shape": "star"}}, "circle"),
        ({"op": "query_same", "attribute": "shape", "same": "color", "of": {"color": "blue"}}, None),
        ({"op": "exists", "of": {"color": "blue", "shape": "star"}}, "no"),
        ({"op": "neighbor", "relation": "left of", "attribute": "shape", "of": {"color": "blue"}}, None),
    ],
)
def test_programs_answer_literally(program: dict[str, Any], answer: str | None) -> None:
    assert evaluate(program, ROW, "plain") == answer


def test_neighbours_share_an_edge() -> None:
    grid = (Object("circle", "red", "large", "left"), Object("star", "blue", "small", "center"))
    for relation, answer in (("right of", "star"), ("left of", None), ("above", None), ("below", None)):
        program = {"op": "neighbor", "relation": relation, "attribute": "shape", "of": {"shape": "circle"}}
        assert evaluate(program, grid) == answer
    assert extreme_object("left", grid) is grid[0] and extreme_object("top", grid) is None


def test_an_absence_rules_out_what_it_covers() -> None:
    nothing_blue = (Object(color="blue"),)
    assert implied_absent({"color": "blue", "shape": "star"}, nothing_blue)
    assert implied_absent({"color": "blue"}, nothing_blue)
    assert not implied_absent({"shape": "star"}, nothing_blue)
    assert not implied_absent({"color": "blue"}, (Object("star", "blue"),))
    assert matches(Object("star"), {"shape": "star", "color": "red"}) is None
    assert matches(Object("star"), {"shape": "circle", "color": "red"}) is False
    assert matches(Object("star", "red"), {"shape": "star", "color": "red"}) is True


def test_what_a_rationale_must_name_comes_in_the_question_s_order() -> None:
    assert relevant({"op": "larger", "a": {"shape": "star"}, "b": {"size": "large"}}, ROW) == [ROW[2], ROW[0]]
    assert relevant({"op": "count_side", "side": "top"}, ROW) == [ROW[0], ROW[1]]
    assert relevant({"op": "beyond_all", "relation": "above", "of": {"shape": "star"}}, ROW) == [ROW[2], ROW[0]]
    assert relevant({"op": "query_same", "same": "color", "of": {"shape": "star"}}, ROW) == [ROW[2], ROW[0]]


def test_in_an_image_of_one_object_all_claims_are_about_it() -> None:
    single = Scene((Object("circle", "red", "large", "center"),), "plain")
    several = Scene((*single.objects, Object("star", "blue", "small", "top")), "plain")
    see, program = "There is a red circle. There is a large object.", {"op": "count", "of": {"size": "large"}}
    assert judged(see, "1", program, "1", single).aligned
    # Of several, the large object may be another than the circle, whose size is open.
    assert not judged(see, "1", program, "1", several).leads_to_answer


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("split", "seed", "samples", "claims", "questions"),
    [
        ("train", 0, "6253d0986d8f8552", "500d9f8c5fca557f", "c92becc84514437e"),
        ("validation", 3, "53fe9283bb32247a", "456049d1c54948f4", "cee784fdc08ee7be"),
        ("generalisation", 7, "1bbbe1d82f65f208", "2c0da0c5662fc571", "5aedf52cec18a444"),
    ],
)
def test_what_a_seed_draws_stays_what_it_was(
    split: str, seed: int, samples: str, claims: str, questions: str, tmp_path: Path
) -> None:
    """Runs name their samples by split, number and seed: other samples under these names would be a silent change."""
    drawn = world_samples(split, 40, seed, image_dir=tmp_path)
    assert digest([sample.to_json() for sample in drawn]) == samples
    scenes, rng = sample_scenes(split, 20, seed), random.Random("claims")
    assert digest([sorted(draw_claims(scene, rng, 4).items()) for scene in scenes]) == claims
    assert digest([perception_questions(scene, rng, 3) for scene in scenes]) == questions


def test_what_can_t_be_checked_is_not_wrong() -> None:
    """easy-VQA's scenes leave colours open: a rationale that names one is right if nothing known speaks against it."""
    program = {"op": "query", "attribute": "shape", "of": {}}
    found = judged("There is a red circle.", "circle", program, "circle", UNKNOWN)
    assert found.claims == (("There is a red circle.", "perception", "unverifiable"),)
    assert found.perception_right and found.rationale_right and found.aligned
    wrong = judged("There is a blue circle.", "circle", program, "circle", UNKNOWN)
    assert not wrong.perception_right and not wrong.rationale_right and wrong.answer_right
    assert not judged("", "circle", program, "circle", UNKNOWN).perception_right  # nothing is claimed
