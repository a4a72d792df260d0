"""Variable-length attention by its definition, behind PyTorch's operator, flash-attn's functions and xformers'.

Each checks what its CUDA kernels take (types, head sizes, strides, page sizes) and computes in fp32; results are rounded once. A
key that the definition does not show is never read: padding and pages beyond `seqused_k` may hold NaN.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simulated_cuda import record
from simulated_cuda.memory_view import host, on_device

HALF = (torch.float16, torch.bfloat16)
FLASH_PAGE = 256  # positions, of which FlashAttention 2 takes multiples


@dataclass(frozen=True)
class Blocks:
    """What a call attends with: `bounds_q` [blocks + 1], and for each block the rows of its keys."""

    bounds_q: list[int]
    key_rows: list[Tensor]  # of int64, on the host
    causal: bool
    left: int  # positions before its own that a query sees; -1: all
    right: int
    scale: float
    softcap: float = 0.0  # 0 for none


def forward(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Attend on the host: q [T, H, d], k and v [K, Hkv, d] -> outputs [T, H, d] and log-sum-exp [H, T], in fp32."""
    out = torch.zeros(q.shape, dtype=torch.float32)
    lse = torch.full((q.shape[1], q.shape[0]), float("inf"))
    for rows, weights, log_sum, _, values, _, _ in _each(q, k, v, blocks):
        out[rows] = torch.einsum("hnm,mhd->nhd", weights, values)
        lse[:, rows] = log_sum
    return out, lse


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v in fp32."""
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float32) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    for (rows, weights, _, keys, values, key_rows, slope), queries in (
        (one, q[one[0]].float()) for one in _each(q, k, v, blocks)
    ):
        incoming = grad[rows].float()  # [n, H, d]
        attended = torch.einsum("hnm,mhd->nhd", weights, values)
        by_weight = torch.einsum("nhd,mhd->hnm", incoming, values)
        by_score = weights * (by_weight - (incoming * attended).sum(-1).T[:, :, None]) * slope * blocks.scale
        grad_q[rows] = torch.einsum("hnm,mhd->nhd", by_score, keys)
        for total, part in (
            (grad_k, torch.einsum("hnm,nhd->mhd", by_score, queries)),
            (grad_v, torch.einsum("hnm,nhd->mhd", weights, incoming)),
        ):
            total.index_add_(0, key_rows, part.unflatten(1, (-1, group)).sum(2))
    return grad_q, grad_k, grad_v


def _each(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Of each block: its query rows, softmax weights [H, n, m], log-sum-exp [H, n], keys and values [m, H, d], key rows [m], and
    the slope of the soft cap, [H, n, m] or [1].
    """
    group = q.shape[1] // k.shape[1]
    for start, end, key_rows in zip(blocks.bounds_q[:-1], blocks.bounds_q[1:], blocks.key_rows, strict=True):
        rows = slice(start, end)
        queries = q[rows].float()
        keys, values = (x[key_rows].float().repeat_interleave(group, 1) for x in (k, v))
        n, m = len(queries), len(keys)
        last_seen = torch.arange(n)[:, None] + (m - n)  # aligned at the bottom right
        seen = torch.ones(n, m, dtype=torch.bool)
        if blocks.causal or blocks.right >= 0:
            seen &= torch.arange(m)[None] <= last_seen + (0 if blocks.causal else blocks.right)
        if blocks.left >= 0:
            seen &= torch.arange(m)[None] >= last_seen - blocks.left
        scores, slope = torch.einsum("nhd,mhd->hnm", queries, keys) * blocks.scale, torch.ones(1)
        if blocks.softcap:
            capped = torch.tanh(scores / blocks.softcap)
            scores, slope = capped * blocks.softcap, 1 - capped.square()
        scores = scores.masked_fill(~seen, float("-inf"))
        yield rows, scores.softmax(-1).nan_to_num(0.0), scores.logsumexp(-1), keys, values, key_rows, slope


def _blocks_of(
    q: Tensor,
    k: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    causal: bool,
    left: int | None,
    right: int | None,
    scale: float | None,
    softcap: float = 0.0,
    used: Tensor | None = None,
    table: Tensor | None = None,
) -> Blocks:
    bounds_q, bounds_k = host(cu_q).tolist(), host(cu_k).tolist()
    lengths = [end - start for start, end in zip(bounds_q, bounds_q[1:], strict=False)]
    paths = [end - start for start, end in zip(bounds_k, bounds_k[1:], strict=False)]
    assert bounds_q[-1] == q.shape[0], f"cu_seqlens_q ends at {bounds_q[-1]}, there are {q.shape[0]} queries"
    assert max(lengths) <= max_q and max(paths) <= max_k, "max_seqlen is less than the longest block"
    if table is not None:
        page = k.shape[1]
        rows = [
            (host(table)[b].long()[:, None] * page + torch.arange(page)).flatten()[: int(host(used)[b])]
            for b in range(len(lengths))
        ]
    else:
        assert bounds_k[-1] <= k.shape[0], f"cu_seqlens_k ends at {bounds_k[-1]}, there are {k.shape[0]} keys"
        counts = paths if used is None else host(used).tolist()
        rows = [torch.arange(start, start + n) for start, n in zip(bounds_k[:-1], counts, strict=True)]
    no_limit = (None, -1)
    return Blocks(
        bounds_q,
        rows,
        causal,
        -1 if left in no_limit else left,
        -1 if right in no_limit else right,
        q.shape[-1] ** -0.5 if scale is None else scale,
        softcap,
    )


def _check_tensors(name: str, q: Tensor, k: Tensor, v: Tensor, *bounds: Tensor, head_sizes: int = 256) -> None:
    for tensor in (q, k, v):
        if not tensor.is_cuda or tensor.device != q.device:
            raise RuntimeError(f"{name} (simulated): expected all tensors on one CUDA device")
        if tensor.dtype not in HALF or tensor.dtype != q.dtype:
            raise RuntimeError(
                f"{name} (simulated): FlashAttention only support fp16 and bf16 data type, not {tensor.dtype}"
            )
        if tensor.stride(-1) != 1:
            raise RuntimeError(f"{name} (simulated): Input tensor must have contiguous last dimension")
    if q.shape[-1] % 8 or q.shape[-1] > head_sizes:
        raise RuntimeError(f"{name} (simulated): head size {q.shape[-1]} is not a multiple of 8 up to {head_sizes}")
    if q.shape[1] % k.shape[-2]:
        raise RuntimeError(f"{name} (simulated): Number of heads in key/value must divide number of heads in query")
    for tensor in bounds:
        if not tensor.is_cuda or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise RuntimeError(f"{name} (simulated): cu_seqlens must be contiguous, of int32, on the device")


def _tape(native: types.ModuleType, run: Any, tensors: list[Tensor], outputs: list[Tensor]) -> None:
    """Let a captured graph's replays compute again what was just computed into `outputs`."""
    if native.is_capturing():

        def again() -> None:
            for output, value in zip(outputs, run(), strict=True):
                host(output).copy_(value)

        native.record_python(again, [*tensors, *outputs])


# PyTorch's operator -------------------------------------------------------------------------------------------


def register_flash_operators(native: types.ModuleType) -> torch.library.Library:
    """Register the two operators by which `torch.nn.attention.varlen` works. The registration ends with the result."""
    library = torch.library.Library("aten", "IMPL")

    def flash_forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
        window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        assert dropout_p == 0.0 and alibi_slopes is None
        _check_tensors("_flash_attention_forward", query, key, value, cum_seq_q, cum_seq_k)
        if block_table is not None and key.shape[1] % FLASH_PAGE:
            raise RuntimeError(f"Paged KV cache block size must be divisible by {FLASH_PAGE} (simulated)")
        record.note("attention", "forward")

        def run() -> tuple[Tensor, Tensor]:
            blocks = _blocks_of(
                query, key, cum_seq_q, cum_seq_k, max_q, max_k, causal=is_causal, left=window_size_left,
                right=window_size_right, scale=scale, used=seqused_k, table=block_table,
            )  # fmt: skip
            keys, values = (host(x).flatten(0, 1) if block_table is not None else host(x) for x in (key, value))
            out, lse = forward(host(query), keys, values, blocks)
            return out.to(query.dtype), lse

        outputs = [on_device(x, query) for x in run()]
        _tape(native, run, [query, key, value], outputs)
        rng = torch.zeros(2, dtype=torch.uint64, device=query.device)
        unused = torch.empty(0, dtype=torch.uint64, device=query.device)
        return outputs[0], outputs[1], rng, unused, torch.empty(0, device=query.device)

    def flash_backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
        unused, *,
        scale=None, window_size_left=None, window_size_right=None, **kwargs,
    ):  # fmt: skip
        _check_tensors("_flash_attention_backward", query, key, value, cum_seq_q, cum_seq_k)
        record.note("attention", "backward")
        blocks = _blocks_of(
            query, key, cum_seq_q, cum_seq_k, max_q, max_k, causal=is_causal, left=window_size_left,
            right=window_size_right, scale=scale,
        )  # fmt: skip
        grads = backward(*map(host, (grad_out, query, key, value)), blocks)
        return tuple(on_device(grad, x, x.dtype) for grad, x in zip(grads, (query, key, value), strict=True))

    library.impl("_flash_attention_forward", flash_forward, "CUDA")
    library.impl("_flash_attention_backward", flash_backward, "CUDA")
    return library


# flash-attn and xformers --------------------------------------------------------------------------------------


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        record.note("attention", "forward")
        ctx.save_for_backward(q, k, v)
        ctx.blocks = blocks
        return on_device(forward(host(q), host(k), host(v), blocks)[0], q, q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        record.note("attention", "backward")
        q, k, v = ctx.saved_tensors
        grads = backward(host(grad), host(q), host(k), host(v), ctx.blocks)
        return (*(on_device(one, x, x.dtype) for one, x in zip(grads, (q, k, v), strict=True)), None)


def _flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """flash-attn 2.8's function, of what srcfast uses."""
    assert dropout_p == 0.0 and alibi_slopes is None and not return_attn_probs and block_table is None
    _check_tensors("flash_attn_varlen_func", q, k, v, cu_seqlens_q, cu_seqlens_k)
    blocks = _blocks_of(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal, left=window_size[0],
        right=window_size[1], scale=softmax_scale, softcap=softcap,
    )  # fmt: skip
    return _Varlen.apply(q, k, v, blocks)


class BlockDiagonalMask:
    """xformers' mask: blocks of queries and of keys; with a window causal, aligned at the bottom right."""

    causal = False

    def __init__(self, bounds_q: list[int], bounds_k: list[int], window: int = 0) -> None:
        self.bounds_q, self.bounds_k, self.window = bounds_q, bounds_k, window
        self.causal = self.causal or bool(window)

    def make_local_attention_from_bottomright(self, window_size: int) -> BlockDiagonalMask:
        return BlockDiagonalMask(self.bounds_q, self.bounds_k, window_size)

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        def bounds(lengths: Any) -> list[int]:
            ends = [0]
            for length in lengths:
                ends.append(ends[-1] + int(length))
            return ends

        kv_seqlen = q_seqlen if kv_seqlen is None else kv_seqlen
        if any(keys < queries for queries, keys in zip(q_seqlen, kv_seqlen, strict=True)):
            raise ValueError(f"{cls.__name__} (simulated): a block has more queries than keys")
        return cls(bounds(q_seqlen), bounds(kv_seqlen))


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """The causal one, aligned at the bottom right."""

    causal = True


def _memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    """xformers' function on [1, M, H, K], or [1, M, G, H, K] with grouped heads, of what srcfast uses."""
    assert p == 0.0 and isinstance(attn_bias, BlockDiagonalMask)
    if query.ndim == 5:  # groups of heads share a head of keys, which `expand` repeats
        groups, heads = query.shape[2:4]
        assert key.shape[2:4] == (groups, heads) and key.stride(3) == 0, "grouped keys are expanded, not copied"
        flat_q, flat_k, flat_v = query[0].flatten(1, 2), key[0, :, :, 0], value[0, :, :, 0]
    else:
        flat_q, flat_k, flat_v = query[0], key[0], value[0]
    _check_tensors("memory_efficient_attention", flat_q, flat_k, flat_v)
    rows = [torch.arange(start, end) for start, end in zip(attn_bias.bounds_k, attn_bias.bounds_k[1:], strict=False)]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    left = attn_bias.window - 1
    out = _Varlen.apply(flat_q, flat_k, flat_v, Blocks(attn_bias.bounds_q, rows, attn_bias.causal, left, -1, scale))
    return out.view(query.shape)


def _module(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
    vars(module).update(attributes)
    return module


@contextmanager
def _modules(*modules: types.ModuleType) -> Iterator[None]:
    from srcfast_kernels.optional import import_failure  # it remembers what could not be imported

    before = {module.__name__: sys.modules.get(module.__name__) for module in modules}
    sys.modules.update({module.__name__: module for module in modules})
    import_failure.cache_clear()
    try:
        yield
    finally:
        import_failure.cache_clear()
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def stand_in_flash_attn() -> Any:
    """A context in which `flash_attn` can be imported: its variable-length function, by definition."""
    return _modules(_module("flash_attn", __version__="2.8.3", flash_attn_varlen_func=_flash_attn_varlen_func))


def stand_in_xformers() -> Any:
    """A context in which `xformers.ops` can be imported: its memory-efficient attention, by definition."""
    mask = BlockDiagonalCausalFromBottomRightMask
    bias = _module(
        "xformers.ops.fmha.attn_bias",
        BlockDiagonalCausalFromBottomRightMask=mask,
        BlockDiagonalMask=BlockDiagonalMask,
    )
    fmha = _module("xformers.ops.fmha", attn_bias=bias, memory_efficient_attention=_memory_efficient_attention)
    fmha.BlockDiagonalCausalFromBottomRightMask = mask
    ops = _module("xformers.ops", fmha=fmha, memory_efficient_attention=_memory_efficient_attention)
    return _modules(_module("xformers", __version__="0.0.35", ops=ops), ops, fmha, bias)
