"""Any LVLM of transformers: its own vision tower, processor, chat template and language model, on the packed forest."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling

from srcfast import distributed
from srcfast.attention.forest_attention import forest_attend
from srcfast.data.forest import Forest
from srcfast.data.images import ImageFile
from srcfast.errors import InputError
from srcfast.models.chat import ChatModel, adds_bos, prompt_error
from srcfast.models.encoded_images import accept_encoded_images, image_arguments
from srcfast.models.placeholders import ImageTexts, Sized
from srcfast.models.pretrained import check_runs, load_pretrained, model_class, refusing_other_forms
from srcfast.models.processor import (
    TYPICAL_IMAGE,
    image_inputs,
    image_token_id,
    image_tokens,
    load_processor,
    placeholder,
)
from srcfast.models.recurrent import forest_mix
from srcfast.models.self_check import check_lvlm
from srcfast.models.sharding import shard_layers
from srcfast.models.supported import ANOTHER_FAMILY
from srcfast.models.transformers_decoder import TokenRow, TransformersDecoder, text_model, tree_positions
from srcfast.models.vision import FrozenVision
from srcfast_kernels.transfers import to_device

UNTILED = "untiled "  # before the names of an image's inputs in a prompt of several images
OF_ALL = ("visual_indicator_features",)  # embeddings of Ovis 2's tokens around images
NO_SIZE = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True)
class EncodedImage:
    """What a forward pass needs of an image.

    Attributes:
        values: embeddings as the model's `get_image_features` returns them, [n, D] or [tiles, n, D]; deep-stack features, which
            later layers add, lie behind them along the last axis.
        sizes: the image's sizes as the processor states them, on the host.
        untiled: the embeddings in a prompt of several images, where the processor cuts tiles of a prompt's only image alone.
    """

    values: Tensor
    sizes: dict[str, Tensor]
    untiled: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Return the bytes of the embeddings."""
        return self.values.nbytes + (0 if self.untiled is None else self.untiled.nbytes)

    def among(self, num_images: int) -> EncodedImage:
        """Return the image as it is encoded in a prompt of so many images."""
        return self if num_images < 2 or self.untiled is None else replace(self, values=self.untiled)


class TransformersVision(FrozenVision):
    """The vision tower, projector and image processor of a model; never in a gradient."""

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self._whole, self.processor, self.config = [model], processor, model.config
        base, text = model.base_model, text_model(model)
        for name, part in base.named_children():
            if part is not text:
                setattr(self, name, part)
        for name, parameter in base.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        accept_encoded_images(base)
        self.names = set(inspect.signature(base.get_image_features).parameters)
        self.hidden_size = int(model.config.get_text_config().hidden_size)
        # Known once an image was encoded: the number of deep-stack features, and whether outputs are lists of images.
        self.deep_layers = 0
        self.in_list = self.deep_in_list = False
        self.of_all: dict[str, Any] = {}  # outputs that are the same for all images

    def num_tokens(self, image: Image.Image, num_images: int = 1) -> int:
        """Count the positions that the image takes in the decoder, in a prompt of so many images."""
        return image_tokens(self.processor, image, image_token_id(self.config), num_images)

    @cached_property
    def typical_tokens(self) -> int:
        """Return the positions that a typical image takes, for forecasts."""
        return self.num_tokens(Image.new("RGB", TYPICAL_IMAGE))

    def prepare(self, image: Image.Image) -> dict[str, Tensor]:
        """Process one image into tensors on the CPU: pixels, and their sizes."""
        inputs = self._image_inputs(image, 1)
        if "batch_num_images" not in self.processor.image_processor.model_input_names:
            return inputs
        # LLaVA-OneVision's processor cuts no tiles where a prompt has several images: here, the same one twice.
        return inputs | {f"{UNTILED}{name}": value[:1] for name, value in self._image_inputs(image, 2).items()}

    def _image_inputs(self, image: Image.Image, count: int) -> dict[str, Tensor]:
        """Return the tensors that the processor makes of so many copies of an image, without those of text."""
        inputs = image_inputs(self.processor, image, count, return_tensors="pt")
        return {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name not in NO_SIZE}

    @torch.no_grad()
    def encode(self, prepared: Sequence[dict[str, Tensor]]) -> list[EncodedImage]:
        """Encode each prepared image."""
        images = []
        for inputs in prepared:
            image = self._encode_one({name: value for name, value in inputs.items() if not name.startswith(UNTILED)})
            untiled = {name.removeprefix(UNTILED): inputs[name] for name in inputs if name.startswith(UNTILED)}
            images.append(replace(image, untiled=self._encode_one(untiled).values) if untiled else image)
        return images

    def _encode_one(self, inputs: Mapping[str, Tensor]) -> EncodedImage:
        parameter = next(self._whole[0].parameters())
        arguments = {
            name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if name in self.names
        }
        output = self._whole[0].base_model.get_image_features(**arguments, return_dict=True)
        values = output.pooler_output
        if values is None:
            raise InputError(
                field="model_type",
                expected="a model that puts an image's embeddings among those of tokens",
                found=f"{self.config.model_type}: deep-stack features alone",
                fix=ANOTHER_FAMILY,
            )
        self.in_list = not isinstance(values, Tensor)
        if not isinstance(values, Tensor):
            values = torch.cat(tuple(values))
        self.of_all = {name: output[name] for name in OF_ALL if name in output}
        deep = getattr(output, "deepstack_features", None) or ()
        parts = [torch.cat(tuple(part)) if not isinstance(part, Tensor) else part for part in deep]
        self.deep_layers, self.deep_in_list = len(parts), any(not isinstance(part, Tensor) for part in deep)
        values = torch.cat([values, *(part.view_as(values) for part in parts)], dim=-1)
        return EncodedImage(values, {name: value for name, value in inputs.items() if "pixel" not in name})

    def outputs(self, images: Sequence[EncodedImage]) -> Any:
        """Put images together as `get_image_features` returns them for all of a batch."""
        same = len({image.values.shape[1:] for image in images}) == 1
        rows = [image.values if same else image.values.flatten(0, -2)[None] for image in images]
        whole = torch.cat(rows, dim=0 if same else -2)
        values = list(whole.split(self.hidden_size, dim=-1))
        output: Any = BaseModelOutputWithPooling(
            pooler_output=(values[0].flatten(0, -2),) if self.in_list else values[0]
        )
        for name, value in self.of_all.items():
            output[name] = value
        if self.deep_layers:
            deep = [part.flatten(0, -2) for part in values[1:]]
            output["deepstack_features"] = [(part,) for part in deep] if self.deep_in_list else deep
        return output


class TransformersLVLM(ChatModel):
    """A conditional-generation model of transformers with its processor; `path` is the checkpoint's directory."""

    def __init__(self, model: Any, processor: Any, path: Path) -> None:
        super().__init__()
        self._whole = [model]  # in a list: its parts are submodules of decoder and vision
        self.decoder = TransformersDecoder(model)
        self.processor, self.tokenizer, self.path = processor, processor.tokenizer, path
        self.vision = TransformersVision(model, processor)
        self.image_token_id = image_token_id(model.config)
        self.max_positions = self.decoder.config.max_positions
        self.adapter_prefix = _name_of(model, text_model(model))
        self.read_tokens(path, model.config, processor)
        self.image_texts = ImageTexts(processor, self.image_token)

    @property
    def image_placeholder(self) -> str:
        return placeholder(self.processor)

    @property
    def chat_template(self) -> str | None:
        return self.processor.chat_template

    def _prompt_ids(self, text: str, images: Sequence[Sized], sample_id: str | None) -> np.ndarray:
        if (shown := text.count(self.image_texts.placeholder)) != len(images):
            fix = "the checkpoint's chat template must show each image once"
            raise prompt_error(sample_id, "chat_template", f"{len(images)} images in the prompt", shown, fix)
        try:
            return self._token_ids(text, images)
        except InputError:
            raise
        except Exception as error:  # of any class, for pixels, templates or placeholders that do not fit
            found, fix = f"{type(error).__name__}: {error}", "the checkpoint's processor and chat template must fit"
            raise prompt_error(sample_id, "images", "images that the processor takes", found, fix) from error

    def processor_inputs(self, question: str, images: Sequence[Image.Image]) -> Any:
        """Return all that the processor makes of a user's turn and the generation prompt, as tensors."""
        return self._processed(self.prompt_text(question, len(images), None), images)

    def _processed(self, text: str, images: Sequence[Image.Image]) -> Any:
        """Return all that the processor makes of a rendered prompt and its images, as tensors."""
        return self.processor(
            text=[text],
            images=[list(images)] if images else None,
            add_special_tokens=adds_bos(self.tokenizer, text),
            return_tensors="pt",
        )

    def _token_ids(self, text: str, images: Sequence[Sized]) -> np.ndarray:
        """Tokenize a rendered prompt into [n], image placeholders at full length."""
        if 0 < len(images) <= self.image_texts.max_images:
            return self.image_texts.token_ids(text, images)
        loaded = [image.load() if isinstance(image, ImageFile) else image for image in images]
        return np.asarray(self._processed(text, loaded)["input_ids"][0], dtype=np.int64)

    def encode_images(self, images: Sequence[Image.Image]) -> list[EncodedImage]:
        """Encode each image, without gradient."""
        return self.vision.encode([self.vision.prepare(image) for image in images])

    def embed(self, forest: Forest, features: Mapping[str, EncodedImage]) -> TokenRow:
        """Put a forest's tokens, its images' embeddings and its rotary positions together.

        Raises:
            InputError: an image's length differs from its placeholders.
        """
        host = forest.host or forest
        inputs: dict[str, Any] = {}
        images = [features[key].among(len(tree.images)) for tree in forest.trees for key in tree.images]
        if images:
            count = sum(image.values.numel() // image.values.shape[-1] for image in images)
            placeholders = int((host.token_ids == self.image_token_id).sum())
            if count != placeholders:
                raise InputError(
                    field="images",
                    expected=f"{placeholders} image positions",
                    found=f"{count} image embeddings",
                    fix="the processor's image size and the model's config.json disagree",
                )
            inputs = image_arguments(self._whole[0].base_model, self.vision.outputs(images))
        positions = self._positions(host, features) if self.decoder.num_axes and images else None
        return TokenRow(
            forest.token_ids,
            None if positions is None else to_device(positions, forest.token_ids.device),
            inputs,
            forest_mix(forest) if self.decoder.has_states else None,
            self.decoder.two_way.ranges(forest, self.image_token_id) if self.decoder.two_way else (),
        )

    def _positions(self, forest: Forest, features: Mapping[str, EncodedImage]) -> Tensor:
        """Compute the rotary positions [axes, T]: a root's by the model, its descendants' by their distance from it."""
        positions = forest.positions.expand(self.decoder.num_axes, -1).clone()
        for tree, starts in zip(forest.trees, forest.segment_start, strict=True):
            if not tree.images:
                continue
            size, end = tree.segments[0].tokens.size, starts[0] + tree.num_tokens
            sizes = _joined([features[key].sizes for key in tree.images])
            prompt = torch.from_numpy(tree.segments[0].tokens)
            root = tree_positions(self._whole[0], prompt, self.image_token_id, sizes)  # [axes, n]
            positions[:, starts[0] : starts[0] + size] = root
            positions[:, starts[0] + size : end] += int(root.max()) + 1 - size
        return positions

    def forward(self, forest: Forest, features: Mapping[str, EncodedImage], rows: Tensor | None = None) -> Tensor:
        """Compute hidden states [T, D] of a forest, or those of `rows` [M] alone (int64, ascending, on the host): [M, D].

        `features` holds each distinct image's embeddings by its key.
        """
        device_rows = None if rows is None else to_device(rows, forest.token_ids.device)
        attend = forest_attend(forest, rows=rows)
        return self.decoder(self.embed(forest, features), forest.positions, attend, device_rows)


def _joined(sizes: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put the sizes of several images together; those that `get_rope_index` takes."""
    return {name: torch.cat([size[name] for size in sizes]) for name in sizes[0] if name == "image_grid_thw"}


def _name_of(model: nn.Module, part: nn.Module) -> str:
    """Return the name of a submodule."""
    return next(name for name, module in model.named_modules() if module is part)


def load_transformers_lvlm(
    path: Path,
    config: Any,
    *,
    quantize: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    shard: bool = False,
) -> TransformersLVLM:
    """Read any image-text-to-text checkpoint of transformers, from safetensors alone and without remote code, frozen.

    With `shard` its layers are sharded over the ranks of this node; each rank reads all weights before it drops the others'.

    Raises:
        InputError: transformers can't build it, a tensor is missing, unexpected, misshaped or not finite, or the model is one
            that the backbone does not run.
    """
    model_class(config, path)  # also where a config names no tower: it has to be an LVLM
    check_runs(config, path)
    processor = load_processor(path, config.model_type)
    shard = shard and distributed.world_size() > 1
    reading: Any = {"device": device, "quantize": quantize, "shard": shard}
    model = load_pretrained(AutoModelForImageTextToText, path, config, dtype, **reading)
    model.requires_grad_(False)
    if not shard:
        model.to(device)  # buffers, too: weights are there
    with refusing_other_forms(path, config):
        lvlm = TransformersLVLM(model, processor, path)
    if shard:
        shard_layers(lvlm.decoder, device)
        lvlm.to(device)
    lvlm.eval()
    with refusing_other_forms(path, config):
        lvlm.decoder.observe_layers()
        check_lvlm(lvlm, model)
    return lvlm
