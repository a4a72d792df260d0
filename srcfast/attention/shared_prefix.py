"""Forest attention on a CPU without gradients: siblings' queries attend to their shared path at once.

A query's keys are its parent's path and its own segment up to itself. The first part is the same for all children of one
parent, so they are one block of queries against one copy of the path; the second is a causal square. Each part gives its
softmax's weighted values and log-sum-exp, which combine to:

    out = segment + sigmoid(lse_path - lse_segment) (path - segment)

Scores are never stored: both parts run through PyTorch's flash attention for CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from srcfast.attention.query_blocks import QueryBlocks, concatenated_ranges, query_blocks, similar_lengths
from srcfast.data.forest import Forest


@dataclass(frozen=True)
class Padded:
    """Groups of blocks padded to similar lengths, and index maps: queries into the groups, out of them, keys into them.

    Each of `groups` is (blocks, padded queries, padded keys, additive mask [blocks, 1, 1 or queries, keys]); without
    a mask it is causal.
    """

    into: Tensor
    out_of: Tensor
    keys: Tensor
    groups: list[tuple[int, int, int, Tensor | None]]


@dataclass(frozen=True)
class SharedPlan:
    """Both parts, and the queries [n] that have a path above their segment."""

    segment: Padded
    path: Padded | None
    below: Tensor


def shared_attention(q: Tensor, k: Tensor, v: Tensor, forest: Forest, rows: Tensor | None = None) -> Tensor:
    """Compute `forest_attention` in fp32 or fp64 without a gradient, for q [M, H, d] of `rows` or of all rows: [M, H, d]."""
    key = ("shared", q.dtype)
    plan = forest.cache.get(key) if rows is None else None
    if plan is None:
        plan = _plan(forest, rows, q.dtype)
    if rows is None:
        forest.cache[key] = plan
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    output, segment_lse = _attend(q, k, v, plan.segment)
    if plan.path is not None:
        on_path, path_lse = _attend(q, k, v, plan.path)  # [n, H, d], [n, H]
        on_segment = output.index_select(0, plan.below)
        weight = (path_lse - segment_lse.index_select(0, plan.below)).sigmoid_()[..., None]  # of the path
        output.index_copy_(0, plan.below, on_segment.lerp_(on_path, weight.expand_as(on_segment)))
    return output


def _attend(q: Tensor, k: Tensor, v: Tensor, padded: Padded) -> tuple[Tensor, Tensor]:
    """Compute weighted values [n, H, d] and log-sum-exp [n, H] of the queries in `padded`, in its order."""
    queries = q.index_select(0, padded.into).split([blocks * long for blocks, long, _, _ in padded.groups])
    sizes = [blocks * wide for blocks, _, wide, _ in padded.groups]
    keys, values = (x.index_select(0, padded.keys).split(sizes) for x in (k, v))
    outputs, sums = [], []
    for (blocks, long, wide, mask), query, key, value in zip(padded.groups, queries, keys, values, strict=True):
        attended, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query.view(blocks, long, *q.shape[1:]).transpose(1, 2),
            key.view(blocks, wide, *k.shape[1:]).transpose(1, 2),
            value.view(blocks, wide, *v.shape[1:]).transpose(1, 2),
            is_causal=mask is None,
            attn_mask=mask,
        )  # [blocks, H, long, d], [blocks, H, long]
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
        sums.append(lse.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, padded.out_of), torch.cat(sums).index_select(0, padded.out_of)


def _plan(forest: Forest, rows: Tensor | None, dtype: torch.dtype) -> SharedPlan:
    blocks = query_blocks(forest, rows)
    kv_index = (forest.host or forest).kv_index.numpy()
    segment = _segment_part(blocks, kv_index, dtype)
    children = np.flatnonzero(blocks.parents >= 0)
    if not len(children):
        return SharedPlan(segment, None, torch.zeros(0, dtype=torch.int64))
    path, below = _path_part(blocks, children, kv_index, dtype)
    return SharedPlan(segment, path, torch.from_numpy(below))


def _segment_part(blocks: QueryBlocks, kv_index: np.ndarray, dtype: torch.dtype) -> Padded:
    """Plan each block against its segment. Whole segments are causal squares, padded at the end, where only padding sees it."""
    queries, keys = _Queries(int(blocks.lengths.sum())), []
    groups: list[tuple[int, int, int, Tensor | None]] = []
    for members in similar_lengths(blocks.lengths, blocks.in_segment):
        lengths, widths = blocks.lengths[members], blocks.in_segment[members]
        ends = blocks.key_ends[members]
        long, wide = int(lengths.max()), int(widths.max())
        square = bool((lengths == widths).all())
        offsets = np.arange(long) if square else np.arange(long) - long + lengths[:, None]  # [members, long]
        queries.add((blocks.ends[members] - lengths)[:, None], offsets, lengths[:, None])
        positions = np.arange(wide) if square else np.arange(wide) - wide + widths[:, None]  # [members, wide]
        keys.append(kv_index[(ends - widths)[:, None] + positions.clip(0, widths[:, None] - 1)].ravel())
        mask = None
        if not square:  # both end with the last query, padded in front
            behind, before = np.arange(wide)[::-1], np.arange(long)[::-1]
            mask = _additive((behind < before[:, None]) | (positions < 0)[:, None], dtype)  # [members, 1, long, wide]
        groups.append((len(members), long, wide, mask))
    return queries.padded(keys, groups)


def _path_part(
    blocks: QueryBlocks, children: np.ndarray, kv_index: np.ndarray, dtype: torch.dtype
) -> tuple[Padded, np.ndarray]:
    """Plan all children of a parent together against its path; return the groups and the queries [n] of their results."""
    families, family = np.unique(blocks.parents[children], return_inverse=True)
    order = np.argsort(family, kind="stable")
    children = children[order]  # family by family
    lengths = blocks.lengths[children]
    rows = concatenated_ranges(blocks.ends[children] - lengths, lengths)  # [n] queries, family by family
    counts = np.bincount(family[order], weights=lengths, minlength=len(families)).astype(np.int64)
    starts = np.cumsum(counts) - counts
    eldest = children[np.searchsorted(family[order], np.arange(len(families)))]
    widths = (blocks.paths - blocks.in_segment)[eldest]
    first_keys = (blocks.key_ends - blocks.paths)[eldest]
    queries, keys = _Queries(len(rows)), []
    groups: list[tuple[int, int, int, Tensor | None]] = []
    for members in similar_lengths(counts, widths):
        group_widths = widths[members, None]
        long, wide = int(counts[members].max()), int(group_widths.max())
        queries.add(starts[members, None], np.arange(long), counts[members, None])
        keys.append(kv_index[first_keys[members, None] + np.arange(wide).clip(max=group_widths - 1)].ravel())
        mask = _additive((np.arange(wide) >= group_widths)[:, None], dtype)  # [members, 1, 1, wide]
        groups.append((len(members), long, wide, mask))
    return queries.padded(keys, groups, rows), rows


class _Queries:
    """Collects the index maps of padded queries."""

    def __init__(self, count: int) -> None:
        self.into: list[np.ndarray] = []
        self.out_of = np.empty(count, dtype=np.int64)
        self.count = 0  # padded queries so far

    def add(self, starts: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> None:
        """Add queries `starts + offsets`, [members, long] by broadcasting; offsets outside of 0 ... lengths - 1 are padding."""
        index = (starts + offsets.clip(0, lengths - 1)).ravel()
        valid = np.flatnonzero(np.broadcast_to((offsets >= 0) & (offsets < lengths), (len(starts), offsets.shape[-1])))
        self.out_of[index[valid]] = self.count + valid
        self.into.append(index)
        self.count += index.size

    def padded(
        self, keys: list[np.ndarray], groups: list[tuple[int, int, int, Tensor | None]], rows: np.ndarray | None = None
    ) -> Padded:
        """Return the maps; `rows` are the queries to which the collected indices refer, where these aren't the queries'."""
        into = np.concatenate(self.into)
        into = into if rows is None else rows[into]
        maps = [torch.from_numpy(index) for index in (into, self.out_of, np.concatenate(keys))]
        return Padded(maps[0], maps[1], maps[2], groups)


def _additive(hidden: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Build an additive mask [blocks, 1, queries, keys] of bool [blocks, queries, keys]; finite, so that padding gives no NaN."""
    mask = torch.zeros(hidden.shape, dtype=dtype)
    return mask.masked_fill_(torch.from_numpy(hidden), torch.finfo(dtype).min / 2)[:, None]
