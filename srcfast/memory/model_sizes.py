"""Sizes of a model, in memory or by the shapes of a checkpoint's tensors, and the memory of a device."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srcfast.config.settings import LoRAConfig
from srcfast.data.jsonl import parse_object, regular
from srcfast.errors import ConfigError, InputError
from srcfast.models.protocols import HasDecoder
from srcfast.models.recurrent import is_recurrent
from srcfast.models.sharding import GATHERED_LAYERS, gathered_bytes, local_values
from srcfast.units import show_bytes
from srcfast_kernels.nf4 import NESTED_BLOCKSIZE, NF4Weight
from srcfast_kernels.transfers import indexed

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# The share of a device's memory to plan with: the rest is for the device's context, the libraries' workspaces and the
# allocator's fragmentation.
USABLE = 0.9
NF4_BLOCKSIZE = 64
# Of layers of transformers' own, without and with recurrent ones: 1.24 to 1.31 was measured without (docs/models.md), 2.4 with.
LAYER_FACTORS = {False: 1.4, True: 2.8}
HEADER_LIMIT = 100_000_000  # bytes: safetensors' own bound
_limit: int | None = None


@dataclass(frozen=True)
class Shapes:
    """A decoder's sizes; `query` and `key` are heads times head size."""

    layers: int
    hidden: int
    query: int
    key: int
    intermediate: int
    vocabulary: int
    head_dim: int = 128
    qk_norm: bool = False

    @property
    def heads(self) -> int:
        return self.query // self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.key // self.head_dim

    @property
    def linear_weights(self) -> int:
        """Count the weights of all layers' linears (q, k, v, o; gate, up, down), without embedding and head."""
        return self.layers * self.hidden * (2 * self.query + 2 * self.key + 3 * self.intermediate)

    @classmethod
    def of(cls, config: Any) -> Shapes:
        """Read the sizes from a `DecoderConfig`, or from transformers' config of a text model or an LVLM (its `text_config`).

        Where layers have heads of different sizes, those of the largest are taken for all, so that forecasts are not too low.
        """
        config = getattr(config, "text_config", config)
        if getattr(config, "is_heterogeneous", False):
            config = max(config.per_layer_config, key=lambda layer: layer.head_dim * layer.num_key_value_heads)

        def first(*names: str) -> Any:
            return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

        heads = first("num_attention_heads", "num_heads")
        head_dim = first("head_dim") or config.hidden_size // heads
        return cls(
            layers=first("num_hidden_layers", "num_layers"),
            hidden=config.hidden_size,
            query=heads * head_dim,
            key=(first("num_key_value_heads", "num_kv_heads") or heads) * head_dim,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            head_dim=head_dim,
            qk_norm=bool(first("qk_norm")) or first("model_type") == "qwen3",
        )


@dataclass(frozen=True)
class VisionSizes:
    """A vision tower's sizes, and the positions that an image takes in the decoder (of LLaVA-NeXT: their maximum)."""

    layers: int
    hidden: int
    intermediate: int
    patches: int
    image_tokens: int

    @classmethod
    def of(cls, config: Any, image_tokens: int | None = None) -> VisionSizes | None:
        """Read the sizes from transformers' config of an LVLM; None for a text model.

        Args:
            image_tokens: positions of a typical image, which the processor decides; None: the config alone decides them.
        """
        vision = getattr(config, "vision_config", None)
        if vision is None:
            return None
        if image_tokens is not None:
            return cls._of_any(vision, image_tokens, config)
        side = vision.image_size // vision.patch_size
        has_class_token = vision.model_type == "clip_vision_model"
        tokens = side * side + has_class_token - (config.vision_feature_select_strategy == "default")
        tiles = 1
        if config.model_type == "llava_next":
            grid = max(config.image_grid_pinpoints, key=lambda size: size[0] * size[1])
            rows, columns = (extent // vision.image_size for extent in grid)
            tiles += rows * columns
            tokens += rows * side * (columns * side + 1)  # a newline embedding ends each row
        return cls(
            layers=vision.num_hidden_layers,
            hidden=vision.hidden_size,
            intermediate=vision.intermediate_size,
            patches=tiles * (side * side + has_class_token),
            image_tokens=tokens,
        )

    @classmethod
    def _of_any(cls, vision: Any, image_tokens: int, config: Any) -> VisionSizes:
        """Read the sizes of any tower, whose names differ by family; what a config leaves out is a ViT's."""

        def first(*names: str) -> Any:
            holders = (vision, config)
            return next((value for holder in holders for name in names if (value := getattr(holder, name, None))), None)

        hidden = int(first("embed_dim", "hidden_size"))
        shrink = first("spatial_merge_size", "scale_factor", "downsample_factor") or 1
        ratio = first("downsample_ratio", "pixel_shuffle_ratio")
        merged = round(1 / ratio**2) if ratio else shrink**2  # patches an embedding
        return cls(
            layers=int(first("num_hidden_layers", "depth", "num_layers") or 1),
            hidden=hidden,
            intermediate=int(first("intermediate_size") or 4 * hidden),
            patches=image_tokens * merged,
            image_tokens=image_tokens,
        )


@dataclass(frozen=True)
class LoRASizes:
    """An adapter's rank, adapted layers, dropout and number of parameters."""

    r: int
    target_modules: tuple[str, ...]
    dropout: float
    parameters: int


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model on which memory depends.

    Attributes:
        shapes: the decoder's.
        device_type: "cuda" or "cpu", where the model runs.
        dtype_bytes: bytes of an activation or of a weight that is not quantised.
        parameters: number of parameters by part: vision, projector, embedding, decoder, head.
        weight_bytes: frozen weights on the device, 4-bit codes included.
        quantisation_bytes: the scales of 4-bit weights.
        lora: the adapter.
        vision: the vision tower of an LVLM.
        waiting_bytes: weights that are on the device only while images are encoded.
        trained: number of the base's weights that are trained.
        layer_factor: what a layer saves for backward, of what a hand-written one does; see LAYER_FACTORS.
        gathered_bytes: of sharded layers, the bytes that are gathered at once while they compute.
    """

    shapes: Shapes
    device_type: str
    dtype_bytes: int
    parameters: dict[str, int]
    weight_bytes: float
    quantisation_bytes: float
    lora: LoRASizes | None = None
    vision: VisionSizes | None = None
    waiting_bytes: float = 0.0
    trained: int = 0
    layer_factor: float = 1.0
    gathered_bytes: float = 0.0

    @property
    def quantised(self) -> bool:
        return self.quantisation_bytes > 0

    @classmethod
    def of(cls, model: HasDecoder, device_type: str | None = None) -> ModelSizes:
        """Measure a model in memory."""
        decoder = model.decoder
        parameters: dict[str, int] = {}
        weights, scales, waiting, trained = 0.0, 0.0, 0, 0
        device = decoder.embed_tokens.weight.device
        ranks, targets, dropouts, adapter = set(), set(), {0.0}, 0
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                adapter += parameter.numel()
                targets.add(name.split(".")[-2])
                dropouts.add(model.get_submodule(name.rpartition(".")[0]).dropout)
                if name.endswith("lora_A"):
                    ranks.add(len(parameter))
            elif name.endswith(".flat"):  # codes and scales of a sharded 4-bit weight
                linear: Any = model.get_submodule(name.rpartition(".")[0])
                count = linear.in_features * linear.out_features
                fraction = local_values(parameter).nbytes / parameter.nbytes  # of this rank
                parameters["decoder"] = parameters.get("decoder", 0) + count
                weights += fraction * math.ceil(count / 2)
                scales += fraction * (parameter.nbytes - math.ceil(count / 2))
            else:
                part = part_of(name)
                parameters[part] = parameters.get(part, 0) + parameter.numel()
                local_bytes = local_values(parameter).nbytes
                weights += local_bytes if parameter.device == device else 0
                waiting += local_bytes if parameter.device != device else 0
                trained += parameter.numel() if parameter.requires_grad else 0
        for weight in whole_nf4(model):
            parameters["decoder"] = parameters.get("decoder", 0) + math.prod(weight.shape)
            weights += weight.packed.nbytes
            scales += weight.num_bytes - weight.packed.nbytes
        embedding = decoder.embed_tokens.weight
        lora = LoRASizes(max(ranks), tuple(sorted(targets)), max(dropouts), adapter) if ranks else None
        vision = getattr(model, "vision", None)
        return cls(
            shapes=Shapes.of(decoder.config),
            device_type=device_type or embedding.device.type,
            dtype_bytes=embedding.element_size(),
            parameters=parameters,
            weight_bytes=round(weights),
            quantisation_bytes=round(scales),
            lora=lora,
            vision=None if vision is None else VisionSizes.of(vision.config, vision.typical_tokens),
            waiting_bytes=round(waiting),
            trained=trained,
            layer_factor=1.0 if decoder.plain_layers else LAYER_FACTORS[decoder.has_states],
            gathered_bytes=gathered_bytes(decoder),
        )

    @classmethod
    def of_tensors(
        cls,
        tensors: Mapping[str, Sequence[int]],
        config: Any,
        *,
        dtype: str,
        device_type: str,
        quantize: str = "none",
        lora: LoRAConfig | None = None,
        vision_offload: bool = False,
        ranks: int = 1,
        image_tokens: int | None = None,
    ) -> ModelSizes:
        """Count from a checkpoint's tensors (name -> shape, as Hugging Face names them) and its transformers config.

        Args:
            dtype: of weights and activations.
            device_type: "cuda" or "cpu".
            quantize: "nf4" for the decoder's linear layers in 4 bits.
            lora: settings of a new adapter; None: the model has none.
            vision_offload: whether the vision tower's weights wait on the host between images; a CPU ignores it.
            ranks: number of ranks over which the decoder's layers are sharded.
            image_tokens: see `VisionSizes.of`.
        """
        parameters = dict.fromkeys(PARTS, 0)
        weights = scales = waiting = linears = 0.0
        adapter = 0
        for name, shape in tensors.items():
            count, part = math.prod(shape), part_of(name)
            parameters[part] += count
            linear = part == "decoder" and name.endswith("_proj.weight")
            if linear and quantize == "nf4":
                weights += math.ceil(count / 2) / ranks
                scales += nf4_scale_bytes(count) / ranks
                linears += math.ceil(count / 2) + nf4_scale_bytes(count)
            elif linear:
                weights += count * DTYPE_BYTES[dtype] / ranks
                linears += count * DTYPE_BYTES[dtype]
            elif part in ("vision", "projector") and vision_offload and device_type == "cuda":
                waiting += count * DTYPE_BYTES[dtype]
            else:
                weights += count * DTYPE_BYTES[dtype]
            if linear and lora is not None and name.split(".")[-2] in lora.target_modules:
                adapter += lora.r * sum(shape)
        shapes = Shapes.of(config)
        return cls(
            shapes=shapes,
            device_type=device_type,
            dtype_bytes=DTYPE_BYTES[dtype],
            parameters={part: count for part, count in parameters.items() if count},
            weight_bytes=round(weights),
            quantisation_bytes=round(scales),
            lora=None if lora is None else LoRASizes(lora.r, tuple(lora.target_modules), lora.dropout, adapter),
            vision=VisionSizes.of(config, image_tokens),
            layer_factor=1.0 if image_tokens is None else LAYER_FACTORS[is_recurrent(config)],
            waiting_bytes=round(waiting),
            gathered_bytes=GATHERED_LAYERS * linears / shapes.layers if ranks > 1 else 0.0,
        )


def whole_nf4(model: HasDecoder | nn.Module) -> Iterator[NF4Weight]:
    """Yield the 4-bit weights of a model that are not sharded."""
    for module in model.modules():
        if getattr(module, "flat", None) is None and isinstance(weight := getattr(module, "weight", None), NF4Weight):
            yield weight


PARTS = ("vision", "projector", "embedding", "decoder", "head")


def part_of(name: str) -> str:
    """Return the part of a model to which a parameter belongs, by its name in a checkpoint or in a module."""
    if any(part in name for part in ("multi_modal_projector", "image_newline", "connector.")):
        return "projector"
    if any(part in name for part in ("vision", "visual.")):
        return "vision"
    if name.endswith("embed_tokens.weight"):
        return "embedding"
    return "head" if name.endswith("lm_head.weight") else "decoder"


def nf4_scale_bytes(count: int) -> int:
    """Count the scales of `count` weights: a byte for each 64, four for each 256 of those, four for their mean."""
    blocks = math.ceil(count / NF4_BLOCKSIZE)
    return blocks + 4 * math.ceil(blocks / NESTED_BLOCKSIZE) + 4


# Checkpoints ------------------------------------------------------------------------------------------------


def read_headers(path: str | Path) -> Iterator[tuple[str, list[int]]]:
    """Yield (tensor's name, shape) from the headers of a checkpoint directory's safetensors files, if any.

    Raises:
        InputError: a header that can't be read.
    """
    for file in sorted(Path(path).glob("*.safetensors")):
        if file.name.startswith("adapter_"):
            continue
        try:
            with open(regular(file), "rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                if not 2 <= size <= HEADER_LIMIT:
                    raise ValueError(f"a header of {size} bytes")
                header = parse_object(opened.read(size))
            for name, entry in header.items():
                if name != "__metadata__":
                    shape = list(entry["shape"])
                    if any(type(extent) is not int or extent < 0 for extent in shape):
                        raise ValueError(f"{name!r} of shape {shape}")
                    yield name, shape
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                file=file, expected="a safetensors header", found=error, fix="fetch the file again"
            ) from error


# Device memory ----------------------------------------------------------------------------------------------


def limit_memory(size: int | None, device: torch.device | str = "cpu") -> None:
    """Limit the memory to plan with to `size` bytes, which a GPU's allocator then enforces; None removes the limit.

    Raises:
        ConfigError: the GPU has less.
    """
    global _limit
    device = torch.device(device)
    fraction = 1.0
    if size is not None and device.type == "cuda":
        whole = torch.cuda.mem_get_info(device)[1]
        fraction = min(1.0, size / whole)
        if size > 1.1 * whole:  # a card sold as 24 GiB may have 22
            raise ConfigError(f"memory: expected at most the {show_bytes(whole)} of {device}, found {show_bytes(size)}")
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(
            fraction, indexed(device)
        )  # raises ValueError where there is no index
    _limit = size


def release_unused(device: torch.device | str) -> None:
    """Free a GPU's memory that no tensor uses, that of unreachable reference cycles included."""
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def memory_of(device: torch.device | str) -> int:
    """Return the bytes that this process may use on a device: its tensors' and the free ones, or the limit if that is less.

    The allocator's gaps between a GPU's tensors are not counted: only a tensor that fits into a gap could use them.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        size = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
    else:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        group = Path("/sys/fs/cgroup/memory.max")  # a container's
        if group.is_file() and (text := group.read_text(encoding="ascii").strip()).isdigit():
            size = min(size, int(text))
    return size if _limit is None else min(size, _limit)


def memory_for(model: HasDecoder) -> int:
    """Return `memory_of` the model's device, less the GPU's tensors that are neither the model nor its gradients."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return memory_of(device)
    sizes = ModelSizes.of(model)
    adapter = 0 if sizes.lora is None else 4 * sizes.lora.parameters
    gradients = [parameter.grad.untyped_storage() for parameter in model.parameters() if parameter.grad is not None]
    model_bytes = sizes.weight_bytes + sizes.quantisation_bytes + adapter
    model_bytes += sum({storage.data_ptr(): storage.nbytes() for storage in gradients}.values())
    return memory_of(device) - max(0, torch.cuda.memory_allocated(device) - round(model_bytes))
