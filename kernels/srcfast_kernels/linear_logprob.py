"""Compute log-probabilities of targets under a linear head, without the [T, V] logits of all rows at once.

    logps_t = x_{t y_t} - log sum_v exp x_tv,        x = cap(scale (h W^T + bias))

With a frozen head the gradient of each log-probability with respect to its hidden state,

    d logp_t / d h_t = w_{y_t} - sum_v p_tv w_v        (times the chain of scale and softcap),

scales with one number a token, so the forward pass forms it chunk by chunk, and backward is a row scaling: two GEMMs in
all. `onehot - p` is formed in fp32 before any rounding; two rounded products are never subtracted from each other.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from srcfast_kernels.backends import Backend, accumulator, backend_for
from srcfast_kernels.cpu_products import add_product, linear, product
from srcfast_kernels.linear_logprob_tiled import linear_logprob_tiled

CHUNK_ELEMENTS = 1 << 22  # logits alive at a time on a CPU, 16 MiB in fp32: near its caches
LEAST_CHUNK_ROWS = 512  # of a CPU: its products of fewer rows take up to half as long again
CACHED_ROWS = 128  # of a chunk that a CPU takes through softmax at a time
COLUMNS = 2048  # of a CPU's logits that are made at a time, and of a half-precision head that are fp32 meanwhile
GPU_CHUNK_ELEMENTS = 7 << 23  # 224 MiB: the head is read once a chunk, so chunks are as tall as memory allows
READ_BEHIND = 64  # columns behind a row of halves that a CPU's products may read
BLOCK = 4096  # columns that a row's program handles at a time


class HeadSettings(NamedTuple):
    """How a head transforms its logits, and the target that doesn't count."""

    logit_scale: float = 1.0
    softcap: float | None = None
    ignore_index: int = -100


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    method: Literal["chunked", "tiled"] = "chunked",
) -> Tensor:
    """Compute log softmax(logits)[target] for logits = scale * (hidden W^T + bias), soft-capped as softcap * tanh(x / softcap).

    Args:
        hidden: [T, D].
        weight: [V, D]; its gradient, and the bias's, is computed only where required.
        targets: [T] int64; rows of `ignore_index` give 0 and no gradient.
        bias: [V].
        logit_scale: factor on the logits, before the cap.
        softcap: Gemma's cap on logits; None for none.
        method: on a GPU, `tiled` keeps no logits in device memory, for half as much work again; frozen heads only.

    Returns:
        [T] fp32 (fp64 for fp64 inputs), never above 0.

    Raises:
        ValueError: the head is to be trained by tiles.
    """
    settings = HeadSettings(logit_scale, softcap, ignore_index)
    backend = backend_for(hidden)
    with torch.autocast(hidden.device.type, enabled=False):  # the casts below decide what is rounded
        if backend == "reference":
            return linear_logprob_reference(hidden, weight, targets, bias=bias, **settings._asdict())
        if backend == "triton" and method == "tiled":
            return linear_logprob_tiled(hidden, weight, targets, bias, *settings)
        return _LinearLogprob.apply(hidden, weight, targets, bias, settings, backend, torch.is_grad_enabled())


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Compute `linear_logprob` in plain PyTorch, with all logits at once."""
    dtype = _compute_dtype(hidden)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    logits = logit_scale * (logits if bias is None else logits + bias.to(dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    counted = targets != ignore_index
    logps = logits.log_softmax(-1).gather(-1, targets.where(counted, 0)[:, None])[:, 0]
    return logps.where(counted, 0.0)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        settings: HeadSettings,
        backend: Backend,
        differentiated: bool,
    ) -> Tensor:
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]  # whatever the mode
        ctx.settings, ctx.backend = settings, backend
        logps = torch.empty(len(targets), dtype=_compute_dtype(hidden), device=hidden.device)  # [T]
        ctx.frozen_head = not (needs_weight or needs_bias)
        stashed = differentiated and needs_hidden and ctx.frozen_head
        stash = hidden.new_empty(hidden.shape) if stashed else None  # [T, D] unit gradients
        buffer = None
        for rows in _chunks(len(targets), weight):
            logits = buffer = head_logits(hidden[rows], weight, buffer)  # [n, V]
            logps[rows], residual = _rows(
                backend, logits, targets[rows], bias, settings, None if stash is None else weight.dtype
            )
            if stash is not None and residual is not None:
                stash[rows] = product(residual, weight).to(stash.dtype)
        ctx.save_for_backward(*((hidden, weight, targets, bias) if stash is None else (stash,)))
        return logps

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]  # [T]
        with torch.autocast(gradient.device.type, enabled=False):
            if ctx.frozen_head:
                (stash,) = ctx.saved_tensors
                return ((gradient[:, None] * stash).to(stash.dtype), *[None] * 6)
            return _backward(ctx, gradient)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the requested gradients for a trained head, from logits computed once more; the head's in fp32."""
    hidden, weight, targets, bias = ctx.saved_tensors
    needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
    dtype = _compute_dtype(hidden)
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs_weight else None
    grad_bias = torch.zeros(len(weight), dtype=dtype, device=weight.device) if needs_bias else None
    # A GPU multiplies halves and sums in fp32; elsewhere the residual stays as wide as the sums.
    factor_dtype = weight.dtype if _multiplies_halves(weight) else dtype
    buffer = None
    for rows in _chunks(len(targets), weight):
        logits = buffer = head_logits(hidden[rows], weight, buffer)  # [n, V]
        _, residual = _rows(ctx.backend, logits, targets[rows], bias, ctx.settings, factor_dtype, gradient[rows])
        assert residual is not None
        if grad_hidden is not None:
            grad_hidden[rows] = product(residual.to(weight.dtype), weight).to(hidden.dtype)
        if grad_weight is not None:
            _add_product(grad_weight, residual.T, hidden[rows].to(factor_dtype))
        if grad_bias is not None:
            grad_bias += residual.sum(0, dtype=dtype)
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None,
        None if grad_bias is None else grad_bias.to(bias.dtype),
        None,
        None,
        None,
    )


def _rows(
    backend: Backend,
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    settings: HeadSettings,
    residual_dtype: torch.dtype | None,
    coefficient: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute logps [n] from logits h W^T [n, V] and, written over them, coefficient_t d logp_t / d (h_t W^T) [n, V]."""
    launch = _rows_triton if backend == "triton" else _rows_torch
    return launch(logits, targets, bias, settings, residual_dtype, coefficient)


def _rows_torch(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    settings: HeadSettings,
    residual_dtype: torch.dtype | None,
    coefficient: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    logps = logits.new_empty(len(targets))
    residual = None if residual_dtype is None else logits.view(residual_dtype)[:, : logits.shape[1]]
    for start in range(0, len(targets), CACHED_ROWS):
        rows = slice(start, start + CACHED_ROWS)
        x, slope = _scaled_and_capped(logits[rows], bias, settings)
        counted = targets[rows] != settings.ignore_index
        at_target = targets[rows].where(counted, 0)[:, None]
        x = torch.log_softmax(x, -1, out=x)
        # Rounding may put a certain token a hair above 0; a log-probability never is.
        logps[rows] = x.gather(-1, at_target)[:, 0].clamp(max=0.0).where(counted, 0.0)
        if residual is not None:
            x.exp_().scatter_add_(-1, at_target, x.new_full(at_target.shape, -1.0))  # p - onehot
            if slope is not None:
                x *= slope
            factor = counted.to(x.dtype) * -settings.logit_scale
            x *= (factor if coefficient is None else factor * coefficient[rows])[:, None]
            # In bf16 it takes the first half of the logits' bytes, hence the copy that `to` makes.
            residual[rows] = x.to(residual_dtype)
    if residual is not None and residual_dtype != logits.dtype:
        # A CPU's products of halves read on behind a row, to a multiple of 32, and multiply by 0 what may be NaN there.
        logits.view(residual_dtype)[:, logits.shape[1] :][:, :READ_BEHIND] = 0
    return logps, residual


def _scaled_and_capped(logits: Tensor, bias: Tensor | None, settings: HeadSettings) -> tuple[Tensor, Tensor | None]:
    """Scale and cap logits as the head does, in place where possible; return them and the slope of the cap."""
    if bias is not None:
        logits += bias.to(logits.dtype)
    if settings.logit_scale != 1.0:
        logits *= settings.logit_scale
    if settings.softcap is None:
        return logits, None
    capped = torch.tanh(logits / settings.softcap)
    return capped * settings.softcap, 1.0 - capped * capped


@triton.jit
def logprob_rows_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    coefficient_ptr,
    logps_ptr,
    residual_ptr,
    logits_stride,
    residual_stride,
    vocabulary,
    ignore_index,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,  # 0 for none
    HAS_BIAS: tl.constexpr,
    HAS_COEFFICIENT: tl.constexpr,
    WRITE_RESIDUAL: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    READ_BEHIND: tl.constexpr,
):
    """Process one row (a program): an online maximum and sum for each column of the block, then the residual over the logits."""
    row = tl.program_id(0).to(tl.int64)  # rows x V may exceed 2^31
    logits_ptr += row * logits_stride
    target = tl.load(targets_ptr + row)
    counted = target != ignore_index
    largest = tl.full((BLOCK,), float("-inf"), ACC)
    total = tl.zeros((BLOCK,), ACC)
    at_target = tl.zeros((BLOCK,), ACC)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        x = _logit(logits_ptr, bias_ptr, columns, inside, LOGIT_SCALE, SOFTCAP, HAS_BIAS, ACC)
        at_target += tl.where(columns == target, x, 0.0)
        x = tl.where(inside, x, float("-inf"))
        new = tl.maximum(largest, x)
        shift = tl.where(new == float("-inf"), 0.0, new)  # of a column that is outside in every block
        total = total * tl.exp(largest - shift) + tl.exp(x - shift)
        largest = new
    top = tl.max(largest, 0)
    lse = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    # Rounding may put a certain token a hair above 0; a log-probability never is.
    logp = tl.minimum(tl.sum(at_target, 0) - lse, 0.0)
    tl.store(logps_ptr + row, tl.where(counted, logp, 0.0))
    if WRITE_RESIDUAL:
        residual_ptr += row * residual_stride
        factor = tl.where(counted, 1.0, 0.0).to(ACC) * LOGIT_SCALE
        if HAS_COEFFICIENT:
            factor *= tl.load(coefficient_ptr + row).to(ACC)
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            x = _logit(logits_ptr, bias_ptr, columns, inside, LOGIT_SCALE, SOFTCAP, HAS_BIAS, ACC)
            residual = (tl.where(columns == target, 1.0, 0.0) - tl.exp(x - lse)) * factor
            if SOFTCAP != 0.0:
                residual *= 1.0 - (x / SOFTCAP) * (x / SOFTCAP)
            # In bf16 the residual takes the first half of the row's logits: all threads have read before one writes.
            tl.debug_barrier()
            tl.store(residual_ptr + columns, residual.to(residual_ptr.dtype.element_ty), mask=inside)
        if residual_ptr.dtype.element_ty != logits_ptr.dtype.element_ty:
            # Zeros behind the row, as `_rows_torch` writes them: where the device is simulated, its products run on a CPU.
            behind = tl.arange(0, READ_BEHIND)
            tl.store(residual_ptr + vocabulary + behind, 0.0, mask=behind < vocabulary)


@triton.jit
def _logit(
    logits_ptr,
    bias_ptr,
    columns,
    inside,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
):
    x = tl.load(logits_ptr + columns, mask=inside, other=0.0).to(ACC)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(ACC)
    x *= LOGIT_SCALE
    if SOFTCAP != 0.0:
        x = SOFTCAP * (2.0 / (1.0 + tl.exp(-2.0 / SOFTCAP * x)) - 1.0)  # tanh; where exp overflows, -1
    return x


def _rows_triton(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    settings: HeadSettings,
    residual_dtype: torch.dtype | None,
    coefficient: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    rows, vocabulary = logits.shape
    logps = logits.new_empty(rows)
    residual = logits if residual_dtype is None else logits.view(residual_dtype)[:, :vocabulary]
    logprob_rows_kernel[(rows,)](
        logits,
        None if bias is None else bias.contiguous(),
        targets.contiguous(),
        None if coefficient is None else coefficient.contiguous(),  # of a sum it is one number, expanded
        logps,
        residual,
        logits.stride(0),
        residual.stride(0),
        vocabulary,
        settings.ignore_index,
        LOGIT_SCALE=settings.logit_scale,
        SOFTCAP=settings.softcap or 0.0,
        HAS_BIAS=bias is not None,
        HAS_COEFFICIENT=coefficient is not None,
        WRITE_RESIDUAL=residual_dtype is not None,
        ACC=accumulator(logits.dtype),
        BLOCK=min(BLOCK, triton.next_power_of_2(vocabulary)),
        READ_BEHIND=READ_BEHIND,
        num_warps=8,
    )
    return logps, None if residual_dtype is None else residual


def head_logits(hidden: Tensor, weight: Tensor, buffer: Tensor | None = None) -> Tensor:
    """Compute h W^T [n, V] in fp32 (fp64 for fp64) whatever the inputs' type, so that no logit is rounded to 16 bits.

    Args:
        hidden: [n, D].
        weight: [V, D]; of halves a GPU multiplies halves and sums in fp32, a CPU converts some rows at a time.
        buffer: [m, V] with m >= n, whose first n rows become the result; default: new memory.
    """
    dtype, rows = _compute_dtype(hidden), len(hidden)
    out = hidden.new_empty(rows, len(weight), dtype=dtype) if buffer is None else buffer[:rows]
    if _multiplies_halves(weight):
        return torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=dtype, out=out)
    wide = hidden.to(dtype)
    if weight.is_cuda:
        return torch.mm(wide, weight.to(dtype).T, out=out)
    if dtype == torch.float64:
        return torch.mm(wide, weight.to(dtype).T.contiguous(), out=out)  # so laid out, like rows mostly get like sums
    for start in range(0, len(weight), COLUMNS):
        part = slice(start, start + COLUMNS)
        out[:, part] = linear(wide, weight[part].to(dtype))
    return out


def _multiplies_halves(weight: Tensor) -> bool:
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to total in place, summed in total's type."""
    if a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    for start in range(0, len(total), COLUMNS):  # some rows at a time: on a CPU the product needs a buffer
        part = slice(start, start + COLUMNS)
        add_product(total[part], a[part], b)


def _chunks(rows: int, weight: Tensor) -> list[slice]:
    elements, min_rows = (GPU_CHUNK_ELEMENTS, 1) if weight.is_cuda else (CHUNK_ELEMENTS, LEAST_CHUNK_ROWS)
    size = max(min_rows, elements // max(1, len(weight)))
    if size > 128:
        size -= size % 128  # whole tiles of the GEMM
    return [slice(start, start + size) for start in range(0, rows, size)]


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
