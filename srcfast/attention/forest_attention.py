"""Attention over a packed prefix forest, behind one function.

Backends:
    flash_attn, torch_varlen, xformers   CUDA: one variable-length call by `varlen_plan`
    blocks                               the CPU's default: segments of similar length padded together, masked; without
                                         gradients all siblings attend at once to what they share (`shared_attention`)
    varlen_reference                     the variable-length call by its definition, block by block, plain PyTorch
    reference                            softmax under the dense ancestor mask over all T tokens

Each gives the result of causal attention over each root-to-leaf path by itself, or of attention by `AttentionOptions`. Of those
flash_attn takes all, torch_varlen windows and two-way ranges, xformers one of these two; the others take any.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from srcfast.attention.options import CAUSAL, AttentionOptions
from srcfast.attention.padded import padded_attention
from srcfast.attention.padded_plan import plan_blocks
from srcfast.attention.shared_prefix import shared_attention
from srcfast.attention.varlen_plan import VarlenPlan, varlen_plan
from srcfast.data.forest import Forest
from srcfast.errors import ConfigError
from srcfast_kernels.optional import import_failure
from srcfast_kernels.transfers import to_device


class Attend(Protocol):
    """The attention of a layer, as a decoder calls it."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions = CAUSAL, /
    ) -> Tensor: ...  # q [T, H, d], k and v [T, Hkv, d] -> [T, H, d]


Backend = Callable[[Tensor, Tensor, Tensor, Forest, Tensor | None, AttentionOptions], Tensor]

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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forest: Forest,
    backend: str | None = None,
    rows: Tensor | None = None,
    options: AttentionOptions = CAUSAL,
) -> Tensor:
    """Compute causal softmax attention in which each segment sees its ancestors and itself; scale 1/sqrt(d).

    Args:
        q: `[T, H, d]`, or `[M, H, d]` for the queries of `rows` alone.
        k, v: `[T, Hkv, d]`; H is a multiple of Hkv (grouped-query attention).
        forest: the forest of these T tokens.
        backend: one of the module's backends; None for the automatic choice.
        rows: `[M]` int64, M >= 1, on the host, so that the host does not wait for a device.
        options: windows, soft caps and two-way ranges.

    Returns:
        `[T, H, d]`, or `[M, H, d]`.

    Raises:
        ConfigError: the backend is unknown, or does not take the options.
    """
    options = options.within(forest)
    name = backend or _forced or _automatic(q, rows, options)
    if name not in _BACKENDS:
        raise ConfigError(f"attention backend {name!r} is unknown; known: {', '.join(_BACKENDS)}")
    if not _takes(name, rows, options):
        raise ConfigError(
            f"attention backend {name!r}: expected attention that it computes, found "
            f"{_described(options)}. Fix: leave the backend to srcfast, or choose 'blocks'"
        )
    return _BACKENDS[name](q, k, v, forest, rows, options)


def forest_attend(forest: Forest, backend: str | None = None, rows: Tensor | None = None) -> Attend:
    """Bind `forest_attention` to a forest, in the form that the decoder calls in each layer.

    Args:
        rows: `[M]` int64 on the host, the rows passed to `Decoder.forward`, whose last layer has queries for them alone.
    """

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions = CAUSAL, /) -> Tensor:
        return forest_attention(q, k, v, forest, backend, rows if q.shape[0] != k.shape[0] else None, options)

    return attend


def _automatic(q: Tensor, rows: Tensor | None, options: AttentionOptions) -> str:
    if not flash_takes(q):
        return "blocks"
    # Stop at the first one: xformers, which comes later, takes seconds to import.
    return next(name for name in _BACKENDS if _takes(name, rows, options) and why_unavailable(name) is None)


def _takes(name: str, rows: Tensor | None, options: AttentionOptions) -> bool:
    """Return whether a backend computes attention by these options, which name no window that covers all paths."""
    if options == CAUSAL or name in ("blocks", "reference"):
        return True
    if options.softcap is not None and name in ("torch_varlen", "xformers"):
        return False
    if not options.two_way:
        return True
    if options.window is not None:
        if name == "xformers":  # which has no call with a window that is not causal
            return False
        if options.beyond_window and options.longest_range > options.window:
            return False  # a call's window is each query's
    return rows is None or not options.touches(rows.numpy())


def _described(options: AttentionOptions) -> str:
    parts = [f"a window of {options.window}"] if options.window is not None else []
    parts += [f"a soft cap of {options.softcap:g}"] if options.softcap is not None else []
    parts += [f"{len(options.two_way)} two-way ranges of up to {options.longest_range} rows"] if options.two_way else []
    return ", ".join(parts)


def flash_takes(q: Tensor) -> bool:
    """Whether FlashAttention's kernels run for these queries [..., d]: half precision, Ampere or later, d = 8, 16, ..., 256.

    The backward kernels of 200 to 224 run on data-centre GPUs alone (8.0 and 9.0), in PyTorch's build as in flash-attn's.
    """
    size = q.shape[-1]
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or size % 8 or size > 256:
        return False
    capability = torch.cuda.get_device_capability(q.device)
    return capability in ((8, 0), (9, 0)) if 192 < size <= 224 else capability >= (8, 0)


def _blocks(q: Tensor, k: Tensor, v: Tensor, forest: Forest, rows: Tensor | None, options: AttentionOptions) -> Tensor:
    dtype = q.dtype
    if not q.is_cuda:  # in bf16 the CPU's backward takes four times fp32's time
        q, k, v = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (q, k, v))
        if options == CAUSAL and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
            return shared_attention(q, k, v, forest, rows).to(dtype)
    key = ("blocks", q.dtype, q.device, options.window, options.two_way, options.beyond_window)
    plan = forest.cache.get(key) if rows is None else None
    if plan is None:
        plan = plan_blocks(forest, q.dtype, q.device, rows, options)
    if rows is None:
        forest.cache[key] = plan
    with torch.autocast("cpu", enabled=False):  # which would cast the factors of each small product to 16 bits again
        return padded_attention(q, k, v, plan, options.softcap).to(dtype)


# One variable-length call -----------------------------------------------------------------------------------

# (q [M, H, d], keys [K, Hkv, d], values, the blocks, whether causal) -> [M, H, d]
Call = Callable[[Tensor, Tensor, Tensor, VarlenPlan, bool], Tensor]


def _by_varlen(
    call: Call, q: Tensor, k: Tensor, v: Tensor, forest: Forest, rows: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Attend by one causal call over the forest's blocks, and by one that is not causal over two-way ranges."""
    plan = varlen_plan(forest, rows)
    keys, values = plan.gather(k, v)  # [K, Hkv, d]
    output = call(q, keys, values, plan, True)
    if not options.two_way or rows is not None:  # no rows of a range are among those: see `_takes`
        return output
    key = ("two-way", options.two_way)
    if key not in forest.cache:
        within = torch.from_numpy(options.two_way_rows)
        forest.cache[key] = to_device(within, q.device), varlen_plan(forest, within)
    index, plan = forest.cache[key]
    # A range's last query sees its whole path, and the others as much of it: the keys of a block are those of its last query.
    keys, values = plan.gather(k, v)
    return output.index_copy(0, index, call(q[index], keys, values, plan, False))


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, forest: Forest, rows: Tensor | None, options: AttentionOptions
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    def call(query: Tensor, keys: Tensor, values: Tensor, plan: VarlenPlan, causal: bool) -> Tensor:
        return flash_attn_varlen_func(
            query,
            keys,
            values,
            plan.cu_seqlens_q,
            plan.cu_seqlens_k,
            plan.max_seqlen_q,
            plan.max_seqlen_k,
            causal=causal,
            window_size=(options.left, -1),
            softcap=options.softcap or 0.0,
            # PyTorch's and xformers' calls check this themselves.
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    return _by_varlen(call, q, k, v, forest, rows, options)


@cache
def varlen_takes(option: str) -> bool:
    """Return whether the installed PyTorch's `varlen_attn` has an option: 2.11's has no `enable_gqa`."""
    from torch.nn.attention.varlen import varlen_attn

    return option in inspect.signature(varlen_attn).parameters


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, forest: Forest, rows: Tensor | None, options: AttentionOptions
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    def call(query: Tensor, keys: Tensor, values: Tensor, plan: VarlenPlan, causal: bool) -> Tensor:
        gqa = {"enable_gqa": q.shape[1] != k.shape[1]}
        if not varlen_takes("enable_gqa"):
            gqa, keys, values = {}, _all_heads(keys, q), _all_heads(values, q)
        output = varlen_attn(
            query,
            keys,
            values,
            plan.cu_seqlens_q,
            plan.cu_seqlens_k,
            plan.max_seqlen_q,
            plan.max_seqlen_k,
            # Both sides are counted from the bottom right; 0 on the right is causal.
            window_size=(options.left, 0 if causal else -1),
            **gqa,
        )
        assert isinstance(output, Tensor)  # a tuple only where auxiliary outputs are requested
        return output

    return _by_varlen(call, q, k, v, forest, rows, options)


def _xformers(
    q: Tensor, k: Tensor, v: Tensor, forest: Forest, rows: Tensor | None, options: AttentionOptions
) -> Tensor:
    from xformers.ops import fmha, memory_efficient_attention

    def bias_of(plan: VarlenPlan, causal: bool) -> Any:
        lengths = plan.lengths_q.tolist(), plan.lengths_k.tolist()
        if causal and options.window is None:
            return fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(*lengths, device=q.device)
        bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens(*lengths, device=q.device)
        return bias.make_local_attention_from_bottomright(options.window) if causal else bias

    def call(query: Tensor, keys: Tensor, values: Tensor, plan: VarlenPlan, causal: bool) -> Tensor:
        key = ("xformers", options.window, id(plan))  # the forest's plans live as long as its cache
        bias = forest.cache.get(key) if rows is None else None
        if bias is None:
            bias = bias_of(plan, causal)
        if rows is None:
            forest.cache[key] = bias
        # Its form for grouped queries has no backward.
        keys, values = _all_heads(keys, q)[None], _all_heads(values, q)[None]
        return memory_efficient_attention(query[None], keys, values, attn_bias=bias)[0]

    return _by_varlen(call, q, k, v, forest, rows, options)


def _all_heads(x: Tensor, q: Tensor) -> Tensor:
    """Repeat the heads of keys or values [K, Hkv, d] for the queries that share them: [K, H, d]."""
    return x[:, :, None].expand(-1, -1, q.shape[1] // x.shape[1], -1).flatten(1, 2)


def _varlen_reference(
    q: Tensor, k: Tensor, v: Tensor, forest: Forest, rows: Tensor | None, options: AttentionOptions
) -> Tensor:
    def call(query: Tensor, keys: Tensor, values: Tensor, plan: VarlenPlan, causal: bool) -> Tensor:
        bounds_q, bounds_k = plan.cu_seqlens_q.tolist(), plan.cu_seqlens_k.tolist()
        outputs = []
        for block in range(len(bounds_q) - 1):
            part = query[bounds_q[block] : bounds_q[block + 1]]
            seen = slice(bounds_k[block], bounds_k[block + 1])
            n, m = part.shape[0], keys[seen].shape[0]
            visible = torch.ones(n, m, dtype=torch.bool, device=q.device)
            if causal:
                visible = visible.tril(m - n)  # aligned at the bottom right
            if options.window is not None:
                visible = visible.triu(m - n - options.window + 1)
            outputs.append(_softmax_attention(part, keys[seen], values[seen], visible, options.softcap))
        return torch.cat(outputs)

    return _by_varlen(call, q, k, v, forest, rows, options)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, forest: Forest, rows: Tensor | None, options: AttentionOptions
) -> Tensor:
    visible = torch.zeros(k.shape[0], k.shape[0], dtype=torch.bool, device=q.device)  # [query, key]
    before, behind = (torch.from_numpy(side).to(q.device)[:, None] for side in options.reach(k.shape[0]))
    for path in forest.paths():
        position = torch.arange(len(path), device=q.device)
        distance = position - position[:, None]  # [query, key]
        visible[path[:, None], path] |= (distance <= behind[path]) & (distance >= -before[path])
    return _softmax_attention(q, k, v, visible if rows is None else visible[rows.to(q.device)], options.softcap)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softcap: float | None) -> Tensor:
    """Attend to the visible keys only; q `[n, H, d]`, k and v `[m, Hkv, d]`, visible `[n, m]` bool."""
    k, v = _all_heads(k, q), _all_heads(v, q)
    scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5  # [H, n, m]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hnm,mhd->nhd", weights, v)


_BACKENDS: dict[str, Backend] = {
    "flash_attn": _flash_attn,
    "torch_varlen": _torch_varlen,
    "xformers": _xformers,
    "blocks": _blocks,
    "varlen_reference": _varlen_reference,
    "reference": _reference,
}
