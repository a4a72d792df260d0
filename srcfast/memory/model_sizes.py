"""Sizes of a model, in memory or by the shapes of a checkpoint's tensors, and the memory of a device."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srcfast.config.settings import LoRAConfig
from srcfast.data.jsonl import parse_object, regular
from srcfast.errors import ConfigError, InputError
from srcfast.models.fused_modules import Replaced, replaced_in
from srcfast.models.lora import has_stacked_experts, target_names
from srcfast.models.protocols import HasDecoder
from srcfast.models.quantized import plain_linears
from srcfast.models.recurrent import state_sizes, value_width
from srcfast.models.sharding import GATHERED_LAYERS, gathered_bytes, local_values
from srcfast.models.supported import attention_layers
from srcfast.models.vision_adapters import check_family, is_adapted_vision, is_read_in_steps, tower_layer
from srcfast.units import show_bytes
from srcfast_kernels.nf4 import NESTED_BLOCKSIZE, NF4Weight, nf4_flat_size
from srcfast_kernels.transfers import indexed

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# The share of a device's memory to plan with: the rest is for the device's context, the libraries' workspaces and the
# allocator's fragmentation.
USABLE = 0.9
NF4_BLOCKSIZE = 64
# Of transformers' own layers, by what of them srcfast replaces (docs/models.md): 1.00 was measured of whole blocks, 1.2 to 1.6 of
# feed-forwards, 1.8 to 2.1 of neither (Gemma 3, LFM2).
LAYER_FACTORS: dict[Replaced, float] = {"blocks": 1.0, "feed-forwards": 1.6, "nothing": 2.2}
HEADER_LIMIT = 100_000_000  # bytes: safetensors' own bound
_limit: int | None = None


@dataclass(frozen=True)
class Shapes:
    """A decoder's sizes; `query` and `key` are heads times head size.

    `kv_layers` counts the layers that have keys and values, `block_weights` the weights of all layers' linears, of experts
    those that a token passes; None: those of Llama's layers.
    """

    layers: int
    hidden: int
    query: int
    key: int
    intermediate: int
    vocabulary: int
    head_dim: int = 128
    qk_norm: bool = False
    kv_layers: int | None = None
    block_weights: int | None = None

    @property
    def attention_layers(self) -> int:
        """Count the layers that are attention: all but the recurrent ones."""
        return self.layers if self.kv_layers is None else self.kv_layers

    @property
    def linear_weights(self) -> int:
        """Count the weights of all layers' linears (q, k, v, o; gate, up, down), without embedding and head."""
        if self.block_weights is not None:
            return self.block_weights
        return self.layers * self.hidden * (2 * self.query + 2 * self.key + 3 * self.intermediate)

    @property
    def heads(self) -> int:
        return self.query // self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.key // self.head_dim

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
    """A vision tower's sizes, and the positions that an image takes in the decoder (of LLaVA-NeXT: their maximum).

    A position has `vectors` embeddings: with deep-stack features, which later layers add, more than one.
    """

    layers: int
    hidden: int
    intermediate: int
    patches: int
    image_tokens: int
    vectors: int = 1

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
        sides = (first("image_size") or 0, first("patch_size") or 1)
        size, patch = (side[0] if isinstance(side, list | tuple) else side for side in sides)
        return cls(
            layers=int(first("num_hidden_layers", "depth", "num_layers") or 1),
            hidden=hidden,
            intermediate=int(first("intermediate_size") or 4 * hidden),
            patches=max(
                image_tokens * merged, (size // patch) ** 2
            ),  # more where a resampler or a pool makes fewer of them
            image_tokens=image_tokens,
            vectors=1 + len(first("deepstack_visual_indexes") or ()),
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
        parameters: number of parameters by part: vision, projector, embedding, decoder, experts, head.
        weight_bytes: frozen weights on the device, 4-bit codes included.
        quantisation_bytes: the scales of 4-bit weights.
        lora: the adapter.
        vision: the vision tower of an LVLM.
        waiting_bytes: weights that are on the device only while images are encoded.
        trained: number of the base's weights that are trained.
        layer_factor: what a layer saves for backward, of what a hand-written one does, a recurrent mixer left out.
        recomputes_groups: whether the layers of a group are recomputed together, as the hand-written decoder's; else one by one.
        gathered_bytes: of sharded layers, the bytes that are gathered at once while they compute.
        state_bytes: of recurrent layers, the states of one sequence.
        mixer_values: of a recurrent layer, the width of its values.
        adapted_layers: the number of the vision tower's layers that have adapters, 0 with those of the projector alone; None:
            images are embedded without adapters.
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
    recomputes_groups: bool = True
    gathered_bytes: float = 0.0
    state_bytes: float = 0.0
    mixer_values: int = 0
    adapted_layers: int | None = None

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
        adapted: set[int | None] = set()  # the tower's layers, and None for the projector
        for name, parameter in model.named_parameters():
            if ".lora_" in name and name.startswith("vision."):
                adapter += parameter.numel()
                adapted.add(tower_layer(name))
            elif ".lora_" in name:
                adapter += parameter.numel()
                targets.add(name.split(".")[-2])
                dropouts.add(model.get_submodule(name.rpartition(".")[0]).dropout)
                if name.endswith("lora_A"):
                    ranks.add(len(parameter))
            elif name.endswith(".flat"):  # codes and scales of a sharded 4-bit weight, or of experts
                quantised: Any = model.get_submodule(name.rpartition(".")[0])
                count = quantised.num_weights
                fraction = local_values(parameter).nbytes / parameter.nbytes  # of this rank
                parameters[part_of(name)] = parameters.get(part_of(name), 0) + count
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
        general: Any = None if decoder.is_handwritten else decoder
        return cls(
            shapes=decoder_shapes(decoder),
            device_type=device_type or embedding.device.type,
            dtype_bytes=embedding.element_size(),
            parameters=parameters,
            weight_bytes=round(weights),
            quantisation_bytes=round(scales),
            lora=lora,
            vision=None if vision is None else VisionSizes.of(vision.config, vision.typical_tokens),
            waiting_bytes=round(waiting),
            trained=trained,
            layer_factor=1.0 if general is None else LAYER_FACTORS[replaced_in(general.layers)],
            recomputes_groups=general is None,
            gathered_bytes=gathered_bytes(decoder),
            state_bytes=0.0 if general is None else _state_bytes(general.text_config, embedding.element_size()),
            mixer_values=0 if general is None else value_width(general.text_config),
            adapted_layers=len(adapted - {None}) if adapted else None,
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
        linears: Collection[str] | None = None,
        replaced: Replaced = "nothing",
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
            linears: names of the weights of the blocks' linears, where transformers' own layers run; None: the hand-written
                ones run.
            replaced: what of transformers' own layers srcfast replaces.
        """
        general = linears is not None
        if linears is None:
            linears = [name for name in tensors if part_of(name) == "decoder" and name.endswith("_proj.weight")]
        stacked = has_stacked_experts(tensors)
        targets = () if lora is None else target_names(lora, (name.split(".")[-2] for name in linears), stacked)
        of_vision = lora if lora is not None and (lora.projector or lora.tower_layers) else None
        if of_vision is not None:
            check_family("lora.projector", not general and hasattr(config, "vision_config"), config)
        waits = vision_offload and device_type == "cuda"
        parameters = dict.fromkeys(PARTS, 0)
        weights = scales = waiting = layer_bytes = 0.0
        adapter = 0
        for name, shape in tensors.items():
            count, part, linear = math.prod(shape), part_of(name), name in linears
            parameters[part] += count
            stacked_experts = part == "experts" and name.endswith(EXPERTS)
            if (linear or stacked_experts) and quantize == "nf4":
                scale_bytes = nf4_scale_bytes(count)
                if stacked_experts:  # each expert's matrix is a row of its own
                    scale_bytes = shape[0] * 4 * nf4_flat_size(count // shape[0]) - math.ceil(count / 2)
                weights += math.ceil(count / 2) / ranks
                scales += scale_bytes / ranks
                layer_bytes += math.ceil(count / 2) + scale_bytes
            elif linear or stacked_experts:
                weights += count * DTYPE_BYTES[dtype] / ranks
                layer_bytes += count * DTYPE_BYTES[dtype]
            elif (
                part in ("vision", "projector")
                and waits
                and not (of_vision and is_read_in_steps(name, config, of_vision))
            ):
                waiting += count * DTYPE_BYTES[dtype]
            else:
                weights += count * DTYPE_BYTES[dtype]
            if linear and lora is not None and name.split(".")[-2] in targets:
                adapter += lora.r * sum(shape)
            elif of_vision is not None and len(shape) == 2 and is_adapted_vision(name, config, of_vision):
                adapter += of_vision.r * sum(shape)
        text, width = config.get_text_config() if general else None, DTYPE_BYTES[dtype]
        if text is None:
            shapes = Shapes.of(config)
        else:
            block_weights = sum(math.prod(tensors[name]) for name in linears)
            shapes = _general_shapes(text, tensors, block_weights, parameters["experts"])
        return cls(
            shapes=shapes,
            device_type=device_type,
            dtype_bytes=width,
            parameters={part: count for part, count in parameters.items() if count},
            weight_bytes=round(weights),
            quantisation_bytes=round(scales),
            lora=None if lora is None else LoRASizes(lora.r, targets, lora.dropout, adapter),
            vision=VisionSizes.of(config, image_tokens),
            layer_factor=LAYER_FACTORS[replaced] if general else 1.0,
            recomputes_groups=not general,
            waiting_bytes=round(waiting),
            gathered_bytes=GATHERED_LAYERS * layer_bytes / shapes.layers if ranks > 1 else 0.0,
            state_bytes=0.0 if text is None else _state_bytes(text, width),
            mixer_values=0 if text is None else value_width(text),
            adapted_layers=None if of_vision is None else of_vision.tower_layers,
        )


def decoder_shapes(decoder: Any) -> Shapes:
    """Read the sizes of a decoder in memory."""
    if decoder.is_handwritten:
        return Shapes.of(decoder.config)
    counts = {name: parameter.numel() for name, parameter in decoder.named_parameters() if ".lora_" not in name}
    linears = sum(linear.in_features * linear.out_features for linear in plain_linears(decoder.layers))
    experts = sum(
        decoder.get_submodule(name.rpartition(".")[0]).num_weights if name.endswith(".flat") else count
        for name, count in counts.items()
        if part_of(name) == "experts"
    )
    return _general_shapes(decoder.text_config, counts, linears, experts)


def _general_shapes(text_config: Any, parameters: Iterable[str], linears: int, experts: int) -> Shapes:
    """Read the sizes of transformers' own layers.

    Args:
        parameters: names of the decoder's parameters.
        linears: number of the weights of the blocks' linears.
        experts: number of the experts' weights, of which a token passes a part.
    """
    chosen = getattr(text_config, "num_experts_per_tok", 0)
    every = getattr(text_config, "num_experts", None) or getattr(text_config, "num_local_experts", None) or 1
    return replace(
        Shapes.of(text_config),
        qk_norm=any(".q_norm." in name for name in parameters),
        kv_layers=len(attention_layers(text_config)),
        block_weights=linears + experts * chosen // every,
    )


def _state_bytes(text_config: Any, width: int) -> float:
    """Count the bytes of a sequence's recurrent states; gated DeltaNet's own are in fp32."""
    convolution, recurrent = state_sizes(text_config)
    return float(width * convolution + 4 * recurrent)


def whole_nf4(model: HasDecoder | nn.Module) -> Iterator[NF4Weight]:
    """Yield the 4-bit weights of a model that are not sharded."""
    for module in model.modules():
        if getattr(module, "flat", None) is None and isinstance(weight := getattr(module, "weight", None), NF4Weight):
            yield weight


PARTS = ("vision", "projector", "embedding", "decoder", "experts", "head")
EXPERTS = ("gate_up_proj", "down_proj")  # how names of experts that are quantised end


def part_of(name: str) -> str:
    """Return the part of a model to which a parameter belongs, by its name in a checkpoint or in a module."""
    if any(part in name for part in ("multi_modal_projector", "image_newline", "connector.")):
        return "projector"
    if any(part in name for part in ("vision", "visual.")):
        return "vision"
    if name.endswith("embed_tokens.weight"):
        return "embedding"
    if ".experts." in name:
        return "experts"
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
