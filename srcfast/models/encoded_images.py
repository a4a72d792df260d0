"""Hand encoded images to transformers' models: in their argument for it, or, where they have none, in place of pixels.

transformers 5.17 has the argument in no model, 5.18 in most, 5.24 in nearly all that encode images by `get_image_features`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.utils import ModelOutput

ARGUMENT = "mm_encoder_outputs"


def takes_encoded_images(model_class: Any) -> bool:
    """Return whether a class has the argument, or a `model` in it, of a class of its module, that encodes images."""
    if _has_argument(model_class):
        return True
    kinds = vars(inspect.getmodule(model_class)).values()
    return model_class.base_model_prefix == "model" and any(hasattr(kind, "get_image_features") for kind in kinds)


def accept_encoded_images(base: Any) -> None:
    """Let a model without the argument take encoded images as pixels; see `image_arguments`."""
    if not _has_argument(base):
        base.get_image_features = _EncodeOrReturn(base.get_image_features)


def image_arguments(base: Any, output: ModelOutput) -> dict[str, Any]:
    """Return the keyword arguments that hand a model what its `get_image_features` would return.

    Without an argument for it, an empty tensor stands for each of the pixels, and holds the output: models ask whether there are
    pixels, and for nothing else of them before they call `get_image_features`.
    """
    if _has_argument(base):
        return {ARGUMENT: {"image": output}}
    stand_in: Any = torch.empty(1)
    stand_in.encoded_images = output
    names = inspect.signature(base.get_image_features).parameters.keys() & inspect.signature(base.forward).parameters
    return {name: stand_in for name in names if "pixel_values" in name}


def _has_argument(model: Any) -> bool:
    """Return whether a model, or a class, takes `mm_encoder_outputs`."""
    return ARGUMENT in inspect.signature(model.forward).parameters


class _EncodeOrReturn:
    """A model's `get_image_features`, which returns encoded images as they are."""

    def __init__(self, encode: Any) -> None:
        self.encode, self.__signature__ = encode, inspect.signature(encode)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        for value in (*arguments, *options.values()):
            if hasattr(value, "encoded_images"):
                return value.encoded_images
        return self.encode(*arguments, **options)
