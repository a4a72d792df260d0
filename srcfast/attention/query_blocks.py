"""Blocks of a forest's queries, each within one segment, and the keys that they see.

They are blocks of all queries, one for each segment, or of some rows alone: a last layer need not compute the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from srcfast.data.forest import Forest

# Blocks are padded together if both their lengths differ by about this ratio at most.
GROUP_RATIO = 1.3
GROUP_OFFSET = 8  # tokens, added to lengths: short blocks may differ by a larger ratio


@dataclass(frozen=True)
class QueryBlocks:
    """`B` blocks of queries that follow each other within a segment; every array is [B] int64 on the host.

    Block b has the queries `ends[b] - lengths[b] : ends[b]` of those that attention gets. They see the keys
    `kv_index[key_ends[b] - paths[b] : key_ends[b]]`, causally and aligned at the end; the last `in_segment[b]` of these are in
    the block's segment, the others are the parent's path. `parents[b]` is that path's last row, -1 for a root.
    """

    ends: np.ndarray
    lengths: np.ndarray
    key_ends: np.ndarray
    paths: np.ndarray
    in_segment: np.ndarray
    parents: np.ndarray


def query_blocks(forest: Forest, rows: Tensor | None = None) -> QueryBlocks:
    """Find the blocks of all rows, or of `rows` [M] int64 (M >= 1) alone, in the order of `rows`."""
    host = forest.host or forest
    bounds_q, bounds_k = (x.numpy().astype(np.int64) for x in (host.cu_seqlens_q, host.cu_seqlens_k))
    segment_parents = host.predictor.numpy()[bounds_q[:-1]]  # [S]
    lengths, paths = np.diff(bounds_q), np.diff(bounds_k)
    if rows is None:
        return QueryBlocks(bounds_q[1:], lengths, bounds_k[1:], paths, lengths, segment_parents)
    selected = rows.cpu().numpy()
    segments = np.searchsorted(bounds_q, selected, side="right") - 1  # [M]
    breaks = np.flatnonzero((np.diff(selected) != 1) | (np.diff(segments) != 0))
    ends = np.append(breaks + 1, len(selected))  # [B]
    segments = segments[ends - 1]
    behind = bounds_q[segments + 1] - 1 - selected[ends - 1]  # tokens of the segment behind a block's last query
    return QueryBlocks(
        ends=ends,
        lengths=np.diff(ends, prepend=0),
        key_ends=bounds_k[segments + 1] - behind,
        paths=paths[segments] - behind,
        in_segment=lengths[segments] - behind,
        parents=segment_parents[segments],
    )


def similar_lengths(lengths: np.ndarray, paths: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the members of groups in which both lengths [B] are similar: a compromise between padding and number of groups."""
    steps = np.floor(np.log(np.stack([paths, lengths]) + GROUP_OFFSET) / np.log(GROUP_RATIO))  # [2, B]
    order = np.lexsort(steps)
    cuts = np.flatnonzero(np.any(np.diff(steps[:, order], axis=1) != 0, axis=0)) + 1
    yield from np.split(order, cuts)


def concatenated_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate the ranges start, start + 1, ..., start + length - 1."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
