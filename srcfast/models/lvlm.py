"""The LVLM: a hand-written decoder with a LLaVA checkpoint's vision tower, tokenizer and chat template."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from srcfast.attention.forest_attention import forest_attend
from srcfast.config.settings import LoRAConfig
from srcfast.data.forest import Forest
from srcfast.data.jsonl import parse_object, write_json
from srcfast.errors import InputError, SrcfastError
from srcfast.models.chat import ChatModel, adds_bos, prompt_error
from srcfast.models.checkpoint import WEIGHTS, fill, read_config, read_file, read_tensors, save_tensors, weight_files
from srcfast.models.decoder import Decoder, is_handwritten_text
from srcfast.models.embedded import checkpoint_directory
from srcfast.models.lora import apply_lora, check_no_adapter
from srcfast.models.placeholders import Sized
from srcfast.models.pretrained import has_vision
from srcfast.models.quantized import NF4Linear
from srcfast.models.text_model import (
    build_decoder,
    copy_companions,
    decoder_tensors,
    load_tokenizer,
)
from srcfast.models.transformers_lvlm import TransformersLVLM, load_transformers_lvlm
from srcfast.models.vision import FAMILIES, TowerOutput, Vision
from srcfast_kernels.transfers import to_device

# LLaVA-1.5's own template, for its checkpoints that come without one.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: "
    "{% endif %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class LVLM(ChatModel):
    """Decoder, vision, tokenizer; `path` is the checkpoint's directory."""

    def __init__(self, decoder: Decoder, vision: Vision, tokenizer: Any, path: Path) -> None:
        super().__init__()
        self.decoder = decoder
        self.vision = vision
        self.tokenizer = tokenizer
        self.path = path
        self.image_token_id = int(vision.config.image_token_id)
        self.max_positions = decoder.config.max_positions
        self.adapter_prefix = "model.language_model"  # of its layers' names in transformers
        self.read_tokens(path, vision.config)

    @property
    def chat_template(self) -> str | None:
        return None if self.tokenizer.chat_template else LLAVA_TEMPLATE

    def _prompt_ids(self, text: str, images: Sequence[Sized], sample_id: str | None) -> np.ndarray:
        ids = np.array(self.tokenizer(text, add_special_tokens=adds_bos(self.tokenizer, text)).input_ids)
        positions = np.flatnonzero(ids == self.image_token_id)
        if len(positions) != len(images):
            expected = f"{len(images)} image placeholders in the prompt"
            fix = "the checkpoint's chat template must show each image once"
            raise prompt_error(sample_id, "chat_template", expected, len(positions), fix)
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[positions] = [self.vision.num_tokens(image) for image in images]
        return np.repeat(ids, repeats)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> list[Tensor] | list[TowerOutput]:
        """Embed each image, [n_i, D], without gradient; with adapters on the projector or tower see `TowerOutput`."""
        with self.vision.on_device():
            return self.vision(images)

    def embed(self, forest: Forest, features: Mapping[str, Tensor | TowerOutput]) -> Tensor:
        """Embed a forest's tokens, [T, D], with the images' embeddings at their placeholders.

        Raises:
            InputError: an image's length differs from its placeholders.
            SrcfastError: projector or tower have adapters, and an image's embeddings were computed without them.
        """
        embeddings = self.decoder.embed(forest.token_ids)
        if not forest.images:
            return embeddings
        # Located on the host: nonzero() on a GPU would wait for it.
        is_image = (forest.host or forest).token_ids == self.image_token_id
        positions = to_device(is_image.nonzero()[:, 0], embeddings.device)
        images = self._image_embeddings(forest, features)
        values = torch.cat([images[key] for key in forest.images]).to(embeddings.dtype)
        if len(values) != len(positions):
            raise InputError(
                field="images",
                expected=f"{len(positions)} image positions",
                found=f"{len(values)} image embeddings",
                fix="the processor's image size and the model's config.json disagree",
            )
        return embeddings.index_put((positions,), values)

    def _image_embeddings(self, forest: Forest, features: Mapping[str, Tensor | TowerOutput]) -> dict[str, Tensor]:
        """Return each distinct image's embeddings [n, D]: adapted layers compute them here, once for all trees of the forest."""
        distinct = {key: features[key] for key in forest.images}
        embeddings = {key: value for key, value in distinct.items() if isinstance(value, Tensor)}
        outputs = {key: value for key, value in distinct.items() if isinstance(value, TowerOutput)}
        if embeddings and self.vision.frozen_layers is not None:
            raise SrcfastError(
                "images: expected outputs of the tower below the adapters, found embeddings, which don't follow the adapters. "
                "Fix: encode images once the model has its adapter"
            )
        if outputs:
            embeddings |= zip(outputs, self.vision.project([*outputs.values()]), strict=True)
        return embeddings

    def forward(
        self, forest: Forest, features: Mapping[str, Tensor | TowerOutput], rows: Tensor | None = None
    ) -> Tensor:
        """Compute hidden states [T, D] of a forest, or those of `rows` [M] alone (int64, ascending, on the host): [M, D].

        `features` holds each distinct image's embeddings by its key, or what `ImageFeatures` gives in place of them.
        """
        embeddings, attend = self.embed(forest, features), forest_attend(forest, rows=rows)
        device_rows = None if rows is None else to_device(rows, embeddings.device)
        return self.decoder(embeddings, forest.positions, attend, device_rows)


AnyLVLM = LVLM | TransformersLVLM


class ImageFeatures:
    """Embeddings of images by key; each distinct image is encoded once while it stays in memory (least recent out).

    Of a model with adapters on its projector or tower only what lies below them is stored, as `TowerOutput`; the model computes
    the embeddings from it in each pass. So nothing in memory is older than the adapters, on or off.
    """

    def __init__(
        self, model: AnyLVLM, load: Callable[[str], Image.Image], max_bytes: int = 1 << 30, batch_size: int = 64
    ):
        self.model, self.load, self.max_bytes, self.batch_size = model, load, max_bytes, batch_size
        self.encoded = 0  # images encoded so far
        self._cache: OrderedDict[str, Any] = OrderedDict()
        self._bytes = 0
        self._frozen_layers: int | None = None  # of the vision tower that has encoded the cached images

    def missing(self, keys: Iterable[str]) -> list[str]:
        """List those that are not in memory."""
        self._follow_adapters()
        return [key for key in keys if key not in self._cache]

    def _follow_adapters(self) -> None:
        """Clear the cache where the vision tower has got or lost adapters since it was filled."""
        frozen = getattr(self.model.vision, "frozen_layers", None)
        if frozen != self._frozen_layers:
            self.clear()
        self._frozen_layers = frozen

    def clear(self) -> None:
        """Clear the cache, so that images are encoded again: rounding of embeddings depends on the images encoded together."""
        self._cache.clear()
        self._bytes = 0

    def for_training(self, deterministic: bool = False) -> ImageFeatures | UncachedImageFeatures:
        """Return features for a training that may be resumed bit for bit, with an empty cache.

        Cached embeddings are those of the steps that first had the images. In fp32 on a CPU any other step would compute the
        same ones; in 16 bits, or on a GPU, only encoding them again in every step reproduces them. On a GPU that is done only
        for a `deterministic` training: any other is not reproducible bit for bit anyway.
        """
        parameter = next(self.model.parameters())
        on_gpu = parameter.device.type == "cuda"
        exact = not on_gpu and parameter.dtype in (torch.float32, torch.float64)
        return self if exact or (on_gpu and not deterministic) else UncachedImageFeatures(self)

    def prepare(self, key: str) -> dict[str, Tensor]:
        """Read an image and process it for the vision tower: on the host, in any process."""
        return self.model.vision.prepare(self.load(key))

    def __call__(
        self, keys: Iterable[str], prepared: Mapping[str, dict[str, Tensor]] = MappingProxyType({})
    ) -> dict[str, Any]:
        """Embed the image of each key, [n, D], or as `TowerOutput`; those in `prepared` are not read again."""
        distinct = list(dict.fromkeys(keys))
        missing = self.missing(distinct)
        fresh: dict[str, Any] = {}
        if missing:
            with self.model.vision.on_device():
                for start in range(0, len(missing), self.batch_size):
                    batch = missing[start : start + self.batch_size]
                    ready = [prepared[key] if key in prepared else self.prepare(key) for key in batch]
                    fresh.update(zip(batch, self.model.vision.encode(ready), strict=True))
        self.encoded += len(missing)
        features = {key: fresh[key] if key in fresh else self._cache[key] for key in distinct}
        for key, value in features.items():
            if key in self._cache:
                self._cache.move_to_end(key)
            else:
                self._cache[key] = value
                self._bytes += value.nbytes
        while self._bytes > self.max_bytes and self._cache:
            self._bytes -= self._cache.popitem(last=False)[1].nbytes
        return features


class UncachedImageFeatures:
    """`ImageFeatures` that encode each call's images without a cache."""

    def __init__(self, features: ImageFeatures) -> None:
        self.features, self.prepare = features, features.prepare

    def missing(self, keys: Iterable[str]) -> list[str]:
        return list(keys)

    def __call__(
        self, keys: Iterable[str], prepared: Mapping[str, dict[str, Tensor]] = MappingProxyType({})
    ) -> dict[str, Any]:
        self.features.clear()
        return self.features(keys, prepared)


def load_lvlm(
    path: str | Path,
    *,
    quantize: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    lora: str | Path | LoRAConfig | None = None,
    shard: bool = False,
    backbone: str = "auto",
) -> AnyLVLM:
    """Read an LVLM's checkpoint from a Hugging Face directory, frozen but for a new adapter.

    Args:
        path: directory with config.json, safetensors (single or sharded), tokenizer and image processor; "embedded" for
            the small one that comes with the package.
        quantize: "nf4" for the linear layers of the decoder's blocks in 4 bits; weights that bitsandbytes quantised are
            not quantised again. Weights are quantised one by one as they are read, on the device.
        dtype: of all other weights, and of the products.
        lora: a PEFT adapter's directory, or a LoRAConfig for a new, trainable adapter.
        shard: shard the decoder's layers over the ranks, see `models.sharding`; all ranks then have to read it.
        backbone: "handwritten" for the hand-written decoder (LLaVA-1.5 and LLaVA-NeXT), "transformers" for transformers' own
            language model (any family), "auto" for the first where it takes the checkpoint.

    Raises:
        InputError: another architecture, or a tensor that is missing, unexpected or misshaped; `quantize`.
    """
    if quantize not in (None, "nf4"):
        raise InputError(field="quantize", expected="None or nf4", found=quantize)
    path = checkpoint_directory(path, "base")
    config = read_config(path)
    if not picks_handwritten(config, backbone):
        general = load_transformers_lvlm(path, config, quantize=quantize, dtype=dtype, device=device, shard=shard)
        apply_lora(general, lora)
        return general
    vision = Vision(config, path)
    config.text_config.tie_word_embeddings = bool(config.tie_word_embeddings)
    decoder = build_decoder(config.text_config, path, device, dtype, quantize, shard)
    vision = vision.to(device=device, dtype=dtype)
    tensors = ((*_part_of(name), tensor) for name, tensor in read_tensors(path))
    fill({"language": decoder, "sight": vision.model}, decoder_tensors(decoder, tensors, path), path)
    tokenizer = load_tokenizer(path)
    if not tokenizer.chat_template and (config.model_type, config.text_config.model_type) != ("llava", "llama"):
        expected, fix = f"a template of {config.model_type}", "write chat_template.jinja beside the checkpoint"
        raise InputError(file=path, field="chat_template", expected=expected, found="none", fix=fix)
    model = LVLM(decoder, vision, tokenizer, path).to(device)
    model.requires_grad_(False)
    model.eval()
    apply_lora(model, lora)
    return model


def picks_handwritten(config: Any, backbone: str) -> bool:
    """Return whether the hand-written decoder computes an LVLM of this config under the setting `model.backbone`."""
    return backbone == "handwritten" or (backbone == "auto" and has_vision(config) and is_handwritten(config))


def is_handwritten(config: Any) -> bool:
    """Return whether the hand-written decoder has the architecture of a checkpoint, of an LVLM or of a text model."""
    if not has_vision(config):
        return is_handwritten_text(config)
    return config.model_type in FAMILIES and is_handwritten_text(config.text_config)


def _part_of(name: str) -> tuple[str, str]:
    """Split a tensor's name, of either layout of LLaVA checkpoints, into "language" or "sight" and the name within it."""
    for prefix in ("model.language_model.", "language_model.model."):
        if name.startswith(prefix):
            return "language", name.removeprefix(prefix)
    if name.endswith("lm_head.weight"):
        return "language", "lm_head.weight"
    return "sight", name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")


def save_lvlm(model: AnyLVLM, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a directory that transformers' `from_pretrained` reads, in `dtype`, by default the model's.

    Raises:
        InputError: the model has an adapter that is not merged, or is in 4 bits.
    """
    check_no_adapter(model)
    if any(isinstance(part, NF4Linear) for part in model.modules()):
        raise InputError(field="quantize", expected="a model in whole weights", found="nf4", fix="save its adapter")
    directory = Path(directory)
    if isinstance(model, TransformersLVLM):
        model.decoder.save(directory, dtype)
    else:
        tensors = {f"model.{name}": tensor for name, tensor in model.vision.model.state_dict().items()}
        for name, tensor in model.decoder.state_dict().items():
            tensors[name if name.startswith("lm_head") else f"model.language_model.{name}"] = tensor
        save_tensors(directory / WEIGHTS, {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()})
    copy_companions(model.path, directory)
    _settle_config(directory / "config.json", dtype or next(model.parameters()).dtype)


def _settle_config(file: Path, dtype: torch.dtype) -> None:
    """Make a config say in which type the weights are written, and that they are not quantised."""

    def settle(values: dict[str, Any]) -> dict[str, Any]:
        types = [key for key in ("dtype", "torch_dtype") if values.get(key) and isinstance(values[key], str)]
        said = dict.fromkeys(types, str(dtype).removeprefix("torch."))  # transformers.js has a mapping there
        return {key: value for key, value in (values | said).items() if key != "quantization_config"}

    text = file.read_bytes()
    if (config := json.loads(text, object_hook=settle)) != parse_object(text):
        write_json(file, config)


def restore_dtypes(directory: Path, dtypes: Mapping[str, torch.dtype]) -> None:
    """Write the weights of `save_lvlm` once more, each in its type among a base's `stored_dtypes`."""
    of = {_part_of(name): dtype for name, dtype in dtypes.items()}  # the names may be those of another layout
    for file in weight_files(directory):
        tensors = dict(read_file(file))
        save_tensors(file, {name: tensor.to(of.get(_part_of(name), tensor.dtype)) for name, tensor in tensors.items()})
    _settle_config(directory / "config.json", Counter(dtypes.values()).most_common(1)[0][0])
