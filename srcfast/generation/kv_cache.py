"""The key-value cache of samples decoded at once: a slot is a sample, with a prompt and rows that continue it.

A prompt is stored once and read once a step by all rows of its sample. Each row's continuation is contiguous, so that no step
gathers keys; of rows that fork, all but one copy what they continue. A step's attention is csrc's `decode_attention` on a CPU
in fp32, where the native library was built, and plain PyTorch elsewhere: padded to the longest prompt and continuation, and so
slower where rows differ. Scores, their softmax and all sums are fp32 whatever the model's type, as in training's attention. No
call waits for a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from srcfast.attention.forest_attention import Attend
from srcfast.errors import SrcfastError
from srcfast.models.protocols import DecoderShapes
from srcfast_kernels import native
from srcfast_kernels.transfers import to_device

LANES = 16  # the native library takes prompts' capacities and heads' sizes that are multiples of it
PROMPT_STEP = 64  # granularity of a fixed cache's prompt capacity: few sizes, so that captured steps serve many calls
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


def storage_of(config: DecoderShapes, layout: Layout, weight: Tensor) -> dict[str, Tensor]:
    """Allocate memory for a cache's keys and values.

    It is zeros, since attention multiplies masked values by 0, and 0 times what uninitialised memory holds may be NaN. On a CPU
    16-bit keys and values are stored in fp32: attention computes in fp32 there, so each position is converted once.
    """
    layers, heads, size = config.num_layers, config.num_kv_heads, config.head_dim
    prompts = layers * layout.slots * heads * size * (layout.prompt_capacity if layout.fixed else 0)
    rows = layers * layout.rows * heads * size * (layout.row_capacity if layout.fixed else GROWTH)
    options: dict[str, Any] = {"dtype": cache_dtype(weight.dtype, weight.device.type), "device": weight.device}
    counts = {"prompt_keys": prompts, "prompt_values": prompts, "row_keys": rows, "row_values": rows}
    return {name: torch.zeros(count, **options) for name, count in counts.items()}


def cache_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Return the dtype of the keys and values of a model of `dtype`."""
    return torch.float32 if dtype in HALVES and device_type == "cpu" else dtype


@dataclass(frozen=True)
class _StepReads:
    """Indices and masks of a step's attention, the same in all layers; `heads` are those of keys and values.

    Attributes:
        index: [R * heads] of each row's keys and values among those of all rows.
        output: [R * heads] of its result; the spare row reads some other row's, which nobody uses.
        newest: [R * heads] position to write.
        used: number of slots up to the last one in use.
        capacity: positions of continuations that are read.
        prompt_mask: [used, 1, 1, P], added to scores.
        row_mask: [used, 1, W, 1, capacity], added to scores.
    """

    index: Tensor
    output: Tensor
    newest: Tensor
    used: int
    capacity: int
    prompt_mask: Tensor
    row_mask: Tensor


class SlotCache:
    """Keys and values of `slots` samples with `width` rows each; row w of slot s has the index s * width + w.

    Args:
        config: the decoder's shapes.
        layout: the cache's sizes.
        weight: a weight, whose dtype and device decide those of keys and values.
        storage: `storage_of` this layout or of a larger one, of which the first part is used; default: new memory.
    """

    def __init__(
        self, config: DecoderShapes, layout: Layout, weight: Tensor, storage: Mapping[str, Tensor] | None = None
    ) -> None:
        self.layout, self.slots, self.width = layout, layout.slots, layout.width
        self.layers, self.kv_heads, self.size = config.num_layers, config.num_kv_heads, config.head_dim
        self.group = config.num_heads // config.num_kv_heads
        self.scale = config.head_dim**-0.5
        self.dtype, self.device = cache_dtype(weight.dtype, weight.device.type), weight.device
        storage = storage_of(config, layout, weight) if storage is None else storage
        prompt_capacity, row_capacity = (layout.prompt_capacity, layout.row_capacity) if layout.fixed else (0, GROWTH)
        prompts = (self.layers, self.slots, self.kv_heads)
        rows = (self.layers, layout.rows * self.kv_heads)

        def view(name: str, *shape: int) -> Tensor:
            return storage[name][: int(np.prod(shape))].view(shape)

        self.prompt_keys = view("prompt_keys", *prompts, self.size, prompt_capacity)
        self.prompt_values = view("prompt_values", *prompts, prompt_capacity, self.size)
        # Row w of slot s and head h are at (s * heads + h) * width + w, the spare row's heads behind all of them.
        self.row_keys = view("row_keys", *rows, self.size, row_capacity)
        self.row_values = view("row_values", *rows, row_capacity, self.size)
        self.prompt_lengths = torch.zeros(self.slots, dtype=torch.int64, device=self.device)
        # Added to scores. A row sees at least its first position, so that no row of scores is all -inf.
        scores = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.prompt_mask = torch.full((self.slots, prompt_capacity), float("-inf"), dtype=scores, device=self.device)
        self._native = (
            self.device.type == "cpu"
            and self.dtype == torch.float32
            and self.size % LANES == 0
            and not layout.spare  # the library has no spare row
            and native.available()
            and hasattr(torch.ops.srcfast, "decode_attention")  # an old build of the library lacks it
        )
        self._queries = torch.zeros(rows[1], self.group * self.size, dtype=self.dtype, device=self.device)
        self._clear_rows()

    def _clear_rows(self) -> None:
        # Both by slot, as indices within it. Free ones are a stack: a row's index decides its order in a step's products, so
        # that results are the same bytes only as long as indices are given out in the same order.
        self._rows: list[list[int]] = [[] for _ in range(self.slots)]
        self._free = [list(reversed(range(self.width))) for _ in range(self.slots)]
        self._into: list[tuple[int, int, int]] = []  # (slot, first token, end) of the prompts being run

    def reset(self) -> None:
        """Restore the state of a new cache, at the same addresses."""
        for tensor in (self.prompt_keys, self.prompt_values, self.row_keys, self.row_values, self._queries):
            tensor.zero_()
        self.prompt_lengths.zero_()
        self.prompt_mask.fill_(float("-inf"))
        self._clear_rows()

    # Prompts and rows -------------------------------------------------------------------------------------

    def admit(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Prepare slots for prompts of these lengths, which are to be run packed, in this order."""
        capacity, longest = self.prompt_mask.shape[1], rounded(max(lengths), LANES)
        if longest > capacity:
            self.prompt_keys = _resized(self.prompt_keys, 4, longest)
            self.prompt_values = _resized(self.prompt_values, 3, longest)
            self.prompt_mask = F.pad(self.prompt_mask, (0, longest - capacity), value=float("-inf"))
        ends = np.cumsum(lengths).tolist()
        self._into = [(slot, end - n, end) for slot, n, end in zip(slots, lengths, ends, strict=True)]
        indices, counts = to_device(np.array([slots, lengths]), self.device)  # [n] each
        self.prompt_lengths[indices] = counts
        hidden = torch.arange(self.prompt_mask.shape[1], device=self.device) >= counts[:, None]
        self.prompt_mask[indices] = torch.zeros(
            hidden.shape, dtype=self.prompt_mask.dtype, device=self.device
        ).masked_fill_(hidden, float("-inf"))

    def record(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store a layer's keys and values [T, Hkv, d] of the prompts being run."""
        for slot, start, end in self._into:
            self.prompt_keys[layer, slot, :, :, : end - start] = k[start:end].permute(1, 2, 0)
            self.prompt_values[layer, slot, :, : end - start] = v[start:end].transpose(0, 1)

    def start(self, slot: int, parents: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Replace a slot's rows by new ones.

        Args:
            parents: the index of the row that each new row continues; empty: as many rows as `lengths`, behind the prompt.
            lengths: the number of its parent's positions that each row continues.

        Returns:
            The new rows' indices.

        Raises:
            SrcfastError: more rows than a slot has.
        """
        if len(lengths) > self.width:
            raise SrcfastError(
                f"the key-value cache: expected at most {self.width} rows in a slot, found {len(lengths)}. "
                "Fix: decode with a width of the most rows that a sample writes at once"
            )
        sources: list[int | None] = [None] * len(lengths)
        if parents:
            paired = zip(parents, lengths, strict=True)
            sources = [parent % self.width if length else None for parent, length in paired]
        rows = self._assign(slot, sources)
        triples = zip(sources, rows, lengths, strict=True)
        copies = np.array([triple for triple in triples if triple[0] is not None and triple[0] != triple[1]])  # [n, 3]
        if len(copies):
            longest = int(copies[:, 2].max())
            copied, written = to_device(copies[:, :2].T.copy(), self.device)  # [n] each
            row_keys, row_values = self._by_slot(self.row_keys), self._by_slot(self.row_values)
            # Up to the longest for all: what is behind a shorter copy is hidden by the mask until it is overwritten.
            for stored in (row_keys[:, slot, ..., :longest], row_values[:, slot, :, :, :longest]):
                stored[:, :, written] = stored[:, :, copied]
        return [slot * self.width + row for row in rows]

    def _assign(self, slot: int, sources: Sequence[int | None]) -> list[int]:
        """Choose new rows' indices within a slot; a row whose index is not its source's has to copy from the source.

        The last row that continues a source takes over its index. So all copies can be made at once: an index that is read is
        still in use, one that is written was free.
        """
        remaining = Counter(sources)
        assert remaining.keys() <= {None, *self._rows[slot]}, "a row continues one of its slot"
        free = self._free[slot]
        free += [row for row in self._rows[slot] if row not in remaining]
        rows = []
        for source in sources:
            remaining[source] -= 1
            rows.append(free.pop() if source is None or remaining[source] else source)
        self._rows[slot] = rows
        return rows

    def release(self, slot: int) -> None:
        """Free a slot's rows."""
        self._free[slot] += self._rows[slot]
        self._rows[slot] = []

    def move(self, source: int, target: int) -> None:
        """Move a sample to a free slot; its rows have the same indices within it."""
        row_keys, row_values = self._by_slot(self.row_keys), self._by_slot(self.row_values)
        for stored in (self.prompt_keys, self.prompt_values, row_keys, row_values):
            stored[:, target] = stored[:, source]
        for by_slot in (self.prompt_mask, self.prompt_lengths):
            by_slot[target] = by_slot[source]
        for listed in (self._free, self._rows):
            _swap(listed, source, target)

    # A step -----------------------------------------------------------------------------------------------

    def begin(self, rows: Tensor, lengths: Tensor, used: int, longest: int) -> Attend:
        """Prepare a step's attention.

        Args:
            rows: [R] int64, ascending: indices of the rows of the step; the spare one any number of times, behind the others.
            lengths: [layout.rows] int64: positions of each row's continuation; the step writes the next one.
            used: number of slots up to the last one in use.
            longest: at least the number of positions of the longest continuation, the next one included.

        Returns:
            (layer, q [R, H, d], k [R, Hkv, d], v [R, Hkv, d]) -> [R, H, d]: writes keys and values, and attends to the
            prompt and the continuation under one softmax.
        """
        if longest > self.row_keys.shape[3]:
            self.row_keys = _resized(self.row_keys, 3, rounded(longest, GROWTH))
            self.row_values = _resized(self.row_values, 2, rounded(longest, GROWTH))
        if self._native:
            return partial(self._attend_natively, rows, lengths[rows])
        heads, width, count = self.kv_heads, self.width, used * self.kv_heads * self.width
        slot, within = rows[:, None] // width, rows[:, None] % width
        head = torch.arange(heads, device=self.device)
        # By the formula the spare row's heads would be `width` apart, but they follow each other behind all other rows.
        index = torch.minimum((slot * heads + head) * width + within, self.slots * heads * width + head).flatten()
        # On a CPU up to the capacity, not to the longest row: a product over contiguous memory is faster.
        capacity = longest if self.layout.fixed else self.row_keys.shape[3]
        hidden = torch.arange(capacity, device=self.device) > lengths[: used * width, None]  # [used * W, capacity]
        row_mask = torch.zeros(hidden.shape, dtype=self.prompt_mask.dtype, device=self.device)
        reads = _StepReads(
            index=index,
            output=index.clamp(max=count - 1),
            newest=lengths[rows].repeat_interleave(heads),
            used=used,
            capacity=capacity,
            prompt_mask=self.prompt_mask[:used, None, None],
            row_mask=row_mask.masked_fill_(hidden, float("-inf")).view(used, 1, width, 1, capacity),
        )
        return partial(self._attend, reads)

    def _attend(self, reads: _StepReads, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the step's keys and values, and attend by PyTorch's products, over all rows of the used slots."""
        used, heads = reads.used, self.kv_heads
        width, group = self.width, self.group
        row_keys, row_values = self.row_keys[layer], self.row_values[layer]
        row_keys[reads.index, :, reads.newest] = k.reshape(-1, self.size).to(self.dtype)
        row_values[reads.index, reads.newest] = v.reshape(-1, self.size).to(self.dtype)
        self._queries.index_copy_(0, reads.index, q.reshape(-1, group * self.size).to(self.dtype))
        count = used * heads * width
        queries = self._queries[:count]
        of_sample = queries.view(used * heads, width * group, self.size)
        of_row = queries.view(count, group, self.size)
        weights = self._weights(reads, layer, of_sample, of_row)  # [count, G, P + capacity]
        prompt = self.prompt_values.shape[3]
        of_prompt = _product(
            weights.view(*of_sample.shape[:2], -1)[:, :, :prompt], self.prompt_values[layer, :used].flatten(0, 1)
        )
        attended = of_prompt.view(of_row.shape) + _product(weights[:, :, prompt:], row_values[:count, : reads.capacity])
        return (
            attended.view(count, group * self.size)
            .index_select(0, reads.output)
            .view(len(q), -1, self.size)
            .to(q.dtype)
        )

    def _weights(self, reads: _StepReads, layer: int, of_sample: Tensor, of_row: Tensor) -> Tensor:
        """Compute softmax over prompts and continuations, [count, G, P + capacity], in the cache's dtype as FlashAttention's."""
        used, heads = reads.used, self.kv_heads
        width, group = self.width, self.group
        prompt_keys = self.prompt_keys[layer, :used].flatten(0, 1)  # [used * Hkv, d, P]
        row_keys = self.row_keys[layer, : len(of_row), :, : reads.capacity]  # [used * Hkv * W, d, capacity]
        on_prompt = _product(of_sample, prompt_keys).view(used, heads, width * group, -1)
        on_row = _product(of_row, row_keys).view(used, heads, width, group, -1)
        torch.add(reads.prompt_mask, on_prompt, alpha=self.scale, out=on_prompt)
        torch.add(reads.row_mask, on_row, alpha=self.scale, out=on_row)
        scores = torch.cat((on_prompt.view(len(of_row), group, -1), on_row.view(len(of_row), group, -1)), dim=-1)
        del on_prompt, on_row  # the step's largest tensors
        return scores.softmax(-1).to(self.dtype)

    def _attend_natively(self, rows: Tensor, lengths: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Do as `_attend` by the native library, which reads what each row sees and nothing else."""
        out = torch.empty(q.shape, dtype=self.dtype, device=self.device)
        torch.ops.srcfast.decode_attention(
            q.to(self.dtype),
            k.to(self.dtype),
            v.to(self.dtype),
            self.prompt_keys[layer],
            self.prompt_values[layer],
            self._by_slot(self.row_keys)[layer],
            self._by_slot(self.row_values)[layer],
            self.prompt_lengths,
            rows,
            lengths,
            self.scale,
            out,
        )
        return out.to(q.dtype)

    def _by_slot(self, stored: Tensor) -> Tensor:
        """View keys or values of all rows but the spare one as [layers, S, Hkv, W, ...]."""
        return stored[:, : self.slots * self.kv_heads * self.width].unflatten(
            1, (self.slots, self.kv_heads, self.width)
        )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a [n, r, k] by b [n, k, c] into [n, r, c], in fp32 (fp64 for fp64); 16-bit operands are summed in fp32."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.dtype in HALVES else torch.bmm(a, b)


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


def _swap(items: list[Any], first: int, second: int) -> None:
    items[first], items[second] = items[second], items[first]
