"""Turn a record into the model's inputs: its prompt's tokens, its images' keys, its images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from srcfast.data.images import image_file, load_image, resolve
from srcfast.data.jsonl import image_print
from srcfast.data.records import Preference, Sample
from srcfast.data.turns import Turn

if TYPE_CHECKING:  # `srcfast curate` reads prints of images without PyTorch
    from srcfast.models.protocols import VisionLanguageModel


class PromptEncoder:
    """Encode prompts of records, each distinct (text, images, turns) once."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model = model
        self.encoded: dict[tuple[str, tuple[str, ...], tuple[Turn, ...]], np.ndarray] = {}

    def __call__(self, record: Sample | Preference) -> np.ndarray:
        """Return the prompt's token ids, `[n]` int64: the chat template's generation prompt, image placeholders expanded.

        Raises:
            InputError: the prompt does not fit the model; it names the sample.
        """
        key = (record.question, image_keys(record), record.turns)
        if key not in self.encoded:
            self.encoded[key] = encode_prompt(self.model, record)
        return self.encoded[key]


def encode_prompt(model: VisionLanguageModel, record: Sample | Preference) -> np.ndarray:
    """Encode a record's prompt `[n]` without a cache, see `PromptEncoder`."""
    images = [image_file(record.image_root, image) for image in record.images]
    return model.encode_prompt(record.question, images, record.id, record.turns)


def image_keys(record: Sample | Preference) -> tuple[str, ...]:
    """Return names of a record's images that are unique across data sets: their paths."""
    return tuple(str(record.image_root / image) for image in record.images)


def image_prints(records: Iterable[Sample | Preference]) -> list[tuple[str, ...]]:
    """Return each record's images' names and SHA-256: the same when their directory moves, others for other images.

    Raises:
        InputError: an image that is missing, or lies outside of its root.
    """
    print_of = cache(lambda root, name: image_print(resolve(root, name), name))  # reads each file once
    return [tuple(print_of(record.image_root, name) for name in record.images) for record in records]


def image_loader(records: Iterable[Sample | Preference]) -> Callable[[str], Image.Image]:
    """Return the function that opens the records' images by `image_keys`, for `srcfast.models.ImageFeatures`."""
    files = {
        key: (record.image_root, image)
        for record in records
        for key, image in zip(image_keys(record), record.images, strict=True)
    }
    return lambda key: load_image(*files[key])
