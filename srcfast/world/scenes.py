"""The embedded world's scenes: a few objects on a 3x3 grid, drawn from a seed and split by content.

A scene belongs to one split for ever: the split is a hash of the scene's content, so two seeds can never put
the same scene into training and test. Six combinations of shape and color are held out of every split but
`generalisation`. They are all stars and crosses, because easy-VQA (which takes part in calibration) shows
circles, rectangles and triangles in every color: these six are never seen in training, whatever the data set.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from srcfast.errors import InputError

SHAPES = ("circle", "rectangle", "triangle", "star", "cross")
COLORS = ("black", "gray", "red", "blue", "green", "yellow", "brown", "teal")
SIZES = ("small", "large")
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
BACKGROUNDS = ("plain", "striped", "dotted")
HELD_OUT = frozenset(
    [
        ("star", "red"),
        ("star", "teal"),
        ("star", "gray"),
        ("cross", "blue"),
        ("cross", "yellow"),
        ("cross", "black"),
    ]
)

ROW = {place: index // 3 for index, place in enumerate(PLACES)}
COLUMN = {place: index % 3 for index, place in enumerate(PLACES)}

_SHARES = (
    ("base", 48),
    ("train", 24),
    ("scorer", 10),
    ("validation", 8),
    ("test", 10),
)  # of 100
SPLITS = tuple(name for name, _ in _SHARES) + ("generalisation",)


@dataclass(frozen=True, slots=True)
class Object:
    """One object, or a description of one: `None` is an attribute that is unknown, or left open."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None
    place: str | None = None

    def to_json(self) -> dict[str, str | None]:
        return {
            "shape": self.shape,
            "color": self.color,
            "size": self.size,
            "place": self.place,
        }


@dataclass(frozen=True, slots=True)
class Scene:
    """What is in an image: its objects (in reading order), its background, and what is known to be absent.

    `absent` holds descriptions that no object meets. A scene of the world is fully known and needs none; a
    real image whose object has an unknown color may still be known to show nothing blue.
    """

    objects: tuple[Object, ...]
    background: str | None = None
    absent: tuple[Object, ...] = ()

    def to_json(self) -> dict[str, Any]:
        scene: dict[str, Any] = {
            "objects": [o.to_json() for o in self.objects],
            "background": self.background,
        }
        if self.absent:
            scene["absent"] = [o.to_json() for o in self.absent]
        return scene

    @classmethod
    def from_json(cls, scene: dict[str, Any]) -> Scene:
        """Read what `to_json` wrote. Raises InputError where the structure is another."""
        try:
            return cls(
                tuple(Object(**o) for o in scene["objects"]),
                scene.get("background"),
                tuple(Object(**o) for o in scene.get("absent", ())),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                field="scene",
                expected="{'objects': [{'shape', 'color', 'size', 'place'}, ...], 'background'}",
                found=scene,
            ) from error


def scene_digest(scene: Scene) -> str:
    """A stable hexadecimal hash of the scene's content, the same on every machine."""
    objects = ";".join([f"{o.shape},{o.color},{o.size},{o.place}" for o in scene.objects])
    return hashlib.sha256(f"{scene.background}|{objects}".encode()).hexdigest()


def split_of(scene: Scene) -> str:
    """The one split that a scene belongs to, a function of its content alone."""
    if any((o.shape, o.color) in HELD_OUT for o in scene.objects):
        return "generalisation"
    bucket = int(scene_digest(scene)[:12], 16) % 100
    for name, share in _SHARES:
        if bucket < share:
            return name
        bucket -= share
    raise AssertionError("the shares sum to 100")


def sample_scenes(split: str, n: int, seed: int) -> list[Scene]:
    """Draw `n` distinct scenes of a split. Raises InputError for an unknown split."""
    return list(islice(scene_stream(split, seed), n))


def scene_stream(split: str, seed: int) -> Iterator[Scene]:
    """Distinct scenes of a split without end. Raises InputError for an unknown split."""
    if split not in SPLITS:
        raise InputError(field="split", expected="one of " + ", ".join(SPLITS), found=split)
    rng = random.Random(f"{split}/{seed}")
    drawn: set[Scene] = set()
    while True:
        scene = _draw_scene(rng, held_out=split == "generalisation")
        if split_of(scene) == split and scene not in drawn:
            drawn.add(scene)
            yield scene


def _draw_scene(rng: random.Random, held_out: bool) -> Scene:
    """A scene of two to five objects from a small palette, so that shapes and colors repeat within it."""
    count = rng.choice((2, 3, 3, 4, 4, 4, 5, 5))
    while True:
        colors = rng.sample(COLORS, 2 if rng.random() < 0.5 else 3)
        shapes = rng.sample(SHAPES, 2 if rng.random() < 0.5 else 3)
        pairs = [(s, c) for s in shapes for c in colors if held_out or (s, c) not in HELD_OUT]
        if len(pairs) < count:
            continue
        chosen = rng.sample(pairs, count)
        if not held_out or any(pair in HELD_OUT for pair in chosen):
            break
    places = sorted(rng.sample(range(9), count))
    objects = tuple(
        [
            Object(shape, color, "large" if rng.random() < 0.5 else "small", PLACES[place])
            for (shape, color), place in zip(chosen, places, strict=True)
        ]
    )
    return Scene(objects, rng.choice(BACKGROUNDS))
