"""Attention over a packed prefix forest, behind one function.

Backends:
    flash_attn, torch_varlen, xformers   CUDA: one variable-length call, keys gathered through `kv_index`
    blocks                               the CPU's default: trees of like length padded together, masked
    varlen_reference                     the variable-length definition, segment by segment, plain PyTorch
    reference                            softmax under the dense ancestor mask over all T tokens

All give what every root-to-leaf path alone would give.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from srcfast.data.forest import Forest
from srcfast.errors import ConfigError

# (layer, q [T, H, d], k [T, Hkv, d], v [T, Hkv, d]) -> [T, H, d]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

# Trees share a padded group while the longest is within this ratio of the shortest: measured on 60 to 250
# tokens, more padding and more calls both cost more.
GROUP_RATIO = 1.125

_forced: str | None = None


def set_backend(name: str | None) -> None:
    """Force a backend for every later call; None returns to the automatic choice.

    Raises:
        ConfigError: the name is unknown, or what it needs is not here.
    """
    global _forced
    if name is not None and name not in _BACKENDS:
        raise ConfigError(f"attention backend {name!r} is unknown; known: {', '.join(_BACKENDS)}")
    if name is not None and name not in available_backends():
        raise ConfigError(f"attention backend {name!r} is not available here; available: {available_backends()}")
    _forced = name


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine, the preferred one first."""
    cuda = torch.cuda.is_available()
    live = {
        "flash_attn": cuda and importlib.util.find_spec("flash_attn") is not None,
        "torch_varlen": cuda and importlib.util.find_spec("torch.nn.attention.varlen") is not None,
        "xformers": cuda and importlib.util.find_spec("xformers") is not None,
    }
    return [name for name in _BACKENDS if live.get(name, True)]


def forest_attention(q: Tensor, k: Tensor, v: Tensor, forest: Forest, backend: str | None = None) -> Tensor:
    """Causal softmax attention in which each segment sees its ancestors and itself; scale 1/sqrt(d).

    Args:
        q: `[T, H, d]`.
        k, v: `[T, Hkv, d]`; H is a multiple of Hkv (grouped-query attention).
        forest: whose T tokens these are.
        backend: one of the module's backends; None for the automatic choice.

    Returns:
        `[T, H, d]`.
    """
    name = backend or _forced or _automatic(q)
    if name not in _BACKENDS:
        raise ConfigError(f"attention backend {name!r} is unknown; known: {', '.join(_BACKENDS)}")
    return _BACKENDS[name](q, k, v, forest)


def forest_attend(forest: Forest, backend: str | None = None) -> Attend:
    """`forest_attention` bound to a forest, in the form that the decoder calls for each layer."""
    return lambda layer, q, k, v: forest_attention(q, k, v, forest, backend)


def _automatic(q: Tensor) -> str:
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return "blocks"  # the CUDA kernels take half precision only
    return available_backends()[0]


# The CPU's way: padded groups of trees ----------------------------------------------------------------------


class _Permute(torch.autograd.Function):
    """`x[index]` where `inverse` undoes it, so that backward is a gather too instead of a scattered sum.

    Rows of padding are gathered from anywhere; their gradients are not looked at, which is right because
    padding attends to itself alone and no token attends to padding.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, ctx.inverse), None, None


def _blocks(q: Tensor, k: Tensor, v: Tensor, forest: Forest) -> Tensor:
    if q.dtype == torch.bfloat16 and not q.is_cuda:  # the CPU's bf16 backward takes four times fp32's time
        return _blocks(q.float(), k.float(), v.float(), forest).to(torch.bfloat16)
    key = ("blocks", q.dtype, q.device)
    if key not in forest.cache:
        forest.cache[key] = _plan_blocks(forest, q.dtype, q.device)
    into, out_of, shapes, masks = forest.cache[key]
    sizes = [trees * length for trees, length in shapes]
    padded = [_Permute.apply(x, into, out_of).split(sizes) for x in (q, k, v)]
    outputs = []
    for (trees, length), mask, *parts in zip(shapes, masks, *padded, strict=True):
        query, keys, values = (x.view(trees, length, -1, x.shape[-1]).transpose(1, 2) for x in parts)
        attended = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
        )  # [trees, H, length, d]
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return _Permute.apply(torch.cat(outputs), out_of, into)


def _plan_blocks(
    forest: Forest, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, list[tuple[int, int]], list[Tensor]]:
    """Index maps into and out of the padded groups, each group's (trees, length), and additive masks `[trees,
    1, n, n]`.

    Within its padded row a tree lies in depth-first order. Then token i sees token j exactly when j <= i <
    end of j's segment's subtree, which is two comparisons.
    """
    orders, ends = zip(
        *(_depth_first(tree, forest.segment_start[i]) for i, tree in enumerate(forest.trees)), strict=True
    )
    lengths = np.array([order.size for order in orders])
    by_length = np.argsort(lengths, kind="stable")
    groups: list[list[int]] = []
    for tree in by_length.tolist():
        if not groups or lengths[tree] > max(lengths[groups[-1][0]] * GROUP_RATIO, lengths[groups[-1][0]] + 4):
            groups.append([])
        groups[-1].append(tree)

    into, shapes, masks = [], [], []
    out_of = np.empty(forest.num_tokens, dtype=np.int64)
    begin = 0
    for members in groups:
        longest = int(lengths[members[-1]])
        column = np.arange(longest)
        index = np.zeros((len(members), longest), dtype=np.int64)
        end = np.tile(column + 1, (len(members), 1))  # padding: seen by itself alone
        for row, tree in enumerate(members):
            index[row, : lengths[tree]] = orders[tree]
            end[row, : lengths[tree]] = ends[tree]
            out_of[orders[tree]] = begin + row * longest + column[: lengths[tree]]
        begin += index.size
        into.append(index.ravel())
        shapes.append(index.shape)
        columns = torch.from_numpy(column).to(device)
        seen = torch.from_numpy(end).to(device)[:, None, :] > columns[:, None]  # [trees, query, key]
        hidden = ~(seen & (columns <= columns[:, None]))
        # Half of the least number: finite, so that no row of scores is all minus infinity within one of the
        # kernel's tiles.
        masks.append(
            torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min / 2)[
                :, None
            ]
        )
    return (
        torch.from_numpy(np.concatenate(into)).to(device),
        torch.from_numpy(out_of).to(device),
        shapes,
        masks,
    )


def _depth_first(tree: Any, starts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The tree's rows in depth-first order, and for each where, in that order, its segment's subtree ends."""
    sizes = [segment.tokens.size for segment in tree.segments]
    totals = list(sizes)  # tokens of each segment's subtree
    for i in range(len(sizes) - 1, 0, -1):
        totals[tree.segments[i].parent] += totals[i]
    place = [0] * len(sizes)  # where each segment begins
    fill = [0] * len(sizes)  # where its next child begins
    for i, segment in enumerate(tree.segments):
        if i > 0:
            place[i] = fill[segment.parent]
            fill[segment.parent] += totals[i]
        fill[i] = place[i] + sizes[i]
    order = np.empty(totals[0], dtype=np.int64)
    end = np.empty(totals[0], dtype=np.int64)
    for i, size in enumerate(sizes):
        order[place[i] : place[i] + size] = np.arange(starts[i], starts[i] + size)
        end[place[i] : place[i] + size] = place[i] + totals[i]
    return order, end


# One variable-length call -----------------------------------------------------------------------------------


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, forest: Forest) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    keys, values = k.index_select(0, forest.kv_index), v.index_select(0, forest.kv_index)  # [K, Hkv, d]
    return flash_attn_varlen_func(
        q,
        keys,
        values,
        forest.cu_seqlens_q,
        forest.cu_seqlens_k,
        forest.max_seqlen_q,
        forest.max_seqlen_k,
        causal=True,
    )


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, forest: Forest) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    keys, values = k.index_select(0, forest.kv_index), v.index_select(0, forest.kv_index)  # [K, Hkv, d]
    # The two cu_seqlens must stay separate tensors: given one object, the cuDNN path may align causality
    # top-left.
    output = varlen_attn(
        q,
        keys,
        values,
        forest.cu_seqlens_q,
        forest.cu_seqlens_k,
        forest.max_seqlen_q,
        forest.max_seqlen_k,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(output, Tensor)  # a tuple only where auxiliary outputs are asked for
    return output


def _xformers(q: Tensor, k: Tensor, v: Tensor, forest: Forest) -> Tensor:
    from xformers.ops import fmha, memory_efficient_attention

    if "xformers" not in forest.cache:
        forest.cache["xformers"] = fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
            forest.cu_seqlens_q.diff().tolist(), forest.cu_seqlens_k.diff().tolist()
        )
    repeats = q.shape[1] // k.shape[1]
    keys, values = (x.index_select(0, forest.kv_index).repeat_interleave(repeats, dim=1)[None] for x in (k, v))
    return memory_efficient_attention(q[None], keys, values, attn_bias=forest.cache["xformers"])[0]


def _varlen_reference(q: Tensor, k: Tensor, v: Tensor, forest: Forest) -> Tensor:
    keys, values = k[forest.kv_index], v[forest.kv_index]  # [K, Hkv, d]
    bounds_q, bounds_k = forest.cu_seqlens_q.tolist(), forest.cu_seqlens_k.tolist()
    outputs = []
    for segment in range(len(bounds_q) - 1):
        query = q[bounds_q[segment] : bounds_q[segment + 1]]
        seen = slice(bounds_k[segment], bounds_k[segment + 1])
        n, m = query.shape[0], keys[seen].shape[0]
        bottom_right = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        outputs.append(_softmax_attention(query, keys[seen], values[seen], bottom_right))
    return torch.cat(outputs)


def _reference(q: Tensor, k: Tensor, v: Tensor, forest: Forest) -> Tensor:
    visible = torch.zeros(q.shape[0], q.shape[0], dtype=torch.bool, device=q.device)  # [query, key]
    for path in forest.paths():
        visible[path[:, None], path] |= torch.ones(len(path), len(path), dtype=torch.bool, device=q.device).tril()
    return _softmax_attention(q, k, v, visible)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Over the visible keys only; q `[n, H, d]`, k and v `[m, Hkv, d]`, visible `[n, m]` bool."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5  # [H, n, m]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hnm,mhd->nhd", weights, v)


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Forest], Tensor]] = {
    "flash_attn": _flash_attn,
    "torch_varlen": _torch_varlen,
    "xformers": _xformers,
    "blocks": _blocks,
    "varlen_reference": _varlen_reference,
    "reference": _reference,
}
