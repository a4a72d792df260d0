"""Render scenes as images: 72x72 RGB, anti-aliased, with jitter in position, extent, tilt and color.

The colors are easy-VQA's eight on its light backgrounds, so that the vision tower also reads easy-VQA's images.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from PIL import Image, ImageDraw

from srcfast.world.scenes import COLUMN, ROW, Object, Scene

IMAGE_SIZE = 72  # pixels; three cells of 24 a side
CELL = IMAGE_SIZE // 3
SUPERSAMPLING = 3
RGB = {
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (255, 0, 0),
    "blue": (0, 0, 255),
    "green": (0, 255, 0),
    "yellow": (255, 255, 0),
    "brown": (165, 42, 42),
    "teal": (0, 128, 128),
}
EXTENT = {"small": (11.0, 13.0), "large": (17.5, 20.5)}  # pixels, the longer side

Point = tuple[float, float]


def render(scene: Scene, seed: int) -> Image.Image:
    """Render a fully known scene as a 72x72 RGB image; the same scene and seed always give the same pixels."""
    rng = random.Random(seed)
    return _rendered(scene, rng, lambda _: rng)


def render_frame(frame: Scene, seed: int) -> Image.Image:
    """Render a frame of a clip, of which all frames have one seed: the background and each object look the same in all."""
    return _rendered(frame, random.Random(seed), lambda o: random.Random(f"{seed}/{o.shape}/{o.color}"))


def _rendered(scene: Scene, rng: random.Random, jitter_of: Callable[[Object], random.Random]) -> Image.Image:
    side = IMAGE_SIZE * SUPERSAMPLING
    tint = tuple([rng.randint(232, 255) for _ in range(3)])
    image = Image.new("RGB", (side, side), tint)
    draw = ImageDraw.Draw(image)
    _draw_background(draw, scene.background, tint, side, rng)
    for o in scene.objects:
        _draw_object(draw, o, jitter_of(o))
    return image.reduce(SUPERSAMPLING)


def _draw_background(
    draw: ImageDraw.ImageDraw, background: str | None, tint: tuple[int, ...], side: int, rng: random.Random
) -> None:
    depth = rng.randint(26, 38)
    shade = tuple([value - depth for value in tint])
    spacing = rng.randint(7, 9) * SUPERSAMPLING
    offset = rng.randrange(spacing)
    if background == "striped":
        width = 2 * SUPERSAMPLING
        vertical = rng.random() < 0.5
        for start in range(offset - spacing, side, spacing):
            box = (start, 0, start + width, side) if vertical else (0, start, side, start + width)
            draw.rectangle(box, fill=shade)
    elif background == "dotted":
        radius = 1.4 * SUPERSAMPLING
        for x in range(offset, side, spacing):
            for y in range(offset, side, spacing):
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)


def _draw_object(draw: ImageDraw.ImageDraw, o: Object, rng: random.Random) -> None:
    assert o.shape and o.color and o.size and o.place
    extent = rng.uniform(*EXTENT[o.size])
    jitter = max(0.0, (CELL - 1.16 * extent) / 4)  # pixels; a tilted corner stays within the cell
    x = (COLUMN[o.place] + 0.5) * CELL + rng.uniform(-jitter, jitter)
    y = (ROW[o.place] + 0.5) * CELL + rng.uniform(-jitter, jitter)
    draw_shape(draw, o.shape, o.color, x, y, extent, rng)


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, color: str, x: float, y: float, extent: float, rng: random.Random
) -> None:
    """Draw a shape centered at (x, y) pixels, its longer side `extent` pixels, with jitter in color and tilt."""
    fill = tuple([min(255, max(0, value + rng.randint(-20, 20))) for value in RGB[color]])
    half = extent / 2
    if shape == "circle":
        box = [(x - half) * SUPERSAMPLING, (y - half) * SUPERSAMPLING]
        box += [(x + half) * SUPERSAMPLING, (y + half) * SUPERSAMPLING]
        draw.ellipse(box, fill=fill)
        return
    tilt = 0.0 if shape == "rectangle" else math.radians(rng.uniform(-12, 12))
    outline = outline_of(shape, half, rng)
    cosine, sine = math.cos(tilt) * SUPERSAMPLING, math.sin(tilt) * SUPERSAMPLING
    center_x, center_y = x * SUPERSAMPLING, y * SUPERSAMPLING
    corners = [(center_x + px * cosine - py * sine, center_y + px * sine + py * cosine) for px, py in outline]
    draw.polygon(corners, fill=fill)


def outline_of(shape: str, half: float, rng: random.Random) -> list[Point]:
    """Return the polygon of a shape about the origin, in pixels; `half` is half of its longer side."""
    if shape == "rectangle":
        other = half * rng.uniform(0.6, 1.0)
        width, height = (half, other) if rng.random() < 0.5 else (other, half)
        return [(-width, -height), (width, -height), (width, height), (-width, height)]
    if shape == "triangle":
        return [(0.0, -half * 0.95), (half, half * 0.85), (-half, half * 0.85)]
    if shape == "star":
        radii = (half * 1.08, half * 0.42)
        turns = [math.pi * corner / 5 for corner in range(10)]
        return [(radii[i % 2] * math.sin(turn), -radii[i % 2] * math.cos(turn)) for i, turn in enumerate(turns)]
    arm = half * 0.34
    cross = [(-arm, -half), (arm, -half), (arm, -arm)]  # a quarter, of which the others are rotations
    for _ in range(3):
        cross += [(-y, x) for x, y in cross[-3:]]
    return cross
