"""Teach a vision tower to perceive: each patch tells what stands at its place, on dense labels, before any language.

The base LVLM is meant to see well and reason poorly, so that what calibration has to bring out is reasoning. Half of
the pictures are scenes; the other half show one object at any place and extent, so that the tower does not depend on
the grid.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import CLIPVisionModel

from srcfast.recipes.base_checkpoint import PATCH_SIZE
from srcfast.world import render
from srcfast.world.scenes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    sample_scenes,
)

SIDE = render.IMAGE_SIZE // PATCH_SIZE
PLACE_OF_PATCH = np.array([r * 3 // SIDE * 3 + c * 3 // SIDE for r in range(SIDE) for c in range(SIDE)])  # [36]
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


class PatchHeads(nn.Module):
    """Linear read-outs of every patch (shape, color, size of what stands at its place, 0: nothing; the place) and of all.

    Each patch alone is to tell all of an object, so that a language model finds it with one look.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.sizes = [len(SHAPES) + 1, len(COLORS) + 1, len(SIZES) + 1, len(PLACES)]
        self.patch = nn.Linear(hidden_size, sum(self.sizes))
        self.image = nn.Linear(hidden_size, len(BACKGROUNDS) + len(SHAPES) + len(COLORS))

    def forward(self, patches: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """From patch features [batch, 36, hidden] to logits by patch [batch, 36, classes] and by image."""
        by_image = self.image(patches.mean(1)).split([len(BACKGROUNDS), len(SHAPES), len(COLORS)], dim=-1)
        return self.patch(patches).split(self.sizes, dim=-1), by_image


def patch_labels(scene: Scene) -> np.ndarray:
    """[36, 4] int64: shape, color and size of what stands at each patch's place, 0 where nothing stands; the place."""
    labels = np.zeros((len(PLACES), 4), dtype=np.int64)
    labels[:, 3] = np.arange(len(PLACES))
    for o in scene.objects:
        found = (SHAPES.index(o.shape) + 1, COLORS.index(o.color) + 1, SIZES.index(o.size) + 1)
        labels[PLACES.index(o.place), :3] = found
    return labels[PLACE_OF_PATCH]


def single_labels(shape: str, color: str, center: Sequence[float], extent: float) -> np.ndarray:
    """[36, 4] as `patch_labels`: the object on the patches that it covers well, nothing where it doesn't reach.

    Size, and patches at its edge, are left open (-100).
    """
    labels = np.zeros((len(PLACE_OF_PATCH), 4), dtype=np.int64)
    labels[:, 3] = PLACE_OF_PATCH
    for patch in range(len(PLACE_OF_PATCH)):
        middle = ((patch % SIDE + 0.5) * PATCH_SIZE, (patch // SIDE + 0.5) * PATCH_SIZE)
        away = max(abs(a - b) for a, b in zip(center, middle, strict=True))
        inside = (extent + PATCH_SIZE) / 2 - away  # pixels by which patch and object overlap
        if inside > 2:
            labels[patch, :3] = (SHAPES.index(shape) + 1, COLORS.index(color) + 1, -100)
        elif inside > 0:
            labels[patch, :3] = -100
    return labels


def render_single(shape: str, color: str, rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    """One object anywhere, 7 to 38 pixels in extent, on a plain light background; and its `single_labels`."""
    scale = render.SUPERSAMPLING
    side = render.IMAGE_SIZE
    image = Image.new("RGB", (side * scale, side * scale), tuple(rng.randint(228, 255) for _ in range(3)))
    extent = math.exp(rng.uniform(math.log(7), math.log(38)))
    center = [rng.uniform(extent / 2, side - extent / 2) for _ in range(2)]
    render.draw_shape(ImageDraw.Draw(image), shape, color, center[0], center[1], extent, rng)
    return image.reduce(scale), single_labels(shape, color, center, extent)


def picture_set(count: int, seed: int, split: str = "base") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`count` pictures: pixels [count, 72, 72, 3] uint8, patch labels [count, 36, 4], image labels [count, 3].

    A label of -100 is not trained on: the size of a single object, the single shape and color of a scene.
    """
    rng = random.Random(f"pictures/{seed}")
    scenes = sample_scenes(split, count // 2, seed)
    pixels = np.empty((count, render.IMAGE_SIZE, render.IMAGE_SIZE, 3), dtype=np.uint8)
    patches = np.full((count, len(PLACE_OF_PATCH), 4), -100, dtype=np.int64)
    images = np.full((count, 3), -100, dtype=np.int64)
    pairs = [(s, c) for s in SHAPES for c in COLORS if (s, c) not in HELD_OUT]
    for index in range(count):
        if index < len(scenes):
            pixels[index] = np.asarray(render.render(scenes[index], rng.randrange(2**31)))
            patches[index] = patch_labels(scenes[index])
            images[index, 0] = BACKGROUNDS.index(scenes[index].background)
        else:
            shape, color = rng.choice(pairs)
            image, patches[index] = render_single(shape, color, rng)
            pixels[index] = np.asarray(image)
            images[index, 1:] = (SHAPES.index(shape), COLORS.index(color))
    return pixels, patches, images


def normalise(pixels: np.ndarray) -> Tensor:
    """[batch, 72, 72, 3] uint8 -> [batch, 3, 72, 72] float, with CLIP's mean and deviation."""
    values = torch.from_numpy(pixels).float() / 255
    return ((values - CLIP_MEAN) / CLIP_STD).permute(0, 3, 1, 2).contiguous()


def teach_tower(
    tower: CLIPVisionModel,
    *,
    pictures: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[int, int, float], None],
) -> dict[str, float]:
    """Train `tower` in place; returns accuracies on 2,000 pictures of unseen scenes."""
    torch.manual_seed(seed)
    tower.set_attn_implementation("eager")  # on the CPU the fused kernel's backward takes most of a step
    pixels, labels, images = picture_set(pictures, seed)
    heads = PatchHeads(tower.config.hidden_size)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, fused=True)
    total = epochs * pictures // batch_size
    generator = np.random.default_rng(seed)
    order = np.concatenate([generator.permutation(pictures) for _ in range(epochs)])
    for step in range(total):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / total)))
        batch = order[step * batch_size : (step + 1) * batch_size]
        with torch.autocast("cpu", dtype=torch.bfloat16):  # three times fp32's GEMM rate where the CPU has bf16
            patches = tower(normalise(pixels[batch])).last_hidden_state[:, 1:]  # [batch, 36, hidden]
        by_patch, by_image = heads(patches.float())
        patch_target, image_target = torch.from_numpy(labels[batch]), torch.from_numpy(images[batch])
        loss = sum(
            F.cross_entropy(logits.flatten(0, 1), patch_target[..., k].flatten()) for k, logits in enumerate(by_patch)
        )
        loss = loss + sum(F.cross_entropy(logits, image_target[:, k]) for k, logits in enumerate(by_image))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        on_step(step + 1, total, loss.item())
    return tower_accuracy(tower, heads, seed + 1)


@torch.no_grad()
def tower_accuracy(tower: CLIPVisionModel, heads: PatchHeads, seed: int) -> dict[str, float]:
    """Shares of the patches with and without an object, and of pictures, that are read right; unseen pictures."""
    pixels, labels, images = picture_set(2000, seed, split="validation")
    outputs = [heads(tower(normalise(chunk)).last_hidden_state[:, 1:]) for chunk in np.array_split(pixels, 20)]
    accuracies = {}
    for k, name in enumerate(("shape", "color", "size", "place")):
        guess = torch.cat([by_patch[k] for by_patch, _ in outputs]).argmax(-1).numpy()
        occupied, empty = (labels[..., 0] > 0) & (labels[..., k] >= 0), labels[..., 0] == 0
        accuracies[f"patch_{name}"] = float((guess == labels[..., k])[occupied].mean())
        accuracies[f"empty_{name}"] = float((guess == labels[..., k])[empty].mean())
    for k, name in enumerate(("background", "single_shape", "single_color")):
        guess = torch.cat([by_image[k] for _, by_image in outputs]).argmax(-1).numpy()
        labelled = images[:, k] >= 0
        accuracies[name] = float((guess == images[:, k])[labelled].mean())
    return accuracies
