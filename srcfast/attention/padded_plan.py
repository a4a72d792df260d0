"""Plan padded groups of a forest's segments: index maps of queries and keys, and masks, for `padded_attention`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from srcfast.attention.options import CAUSAL, AttentionOptions
from srcfast.attention.padded import Plan
from srcfast.attention.query_blocks import QueryBlocks, query_blocks, similar_lengths
from srcfast.data.forest import Forest
from srcfast_kernels.transfers import to_device_together


def plan_blocks(
    forest: Forest,
    dtype: torch.dtype,
    device: torch.device,
    rows: Tensor | None = None,
    options: AttentionOptions = CAUSAL,
) -> Plan:
    """Plan padded groups: index maps of the queries into and out of them, of the keys into them, and the groups.

    A row is a segment, or the part of it that `rows` selects; its keys are its path from the root, or those that one of its
    queries sees. Both end at the row's last token (keys behind it, if a two-way range has some) and are padded in front, so that
    one causal mask serves all rows of a group. The work is the sum of segment times path: less than the square of the tree
    wherever it has children.
    """
    blocks, further, reach = query_blocks(forest, rows), None, None
    if options.window is not None or options.two_way:
        before, behind = (
            side if rows is None else side[rows.cpu().numpy()] for side in options.reach(forest.num_tokens)
        )
        blocks, further = _seen(blocks, before, behind)
        reach = (before, behind)
    kv_index = (forest.host or forest).kv_index.numpy()
    into: list[np.ndarray] = []
    keys_of: list[np.ndarray] = []
    of_rows: list[list[np.ndarray]] = []  # of each group, what its mask is made of
    sizes: list[tuple[int, int, int]] = []
    out_of = np.empty(blocks.lengths.sum(), dtype=np.int64)
    begin = 0
    for members in similar_lengths(blocks.lengths, blocks.paths):
        lengths, paths = blocks.lengths[members, None], blocks.paths[members, None]
        long, wide = int(lengths.max()), int(paths.max())
        from_end_q, from_end_k = np.arange(long)[::-1], np.arange(wide)[::-1]  # tokens that follow
        index = np.maximum(blocks.ends[members, None] - 1 - from_end_q, 0)  # [rows, long]
        valid = from_end_q < lengths  # the others are padding
        out_of[index[valid]] = begin + np.flatnonzero(valid)
        begin += index.size
        into.append(index.ravel())
        keys_of.append(kv_index[np.maximum(blocks.key_ends[members, None] - 1 - from_end_k, 0)].ravel())
        sizes.append((len(members), long, wide))
        of_rows.append([paths[:, 0]])
        if further is not None and reach is not None:
            of_rows[-1] += [further[members], *(side[index].ravel() for side in reach)]
    parts = [part for group in of_rows for part in group]
    whole = [np.concatenate(into), out_of, np.concatenate(keys_of), np.concatenate(parts)]
    rows_in, rows_out, key_rows, flat = to_device_together(whole, device)
    on_device = iter(flat.split([len(part) for part in parts]))
    groups = []
    for (count, long, wide), group in zip(sizes, of_rows, strict=True):
        paths, *others = [next(on_device) for _ in group]
        if others:
            mask = _range_mask(wide, paths, others[0], *(side.view(count, long) for side in others[1:]), dtype=dtype)
        else:
            mask = _block_mask(long, wide, paths, dtype)
        groups.append((count, long, wide, mask))
    return rows_in, rows_out, key_rows, groups


def _seen(blocks: QueryBlocks, before: np.ndarray, behind: np.ndarray) -> tuple[QueryBlocks, np.ndarray]:
    """Reduce blocks to the keys that one of their queries sees; return how many keys [B] are behind the last query, too.

    Args:
        before, behind: of each query of attention, how far on its path it sees.
    """
    starts = blocks.ends - blocks.lengths  # [B]
    from_end = (
        np.repeat(blocks.ends, blocks.lengths) - 1 - np.arange(len(before))
    )  # [M] queries that follow in the block
    further = np.maximum(np.maximum.reduceat(behind - from_end, starts), 0)
    longest = np.maximum.reduceat(before + from_end, starts) + 1 + further
    paths = np.minimum(blocks.paths + further, longest)
    return replace(blocks, key_ends=blocks.key_ends + further, paths=paths), further


def _block_mask(long: int, wide: int, paths: Tensor, dtype: torch.dtype) -> Tensor:
    """Build a group's additive mask [rows, 1, long, wide] on the device of `paths` [rows]: masks are too large to copy there."""
    from_end_q, from_end_k = (torch.arange(size - 1, -1, -1, device=paths.device) for size in (long, wide))
    hidden = from_end_k < from_end_q[:, None]  # [long, wide]
    return _additive(hidden | (from_end_k >= paths[:, None])[:, None], dtype)


def _range_mask(
    wide: int, paths: Tensor, further: Tensor, before: Tensor, behind: Tensor, *, dtype: torch.dtype
) -> Tensor:
    """Build a group's additive mask [rows, 1, long, wide] of queries that see ranges of keys.

    Args:
        paths: [rows] keys of each row.
        further: [rows] keys behind the last query.
        before, behind: [rows, long] how far each query sees.
    """
    from_end_q, from_end_k = (torch.arange(size - 1, -1, -1, device=paths.device) for size in (before.shape[1], wide))
    # [rows, long, wide]: how far a key is behind the query
    distance = (further[:, None] + from_end_q)[:, :, None] - from_end_k
    hidden = (distance > behind[:, :, None]) | (distance < -before[:, :, None])
    return _additive(hidden | (from_end_k >= paths[:, None])[:, None], dtype)


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Build the mask [rows, 1, long, wide] of bool [rows, long, wide]."""
    # Half of the smallest number: finite, so that no row of scores is all minus infinity.
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min / 2)[:, None]
