"""Forecast of a model's parameters and memory, from the safetensors' headers alone: no weight is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from srcfast.errors import ConfigError, InputError

DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
# 4 bits a weight, an 8-bit scale for 64 weights, an fp32 scale for 256 scales (QLoRA, Dettmers et al., 2023).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
HEADER_LIMIT = 100_000_000  # bytes: safetensors' own bound
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY = {"k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}


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
        """Weights of all layers' linears: q, k, v, o; gate, up, down. Embedding and head are not among them."""
        return self.layers * self.hidden * (2 * self.query + 2 * self.key + 3 * self.intermediate)

    @classmethod
    def of(cls, config: Any) -> Shapes:
        """Of a `DecoderConfig`, or of transformers' config of a text model, or of an LVLM (its `text_config`)."""
        config = getattr(config, "text_config", config)

        def first(*names: str) -> Any:
            return next((found for name in names if (found := getattr(config, name, None)) is not None), None)

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
class Estimate:
    """What a model takes, in bytes; `parameters` by part of the model."""

    parameters: dict[str, int]
    shapes: Shapes
    weight_bytes: float
    adapter_parameters: int
    adapter_bytes: float
    optimizer_bytes: float
    activation_bytes_per_token: float
    kv_bytes_per_token: float
    memory: int | None = None
    largest_token_budget: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, with the sum of the parameters and of what doesn't depend on tokens."""
        fixed = self.weight_bytes + self.adapter_bytes + self.optimizer_bytes
        return asdict(self) | {"total_parameters": sum(self.parameters.values()), "fixed_bytes": fixed}


def estimate(
    path: str | Path,
    *,
    dtype: str = "float32",
    quantize: str = "none",
    lora_r: int = 64,
    target_modules: Sequence[str] = (),
    memory: int | None = None,
) -> Estimate:
    """Forecast the memory of LoRA training and of decoding.

    With b bytes an element of `dtype`, D hidden size, Q and K the widths of queries and keys, F the MLP's,
    L layers and r the rank, a token in training keeps

        L b (4 D + 2 Q + 2 K + 3 F + (number of target modules) r) + 3 * 4 D

    bytes: in each layer the two norms' inputs and outputs (4 D); q, k, v and the attention's result
    (2 Q + 2 K); gate, up and their product (3 F); each adapter's low-rank activation; and at the head the
    hidden state, its unit gradient and its gradient in fp32. No logits are kept. A token in decoding keeps
    2 L K b bytes of keys and values. An adapter's weight takes 4 bytes, its gradient and AdamW's moments 12.
    The forecast leaves out kernels' workspace, images' activations (the vision tower has no gradient) and the
    allocator's fragmentation: 10 % of `memory` is kept for them.

    Args:
        path: checkpoint directory.
        dtype: of weights and activations.
        quantize: "nf4": the decoder's linear layers in 4 bits.
        lora_r: rank of the adapter.
        target_modules: adapted linear layers.
        memory: bytes to fit into; gives the largest token budget.

    Raises:
        InputError: no checkpoint of safetensors, a damaged header, or a decoder of another layout.
    """
    tensors = dict(read_headers(path))
    shapes = _shapes(tensors, path)
    parameters = dict.fromkeys(("vision", "projector", "embedding", "decoder", "head"), 0)
    weight_bytes = 0.0
    adapter = 0
    width = DTYPE_BYTES[dtype]
    for name, shape in tensors.items():
        count = math.prod(shape)
        part = _part(name)
        parameters[part] += count
        linear = part == "decoder" and name.endswith("_proj.weight")
        weight_bytes += count * (NF4_BYTES if linear and quantize == "nf4" else width)
        if linear and name.split(".")[-2] in target_modules:
            adapter += lora_r * sum(shape)
    layer = (
        4 * shapes.hidden + 2 * shapes.query + 2 * shapes.key + 3 * shapes.intermediate + len(target_modules) * lora_r
    )
    activation = shapes.layers * width * layer + 12 * shapes.hidden
    fixed = weight_bytes + 16 * adapter
    budget = None if memory is None else max(0, int((0.9 * memory - fixed) / activation))
    return Estimate(
        parameters={part: count for part, count in parameters.items() if count},
        shapes=shapes,
        weight_bytes=weight_bytes,
        adapter_parameters=adapter,
        adapter_bytes=4.0 * adapter,
        optimizer_bytes=12.0 * adapter,
        activation_bytes_per_token=activation,
        kv_bytes_per_token=2 * shapes.layers * shapes.key * width,
        memory=memory,
        largest_token_budget=budget,
    )


def read_headers(path: str | Path) -> Iterator[tuple[str, list[int]]]:
    """(tensor's name, shape) over a checkpoint directory's safetensors, from their headers.

    Raises:
        InputError: no config.json, no safetensors, or a header that can't be read.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise InputError(
            file=path, expected="a model directory with config.json", found="none", mend="name the directory"
        )
    files = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("adapter_"))
    if not files:
        raise InputError(
            file=path,
            expected="safetensors weights",
            found="none",
            mend="download them, or convert pickled ones",
        )
    for file in files:
        try:
            with open(file, "rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                if not 2 <= size <= HEADER_LIMIT:
                    raise ValueError(f"a header of {size} bytes")
                header = json.loads(opened.read(size))
            for name, entry in header.items():
                if name != "__metadata__":
                    yield name, [int(extent) for extent in entry["shape"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                file=file, expected="a safetensors header", found=error, mend="fetch the file again"
            ) from error


def parse_bytes(text: str) -> int:
    """`12GiB`, `80 GB`, `500000`: a size in bytes. Raises ConfigError where it is none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ConfigError(f"--memory: expected a size such as 12GiB, found {text!r}")
    unit = found[2].lower()
    size = int(float(found[1]) * (_BINARY[unit] if found[3] else _UNITS[unit]))
    if size < 1:
        raise ConfigError(f"--memory: expected a size above 0, found {text!r}")
    return size


def show_bytes(count: float) -> str:
    """`12.3 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _part(name: str) -> str:
    if "vision_tower" in name:
        return "vision"
    if "multi_modal_projector" in name or "image_newline" in name:
        return "projector"
    if name.endswith("embed_tokens.weight"):
        return "embedding"
    return "head" if name.endswith("lm_head.weight") else "decoder"


def _shapes(tensors: dict[str, list[int]], path: str | Path) -> Shapes:
    """The decoder's sizes as its tensors have them: a config.json may leave them to defaults."""
    language = {name: shape for name, shape in tensors.items() if _part(name) in ("decoder", "embedding")}

    def extents(suffix: str) -> list[int]:
        for name, shape in language.items():
            if name.endswith(suffix) and len(shape) == 2:
                return shape
        raise InputError(
            file=path,
            field=suffix,
            expected="a decoder with this matrix",
            found=f"{len(tensors)} tensors without it",
            mend="choose a Llama, Mistral or Qwen decoder",
        )

    vocabulary, hidden = extents("embed_tokens.weight")
    query, key = (
        extents("layers.0.self_attn.q_proj.weight")[0],
        extents("layers.0.self_attn.k_proj.weight")[0],
    )
    intermediate = extents("layers.0.mlp.gate_proj.weight")[0]
    layers = {found[1] for name in language if (found := re.search(r"\blayers\.(\d+)\.", name))}
    return Shapes(len(layers), hidden, query, key, intermediate, vocabulary)
