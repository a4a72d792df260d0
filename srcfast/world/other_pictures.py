"""Pictures for tests alone: scenes drawn by a second renderer, and pictures that are blurred, covered or noisy.

No training data has such pictures. The second renderer draws the same scenes with other hues, outlines, hatching, wider
stripes, crosses in place of dots, tilted by a few degrees, slightly blurred, and compressed as JPEG.
"""

from __future__ import annotations

import colorsys
import io
import math
import random
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from srcfast.errors import InputError
from srcfast.world.render import CELL, EXTENT, IMAGE_SIZE, Point, outline_of
from srcfast.world.scenes import COLUMN, ROW, Object, Scene

SCALE = 4  # pixels that are drawn for each pixel of the picture
HUES = {
    "black": (24, 24, 32),
    "gray": (118, 118, 112),
    "red": (222, 24, 40),
    "blue": (30, 40, 226),
    "green": (20, 226, 48),
    "yellow": (242, 232, 36),
    "brown": (148, 60, 28),
    "teal": (16, 140, 140),
}

Degradation = Literal["blurred", "covered", "noisy"]
DEGRADATIONS: tuple[str, ...] = get_args(Degradation)
LEVELS = (1, 2, 3)
_BLUR = (1.0, 2.0, 3.5)  # pixels, the Gaussian's standard deviation
_COVERS = (2, 4, 7)  # squares
_COVER_SIDE = 18  # pixels
_COVER_COLOR = (206, 130, 226)  # which no object has
_NOISE = (50, 110, 190)  # the most that is added to a channel or subtracted from it


def degrade(picture: Image.Image, kind: Degradation, level: int, seed: int) -> Image.Image:
    """Blur a picture, cover parts of it by squares, or add noise to it: more at each level, from 1 to 3.

    The same picture, kind, level and seed always give the same pixels. Raises InputError for another kind or level.
    """
    if kind not in DEGRADATIONS or level not in LEVELS:
        expected = f"one of {', '.join(DEGRADATIONS)}, and a level of 1, 2 or 3"
        raise InputError(field="split", expected=expected, found=f"{kind}-{level}")
    rng = random.Random(f"{kind}/{level}/{seed}")
    if kind == "blurred":
        return picture.filter(ImageFilter.GaussianBlur(_BLUR[level - 1]))
    if kind == "covered":
        covered = picture.copy()
        draw = ImageDraw.Draw(covered)
        for _ in range(_COVERS[level - 1]):
            x, y = (rng.randrange(side - _COVER_SIDE + 1) for side in picture.size)
            draw.rectangle((x, y, x + _COVER_SIDE - 1, y + _COVER_SIDE - 1), fill=_COVER_COLOR)
        return covered
    pixels = np.asarray(picture).astype(np.int32)  # [height, width, 3]
    noise = np.frombuffer(rng.randbytes(pixels.size), np.uint8).reshape(pixels.shape).astype(np.int32)  # uniform
    noisy = pixels + (2 * noise - 255) * _NOISE[level - 1] // 255
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def render_otherwise(scene: Scene, seed: int) -> Image.Image:
    """Render a fully known scene as a 72x72 RGB image by the second renderer; deterministic as `render.render` is."""
    rng = random.Random(f"otherwise/{seed}")
    side = IMAGE_SIZE * SCALE
    tint = tuple([rng.randint(214, 240) for _ in range(3)])
    image = Image.new("RGB", (side, side), tint)
    _draw_background(ImageDraw.Draw(image), scene.background, tint, side, rng)
    for o in scene.objects:
        _draw_object(image, o, rng)
    image = image.rotate(rng.uniform(-4, 4), Image.Resampling.BICUBIC, fillcolor=tint).reduce(SCALE)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.6)))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=rng.randint(70, 85), subsampling=0)
    with Image.open(file) as compressed:
        return compressed.convert("RGB")


def _draw_background(
    draw: ImageDraw.ImageDraw, background: str | None, tint: tuple[int, ...], side: int, rng: random.Random
) -> None:
    shade = tuple([value - rng.randint(30, 44) for value in tint])
    spacing = rng.randint(9, 11) * SCALE
    offset = rng.randrange(spacing)
    if background == "striped":
        vertical = rng.random() < 0.5
        for start in range(offset - spacing, side, spacing):
            box = (start, 0, start + 3 * SCALE, side) if vertical else (0, start, side, start + 3 * SCALE)
            draw.rectangle(box, fill=shade)
    elif background == "dotted":
        arm, half = 2 * SCALE, SCALE // 2
        for x in range(offset, side, spacing):
            for y in range(offset, side, spacing):
                draw.rectangle((x - arm, y - half, x + arm, y + half), fill=shade)
                draw.rectangle((x - half, y - arm, x + half, y + arm), fill=shade)


def _draw_object(image: Image.Image, o: Object, rng: random.Random) -> None:
    assert o.shape and o.color and o.size and o.place
    half = rng.uniform(*EXTENT[o.size]) / 2
    center = [(line[o.place] + 0.5) * CELL + rng.uniform(-1, 1) for line in (COLUMN, ROW)]
    tilt = math.radians(rng.uniform(-9, 9))
    corners = [_placed(point, center, tilt) for point in _outline(o.shape, half, rng)]
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    fill = _changed(HUES[o.color], 1.0, rng)
    image.paste(fill, mask=mask)
    lines = Image.new("L", image.size)  # the hatching
    draw, spacing, side = ImageDraw.Draw(lines), rng.randint(4, 5) * SCALE, image.size[0]
    slant = rng.choice((-1, 1)) * rng.randint(side // 2, side)
    for start in range(-side, 2 * side, spacing):
        draw.line((start, 0, start + slant, side), fill=255, width=SCALE)
    image.paste(_changed(fill, 0.86, rng), mask=ImageChops.multiply(mask, lines))
    width = rng.choice((1, 2)) * SCALE // 2
    ImageDraw.Draw(image).line(
        [*corners, corners[0], corners[1]], fill=_changed(fill, 0.7, rng), width=width, joint="curve"
    )


def _outline(shape: str, half: float, rng: random.Random) -> list[Point]:
    """Return the polygon of a shape about the origin, in pixels."""
    if shape == "circle":
        turns = [2 * math.pi * corner / 48 for corner in range(48)]
        return [(half * math.cos(turn), half * math.sin(turn)) for turn in turns]
    return outline_of(shape, half, rng)


def _placed(point: Point, center: list[float], tilt: float) -> Point:
    """Turn a point about the origin and move it to the center; from pixels of the picture to those that are drawn."""
    x, y = point
    turned = x * math.cos(tilt) - y * math.sin(tilt), x * math.sin(tilt) + y * math.cos(tilt)
    return (center[0] + turned[0]) * SCALE, (center[1] + turned[1]) * SCALE


def _changed(color: tuple[int, ...], brightness: float, rng: random.Random) -> tuple[int, int, int]:
    """Turn a color's hue a little, and multiply its brightness."""
    hue, saturation, value = colorsys.rgb_to_hsv(*[channel / 255 for channel in color])
    rgb = colorsys.hsv_to_rgb((hue + rng.uniform(-0.012, 0.012)) % 1, saturation, value * brightness)
    red, green, blue = (round(255 * channel) for channel in rgb)
    return red, green, blue
