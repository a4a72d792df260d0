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
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from srcfast.attention.forest_attention import Attend
from srcfast.attention.options import CAUSAL, AttentionOptions
from srcfast.errors import SrcfastError
from srcfast.generation.kv_store import (
    GROWTH,
    HALVES,
    LANES,
    LayerStore,
    Layout,
    cache_dtype,
    layers_by_shape,
    rounded,
    storage_of,
)
from srcfast.models.protocols import DecoderShapes
from srcfast_kernels import native
from srcfast_kernels.transfers import to_device


@dataclass(frozen=True)
class _StepReads:
    """Indices and masks of a step's attention, the same in all layers.

    Attributes:
        rows: [R] of the step.
        lengths: [layout.rows] positions of each row's continuation, without the one that the step writes.
        used: number of slots up to the last one in use.
        capacity: positions of continuations that are read.
        heads: by the number of heads of keys and values: where the rows' heads are [R * heads], where their results are [R *
            heads] (the spare row reads some other row's, which nobody uses), and the position to write [R * heads].
        masks: by window: what is added to scores of prompts [used, 1, 1 or W, 1, P] and of rows [used, 1, W, 1, capacity].
    """

    rows: Tensor
    lengths: Tensor
    used: int
    capacity: int
    heads: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[int | None, tuple[Tensor, Tensor]] = field(default_factory=dict)


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
        self.dtype, self.device = cache_dtype(weight.dtype, weight.device.type), weight.device
        storage = storage_of(config, layout, weight) if storage is None else storage
        self.stores: list[LayerStore] = []
        self._of_layer: dict[int, tuple[LayerStore, int]] = {}  # its store, and its number there
        for (heads, size), layers in layers_by_shape(config).items():
            group = config.num_heads // heads
            self.stores.append(LayerStore(len(self.stores), len(layers), heads, size, group, layout, storage))
            self._of_layer |= {layer: (self.stores[-1], number) for number, layer in enumerate(layers)}
        self.prompt_lengths = torch.zeros(self.slots, dtype=torch.int64, device=self.device)
        # Added to scores. A row sees at least its first position, so that no row of scores is all -inf.
        scores = torch.float64 if self.dtype == torch.float64 else torch.float32
        prompt_capacity, _ = layout.first_capacities
        self.prompt_mask = torch.full((self.slots, prompt_capacity), float("-inf"), dtype=scores, device=self.device)
        self._native = (
            self.device.type == "cpu"
            and self.dtype == torch.float32
            and all(store.size % LANES == 0 for store in self.stores)
            and not layout.spare  # the library has no spare row
            and native.available()
            and _library_takes_windows()
        )
        self._clear_rows()

    def _clear_rows(self) -> None:
        # Both by slot, as indices within it. Free ones are a stack: a row's index decides its order in a step's products, so
        # that results are the same bytes only as long as indices are given out in the same order.
        self._rows: list[list[int]] = [[] for _ in range(self.slots)]
        self._free = [list(reversed(range(self.width))) for _ in range(self.slots)]
        self._into: list[tuple[int, int, int]] = []  # (slot, first token, end) of the prompts being run

    def reset(self) -> None:
        """Restore the state of a new cache, at the same addresses."""
        for store in self.stores:
            store.reset()
        self.prompt_lengths.zero_()
        self.prompt_mask.fill_(float("-inf"))
        self._clear_rows()

    # Prompts and rows -------------------------------------------------------------------------------------

    def admit(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Prepare slots for prompts of these lengths, which are to be run packed, in this order."""
        capacity, longest = self.prompt_mask.shape[1], rounded(max(lengths), LANES)
        if longest > capacity:
            for store in self.stores:
                store.grow_prompts(longest)
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
        store, number = self._of_layer[layer]
        for slot, start, end in self._into:
            store.record(number, slot, k[start:end], v[start:end])

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
            for store in self.stores:
                # Up to the longest for all: what is behind a shorter copy is hidden by the mask until it is overwritten.
                store.copy_rows(slot, copied, written, longest)
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
        for store in self.stores:
            store.move(source, target)
        for by_slot in (self.prompt_mask, self.prompt_lengths):
            by_slot[target] = by_slot[source]
        for listed in (self._free, self._rows):
            listed[source], listed[target] = listed[target], listed[source]

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
            prompt and the continuation under one softmax. Two-way ranges lie in prompts, and so are nothing to a step.
        """
        if longest > self.stores[0].row_keys.shape[3]:
            for store in self.stores:
                store.grow_rows(rounded(longest, GROWTH))
        if self._native:
            return partial(self._attend_natively, rows, lengths[rows])
        # On a CPU up to the capacity, not to the longest row: a product over contiguous memory is faster.
        capacity = longest if self.layout.fixed else self.stores[0].row_keys.shape[3]
        return partial(self._attend, _StepReads(rows, lengths, used, capacity))

    def _attend(
        self,
        reads: _StepReads,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: AttentionOptions = CAUSAL,
        /,
    ) -> Tensor:
        """Write the step's keys and values, and attend by PyTorch's products, over all rows of the used slots."""
        (store, number), used = self._of_layer[layer], reads.used
        heads, group, size = store.heads, store.group, store.size
        count = used * heads * self.width
        if heads not in reads.heads:
            index = store.row_heads(reads.rows)
            newest = reads.lengths[reads.rows].repeat_interleave(heads)
            reads.heads[heads] = index, index.clamp(max=count - 1), newest
        index, output, newest = reads.heads[heads]
        row_keys, row_values = store.row_keys[number], store.row_values[number]
        row_keys[index, :, newest] = k.reshape(-1, size).to(self.dtype)
        row_values[index, newest] = v.reshape(-1, size).to(self.dtype)
        store.queries.index_copy_(0, index, q.reshape(-1, group * size).to(self.dtype))
        queries = store.queries[:count]
        of_sample = queries.view(used * heads, self.width * group, size)
        of_row = queries.view(count, group, size)
        weights = self._weights(reads, store, number, of_sample, of_row, options)  # [count, G, P + capacity]
        prompt = store.prompt_values.shape[3]
        of_prompt = _product(
            weights.view(*of_sample.shape[:2], -1)[:, :, :prompt], store.prompt_values[number, :used].flatten(0, 1)
        )
        attended = of_prompt.view(of_row.shape) + _product(weights[:, :, prompt:], row_values[:count, : reads.capacity])
        return attended.view(count, group * size).index_select(0, output).view(len(q), -1, size).to(q.dtype)

    def _weights(
        self,
        reads: _StepReads,
        store: LayerStore,
        number: int,
        of_sample: Tensor,
        of_row: Tensor,
        options: AttentionOptions,
    ) -> Tensor:
        """Compute softmax over prompts and continuations, [count, G, P + capacity], in the cache's dtype as FlashAttention's."""
        used, heads = reads.used, store.heads
        scale = store.size**-0.5
        prompt_keys = store.prompt_keys[number, :used].flatten(0, 1)  # [used * Hkv, d, P]
        row_keys = store.row_keys[number, : len(of_row), :, : reads.capacity]  # [used * Hkv * W, d, capacity]
        on_prompt = _product(of_sample, prompt_keys).view(used, heads, self.width, store.group, -1)
        on_row = _product(of_row, row_keys).view(used, heads, self.width, store.group, -1)
        prompt_mask, row_mask = self._masks(reads, options.window)
        if options.softcap is not None:
            for scores in (on_prompt, on_row):
                scores.mul_(scale / options.softcap).tanh_()
            scale = options.softcap
        torch.add(prompt_mask, on_prompt, alpha=scale, out=on_prompt)
        torch.add(row_mask, on_row, alpha=scale, out=on_row)
        joined = torch.cat([part.view(len(of_row), store.group, -1) for part in (on_prompt, on_row)], dim=-1)
        del on_prompt, on_row  # the step's largest tensors
        return joined.softmax(-1).to(self.dtype)

    def _masks(self, reads: _StepReads, window: int | None) -> tuple[Tensor, Tensor]:
        """Return what is added to the scores of prompts and of rows, see `_StepReads`."""
        used, width = reads.used, self.width
        if window is not None and window >= self.prompt_mask.shape[1] + reads.capacity:
            window = None
        if window in reads.masks:
            return reads.masks[window]
        lengths = reads.lengths[: used * width, None]
        positions = torch.arange(reads.capacity, device=self.device)
        hidden = positions > lengths  # [used * W, capacity]
        prompt_mask = self.prompt_mask[:used, None, None, None]
        if window is not None:
            hidden |= positions <= lengths - window
            of_prompt = torch.arange(self.prompt_mask.shape[1], device=self.device)
            newest = self.prompt_lengths[:used].repeat_interleave(width)[:, None] + lengths  # [used * W, 1]
            unseen = (of_prompt <= newest - window).view(used, 1, width, 1, -1)
            prompt_mask = prompt_mask.masked_fill(unseen, float("-inf"))
        row_mask = torch.zeros(hidden.shape, dtype=self.prompt_mask.dtype, device=self.device)
        row_mask.masked_fill_(hidden, float("-inf"))
        reads.masks[window] = prompt_mask, row_mask.view(used, 1, width, 1, reads.capacity)
        return reads.masks[window]

    def _attend_natively(
        self,
        rows: Tensor,
        lengths: Tensor,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: AttentionOptions = CAUSAL,
        /,
    ) -> Tensor:
        """Do as `_attend` by the native library, which reads what each row sees and nothing else."""
        store, number = self._of_layer[layer]
        out = torch.empty(q.shape, dtype=self.dtype, device=self.device)
        torch.ops.srcfast.decode_attention(
            q.to(self.dtype),
            k.to(self.dtype),
            v.to(self.dtype),
            store.prompt_keys[number],
            store.prompt_values[number],
            store.by_slot(store.row_keys)[number],
            store.by_slot(store.row_values)[number],
            self.prompt_lengths,
            rows,
            lengths,
            store.size**-0.5,
            options.window or 0,
            options.softcap or 0.0,
            out,
        )
        return out.to(q.dtype)


def _library_takes_windows() -> bool:
    """Return whether the native library is not an old build, whose attention lacks windows and soft caps."""
    operation = getattr(torch.ops.srcfast, "decode_attention", None)
    return operation is not None and "int window" in str(operation.default._schema)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a [n, r, k] by b [n, k, c] into [n, r, c], in fp32 (fp64 for fp64); 16-bit operands are summed in fp32."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.dtype in HALVES else torch.bmm(a, b)
