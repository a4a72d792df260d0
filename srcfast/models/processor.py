"""A checkpoint's own processor: prompts by its chat template, image placeholders at full length, images as tensors.

transformers' processors of several families take a video processor, which needs torchvision. Nothing here reads videos: parts
other than tokenizer and image processor are left out, and the image processor is the one that needs Pillow and numpy alone.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from srcfast.data.jsonl import parse_object
from srcfast.errors import InputError
from srcfast.models.text_model import load_tokenizer
from srcfast.models.vision import load_image_processor

# Of families whose checkpoints have none, since they were not made for chats: images, the question, and the answer with its end.
# PaliGemma's processor adds the first token and the line break behind the question.
TEMPLATES = {
    "paligemma": (
        "{% if messages | length > 2 or messages[0].role != 'user' %}{{ raise_exception('it takes one question alone') }}"
        "{% endif %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content[0].text }}{{ eos_token }}{% else %}"
        "{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
        "{% endif %}{% endfor %}"
    )
}


def load_processor(path: str | Path, model_type: str) -> Any:
    """Load the processor of a checkpoint of this model type, without remote code.

    Raises:
        InputError: transformers has none for this type, or a file is missing or damaged.
    """
    name = PROCESSOR_MAPPING_NAMES.get(model_type) or _processor_class(Path(path))
    if name is None or not isinstance(getattr(transformers, name, None), type):
        raise InputError(file=path, field="model_type", expected="a type with a processor", found=model_type)
    tokenizer, images = load_tokenizer(path), load_image_processor(path)
    try:
        kind = _without_videos(getattr(transformers, name))
        settings, _ = kind.get_processor_dict(path)
        parts = [{"tokenizer": tokenizer, "image_processor": images}.get(part) for part in kind.get_attributes()]
        processor = kind.from_args_and_dict(parts, settings)
    except Exception as error:  # ImportError of an optional package, TypeError, KeyError, ...
        found = f"{type(error).__name__}: {error}"
        raise InputError(file=path, expected=f"the files of a {name}", found=found) from error
    if isinstance(processor, tuple):
        processor = processor[0]
    if isinstance(processor.chat_template, dict):  # of several, by name
        processor.chat_template = processor.chat_template.get("default")
    if not processor.chat_template:
        processor.chat_template = tokenizer.chat_template or TEMPLATES.get(model_type)
    return processor


def _processor_class(path: Path) -> str | None:
    """Return the name of the processor that a checkpoint's files state."""
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if (path / file).is_file():
            with suppress(OSError, ValueError):  # loading the parts names a damaged file
                name = parse_object((path / file).read_bytes()).get("processor_class")
                if isinstance(name, str) and name.endswith("Processor"):
                    return name
    return None


def _without_videos(kind: type[Any]) -> type[Any]:
    """Return the processor's class, but one that may lack parts."""

    def check(self: Any, name: str, part: Any) -> Any:
        return None if part is None else kind.check_argument_for_proper_class(self, name, part)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


TYPICAL_IMAGE = (640, 480)  # width, height in pixels, by which forecasts count an image's positions


def placeholder(processor: Any) -> str:
    """Return the token that the chat template writes for an image, which the processor replaces."""
    return getattr(processor, "image_placeholder_token", None) or processor.image_token


def image_inputs(processor: Any, image: Image.Image, count: int = 1, **options: Any) -> Any:
    """Return what a processor makes of an image and its placeholder alone, or of so many of them."""
    text = placeholder(processor)
    if hasattr(processor, "image_start_token") and hasattr(processor, "image_end_token"):
        text = f"{processor.image_start_token}{text}{processor.image_end_token}"
    return processor(text=[text * count], images=[[image] * count], add_special_tokens=False, **options)


def image_tokens(processor: Any, image: Image.Image, image_token_id: int, num_images: int = 1) -> int:
    """Count the positions that an image takes in a prompt of so many images."""
    count = min(num_images, 2)  # a third changes nothing
    inputs = image_inputs(processor, image, count, return_tensors="pt")
    return int((np.asarray(inputs["input_ids"][0]) == image_token_id).sum()) // count


def typical_image_tokens(path: str | Path, config: Any) -> int:
    """Count the positions of an image of TYPICAL_IMAGE's size, by a checkpoint's processor. Raises InputError without one."""
    processor = load_processor(path, config.model_type)
    return image_tokens(processor, Image.new("RGB", TYPICAL_IMAGE), image_token_id(config))


def image_token_id(config: Any) -> int:
    """Return the id of the image placeholder. Raises InputError where the config names none."""
    for name in ("image_token_id", "image_token_index"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise InputError(field="image_token_id", expected="the id of the image placeholder", found="none")
