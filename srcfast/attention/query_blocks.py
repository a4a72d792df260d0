"""The queries of a forest in blocks, each within one segment: what every block's queries are and which keys they see.

All of a forest's queries (one block a segment), or those of some rows alone: a last layer need not compute the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from srcfast.data.forest import Forest

# Blocks share a padded group where both their lengths are about within this ratio.
GROUP_RATIO = 1.3
GROUP_OFFSET = 8  # tokens: short blocks share a group more readily


@dataclass(frozen=True)
class QueryBlocks:
    """`B` blocks of queries that follow each other within a segment; every array is [B] int64 on the host.

    Block b has the queries `ends[b] - lengths[b] : ends[b]` among those that attention is given. They see the keys
    `kv_index[key_ends[b] - paths[b] : key_ends[b]]`, causally and aligned at the end; the last `own[b]` of these are of
    their own segment, the others its parent's path. `parents[b]` is that path's last row, -1 below nothing.
    """

    ends: np.ndarray
    lengths: np.ndarray
    key_ends: np.ndarray
    paths: np.ndarray
    own: np.ndarray
    parents: np.ndarray


def query_blocks(forest: Forest, rows: Tensor | None = None) -> QueryBlocks:
    """Blocks of all rows, or of `rows` [M] int64 alone, in the order of `rows`, at least one."""
    host = forest.host or forest
    bounds_q, bounds_k = (x.numpy().astype(np.int64) for x in (host.cu_seqlens_q, host.cu_seqlens_k))
    segment_parents = host.predictor.numpy()[bounds_q[:-1]]  # [S]
    lengths, paths = np.diff(bounds_q), np.diff(bounds_k)
    if rows is None:
        return QueryBlocks(bounds_q[1:], lengths, bounds_k[1:], paths, lengths, segment_parents)
    at = rows.cpu().numpy()
    segments = np.searchsorted(bounds_q, at, side="right") - 1  # [M]
    breaks = np.flatnonzero((np.diff(at) != 1) | (np.diff(segments) != 0))
    ends = np.append(breaks + 1, len(at))  # [B]
    segments = segments[ends - 1]
    behind = bounds_q[segments + 1] - 1 - at[ends - 1]  # tokens of the segment behind a block's last query
    return QueryBlocks(
        ends=ends,
        lengths=np.diff(ends, prepend=0),
        key_ends=bounds_k[segments + 1] - behind,
        paths=paths[segments] - behind,
        own=lengths[segments] - behind,
        parents=segment_parents[segments],
    )


def like_lengths(lengths: np.ndarray, others: np.ndarray) -> Iterator[np.ndarray]:
    """Members of the groups in which both lengths [B] are alike: more padding and more groups both cost more."""
    steps = np.floor(np.log(np.stack([others, lengths]) + GROUP_OFFSET) / np.log(GROUP_RATIO))  # [2, B]
    order = np.lexsort(steps)
    cuts = np.flatnonzero(np.any(np.diff(steps[:, order], axis=1) != 0, axis=0)) + 1
    yield from np.split(order, cuts)


def behind_one_another(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The ranges start, start + 1, ..., start + length - 1, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
