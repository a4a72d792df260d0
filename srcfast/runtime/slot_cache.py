"""Keys and values of samples that are decoded at once, each slot a sample: a prompt, and rows that continue it.

A prompt is kept once and read once a step by all rows of its sample; each row's own continuation is one page, contiguous, so
that no step gathers keys. A step's attention is csrc's `decode_attention` on a CPU in fp32, where the native library was built,
and plain PyTorch elsewhere: padded to the longest prompt and continuation, and so slower where rows differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from srcfast.runtime.kv_pages import KVPages, PagedRow
from srcfast_kernels import native

LANES = 16  # the native library takes prompts' rooms and heads' sizes that are multiples of it
GROWTH = 32  # positions by which a cache that grows does so
ENDLESS = 1 << 30  # a page takes any number of positions


class SlotCache:
    """Of `slots` samples with `width` rows each; row w of slot s lies at place s * width + w.

    Args:
        config: the decoder's shapes (`num_layers`, `num_heads`, `num_kv_heads`, `head_dim`).
        slots, width: samples at once, rows of each at most.
        prompt_room, own_room: positions of the longest prompt and continuation; what is kept grows up to them as it is needed
            (`fixed`: is all there from the beginning, as captured graphs need it).
        weight: whose dtype and device keys and values have.
    """

    def __init__(
        self, config: Any, slots: int, width: int, prompt_room: int, own_room: int, weight: Tensor, fixed: bool = False
    ) -> None:
        self.slots, self.width, self.fixed = slots, width, fixed
        self.layers, self.kv_heads, self.size = config.num_layers, config.num_kv_heads, config.head_dim
        self.group = config.num_heads // config.num_kv_heads
        self.scale = config.head_dim**-0.5
        self._options = {"dtype": weight.dtype, "device": weight.device}
        # Never left unset: what no mask lets through is still multiplied by 0.
        seen = _rounded(prompt_room, LANES) if fixed else 0
        shape = (self.layers, slots, self.kv_heads)
        self.prompt_keys = torch.zeros(*shape, self.size, seen, **self._options)
        self.prompt_values = torch.zeros(*shape, seen, self.size, **self._options)
        room = _rounded(own_room, LANES) if fixed else GROWTH
        self.own_keys = torch.zeros(*shape, width, self.size, room, **self._options)
        self.own_values = torch.zeros(*shape, width, room, self.size, **self._options)
        self.prompt_lengths = torch.zeros(slots, dtype=torch.int64, device=weight.device)
        # Added to scores. A row sees its own first position at least, so that no row of scores is all -inf.
        self.prompt_mask = torch.full((slots, seen), float("-inf"), **self._options)
        self._native = (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and self.size % LANES == 0
            and native.available()
            and hasattr(torch.ops.srcfast, "decode_attention")  # not in a library that was built before it
        )
        self._queries = torch.zeros(slots * self.kv_heads * width, self.group * self.size, **self._options)
        self._pages = [KVPages(range(width), ENDLESS) for _ in range(slots)]
        self._rows: list[dict[int, PagedRow]] = [{} for _ in range(slots)]  # by their page
        self._into: list[tuple[int, int, int]] = []  # (slot, first token, end) of the prompts that are being run

    # Prompts and rows -------------------------------------------------------------------------------------

    def admit(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Make room for prompts of these lengths, which are about to be run packed, in this order."""
        room, longest = self.prompt_mask.shape[1], _rounded(max(lengths), LANES)
        if longest > room:
            self.prompt_keys = _grown(self.prompt_keys, 4, longest)
            self.prompt_values = _grown(self.prompt_values, 3, longest)
            self.prompt_mask = F.pad(self.prompt_mask, (0, longest - room), value=float("-inf"))
        ends = np.cumsum(lengths).tolist()
        self._into = [(slot, end - n, end) for slot, n, end in zip(slots, lengths, ends, strict=True)]
        for slot, length in zip(slots, lengths, strict=True):
            self.prompt_mask[slot, :length], self.prompt_mask[slot, length:] = 0.0, float("-inf")
            self.prompt_lengths[slot] = length

    def record(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep a layer's keys and values [T, Hkv, d] of the prompts that are being run."""
        for slot, start, end in self._into:
            self.prompt_keys[layer, slot, :, :, : end - start] = k[start:end].permute(1, 2, 0)
            self.prompt_values[layer, slot, :, : end - start] = v[start:end].transpose(0, 1)

    def start(self, slot: int, parents: Sequence[int], lengths: Sequence[int], limit: int) -> list[int]:
        """Let new rows take the place of a slot's old ones.

        Args:
            parents: the place of the row that each new row continues; empty: as many rows as `lengths`, behind the prompt.
            lengths: how many of its parent's positions each keeps.
            limit: positions that each will write at most.

        Returns:
            The new rows' places.
        """
        pages, old = self._pages[slot], self._rows[slot]
        if parents:
            rows = [pages.fork(old[parent % self.width], n) for parent, n in zip(parents, lengths, strict=True)]
        else:
            rows = [pages.new_row() for _ in lengths]
        self.release(slot)
        copies = [copy for row in rows for copy in pages.extend(row, row.length + limit)]
        if copies:
            longest = max(copy.length for copy in copies)
            sources, targets = [copy.source for copy in copies], [copy.target for copy in copies]
            for held in (self.own_keys[:, slot, ..., :longest], self.own_values[:, slot, :, :, :longest]):
                held[:, :, targets] = held[:, :, sources]
        self._rows[slot] = {row.pages[0]: row for row in rows}
        return [slot * self.width + row.pages[0] for row in rows]

    def release(self, slot: int) -> None:
        """Forget a slot's rows."""
        for row in self._rows[slot].values():
            self._pages[slot].release(row)
        self._rows[slot] = {}

    def move(self, source: int, target: int) -> None:
        """A sample moves to a free slot, its rows each to the same place within it."""
        for kept in (self.prompt_keys, self.prompt_values, self.own_keys, self.own_values):
            kept[:, target] = kept[:, source]
        for by_slot in (self.prompt_mask, self.prompt_lengths):
            by_slot[target] = by_slot[source]
        for listed in (self._pages, self._rows):
            _swap(listed, source, target)

    # A step -----------------------------------------------------------------------------------------------

    def begin(self, places: Tensor, lengths: Tensor, used: int, longest: int) -> None:
        """Prepare a step's attention.

        Args:
            places: [R] int64, ascending: the rows that take part.
            lengths: [S * W] int64 by place: positions of its own that a row has; the step writes the next one.
            used: slots beyond which none is taken.
            longest: at least the number of own positions of the longest row, the next one included.
        """
        if longest > self.own_keys.shape[5]:
            self.own_keys = _grown(self.own_keys, 5, _rounded(longest, GROWTH))
            self.own_values = _grown(self.own_values, 4, _rounded(longest, GROWTH))
        if self._native:
            self._places, self._lengths = places, lengths[places]
            return
        device, heads, width = places.device, self.kv_heads, self.width
        slot, within = places // width, places % width
        head = torch.arange(heads, device=device)
        self._index = ((slot[:, None] * heads + head) * width + within[:, None]).flatten()  # [R * Hkv]
        room = self.own_keys.shape[5]
        self._newest = lengths[places].repeat_interleave(heads)  # [R * Hkv]
        self._used = used
        # On a CPU to the end of the room, not of the longest row: a product over all of it, in one piece, is the faster one.
        self._read = room = longest if self.fixed else room
        unseen = torch.arange(room, device=device) > lengths[: used * width, None]  # [S * W, L]
        mask = torch.zeros(unseen.shape, **self._options).masked_fill_(unseen, float("-inf"))
        self._own_mask = mask.view(used, 1, width, room).expand(-1, heads, -1, -1).reshape(-1, 1, room)
        mask = self.prompt_mask[:used, None].expand(-1, heads, -1)
        self._mask = mask.reshape(used * heads, 1, -1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [R, H, d], k and v [R, Hkv, d] -> [R, H, d]: prompt and own positions under one softmax."""
        if self._native:
            return self._attend_natively(layer, q, k, v)
        rows, (slots, width, group) = len(q), (self._used, self.width, self.group)
        own_keys, own_values = self.own_keys[layer].flatten(0, 2), self.own_values[layer].flatten(0, 2)
        own_keys[self._index, :, self._newest] = k.reshape(-1, self.size)
        own_values[self._index, self._newest] = v.reshape(-1, self.size)
        self._queries.index_copy_(0, self._index, q.reshape(-1, group * self.size))
        queries = self._queries[: slots * self.kv_heads * width]
        of_sample = queries.view(slots * self.kv_heads, width * group, self.size)
        of_row = queries.view(-1, group, self.size)
        prompt_keys = self.prompt_keys[layer, :slots].flatten(0, 1)  # [S * Hkv, d, P]
        prompt_values = self.prompt_values[layer, :slots].flatten(0, 1)  # [S * Hkv, P, d]
        own_keys = own_keys[: len(of_row), :, : self._read]  # [S * Hkv * W, d, L]
        own_values = own_values[: len(of_row), : self._read]  # [S * Hkv * W, L, d]
        on_prompt = torch.baddbmm(self._mask, of_sample, prompt_keys, alpha=self.scale)  # [S * Hkv, W * G, P]
        on_own = torch.baddbmm(self._own_mask, of_row, own_keys, alpha=self.scale)  # [S * Hkv * W, G, L]
        seen = on_prompt.shape[-1]
        weights = torch.cat((on_prompt.view(len(of_row), group, seen), on_own), dim=-1).softmax(-1)
        of_prompt = torch.bmm(weights.view(*of_sample.shape[:2], -1)[:, :, :seen], prompt_values)
        attended = torch.baddbmm(of_prompt.view(of_row.shape), weights[:, :, seen:], own_values)
        return attended.view(-1, group * self.size).index_select(0, self._index).view(rows, -1, self.size)

    def _attend_natively(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty(q.shape, **self._options)
        torch.ops.srcfast.decode_attention(
            q,
            k,
            v,
            self.prompt_keys[layer],
            self.prompt_values[layer],
            self.own_keys[layer],
            self.own_values[layer],
            self.prompt_lengths,
            self._places,
            self._lengths,
            self.scale,
            out,
        )
        return out


def _rounded(count: int, step: int) -> int:
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
