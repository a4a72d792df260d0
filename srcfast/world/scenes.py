"""Draw the embedded world's scenes: a few objects on a 3x3 grid, drawn from a seed and split by content.

The split of a scene is a hash of its content, so no two seeds put the same scene into training and test. Six
combinations of shape and color are held out of every split but `generalisation`. They are all stars and
crosses, because easy-VQA, which calibration also uses, shows circles, rectangles and triangles in every color:
so no dataset shows these six in training.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from srcfast.errors import InputError

SHAPES = ("circle", "rectangle", "triangle", "star", "cross")
COLORS = ("black", "gray", "red", "blue", "green", "yellow", "brown", "teal")
SIZES = ("small", "large")
VALUES = {"shape": SHAPES, "color": COLORS, "size": SIZES}
PLURALS = {name: "crosses" if name == "cross" else name + "s" for name in (*SHAPES, "object")}
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
BACKGROUNDS = ("plain", "striped", "dotted")
HELD_OUT = frozenset(
    [("star", "red"), ("star", "teal"), ("star", "gray"), ("cross", "blue"), ("cross", "yellow"), ("cross", "black")]
)

ROW = {place: index // 3 for index, place in enumerate(PLACES)}
COLUMN = {place: index % 3 for index, place in enumerate(PLACES)}

_SHARES = {"base": 48, "train": 24, "scorer": 10, "validation": 8, "test": 10}  # percent
SPLITS = (*_SHARES, "generalisation")


@dataclass(frozen=True, slots=True)
class Object:
    """An object, or a description of objects: `None` is an unknown attribute or, in a description, any value."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None
    place: str | None = None

    def to_json(self) -> dict[str, str | None]:
        return {"shape": self.shape, "color": self.color, "size": self.size, "place": self.place}

    def described(self, *names: str) -> dict[str, str]:
        """Return those of the named attributes, or of all, that are known."""
        return {name: value for name in names or self.__slots__ if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class Scene:
    """Content of an image: its objects in reading order, its background, and what is known to be absent.

    `absent` has descriptions that no object matches. Scenes of the embedded world are fully known and need
    none; an easy-VQA image whose object has an unknown color may still be known to show nothing blue.
    """

    objects: tuple[Object, ...]
    background: str | None = None
    absent: tuple[Object, ...] = ()

    def to_json(self) -> dict[str, Any]:
        scene: dict[str, Any] = {"objects": [o.to_json() for o in self.objects], "background": self.background}
        if self.absent:
            scene["absent"] = [o.to_json() for o in self.absent]
        return scene

    @classmethod
    def from_json(cls, scene: dict[str, Any]) -> Scene:
        """Read what `to_json` wrote. Raises InputError for any other structure."""
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
    """Return a hexadecimal hash of the scene's content, the same on every machine."""
    objects = ";".join([f"{o.shape},{o.color},{o.size},{o.place}" for o in scene.objects])
    return hashlib.sha256(f"{scene.background}|{objects}".encode()).hexdigest()


def split_of(scene: Scene) -> str:
    """Return the split of a scene, a function of its content alone."""
    if any((o.shape, o.color) in HELD_OUT for o in scene.objects):
        return "generalisation"
    return share_of(scene_digest(scene))


def share_of(digest: str) -> str:
    """Return the split, `generalisation` excepted, that a hexadecimal hash falls into."""
    bucket = int(digest[:12], 16) % 100
    for name, share in _SHARES.items():
        if bucket < share:
            return name
        bucket -= share
    raise AssertionError("the shares sum to 100")


def check_split(split: str, splits: Sequence[str] = SPLITS) -> None:
    """Raise InputError for an unknown split."""
    if split not in splits:
        raise InputError(field="split", expected="one of " + ", ".join(splits), found=split)


def sample_scenes(split: str, n: int, seed: int) -> list[Scene]:
    """Draw `n` distinct scenes of a split. Raises InputError for an unknown split."""
    return list(islice(scene_stream(split, seed), n))


def scene_stream(split: str, seed: int) -> Iterator[Scene]:
    """Yield distinct scenes of a split, without end. Raises InputError for an unknown split."""
    check_split(split)
    rng = random.Random(f"{split}/{seed}")
    drawn: set[Scene] = set()
    while True:
        scene = _draw_scene(rng, held_out=split == "generalisation")
        if split_of(scene) == split and scene not in drawn:
            drawn.add(scene)
            yield scene


def _draw_scene(rng: random.Random, held_out: bool) -> Scene:
    """Draw a scene of two to five objects from few shapes and colors, so that both repeat within it."""
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
