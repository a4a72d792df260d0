"""From images to embeddings: transformers' own vision towers, projectors and processors, language model left out."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import ImageProcessingMixin, LlavaModel, LlavaNextModel

# From its module: transformers 5.17 says of the package's that it needs torchvision, which it does not.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from srcfast.data.images import ImageFile
from srcfast.errors import InputError, SrcfastError
from srcfast.models.checkpoint import check_weight_count
from srcfast.models.config_bounds import SIDE
from srcfast_kernels.transfers import to_device

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
        """Pack each image's tiles [tiles, patches, D] by its height and width into embeddings [n_i, D]; returns n_i, too."""
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
        return packed, [len(embeddings) for embeddings in packed]


FAMILIES = {"llava": LlavaModel, "llava_next": TiledSight}


@dataclass(frozen=True)
class TowerOutput:
    """What the part of a vision tower below all adapters computes of an image: it stays the same while adapters are trained.

    Attributes:
        values: [tiles, rows, width], the input of the tower's next layer, or of the projector once all are passed.
        passed: number of the tower's layers that are passed.
        size: [1, 2] int64 on the host, height and width of the image in pixels; None for LLaVA-1.5, whose images have one tile.
    """

    values: Tensor
    passed: int
    size: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Return the bytes of the values."""
        return self.values.nbytes


class FrozenVision(nn.Module):
    """A vision tower whose weights are never trained, and may wait on the host while no image is encoded."""

    _host_weights: Sequence[Tensor] = ()  # weights on the host, once `to_host` has been called

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: with a tower's dropout, an image would have other embeddings in each run."""
        return super().train(False)

    def to_host(self) -> None:
        """Move the weights from a GPU to the host; from now on they are on the GPU within `on_device` alone."""
        parameters = self.waiting_parameters()
        if parameters[0].is_cuda and not self._host_weights:
            self._device = parameters[0].device
            self._host_weights = [parameter.data.cpu().pin_memory() for parameter in parameters]
            self._set_weights(self._host_weights)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Move the weights to their device within. They never change, so nothing is copied back."""
        if not self._host_weights:
            yield
            return
        self._set_weights([weight.to(self._device, non_blocking=True) for weight in self._host_weights])
        try:
            yield
        finally:
            self._set_weights(self._host_weights)

    def waiting_parameters(self) -> list[nn.Parameter]:
        """List the parameters that nothing but encoding reads, which may wait on the host."""
        return list(self.parameters())

    @contextmanager
    def changing_adapters(self) -> Iterator[None]:
        """Hold all weights on their device within, where adapters are added or removed: other weights may wait then."""
        waited = bool(self._host_weights)
        if waited:
            self._set_weights([weight.to(self._device) for weight in self._host_weights])
            self._host_weights = ()
        try:
            yield
        finally:
            if waited:
                self.to_host()

    def _set_weights(self, weights: Sequence[Tensor]) -> None:
        for parameter, weight in zip(self.waiting_parameters(), weights, strict=True):
            parameter.data = weight


class Vision(FrozenVision):
    """Tower and projector of a LLaVA-1.5 or LLaVA-NeXT checkpoint; their weights are never trained, adapters on them may be."""

    typical_tokens = None  # of an image: config and size decide them, see `num_tokens`

    def __init__(self, config: Any, path: str | Path) -> None:
        super().__init__()
        _check_config(config, path)
        self.config, self.path = config, Path(path)
        self.processor = load_image_processor(path)
        self.model = _checked_model(config, path)
        shape = list(self.prepare(Image.new("RGB", (96, 64)))["pixel_values"].shape[-3:])
        if shape != (expected := [3, *[int(config.vision_config.image_size)] * 2]):
            fix = "let crop_size and size be the image_size of config.json's vision_config"
            raise InputError(file=path, field="crop_size", expected=f"images of shape {expected}", found=shape, fix=fix)

    def num_tokens(self, image: Image.Image | ImageFile, num_images: int = 1) -> int:
        """Count the positions that the image takes in the decoder, in a prompt of so many images, whatever their number."""
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
        """Process one image into tensors on the CPU: pixel_values, and for LLaVA-NeXT image_sizes."""
        try:
            inputs = self.processor(images=[image], return_tensors="pt")
        except Exception as error:  # of any class, for settings that do not fit each other
            expected, found = "settings by which images are processed", f"{type(error).__name__}: {error}"
            raise InputError(file=self.path / "preprocessor_config.json", expected=expected, found=found) from error
        return {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}

    def forward(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Embed each image: [n_i, D]."""
        return self.encode([self.prepare(image) for image in images])

    def encode(self, prepared: Sequence[dict[str, Tensor]]) -> list[Tensor] | list[TowerOutput]:
        """Embed each prepared image, [n_i, D], without gradient; with adapters compute what `project` embeds it from."""
        frozen = self.frozen_layers
        if frozen is not None:
            # What is computed in inference mode, as by decoding, could not be saved for a backward pass.
            with torch.inference_mode(False), torch.no_grad():
                return self._run_tower(prepared, frozen)
        with torch.no_grad():
            pixels = self._pixels(prepared)
            if self.config.model_type == "llava":
                sizes = {}
            else:  # [1, tiles, 3, H, W] each: fewer tiles are filled up, and left out again by the image's size
                max_tiles = max(tiles.shape[1] for tiles in pixels)
                pixels = [F.pad(tiles, (0, 0) * 3 + (0, max_tiles - tiles.shape[1])) for tiles in pixels]
                sizes = {"image_sizes": torch.cat([inputs["image_sizes"] for inputs in prepared])}
            return list(self.model.get_image_features(torch.cat(pixels), **sizes).pooler_output)

    def _pixels(self, prepared: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        """Copy the images' pixels to the device: [1, 3, H, W] each, of LLaVA-NeXT [1, tiles, 3, H, W]."""
        parameter = next(self.model.parameters())
        # One by one: what workers prepared lies in page-locked memory already.
        return [to_device(inputs["pixel_values"], parameter.device).to(parameter.dtype) for inputs in prepared]

    # With adapters ------------------------------------------------------------------------------------------

    @property
    def tower_layers(self) -> nn.ModuleList:
        """The tower's layers, those that no embedding is made of included.

        Raises:
            InputError: the tower has another structure than those of CLIP and SigLIP.
        """
        for name, module in self.model.vision_tower.named_modules():
            if name.endswith("encoder.layers") and isinstance(module, nn.ModuleList):
                return module
        found = self.config.vision_config.model_type
        raise InputError(field="lora.tower_layers", expected="a tower such as CLIP's or SigLIP's", found=found)

    @property
    def used_layers(self) -> int:
        """The number of the tower's layers that embeddings are made of."""
        return used_layers(self.config)

    @property
    def frozen_layers(self) -> int | None:
        """The number of the used layers below the first adapter: all of them with adapters on the projector alone.

        None without adapters.
        """
        if not _is_adapted(self.model):
            return None
        if not _is_adapted(self.model.vision_tower):
            return self.used_layers
        adapted = [number for number, layer in enumerate(self.tower_layers) if _is_adapted(layer)]
        return min(*adapted, self.used_layers)

    @torch.no_grad()
    def check_layers(self, passed: int) -> None:
        """Check that the tower's layers from number `passed` on, run one by one, give what the tower gives as a whole.

        Raises:
            InputError: they do not; or embeddings are made of several layers' hidden states.
        """
        field, fix = "lora.tower_layers", "set it to 0"
        if not isinstance(self.config.vision_feature_layer, int):
            expected, found = "one vision_feature_layer in config.json", str(self.config.vision_feature_layer)
            raise InputError(file=self.path, field=field, expected=expected, found=found, fix=fix)
        layers = self.tower_layers[passed : self.used_layers]
        side = int(self.config.vision_config.image_size)
        shades = Image.linear_gradient("L").resize((side, side)).convert("RGB")
        with self.on_device():
            pixels = self._pixels([self.prepare(shades)])[0].flatten(0, -4)
            states = self.model.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
            values = states[passed]
            for layer in layers:
                values = layer(values, None)
        difference = float((values - states[self.used_layers]).abs().max() / states[self.used_layers].abs().max())
        if not difference <= 8 * torch.finfo(values.dtype).eps ** 0.75:
            expected = "a tower whose layers follow each other"
            found = f"outputs that differ by {difference:.1e}, relative to the largest"
            raise InputError(file=self.path, field=field, expected=expected, found=found, fix=fix)

    def waiting_parameters(self) -> list[nn.Parameter]:
        frozen, tower = self.frozen_layers, self.model.vision_tower
        if frozen is None:
            return list(self.parameters())
        above = self.tower_layers[frozen:] if _is_adapted(tower) else nn.ModuleList()
        read = {id(parameter) for parameter in above.parameters()}  # in each training step
        return [parameter for parameter in tower.parameters() if id(parameter) not in read]

    def _run_tower(self, prepared: Sequence[dict[str, Tensor]], passed: int) -> list[TowerOutput]:
        """Compute what leaves the first `passed` layers of the tower, for each prepared image."""
        tiles = [pixels.flatten(0, -4) for pixels in self._pixels(prepared)]  # [tiles, 3, H, W] each
        states = self.model.vision_tower(torch.cat(tiles), output_hidden_states=True, return_dict=True).hidden_states
        values = self._selected(states) if passed == self.used_layers else states[passed]  # [all tiles, rows, width]
        sizes = [inputs.get("image_sizes") for inputs in prepared]
        # Each by itself: a view of all images would keep all of them in memory.
        split = [one.clone() for one in values.split([len(one) for one in tiles])]
        return [TowerOutput(one, passed, size) for one, size in zip(split, sizes, strict=True)]

    def _selected(self, states: Sequence[Tensor]) -> Tensor:
        """Select what enters the projector, [tiles, patches, width], among the hidden states before and after each layer."""
        layers = self.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        return torch.cat([states[layer][:, self._first_row :] for layer in layers], dim=-1)

    @property
    def _first_row(self) -> int:
        """The first row of a hidden state that embeddings are made of: 1 where the class token is left out."""
        return int(self.config.vision_feature_select_strategy == "default")

    def project(self, images: Sequence[TowerOutput]) -> list[Tensor]:
        """Embed images, [n_i, D] each, by the tower's layers that are left and the projector, with gradients to their adapters.

        Raises:
            SrcfastError: an image has passed a layer that has an adapter: what was computed is not this adapter's.
        """
        passed, frozen = {image.passed for image in images}, self.frozen_layers
        if len(passed) > 1 or (frozen is not None and max(passed) > frozen):
            raise SrcfastError(
                f"images: expected outputs of the tower's first {frozen} layers, which have no adapter, found outputs of "
                f"{sorted(passed)}. Fix: encode images once the model has its adapter"
            )
        start = passed.pop()
        values = torch.cat([image.values for image in images])  # [all tiles, rows, width]
        if start < self.used_layers:
            for layer in self.tower_layers[start : self.used_layers]:
                values = layer(values, None)
            values = values[:, self._first_row :]
        values = self.model.multi_modal_projector(values)  # [all tiles, patches, D]
        if self.config.model_type == "llava":
            return list(values)
        packed, _ = self.model.pack_image_features(
            values.split([len(image.values) for image in images]),
            torch.cat([image.size for image in images if image.size is not None]),
            self.config.vision_feature_select_strategy,
            image_newline=self.model.image_newline,
        )
        return packed


def used_layers(config: Any) -> int:
    """Return how many of a tower's layers a LLaVA config makes embeddings of: up to the deepest that it selects."""
    count, selected = int(config.vision_config.num_hidden_layers), config.vision_feature_layer
    layers = [selected] if isinstance(selected, int) else selected
    return max(layer if layer >= 0 else count + 1 + layer for layer in layers)


def _is_adapted(module: nn.Module) -> bool:
    """Return whether a part has an adapter (`LoRALinear`)."""
    return any(hasattr(part, "lora_A") for part in module.modules())


def _settings(config: Any) -> Iterator[tuple[str, bool, str, object]]:
    """Yield (field, whether it is right, what is expected, what is there); a later field needs all before it to be right."""
    yield "model_type", config.model_type in FAMILIES, " or ".join(FAMILIES), config.model_type
    token, strategy = config.image_token_id, config.vision_feature_select_strategy
    in_vocabulary = type(token) is int and 0 <= token < config.text_config.vocab_size
    yield "image_token_id", in_vocabulary, "a token of the vocabulary", repr(token)
    yield "vision_feature_select_strategy", strategy in ("default", "full"), "default or full", repr(strategy)
    patch, image = config.vision_config.patch_size, config.vision_config.image_size
    yield "vision_config.patch_size", patch <= image, f"at most image_size, {image}", patch


def _check_config(config: Any, path: str | Path) -> None:
    """Raise InputError at the first setting that is not one of a LLaVA checkpoint."""
    for field, right, expected, found in _settings(config):
        if not right:
            fix = "choose a LLaVA-1.5 or LLaVA-NeXT checkpoint" if field == "model_type" else None
            raise InputError(file=path, field=field, expected=expected, found=found, fix=fix)


def _checked_model(config: Any, path: str | Path) -> nn.Module:
    """Build tower and projector, not yet filled. Raises InputError where they can't be built, or the files hold far less."""
    try:
        with torch.device("meta"):  # where weights take no memory: there may be far more than the checkpoint's
            sketch = bare_model(config)
        check_weight_count([sketch], path, SIGHT)
        return bare_model(config)
    except torch.OutOfMemoryError:  # a RuntimeError, too
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
        expected, found = "settings of a vision tower", f"{type(error).__name__}: {error}"
        raise InputError(file=path, field="vision_config", expected=expected, found=found) from error


def bare_model(config: Any) -> nn.Module:
    """Build tower and projector of a LLaVA config, not yet filled."""
    bare = copy.deepcopy(config)
    # transformers builds the language model, too: one without layers and vocabulary, dropped at once.
    bare.text_config.num_hidden_layers, bare.text_config.vocab_size = 0, 1
    bare.text_config.pad_token_id = bare.text_config.bos_token_id = bare.text_config.eos_token_id = None
    model = FAMILIES[config.model_type](bare)
    del model.language_model
    return model


def load_image_processor(path: str | Path) -> Any:
    """Load the checkpoint's image processor, in the backend that needs Pillow and numpy alone. Raises InputError."""
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(path)
        name = str(settings.get("image_processor_type")).removesuffix("Fast")
        for kind in (name, f"{name}Pil"):
            _export(kind)
        processor = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
        sides = [side for side in dict(processor.size or {}).values() if side is not None]
    except Exception as error:  # TypeError, KeyError, ... for a file of other fields
        raise InputError(file=path, expected="an image processor's preprocessor_config.json", found=error) from error
    if not hasattr(type(processor), "merge_size"):  # families that merge patches state areas in place of sides
        for side in (side for side in sides if not SIDE[0](side)):
            raise InputError(file=path, field="size", expected=f"{SIDE[1]}, of each side in pixels", found=side)
    return processor


def _export(name: str) -> None:
    """Let transformers' package export a class that its module defines without torchvision.

    Of some classes (Idefics 2 and 3, SmolVLM in 5.17; Molmo 2 in 5.24) the package says that they need it, though they do not.
    """
    stand_in = getattr(transformers, name, None)
    if getattr(stand_in, "is_dummy", False):
        with suppress(ImportError):  # it does need torchvision
            defined = getattr(importlib.import_module(stand_in.__module__), name)
            setattr(importlib.import_module(stand_in.__module__.rpartition(".")[0]), name, defined)
