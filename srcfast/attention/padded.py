"""The CPU's attention with gradients: groups of segments of similar length, padded, a chunk at a time.

Only the queries, keys and values are saved for backward; gathered copies and softmax weights, which are several times as
large, are recomputed. A chunk of a group fits into the processor's cache, so that this costs little.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 20  # of the scores that are alive at a time; one segment's under one head of keys may take more
GPU_CHUNK_BYTES = 1 << 28  # on a GPU, which runs this where FlashAttention has no kernel, as for fp32

Group = tuple[int, int, int, Tensor]  # segments, padded queries and keys of each, additive mask [segments, 1, q, k]
Plan = tuple[Tensor, Tensor, Tensor, list[Group]]  # rows into the padded queries, out of them, rows of the keys, groups
Chunk = tuple[slice, Tensor, Tensor, slice]  # padded queries, rows of the keys, mask [segments, 1, q, k], heads of keys


def padded_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, softcap: float | None = None) -> Tensor:
    """Compute softmax attention [M, H, d] of q [M, H, d] over k and v [T, Hkv, d] by a plan of `plan_blocks`.

    With a soft cap c scores s become c tanh(s / c).
    """
    return _PaddedAttention.apply(q, k, v, plan, softcap)


class _PaddedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, softcap: float | None) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.plan, ctx.softcap = plan, softcap
        into, out_of, _, _ = plan
        padded = q.new_empty(len(into), q.shape[1], q.shape[2])
        for queries, keys, mask, heads in _chunks(plan, q, k):
            query, key, value = _gathered(q, k, v, into[queries], keys, len(mask), heads)
            attended = torch.bmm(_weights(query, key, mask, softcap)[0], value)  # [segments heads, H / Hkv long, d]
            _write(_of_heads(padded[queries], heads, k), attended, len(mask), heads)
        return padded.index_select(0, out_of)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v = ctx.saved_tensors
        into, out_of, _, _ = ctx.plan
        padded = q.new_zeros(len(into), q.shape[1], q.shape[2])  # padding has no gradient
        padded.index_copy_(0, out_of, gradients[0])
        grad_q = torch.empty_like(padded)
        wide = torch.promote_types(q.dtype, torch.float32)  # 16-bit gradients are summed in fp32 and rounded once
        grad_k, grad_v = (x.new_zeros(len(x), x[0].numel(), dtype=wide) for x in (k, v))  # [T, Hkv d]
        for queries, keys, mask, heads in _chunks(ctx.plan, q, k):
            query, key, value = _gathered(q, k, v, into[queries], keys, len(mask), heads)
            weights, slope = _weights(query, key, mask, ctx.softcap)
            gradient = _by_head(_of_heads(padded[queries], heads, k), len(mask), heads)
            columns = slice(heads.start * k.shape[2], heads.stop * k.shape[2])
            _add_at(grad_v[:, columns], keys, torch.bmm(weights.transpose(1, 2), gradient), len(mask), heads)
            slopes = torch.bmm(gradient, value.transpose(1, 2))
            scores = torch._softmax_backward_data(slopes, weights, -1, weights.dtype)
            if slope is not None:
                scores *= slope
            _write(_of_heads(grad_q[queries], heads, k), torch.bmm(scores, key), len(mask), heads)
            _add_at(grad_k[:, columns], keys, torch.bmm(scores.transpose(1, 2), query), len(mask), heads)
        grad_q = grad_q.index_select(0, out_of).mul_(q.shape[-1] ** -0.5)
        return grad_q, grad_k.view_as(k).to(k.dtype), grad_v.view_as(v).to(v.dtype), None, None


def _chunks(plan: Plan, q: Tensor, k: Tensor) -> Iterator[Chunk]:
    """Split the groups into chunks of segments by `CHUNK_BYTES` of scores; where one segment has more, into some of its heads."""
    _, _, keys_of, groups = plan
    limit = CHUNK_BYTES if q.device.type == "cpu" else GPU_CHUNK_BYTES
    num_heads = k.shape[1]
    query = key = 0
    for rows, long, wide, mask in groups:
        # Bytes of a segment's scores under one head of keys.
        head_bytes = q.shape[1] // num_heads * long * wide * q.element_size()
        heads = min(num_heads, max(1, limit // head_bytes))
        max_segments = max(1, limit // (head_bytes * num_heads))
        for start in range(0, rows, max_segments):
            count = min(max_segments, rows - start)
            queries = slice(query + start * long, query + (start + count) * long)
            keys = keys_of[key + start * wide : key + (start + count) * wide]
            for first in range(0, num_heads, heads):
                yield queries, keys, mask[start : start + count], slice(first, min(first + heads, num_heads))
        query, key = query + rows * long, key + rows * wide


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, keys: Tensor, segments: int, heads: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Gather segments' queries, divided by sqrt(d), [segments heads, H / Hkv long, d], and their keys and values by head."""
    query = _by_head(_of_heads(q, heads, k).index_select(0, rows).mul_(q.shape[-1] ** -0.5), segments, heads)
    key, value = (_by_head(x[:, heads].index_select(0, keys), segments, heads) for x in (k, v))
    return query, key, value


def _of_heads(x: Tensor, heads: slice, k: Tensor) -> Tensor:
    """Select the queries [n, H, d] that belong to some heads of the keys [T, Hkv, d]."""
    group = x.shape[1] // k.shape[1]
    return x[:, heads.start * group : heads.stop * group]


def _by_head(x: Tensor, segments: int, heads: slice) -> Tensor:
    """Regroup [segments n, heads g, d] into [segments heads, g n, d], contiguous."""
    count = heads.stop - heads.start
    split = x.view(segments, -1, count, x.shape[1] // count, x.shape[2])
    return split.permute(0, 2, 3, 1, 4).reshape(segments * count, -1, x.shape[2])


def _write(target: Tensor, x: Tensor, segments: int, heads: slice) -> None:
    """Write the inverse of `_by_head` into `target` [segments n, heads g, d]."""
    count, size = heads.stop - heads.start, target.shape[2]
    split = x.view(segments, count, target.shape[1] // count, -1, size).permute(0, 3, 1, 2, 4)
    target.view(segments, -1, *split.shape[2:]).copy_(split)


def _add_at(total: Tensor, rows: Tensor, x: Tensor, segments: int, heads: slice) -> None:
    """Add x [segments heads, n, d] to total[rows], repeatedly for a row that occurs repeatedly. total: [T, heads d]."""
    flat = x.view(segments, heads.stop - heads.start, -1, x.shape[-1]).transpose(1, 2).reshape(len(rows), -1)
    total.index_add_(0, rows, flat.to(total.dtype))


def _weights(query: Tensor, key: Tensor, mask: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Compute softmax of scores [segments Hkv, H / Hkv long, wide] under a mask [segments, 1, long, wide].

    Returns the slope of the soft cap, too, None without one.
    """
    scores, slope = torch.bmm(query, key.transpose(1, 2)), None
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores, slope = capped * softcap, 1.0 - capped * capped
    segments, _, long, wide = mask.shape
    scores.view(segments, -1, long, wide).add_(mask)
    return torch.softmax(scores, -1), slope
