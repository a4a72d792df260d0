"""Prompts by the images' sizes alone: which text a processor writes for an image depends on nothing else of it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from srcfast.data.images import ImageFile
from srcfast.models.chat import adds_bos
from srcfast.models.processor import image_inputs, placeholder

Sized: TypeAlias = Image.Image | ImageFile
# Width and height in pixels of images of which the processor's own expansions are compared: by count, and in whole prompts.
COUNTED = ((31, 19), (97, 61), (131, 203), (640, 480))
PROMPTED = ((97, 61), (131, 203))


class ImageTexts:
    """Expand image placeholders in a text as a processor does, without pixels.

    Where the processor counts an image's positions by its size (`_get_num_multimodal_tokens`) and writes them in one run, no
    image is processed. Otherwise a blank image is, one of each distinct size.

    Args:
        processor: transformers'.
        image_token: the token of an image's positions.

    Attributes:
        max_images: number of images of a prompt up to which the processor's own token ids were the same; 0 where it is another's
            to expand.
    """

    def __init__(self, processor: Any, image_token: str) -> None:
        self.processor, self.image_token = processor, image_token
        self.placeholder = placeholder(processor)
        self._texts: dict[tuple[int, int], str] = {}
        self._runs = re.compile(f"(?:{re.escape(image_token)})+")
        # Of a processor that counts: what it writes before and behind the positions, and how many tokens it counts beside them.
        self._frame: tuple[str, str, int] | None = None
        self.max_images = self._check()

    def token_ids(self, text: str, images: Sequence[Sized]) -> np.ndarray:
        """Tokenize a text with a placeholder for each image into [n], image positions at full length."""
        parts = text.split(self.placeholder)
        if len(parts) != len(images) + 1:
            raise ValueError(f"{len(parts) - 1} placeholders {self.placeholder} in the prompt for {len(images)} images")
        texts = [self._text((image.width, image.height)) for image in images]
        expanded = parts[0] + "".join(inserted + part for inserted, part in zip(texts, parts[1:], strict=True))
        # One token for each run: thousands of equal ones take time.
        lengths = [len(run) // len(self.image_token) for run in self._runs.findall(expanded)]
        tokenizer, short = self.processor.tokenizer, self._runs.sub(lambda run: self.image_token, expanded)
        ids = np.array(tokenizer(short, add_special_tokens=adds_bos(tokenizer, text)).input_ids, dtype=np.int64)
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[ids == tokenizer.convert_tokens_to_ids(self.image_token)] = lengths
        return np.repeat(ids, repeats)

    def _text(self, size: tuple[int, int]) -> str:
        """Return what the processor writes for an image of this width and height."""
        if size not in self._texts:
            if self._frame is None:
                self._texts[size] = self._processed(size)
            else:
                before, behind, others = self._frame
                self._texts[size] = before + self.image_token * (self._count(size) - others) + behind
        return self._texts[size]

    def _processed(self, size: tuple[int, int]) -> str:
        inputs = image_inputs(self.processor, Image.new("RGB", size), return_text_replacement_offsets=True)
        ((replaced,),) = inputs["text_replacement_offsets"]
        return str(replaced["replacement"])

    def _count(self, size: tuple[int, int]) -> int:
        width, height = size
        return int(self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens[0])

    def _check(self) -> float:
        """Compare expansions with the processor's own of an image, and of two, and return the number of images that agree."""
        try:
            if hasattr(self.processor, "_get_num_multimodal_tokens"):
                frames = {self._frame_of(size) for size in COUNTED}
                self._frame = frames.pop() if len(frames) == 1 else None
            agreed = [self._agrees(PROMPTED[:count]) for count in (1, 2)]
        except Exception:  # of any class, where a processor has other methods, or expands otherwise
            self._frame = None
            return 0
        return 0 if not agreed[0] else math.inf if agreed[1] else 1

    def _frame_of(self, size: tuple[int, int]) -> tuple[str, str, int] | None:
        """Return what stands around the positions of an image of this size; None where they are not one run."""
        parts = self._runs.split(text := self._processed(size))
        if len(parts) != 2:
            return None
        positions = (len(text) - len(parts[0]) - len(parts[1])) // len(self.image_token)
        return parts[0], parts[1], self._count(size) - positions

    def _agrees(self, sizes: Sequence[tuple[int, int]]) -> bool:
        images = [Image.new("RGB", size) for size in sizes]
        text = "a\n".join([self.placeholder] * len(images)) + "\nb"
        bos = adds_bos(self.processor.tokenizer, text)
        own = self.processor(text=[text], images=[images], add_special_tokens=bos)["input_ids"][0]
        return self.token_ids(text, images).tolist() == np.asarray(own).tolist()
