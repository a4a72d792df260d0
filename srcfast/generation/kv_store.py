"""Keys and values of the layers of a key-value cache whose heads have one shape; most models have one such store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srcfast.models.protocols import DecoderShapes

LANES = 16  # the native library takes prompts' capacities and heads' sizes that are multiples of it
GROWTH = 32  # positions by which a cache on a CPU grows
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layout:
    """Sizes of a cache.

    Attributes:
        slots, width: samples at once, maximum of rows of each.
        prompt_capacity, row_capacity: positions of each prompt and of each row's continuation.
        spare: whether there is one more row, without a prompt, that pads captured steps; its index is slots * width.
        fixed: whether all memory is allocated at once, as on a GPU, where growing would need the old and the new memory
            together; otherwise capacities grow as needed.
    """

    slots: int
    width: int
    prompt_capacity: int
    row_capacity: int
    spare: bool = False
    fixed: bool = False

    @classmethod
    def of(
        cls, slots: int, width: int, longest_prompt: int, longest_row: int, *, on_gpu: bool, spare: bool = False
    ) -> Layout:
        """Return the layout for prompts and continuations of at most these lengths."""
        step = PROMPT_STEP if on_gpu else LANES
        prompt_capacity, row_capacity = rounded(longest_prompt, step), rounded(longest_row, LANES if on_gpu else GROWTH)
        return cls(slots, width, prompt_capacity, row_capacity, spare, fixed=on_gpu)

    @property
    def rows(self) -> int:
        """Return the number of rows, the spare one included."""
        return self.slots * self.width + self.spare

    @property
    def positions(self) -> int:
        """Return the number of positions that a fixed cache has in each layer."""
        return self.slots * self.prompt_capacity + self.rows * self.row_capacity

    @property
    def first_capacities(self) -> tuple[int, int]:
        """Return the positions of each prompt and of each row for which a new cache has memory."""
        return (self.prompt_capacity, self.row_capacity) if self.fixed else (0, GROWTH)


PROMPT_STEP = 64  # granularity of a fixed cache's prompt capacity: few sizes, so that captured steps serve many calls


def layers_by_shape(config: DecoderShapes) -> dict[tuple[int, int], list[int]]:
    """Group the layers of a decoder by their (heads of keys and values, size of a head)."""
    shapes = getattr(config, "kv_shapes", None) or ((config.num_kv_heads, config.head_dim),) * config.num_layers
    layers: dict[tuple[int, int], list[int]] = {}
    for layer, shape in enumerate(shapes):
        layers.setdefault(shape, []).append(layer)
    return layers


def storage_of(config: DecoderShapes, layout: Layout, weight: Tensor) -> dict[str, Tensor]:
    """Allocate memory for a cache's keys and values.

    It is zeros, since attention multiplies masked values by 0, and 0 times what uninitialised memory holds may be NaN. On a CPU
    16-bit keys and values are stored in fp32: attention computes in fp32 there, so each position is converted once.
    """
    prompts, rows = layout.first_capacities
    options: dict[str, Any] = {"dtype": cache_dtype(weight.dtype, weight.device.type), "device": weight.device}
    storage = {}
    for number, ((heads, size), layers) in enumerate(layers_by_shape(config).items()):
        of_position = len(layers) * heads * size
        for name, positions in (("prompt", layout.slots * prompts), ("row", layout.rows * rows)):
            for kind in ("keys", "values"):
                storage[f"{name}_{kind}.{number}"] = torch.zeros(of_position * positions, **options)
    return storage


def cache_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Return the dtype of the keys and values of a model of `dtype`."""
    return torch.float32 if dtype in HALVES and device_type == "cpu" else dtype


class LayerStore:
    """The keys and values of `layers` layers.

    Args:
        number: of the store, which names its part of the storage.
        layers, heads, size: heads of keys and values, and the size of a head.
        group: heads of queries to each of them.
        layout: the cache's sizes.
        storage: `storage_of` this layout or of a larger one, of which the first part is used.
    """

    def __init__(
        self,
        number: int,
        layers: int,
        heads: int,
        size: int,
        group: int,
        layout: Layout,
        storage: Mapping[str, Tensor],
    ) -> None:
        self.layout, self.heads, self.size, self.group = layout, heads, size, group
        prompt_capacity, row_capacity = layout.first_capacities

        def view(name: str, *shape: int) -> Tensor:
            return storage[f"{name}.{number}"][: int(np.prod(shape))].view(shape)

        prompts, rows = (layers, layout.slots, heads), (layers, layout.rows * heads)
        self.prompt_keys = view("prompt_keys", *prompts, size, prompt_capacity)
        self.prompt_values = view("prompt_values", *prompts, prompt_capacity, size)
        # Row w of slot s and head h are at (s * heads + h) * width + w, the spare row's heads behind all of them.
        self.row_keys = view("row_keys", *rows, size, row_capacity)
        self.row_values = view("row_values", *rows, row_capacity, size)
        self.queries = self.row_keys.new_zeros(rows[1], group * size)

    def reset(self) -> None:
        """Restore the state of a new store, at the same addresses."""
        for tensor in (self.prompt_keys, self.prompt_values, self.row_keys, self.row_values, self.queries):
            tensor.zero_()

    def grow_prompts(self, capacity: int) -> None:
        """Make room for prompts of `capacity` positions."""
        self.prompt_keys = _resized(self.prompt_keys, 4, capacity)
        self.prompt_values = _resized(self.prompt_values, 3, capacity)

    def grow_rows(self, capacity: int) -> None:
        """Make room for continuations of `capacity` positions."""
        self.row_keys = _resized(self.row_keys, 3, capacity)
        self.row_values = _resized(self.row_values, 2, capacity)

    def record(self, layer: int, slot: int, k: Tensor, v: Tensor) -> None:
        """Store a layer's keys and values [n, heads, d] of a slot's prompt."""
        self.prompt_keys[layer, slot, :, :, : len(k)] = k.permute(1, 2, 0)
        self.prompt_values[layer, slot, :, : len(v)] = v.transpose(0, 1)

    def copy_rows(self, slot: int, copied: Tensor, written: Tensor, longest: int) -> None:
        """Copy the first positions of rows of a slot [n] to others [n]."""
        row_keys, row_values = self.by_slot(self.row_keys), self.by_slot(self.row_values)
        for stored in (row_keys[:, slot, ..., :longest], row_values[:, slot, :, :, :longest]):
            stored[:, :, written] = stored[:, :, copied]

    def move(self, source: int, target: int) -> None:
        """Copy a slot's prompt and rows to another slot."""
        row_keys, row_values = self.by_slot(self.row_keys), self.by_slot(self.row_values)
        for stored in (self.prompt_keys, self.prompt_values, row_keys, row_values):
            stored[:, target] = stored[:, source]

    def row_heads(self, rows: Tensor) -> Tensor:
        """Compute where the heads of rows [R] are among those of all rows: [R * heads]."""
        heads, width = self.heads, self.layout.width
        slot, within = rows[:, None] // width, rows[:, None] % width
        head = torch.arange(heads, device=rows.device)
        # By the formula the spare row's heads would be `width` apart, but they follow each other behind all other rows.
        index = torch.minimum((slot * heads + head) * width + within, self.layout.slots * heads * width + head)
        return index.flatten()

    def by_slot(self, stored: Tensor) -> Tensor:
        """View keys or values of all rows but the spare one as [layers, S, heads, W, ...]."""
        slots, width = self.layout.slots, self.layout.width
        return stored[:, : slots * self.heads * width].unflatten(1, (slots, self.heads, width))


def rounded(count: int, step: int) -> int:
    """Round up to a multiple of `step`."""
    return -(-count // step) * step


def _resized(stored: Tensor, dim: int, capacity: int) -> Tensor:
    """Copy a tensor into a larger one, zeros behind it in `dim`."""
    shape = list(stored.shape)
    shape[dim] = capacity
    resized = stored.new_zeros(shape)
    resized.narrow(dim, 0, stored.shape[dim]).copy_(stored)
    return resized
