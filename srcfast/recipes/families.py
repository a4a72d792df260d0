"""What the bases of the study learn from: pictures of all data families with dense labels, captions and questions.

Samples come from the splits that calibration does not use: `base`, of easy-VQA `fit`. A picture here is all samples about the
same images.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from srcfast.config.datasets import DatasetConfig
from srcfast.data.images import load_image
from srcfast.data.records import Sample
from srcfast.recipes.language import Drawn, Stage, Writer
from srcfast.recipes.vision_tower import IMAGE_CLASSES, PATCH_CLASSES, Labelled, cell_labels
from srcfast.stages.datasets import read_dataset
from srcfast.stages.prompts import image_keys
from srcfast.world.rationales import perception_questions
from srcfast.world.scenes import BACKGROUNDS, COLORS, PLACES, SHAPES, Scene

FAMILIES = ("world", "clips", "digits", "charts", "easy_vqa")
IMAGE_SIZE = 144  # pixels a side: a chart's own; the others' images are enlarged
PATCH_SIZE = 16  # 3 x 3 patches in each of the world's cells
SIDE = IMAGE_SIZE // PATCH_SIZE

HEIGHTS = 51  # of a bar, in fiftieths of the axis
AXES = (10, 20, 50, 100)
# Of each patch: the world's attributes of its cell, the digit in its cell (0: none); of a chart's patch the bar that it is above
# or on (0: none), its height, the axis, and its value in two digits, in tenths on an axis to 10.
CLASSES = {
    **dict(zip(("shape", "color", "size", "place"), PATCH_CLASSES, strict=True)),
    "digit": 11,
    "bar": 6,
    "height": HEIGHTS,
    "axis": len(AXES),
    "tens": 11,
    "ones": 10,
}
OF_IMAGE = dict(zip(("background", "single_shape", "single_color"), IMAGE_CLASSES, strict=True))
_WORLD, _DIGIT, _CHART = slice(0, 4), [4, 3], slice(5, 10)  # columns of the patches' labels
_LEFT, _WIDTH = 0.18, 0.79  # of a chart's axes, as shares of the image

# Words that R-Scorers read and write.
_OF_SCORERS = (
    "Question Facts Answer First Second Better Score first second tie A detail of the reference may be wrong missing"
)
Picture = list[Sample]
# The last one is easy-VQA's in place of the first three.
Split = Literal["base", "train", "scorer", "validation", "test", "fit"]


def read_family(name: str, count: int, seed: int, images: Path, split: Split = "base") -> list[Sample]:
    """Draw samples of a family, only those with rationales; images are drawn into a directory."""
    if name == "easy_vqa" and split not in ("validation", "test"):
        split = "fit"
    dataset = DatasetConfig(name=name, format=name, split=split, limit=count, seed=seed)
    return [sample for sample in read_dataset(dataset, images, []) if sample.rationale]


def by_images(samples: Sequence[Sample]) -> list[Picture]:
    """Group samples of the same images."""
    groups: dict[tuple[str, ...], Picture] = {}
    for sample in samples:
        groups.setdefault(image_keys(sample), []).append(sample)
    return list(groups.values())


# --- Dense labels -------------------------------------------------------------------------------------------


def label(pictures: Sequence[Picture]) -> Labelled:
    """Read all images of some pictures, with their labels."""
    pixels: list[np.ndarray] = []
    patches: list[np.ndarray] = []
    images: list[np.ndarray] = []
    for sample in (picture[0] for picture in pictures):
        for number, name in enumerate(sample.images):
            pixels.append(np.asarray(load_image(sample.image_root, name)))
            of_patches, of_image = labels_of(sample, number, pixels[-1])
            patches.append(of_patches)
            images.append(of_image)

    def chosen(indices: np.ndarray) -> np.ndarray:
        return np.stack([enlarged(pixels[index]) for index in indices])

    return Labelled(chosen, np.stack(patches), np.stack(images))


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """Resize an image [height, width, 3] to the tower's size, as the processor does."""
    if pixels.shape[:2] == (IMAGE_SIZE, IMAGE_SIZE):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def labels_of(sample: Sample, number: int, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return labels of the patches [81, attributes] and of the image [3] for one of a sample's images; -100: none."""
    patches = np.full((SIDE * SIDE, len(CLASSES)), -100, dtype=np.int64)
    image = np.full(len(OF_IMAGE), -100, dtype=np.int64)
    rows, columns = np.divmod(np.arange(SIDE * SIDE), SIDE)
    cells = rows * 3 // SIDE * 3 + columns * 3 // SIDE
    extra = sample.extra
    if "numbers" in extra and "axis" not in extra["numbers"]:
        digits = {PLACES.index(place): int(value) for place, value in extra["numbers"]["values"].items()}
        patches[:, _DIGIT] = np.array([(digits.get(cell, -1) + 1, cell) for cell in range(len(PLACES))])[cells]
    elif "numbers" in extra:
        patches[:, _CHART] = _chart_labels(extra["numbers"])[columns]
    else:
        scene = Scene.from_json(extra["clip"][number] if "clip" in extra else extra["scene"])
        if scene.background is None:
            shape, color = scene.objects[0].shape, scene.objects[0].color
            image[1] = -100 if shape is None else SHAPES.index(shape)
            image[2] = -100 if color is None else COLORS.index(color)
            patches[:, _WORLD] = _single_labels(image[1], image[2], pixels)
        else:
            patches[:, _WORLD] = cell_labels(scene)[cells]
            image[0] = BACKGROUNDS.index(scene.background)
    return patches, image


def _chart_labels(numbers: dict[str, Any]) -> np.ndarray:
    """Return labels [columns of patches, 5]: bar, height, axis, tens and ones; left of the bars the axis alone."""
    axis, values = numbers["axis"], list(numbers["values"].values())
    labels = np.full((SIDE, 5), -100, dtype=np.int64)
    labels[:, 0], labels[:, 2] = 0, AXES.index(axis)
    middles = (np.arange(SIDE) + 0.5) / SIDE
    bars = np.rint((middles - _LEFT) / _WIDTH * (len(values) + 0.2) - 0.6).astype(
        int
    )  # the axis runs from -0.6 to n - 0.4
    for column in np.flatnonzero((middles > _LEFT) & (bars >= 0) & (bars < len(values))):
        value = values[bars[column]]
        tens, ones = divmod(round(value * 10 if axis == 10 else value), 10)
        labels[column] = (bars[column] + 1, round(value / axis * (HEIGHTS - 1)), labels[column, 2], tens, ones)
    return labels


def _single_labels(shape: int, color: int, pixels: np.ndarray) -> np.ndarray:
    """Return labels [81, 4] of easy-VQA's images: the object on patches of which it covers a quarter, no label at its edge."""
    differs = np.abs(enlarged(pixels).astype(int) - pixels[0, 0]).max(-1) > 40  # from the background
    covered = differs.reshape(SIDE, PATCH_SIZE, SIDE, PATCH_SIZE).mean((1, 3)).flatten()
    labels = np.full((SIDE * SIDE, 4), -100, dtype=np.int64)
    labels[covered == 0, :3] = 0
    labels[covered > 0.25, :2] = [value if value < 0 else value + 1 for value in (shape, color)]
    return labels


# --- Texts --------------------------------------------------------------------------------------------------


def caption(sample: Sample) -> tuple[str, str]:
    """Return the question for a dense caption, and the caption: all facts."""
    return f"Describe the image{'s' if len(sample.images) > 1 else ''}.", " ".join(sample.facts)


def perceptions(sample: Sample, rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Draw questions about what is to be seen, with answers in the sentences that rationales have."""
    return [_perception(sample, rng) for _ in range(count)]


def _perception(sample: Sample, rng: random.Random) -> tuple[str, str]:
    extra = sample.extra
    if "numbers" in extra:
        names = list(extra["numbers"]["values"])
        index = rng.randrange(len(names))
        what = names[index] if "axis" in extra["numbers"] else f"at the {names[index]}"
        return f"What is {what}?", sample.facts[index]
    if "clip" in extra:
        number = rng.randrange(len(extra["clip"]))
        [(question, answer)] = perception_questions(Scene.from_json(extra["clip"][number]), rng, 1)
        frame = f"In frame {number + 1}, "
        return frame + question[0].lower() + question[1:], answer.replace("There is", f"{frame}there is")
    scene = Scene.from_json(extra["scene"])
    if scene.background is None:  # easy-VQA's objects have no place to ask for
        return caption(sample)
    [pair] = perception_questions(scene, rng, 1)
    return pair


def corpus(samples: Sequence[Sample], rng: random.Random) -> Iterator[str]:
    """Yield the texts on which the tokenizer is trained."""
    for sample in samples:
        rationale = " ".join([*sample.extra["see"], *sample.extra["think"]])
        yield f"USER: {' '.join(caption(sample))} {sample.question} ASSISTANT: {rationale} {sample.answer} {_OF_SCORERS}"
        for question, answer in perceptions(sample, rng, 2):
            yield f"{question} ASSISTANT: {answer}"


def picture_tree(writer: Writer, picture: Picture, rng: random.Random) -> Drawn:
    """Draw a tree of images: perception questions, short answers and, with probability 1/4, a caption."""
    first = picture[0]
    pairs = [caption(first)] if rng.random() < 0.25 else []
    pairs += dict(perceptions(first, rng, 6)).items()
    pairs += [(sample.question, sample.answer) for sample in rng.sample(picture, min(4, len(picture)))]
    return writer.tree(writer.image_root(len(first.images)), pairs, image_keys(first))


def text_tree(writer: Writer, picture: Picture, questions: int, rng: random.Random) -> Drawn:
    """Draw a tree of a picture's facts as text, with questions that tagged rationales answer."""
    asked = [
        (sample.question, sample.extra["see"], sample.extra["think"], sample.answer)
        for sample in rng.sample(picture, min(questions, len(picture)))
    ]
    return writer.text_tree(picture[0].facts, asked)


def draw_trees(
    writer: Writer, pictures: Mapping[str, Sequence[Picture]], weights: Mapping[str, float], stage: Stage, seed: str
) -> list[Drawn]:
    """Draw the trees of a step of a stage: families in the shares of their weights, any picture of a family."""
    rng = random.Random(seed)
    count = stage.pictures_per_step + stage.texts_per_step
    chosen = [rng.choice(pictures[name]) for name in rng.choices(list(weights), list(weights.values()), k=count)]
    trees = [picture_tree(writer, picture, rng) for picture in chosen[: stage.pictures_per_step]]
    texts = chosen[stage.pictures_per_step :]
    return trees + [text_tree(writer, picture, stage.questions_per_text, rng) for picture in texts]
