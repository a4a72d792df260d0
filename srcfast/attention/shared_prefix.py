"""Forest attention on a CPU without gradients: what siblings share is met by all of their queries at once.

A query's keys are its parent's path and its own segment up to itself. The first part is the same for all children of one
parent, so they are one block of queries against one copy of the path; the second is a causal square. Each part gives its
softmax's weighted values and log-sum-exp, from which both together follow:

    out = own + sigmoid(lse_path - lse_own) (path - own)

Scores are never kept: both parts run through PyTorch's flash attention for CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from srcfast.attention.query_blocks import QueryBlocks, behind_one_another, like_lengths, query_blocks
from srcfast.data.forest import Forest


@dataclass(frozen=True)
class Padded:
    """Groups of blocks padded to like lengths: index maps of the queries into the groups and out of them, of the keys into them.

    `groups` has of each (blocks, padded queries, padded keys, additive mask [blocks, 1, 1 or queries, keys]); without
    a mask it is causal.
    """

    into: Tensor
    out_of: Tensor
    keys: Tensor
    groups: list[tuple[int, int, int, Tensor | None]]


@dataclass(frozen=True)
class SharedPlan:
    """Both parts, and the queries [n] that have a path above their segment."""

    own: Padded
    path: Padded | None
    below: Tensor


def shared_attention(q: Tensor, k: Tensor, v: Tensor, forest: Forest, rows: Tensor | None = None) -> Tensor:
    """`forest_attention` in fp32 or fp64, for q [M, H, d] of `rows` or of all: [M, H, d] without a gradient."""
    key = ("shared", q.dtype)
    plan = forest.cache.get(key) if rows is None else None
    if plan is None:
        plan = _plan(forest, rows, q.dtype)
    if rows is None:
        forest.cache[key] = plan
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    output, own_lse = _attend(q, k, v, plan.own)
    if plan.path is not None:
        shared, lse = _attend(q, k, v, plan.path)  # [n, H, d], [n, H]
        own = output.index_select(0, plan.below)
        share = (lse - own_lse.index_select(0, plan.below)).sigmoid_()[..., None]
        output.index_copy_(0, plan.below, own.lerp_(shared, share.expand_as(own)))
    return output


def _attend(q: Tensor, k: Tensor, v: Tensor, padded: Padded) -> tuple[Tensor, Tensor]:
    """Weighted values [n, H, d] and log-sum-exp [n, H] of the queries in `padded`, in its order."""
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
    own = _own_part(blocks, kv_index, dtype)
    children = np.flatnonzero(blocks.parents >= 0)
    if not len(children):
        return SharedPlan(own, None, torch.zeros(0, dtype=torch.int64))
    path, below = _path_part(blocks, children, kv_index, dtype)
    return SharedPlan(own, path, torch.from_numpy(below))


def _own_part(blocks: QueryBlocks, kv_index: np.ndarray, dtype: torch.dtype) -> Padded:
    """Every block against its own segment. Whole segments are causal squares, padded behind, where only padding sees it."""
    queries, keys = _Queries(int(blocks.lengths.sum())), []
    groups: list[tuple[int, int, int, Tensor | None]] = []
    for members in like_lengths(blocks.lengths, blocks.own):
        lengths, own, ends = blocks.lengths[members], blocks.own[members], blocks.key_ends[members]
        long, wide = int(lengths.max()), int(own.max())
        square = bool((lengths == own).all())
        offsets = np.arange(long) if square else np.arange(long) - long + lengths[:, None]  # [members, long]
        queries.add((blocks.ends[members] - lengths)[:, None], offsets, lengths[:, None])
        places = np.arange(wide) if square else np.arange(wide) - wide + own[:, None]  # [members, wide]
        keys.append(kv_index[(ends - own)[:, None] + places.clip(0, own[:, None] - 1)].ravel())
        mask = None
        if not square:  # both end with the last query, padded in front
            behind, before = np.arange(wide)[::-1], np.arange(long)[::-1]
            mask = _additive((behind < before[:, None]) | (places < 0)[:, None], dtype)  # [members, 1, long, wide]
        groups.append((len(members), long, wide, mask))
    return queries.padded(keys, groups)


def _path_part(
    blocks: QueryBlocks, children: np.ndarray, kv_index: np.ndarray, dtype: torch.dtype
) -> tuple[Padded, np.ndarray]:
    """All children of a parent together against its path: the groups, and the queries [n] whose results come out of them."""
    families, family = np.unique(blocks.parents[children], return_inverse=True)
    order = np.argsort(family, kind="stable")
    children = children[order]  # family by family
    lengths = blocks.lengths[children]
    rows = behind_one_another(blocks.ends[children] - lengths, lengths)  # [n] queries, family by family
    counts = np.bincount(family[order], weights=lengths, minlength=len(families)).astype(np.int64)
    starts = np.cumsum(counts) - counts
    eldest = children[np.searchsorted(family[order], np.arange(len(families)))]
    wides = (blocks.paths - blocks.own)[eldest]
    first_keys = (blocks.key_ends - blocks.paths)[eldest]
    queries, keys = _Queries(len(rows)), []
    groups: list[tuple[int, int, int, Tensor | None]] = []
    for members in like_lengths(counts, wides):
        own, long, wide = wides[members, None], int(counts[members].max()), int(wides[members].max())
        queries.add(starts[members, None], np.arange(long), counts[members, None])
        keys.append(kv_index[first_keys[members, None] + np.arange(wide).clip(max=own - 1)].ravel())
        mask = _additive((np.arange(wide) >= own)[:, None], dtype)  # [members, 1, 1, wide]
        groups.append((len(members), long, wide, mask))
    return queries.padded(keys, groups, rows), rows


class _Queries:
    """Collects the index maps of padded queries."""

    def __init__(self, count: int) -> None:
        self.into: list[np.ndarray] = []
        self.out_of = np.empty(count, dtype=np.int64)
        self.places = 0

    def add(self, starts: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> None:
        """Queries `starts + offsets`, [members, long] by broadcasting; offsets outside of 0 ... lengths - 1 are padding."""
        index = (starts + offsets.clip(0, lengths - 1)).ravel()
        real = np.flatnonzero(np.broadcast_to((offsets >= 0) & (offsets < lengths), (len(starts), offsets.shape[-1])))
        self.out_of[index[real]] = self.places + real
        self.into.append(index)
        self.places += index.size

    def padded(
        self, keys: list[np.ndarray], groups: list[tuple[int, int, int, Tensor | None]], rows: np.ndarray | None = None
    ) -> Padded:
        """`rows`: which queries the collected indices stand for, where they aren't the queries themselves."""
        into = np.concatenate(self.into)
        into = into if rows is None else rows[into]
        maps = [torch.from_numpy(index) for index in (into, self.out_of, np.concatenate(keys))]
        return Padded(maps[0], maps[1], maps[2], groups)


def _additive(hidden: np.ndarray, dtype: torch.dtype) -> Tensor:
    """An additive mask [blocks, 1, queries, keys] of bool [blocks, queries, keys]; finite, so that padding has no NaN."""
    mask = torch.zeros(hidden.shape, dtype=dtype)
    return mask.masked_fill_(torch.from_numpy(hidden), torch.finfo(dtype).min / 2)[:, None]
