"""Train a vision tower on dense labels, before any language: each patch predicts the object in its cell of the grid.

The base LVLM should see well and reason poorly, so that calibration has reasoning to improve. Half of the images are scenes;
the others show one object at any position and extent, so that the tower does not depend on the grid.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import CLIPVisionModel

from srcfast.recipes.base_checkpoint import PATCH_SIZE
from srcfast.recipes.unfinished import Unfinished
from srcfast.world import render
from srcfast.world.scenes import BACKGROUNDS, COLORS, HELD_OUT, PLACES, SHAPES, SIZES, Scene, sample_scenes

SIDE = render.IMAGE_SIZE // PATCH_SIZE
PLACE_OF_PATCH = np.array([r * 3 // SIDE * 3 + c * 3 // SIDE for r in range(SIDE) for c in range(SIDE)])  # [36]
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


class DenseHeads(nn.Module):
    """Linear heads: for attributes of each patch, and for those of the image; their numbers of classes are given.

    Each patch learns all attributes of what is in its cell, so that a language model needs to attend to one patch alone.
    """

    def __init__(self, hidden_size: int, patch_classes: Sequence[int], image_classes: Sequence[int]) -> None:
        super().__init__()
        self.patch_classes, self.image_classes = list(patch_classes), list(image_classes)
        self.patch = nn.Linear(hidden_size, sum(patch_classes))
        self.image = nn.Linear(hidden_size, sum(image_classes))

    def forward(self, patches: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Map patch features [batch, patches, hidden] to logits [batch, patches, classes] and per image [batch, classes]."""
        by_image = self.image(patches.mean(1)).split(self.image_classes, dim=-1)
        return self.patch(patches).split(self.patch_classes, dim=-1), by_image


@dataclass(frozen=True)
class Labelled:
    """Images with labels of their patches [n, patches, attributes] and of the whole [n, attributes]; -100: not trained on.

    `pixels` gives those of some images by their indices, [batch, side, side, 3] uint8.
    """

    pixels: Callable[[np.ndarray], np.ndarray]
    patches: np.ndarray
    images: np.ndarray


PATCH_CLASSES = (len(SHAPES) + 1, len(COLORS) + 1, len(SIZES) + 1, len(PLACES))  # the first three: 0 is no object
IMAGE_CLASSES = (len(BACKGROUNDS), len(SHAPES), len(COLORS))


def cell_labels(scene: Scene) -> np.ndarray:
    """Return labels [9, 4], int64, per cell: shape, color and size of the object in it (0: none), and the cell."""
    labels = np.zeros((len(PLACES), 4), dtype=np.int64)
    labels[:, 3] = np.arange(len(PLACES))
    for o in scene.objects:
        attributes = (SHAPES.index(o.shape) + 1, COLORS.index(o.color) + 1, SIZES.index(o.size) + 1)
        labels[PLACES.index(o.place), :3] = attributes
    return labels


def single_labels(shape: str, color: str, center: Sequence[float], extent: float) -> np.ndarray:
    """Return labels [36, 4] of patches: the object on those that overlap it by over 2 pixels, else none.

    Its size, and patches at its edge, are not trained on (-100).
    """
    labels = np.zeros((len(PLACE_OF_PATCH), 4), dtype=np.int64)
    labels[:, 3] = PLACE_OF_PATCH
    rows, columns = np.divmod(np.arange(len(PLACE_OF_PATCH)), SIDE)
    middles = (np.stack([columns, rows], axis=1) + 0.5) * PATCH_SIZE
    overlap = (extent + PATCH_SIZE) / 2 - np.abs(middles - center).max(axis=1)  # pixels, of each patch with the object
    labels[overlap > 0, :3] = -100
    labels[overlap > 2, :2] = (SHAPES.index(shape) + 1, COLORS.index(color) + 1)
    return labels


def render_single(shape: str, color: str, rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    """Render one object at a random position, 7 to 38 pixels in extent, on a plain light background. Returns its labels too."""
    scale = render.SUPERSAMPLING
    side = render.IMAGE_SIZE
    image = Image.new("RGB", (side * scale, side * scale), tuple(rng.randint(228, 255) for _ in range(3)))
    extent = math.exp(rng.uniform(math.log(7), math.log(38)))
    center = [rng.uniform(extent / 2, side - extent / 2) for _ in range(2)]
    render.draw_shape(ImageDraw.Draw(image), shape, color, center[0], center[1], extent, rng)
    return image.reduce(scale), single_labels(shape, color, center, extent)


def picture_set(count: int, seed: int, split: str = "base") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Render `count` images: pixels [count, 72, 72, 3] uint8, patch labels [count, 36, 4], image labels [count, 3].

    A label of -100 is not trained on: the size of a single object, the image's one shape and color for a scene.
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
            patches[index] = cell_labels(scenes[index])[PLACE_OF_PATCH]
            images[index, 0] = BACKGROUNDS.index(scenes[index].background)
        else:
            shape, color = rng.choice(pairs)
            image, patches[index] = render_single(shape, color, rng)
            pixels[index] = np.asarray(image)
            images[index, 1:] = (SHAPES.index(shape), COLORS.index(color))
    return pixels, patches, images


def normalise(pixels: np.ndarray) -> Tensor:
    """Normalise by CLIP's mean and standard deviation: [batch, side, side, 3] uint8 -> [batch, 3, side, side] float."""
    values = torch.from_numpy(pixels).float() / 255
    return ((values - CLIP_MEAN) / CLIP_STD).permute(0, 3, 1, 2).contiguous()


def scheduled(learning_rate: float, step: int, steps: int, warmup_steps: int) -> float:
    """Return the learning rate of a step: a linear warm-up, then a cosine."""
    return learning_rate * min((step + 1) / warmup_steps, 0.5 * (1 + math.cos(math.pi * step / steps)))


def update(optimizer: torch.optim.Optimizer, loss: Tensor, learning_rate: float) -> None:
    """Take a step, the gradients of each parameter group clipped to norm 1."""
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def train_tower(
    tower: CLIPVisionModel,
    *,
    pictures: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[int, int, float], None],
) -> dict[str, float]:
    """Train `tower` in place, and return accuracies on 2,000 images of unseen scenes."""
    torch.manual_seed(seed)
    pixels, labels, images = picture_set(pictures, seed)
    heads = DenseHeads(tower.config.hidden_size, PATCH_CLASSES, IMAGE_CLASSES)
    train_on_labels(
        tower,
        heads,
        Labelled(pixels.__getitem__, labels, images),
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        on_step=on_step,
    )
    return tower_accuracy(tower, heads, seed + 1)


def train_on_labels(
    tower: CLIPVisionModel,
    heads: DenseHeads,
    labelled: Labelled,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[int, int, float], None],
    unfinished: Unfinished | None = None,
) -> None:
    """Train `tower` and `heads` in place, on epochs that the seed orders; with `unfinished` the training is saved there."""
    tower.set_attn_implementation("eager")  # on a CPU the backward of the fused kernel takes most of a step's time
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], weight_decay=0.01, fused=True)
    pictures = len(labelled.images)
    total = epochs * pictures // batch_size
    generator = np.random.default_rng(seed)
    order = np.concatenate([generator.permutation(pictures) for _ in range(epochs)])
    for step in range(0 if unfinished is None else unfinished.load(optimizer), total):
        batch = order[step * batch_size : (step + 1) * batch_size]
        with torch.autocast("cpu", dtype=torch.bfloat16):  # three times as fast on CPUs with bf16
            patches = tower(normalise(labelled.pixels(batch))).last_hidden_state[:, 1:]  # [batch, patches, hidden]
        by_patch, by_image = heads(patches.float())
        loss = _labelled_loss(by_patch, labelled.patches[batch])
        loss = loss + _labelled_loss(by_image, labelled.images[batch])
        update(optimizer, loss, scheduled(learning_rate, step, total, warmup_steps=100))
        on_step(step + 1, total, loss.item())
        if unfinished is not None:
            unfinished.save_if_due(optimizer, step + 1)


def _labelled_loss(logits: Sequence[Tensor], labels: np.ndarray) -> Tensor:
    """Sum the cross entropies of attributes, each over its labels [..., attributes]; one without labels counts nothing."""
    targets = torch.from_numpy(labels)
    losses = [
        F.cross_entropy(each.flatten(0, -2), targets[..., k].flatten())
        for k, each in enumerate(logits)
        if (labels[..., k] >= 0).any()
    ]
    return sum(losses, torch.zeros(()))


@torch.no_grad()
def tower_accuracy(tower: CLIPVisionModel, heads: DenseHeads, seed: int) -> dict[str, float]:
    """Measure on unseen images the share of right predictions, of patches with and without an object, and of images."""
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
