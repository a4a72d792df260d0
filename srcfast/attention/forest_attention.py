"""Attention over a packed prefix forest, behind one function.

Backends:
    flash_attn, torch_varlen, xformers   CUDA: one variable-length call by `varlen_plan`
    blocks                               the CPU's default: segments of similar length padded together, masked; without
                                         gradients all siblings attend at once to what they share (`shared_attention`)
    varlen_reference                     the variable-length call by its definition, block by block, plain PyTorch
    reference                            softmax under the dense ancestor mask over all T tokens

Each gives the result of causal attention over each root-to-leaf path by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from srcfast.attention.padded import Plan, padded_attention
from srcfast.attention.query_blocks import query_blocks, similar_lengths
from srcfast.attention.shared_prefix import shared_attention
from srcfast.attention.varlen_plan import varlen_plan
from srcfast.data.forest import Forest
from srcfast.errors import ConfigError
from srcfast_kernels.optional import import_failure
from srcfast_kernels.transfers import to_device_together

# (layer, q [T, H, d], k [T, Hkv, d], v [T, Hkv, d]) -> [T, H, d]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

# The function of an optional package that a backend calls.
_IMPORTS = {
    "flash_attn": ("flash_attn", "flash_attn_varlen_func"),
    "xformers": ("xformers.ops", "memory_efficient_attention"),
}

_forced: str | None = None


def set_backend(name: str | None) -> None:
    """Force a backend for all later calls; None restores the automatic choice.

    Raises:
        ConfigError: the name is unknown, or the backend can't run on this machine.
    """
    global _forced
    if name is not None and name not in _BACKENDS:
        raise ConfigError(f"attention backend {name!r} is unknown; known: {', '.join(_BACKENDS)}")
    if name is not None and (reason := why_unavailable(name)) is not None:
        raise ConfigError(
            f"attention backend {name!r} is not available here ({reason}); available: {available_backends()}"
        )
    _forced = name


def available_backends() -> list[str]:
    """List the backends that can run on this machine, the preferred one first."""
    return [name for name in _BACKENDS if why_unavailable(name) is None]


def why_unavailable(name: str) -> str | None:
    """Return the reason why a backend can't run on this machine, or None if it can."""
    if name in ("flash_attn", "torch_varlen", "xformers") and not torch.cuda.is_available():
        return "no CUDA device"
    return import_failure(*_IMPORTS[name]) if name in _IMPORTS else None


def forest_attention(
    q: Tensor, k: Tensor, v: Tensor, forest: Forest, backend: str | None = None, rows: Tensor | None = None
) -> Tensor:
    """Compute causal softmax attention in which each segment sees its ancestors and itself; scale 1/sqrt(d).

    Args:
        q: `[T, H, d]`, or `[M, H, d]` for the queries of `rows` alone.
        k, v: `[T, Hkv, d]`; H is a multiple of Hkv (grouped-query attention).
        forest: the forest of these T tokens.
        backend: one of the module's backends; None for the automatic choice.
        rows: `[M]` int64, M >= 1, on the host, so that the host does not wait for a device.

    Returns:
        `[T, H, d]`, or `[M, H, d]`.
    """
    name = backend or _forced or _automatic(q)
    if name not in _BACKENDS:
        raise ConfigError(f"attention backend {name!r} is unknown; known: {', '.join(_BACKENDS)}")
    return _BACKENDS[name](q, k, v, forest, rows)


def forest_attend(forest: Forest, backend: str | None = None, rows: Tensor | None = None) -> Attend:
    """Bind `forest_attention` to a forest, in the form that the decoder calls in each layer.

    Args:
        rows: `[M]` int64 on the host, the rows passed to `Decoder.forward`, whose last layer has queries for them alone.
    """

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return forest_attention(q, k, v, forest, backend, rows if q.shape[0] != k.shape[0] else None)

    return attend


def _automatic(q: Tensor) -> str:
    if not flash_takes(q):
        return "blocks"
    # Stop at the first one: xformers, which comes later, takes seconds to import.
    return next(name for name in _BACKENDS if why_unavailable(name) is None)


def flash_takes(q: Tensor) -> bool:
    """Whether FlashAttention's kernels run for these queries [..., d]: half precision, Ampere or later, d = 8, 16, ..., 256.

    The backward kernels of 200 to 224 run on data-centre GPUs alone (8.0 and 9.0), in PyTorch's build as in flash-attn's.
    """
    size = q.shape[-1]
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or size % 8 or size > 256:
        return False
    capability = torch.cuda.get_device_capability(q.device)
    return capability in ((8, 0), (9, 0)) if 192 < size <= 224 else capability >= (8, 0)


# The CPU's way: padded groups of segments --------------------------------------------------------------------


def _blocks(q: Tensor, k: Tensor, v: Tensor, forest: Forest, rows: Tensor | None) -> Tensor:
    dtype = q.dtype
    if not q.is_cuda:  # in bf16 the CPU's backward takes four times fp32's time
        q, k, v = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (q, k, v))
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
            return shared_attention(q, k, v, forest, rows).to(dtype)
    key = ("blocks", q.dtype, q.device)
    plan = forest.cache.get(key) if rows is None else None
    if plan is None:
        plan = plan_blocks(forest, q.dtype, q.device, rows)
    if rows is None:
        forest.cache[key] = plan
    return padded_attention(q, k, v, plan).to(dtype)


def plan_blocks(forest: Forest, dtype: torch.dtype, device: torch.device, rows: Tensor | None = None) -> Plan:
    """Plan padded groups: index maps of the queries into and out of them, of the keys into them, and the groups.

    A row is a segment, or the part of it that `rows` selects; its keys are its path from the root. Both end at its last
    token and are padded in front, so that one causal mask serves all rows of a group. The work is the sum of segment times
    path: less than the square of the tree wherever it has children.
    """
    blocks = query_blocks(forest, rows)
    kv_index = (forest.host or forest).kv_index.numpy()
    into: list[np.ndarray] = []
    keys_of: list[np.ndarray] = []
    paths_of: list[np.ndarray] = []
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
        paths_of.append(paths[:, 0])
    whole = [np.concatenate(into), out_of, np.concatenate(keys_of), np.concatenate(paths_of)]
    rows_in, rows_out, key_rows, device_paths = to_device_together(whole, device)
    by_group = device_paths.split([count for count, _, _ in sizes])
    groups = [(*size, _block_mask(*size[1:], paths, dtype)) for size, paths in zip(sizes, by_group, strict=True)]
    return rows_in, rows_out, key_rows, groups


def _block_mask(long: int, wide: int, paths: Tensor, dtype: torch.dtype) -> Tensor:
    """Build a group's additive mask [rows, 1, long, wide] on the device of `paths` [rows]: masks are too large to copy there."""
    from_end_q, from_end_k = (torch.arange(size - 1, -1, -1, device=paths.device) for size in (long, wide))
    hidden = from_end_k < from_end_q[:, None]  # [long, wide]
    hidden = hidden | (from_end_k >= paths[:, None])[:, None]  # [rows, long, wide]
    # Half of the smallest number: finite, so that no row of scores is all minus infinity.
    mask = torch.zeros(hidden.shape, dtype=dtype, device=paths.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min / 2)[:, None]


# One variable-length call -----------------------------------------------------------------------------------


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, forest: Forest, rows: Tensor | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    plan = varlen_plan(forest, rows)
    keys, values = plan.gather(k, v)  # [K, Hkv, d]
    return flash_attn_varlen_func(
        q,
        keys,
        values,
        plan.cu_seqlens_q,
        plan.cu_seqlens_k,
        plan.max_seqlen_q,
        plan.max_seqlen_k,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),  # PyTorch's and xformers' calls check this themselves
    )


@cache
def varlen_takes(option: str) -> bool:
    """Return whether the installed PyTorch's `varlen_attn` has an option: 2.11's has no `enable_gqa`."""
    from torch.nn.attention.varlen import varlen_attn

    return option in inspect.signature(varlen_attn).parameters


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, forest: Forest, rows: Tensor | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    plan = varlen_plan(forest, rows)
    keys, values = plan.gather(k, v)  # [K, Hkv, d]
    options = {"enable_gqa": q.shape[1] != k.shape[1]}
    if not varlen_takes("enable_gqa"):
        options, keys, values = {}, _all_heads(keys, q), _all_heads(values, q)
    output = varlen_attn(
        q,
        keys,
        values,
        plan.cu_seqlens_q,
        plan.cu_seqlens_k,
        plan.max_seqlen_q,
        plan.max_seqlen_k,
        window_size=(-1, 0),  # causal, aligned bottom-right
        **options,
    )
    assert isinstance(output, Tensor)  # a tuple only where auxiliary outputs are requested
    return output


def _xformers(q: Tensor, k: Tensor, v: Tensor, forest: Forest, rows: Tensor | None) -> Tensor:
    from xformers.ops import fmha, memory_efficient_attention

    plan = varlen_plan(forest, rows)
    bias = forest.cache.get("xformers") if rows is None else None
    if bias is None:
        bias = fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
            plan.lengths_q.tolist(), plan.lengths_k.tolist(), device=q.device
        )
    if rows is None:
        forest.cache["xformers"] = bias
    keys, values = plan.gather(k, v)  # [K, Hkv, d]
    # Its form for grouped queries has no backward.
    keys, values = _all_heads(keys, q)[None], _all_heads(values, q)[None]
    return memory_efficient_attention(q[None], keys, values, attn_bias=bias)[0]


def _all_heads(x: Tensor, q: Tensor) -> Tensor:
    """Repeat the heads of keys or values [K, Hkv, d] for the queries that share them: [K, H, d]."""
    return x[:, :, None].expand(-1, -1, q.shape[1] // x.shape[1], -1).flatten(1, 2)


def _varlen_reference(q: Tensor, k: Tensor, v: Tensor, forest: Forest, rows: Tensor | None) -> Tensor:
    plan = varlen_plan(forest, rows)
    keys, values = plan.gather(k, v)  # [K, Hkv, d]
    bounds_q, bounds_k = plan.cu_seqlens_q.tolist(), plan.cu_seqlens_k.tolist()
    outputs = []
    for block in range(len(bounds_q) - 1):
        query = q[bounds_q[block] : bounds_q[block + 1]]
        visible = slice(bounds_k[block], bounds_k[block + 1])
        n, m = query.shape[0], keys[visible].shape[0]
        bottom_right = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        outputs.append(_softmax_attention(query, keys[visible], values[visible], bottom_right))
    return torch.cat(outputs)


def _reference(q: Tensor, k: Tensor, v: Tensor, forest: Forest, rows: Tensor | None) -> Tensor:
    visible = torch.zeros(k.shape[0], k.shape[0], dtype=torch.bool, device=q.device)  # [query, key]
    for path in forest.paths():
        visible[path[:, None], path] |= torch.ones(len(path), len(path), dtype=torch.bool, device=q.device).tril()
    return _softmax_attention(q, k, v, visible if rows is None else visible[rows.to(q.device)])


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Attend to the visible keys only; q `[n, H, d]`, k and v `[m, Hkv, d]`, visible `[n, m]` bool."""
    k, v = _all_heads(k, q), _all_heads(v, q)
    scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5  # [H, n, m]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hnm,mhd->nhd", weights, v)


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Forest, Tensor | None], Tensor]] = {
    "flash_attn": _flash_attn,
    "torch_varlen": _torch_varlen,
    "xformers": _xformers,
    "blocks": _blocks,
    "varlen_reference": _varlen_reference,
    "reference": _reference,
}
