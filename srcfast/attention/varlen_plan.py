"""Plan a forest as one variable-length call: its blocks of queries, and the keys that have to be copied for them.

A segment that follows its parent directly continues its parent's block, and its first child may continue both: such
a chain sees its first segment's ancestors and, causally, itself, exactly as one long segment would. So a block is a
chain, its keys are the path of its last segment, and only chains that begin below a branch need copies of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from srcfast.attention.query_blocks import concatenated_ranges, query_blocks
from srcfast.data.forest import Forest
from srcfast_kernels.gather_rows import RowCopies, gather_rows
from srcfast_kernels.transfers import to_device_together


@dataclass(frozen=True)
class VarlenPlan:
    """`B` blocks: block b has the queries `cu_seqlens_q[b]:cu_seqlens_q[b + 1]` and the keys
    `copies.index[cu_seqlens_k[b]:cu_seqlens_k[b + 1]]`, or, without copies, those of the same rows.

    Both are [B + 1] int32, and two tensors even where they are equal: given one object, cuDNN's path in PyTorch may align
    causality top-left. `lengths_q` and `lengths_k` are the blocks' numbers of queries and keys, [B].
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    lengths_q: np.ndarray
    lengths_k: np.ndarray
    max_seqlen_q: int
    max_seqlen_k: int
    copies: RowCopies | None

    def gather(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Gather keys and values [T, Hkv, d] in the order of the blocks, [K, Hkv, d]."""
        return (k, v) if self.copies is None else gather_rows(k, v, self.copies)


def varlen_plan(forest: Forest, rows: Tensor | None = None) -> VarlenPlan:
    """Return the forest's plan, built on the host and copied to its device once; or one for the queries of `rows` [M]."""
    if rows is not None:
        return _plan_of_rows(forest, rows)
    if "varlen" not in forest.cache:
        forest.cache["varlen"] = _plan(forest.host or forest, forest.token_ids.device)
    return forest.cache["varlen"]


def _plan(host: Forest, device: torch.device) -> VarlenPlan:
    bounds_q, paths = host.cu_seqlens_q.numpy(), host.cu_seqlens_k.diff().numpy()
    starts = bounds_q[1:-1]  # of all segments but the first
    continues = host.predictor.numpy()[starts] == starts - 1  # the row before is the parent's last
    ends = np.append(~continues, True)  # [S] whether a chain ends with this segment
    cu_seqlens_q = np.append(0, bounds_q[1:][ends]).astype(np.int32)  # [B + 1]
    cu_seqlens_k = np.append(0, paths[ends].cumsum()).astype(np.int32)  # [B + 1]
    copies = None
    if cu_seqlens_k[-1] > host.num_tokens:  # else the blocks' keys are all rows, once and in order
        index = host.kv_index.numpy()[np.repeat(ends, paths)]  # [K]
        copies = RowCopies.of(torch.from_numpy(index), host.num_tokens)
    return _on_device(cu_seqlens_q, cu_seqlens_k, copies, device)


def _plan_of_rows(forest: Forest, rows: Tensor) -> VarlenPlan:
    blocks = query_blocks(forest, rows)
    host = forest.host or forest
    index = host.kv_index.numpy()[concatenated_ranges(blocks.key_ends - blocks.paths, blocks.paths)]  # [K]
    cu_seqlens_q = np.append(0, blocks.lengths.cumsum()).astype(np.int32)
    cu_seqlens_k = np.append(0, blocks.paths.cumsum()).astype(np.int32)
    copies = RowCopies.of(torch.from_numpy(index), host.num_tokens)
    return _on_device(cu_seqlens_q, cu_seqlens_k, copies, forest.token_ids.device)


def _on_device(
    cu_seqlens_q: np.ndarray, cu_seqlens_k: np.ndarray, copies: RowCopies | None, device: torch.device
) -> VarlenPlan:
    lists = [] if copies is None else [copies.index, copies.starts, copies.places]
    device_q, device_k, *device_copies = to_device_together([cu_seqlens_q, cu_seqlens_k, *lists], device)
    lengths_q, lengths_k = np.diff(cu_seqlens_q), np.diff(cu_seqlens_k)
    return VarlenPlan(
        cu_seqlens_q=device_q,
        cu_seqlens_k=device_k,
        lengths_q=lengths_q,
        lengths_k=lengths_k,
        max_seqlen_q=int(lengths_q.max()),
        max_seqlen_k=int(lengths_k.max()),
        copies=RowCopies(*device_copies) if device_copies else None,
    )
