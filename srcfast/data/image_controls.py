"""Replace the images of an evaluation set, to measure what a model answers without seeing: blank ones, or another sample's."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from srcfast.data.images import load_image
from srcfast.data.jsonl import replacing
from srcfast.data.records import Sample
from srcfast.errors import InputError

GRAY = (127, 127, 127)


def blank_images(samples: Sequence[Sample], directory: Path) -> list[Sample]:
    """Return the samples with plain gray images of the same sizes, which are written to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    names: dict[str, str] = {}
    for sample in samples:
        for name, file in zip(sample.images, _files(sample), strict=True):
            if file not in names:
                width, height = load_image(sample.image_root, name).size
                names[file] = f"blank-{width}x{height}.png"
                if not (directory / names[file]).is_file():
                    with replacing(directory / names[file]) as output:
                        Image.new("RGB", (width, height), GRAY).save(output, format="PNG")
    return [
        replace(sample, images=tuple(names[file] for file in _files(sample)), image_root=directory)
        for sample in samples
    ]


def shuffled_images(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Return the samples, each with the images of another one that has as many but shows none of the same files.

    Raises:
        InputError: samples of one number of images have too few distinct ones.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        if sample.images:
            groups[len(sample.images)].append(index)
    shuffled = list(samples)
    for count, members in groups.items():
        # Samples of the same images stand together, so that a step over the largest such group leads each to other images.
        sizes = Counter(_files(samples[index]) for index in members)
        rng = random.Random(f"shuffled/{seed}/{count}")
        rank = {files: rng.random() for files in sorted(sizes)}
        members.sort(key=lambda index: (rank[_files(samples[index])], index))
        step = max(sizes.values())
        for position, index in enumerate(members):
            other = samples[members[(position + step) % len(members)]]
            if {*_files(other)} & {*_files(samples[index])}:
                raise InputError(
                    sample_id=samples[index].id,
                    field="images",
                    expected="another sample with as many images, all of them others",
                    found=f"{step} of {len(members)} samples with the same images",
                    fix="take more samples, or leave out images: shuffled",
                )
            shuffled[index] = replace(samples[index], images=other.images, image_root=other.image_root)
    return shuffled


def _files(sample: Sample) -> tuple[str, ...]:
    return tuple(str(Path(sample.image_root) / name) for name in sample.images)
