"""Scenes: distinct, split by content, held-out combinations kept out, drawn alike from the same seed."""

import json
import random

import numpy as np
import pytest

from srcfast.errors import InputError
from srcfast.world.render import IMAGE_SIZE, render
from srcfast.world.scenes import (
    BACKGROUNDS,
    COLORS,
    COLUMN,
    HELD_OUT,
    PLACES,
    ROW,
    SHAPES,
    SIZES,
    SPLITS,
    Object,
    Scene,
    sample_scenes,
    split_of,
)


@pytest.mark.parametrize("split", SPLITS)
def test_every_scene_belongs_to_the_split_it_was_drawn_for(split: str) -> None:
    scenes = sample_scenes(split, 150, seed=random.randrange(10**6))
    assert len(set(scenes)) == 150
    assert {split_of(scene) for scene in scenes} == {split}


def test_scenes_are_well_formed_and_repeat_shapes_and_colors() -> None:
    scenes = sample_scenes("base", 600, seed=3)
    repeats = 0
    for scene in scenes:
        pairs = [(o.shape, o.color) for o in scene.objects]
        places = [PLACES.index(str(o.place)) for o in scene.objects]
        assert 2 <= len(pairs) <= 5 and len(set(pairs)) == len(pairs)
        assert places == sorted(set(places))
        assert scene.background in BACKGROUNDS and all(o.size in SIZES for o in scene.objects)
        repeats += len({o.shape for o in scene.objects}) < len(pairs) or len({c for _, c in pairs}) < len(pairs)
    assert repeats > 0.7 * len(scenes)  # else counting and comparing would be dull
    shown = {(o.shape, o.color) for scene in scenes for o in scene.objects}
    assert shown == {(s, c) for s in SHAPES for c in COLORS} - HELD_OUT


def test_held_out_combinations_appear_in_generalisation_alone() -> None:
    for split in SPLITS:
        shown = [any((o.shape, o.color) in HELD_OUT for o in s.objects) for s in sample_scenes(split, 120, 5)]
        assert all(shown) if split == "generalisation" else not any(shown)
    assert len(HELD_OUT) == 6
    held_out_of = [sum(color in pair for pair in HELD_OUT) for color in COLORS]
    assert max(held_out_of) == 1  # every color still occurs in four of five shapes


def test_drawing_is_a_function_of_split_and_seed() -> None:
    assert sample_scenes("train", 40, 7) == sample_scenes("train", 40, 7)
    assert sample_scenes("train", 60, 7)[:40] == sample_scenes("train", 40, 7)
    assert sample_scenes("train", 40, 7) != sample_scenes("train", 40, 8)


def test_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="generalization"):
        sample_scenes("generalization", 1, 0)


def test_a_scene_survives_json() -> None:
    scene = sample_scenes("test", 1, 0)[0]
    assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene
    partly = Scene((Object(shape="circle"),), None, (Object(color="blue"),))
    assert Scene.from_json(json.loads(json.dumps(partly.to_json()))) == partly
    for broken in ({}, {"objects": [3]}, {"objects": [{"form": "circle"}]}, [], "scene"):
        with pytest.raises(InputError, match="scene"):
            Scene.from_json(broken)  # type: ignore[arg-type]


def test_objects_are_drawn_in_their_own_cell_with_their_color_and_size() -> None:
    cell = IMAGE_SIZE // 3
    for index, scene in enumerate(sample_scenes("base", 60, seed=11)):
        plain = Scene(scene.objects, "plain")
        image = np.asarray(render(plain, seed=index)).astype(int)
        assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        here = {(ROW[str(o.place)], COLUMN[str(o.place)]): o for o in scene.objects}
        background = np.asarray(render(Scene((), "plain"), seed=index)).astype(int)[0, 0]
        painted = np.abs(image - background).sum(axis=2) > 40
        for row in range(3):
            for column in range(3):
                inside = painted[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
                o = here.get((row, column))
                if o is None:
                    assert not inside.any()
                else:
                    ys, xs = np.nonzero(inside)
                    extent = max(np.ptp(ys), np.ptp(xs)) + 1
                    assert extent <= 15 if o.size == "small" else extent >= 17  # 11-13 and 17.5-20.5 pixels, tilted


def test_rendering_is_a_function_of_scene_and_seed() -> None:
    scene = sample_scenes("base", 1, seed=0)[0]
    first = render(scene, seed=4)
    assert first.tobytes() == render(scene, seed=4).tobytes()
    assert first.tobytes() != render(scene, seed=5).tobytes()


def test_backgrounds_differ_from_each_other() -> None:
    deviations = {
        background: np.mean([np.asarray(render(Scene((), background), seed)).std(axis=(0, 1)) for seed in range(8)])
        for background in BACKGROUNDS
    }
    assert deviations["plain"] == 0.0
    assert deviations["dotted"] > 4.0 and deviations["striped"] > 1.2 * deviations["dotted"]
