"""From images to embeddings: transformers' own vision towers, projectors and processors, language model left out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, LlavaModel, LlavaNextModel
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from srcfast.errors import InputError
from srcfast.models.checkpoint import refuse_more_than_stored
from srcfast_kernels.transfers import send

SIGHT = ("vision_tower.", "multi_modal_projector.", "image_newline")  # in names of tensors


class TiledSight(LlavaNextModel):
    """LLaVA-NeXT's tower and projector, which put an image's tiles together without waiting for the device.

    transformers' own sends the images' lengths to the device from memory that can be paged; nothing here reads them.
    """

    def pack_image_features(
        self,
        image_features: Sequence[Tensor],
        image_sizes: Tensor,
        vision_feature_select_strategy: str,
        image_newline: Tensor,
    ) -> tuple[list[Tensor], list[int]]:
        """Embeddings [n_i, D] of each image, from those of its tiles [tiles, patches, D] and its height and width; and n_i."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        packed = []
        for tiles, size in zip(image_features, image_sizes.tolist(), strict=True):  # the first is the whole image
            rows, columns = get_anyres_image_grid_shape(size, self.config.image_grid_pinpoints, vision.image_size)
            grid = tiles[1:].view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3)
            grid = unpad_image(grid.flatten(1, 2).flatten(2, 3), size)  # [D, height, width]
            ends = image_newline[:, None, None].expand(*grid.shape[:-1], 1)
            lines = torch.cat((grid, ends), dim=-1).flatten(1, 2).T
            packed.append(torch.cat((tiles[0], lines)))
        return packed, [len(own) for own in packed]


FAMILIES = {"llava": LlavaModel, "llava_next": TiledSight}


class Vision(nn.Module):
    """Tower and projector of a LLaVA-1.5 or LLaVA-NeXT checkpoint; never trained, never in a gradient."""

    def __init__(self, config: Any, path: str | Path) -> None:
        super().__init__()
        if config.model_type not in FAMILIES:
            raise InputError(
                file=path,
                field="model_type",
                expected=" or ".join(FAMILIES),
                found=config.model_type,
                mend="choose a LLaVA-1.5 or LLaVA-NeXT checkpoint",
            )
        self.config = config
        token = config.image_token_id
        if type(token) is not int or not 0 <= token < config.text_config.vocab_size:
            raise InputError(file=path, field="image_token_id", expected="a token of the vocabulary", found=repr(token))
        if config.vision_feature_select_strategy not in ("default", "full"):
            raise InputError(
                file=path,
                field="vision_feature_select_strategy",
                expected="default or full",
                found=repr(config.vision_feature_select_strategy),
            )
        settings = config.vision_config
        if settings.patch_size > settings.image_size:
            raise InputError(
                file=path,
                field="vision_config.patch_size",
                expected=f"at most image_size, {settings.image_size}",
                found=settings.patch_size,
            )
        self.processor = load_image_processor(path)
        try:
            with torch.device("meta"):
                sketch = bare_model(config)
            refuse_more_than_stored([sketch], path, SIGHT)
            self.model = bare_model(config)
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            found = f"{type(error).__name__}: {error}"
            raise InputError(
                file=path, field="vision_config", expected="settings of a vision tower", found=found
            ) from error
        self._waiting: list[Tensor] = []  # weights on the host, of a tower that waits there

    def train(self, mode: bool = True) -> Vision:
        """Never: a tower's own dropout would make of one image another in each run."""
        return super().train(False)

    def rest(self) -> None:
        """From now on the weights wait on the host, and are on their device within `awake` alone. Not where that is the host."""
        parameters = list(self.model.parameters())
        if parameters[0].is_cuda and not self._waiting:
            self._works_on = parameters[0].device
            self._waiting = [parameter.data.cpu().pin_memory() for parameter in parameters]
            self._place(self._waiting)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Within: the weights are on their device. They never change, so the way back costs nothing."""
        if not self._waiting:
            yield
            return
        self._place([weight.to(self._works_on, non_blocking=True) for weight in self._waiting])
        try:
            yield
        finally:
            self._place(self._waiting)

    def _place(self, weights: Sequence[Tensor]) -> None:
        for parameter, weight in zip(self.model.parameters(), weights, strict=True):
            parameter.data = weight

    def num_tokens(self, image: Image.Image) -> int:
        """How many positions the image takes in the decoder."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        has_class_token = vision.model_type == "clip_vision_model"
        dropped = self.config.vision_feature_select_strategy == "default"
        base = side * side + has_class_token - dropped
        if self.config.model_type == "llava":
            return base
        size = (image.height, image.width)
        rows, columns = get_anyres_image_grid_shape(size, self.config.image_grid_pinpoints, vision.image_size)
        grid = torch.empty(1, rows * side, columns * side, device="meta")
        _, height, width = unpad_image(grid, size).shape
        return base + height * (width + 1)  # a newline embedding ends each row

    def prepare(self, image: Image.Image) -> dict[str, Tensor]:
        """The processor's tensors of one image, on the CPU: pixel_values, and for LLaVA-NeXT image_sizes."""
        inputs = self.processor(images=[image], return_tensors="pt")
        return {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}

    def forward(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Embeddings [n_i, D] of each image."""
        return self.encode([self.prepare(image) for image in images])

    @torch.no_grad()
    def encode(self, prepared: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        """Embeddings [n_i, D] of each prepared image."""
        parameter = next(self.model.parameters())
        # One by one: what workers prepared lies in page-locked memory already.
        pixels = [send(own["pixel_values"], parameter.device).to(parameter.dtype) for own in prepared]
        if self.config.model_type == "llava":
            sizes = {}
        else:  # [1, tiles, 3, H, W] each: fewer tiles are filled up, and left out again by the image's size
            most = max(part.shape[1] for part in pixels)
            pixels = [F.pad(part, (0, 0) * 3 + (0, most - part.shape[1])) for part in pixels]
            sizes = {"image_sizes": torch.cat([own["image_sizes"] for own in prepared])}
        return list(self.model.get_image_features(torch.cat(pixels), **sizes).pooler_output)


def bare_model(config: Any) -> nn.Module:
    """Tower and projector of a LLaVA config, not yet filled."""
    bare = copy.deepcopy(config)
    # transformers builds the language model too; it is made next to nothing, then dropped.
    bare.text_config.num_hidden_layers, bare.text_config.vocab_size = 0, 1
    bare.text_config.pad_token_id = bare.text_config.bos_token_id = bare.text_config.eos_token_id = None
    model = FAMILIES[config.model_type](bare)
    del model.language_model
    return model


def load_image_processor(path: str | Path) -> Any:
    """The checkpoint's image processor, in the backend that needs Pillow and numpy alone. Raises InputError."""
    try:
        return AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
    except Exception as error:  # TypeError, KeyError, ... for a file of other fields
        raise InputError(file=path, expected="an image processor's preprocessor_config.json", found=error) from error
