"""Keys and values of samples that are decoded at once, each slot a sample: a prompt, and rows that continue it.

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

LANES = 16  # the native library takes prompts' rooms and heads' sizes that are multiples of it
PROMPT_STEP = (
    64  # positions by which prompts' rooms of fixed size differ: few sizes, so that captured steps serve many calls
)
GROWTH = 32  # positions by which a cache that grows does so
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layout:
    """Sizes of a cache.

    Attributes:
        slots, width: samples at once, rows of each at most.
        prompt_room, own_room: positions of each prompt and of each row's continuation.
        spare: one row more, without a prompt, for the rows that only fill up a captured step; its place is slots * width.
        fixed: all is allocated from the beginning, as a GPU's is, where a cache that grew would need its old and its new
            memory at once; else rooms grow as they are needed.
    """

    slots: int
    width: int
    prompt_room: int
    own_room: int
    spare: bool = False
    fixed: bool = False

    @classmethod
    def of(
        cls, slots: int, width: int, longest_prompt: int, longest_own: int, *, on_gpu: bool, spare: bool = False
    ) -> Layout:
        """The sizes for prompts and continuations of up to so many positions."""
        step = PROMPT_STEP if on_gpu else LANES
        prompt_room, own_room = rounded(longest_prompt, step), rounded(longest_own, LANES if on_gpu else GROWTH)
        return cls(slots, width, prompt_room, own_room, spare, fixed=on_gpu)

    @property
    def rows(self) -> int:
        """Places of rows, the spare one included."""
        return self.slots * self.width + self.spare

    @property
    def positions(self) -> int:
        """Positions of which a fixed cache keeps keys and values, in each layer."""
        return self.slots * self.prompt_room + self.rows * self.own_room


def storage_of(config: DecoderShapes, layout: Layout, weight: Tensor) -> dict[str, Tensor]:
    """Memory for a cache's keys and values, zeros: attention multiplies what no mask lets through by 0, so none is left unset.

    On a CPU halves are kept in fp32: attention computes in fp32 there, and so each position is converted once.
    """
    layers, heads, size = config.num_layers, config.num_kv_heads, config.head_dim
    prompts = layers * layout.slots * heads * size * (layout.prompt_room if layout.fixed else 0)
    own = layers * layout.rows * heads * size * (layout.own_room if layout.fixed else GROWTH)
    options: dict[str, Any] = {"dtype": cache_dtype(weight.dtype, weight.device.type), "device": weight.device}
    counts = {"prompt_keys": prompts, "prompt_values": prompts, "own_keys": own, "own_values": own}
    return {name: torch.zeros(count, **options) for name, count in counts.items()}


def cache_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The type of a cache's keys and values for a model of `dtype`."""
    return torch.float32 if dtype in HALVES and device_type == "cpu" else dtype


@dataclass(frozen=True)
class _Reads:
    """What a step's attention looks up, `heads` being those of keys and values.

    Attributes:
        index: [R * heads] where each row's keys and values lie among those of all rows.
        output: [R * heads] where its result does; a spare row's is some other row's.
        newest: [R * heads] position that is written.
        used: slots beyond which none is taken.
        room: own positions that are read.
        prompt_mask: [used, 1, 1, P], added to scores.
        own_mask: [used, 1, W, 1, room], added to scores.
    """

    index: Tensor
    output: Tensor
    newest: Tensor
    used: int
    room: int
    prompt_mask: Tensor
    own_mask: Tensor


class SlotCache:
    """Of `slots` samples with `width` rows each; row w of slot s lies at place s * width + w.

    Args:
        config: the decoder's shapes (`num_layers`, `num_heads`, `num_kv_heads`, `head_dim`).
        layout: its sizes.
        weight: whose dtype and device decide those of keys and values.
        storage: `storage_of` this layout or of a larger one, to be used from the front; default: its own.
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
        prompt_room, own_room = (layout.prompt_room, layout.own_room) if layout.fixed else (0, GROWTH)
        prompts, own = (self.layers, self.slots, self.kv_heads), (self.layers, layout.rows * self.kv_heads)

        def part(name: str, *shape: int) -> Tensor:
            return storage[name][: int(np.prod(shape))].view(shape)

        self.prompt_keys = part("prompt_keys", *prompts, self.size, prompt_room)
        self.prompt_values = part("prompt_values", *prompts, prompt_room, self.size)
        # Of the row at place s * width + w and head h at (s * heads + h) * width + w, a spare row's behind them.
        self.own_keys = part("own_keys", *own, self.size, own_room)
        self.own_values = part("own_values", *own, own_room, self.size)
        self.prompt_lengths = torch.zeros(self.slots, dtype=torch.int64, device=self.device)
        # Added to scores. A row sees its own first position at least, so that no row of scores is all -inf.
        scores = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.prompt_mask = torch.full((self.slots, prompt_room), float("-inf"), dtype=scores, device=self.device)
        self._native = (
            self.device.type == "cpu"
            and self.dtype == torch.float32
            and self.size % LANES == 0
            and not layout.spare  # which it knows nothing of
            and native.available()
            and hasattr(torch.ops.srcfast, "decode_attention")  # not in a library that was built before it
        )
        self._queries = torch.zeros(own[1], self.group * self.size, dtype=self.dtype, device=self.device)
        self._forget_rows()

    def _forget_rows(self) -> None:
        # Both by slot, as indices within it. Free ones are a stack: a row's index decides its order in a step's products, so
        # that results are the same bytes only as long as indices are given out in the same order.
        self._rows: list[list[int]] = [[] for _ in range(self.slots)]
        self._free = [list(reversed(range(self.width))) for _ in range(self.slots)]
        self._into: list[tuple[int, int, int]] = []  # (slot, first token, end) of the prompts that are being run

    def reset(self) -> None:
        """As a new cache in fresh memory, at the same addresses."""
        for held in (self.prompt_keys, self.prompt_values, self.own_keys, self.own_values, self._queries):
            held.zero_()
        self.prompt_lengths.zero_()
        self.prompt_mask.fill_(float("-inf"))
        self._forget_rows()

    # Prompts and rows -------------------------------------------------------------------------------------

    def admit(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Make room for prompts of these lengths, which are about to be run packed, in this order."""
        room, longest = self.prompt_mask.shape[1], rounded(max(lengths), LANES)
        if longest > room:
            self.prompt_keys = _grown(self.prompt_keys, 4, longest)
            self.prompt_values = _grown(self.prompt_values, 3, longest)
            self.prompt_mask = F.pad(self.prompt_mask, (0, longest - room), value=float("-inf"))
        ends = np.cumsum(lengths).tolist()
        self._into = [(slot, end - n, end) for slot, n, end in zip(slots, lengths, ends, strict=True)]
        taken, own = to_device(np.array([slots, lengths]), self.device)  # [n] each
        self.prompt_lengths[taken] = own
        hidden = torch.arange(self.prompt_mask.shape[1], device=self.device) >= own[:, None]
        self.prompt_mask[taken] = torch.zeros(
            hidden.shape, dtype=self.prompt_mask.dtype, device=self.device
        ).masked_fill_(hidden, float("-inf"))

    def record(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep a layer's keys and values [T, Hkv, d] of the prompts that are being run."""
        for slot, start, end in self._into:
            self.prompt_keys[layer, slot, :, :, : end - start] = k[start:end].permute(1, 2, 0)
            self.prompt_values[layer, slot, :, : end - start] = v[start:end].transpose(0, 1)

    def start(self, slot: int, parents: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Replace a slot's rows by new ones.

        Args:
            parents: the place of the row that each new row continues; empty: as many rows as `lengths`, behind the prompt.
            lengths: how many of its parent's positions each keeps.

        Returns:
            The new rows' places.

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
            own_keys, own_values = self._by_slot(self.own_keys), self._by_slot(self.own_values)
            for stored in (own_keys[:, slot, ..., :longest], own_values[:, slot, :, :, :longest]):
                stored[:, :, written] = stored[:, :, copied]
        return [slot * self.width + row for row in rows]

    def _assign(self, slot: int, sources: Sequence[int | None]) -> list[int]:
        """Give new rows their indices within a slot; a row has to copy its source's positions where its index is another.

        The last row that continues a source takes over the source's index. So the copies can be made at once: an index that is
        read is still in use, one that is written was free.
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
        """A sample moves to a free slot, its rows each to the same place within it."""
        own_keys, own_values = self._by_slot(self.own_keys), self._by_slot(self.own_values)
        for kept in (self.prompt_keys, self.prompt_values, own_keys, own_values):
            kept[:, target] = kept[:, source]
        for by_slot in (self.prompt_mask, self.prompt_lengths):
            by_slot[target] = by_slot[source]
        for listed in (self._free, self._rows):
            _swap(listed, source, target)

    # A step -----------------------------------------------------------------------------------------------

    def begin(self, places: Tensor, lengths: Tensor, used: int, longest: int) -> Attend:
        """Prepare a step's attention.

        Args:
            places: [R] int64, ascending: the rows that take part; the spare one any number of times, behind the others.
            lengths: [rows] int64 by place: positions of its own that a row has; the step writes the next one.
            used: slots beyond which none is taken.
            longest: at least the number of own positions of the longest row, the next one included.

        Returns:
            (layer, q [R, H, d], k [R, Hkv, d], v [R, Hkv, d]) -> [R, H, d]: writes keys and values, and attends to prompt
            and own positions under one softmax.
        """
        if longest > self.own_keys.shape[3]:
            self.own_keys = _grown(self.own_keys, 3, rounded(longest, GROWTH))
            self.own_values = _grown(self.own_values, 2, rounded(longest, GROWTH))
        if self._native:
            return partial(self._attend_natively, places, lengths[places])
        heads, width, count = self.kv_heads, self.width, used * self.kv_heads * self.width
        slot, within = places[:, None] // width, places[:, None] % width
        head = torch.arange(heads, device=self.device)
        # A spare row's place would be `width` apart for each head: its one page is right behind the other rows'.
        index = torch.minimum((slot * heads + head) * width + within, self.slots * heads * width + head).flatten()
        # On a CPU to the end of the room, not of the longest row: a product over all of it, in one piece, is the faster one.
        room = longest if self.layout.fixed else self.own_keys.shape[3]
        unseen = torch.arange(room, device=self.device) > lengths[: used * width, None]  # [used * W, room]
        own_mask = torch.zeros(unseen.shape, dtype=self.prompt_mask.dtype, device=self.device)
        reads = _Reads(
            index=index,
            output=index.clamp(max=count - 1),
            newest=lengths[places].repeat_interleave(heads),
            used=used,
            room=room,
            prompt_mask=self.prompt_mask[:used, None, None],
            own_mask=own_mask.masked_fill_(unseen, float("-inf")).view(used, 1, width, 1, room),
        )
        return partial(self._attend, reads)

    def _attend(self, reads: _Reads, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, used, (heads, width, group) = len(q), reads.used, (self.kv_heads, self.width, self.group)
        own_keys, own_values = self.own_keys[layer], self.own_values[layer]
        own_keys[reads.index, :, reads.newest] = k.reshape(-1, self.size).to(self.dtype)
        own_values[reads.index, reads.newest] = v.reshape(-1, self.size).to(self.dtype)
        self._queries.index_copy_(0, reads.index, q.reshape(-1, group * self.size).to(self.dtype))
        count = used * heads * width
        queries = self._queries[:count]
        of_sample = queries.view(used * heads, width * group, self.size)
        of_row = queries.view(count, group, self.size)
        weights = self._weights(reads, layer, of_sample, of_row)  # [count, G, P + room]
        seen = self.prompt_values.shape[3]
        of_prompt = _product(
            weights.view(*of_sample.shape[:2], -1)[:, :, :seen], self.prompt_values[layer, :used].flatten(0, 1)
        )
        attended = of_prompt.view(of_row.shape) + _product(weights[:, :, seen:], own_values[:count, : reads.room])
        return (
            attended.view(count, group * self.size).index_select(0, reads.output).view(rows, -1, self.size).to(q.dtype)
        )

    def _weights(self, reads: _Reads, layer: int, of_sample: Tensor, of_row: Tensor) -> Tensor:
        """Softmax over prompt and own positions, [rows, G, P + room], rounded to the cache's type as FlashAttention's are."""
        used, heads, width, group = reads.used, self.kv_heads, self.width, self.group
        prompt_keys = self.prompt_keys[layer, :used].flatten(0, 1)  # [used * Hkv, d, P]
        own_keys = self.own_keys[layer, : len(of_row), :, : reads.room]  # [used * Hkv * W, d, room]
        on_prompt = _product(of_sample, prompt_keys).view(used, heads, width * group, -1)
        on_own = _product(of_row, own_keys).view(used, heads, width, group, -1)
        torch.add(reads.prompt_mask, on_prompt, alpha=self.scale, out=on_prompt)
        torch.add(reads.own_mask, on_own, alpha=self.scale, out=on_own)
        scores = torch.cat((on_prompt.view(len(of_row), group, -1), on_own.view(len(of_row), group, -1)), dim=-1)
        del on_prompt, on_own  # the step's largest tensors
        return scores.softmax(-1).to(self.dtype)

    def _attend_natively(self, places: Tensor, lengths: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty(q.shape, dtype=self.dtype, device=self.device)
        torch.ops.srcfast.decode_attention(
            q.to(self.dtype),
            k.to(self.dtype),
            v.to(self.dtype),
            self.prompt_keys[layer],
            self.prompt_values[layer],
            self._by_slot(self.own_keys)[layer],
            self._by_slot(self.own_values)[layer],
            self.prompt_lengths,
            places,
            lengths,
            self.scale,
            out,
        )
        return out.to(q.dtype)

    def _by_slot(self, own: Tensor) -> Tensor:
        """Keys or values of all rows but the spare one: [layers, S, Hkv, W, ...]."""
        return own[:, : self.slots * self.kv_heads * self.width].unflatten(1, (self.slots, self.kv_heads, self.width))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 (fp64 of fp64): a [n, r, k], b [n, k, c] -> [n, r, c]; a GPU multiplies halves and sums in fp32."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.dtype in HALVES else torch.bmm(a, b)


def rounded(count: int, step: int) -> int:
    """The least multiple of `step` that is no less."""
    return -(-count // step) * step


def _grown(kept: Tensor, dim: int, room: int) -> Tensor:
    """With room for more positions, zeros."""
    shape = list(kept.shape)
    shape[dim] = room
    grown = kept.new_zeros(shape)
    grown.narrow(dim, 0, kept.shape[dim]).copy_(kept)
    return grown


def _swap(listed: list[Any], one: int, other: int) -> None:
    listed[one], listed[other] = listed[other], listed[one]
