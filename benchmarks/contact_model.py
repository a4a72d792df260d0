"""Models of first contact: srcfast's models of any shape, with random weights that are drawn and quantised on the device.

No weight is read from a disk. A directory holds config, tokenizer, image processor and a sparse weights file: its header lists
names and shapes, for all that counts weights from headers (forecasts, checks); its values are zeros that take no disk.
"""

from __future__ import annotations

import gc
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srcfast.attention.forest_attention import forest_attend
from srcfast.config.settings import LoRAConfig
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.models.checkpoint import WEIGHTS, read_config
from srcfast.models.decoder import Decoder
from srcfast.models.lora import add_lora, lora_parameters
from srcfast.models.lvlm import LVLM
from srcfast.models.quantized import NF4Linear
from srcfast.models.scorer import Scorer
from srcfast.models.text_model import TextModel, build_decoder, load_tokenizer
from srcfast.models.vision import Vision
from srcfast_benchmarks.contact_results import Context
from srcfast_benchmarks.random_models import (
    CONSTANT,
    GAIN,
    LLAVA_7B,
    SMALL,
    ModelShape,
    bias_head,
    build_model,
    word_tokenizer,
    write_companions,
)

NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # of safetensors
ADAPTER_DEVIATION = 0.002  # of the adapter's B, which is zero in a new adapter
SIZES = {"hidden_size": 64, "intermediate_size": 96, "layers": 2, "heads": 2, "vocabulary": 1024, "dtype": "bfloat16"}
TINY_LVLM: ModelShape = replace(SMALL, **SIZES, image_size=32, vision_hidden_size=64, vision_layers=2)  # type: ignore[arg-type]


class Models:
    """Builds LVLMs of a part's shape on the device, one at a time."""

    def __init__(self, context: Context) -> None:
        self.shape = TINY_LVLM if context.tiny else LLAVA_7B
        self.directory = context.work / "lvlm"
        self._key: tuple[str, int] | None = None
        self._model: LVLM | None = None

    def lvlm(self, quantize: str, r: int) -> LVLM:
        """The model with these settings, as `model.quantize` and `lora.r` name them. Another model is freed first."""
        if self._model is None or self._key != (quantize, r):
            self._key = self._model = None
            free()
            write_directory(self.directory, self.shape)
            self._model = random_lvlm(self.directory, self.shape, None if quantize == "none" else quantize, "cuda", r)
            self._key = (quantize, r)
        return self._model

    def words(self, quantize: str, r: int) -> list[str]:
        """The model's settings as `key=value` words, for `srcfast.config.load.load_config`."""
        model = f"model={{path: '{self.directory}', dtype: {self.shape.dtype}, device: cuda, quantize: {quantize}}}"
        return [model, f"lora={{r: {r}, alpha: {2 * r}}}"]


def free() -> None:
    """Return unused memory to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def write_directory(directory: Path, shape: ModelShape) -> Path:
    """Write the directory of a model of this shape, unless it is complete already."""
    done = directory / "shape.json"
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == asdict(shape):
        return directory
    tokenizer = word_tokenizer(shape.vocabulary)
    sketch = build_model(shape, tokenizer, "meta")
    directory.mkdir(parents=True, exist_ok=True)
    sketch.config.save_pretrained(directory)
    write_companions(directory, shape, tokenizer)
    width, offset, header = getattr(torch, shape.dtype).itemsize, 0, {}
    for name, tensor in sketch.state_dict().items():
        end = offset + width * tensor.numel()
        header[name] = {"dtype": NAMES[shape.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(directory / WEIGHTS, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    done.write_text(json.dumps(asdict(shape)), encoding="utf-8")
    return directory


@torch.no_grad()
def random_lvlm(directory: Path, shape: ModelShape, quantize: str | None, device: str, r: int) -> LVLM:
    """An LVLM with an adapter of rank `r` whose two factors are both random; `quantize` as for `load_lvlm`."""
    torch.manual_seed(0)
    config, dtype = read_config(directory), getattr(torch, shape.dtype)
    decoder = build_decoder(config.text_config, directory, device, dtype, quantize)
    draw_weights(decoder, shape, device, dtype)
    with torch.device(device):  # transformers draws the tower's weights there, in fp32
        vision = Vision(config, directory)
    vision = vision.to(device=device, dtype=dtype)
    projection = vision.model.multi_modal_projector.linear_2
    projection.weight[0], projection.bias[0] = 0.0, CONSTANT
    model = LVLM(decoder, vision, load_tokenizer(directory), directory)
    finish(model, shape, device)
    add_lora(model, LoRAConfig(r=r, alpha=2.0 * r))
    for parameter in lora_parameters(model)[1::2]:
        parameter.normal_(0.0, ADAPTER_DEVIATION)
    return model


@torch.no_grad()
def random_scorer(directory: Path, shape: ModelShape, device: str) -> Scorer:
    """An R-Scorer of graded verdicts."""
    torch.manual_seed(0)
    config, dtype = read_config(directory), getattr(torch, shape.dtype)
    decoder = build_decoder(config, directory, device, dtype)
    draw_weights(decoder, shape, device, dtype)
    model = TextModel(decoder, load_tokenizer(directory), directory)
    finish(model, shape, device)
    return Scorer(model, "graded").to(device)


def draw_weights(decoder: Decoder, shape: ModelShape, device: str, dtype: torch.dtype) -> None:
    """Set normal weights, norms of one, biases of zero; dimension 0 of the residual stream is CONSTANT at every position.

    Matrices that write into the stream are drawn smaller by the root of twice the layers (GPT-2's initialisation), so that
    the stream stays of one size in a deep model.
    """
    smaller = 1.0 / math.sqrt(2.0 * shape.layers)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.empty(*size, device=device, dtype=dtype).normal_(0.0, shape.deviation * scale)

    for name, module in decoder.named_modules():
        writes = name.endswith(("o_proj", "down_proj"))
        if isinstance(module, NF4Linear | nn.Linear):
            weight = normal(module.out_features, module.in_features, scale=smaller if writes else 1.0)
            if writes:
                weight[0] = 0.0
            if isinstance(module, NF4Linear):
                module.set_weight(weight)
            else:
                module.weight.copy_(weight)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.copy_(normal(*module.weight.shape))
            module.weight[:, 0] = CONSTANT
        elif getattr(module, "weight", None) is not None:  # a norm
            module.weight.fill_(1.0)


def finish(model: Any, shape: ModelShape, device: str) -> None:
    """Freeze the model, and set the chances of the end token and the full stop that the shape asks for."""
    model.requires_grad_(False)
    model.eval()
    decoder = model.decoder
    drawn = torch.randint(10, shape.vocabulary, (128,), generator=torch.Generator().manual_seed(1)).numpy()
    forest = Forest.of([Tree((Segment(drawn),))]).to(device)
    hidden = decoder(decoder.embed(forest.token_ids), forest.positions, forest_attend(forest))  # [128, D]
    decoder.norm.weight[0] = GAIN / hidden[:, 0].float().mean()
    bias_head(decoder.head_weight, model.tokenizer, shape)
